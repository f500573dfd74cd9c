//! Gated linear attention: one log decay per key channel.
//!
//! Yang et al., "Gated linear attention transformers with hardware-efficient training",
//! arXiv 2312.06635, section 4. Parameters are those of `fla.layers.GatedLinearAttention` with
//! `expand_k = 1`, `expand_v = 2` and short convolutions.

use candle_core::{DType, Result, Tensor};

use super::output::{fused_norm, gate, norm_and_gate};
use super::{
    Builder, Call, Dims, Grain, Init, Kind, Mixer, Model, Param, Part, Rows, Scale, ShortConvs, Transition,
};
use crate::ops::gates::log_sigmoid;
use crate::ops::gla::gla;
use crate::ops::linear::linear;
use crate::ops::{Arg, view};

/// The gate's logarithm is divided by this, so that states begin long-lived.
const GATE_DIVISOR: f64 = 16.0;
const GATE_RANK: usize = 16;

pub(super) const MODEL: Model = Model {
    name: "gla",
    recurrence: |parts| match parts.decay {
        true => "S = diag(exp g) S + k^T v",
        false => "S = S + k^T v",
    },
    reference: "Yang et al. 2023, arXiv 2312.06635",
    build: |dims, builder| Ok(Box::new(Gla::new(dims, builder))),
    state_size: |dims| Some(2 * dims.width * dims.head_dim()),
    grain: Some(Grain::KeyChannel),
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
    Kind { name: "decay", about: "exp(g), of each key channel", scale: Scale::Decay, rows: Rows::Head };

struct Gla {
    heads: usize,
    head_dim: usize,
    /// With the first half of the decay's projection.
    qkv: ShortConvs,
    gate: Option<Param>,
    decay: Option<Decay>,
    norm: Param,
    out: Param,
}

/// Where the log decay comes from.
struct Decay {
    up: Param,
    bias: Param,
}

impl Gla {
    fn new(dims: &Dims, builder: &Builder) -> Self {
        let width = dims.width;
        let down = || builder.push("gk_proj.0").param("weight", &[GATE_RANK, width], Init::linear(width));
        let down = dims.parts.decay.then(down);
        let decay = || {
            let up = builder.push("gk_proj.1");
            Decay {
                up: up.param("weight", &[width, GATE_RANK], Init::linear(GATE_RANK)),
                bias: up.param("bias", &[width], Init::linear(GATE_RANK)),
            }
        };
        Self {
            heads: dims.heads,
            head_dim: dims.head_dim(),
            qkv: {
                let plain: Vec<&Param> = down.iter().collect();
                ShortConvs::new(builder, dims, [width, width, 2 * width], &plain)
            },
            gate: gate(dims, builder),
            decay: dims.parts.decay.then(decay),
            norm: fused_norm(dims, builder),
            out: builder.push("o_proj").param("weight", &[width, 2 * width], Init::linear(2 * width)),
        }
    }
}

impl Mixer for Gla {
    fn forward(&self, x: &Tensor, call: &mut Call) -> Result<Tensor> {
        let (batch, steps, _) = x.dims3()?;
        let keys = (batch, steps, self.heads, self.head_dim);
        let ([q, k, v], plain) = self.qkv.forward(x, 0, call)?;
        let v = view(&v, (batch, steps, self.heads, 2 * self.head_dim));
        let decay = match &self.decay {
            // The log of a decay that keeps everything.
            None => {
                let dtype = if x.dtype() == DType::BF16 { DType::F32 } else { x.dtype() };
                Tensor::zeros(keys, dtype, x.device())?
            }
            Some(Decay { up, bias }) => {
                let g = linear(&plain[0], up, Some(Arg::from(bias)))?;
                let g = log_sigmoid(&g, GATE_DIVISOR)?;
                call.note(&DECAY, steps, [&g], |[g]| g.reshape(keys)?.exp())?;
                g
            }
        };
        let scale = (self.head_dim as f64).powf(-0.5);
        let (o, state) =
            gla(view(&q, keys), view(&k, keys), v, view(&decay, keys), scale, call.recall_arg(1))?;
        call.keep(1, state);
        linear(&norm_and_gate(&o, x, &self.norm, self.gate.as_ref(), call)?, &self.out, None)
    }
}
