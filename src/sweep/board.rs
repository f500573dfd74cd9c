//! Where a sweep stands: a live table in a terminal, plain lines elsewhere, and `status.csv`.

use std::collections::HashMap;
use std::fs::File;
use std::io::{IsTerminal, Read, Seek, SeekFrom};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::ledger::{Ledger, Snapshot, State};
use super::plan::Plan;
use crate::files;

/// Runs by state.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counts {
    pub pending: usize,
    pub running: usize,
    pub done: usize,
    pub failed: usize,
}

impl Counts {
    pub fn of(plan: &Plan, snapshot: &Snapshot) -> Self {
        let mut counts = Self::default();
        for run in &plan.runs {
            match snapshot.state(&run.id) {
                State::Pending => counts.pending += 1,
                State::Running { .. } => counts.running += 1,
                State::Done => counts.done += 1,
                State::Failed => counts.failed += 1,
            }
        }
        counts
    }

    pub fn total(self) -> usize {
        self.pending + self.running + self.done + self.failed
    }
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} of {} done, {} running, {} pending",
            self.done,
            self.total(),
            self.running,
            self.pending
        )?;
        match self.failed {
            0 => Ok(()),
            failed => write!(f, ", {failed} failed"),
        }
    }
}

/// Shows the course of a sweep on stderr.
pub struct Board {
    live: Option<Live>,
    /// Work done, in floating-point operations, when it was first looked at.
    first: Option<(Instant, f64)>,
    shown: Option<Instant>,
    last: Option<Counts>,
}

struct Live {
    screen: MultiProgress,
    total: ProgressBar,
    runs: HashMap<String, ProgressBar>,
}

/// Between two plain lines that say nothing new.
const QUIET: Duration = Duration::from_secs(60);

/// Running runs that a screen has room for.
const MOST_BARS: usize = 24;

/// Time that has to be watched before it says how long the rest takes.
const WATCHED: Duration = Duration::from_secs(5);

impl Board {
    pub fn new(plan: &Plan) -> Self {
        let live = std::io::stderr().is_terminal().then(|| {
            let screen = MultiProgress::new();
            let style = ProgressStyle::with_template("{bar:24} {msg}").expect("a valid template");
            let total = ProgressBar::new(plan.runs.len() as u64).with_style(style.progress_chars("━╸─"));
            Live { total: screen.add(total), screen, runs: HashMap::new() }
        });
        Self { live, first: None, shown: None, last: None }
    }

    /// A line that stays.
    pub fn line(&self, text: &str) {
        match &self.live {
            // A screen that is gone is no reason to stop.
            Some(live) => drop(live.screen.println(text)),
            None => eprintln!("{text}"),
        }
    }

    /// Shows the sweep as it is now.
    pub fn update(&mut self, plan: &Plan, snapshot: &Snapshot) {
        let counts = Counts::of(plan, snapshot);
        let (mut done, mut left) = (0.0, 0.0);
        let mut running = Vec::new();
        for run in &plan.runs {
            let work = run.work();
            match snapshot.state(&run.id) {
                State::Done => done += work,
                State::Failed => {}
                State::Pending => left += work,
                State::Running { owner, device, .. } => {
                    let progress = progress(&plan.run_dir(run));
                    let share =
                        progress.as_ref().map_or(0.0, |p| p.step as f64 / run.config.updates() as f64);
                    done += share * work;
                    left += (1.0 - share) * work;
                    running.push((run, owner, device, progress));
                }
            }
        }
        let (begin, before) = *self.first.get_or_insert((Instant::now(), done));
        let eta = (begin.elapsed() > WATCHED && done > before)
            .then(|| begin.elapsed().mul_f64((left / (done - before)).min(1e9)));
        let text = match eta {
            Some(eta) if left > 0.0 => format!("{counts}, about {} left", span(eta)),
            _ => counts.to_string(),
        };
        let Some(live) = &mut self.live else {
            let new = self.last != Some(counts) || self.shown.is_none_or(|at| at.elapsed() > QUIET);
            if new {
                eprintln!("{text}");
                (self.last, self.shown) = (Some(counts), Some(Instant::now()));
            }
            return;
        };
        live.total.set_position((counts.done + counts.failed) as u64);
        live.total.set_message(text);
        live.runs.retain(|id, bar| {
            let keep = running.iter().any(|(run, ..)| run.id == *id);
            if !keep {
                bar.finish_and_clear();
                live.screen.remove(bar);
            }
            keep
        });
        for (run, owner, device, progress) in running {
            if live.runs.len() >= MOST_BARS && !live.runs.contains_key(&run.id) {
                continue;
            }
            let bar = live.runs.entry(run.id.clone()).or_insert_with(|| {
                let style = ProgressStyle::with_template("{bar:12} {msg}").expect("a valid template");
                let bar =
                    ProgressBar::new(run.config.updates() as u64).with_style(style.progress_chars("━╸─"));
                live.screen.insert_before(&live.total, bar)
            });
            let name = match run.values.is_empty() {
                true => run.folder(),
                false => {
                    run.values.iter().filter(|value| !value.is_empty()).cloned().collect::<Vec<_>>().join(" ")
                }
            };
            let place = format!("{device} {owner}");
            match progress {
                None => bar.set_message(format!("{name}  {place}  begins")),
                Some(p) => {
                    bar.set_position(p.step as u64);
                    bar.set_message(format!(
                        "{name}  {place}  loss {:.3}  accuracy {:.1} %",
                        p.loss,
                        100.0 * p.accuracy
                    ));
                }
            }
        }
    }

    /// Takes the table away.
    pub fn finish(&mut self) {
        if let Some(live) = self.live.take() {
            live.runs.values().for_each(ProgressBar::finish_and_clear);
            live.total.finish_and_clear();
        }
    }
}

/// How far a run has come.
struct RunProgress {
    step: usize,
    loss: f64,
    accuracy: f64,
}

/// From the last whole line of training in the metrics of a run.
fn progress(dir: &Path) -> Option<RunProgress> {
    const TAIL: u64 = 4 << 10;
    let mut file = File::open(dir.join("metrics.jsonl")).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL))).ok()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    text.lines().rev().find_map(|line| {
        let record: serde_json::Value = serde_json::from_str(line).ok()?;
        (record["split"] == "train").then_some(())?;
        let (loss, accuracy) = (record["loss"].as_f64()?, record["accuracy"].as_f64()?);
        Some(RunProgress { step: record["step"].as_u64()? as usize, loss, accuracy })
    })
}

/// A duration as people say it.
pub fn span(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{:.1} h", seconds as f64 / 3600.0),
        _ => format!("{:.1} days", seconds as f64 / 86400.0),
    }
}

/// Writes every run with its state into the folder of the sweep.
pub fn write_status(plan: &Plan, ledger: &Ledger, snapshot: &Snapshot) -> Result<()> {
    let mut csv = csv::Writer::from_writer(Vec::new());
    let head = ["run", "state", "where", "reason", "accuracy", "parameters"].into_iter();
    csv.write_record(head.chain(plan.varying.iter().map(String::as_str)))?;
    for run in &plan.runs {
        let state = snapshot.state(&run.id);
        let (mut place, mut reason, mut accuracy) = (String::new(), String::new(), String::new());
        match &state {
            State::Pending => {}
            State::Running { owner, device, .. } => place = format!("{device} {owner}"),
            State::Done => {
                if let Some(done) = ledger.result(&run.id) {
                    place = format!("{} {}", done.device, done.host);
                    accuracy = format!("{:.6}", done.accuracy);
                }
            }
            State::Failed => reason = ledger.reason(&run.id),
        }
        let (folder, parameters) = (run.folder(), run.parameters.to_string());
        let cells = [&folder, state.name(), &place, &reason, &accuracy, &parameters].into_iter();
        csv.write_record(cells.chain(run.values.iter().map(String::as_str)))?;
    }
    let text = csv.into_inner()?;
    files::write_atomic(&plan.dir.join("status.csv"), |out| out.write_all(&text))
}
