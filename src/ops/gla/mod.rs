//! Gated linear attention: a matrix state whose rows decay on their own.

#[cfg(feature = "cuda")]
pub(super) mod cuda;
pub mod reference;

use candle_core::{Device, Result, Tensor};

use self::reference::{Gla, GlaGrads};
use super::panels::Walked;
use super::real::Real;
use super::scan::{expect_shape, grad_or_zeros, slice_of_option};
use super::tape::{Arg, Forward, Node, Run, apply};
use crate::{dispatch, slices};

const NAME: &str = "gla";

/// Gated linear attention.
///
/// | argument | shape | |
/// |---|---|---|
/// | `q`, `k` | [B, T, H, K] | queries and keys |
/// | `v` | [B, T, H, V] | values |
/// | `gk` | [B, T, H, K] | log decay of every row of the state, at most 0 |
/// | `scale` | | of the outputs, K^-½ in the layer |
/// | `state` | [B, H, K, V] | before the first token; none: zeros |
///
/// Returns the outputs [B, T, H, V] and the final state [B, H, K, V]. On the CPU all arguments share one
/// dtype, f32 or f64; on a GPU `q`, `k`, `v` and the outputs are f32 or bf16, the others f32. With row
/// vectors, one head and one token:
///
/// ```text
/// S ← diag(exp(gk)) S + kᵀ v
/// o = scale · q S
/// ```
///
/// Yang et al. 2024, arXiv:2312.06635, eq. 3. With one decay per head, repeated over K, it is RetNet's
/// and simple GLA's recurrence. Every argument is differentiable. On the CPU the forward pass is strictly
/// sequential: a sequence fed in pieces gives the same bits as in one.
///
/// # Errors
/// Shapes or dtypes that do not fit together; a device without this operation.
pub fn gla(
    q: impl Into<Arg>,
    k: impl Into<Arg>,
    v: impl Into<Arg>,
    gk: impl Into<Arg>,
    scale: f64,
    state: Option<Arg>,
) -> Result<(Tensor, Tensor)> {
    let node = GlaNode { scale, stateful: state.is_some() };
    let mut args = vec![q.into(), k.into(), v.into(), gk.into()];
    args.extend(state);
    let mut outputs = apply(node, &args)?.into_iter();
    match (outputs.next(), outputs.next()) {
        (Some(o), Some(state)) => Ok((o, state)),
        _ => candle_core::bail!("{NAME}: expected two outputs"),
    }
}

struct GlaNode {
    scale: f64,
    stateful: bool,
}

/// Sizes, checked against every argument.
#[derive(Clone, Copy)]
pub(super) struct Dims {
    pub batch: usize,
    pub steps: usize,
    pub heads: usize,
    pub key: usize,
    pub value: usize,
}

impl GlaNode {
    fn dims(&self, args: &[Tensor]) -> Result<Dims> {
        let (batch, steps, heads, key) = args[0].dims4()?;
        let (_, _, _, value) = args[2].dims4()?;
        if steps == 0 || key == 0 || value == 0 {
            candle_core::bail!("{NAME}: {steps} steps, key dim {key}, value dim {value}; none may be 0")
        }
        expect_shape(NAME, "k", &args[1], &[batch, steps, heads, key])?;
        expect_shape(NAME, "v", &args[2], &[batch, steps, heads, value])?;
        expect_shape(NAME, "gk", &args[3], &[batch, steps, heads, key])?;
        if self.stateful {
            expect_shape(NAME, "state", &args[4], &[batch, heads, key, value])?;
        }
        Ok(Dims { batch, steps, heads, key, value })
    }

    /// Runs `f` on the arguments as slices.
    fn with_slices<F: Real, R>(&self, args: &[Tensor], f: impl FnOnce(Gla<'_, F>) -> R) -> Result<R> {
        let Dims { batch, steps, heads, key, value } = self.dims(args)?;
        slices!(F; q = &args[0], k = &args[1], v = &args[2], gk = &args[3]);
        let state = args.get(4).map(Tensor::storage_and_layout);
        let state = slice_of_option(&state)?;
        let scale = F::of(self.scale);
        Ok(f(Gla { batch, steps, heads, key, value, scale, q, k, v, gk, state }))
    }
}

impl Node for GlaNode {
    fn name(&self) -> &'static str {
        NAME
    }

    fn forward(&self, args: &[Tensor], save: bool) -> Result<Forward> {
        let dims = self.dims(args)?;
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            return cuda::forward(dims, args, self.scale);
        }
        let Dims { batch, steps, heads, key, value } = dims;
        dispatch!(args[0].dtype(), F => {
            let walked: Walked<F> = self.with_slices(args, |gla| gla.forward(save))?;
            walked.into_forward((batch, steps, heads, value), (batch, heads, key, value), save)
        })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let args = &run.args;
        let dims = self.dims(args)?;
        let Dims { batch, steps, heads, key, value } = dims;
        let d_o = grad_or_zeros(&grads[0], &[batch, steps, heads, value], &args[0])?;
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            let grads = cuda::backward(dims, args, self.scale, &d_o, grads[1].as_ref())?;
            return Ok(grads.into_iter().take(args.len()).map(Some).collect());
        }
        let d_state = grad_or_zeros(&grads[1], &[batch, heads, key, value], &args[0])?;
        dispatch!(args[0].dtype(), F => {
            slices!(F; checkpoints = &run.saved[0], d_o = &d_o, d_state = &d_state);
            let GlaGrads::<F> { q, k, v, gk, state } =
                self.with_slices(args, |gla| gla.backward(checkpoints, d_o, d_state))?;
            // Without an initial state the last gradient has no argument to go to.
            [q, k, v, gk, state]
                .into_iter()
                .zip(args)
                .map(|(grad, arg)| Tensor::from_vec(grad, arg.shape(), &Device::Cpu).map(Some))
                .collect()
        })
    }
}
