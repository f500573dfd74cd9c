//! Short convolution along time, one filter per channel, then SiLU.

#[cfg(feature = "cuda")]
mod cuda;
mod reference;

use candle_core::{Device, Result, Tensor};

use self::reference::{Shape, split};
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
    let ([y], state) = causal_conv1d_silu_split(x, weight, bias, state, [width])?;
    Ok((y, state))
}

/// [`causal_conv1d_silu`] with y in parts of these `widths`, which add up to D: what one matrix product and one
/// convolution make together, such as queries, keys and values.
pub fn causal_conv1d_silu_split<const N: usize>(
    x: impl Into<Arg>,
    weight: impl Into<Arg>,
    bias: Option<Arg>,
    state: Option<Arg>,
    widths: [usize; N],
) -> Result<([Tensor; N], Tensor)> {
    let (x, weight) = (x.into(), weight.into());
    let (batch, steps, width) = x.shape().dims3()?;
    if widths.iter().sum::<usize>() != width {
        candle_core::bail!("causal_conv1d: x has {width} channels, which are no parts of {widths:?}")
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
        widths: widths.to_vec(),
        bias: bias.as_ref().map(|_| 2),
        state: state.as_ref().map(|_| 2 + bias.iter().count()),
    };
    let args: Vec<Arg> = [x, weight].into_iter().chain(bias).chain(state).collect();
    let mut out = apply(node, &args)?;
    let state = out.pop().expect("the node's last output");
    Ok((out.try_into().expect("one output for each part"), state))
}

struct CausalConv1d {
    shape: Shape,
    /// Channels of the parts of y.
    widths: Vec<usize>,
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
            let parts = split(reference::forward(self.shape, input), &self.widths);
            let parts = parts.into_iter().zip(&self.widths);
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
        let zeros = |grad: &Option<Tensor>, steps: usize, width: usize| match grad {
            // A view of the output may have given the gradient another shape.
            Some(grad) => grad.reshape((self.shape.batch, steps, width)),
            None => Tensor::zeros((self.shape.batch, steps, width), args[0].dtype(), &Device::Cpu),
        };
        let Shape { steps, width, taps, .. } = self.shape;
        let (d_final, dy) = grads.split_last().expect("the state is an output");
        let d_final = zeros(d_final, taps - 1, width)?;
        let parts = dy.iter().zip(&self.widths).map(|(dy, &width)| zeros(dy, steps, width));
        let dy = Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 2)?;
        dispatch!(args[0].dtype(), F => {
            slices!(F; x = &args[0], w = &args[1], bias = bias, state = state, dy = &dy, d_final = &d_final);
            let grads = reference::backward(self.shape, self.input(x, w, bias, state), dy, d_final);
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
        reference::Input { x, weight, bias: self.bias.map(|_| bias), state: self.state.map(|_| state) }
    }
}
