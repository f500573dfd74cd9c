//! One update: forward and backward passes over micro-batches, clipping, Adam.

use anyhow::Result;
use candle_core::{Device, Tensor};

use super::evaluate::{ElementLabels, targets, with_input};
use super::schedule;
use crate::config::{Auto, Config, Emulate, OptimizerKind, Recompute};
use crate::device::number_format;
use crate::model::param::Group;
use crate::model::{Context, DropoutKey, Input, RecNet};
use crate::ops::head::head_cross_entropy;
use crate::ops::optim::{AdamStep, clip_scale, global_norm};
use crate::task::rng::SeedSequence;
use crate::task::{Batch, Samples};
use crate::trace;

/// Marks the random stream of dropout masks among the streams of a seed.
const DROPOUT: u32 = 0xd209_0075;

/// A model in training: weights, moments, and the number of updates made.
pub struct Trainer {
    pub(super) config: Config,
    pub(super) net: RecNet,
    pub(super) m: Tensor,
    pub(super) v: Tensor,
    /// Updates made.
    pub(super) step: usize,
    /// Updates launched since.
    pub(super) ahead: usize,
    total: usize,
    /// What the last update on the CPU showed, until it is asked for.
    shown: Option<StepStats>,
    /// Samples per forward pass that memory has room for.
    limit: usize,
    /// Made at the first update.
    #[cfg(feature = "cuda")]
    pub(super) updates: Option<super::gpu::Updates>,
}

/// The samples of one update.
pub enum Feed {
    Steps(Batch),
    /// Packed for a GPU.
    #[cfg(feature = "cuda")]
    Compact(crate::ops::expand::Compact),
}

/// Samples per forward pass, of samples of so many timesteps.
///
/// The released code takes 4 where the longest gap is at least 1 and the width above 648, else all
/// that memory holds: when it is emulated the number bears on the gradient.
pub fn micro_batch(config: &Config, steps: usize, cpu: bool) -> usize {
    /// Numbers in one activation tensor: about what keeps the working set of a layer in the caches
    /// of a CPU. A constant, so that a run does not depend on the machine.
    const ON_CPU: usize = 1 << 20;
    /// What leaves room for the activations of all layers in the 80 GB of a large GPU.
    const ON_GPU: usize = 1 << 27;
    let activation = if cpu { ON_CPU } else { ON_GPU };
    match config.train.micro_batch {
        Auto::Value(micro) => micro,
        Auto::Auto(_) if config.train.emulate == Emulate::Authors => {
            let small = config.task.gap.high >= 1.0 && config.model.width > 648;
            if small { 4 } else { config.train.batch }
        }
        Auto::Auto(_) => (activation / (steps * config.model.width).max(1)).clamp(1, config.train.batch),
    }
}

/// Whether a GPU had too little memory.
pub(super) fn is_out_of_memory(error: &anyhow::Error) -> bool {
    let text = format!("{error:#}");
    text.contains("OUT_OF_MEMORY") || text.contains("out of memory")
}

/// What one update showed.
#[derive(Clone, Copy, Debug)]
pub struct StepStats {
    /// Mean cross-entropy over the steps of the batch, in nats.
    pub loss: f64,
    pub accuracy: f64,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
    pub lr: f64,
    pub tokens: usize,
}

/// An update that would have put numbers into the weights that are none.
#[derive(Debug)]
pub struct NotFinite {
    /// What is not finite, in words.
    pub what: String,
}

impl std::fmt::Display for NotFinite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for NotFinite {}

impl Trainer {
    /// A fresh model of the configured kind.
    pub fn new(config: &Config, features: usize, classes: usize, device: &Device) -> Result<Self> {
        let dtype = number_format(config, device)?.dtype();
        let net = RecNet::new(&config.model, features, classes, config.seed, dtype, device)?;
        let (m, v) = (net.params().value().zeros_like()?, net.params().value().zeros_like()?);
        Ok(Self {
            config: config.clone(),
            net,
            m,
            v,
            step: 0,
            ahead: 0,
            total: config.updates(),
            shown: None,
            limit: usize::MAX,
            #[cfg(feature = "cuda")]
            updates: None,
        })
    }

    pub fn net(&self) -> &RecNet {
        &self.net
    }

    /// Updates made so far.
    pub fn step(&self) -> usize {
        self.step
    }

    /// Updates that were launched and not finished.
    pub fn under_way(&self) -> usize {
        self.ahead + usize::from(self.shown.is_some())
    }

    /// Updates made when the next one that is launched begins.
    pub(super) fn next(&self) -> usize {
        self.step + self.ahead
    }

    /// Updates of the whole run.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Updates between two evaluations.
    pub fn evaluation_interval(&self) -> usize {
        (self.config.train.eval_every / self.config.train.batch).max(1)
    }

    /// Flat weights and moments by name, for an exact resume.
    pub fn state(&self) -> [(&'static str, &Tensor); 3] {
        [("adam_m", &self.m), ("adam_v", &self.v), ("weights", self.net.params().value())]
    }

    /// Goes on from weights and moments that [`Trainer::state`] gave after `step` updates.
    pub fn restore(&mut self, step: usize, mut state: impl FnMut(&str) -> Option<Tensor>) -> Result<()> {
        for (name, own) in self.state() {
            let Some(saved) = state(name).filter(|saved| saved.dims() == own.dims()) else {
                anyhow::bail!("its tensor {name} does not fit this model")
            };
            own.slice_set(&saved.to_device(own.device())?, 0, 0)?;
        }
        self.net.params().refresh()?;
        self.step = step;
        Ok(())
    }

    /// Lets no forward pass have more than `limit` samples. The gradient stays that of the whole batch.
    pub fn limit_micro_batch(&mut self, limit: usize) {
        self.limit = self.limit.min(limit.max(1));
    }

    /// The limit that was set, if any.
    pub fn limit(&self) -> Option<usize> {
        (self.limit < usize::MAX).then_some(self.limit)
    }

    /// After a failed forward or backward pass over `samples` at most: halves micro-batches where memory was
    /// short, and tells whether another try is worth it.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "a CPU's memory ends the process"))]
    pub(super) fn retreat(&mut self, error: &anyhow::Error, micro_batch: usize) -> bool {
        if !is_out_of_memory(error) || micro_batch < 2 {
            return false;
        }
        self.limit = micro_batch.div_ceil(2);
        eprintln!("out of memory: going on with micro-batches of at most {}", self.limit);
        true
    }

    /// Samples per forward pass, as memory allows.
    pub(super) fn micro_batch(&self, steps: usize) -> usize {
        let cpu = self.net.params().value().device().is_cpu();
        micro_batch(&self.config, steps, cpu).min(self.limit)
    }

    /// The dropout of the next update. The released code drops nothing after its first evaluation.
    pub(super) fn dropout(&self) -> Option<DropoutKey> {
        let p = self.config.model.dropout;
        let authors = self.config.train.emulate == Emulate::Authors;
        if p == 0.0 || (authors && self.next() >= self.evaluation_interval()) {
            return None;
        }
        let (seed, step) = (self.config.seed, self.next() as u32);
        let [key] = SeedSequence::new(&[seed as u32, (seed >> 32) as u32, DROPOUT, step]).state::<1>();
        Some(DropoutKey { p, key: [key as u32, (key >> 32) as u32], first: 0 })
    }

    /// Adds up the gradient of a batch; gives its loss and accuracy.
    pub fn accumulate(&self, batch: &Batch) -> Result<(f64, f64)> {
        self.net.params().zero_grad()?;
        let authors = self.config.train.emulate == Emulate::Authors;
        let (micro, device) = (self.micro_batch(batch.steps), self.net.params().value().device());
        let (weight, bias) = self.net.decoder();
        let (mut loss, mut right, mut elements, mut steps) = (0.0, 0, 0, 0);
        for first in (0..batch.batch).step_by(micro) {
            let part = batch.rows(first..(first + micro).min(batch.batch));
            // The released code adds the means of its micro-batches up, and reports the last one.
            if authors {
                (loss, right, elements, steps) = (0.0, 0, 0, 0);
            }
            let denominator = if authors { part.asked_steps() } else { batch.asked_steps() };
            let dropout = self.dropout().map(|key| DropoutKey { first: first as u32, ..key });
            let recompute = self.config.train.recompute == Recompute::Layers;
            let mut context = Context { dropout, recompute, ..Context::default() };
            let out = trace::part("forward", || {
                let hidden = with_input(&part, device, |input| self.net.hidden(input, &mut context))?;
                head_cross_entropy(&hidden, weight, bias, &targets(&part), denominator as f64)
            })?;
            let mut labels = ElementLabels::default();
            labels.take(&part);
            let (r, e) = labels.count(&out.votes);
            (loss, right, elements) = (loss + out.loss_sum, right + r, elements + e);
            steps += part.asked_steps();
            trace::part("backward", || out.loss.backward())?;
        }
        Ok((loss / steps as f64, right as f64 / elements as f64))
    }

    /// The learning rate of the next update.
    pub(super) fn learning_rate(&self) -> f64 {
        self.config.train.lr * schedule::multiplier(&self.config, self.next(), self.total)
    }

    /// One update.
    pub fn update_with(&mut self, feed: Feed) -> Result<StepStats> {
        self.launch(feed)?;
        self.finish()
    }

    /// Launches an update, for [`Trainer::finish`] to wait for. A GPU takes a second one before the first is finished
    /// if [`Trainer::launches_ahead`] says so, and is never idle then; the results are the same.
    pub fn launch(&mut self, feed: Feed) -> Result<()> {
        if self.under_way() > usize::from(self.launches_ahead()) {
            anyhow::bail!("an update was launched before the last one was finished")
        }
        match feed {
            Feed::Steps(batch) => self.shown = Some(self.update(&batch)?),
            #[cfg(feature = "cuda")]
            Feed::Compact(compact) => self.launch_compact(compact)?,
        }
        Ok(())
    }

    /// Waits for the update that was launched first, and tells what it showed. Fails with [`NotFinite`] on a loss or
    /// gradient that is not finite; no weight is touched then, nor by what was launched after it.
    pub fn finish(&mut self) -> Result<StepStats> {
        match self.shown.take() {
            Some(stats) => Ok(stats),
            #[cfg(feature = "cuda")]
            None => self.finish_compact(),
            #[cfg(not(feature = "cuda"))]
            None => anyhow::bail!("no update was launched"),
        }
    }

    /// Whether an update may be launched before the last one is finished.
    pub fn launches_ahead(&self) -> bool {
        #[cfg(feature = "cuda")]
        if let Some(updates) = &self.updates {
            return updates.launch_ahead();
        }
        false
    }

    /// How [`Trainer::launch`] wants its samples; for the thread that makes them.
    pub fn feed(&self) -> fn(Samples) -> Result<Feed> {
        #[cfg(feature = "cuda")]
        if self.net.params().value().device().is_cuda() {
            return |samples| Ok(Feed::Compact(samples.compact()?));
        }
        |samples| Ok(Feed::Steps(samples.into_batch()))
    }

    /// One update on the CPU. Fails with [`NotFinite`], before any weight is touched, on a loss or gradient that
    /// is not finite.
    pub fn update(&mut self, batch: &Batch) -> Result<StepStats> {
        if self.net.params().value().device().is_cuda() {
            anyhow::bail!("a GPU takes samples as Trainer::feed packs them")
        }
        let (loss, accuracy) = self.accumulate(batch)?;
        let params = self.net.params();
        let grad_norm = global_norm(params.gradient())?;
        if !loss.is_finite() || !grad_norm.is_finite() {
            let device = params.value().device();
            return with_input(batch, device, |input| Ok(self.not_finite(input, loss)))?.and_then(Err);
        }
        let grad_scale = clip_scale(grad_norm, self.config.train.clip);
        trace::part("optimizer", || -> Result<()> {
            for group in params.groups() {
                let of = |flat| group.of(flat);
                let (value, grad, m, v) =
                    (of(params.value())?, of(params.gradient())?, of(&self.m)?, of(&self.v)?);
                AdamStep { grad_scale, ..self.adam_step(group) }.apply(&value, &grad, &m, &v)?;
            }
            Ok(())
        })?;
        let lr = self.learning_rate();
        self.step += 1;
        Ok(StepStats { loss, accuracy, grad_norm, lr, tokens: batch.valid_steps() })
    }

    /// The next update of a group of parameters, without clipping.
    pub(super) fn adam_step(&self, group: &Group) -> AdamStep {
        let train = &self.config.train;
        let most = group.most_rate.unwrap_or(f64::INFINITY);
        AdamStep {
            lr: train.lr.min(most) * schedule::multiplier(&self.config, self.next(), self.total),
            beta1: train.beta1,
            beta2: train.beta2,
            eps: train.eps,
            weight_decay: if group.most_rate.is_some() { 0.0 } else { train.weight_decay },
            decoupled: train.optimizer == OptimizerKind::Adamw,
            step: self.next() as u64 + 1,
            grad_scale: 1.0,
        }
    }

    /// The first tensor that is not finite, in the order in which a step computes them.
    pub(super) fn not_finite(&self, input: Input, loss: f64) -> Result<anyhow::Error> {
        Ok(NotFinite { what: self.culprit(input, loss)? }.into())
    }

    fn culprit(&self, input: Input, loss: f64) -> Result<String> {
        let finite = |tensor: &Tensor| Ok::<_, candle_core::Error>(global_norm(tensor)?.is_finite());
        for param in self.net.params().named() {
            if !finite(&param.value())? {
                return Ok(format!("the weights {} are not finite", param.name()));
            }
        }
        let mut found = None;
        crate::ops::no_grad(|| {
            let mut context = Context { dropout: self.dropout(), ..Context::default() };
            self.net.watch(input, &mut context, |name, x| {
                if found.is_none() && !finite(x)? {
                    found = Some(format!("the output of {name} is not finite"));
                }
                Ok(())
            })
        })?;
        if let Some(found) = found {
            return Ok(found);
        }
        if !loss.is_finite() {
            return Ok(format!(
                "the loss is {loss}, from finite outputs of the last layer: the decoder overflows"
            ));
        }
        for param in self.net.params().params() {
            if !finite(&param.grad())? {
                return Ok(format!("the gradient of {} is not finite", param.name()));
            }
        }
        Ok("the norm of the gradient overflows".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::load::parse;
    use crate::task::{Part, Task};

    fn config(sets: &[&str]) -> Config {
        let text = "
seed: 5
task: {preset: task2, ambiguities: 4, depth: 3, length: 10, samples: {train: 800}}
model: {name: gated_delta_net, layers: 2, width: 16, dropout: 0.3}
train: {batch: 8, warmup: 10, eval_every: 16}";
        let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
        parse(text, "test", &sets).unwrap()
    }

    fn trainer(sets: &[&str]) -> (Trainer, Batch) {
        let config = config(sets);
        let task = Task::new(&config.task, config.seed).unwrap();
        let trainer = Trainer::new(&config, task.features(), task.classes(), &Device::Cpu).unwrap();
        (trainer, task.batch(Part::Train, 0, 8, None).unwrap())
    }

    fn gradient(trainer: &Trainer) -> Vec<f32> {
        trainer.net().params().gradient().to_vec1().unwrap()
    }

    fn distance(a: &[f32], b: &[f32]) -> f64 {
        let square = |x: f32| f64::from(x) * f64::from(x);
        let error: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
        (error / a.iter().map(|a| square(*a)).sum::<f64>()).sqrt()
    }

    /// Batches of unequal lengths, with dropout: masks and means are those of the whole batch.
    #[test]
    fn micro_batches_give_the_gradient_of_the_batch() {
        let (whole, batch) = trainer(&["train.micro_batch=8"]);
        let (loss, accuracy) = whole.accumulate(&batch).unwrap();
        let want = gradient(&whole);
        for micro in [1, 3, 4] {
            let (parts, _) = trainer(&[&format!("train.micro_batch={micro}")]);
            let (l, a) = parts.accumulate(&batch).unwrap();
            assert!((l - loss).abs() < 1e-6 && a == accuracy, "{micro}: loss {l}, not {loss}");
            let error = distance(&want, &gradient(&parts));
            assert!(error < 1e-5, "{micro}: gradient off by {error:.1e}");
        }
    }

    #[test]
    fn emulation_drops_nothing_after_the_first_evaluation() {
        let authors = ["train.emulate=authors", "task.split=as-released"];
        let (mut emulated, batch) = trainer(&authors);
        let (clean, _) = trainer(&["task.split=as-released"]);
        let (dry, _) = trainer(&["task.split=as-released", "model.dropout=0"]);
        let loss = |trainer: &Trainer| trainer.accumulate(&batch).unwrap().0;
        assert_eq!(loss(&emulated), loss(&clean));
        assert_ne!(loss(&emulated), loss(&dry));
        // The first evaluation comes after 16 samples, two updates.
        emulated.step = 2;
        assert_eq!(loss(&emulated), loss(&dry));
    }

    #[test]
    fn emulation_adds_the_means_of_micro_batches() {
        let authors = ["train.emulate=authors", "task.split=as-released", "model.dropout=0"];
        let (whole, batch) = trainer(&authors);
        whole.accumulate(&batch).unwrap();
        let (parts, _) = trainer(&[&authors[..], &["train.micro_batch=4"]].concat());
        let (loss, _) = parts.accumulate(&batch).unwrap();
        let [first, last] = [0..4, 4..8].map(|rows| {
            let loss = whole.accumulate(&batch.rows(rows)).unwrap().0;
            (loss, gradient(&whole))
        });
        assert!((loss - last.0).abs() < 1e-6, "the last micro-batch is reported");
        let sum: Vec<f32> = first.1.iter().zip(&last.1).map(|(a, b)| a + b).collect();
        assert!(distance(&sum, &gradient(&parts)) < 1e-5);
    }

    /// The first update of Adam moves every value by the learning rate, AdamW's decay beside it.
    #[test]
    fn the_rates_of_s4_learn_slowly_and_do_not_decay() {
        let sets = ["model={name: s4, state: 4}", "train={lr: 0.05, warmup: 0, optimizer: adamw}"];
        let (mut trainer, batch) = trainer(&[&sets[..], &["train.weight_decay=0.5"]].concat());
        let values = |trainer: &Trainer| -> Vec<(String, Vec<f32>)> {
            let of = |param: &crate::model::Param| param.value().flatten_all().unwrap().to_vec1().unwrap();
            trainer.net().params().params().iter().map(|p| (p.name().to_string(), of(p))).collect()
        };
        let before = values(&trainer);
        let lr = trainer.update(&batch).unwrap().lr as f32;
        for ((name, before), (_, after)) in before.iter().zip(values(&trainer)) {
            let slow = ["log_dt", "log_A_real", "A_imag"].iter().any(|own| name.ends_with(own));
            for (before, after) in before.iter().zip(after) {
                let (most, decay) = if slow { (lr / 50.0, 0.0) } else { (lr, 0.5 * lr * before) };
                let moved = (after - before + decay).abs();
                // Where the gradient is as small as epsilon, it moves less.
                assert!(moved <= 1.001 * most + 1e-6, "{name}: {moved} of {most}");
            }
        }
        let moved = |name: &str| {
            let of = |list: &[(String, Vec<f32>)]| list.iter().find(|(n, _)| n == name).unwrap().1[0];
            (of(&values(&trainer)) - of(&before)).abs()
        };
        assert!(moved("layers.0.kernel.log_dt") > 0.9 * lr / 50.0 && moved("decoder.bias") > 0.5 * lr);
    }

    #[test]
    fn an_update_that_is_not_finite_leaves_the_weights_alone() {
        let (mut trainer, batch) = trainer(&["train.micro_batch=8"]);
        let params = trainer.net().params();
        let name = "layers.1.o_proj.weight";
        let param = params.params().iter().find(|param| param.name() == name).unwrap();
        let bad = (param.value().ones_like().unwrap() * f64::NAN).unwrap();
        param.value().slice_set(&bad, 0, 0).unwrap();
        let before: Vec<u32> = params.value().to_vec1::<f32>().unwrap().iter().map(|x| x.to_bits()).collect();
        let error = trainer.update(&batch).unwrap_err();
        let what = &error.downcast_ref::<NotFinite>().expect("its own error").what;
        assert_eq!(*what, format!("the weights {name} are not finite"));
        let values = trainer.net().params().value().to_vec1::<f32>().unwrap();
        assert_eq!(values.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), before);
        assert_eq!(trainer.step(), 0);
    }
}
