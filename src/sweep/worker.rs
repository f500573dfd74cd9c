//! Carries out the runs of a sweep: one child process a run, so many at a time on each device.
//!
//! A child is an ordinary `train --resume` in the run's directory. Its standard input is a pipe that this process
//! holds: when the pipe ends, because this process wants it to stop or because it died, the child saves and stops.
//! Whatever ends a child, its run is either done, or failed with a reason, or pending again.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};

use super::board::{Board, Counts};
use super::ledger::{Claim, Ledger, Snapshot, State};
use super::plan::{Plan, Planned, is_run};
use crate::error::INTERRUPTED;
use crate::train::{self, Summary, interrupt};
use crate::{config, files};

/// How a sweep is worked on.
pub struct Options {
    /// `cpu`, `cuda:0`, …
    pub devices: Vec<String>,
    /// Runs at the same time on each device.
    pub per_device: usize,
    /// Threads of each run.
    pub threads: usize,
    /// Give runs that failed another try.
    pub retry_failed: bool,
    /// Stop at the first failure.
    pub fail_fast: bool,
    /// How long a claim of another machine is held without being renewed.
    pub lease: Duration,
    /// Whether to wait for runs of others, and to take them over if their holders die.
    pub wait: bool,
}

/// How it ended.
pub struct Outcome {
    pub counts: Counts,
    pub interrupted: bool,
}

/// Children that a signal ended without having got further, before a run counts as failed.
const MOST_DEATHS: usize = 5;

/// How long a run directory may be locked by a process that nobody claims: one whose parent died is still saving.
const LOCKED: Duration = Duration::from_secs(120);

/// Room for one run on a device.
struct Slot {
    device: String,
    job: Option<Job>,
    /// Why the device cannot be used any more.
    lost: Option<String>,
}

/// A run in a slot.
struct Job {
    /// Index into the plan.
    run: usize,
    dir: PathBuf,
    claim: Claim,
    /// None while somebody else's process still holds the directory.
    child: Option<Child>,
    /// Where in the log the child begins.
    log_from: u64,
    since: Instant,
    /// Whether this process wants the child to stop.
    asked: bool,
    deaths: Deaths,
}

/// What is known of the ends of a run's children.
#[derive(Default)]
struct Deaths {
    /// Ends by a signal since the run last got further.
    count: usize,
    /// When the state was written, as of the last start.
    state: Option<SystemTime>,
    /// Samples per forward pass, at most; halved when memory does not suffice.
    micro_batch: Option<usize>,
    /// Processes that the system had killed for want of memory at the last start.
    oom_kills: u64,
}

/// Works on the plan's runs until nothing is left to do, or until asked to stop.
pub fn work(plan: &Plan, options: &Options) -> Result<Outcome> {
    plan.create()?;
    let mut ledger = Ledger::open(&plan.dir, options.lease);
    ledger.sweep_up();
    let snapshot = ledger.look()?;
    let board = Board::new(plan);
    check_results(plan, &ledger, &snapshot, options.retry_failed, &board)?;
    interrupt::listen()?;
    let slots = (0..options.per_device).flat_map(|_| &options.devices);
    let slots = slots.map(|device| Slot { device: device.clone(), job: None, lost: None }).collect();
    let mut worker = Worker {
        plan,
        options,
        ledger,
        board,
        slots,
        program: std::env::current_exe().context("cannot find this program's own file")?,
        stopping: false,
    };
    let result = worker.work();
    worker.board.finish();
    if result.is_err() {
        worker.abandon();
    }
    result.with_context(|| {
        let gone = match plan.dir.join("ledger").is_dir() {
            true => String::new(),
            false => format!(": the folder {} is gone", plan.dir.display()),
        };
        format!(
            "the sweep stopped{gone}; finished runs stay and the others go on where they were saved: mend the cause \
             and give the same command again"
        )
    })
}

/// Puts runs back that are said to be done but have no result any more, and, on request, those that failed.
pub(super) fn check_results(
    plan: &Plan,
    ledger: &Ledger,
    snapshot: &Snapshot,
    retry: bool,
    board: &Board,
) -> Result<()> {
    for run in &plan.runs {
        match snapshot.state(&run.id) {
            State::Done if Summary::open(&plan.run_dir(run)).is_err() => {
                board.line(&format!("{} has lost its summary: it is run again", run.folder()));
                ledger.forget(&run.id)?;
            }
            State::Failed if retry => ledger.forget(&run.id)?,
            _ => {}
        }
    }
    Ok(())
}

struct Worker<'a> {
    plan: &'a Plan,
    options: &'a Options,
    ledger: Ledger,
    board: Board,
    slots: Vec<Slot>,
    program: PathBuf,
    stopping: bool,
}

impl Worker<'_> {
    fn work(&mut self) -> Result<Outcome> {
        let (mut looked, mut renewed, mut reported) = (None::<Instant>, Instant::now(), None::<Instant>);
        let mut snapshot = Snapshot::default();
        loop {
            if interrupt::asked() && !self.stopping {
                self.board.line("stopping: runs save their state…");
                self.stopping = true;
            }
            if self.stopping {
                self.jobs().for_each(Job::ask_to_stop);
            }
            let mut changed = false;
            for slot in 0..self.slots.len() {
                changed |= self.tend(slot)?;
            }
            if renewed.elapsed() > self.options.lease / 12 {
                renewed = Instant::now();
                for job in self.slots.iter().filter_map(|slot| slot.job.as_ref()) {
                    // A claim that is gone shows at the next look.
                    let _ = self.ledger.renew(&job.claim);
                }
            }
            if changed || looked.is_none_or(|at| at.elapsed() > Duration::from_secs(1)) {
                snapshot = self.ledger.look()?;
                looked = Some(Instant::now());
                self.give_up_lost_claims(&snapshot);
                if !self.stopping {
                    snapshot = self.start_jobs(snapshot)?;
                }
                self.board.update(self.plan, &snapshot);
                let due = reported.is_none_or(|at| at.elapsed() > Duration::from_secs(30));
                if due {
                    reported = Some(Instant::now());
                    super::board::write_status(self.plan, &self.ledger, &snapshot)?;
                }
            }
            if self.slots.iter().all(|slot| slot.job.is_none()) && self.nothing_to_do(&snapshot)? {
                super::board::write_status(self.plan, &self.ledger, &snapshot)?;
                let counts = Counts::of(self.plan, &snapshot);
                return Ok(Outcome { counts, interrupted: interrupt::asked() });
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn jobs(&mut self) -> impl Iterator<Item = &mut Job> {
        self.slots.iter_mut().filter_map(|slot| slot.job.as_mut())
    }

    /// Whether this process, which runs nothing, can end.
    fn nothing_to_do(&self, snapshot: &Snapshot) -> Result<bool> {
        let counts = Counts::of(self.plan, snapshot);
        if self.stopping || counts.pending + counts.running == 0 {
            return Ok(true);
        }
        if self.slots.iter().all(|slot| slot.lost.is_some()) {
            let why = self.slots.iter().find_map(|slot| slot.lost.clone()).unwrap_or_default();
            anyhow::bail!(
                "no device is left ({why}); {} runs are pending: mend it and give the same command again",
                counts.pending
            )
        }
        Ok(!self.options.wait && counts.pending == 0)
    }

    /// Stops the children of runs that somebody else has taken over, which happens to a process that was asleep.
    fn give_up_lost_claims(&mut self, snapshot: &Snapshot) {
        for slot in &mut self.slots {
            let Some(job) = slot.job.as_mut().filter(|job| !snapshot.holds(&job.claim)) else { continue };
            self.board
                .line(&format!("{} was taken over by another process", self.plan.runs[job.run].folder()));
            job.ask_to_stop();
            if let Some(child) = &mut job.child {
                let _ = child.wait();
            }
            slot.job = None;
        }
    }

    /// Fills free slots with pending runs.
    fn start_jobs(&mut self, mut snapshot: Snapshot) -> Result<Snapshot> {
        let mut next = 0;
        for slot in 0..self.slots.len() {
            if self.slots[slot].job.is_some() || self.slots[slot].lost.is_some() {
                continue;
            }
            while let Some(run) = self.plan.runs.get(next) {
                next += 1;
                if snapshot.state(&run.id) != State::Pending {
                    continue;
                }
                let device = self.slots[slot].device.clone();
                if let Some(claim) = self.ledger.claim(&run.id, &snapshot, &device)? {
                    let job = self.job(next - 1, claim);
                    self.slots[slot].job = Some(job);
                    self.tend(slot)?;
                    snapshot = self.ledger.look()?;
                    break;
                }
            }
        }
        Ok(snapshot)
    }

    fn job(&self, run: usize, claim: Claim) -> Job {
        let dir = self.plan.run_dir(&self.plan.runs[run]);
        let deaths = Deaths::default();
        Job { run, dir, claim, child: None, log_from: 0, since: Instant::now(), asked: false, deaths }
    }

    /// Sees to the job in a slot; gives whether its run changed its state.
    fn tend(&mut self, slot: usize) -> Result<bool> {
        let Some(mut job) = self.slots[slot].job.take() else { return Ok(false) };
        let status = match &mut job.child {
            Some(child) => child.try_wait()?,
            None => {
                if job.asked {
                    self.ledger.release(&job.claim)?;
                    return Ok(true);
                }
                if Summary::open(&job.dir).is_ok() {
                    // Whoever ran it died before it could enter the result.
                    return self.end(slot, job, None).map(|()| true);
                }
                if !train::is_locked(&job.dir) {
                    self.start(&mut job, slot)?;
                } else if job.since.elapsed() > LOCKED {
                    let run = self.plan.runs[job.run].folder();
                    self.board.line(&format!("{run} is held by a process outside the sweep: left for later"));
                    self.ledger.release(&job.claim)?;
                    return Ok(true);
                }
                None
            }
        };
        match status {
            None => {
                self.slots[slot].job = Some(job);
                Ok(false)
            }
            Some(status) => self.end(slot, job, Some(status)).map(|()| true),
        }
    }

    /// Starts the child of a job.
    fn start(&self, job: &mut Job, slot: usize) -> Result<()> {
        let run = &self.plan.runs[job.run];
        prepare(&job.dir, run)?;
        job.deaths.state = modified(&job.dir.join("state.safetensors"));
        job.deaths.oom_kills = oom_kills();
        let log = OpenOptions::new().create(true).append(true).open(job.dir.join("log.txt"));
        let log = log.with_context(|| format!("cannot write in {}", job.dir.display()))?;
        job.log_from = log.metadata()?.len();
        let mut command = Command::new(&self.program);
        command.arg("train").arg(job.dir.join("config.yaml")).arg("--out").arg(&job.dir);
        command.args(["--resume", "--stop-at-end-of-input", "--device", &self.slots[slot].device]);
        command.args(["--threads", &self.options.threads.to_string()]);
        if let Some(micro_batch) = job.deaths.micro_batch {
            command.args(["--max-micro-batch", &micro_batch.to_string()]);
        }
        command.stdin(Stdio::piped()).stdout(log.try_clone()?).stderr(log);
        job.child =
            Some(command.spawn().with_context(|| format!("cannot start {}", self.program.display()))?);
        let again = if job.deaths.state.is_some() { "resumes" } else { "starts" };
        self.board.line(&format!("{} {again} on {}", run.folder(), self.slots[slot].device));
        Ok(())
    }

    /// Enters how a job ended: `status` of its child, or none if the run turned out to be done.
    fn end(&mut self, slot: usize, mut job: Job, status: Option<ExitStatus>) -> Result<()> {
        let run = &self.plan.runs[job.run];
        let (name, device) = (run.folder(), self.slots[slot].device.clone());
        if let Ok(summary) = Summary::open(&job.dir) {
            self.ledger.done(job.claim, &name, summary.accuracy, summary.seconds)?;
            self.board.line(&format!(
                "{name} done: accuracy {:.2} %, {:.1} % of the ceiling, {:.0} s",
                100.0 * summary.accuracy,
                100.0 * summary.accuracy / summary.ceiling,
                summary.seconds
            ));
            return Ok(());
        }
        let Some(status) = status else { return self.ledger.release(&job.claim) };
        if job.asked || status.code() == Some(INTERRUPTED) {
            return self.ledger.release(&job.claim);
        }
        let log = log_from(&job.dir.join("log.txt"), job.log_from);
        let message = last_message(&log);
        if device_is_lost(&device, message) {
            self.board
                .line(&format!("{device} cannot be used any more ({message}); {name} is pending again"));
            for other in self.slots.iter_mut().filter(|other| other.device == device) {
                other.lost = Some(format!("{device}: {message}"));
            }
            return self.ledger.release(&job.claim);
        }
        if disk_is_unusable(message) {
            // Every other run would end like this. Releasing may fail alike; then the claim ends with this process.
            let _ = self.ledger.release(&job.claim);
            let cause = message.rfind("cannot ").map_or(message, |at| &message[at..]);
            anyhow::bail!("{cause}")
        }
        if status.code().is_some() {
            return self.fail(job, message);
        }
        // A signal, and nobody here sent it.
        if modified(&job.dir.join("state.safetensors")) != job.deaths.state {
            job.deaths.count = 0;
        }
        job.deaths.count += 1;
        let batch = run.config.train.batch;
        if oom_kills() > job.deaths.oom_kills || log.contains("memory allocation of") {
            let halved = job.deaths.micro_batch.unwrap_or(batch).div_ceil(2);
            if job.deaths.micro_batch == Some(1) || batch == 1 {
                return self.fail(job, "out of memory, even with one sample at a time");
            }
            self.board
                .line(&format!("{name} ran out of memory: again with micro-batches of at most {halved}"));
            job.deaths.micro_batch = Some(halved);
            job.deaths.count = 0;
        } else if job.deaths.count > MOST_DEATHS {
            return self.fail(
                job,
                &format!("its process was ended {MOST_DEATHS} times ({status}) before it got further"),
            );
        } else {
            self.board
                .line(&format!("{name}: its process was ended ({status}); it goes on from its last state"));
        }
        job.child = None;
        job.since = Instant::now();
        self.slots[slot].job = Some(job);
        Ok(())
    }

    fn fail(&mut self, job: Job, reason: &str) -> Result<()> {
        let name = self.plan.runs[job.run].folder();
        self.board.line(&format!("{name} failed: {reason}"));
        self.ledger.failed(job.claim, &name, reason)?;
        if self.options.fail_fast && !self.stopping {
            self.board.line("--fail-fast: the other runs save their state and stop…");
            self.stopping = true;
        }
        Ok(())
    }

    /// After an error of this process: children save and stop, and what can be given back is.
    fn abandon(&mut self) {
        self.jobs().for_each(Job::ask_to_stop);
        for slot in &mut self.slots {
            let Some(mut job) = slot.job.take() else { continue };
            if let Some(child) = &mut job.child {
                let _ = child.wait();
            }
            // The ledger may be what failed; then the claim ends with this process.
            let _ = self.ledger.release(&job.claim);
        }
    }
}

impl Job {
    fn ask_to_stop(&mut self) {
        self.asked = true;
        if let Some(child) = &mut self.child {
            drop(child.stdin.take());
        }
    }
}

/// Makes the run directory with its configuration.
fn prepare(dir: &Path, run: &Planned) -> Result<()> {
    files::create_folder(dir)?;
    let path = dir.join("config.yaml");
    // That of an interrupted run stays: its state belongs to it.
    if path.exists() && config::load::load(&path, &[]).is_ok_and(|config| is_run(&config, &run.id)) {
        return Ok(());
    }
    let yaml = run.config.to_yaml();
    files::write_atomic(&path, |out| out.write_all(yaml.as_bytes()))
}

fn modified(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path).and_then(|meta| meta.modified()).ok()
}

/// Processes that Linux killed for want of memory since it started.
fn oom_kills() -> u64 {
    let text = std::fs::read_to_string("/proc/vmstat").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
    line.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
}

/// A log from byte `from` on; empty if it cannot be read.
fn log_from(path: &Path, from: u64) -> String {
    let read = || -> std::io::Result<Vec<u8>> {
        let (mut file, mut bytes) = (File::open(path)?, Vec::new());
        file.seek(SeekFrom::Start(from))?;
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
}

/// The last error in a log, or its last line.
fn last_message(log: &str) -> &str {
    let lines = || log.lines().rev().filter(|line| !line.trim().is_empty());
    let error = lines().find_map(|line| line.strip_prefix("error: "));
    error.or(lines().next()).unwrap_or("it ended without a message")
}

/// Whether a message says that the disk, not the run, is at fault: full, over quota, read-only or broken.
fn disk_is_unusable(message: &str) -> bool {
    const ERRORS: [u32; 5] = [5, 27, 28, 30, 122];
    ERRORS.iter().any(|error| message.contains(&format!("(os error {error})")))
}

/// Whether a message says that the GPU, not the run, is at fault.
fn device_is_lost(device: &str, message: &str) -> bool {
    const SIGNS: [&str; 8] = [
        "--device is `cuda:",
        "CUDA_ERROR_NO_DEVICE",
        "CUDA_ERROR_INVALID_DEVICE",
        "CUDA_ERROR_DEVICE_UNAVAILABLE",
        "CUDA_ERROR_ECC_UNCORRECTABLE",
        "CUDA_ERROR_NVLINK_UNCORRECTABLE",
        "CUDA_ERROR_SYSTEM_NOT_READY",
        "GPU is lost",
    ];
    device.starts_with("cuda") && SIGNS.iter().any(|sign| message.contains(sign))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_the_last_error_of_the_log() {
        let log = "error: an older one\nstep 3\nerror: disk full\nstack backtrace:\nnote: more\n\n";
        assert_eq!(last_message(log), "disk full");
        assert_eq!(last_message("step 3\nstopped somewhere\n"), "stopped somewhere");
        assert_eq!(last_message("\n"), "it ended without a message");
    }

    #[test]
    fn a_gpu_that_is_gone_is_no_fault_of_the_run() {
        for message in [
            "the run stopped after update 7: DriverError(CUDA_ERROR_ECC_UNCORRECTABLE, \"uncorrectable ECC error\")",
            "--device is `cuda:1`, but there is no such GPU",
        ] {
            assert!(device_is_lost("cuda:1", message), "{message}");
        }
        for (device, message) in [
            ("cuda:1", "update 3 would not be finite: the weights layers.0.a_log are not finite"),
            ("cuda:1", "cannot write metrics.jsonl: No space left on device"),
            ("cpu", "DriverError(CUDA_ERROR_NO_DEVICE)"),
        ] {
            assert!(!device_is_lost(device, message), "{message}");
        }
    }
}
