//! What stands around a mixer: the residual, the norms, and in the blocks of language models an MLP.

use candle_core::{Result, Tensor};

use super::{Builder, Call, Dims, Init, Mixer, Model, Param};
use crate::config::Block;
use crate::ops::add::add;
use crate::ops::dropout::{Dropout, dropout};
use crate::ops::linear::linear;
use crate::ops::norms::{RmsEps, rms_norm};
use crate::ops::residual_norm::residual_dropout_layer_norm;
use crate::ops::swiglu::swiglu;

const LAYER_NORM_EPS: f64 = 1e-5;
/// As in the models of flash-linear-attention.
const RMS_NORM_EPS: f64 = 1e-6;

/// Columns of an MLP come in multiples of this, as in flash-linear-attention.
const MLP_MULTIPLE: usize = 256;

/// A layer of the stack.
pub(super) struct Layer {
    mixer: Box<dyn Mixer>,
    around: Around,
}

enum Around {
    /// x ← LayerNorm(x + drop(mixer(x))).
    PostNorm { weight: Param, bias: Param },
    /// x ← x + drop(mixer(RMSNorm(x))), x ← x + drop(MLP(RMSNorm(x))).
    Layered { attn_norm: Param, mlp_norm: Param, mlp: Mlp },
}

/// The dropouts of a layer's branches.
#[derive(Clone, Copy)]
pub(super) struct Dropouts {
    pub mixer: Option<Dropout>,
    pub mlp: Option<Dropout>,
}

impl Layer {
    /// Layer `l` of a stack. Around a layered one the names are those of flash-linear-attention.
    pub fn new(model: &Model, dims: &Dims, builder: &Builder, l: usize) -> anyhow::Result<Self> {
        let of_layer = builder.push("layers").push(l);
        let ones = |b: Builder| b.param("weight", &[dims.width], Init::Const(1.0));
        match dims.block {
            Block::PostNorm => {
                let mixer = (model.build)(dims, &of_layer)?;
                let norm = builder.push("norms").push(l);
                let bias = norm.param("bias", &[dims.width], Init::Const(0.0));
                Ok(Self { mixer, around: Around::PostNorm { weight: ones(norm), bias } })
            }
            Block::Layered => {
                let attn_norm = ones(of_layer.push("attn_norm"));
                let mixer = (model.build)(dims, &of_layer.push("attn"))?;
                let mlp_norm = ones(of_layer.push("mlp_norm"));
                let mlp = Mlp::new(dims.width, &of_layer.push("mlp"));
                Ok(Self { mixer, around: Around::Layered { attn_norm, mlp_norm, mlp } })
            }
        }
    }

    /// [B, T, width] to the same; `see` gets what the parts give, by the names of the parts in layer `l`.
    pub fn forward(
        &self,
        l: usize,
        x: &Tensor,
        call: &mut Call,
        drop: &Dropouts,
        see: &mut impl FnMut(&str, &Tensor) -> Result<()>,
    ) -> Result<Tensor> {
        match &self.around {
            Around::PostNorm { weight, bias } => {
                let y = self.mixer.forward(x, call)?;
                see(&format!("layers.{l}"), &y)?;
                let x = residual_dropout_layer_norm(&y, x, weight, bias, LAYER_NORM_EPS, drop.mixer)?;
                see(&format!("norms.{l}"), &x)?;
                Ok(x)
            }
            Around::Layered { attn_norm, mlp_norm, mlp } => {
                let y = self.mixer.forward(&normed(x, attn_norm)?, call)?;
                see(&format!("layers.{l}.attn"), &y)?;
                let x = residual(x, &y, &drop.mixer)?;
                let y = mlp.forward(&normed(&x, mlp_norm)?)?;
                see(&format!("layers.{l}.mlp"), &y)?;
                residual(&x, &y, &drop.mlp)
            }
        }
    }

    pub fn check_weights(&self) -> anyhow::Result<()> {
        self.mixer.check_weights()
    }
}

/// The norm behind the last layer, where the layers leave none.
pub(super) fn final_norm(dims: &Dims, builder: &Builder) -> Option<Param> {
    let norm = || builder.push("norm").param("weight", &[dims.width], Init::Const(1.0));
    (dims.block == Block::Layered).then(norm)
}

/// w ⊙ x / √(mean x² + eps) over the width.
pub(super) fn normed(x: &Tensor, weight: &Param) -> Result<Tensor> {
    rms_norm(x, weight, RMS_NORM_EPS, RmsEps::Inside)
}

/// x + drop(y).
fn residual(x: &Tensor, y: &Tensor, mask: &Option<Dropout>) -> Result<Tensor> {
    match mask {
        Some(mask) => add(x, &dropout(y, mask)?),
        None => add(x, y),
    }
}

/// down(silu(gate x) ⊙ up x), without biases. Source: Shazeer, "GLU variants improve transformer", arXiv 2002.05202;
/// width and names as in flash-linear-attention.
struct Mlp {
    /// Gate and up, as one matrix product.
    gate_up: Param,
    down: Param,
    /// The slope of the SiLU, which here is no parameter.
    slope: Param,
}

/// Columns of the MLP: 4 · 2/3 of the width, rounded up to a multiple of 256.
fn mlp_width(width: usize) -> usize {
    (8 * width / 3).next_multiple_of(MLP_MULTIPLE)
}

impl Mlp {
    fn new(width: usize, builder: &Builder) -> Self {
        let inner = mlp_width(width);
        let weight = |name: &str, rows: usize, columns: usize| {
            builder.push(name).param("weight", &[rows, columns], Init::linear(columns))
        };
        let (gate, up) = (weight("gate_proj", inner, width), weight("up_proj", inner, width));
        Self {
            gate_up: builder.stack(&[&gate, &up], 8),
            down: weight("down_proj", width, inner),
            slope: builder.constant("slope", &[1], Init::Const(1.0)),
        }
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        linear(&swiglu(&linear(x, &self.gate_up, None)?, &self.slope, None)?, &self.down, None)
    }
}
