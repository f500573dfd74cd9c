//! MesaNet: each step reads from the best linear fit, in the sense of least squares, of values to keys so far.
//!
//! von Oswald et al., "MesaNet: sequence modeling by locally optimal test-time training", arXiv 2506.05233,
//! section 3. Parameters are those of `fla.layers.MesaNet` as the authors of the benchmark call it: values as
//! wide as keys, and without a convolution.

use candle_core::{DType, Result, Tensor};

use super::{
    Builder, Call, Conv, Dims, Grain, Init, Kind, Mixer, Model, Param, Part, Rows, Scale, Transition,
};
use crate::ops::gates::{log_sigmoid, sigmoid};
use crate::ops::l2norm::l2norm;
use crate::ops::linear::linear;
use crate::ops::mesa::{States, mesa};
use crate::ops::norms::{RmsEps, rms_norm};
use crate::ops::{Arg, view};

pub(super) const MODEL: Model = Model {
    name: "mesa_net",
    recurrence: |parts| match parts.decay {
        true => "S = a S + b k^T v, A = a A + b k^T k, read by (A + L)^-1 q",
        false => "S = S + b k^T v, A = A + b k^T k, read by (A + L)^-1 q",
    },
    reference: "von Oswald et al. 2025, arXiv 2506.05233",
    build: |dims, builder| Ok(Box::new(MesaNet::new(dims, builder))),
    state_size: |dims| Some(2 * dims.width * dims.head_dim()),
    grain: Some(Grain::Head),
    transition: Transition::Linear,
    input_dependent_decay: true,
    householders: |_| 0,
    decay: Part::On,
    output_gate: Part::Never,
    short_conv: Part::On,
    negative_eigenvalues: Part::Never,
    delta_rule: Part::Never,
    qk_norm: Part::Never,
};

const DECAY: Kind = Kind { name: "decay", about: "a of each head", scale: Scale::Decay, rows: Rows::Head };
const WEIGHT: Kind = Kind {
    name: "weight",
    about: "b, of each head's token in the fit",
    scale: Scale::Linear,
    rows: Rows::Head,
};

/// A projection to a number for each head.
struct Gate {
    weight: Param,
    bias: Param,
}

impl Gate {
    fn new(builder: &Builder, name: &str, dims: &Dims) -> Self {
        let (b, width) = (builder.push(name), dims.width);
        Self {
            weight: b.param("weight", &[dims.heads, width], Init::linear(width)),
            bias: b.param("bias", &[dims.heads], Init::linear(width)),
        }
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        linear(x, &self.weight, Some(Arg::from(&self.bias)))
    }
}

struct MesaNet {
    heads: usize,
    head_dim: usize,
    /// Queries, keys and values, as one matrix product; the first two go through `conv`.
    qkv: Param,
    conv: Conv,
    decay: Option<Gate>,
    weight: Gate,
    lambda: Param,
    norm: Param,
    out: Param,
}

impl MesaNet {
    fn new(dims: &Dims, builder: &Builder) -> Self {
        let width = dims.width;
        let square = |name: &str| builder.push(name).param("weight", &[width, width], Init::linear(width));
        let qkv = ["q_proj", "k_proj", "v_proj"].map(square);
        let convs = ["q_conv1d", "k_conv1d"].map(|name| Conv::new(&builder.push(name), dims, width, false));
        Self {
            heads: dims.heads,
            head_dim: dims.head_dim(),
            // The regularisation begins at 1: softplus of this is 3/4.
            lambda: builder.param("lambda_params", &[width], Init::Const(0.75f64.exp_m1().ln())),
            qkv: builder.stack(&qkv.each_ref(), 8),
            conv: Conv::stack(builder, &convs.each_ref()),
            decay: dims.parts.decay.then(|| Gate::new(builder, "a_proj", dims)),
            weight: Gate::new(builder, "b_proj", dims),
            norm: builder.push("o_norm").param("weight", &[dims.head_dim()], Init::Const(1.0)),
            out: square("o_proj"),
        }
    }
}

impl Mixer for MesaNet {
    fn forward(&self, x: &Tensor, call: &mut Call) -> Result<Tensor> {
        let (batch, steps, width) = x.dims3()?;
        let per_head = (batch, steps, self.heads, self.head_dim);
        let qkv = linear(x, &self.qkv, None)?;
        let ([q, k], plain) = self.conv.split(&qkv, [width, width], &[width], 0, call)?;
        let (q, k) = (l2norm(view(&q, per_head))?, l2norm(view(&k, per_head))?);
        let beta = sigmoid(&self.weight.forward(x)?, 1.0)?;
        let g = match &self.decay {
            Some(decay) => {
                let g = log_sigmoid(&decay.forward(x)?, 1.0)?;
                call.note(&DECAY, steps, [&g], |[g]| g.exp())?;
                g
            }
            // The log of a decay that keeps everything.
            None => {
                let dtype = if x.dtype() == DType::BF16 { DType::F32 } else { x.dtype() };
                Tensor::zeros((batch, steps, self.heads), dtype, x.device())?
            }
        };
        call.note(&WEIGHT, steps, [&beta], |[beta]| Ok(beta))?;
        let states = call.recall_arg(1).zip(call.recall_arg(2));
        let states = states.map(|(keys, values)| States { keys, values });
        let (o, keys, values) = mesa(&q, &k, view(&plain[0], per_head), &beta, &g, &self.lambda, states)?;
        call.keep(1, keys);
        call.keep(2, values);
        let o = rms_norm(view(&o, (batch, steps, width)), &self.norm, 1e-5, RmsEps::Inside)?;
        linear(&o, &self.out, None)
    }
}
