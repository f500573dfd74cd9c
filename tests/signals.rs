//! Symbols as real signals: files that the Python world made, what is drawn of them, and whole runs.

mod common;
#[path = "common/place.rs"]
mod place;

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use place::{Place, metrics, summary};
use selectivbench::config::load::parse;
use selectivbench::config::{Auto, Config, Encoding, TaskConfig};
use selectivbench::task::recordings::mfcc::{COEFFICIENTS, FRAMES, Mfcc, RATE};
use selectivbench::task::recordings::{Recordings, speech, spikes};
use selectivbench::task::{BLANK, PAD, Part, Task};
use tempfile::TempDir;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/signals").join(name)
}

fn tensor(file: &str, name: &str) -> Tensor {
    candle_core::safetensors::load(golden(file), &Device::Cpu).unwrap().remove(name).unwrap()
}

fn samples_of(path: &Path) -> Vec<f32> {
    let mut reader = hound::WavReader::open(path).unwrap();
    reader.samples::<i16>().map(|sample| f32::from(sample.unwrap()) / 32768.0).collect()
}

/// Two symbols, `#` and A, whose four states are told apart by their past.
const TWO: &str = "
seed: 3
task:
  preset: task2
  ambiguities: 1
  depth: 4
  density: 1.5
  length: 6
  string: {max: 12}
  gap: {low: 0.1, high: 0.3}
  test_gap: 0.2
  noise: 0
  samples: {train: 48, validation: 6, test: 6}
model: {name: gated_delta_net, layers: 1, width: 16}
train: {batch: 8, lr: 0.01, warmup: 2, eval_every: 24, save_every: 2, log_every: 1, eval_batch: 4, eval_chunk: 37}
";

fn config(sets: &[String]) -> Config {
    parse(TWO, "test", sets).unwrap()
}

fn encoding(name: &str, data: &Path) -> Vec<String> {
    vec![format!("task.encoding={name}"), format!("task.data={}", data.display())]
}

/// A folder with the files of a spiking data set, all of them `file`.
fn spiking(set: &spikes::Set, file: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, ..) in set.files {
        fs::copy(golden(file), dir.path().join(name)).unwrap();
    }
    dir
}

/// A folder of the layout of Speech Commands: of each word three files to train on, two to validate and two to test
/// on, each of another pitch and length.
fn speaking() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let (mut validation, mut testing) = (String::new(), String::new());
    for (w, word) in speech::WORDS.iter().enumerate() {
        fs::create_dir(dir.path().join(word)).unwrap();
        for i in 0..7 {
            let name = format!("{word}/{i:08x}_nohash_0.wav");
            let spec = hound::WavSpec {
                channels: 1,
                sample_rate: RATE as u32,
                bits_per_sample: 16,
                sample_format: hound::SampleFormat::Int,
            };
            let mut file = hound::WavWriter::create(dir.path().join(&name), spec).unwrap();
            let pitch = 150.0 + 90.0 * w as f32 + 7.0 * i as f32;
            for t in 0..800 + 100 * i {
                let phase = 2.0 * std::f32::consts::PI * pitch * t as f32 / RATE as f32;
                file.write_sample((9000.0 * phase.sin()) as i16).unwrap();
            }
            file.finalize().unwrap();
            match i {
                1 | 4 => validation += &format!("{name}\n"),
                2 | 6 => testing += &format!("{name}\n"),
                _ => {}
            }
        }
    }
    fs::create_dir(dir.path().join("_background_noise_")).unwrap();
    fs::write(dir.path().join("validation_list.txt"), validation).unwrap();
    fs::write(dir.path().join("testing_list.txt"), testing).unwrap();
    dir
}

fn load(sets: &[String], symbols: usize) -> anyhow::Result<Recordings> {
    Ok(Recordings::load(&config(sets).task, symbols)?.expect("an encoding with recordings"))
}

/// All frames of a recording, one after the other.
fn frames(recordings: &Recordings, recording: u32) -> Vec<f32> {
    let (frames, channels) = (recordings.frames(), recordings.table().channels());
    let mut x = vec![0.0; frames * channels];
    for (i, row) in x.chunks_exact_mut(channels).enumerate() {
        recordings.table().add_row(recording as usize * frames + i, row);
    }
    x
}

const PARTS: [Part; 3] = [Part::Train, Part::Validation, Part::Test];

#[test]
fn coefficients_are_those_of_librosa() {
    let got = Mfcc::default().of(&samples_of(&golden("word.wav")));
    let want = tensor("mfcc.safetensors", "mfcc");
    assert_eq!(want.dims(), [FRAMES, COEFFICIENTS]);
    let want: Vec<f32> = want.flatten_all().unwrap().to_vec1().unwrap();
    let off = got.iter().zip(&want).map(|(got, want)| (got - want).abs()).fold(0.0, f32::max);
    assert!(got.len() == want.len() && off < 1e-4, "off by {off}");
    assert!(want.iter().any(|x| x.abs() > 100.0));
    // What is longer than a second is cut, and silence has the lowest energy in every band.
    let long = vec![0.25; RATE + 999];
    assert_eq!(Mfcc::default().of(&long), Mfcc::default().of(&long[..RATE]));
    let silence = Mfcc::default().of(&[]);
    let lowest = -100.0 * 40f32.sqrt();
    assert!(silence.chunks(COEFFICIENTS).all(|row| (row[0] - lowest).abs() < 1e-3 && row[1].abs() < 1e-3));
}

/// Files of PyTables, which made the published ones, and of h5py: the same counts as with numpy.
#[test]
fn spikes_are_binned_as_by_numpy() {
    let bins = tensor("bins.safetensors", "bins").to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap();
    let dense = |row: usize| {
        let mut x = vec![0.0; spikes::FRAMES * spikes::CHANNELS];
        for bin in bins.iter().filter(|bin| bin[0] as usize == row) {
            x[bin[1] as usize * spikes::CHANNELS + bin[2] as usize] = bin[3] as f32;
        }
        x
    };
    assert!(bins.iter().any(|bin| bin[3] > 1.0));
    for file in ["spikes_tables.h5", "spikes_h5py.h5"] {
        let dir = spiking(&spikes::SHD, file);
        let shd = load(&encoding("shd", dir.path()), 2).unwrap();
        assert_eq!((shd.frames(), shd.table().channels()), (140, 700));
        // Rows of label 0 and of label 1; the first of each is held out for validation.
        let rows = [[vec![2, 4, 7], vec![3, 5, 6]], [vec![0], vec![1]], [vec![0, 2, 4, 7], vec![1, 3, 5, 6]]];
        for (part, rows) in PARTS.into_iter().zip(rows) {
            for (symbol, rows) in (0..).zip(rows) {
                let got: Vec<Vec<f32>> =
                    shd.of(part, symbol).map(|recording| frames(&shd, recording)).collect();
                let want: Vec<Vec<f32>> = rows.into_iter().map(dense).collect();
                assert!(got == want, "{file}, {part:?}, symbol {symbol}");
            }
        }
        let few = load(&[encoding("shd", dir.path()), vec!["task.recordings=2".into()]].concat(), 2).unwrap();
        assert_eq!(few.of(Part::Test, 1).len(), 2);
        assert_eq!(frames(&few, few.of(Part::Test, 1).start), dense(1));
        assert_ne!(few.fingerprint(), shd.fingerprint());
    }
}

#[test]
fn vectors_are_shown_as_they_are() {
    let file = golden("vectors.safetensors");
    let recordings = load(&encoding("vectors", &file), 5).unwrap();
    assert_eq!((recordings.frames(), recordings.table().channels()), (2, 4));
    for (part, name) in PARTS.into_iter().zip(["train", "validation", "test"]) {
        let want = tensor("vectors.safetensors", name);
        for symbol in 0..5 {
            let want = want.get(symbol as usize).unwrap();
            let got = recordings.of(part, symbol);
            assert_eq!(got.len(), want.dim(0).unwrap());
            for (i, recording) in got.enumerate() {
                let want: Vec<f32> = want.get(i).unwrap().flatten_all().unwrap().to_vec1().unwrap();
                assert_eq!(frames(&recordings, recording), want);
            }
        }
    }
    // One vector a symbol, for all parts.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("one.safetensors");
    let one = Tensor::new(&[[1f32, 2.0, 3.0], [4.0, 5.0, 6.0]], &Device::Cpu).unwrap();
    one.save_safetensors("vectors", &file).unwrap();
    let recordings = load(&encoding("vectors", &file), 2).unwrap();
    assert_eq!((recordings.frames(), recordings.table().channels()), (1, 3));
    assert_eq!(frames(&recordings, recordings.of(Part::Test, 1).start), [4.0, 5.0, 6.0]);
}

#[test]
fn words_are_parted_by_the_lists_and_put_on_one_scale() {
    let dir = speaking();
    let gsc = load(&encoding("gsc", dir.path()), 3).unwrap();
    for (part, files) in PARTS.into_iter().zip([&[0, 3, 5][..], &[1, 4], &[2, 6]]) {
        for symbol in 0..3 {
            assert_eq!(gsc.of(part, symbol).len(), files.len());
        }
    }
    // One recording against its own file, on the scale of all.
    let mfcc = Mfcc::default();
    let raw = |word: usize, i: usize| {
        let path = dir.path().join(speech::WORDS[word]).join(format!("{i:08x}_nohash_0.wav"));
        mfcc.of(&samples_of(&path))
    };
    let trained: Vec<Vec<f32>> =
        (0..3).flat_map(|word| [0, 3, 5].map(|i| (word, i))).map(|(word, i)| raw(word, i)).collect();
    let (got, want) = (frames(&gsc, gsc.of(Part::Test, 2).start + 1), raw(2, 6));
    for c in 0..COEFFICIENTS {
        let column = |x: &Vec<f32>| x.iter().skip(c).step_by(COEFFICIENTS).map(|&x| f64::from(x)).collect();
        let all: Vec<f64> = trained.iter().flat_map(|x| -> Vec<f64> { column(x) }).collect();
        let mean = all.iter().sum::<f64>() / all.len() as f64;
        let deviation = (all.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / all.len() as f64).sqrt();
        let want: Vec<f64> = column(&want);
        for (got, want) in column(&got).into_iter().zip(want) {
            let got: f64 = got;
            assert!((got - (want - mean) / deviation).abs() < 1e-4, "coefficient {c}");
        }
    }
}

/// Every step of samples with gaps and with distractors against the table, whatever the pieces that they come in.
#[test]
fn steps_show_the_recordings_that_were_drawn() {
    let dir = spiking(&spikes::SHD, "spikes_h5py.h5");
    let vectors = encoding("vectors", &golden("vectors.safetensors"));
    let distractors = ["task.gap.kind=distractor", "task.ambiguities=4", "task.depth=2", "task.gap.high=0.2"];
    for (sets, more) in [
        (encoding("shd", dir.path()), &[][..]),
        (vectors.clone(), &["task.noise=0.3"]),
        (vectors, &distractors),
    ] {
        let sets = [sets, more.iter().map(|set| set.to_string()).collect()].concat();
        let config = config(&sets);
        let task = Task::new(&config.task, 3).unwrap();
        let recordings = task.recordings().unwrap();
        let (frames, channels) = (recordings.frames(), task.features());
        let symbols = Task::of_symbols(&config.task, 3).unwrap();
        for (part, piece) in PARTS.into_iter().zip([7, 50, usize::MAX]) {
            let mut samples = task.samples(part, 2, 4, None).unwrap();
            let list = samples.as_slice().to_vec();
            let single = task.samples(part, 3, 1, None).unwrap();
            assert_eq!(single.as_slice(), &list[1..2], "a sample depends on its index alone");
            let alone = symbols.samples(part, 2, 4, None).unwrap();
            for (own, alone) in list.iter().zip(alone.as_slice()) {
                assert_eq!(
                    (&own.states, &own.gaps, &own.distractors),
                    (&alone.states, &alone.gaps, &alone.distractors)
                );
                let each = if own.distractors.is_empty() { 1 } else { frames };
                let gaps = own.gaps.iter().sum::<u32>() as usize;
                assert_eq!(own.steps(), own.states.len() * frames + gaps * each);
            }
            let mut whole = task.batch(part, 2, 4, None).unwrap();
            let noise = whole.noise.take();
            let dense = whole.dense();
            for (b, sample) in list.iter().enumerate() {
                let of = |symbols: &[u32], drawn: &[u32]| {
                    let own =
                        |(&symbol, recording): (&u32, &u32)| recordings.of(part, symbol).contains(recording);
                    symbols.len() == drawn.len() && symbols.iter().zip(drawn).all(own)
                };
                assert!(of(&sample.symbols, &sample.recordings));
                assert!(of(&sample.distractors, &sample.distractor_recordings));
                let mut shown = sample.distractors.iter().zip(&sample.distractor_recordings);
                let mut t = b * whole.steps;
                let mut check = |symbol: u32, recording: u32, element: u32, distractor: bool, gap: u32| {
                    for i in 0..frames + gap as usize {
                        let mut row = vec![0.0; channels];
                        if i < frames {
                            recordings.table().add_row(recording as usize * frames + i, &mut row);
                        }
                        assert_eq!(dense[t * channels..][..channels], row);
                        assert_eq!(whole.symbols[t], if i < frames { symbol } else { BLANK });
                        let asked = distractor || i + 1 >= frames;
                        assert_eq!(whole.element[t], if asked { element } else { PAD });
                        assert_eq!(whole.labels[t], sample.labels[element as usize]);
                        assert_eq!(whole.distractor[t], distractor);
                        t += 1;
                    }
                };
                let blank = sample.distractors.is_empty();
                for e in 0..sample.states.len() {
                    let gap = if blank { sample.gaps[e] } else { 0 };
                    check(sample.symbols[e], sample.recordings[e], e as u32, false, gap);
                    for _ in 0..if blank { 0 } else { sample.gaps[e] } {
                        let (&symbol, &recording) = shown.next().unwrap();
                        check(symbol, recording, e as u32, true, 0);
                    }
                }
                assert_eq!(t, b * whole.steps + sample.steps());
            }
            let asked: usize = list.iter().map(|s| s.states.len() + s.behind().sum::<usize>()).sum();
            assert_eq!(whole.asked_steps(), asked);
            assert_eq!(more.len() == 4, list.iter().any(|sample| !sample.distractors.is_empty()));
            whole.noise = noise;
            let dense = whole.dense();
            let mut at = 0;
            while let Some(window) = samples.next_window(piece) {
                let x = window.dense();
                for b in 0..4 {
                    let rows = b * whole.steps + at..b * whole.steps + at + window.steps;
                    assert_eq!(
                        window.element[b * window.steps..][..window.steps],
                        whole.element[rows.clone()]
                    );
                    assert_eq!(
                        window.symbols[b * window.steps..][..window.steps],
                        whole.symbols[rows.clone()]
                    );
                    let row = &dense[rows.start * channels..rows.end * channels];
                    assert!(x[b * window.steps * channels..][..row.len()] == *row);
                }
                at += window.steps;
            }
            assert_eq!(at, whole.steps);
        }
    }
}

/// Recordings are drawn anew every time, all of them sooner or later, and apart from the symbols.
#[test]
fn recordings_are_drawn_evenly() {
    let config = config(&encoding("vectors", &golden("vectors.safetensors")));
    let task = Task::new(&config.task, 3).unwrap();
    let recordings = task.recordings().unwrap();
    let samples = task.samples(Part::Train, 0, 500, None).unwrap();
    let mut counts = [0usize; 3];
    for sample in samples.as_slice() {
        for (&symbol, recording) in sample.symbols.iter().zip(&sample.recordings) {
            counts[(recording - recordings.of(Part::Train, symbol).start) as usize] += 1;
        }
    }
    assert_eq!(counts.iter().sum::<usize>(), 3000);
    assert!(counts.iter().all(|count| (900..1100).contains(count)), "{counts:?}");
    let ceiling = |task: &Task| task.ceiling(0.2).unwrap();
    assert_eq!(ceiling(&task), ceiling(&Task::of_symbols(&config.task, 3).unwrap()));
    let hash = |recordings: usize| {
        let config = TaskConfig { recordings: Auto::Value(recordings), ..config.task.clone() };
        Task::new(&config, 3).unwrap().data_hash().unwrap()
    };
    assert_ne!(hash(1), hash(2));
    // Where the files lie is of no account; what is in them is.
    let dir = tempfile::tempdir().unwrap();
    let moved = dir.path().join("moved.safetensors");
    fs::copy(golden("vectors.safetensors"), &moved).unwrap();
    let config = TaskConfig { data: moved.display().to_string(), ..config.task };
    assert_eq!(Task::new(&config, 3).unwrap().data_hash().unwrap(), task.data_hash().unwrap());
}

/// Trains, is tested in pieces, inspected, exported and looked at through the command line, with every encoding.
#[test]
fn every_encoding_runs_end_to_end() {
    let [gsc, shd, ssc] =
        [speaking(), spiking(&spikes::SHD, "spikes_tables.h5"), spiking(&spikes::SSC, "spikes_h5py.h5")];
    let one_hot: Vec<String> = vec!["task.encoding=one_hot".into()];
    let all = [
        ("one_hot", one_hot, 2),
        ("gsc", encoding("gsc", gsc.path()), 13),
        ("shd", encoding("shd", shd.path()), 700),
        ("ssc", encoding("ssc", ssc.path()), 700),
        ("vectors", encoding("vectors", &golden("vectors.safetensors")), 4),
    ];
    let place = Place::new(TWO);
    let mut ceilings = vec![];
    for (name, sets, features) in &all {
        let with = |args: &[&str]| -> Vec<String> {
            let sets = sets.iter().flat_map(|set| ["--set".to_string(), set.clone()]);
            args.iter().map(|arg| arg.to_string()).chain(sets).collect()
        };
        let ok = |args: Vec<String>| place.ok(&args.iter().map(String::as_str).collect::<Vec<_>>());
        ok(with(&["train", "tiny.yaml", "--out", name]));
        let end = summary(&place.path(name));
        assert!(end["loss"].as_f64().unwrap().is_finite(), "{name}");
        ceilings.push(end["ceiling"].as_f64().unwrap());
        let losses: Vec<f64> = metrics(&place.path(name))
            .iter()
            .filter(|record| record["split"] == "train")
            .map(|record| record["loss"].as_f64().unwrap())
            .collect();
        assert_eq!(losses.len(), 6, "{name}");
        assert!(losses[5] < losses[0], "{name}: {losses:?}");

        // In one piece as in pieces.
        let test = |chunk: &str| {
            ok(["eval", name, "--json", "eval.json", "--chunk", chunk].map(String::from).into());
            let text = fs::read_to_string(place.path("eval.json")).unwrap();
            find(&serde_json::from_str(&text).unwrap(), "loss").unwrap_or_else(|| panic!("no loss in {text}"))
        };
        let (whole, pieces) = (test("100000"), test("11"));
        assert!((whole - pieces).abs() < 1e-5 * whole, "{name}: {whole} in one piece, {pieces} in pieces");
        assert!((whole - end["loss"].as_f64().unwrap()).abs() < 1e-5 * whole, "{name}");

        ok(vec!["inspect".into(), name.to_string(), "--out".into(), format!("look-{name}")]);
        ok(vec!["inspect".into(), name.to_string(), "--text".into(), "A0.. A1 #".into(), "--json".into()]);
        ok(with(&["data", "show", "tiny.yaml", "--picture", &format!("{name}.svg")]));
        let stats = ok(with(&["data", "stats", "tiny.yaml", "--json"]));
        let stats: serde_json::Value = serde_json::from_str(&stats).unwrap();
        assert_eq!((&stats["features"], &stats["encoding"]), (&(*features).into(), &(*name).into()));
        ok(with(&[
            "data",
            "export",
            "tiny.yaml",
            "--format",
            "safetensors",
            "--out",
            &format!("data-{name}"),
        ]));
        let x = common::noise(5, &[2, 9, *features]).to_dtype(DType::F32).unwrap();
        x.save_safetensors("x", place.path("x.safetensors")).unwrap();
        ok(["predict", name, "--input", "x.safetensors", "--output", "y.safetensors"]
            .map(String::from)
            .into());

        // Killed after an update, it ends with the same bits.
        ok(with(&["train", "tiny.yaml", "--out", &format!("{name}-again"), "--threads", "1"]));
        place::same_end(&place.path(name), &place.path(&format!("{name}-again")));
    }
    assert!(ceilings.iter().all(|&ceiling| ceiling == ceilings[0]), "{ceilings:?}");

    // The next symbol too, in pieces that end within recordings, with its divergence from the ideal.
    let sets =
        [encoding("vectors", &golden("vectors.safetensors")), vec!["task.objective=predict".into()]].concat();
    let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    place.ok(&[&["train", "tiny.yaml", "--out", "predict", "--set", "train.eval_chunk=3"], &sets[..]].concat());
    place
        .ok(&[&["train", "tiny.yaml", "--out", "at-once", "--set", "train.eval_chunk=9999"], &sets[..]]
            .concat());
    let [kl, whole] = ["predict", "at-once"].map(|run| summary(&place.path(run))["kl"].as_f64().unwrap());
    assert!((kl - whole).abs() < 1e-6 && kl >= 0.0, "{kl} in pieces, {whole} at once");
}

/// The first number with that key, anywhere in a value.
fn find(value: &serde_json::Value, key: &str) -> Option<f64> {
    match value {
        serde_json::Value::Object(map) => map
            .get(key)
            .and_then(serde_json::Value::as_f64)
            .or_else(|| map.values().find_map(|value| find(value, key))),
        serde_json::Value::Array(list) => list.iter().find_map(|value| find(value, key)),
        _ => None,
    }
}

#[test]
fn configurations_of_signals_name_their_data() {
    for name in ["gsc", "shd", "ssc", "vectors"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("configs/signals_{name}.yaml"));
        let config = selectivbench::config::load::load(&path, &[]).unwrap();
        assert_eq!(config.task.encoding.name(), name);
        let task = Task::of_symbols(&config.task, config.seed).unwrap();
        assert!(task.grammar().alphabet() <= 9);
        let bare = parse("task: {encoding: shd, ambiguities: 8}", "test", &[]).unwrap();
        assert_eq!((bare.task.encoding, bare.task.data.as_str()), (Encoding::Shd, "data/shd"));
    }
}

/// What is missing or wrong is told in a sentence, before anything is written.
#[test]
fn bad_recordings_are_refused() {
    let say = |sets: &[String]| format!("{:#}", Task::new(&config(sets).task, 3).map(|_| ()).unwrap_err());
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let shown = dir.path().display();

    assert!(
        say(&encoding("gsc", &path("none")))
            .contains("which is no folder; it must be the one of the data set")
    );
    assert!(say(&encoding("gsc", dir.path())).contains("validation_list.txt, which says what is held out"));
    let words = speaking();
    fs::remove_dir_all(words.path().join("no")).unwrap();
    assert!(
        say(&encoding("gsc", words.path())).contains("has no folder `no`; it must hold one for every word")
    );
    fs::create_dir(words.path().join("no")).unwrap();
    assert!(
        say(&encoding("gsc", words.path()))
            .contains("holds no train recording of the word `no`, which stands for the symbol A")
    );
    fs::write(words.path().join("yes/00000000_nohash_0.wav"), "RIFF").unwrap();
    let words = speaking();
    fs::write(words.path().join("yes/00000000_nohash_0.wav"), "RIFF").unwrap();
    assert!(say(&encoding("gsc", words.path())).contains("00000000_nohash_0.wav is no whole WAV file"));
    let spec = hound::WavSpec {
        channels: 2,
        sample_rate: 8000,
        bits_per_sample: 24,
        sample_format: hound::SampleFormat::Int,
    };
    let wav = words.path().join("yes/00000000_nohash_0.wav");
    hound::WavWriter::create(&wav, spec).unwrap().finalize().unwrap();
    assert!(
        say(&encoding("gsc", words.path()))
            .contains("has 2 channels of 24 bits at 8000 Hz; it must have 1 of 16 bits")
    );

    assert_eq!(
        say(&encoding("shd", dir.path())),
        format!(
            "{shown}/shd_train.h5 is missing; `selectivbench data fetch shd` says where to get it and how to unpack it"
        )
    );
    fs::write(path("shd_train.h5"), "no HDF5").unwrap();
    assert!(say(&encoding("shd", dir.path())).contains("shd_train.h5 is no whole HDF5 file"));
    let whole = fs::read(golden("spikes_tables.h5")).unwrap();
    fs::copy(golden("spikes_tables.h5"), path("shd_test.h5")).unwrap();
    // Cut anywhere, a file is refused or read right, and never panics.
    for length in (0..whole.len()).step_by(397) {
        fs::write(path("shd_train.h5"), &whole[..length]).unwrap();
        assert!(!say(&encoding("shd", dir.path())).is_empty());
    }
    fs::write(path("shd_train.h5"), &whole).unwrap();
    let three = [encoding("shd", dir.path()), vec!["task.ambiguities=2".into()]].concat();
    assert!(say(&three).contains("has no train recording of label 2, which stands for the symbol B"));

    let file = path("v.safetensors");
    assert!(say(&encoding("vectors", &file)).contains("cannot read the vectors that task.data names,"));
    fs::write(&file, "no tensors").unwrap();
    assert!(say(&encoding("vectors", &file)).contains("is no whole safetensors file"));
    let save = |name: &str, values: &[f32], shape: &[usize]| {
        Tensor::from_slice(values, shape, &Device::Cpu).unwrap().save_safetensors(name, &file).unwrap();
    };
    save("train", &[0.0; 4], &[2, 2]);
    assert!(
        say(&encoding("vectors", &file))
            .contains("holds no tensor `validation`, nor one `vectors` for all parts")
    );
    save("vectors", &[0.0; 4], &[4]);
    assert!(
        say(&encoding("vectors", &file))
            .contains("has shape [4]; it must be (symbols, recordings, frames, channels)")
    );
    save("vectors", &[0.0; 4], &[1, 4]);
    assert!(say(&encoding("vectors", &file)).contains("holds vectors of 1 symbols; the task has 2"));
    save("vectors", &[0.0, f32::NAN, 0.0, 0.0], &[2, 2]);
    assert!(say(&encoding("vectors", &file)).contains("holds NaN; vectors must be finite"));
    save("vectors", &[0.0; 8], &[2, 1, 4, 1]);
    let long = [encoding("vectors", &file), vec!["task.gap.high=0".into(), "task.gap.low=0".into()]].concat();
    let long = [long, vec!["task.length=5000000".into(), "task.test_gap=0".into()]].concat();
    assert!(say(&long).contains("recordings of 4 frames make sequences of up to 20000000 timesteps"));

    let place = Place::new(TWO);
    place.refuses(
        &["train", "tiny.yaml", "--out", "run", "--set", "task.encoding=gsc"],
        "task.data is data/gsc, which",
    );
    let as_released = parse(TWO, "test", &["task.encoding=gsc".into(), "task.split=as-released".into()]);
    assert!(as_released.unwrap_err().to_string().contains("as-released, which draws one_hot symbols only"));
}

#[test]
fn fetch_says_where_and_what_is_missing() {
    let place = Place::new(TWO);
    let (words, digits) = (speaking(), spiking(&spikes::SHD, "spikes_tables.h5"));
    for (name, address, missing) in [
        ("gsc", "speech_commands_v0.02.tar.gz", "data/gsc is missing"),
        ("shd", "https://zenkelab.org/datasets/shd_train.h5.zip", "data/shd is missing"),
        ("ssc", "https://zenkelab.org/datasets/ssc_valid.h5.zip", "data/ssc is missing"),
    ] {
        place.refuses(&["data", "fetch", name], missing);
        let output = place.command(&["data", "fetch", name]).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains(address) && text.contains("unpack there"), "{text}");
    }
    let dir = |dir: &TempDir| dir.path().display().to_string();
    let out = place.ok(&["data", "fetch", "gsc", "--dir", &dir(&words)]);
    assert!(out.contains("can be used: 245 recordings of 35 words"), "{out}");
    let out = place.ok(&["data", "fetch", "shd", "--dir", &dir(&digits)]);
    assert!(out.contains("shd_train.h5: 8 recordings, 8156 as published"), "{out}");
    fs::write(digits.path().join("shd_test.h5.zip"), "half").unwrap();
    place.refuses(&["data", "fetch", "shd", "--dir", &dir(&digits)], "shd_test.h5.zip has the md5 ");
    fs::remove_file(digits.path().join("shd_test.h5.zip")).unwrap();
    fs::remove_file(digits.path().join("shd_test.h5")).unwrap();
    place.refuses(&["data", "fetch", "shd", "--dir", &dir(&digits)], "shd_test.h5 is missing");
    fs::remove_file(words.path().join("cat/00000002_nohash_0.wav")).unwrap();
    place.refuses(
        &["data", "fetch", "gsc", "--dir", &dir(&words)],
        "lacks cat/00000002_nohash_0.wav, which testing_list.txt names",
    );
}
