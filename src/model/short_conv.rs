//! The short convolution, and with projections before it, as fla's layers make their queries, keys and values.

use candle_core::{Result, Tensor};

use super::{Builder, Call, Dims, Init, Param};
use crate::ops::Arg;
use crate::ops::causal_conv1d::causal_conv1d_silu_split;
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
                false => builder.constant("weight", &[channels, 1, 1], Init::Const(1.0)),
            },
            bias: (bias && reaches).then(|| builder.param("bias", &[channels], init())),
            reaches,
        }
    }

    /// Convolutions side by side, as one over the channels of all.
    pub fn stack(builder: &Builder, convs: &[&Conv]) -> Self {
        let weights: Vec<&Param> = convs.iter().map(|conv| &conv.weight).collect();
        let biases: Option<Vec<&Param>> = convs.iter().map(|conv| conv.bias.as_ref()).collect();
        Self {
            weight: builder.stack(&weights, 1),
            bias: biases.map(|biases| builder.stack(&biases, 1)),
            reaches: convs[0].reaches,
        }
    }

    /// [B, T, channels] to the same; the last inputs are kept in `slot` of the layer's state.
    pub fn forward(&self, x: &Tensor, slot: usize, call: &mut Call) -> Result<Tensor> {
        let ([y], _) = self.split(x, [x.dim(2)?], &[], slot, call)?;
        Ok(y)
    }

    /// [`Conv::forward`] of the first columns of x, in parts of these `widths`, and the columns behind them as they
    /// are, in parts of the widths `plain`.
    pub fn split<const N: usize>(
        &self,
        x: &Tensor,
        widths: [usize; N],
        plain: &[usize],
        slot: usize,
        call: &mut Call,
    ) -> Result<([Tensor; N], Vec<Tensor>)> {
        let bias = self.bias.as_ref().map(Arg::from);
        let state = if self.reaches { call.recall_arg(slot) } else { None };
        let split = causal_conv1d_silu_split(x, &self.weight, bias, state, widths, plain)?;
        if self.reaches {
            call.keep(slot, split.state);
        }
        Ok((split.parts, split.plain))
    }
}

/// Queries, keys and values: silu(conv(W x)), without biases; parameters `<name>_proj.weight` and
/// `<name>_conv1d.weight`, the names q, k and v. With them come further projections of the same input: all are one
/// matrix product.
pub struct ShortConvs {
    proj: Param,
    conv: Conv,
    widths: [usize; 3],
    plain: Vec<usize>,
}

impl ShortConvs {
    /// `plain`: weights [outputs, width] that were declared already.
    pub fn new(builder: &Builder, dims: &Dims, widths: [usize; 3], plain: &[&Param]) -> Self {
        let names = ["q", "k", "v"];
        let declared = [0, 1, 2].map(|i| {
            let proj = builder.push(format!("{}_proj", names[i]));
            let proj = proj.param("weight", &[widths[i], dims.width], Init::linear(dims.width));
            (proj, Conv::new(&builder.push(format!("{}_conv1d", names[i])), dims, widths[i], false))
        });
        let proj: Vec<&Param> = declared.iter().map(|(proj, _)| proj).chain(plain.iter().copied()).collect();
        Self {
            proj: builder.stack(&proj, 8),
            conv: Conv::stack(builder, &declared.each_ref().map(|(_, conv)| conv)),
            widths,
            plain: plain.iter().map(|param| param.shape()[0]).collect(),
        }
    }

    /// [B, T, width] to q, k and v, each [B, T, its channels], and to the further projections; the last inputs are
    /// kept in `slot` of the layer's state.
    pub fn forward(&self, x: &Tensor, slot: usize, call: &mut Call) -> Result<([Tensor; 3], Vec<Tensor>)> {
        self.conv.split(&linear(x, &self.proj, None)?, self.widths, &self.plain, slot, call)
    }
}
