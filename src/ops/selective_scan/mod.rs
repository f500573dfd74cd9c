//! The selective scan: the recurrence of Mamba.

#[cfg(feature = "cuda")]
mod cuda;
pub mod reference;

use candle_core::{Device, Result, Tensor};

use self::reference::{SelectiveScan, SelectiveScanForward, SelectiveScanGrads};
use super::real::Real;
use super::scan::{expect_shape, grad_or_zeros, slice_of_option};
use super::tape::{Arg, Forward, Node, Run, Value, apply};
use crate::{dispatch, slices};

const NAME: &str = "selective_scan";

/// Mamba's recurrence: every channel has N states, each with a decay of its own.
///
/// | argument | shape | |
/// |---|---|---|
/// | `u` | [B, T, D] | inputs |
/// | `delta` | [B, T, D] | step sizes before bias and softplus |
/// | `a_log` | [D, N] | A = −exp(a_log) |
/// | `b`, `c` | [B, T, N] | input and output maps, shared by the channels |
/// | `d` | \[D\] | skip connection |
/// | `z` | [B, T, D] | gate; none: no gate |
/// | `delta_bias` | \[D\] | |
/// | `state` | [B, D, N] | before the first token; none: zeros |
///
/// Returns the outputs [B, T, D] and the final state [B, D, N]. All arguments share one dtype, f32 or f64; on a GPU
/// u, delta, b, c and z are f32 or bf16, and the parameters and states f32.
/// With Δ = softplus(delta + delta_bias), one channel and one token:
///
/// ```text
/// hₙ ← exp(Δ Aₙ) hₙ + Δ u Bₙ
/// y = (Σₙ Cₙ hₙ + D u) · silu(z)
/// ```
///
/// Gu and Dao 2023, arXiv:2312.00752, algorithm 2, with the discretisation of their code (A exactly, B by
/// an Euler step). Every argument is differentiable. The forward pass is strictly sequential: a sequence
/// fed in pieces gives the same bits as in one.
///
/// # Errors
/// Shapes or dtypes that do not fit together; a device without this operation.
#[allow(clippy::too_many_arguments)]
pub fn selective_scan(
    u: impl Into<Arg>,
    delta: impl Into<Arg>,
    a_log: impl Into<Arg>,
    b: impl Into<Arg>,
    c: impl Into<Arg>,
    d: impl Into<Arg>,
    z: Option<Arg>,
    delta_bias: impl Into<Arg>,
    state: Option<Arg>,
) -> Result<(Tensor, Tensor)> {
    let node = SelectiveScanNode { gated: z.is_some(), stateful: state.is_some() };
    let mut args =
        vec![u.into(), delta.into(), a_log.into(), b.into(), c.into(), d.into(), delta_bias.into()];
    args.extend(z);
    args.extend(state);
    let mut outputs = apply(node, &args)?.into_iter();
    match (outputs.next(), outputs.next()) {
        (Some(y), Some(state)) => Ok((y, state)),
        _ => candle_core::bail!("{NAME}: expected two outputs"),
    }
}

struct SelectiveScanNode {
    gated: bool,
    stateful: bool,
}

/// Sizes, checked against every argument.
struct Dims {
    batch: usize,
    steps: usize,
    channels: usize,
    states: usize,
}

impl SelectiveScanNode {
    fn z<'a>(&self, args: &'a [Tensor]) -> Option<&'a Tensor> {
        self.gated.then(|| &args[7])
    }

    fn state<'a>(&self, args: &'a [Tensor]) -> Option<&'a Tensor> {
        self.stateful.then(|| &args[7 + usize::from(self.gated)])
    }

    fn dims(&self, args: &[Tensor]) -> Result<Dims> {
        let (batch, steps, channels) = args[0].dims3()?;
        let (_, states) = args[2].dims2()?;
        if steps == 0 || channels == 0 || states == 0 {
            candle_core::bail!(
                "{NAME}: {steps} steps, {channels} channels and {states} states; none may be 0"
            )
        }
        expect_shape(NAME, "delta", &args[1], &[batch, steps, channels])?;
        expect_shape(NAME, "a_log", &args[2], &[channels, states])?;
        expect_shape(NAME, "b", &args[3], &[batch, steps, states])?;
        expect_shape(NAME, "c", &args[4], &[batch, steps, states])?;
        expect_shape(NAME, "d", &args[5], &[channels])?;
        expect_shape(NAME, "delta_bias", &args[6], &[channels])?;
        if let Some(z) = self.z(args) {
            expect_shape(NAME, "z", z, &[batch, steps, channels])?;
        }
        if let Some(state) = self.state(args) {
            expect_shape(NAME, "state", state, &[batch, channels, states])?;
        }
        Ok(Dims { batch, steps, channels, states })
    }

    /// Runs `f` on the arguments as slices.
    fn with_slices<F: Real, R>(
        &self,
        args: &[Tensor],
        f: impl FnOnce(SelectiveScan<'_, F>) -> R,
    ) -> Result<R> {
        let Dims { batch, steps, channels, states } = self.dims(args)?;
        slices!(F; u = &args[0], delta = &args[1], a_log = &args[2], b = &args[3], c = &args[4]);
        slices!(F; d = &args[5], delta_bias = &args[6]);
        let z = self.z(args).map(Tensor::storage_and_layout);
        let state = self.state(args).map(Tensor::storage_and_layout);
        let (z, state) = (slice_of_option(&z)?, slice_of_option(&state)?);
        Ok(f(SelectiveScan {
            batch,
            steps,
            channels,
            states,
            u,
            delta,
            a_log,
            b,
            c,
            d,
            delta_bias,
            z,
            state,
        }))
    }
}

impl Node for SelectiveScanNode {
    fn name(&self) -> &'static str {
        NAME
    }

    fn forward(&self, args: &[Tensor], save: bool) -> Result<Forward> {
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            return cuda::forward(self, args, save);
        }
        let Dims { batch, steps, channels, states } = self.dims(args)?;
        dispatch!(args[0].dtype(), F => {
            let SelectiveScanForward::<F> { y, state, checkpoints } =
                self.with_slices(args, |scan| scan.forward(save))?;
            let outputs =
                vec![Value::cpu(y, (batch, steps, channels)), Value::cpu(state, (batch, channels, states))];
            let count = checkpoints.len();
            let saved = match save {
                true => vec![Tensor::from_vec(checkpoints, count, &Device::Cpu)?],
                false => vec![],
            };
            Ok(Forward { outputs, saved })
        })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        #[cfg(feature = "cuda")]
        if run.args[0].device().is_cuda() {
            return cuda::backward(self, run, grads);
        }
        let args = &run.args;
        let Dims { batch, steps, channels, states } = self.dims(args)?;
        let d_y = grad_or_zeros(&grads[0], &[batch, steps, channels], &args[0])?;
        let d_state = grad_or_zeros(&grads[1], &[batch, channels, states], &args[0])?;
        dispatch!(args[0].dtype(), F => {
            slices!(F; checkpoints = &run.saved[0], d_y = &d_y, d_state = &d_state);
            let SelectiveScanGrads::<F> { u, delta, a_log, b, c, d, delta_bias, z, state } =
                self.with_slices(args, |scan| scan.backward(checkpoints, d_y, d_state))?;
            let mut out = vec![u, delta, a_log, b, c, d, delta_bias];
            if self.gated {
                out.push(z);
            }
            if self.stateful {
                out.push(state);
            }
            out.into_iter()
                .zip(args)
                .map(|(grad, arg)| Tensor::from_vec(grad, arg.shape(), &Device::Cpu).map(Some))
                .collect()
        })
    }
}
