//! What Kimi delta attention makes of its projections before the recurrence of [`dplr`](super::dplr).

#[cfg(feature = "cuda")]
mod cuda;
mod reference;

use candle_core::{Device, Result, Tensor};

use super::scan::{expect_shape, grad_or_zeros};
use super::tape::{Arg, Forward, Node, Run, Value, apply};
use crate::{dispatch, slices};

/// Log decay of every key channel, g = −exp(a_log) · softplus(f + dt_bias).
///
/// `f` is [B, T, H, K], `a_log` \[H\], `dt_bias` \[H·K\]; returns [B, T, H, K], never above 0. f32 or f64 on the CPU;
/// on a GPU `f` is f32 or bf16, the others and the result f32, and K is at most 128. Kimi Team 2025,
/// arXiv:2510.26692, section 4, with the decay function of Mamba-2; the softplus is its argument above 20, as in
/// PyTorch.
///
/// # Errors
/// Shapes or dtypes that do not fit together; a device without this operation.
pub fn kda_gate(f: impl Into<Arg>, a_log: impl Into<Arg>, dt_bias: impl Into<Arg>) -> Result<Tensor> {
    apply(Gate, &[f.into(), a_log.into(), dt_bias.into()]).map(|mut out| out.remove(0))
}

/// What a key does to the state: where it is read, exp(g) ⊙ k, and where it is written and erased, β k.
///
/// `k` and `g` are [B, T, H, K], `beta` [B, T, H]; returns both as [B, T, H, K]. f32 or f64 on the CPU; on a GPU `k`
/// and the results are f32 or bf16, the others f32, and K is at most 128. As `a`, and `b` and `k`, of
/// [`dplr`](super::dplr::dplr()) they make it S ← (I − β kᵀk) diag(exp(g)) S + β kᵀv, Kimi Team 2025,
/// arXiv:2510.26692, eq. 1.
///
/// # Errors
/// Shapes or dtypes that do not fit together; a device without this operation.
pub fn kda_keys(k: impl Into<Arg>, g: impl Into<Arg>, beta: impl Into<Arg>) -> Result<[Tensor; 2]> {
    match <[Tensor; 2]>::try_from(apply(Keys, &[k.into(), g.into(), beta.into()])?) {
        Ok(keys) => Ok(keys),
        Err(_) => candle_core::bail!("kda_keys: expected two outputs"),
    }
}

struct Gate;

impl Gate {
    /// [B, T, H, K], checked against the parameters.
    fn dims(args: &[Tensor]) -> Result<[usize; 4]> {
        let (batch, steps, heads, key) = args[0].dims4()?;
        expect_shape("kda_gate", "a_log", &args[1], &[heads])?;
        expect_shape("kda_gate", "dt_bias", &args[2], &[heads * key])?;
        Ok([batch, steps, heads, key])
    }
}

impl Node for Gate {
    fn name(&self) -> &'static str {
        "kda_gate"
    }

    fn forward(&self, args: &[Tensor], _: bool) -> Result<Forward> {
        let dims = Self::dims(args)?;
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            return cuda::gate(args, dims);
        }
        let value = dispatch!(args[0].dtype(), F => {
            slices!(F; f = &args[0], a_log = &args[1], dt_bias = &args[2]);
            Value::cpu(reference::gate(f, a_log, dt_bias, dims[3]), args[0].shape())
        });
        Ok(Forward { outputs: vec![value], saved: vec![] })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let args = &run.args;
        let dims = Self::dims(args)?;
        let Some(dg) = &grads[0] else { return Ok(vec![None; 3]) };
        #[cfg(feature = "cuda")]
        if dg.device().is_cuda() {
            return cuda::gate_backward(run, dims, dg);
        }
        dispatch!(args[0].dtype(), F => {
            slices!(F; f = &args[0], a_log = &args[1], dt_bias = &args[2], dg = dg);
            let grads = reference::gate_backward(f, a_log, dt_bias, dg, dims[3]);
            let tensors = grads.into_iter().zip(args);
            tensors.map(|(grad, arg)| Tensor::from_vec(grad, arg.shape(), &Device::Cpu).map(Some)).collect()
        })
    }
}

struct Keys;

impl Keys {
    /// [B, T, H, K], checked against all arguments.
    fn dims(args: &[Tensor]) -> Result<[usize; 4]> {
        let (batch, steps, heads, key) = args[0].dims4()?;
        expect_shape("kda_keys", "g", &args[1], &[batch, steps, heads, key])?;
        expect_shape("kda_keys", "beta", &args[2], &[batch, steps, heads])?;
        Ok([batch, steps, heads, key])
    }
}

impl Node for Keys {
    fn name(&self) -> &'static str {
        "kda_keys"
    }

    fn forward(&self, args: &[Tensor], _: bool) -> Result<Forward> {
        let dims = Self::dims(args)?;
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            return cuda::keys(args, dims);
        }
        let outputs = dispatch!(args[0].dtype(), F => {
            slices!(F; k = &args[0], g = &args[1], beta = &args[2]);
            reference::keys(k, g, beta, dims[3]).map(|x| Value::cpu(x, args[0].shape())).into()
        });
        Ok(Forward { outputs, saved: vec![] })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let args = &run.args;
        let dims = Self::dims(args)?;
        let d_read = grad_or_zeros(&grads[0], &dims, &args[0])?;
        let d_write = grad_or_zeros(&grads[1], &dims, &args[0])?;
        #[cfg(feature = "cuda")]
        if d_read.device().is_cuda() {
            return cuda::keys_backward(args, dims, &d_read, &d_write);
        }
        dispatch!(args[0].dtype(), F => {
            slices!(F; k = &args[0], g = &args[1], beta = &args[2], d_read = &d_read, d_write = &d_write);
            let grads = reference::keys_backward(k, g, beta, d_read, d_write, dims[3]);
            let tensors = grads.into_iter().zip(args);
            tensors.map(|(grad, arg)| Tensor::from_vec(grad, arg.shape(), &Device::Cpu).map(Some)).collect()
        })
    }
}
