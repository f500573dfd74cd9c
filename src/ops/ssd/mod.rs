//! State space duality: the recurrence of Mamba-2.

#[cfg(feature = "cuda")]
mod cuda;
pub mod reference;

use candle_core::{Device, Result, Tensor};

use self::reference::{Ssd, SsdGrads};
use super::panels::Walked;
use super::real::Real;
use super::scan::{expect_shape, grad_or_zeros, slice_of_option};
use super::tape::{Arg, Forward, Node, Run, apply};
use crate::{dispatch, slices};

const NAME: &str = "ssd";

/// Mamba-2's recurrence: a matrix state per head that decays by one number per token.
///
/// | argument | shape | |
/// |---|---|---|
/// | `x` | [B, T, H, P] | inputs |
/// | `dt` | [B, T, H] | step sizes before bias and softplus |
/// | `a_log` | \[H\] | A = −exp(a_log) |
/// | `b`, `c` | [B, T, G, N] | input and output maps; head h uses group h / (H/G) |
/// | `d` | \[H\] | skip connection |
/// | `dt_bias` | \[H\] | |
/// | `state` | [B, H, P, N] | before the first token; none: zeros |
///
/// Returns the outputs [B, T, H, P] and the final state [B, H, P, N]. On the CPU all arguments share one dtype,
/// f32 or f64; on a GPU `x`, `dt`, `b` and `c` are f32 or bf16 like the outputs, the others f32. With Δ = softplus(dt + dt_bias), one head and one token:
///
/// ```text
/// h ← exp(Δ A) h + Δ x Bᵀ
/// y = h C + D x
/// ```
///
/// Dao and Gu 2024, arXiv:2405.21060, section 7, with the discretisation of Mamba (A exactly, B by an
/// Euler step). Every argument is differentiable. On the CPU the forward pass is strictly sequential: a
/// sequence fed in pieces gives the same bits as in one.
///
/// # Errors
/// Shapes or dtypes that do not fit together; a device without this operation.
#[allow(clippy::too_many_arguments)]
pub fn ssd(
    x: impl Into<Arg>,
    dt: impl Into<Arg>,
    a_log: impl Into<Arg>,
    b: impl Into<Arg>,
    c: impl Into<Arg>,
    d: impl Into<Arg>,
    dt_bias: impl Into<Arg>,
    state: Option<Arg>,
) -> Result<(Tensor, Tensor)> {
    let node = SsdNode { stateful: state.is_some() };
    let mut args = vec![x.into(), dt.into(), a_log.into(), b.into(), c.into(), d.into(), dt_bias.into()];
    args.extend(state);
    let mut outputs = apply(node, &args)?.into_iter();
    match (outputs.next(), outputs.next()) {
        (Some(y), Some(state)) => Ok((y, state)),
        _ => candle_core::bail!("{NAME}: expected two outputs"),
    }
}

struct SsdNode {
    stateful: bool,
}

/// Sizes, checked against every argument.
#[derive(Clone, Copy)]
struct Dims {
    batch: usize,
    steps: usize,
    heads: usize,
    dim: usize,
    groups: usize,
    states: usize,
}

impl SsdNode {
    fn dims(&self, args: &[Tensor]) -> Result<Dims> {
        let (batch, steps, heads, dim) = args[0].dims4()?;
        let (_, _, groups, states) = args[3].dims4()?;
        if steps == 0 || groups == 0 || heads % groups != 0 {
            candle_core::bail!("{NAME}: {groups} groups do not divide {heads} heads, or there are no steps")
        }
        expect_shape(NAME, "dt", &args[1], &[batch, steps, heads])?;
        expect_shape(NAME, "b", &args[3], &[batch, steps, groups, states])?;
        expect_shape(NAME, "c", &args[4], &[batch, steps, groups, states])?;
        for (name, i) in [("a_log", 2), ("d", 5), ("dt_bias", 6)] {
            expect_shape(NAME, name, &args[i], &[heads])?;
        }
        if self.stateful {
            expect_shape(NAME, "state", &args[7], &[batch, heads, dim, states])?;
        }
        Ok(Dims { batch, steps, heads, dim, groups, states })
    }

    /// Runs `f` on the arguments as slices.
    fn with_slices<F: Real, R>(&self, args: &[Tensor], f: impl FnOnce(Ssd<'_, F>) -> R) -> Result<R> {
        let Dims { batch, steps, heads, dim, groups, states } = self.dims(args)?;
        slices!(F; x = &args[0], dt = &args[1], a_log = &args[2], b = &args[3], c = &args[4]);
        slices!(F; d = &args[5], dt_bias = &args[6]);
        let state = args.get(7).map(Tensor::storage_and_layout);
        let state = slice_of_option(&state)?;
        Ok(f(Ssd { batch, steps, heads, dim, groups, states, x, dt, a_log, b, c, d, dt_bias, state }))
    }
}

impl Node for SsdNode {
    fn name(&self) -> &'static str {
        NAME
    }

    fn forward(&self, args: &[Tensor], save: bool) -> Result<Forward> {
        let dims = self.dims(args)?;
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            return cuda::forward(dims, args, save);
        }
        let Dims { batch, steps, heads, dim, states, .. } = dims;
        dispatch!(args[0].dtype(), F => {
            let walked: Walked<F> = self.with_slices(args, |ssd| ssd.forward(save))?;
            walked.into_forward((batch, steps, heads, dim), (batch, heads, dim, states), save)
        })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let args = &run.args;
        let dims = self.dims(args)?;
        let Dims { batch, steps, heads, dim, states, .. } = dims;
        let d_y = grad_or_zeros(&grads[0], &[batch, steps, heads, dim], &args[0])?;
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            let mut grads = cuda::backward(dims, run, &d_y, grads[1].as_ref())?;
            grads.truncate(args.len());
            return Ok(grads);
        }
        let d_state = grad_or_zeros(&grads[1], &[batch, heads, dim, states], &args[0])?;
        dispatch!(args[0].dtype(), F => {
            slices!(F; checkpoints = &run.saved[0], d_y = &d_y, d_state = &d_state);
            let SsdGrads::<F> { x, dt, a_log, b, c, d, dt_bias, state } =
                self.with_slices(args, |ssd| ssd.backward(checkpoints, d_y, d_state))?;
            // Without an initial state the last gradient has no argument to go to.
            [x, dt, a_log, b, c, d, dt_bias, state]
                .into_iter()
                .zip(args)
                .map(|(grad, arg)| Tensor::from_vec(grad, arg.shape(), &Device::Cpu).map(Some))
                .collect()
        })
    }
}
