//! Updates and evaluations on a GPU: batches arrive compact and are spread over timesteps there, and the host
//! reads a few numbers when a step is done.

use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Instant;

use anyhow::Result;
use candle_core::{DType, Tensor};
use cudarc::driver::CudaGraph;

use super::breakdown::Counter;
use super::evaluate::{EvalPlan, Evaluation, MeanDivergence, next_targets};
use super::trainer::{StepStats, Trainer};
use crate::config::{Emulate, Recompute};
use crate::cuda::Gpu;
use crate::cuda::about::trim;
use crate::cuda::graph::{capture, rehearse};
use crate::model::{Context, DropoutKey, Input, RecNet};
use crate::ops::dropout::cuda::set_key;
use crate::ops::expand::{Compact, DeviceBatch, DeviceSamples};
use crate::ops::head::cuda::{DeviceTargets, Report, Totals, valid_scale};
use crate::ops::head::device::{DeviceVote, head_cross_entropy};
use crate::ops::linear::linear;
use crate::ops::no_grad;
use crate::ops::optim::AdamStep;
use crate::ops::optim::cuda::{DeviceAdam, Flat, sum_of_squares};
use crate::ops::tape::Arg;
use crate::task::next::Divergence;
use crate::task::{Sample, Task};
use crate::trace;

/// What a model sees of a batch.
pub(super) fn input(batch: &DeviceBatch) -> Input<'_> {
    match &batch.dense {
        Some(dense) => Input::Dense(dense),
        None => Input::Ids(&batch.ids),
    }
}

fn targets(batch: &DeviceBatch) -> Result<DeviceTargets> {
    Ok(DeviceTargets { labels: batch.labels.contiguous()?, element: batch.element.contiguous()? })
}

/// What the updates of a run keep on a GPU.
///
/// An update is launched kernel by kernel the first time that a batch of its size comes. The second time all its
/// launches are captured, and from then on they are one: so many small kernels are faster than a host can launch
/// them. What differs from update to update lies at fixed places in the memory of the GPU: samples, dropout's key,
/// learning rate.
pub(super) struct Updates {
    gpu: Gpu,
    /// One for each group of parameters.
    adam: Vec<DeviceAdam>,
    report: Report,
    /// The sizes that came, the latest last.
    sizes: Vec<Size>,
    /// Off after a capture that failed.
    capturing: bool,
}

/// Batches of one size.
struct Size {
    batch: DeviceBatch,
    dropout: bool,
    /// Samples of a forward pass when an update of this size was last launched kernel by kernel.
    rehearsed: Option<usize>,
    graph: Option<CudaGraph>,
}

impl Updates {
    fn new(trainer: &Trainer) -> Result<Self> {
        let device = trainer.net.params().value().device();
        let gpu = Gpu::new(device)?;
        Ok(Self {
            adam: (trainer.net.params().groups().iter())
                .map(|group| DeviceAdam::new(trainer.adam_step(group), trainer.config.train.clip, device))
                .collect::<candle_core::Result<_>>()?,
            report: Report::new(&gpu)?,
            sizes: vec![],
            capturing: true,
            gpu,
        })
    }

    /// Makes the tensors for samples of this size the last of `sizes`.
    fn select(&mut self, compact: &Compact, dropout: bool, dtype: DType) -> Result<()> {
        /// Sizes whose updates stay captured.
        const KEPT: usize = 32;
        let shape = (compact.batch(), padded(compact.steps()));
        let dense = compact.is_dense().then_some(dtype);
        let fits = |size: &Size| {
            (size.batch.batch, size.batch.steps) == shape
                && size.batch.elements == compact.elements()
                && size.batch.dense.is_some() == dense.is_some()
                && size.dropout == dropout
        };
        let size = match self.sizes.iter().position(fits) {
            Some(at) => self.sizes.remove(at),
            None => {
                let (elements, features) = (compact.elements(), compact.features());
                let batch = DeviceBatch::empty(&self.gpu.device(), shape, elements, features, dense)?;
                Size { batch, dropout, rehearsed: None, graph: None }
            }
        };
        if self.sizes.len() == KEPT {
            self.sizes.remove(0);
        }
        self.sizes.push(size);
        Ok(())
    }

    /// Launches the update of the batch that was selected.
    fn launch(&mut self, trainer: &mut Trainer) -> Result<()> {
        loop {
            let size = self.sizes.last().expect("a size was selected");
            let micro = trainer.micro_batch(size.batch.steps).min(size.batch.batch);
            match self.try_launch(trainer, micro) {
                Err(error) if trainer.retreat(&error, micro) => {}
                result => return result,
            }
        }
    }

    fn try_launch(&mut self, trainer: &Trainer, micro: usize) -> Result<()> {
        let size = self.sizes.last_mut().expect("a size was selected");
        let batch = &size.batch;
        let (adam, report) = (&self.adam, &self.report);
        let update = || trainer.launch_update(batch, adam, report);
        if self.capturing && size.rehearsed == Some(micro) && !trace::watched() {
            let launched = match &size.graph {
                Some(graph) => graph.launch().map_err(anyhow::Error::from),
                None => capture(&self.gpu, update).and_then(|graph| {
                    graph.launch()?;
                    size.graph = Some(graph);
                    Ok(())
                }),
            };
            let Err(error) = launched else { return Ok(()) };
            eprintln!("going on without captured updates, a little slower: {error:#}");
            self.capturing = false;
            self.sizes.iter_mut().for_each(|size| size.graph = None);
            self.gpu.stream().synchronize()?;
            trim(&self.gpu)?;
            return self.try_launch(trainer, micro);
        }
        size.graph = None;
        rehearse(&self.gpu, update)?;
        size.rehearsed = Some(micro);
        Ok(())
    }
}

/// Timesteps that batches of about this length are padded to, so that few sizes are captured: 3 % more at most.
fn padded(steps: usize) -> usize {
    steps.next_multiple_of(1 << (steps / 32).max(1).ilog2())
}

impl Trainer {
    /// [`Trainer::update`] with a batch that was packed for the GPU; the gradient that is not finite leaves the
    /// weights alone.
    pub fn update_compact(&mut self, compact: Compact) -> Result<StepStats> {
        let mut updates = match self.updates.take() {
            Some(updates) => updates,
            None => Updates::new(self)?,
        };
        let stats = self.update_through(&mut updates, compact);
        self.updates = Some(updates);
        stats
    }

    /// The GPU that updates run on, once there was one.
    pub fn gpu(&self) -> Option<&Gpu> {
        self.updates.as_ref().map(|updates| &updates.gpu)
    }

    /// Launches the last update again, with the samples and the step's numbers that it had, if it was captured; for
    /// measuring. Gives whether it was.
    pub fn relaunch(&self) -> Result<bool> {
        let size = self.updates.as_ref().and_then(|updates| updates.sizes.last());
        match size.and_then(|size| size.graph.as_ref()) {
            Some(graph) => graph.launch().map(|()| true).map_err(anyhow::Error::from),
            None => Ok(false),
        }
    }

    fn update_through(&mut self, updates: &mut Updates, compact: Compact) -> Result<StepStats> {
        let (dtype, lr, dropout) = (self.net.dtype(), self.learning_rate(), self.dropout());
        trace::part("upload", || {
            updates.select(&compact, dropout.is_some(), dtype)?;
            let size = updates.sizes.last_mut().expect("a size was selected");
            let mut samples = DeviceSamples::upload(compact, dtype, &updates.gpu.device())?;
            samples.fill(&mut size.batch)?;
            if let Some(DropoutKey { key, .. }) = dropout {
                set_key(&updates.gpu, key)?;
            }
            for (group, adam) in self.net.params().groups().iter().zip(&updates.adam) {
                let AdamStep { lr, step, .. } = self.adam_step(group);
                adam.set_step(lr, step)?;
            }
            anyhow::Ok(())
        })?;
        updates.launch(self)?;
        // Everything is on its way: now wait for what it says.
        let ([loss, steps, right, elements], squares) = updates.report.read()?;
        let (loss, grad_norm) = (loss / steps, squares.sqrt());
        let batch = &updates.sizes.last().expect("a size was selected").batch;
        if !loss.is_finite() || !grad_norm.is_finite() {
            return Err(self.not_finite(input(batch), loss)?);
        }
        self.step += 1;
        Ok(StepStats { loss, accuracy: right / elements, grad_norm, lr, tokens: batch.valid_steps() })
    }

    /// Puts a whole update on the stream, its report included; the host sees nothing of it.
    fn launch_update(&self, batch: &DeviceBatch, adam: &[DeviceAdam], report: &Report) -> Result<()> {
        let (totals, loss) = self.accumulate_on_gpu(batch)?;
        trace::part("optimizer", || {
            let params = self.net.params();
            let squares = sum_of_squares(params.gradient())?;
            for (group, adam) in params.groups().iter().zip(adam) {
                let of = |flat| group.of(flat);
                let (value, grad, m, v) =
                    (of(params.value())?, of(params.gradient())?, of(&self.m)?, of(&self.v)?);
                let shadow = params.shadow().map(of).transpose()?;
                let flat = Flat { value: &value, grad: &grad, m: &m, v: &v, shadow: shadow.as_ref() };
                adam.apply(&flat, &squares, &loss)?;
            }
            for (i, totals) in totals.iter().enumerate() {
                report.add(totals, Some(&squares), i > 0)?;
            }
            Ok(())
        })
    }

    /// Adds up the gradient of a batch; gives what its micro-batches showed, and the loss of the last.
    fn accumulate_on_gpu(&self, batch: &DeviceBatch) -> Result<(Vec<Totals>, Tensor)> {
        self.net.params().zero_grad()?;
        let authors = self.config.train.emulate == Emulate::Authors;
        let micro = self.micro_batch(batch.steps);
        let (weight, bias) = self.net.decoder();
        let whole = valid_scale(&targets(batch)?)?;
        let mut shown = Vec::new();
        let mut last = None;
        for first in (0..batch.batch).step_by(micro) {
            let part = batch.rows(first..(first + micro).min(batch.batch))?;
            let targets = Arc::new(targets(&part)?);
            let factor = if authors { valid_scale(&targets)? } else { whole.clone() };
            let dropout = self.dropout().map(|key| DropoutKey { first: first as u32, ..key });
            let recompute = self.config.train.recompute == Recompute::Layers;
            let mut context = Context { dropout, recompute, ..Context::default() };
            let (loss, totals) = trace::part("forward", || {
                let hidden = self.net.hidden(input(&part), &mut context)?;
                head_cross_entropy(&hidden, weight, bias, &targets, part.elements, &factor)
            })?;
            trace::part("backward", || loss.backward())?;
            // The released code reports the last of its micro-batches.
            if authors {
                shown.clear();
            }
            shown.push(totals);
            last = Some(loss.detach());
        }
        match last {
            Some(loss) => Ok((shown, loss)),
            None => anyhow::bail!("a batch without a sample"),
        }
    }
}

/// The samples of one batch of an evaluation.
struct EvalBatch {
    known: Vec<Sample>,
    compact: Compact,
}

impl EvalBatch {
    /// The batch that begins with sample `first`.
    fn draw(task: &Task, plan: &EvalPlan, first: usize) -> Result<Self> {
        let count = plan.batch.min(plan.samples - first);
        let samples = task.samples(plan.part, first as u64, count, plan.gap)?;
        Ok(Self { known: samples.as_slice().to_vec(), compact: samples.compact()? })
    }
}

/// [`evaluate`](super::evaluate::evaluate) on a GPU; a thread draws the next samples meanwhile.
pub(super) fn evaluate(
    net: &RecNet,
    task: &Task,
    plan: &EvalPlan,
    progress: impl FnMut(usize) -> bool,
) -> Result<Option<Evaluation>> {
    std::thread::scope(|scope| {
        let (send, batches) = sync_channel(1);
        scope.spawn(move || {
            for first in (0..plan.samples).step_by(plan.batch) {
                let batch = EvalBatch::draw(task, plan, first);
                // Nobody takes it any more after an error or a request to stop.
                if send.send(batch).is_err() {
                    return;
                }
            }
        });
        evaluate_batches(net, task, plan, batches.into_iter(), progress)
    })
}

fn evaluate_batches(
    net: &RecNet,
    task: &Task,
    plan: &EvalPlan,
    batches: impl Iterator<Item = Result<EvalBatch>>,
    mut progress: impl FnMut(usize) -> bool,
) -> Result<Option<Evaluation>> {
    let begin = Instant::now();
    let (weight, bias) = net.decoder();
    let device = net.params().value().device();
    let gpu = Gpu::new(device)?;
    let report = Report::new(&gpu)?;
    let mut counter = Counter::new(task);
    let (next, mut kl) = (next_targets(task, plan), MeanDivergence::default());
    let (mut done, mut timesteps, mut tokens) = (0, 0, 0);
    for batch in batches {
        let EvalBatch { known, compact } = batch?;
        timesteps = timesteps.max(compact.steps());
        tokens += compact.valid_steps();
        let elements = compact.elements();
        let mut samples = DeviceSamples::upload(compact, net.dtype(), device)?;
        let mut divergence = next.as_ref().map(|next| Divergence::new(next, &known));
        let mut context = Context::streaming();
        let mut vote = DeviceVote::new(&gpu, known.len(), elements, net.classes())?;
        while let Some(piece) = samples.next_window(plan.chunk)? {
            if !progress(done) {
                return Ok(None);
            }
            no_grad(|| {
                let hidden = net.hidden(input(&piece), &mut context)?;
                let targets = targets(&piece).map_err(candle_core::Error::wrap)?;
                if let Some(divergence) = &mut divergence {
                    // The classes are few: their logits are read back, in f32 whatever the layers compute in.
                    let hidden = hidden.to_dtype(DType::F32)?;
                    let logits = linear(&hidden, &weight.value(), Some(Arg::from(&bias.value())))?;
                    let element = piece.element.flatten_all()?.to_vec1::<u32>()?;
                    divergence.add(&logits.flatten_all()?.to_vec1()?, &element);
                }
                vote.feed(&hidden, &weight.weight(), &bias.value(), &targets)
            })?;
        }
        let totals = vote.finish()?;
        kl.add(divergence);
        report.add(&totals, None, done > 0)?;
        counter.add(&known, &totals.votes.flatten_all()?.to_vec1()?);
        done += known.len();
    }
    if !progress(plan.samples) {
        return Ok(None);
    }
    let ([loss, steps, right, elements], _) = report.read()?;
    Ok(Some(Evaluation {
        accuracy: right / elements,
        loss: loss / steps,
        kl: kl.finish(),
        samples: plan.samples,
        timesteps,
        tokens,
        seconds: begin.elapsed().as_secs_f64(),
        breakdown: Some(counter.finish()),
    }))
}
