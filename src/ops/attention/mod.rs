//! Softmax attention: normed and rotated queries and keys, then causal attention, which may forget.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
mod hopper;
mod reference;
mod rope;

use candle_core::{Device, Result, Tensor};

use self::reference::Shape;
use super::real::Real;
use super::tape::{Arg, Forward, Node, Run, Value, apply};
use crate::{dispatch, slices};

pub use rope::{qk_norm_rope, rope};

/// softmax(scale · q kᵀ + causal mask) v, per head.
///
/// q [B, T, H, D], k [B, S, H, D], v [B, S, H, V] with S ≥ T; gives [B, T, H, V]. Query t sees the keys
/// 0 ..= S−T+t, so k and v may hold a cache of earlier steps; with a `window`, only the last so many of them. Scores
/// exist for one tile of queries and
/// keys at a time; the backward pass forms them again from the saved log-sum-exp.
/// Source: Dao, "FlashAttention-2: faster attention with better parallelism and work partitioning", 2023.
pub fn causal_attention(
    q: impl Into<Arg>,
    k: impl Into<Arg>,
    v: impl Into<Arg>,
    scale: f64,
    window: Option<usize>,
) -> Result<Tensor> {
    attention([q.into(), k.into(), v.into()], None, scale, window)
}

/// [`causal_attention`] that forgets: softmax(scale · q kᵀ + c_i − c_j + causal mask) v, per head, with c the sums of
/// the log forget gates g up to a timestep.
///
/// g [B, S, H], log f with f in (0, 1], belongs to the keys: key j counts for query i less by all gates behind j, up
/// to that of i. f32 where q, k and v are bf16. Sums are taken in f64; their differences enter the scores in the
/// format of these. Source: Lin et al., "Forgetting transformer: softmax attention with a forget gate", arXiv
/// 2503.02130, section 3.
pub fn forgetting_attention(
    q: impl Into<Arg>,
    k: impl Into<Arg>,
    v: impl Into<Arg>,
    g: impl Into<Arg>,
    scale: f64,
    window: Option<usize>,
) -> Result<Tensor> {
    attention([q.into(), k.into(), v.into()], Some(g.into()), scale, window)
}

fn attention([q, k, v]: [Arg; 3], g: Option<Arg>, scale: f64, window: Option<usize>) -> Result<Tensor> {
    let (batch, steps, heads, dim) = q.shape().dims4()?;
    let (_, keys, _, values) = v.shape().dims4()?;
    if k.shape().dims() != [batch, keys, heads, dim] || v.shape().dims()[..3] != [batch, keys, heads] {
        candle_core::bail!(
            "attention: q {:?}, k {:?} and v {:?} do not fit together",
            q.shape(),
            k.shape(),
            v.shape()
        )
    }
    if keys < steps {
        candle_core::bail!("attention: {keys} keys for {steps} queries; every query needs its own key")
    }
    if let Some(g) = &g
        && g.shape().dims() != [batch, keys, heads]
    {
        candle_core::bail!("attention: g {:?} does not fit to k {:?}", g.shape(), k.shape())
    }
    if window == Some(0) {
        candle_core::bail!("attention: a window of 0 steps; every query sees its own key")
    }
    let window = window.unwrap_or(keys).min(keys);
    let shape = Shape { batch, steps, keys, heads, dim, values, window };
    let args: Vec<Arg> = [q, k, v].into_iter().chain(g).collect();
    Ok(apply(CausalAttention { shape, scale }, &args)?.remove(0))
}

struct CausalAttention {
    shape: Shape,
    scale: f64,
}

impl CausalAttention {
    /// Of the log forget gates, where there are some.
    fn sums<F: Real>(&self, args: &[Tensor]) -> Result<Option<Vec<f64>>> {
        let Some(g) = args.get(3) else { return Ok(None) };
        slices!(F; g = g);
        Ok(Some(reference::cumulative(self.shape, g)))
    }
}

impl Node for CausalAttention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn keeps(&self) -> &'static [usize] {
        &[0]
    }

    fn forward(&self, args: &[Tensor], save: bool) -> Result<Forward> {
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            return cuda::forward(self.shape, args, self.scale, save);
        }
        let Shape { batch, steps, heads, values, .. } = self.shape;
        dispatch!(args[0].dtype(), F => {
            slices!(F; q = &args[0], k = &args[1], v = &args[2]);
            let sums = self.sums::<F>(args)?;
            let (o, lse) = reference::forward(self.shape, (q, k, v), sums.as_deref(), self.scale as F);
            let saved = match save {
                true => vec![Tensor::from_vec(lse, (batch, steps, heads), &Device::Cpu)?],
                false => vec![],
            };
            Ok(Forward { outputs: vec![Value::cpu(o, (batch, steps, heads, values))], saved })
        })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let (args, Some(dout)) = (&run.args, &grads[0]) else { return Ok(vec![None; run.args.len()]) };
        #[cfg(feature = "cuda")]
        if dout.device().is_cuda() {
            let saved = (&run.outputs[0], &run.saved[0]);
            let grads = cuda::backward(self.shape, args, saved, dout, self.scale)?;
            return Ok(grads.into_iter().map(Some).collect());
        }
        dispatch!(dout.dtype(), F => {
            slices!(F; q = &args[0], k = &args[1], v = &args[2]);
            slices!(F; o = &run.outputs[0], lse = &run.saved[0], dout = dout);
            let (sums, scale) = (self.sums::<F>(args)?, self.scale as F);
            let grads = reference::backward(self.shape, (q, k, v), sums.as_deref(), (o, lse), dout, scale);
            grads
                .into_iter()
                .zip(args)
                .map(|(grad, arg)| Ok(Some(Tensor::from_vec(grad, arg.shape(), &Device::Cpu)?)))
                .collect()
        })
    }
}
