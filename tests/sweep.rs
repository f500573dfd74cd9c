//! Sweeps through the command line: what is run, killed sweeps, failures, memory.

#[path = "common/place.rs"]
mod place;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use place::{Place, metrics, same_end, summary};

/// Six runs of about a second.
const SWEEP: &str = "
config:
  task:
    preset: task2
    ambiguities: 4
    depth: 3
    length: 12
    gap: {low: 0.1, high: 0.3}
    test_gap: 0.2
    samples: {train: 1600, validation: 20, test: 40}
  model: {layers: 2, width: 16, state: 8}
  train: {batch: 8, lr: 0.01, warmup: 10, eval_every: 160, save_every: 3, log_every: 1, eval_batch: 16}
grid:
  model.name: [gated_delta_net, mamba2]
  seed: {from: 1, to: 3}
";

/// The run directories of a sweep by name.
fn runs(dir: &Path) -> BTreeMap<String, PathBuf> {
    let entries = fs::read_dir(dir.join("runs")).unwrap().flatten();
    entries.map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry.path())).collect()
}

/// Entries of a kind in the ledger.
fn ledger(dir: &Path, kind: &str) -> usize {
    let entries = fs::read_dir(dir.join("ledger")).unwrap().flatten();
    entries.filter(|entry| entry.file_name().to_string_lossy().contains(kind)).count()
}

fn same_sweeps(a: &Path, b: &Path) {
    let (one, two) = (runs(a), runs(b));
    assert_eq!(one.keys().collect::<Vec<_>>(), two.keys().collect::<Vec<_>>());
    one.iter().for_each(|(name, dir)| same_end(dir, &two[name]));
    assert_eq!((ledger(b, "done"), ledger(b, "claim"), ledger(b, "failed")), (one.len(), 0, 0));
}

/// The training processes that a sweep started.
fn children(sweep: &Child) -> Vec<String> {
    let id = sweep.id();
    let text = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
    text.split_whitespace().map(str::to_string).collect()
}

fn signal(name: &str, process: &str) {
    // It may have ended meanwhile.
    let _ = Command::new("kill").args([name, process]).stderr(Stdio::null()).status();
}

/// Processes of one sweep die at random, sometimes only their children; others join; in the end every run was done
/// once, with the bits of an undisturbed sweep.
#[cfg(target_os = "linux")]
#[test]
fn a_sweep_that_is_killed_at_random_ends_as_an_undisturbed_one() {
    let place = Place::new(SWEEP);
    place.ok(&["sweep", "tiny.yaml", "--out", "whole"]);
    assert_eq!(runs(&place.path("whole")).len(), 6);
    let start = || {
        let mut command =
            place.command(&["sweep", "tiny.yaml", "--out", "killed", "--jobs", "2", "--no-wait"]);
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    let mut random = 1u64;
    let mut below = |n: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % n
    };
    let mut kills = 0;
    for round in 0.. {
        assert!(round < 60, "the sweep does not end");
        let mut processes = [start(), start()];
        // Longer every time: the sweep must come to its end.
        let deadline = Instant::now() + Duration::from_millis(150 + 60 * round + below(300));
        while Instant::now() < deadline && processes.iter_mut().any(|p| p.try_wait().unwrap().is_none()) {
            std::thread::sleep(Duration::from_millis(40 + below(80)));
            let victim = &processes[below(2) as usize];
            if let (0, Some(child)) = (below(4), children(victim).first()) {
                signal("-KILL", child);
                kills += 1;
            }
        }
        let ended = processes.iter_mut().all(|p| p.try_wait().unwrap().is_some_and(|s| s.success()));
        if ended {
            break;
        }
        for process in &mut processes {
            match below(3) {
                0 => signal("-TERM", &process.id().to_string()),
                _ => process.kill().unwrap(),
            }
            process.wait().unwrap();
            kills += 1;
        }
    }
    assert!(kills >= 6, "only {kills} kills: the sweep is too short for this test");
    place.ok(&["sweep", "tiny.yaml", "--out", "killed"]);
    same_sweeps(&place.path("whole"), &place.path("killed"));

    // Nothing is left to do; the report knows all runs.
    let before = place::tree(&place.path("killed/runs"));
    place.ok(&["sweep", "tiny.yaml", "--out", "killed"]);
    assert!(place::tree(&place.path("killed/runs")) == before);
    place.ok(&["report", "killed", "--out", "report"]);
    assert_eq!(fs::read_to_string(place.path("report/runs.csv")).unwrap().lines().count(), 1 + 6);
}

#[test]
fn what_is_new_in_the_file_is_added_and_parts_can_be_chosen() {
    let place = Place::new(&SWEEP.replace("to: 3", "to: 1"));
    let dir = place.path("runs/tiny");
    place.ok(&["sweep", "tiny.yaml"]);
    let first = runs(&dir);
    assert_eq!(first.len(), 2);
    let summaries: Vec<_> = first.values().map(|run| fs::read(run.join("summary.json")).unwrap()).collect();

    fs::write(place.path("tiny.yaml"), SWEEP.replace("save_every: 3", "save_every: 100")).unwrap();
    place.ok(&["sweep", "tiny.yaml", "--only", "model.name=mamba2"]);
    assert_eq!(runs(&dir).keys().filter(|name| name.contains("mamba2")).count(), 3);
    place.ok(&["sweep", "tiny.yaml", "--shard", "1/2"]);
    place.ok(&["sweep", "tiny.yaml", "--shard", "2/2"]);
    assert_eq!((runs(&dir).len(), ledger(&dir, "done")), (6, 6));
    let again: Vec<_> = first.values().map(|run| fs::read(run.join("summary.json")).unwrap()).collect();
    assert_eq!(summaries, again, "what was done is not done again");

    // Another split is another run.
    let output = place.ok(&["sweep", "tiny.yaml", "--set", "task.split=as-released", "--status"]);
    assert!(output.contains("0 of 6 done, 0 running, 6 pending"), "{output}");
    let status = fs::read_to_string(dir.join("status.csv")).unwrap();
    assert!(status.starts_with("run,state,where,reason,accuracy,parameters,model.name,seed\n"), "{status}");
}

#[test]
fn a_run_whose_folder_is_gone_is_run_again() {
    let place = Place::new(&SWEEP.replace("to: 3", "to: 1"));
    place.ok(&["sweep", "tiny.yaml", "--out", "a"]);
    let lost = runs(&place.path("a")).into_values().next().unwrap();
    let before = metrics(&lost);
    fs::remove_dir_all(&lost).unwrap();
    let (code, stderr) = place.run(&["sweep", "tiny.yaml", "--out", "a"]);
    assert!(code == 0 && stderr.contains("has lost its summary: it is run again"), "{stderr}");
    assert_eq!(metrics(&lost), before);
}

#[test]
fn failures_have_reasons_and_get_another_try_on_request() {
    let sweep = SWEEP.replace("seed: {from: 1, to: 3}", "train.lr: [100, 0.01]");
    let place = Place::new(&sweep);
    let (code, stderr) = place.run(&["sweep", "tiny.yaml", "--out", "a", "--fail-fast"]);
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("--fail-fast") && stderr.contains("1 of 4 runs failed"), "{stderr}");
    let (code, stderr) = place.run(&["sweep", "tiny.yaml", "--out", "a"]);
    assert_eq!(code, 1);
    assert!(stderr.contains("2 of 4 runs failed; mend the cause and add --retry-failed"), "{stderr}");
    assert!(stderr.contains("would not be finite"), "{stderr}");
    let dir = place.path("a");
    assert_eq!((ledger(&dir, "done"), ledger(&dir, "failed"), ledger(&dir, "claim")), (2, 2, 0));
    let status = place.ok(&["sweep", "tiny.yaml", "--out", "a", "--status"]);
    assert!(status.contains("2 of 4 done") && status.contains("would not be"), "{status}");
    // Failed runs are left alone, and tried again when asked.
    let (_, stderr) = place.run(&["sweep", "tiny.yaml", "--out", "a"]);
    assert!(!stderr.contains("starts on") && !stderr.contains("resumes on"), "{stderr}");
    let (_, stderr) = place.run(&["sweep", "tiny.yaml", "--out", "a", "--retry-failed"]);
    assert_eq!(stderr.matches("failed: update").count(), 2, "{stderr}");
}

/// With too little memory for the whole batch in one pass, the run goes on in smaller ones.
#[cfg(target_os = "linux")]
#[test]
fn a_run_out_of_memory_goes_on_with_smaller_micro_batches() {
    let sweep = "
config:
  task: {preset: task2, ambiguities: 4, depth: 3, length: 100, samples: {train: 512, validation: 4, test: 4}}
  model: {name: gated_delta_net, layers: 4, width: 64}
  train: {batch: 256, micro_batch: 256, warmup: 1, eval_every: 512, eval_batch: 4}
";
    let place = Place::new(sweep);
    let program = place.command(&[]).get_program().to_owned();
    // Address space, in KiB: enough for a part of the batch.
    let output = Command::new("sh")
        .current_dir(place.path(""))
        .args(["-c", "ulimit -v 3000000; exec \"$0\" sweep tiny.yaml --out a --threads 1"])
        .arg(program)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("ran out of memory: again with micro-batches of at most"), "{stderr}");
    let run = runs(&place.path("a")).into_values().next().unwrap();
    let summary = summary(&run);
    assert!(summary["max_micro_batch"].as_u64().unwrap() < 256, "{summary}");
    assert_eq!(summary["steps"], 2);
}

#[test]
fn a_dry_run_tells_what_it_takes_and_writes_nothing() {
    let place = Place::new(SWEEP);
    let before = place::tree(&place.path(""));
    let output = place.ok(&["sweep", "tiny.yaml", "--dry-run"]);
    assert!(output.contains("6 runs, about") && output.contains("MiB"), "{output}");
    assert_eq!(place::tree(&place.path("")), before);
}

#[test]
fn bad_input_is_refused_before_anything_is_written() {
    let place = Place::new(SWEEP);
    fs::write(place.path("wide.yaml"), "grid: {model.width: [64, 66], model.name: [gla]}").unwrap();
    fs::write(place.path("key.yaml"), "grid: {model.with: [64]}").unwrap();
    fs::write(place.path("base.yaml"), "base: nowhere.yaml").unwrap();
    fs::write(place.path("file"), "").unwrap();
    for (args, part) in [
        (&["sweep", "none.yaml"][..], "none.yaml does not exist"),
        (&["sweep", "wide.yaml"], "wide.yaml: the run with model.width=66: model.width is 66"),
        (&["sweep", "key.yaml"], "unknown key `model.with`; did you mean `model.width`?"),
        (&["sweep", "base.yaml"], "nowhere.yaml does not exist"),
        (&["sweep", "tiny.yaml", "--only", "seed=9"], "no run has that; seed is one of 1, 2, 3"),
        (&["sweep", "tiny.yaml", "--only", "sed=1"], "unknown key `sed`; did you mean `seed`?"),
        (&["sweep", "tiny.yaml", "--only", "seed"], "write key.path=value"),
        (&["sweep", "tiny.yaml", "--shard", "3/2"], "--shard is 3/2; it must be i/n"),
        (&["sweep", "tiny.yaml", "--devices", "tpu"], "--device is \"tpu\""),
        (&["sweep", "tiny.yaml", "--devices", "gpu"], "--devices is gpu, but no GPU"),
        (&["sweep", "tiny.yaml", "--devices", "cpu,cpu"], "name each device once"),
        (&["sweep", "tiny.yaml", "--set", "train.precision=bf16"], "cpu computes in f32"),
        (&["sweep", "tiny.yaml", "--per-device", "0"], "--per-device is 0"),
        (&["sweep", "tiny.yaml", "--out", "file"], "file is not the folder of a sweep"),
    ] {
        place.refuses(args, part);
    }
}
