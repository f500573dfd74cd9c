//! Sweeps through a real Slurm on this machine's loopback interface: slurmctld, slurmd and munged as
//! `tests/slurm/cluster.sh` starts them. Where they are not installed the test says so and passes.
#![cfg(unix)]

#[path = "common/place.rs"]
mod place;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use place::{Place, same_end};
use serde_json::Value;

/// Runs of some seconds, on a model so small that they need little of two cores.
const BASE: &str = "
task:
  preset: task2
  ambiguities: 4
  depth: 3
  length: 12
  gap: {low: 0.1, high: 0.3}
  test_gap: 0.2
  samples: {train: 4000, validation: 20, test: 40}
model: {name: gated_delta_net, layers: 2, width: 16, state: 8}
train: {batch: 8, lr: 0.01, warmup: 10, eval_every: 160, save_every: 1, log_every: 1, eval_batch: 16}
";

const SWEEP: &str = "
base: tiny.yaml
grid: {seed: {from: 1, to: 6}}
slurm:
  partition: work
  time: 00:10:00
  workers: 3
  notice: 1
  setup: [\"export GREETING='a \\\"b\\\" $HOME'\", 'echo \"the greeting is $GREETING\"']
  options: ['--comment=x \"y\" \\ z']
";

/// Longest that anything here may take.
const LONG: Duration = Duration::from_secs(120);

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/slurm/cluster.sh");

/// A Slurm that ends with the test.
struct Cluster(tempfile::TempDir);

impl Cluster {
    fn start() -> Option<Self> {
        for program in ["slurmctld", "slurmd", "sbatch", "munged"] {
            let there = Command::new("sh").args(["-c", &format!("command -v {program}")]).output().unwrap();
            if !there.status.success() {
                println!("skipped: no Slurm on this machine ({program} is missing)");
                return None;
            }
        }
        let cluster = Self(tempfile::tempdir().unwrap());
        let output = Command::new(SCRIPT).arg("start").arg(cluster.0.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Some(cluster)
    }

    /// A command of Slurm; what it prints.
    fn ask(&self, args: &[&str]) -> String {
        let output = Command::new(args[0]).args(&args[1..]).env("SLURM_CONF", self.conf()).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_string()
    }

    fn conf(&self) -> PathBuf {
        self.0.path().join("slurm.conf")
    }

    /// Tasks that run or wait.
    fn tasks(&self) -> Vec<String> {
        self.ask(&["squeue", "--noheader", "--array", "--format=%F_%K %T"])
            .lines()
            .map(str::to_string)
            .collect()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = Command::new(SCRIPT).arg("stop").arg(self.0.path()).status();
    }
}

/// A sweep on the cluster.
struct Sweep<'a> {
    place: &'a Place,
    cluster: &'a Cluster,
    out: &'a str,
}

impl Sweep<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.place.path(self.out).join(name)
    }

    fn launch(&self, more: &[&str]) -> Child {
        let args = ["sweep", "sweep.yaml", "--out", self.out, "--launcher", "slurm"];
        let log =
            fs::OpenOptions::new().create(true).append(true).open(self.place.path("launch.log")).unwrap();
        let mut command = self.place.command(&[&args, more].concat());
        command.env("SLURM_CONF", self.cluster.conf()).stdout(Stdio::null()).stderr(log);
        command.spawn().unwrap()
    }

    /// Waits for the end of a launcher; its exit code.
    fn end(&self, child: Child) -> i32 {
        let mut child = child;
        self.wait("the launcher ends", || child.try_wait().unwrap().is_some());
        child.wait().unwrap().code().unwrap_or(-1)
    }

    fn wait(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let begin = Instant::now();
        while !holds() {
            assert!(begin.elapsed() < LONG, "waiting until {what}: {}", self.story());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Everything that was printed.
    fn story(&self) -> String {
        let logs = fs::read_dir(self.path("slurm")).unwrap().flatten().map(|entry| entry.path());
        let logs = logs.filter(|path| path.extension().is_some_and(|ending| ending == "log"));
        let read =
            |path: PathBuf| format!("{}:\n{}", path.display(), fs::read_to_string(&path).unwrap_or_default());
        let mut all: Vec<String> = logs.map(read).collect();
        all.sort();
        all.push(read(self.place.path("launch.log")));
        all.push(format!("{:?}", self.cluster.tasks()));
        all.join("\n")
    }

    /// Waits until so many tasks train, and have saved something; the claims.
    fn wait_for_training(&self, tasks: usize) -> Vec<Value> {
        let mut claims = Vec::new();
        self.wait("tasks train", || {
            claims = self.claims();
            let saved = claims.iter().filter(|claim| {
                let id = claim["id"].as_str().unwrap();
                self.runs().iter().any(|dir| {
                    dir.to_string_lossy().ends_with(&id[..8])
                        && dir.join("state.safetensors").exists()
                        && !dir.join("summary.json").exists()
                })
            });
            saved.count() >= tasks
        });
        claims
    }

    /// The claims that living workers hold.
    fn claims(&self) -> Vec<Value> {
        let Ok(entries) = fs::read_dir(self.path("ledger")) else { return Vec::new() };
        let claim = |path: PathBuf| {
            let name = path.file_name()?.to_string_lossy().into_owned();
            let (id, _) = name.split_once(".claim.")?;
            let mut claim: Value = serde_json::from_slice(&fs::read(&path).ok()?).ok()?;
            claim["id"] = id.into();
            let alive = Path::new("/proc").join(claim["pid"].to_string()).exists();
            (claim["released"] == false && alive).then_some(claim)
        };
        entries.flatten().filter_map(|entry| claim(entry.path())).collect()
    }

    fn runs(&self) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(self.path("runs")) else { return Vec::new() };
        let mut runs: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        runs.sort();
        runs
    }

    /// The number of workers that were submitted in all.
    fn submitted(&self) -> usize {
        let text = fs::read_to_string(self.place.path("launch.log")).unwrap();
        let numbers = text
            .lines()
            .filter_map(|line| line.strip_prefix("submitted ")?.split(' ').next()?.parse::<usize>().ok());
        numbers.sum()
    }

    /// Every run was finished once, with the numbers of the sweep in `plain`.
    fn is_as(&self, plain: &Path) {
        let runs = self.runs();
        assert_eq!(runs.len(), 6, "{runs:?}");
        for run in &runs {
            same_end(&plain.join("runs").join(run.file_name().unwrap()), run);
            let log = fs::read_to_string(run.join("log.txt")).unwrap();
            assert_eq!(log.matches("run directory: ").count(), 1, "{log}");
        }
        let mut ledger: Vec<_> =
            fs::read_dir(self.path("ledger")).unwrap().flatten().map(|e| e.file_name()).collect();
        ledger.retain(|name| !name.to_string_lossy().ends_with(".done.json"));
        assert!(ledger.is_empty(), "{ledger:?}");
    }
}

fn signal(name: &str, process: u64) {
    assert!(Command::new("kill").args([name, &process.to_string()]).status().unwrap().success());
}

/// The index of the task that a process belongs to.
fn task_of(process: u64) -> String {
    let environment = fs::read(format!("/proc/{process}/environ")).unwrap();
    let mut variables = environment.split(|byte| *byte == 0).map(|text| String::from_utf8_lossy(text));
    variables.find_map(|text| Some(text.strip_prefix("SLURM_ARRAY_TASK_ID=")?.to_string())).unwrap()
}

#[test]
fn a_sweep_on_slurm_survives_what_slurm_does() {
    let Some(cluster) = Cluster::start() else { return };
    let place = Place::new(BASE);
    fs::write(place.path("sweep.yaml"), SWEEP).unwrap();
    place.ok(&["sweep", "sweep.yaml", "--out", "plain", "--per-device", "2"]);
    let plain = place.path("plain");

    // A task is requeued, a worker killed, and a more urgent job takes a node.
    let sweep = Sweep { place: &place, cluster: &cluster, out: "it's 50%a disturbed" };
    let launcher = sweep.launch(&[]);
    let claims = sweep.wait_for_training(3);
    let script = fs::read_to_string(sweep.path("slurm/1.sh")).unwrap();
    let job = cluster.tasks()[0].split('_').next().unwrap().to_string();
    cluster.ask(&["scontrol", "requeue", &format!("{job}_0")]);
    let pids = claims.iter().map(|claim| claim["pid"].as_u64().unwrap());
    signal("-KILL", pids.into_iter().find(|pid| task_of(*pid) == "1").unwrap());
    let comment = cluster.ask(&["scontrol", "show", "job", &format!("{job}_1")]);
    assert!(comment.contains("Comment=x \"y\" \\ z"), "{comment}\n{script}");
    sweep.wait_for_training(1);
    let all =
        ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--wrap=sleep 1", "--output=/dev/null"];
    cluster.ask(&[&["sbatch", "--partition=urgent"], &all[..]].concat());
    assert_eq!(sweep.end(launcher), 0, "{}", sweep.story());
    sweep.is_as(&plain);
    let story = sweep.story();
    for part in [
        "the greeting is a \"b\" $HOME",
        "DUE TO JOB REQUEUE",
        "DUE TO PREEMPTION",
        "resumes on cpu",
        "_1 is lost: FAILED",
    ] {
        assert!(story.contains(part), "{part}: {story}");
    }
    assert_eq!(cluster.tasks(), [""; 0]);

    // Somebody cancels everything: the launcher says so, and a later one goes on.
    fs::remove_file(place.path("launch.log")).unwrap();
    let sweep = Sweep { out: "cancelled", ..sweep };
    let launcher = sweep.launch(&[]);
    sweep.wait_for_training(3);
    cluster.ask(&["scancel", "--user", &cluster.ask(&["id", "-un"])]);
    assert_eq!(sweep.end(launcher), 130, "{}", sweep.story());
    assert!(sweep.story().contains("the jobs were cancelled"), "{}", sweep.story());
    assert_eq!((sweep.claims(), sweep.submitted()), (vec![], 3));
    // What Slurm refuses is said in its words.
    assert_eq!(sweep.end(sweep.launch(&["--slurm", "partition=nowhere"])), 1);
    assert!(sweep.story().contains("sbatch says: sbatch: error: invalid partition specified: nowhere"));
    // Left alone, and taken up again: nothing is submitted twice.
    assert_eq!(sweep.end(sweep.launch(&["--detach"])), 0);
    assert_eq!(sweep.submitted(), 6);
    let mut launcher = sweep.launch(&[]);
    sweep.wait_for_training(3);
    assert!(launcher.try_wait().unwrap().is_none());
    // Ctrl-C cancels: when the launcher is gone, nothing runs, and nothing is claimed.
    signal("-INT", launcher.id().into());
    assert_eq!(sweep.end(launcher), 130, "{}", sweep.story());
    assert_eq!((sweep.claims(), sweep.submitted(), cluster.tasks()), (vec![], 6, vec![]));
    // The time of a task is nearly over: it saves, and queues again by itself.
    let launcher = sweep.launch(&["--slurm", "workers=1"]);
    sweep.wait_for_training(1);
    std::thread::sleep(Duration::from_secs(1));
    let task = cluster.tasks()[0].split(' ').next().unwrap().to_string();
    cluster.ask(&["scancel", "--batch", "--signal=USR1", &task]);
    assert_eq!(sweep.end(launcher), 0, "{}", sweep.story());
    assert_eq!(sweep.submitted(), 7, "{}", sweep.story());
    assert!(cluster.ask(&["scontrol", "show", "job", &task]).contains("Restarts=1"));
    sweep.is_as(&plain);
}

#[test]
fn what_slurm_cannot_do_is_said_in_one_sentence() {
    let place = Place::new(BASE);
    fs::write(place.path("sweep.yaml"), SWEEP).unwrap();
    let slurm = |set: &'static str| ["sweep", "sweep.yaml", "--launcher", "slurm", "--slurm", set];
    place.refuses(&slurm("partitoin=gpu"), "did you mean `partition`?");
    place.refuses(&slurm("partition"), "write key=value");
    place.refuses(&slurm("workers=0"), "it must be a whole number from 1 on");
    place.refuses(&slurm("mem=8 G"), "it must be one word");
    place.refuses(&slurm("options=--array=1-3"), "--array, which the launcher sets itself");
    place.refuses(&slurm("options=constraint=a100"), "it must be an option of sbatch");
    place.refuses(&slurm("setup=[{a: 1}]"), "it must be text on one line");
    place.refuses(&["sweep", "sweep.yaml", "--detach"], "--launcher slurm");
    let nowhere = tempfile::tempdir().unwrap();
    let mut command = place.command(&slurm("time=1"));
    let output = command.env("PATH", nowhere.path()).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("needs sbatch, which is not in PATH"), "{stderr}");
    assert!(!place.path("runs").exists());
}
