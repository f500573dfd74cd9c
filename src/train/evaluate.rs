//! Accuracy and loss of a model on a part of the data, in pieces of bounded length.

use std::time::Instant;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::breakdown::{Breakdown, Counter};
use crate::config::Config;
use crate::model::{Context, Input, RecNet};
use crate::ops::head::{self, Vote};
use crate::ops::no_grad;
use crate::task::next::{Divergence, Targets};
use crate::task::{Batch, PAD, Part, Task};

/// What is evaluated, and in which portions.
#[derive(Clone, Copy, Debug)]
pub struct EvalPlan {
    pub part: Part,
    pub samples: usize,
    /// A fixed gap in place of the task's `test_gap`.
    pub gap: Option<f64>,
    /// Samples per forward pass.
    pub batch: usize,
    /// Timesteps per forward pass; the state is carried from one to the next.
    pub chunk: usize,
}

/// Timesteps per forward pass, as configured.
pub fn chunk(config: &Config, device: &candle_core::Device) -> usize {
    /// What keeps to the caches of a CPU.
    const ON_CPU: usize = 512;
    /// What keeps a large GPU busy, so that the beginning and the end of a kernel are a small part of it.
    const ON_GPU: usize = 2048;
    config.train.eval_chunk.or(if device.is_cpu() { ON_CPU } else { ON_GPU })
}

/// What came out.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Evaluation {
    /// Share of the elements whose window voted for the right state, or the right next symbol.
    pub accuracy: f64,
    /// Mean cross-entropy over all steps that are asked, in nats.
    pub loss: f64,
    /// Where the next symbol is predicted: mean over all steps of the divergence of the model's distribution from
    /// the target's ([`crate::task::next`]), in nats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl: Option<f64>,
    pub samples: usize,
    /// Timesteps of the longest sample.
    pub timesteps: usize,
    /// Timesteps of all samples.
    pub tokens: usize,
    pub seconds: f64,
    /// Where it was right; runs of older versions lack it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub breakdown: Option<Breakdown>,
}

/// The steps of a batch as the head wants them.
pub fn targets(batch: &Batch) -> head::Targets {
    head::Targets {
        labels: batch.labels.clone(),
        element: batch.element.clone(),
        batch: batch.batch,
        steps: batch.steps,
        elements: batch.elements,
    }
}

/// The label of every element, [B·E]; [`PAD`] where a sample has no such element.
#[derive(Default)]
pub struct ElementLabels(Vec<u32>);

impl ElementLabels {
    /// Takes the elements that a batch, or a piece of one, shows.
    pub fn take(&mut self, batch: &Batch) {
        self.0.resize(batch.batch * batch.elements, PAD);
        let steps = batch.element.iter().zip(&batch.labels).enumerate();
        for (i, (&element, &label)) in steps.filter(|(_, (element, _))| **element != PAD) {
            self.0[i / batch.steps * batch.elements + element as usize] = label;
        }
    }

    /// Right votes, and elements.
    pub fn count(&self, votes: &[u32]) -> (usize, usize) {
        let elements = self.0.iter().filter(|&&label| label != PAD).count();
        let right = self.0.iter().zip(votes).filter(|(label, vote)| **label != PAD && label == vote).count();
        (right, elements)
    }
}

/// The divergence from the targets of a whole evaluation.
#[derive(Default)]
pub(super) struct MeanDivergence {
    sum: f64,
    steps: usize,
}

impl MeanDivergence {
    /// Adds that of a batch.
    pub(super) fn add(&mut self, batch: Option<Divergence>) {
        let Some((sum, steps)) = batch.map(Divergence::finish) else { return };
        self.sum += sum;
        self.steps += steps;
    }

    pub(super) fn finish(self) -> Option<f64> {
        (self.steps > 0).then(|| self.sum / self.steps as f64)
    }
}

/// The targets of what a plan evaluates, if there are any: gaps of the training part are not fixed.
pub(super) fn next_targets<'a>(task: &'a Task, plan: &EvalPlan) -> Option<Targets<'a>> {
    if plan.part == Part::Train { None } else { Targets::new(task, plan.gap) }
}

/// What a model sees of a batch: ids where that is all, numbers where noise is added or symbols are recordings.
pub fn with_input<T>(
    batch: &Batch,
    device: &candle_core::Device,
    f: impl FnOnce(Input) -> candle_core::Result<T>,
) -> candle_core::Result<T> {
    if !batch.is_dense() {
        return f(Input::Ids(&batch.ids(device)?));
    }
    let shape = (batch.batch, batch.steps, batch.features);
    f(Input::Dense(&candle_core::Tensor::from_vec(batch.dense(), shape, device)?))
}

/// Evaluates `net`; `progress` is told the number of finished samples and gives false to stop, which
/// gives `None`.
///
/// Sequences come in pieces of `plan.chunk` timesteps with carried state, so that the memory that a
/// recurrent model needs does not depend on their length.
pub fn evaluate(
    net: &RecNet,
    task: &Task,
    plan: &EvalPlan,
    mut progress: impl FnMut(usize) -> bool,
) -> Result<Option<Evaluation>> {
    #[cfg(feature = "cuda")]
    if net.params().value().device().is_cuda() {
        return super::gpu::evaluate(net, task, plan, progress);
    }
    let begin = Instant::now();
    let (weight, bias) = net.decoder();
    let device = net.params().value().device();
    let (mut right, mut elements, mut loss, mut steps) = (0, 0, 0.0, 0);
    let (mut tokens, mut timesteps) = (0, 0);
    let mut counter = Counter::new(task);
    let (next, mut kl) = (next_targets(task, plan), MeanDivergence::default());
    for first in (0..plan.samples).step_by(plan.batch) {
        let count = plan.batch.min(plan.samples - first);
        let mut samples = task.samples(plan.part, first as u64, count, plan.gap)?;
        timesteps = timesteps.max(samples.steps());
        tokens += samples.valid_steps();
        let mut divergence = next.as_ref().map(|next| Divergence::new(next, samples.as_slice()));
        let mut context = Context::streaming();
        let mut vote = Vote::new(count, net.classes());
        let mut labels = ElementLabels::default();
        while let Some(piece) = samples.next_window(plan.chunk) {
            if !progress(first) {
                return Ok(None);
            }
            labels.take(&piece);
            no_grad(|| {
                let hidden = with_input(&piece, device, |input| net.hidden(input, &mut context))?;
                if let Some(divergence) = &mut divergence {
                    divergence.add(&net.decode(&hidden)?.flatten_all()?.to_vec1()?, &piece.element);
                }
                vote.feed(&hidden, &weight.value(), &bias.value(), &targets(&piece))
            })?;
        }
        let (votes, sum, asked) = vote.finish();
        kl.add(divergence);
        counter.add(samples.as_slice(), &votes);
        let (r, e) = labels.count(&votes);
        (right, elements, loss, steps) = (right + r, elements + e, loss + sum, steps + asked);
    }
    if !progress(plan.samples) {
        return Ok(None);
    }
    Ok(Some(Evaluation {
        accuracy: right as f64 / elements as f64,
        loss: loss / steps as f64,
        kl: kl.finish(),
        samples: plan.samples,
        timesteps,
        tokens,
        seconds: begin.elapsed().as_secs_f64(),
        breakdown: Some(counter.finish()),
    }))
}
