//! Short convolution along time, one filter per channel, then SiLU.

#[cfg(feature = "cuda")]
mod cuda;
mod reference;

use candle_core::{Device, Result, Tensor};

use self::reference::{Part, Shape, columns, side_by_side};
use super::scan::slice_of_option;
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
            let input = self.input(x, w, bias, state);
            let value = |part: Vec<F>, width: usize| Value::cpu(part, (batch, steps, width));
            let convolved = side_by_side(0, &self.widths)
                .map(|part| value(reference::forward(self.shape, input, part.clone()), part.len()));
            let plain = side_by_side(width, &self.plain)
                .map(|part| value(columns(x, self.columns, part.clone()), part.len()));
            let state = Value::cpu(reference::final_state(self.shape, input), (batch, taps - 1, width));
            convolved.chain(plain).chain([state]).collect()
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
        let held: Vec<_> = grads.iter().map(|grad| grad.as_ref().map(Tensor::storage_and_layout)).collect();
        dispatch!(args[0].dtype(), F => {
            slices!(F; x = &args[0], w = &args[1], bias = bias, state = state);
            let grads: Vec<Option<&[F]>> = held.iter().map(slice_of_option).collect::<Result<_>>()?;
            let (d_final, grads) = grads.split_last().expect("the state is an output");
            let widths = [&self.widths[..], &self.plain].concat();
            let parts: Vec<Part<F>> = (side_by_side(0, &widths).zip(grads))
                .map(|(columns, &grad)| Part { columns, grad })
                .collect();
            let (dy, d_plain) = parts.split_at(self.widths.len());
            let input = self.input(x, w, bias, state);
            let grads = reference::backward(self.shape, input, dy, d_plain, *d_final);
            let mut out = vec![
                Some(Tensor::from_vec(grads.x, args[0].shape(), &Device::Cpu)?),
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
    fn input<'a, F>(
        &self,
        x: &'a [F],
        weight: &'a [F],
        bias: &'a [F],
        state: &'a [F],
    ) -> reference::Input<'a, F> {
        let (bias, state) = (self.bias.map(|_| bias), self.state.map(|_| state));
        reference::Input { x, columns: self.columns, weight, bias, state }
    }
}
