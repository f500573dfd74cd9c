//! RetNet: multi-scale retention, linear attention whose heads each forget at a fixed rate.
//!
//! Sun et al., "Retentive network: a successor to transformer for large language models", arXiv 2307.08621,
//! equations 5 to 8. Parameters are those of `fla.layers.MultiScaleRetention` with `expand_k = 1`,
//! `expand_v = 2` and short convolutions.

use candle_core::{Device, Result, Tensor};

use super::mamba::NO_DECAY;
use super::output::{fused_norm, gate, norm_and_gate};
use super::{
    Builder, Call, Dims, Grain, Init, Kind, Mixer, Model, Param, Part, Rows, Scale, ShortConvs, Transition,
};
use crate::bail_input;
use crate::ops::attention::rope;
use crate::ops::linear::linear;
use crate::ops::ssd::ssd;
use crate::ops::view;

pub(super) const MODEL: Model = Model {
    name: "retnet",
    recurrence: |parts| match parts.decay {
        true => "S = gamma S + k^T v",
        false => "S = S + k^T v",
    },
    reference: "Sun et al. 2023, arXiv 2307.08621",
    build: |dims, builder| Ok(Box::new(RetNet::new(dims, builder)?)),
    state_size: |dims| Some(2 * dims.width * dims.head_dim()),
    grain: Some(Grain::Head),
    transition: Transition::Linear,
    input_dependent_decay: false,
    householders: |_| 0,
    decay: Part::On,
    output_gate: Part::On,
    short_conv: Part::On,
    negative_eigenvalues: Part::Never,
    delta_rule: Part::Never,
    qk_norm: Part::Never,
};

const DECAY: Kind =
    Kind { name: "decay", about: "gamma of each head, fixed", scale: Scale::Decay, rows: Rows::Head };

/// Base of the rotary embedding, as in fla.
const ROPE_BASE: f64 = 10_000.0;

struct RetNet {
    heads: usize,
    head_dim: usize,
    qkv: ShortConvs,
    gate: Option<Param>,
    norm: Param,
    out: Param,
    /// Retention is Mamba-2's recurrence with a step size that is always the scale of the outputs, K^-½, and a
    /// rate that makes the decay γ of it.
    step_bias: Param,
    rate: Param,
    skip: Param,
    /// γ of each head.
    decay: Option<Vec<f32>>,
}

impl RetNet {
    fn new(dims: &Dims, builder: &Builder) -> anyhow::Result<Self> {
        let (width, heads, head_dim) = (dims.width, dims.heads, dims.head_dim());
        if !head_dim.is_multiple_of(2) {
            bail_input!(
                "model.width is {width} with {heads} heads, a head dim of {head_dim}: retnet's rotary embedding needs \
                 an even one"
            )
        }
        let scale = (head_dim as f64).powf(-0.5);
        // log γ, of γ = 1 − 2^(−5−h).
        let log_decay = |h: usize| (-(-5.0 - h as f64).exp2()).ln_1p();
        // The values of a head are two of Mamba-2's heads.
        let halves = 2 * heads;
        let rates = (0..halves).map(|half| match dims.parts.decay {
            true => (-log_decay(half / 2) / scale).ln(),
            false => NO_DECAY,
        });
        let constant = |name: &str, init: Init| builder.constant(name, &[halves], init);
        Ok(Self {
            heads,
            head_dim,
            qkv: ShortConvs::new(builder, dims, [width, width, 2 * width], &[]),
            gate: gate(dims, builder),
            norm: fused_norm(dims, builder),
            out: builder.push("o_proj").param("weight", &[width, 2 * width], Init::linear(2 * width)),
            // The inverse of softplus.
            step_bias: constant("step_bias", Init::Const(scale + (-(-scale).exp_m1()).ln())),
            rate: constant("rate", Init::Values(rates.collect())),
            skip: constant("skip", Init::Const(0.0)),
            decay: dims.parts.decay.then(|| (0..heads).map(|h| log_decay(h).exp() as f32).collect()),
        })
    }
}

impl Mixer for RetNet {
    fn forward(&self, x: &Tensor, call: &mut Call) -> Result<Tensor> {
        let (batch, steps, _) = x.dims3()?;
        let (heads, head_dim) = (self.heads, self.head_dim);
        let keys = (batch, steps, heads, head_dim);
        let ([q, k, v], _) = self.qkv.forward(x, 0, call)?;
        let q = rope(view(&q, keys), ROPE_BASE, call.position)?;
        let k = rope(view(&k, keys), ROPE_BASE, call.position)?;
        let v = view(&v, (batch, steps, 2 * heads, head_dim));
        if let Some(decay) = &self.decay {
            let rows = Tensor::from_slice(decay, (1, 1, heads), &Device::Cpu)?;
            call.note(&DECAY, steps, [&rows], |[decay]| decay.broadcast_as((1, steps, heads)))?;
        }
        let dt = Tensor::zeros((batch, steps, 2 * heads), x.dtype(), x.device())?;
        let (o, state) = ssd(v, &dt, &self.rate, &k, &q, &self.skip, &self.step_bias, call.recall_arg(1))?;
        call.keep(1, state);
        linear(&norm_and_gate(&o, x, &self.norm, self.gate.as_ref(), call)?, &self.out, None)
    }
}
