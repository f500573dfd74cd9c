//! Mamba-2: state space duality, one scalar decay per head.
//!
//! Dao and Gu, "Transformers are SSMs", arXiv 2405.21060, section 7. Parameters are those of
//! `mamba_ssm.Mamba2` with `expand = 2`, one group, and a head dim of width / heads.

use candle_core::{Result, Tensor};

use super::notes::softplus;
use super::{Builder, Call, Dims, Init, Kind, Mixer, Model, Param, Rows, Scale};
use crate::ops::causal_conv1d::causal_conv1d_silu;
use crate::ops::linear::linear;
use crate::ops::norms::{GateOrder, gated_rms_norm};
use crate::ops::ssd::ssd;
use crate::ops::{Arg, view};

pub(super) const MODEL: Model = Model {
    name: "mamba2",
    recurrence: "S = exp(dt a) S + dt B^T x",
    reference: "Dao and Gu 2024, arXiv 2405.21060",
    build: |dims, builder| Ok(Box::new(Mamba2::new(dims, builder))),
    state_size: |dims| Some(2 * dims.width * dims.state),
};

const DT: Kind = Kind { name: "dt", about: "step size of each head", scale: Scale::Log, rows: Rows::Head };
const DECAY: Kind =
    Kind { name: "decay", about: "exp(dt a), of each head", scale: Scale::Decay, rows: Rows::Head };
const OUTPUT_GATE: Kind = Kind {
    name: "output_gate",
    about: "silu(z), what the output is multiplied with",
    scale: Scale::Linear,
    rows: Rows::Layer,
};

/// One part of the fused input projection with its share of the convolution.
struct Part {
    proj: Param,
    conv_weight: Param,
    conv_bias: Param,
}

struct Mamba2 {
    heads: usize,
    head_dim: usize,
    state: usize,
    z: Param,
    x: Part,
    b: Part,
    c: Part,
    dt: Param,
    dt_bias: Param,
    a_log: Param,
    d: Param,
    norm: Param,
    out: Param,
}

impl Mamba2 {
    fn new(dims: &Dims, builder: &Builder) -> Self {
        let (width, n, inner) = (dims.width, dims.state, 2 * dims.width);
        let heads = 2 * dims.heads;
        let in_proj = builder.push("in_proj");
        let in_proj = in_proj.param("weight", &[2 * inner + 2 * n + heads, width], Init::linear(width));
        let conv = builder.push("conv1d");
        let conv_weight = conv.param("weight", &[inner + 2 * n, 1, dims.conv], Init::linear(dims.conv));
        let conv_bias = conv.param("bias", &[inner + 2 * n], Init::linear(dims.conv));
        // The convolution is depthwise: each part can have its own rows of it.
        let part = |start: usize, len: usize| Part {
            proj: in_proj.rows(inner + start, len),
            conv_weight: conv_weight.rows(start, len),
            conv_bias: conv_bias.rows(start, len),
        };
        Self {
            heads,
            head_dim: dims.head_dim(),
            state: n,
            z: in_proj.rows(0, inner),
            x: part(0, inner),
            b: part(inner, n),
            c: part(inner + n, n),
            dt: in_proj.rows(2 * inner + 2 * n, heads),
            dt_bias: builder.param("dt_bias", &[heads], Init::step_size()),
            a_log: builder.param("A_log", &[heads], Init::LogUniform(1.0, 16.0)),
            d: builder.param("D", &[heads], Init::Const(1.0)),
            norm: builder.push("norm").param("weight", &[inner], Init::Const(1.0)),
            out: builder.push("out_proj").param("weight", &[width, inner], Init::linear(inner)),
        }
    }
}

impl Mixer for Mamba2 {
    fn forward(&self, u: &Tensor, call: &mut Call) -> Result<Tensor> {
        let (batch, steps, width) = u.dims3()?;
        let mut part = |slot: usize, part: &Part| -> Result<Tensor> {
            let (y, tail) = causal_conv1d_silu(
                &linear(u, &part.proj, None)?,
                &part.conv_weight,
                Some(Arg::from(&part.conv_bias)),
                call.recall_arg(slot),
            )?;
            call.keep(slot, tail);
            Ok(y)
        };
        let x = view(&part(0, &self.x)?, (batch, steps, self.heads, self.head_dim));
        let b = view(&part(1, &self.b)?, (batch, steps, 1, self.state));
        let c = view(&part(2, &self.c)?, (batch, steps, 1, self.state));
        let dt = linear(u, &self.dt, None)?;
        let (bias, a_log) = (self.dt_bias.value(), self.a_log.value());
        let step = |dt: &Tensor, bias: &Tensor| softplus(&dt.broadcast_add(bias)?);
        call.note(&DT, steps, [&dt, &bias], |[dt, bias]| step(&dt, &bias))?;
        call.note(&DECAY, steps, [&dt, &bias, &a_log], |[dt, bias, a_log]| {
            step(&dt, &bias)?.broadcast_mul(&a_log.exp()?)?.neg()?.exp()
        })?;
        let (y, state) = ssd(x, &dt, &self.a_log, b, c, &self.d, &self.dt_bias, call.recall_arg(3))?;
        call.keep(3, state);
        let y = view(&y, (batch, steps, 2 * width));
        let z = linear(u, &self.z, None)?;
        call.note(&OUTPUT_GATE, steps, [&z], |[z]| z.silu()?.unsqueeze(2))?;
        let y = gated_rms_norm(y, &z, &self.norm, 1e-5, GateOrder::BeforeNorm)?;
        linear(&y, &self.out, None)
    }
}
