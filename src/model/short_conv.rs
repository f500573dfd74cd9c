//! Projection and short convolution, as fla's layers make their queries, keys and values.

use candle_core::{Result, Tensor};

use super::{Builder, Call, Dims, Init, Param};
use crate::ops::causal_conv1d::causal_conv1d_silu;
use crate::ops::linear::linear;

/// silu(conv(W x)), without biases; parameters `<name>_proj.weight` and `<name>_conv1d.weight`.
pub struct ShortConv {
    proj: Param,
    conv: Param,
}

impl ShortConv {
    pub fn new(builder: &Builder, name: &str, dims: &Dims, channels: usize) -> Self {
        let proj = builder.push(format!("{name}_proj"));
        let conv = builder.push(format!("{name}_conv1d"));
        Self {
            proj: proj.param("weight", &[channels, dims.width], Init::linear(dims.width)),
            conv: conv.param("weight", &[channels, 1, dims.conv], Init::linear(dims.conv)),
        }
    }

    /// [B, T, width] to [B, T, channels]; the last inputs are kept in `slot` of the layer's state.
    pub fn forward(&self, x: &Tensor, slot: usize, call: &mut Call) -> Result<Tensor> {
        let (y, tail) =
            causal_conv1d_silu(&linear(x, &self.proj, None)?, &self.conv, None, call.recall_arg(slot))?;
        call.keep(slot, tail);
        Ok(y)
    }
}
