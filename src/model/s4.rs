//! S4D: a state space model with a complex diagonal transition that does not depend on the input.
//!
//! Gu, Gupta, Goel and Ré, "On the parameterization and initialization of diagonal state space models", arXiv
//! 2206.11893, with S4D-Lin's initialization. Parameters are those of the S4D layer that its authors publish as
//! a minimal version: a GELU and a gated linear layer follow the recurrence. As there, the parameters of the
//! recurrence learn at a rate of at most 1e-3 and without weight decay.

use candle_core::{DType, Result, Tensor};

use super::{Builder, Call, Dims, Grain, Init, Kind, Mixer, Model, Param, Part, Rows, Scale, Transition};
use crate::bail_input;
use crate::ops::Arg;
use crate::ops::activations::{gelu, glu};
use crate::ops::dropout::{Dropout, dropout};
use crate::ops::linear::linear;
use crate::ops::s4d::s4d;

pub(super) const MODEL: Model = Model {
    name: "s4",
    recurrence: |_| "h = exp(dt A) . h + u, A complex",
    reference: "Gu et al. 2022, arXiv 2206.11893",
    build: |dims, builder| Ok(Box::new(S4::new(dims, builder)?)),
    state_size: |dims| Some(dims.width * dims.state),
    grain: Some(Grain::State),
    transition: Transition::Complex,
    input_dependent_decay: false,
    householders: |_| 0,
    decay: Part::Always,
    output_gate: Part::Never,
    short_conv: Part::Never,
    negative_eigenvalues: Part::Never,
    delta_rule: Part::Never,
    qk_norm: Part::Never,
};

const DECAY: Kind = Kind {
    name: "decay",
    about: "|exp(dt A)| of each state, mean over channels, fixed",
    scale: Scale::Decay,
    rows: Rows::State,
};

/// The largest learning rate of the recurrence.
const MOST_RATE: f64 = 1e-3;

struct S4 {
    d: Param,
    c: Param,
    log_dt: Param,
    log_a_real: Param,
    a_imag: Param,
    out: Param,
    out_bias: Param,
}

impl S4 {
    fn new(dims: &Dims, builder: &Builder) -> anyhow::Result<Self> {
        let (width, pairs) = (dims.width, dims.state / 2);
        if !dims.state.is_multiple_of(2) {
            bail_input!(
                "model.state is {}, but s4 has pairs of conjugate states; use {} or {}",
                dims.state,
                (dims.state - 1).max(2),
                dims.state + 1
            )
        }
        let kernel = builder.push("kernel");
        let slow = |name: &str, shape: &[usize], init| kernel.slow_param(name, shape, init, MOST_RATE);
        let rows = |f: fn(usize) -> f64| Init::Values((0..width * pairs).map(|i| f(i % pairs)).collect());
        let out = builder.push("output_linear.0");
        Ok(Self {
            d: builder.param("D", &[width], Init::Normal(1.0)),
            // The real and the imaginary part of a complex normal number.
            c: kernel.param("C", &[width, pairs, 2], Init::Normal(0.5f64.sqrt())),
            log_dt: slow("log_dt", &[width], Init::Between(1e-3f64.ln(), 0.1f64.ln())),
            log_a_real: slow("log_A_real", &[width, pairs], Init::Const(0.5f64.ln())),
            a_imag: slow("A_imag", &[width, pairs], rows(|n| std::f64::consts::PI * n as f64)),
            out: out.param("weight", &[2 * width, width, 1], Init::linear(width)).matrix(),
            out_bias: out.param("bias", &[2 * width], Init::linear(width)),
        })
    }
}

impl Mixer for S4 {
    fn forward(&self, u: &Tensor, call: &mut Call) -> Result<Tensor> {
        let (_, steps, _) = u.dims3()?;
        let (c, log_dt, a_real, a_imag) = (&self.c, &self.log_dt, &self.log_a_real, &self.a_imag);
        let (y, state) = s4d(u, c, log_dt, a_real, a_imag, &self.d, call.recall_arg(0))?;
        call.keep(0, state);
        call.note(&DECAY, steps, [&log_dt.value(), &a_real.value()], |[log_dt, a_real]| {
            let rate = a_real.exp()?.broadcast_mul(&log_dt.exp()?.unsqueeze(1)?)?;
            let decay = rate.neg()?.exp()?.mean(0)?.to_dtype(DType::F32)?;
            decay.broadcast_as((1, steps, decay.dim(0)?))
        })?;
        let mut y = gelu(&y)?;
        if let Some(mask) = &call.dropout {
            y = dropout(&y, &Dropout { tied: true, ..*mask })?;
        }
        glu(&linear(&y, &self.out, Some(Arg::from(&self.out_bias)))?)
    }
}
