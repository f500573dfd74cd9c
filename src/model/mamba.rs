//! Mamba: a selective state space model with a diagonal transition per channel.
//!
//! Gu and Dao, "Mamba: linear-time sequence modeling with selective state spaces", arXiv 2312.00752,
//! algorithm 2. Parameters are those of `mamba_ssm.Mamba` with `expand = 2`.

use candle_core::{Result, Tensor};

use super::notes::softplus;
use super::{Builder, Call, Dims, Init, Kind, Mixer, Model, Param, Rows, Scale};
use crate::ops::Arg;
use crate::ops::causal_conv1d::causal_conv1d_silu;
use crate::ops::linear::linear;
use crate::ops::selective_scan::selective_scan;

pub(super) const MODEL: Model = Model {
    name: "mamba",
    recurrence: "h = exp(dt A) . h + dt B x",
    reference: "Gu and Dao 2023, arXiv 2312.00752",
    build: |dims, builder| Ok(Box::new(Mamba::new(dims, builder))),
    state_size: |dims| Some(2 * dims.width * dims.state),
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

struct Mamba {
    in_x: Param,
    in_z: Param,
    conv_weight: Param,
    conv_bias: Param,
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
        let in_proj = builder.push("in_proj").param("weight", &[2 * inner, width], Init::linear(width));
        let conv = builder.push("conv1d");
        let x_proj = builder.push("x_proj").param("weight", &[rank + 2 * n, inner], Init::linear(inner));
        let dt_proj = builder.push("dt_proj");
        Self {
            in_x: in_proj.rows(0, inner),
            in_z: in_proj.rows(inner, inner),
            conv_weight: conv.param("weight", &[inner, 1, dims.conv], Init::linear(dims.conv)),
            conv_bias: conv.param("bias", &[inner], Init::linear(dims.conv)),
            x_proj_dt: x_proj.rows(0, rank),
            x_proj_b: x_proj.rows(rank, n),
            x_proj_c: x_proj.rows(rank + n, n),
            dt_weight: dt_proj.param("weight", &[inner, rank], Init::linear(rank)),
            dt_bias: dt_proj.param("bias", &[inner], Init::step_size()),
            a_log: builder.param("A_log", &[inner, n], Init::LogArange),
            d: builder.param("D", &[inner], Init::Const(1.0)),
            out: builder.push("out_proj").param("weight", &[width, inner], Init::linear(inner)),
        }
    }
}

impl Mixer for Mamba {
    fn forward(&self, u: &Tensor, call: &mut Call) -> Result<Tensor> {
        let (_, steps, _) = u.dims3()?;
        let z = linear(u, &self.in_z, None)?;
        let (x, tail) = causal_conv1d_silu(
            &linear(u, &self.in_x, None)?,
            &self.conv_weight,
            Some(Arg::from(&self.conv_bias)),
            call.recall_arg(0),
        )?;
        call.keep(0, tail);
        let dt = linear(&linear(&x, &self.x_proj_dt, None)?, &self.dt_weight, None)?;
        let b = linear(&x, &self.x_proj_b, None)?;
        let c = linear(&x, &self.x_proj_c, None)?;
        let (bias, a_log) = (self.dt_bias.value(), self.a_log.value());
        let step = |dt: &Tensor, bias: &Tensor| softplus(&dt.broadcast_add(bias)?);
        call.note(&DT, steps, [&dt, &bias], |[dt, bias]| step(&dt, &bias)?.unsqueeze(2))?;
        call.note(&DECAY, steps, [&dt, &bias, &a_log], |[dt, bias, a_log]| {
            let (step, rates) = (step(&dt, &bias)?, a_log.exp()?.neg()?);
            let mean = |n| step.broadcast_mul(&rates.get_on_dim(1, n)?)?.exp()?.mean(2);
            Tensor::stack(&(0..rates.dims()[1]).map(mean).collect::<Result<Vec<_>>>()?, 2)
        })?;
        call.note(&OUTPUT_GATE, steps, [&z], |[z]| z.silu()?.unsqueeze(2))?;
        let (y, state) = selective_scan(
            &x,
            &dt,
            &self.a_log,
            &b,
            &c,
            &self.d,
            Some(Arg::from(&z)),
            &self.dt_bias,
            call.recall_arg(1),
        )?;
        call.keep(1, state);
        linear(&y, &self.out, None)
    }
}
