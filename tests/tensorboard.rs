//! A real TensorBoard reads the event files: `pip install tensorboard` and have that `python3` first in `PATH`.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use assert_cmd::cargo::cargo_bin_cmd;

const CONFIG: &str = "
seed: 3
task:
  preset: task3
  ambiguities: 4
  depth: 3
  length: 20
  gap: {start: 2, probability: 0.3}
  eval_gaps: [0.2]
  samples: {train: 2400, validation: 20, test: 40}
model: {name: gla, layers: 1, width: 16}
train: {batch: 8, warmup: 10, eval_every: 160, save_every: 7, log_every: 2}
";

fn train(dir: &Path) -> Command {
    let mut command = Command::new(cargo_bin_cmd!("selectivbench").get_program());
    command.current_dir(dir).args(["train", "tiny.yaml", "--out", "run", "--resume"]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// What TensorBoard reads is what stands in metrics.jsonl.
fn compare(dir: &Path) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/read_events.py");
    let output = Command::new("python3").arg(script).arg(dir.join("run")).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&text));
}

#[test]
fn tensorboard_reads_what_metrics_jsonl_holds() {
    let import = "import tensorboard.backend.event_processing.event_accumulator";
    if !Command::new("python3").args(["-c", import]).output().is_ok_and(|run| run.status.success()) {
        eprintln!("skipped: python3 has no package `tensorboard` (pip install tensorboard)");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("tiny.yaml"), CONFIG).unwrap();
    // Killed twice between two saved states, so that the resumed run writes lines again.
    let lines =
        || fs::read_to_string(dir.path().join("run/metrics.jsonl")).map_or(0, |text| text.lines().count());
    for _ in 0..2 {
        let before = lines();
        let mut child = train(dir.path()).spawn().unwrap();
        while lines() < before + 20 {
            assert!(child.try_wait().unwrap().is_none(), "the run ended before it was killed");
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert!(train(dir.path()).status().unwrap().success());
    compare(dir.path());
}
