//! Short convolution along time, one filter per channel, then SiLU.

#[cfg(feature = "cuda")]
mod cuda;
mod reference;

use std::borrow::Cow;

use candle_core::{Device, Result, Tensor};

use self::reference::{Shape, columns, split, starts};
use super::real::Real;
use super::tape::{Arg, Forward, Node, Run, Value, apply};
use crate::{dispatch, slices};

/// y_t = silu(bias + Σ_j w_j ⊙ x_{t-W+1+j}), and the last W−1 inputs.
///
/// x [B, T, D], weight [D, W] or [D, 1, W] with `weight[:, W-1]` on the current step, bias \[D\], state
/// [B, W−1, D]: the inputs before the first step, zeros if absent. Gives (y [B, T, D], final state
/// [B, W−1, D]). A sequence fed in pieces, each with the final state of the one before, gives the same
/// bits as in one piece. Source: `causal_conv1d_fn` of causal-conv1d with activation "silu".
pub fn causal_conv1d_silu(
    x: impl Into<Arg>,
    weight: impl Into<Arg>,
    bias: Option<Arg>,
    state: Option<Arg>,
) -> Result<(Tensor, Tensor)> {
    let x = x.into();
    let (_, _, width) = x.shape().dims3()?;
    let Split { parts: [y], state, .. } = causal_conv1d_silu_split(x, weight, bias, state, [width], &[])?;
    Ok((y, state))
}

/// What [`causal_conv1d_silu_split`] gives.
pub struct Split<const N: usize> {
    pub parts: [Tensor; N],
    pub plain: Vec<Tensor>,
    pub state: Tensor,
}

/// [`causal_conv1d_silu`] of the first columns of x, with y in parts of these `widths`: what one matrix product and
/// one convolution make together, such as queries, keys and values.
///
/// x is [B, T, ≥ D]. The columns behind the D that are convolved are given as they are, in parts of the widths
/// `plain`, and what is then left is not looked at.
pub fn causal_conv1d_silu_split<const N: usize>(
    x: impl Into<Arg>,
    weight: impl Into<Arg>,
    bias: Option<Arg>,
    state: Option<Arg>,
    widths: [usize; N],
    plain: &[usize],
) -> Result<Split<N>> {
    let (x, weight) = (x.into(), weight.into());
    let (batch, steps, columns) = x.shape().dims3()?;
    let width = widths.iter().sum::<usize>();
    if width + plain.iter().sum::<usize>() > columns {
        candle_core::bail!("causal_conv1d: x has {columns} channels, too few for {widths:?} and {plain:?}")
    }
    let elements = weight.shape().elem_count();
    if weight.shape().dims().first() != Some(&width) || elements == 0 || elements % width != 0 {
        candle_core::bail!(
            "causal_conv1d: x has {width} channels, but the weight has shape {:?}; expected [{width}, W]",
            weight.shape()
        )
    }
    let taps = elements / width;
    if let Some(bias) = &bias
        && bias.shape().elem_count() != width
    {
        candle_core::bail!("causal_conv1d: the bias has shape {:?}, expected [{width}]", bias.shape())
    }
    if let Some(state) = &state
        && state.shape().dims() != [batch, taps - 1, width]
    {
        candle_core::bail!(
            "causal_conv1d: the state has shape {:?}, expected [{batch}, {}, {width}]",
            state.shape(),
            taps - 1
        )
    }
    let node = CausalConv1d {
        shape: Shape { batch, steps, width, taps },
        columns,
        widths: widths.to_vec(),
        plain: plain.to_vec(),
        bias: bias.as_ref().map(|_| 2),
        state: state.as_ref().map(|_| 2 + bias.iter().count()),
    };
    let args: Vec<Arg> = [x, weight].into_iter().chain(bias).chain(state).collect();
    let mut parts = apply(node, &args)?;
    let state = parts.pop().expect("the node's last output");
    let plain = parts.split_off(N);
    Ok(Split { parts: parts.try_into().expect("one output for each part"), plain, state })
}

struct CausalConv1d {
    shape: Shape,
    /// Of x: those that are convolved, and more.
    columns: usize,
    /// Channels of the parts of y, and of what is given as it is.
    widths: Vec<usize>,
    plain: Vec<usize>,
    /// Where the optional arguments stand.
    bias: Option<usize>,
    state: Option<usize>,
}

impl Node for CausalConv1d {
    fn name(&self) -> &'static str {
        "causal_conv1d"
    }

    fn forward(&self, args: &[Tensor], _: bool) -> Result<Forward> {
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            return cuda::forward(self, args);
        }
        let Shape { batch, steps, width, taps } = self.shape;
        let (bias, state) = (&args[self.bias.unwrap_or(0)], &args[self.state.unwrap_or(0)]);
        let outputs = dispatch!(args[0].dtype(), F => {
            slices!(F; x = &args[0], w = &args[1], bias = bias, state = state);
            let convolved = self.convolved(x);
            let input = self.input(&convolved, w, bias, state);
            let mut outputs = split(reference::forward(self.shape, input), &self.widths);
            for (start, &len) in starts(width, &self.plain).zip(&self.plain) {
                outputs.push(columns(x, self.columns, start, len));
            }
            let widths = self.widths.iter().chain(&self.plain);
            let parts = outputs.into_iter().zip(widths);
            let mut outputs: Vec<Value> =
                parts.map(|(part, &width)| Value::cpu(part, (batch, steps, width))).collect();
            outputs.push(Value::cpu(reference::final_state(self.shape, input), (batch, taps - 1, width)));
            outputs
        });
        Ok(Forward { outputs, saved: vec![] })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        #[cfg(feature = "cuda")]
        if run.args[0].device().is_cuda() {
            return cuda::backward(self, run, grads);
        }
        let args = &run.args;
        let (bias, state) = (&args[self.bias.unwrap_or(0)], &args[self.state.unwrap_or(0)]);
        let Shape { batch, steps, width, taps } = self.shape;
        let zeros =
            |steps: usize, width: usize| Tensor::zeros((batch, steps, width), args[0].dtype(), &Device::Cpu);
        let or_zeros = |grad: &Option<Tensor>, steps: usize, width: usize| match grad {
            Some(grad) => Ok(grad.clone()),
            None => zeros(steps, width),
        };
        let (d_final, parts) = grads.split_last().expect("the state is an output");
        let d_final = or_zeros(d_final, taps - 1, width)?;
        let (dy, d_plain) = parts.split_at(self.widths.len());
        let side_by_side = |grads: &[Option<Tensor>], widths: &[usize]| {
            let parts = grads.iter().zip(widths).map(|(grad, &width)| or_zeros(grad, steps, width));
            parts.collect::<Result<Vec<_>>>()
        };
        let dy = Tensor::cat(&side_by_side(dy, &self.widths)?, 2)?;
        dispatch!(args[0].dtype(), F => {
            slices!(F; x = &args[0], w = &args[1], bias = bias, state = state, dy = &dy, d_final = &d_final);
            let convolved = self.convolved(x);
            let grads = reference::backward(self.shape, self.input(&convolved, w, bias, state), dy, d_final);
            let mut dx = vec![Tensor::from_vec(grads.x, (batch, steps, width), &Device::Cpu)?];
            dx.extend(side_by_side(d_plain, &self.plain)?);
            let rest = self.columns - width - self.plain.iter().sum::<usize>();
            if rest > 0 {
                dx.push(zeros(steps, rest)?);
            }
            let mut out = vec![
                Some(Tensor::cat(&dx, 2)?),
                Some(Tensor::from_vec(grads.weight, args[1].shape(), &Device::Cpu)?),
            ];
            if let Some(i) = self.bias {
                out.push(Some(Tensor::from_vec(grads.bias, args[i].shape(), &Device::Cpu)?));
            }
            if let Some(i) = self.state {
                out.push(Some(Tensor::from_vec(grads.state, args[i].shape(), &Device::Cpu)?));
            }
            Ok(out)
        })
    }
}

impl CausalConv1d {
    /// The columns of x that are convolved.
    fn convolved<'a, F: Real>(&self, x: &'a [F]) -> Cow<'a, [F]> {
        match self.shape.width {
            width if width == self.columns => x.into(),
            width => columns(x, self.columns, 0, width).into(),
        }
    }

    fn input<'a, F>(
        &self,
        x: &'a [F],
        weight: &'a [F],
        bias: &'a [F],
        state: &'a [F],
    ) -> reference::Input<'a, F> {
        reference::Input { x, weight, bias: self.bias.map(|_| bias), state: self.state.map(|_| state) }
    }
}
