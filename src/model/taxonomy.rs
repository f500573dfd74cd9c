//! What a layer is made of: the parts that a configuration can switch, and the words in which models are compared.
//!
//! Every registry entry states the parts of its model. A configuration can leave a part out, or add one that the model
//! is known to work with: `--set model.decay=off`. [`Model::parts`] settles which are there, and
//! [`Model::taxonomy`] says what the layer then is.

use serde::Serialize;

use super::{Dims, MODELS, Model};
use crate::bail_input;
use crate::config::{ModelConfig, Switch};

/// Whether a model has a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// It has no place for it.
    Never,
    /// It can have it, but by itself does not.
    Off,
    /// It has it, and does without if the configuration says so.
    On,
    /// It cannot do without.
    Always,
}

/// The parts that a configured layer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parts {
    /// The state, or what it holds, decays.
    pub decay: bool,
    pub output_gate: bool,
    /// A short convolution along time; its SiLU stays without it.
    pub short_conv: bool,
    /// Write strengths up to 2, which let an erased key change its sign.
    pub negative_eigenvalues: bool,
    /// A write erases what its key held.
    pub delta_rule: bool,
    /// Queries and keys of softmax attention are normed.
    pub qk_norm: bool,
}

/// What has a decay of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Grain {
    /// The matrix state of a head: a scalar transition. Of attention: the weights of all that a head keeps.
    Head,
    /// A key channel of a head, which is a row of its state: a diagonal transition.
    KeyChannel,
    /// A single state of a channel: a diagonal transition.
    State,
}

/// What carries the state from one step to the next, before decay and delta rule are named.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Transition {
    /// The state is multiplied with a matrix of real eigenvalues.
    Linear,
    /// With a diagonal from which a matrix of rank one is taken that has no eigenvalue above 1. Where there is a decay,
    /// the diagonal is at least `least_decay`.
    LowRank { least_decay: f64 },
    /// With a diagonal of complex numbers.
    Complex,
    /// The state goes through a function that is not linear.
    Nonlinear,
    /// Nothing: what was seen is kept as it is.
    Attention,
}

/// A configured layer in the words in which models are compared.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Taxonomy {
    /// What the state is multiplied with at each step, in a word or two.
    pub transition: String,
    /// What has a decay of its own; `None`: nothing decays.
    pub decay: Option<Grain>,
    /// Whether the input sets how much is kept.
    pub input_dependent_decay: bool,
    /// Whether the transition lets the channels of a state act on each other.
    pub channel_mixing: bool,
    /// Whether a write erases what its key held.
    pub delta_rule: bool,
    /// Factors I − β kᵀk of a transition: the steps of the delta rule at each token.
    pub householders: usize,
    pub output_gate: bool,
    pub short_conv: bool,
    /// Smallest and largest eigenvalue that a factor of the transition can have; a product of several can also have
    /// complex ones, of a modulus up to 1. Of a complex diagonal: their real parts. `None`: there is no matrix.
    pub eigenvalues: Option<[f64; 2]>,
    /// Floats of state per sequence; `None` if it grows with the sequence.
    pub state_per_layer: Option<usize>,
}

impl Model {
    /// The parts of the configured layer.
    ///
    /// # Errors
    /// A switch of a part for which the model has no place.
    pub fn parts(&self, config: &ModelConfig) -> anyhow::Result<Parts> {
        let part = |field: &str, of: fn(&Model) -> Part, switch: Switch| match (of(self), switch) {
            (Part::Never, Switch::On | Switch::Off) => {
                let have = MODELS.iter().filter(|model| of(model) != Part::Never);
                let have: Vec<&str> = have.map(|model| model.name).collect();
                bail_input!(
                    "model.{field} is {switch}, but {} has no such part; leave it at auto, or use one of {}",
                    self.name,
                    have.join(", ")
                )
            }
            (Part::Always, Switch::Off) => {
                bail_input!("model.{field} is off, but {} cannot do without; set it to auto", self.name)
            }
            (part, Switch::Auto) => Ok(matches!(part, Part::On | Part::Always)),
            (_, switch) => Ok(switch == Switch::On),
        };
        let delta_rule = part("delta_rule", |model| model.delta_rule, config.delta_rule)?;
        let negative_eigenvalues =
            part("negative_eigenvalues", |model| model.negative_eigenvalues, config.negative_eigenvalues)?;
        if config.negative_eigenvalues == Switch::On && !delta_rule {
            bail_input!(
                "model.negative_eigenvalues is on, but without the delta rule (model.delta_rule off) nothing is erased; \
                 leave it at auto"
            )
        }
        Ok(Parts {
            decay: part("decay", |model| model.decay, config.decay)?,
            output_gate: part("output_gate", |model| model.output_gate, config.output_gate)?,
            short_conv: part("short_conv", |model| model.short_conv, config.short_conv)?,
            negative_eigenvalues: negative_eigenvalues && delta_rule,
            delta_rule,
            qk_norm: part("qk_norm", |model| model.qk_norm, config.qk_norm)?,
        })
    }

    /// What a layer of these sizes and parts is.
    pub fn taxonomy(&self, dims: &Dims) -> Taxonomy {
        let Parts { decay, output_gate, short_conv, negative_eigenvalues, delta_rule, .. } = dims.parts;
        let householders = if delta_rule { (self.householders)(dims) } else { 0 };
        let state_per_layer = (self.state_size)(dims);
        let grain = if decay { self.grain } else { None };
        let kept = grain.map(|grain| if grain == Grain::Head { "scalar" } else { "diagonal" });
        let erased = match householders {
            0 => None,
            1 => Some("Householder".to_string()),
            n => Some(format!("{n} Householders")),
        };
        let (transition, eigenvalues) = match (self.transition, kept, erased) {
            (Transition::Attention, None, _) => ("key-value cache".into(), None),
            (Transition::Attention, Some(_), _) => ("decaying key-value cache".into(), None),
            (Transition::Nonlinear, ..) => ("nonlinear".into(), None),
            (Transition::Complex, ..) => ("complex diagonal".into(), Some([-1.0, 1.0])),
            (Transition::LowRank { least_decay }, kept, _) => {
                let (kept, least) =
                    if kept.is_some() { ("diagonal", least_decay) } else { ("identity", 1.0) };
                (format!("{kept} + rank 1"), Some([least - 1.0, 1.0]))
            }
            (Transition::Linear, None, None) => ("identity".into(), Some([1.0, 1.0])),
            (Transition::Linear, kept, erased) => {
                let factors: Vec<String> = kept.map(String::from).into_iter().chain(erased).collect();
                (factors.join(" x "), Some([if negative_eigenvalues { -1.0 } else { 0.0 }, 1.0]))
            }
        };
        Taxonomy {
            transition,
            decay: grain,
            input_dependent_decay: grain.is_some() && self.input_dependent_decay,
            channel_mixing: householders > 0 || self.transition == Transition::Nonlinear,
            delta_rule,
            householders,
            output_gate,
            short_conv,
            eigenvalues,
            state_per_layer,
        }
    }
}
