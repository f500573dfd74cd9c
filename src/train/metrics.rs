//! `metrics.jsonl`, one object a line, and the same numbers as TensorBoard events.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;

use super::events::Events;
use crate::bad_input;

/// The metrics of one run, open for writing.
pub struct Metrics {
    path: PathBuf,
    file: File,
    bytes: u64,
    events: Events,
    /// Time of the run's second 0, in seconds since 1970.
    start: f64,
}

/// One line.
#[derive(Clone, Debug, Serialize)]
pub struct Record {
    /// Updates made.
    pub step: usize,
    /// Training samples seen.
    pub samples: usize,
    /// `train`, `validation` or `test`.
    pub split: &'static str,
    /// Fixed gap of a test.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gap: Option<f64>,
    pub loss: f64,
    pub accuracy: f64,
    /// Of an evaluation of next-symbol prediction.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grad_norm: Option<f64>,
    pub tokens_per_s: f64,
    /// The most memory used so far, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_memory: Option<u64>,
    /// Of an evaluation: [`Breakdown::shares`](super::breakdown::Breakdown::shares).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy_by: Option<Value>,
    /// Since the run began, pauses left out.
    pub seconds: f64,
}

/// Begins the name of TensorBoard's files.
const EVENTS: &str = "events.out.tfevents.";

impl Metrics {
    /// Opens the metrics in `dir`. The first `keep` bytes stay: what a killed run wrote after its last
    /// resume point is written again.
    pub fn open(dir: &Path, keep: u64, seconds: f64) -> Result<Self> {
        let path = dir.join("metrics.jsonl");
        let name = |e: std::io::Error| bad_input!("cannot write {}: {e}", path.display());
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(name)?;
        if file.metadata()?.len() < keep {
            return Err(bad_input!(
                "{} is shorter than when the run was saved; delete {} to begin again",
                path.display(),
                dir.display()
            ));
        }
        file.set_len(keep)?;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        file.seek(SeekFrom::End(0))?;

        for entry in std::fs::read_dir(dir)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(EVENTS) {
                std::fs::remove_file(entry.path())?;
            }
        }
        let start = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64() - seconds;
        let events = dir.join(format!("{EVENTS}{}.selectivbench", start as u64));
        let events = Events::create(&events, start)?;
        let mut metrics = Self { path, file, bytes: keep, events, start };
        for line in text.lines() {
            let record = serde_json::from_str(line)
                .map_err(|e| bad_input!("{} is damaged: {e}", metrics.path.display()))?;
            metrics.event(&record)?;
        }
        Ok(metrics)
    }

    /// Appends one line.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        let value = serde_json::to_value(record)?;
        let line = format!("{value}\n");
        self.file
            .write_all(line.as_bytes())
            .with_context(|| format!("cannot write {}", self.path.display()))?;
        self.bytes += line.len() as u64;
        self.event(&value)
    }

    /// Every number of a record as a scalar `<split>/<name>` or `<split>/accuracy_by_<group>/<name>`.
    fn event(&mut self, record: &Value) -> Result<()> {
        let number = |name: &str| record[name].as_f64();
        let split = record["split"].as_str().unwrap_or("run");
        let at = self.start + number("seconds").unwrap_or(0.0);
        let step = record["step"].as_i64().unwrap_or(0);
        let gap = number("gap").map_or(String::new(), |gap| format!("_gap_{gap}"));
        let scalars = ["loss", "accuracy", "kl", "lr", "grad_norm", "tokens_per_s", "peak_memory"]
            .into_iter()
            .filter_map(|name| Some((format!("{split}{gap}/{name}"), number(name)? as f32)));
        let shares = members(&record["accuracy_by"]).flat_map(|(group, shares)| {
            let tag = format!("{split}{gap}/accuracy_by_{group}");
            let named =
                move |(name, share): (_, &Value)| Some((format!("{tag}/{name}"), share.as_f64()? as f32));
            members(shares).filter_map(named)
        });
        let scalars = scalars.chain(shares);
        self.events.scalars(step, at, scalars).context("cannot write TensorBoard events")
    }

    /// Brings everything to the disk; gives the length of `metrics.jsonl`.
    pub fn sync(&mut self) -> Result<u64> {
        self.file.sync_data().with_context(|| format!("cannot write {}", self.path.display()))?;
        Ok(self.bytes)
    }
}

/// The entries of an object; none of anything else.
fn members(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flatten()
}
