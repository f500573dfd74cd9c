//! Diagonal state space model with a complex transition that does not depend on the input.

#[cfg(feature = "cuda")]
mod cuda;
mod reference;

use candle_core::{Device, Result, Tensor};

use self::reference::{S4d, S4dGrads};
use super::real::Real;
use super::scan::{expect_shape, grad_or_zeros, slice_of_option};
use super::tape::{Arg, Forward, Node, Run, Value, apply};
use crate::{dispatch, slices};

const NAME: &str = "s4d";

/// The recurrence of S4D: complex states of every channel that turn and decay at fixed rates.
///
/// | argument | shape | |
/// |---|---|---|
/// | `u` | [B, T, D] | inputs |
/// | `c` | [D, N, 2] | output map: real and imaginary part of C, here and below |
/// | `log_dt` | \[D\] | log of the step size Δ |
/// | `log_a_real` | [D, N] | Re A = −exp(log_a_real) |
/// | `a_imag` | [D, N] | Im A |
/// | `d` | \[D\] | skip connection |
/// | `state` | [B, D, N, 2] | before the first token; none: zeros |
///
/// Returns the outputs [B, T, D] and the final state [B, D, N, 2]. On the CPU all arguments share one dtype,
/// f32 or f64; on a GPU `u` and the outputs are f32 or bf16, the others f32. N counts pairs of conjugate
/// states, of which one is kept. With Ā = exp(Δ A) and C̄ = C (Ā − 1) / A, for one channel and token:
///
/// ```text
/// h ← Ā h + u
/// y = 2 Re Σ C̄ h + D u
/// ```
///
/// Gu et al. 2022, arXiv:2206.11893, section 3: zero-order hold, with B = 1 and what it would be multiplied
/// with moved to C; the convolution as a recurrence. Every argument is differentiable. Ā and C̄ are computed in
/// f64 throughout: they are raised to the power of the sequence's length. On the CPU the forward pass is
/// strictly sequential: a sequence fed in pieces gives the same bits as in one.
///
/// # Errors
/// Shapes or dtypes that do not fit together; a device without this operation.
pub fn s4d(
    u: impl Into<Arg>,
    c: impl Into<Arg>,
    log_dt: impl Into<Arg>,
    log_a_real: impl Into<Arg>,
    a_imag: impl Into<Arg>,
    d: impl Into<Arg>,
    state: Option<Arg>,
) -> Result<(Tensor, Tensor)> {
    let node = S4dNode { stateful: state.is_some() };
    let mut args = vec![u.into(), c.into(), log_dt.into(), log_a_real.into(), a_imag.into(), d.into()];
    args.extend(state);
    let mut outputs = apply(node, &args)?.into_iter();
    match (outputs.next(), outputs.next()) {
        (Some(y), Some(state)) => Ok((y, state)),
        _ => candle_core::bail!("{NAME}: expected two outputs"),
    }
}

struct S4dNode {
    stateful: bool,
}

/// Sizes, checked against every argument.
#[derive(Clone, Copy)]
struct Dims {
    batch: usize,
    steps: usize,
    width: usize,
    pairs: usize,
}

impl S4dNode {
    fn dims(&self, args: &[Tensor]) -> Result<Dims> {
        let (batch, steps, width) = args[0].dims3()?;
        let (_, pairs, _) = args[1].dims3()?;
        if steps == 0 || width == 0 || pairs == 0 {
            candle_core::bail!(
                "{NAME}: {steps} steps, {width} channels, {pairs} pairs of states; none may be 0"
            )
        }
        expect_shape(NAME, "c", &args[1], &[width, pairs, 2])?;
        for (name, i) in [("log_dt", 2), ("d", 5)] {
            expect_shape(NAME, name, &args[i], &[width])?;
        }
        for (name, i) in [("log_a_real", 3), ("a_imag", 4)] {
            expect_shape(NAME, name, &args[i], &[width, pairs])?;
        }
        if self.stateful {
            expect_shape(NAME, "state", &args[6], &[batch, width, pairs, 2])?;
        }
        Ok(Dims { batch, steps, width, pairs })
    }

    /// Runs `f` on the arguments as slices.
    fn with_slices<F: Real, R>(&self, args: &[Tensor], f: impl FnOnce(S4d<'_, F>) -> R) -> Result<R> {
        let Dims { batch, steps, width, pairs } = self.dims(args)?;
        slices!(F; u = &args[0], c = &args[1], log_dt = &args[2], log_a_real = &args[3], a_imag = &args[4]);
        slices!(F; d = &args[5]);
        let state = args.get(6).map(Tensor::storage_and_layout);
        let state = slice_of_option(&state)?;
        Ok(f(S4d { batch, steps, width, pairs, u, c, log_dt, log_a_real, a_imag, d, state }))
    }
}

impl Node for S4dNode {
    fn name(&self) -> &'static str {
        NAME
    }

    fn forward(&self, args: &[Tensor], _: bool) -> Result<Forward> {
        let dims = self.dims(args)?;
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            return cuda::forward(dims, args);
        }
        let Dims { batch, steps, width, pairs } = dims;
        dispatch!(args[0].dtype(), F => {
            let (y, state) = self.with_slices::<F, _>(args, |s4d| s4d.forward())?;
            let outputs =
                vec![Value::cpu(y, (batch, steps, width)), Value::cpu(state, (batch, width, pairs, 2))];
            Ok(Forward { outputs, saved: vec![] })
        })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let args = &run.args;
        let dims = self.dims(args)?;
        let Dims { batch, steps, width, pairs } = dims;
        let d_y = grad_or_zeros(&grads[0], &[batch, steps, width], &args[0])?;
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            let grads = cuda::backward(dims, args, &d_y, grads[1].as_ref())?;
            return Ok(grads.into_iter().take(args.len()).map(Some).collect());
        }
        let d_state = grad_or_zeros(&grads[1], &[batch, width, pairs, 2], &args[0])?;
        dispatch!(args[0].dtype(), F => {
            slices!(F; d_y = &d_y, d_state = &d_state);
            let S4dGrads::<F> { u, c, log_dt, log_a_real, a_imag, d, state } =
                self.with_slices(args, |s4d| s4d.backward(d_y, d_state))?;
            // Without an initial state the last gradient has no argument to go to.
            [u, c, log_dt, log_a_real, a_imag, d, state]
                .into_iter()
                .zip(args)
                .map(|(grad, arg)| Tensor::from_vec(grad, arg.shape(), &Device::Cpu).map(Some))
                .collect()
        })
    }
}
