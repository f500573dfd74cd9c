//! `--launcher slurm`: the workers of a sweep as the tasks of a Slurm job array.
//!
//! The ledger does all the work: a task is nothing but one more process that takes runs until none is left, so
//! tasks may begin late, be preempted, be killed and come back as they like. What is done here is to start them
//! (`sbatch`), to watch them (`squeue`), to replace those that are lost, and to cancel them (`scancel`).
//!
//! | in `slurm/` | |
//! |---|---|
//! | `<n>.sh` | the batch script of each submission; `sbatch` takes it by hand, too |
//! | `<job>_<task>.log` | what a task printed, restarts included |
//! | `jobs.json` | the submissions, so that the next process finds those that are still there |
//!
//! Slurm ends a task in three ways, and all save the runs: *cancellation*, *preemption* and *requeue* send SIGTERM
//! to every process of the task; *the end of its time* is announced to the script by SIGUSR1, which stops the
//! worker and queues the task again. What Slurm requeues takes up its runs where they stood. A task that dies
//! otherwise leaves claims that the others take over.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_yaml::{Mapping, Value};
use signal_hook::consts::SIGINT;

use super::board::{Board, Counts, write_status};
use super::file::check_keys;
use super::ledger::Ledger;
use super::plan::Plan;
use super::worker::{Outcome, check_results};
use crate::config::load::{document, shown};
use crate::error::INTERRUPTED;
use crate::{bad_input, bail_input, files};

/// Settings that are options of `sbatch` under the same name, with dashes.
const OPTIONS: [&str; 7] = ["partition", "time", "gres", "cpus_per_task", "mem", "account", "qos"];

/// The other settings.
const OTHERS: [&str; 4] = ["workers", "notice", "setup", "options"];

/// Options that the launcher itself needs to be as they are.
const OWN: [&str; 12] = [
    "--array",
    "-a",
    "--output",
    "-o",
    "--error",
    "-e",
    "--signal",
    "--requeue",
    "--no-requeue",
    "--open-mode",
    "--wrap",
    "--chdir",
];

/// Workers at once if neither the user nor the number of runs says less.
const MOST_WORKERS: usize = 100;

/// The part `slurm:` of a sweep file, and what `--slurm key=value` lays over it.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Options of `sbatch`, complete.
    options: Vec<String>,
    /// Tasks at once, at most.
    workers: usize,
    /// Seconds before the end of a task's time at which it saves and queues again.
    notice: usize,
    /// Lines of shell before the worker starts.
    setup: Vec<String>,
}

impl Settings {
    /// Checks the settings in a sweep file that messages call `origin`, with `sets`, each `key=value`, over them.
    pub fn read(mapping: &Mapping, origin: &str, sets: &[String]) -> Result<Self> {
        let known: Vec<&str> = OPTIONS.into_iter().chain(OTHERS).collect();
        let mut all: BTreeMap<String, (Value, String)> = BTreeMap::new();
        let mut lay = |mapping: &Mapping, origin: &str| -> Result<()> {
            check_keys(mapping, &known, origin, "slurm")?;
            for (key, value) in mapping.iter().filter(|(_, value)| !value.is_null()) {
                let key = key.as_str().unwrap_or_default();
                all.insert(key.to_string(), (value.clone(), format!("{origin}: slurm.{key}")));
            }
            Ok(())
        };
        lay(mapping, origin)?;
        for set in sets {
            let place = format!("--slurm {set}");
            let Some((key, value)) = set.split_once('=') else {
                bail_input!("{place}: write key=value, for example --slurm partition=gpu")
            };
            lay(&Mapping::from_iter([(key.trim().into(), document(value, &place)?)]), &place)?;
        }

        let mut options = Vec::new();
        for key in OPTIONS {
            let Some((value, place)) = all.get(key) else { continue };
            options.push(format!("--{}={}", key.replace('_', "-"), word(value, place)?));
        }
        let lines = |key: &str| match all.get(key) {
            None => Ok(Vec::new()),
            Some((Value::Sequence(lines), place)) => lines.iter().map(|line| text(line, place)).collect(),
            Some((line, place)) => Ok(vec![text(line, place)?]),
        };
        for option in lines("options")? {
            let name = option.split(['=', ' ']).next().unwrap_or_default();
            if !name.starts_with('-') || name.trim_start_matches('-').is_empty() {
                bail_input!(
                    "{origin}: slurm.options holds `{option}`; it must be an option of sbatch, such as \
                     --constraint=a100"
                )
            }
            if OWN.contains(&name) {
                bail_input!(
                    "{origin}: slurm.options holds {name}, which the launcher sets itself; leave it out"
                )
            }
            options.push(option);
        }
        let count = |key: &str, default: usize| match all.get(key) {
            None => Ok(default),
            Some((value, place)) => match value.as_u64() {
                Some(n @ 1..=1_000_000) => Ok(n as usize),
                _ => Err(bad_input!("{place} is {}; it must be a whole number from 1 on", shown(value))),
            },
        };
        Ok(Self {
            options,
            workers: count("workers", MOST_WORKERS)?,
            notice: count("notice", 60)?,
            setup: lines("setup")?,
        })
    }

    /// Whether the tasks will have a GPU, as far as the settings tell.
    pub fn gpu(&self) -> bool {
        let asks = |option: &String| option.starts_with("--gpus") || option.starts_with("-G");
        self.options
            .iter()
            .any(|option| asks(option) || (option.starts_with("--gres") && option.contains("gpu")))
    }
}

/// A value as `sbatch` takes it: one word or number.
fn word(value: &Value, place: &str) -> Result<String> {
    let text = text(value, place)?;
    match text.is_empty() || text.contains(char::is_whitespace) {
        true => bail_input!("{place} is {}; it must be one word", shown(value)),
        false => Ok(text),
    }
}

/// A text on one line, or a number.
fn text(value: &Value, place: &str) -> Result<String> {
    match value {
        Value::String(text) if !text.contains(char::is_control) => Ok(text.clone()),
        Value::Number(number) => Ok(number.to_string()),
        other => bail_input!("{place} is {}; it must be text on one line", shown(other)),
    }
}

/// What the workers run, and where.
pub struct Workers {
    /// The folder of the sweep.
    pub dir: PathBuf,
    /// The name of the sweep.
    pub name: String,
    /// This program with the arguments of a worker.
    pub command: Vec<OsString>,
    pub settings: Settings,
}

/// A submission.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Job {
    id: String,
    /// Where Slurm looks after several clusters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cluster: Option<String>,
    tasks: usize,
    script: String,
}

/// A task of a job array: job and index.
type Task = (String, usize);

/// The state of a task, in Slurm's words.
#[derive(Clone, Debug, PartialEq)]
struct TaskState {
    state: String,
    /// Why it waits.
    reason: String,
}

impl TaskState {
    fn new(state: &str) -> Self {
        Self { state: state.into(), reason: String::new() }
    }

    /// Whether the task runs, or will.
    fn is_active(&self) -> bool {
        !matches!(
            self.state.as_str(),
            "COMPLETED"
                | "CANCELLED"
                | "FAILED"
                | "TIMEOUT"
                | "NODE_FAIL"
                | "PREEMPTED"
                | "BOOT_FAIL"
                | "DEADLINE"
                | "OUT_OF_MEMORY"
                | GONE
        )
    }

    /// Whether the task ended without having finished its work, and nobody wanted that.
    fn is_lost(&self) -> bool {
        !self.is_active() && !matches!(self.state.as_str(), "COMPLETED" | "CANCELLED")
    }
}

/// A task that Slurm no longer knows.
const GONE: &str = "gone";

/// The tasks of a sweep.
struct Array {
    workers: Workers,
    jobs: Vec<Job>,
    /// Those that were there since the last submission.
    tasks: BTreeMap<Task, TaskState>,
}

impl Array {
    /// Finds the tasks that earlier launches left.
    fn open(workers: Workers) -> Result<Self> {
        files::create_folder(&workers.dir.join("slurm"))?;
        let mut array = Self { workers, jobs: Vec::new(), tasks: BTreeMap::new() };
        array.attach()?;
        Ok(array)
    }

    fn folder(&self) -> PathBuf {
        self.workers.dir.join("slurm")
    }

    /// Tasks that run or will.
    fn active(&self) -> usize {
        self.tasks.values().filter(|task| task.is_active()).count()
    }

    /// Tasks that ended without having finished, though nobody cancelled them.
    fn lost(&self) -> usize {
        self.tasks.values().filter(|task| task.is_lost()).count()
    }

    /// Whether a task was cancelled, and not by this process.
    fn cancelled(&self) -> bool {
        self.tasks.values().any(|task| task.state == "CANCELLED")
    }

    /// Keeps other processes from submitting until the result is dropped.
    fn lock(&self) -> Result<File> {
        let path = self.folder().join(".lock");
        let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        // A file system without locks: better to go on than to refuse.
        let _ = file.lock();
        Ok(file)
    }

    /// Takes in the jobs that others submitted, as far as they are still there.
    fn attach(&mut self) -> Result<()> {
        let path = self.folder().join("jobs.json");
        self.jobs = match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map_err(|error| {
                bad_input!(
                    "{} is damaged: {error}; cancel the jobs of this sweep that `squeue --me` shows, delete the \
                     file, and start again",
                    path.display()
                )
            })?,
            Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        if self.jobs.is_empty() {
            return Ok(());
        }
        let active = self.queue()?.into_iter().filter(|(_, state)| state.is_active());
        self.tasks.extend(active);
        Ok(())
    }

    /// Submits workers until there are `wanted`, though no more than `most` new ones, nor more in all than the
    /// settings allow. Gives the number of new ones.
    fn submit(&mut self, wanted: usize, most: usize) -> Result<usize> {
        let _lock = self.lock()?;
        // Another process may just have done it.
        self.attach()?;
        self.tasks.retain(|_, task| task.is_active());
        let tasks = wanted.min(self.workers.settings.workers).saturating_sub(self.active()).min(most);
        if tasks == 0 {
            return Ok(0);
        }
        let folder = self.folder();
        let script =
            (1..).map(|n| format!("{n}.sh")).find(|name| !folder.join(name).exists()).unwrap_or_default();
        let path = folder.join(&script);
        let text = self.script(tasks)?;
        files::write_atomic(&path, |out| out.write_all(text.as_bytes()))?;
        let mut sbatch = Command::new("sbatch");
        sbatch.arg("--parsable").arg(&path);
        // Submitted from inside a job: what belongs to that job is none of ours.
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("SLURM_") && text != "SLURM_CONF" && text != "SLURM_CLUSTERS" {
                sbatch.env_remove(&name);
            }
        }
        let answer = call(&mut sbatch)?;
        let (id, cluster) = match answer.trim().split_once(';') {
            Some((id, cluster)) => (id, Some(cluster.to_string())),
            None => (answer.trim(), None),
        };
        if id.is_empty() || !id.bytes().all(|byte| byte.is_ascii_digit()) {
            anyhow::bail!("sbatch answered `{}`, which is not the number of a job", answer.trim())
        }
        self.jobs.retain(|job| self.tasks.keys().any(|(id, _)| *id == job.id));
        self.jobs.push(Job { id: id.into(), cluster, tasks, script });
        let json = serde_json::to_string_pretty(&self.jobs)? + "\n";
        let written = files::write_atomic(&folder.join("jobs.json"), |out| out.write_all(json.as_bytes()));
        // A job that is not in the list would be submitted once more.
        written.inspect_err(|_| drop(self.scancel(&self.jobs[self.jobs.len() - 1..], &[])))?;
        self.tasks.extend((0..tasks).map(|index| ((id.to_string(), index), TaskState::new("PENDING"))));
        Ok(tasks)
    }

    /// The batch script of `tasks` workers.
    fn script(&self, tasks: usize) -> Result<String> {
        let Workers { dir, name, command, settings } = &self.workers;
        // A `%` would begin a pattern.
        let folder = absolute(&dir.join("slurm"))?.replace('%', "%%");
        let here = std::env::current_dir().context("the working folder is gone")?;
        let mut options = vec![
            format!("--job-name={name}"),
            format!("--array=0-{}", tasks - 1),
            format!("--output={folder}/%A_%a.log"),
            "--open-mode=append".to_string(),
            "--requeue".to_string(),
            format!("--signal=B:USR1@{}", settings.notice),
            format!("--chdir={}", absolute(&here)?),
        ];
        options.extend(settings.options.iter().cloned());
        let mut out =
            format!("#!/bin/bash\n# Workers of the sweep {name}: each takes runs until none is left.\n");
        for option in options {
            writeln!(out, "#SBATCH {}", sbatch_quoted(&option))?;
        }
        if !settings.setup.is_empty() {
            out.push('\n');
        }
        for line in &settings.setup {
            writeln!(out, "{line}")?;
        }
        let words = command.iter().map(|word| match word.to_str() {
            Some(word) => Ok(shell_quoted(word)),
            None => Err(bad_input!("{} is not UTF-8 text; batch scripts need it", word.display())),
        });
        let words = words.collect::<Result<Vec<_>>>()?.join(" ");
        write!(
            out,
            r#"
# The time is nearly over: stop the worker, which saves its runs, and queue again.
trap 'again=1; kill -TERM "$worker"' USR1
# Cancelled, preempted or requeued: Slurm has told the worker as well; wait until it has saved its runs.
trap ':' TERM
# What this task was given, where Slurm does not enforce it.
export RAYON_NUM_THREADS="${{SLURM_CPUS_ON_NODE:-0}}"
{words} &
worker=$!
wait "$worker"
while kill -0 "$worker" 2>/dev/null; do wait "$worker"; done
wait "$worker"
code=$?
# A task that had no time to do anything would come back for ever.
if [ -n "$again" ] && [ "$code" = 130 ] && [ "$SECONDS" -ge {notice} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"#,
            notice = settings.notice,
        )?;
        Ok(out)
    }

    /// Asks Slurm for all tasks of this sweep that it remembers.
    fn queue(&self) -> Result<BTreeMap<Task, TaskState>> {
        let mut found = BTreeMap::new();
        for (cluster, ids) in by_cluster(&self.jobs) {
            let mut squeue = Command::new("squeue");
            // Not by number: one that Slurm has forgotten would be an error.
            squeue.args(["--me", "--noheader", "--array", "--states=all", "--format=%F|%K|%T|%r"]);
            let answer = call(squeue.args(cluster_args(cluster)))?;
            for line in answer.lines() {
                let mut fields = line.split('|').map(str::trim);
                let (Some(id), Some(index), Some(state)) = (fields.next(), fields.next(), fields.next())
                else {
                    continue;
                };
                let (Ok(index), true) = (index.parse(), ids.contains(&id)) else { continue };
                let reason = fields.next().unwrap_or_default().to_string();
                found.insert((id.to_string(), index), TaskState { state: state.into(), reason });
            }
        }
        Ok(found)
    }

    /// Brings the states of the tasks up to date; gives those that were lost since, with how.
    fn refresh(&mut self) -> Result<Vec<(String, String)>> {
        let mut queue = self.queue()?;
        let mut lost = Vec::new();
        for (task, state) in &mut self.tasks {
            if !state.is_active() {
                continue;
            }
            *state = queue.remove(task).unwrap_or(TaskState::new(GONE));
            if state.is_lost() {
                lost.push((format!("{}_{}", task.0, task.1), state.state.clone()));
            }
        }
        Ok(lost)
    }

    /// `job 17: 3 running, 5 pending (Resources)`.
    fn describe(&self) -> String {
        let mut jobs: BTreeMap<&str, BTreeMap<String, usize>> = BTreeMap::new();
        for ((id, _), task) in self.tasks.iter().filter(|(_, task)| task.is_active()) {
            let state = task.state.to_lowercase();
            let state = match task.reason.as_str() {
                "" | "None" => state,
                reason => format!("{state} ({reason})"),
            };
            *jobs.entry(id).or_default().entry(state).or_default() += 1;
        }
        if jobs.is_empty() {
            return "no job".into();
        }
        let job = |(id, states): (&str, BTreeMap<String, usize>)| {
            let states: Vec<String> = states.into_iter().map(|(state, n)| format!("{n} {state}")).collect();
            format!("job {id}: {}", states.join(", "))
        };
        jobs.into_iter().map(job).collect::<Vec<_>>().join("; ")
    }

    /// The last line that a task printed.
    fn last_line(&self, task: &str) -> String {
        let text = std::fs::read(self.folder().join(format!("{task}.log"))).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it printed nothing").to_string()
    }

    /// Cancels all tasks and waits until they are gone: running ones save their runs first.
    fn cancel(&mut self) -> Result<()> {
        let sent = self.scancel(&self.jobs, &[]);
        self.wait_until_gone(Duration::from_secs(300));
        match self.active() {
            0 => Ok(()),
            left => sent.and_then(|()| {
                Err(anyhow::anyhow!("{left} tasks do not end: look at them with `squeue --me`"))
            }),
        }
    }

    /// Cancels the tasks that have not begun, which would only find that nothing is left to do.
    fn cancel_waiting(&mut self) {
        if self.active() > 0 {
            // They may have begun or ended by now.
            let _ = self.scancel(&self.jobs, &["--state=PENDING"]);
        }
    }

    /// Waits until no task is left, but no longer than `most`.
    fn wait_until_gone(&mut self, most: Duration) {
        let begin = Instant::now();
        while self.active() > 0 && begin.elapsed() < most {
            std::thread::sleep(interval(begin.elapsed()));
            // A controller that does not answer is asked again.
            let _ = self.refresh();
        }
    }

    fn scancel(&self, jobs: &[Job], only: &[&str]) -> Result<()> {
        for (cluster, ids) in by_cluster(jobs) {
            call(Command::new("scancel").args(cluster_args(cluster)).args(only).args(ids))?;
        }
        Ok(())
    }
}

/// The numbers of jobs by cluster.
fn by_cluster(jobs: &[Job]) -> BTreeMap<Option<&str>, Vec<&str>> {
    let mut clusters: BTreeMap<Option<&str>, Vec<&str>> = BTreeMap::new();
    for job in jobs {
        clusters.entry(job.cluster.as_deref()).or_default().push(&job.id);
    }
    clusters
}

fn cluster_args(cluster: Option<&str>) -> Vec<String> {
    cluster.map(|cluster| format!("--clusters={cluster}")).into_iter().collect()
}

/// Between two questions to the controller of Slurm, which many people share: seldom when it takes long.
fn interval(elapsed: Duration) -> Duration {
    (elapsed / 20).clamp(Duration::from_millis(500), Duration::from_secs(15))
}

/// What a command of Slurm prints; its own words where it fails.
fn call(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    // Ctrl-C is for this process: a submission that it broke off could leave a job that nobody knows.
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(command, 0);
    let Output { status, stdout, stderr } = match command.stdin(Stdio::null()).output() {
        Err(error) if error.kind() == ErrorKind::NotFound => bail_input!(
            "--launcher slurm needs {program}, which is not in PATH; give the command on a machine that submits to \
             Slurm, or leave --launcher out to work on this one"
        ),
        result => result.with_context(|| format!("cannot start {program}"))?,
    };
    if !status.success() {
        let stderr = String::from_utf8_lossy(&stderr);
        let words: Vec<&str> = stderr.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        match words.is_empty() {
            true => anyhow::bail!("{program} ended with {status}"),
            false => anyhow::bail!("{program} says: {}", words.join("; ")),
        }
    }
    Ok(String::from_utf8_lossy(&stdout).into_owned())
}

/// A path that means the same everywhere.
fn absolute(path: &Path) -> Result<String> {
    let path = std::path::absolute(path).with_context(|| format!("cannot find {}", path.display()))?;
    match path.to_str() {
        Some(text) if !text.contains(char::is_control) => Ok(text.to_string()),
        _ => bail_input!("the path {} cannot stand in a batch script; give another --out", path.display()),
    }
}

/// Whether a word means itself, to a shell and to sbatch.
fn is_plain(word: &str) -> bool {
    !word.is_empty() && word.chars().all(|c| c.is_ascii_alphanumeric() || "_-+=:,./@%".contains(c))
}

/// An option on a line of `#SBATCH`, where backslashes work inside any quotes.
fn sbatch_quoted(option: &str) -> String {
    match is_plain(option) {
        true => option.to_string(),
        false => format!("\"{}\"", option.replace('\\', "\\\\").replace('"', "\\\"")),
    }
}

/// A word of a shell.
fn shell_quoted(word: &str) -> String {
    match is_plain(word) {
        true => word.to_string(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

/// How a sweep is launched.
pub struct Options {
    /// Leave as soon as the workers are submitted.
    pub detach: bool,
    /// Submissions in a row that replace lost tasks without a run having ended in between.
    pub resubmit: usize,
    pub retry_failed: bool,
    pub fail_fast: bool,
    pub lease: Duration,
}

/// Submits workers for the plan's runs and follows them until nothing is left to do. None if it did not follow.
pub fn launch(plan: &Plan, workers: Workers, options: &Options) -> Result<Option<Outcome>> {
    // Not SIGTERM or SIGHUP: who loses the connection does not want to lose the jobs.
    let interrupted = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register_conditional_shutdown(SIGINT, INTERRUPTED, interrupted.clone())?;
    signal_hook::flag::register(SIGINT, interrupted.clone())?;

    call(Command::new("sbatch").arg("--version"))?;
    plan.create()?;
    let board = Board::new(plan);
    let mut ledger = Ledger::open(&plan.dir, options.lease);
    let before = ledger.look()?;
    check_results(plan, &ledger, &before, options.retry_failed, &board)?;
    let counts = Counts::of(plan, &ledger.look()?);
    let mut launcher =
        Launcher { plan, options, ledger, board, array: Array::open(workers)?, counts, interrupted };
    if options.detach {
        if launcher.submit(counts.pending)? == 0 {
            launcher.board.line(&format!("nothing to submit: {counts}; {}", launcher.array.describe()));
        }
        return Ok(None);
    }
    let outcome = launcher.follow();
    launcher.board.finish();
    outcome.map(Some)
}

struct Launcher<'a> {
    plan: &'a Plan,
    options: &'a Options,
    ledger: Ledger,
    board: Board,
    array: Array,
    counts: Counts,
    interrupted: Arc<AtomicBool>,
}

impl Launcher<'_> {
    /// Submits workers where there are fewer than runs for them, `most` at most.
    fn submit(&mut self, most: usize) -> Result<usize> {
        let wanted = self.counts.pending + self.counts.running;
        let tasks = self.array.submit(wanted, most)?;
        if tasks > 0 {
            self.board.line(&format!("submitted {tasks} workers as {}", self.array.describe()));
        }
        Ok(tasks)
    }

    fn follow(&mut self) -> Result<Outcome> {
        let failed = self.counts.failed;
        self.submit(self.counts.pending)?;
        let (begin, mut asked, mut ended, mut fruitless) = (Instant::now(), Instant::now(), self.ended(), 0);
        let mut said = String::new();
        loop {
            std::thread::sleep(Duration::from_millis(100));
            let cancel = self.interrupted.load(Ordering::SeqCst);
            if !cancel && asked.elapsed() < interval(begin.elapsed()) {
                continue;
            }
            if let Err(error) = self.ask() {
                self.board.line(&format!("{error:#}; still trying"));
            }
            asked = Instant::now();
            let snapshot = self.ledger.look()?;
            self.counts = Counts::of(self.plan, &snapshot);
            self.board.update(self.plan, &snapshot);
            let jobs = self.array.describe();
            if jobs != said {
                if self.array.active() > 0 {
                    self.board.line(&jobs);
                }
                said = jobs;
            }
            let Counts { pending, running, .. } = self.counts;
            if cancel || (self.options.fail_fast && self.counts.failed > failed) {
                self.board.line("cancelling the jobs: runs save their state…");
                self.array.cancel()?;
                return self.end(cancel);
            }
            if pending + running == 0 {
                self.array.cancel_waiting();
                self.array.wait_until_gone(Duration::from_secs(30));
                return self.end(false);
            }
            let lost = self.array.lost();
            if self.array.active() == 0 && pending > 0 && lost == 0 && self.array.cancelled() {
                self.board.line("the jobs were cancelled");
                return self.end(true);
            }
            let missing = if self.array.active() == 0 { pending } else { lost.min(pending) };
            if missing == 0 {
                continue;
            }
            if self.ended() > ended {
                (ended, fruitless) = (self.ended(), 0);
            }
            if fruitless >= self.options.resubmit {
                if self.array.active() > 0 {
                    continue;
                }
                anyhow::bail!(
                    "no job is left: {}; look into {}, mend the cause and give the same command again",
                    self.counts,
                    self.array.folder().display()
                )
            }
            fruitless += usize::from(self.submit(missing)? > 0);
        }
    }

    /// Runs that have come to an end.
    fn ended(&self) -> usize {
        self.counts.done + self.counts.failed
    }

    /// Asks Slurm how the tasks are, and says which of them were lost.
    fn ask(&mut self) -> Result<()> {
        for (task, state) in self.array.refresh()? {
            self.board.line(&format!("task {task} is lost: {state}: {}", self.array.last_line(&task)));
        }
        Ok(())
    }

    /// How it stands when no task is left.
    fn end(&mut self, interrupted: bool) -> Result<Outcome> {
        let snapshot = self.ledger.look()?;
        write_status(self.plan, &self.ledger, &snapshot)?;
        Ok(Outcome { counts: Counts::of(self.plan, &snapshot), interrupted })
    }
}
