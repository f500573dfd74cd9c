//! Gated linear attention: one log decay per key channel.
//!
//! Yang et al., "Gated linear attention transformers with hardware-efficient training",
//! arXiv 2312.06635, section 4. Parameters are those of `fla.layers.GatedLinearAttention` with
//! `expand_k = 1`, `expand_v = 2` and short convolutions.

use candle_core::{Result, Tensor};

use super::{Builder, Call, Dims, Init, Kind, Mixer, Model, Param, Rows, Scale, ShortConv};
use crate::ops::gates::log_sigmoid;
use crate::ops::gla::gla;
use crate::ops::linear::linear;
use crate::ops::norms::{GateOrder, gated_rms_norm};
use crate::ops::{Arg, view};

/// The gate's logarithm is divided by this, so that states begin long-lived.
const GATE_DIVISOR: f64 = 16.0;
const GATE_RANK: usize = 16;

pub(super) const MODEL: Model = Model {
    name: "gla",
    recurrence: "S = diag(exp g) S + k^T v",
    reference: "Yang et al. 2023, arXiv 2312.06635",
    build: |dims, builder| Ok(Box::new(Gla::new(dims, builder))),
    state_size: |dims| Some(2 * dims.width * dims.head_dim()),
};

const DECAY: Kind =
    Kind { name: "decay", about: "exp(g), of each key channel", scale: Scale::Decay, rows: Rows::Head };
const OUTPUT_GATE: Kind = Kind {
    name: "output_gate",
    about: "silu(gate), what the output is multiplied with",
    scale: Scale::Linear,
    rows: Rows::Layer,
};

struct Gla {
    heads: usize,
    head_dim: usize,
    q: ShortConv,
    k: ShortConv,
    v: ShortConv,
    gate: Param,
    decay_down: Param,
    decay_up: Param,
    decay_bias: Param,
    norm: Param,
    out: Param,
}

impl Gla {
    fn new(dims: &Dims, builder: &Builder) -> Self {
        let width = dims.width;
        let decay = builder.push("gk_proj");
        let up = decay.push(1);
        Self {
            heads: dims.heads,
            head_dim: dims.head_dim(),
            q: ShortConv::new(builder, "q", dims, width),
            k: ShortConv::new(builder, "k", dims, width),
            v: ShortConv::new(builder, "v", dims, 2 * width),
            gate: builder.push("g_proj").param("weight", &[2 * width, width], Init::linear(width)),
            decay_down: decay.push(0).param("weight", &[GATE_RANK, width], Init::linear(width)),
            decay_up: up.param("weight", &[width, GATE_RANK], Init::linear(GATE_RANK)),
            decay_bias: up.param("bias", &[width], Init::linear(GATE_RANK)),
            norm: builder.push("g_norm_swish_gate").param("weight", &[2 * dims.head_dim()], Init::Const(1.0)),
            out: builder.push("o_proj").param("weight", &[width, 2 * width], Init::linear(2 * width)),
        }
    }
}

impl Mixer for Gla {
    fn forward(&self, x: &Tensor, call: &mut Call) -> Result<Tensor> {
        let (batch, steps, width) = x.dims3()?;
        let keys = (batch, steps, self.heads, self.head_dim);
        let q = view(&self.q.forward(x, 0, call)?, keys);
        let k = view(&self.k.forward(x, 1, call)?, keys);
        let v = view(&self.v.forward(x, 2, call)?, (batch, steps, self.heads, 2 * self.head_dim));
        let decay = linear(x, &self.decay_down, None)?;
        let decay = linear(&decay, &self.decay_up, Some(Arg::from(&self.decay_bias)))?;
        let decay = log_sigmoid(&decay, GATE_DIVISOR)?;
        call.note(&DECAY, steps, [&decay], |[g]| g.reshape(keys)?.exp())?;
        let scale = (self.head_dim as f64).powf(-0.5);
        let (o, state) = gla(q, k, v, view(&decay, keys), scale, call.recall_arg(3))?;
        call.keep(3, state);
        let o = view(&o, (batch, steps, 2 * width));
        let gate = linear(x, &self.gate, None)?;
        call.note(&OUTPUT_GATE, steps, [&gate], |[gate]| gate.silu()?.unsqueeze(2))?;
        linear(&gated_rms_norm(o, &gate, &self.norm, 1e-5, GateOrder::AfterNorm)?, &self.out, None)
    }
}
