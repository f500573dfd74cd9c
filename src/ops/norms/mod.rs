//! Normalisation over the last dimension: layer norm, RMS norm, and RMS norm with a gate.

#[cfg(feature = "cuda")]
mod cuda;
mod reference;

use candle_core::{Device, Result, Tensor};

use super::tape::{Arg, Forward, Node, Run, Value, apply};
use crate::{dispatch, slices};

pub(crate) use reference::{layer_norm_row, layer_norm_row_backward};

/// Where an RMS norm adds its epsilon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RmsEps {
    /// x / √(mean x² + eps).
    Inside,
    /// x / (√(mean x²) + eps).
    Outside,
}

/// Where a gated RMS norm applies its gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateOrder {
    /// w ⊙ x̂ ⊙ silu(z), as in flash-linear-attention.
    AfterNorm,
    /// w ⊙ rms(x ⊙ silu(z)), as in Mamba-2 (`norm_before_gate = False`).
    BeforeNorm,
    /// w ⊙ x̂ ⊙ σ(z), as in Kimi delta attention and xLSTM.
    SigmoidAfterNorm,
}

/// y = w ⊙ (x − mean) / √(var + eps) + b over the last dimension, with the biased variance.
///
/// x [.., n], w \[n\], b \[n\]. As PyTorch's `nn.LayerNorm`.
pub fn layer_norm(x: impl Into<Arg>, w: impl Into<Arg>, b: impl Into<Arg>, eps: f64) -> Result<Tensor> {
    let (x, w, b) = (x.into(), w.into(), b.into());
    let n = w.shape().elem_count();
    if x.shape().dims().last() != Some(&n) || b.shape().elem_count() != n || n == 0 {
        candle_core::bail!(
            "layer_norm: x has shape {:?}, the weight {:?}, the bias {:?}; the last dimensions must agree",
            x.shape(),
            w.shape(),
            b.shape()
        )
    }
    Ok(apply(LayerNorm { eps }, &[x, w, b])?.remove(0))
}

/// RMS norm of each group of n along the last dimension, all with the same weight.
///
/// x [.., m], w \[n\] where n divides m. Source: Zhang and Sennrich, "Root mean square layer
/// normalization", 2019; the released layers differ in where they add `eps`.
pub fn rms_norm(x: impl Into<Arg>, w: impl Into<Arg>, eps: f64, place: RmsEps) -> Result<Tensor> {
    let (x, w) = (x.into(), w.into());
    check_groups("rms_norm", &x, &w)?;
    Ok(apply(RmsNorm { eps, place, gate: None }, &[x, w])?.remove(0))
}

/// RMS norm of each group of n along the last dimension with a silu or sigmoid gate; `eps` inside the root.
///
/// x [.., m], z [.., m], w \[n\] where n divides m: n is the head's value dimension in
/// flash-linear-attention, all channels in Mamba-2.
pub fn gated_rms_norm(
    x: impl Into<Arg>,
    z: impl Into<Arg>,
    w: impl Into<Arg>,
    eps: f64,
    order: GateOrder,
) -> Result<Tensor> {
    let (x, z, w) = (x.into(), z.into(), w.into());
    check_groups("gated_rms_norm", &x, &w)?;
    if x.shape().elem_count() != z.shape().elem_count() {
        candle_core::bail!("gated_rms_norm: x has shape {:?}, its gate {:?}", x.shape(), z.shape())
    }
    Ok(apply(RmsNorm { eps, place: RmsEps::Inside, gate: Some(order) }, &[x, w, z])?.remove(0))
}

fn check_groups(name: &str, x: &Arg, w: &Arg) -> Result<()> {
    let n = w.shape().elem_count();
    match x.shape().dims().last() {
        Some(m) if n > 0 && m % n == 0 => Ok(()),
        _ => candle_core::bail!(
            "{name}: the weight's {n} elements do not divide the last dimension of x, {:?}",
            x.shape()
        ),
    }
}

struct LayerNorm {
    eps: f64,
}

impl Node for LayerNorm {
    fn name(&self) -> &'static str {
        "layer_norm"
    }

    fn forward(&self, args: &[Tensor], _: bool) -> Result<Forward> {
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            return cuda::layer_norm(self, args);
        }
        let value = dispatch!(args[0].dtype(), F => {
            slices!(F; x = &args[0], w = &args[1], b = &args[2]);
            Value::cpu(reference::layer_norm(x, w, b, self.eps), args[0].shape())
        });
        Ok(Forward { outputs: vec![value], saved: vec![] })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let (args, Some(dy)) = (&run.args, &grads[0]) else { return Ok(vec![None; 3]) };
        #[cfg(feature = "cuda")]
        if dy.device().is_cuda() {
            return cuda::layer_norm_backward(self, run, dy);
        }
        dispatch!(dy.dtype(), F => {
            slices!(F; x = &args[0], w = &args[1], dy = dy);
            let (dx, dw, db) = reference::layer_norm_backward(x, w, dy, self.eps);
            Ok(vec![
                Some(Tensor::from_vec(dx, args[0].shape(), &Device::Cpu)?),
                Some(Tensor::from_vec(dw, args[1].shape(), &Device::Cpu)?),
                Some(Tensor::from_vec(db, args[2].shape(), &Device::Cpu)?),
            ])
        })
    }
}

/// Arguments: x, w, and the gate z if there is one.
struct RmsNorm {
    eps: f64,
    place: RmsEps,
    gate: Option<GateOrder>,
}

impl Node for RmsNorm {
    fn name(&self) -> &'static str {
        if self.gate.is_some() { "gated_rms_norm" } else { "rms_norm" }
    }

    fn forward(&self, args: &[Tensor], _: bool) -> Result<Forward> {
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            return cuda::rms_norm(self, args);
        }
        let z = args.get(2).unwrap_or(&args[0]);
        let value = dispatch!(args[0].dtype(), F => {
            slices!(F; x = &args[0], w = &args[1], z = z);
            let gate = self.gate.map(|order| (order, z));
            Value::cpu(reference::rms_norm(x, w, gate, self.eps, self.place), args[0].shape())
        });
        Ok(Forward { outputs: vec![value], saved: vec![] })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let args = &run.args;
        let Some(dy) = &grads[0] else { return Ok(vec![None; args.len()]) };
        #[cfg(feature = "cuda")]
        if dy.device().is_cuda() {
            return cuda::rms_norm_backward(self, run, dy);
        }
        let z = args.get(2).unwrap_or(&args[0]);
        dispatch!(dy.dtype(), F => {
            slices!(F; x = &args[0], w = &args[1], z = z, dy = dy);
            let gate = self.gate.map(|order| (order, z));
            let (dx, dw, dz) = reference::rms_norm_backward(x, w, gate, dy, self.eps, self.place);
            let mut out = vec![
                Some(Tensor::from_vec(dx, args[0].shape(), &Device::Cpu)?),
                Some(Tensor::from_vec(dw, args[1].shape(), &Device::Cpu)?),
            ];
            if self.gate.is_some() {
                out.push(Some(Tensor::from_vec(dz, args[2].shape(), &Device::Cpu)?));
            }
            Ok(out)
        })
    }
}
