//! Mamba: a selective state space model with a diagonal transition per channel.
//!
//! Gu and Dao, "Mamba: linear-time sequence modeling with selective state spaces", arXiv 2312.00752,
//! algorithm 2. Parameters are those of `mamba_ssm.Mamba` with `expand = 2`.

use candle_core::{Result, Tensor};

use super::notes::softplus;
use super::{
    Builder, Call, Conv, Dims, Grain, Init, Kind, Mixer, Model, Param, Part, Rows, Scale, Transition,
};
use crate::ops::Arg;
use crate::ops::linear::linear;
use crate::ops::selective_scan::selective_scan;

pub(super) const MODEL: Model = Model {
    name: "mamba",
    recurrence: |parts| match parts.decay {
        true => "h = exp(dt A) . h + dt B x",
        false => "h = h + dt B x",
    },
    reference: "Gu and Dao 2023, arXiv 2312.00752",
    build: |dims, builder| Ok(Box::new(Mamba::new(dims, builder))),
    state_size: |dims| Some(2 * dims.width * dims.state),
    grain: Some(Grain::State),
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

const DT: Kind =
    Kind { name: "dt", about: "step size of each channel", scale: Scale::Log, rows: Rows::Layer };
const DECAY: Kind = Kind {
    name: "decay",
    about: "exp(dt A) of each state, mean over channels",
    scale: Scale::Decay,
    rows: Rows::State,
};
const OUTPUT_GATE: Kind = Kind {
    name: "output_gate",
    about: "silu(z), what the output is multiplied with",
    scale: Scale::Linear,
    rows: Rows::Layer,
};

/// Stands in for `A_log` without a decay: A = −exp(−1000) is 0 in every number format, and exp(Δ A) is 1.
pub(super) const NO_DECAY: f64 = -1000.0;

struct Mamba {
    in_x: Param,
    in_z: Option<Param>,
    conv: Conv,
    x_proj_dt: Param,
    x_proj_b: Param,
    x_proj_c: Param,
    dt_weight: Param,
    dt_bias: Param,
    a_log: Param,
    d: Param,
    out: Param,
}

impl Mamba {
    fn new(dims: &Dims, builder: &Builder) -> Self {
        let (width, n, inner) = (dims.width, dims.state, 2 * dims.width);
        let rank = width.div_ceil(16);
        let rows = if dims.parts.output_gate { 2 * inner } else { inner };
        let in_proj = builder.push("in_proj").param("weight", &[rows, width], Init::linear(width));
        let conv = Conv::new(&builder.push("conv1d"), dims, inner, true);
        let x_proj = builder.push("x_proj").param("weight", &[rank + 2 * n, inner], Init::linear(inner));
        let dt_proj = builder.push("dt_proj");
        Self {
            in_x: in_proj.rows(0, inner),
            in_z: dims.parts.output_gate.then(|| in_proj.rows(inner, inner)),
            conv,
            x_proj_dt: x_proj.rows(0, rank),
            x_proj_b: x_proj.rows(rank, n),
            x_proj_c: x_proj.rows(rank + n, n),
            dt_weight: dt_proj.param("weight", &[inner, rank], Init::linear(rank)),
            dt_bias: dt_proj.param("bias", &[inner], Init::step_size()),
            a_log: match dims.parts.decay {
                true => builder.param("A_log", &[inner, n], Init::LogArange),
                false => builder.constant("A_log", &[inner, n], Init::Const(NO_DECAY)),
            },
            d: builder.param("D", &[inner], Init::Const(1.0)),
            out: builder.push("out_proj").param("weight", &[width, inner], Init::linear(inner)),
        }
    }
}

impl Mixer for Mamba {
    fn forward(&self, u: &Tensor, call: &mut Call) -> Result<Tensor> {
        let (_, steps, _) = u.dims3()?;
        let z = self.in_z.as_ref().map(|z| linear(u, z, None)).transpose()?;
        let x = self.conv.forward(&linear(u, &self.in_x, None)?, 0, call)?;
        let dt = linear(&linear(&x, &self.x_proj_dt, None)?, &self.dt_weight, None)?;
        let b = linear(&x, &self.x_proj_b, None)?;
        let c = linear(&x, &self.x_proj_c, None)?;
        let (bias, a_log) = (self.dt_bias.value(), self.a_log.value());
        let step = |dt: &Tensor, bias: &Tensor| softplus(&dt.broadcast_add(bias)?);
        call.note(&DT, steps, [&dt, &bias], |[dt, bias]| step(&dt, &bias)?.unsqueeze(2))?;
        if self.a_log.trained() {
            call.note(&DECAY, steps, [&dt, &bias, &a_log], |[dt, bias, a_log]| {
                let (step, rates) = (step(&dt, &bias)?, a_log.exp()?.neg()?);
                let mean = |n| step.broadcast_mul(&rates.get_on_dim(1, n)?)?.exp()?.mean(2);
                Tensor::stack(&(0..rates.dims()[1]).map(mean).collect::<Result<Vec<_>>>()?, 2)
            })?;
        }
        if let Some(z) = &z {
            call.note(&OUTPUT_GATE, steps, [z], |[z]| z.silu()?.unsqueeze(2))?;
        }
        let (y, state) = selective_scan(
            &x,
            &dt,
            &self.a_log,
            &b,
            &c,
            &self.d,
            z.map(Arg::Tensor),
            &self.dt_bias,
            call.recall_arg(1),
        )?;
        call.keep(1, state);
        linear(&y, &self.out, None)
    }
}
