//! A folder in which the program is run, and what it leaves there.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use assert_cmd::cargo::cargo_bin_cmd;
use serde_json::Value;

pub struct Place(tempfile::TempDir);

impl Place {
    pub fn new(config: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("tiny.yaml"), config).unwrap();
        Self(dir)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let program = cargo_bin_cmd!("selectivbench").get_program().to_owned();
        let mut command = Command::new(program);
        command.current_dir(self.0.path()).args(args).stdin(Stdio::null());
        command
    }

    /// Runs to the end; gives exit code and stderr.
    pub fn run(&self, args: &[&str]) -> (i32, String) {
        let Output { status, stderr, .. } = self.command(args).output().unwrap();
        (status.code().unwrap_or(-1), String::from_utf8(stderr).unwrap())
    }

    /// Waits until the run that `child` trains has saved its state.
    pub fn wait_for_state(&self, run: &str, child: &mut Child) {
        while !self.path(run).join("state.safetensors").exists() {
            assert!(child.try_wait().unwrap().is_none(), "the run ended before it saved anything");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.command(args).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {stderr}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Expects bad input: exit code 2, one sentence that holds `part`, and no new file.
    pub fn refuses(&self, args: &[&str], part: &str) {
        let before = tree(self.0.path());
        let (code, stderr) = self.run(args);
        assert_eq!(code, 2, "{args:?}: {stderr}");
        assert_eq!(stderr.trim_end().lines().count(), 1, "{args:?}: {stderr}");
        assert!(stderr.starts_with("error: ") && stderr.contains(part), "{args:?}: {stderr}");
        assert_eq!(tree(self.0.path()), before, "{args:?} wrote something");
    }
}

/// Every file below `dir`, with its contents.
pub fn tree(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            files.push((path.clone(), vec![]));
            files.extend(tree(&path));
        } else {
            files.push((path.clone(), fs::read(&path).unwrap()));
        }
    }
    files.sort();
    files
}

/// The metrics without what a clock says.
pub fn metrics(run: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| {
            let mut value: Value = serde_json::from_str(line).unwrap();
            let object = value.as_object_mut().unwrap();
            object.retain(|key, _| !["seconds", "tokens_per_s", "peak_memory"].contains(&key.as_str()));
            value
        })
        .collect()
}

pub fn summary(run: &Path) -> Value {
    serde_json::from_slice(&fs::read(run.join("summary.json")).unwrap()).unwrap()
}

pub fn same_end(a: &Path, b: &Path) {
    let bytes = |run: &Path| fs::read(run.join("checkpoint.safetensors")).unwrap();
    assert!(bytes(a) == bytes(b), "the checkpoints differ");
    assert_eq!(metrics(a), metrics(b));
    for field in ["accuracy", "loss", "ceiling", "steps", "samples", "parameters", "data"] {
        assert_eq!(summary(a)[field], summary(b)[field], "{field}");
    }
}
