//! Gated DeltaNet: the delta rule with a decay of the whole state before each write.
//!
//! Yang, Kautz and Hatamizadeh, "Gated delta networks: improving Mamba2 with delta rule",
//! arXiv 2412.06464, equation 10. Parameters are those of `fla.layers.GatedDeltaNet` with
//! `head_dim = width / heads` and `expand_v = 2`.

use candle_core::{Result, Tensor};

use super::output::{gate, norm_and_gate};
use super::{
    Builder, Call, Dims, Grain, Init, Kind, Mixer, Model, Param, Part, Rows, Scale, ShortConvs, Transition,
};
use crate::ops::delta::{gated_delta_rule, gated_sum_rule};
use crate::ops::gates::{decay_gate, sigmoid};
use crate::ops::l2norm::l2norm;
use crate::ops::linear::linear;
use crate::ops::{Arg, view};

pub(super) const MODEL: Model = Model {
    name: "gated_delta_net",
    recurrence: super::delta_net::MODEL.recurrence,
    reference: "Yang et al. 2024, arXiv 2412.06464",
    build: |dims, builder| Ok(Box::new(GatedDelta::new(dims, builder, 1))),
    state_size: |dims| Some(2 * dims.width * dims.head_dim()),
    grain: Some(Grain::Head),
    transition: Transition::Linear,
    input_dependent_decay: true,
    householders: |_| 1,
    decay: Part::On,
    output_gate: Part::On,
    short_conv: Part::On,
    negative_eigenvalues: Part::Off,
    delta_rule: Part::On,
    qk_norm: Part::Never,
};

const ALPHA: Kind =
    Kind { name: "alpha", about: "decay of each head", scale: Scale::Decay, rows: Rows::Head };
const BETA: Kind = Kind {
    name: "beta",
    about: "write strength of each head and Householder step",
    scale: Scale::Linear,
    rows: Rows::Head,
};
/// The layer of DeltaNet (without decay and output gate), Gated DeltaNet, and Gated DeltaProduct (several
/// Householder steps a token).
pub(super) struct GatedDelta {
    heads: usize,
    head_dim: usize,
    /// Householder steps a token.
    steps: usize,
    /// beta is this times a sigmoid: 2 lets the transition have negative eigenvalues.
    beta_scale: f64,
    /// The delta rule, or else the sum rule: linear attention with write strengths.
    delta_rule: bool,
    /// With the projections of beta and of the decay.
    qkv: ShortConvs,
    decay: Option<Decay>,
    gate: Option<Param>,
    norm: Param,
    out: Param,
}

/// Where the log decay comes from.
struct Decay {
    a_log: Param,
    dt_bias: Param,
}

impl GatedDelta {
    pub(super) fn new(dims: &Dims, builder: &Builder, steps: usize) -> Self {
        let (width, heads) = (dims.width, dims.heads);
        let weight = |name: &str, rows: usize, columns: usize| {
            builder.push(name).param("weight", &[rows, columns], Init::linear(columns))
        };
        Self {
            heads,
            head_dim: dims.head_dim(),
            steps,
            delta_rule: dims.parts.delta_rule,
            beta_scale: if dims.parts.negative_eigenvalues { 2.0 } else { 1.0 },
            qkv: {
                let beta = weight("b_proj", steps * heads, width);
                let decay = dims.parts.decay.then(|| weight("a_proj", heads, width));
                let plain: Vec<&Param> = [&beta].into_iter().chain(&decay).collect();
                ShortConvs::new(builder, dims, [width, steps * width, 2 * steps * width], &plain)
            },
            decay: dims.parts.decay.then(|| Decay {
                a_log: builder.param("A_log", &[heads], Init::LogUniform(0.0, 16.0)),
                dt_bias: builder.param("dt_bias", &[heads], Init::step_size()),
            }),
            gate: gate(dims, builder),
            norm: builder.push("o_norm").param("weight", &[2 * dims.head_dim()], Init::Const(1.0)),
            out: weight("o_proj", width, 2 * width),
        }
    }
}

impl Mixer for GatedDelta {
    fn forward(&self, x: &Tensor, call: &mut Call) -> Result<Tensor> {
        let (batch, t, _) = x.dims3()?;
        let (heads, k_dim, n) = (self.heads, self.head_dim, self.steps);
        // A token's Householder steps stand one after the other: [B, T, n, H, ..] is [B, T n, H, ..].
        let ([q, k, v], plain) = self.qkv.forward(x, 0, call)?;
        let q = l2norm(view(&q, (batch, t, heads, k_dim)))?;
        let k = l2norm(view(&k, (batch, t * n, heads, k_dim)))?;
        let v = view(&v, (batch, t * n, heads, 2 * k_dim));
        let beta = sigmoid(view(&plain[0], (batch, t * n, heads)), self.beta_scale)?;
        let g = match &self.decay {
            None => None,
            Some(Decay { a_log, dt_bias }) => {
                let g = decay_gate(&plain[1], a_log, dt_bias)?;
                call.note(&ALPHA, t, [&g], |[g]| g.exp())?;
                Some(g)
            }
        };
        call.note(&BETA, t, [&beta], |[beta]| beta.reshape((batch, t, n, heads))?.transpose(2, 3))?;
        let scale = (k_dim as f64).powf(-0.5);
        let (g, state) = (g.map(Arg::Tensor), call.recall_arg(1));
        let (o, state) = match self.delta_rule {
            true => gated_delta_rule(&q, &k, v, &beta, g, scale, state)?,
            false => gated_sum_rule(&q, &k, v, &beta, g, scale, state)?,
        };
        call.keep(1, state);
        linear(&norm_and_gate(&o, x, &self.norm, self.gate.as_ref(), call)?, &self.out, None)
    }
}
