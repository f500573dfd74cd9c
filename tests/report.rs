//! `report` through the command line, on small run directories that were never trained; and its page in
//! a real browser.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use assert_cmd::cargo::cargo_bin_cmd;
use serde_json::{Value, json};

/// A finished run.
#[derive(Clone)]
struct Fake {
    dir: PathBuf,
    model: &'static str,
    width: usize,
    lr: f64,
    seed: u64,
    validation: f64,
    /// Test accuracies at gaps of 0.1, 0.2, …
    tests: Vec<f64>,
}

impl Fake {
    fn write(&self) {
        let Self { dir, model, width, lr, seed, .. } = self;
        fs::create_dir_all(dir).unwrap();
        let config = format!(
            "seed: {seed}\ntask: {{preset: task2, ambiguities: 4, length: 12, test_gap: 0.1, samples: {{train: \
             800, validation: 20, test: 20}}}}\nmodel: {{name: {model}, width: {width}, layers: 2}}\ntrain: {{lr: \
             {lr}, warmup: 10, batch: 8}}\n"
        );
        fs::write(dir.join("config.yaml"), config).unwrap();
        let mut metrics = String::new();
        for (i, share) in [0.3, 0.7, 0.9, 1.0].into_iter().enumerate() {
            let samples = 200 * (i + 1);
            metrics += &format!(
                "{{\"step\":{0},\"samples\":{samples},\"split\":\"train\",\"loss\":2.0,\"accuracy\":0.1}}\n\
                 {{\"step\":{0},\"samples\":{samples},\"split\":\"validation\",\"loss\":1.5,\"accuracy\":{1}}}\n",
                samples / 8,
                share * self.validation
            );
        }
        fs::write(dir.join("metrics.jsonl"), metrics).unwrap();
        let test = |(i, accuracy): (usize, &f64)| {
            json!({
                "gap": (i + 1) as f64 / 10.0, "ceiling": 0.96, "accuracy": accuracy, "loss": 0.5, "samples": 20,
                "timesteps": 24, "tokens": 480, "seconds": 0.1,
                "breakdown": {
                    "by_gap": [{"gap": i + 1, "right": (accuracy * 100.0).round() as u64, "elements": 100}],
                    "by_distance": [{"from": 1, "to": 1, "right": 9, "elements": 10},
                                    {"from": 17, "to": 32, "right": 4, "elements": 10}],
                },
            })
        };
        let summary = json!({
            "accuracy": self.tests[0], "ceiling": 0.96, "loss": 0.5, "steps": 100, "samples": 800,
            "parameters": 100 * width * width, "state_size": if *model == "transformer" { json!(null) } else { json!(64 * width) },
            "seconds": 10.0 * *width as f64 / 16.0, "tokens_per_s": 5e4, "model": model, "task": "task2",
            "seed": seed, "device": "cpu", "precision": "f32", "split": "held-out", "emulate": [],
            "tests": self.tests.iter().enumerate().map(test).collect::<Vec<_>>(),
            "version": "0.1.0", "data": format!("{seed:064x}"), "threads": 2,
        });
        fs::write(dir.join("summary.json"), summary.to_string()).unwrap();
        let run = json!({"commit": "0123abcd", "host": "node<1>", "command": ["selectivbench", "train"]});
        fs::write(dir.join("run.json"), run.to_string()).unwrap();
    }
}

/// Three models of two widths, two learning rates and two seeds.
fn grid(root: &Path) -> Vec<Fake> {
    let mut all = Vec::new();
    for (m, model) in ["transformer", "mamba2", "gated_delta_net"].into_iter().enumerate() {
        for width in [16, 32] {
            for (l, lr) in [0.001, 0.004].into_iter().enumerate() {
                for seed in [1, 2] {
                    let validation = 0.4 + 0.15 * m as f64 + 0.005 * width as f64 - 0.1 * l as f64;
                    let accuracy = validation + 0.02 * seed as f64 + 0.2 * l as f64;
                    let dir = root.join(format!("{model}-{width}-{lr}-s{seed}"));
                    let tests = vec![accuracy.min(0.95), accuracy / 2.0];
                    all.push(Fake { dir, model, width, lr, seed, validation, tests });
                }
            }
        }
    }
    all.iter().for_each(Fake::write);
    all
}

fn report(dir: &Path, args: &[&str]) -> (i32, String, String) {
    let program = cargo_bin_cmd!("selectivbench").get_program().to_owned();
    let mut command = Command::new(program);
    command.current_dir(dir).arg("report").args(args).stdin(Stdio::null());
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap_or(-1), text(stdout), text(stderr))
}

fn rows(path: &Path) -> Vec<std::collections::BTreeMap<String, String>> {
    csv::Reader::from_path(path).unwrap().deserialize().map(Result::unwrap).collect()
}

#[test]
fn a_report_of_a_grid() {
    let place = tempfile::tempdir().unwrap();
    grid(&place.path().join("runs"));
    let (code, stdout, stderr) = report(place.path(), &["runs", "--out", "report"]);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("gated_delta_net · width 32 is the most accurate"), "{stdout}");

    let out = place.path().join("report");
    let settings = rows(&out.join("settings.csv"));
    assert_eq!(settings.len(), 6);
    // The validation prefers 0.001, the test would prefer 0.004.
    assert!(settings.iter().all(|row| row["train.lr"] == "0.001" && row["n"] == "2"), "{settings:?}");
    let best = &settings[0];
    assert_eq!((&best["model"][..], &best["width"][..]), ("gated_delta_net", "32"));
    // 0.86 + 0.02 and 0.86 + 0.04
    assert!((best["accuracy"].parse::<f64>().unwrap() - 0.89).abs() < 1e-9);
    assert!((best["sd"].parse::<f64>().unwrap() - 0.02 / 2f64.sqrt()).abs() < 1e-9);
    let candidates = rows(&out.join("candidates.csv"));
    assert_eq!(candidates.len(), 12);
    assert_eq!(candidates.iter().filter(|row| row["chosen"] == "yes").count(), 6);
    assert_eq!(rows(&out.join("runs.csv")).len(), 24);

    for figure in [
        "accuracy_by_parameters",
        "accuracy_by_gap",
        "learning_curves",
        "accuracy_by_seconds",
        "accuracy_by_state",
        "accuracy_by_gap_before",
        "accuracy_by_distance",
    ] {
        let svg = fs::read_to_string(out.join(format!("figures/{figure}.svg"))).expect(figure);
        assert!(svg.contains("mamba2") && !svg.contains("NaN"), "{figure}");
        assert!(fs::read(out.join(format!("figures/{figure}.png"))).unwrap().starts_with(b"\x89PNG"));
    }
    assert!(!out.join("figures/accuracy_by_complexity.svg").exists());
    let svg = fs::read_to_string(out.join("figures/accuracy_by_parameters.svg")).unwrap();
    assert!(svg.contains("ceiling") && svg.contains("last "), "{svg}");
    let markdown = fs::read_to_string(out.join("report.md")).unwrap();
    assert!(markdown.contains("the test chooses nothing"), "{markdown}");
    assert!(markdown.contains("highest mean validation accuracy of 2 candidates"), "{markdown}");
}

#[test]
fn a_report_is_the_same_whatever_the_order_of_the_folders() {
    let place = tempfile::tempdir().unwrap();
    let all = grid(&place.path().join("runs"));
    let dirs: Vec<String> = all.iter().map(|run| run.dir.display().to_string()).collect();
    let mut forward: Vec<&str> = dirs.iter().map(String::as_str).collect();
    forward.extend(["--out", "one"]);
    let mut back: Vec<&str> = dirs.iter().rev().map(String::as_str).collect();
    back.extend(["--out", "two"]);
    let paths =
        |text: String| text.lines().filter(|line| !line.contains('/')).map(String::from).collect::<Vec<_>>();
    let first = report(place.path(), &forward);
    assert_eq!(paths(first.1), paths(report(place.path(), &back).1));
    for file in ["report.html", "report.md", "settings.csv", "runs.csv", "figures/learning_curves.svg"] {
        let read = |out: &str| fs::read(place.path().join(out).join(file)).unwrap();
        assert!(read("one") == read("two"), "{file}");
    }
}

#[test]
fn a_sweep_folder_in_bad_weather() {
    let place = tempfile::tempdir().unwrap();
    let sweep = place.path().join("sweep");
    let all = grid(&sweep.join("runs"));
    let path = |run: &Fake, file: &str| run.dir.join(file);
    // A crash while a line was written; no metrics at all; no provenance; a damaged summary; a copy.
    let metrics = fs::read_to_string(path(&all[0], "metrics.jsonl")).unwrap();
    fs::write(path(&all[0], "metrics.jsonl"), &metrics[..metrics.len() - 20]).unwrap();
    fs::remove_file(path(&all[1], "metrics.jsonl")).unwrap();
    fs::remove_file(path(&all[2], "run.json")).unwrap();
    fs::write(path(&all[3], "summary.json"), "{\"accuracy\": 0.").unwrap();
    Fake { dir: sweep.join("runs/copy"), ..all[4].clone() }.write();
    // An unfinished run, and one that failed: its folder is not also an unfinished one.
    for name in ["half", "gone-0123abcd"] {
        let dir = sweep.join("runs").join(name);
        fs::create_dir_all(&dir).unwrap();
        fs::copy(path(&all[5], "config.yaml"), dir.join("config.yaml")).unwrap();
        fs::write(dir.join("metrics.jsonl"), "").unwrap();
    }
    fs::create_dir_all(sweep.join("ledger")).unwrap();
    let failure =
        json!({"run": "gone-0123abcd", "reason": "the loss is NaN <after> 12 updates", "host": "a"});
    fs::write(sweep.join("ledger/0123abcd89abcdef.failed.json"), failure.to_string()).unwrap();
    fs::write(sweep.join("ledger/fedcba9876543210.failed.json"), "{\"rea").unwrap();

    let (code, stdout, stderr) = report(place.path(), &["sweep", "--out", "report"]);
    assert_eq!(code, 0, "{stderr}");
    for part in [
        "1 unfinished run is left out",
        "2 failed runs",
        "gone-0123abcd: the loss is NaN <after> 12 updates",
        "fedcba9876543210: the ledger's entry is damaged",
        "1 line of",
        "has no learning curve",
        "summary.json is damaged",
        "the same configuration and seed",
    ] {
        assert!(stdout.contains(part), "{part}: {stdout}");
    }
    let page = fs::read_to_string(place.path().join("report/report.html")).unwrap();
    assert!(page.contains("the loss is NaN &lt;after&gt; 12 updates"));
    assert_eq!(rows(&place.path().join("report/runs.csv")).len(), 23);
}

#[test]
fn refusals_write_nothing() {
    let place = tempfile::tempdir().unwrap();
    fs::create_dir(place.path().join("empty")).unwrap();
    grid(&place.path().join("runs"));
    for (args, part) in [
        (&["empty", "--out", "report"][..], "no finished run in empty"),
        (&["missing", "--out", "report"], "cannot read missing"),
        (&["runs", "--tuned", "train.rl", "--out", "report"], "did you mean train.lr?"),
        (&["runs", "--tuned", "seed", "--out", "report"], "--tuned seed"),
    ] {
        let (code, _, stderr) = report(place.path(), args);
        assert_eq!(code, 2, "{args:?}: {stderr}");
        assert!(stderr.contains(part) && stderr.trim_end().lines().count() == 1, "{args:?}: {stderr}");
        assert!(!place.path().join("report").exists(), "{args:?}");
    }
}

#[test]
fn other_fields_can_be_tuned() {
    let place = tempfile::tempdir().unwrap();
    grid(&place.path().join("runs"));
    let (code, _, stderr) =
        report(place.path(), &["runs", "--tuned", "train.lr,model.width", "--out", "report"]);
    assert_eq!(code, 0, "{stderr}");
    let settings = rows(&place.path().join("report/settings.csv"));
    assert_eq!(settings.len(), 3);
    assert!(
        settings.iter().all(|row| row["model.width"] == "32" && row["candidates"] == "4"),
        "{settings:?}"
    );
}

#[test]
fn a_page_of_1500_runs_is_small() {
    let place = tempfile::tempdir().unwrap();
    for seed in 0..125 {
        for run in [("gla", 32), ("mamba2", 32), ("gla", 64), ("mamba2", 64)] {
            for lr in [0.001, 0.002, 0.004] {
                let dir = place.path().join(format!("runs/{}-w{}-lr{lr}-s{seed}", run.0, run.1));
                let validation = 0.5 + 0.001 * seed as f64;
                let tests = vec![validation, validation / 2.0];
                Fake { dir, model: run.0, width: run.1, lr, seed, validation, tests }.write();
            }
        }
    }
    let (code, _, stderr) = report(place.path(), &["runs", "--out", "report"]);
    assert_eq!(code, 0, "{stderr}");
    let bytes = fs::metadata(place.path().join("report/report.html")).unwrap().len();
    assert!(bytes < 4_000_000, "{bytes} bytes");
}

/// Loads the page from a file and uses it as people do: tests/report_page.py.
#[test]
fn the_page_works_in_a_browser() {
    let has =
        |program: &str| Command::new(program).arg("--version").output().is_ok_and(|o| o.status.success());
    for (program, name) in [("chromium", "Chromium"), ("chromedriver", "chromedriver"), ("python3", "Python")]
    {
        if !has(program) {
            println!("skipped: no {name}");
            return;
        }
    }
    let place = tempfile::tempdir().unwrap();
    grid(&place.path().join("runs"));
    let (code, _, stderr) = report(place.path(), &["runs", "--out", "report"]);
    assert_eq!(code, 0, "{stderr}");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/report_page.py");
    let mut command = Command::new("python3");
    let output = command.arg(script).arg(place.path().join("report/report.html")).output().unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    let page: Value =
        serde_json::from_str(text.lines().last().unwrap_or("")).expect("a line of JSON at the end");
    assert_eq!(page, json!({"loads": 6}), "{text}");
}
