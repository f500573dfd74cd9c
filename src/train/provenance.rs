//! `run.json`: which program, device, numeric route and data made the numbers of a run.
//!
//! Written when a process begins to train. A run that was resumed also names the processes before, as far as their
//! updates are in the weights.

use std::path::Path;
use std::time::SystemTime;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::{Options, device_name};
use crate::config::Precision;
use crate::device::{hardware, simd};
use crate::files;
use crate::task::Task;

/// One process that trained.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Provenance {
    pub version: String,
    /// That the program was built from: 40 hex digits, then `+changes` where files that are compiled differed from
    /// it; `unknown` if it was built from an archive.
    pub commit: String,
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// What the hardware calls itself.
    pub hardware: Option<String>,
    /// Version of the GPU's driver; none on the CPU.
    pub driver: Option<String>,
    /// Number format of activations: f32, tf32 or bf16.
    pub precision: String,
    /// Whether products of f32 matrices may round to tf32.
    pub tf32: bool,
    pub threads: usize,
    /// Instruction sets that the program was compiled for.
    pub simd: Vec<String>,
    /// SHA-256 of grammar and task.
    pub data: String,
    pub host: String,
    pub command: Vec<String>,
    /// Where the command was given.
    pub directory: String,
    /// In UTC, as in `2026-01-31T12:00:00Z`.
    pub started: String,
    /// Updates that were made when it began.
    pub step: usize,
    /// The processes before this one, the first one first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub before: Vec<Provenance>,
}

impl Provenance {
    /// Of this process, which goes on after update `step`.
    fn here(options: &Options, precision: Precision, task: &Task, step: usize) -> Result<Self> {
        #[cfg(feature = "cuda")]
        let driver = options.device.is_cuda().then(crate::cuda::about::driver).flatten();
        #[cfg(not(feature = "cuda"))]
        let driver = None;
        Ok(Self {
            version: env!("CARGO_PKG_VERSION").into(),
            commit: env!("SELECTIVBENCH_COMMIT").into(),
            device: device_name(&options.device),
            hardware: hardware(&options.device),
            driver,
            precision: precision.name().into(),
            tf32: precision == Precision::Tf32,
            threads: rayon::current_num_threads(),
            simd: simd().into_iter().map(String::from).collect(),
            data: task.data_hash()?,
            host: gethostname::gethostname().to_string_lossy().into_owned(),
            command: std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect(),
            directory: std::env::current_dir().unwrap_or_default().display().to_string(),
            started: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            step,
            before: Vec::new(),
        })
    }

    /// Reads what a run directory says; none where it says nothing that can be read.
    pub fn open(dir: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(dir.join("run.json")).ok()?).ok()
    }

    /// Writes `run.json` of a process that goes on after update `step`.
    pub fn write(
        dir: &Path,
        options: &Options,
        precision: Precision,
        task: &Task,
        step: usize,
    ) -> Result<()> {
        let mut new = Self::here(options, precision, task, step)?;
        if let Some(mut last) = Self::open(dir) {
            new.before = std::mem::take(&mut last.before);
            new.before.push(last);
            // What was done after the point that this process goes on from is lost.
            new.before.retain(|process| process.step < step);
        }
        let json = serde_json::to_string_pretty(&new)? + "\n";
        files::write_atomic(&dir.join("run.json"), |out| out.write_all(json.as_bytes()))
    }
}
