//! The softmax-attention baseline: rotary positions, RMS-normed queries and keys, SwiGLU.
//!
//! Vaswani et al., arXiv 1706.03762; Su et al., arXiv 2104.09864 (rotary); Shazeer, arXiv 2002.05202
//! (SwiGLU, here with a trained slope). The block has residuals of its own; the stack around it adds its
//! input once more, as in the authors' released code.

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use super::notes::age;
use super::{Builder, Call, Dims, Init, Kind, Mixer, Model, Param, Part, Rows, Scale, Transition};
use crate::bail_input;
use crate::config::Block;
use crate::ops::add::add;
use crate::ops::attention::{causal_attention, qk_norm_rope};
use crate::ops::dropout::dropout;
use crate::ops::linear::linear;
use crate::ops::norms::{RmsEps, rms_norm};
use crate::ops::swiglu::swiglu;
use crate::ops::{Arg, view};

pub(super) const MODEL: Model = Model {
    name: "transformer",
    recurrence: |_| "keeps keys and values",
    reference: "Vaswani et al. 2017, arXiv 1706.03762",
    build: |dims, builder| Ok(Box::new(Transformer::new(dims, builder)?)),
    state_size: |dims| dims.window.map(|window| 2 * dims.width * window),
    grain: None,
    transition: Transition::Attention,
    input_dependent_decay: false,
    householders: |_| 0,
    decay: Part::Never,
    output_gate: Part::Never,
    short_conv: Part::Never,
    negative_eigenvalues: Part::Never,
    delta_rule: Part::Never,
    qk_norm: Part::Always,
};

const ATTENTION: Kind = Kind {
    name: "attention",
    about: "share by age in timesteps, mean over heads",
    scale: Scale::Linear,
    rows: Rows::Age,
};
const ENTROPY: Kind = Kind {
    name: "entropy",
    about: "entropy of the attention, in nats",
    scale: Scale::Linear,
    rows: Rows::Head,
};

/// The norms add this to the root mean square, outside the root.
const RMS_EPS: f64 = 1e-8;

struct Affine {
    weight: Param,
    bias: Param,
}

impl Affine {
    fn new(builder: &Builder, name: &str, rows: usize, columns: usize) -> Self {
        let b = builder.push(name);
        Self {
            weight: b.param("weight", &[rows, columns], Init::linear(columns)),
            bias: b.param("bias", &[rows], Init::linear(columns)),
        }
    }

    fn forward(&self, x: impl Into<Arg>) -> Result<Tensor> {
        linear(x, &self.weight, Some(Arg::from(&self.bias)))
    }
}

struct Transformer {
    heads: usize,
    head_dim: usize,
    rope_base: f64,
    window: Option<usize>,
    inv_freq: Param,
    q: Affine,
    k: Affine,
    v: Affine,
    out: Affine,
    q_norm: Param,
    k_norm: Param,
    out_norm: Param,
    up: Affine,
    down: Affine,
    beta: Param,
}

fn inverse_frequencies(base: f64, head_dim: usize) -> Vec<f64> {
    (0..head_dim / 2).map(|i| base.powf(-((2 * i) as f64) / head_dim as f64)).collect()
}

impl Transformer {
    fn new(dims: &Dims, builder: &Builder) -> anyhow::Result<Self> {
        let (width, head_dim) = (dims.width, dims.head_dim());
        if dims.block == Block::Layered {
            bail_input!(
                "model.block is layered, but the transformer has residuals and an MLP of its own; leave it at post_norm"
            )
        }
        if !head_dim.is_multiple_of(2) {
            bail_input!(
                "model.width is {width} with {} heads, a head dim of {head_dim}: the transformer's rotary \
                 embedding needs an even one",
                dims.heads
            )
        }
        let norm = |name: &str, n: usize| builder.push(name).param("weight", &[n], Init::Const(1.0));
        let frequencies = inverse_frequencies(dims.rope_base, head_dim);
        Ok(Self {
            heads: dims.heads,
            head_dim,
            rope_base: dims.rope_base,
            window: dims.window,
            inv_freq: builder.push("rotary").buffer("inv_freq", &[head_dim / 2], Init::Values(frequencies)),
            q: Affine::new(builder, "q_proj", width, width),
            k: Affine::new(builder, "k_proj", width, width),
            v: Affine::new(builder, "v_proj", width, width),
            out: Affine::new(builder, "out_proj", width, width),
            q_norm: norm("q_norm", head_dim),
            k_norm: norm("k_norm", head_dim),
            out_norm: norm("out_norm", width),
            up: Affine::new(builder, "linear1", 8 * width, width),
            down: Affine::new(builder, "linear2", width, 4 * width),
            beta: builder.param("beta", &[1], Init::Const(1.0)),
        })
    }
}

/// Keys and values that the next piece of a sequence sees: its first timestep one less of what is here than its window
/// has.
pub(super) fn kept(window: Option<usize>, keys: usize) -> usize {
    window.map_or(keys, |window| keys.min((window - 1).max(1)))
}

/// Tells where attention goes, and how widely. q [B, T, ..] and k [B, S, ..] have all heads one behind the other; g
/// [B, S, H]: log forget gates.
pub(super) fn tell(
    call: &mut Call,
    heads: usize,
    [q, k]: [&Tensor; 2],
    g: Option<&Tensor>,
    scale: f64,
    window: Option<usize>,
) -> Result<()> {
    let steps = q.dim(1)?;
    for (i, kind) in [&ATTENTION, &ENTROPY].into_iter().enumerate() {
        let part = |q: Tensor, k: Tensor, g: Option<Tensor>| {
            let (shares, entropy) = attention(heads, &q, &k, g.as_ref(), scale, window)?;
            Ok([shares, entropy][i].clone())
        };
        match g {
            Some(g) => call.note(kind, steps, [q, k, g], |[q, k, g]| part(q, k, Some(g)))?,
            None => call.note(kind, steps, [q, k], |[q, k]| part(q, k, None))?,
        }
    }
    Ok(())
}

/// Of one sequence, in f32: the share of the attention at each age, [1, T, ages], mean over the heads, and its entropy
/// [1, T, H].
fn attention(
    heads: usize,
    q: &Tensor,
    k: &Tensor,
    g: Option<&Tensor>,
    scale: f64,
    window: Option<usize>,
) -> Result<(Tensor, Tensor)> {
    let (steps, keys) = (q.dim(1)?, k.dim(1)?);
    let dim = q.elem_count() / (steps * heads);
    let values = |x: &Tensor| x.flatten_all()?.to_vec1::<f32>();
    let (q, k) = (values(q)?, values(k)?);
    // What was forgotten up to each step, of every head.
    let mut sums = vec![0.0; keys * heads];
    for (i, g) in g.map(values).transpose()?.unwrap_or_default().into_iter().enumerate() {
        sums[i] = f64::from(g) + if i < heads { 0.0 } else { sums[i - heads] };
    }
    let row = |t: usize, h: usize| (t * heads + h) * dim..(t * heads + h + 1) * dim;
    // So many that a long sequence in pieces has the same in each.
    const AGES: usize = 16;
    let each: Vec<([f32; AGES], Vec<f32>)> = (0..steps)
        .into_par_iter()
        .map(|t| {
            let mut shares = [0.0; AGES];
            let last = keys - steps + t;
            let first = (last + 1).saturating_sub(window.unwrap_or(keys));
            let entropies = (0..heads).map(|h| {
                let query = &q[row(t, h)];
                let score = |s| {
                    let dot: f32 = query.iter().zip(&k[row(s, h)]).map(|(q, k)| q * k).sum();
                    f64::from(dot) * scale + sums[last * heads + h] - sums[s * heads + h]
                };
                let scores: Vec<f64> = (first..=last).map(score).collect();
                let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().map(|score| (score - most).exp()).sum();
                let mut entropy = 0.0;
                for (s, score) in (first..).zip(&scores) {
                    let log = score - most - total.ln();
                    entropy -= log.exp() * log;
                    shares[age(last - s).min(AGES - 1)] += (log.exp() / heads as f64) as f32;
                }
                entropy as f32
            });
            let entropies = entropies.collect();
            (shares, entropies)
        })
        .collect();
    let shares: Vec<f32> = each.iter().flat_map(|(shares, _)| *shares).collect();
    let entropies: Vec<f32> = each.into_iter().flat_map(|(_, entropies)| entropies).collect();
    let shares = Tensor::from_vec(shares, (1, steps, AGES), &Device::Cpu)?;
    Ok((shares, Tensor::from_vec(entropies, (1, steps, heads), &Device::Cpu)?))
}

impl Mixer for Transformer {
    fn forward(&self, x: &Tensor, call: &mut Call) -> Result<Tensor> {
        let (batch, steps, width) = x.dims3()?;
        let per_head = (batch, steps, self.heads, self.head_dim);
        let (past, offset) = (call.recall(0).zip(call.recall(1)), call.position);
        let q = qk_norm_rope(view(&self.q.forward(x)?, per_head), &self.q_norm, self.rope_base, offset)?;
        let k = qk_norm_rope(view(&self.k.forward(x)?, per_head), &self.k_norm, self.rope_base, offset)?;
        let v = self.v.forward(x)?;
        let (k, v) = match past {
            Some((past_k, past_v)) => (Tensor::cat(&[&past_k, &k], 1)?, Tensor::cat(&[&past_v, &v], 1)?),
            None => (k, v),
        };
        let scale = (self.head_dim as f64).powf(-0.5);
        tell(call, self.heads, [&q, &k], None, scale, self.window)?;
        let o = causal_attention(&q, &k, view(&v, k.shape()), scale, self.window)?;
        let keys = k.dim(1)?;
        let kept = kept(self.window, keys);
        call.keep(0, k.narrow(1, keys - kept, kept)?);
        call.keep(1, v.narrow(1, keys - kept, kept)?);
        let o = self.out.forward(view(&o, (batch, steps, width)))?;
        let h = add(x, &rms_norm(&o, &self.out_norm, RMS_EPS, RmsEps::Outside)?)?;
        // Added to what the product gave where that is read: its gradient needs no pass of its own.
        let bias = Some(Arg::from(&self.up.bias));
        let mut y = self.down.forward(&swiglu(&linear(&h, &self.up.weight, None)?, &self.beta, bias)?)?;
        if let Some(mask) = &call.dropout {
            y = dropout(&y, mask)?;
        }
        add(&h, &y)
    }

    fn check_weights(&self) -> anyhow::Result<()> {
        let loaded = self.inv_freq.value().to_dtype(candle_core::DType::F64)?.to_vec1::<f64>()?;
        let own = inverse_frequencies(self.rope_base, self.head_dim);
        if loaded.iter().zip(&own).any(|(a, b)| a.is_nan() || (a - b).abs() > 1e-4 * b) {
            bail_input!(
                "{} in the weights does not belong to model.rope_base {}",
                self.inv_freq.name(),
                self.rope_base
            )
        }
        Ok(())
    }
}
