//! The types of a resolved configuration.
//!
//! A resolved configuration is complete: training from it repeats the run. `auto` is resolved when the
//! configuration is loaded, except for `train.micro_batch` and `train.precision`, which depend on the
//! device.

use serde::{Deserialize, Serialize};

use crate::task::recordings::{mfcc, speech, spikes};

/// A number, or `auto` for the value that follows from the other fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Auto {
    Value(usize),
    Auto(AutoWord),
}

/// The word `auto`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AutoWord {
    Auto,
}

impl Auto {
    pub const AUTO: Auto = Auto::Auto(AutoWord::Auto);

    /// The number, or `default` for `auto`.
    pub fn or(self, default: usize) -> usize {
        match self {
            Auto::Value(value) => value,
            Auto::Auto(_) => default,
        }
    }
}

/// Whether a model has a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Switch {
    /// As the model has it by itself.
    Auto,
    On,
    Off,
}

impl std::fmt::Display for Switch {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(match self {
            Switch::Auto => "auto",
            Switch::On => "on",
            Switch::Off => "off",
        })
    }
}

/// What stands around every mixer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Block {
    /// The authors': LayerNorm(x + mixer(x)).
    PostNorm,
    /// That of language models: norms before the mixer and before an MLP behind it, each with a residual.
    Layered,
}

/// One run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub seed: u64,
    pub task: TaskConfig,
    pub model: ModelConfig,
    pub train: TrainConfig,
}

/// A named setting of the task's fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskPreset {
    #[serde(rename = "task1_complexity")]
    Task1Complexity,
    #[serde(rename = "task1_model_size")]
    Task1ModelSize,
    Task2,
    Task3,
    Task4,
}

/// What is generated. All durations are in time units; a timestep is 0.1 of one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskConfig {
    pub preset: TaskPreset,
    pub objective: Objective,
    pub encoding: Encoding,
    /// Where the recordings of `encoding` are: a folder, or the file of `vectors`. `auto`: `data/gsc`, `data/shd` or
    /// `data/ssc`.
    pub data: String,
    /// Recordings of a symbol in each part, at most. `auto`: all.
    pub recordings: Auto,
    /// Symbols, `#` included; the width of a one-hot input. `auto`: ambiguities + 1.
    pub vocab: Auto,
    /// Symbols that stand for several states.
    pub ambiguities: usize,
    /// States per ambiguous symbol. `auto`: as many as there are ambiguities.
    pub depth: Auto,
    /// Expected share of the symbols that may follow a state.
    pub density: f64,
    pub start_states: usize,
    /// Elements of a sample.
    pub length: usize,
    pub string: StringConfig,
    pub gap: GapConfig,
    /// Gap after every element in validation and test.
    pub test_gap: f64,
    /// Fixed gaps at which the final test is repeated.
    pub eval_gaps: Vec<f64>,
    /// Upper end of the uniform noise added to every input value.
    pub noise: f64,
    pub split: Split,
    pub samples: SampleCounts,
}

/// What is asked of a model at every timestep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Objective {
    /// The state of the element that the timestep belongs to.
    Classify,
    /// The symbol of the element behind it.
    Predict,
}

impl Objective {
    /// The name in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Objective::Classify => "classify",
            Objective::Predict => "predict",
        }
    }
}

/// How a symbol is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Encoding {
    /// As a one-hot vector, for one timestep.
    OneHot,
    /// As a spoken word of Google Speech Commands.
    Gsc,
    /// As a word of the Spiking Heidelberg Digits.
    Shd,
    /// As a word of the Spiking Speech Commands.
    Ssc,
    /// As vectors from a safetensors file.
    Vectors,
}

impl Encoding {
    /// The name in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Encoding::OneHot => "one_hot",
            Encoding::Gsc => "gsc",
            Encoding::Shd => "shd",
            Encoding::Ssc => "ssc",
            Encoding::Vectors => "vectors",
        }
    }

    /// Timesteps that a symbol is shown for, numbers in each, and words that there are, of a data set.
    pub fn of_set(self) -> Option<(usize, usize, usize)> {
        match self {
            Encoding::OneHot | Encoding::Vectors => None,
            Encoding::Gsc => Some((mfcc::FRAMES, mfcc::COEFFICIENTS, speech::WORDS.len())),
            Encoding::Shd => Some((spikes::FRAMES, spikes::CHANNELS, spikes::SHD.labels)),
            Encoding::Ssc => Some((spikes::FRAMES, spikes::CHANNELS, spikes::SSC.labels)),
        }
    }

    /// Timesteps that a symbol is shown for, as far as is known before a file is read.
    pub fn frames(self) -> usize {
        self.of_set().map_or(1, |(frames, ..)| frames)
    }
}

/// Accepted lengths of one string, `#` included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StringConfig {
    pub min: usize,
    /// `auto`: the sample's length.
    pub max: Auto,
}

/// What stands between two elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GapKind {
    /// Timesteps without a symbol.
    Blank,
    /// Symbols that break the grammar's rules.
    Distractor,
}

/// How a gap's duration is drawn while training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GapLaw {
    /// Uniform in [low, high].
    Uniform,
    /// exp of a normal number with mean `mu` and standard deviation `sigma`, cut to [low, high].
    Lognormal,
    /// Always `high`.
    Fixed,
}

/// Gaps while training; drawn durations are rounded to 0.1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GapConfig {
    pub kind: GapKind,
    pub law: GapLaw,
    pub low: f64,
    pub high: f64,
    /// Mean of log duration, for `lognormal`.
    pub mu: f64,
    /// Standard deviation of log duration, for `lognormal`.
    pub sigma: f64,
    /// First element that a gap can follow.
    pub start: usize,
    /// Probability of a gap after an element.
    pub probability: f64,
}

/// Which random streams the samples come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Split {
    /// Disjoint streams for training, validation and test.
    HeldOut,
    /// The streams of the authors' generator, whose test samples are the first training samples.
    AsReleased,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SampleCounts {
    pub train: usize,
    pub validation: usize,
    pub test: usize,
}

/// The stack of mixers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// A name of the registry (`selectivbench models`).
    pub name: String,
    pub block: Block,
    pub layers: usize,
    pub width: usize,
    /// State size N of mamba, mamba2 and s4.
    pub state: usize,
    /// `auto`: the authors' rule (4 up to width 512, then the first power of two with head dim <= 128).
    pub heads: Auto,
    pub dropout: f64,
    /// Taps of the short convolution.
    pub conv: usize,
    /// Householder steps per token of gated_delta_product.
    pub householders: usize,
    /// Base of the transformer's rotary embedding.
    pub rope_base: f64,
    /// Latest timesteps that attention sees, the current one included; `auto`: all of them.
    pub window: Auto,
    /// Decay of the state; off: nothing is forgotten but by the delta rule.
    pub decay: Switch,
    /// Gate on what is read from the state.
    pub output_gate: Switch,
    /// Short convolution before the recurrence; off: its SiLU alone.
    pub short_conv: Switch,
    /// Write strengths of the delta rule: up to 2 if on, up to 1 if off.
    pub negative_eigenvalues: Switch,
    /// The delta rule, which erases what a key held before it writes; off: writes are added.
    pub delta_rule: Switch,
    /// Norms of queries and keys before softmax attention.
    pub qk_norm: Switch,
}

impl ModelConfig {
    /// The number of heads; `auto` is the authors' rule: 4 up to width 512, then the first of 4, 8, 16, …
    /// that divides the width into heads of at most 128.
    pub fn heads(&self) -> usize {
        let rule = || {
            if self.width <= 512 {
                return 4;
            }
            let heads = |h: &usize| self.width.is_multiple_of(*h) && self.width / h <= 128;
            (2..20).map(|k| 1 << k).find(heads).unwrap_or(4)
        };
        match self.heads {
            Auto::Value(heads) => heads,
            Auto::Auto(_) => rule(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrainPreset {
    /// The authors' recipe.
    Paper,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// Weight decay added to the gradient.
    Adam,
    /// Weight decay applied to the weights.
    Adamw,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Half a cosine from `lr` to `lr · lr_min`.
    Cosine,
    /// `lr` after the warm-up.
    Constant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// The best that the device trains reliably in: f32 on the CPU, bf16 on a GPU.
    Auto,
    F32,
    Tf32,
    Bf16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Emulate {
    None,
    /// What the released training code does beside its recipe and bears on the numbers.
    Authors,
}

/// What the backward pass computes again instead of keeping it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    None,
    /// Each layer, from its input: the same gradients, less memory, more time.
    Layers,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    pub preset: TrainPreset,
    /// Samples per update.
    pub batch: usize,
    /// Samples per forward pass; gradients are those of the whole batch. `auto`: as memory allows.
    pub micro_batch: Auto,
    pub recompute: Recompute,
    pub optimizer: OptimizerKind,
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    /// Updates of linear warm-up; may be a fraction, as in the released code.
    pub warmup: f64,
    pub schedule: Schedule,
    /// Where the cosine ends, as a share of `lr`.
    pub lr_min: f64,
    /// Largest global norm of the gradient.
    pub clip: f64,
    /// Training samples between two evaluations.
    pub eval_every: usize,
    /// Samples per forward pass of an evaluation.
    pub eval_batch: usize,
    /// Timesteps per piece when a sequence is evaluated in pieces; see [`crate::train::evaluate::chunk`].
    pub eval_chunk: Auto,
    /// Updates between two exact resume points.
    pub save_every: usize,
    /// Updates between two lines of training metrics.
    pub log_every: usize,
    pub precision: Precision,
    pub emulate: Emulate,
}
