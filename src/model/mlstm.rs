//! mLSTM: a matrix memory with an exponential input gate and a normaliser, of xLSTM.
//!
//! Beck et al., "xLSTM: extended long short-term memory", arXiv 2405.04517, section 2.3, and Beck et al., "xLSTM 7B",
//! arXiv 2503.13427, section 2. Of their blocks this is the mixer alone, with the queries, keys and values of the other
//! models here: the gates i, f and the sigmoid output gate from the layer's input as in xLSTM 7B, and keys half as wide
//! as values as there, but with a short convolution before all three, an RMS norm that the heads share for the
//! norm of each head, no soft cap on the gates, and neither the up-projection of 2405.04517 nor its learnable skip. The
//! gates begin as there: weights of zero, i with biases from N(0, 0.1), f with biases from 3 to 6.

use candle_core::{DType, Result, Tensor};

use super::output::gate;
use super::{
    Builder, Call, Dims, Grain, Init, Kind, Mixer, Model, Param, Part, Rows, Scale, ShortConvs, Transition,
};
use crate::ops::gates::log_sigmoid;
use crate::ops::linear::linear;
use crate::ops::mlstm::{State, mlstm};
use crate::ops::norms::{GateOrder, RmsEps, gated_rms_norm, rms_norm};
use crate::ops::{Arg, view};

pub(super) const MODEL: Model = Model {
    name: "mlstm",
    recurrence: |parts| match parts.decay {
        true => "C = f C + exp(i) k^T v, n = f n + exp(i) k, read as q C / max(|q n|, 1)",
        false => "C = C + exp(i) k^T v, n = n + exp(i) k, read as q C / max(|q n|, 1)",
    },
    reference: "Beck et al. 2024, arXiv 2405.04517",
    build: |dims, builder| Ok(Box::new(MLstm::new(dims, builder))),
    // The memory, the normaliser and its stabiliser.
    state_size: |dims| Some(2 * dims.width * dims.head_dim() + dims.width + dims.heads),
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

const DECAY: Kind =
    Kind { name: "decay", about: "f, the forget gate of each head", scale: Scale::Decay, rows: Rows::Head };
const INPUT: Kind = Kind {
    name: "input_gate",
    about: "exp(i), the input gate of each head",
    scale: Scale::Log,
    rows: Rows::Head,
};
const OUTPUT_GATE: Kind = Kind {
    name: "output_gate",
    about: "sigma(gate), what the output is multiplied with",
    scale: Scale::Linear,
    rows: Rows::Layer,
};

struct MLstm {
    heads: usize,
    head_dim: usize,
    qkv: ShortConvs,
    input: Scalars,
    forget: Option<Scalars>,
    gate: Option<Param>,
    norm: Param,
    out: Param,
}

/// A projection to a number for each head.
struct Scalars {
    weight: Param,
    bias: Param,
}

impl Scalars {
    fn new(builder: &Builder, name: &str, dims: &Dims, bias: Init) -> Self {
        let b = builder.push(name);
        Self {
            weight: b.param("weight", &[dims.heads, dims.width], Init::Const(0.0)),
            bias: b.param("bias", &[dims.heads], bias),
        }
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        linear(x, &self.weight, Some(Arg::from(&self.bias)))
    }
}

impl MLstm {
    fn new(dims: &Dims, builder: &Builder) -> Self {
        let (width, heads) = (dims.width, dims.heads);
        let steps = (heads - 1).max(1) as f64;
        let forget = Init::Values((0..heads).map(|h| 3.0 + 3.0 * h as f64 / steps).collect());
        Self {
            heads,
            head_dim: dims.head_dim(),
            qkv: ShortConvs::new(builder, dims, [width, width, 2 * width], &[]),
            input: Scalars::new(builder, "i_proj", dims, Init::Normal(0.1)),
            forget: dims.parts.decay.then(|| Scalars::new(builder, "f_proj", dims, forget)),
            gate: gate(dims, builder),
            norm: builder.push("o_norm").param("weight", &[2 * dims.head_dim()], Init::Const(1.0)),
            out: builder.push("o_proj").param("weight", &[width, 2 * width], Init::linear(2 * width)),
        }
    }
}

impl Mixer for MLstm {
    fn forward(&self, x: &Tensor, call: &mut Call) -> Result<Tensor> {
        let (batch, steps, width) = x.dims3()?;
        let keys = (batch, steps, self.heads, self.head_dim);
        let ([q, k, v], _) = self.qkv.forward(x, 0, call)?;
        let v = view(&v, (batch, steps, self.heads, 2 * self.head_dim));
        let i = self.input.forward(x)?;
        call.note(&INPUT, steps, [&i], |[i]| i.exp())?;
        let log_f = match &self.forget {
            Some(forget) => {
                let log_f = log_sigmoid(&forget.forward(x)?, 1.0)?;
                call.note(&DECAY, steps, [&log_f], |[log_f]| log_f.exp())?;
                log_f
            }
            // The log of a gate that keeps everything.
            None => {
                let dtype = if x.dtype() == DType::BF16 { DType::F32 } else { x.dtype() };
                Tensor::zeros((batch, steps, self.heads), dtype, x.device())?
            }
        };
        let state = match (call.recall_arg(1), call.recall_arg(2), call.recall_arg(3)) {
            (Some(memory), Some(normaliser), Some(most)) => Some(State { memory, normaliser, most }),
            _ => None,
        };
        let scale = (self.head_dim as f64).powf(-0.5);
        let (h, state) = mlstm(view(&q, keys), view(&k, keys), v, &i, &log_f, scale, state)?;
        call.keep(1, state.memory);
        call.keep(2, state.normaliser);
        call.keep(3, state.most);
        let h = view(&h, (batch, steps, 2 * width));
        let h = match &self.gate {
            None => rms_norm(h, &self.norm, 1e-5, RmsEps::Inside)?,
            Some(gate) => {
                let gate = linear(x, gate, None)?;
                call.note(&OUTPUT_GATE, steps, [&gate], |[gate]| {
                    ((gate.neg()?.exp()? + 1.0)?.recip())?.unsqueeze(2)
                })?;
                gated_rms_norm(h, &gate, &self.norm, 1e-5, GateOrder::SigmoidAfterNorm)?
            }
        };
        linear(&h, &self.out, None)
    }
}
