//! What runs will take, from updates that are measured here.
//!
//! For each model the smallest and, if that is quick, the largest of the plan's runs makes a few updates on a few
//! samples. Operations per second, and bytes per activation, are interpolated between the two.

use std::time::{Duration, Instant};

use anyhow::Result;
use candle_core::Device;

use super::plan::{Planned, mean_steps};
use crate::config::{Auto, Config};
use crate::device::{peak_memory, reset_peak_memory};
use crate::task::{Part, Task};
use crate::train::trainer::{Feed, Trainer, micro_batch};

/// What one run takes.
#[derive(Clone, Copy, Debug)]
pub struct Estimate {
    pub seconds: f64,
    /// Bytes; none where they cannot be measured.
    pub memory: Option<f64>,
}

/// Measured at one size of a model.
#[derive(Clone, Copy, Debug)]
struct Probe {
    parameters: f64,
    /// Floating-point operations a second, by the count of [`Planned::work`].
    rate: f64,
    /// Bytes beside those of [`fixed`], for each timestep of a forward pass, layer and channel.
    bytes: Option<f64>,
}

/// Timesteps of a measured update.
const TIMESTEPS: usize = 2048;

/// Updates are repeated for so long: the machine may be busy.
const ENOUGH: Duration = Duration::from_millis(300);

/// Longest that the larger of two probes of a model may take.
const PATIENCE: Duration = Duration::from_secs(4);

/// Estimates all runs on a device; in their order.
pub fn estimate(runs: &[Planned], device: &Device) -> Result<Vec<Estimate>> {
    let mut probes: Vec<(&str, Vec<Probe>)> = Vec::new();
    for run in runs {
        let name = run.config.model.name.as_str();
        if probes.iter().any(|(known, _)| *known == name) {
            continue;
        }
        let of_model = || runs.iter().filter(|run| run.config.model.name == name);
        let smallest = of_model().min_by_key(|run| run.parameters).unwrap_or(run);
        let largest = of_model().max_by_key(|run| run.parameters).unwrap_or(run);
        let (first, seconds) = probe(smallest, device)?;
        let mut measured = vec![first];
        let growth = largest.parameters as f64 / smallest.parameters as f64;
        if growth > 1.5 && seconds * growth < PATIENCE.as_secs_f64() {
            measured.push(probe(largest, device)?.0);
        }
        probes.push((name, measured));
    }
    Ok(runs
        .iter()
        .map(|run| {
            let measured = probes.iter().find(|(name, _)| *name == run.config.model.name);
            from(run, measured.map_or(&[], |(_, probes)| probes), device.is_cpu())
        })
        .collect())
}

/// Interpolates in the logarithms of parameters and rates.
fn from(run: &Planned, probes: &[Probe], cpu: bool) -> Estimate {
    let Some((first, last)) = probes.first().zip(probes.last()) else {
        return Estimate { seconds: f64::NAN, memory: None };
    };
    let span = (last.parameters / first.parameters).ln();
    let at = if span > 0.0 {
        ((run.parameters as f64 / first.parameters).ln() / span).clamp(0.0, 1.0)
    } else {
        0.0
    };
    let between = |a: f64, b: f64| (a.ln() + at * (b.ln() - a.ln())).exp();
    let activations =
        (forward_timesteps(&run.config, cpu) * run.config.model.width * run.config.model.layers) as f64;
    let memory = first.bytes.zip(last.bytes).map(|(a, b)| fixed(run) + between(a, b) * activations);
    Estimate { seconds: run.work() / between(first.rate, last.rate), memory }
}

/// Weights, gradients and two moments, in f32, and the program itself.
fn fixed(run: &Planned) -> f64 {
    const PROGRAM: f64 = 32e6;
    PROGRAM + 16.0 * run.parameters as f64
}

/// Timesteps of a forward pass while training.
fn forward_timesteps(config: &Config, cpu: bool) -> usize {
    let steps = mean_steps(&config.task).ceil() as usize;
    steps * micro_batch(config, steps, cpu).min(config.train.batch)
}

/// Updates with a few samples: what the fastest after the first showed, and how long it took.
fn probe(run: &Planned, device: &Device) -> Result<(Probe, f64)> {
    let mut config = run.config.clone();
    let steps = mean_steps(&config.task).ceil() as usize;
    config.train.batch = (TIMESTEPS / steps.max(1)).clamp(1, config.train.batch);
    config.train.micro_batch = Auto::Value(config.train.batch);
    let task = Task::new(&config.task, config.seed)?;
    let mut trainer = Trainer::new(&config, task.features(), task.classes(), device)?;
    let feed = trainer.feed();
    let samples = || -> Result<Feed> { feed(task.samples(Part::Train, 0, config.train.batch, None)?) };
    let (mut seconds, mut tokens, mut warm) = (f64::INFINITY, 0, false);
    reset_peak_memory(device)?;
    let begun = Instant::now();
    while tokens == 0 || begun.elapsed() < ENOUGH {
        let samples = samples()?;
        let begin = Instant::now();
        tokens = trainer.update_with(samples)?.tokens;
        let took = begin.elapsed().as_secs_f64();
        // The first update of a GPU loads kernels.
        if warm || (device.is_cpu() && took > ENOUGH.as_secs_f64()) {
            seconds = seconds.min(took);
        } else if !warm {
            (warm, tokens) = (true, 0);
        }
    }
    let parameters = run.parameters as f64;
    let activations = (tokens * config.model.width * config.model.layers) as f64;
    let bytes = peak_memory(device).map(|bytes| ((bytes as f64 - fixed(run)) / activations).max(1.0));
    Ok((Probe { parameters, rate: 6.0 * parameters * tokens as f64 / seconds, bytes }, seconds))
}
