//! What a person sees of a run: a progress bar, or plain lines where there is no terminal.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::trainer::StepStats;

/// Shows the course of a run on stderr.
pub struct Progress {
    bar: Option<ProgressBar>,
    total: usize,
    begin: Instant,
    first: usize,
    shown: Instant,
    /// Exponential means of loss and accuracy.
    smooth: Option<(f64, f64)>,
    tokens: usize,
}

/// Between two plain lines.
const QUIET: Duration = Duration::from_secs(10);

impl Progress {
    /// A run of `total` updates of which `first` are made.
    pub fn new(total: usize, first: usize) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:24} {pos}/{len} {msg}  ETA {eta}")
                .expect("a valid template")
                .progress_chars("━╸─");
            let bar = ProgressBar::new(total as u64).with_style(style).with_position(first as u64);
            bar.reset_eta();
            bar.enable_steady_tick(Duration::from_millis(250));
            bar
        });
        let now = Instant::now();
        Self { bar, total, begin: now, first, shown: now, smooth: None, tokens: 0 }
    }

    /// Tokens per second since this process began to train.
    pub fn rate(&self) -> f64 {
        self.tokens as f64 / self.begin.elapsed().as_secs_f64().max(1e-9)
    }

    /// After update `step`.
    pub fn update(&mut self, step: usize, stats: &StepStats) {
        self.tokens += stats.tokens;
        let (loss, accuracy) = self.smooth.unwrap_or((stats.loss, stats.accuracy));
        let mean = |old: f64, new: f64| old + 0.1 * (new - old);
        let (loss, accuracy) = (mean(loss, stats.loss), mean(accuracy, stats.accuracy));
        self.smooth = Some((loss, accuracy));
        let text =
            format!("loss {loss:.4}  accuracy {:.1} %  {} tokens/s", 100.0 * accuracy, count(self.rate()));
        match &self.bar {
            Some(bar) => {
                bar.set_message(text);
                bar.set_position(step as u64);
            }
            None if step == self.total || self.shown.elapsed() >= QUIET => {
                self.shown = Instant::now();
                let each = self.begin.elapsed().div_f64((step - self.first).max(1) as f64);
                let eta = each.mul_f64((self.total - step) as f64).as_secs();
                eprintln!("step {step}/{}  {text}  ETA {eta} s", self.total);
            }
            None => {}
        }
    }

    /// Shows what is being evaluated.
    pub fn evaluating(&self, what: &str, done: usize, of: usize) {
        if let Some(bar) = &self.bar {
            bar.set_message(format!("{what} {done}/{of}"));
        }
    }

    /// A line that stays.
    pub fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A large number in three digits: 12.3k, 4.56M.
pub fn count(x: f64) -> String {
    let (x, unit) = match x {
        x if x >= 1e12 => (x / 1e12, "T"),
        x if x >= 1e9 => (x / 1e9, "G"),
        x if x >= 1e6 => (x / 1e6, "M"),
        x if x >= 1e3 => (x / 1e3, "k"),
        x => (x, ""),
    };
    let decimals = if x >= 100.0 || unit.is_empty() {
        0
    } else if x >= 10.0 {
        1
    } else {
        2
    };
    format!("{x:.decimals$}{unit}")
}
