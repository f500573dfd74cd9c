//! A training step by part.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::Device;
use serde::Serialize;

use super::ops::Options;
use super::timing::Timing;
use crate::check::Route;
use crate::config::{Auto, Config};
use crate::device::{peak_memory, reset_peak_memory};
use crate::task::{Part, Task};
use crate::trace::{Kind, Watch, watching};
use crate::train::trainer::{Feed, Trainer};

/// What takes time in a step.
#[derive(Clone, Debug, Serialize)]
pub struct StepPart {
    /// `forward`, or `selective_scan, backward`.
    pub name: String,
    pub kind: String,
    /// Times that it runs in a step.
    pub runs: usize,
    pub seconds: f64,
}

/// Updates of one model.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    pub model: &'static str,
    pub route: Route,
    pub width: usize,
    pub batch: usize,
    pub steps: usize,
    pub parameters: usize,
    /// By the host's clock, from the loss of one update on the host to the next; samples are in memory.
    pub update: Timing,
    /// Of captured updates: what one takes on the GPU while the host keeps it busy.
    pub gpu: Option<f64>,
    pub tokens_per_s: f64,
    /// Drawing and packing the samples of a step on one thread; a run does it beside the step before.
    pub data: f64,
    /// Bytes: of the GPU's pool, or of the process.
    pub peak_memory: Option<u64>,
    pub parts: Vec<StepPart>,
}

/// Measures updates of a model of some width: 64 samples of 400 steps on a GPU, 4 on the CPU, or as many as `options`
/// say. What model, width and options do not say is as in `config`.
pub fn step(model: &'static str, width: usize, options: &Options, config: &Config) -> Result<Step> {
    let Options { device, route, .. } = options;
    let (rounds, batch) = if device.is_cpu() { (3, 4) } else { (12, 64) };
    let batch = options.batch.unwrap_or(batch);
    let mut config = config.clone();
    config.model.name = model.into();
    config.model.width = width;
    config.model.heads = Auto::AUTO;
    config.train.batch = batch;
    config.train.precision = route.precision();
    // 400 steps: 200 elements, each with a gap of one step.
    config.task.gap.low = 0.1;
    config.task.gap.high = 0.1;
    config.task.gap.probability = 1.0;
    let task = Task::new(&config.task, config.seed)?;
    let mut trainer = Trainer::new(&config, task.features(), task.classes(), device)?;
    let feed = trainer.feed();
    let samples = |step: usize| -> Result<(Feed, f64)> {
        let begin = Instant::now();
        let feed = feed(task.samples(Part::Train, (step * batch) as u64, batch, None)?)?;
        Ok((feed, begin.elapsed().as_secs_f64()))
    };

    let mut at = 0;
    let mut draw = |count: usize| -> Result<Vec<(Feed, f64)>> {
        at += count;
        (at - count..at).map(samples).collect()
    };
    for (feed, _) in draw(3)? {
        trainer.update_with(feed)?;
    }
    reset_peak_memory(device)?;
    let (mut times, mut tokens) = (vec![], 0);
    let (feeds, mut data): (Vec<_>, Vec<_>) = draw(rounds)?.into_iter().unzip();
    let mut feeds = feeds.into_iter();
    for _ in 0..rounds {
        let begin = Instant::now();
        // As a run does.
        while trainer.under_way() < 1 + usize::from(trainer.launches_ahead()) {
            let Some(feed) = feeds.next() else { break };
            trainer.launch(feed)?;
        }
        let stats = trainer.finish()?;
        times.push(begin.elapsed().as_secs_f64());
        tokens += stats.tokens;
    }
    let peak_memory = peak_memory(device);
    let total: f64 = times.iter().sum();
    let gpu = busy(&trainer, rounds)?;

    let parts = Rc::new(RefCell::new(Parts::new(device)?));
    for (feed, _) in draw(1)? {
        watching(Log(parts.clone()), || trainer.update_with(feed))?;
    }
    let parts = Rc::try_unwrap(parts).ok().context("the watch is gone with the step")?.into_inner();
    data.sort_by(f64::total_cmp);
    Ok(Step {
        model,
        route: *route,
        width,
        batch,
        steps: tokens / rounds / batch,
        parameters: trainer.net().params().count(),
        update: Timing::of(times, 1),
        gpu,
        tokens_per_s: tokens as f64 / total,
        data: data[data.len() / 2],
        peak_memory,
        parts: parts.sum()?,
    })
}

/// Seconds of an update that is launched `rounds` times without waiting for it.
#[cfg(feature = "cuda")]
fn busy(trainer: &Trainer, rounds: usize) -> Result<Option<f64>> {
    let Some(gpu) = trainer.gpu() else { return Ok(None) };
    let mut again = true;
    let stretch = super::gpu::stretch(gpu, || {
        for _ in 0..rounds {
            again &= trainer.relaunch()?;
        }
        Ok(())
    })?;
    Ok(if again { Some(stretch.seconds()? / rounds as f64) } else { None })
}

#[cfg(not(feature = "cuda"))]
fn busy(_: &Trainer, _: usize) -> Result<Option<f64>> {
    Ok(None)
}

/// A moment, by the clock of a device.
enum Moment {
    Host(Instant),
    #[cfg(feature = "cuda")]
    Gpu(cudarc::driver::CudaEvent),
}

/// The ranges of a step and when they were.
struct Parts {
    #[cfg(feature = "cuda")]
    gpu: Option<crate::cuda::Gpu>,
    open: Vec<(Kind, &'static str, Moment)>,
    closed: Vec<(Kind, &'static str, Moment, Moment)>,
}

impl Parts {
    fn new(device: &Device) -> Result<Self> {
        let _ = device;
        Ok(Self {
            #[cfg(feature = "cuda")]
            gpu: if device.is_cuda() { Some(crate::cuda::Gpu::new(device)?) } else { None },
            open: vec![],
            closed: vec![],
        })
    }

    fn now(&self) -> Moment {
        #[cfg(feature = "cuda")]
        if let Some(event) = self.gpu.as_ref().and_then(|gpu| super::gpu::mark(gpu).ok()) {
            return Moment::Gpu(event);
        }
        Moment::Host(Instant::now())
    }

    /// Seconds of every part, the longest of a kind first.
    fn sum(self) -> Result<Vec<StepPart>> {
        let mut sums: BTreeMap<(Kind, &'static str), (usize, f64)> = BTreeMap::new();
        for (kind, name, begin, end) in self.closed {
            let seconds = match (begin, end) {
                (Moment::Host(begin), Moment::Host(end)) => (end - begin).as_secs_f64(),
                #[cfg(feature = "cuda")]
                (Moment::Gpu(begin), Moment::Gpu(end)) => super::gpu::between(begin, end).seconds()?,
                #[cfg(feature = "cuda")]
                _ => continue,
            };
            let sum = sums.entry((kind, name)).or_default();
            *sum = (sum.0 + 1, sum.1 + seconds);
        }
        let mut parts = vec![];
        for ((kind, name), (runs, seconds)) in sums {
            parts.push((
                kind,
                StepPart { name: name.into(), kind: format!("{kind:?}").to_lowercase(), runs, seconds },
            ));
        }
        // Parts of the update first, then the nodes in them.
        parts.sort_by(|(a, x), (b, y)| {
            let node = |kind: &Kind| *kind != Kind::Part;
            node(a).cmp(&node(b)).then(y.seconds.total_cmp(&x.seconds))
        });
        Ok(parts.into_iter().map(|(_, part)| part).collect())
    }
}

struct Log(Rc<RefCell<Parts>>);

impl Watch for Log {
    fn begin(&mut self, kind: Kind, name: &'static str) {
        let mut parts = self.0.borrow_mut();
        let now = parts.now();
        parts.open.push((kind, name, now));
    }

    fn end(&mut self) {
        let mut parts = self.0.borrow_mut();
        let now = parts.now();
        if let Some((kind, name, begin)) = parts.open.pop() {
            parts.closed.push((kind, name, begin, now));
        }
    }
}
