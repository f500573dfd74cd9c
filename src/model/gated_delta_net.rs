//! Gated DeltaNet: the delta rule with a decay of the whole state before each write.
//!
//! Yang, Kautz and Hatamizadeh, "Gated delta networks: improving Mamba2 with delta rule",
//! arXiv 2412.06464, equation 10. Parameters are those of `fla.layers.GatedDeltaNet` with
//! `head_dim = width / heads` and `expand_v = 2`.

use candle_core::{Result, Tensor};

use super::{Builder, Call, Dims, Init, Kind, Mixer, Model, Param, Rows, Scale, ShortConv};
use crate::ops::delta::gated_delta_rule;
use crate::ops::gates::{decay_gate, sigmoid};
use crate::ops::l2norm::l2norm;
use crate::ops::linear::linear;
use crate::ops::norms::{GateOrder, gated_rms_norm};
use crate::ops::{Arg, view};

pub(super) const MODEL: Model = Model {
    name: "gated_delta_net",
    recurrence: "S = a (I - beta k^T k) S + beta k^T v",
    reference: "Yang et al. 2024, arXiv 2412.06464",
    build: |dims, builder| Ok(Box::new(GatedDelta::new(dims, builder, 1, 1.0))),
    state_size: |dims| Some(2 * dims.width * dims.head_dim()),
};

const ALPHA: Kind =
    Kind { name: "alpha", about: "decay of each head", scale: Scale::Decay, rows: Rows::Head };
const BETA: Kind = Kind {
    name: "beta",
    about: "write strength of each head and Householder step",
    scale: Scale::Linear,
    rows: Rows::Head,
};
const OUTPUT_GATE: Kind = Kind {
    name: "output_gate",
    about: "silu(gate), what the output is multiplied with",
    scale: Scale::Linear,
    rows: Rows::Layer,
};

/// The layer of both Gated DeltaNet (one Householder step a token, beta up to 1) and Gated DeltaProduct.
pub(super) struct GatedDelta {
    heads: usize,
    head_dim: usize,
    /// Householder steps a token.
    steps: usize,
    /// beta is this times a sigmoid: 2 lets the transition have negative eigenvalues.
    beta_scale: f64,
    q: ShortConv,
    k: ShortConv,
    v: ShortConv,
    beta: Param,
    decay: Param,
    a_log: Param,
    dt_bias: Param,
    gate: Param,
    norm: Param,
    out: Param,
}

impl GatedDelta {
    pub(super) fn new(dims: &Dims, builder: &Builder, steps: usize, beta_scale: f64) -> Self {
        let (width, heads) = (dims.width, dims.heads);
        let weight = |name: &str, rows: usize, columns: usize| {
            builder.push(name).param("weight", &[rows, columns], Init::linear(columns))
        };
        Self {
            heads,
            head_dim: dims.head_dim(),
            steps,
            beta_scale,
            q: ShortConv::new(builder, "q", dims, width),
            k: ShortConv::new(builder, "k", dims, steps * width),
            v: ShortConv::new(builder, "v", dims, 2 * steps * width),
            beta: weight("b_proj", steps * heads, width),
            decay: weight("a_proj", heads, width),
            a_log: builder.param("A_log", &[heads], Init::LogUniform(0.0, 16.0)),
            dt_bias: builder.param("dt_bias", &[heads], Init::step_size()),
            gate: weight("g_proj", 2 * width, width),
            norm: builder.push("o_norm").param("weight", &[2 * dims.head_dim()], Init::Const(1.0)),
            out: weight("o_proj", width, 2 * width),
        }
    }
}

impl Mixer for GatedDelta {
    fn forward(&self, x: &Tensor, call: &mut Call) -> Result<Tensor> {
        let (batch, t, width) = x.dims3()?;
        let (heads, k_dim, n) = (self.heads, self.head_dim, self.steps);
        // A token's Householder steps stand one after the other: [B, T, n, H, ..] is [B, T n, H, ..].
        let q = l2norm(view(&self.q.forward(x, 0, call)?, (batch, t, heads, k_dim)))?;
        let k = l2norm(view(&self.k.forward(x, 1, call)?, (batch, t * n, heads, k_dim)))?;
        let v = view(&self.v.forward(x, 2, call)?, (batch, t * n, heads, 2 * k_dim));
        let beta = linear(x, &self.beta, None)?;
        let beta = sigmoid(view(&beta, (batch, t * n, heads)), self.beta_scale)?;
        let g = decay_gate(&linear(x, &self.decay, None)?, &self.a_log, &self.dt_bias)?;
        call.note(&ALPHA, t, [&g], |[g]| g.exp())?;
        call.note(&BETA, t, [&beta], |[beta]| beta.reshape((batch, t, n, heads))?.transpose(2, 3))?;
        let scale = (k_dim as f64).powf(-0.5);
        let (o, state) = gated_delta_rule(&q, &k, v, &beta, Some(Arg::from(&g)), scale, call.recall_arg(3))?;
        call.keep(3, state);
        let o = view(&o, (batch, t, 2 * width));
        let gate = linear(x, &self.gate, None)?;
        call.note(&OUTPUT_GATE, t, [&gate], |[gate]| gate.silu()?.unsqueeze(2))?;
        linear(&gated_rms_norm(o, &gate, &self.norm, 1e-5, GateOrder::AfterNorm)?, &self.out, None)
    }
}
