//! Updates and evaluations on a GPU: batches arrive compact and are spread over timesteps there, and the host
//! reads a few numbers when a step is done.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Instant;

use anyhow::{Context as _, Result};
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
    /// Updates that are not finished.
    launched: VecDeque<Launched>,
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

/// An update on its way.
struct Launched {
    samples: DeviceSamples,
    dropout: Option<DropoutKey>,
    lr: f64,
    tokens: usize,
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
            launched: VecDeque::new(),
            sizes: vec![],
            capturing: true,
            gpu,
        })
    }

    /// Whether an update may be launched before the last one is finished: not if it could not be repeated to find out
    /// what went wrong in it.
    pub(super) fn launch_ahead(&self) -> bool {
        self.launched.iter().all(|launched| launched.samples.can_rewind())
    }

    /// Spreads samples over the tensors for their size, which become the last of `sizes`. Gives their timesteps.
    fn place(
        &mut self,
        samples: &mut DeviceSamples,
        dropout: Option<DropoutKey>,
        dtype: DType,
    ) -> Result<usize> {
        self.select(samples.compact(), dropout.is_some(), dtype)?;
        let size = self.sizes.last_mut().expect("a size was selected");
        samples.fill(&mut size.batch)?;
        if let Some(DropoutKey { key, .. }) = dropout {
            set_key(&self.gpu, key)?;
        }
        Ok(size.batch.valid_steps())
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
    /// [`Trainer::launch`] of a batch that was packed for the GPU.
    pub(super) fn launch_compact(&mut self, compact: Compact) -> Result<()> {
        let mut updates = match self.updates.take() {
            Some(updates) => updates,
            None => Updates::new(self)?,
        };
        let launched = self.launch_through(&mut updates, compact);
        self.updates = Some(updates);
        launched
    }

    /// [`Trainer::finish`] of what [`Trainer::launch_compact`] launched.
    pub(super) fn finish_compact(&mut self) -> Result<StepStats> {
        let mut updates = self.updates.take().context("no update was launched")?;
        let stats = self.finish_through(&mut updates);
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

    fn launch_through(&mut self, updates: &mut Updates, compact: Compact) -> Result<()> {
        let (dtype, lr, dropout) = (self.net.dtype(), self.learning_rate(), self.dropout());
        let launched = trace::part("upload", || {
            let mut samples = DeviceSamples::upload(compact, dtype, &updates.gpu.device())?;
            let tokens = updates.place(&mut samples, dropout, dtype)?;
            for (group, adam) in self.net.params().groups().iter().zip(&updates.adam) {
                let AdamStep { lr, step, .. } = self.adam_step(group);
                adam.set_step(lr, step)?;
            }
            anyhow::Ok(Launched { samples, dropout, lr, tokens })
        })?;
        updates.launch(self)?;
        updates.report.send()?;
        updates.launched.push_back(launched);
        self.ahead += 1;
        Ok(())
    }

    fn finish_through(&mut self, updates: &mut Updates) -> Result<StepStats> {
        let mut launched = updates.launched.pop_front().context("no update was launched")?;
        let ([loss, steps, right, elements], squares) = updates.report.receive()?;
        let (loss, grad_norm) = (loss / steps, squares.sqrt());
        self.ahead -= 1;
        if !loss.is_finite() || !grad_norm.is_finite() {
            // What was launched after it touched no weight; but its samples and gradient are there now.
            let others = updates.launched.len();
            for _ in 0..others {
                updates.report.receive()?;
            }
            updates.launched.clear();
            self.ahead = 0;
            if others > 0 {
                launched.samples.rewind();
                updates.place(&mut launched.samples, launched.dropout, self.net.dtype())?;
                let batch = &updates.sizes.last().expect("a size was selected").batch;
                self.launch_update(batch, &updates.adam, &updates.report)?;
            }
            updates.report.clear()?;
            let batch = &updates.sizes.last().expect("a size was selected").batch;
            return Err(self.not_finite(input(batch), loss)?);
        }
        self.step += 1;
        let Launched { lr, tokens, .. } = launched;
        Ok(StepStats { loss, accuracy: right / elements, grad_norm, lr, tokens })
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
                adam.apply(&flat, &squares, &loss, &report.halted()?)?;
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
    let mut report = Report::new(&gpu)?;
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
    report.send()?;
    let ([loss, steps, right, elements], _) = report.receive()?;
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

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use crate::config::load::parse;
    use crate::task::{Part, Task};
    use crate::train::trainer::{NotFinite, Trainer};

    #[test]
    fn updates_launched_ahead_are_those_one_by_one_and_touch_nothing_after_a_failure() {
        let Ok(device) = Device::new_cuda(0) else {
            eprintln!("skipped: no GPU");
            return;
        };
        let text = "
seed: 5
task: {preset: task2, ambiguities: 4, depth: 3, length: 10, samples: {train: 800}}
model: {name: gated_delta_net, layers: 2, width: 16, dropout: 0.3}
train: {batch: 8, warmup: 1, precision: f32}";
        let config = parse(text, "test", &[]).unwrap();
        let task = Task::new(&config.task, config.seed).unwrap();
        let trainer = || Trainer::new(&config, task.features(), task.classes(), &device).unwrap();
        let feed = |trainer: &Trainer, step: u64| {
            trainer.feed()(task.samples(Part::Train, 8 * step, 8, None).unwrap()).unwrap()
        };
        let bits = |trainer: &Trainer| trainer.state().map(|(_, x)| x.to_vec1::<f32>().unwrap());

        let mut one_by_one = trainer();
        let losses: Vec<f64> = (0..8)
            .map(|step| {
                let feed = feed(&one_by_one, step);
                one_by_one.update_with(feed).unwrap().loss
            })
            .collect();
        let mut ahead = trainer();
        let mut shown = vec![];
        for step in 0..8 {
            let feed = feed(&ahead, step);
            ahead.launch(feed).unwrap();
            if ahead.under_way() == 2 {
                shown.push(ahead.finish().unwrap().loss);
            }
        }
        shown.push(ahead.finish().unwrap().loss);
        assert_eq!(losses, shown);
        assert_eq!(bits(&one_by_one), bits(&ahead));

        // A weight that is no number: the update fails, and so would the one behind it, which is never asked.
        let value = ahead.net().params().value();
        value.slice_set(&candle_core::Tensor::new(&[f32::NAN], &device).unwrap(), 0, 0).unwrap();
        let before = bits(&ahead);
        for step in 8..10 {
            let feed = feed(&ahead, step);
            ahead.launch(feed).unwrap();
        }
        let error = ahead.finish().unwrap_err();
        assert!(error.is::<NotFinite>(), "{error:#}");
        assert_eq!((ahead.under_way(), ahead.step()), (0, 8));
        let same = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(before.iter().zip(&bits(&ahead)).all(|(a, b)| same(a, b)), "nothing is touched");
    }
}
