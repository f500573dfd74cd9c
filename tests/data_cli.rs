//! `selectivbench data`, as a user runs it.

use std::path::Path;

use assert_cmd::Command;
use safetensors::SafeTensors;
use serde_json::Value;
use sha2::{Digest, Sha256};

/// The small grammar of the golden sequences, as released.
const TOY: &str = "
seed: 1
task:
  preset: task1_model_size
  vocab: 6
  ambiguities: 2
  depth: 3
  length: 20
  split: as-released
  samples: {train: 1000, validation: 20, test: 30}
train: {warmup: 10}
";

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("toy.yaml"), TOY).unwrap();
        Self(folder)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn data(&self, args: &[&str]) -> assert_cmd::assert::Assert {
        let mut command = Command::new(env!("CARGO_BIN_EXE_selectivbench"));
        let (name, rest) = args.split_first().unwrap();
        command.current_dir(self.path()).args(["data", name, "toy.yaml"]).args(rest).assert()
    }

    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path().join(name)).unwrap()
    }
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn stdout(assert: &assert_cmd::assert::Assert) -> String {
    String::from_utf8(assert.get_output().stdout.clone()).unwrap()
}

fn stderr(assert: &assert_cmd::assert::Assert) -> String {
    String::from_utf8(assert.get_output().stderr.clone()).unwrap()
}

#[test]
fn export_writes_the_authors_files() {
    let folder = Folder::new();
    folder.data(&["export", "--out", "a/b"]).success();
    // grammars.json and sequences.json.gz, toy6_s1
    let transitions = "b65a006377a4d4b17237194ae3ab1951d5a921c8e69edb96a8a91430cd224241";
    assert_eq!(sha256(&folder.read("a/b/transitions")), transitions);
    let lines = "a04cfb444ad05887c7e1eaf7779ce0e2425afbcdedc952007f8b27eeb0bc49b0";
    let train = folder.read("a/b/train");
    assert_eq!(sha256(&train), lines);
    let test = folder.read("a/b/test");
    assert_eq!(test.iter().filter(|&&byte| byte == b'\n').count(), 30);
    assert!(train.starts_with(&test));

    let refused = folder.data(&["export", "--out", "a/b", "--samples", "5"]).failure().code(2);
    assert!(stderr(&refused).contains("--force"), "{}", stderr(&refused));
    assert_eq!(folder.read("a/b/train"), train);
    folder.data(&["export", "--out", "a/b", "--samples", "5", "--force"]).success();
    assert!(train.starts_with(&folder.read("a/b/train")));
    let left = std::fs::read_dir(folder.path().join("a/b")).unwrap().count();
    assert_eq!(left, 3, "nothing unfinished is left");
}

#[test]
fn export_writes_tensors() {
    let folder = Folder::new();
    let kind = "task.gap={kind: distractor, law: uniform, low: 0.1, high: 0.3, probability: 0.5}";
    folder
        .data(&["export", "--out", "d", "--format", "safetensors", "--samples", "70", "--set", kind])
        .success();
    for (part, count) in [("train", 70), ("validation", 20), ("test", 30)] {
        let bytes = folder.read(&format!("d/{part}.safetensors"));
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let i32s = |name: &str| -> Vec<i32> {
            let view = tensors.tensor(name).unwrap();
            assert_eq!(view.shape(), [count, 20]);
            view.data().chunks(4).map(|x| i32::from_le_bytes(x.try_into().unwrap())).collect()
        };
        let first = tensors.tensor("distractor_first").unwrap();
        let first: Vec<i64> =
            first.data().chunks(8).map(|x| i64::from_le_bytes(x.try_into().unwrap())).collect();
        let (labels, gaps) = (i32s("labels"), i32s("gaps"));
        let symbols = tensors.tensor("symbols").unwrap();
        let distractors = tensors.tensor("distractors").unwrap();
        assert_eq!(symbols.shape(), [count, 20]);
        assert_eq!(first.len(), count + 1);
        assert_eq!(*first.last().unwrap() as usize, distractors.shape()[0]);
        for (i, gaps) in gaps.chunks(20).enumerate() {
            assert_eq!(i64::from(gaps.iter().sum::<i32>()), first[i + 1] - first[i]);
        }
        assert!(labels.iter().all(|label| (0..10).contains(label)));
        assert!(distractors.data().iter().chain(symbols.data()).all(|class| *class < 6));
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let names = header.metadata().as_ref().unwrap()["states"].split(' ').collect::<Vec<_>>();
        let letter = |class: u8| if class == 0 { '#' } else { (b'A' + class - 1) as char };
        for (label, class) in labels.iter().zip(symbols.data()) {
            assert!(names[*label as usize].starts_with(letter(*class)));
        }
    }
}

#[test]
fn show_tells_and_draws_a_sample() {
    let folder = Folder::new();
    let plain = stdout(&folder.data(&["show", "--index", "3"]).success());
    assert!(plain.contains("test sample 3 (as-released), seed 1: 20 elements, 40 timesteps"), "{plain}");
    assert!(!plain.contains('\x1b'), "no colour where there is no terminal");
    let kind = "task.gap.kind=distractor";
    let args = ["show", "--part", "train", "--gap", "0.4", "--set", kind, "--picture"];
    for (name, magic) in [("sample.png", &b"\x89PNG"[..]), ("sample.svg", b"<svg")] {
        folder.data(&[&args[..], &[name]].concat()).success();
        assert!(folder.read(name).starts_with(magic), "{name}");
    }
    for wrong in [&["--index", "30"][..], &["--picture", "sample.gif"], &["--gap=-1"]] {
        let refused = folder.data(&[&["show"], wrong].concat()).failure().code(2);
        assert_eq!(stderr(&refused).lines().count(), 1, "{}", stderr(&refused));
    }
}

#[test]
fn stats_tell_the_facts() {
    let folder = Folder::new();
    let json: Value = serde_json::from_str(&stdout(&folder.data(&["stats", "--json"]).success())).unwrap();
    assert_eq!(json["states"], 10);
    assert_eq!(json["transitions"], 20);
    assert_eq!(json["attempts"], 4);
    assert_eq!(json["out_degree"]["max"], 4);
    assert!((json["topological_entropy"].as_f64().unwrap() - 0.9195444613133203).abs() < 1e-9);
    let ceiling = json["ceiling"].as_f64().unwrap();
    assert!(ceiling > 0.5 && ceiling <= 1.0);
    let text = stdout(&folder.data(&["stats"]).success());
    for word in ["Bayes ceiling", "topological entropy", "out-degrees", "last k elements"] {
        assert!(text.contains(word), "{text}");
    }
}
