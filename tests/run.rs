//! Whole runs through the command line: train, die, resume, evaluate; import, predict, export; the
//! weather that a run can meet.

mod common;
#[path = "common/place.rs"]
mod place;

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use common::{Golden, relative_rms};
use place::{Place, metrics, same_end, summary};
use selectivbench::model::MODELS;
use serde_json::Value;

/// A model that trains in seconds on a task with gaps and noise.
const TINY: &str = "
seed: 3
task:
  preset: task2
  ambiguities: 4
  depth: 3
  length: 12
  gap: {low: 0.1, high: 0.3}
  test_gap: 0.2
  samples: {train: 1200, validation: 20, test: 40}
model: {name: gated_delta_net, layers: 2, width: 16, state: 8}
train: {batch: 8, lr: 0.01, warmup: 10, eval_every: 160, save_every: 1, log_every: 1, eval_batch: 16}
";

#[test]
fn a_killed_run_ends_as_an_uninterrupted_one() {
    let place = Place::new(TINY);
    place.ok(&["train", "tiny.yaml", "--out", "whole"]);
    let train = ["train", "tiny.yaml", "--out", "killed", "--resume"];
    // The state is written after every update, so that some of the kills fall into a write.
    let mut kills = 0;
    let mut wait = 20;
    while !place.path("killed/summary.json").exists() {
        let mut child = place.command(&train).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        // Longer every time: the run must come to its end.
        let deadline = Instant::now() + Duration::from_millis(wait);
        wait += 13;
        while Instant::now() < deadline && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        kills += usize::from(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        let Output { status, stderr, .. } = child.wait_with_output().unwrap();
        // Killed or at its end: no kill may leave anything that the next run refuses.
        assert!(status.code().is_none_or(|code| code == 0), "{}", String::from_utf8_lossy(&stderr));
    }
    assert!(kills >= 3, "only {kills} kills: the run is too short for this test");
    same_end(&place.path("whole"), &place.path("killed"));
    let left: Vec<_> = fs::read_dir(place.path("killed")).unwrap().flatten().map(|e| e.file_name()).collect();
    // What kills left half-written is swept up by the next run; the last one was not killed.
    assert!(left.iter().all(|name| !name.to_string_lossy().starts_with(".unfinished")), "{left:?}");
    // Killed before the first file: nothing to go on from, nothing in the way.
    fs::create_dir(place.path("early")).unwrap();
    fs::write(place.path("early/.lock"), "").unwrap();
    fs::write(place.path("early/.unfinished-1"), "half").unwrap();
    place.ok(&["train", "tiny.yaml", "--out", "early", "--resume"]);
    same_end(&place.path("whole"), &place.path("early"));
    // A resume of a finished run changes nothing.
    place.ok(&train);
    same_end(&place.path("whole"), &place.path("killed"));
}

#[test]
fn the_configuration_in_a_run_directory_repeats_the_run() {
    let place = Place::new(TINY);
    place.ok(&["train", "tiny.yaml", "--out", "a", "--threads", "1"]);
    place.ok(&["train", "a/config.yaml", "--out", "b", "--threads", "2"]);
    same_end(&place.path("a"), &place.path("b"));
    let yaml = |run: &str| fs::read_to_string(place.path(run).join("config.yaml")).unwrap();
    assert_eq!(yaml("a"), yaml("b"));
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_saves_and_says_how_to_go_on() {
    let place = Place::new(TINY);
    place.ok(&["train", "tiny.yaml", "--out", "whole"]);
    let mut child = place
        .command(&["train", "tiny.yaml", "--out", "stopped", "--set", "train.save_every=1"])
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    place.wait_for_state("stopped", &mut child);
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let status = child.wait().unwrap();
    let mut stderr = String::new();
    std::io::Read::read_to_string(child.stderr.as_mut().unwrap(), &mut stderr).unwrap();
    assert_eq!(status.code(), Some(130), "{stderr}");
    let command = "selectivbench train stopped/config.yaml --out stopped --resume";
    assert!(stderr.contains(command), "{stderr}");
    assert!(place.path("stopped/checkpoint.safetensors").exists());
    place.ok(&["train", "stopped/config.yaml", "--out", "stopped", "--resume"]);
    same_end(&place.path("whole"), &place.path("stopped"));
}

#[test]
fn next_symbol_prediction_from_training_to_report() {
    let place = Place::new(&TINY.replace("preset: task2", "preset: task2\n  objective: predict"));
    place.ok(&["train", "tiny.yaml", "--out", "whole", "--set", "task.eval_gaps=[0.5]"]);
    let mut child = place
        .command(&["train", "tiny.yaml", "--out", "killed", "--set", "task.eval_gaps=[0.5]"])
        .stderr(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    place.wait_for_state("killed", &mut child);
    child.kill().unwrap();
    child.wait().unwrap();
    place.ok(&["train", "killed/config.yaml", "--out", "killed", "--resume"]);
    same_end(&place.path("whole"), &place.path("killed"));

    // The model comes nearer to the ideal, and cannot do better.
    let lines = metrics(&place.path("whole"));
    let kl = |split: &str| {
        let of_split = lines.iter().filter(|line| line["split"] == split);
        of_split.map(|line| line["kl"].as_f64()).collect::<Vec<_>>()
    };
    let validation: Vec<f64> = kl("validation").into_iter().map(|kl| kl.expect("a divergence")).collect();
    assert!(validation.iter().all(|&kl| kl > 0.0) && kl("train").iter().all(Option::is_none));
    assert!(validation[validation.len() - 1] < 0.7 * validation[0], "{validation:?}");
    let number =
        |value: &Value, field: &str| value[field].as_f64().unwrap_or_else(|| panic!("{field} of {value}"));
    let end = summary(&place.path("whole"));
    assert_eq!(end["kl"], end["tests"][0]["kl"]);
    assert!(number(&end, "ceiling") < 0.95 && number(&end, "accuracy") < number(&end, "ceiling") + 0.1);

    // On 40 samples the loss is about the entropy of the next symbol and the divergence.
    let stats = place.ok(&["data", "stats", "tiny.yaml", "--json"]);
    let stats: Value = serde_json::from_str(&stats).unwrap();
    assert_eq!((&stats["objective"], &stats["classes"]), (&"predict".into(), &5.into()));
    let least = number(&stats, "next_symbol_entropy");
    assert!((number(&end, "loss") - number(&end, "kl") - least).abs() < 0.15, "{end}, {least}");
    assert!(place.ok(&["data", "show", "tiny.yaml"]).contains("the symbol to predict"));
    assert!(place.ok(&["inspect", "whole"]).contains("the symbol to predict"));
    place.ok(&["inspect", "whole", "--text", "A0. B0. #."]);
    place.refuses(&["inspect", "whole", "--text", "A0."], "at least two");

    // Pieces that cut windows change nothing.
    for (chunk, file) in [("4096", "whole.json"), ("7", "pieces.json")] {
        let table = place.ok(&["eval", "whole", "--gap", "0.2,0.5", "--json", file, "--chunk", chunk]);
        assert!(table.contains("KL") && table.contains("predict"), "{table}");
    }
    let read =
        |name: &str| -> Vec<Value> { serde_json::from_slice(&fs::read(place.path(name)).unwrap()).unwrap() };
    for ((whole, pieces), test) in
        read("whole.json").iter().zip(&read("pieces.json")).zip(end["tests"].as_array().unwrap())
    {
        assert_eq!(whole["accuracy"], pieces["accuracy"]);
        assert!((number(whole, "kl") - number(pieces, "kl")).abs() < 1e-6);
        assert!((number(whole, "kl") - number(test, "kl")).abs() < 1e-6);
    }

    // As released the samples and the targets are others; the report keeps all apart.
    place.ok(&["train", "tiny.yaml", "--out", "released", "--set", "task.split=as-released"]);
    assert!(summary(&place.path("released"))["kl"].as_f64().unwrap() > 0.0);
    place.ok(&["train", "tiny.yaml", "--out", "named", "--set", "task.objective=classify"]);
    assert!(summary(&place.path("named")).get("kl").is_none());
    place.ok(&["report", "whole", "released", "named", "--out", "report"]);
    let text = fs::read_to_string(place.path("report/report.md")).unwrap();
    assert!(text.contains("objective classify") && text.contains("objective predict"), "{text}");
    assert!(text.contains("KL"), "{text}");
}

#[test]
fn evaluation_at_several_gaps_and_in_pieces() {
    let place = Place::new(TINY);
    place.ok(&["train", "tiny.yaml", "--out", "run", "--set", "task.eval_gaps=[0.2, 0.5]"]);
    place.ok(&["eval", "run", "--gap", "0.2,0.5,1,2", "--json", "whole.json", "--chunk", "4096"]);
    place.ok(&[
        "eval",
        "run/checkpoint.safetensors",
        "--gap",
        "0.2,0.5,1,2",
        "--json",
        "pieces.json",
        "--chunk",
        "7",
    ]);
    let read =
        |name: &str| -> Vec<Value> { serde_json::from_slice(&fs::read(place.path(name)).unwrap()).unwrap() };
    let (whole, pieces) = (read("whole.json"), read("pieces.json"));
    assert_eq!(whole.len(), 4);
    for (whole, pieces) in whole.iter().zip(&pieces) {
        let number = |row: &Value, field: &str| row[field].as_f64().unwrap();
        assert_eq!(whole["accuracy"], pieces["accuracy"]);
        assert!((number(whole, "loss") - number(pieces, "loss")).abs() < 1e-6);
        assert_eq!(number(whole, "timesteps"), 12.0 * (1.0 + 10.0 * number(whole, "gap")));
    }
    // The run's own tests are the same.
    let tests = &summary(&place.path("run"))["tests"];
    for (i, row) in whole[..2].iter().enumerate() {
        assert_eq!(tests[i]["accuracy"], row["accuracy"]);
        assert_eq!(tests[i]["gap"], row["gap"]);
        assert_eq!(tests[i]["ceiling"], row["ceiling"]);
    }
}

/// Sums of the breakdown are the accuracy; the table and the run's own tests say the same.
#[test]
fn a_breakdown_adds_up_to_the_accuracy() {
    let place = Place::new(TINY);
    let distractors = ["--set", "task.preset=task3", "--set", "task.gap={start: 2, probability: 0.4}"];
    place.ok(&[&["train", "tiny.yaml", "--out", "run"], &distractors[..]].concat());
    let table = place.ok(&["eval", "run", "--gap", "0,0.3", "--breakdown", "--json", "eval.json"]);
    let rows: Vec<Value> = serde_json::from_slice(&fs::read(place.path("eval.json")).unwrap()).unwrap();
    let own = summary(&place.path("run"))["tests"][0].clone();
    for row in rows.iter().chain([&own]) {
        let breakdown = &row["breakdown"];
        for group in ["by_gap", "by_distance"] {
            let sum = |field: &str| {
                breakdown[group]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|bin| bin[field].as_u64().unwrap())
                    .sum::<u64>()
            };
            assert_eq!(sum("elements"), 40 * 12);
            assert_eq!(sum("right") as f64 / sum("elements") as f64, row["accuracy"].as_f64().unwrap());
        }
    }
    let count = |row: &Value, field: &str| row["breakdown"]["distractor"]["on"][field].as_u64().unwrap();
    assert_eq!(count(&rows[0], "elements"), 0, "no distractor is shown at gap 0");
    assert!((100..250).contains(&count(&rows[1], "elements")), "{}", rows[1]["breakdown"]);
    let (right, elements) = (count(&rows[1], "right"), count(&rows[1], "elements"));
    let shown = format!("{:.1} % of {elements}", 100.0 * right as f64 / elements as f64);
    let line = table.lines().find(|line| line.contains("on it")).unwrap();
    assert!(line.contains(&shown), "{line}: {shown}");
}

#[test]
fn a_run_says_what_made_it() {
    let place = Place::new(TINY);
    let origin =
        || -> Value { serde_json::from_slice(&fs::read(place.path("run/run.json")).unwrap()).unwrap() };
    let begin = ["train", "tiny.yaml", "--out", "run", "--threads", "1"];
    let mut child = place.command(&begin).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    place.wait_for_state("run", &mut child);
    child.kill().unwrap();
    child.wait().unwrap();
    let first = origin();
    assert_eq!((&first["step"], &first["before"]), (&Value::from(0), &Value::Null));
    place.ok(&["train", "run/config.yaml", "--out", "run", "--resume", "--threads", "2"]);
    let last = origin();
    assert!(last["step"].as_u64().unwrap() > 0);
    assert_eq!(last["before"], Value::from(vec![first.clone()]));
    assert_eq!((&first["threads"], &last["threads"]), (&Value::from(1), &Value::from(2)));
    assert_eq!(last["command"].as_array().unwrap()[2], "run/config.yaml");
    for (field, want) in [("device", "cpu"), ("precision", "f32"), ("version", env!("CARGO_PKG_VERSION"))] {
        assert_eq!(last[field], want);
    }
    assert_eq!(last["data"], summary(&place.path("run"))["data"]);
    // The same program says the same of itself.
    let version = place.ok(&["--version"]);
    assert!(version.contains(&format!("commit {}", last["commit"].as_str().unwrap())), "{version}");
}

#[test]
fn every_model_trains_and_learns() {
    let place = Place::new(TINY);
    for model in MODELS {
        let name = format!("model.name={}", model.name);
        let run = place.path(model.name);
        place.ok(&[
            "train",
            "tiny.yaml",
            "--out",
            run.to_str().unwrap(),
            "--set",
            &name,
            "--set",
            "task.noise=0",
        ]);
        let metrics = metrics(&run);
        let validations: Vec<&Value> = metrics.iter().filter(|m| m["split"] == "validation").collect();
        let accuracy = |m: &Value| m["accuracy"].as_f64().unwrap();
        let (first, last) = (accuracy(validations[0]), accuracy(validations[validations.len() - 1]));
        assert!(last > first + 0.05 && last > 0.25, "{}: {first} to {last}", model.name);
    }
}

#[test]
fn as_released_with_the_emulation() {
    let place = Place::new(TINY);
    place.refuses(&["train", "tiny.yaml", "--set", "train.emulate=authors"], "task.split");
    let set = ["--set", "train.emulate=authors", "--set", "task.split=as-released"];
    place.ok(&[&["train", "tiny.yaml", "--out", "run"], &set[..]].concat());
    let summary = summary(&place.path("run"));
    assert_eq!(summary["split"], "as-released");
    assert_eq!(summary["emulate"].as_array().unwrap().len(), 4);
    let metrics = metrics(&place.path("run"));
    assert_eq!(metrics[0]["lr"], 0.0, "the first update of the released code changes nothing");
}

#[test]
fn weights_that_explode_end_the_run_with_a_name() {
    let place = Place::new(TINY);
    let (code, stderr) = place.run(&[
        "train",
        "tiny.yaml",
        "--out",
        "run",
        "--set",
        "train.lr=100",
        "--set",
        "train.warmup=0",
    ]);
    assert_eq!(code, 1, "{stderr}");
    let last = stderr.lines().last().unwrap();
    assert!(last.starts_with("error: update ") && last.contains("not finite"), "{last}");
    assert!(last.contains("run/checkpoint.safetensors"), "{last}");
    place.ok(&["eval", "run"]);
}

/// The state of a golden model without the rest of its file.
fn golden_state(golden: &Golden, path: &Path) {
    let tensors: HashMap<String, Tensor> = golden
        .names()
        .filter_map(|name| {
            Some((name.strip_prefix("param.")?.to_string(), golden.get(name, candle_core::DType::F32)))
        })
        .collect();
    candle_core::safetensors::save(&tensors, path).unwrap();
}

#[test]
fn imported_weights_predict_what_pytorch_predicts() {
    let place = Place::new(TINY);
    // Those of the paper have references.
    for model in &MODELS[..7] {
        let golden = Golden::open(&format!("model_{}", model.name));
        golden_state(&golden, &place.path("state.safetensors"));
        let x = golden.get("x", candle_core::DType::F32);
        candle_core::safetensors::save(&HashMap::from([("x", x)]), place.path("x.safetensors")).unwrap();
        let name = format!("model.name={}", model.name);
        let set = ["--set", &name, "--set", "model.width=64", "--set", "model.state=16"];
        place.ok(&[
            &["import", "--config", "tiny.yaml", "--weights", "state.safetensors", "--out", "m.safetensors"],
            &set[..],
        ]
        .concat());
        place.ok(&["predict", "m.safetensors", "--input", "x.safetensors", "--output", "y.safetensors"]);
        let y = candle_core::safetensors::load(place.path("y.safetensors"), &Device::Cpu).unwrap();
        let error = relative_rms(&y["logits"], &golden.f64("logits"));
        assert!(error < 1e-5, "{}: logits are off by {error:.1e}", model.name);
        // And back again, bit for bit.
        place.ok(&["export", "m.safetensors", "--out", "back.safetensors"]);
        let load = |name: &str| candle_core::safetensors::load(place.path(name), &Device::Cpu).unwrap();
        let (there, back) = (load("state.safetensors"), load("back.safetensors"));
        assert_eq!(there.len(), back.len());
        for (name, tensor) in &there {
            common::assert_same_bits(name, tensor, &back[name]);
        }
    }
}

#[test]
fn bad_input_is_refused_before_any_work() {
    let place = Place::new(TINY);
    place.ok(&["train", "tiny.yaml", "--out", "run"]);
    let checkpoint = fs::read(place.path("run/checkpoint.safetensors")).unwrap();
    fs::write(place.path("cut.safetensors"), &checkpoint[..checkpoint.len() / 2]).unwrap();
    fs::write(place.path("empty.safetensors"), []).unwrap();
    fs::write(place.path("text.safetensors"), "no tensors").unwrap();
    fs::write(place.path("cut.yaml"), "task: {preset: ta").unwrap();
    let newer = String::from_utf8_lossy(&checkpoint[8..]).find("\"format\":\"1\"").unwrap() + 8;
    let mut future = checkpoint.clone();
    future[newer + 10] = b'9';
    fs::write(place.path("future.safetensors"), &future).unwrap();
    place.ok(&["export", "run", "--out", "weights.safetensors"]);
    fs::create_dir(place.path("folder")).unwrap();
    fs::write(place.path("folder/something"), "else").unwrap();

    let cases: &[(&[&str], &str)] = &[
        (&["train", "none.yaml"], "none.yaml"),
        (&["train", "cut.yaml"], "cut.yaml"),
        (&["train", "tiny.yaml", "--set", "train.lr=-1"], "train.lr is -1"),
        (&["train", "tiny.yaml", "--set", "train.lrr=1"], "did you mean `train.lr`"),
        (&["train", "tiny.yaml", "--set", "model.name=mamba3"], "did you mean `mamba2`"),
        (&["train", "tiny.yaml", "--set", "model.width=30"], "model.width"),
        (&["train", "tiny.yaml", "--set", "train.warmup=1000"], "train.warmup is 1000"),
        (&["train", "tiny.yaml", "--set", "train.precision=bf16"], "train.precision is bf16"),
        (&["train", "tiny.yaml", "--set", "task.density=0.0001"], "task.density"),
        (&["train", "tiny.yaml", "--device", "gpu"], "--device"),
        (&["train", "tiny.yaml", "--device", "cuda:0"], "--device is `cuda:0`"),
        (&["train", "tiny.yaml", "--threads", "0"], "--threads is 0"),
        (&["train", "tiny.yaml", "--out", "run"], "run is not empty"),
        (&["train", "tiny.yaml", "--out", "tiny.yaml"], "tiny.yaml is a file"),
        (&["train", "tiny.yaml", "--out", "/proc/selectivbench"], "/proc/selectivbench"),
        (&["train", "tiny.yaml", "--out", "folder", "--resume"], "no run to resume"),
        (&["train", "tiny.yaml", "--out", "run", "--resume", "--set", "train.lr=0.5"], "train.lr is 0.5"),
        (&["eval", "nowhere"], "nowhere"),
        (&["eval", "folder"], "folder/checkpoint.safetensors"),
        (&["eval", "cut.safetensors"], "cut.safetensors"),
        (&["eval", "empty.safetensors"], "empty.safetensors"),
        (&["eval", "text.safetensors"], "text.safetensors"),
        (&["eval", "future.safetensors"], "format 9"),
        (&["eval", "weights.safetensors"], "selectivbench import"),
        (&["eval", "run", "--gap", "-1"], "--gap"),
        (&["eval", "run", "--gap", "NaN"], "--gap"),
        (&["eval", "run", "--gap", "1e9"], "--gap"),
        (&["eval", "run", "--samples", "0"], "--samples is 0"),
        (&["eval", "run", "--split", "held"], "--split is held"),
        (&["eval", "run", "--json", "folder"], "folder"),
        (&["eval", "run", "cut.safetensors"], "cut.safetensors"),
        (&["predict", "run", "--input", "weights.safetensors", "--output", "y"], "no tensor `x`"),
        (&["predict", "run", "--input", "none", "--output", "y"], "none"),
        (
            &[
                "import",
                "--config",
                "tiny.yaml",
                "--weights",
                "weights.safetensors",
                "--out",
                "c",
                "--set",
                "model.name=mamba",
            ],
            "layers.0.",
        ),
        (
            &[
                "import",
                "--config",
                "tiny.yaml",
                "--weights",
                "weights.safetensors",
                "--out",
                "c",
                "--set",
                "model.layers=1",
            ],
            "layers.1.",
        ),
        (
            &[
                "import",
                "--config",
                "tiny.yaml",
                "--weights",
                "weights.safetensors",
                "--out",
                "c",
                "--set",
                "model.width=32",
            ],
            "has shape",
        ),
        (
            &["import", "--config", "tiny.yaml", "--weights", "cut.safetensors", "--out", "c"],
            "cut.safetensors",
        ),
        (&["export", "cut.safetensors", "--out", "w"], "cut.safetensors"),
    ];
    for (args, part) in cases {
        place.refuses(args, part);
    }

    // A damaged state does not cost the run more than the state.
    let state = fs::read(place.path("run/state.safetensors")).unwrap();
    fs::write(place.path("run/state.safetensors"), &state[..state.len() / 3]).unwrap();
    place.refuses(&["train", "tiny.yaml", "--out", "run", "--resume"], "run/state.safetensors");
}

/// `ulimit -f` with the signal ignored: writing fails as on a full disk.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_ends_the_run_without_a_loss() {
    let place = Place::new(TINY);
    let longer = "--set task.samples.train=6000";
    place.ok(&["train", "tiny.yaml", "--out", "whole", "--set", "task.samples.train=6000"]);
    let program = place.command(&[]).get_program().to_owned();
    // Room for checkpoint and state and for half of the metrics.
    let full = format!(
        "trap '' XFSZ; ulimit -f 80; exec '{}' train tiny.yaml --out full {longer}",
        program.to_string_lossy()
    );
    let output = Command::new("bash").args(["-c", &full]).current_dir(place.path("")).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    let last = stderr.lines().last().unwrap();
    assert!(last.contains("cannot write") && last.contains("metrics.jsonl"), "{last}");
    assert!(last.contains("saved up to update") && last.contains("--resume"), "{last}");
    place.ok(&["train", "full/config.yaml", "--out", "full", "--resume"]);
    same_end(&place.path("whole"), &place.path("full"));
}

#[test]
fn two_processes_do_not_train_in_one_directory() {
    let place = Place::new(TINY);
    let mut child = place
        .command(&["train", "tiny.yaml", "--out", "run", "--set", "task.samples.train=20000"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    place.wait_for_state("run", &mut child);
    let (code, stderr) =
        place.run(&["train", "tiny.yaml", "--out", "run", "--resume", "--set", "task.samples.train=20000"]);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("another process is training in run"), "{stderr}");
}

#[test]
fn a_reader_that_goes_away_is_no_panic() {
    let place = Place::new(TINY);
    for args in [&["models"][..], &["tasks"], &["--help"]] {
        let mut child = place.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!stderr.contains("panicked"), "{stderr}");
    }
}
