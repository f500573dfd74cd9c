//! `state.safetensors`: what an exact resume begins from.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::trainer::Trainer;
use crate::checkpoint::{Snapshot, read_tensors};
use crate::config::{self, Config};
use crate::{bad_input, bail_input};

/// Where a run stood.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Position {
    /// Updates made.
    pub step: usize,
    pub seconds: f64,
    /// [`Position::seconds`] without the evaluations.
    pub training_seconds: f64,
    /// Timesteps trained on.
    pub tokens: usize,
    /// Length of `metrics.jsonl`.
    pub metrics_bytes: u64,
    /// Whether the evaluation at this step is still to be done.
    pub pending_evaluation: bool,
    /// Samples per forward pass that memory had room for, where that was less than configured.
    #[serde(default)]
    pub max_micro_batch: Option<usize>,
}

/// A saved run.
pub struct State {
    position: Position,
    config: Config,
    pub tensors: HashMap<String, Tensor>,
}

impl std::ops::Deref for State {
    type Target = Position;

    fn deref(&self) -> &Position {
        &self.position
    }
}

/// The state of a run, to be written.
pub fn snapshot(config: &Config, trainer: &Trainer, position: &Position) -> Result<Snapshot> {
    let metadata = vec![("position", serde_json::to_string(position)?), ("config", config.to_yaml())];
    Snapshot::of(trainer.state(), metadata)
}

impl State {
    /// Where the state of a run directory is.
    pub fn path(dir: &Path) -> PathBuf {
        dir.join("state.safetensors")
    }

    /// The state in `dir`, if there is one.
    pub fn open(dir: &Path) -> Result<Option<Self>> {
        let path = Self::path(dir);
        if !path.exists() {
            return Ok(None);
        }
        let (tensors, metadata) = read_tensors(&path, "the state of the run")?;
        let damaged = || bad_input!("{} is no state of a run; delete it to begin again", path.display());
        let position = metadata.get("position").ok_or_else(damaged)?;
        let position = serde_json::from_str(position).map_err(|_| damaged())?;
        let config = metadata.get("config").ok_or_else(damaged)?;
        let config = config::load::parse(config, &format!("the configuration in {}", path.display()), &[])?;
        Ok(Some(Self { position, config, tensors }))
    }

    /// Refuses to go on with another configuration than the run was started with.
    pub fn check_config(&self, config: &Config, dir: &Path) -> Result<()> {
        let (now, then) = (serde_json::to_value(config)?, serde_json::to_value(&self.config)?);
        if let Some((field, now, then)) = difference("", &now, &then) {
            bail_input!(
                "{field} is {now}, but the run in {} was started with {then}; resume it with \
                 {}/config.yaml, or give another --out",
                dir.display(),
                dir.display()
            )
        }
        Ok(())
    }
}

/// The first field in which two configurations differ, with both values.
fn difference(
    path: &str,
    a: &serde_json::Value,
    b: &serde_json::Value,
) -> Option<(String, serde_json::Value, serde_json::Value)> {
    if let (Some(a), Some(b)) = (a.as_object(), b.as_object()) {
        return a.iter().find_map(|(key, a)| {
            let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
            difference(&path, a, b.get(key).unwrap_or(&serde_json::Value::Null))
        });
    }
    (a != b).then(|| (path.to_string(), a.clone(), b.clone()))
}
