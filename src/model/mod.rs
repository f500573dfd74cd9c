//! Models: the stack around every mixer, and one file per mixer.
//!
//! To add a model, write one file beside the others and one line in [`MODELS`]. Its entry also says what the model is
//! made of ([`taxonomy`]). What is worth looking at inside of it (a decay, a gate) becomes a picture of
//! `selectivbench inspect` with one [`Call::note`].

mod block;
pub mod notes;
pub mod param;
pub mod recnet;
pub mod taxonomy;

mod delta_net;
mod fox;
mod gated_delta_net;
mod gated_delta_product;
mod gla;
mod gru;
mod kda;
mod mamba;
mod mamba2;
mod mesa_net;
mod mlstm;
mod output;
mod retnet;
mod rwkv7;
mod s4;
mod short_conv;
mod transformer;

use std::collections::HashMap;

use candle_core::{Result, Tensor};

use crate::config::{Auto, Block, ModelConfig};
use crate::error::nearest;
use crate::ops::Arg;
use crate::ops::dropout::Dropout;
use crate::{bad_input, bail_input};
pub use notes::{Kind, Notes, Rows, Scale};
pub use param::{Builder, Init, Param, ParamStore};
pub use recnet::{Context, DropoutKey, Input, RecNet};
pub use short_conv::{Conv, ShortConvs};
pub use taxonomy::{Grain, Part, Parts, Taxonomy, Transition};

/// Every model that a configuration can name.
pub const MODELS: &[Model] = &[
    transformer::MODEL,
    mamba::MODEL,
    mamba2::MODEL,
    gla::MODEL,
    delta_net::MODEL,
    gated_delta_net::MODEL,
    gated_delta_product::MODEL,
    retnet::MODEL,
    gru::MODEL,
    s4::MODEL,
    mesa_net::MODEL,
    fox::MODEL,
    kda::MODEL,
    rwkv7::MODEL,
    mlstm::MODEL,
];

/// The model of that name, or an error that names the nearest one.
pub fn find(name: &str) -> anyhow::Result<&'static Model> {
    MODELS.iter().find(|model| model.name == name).ok_or_else(|| {
        let names: Vec<&str> = MODELS.iter().map(|model| model.name).collect();
        match nearest(name, names.iter().copied()) {
            Some(near) => bad_input!("unknown model `{name}`; did you mean `{near}`?"),
            None => bad_input!("unknown model `{name}`; there are {}", names.join(", ")),
        }
    })
}

/// A kind of sequence mixer, as the registry knows it.
pub struct Model {
    /// The name in configurations.
    pub name: &'static str,
    /// How the state moves from one step to the next, in one line of ASCII maths.
    pub recurrence: fn(&Parts) -> &'static str,
    /// Where it was published.
    pub reference: &'static str,
    /// Declares the parameters of one layer. Names are those of the PyTorch layer.
    pub build: fn(&Dims, &Builder) -> anyhow::Result<Box<dyn Mixer>>,
    /// Floats of state that one layer carries per sequence from step to step; `None` if it grows with
    /// the sequence.
    pub state_size: fn(&Dims) -> Option<usize>,
    /// What has a decay of its own, where there is one.
    pub grain: Option<Grain>,
    pub transition: Transition,
    pub input_dependent_decay: bool,
    /// Steps of the delta rule at each token; 0: a write erases nothing.
    pub householders: fn(&Dims) -> usize,
    pub decay: Part,
    pub output_gate: Part,
    pub short_conv: Part,
    /// Write strengths of the delta rule up to 2.
    pub negative_eigenvalues: Part,
    /// A write erases what its key held; without it writes are added.
    pub delta_rule: Part,
    /// Norms of queries and keys before softmax attention.
    pub qk_norm: Part,
}

/// One layer's way of letting timesteps speak to each other.
pub trait Mixer: Send + Sync {
    /// [B, T, width] to [B, T, width], causal. What one piece of a sequence leaves for the next goes
    /// through [`Call::recall`] and [`Call::keep`].
    fn forward(&self, x: &Tensor, call: &mut Call) -> Result<Tensor>;

    /// Checks loaded weights for what shapes cannot tell.
    fn check_weights(&self) -> anyhow::Result<()> {
        Ok(())
    }
}

/// The sizes of a layer.
#[derive(Clone, Debug)]
pub struct Dims {
    pub width: usize,
    pub heads: usize,
    /// State size N of mamba, mamba2 and s4.
    pub state: usize,
    /// Taps of the short convolution.
    pub conv: usize,
    /// Householder steps per token.
    pub householders: usize,
    pub rope_base: f64,
    /// Latest timesteps that attention sees; `None`: all of them.
    pub window: Option<usize>,
    /// What stands around the mixer.
    pub block: Block,
    pub parts: Parts,
}

impl Dims {
    /// Fails if the width cannot be cut into the heads, or on a part that `model` cannot have.
    pub fn new(model: &Model, config: &ModelConfig) -> anyhow::Result<Self> {
        let parts = model.parts(config)?;
        let window = match config.window {
            Auto::Auto(_) => None,
            Auto::Value(window) if model.transition == Transition::Attention => Some(window),
            Auto::Value(window) => {
                let have = MODELS.iter().filter(|model| model.transition == Transition::Attention);
                let have: Vec<&str> = have.map(|model| model.name).collect();
                bail_input!(
                    "model.window is {window}, but {} has no attention; leave it at auto, or use {}",
                    model.name,
                    have.join(" or ")
                )
            }
        };
        let heads = config.heads();
        if heads == 0 || !divides(config) {
            let width = config.width;
            let works = |width: &usize| divides(&ModelConfig { width: *width, ..config.clone() });
            let near: Vec<String> =
                [(1..width).rev().find(works), (width + 1..=2 * width + heads).find(works)]
                    .iter()
                    .flatten()
                    .map(usize::to_string)
                    .collect();
            bail_input!(
                "model.width is {width} and model.heads is {heads}, but the width must be a multiple of the heads; \
                 use a width of {}",
                near.join(" or ")
            )
        }
        Ok(Self {
            width: config.width,
            heads,
            state: config.state,
            conv: config.conv,
            householders: config.householders,
            rope_base: config.rope_base,
            window,
            block: config.block,
            parts,
        })
    }

    /// Width of one head, K.
    pub fn head_dim(&self) -> usize {
        self.width / self.heads
    }
}

/// Whether the width can be cut into the heads, which may follow from the width.
fn divides(config: &ModelConfig) -> bool {
    config.width > 0 && config.width.is_multiple_of(config.heads().max(1))
}

/// What a mixer may use beside its input.
pub struct Call<'a> {
    /// The mask for dropout inside the layer, while training.
    pub dropout: Option<Dropout>,
    /// Timesteps of the sequence before this piece.
    pub position: usize,
    slots: Option<&'a mut LayerState>,
    notes: Option<&'a mut Notes>,
}

/// What one layer carries from one piece of a sequence to the next.
#[derive(Clone, Default)]
pub struct LayerState(Vec<Option<Tensor>>);

impl<'a> Call<'a> {
    pub fn new(dropout: Option<Dropout>, slots: Option<&'a mut LayerState>) -> Self {
        Self { dropout, position: 0, slots, notes: None }
    }

    /// For a piece that begins after `position` timesteps of its sequence.
    pub fn at(self, position: usize) -> Self {
        Self { position, ..self }
    }

    /// With somebody who looks at the layer.
    pub fn with_notes(self, notes: Option<&'a mut Notes>) -> Self {
        Self { notes, ..self }
    }

    /// Shows a quantity to who looks at the layer: what `f` makes of the tensors `from`, [B, T, rows] or
    /// [B, T, rows, channels], T the timesteps given to the layer.
    ///
    /// `f` is only called where somebody looks, with one sequence, and with `from` on the CPU in f32:
    ///
    /// ```ignore
    /// call.note(&DECAY, steps, [&g], |[g]| g.exp())?;
    /// ```
    pub fn note<const N: usize>(
        &mut self,
        kind: &'static Kind,
        steps: usize,
        from: [&Tensor; N],
        f: impl FnOnce([Tensor; N]) -> Result<Tensor>,
    ) -> Result<()> {
        self.notes.as_mut().map_or(Ok(()), |notes| notes.take(kind, steps, from, f))
    }

    /// What the piece before left in `slot`; `None` at the start of a sequence.
    pub fn recall(&self, slot: usize) -> Option<Tensor> {
        self.slots.as_ref()?.0.get(slot)?.clone()
    }

    /// [`Call::recall`] as an argument of an operation.
    pub fn recall_arg(&self, slot: usize) -> Option<Arg> {
        self.recall(slot).map(Arg::Tensor)
    }

    /// Leaves `value` in `slot` for the next piece.
    pub fn keep(&mut self, slot: usize, value: Tensor) {
        if let Some(state) = &mut self.slots {
            if state.0.len() <= slot {
                state.0.resize(slot + 1, None);
            }
            state.0[slot] = Some(value.detach());
        }
    }
}

/// Number of trained values of a configured model.
pub fn count_parameters(config: &ModelConfig, features: usize, classes: usize) -> anyhow::Result<usize> {
    let builder = Builder::new();
    recnet::declare(find(&config.name)?, config, features, classes, &builder)?;
    Ok(builder.declared())
}

/// Refuses weights that do not fit a configured model, before anything is allocated for it.
pub fn check_weights(
    config: &ModelConfig,
    features: usize,
    classes: usize,
    tensors: &HashMap<String, Tensor>,
) -> anyhow::Result<()> {
    let builder = Builder::new();
    recnet::declare(find(&config.name)?, config, features, classes, &builder)?;
    builder.check(tensors)
}

/// The width whose parameter count comes nearest to `budget`, among the multiples of 8 that the model's
/// head rule allows.
pub fn width_for_budget(
    config: &ModelConfig,
    features: usize,
    classes: usize,
    budget: usize,
) -> anyhow::Result<usize> {
    let mut best: Option<(usize, usize)> = None;
    for width in (8..=8192).step_by(8) {
        let candidate = ModelConfig { width, ..config.clone() };
        // A width that the head rule cannot divide is no candidate.
        let Ok(count) = count_parameters(&candidate, features, classes) else { continue };
        let miss = count.abs_diff(budget);
        if best.is_none_or(|(least, _)| miss < least) {
            best = Some((miss, width));
        } else if count > 2 * budget {
            break;
        }
    }
    match best {
        Some((miss, width)) if miss <= budget / 2 => Ok(width),
        _ => bail_input!(
            "no width of {} with {} layers comes near {budget} parameters; change --budget or --layers",
            config.name,
            config.layers
        ),
    }
}
