//! The short convolution, and with a projection before it, as fla's layers make their queries, keys and values.

use candle_core::{Result, Tensor};

use super::{Builder, Call, Dims, Init, Param};
use crate::ops::Arg;
use crate::ops::causal_conv1d::causal_conv1d_silu;
use crate::ops::linear::linear;

/// silu(conv(x)), or silu(x) without the convolution; parameters `weight` and `bias`.
pub struct Conv {
    weight: Param,
    bias: Option<Param>,
    /// Whether it reaches beyond the current step, so that pieces of a sequence hand something on.
    reaches: bool,
}

impl Conv {
    pub fn new(builder: &Builder, dims: &Dims, channels: usize, bias: bool) -> Self {
        let (reaches, init) = (dims.parts.short_conv, || Init::linear(dims.conv));
        Self {
            weight: match reaches {
                true => builder.param("weight", &[channels, 1, dims.conv], init()),
                // One tap of 1 leaves the operation's SiLU.
                false => builder.constant("weight", &[channels, 1, 1], 1.0),
            },
            bias: (bias && reaches).then(|| builder.param("bias", &[channels], init())),
            reaches,
        }
    }

    /// The convolution, which is depthwise, of `len` channels from `start` on.
    pub fn rows(&self, start: usize, len: usize) -> Self {
        Self {
            weight: self.weight.rows(start, len),
            bias: self.bias.as_ref().map(|bias| bias.rows(start, len)),
            reaches: self.reaches,
        }
    }

    /// [B, T, channels] to the same; the last inputs are kept in `slot` of the layer's state.
    pub fn forward(&self, x: &Tensor, slot: usize, call: &mut Call) -> Result<Tensor> {
        let bias = self.bias.as_ref().map(Arg::from);
        let state = if self.reaches { call.recall_arg(slot) } else { None };
        let (y, tail) = causal_conv1d_silu(x, &self.weight, bias, state)?;
        if self.reaches {
            call.keep(slot, tail);
        }
        Ok(y)
    }
}

/// silu(conv(W x)), without biases; parameters `<name>_proj.weight` and `<name>_conv1d.weight`.
pub struct ShortConv {
    proj: Param,
    conv: Conv,
}

impl ShortConv {
    pub fn new(builder: &Builder, name: &str, dims: &Dims, channels: usize) -> Self {
        let proj = builder.push(format!("{name}_proj"));
        Self {
            proj: proj.param("weight", &[channels, dims.width], Init::linear(dims.width)),
            conv: Conv::new(&builder.push(format!("{name}_conv1d")), dims, channels, false),
        }
    }

    /// [B, T, width] to [B, T, channels]; the last inputs are kept in `slot` of the layer's state.
    pub fn forward(&self, x: &Tensor, slot: usize, call: &mut Call) -> Result<Tensor> {
        self.conv.forward(&linear(x, &self.proj, None)?, slot, call)
    }
}
