//! The generalised delta rule: a matrix state whose transition is diagonal plus low rank.

#[cfg(feature = "cuda")]
mod cuda;
pub mod reference;

use candle_core::{Device, Result, Tensor};

use self::reference::{Dplr, DplrGrads};
use super::panels::Walked;
use super::real::Real;
use super::scan::{expect_shape, grad_or_zeros, slice_of_option};
use super::tape::{Arg, Forward, Node, Run, apply};
use crate::{dispatch, slices};

const NAME: &str = "dplr";

/// Recurrence with a diagonal plus low rank transition.
///
/// | argument | shape | |
/// |---|---|---|
/// | `q`, `k` | [B, T, H, K] | queries and keys |
/// | `v` | [B, T, H, V] | values |
/// | `g` | [B, T, H, K] | log decay of every row of the state, at most 0 |
/// | `a` | [B, T, H, K] | where the state is read before what stands there is erased |
/// | `b` | [B, T, H, K] | where what was read is taken away |
/// | `scale` | | of the outputs |
/// | `state` | [B, H, K, V] | before the first token; none: zeros |
///
/// Returns the outputs [B, T, H, V] and the final state [B, H, K, V]. On the CPU all arguments share one
/// dtype, f32 or f64; on a GPU `g` and the states are f32, the others and the outputs f32 or bf16, and K is at
/// most 128. With row vectors, one head and one token:
///
/// ```text
/// S ← (diag(exp(g)) − bᵀ a) S + kᵀ v
/// o = scale · q S
/// ```
///
/// With a key κ of length one, log decay g and write strength β, a = exp(g) κ and b = β κ, k = β κ make it Kimi
/// delta attention, S ← (I − β κᵀκ) diag(exp(g)) S + β κᵀ v (Kimi Team 2025, arXiv:2510.26692, eq. 1); with
/// a = κ and b = η κ for in-context learning rates η it is RWKV-7's S ← (diag(exp(g)) − (η κ)ᵀ κ) S + kᵀ v, which
/// the paper writes for the transposed state (Peng et al. 2025, arXiv:2503.14456, section 4.1). No decay is ever
/// divided by: a gate may be as negative as it likes. Every argument is differentiable. On the CPU the forward
/// pass is strictly sequential: a sequence fed in pieces gives the same bits as in one.
///
/// # Errors
/// Shapes or dtypes that do not fit together; a device without this operation.
#[allow(clippy::too_many_arguments)]
pub fn dplr(
    q: impl Into<Arg>,
    k: impl Into<Arg>,
    v: impl Into<Arg>,
    g: impl Into<Arg>,
    a: impl Into<Arg>,
    b: impl Into<Arg>,
    scale: f64,
    state: Option<Arg>,
) -> Result<(Tensor, Tensor)> {
    let node = DplrNode { scale, stateful: state.is_some() };
    let mut args = vec![q.into(), k.into(), v.into(), g.into(), a.into(), b.into()];
    args.extend(state);
    let mut outputs = apply(node, &args)?.into_iter();
    match (outputs.next(), outputs.next()) {
        (Some(o), Some(state)) => Ok((o, state)),
        _ => candle_core::bail!("{NAME}: expected two outputs"),
    }
}

struct DplrNode {
    scale: f64,
    stateful: bool,
}

/// Sizes, checked against every argument.
#[derive(Clone, Copy)]
struct Dims {
    batch: usize,
    steps: usize,
    heads: usize,
    key: usize,
    value: usize,
}

impl DplrNode {
    fn dims(&self, args: &[Tensor]) -> Result<Dims> {
        let (batch, steps, heads, key) = args[0].dims4()?;
        let (_, _, _, value) = args[2].dims4()?;
        if steps == 0 || key == 0 || value == 0 {
            candle_core::bail!("{NAME}: {steps} steps, key dim {key}, value dim {value}; none may be 0")
        }
        expect_shape(NAME, "v", &args[2], &[batch, steps, heads, value])?;
        for (i, name) in [(1, "k"), (3, "g"), (4, "a"), (5, "b")] {
            expect_shape(NAME, name, &args[i], &[batch, steps, heads, key])?;
        }
        if self.stateful {
            expect_shape(NAME, "state", &args[6], &[batch, heads, key, value])?;
        }
        Ok(Dims { batch, steps, heads, key, value })
    }

    /// Runs `f` on the arguments as slices.
    fn with_slices<F: Real, R>(&self, args: &[Tensor], f: impl FnOnce(Dplr<'_, F>) -> R) -> Result<R> {
        let Dims { batch, steps, heads, key, value } = self.dims(args)?;
        slices!(F; q = &args[0], k = &args[1], v = &args[2], g = &args[3], a = &args[4], b = &args[5]);
        let state = args.get(6).map(Tensor::storage_and_layout);
        let state = slice_of_option(&state)?;
        let scale = F::of(self.scale);
        Ok(f(Dplr { batch, steps, heads, key, value, scale, q, k, v, g, a, b, state }))
    }
}

impl Node for DplrNode {
    fn name(&self) -> &'static str {
        NAME
    }

    fn forward(&self, args: &[Tensor], save: bool) -> Result<Forward> {
        let dims = self.dims(args)?;
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            return cuda::forward(dims, args, self.scale, save);
        }
        let Dims { batch, steps, heads, key, value } = dims;
        dispatch!(args[0].dtype(), F => {
            let walked: Walked<F> = self.with_slices(args, |dplr| dplr.forward(save))?;
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
            return cuda::backward(dims, run, self.scale, &d_o, grads[1].as_ref());
        }
        let d_state = grad_or_zeros(&grads[1], &[batch, heads, key, value], &args[0])?;
        dispatch!(args[0].dtype(), F => {
            slices!(F; checkpoints = &run.saved[0], d_o = &d_o, d_state = &d_state);
            let DplrGrads::<F> { q, k, v, g, a, b, state } =
                self.with_slices(args, |dplr| dplr.backward(checkpoints, d_o, d_state))?;
            // Without an initial state the last gradient has no argument to go to.
            [q, k, v, g, a, b, state]
                .into_iter()
                .zip(args)
                .map(|(grad, arg)| Tensor::from_vec(grad, arg.shape(), &Device::Cpu).map(Some))
                .collect()
        })
    }
}
