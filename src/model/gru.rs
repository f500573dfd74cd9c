//! Gated recurrent unit: the nonlinear recurrence that linear ones are held against.
//!
//! Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical machine translation",
//! arXiv 1406.1078, section 2.3. Parameters are those of `torch.nn.GRU` with one layer.

use candle_core::{Result, Tensor};

use super::{Builder, Call, Dims, Grain, Init, Kind, Mixer, Model, Param, Part, Rows, Scale, Transition};
use crate::ops::Arg;
use crate::ops::gru::gru;
use crate::ops::linear::linear;

pub(super) const MODEL: Model = Model {
    name: "gru",
    recurrence: |_| "h = (1 - z) tanh(W x + r . U h) + z h",
    reference: "Cho et al. 2014, arXiv 1406.1078",
    build: |dims, builder| Ok(Box::new(Gru::new(dims, builder))),
    state_size: |dims| Some(dims.width),
    grain: Some(Grain::State),
    transition: Transition::Nonlinear,
    input_dependent_decay: true,
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
    about: "z, the share of each unit that is kept",
    scale: Scale::Decay,
    rows: Rows::Layer,
};

struct Gru {
    input: Param,
    input_bias: Param,
    state: Param,
    state_bias: Param,
}

impl Gru {
    fn new(dims: &Dims, builder: &Builder) -> Self {
        let width = dims.width;
        let param = |name: &str, shape: &[usize]| builder.param(name, shape, Init::linear(width));
        Self {
            input: param("weight_ih_l0", &[3 * width, width]),
            state: param("weight_hh_l0", &[3 * width, width]),
            input_bias: param("bias_ih_l0", &[3 * width]),
            state_bias: param("bias_hh_l0", &[3 * width]),
        }
    }
}

impl Mixer for Gru {
    fn forward(&self, x: &Tensor, call: &mut Call) -> Result<Tensor> {
        let (batch, steps, width) = x.dims3()?;
        let gates = linear(x, &self.input, Some(Arg::from(&self.input_bias)))?;
        let start = call.recall(0);
        let (h, last) = gru(&gates, &self.state, &self.state_bias, start.clone().map(Arg::Tensor))?;
        // z again, from the state before each step.
        let (weight, bias) = (self.state.value(), self.state_bias.value());
        call.note(&DECAY, steps, [&gates, &h, &weight, &bias], |[gates, h, weight, bias]| {
            let start = match &start {
                Some(start) => start.to_device(h.device())?.to_dtype(h.dtype())?,
                None => Tensor::zeros((batch, width), h.dtype(), h.device())?,
            };
            let before = Tensor::cat(&[start.unsqueeze(1)?, h.narrow(1, 0, steps - 1)?], 1)?;
            let z = |x: &Tensor, dim| x.narrow(dim, width, width);
            let a = before.reshape((batch * steps, width))?.matmul(&z(&weight, 0)?.t()?)?;
            let z = (z(&gates, 2)?.reshape(a.shape())? + a.broadcast_add(&z(&bias, 0)?)?)?;
            let z = ((z.neg()?.exp()? + 1.0)?.recip())?;
            z.reshape((batch, steps, 1, width))
        })?;
        call.keep(0, last);
        Ok(h)
    }
}
