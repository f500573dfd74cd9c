//! Updates and evaluations on a GPU: batches arrive compact and are spread over timesteps there, and the host
//! reads a few numbers when a step is done.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use candle_core::{DType, Tensor};

use super::breakdown::Counter;
use super::evaluate::{EvalPlan, Evaluation, MeanDivergence, next_targets};
use super::trainer::{StepStats, Trainer};
use crate::config::{Emulate, OptimizerKind};
use crate::cuda::Gpu;
use crate::model::{Context, DropoutKey, Input, RecNet};
use crate::ops::expand::{Compact, DeviceBatch, DeviceSamples};
use crate::ops::head::cuda::{DeviceTargets, Totals, valid_scale};
use crate::ops::head::device::{DeviceVote, head_cross_entropy};
use crate::ops::linear::linear;
use crate::ops::no_grad;
use crate::ops::optim::AdamStep;
use crate::ops::optim::cuda::{DeviceAdam, Flat, sum_of_squares};
use crate::ops::tape::Arg;
use crate::task::Task;
use crate::task::next::Divergence;
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

/// [`Totals`] on the host.
#[derive(Default)]
struct Sums {
    loss: f64,
    steps: usize,
    right: usize,
    elements: usize,
}

impl Sums {
    fn add(&mut self, totals: &Totals) -> Result<()> {
        self.loss += totals.loss_sum.to_vec1::<f64>()?[0];
        self.steps += totals.steps.to_vec1::<u32>()?[0] as usize;
        let counts = totals.counts.to_vec1::<u32>()?;
        self.right += counts[0] as usize;
        self.elements += counts[1] as usize;
        Ok(())
    }
}

impl Trainer {
    /// The optimizer of a model on a GPU.
    pub(super) fn device_adam(&self) -> Result<DeviceAdam> {
        let train = &self.config.train;
        let settings = AdamStep {
            lr: 0.0,
            beta1: train.beta1,
            beta2: train.beta2,
            eps: train.eps,
            weight_decay: train.weight_decay,
            decoupled: train.optimizer == OptimizerKind::Adamw,
            step: 0,
            grad_scale: 1.0,
        };
        Ok(DeviceAdam::new(settings, train.clip, self.net.params().value().device())?)
    }

    /// [`Trainer::update`] with a batch that was packed for the GPU.
    pub fn update_compact(&mut self, compact: Compact) -> Result<StepStats> {
        let (device, dtype) = (self.net.params().value().device(), self.net.dtype());
        let steps = compact.steps();
        let batch = trace::part("upload", || {
            DeviceSamples::upload(compact, dtype, device).and_then(|mut samples| samples.next_window(steps))
        });
        match batch? {
            Some(batch) => self.update_on_gpu(&batch),
            None => anyhow::bail!("a batch without a timestep"),
        }
    }

    /// One update; the gradient that is not finite leaves the weights alone.
    pub(super) fn update_on_gpu(&mut self, batch: &DeviceBatch) -> Result<StepStats> {
        let (totals, loss) = loop {
            let micro_batch = self.micro_batch(batch.steps).min(batch.batch);
            match self.accumulate_on_gpu(batch) {
                Err(error) if self.retreat(&error, micro_batch) => {}
                result => break result?,
            }
        };
        let optimizer = trace::range(trace::Kind::Part, "optimizer");
        let params = self.net.params();
        let squares = sum_of_squares(params.gradient())?;
        let lr = self.learning_rate();
        let adam = match &self.adam {
            Some(adam) => adam,
            None => self.adam.insert(self.device_adam()?),
        };
        adam.set_step(lr, self.step as u64 + 1)?;
        let params = self.net.params();
        let (value, grad, shadow) = (params.value(), params.gradient(), params.shadow());
        adam.apply(&Flat { value, grad, m: &self.m, v: &self.v, shadow }, &squares, &loss)?;

        drop(optimizer);
        // Everything is on its way: now wait for what it says.
        let grad_norm = squares.to_vec1::<f64>()?[0].sqrt();
        let mut sums = Sums::default();
        for totals in &totals {
            sums.add(totals)?;
        }
        let loss = sums.loss / sums.steps as f64;
        if !loss.is_finite() || !grad_norm.is_finite() {
            return Err(self.not_finite(input(batch), loss)?);
        }
        self.step += 1;
        let accuracy = sums.right as f64 / sums.elements as f64;
        Ok(StepStats { loss, accuracy, grad_norm, lr, tokens: batch.valid_steps() })
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
            let mut context = Context { dropout, state: None };
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

/// [`evaluate`](super::evaluate::evaluate) on a GPU.
pub(super) fn evaluate(
    net: &RecNet,
    task: &Task,
    plan: &EvalPlan,
    mut progress: impl FnMut(usize) -> bool,
) -> Result<Option<Evaluation>> {
    let begin = Instant::now();
    let (weight, bias) = net.decoder();
    let device = net.params().value().device();
    let gpu = Gpu::new(device)?;
    let mut sums = Sums::default();
    let mut counter = Counter::new(task);
    let (next, mut kl) = (next_targets(task, plan), MeanDivergence::default());
    let mut timesteps = 0;
    for first in (0..plan.samples).step_by(plan.batch) {
        let count = plan.batch.min(plan.samples - first);
        let samples = task.samples(plan.part, first as u64, count, plan.gap)?;
        let known = samples.as_slice().to_vec();
        let compact = samples.compact()?;
        timesteps = timesteps.max(compact.steps());
        let elements = compact.elements();
        let mut samples = DeviceSamples::upload(compact, net.dtype(), device)?;
        let mut divergence = next.as_ref().map(|next| Divergence::new(next, &known));
        let mut context = Context::streaming();
        let mut vote = DeviceVote::new(&gpu, count, elements, net.classes())?;
        while let Some(piece) = samples.next_window(plan.chunk)? {
            if !progress(first) {
                return Ok(None);
            }
            no_grad(|| {
                let hidden = net.hidden(input(&piece), &mut context)?;
                let targets = targets(&piece).map_err(candle_core::Error::wrap)?;
                if let Some(divergence) = &mut divergence {
                    // The classes are few: their logits are read back, in f32 whatever the layers compute in.
                    let hidden = hidden.to_dtype(DType::F32)?;
                    let logits = linear(&hidden, &weight.value(), Some(Arg::from(&bias.value())))?;
                    divergence.add(&logits.flatten_all()?.to_vec1()?);
                }
                vote.feed(&hidden, &weight.weight(), &bias.value(), &targets)
            })?;
        }
        let totals = vote.finish()?;
        kl.add(divergence);
        sums.add(&totals)?;
        counter.add(&known, &totals.votes.flatten_all()?.to_vec1()?);
    }
    if !progress(plan.samples) {
        return Ok(None);
    }
    Ok(Some(Evaluation {
        accuracy: sums.right as f64 / sums.elements as f64,
        loss: sums.loss / sums.steps as f64,
        kl: kl.finish(),
        samples: plan.samples,
        timesteps,
        tokens: sums.steps,
        seconds: begin.elapsed().as_secs_f64(),
        breakdown: Some(counter.finish()),
    }))
}

/// A batch from the host, step by step.
pub(super) fn upload(
    batch: &crate::task::Batch,
    dtype: DType,
    device: &candle_core::Device,
) -> Result<DeviceBatch> {
    let shape = (batch.batch, batch.steps);
    let to = |steps: &[u32]| Tensor::from_slice(steps, shape, device);
    let dense = match batch.noise {
        None => None,
        Some(_) => {
            let shape = (batch.batch, batch.steps, batch.features);
            Some(Tensor::from_vec(batch.dense(), shape, device)?.to_dtype(dtype)?)
        }
    };
    Ok(DeviceBatch {
        batch: batch.batch,
        steps: batch.steps,
        elements: batch.elements,
        features: batch.features,
        ids: batch.ids(device)?,
        labels: to(&batch.labels)?,
        element: to(&batch.element)?,
        dense,
        lengths: batch.lengths.clone(),
        first: batch.first,
    })
}
