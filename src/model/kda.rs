//! Kimi delta attention: the delta rule with a decay of every key channel.
//!
//! Kimi Team, "Kimi Linear: an expressive, efficient attention architecture", arXiv 2510.26692, equation 1 and
//! section 4. Parameters are those of `fla.layers.KimiDeltaAttention` with `head_dim = width / heads` and, as in the
//! paper, values as wide as keys (`expand_v = 1`). `dt_bias` begins as Mamba-2's, not at zero.

use candle_core::{DType, Result, Tensor};

use super::{
    Builder, Call, Dims, Grain, Init, Kind, Mixer, Model, Param, Part, Rows, Scale, ShortConvs, Transition,
};
use crate::ops::dplr::dplr;
use crate::ops::gates::sigmoid;
use crate::ops::kda::{kda_gate, kda_keys};
use crate::ops::l2norm::l2norm;
use crate::ops::linear::linear;
use crate::ops::norms::{GateOrder, RmsEps, gated_rms_norm, rms_norm};
use crate::ops::{Arg, view};

pub(super) const MODEL: Model = Model {
    name: "kda",
    recurrence: |parts| match parts.decay {
        true => "S = (I - b k^T k) diag(exp g) S + b k^T v",
        false => "S = (I - b k^T k) S + b k^T v",
    },
    reference: "Kimi Team 2025, arXiv 2510.26692",
    build: |dims, builder| Ok(Box::new(Kda::new(dims, builder))),
    state_size: |dims| Some(dims.width * dims.head_dim()),
    grain: Some(Grain::KeyChannel),
    transition: Transition::Linear,
    input_dependent_decay: true,
    householders: |_| 1,
    decay: Part::On,
    output_gate: Part::On,
    short_conv: Part::On,
    negative_eigenvalues: Part::Off,
    delta_rule: Part::Always,
    qk_norm: Part::Never,
};

const DECAY: Kind =
    Kind { name: "decay", about: "exp(g), of each key channel", scale: Scale::Decay, rows: Rows::Head };
const BETA: Kind =
    Kind { name: "beta", about: "b, write strength of each head", scale: Scale::Linear, rows: Rows::Head };
const OUTPUT_GATE: Kind = Kind {
    name: "output_gate",
    about: "sigma(gate), what the output is multiplied with",
    scale: Scale::Linear,
    rows: Rows::Layer,
};

struct Kda {
    heads: usize,
    head_dim: usize,
    /// beta is this times a sigmoid: 2 lets the transition have negative eigenvalues.
    beta_scale: f64,
    /// With the projection of beta, and the first halves of those of the decay and of the gate.
    qkv: ShortConvs,
    decay: Option<Decay>,
    gate: Option<Gate>,
    norm: Param,
    out: Param,
}

/// Where the log decay comes from.
struct Decay {
    up: Param,
    a_log: Param,
    dt_bias: Param,
}

/// Where the output gate comes from.
struct Gate {
    up: Param,
    bias: Param,
}

impl Kda {
    fn new(dims: &Dims, builder: &Builder) -> Self {
        let (width, heads, rank) = (dims.width, dims.heads, dims.head_dim());
        let weight = |name: &str, rows: usize, columns: usize| {
            builder.push(name).param("weight", &[rows, columns], Init::linear(columns))
        };
        let qkv = {
            let beta = weight("b_proj", heads, width);
            let decay = dims.parts.decay.then(|| weight("f_proj.0", rank, width));
            let gate = dims.parts.output_gate.then(|| weight("g_proj.0", rank, width));
            let plain: Vec<&Param> = [&beta].into_iter().chain(&decay).chain(&gate).collect();
            ShortConvs::new(builder, dims, [width; 3], &plain)
        };
        Self {
            heads,
            head_dim: rank,
            beta_scale: if dims.parts.negative_eigenvalues { 2.0 } else { 1.0 },
            qkv,
            decay: dims.parts.decay.then(|| Decay {
                up: weight("f_proj.1", width, rank),
                a_log: builder.param("A_log", &[heads], Init::LogUniform(1.0, 16.0)),
                dt_bias: builder.param("dt_bias", &[width], Init::step_size()),
            }),
            gate: dims.parts.output_gate.then(|| Gate {
                up: weight("g_proj.1", width, rank),
                bias: builder.push("g_proj.1").param("bias", &[width], Init::linear(rank)),
            }),
            norm: builder.push("o_norm").param("weight", &[rank], Init::Const(1.0)),
            out: weight("o_proj", width, width),
        }
    }
}

impl Mixer for Kda {
    fn forward(&self, x: &Tensor, call: &mut Call) -> Result<Tensor> {
        let (batch, steps, width) = x.dims3()?;
        let rows = (batch, steps, self.heads, self.head_dim);
        let ([q, k, v], plain) = self.qkv.forward(x, 0, call)?;
        let mut plain = plain.into_iter();
        let mut next = || plain.next().expect("as many as were declared");
        let (q, k) = (l2norm(view(&q, rows))?, l2norm(view(&k, rows))?);
        let beta = sigmoid(&next(), self.beta_scale)?;
        call.note(&BETA, steps, [&beta], |[beta]| Ok(beta))?;
        let g = match &self.decay {
            // The log of a decay that keeps everything.
            None => {
                let dtype = if x.dtype() == DType::BF16 { DType::F32 } else { x.dtype() };
                Tensor::zeros(rows, dtype, x.device())?
            }
            Some(Decay { up, a_log, dt_bias }) => {
                let f = linear(&next(), up, None)?;
                let g = kda_gate(view(&f, rows), a_log, dt_bias)?;
                call.note(&DECAY, steps, [&g], |[g]| g.exp())?;
                g
            }
        };
        let [read, write] = kda_keys(&k, &g, &beta)?;
        let scale = (self.head_dim as f64).powf(-0.5);
        let (o, state) = dplr(&q, &write, view(&v, rows), &g, &read, &write, scale, call.recall_arg(1))?;
        call.keep(1, state);
        let o = view(&o, (batch, steps, width));
        let o = match &self.gate {
            None => rms_norm(o, &self.norm, 1e-5, RmsEps::Inside)?,
            Some(Gate { up, bias }) => {
                let gate = linear(&next(), up, Some(Arg::from(bias)))?;
                call.note(&OUTPUT_GATE, steps, [&gate], |[gate]| {
                    ((gate.neg()?.exp()? + 1.0)?.recip())?.unsqueeze(2)
                })?;
                gated_rms_norm(o, &gate, &self.norm, 1e-5, GateOrder::SigmoidAfterNorm)?
            }
        };
        linear(&o, &self.out, None)
    }
}
