//! Mamba-2: state space duality, one scalar decay per head.
//!
//! Dao and Gu, "Transformers are SSMs", arXiv 2405.21060, section 7. Parameters are those of
//! `mamba_ssm.Mamba2` with `expand = 2`, one group, and a head dim of width / heads.

use candle_core::{Result, Tensor};

use super::mamba::NO_DECAY;
use super::notes::softplus;
use super::{
    Builder, Call, Conv, Dims, Grain, Init, Kind, Mixer, Model, Param, Part, Rows, Scale, Transition,
};
use crate::ops::linear::linear;
use crate::ops::norms::{GateOrder, RmsEps, gated_rms_norm, rms_norm};
use crate::ops::ssd::ssd;
use crate::ops::view;

pub(super) const MODEL: Model = Model {
    name: "mamba2",
    recurrence: |parts| match parts.decay {
        true => "S = exp(dt a) S + dt B^T x",
        false => "S = S + dt B^T x",
    },
    reference: "Dao and Gu 2024, arXiv 2405.21060",
    build: |dims, builder| Ok(Box::new(Mamba2::new(dims, builder))),
    state_size: |dims| Some(2 * dims.width * dims.state),
    grain: Some(Grain::Head),
    transition: Transition::Linear,
    input_dependent_decay: true,
    householders: |_| 0,
    decay: Part::On,
    output_gate: Part::On,
    short_conv: Part::On,
    negative_eigenvalues: Part::Never,
    delta_rule: Part::Never,
    qk_norm: Part::Never,
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

struct Mamba2 {
    heads: usize,
    head_dim: usize,
    state: usize,
    z: Option<Param>,
    /// x, B, C and the step size.
    xbc_dt: Param,
    conv: Conv,
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
        // The rows of the gate come first.
        let gate = if dims.parts.output_gate { inner } else { 0 };
        let in_proj = in_proj.param("weight", &[gate + inner + 2 * n + heads, width], Init::linear(width));
        let conv = Conv::new(&builder.push("conv1d"), dims, inner + 2 * n, true);
        Self {
            heads,
            head_dim: dims.head_dim(),
            state: n,
            z: dims.parts.output_gate.then(|| in_proj.rows(0, inner)),
            xbc_dt: in_proj.rows(gate, inner + 2 * n + heads),
            conv,
            dt_bias: builder.param("dt_bias", &[heads], Init::step_size()),
            a_log: match dims.parts.decay {
                true => builder.param("A_log", &[heads], Init::LogUniform(1.0, 16.0)),
                false => builder.constant("A_log", &[heads], Init::Const(NO_DECAY)),
            },
            d: builder.param("D", &[heads], Init::Const(1.0)),
            norm: builder.push("norm").param("weight", &[inner], Init::Const(1.0)),
            out: builder.push("out_proj").param("weight", &[width, inner], Init::linear(inner)),
        }
    }
}

impl Mixer for Mamba2 {
    fn forward(&self, u: &Tensor, call: &mut Call) -> Result<Tensor> {
        let (batch, steps, width) = u.dims3()?;
        let widths = [2 * width, self.state, self.state];
        let projected = linear(u, &self.xbc_dt, None)?;
        let ([x, b, c], plain) = self.conv.split(&projected, widths, &[self.heads], 0, call)?;
        let x = view(&x, (batch, steps, self.heads, self.head_dim));
        let [b, c] = [b, c].map(|y| view(&y, (batch, steps, 1, self.state)));
        let dt = &plain[0];
        let (bias, a_log) = (self.dt_bias.value(), self.a_log.value());
        let step = |dt: &Tensor, bias: &Tensor| softplus(&dt.broadcast_add(bias)?);
        call.note(&DT, steps, [dt, &bias], |[dt, bias]| step(&dt, &bias))?;
        if self.a_log.trained() {
            call.note(&DECAY, steps, [dt, &bias, &a_log], |[dt, bias, a_log]| {
                step(&dt, &bias)?.broadcast_mul(&a_log.exp()?)?.neg()?.exp()
            })?;
        }
        let (y, state) = ssd(x, dt, &self.a_log, b, c, &self.d, &self.dt_bias, call.recall_arg(1))?;
        call.keep(1, state);
        let y = view(&y, (batch, steps, 2 * width));
        let y = match &self.z {
            None => rms_norm(y, &self.norm, 1e-5, RmsEps::Inside)?,
            Some(z) => {
                let z = linear(u, z, None)?;
                call.note(&OUTPUT_GATE, steps, [&z], |[z]| z.silu()?.unsqueeze(2))?;
                gated_rms_norm(y, &z, &self.norm, 1e-5, GateOrder::BeforeNorm)?
            }
        };
        linear(&y, &self.out, None)
    }
}
