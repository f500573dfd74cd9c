//! Sweeps in bad weather, with real processes and signals: a full disk, a folder that is removed, two machines
//! whose clocks disagree and one of which dies, files that are cut in half. No result may be lost or be made twice,
//! and the message says what to do.
#![cfg(target_os = "linux")]

#[path = "common/place.rs"]
mod place;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use place::{Place, same_end};

/// Four runs of a second or two.
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
  model: {name: gated_delta_net, layers: 2, width: 16, state: 8}
  train: {batch: 8, lr: 0.01, warmup: 10, eval_every: 160, save_every: 3, log_every: 1, eval_batch: 16}
grid: {seed: {from: 1, to: 4}}
";

/// What to do, as every sweep says that something kept from its work.
const ADVICE: &str = "mend the cause and give the same command again";

struct Weather {
    place: Place,
    program: String,
}

impl Weather {
    /// A folder, and in it the undisturbed sweep `whole`.
    fn new() -> Self {
        let place = Place::new(SWEEP);
        place.ok(&["sweep", "tiny.yaml", "--out", "whole", "--jobs", "2"]);
        let program = place.command(&[]).get_program().to_str().unwrap().to_string();
        Self { place, program }
    }

    /// A shell in the folder that knows the program as `$0`.
    fn shell(&self, script: &str) -> Command {
        self.shell_in(&[], script)
    }

    fn shell_in(&self, around: &[&str], script: &str) -> Command {
        let words: Vec<&str> = around.iter().copied().chain(["bash", "-c", script, &self.program]).collect();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).current_dir(self.place.path("")).stdin(Stdio::null());
        command
    }

    /// Every run was done once, and as in the undisturbed sweep.
    fn is_whole(&self, sweep: &str) {
        let (whole, other) = (runs(&self.place.path("whole")), runs(&self.place.path(sweep)));
        assert_eq!(whole.keys().collect::<Vec<_>>(), other.keys().collect::<Vec<_>>());
        for (name, run) in &other {
            same_end(&whole[name], run);
            let log = fs::read_to_string(run.join("log.txt")).unwrap();
            assert_eq!(log.matches("run directory: ").count(), 1, "{log}");
        }
        let left: Vec<String> =
            ledger(&self.place.path(sweep)).into_iter().filter(|n| !n.ends_with(".done.json")).collect();
        assert!(left.is_empty(), "{left:?}");
    }

    /// Waits until something holds.
    fn wait(&self, what: &str, holds: impl Fn() -> bool) {
        let begin = Instant::now();
        while !holds() {
            assert!(begin.elapsed() < Duration::from_secs(60), "waiting until {what}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// The run directories of a sweep by name.
fn runs(dir: &Path) -> BTreeMap<String, PathBuf> {
    let entries = fs::read_dir(dir.join("runs")).into_iter().flatten().flatten();
    entries.map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry.path())).collect()
}

/// The names in the ledger of a sweep.
fn ledger(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir.join("ledger")).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn done(dir: &Path) -> usize {
    ledger(dir).iter().filter(|name| name.ends_with(".done.json")).count()
}

fn texts(output: &Output) -> (i32, String) {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code().unwrap_or(-1), text)
}

/// Whether the system lets this process be another machine: its own processes, its own file systems.
fn can(around: &[&str]) -> bool {
    let output = Command::new(around[0]).args(&around[1..]).arg("true").output();
    let can = output.is_ok_and(|output| output.status.success());
    if !can {
        println!("skipped: `{}` does not work here", around.join(" "));
    }
    can
}

#[test]
fn a_full_disk_stops_the_sweep_and_no_run_fails_for_it() {
    let weather = Weather::new();
    // The signal is ignored: writing fails as on a full disk. Weights fit, weights with moments do not.
    let limited = "trap '' XFSZ; ulimit -f 60; exec \"$0\" sweep tiny.yaml --out limited";
    let (code, stderr) = texts(&weather.shell(limited).output().unwrap());
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains(ADVICE) && stderr.contains("File too large"), "{stderr}");
    assert!(ledger(&weather.place.path("limited")).iter().all(|name| !name.contains("failed")), "{stderr}");
    weather.place.ok(&["sweep", "tiny.yaml", "--out", "limited"]);
    weather.is_whole("limited");

    let own = ["unshare", "--map-root-user", "--mount"];
    if !can(&own) {
        return;
    }
    // A real file system, with room for half of the sweep.
    let script = "
        set -e
        mkdir disk
        mount -t tmpfs -o size=1500k none disk
        head -c 1100000 /dev/zero >disk/ballast
        code=0; \"$0\" sweep tiny.yaml --out disk/sweep --jobs 2 || code=$?
        [ $code = 1 ]
        cp -r disk/sweep full
        rm disk/ballast
        \"$0\" sweep tiny.yaml --out disk/sweep
        cp -r disk/sweep healed";
    let (code, stderr) = texts(&weather.shell_in(&own, script).output().unwrap());
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains(ADVICE) && stderr.contains("No space left on device"), "{stderr}");
    let full = weather.place.path("full");
    assert!(done(&full) < 4 && ledger(&full).iter().all(|name| !name.contains("failed")), "{stderr}");
    weather.is_whole("healed");
}

#[test]
fn a_folder_that_is_removed_ends_the_sweep_and_its_children() {
    let weather = Weather::new();
    let dir = weather.place.path("away");
    let mut sweep = weather.place.command(&["sweep", "tiny.yaml", "--out", "away", "--jobs", "2"]);
    let sweep = sweep.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    weather.wait("runs are saved", || runs(&dir).values().any(|run| run.join("state.safetensors").exists()));
    // A process may write while its folder is emptied.
    while dir.exists() {
        let _ = fs::remove_dir_all(&dir);
    }
    let (code, stderr) = texts(&sweep.wait_with_output().unwrap());
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("the folder away is gone") && stderr.contains(ADVICE), "{stderr}");
    assert!(!dir.exists(), "something wrote on: {:?}", place::tree(&dir));
    weather.place.ok(&["sweep", "tiny.yaml", "--out", "away"]);
    weather.is_whole("away");
}

/// Two machines share a folder: one is two hours ahead and dies, the other is right and takes over its runs, but only
/// after the lease; then two that are wrong share the rest.
#[test]
fn machines_whose_clocks_disagree_share_a_sweep_and_outlive_each_other() {
    let elsewhere =
        ["unshare", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"];
    if !can(&elsewhere) || !can(&["faketime", "-f", "+2h"]) {
        return;
    }
    let weather = Weather::new();
    let on = |clock: &str| {
        // faketime keeps a semaphore by the number of its process, which another machine may have, too.
        let script = format!(
            "mount -t tmpfs none /dev/shm && exec faketime -f {clock} \"$0\" sweep tiny.yaml --out shared --lease 10"
        );
        let mut command = weather.shell_in(&elsewhere, &script);
        // The files' times are those of the server.
        command.env("NO_FAKE_STAT", "1").stdout(Stdio::null()).stderr(Stdio::piped());
        command
    };
    let dir = weather.place.path("shared");
    let mut ahead = on("+2h").spawn().unwrap();
    weather.wait("a run is saved", || runs(&dir).values().any(|run| run.join("state.safetensors").exists()));
    // All its processes end at once, as those of a machine without power.
    ahead.kill().unwrap();
    ahead.wait().unwrap();
    let held =
        ledger(&dir).into_iter().find(|name| name.contains(".claim.")).expect("a run without an owner");
    let others = [on("-2h").spawn().unwrap(), on("+1h").spawn().unwrap()];
    // Others are done first; the lease of the dead keeps its run.
    weather.wait("three runs are done", || done(&dir) == 3);
    assert!(ledger(&dir).contains(&held), "{held}: {:?}", ledger(&dir));
    for other in others {
        let (code, stderr) = texts(&other.wait_with_output().unwrap());
        assert_eq!(code, 0, "{stderr}");
    }
    weather.is_whole("shared");
}

#[test]
fn two_sweeps_at_once_do_every_run_once() {
    let weather = Weather::new();
    let start = || {
        let mut command = weather.place.command(&["sweep", "tiny.yaml", "--out", "both"]);
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let starts: usize = [start(), start()]
        .map(|sweep| {
            let (code, stderr) = texts(&sweep.wait_with_output().unwrap());
            assert_eq!(code, 0, "{stderr}");
            assert!(!stderr.contains("resumes"), "{stderr}");
            stderr.matches("starts on").count()
        })
        .iter()
        .sum();
    assert_eq!(starts, 4);
    weather.is_whole("both");
}

/// Every file that a sweep keeps is cut in half while a run is under way: the results stay, the rest is done again
/// or goes on.
#[test]
fn files_cut_in_half_cost_no_result() {
    let weather = Weather::new();
    let dir = weather.place.path("cut");
    let mut sweep = weather.place.command(&["sweep", "tiny.yaml", "--out", "cut"]);
    let mut sweep = sweep.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    weather.wait("the third run is under way", || {
        done(&dir) == 2
            && runs(&dir).values().filter(|run| run.join("state.safetensors").exists()).count() == 3
    });
    sweep.kill().unwrap();
    sweep.wait().unwrap();
    let finished: Vec<(PathBuf, Vec<u8>)> = runs(&dir)
        .into_values()
        .filter_map(|run| Some((run.clone(), fs::read(run.join("summary.json")).ok()?)))
        .collect();
    assert!(finished.len() >= 2);
    let cut = |path: &Path| {
        let file = fs::OpenOptions::new().write(true).open(path).unwrap();
        file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    };
    let names = ledger(&dir);
    assert!(names.iter().any(|name| name.contains(".claim.")), "{names:?}");
    names.iter().for_each(|name| cut(&dir.join("ledger").join(name)));
    ["sweep.yaml", "status.csv"].iter().for_each(|name| cut(&dir.join(name)));
    // Nobody can say whose half a claim is: it holds until the lease is over.
    weather.place.ok(&["sweep", "tiny.yaml", "--out", "cut", "--lease", "10"]);
    for (run, summary) in &finished {
        assert!(fs::read(run.join("summary.json")).unwrap() == *summary, "{} was made again", run.display());
    }
    weather.is_whole("cut");
    // Half a summary is none: that run is made again, the others stay.
    cut(&finished[0].0.join("summary.json"));
    let (code, stderr) = weather.place.run(&["sweep", "tiny.yaml", "--out", "cut"]);
    assert!(code == 0 && stderr.contains("has lost its summary"), "{stderr}");
    assert_eq!(stderr.matches(" done: ").count(), 1, "{stderr}");
    same_end(
        &runs(&weather.place.path("whole"))[finished[0].0.file_name().unwrap().to_str().unwrap()],
        &finished[0].0,
    );
}
