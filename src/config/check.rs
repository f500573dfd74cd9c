//! What a configuration may hold: every range, and the sentence that says what would be right.

use std::ops::RangeInclusive;

use super::*;
use crate::bail_input;
use crate::model;
use crate::task::batch::TIMESTEP;
use crate::task::grammar::{LETTERS, MAX_DEPTH};
use crate::task::recordings::vectors;

/// Timesteps of the longest sequence.
const MOST_STEPS: usize = 1 << 24;

/// Layers of the deepest model.
pub(crate) const MOST_LAYERS: usize = 1024;

/// Largest width, state size, vocabulary, …
pub(crate) const MOST_SIZE: usize = 1 << 16;

/// Trained values of the largest model.
const MOST_PARAMETERS: f64 = 1e11;

impl Config {
    /// Updates of the run: one pass over the training samples.
    pub fn updates(&self) -> usize {
        self.task.samples.train.div_ceil(self.train.batch)
    }

    /// Fails on the first field that cannot be used. `train.precision` is left to the device.
    pub fn check(&self) -> anyhow::Result<()> {
        self.task.check()?;
        // Vectors are as wide as a file says that need not be here now; a model hardly grows with them.
        self.model.check(self.task.features().unwrap_or(1), self.task.classes())?;
        self.train.check()?;
        if self.train.emulate == Emulate::Authors && self.task.split != Split::AsReleased {
            bail_input!(
                "train.emulate is authors, but task.split is held-out; the released code's numbers need task.split \
                 as-released"
            )
        }
        let (warmup, updates) = (self.train.warmup, self.updates());
        if warmup > updates as f64 {
            bail_input!(
                "train.warmup is {} updates, but the run has only {updates} ({} samples in batches of {}); \
                 set train.warmup to {updates} or less",
                plain(warmup),
                self.task.samples.train,
                self.train.batch
            )
        }
        Ok(())
    }

    /// The same with every `auto` replaced, except for those that depend on the device.
    pub(super) fn resolved(mut self) -> Self {
        let heads = self.model.heads();
        let task = &mut self.task;
        (task.vocab, task.depth) = (Auto::Value(task.vocab()), Auto::Value(task.depth()));
        task.string.max = Auto::Value(task.max_string());
        if task.data == TaskConfig::AUTO && task.encoding.of_set().is_some() {
            task.data = format!("data/{}", task.encoding.name());
        }
        self.model.heads = Auto::Value(heads);
        self
    }
}

impl TaskConfig {
    /// The value of `data` that follows from `encoding`.
    pub const AUTO: &str = "auto";

    /// Letters of the grammar: the symbols without `#`, of which there are at most 52.
    pub fn letters(&self) -> usize {
        self.vocab().saturating_sub(1).min(LETTERS)
    }

    /// States of the grammar, `#` included.
    pub fn states(&self) -> usize {
        self.letters() - self.ambiguities + self.ambiguities * self.depth() + 1
    }

    /// Classes to tell apart: states, or the symbols that may come next.
    pub fn classes(&self) -> usize {
        match self.objective {
            Objective::Classify => self.states(),
            Objective::Predict => self.vocab(),
        }
    }

    /// Width of the input. Fails where that stands in a file that cannot be read.
    pub fn features(&self) -> anyhow::Result<usize> {
        match (self.encoding, self.encoding.of_set()) {
            (_, Some((_, channels, _))) => Ok(channels),
            (Encoding::Vectors, None) => vectors::channels(self.data.as_ref()),
            (_, None) => Ok(self.vocab()),
        }
    }

    /// Checks how symbols are shown.
    fn check_encoding(&self) -> anyhow::Result<()> {
        let name = self.encoding.name();
        if self.encoding != Encoding::OneHot && self.split == Split::AsReleased {
            bail_input!(
                "task.encoding is {name}, but task.split is as-released, which draws one_hot symbols only; set \
                 task.split to held-out"
            )
        }
        if self.encoding == Encoding::Vectors && self.data == Self::AUTO {
            bail_input!("task.encoding is vectors, but task.data is auto; set it to a safetensors file")
        }
        if let Auto::Value(recordings) = self.recordings {
            count("task.recordings", recordings, 1..=MOST_SIZE)?;
        }
        let symbols = self.letters() + 1;
        if let Some((.., words)) = self.encoding.of_set()
            && symbols > words
        {
            bail_input!(
                "task.encoding is {name}, which has {words} words, but the task has {symbols} symbols, # included; set \
                 task.ambiguities to {} or less, and task.vocab to {words} or less or to auto",
                words - 1
            )
        }
        Ok(())
    }

    fn check(&self) -> anyhow::Result<()> {
        let Self { ambiguities, string, gap, samples, .. } = self;
        count("task.ambiguities", *ambiguities, 0..=LETTERS)?;
        let vocab = self.vocab();
        if *ambiguities == 0 && self.vocab == Auto::AUTO {
            bail_input!(
                "task.ambiguities is 0 and task.vocab is auto, which leaves no letter; set task.vocab"
            )
        }
        count("task.vocab", vocab, 2..=MOST_SIZE)?;
        if *ambiguities > self.letters() {
            bail_input!(
                "task.ambiguities is {ambiguities}, but task.vocab {vocab} has only {} letters; set task.vocab to \
                 {} or more, or to auto",
                self.letters(),
                ambiguities + 1
            )
        }
        if *ambiguities > 0 {
            count("task.depth", self.depth(), 1..=MAX_DEPTH)?;
        }
        self.check_encoding()?;
        number("task.density", self.density, self.density > 0.0, "greater than 0")?;
        // `#` is a state, but starts no string.
        count("task.start_states", self.start_states, 1..=self.states() - 1)?;

        count("task.length", self.length, 1..=MOST_STEPS)?;
        count("task.string.min", string.min, 1..=MOST_STEPS)?;
        let max = self.max_string();
        count("task.string.max", max, 1..=MOST_STEPS)?;
        if string.min > max {
            bail_input!(
                "task.string.min is {}, but task.string.max is {max}, which is less; swap them or widen the range",
                string.min
            )
        }

        for (field, value) in
            [("task.gap.low", gap.low), ("task.gap.high", gap.high), ("task.test_gap", self.test_gap)]
        {
            self.check_gap(field, value)?;
        }
        for (i, &value) in self.eval_gaps.iter().enumerate() {
            self.check_gap(&format!("task.eval_gaps[{i}]"), value)?;
        }
        if gap.law != GapLaw::Fixed && gap.low > gap.high {
            bail_input!(
                "task.gap.low is {}, but task.gap.high is {}, which is less; swap them or widen the range",
                gap.low,
                gap.high
            )
        }
        number("task.gap.mu", gap.mu, true, "a finite number")?;
        number("task.gap.sigma", gap.sigma, gap.sigma >= 0.0, "0 or more")?;
        fraction("task.gap.probability", gap.probability)?;
        number("task.noise", self.noise, (0.0..=1000.0).contains(&self.noise), "between 0 and 1000")?;

        for (field, value) in [
            ("task.samples.train", samples.train),
            ("task.samples.validation", samples.validation),
            ("task.samples.test", samples.test),
        ] {
            count(field, value, 1..=1_000_000_000_000)?;
        }
        Ok(())
    }

    /// A gap must be a duration that leaves a sequence with a length that can be held.
    pub fn check_gap(&self, field: &str, gap: f64) -> anyhow::Result<()> {
        number(field, gap, gap >= 0.0, "0 or more")?;
        let steps = self.steps_at(gap, self.encoding.frames());
        if steps > MOST_STEPS as f64 {
            bail_input!(
                "{field} is {}, which makes sequences of up to {} timesteps with task.length {}; at most {MOST_STEPS} \
                 are possible",
                plain(gap),
                plain(steps),
                self.length
            )
        }
        Ok(())
    }
}

impl TaskConfig {
    /// Timesteps of a sample with this gap behind every element, whose symbols take `frames`.
    fn steps_at(&self, gap: f64, frames: usize) -> f64 {
        let each = if self.gap.kind == GapKind::Distractor { frames } else { 1 };
        self.length as f64 * (frames as f64 + (gap / TIMESTEP).ceil() * each as f64)
    }

    /// Recordings, whose `frames` are only known when they are read, must leave sequences that can be held too.
    pub fn check_frames(&self, frames: usize) -> anyhow::Result<()> {
        let longest = [self.gap.high, self.test_gap].into_iter().chain(self.eval_gaps.iter().copied());
        let steps = self.steps_at(longest.fold(0.0, f64::max), frames);
        if steps > MOST_STEPS as f64 {
            bail_input!(
                "recordings of {frames} frames make sequences of up to {} timesteps with task.length {}; at most \
                 {MOST_STEPS} are possible",
                plain(steps),
                self.length
            )
        }
        Ok(())
    }
}

impl ModelConfig {
    fn check(&self, features: usize, classes: usize) -> anyhow::Result<()> {
        model::find(&self.name)?;
        count("model.layers", self.layers, 1..=MOST_LAYERS)?;
        count("model.width", self.width, 1..=MOST_SIZE)?;
        count("model.state", self.state, 1..=MOST_SIZE)?;
        count("model.heads", self.heads(), 1..=MOST_SIZE)?;
        number(
            "model.dropout",
            self.dropout,
            (0.0..1.0).contains(&self.dropout),
            "at least 0 and less than 1",
        )?;
        count("model.conv", self.conv, 1..=1024)?;
        count("model.householders", self.householders, 1..=64)?;
        if let Auto::Value(window) = self.window {
            count("model.window", window, 1..=MOST_STEPS)?;
        }
        let base = self.rope_base;
        number("model.rope_base", base, (1.0..=1e12).contains(&base), "between 1 and 1e12")?;
        // One layer, whose count is enough to refuse what no device holds, shows whether all can be built.
        let one = model::count_parameters(&Self { layers: 1, ..self.clone() }, features, classes)?;
        let parameters = one as f64 * self.layers as f64;
        if parameters > MOST_PARAMETERS {
            bail_input!(
                "model.width is {} and model.layers is {}, which makes about {parameters:.0e} parameters; at most \
                 {MOST_PARAMETERS:e} are possible",
                self.width,
                self.layers
            )
        }
        Ok(())
    }
}

impl TrainConfig {
    fn check(&self) -> anyhow::Result<()> {
        count("train.batch", self.batch, 1..=1_000_000)?;
        if let Auto::Value(micro_batch) = self.micro_batch {
            count("train.micro_batch", micro_batch, 1..=self.batch)?;
        }
        // The bounds keep every value a normal number in f32.
        number("train.lr", self.lr, self.lr > 0.0 && self.lr <= 100.0, "greater than 0 and at most 100")?;
        for (field, beta) in [("train.beta1", self.beta1), ("train.beta2", self.beta2)] {
            number(field, beta, (0.0..1.0).contains(&beta), "at least 0 and less than 1")?;
        }
        number("train.eps", self.eps, (1e-30..=1.0).contains(&self.eps), "between 1e-30 and 1")?;
        let decay = self.weight_decay;
        number("train.weight_decay", decay, (0.0..=100.0).contains(&decay), "between 0 and 100")?;
        number("train.warmup", self.warmup, self.warmup >= 0.0, "0 or more")?;
        fraction("train.lr_min", self.lr_min)?;
        number(
            "train.clip",
            self.clip,
            self.clip > 0.0 && self.clip <= 1e30,
            "greater than 0 and at most 1e30",
        )?;
        for (field, value) in [
            ("train.eval_every", self.eval_every),
            ("train.eval_batch", self.eval_batch),
            ("train.save_every", self.save_every),
            ("train.log_every", self.log_every),
        ] {
            count(field, value, 1..=1_000_000_000_000)?;
        }
        if let Auto::Value(chunk) = self.eval_chunk {
            count("train.eval_chunk", chunk, 1..=1_000_000_000_000)?;
        }
        Ok(())
    }
}

/// Fails unless `value` is in `range`.
pub(crate) fn count(field: &str, value: usize, range: RangeInclusive<usize>) -> anyhow::Result<()> {
    if !range.contains(&value) {
        bail_input!("{field} is {value}; it must be between {} and {}", range.start(), range.end())
    }
    Ok(())
}

/// Fails unless `value` is finite and `right`.
fn number(field: &str, value: f64, right: bool, rule: &str) -> anyhow::Result<()> {
    if !(right && value.is_finite()) {
        bail_input!("{field} is {}; it must be {rule}", plain(value))
    }
    Ok(())
}

fn fraction(field: &str, value: f64) -> anyhow::Result<()> {
    number(field, value, (0.0..=1.0).contains(&value), "between 0 and 1")
}

/// A number as one would write it, without hundreds of zeros.
fn plain(value: f64) -> String {
    if value == 0.0 || !value.is_finite() || (1e-5..1e15).contains(&value.abs()) {
        value.to_string()
    } else {
        format!("{value:e}")
    }
}
