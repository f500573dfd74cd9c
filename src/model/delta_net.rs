//! DeltaNet: the delta rule, which erases what a key held before it writes.
//!
//! Yang et al., "Parallelizing linear transformers with the delta rule over sequence length",
//! arXiv 2406.06484, section 2. Parameters are those of `fla.layers.DeltaNet` with `expand_k = 1`,
//! `expand_v = 2` and short convolutions.

use candle_core::{Result, Tensor};

use super::{Builder, Call, Dims, Init, Kind, Mixer, Model, Param, Rows, Scale, ShortConv};
use crate::ops::delta::gated_delta_rule;
use crate::ops::gates::sigmoid;
use crate::ops::l2norm::l2norm;
use crate::ops::linear::linear;
use crate::ops::norms::{RmsEps, rms_norm};
use crate::ops::view;

pub(super) const MODEL: Model = Model {
    name: "delta_net",
    recurrence: "S = (I - beta k^T k) S + beta k^T v",
    reference: "Yang et al. 2024, arXiv 2406.06484",
    build: |dims, builder| Ok(Box::new(DeltaNet::new(dims, builder))),
    state_size: |dims| Some(2 * dims.width * dims.head_dim()),
};

const BETA: Kind =
    Kind { name: "beta", about: "write strength of each head", scale: Scale::Linear, rows: Rows::Head };

struct DeltaNet {
    heads: usize,
    head_dim: usize,
    q: ShortConv,
    k: ShortConv,
    v: ShortConv,
    beta: Param,
    norm: Param,
    out: Param,
}

impl DeltaNet {
    fn new(dims: &Dims, builder: &Builder) -> Self {
        let width = dims.width;
        Self {
            heads: dims.heads,
            head_dim: dims.head_dim(),
            q: ShortConv::new(builder, "q", dims, width),
            k: ShortConv::new(builder, "k", dims, width),
            v: ShortConv::new(builder, "v", dims, 2 * width),
            beta: builder.push("b_proj").param("weight", &[dims.heads, width], Init::linear(width)),
            norm: builder.push("o_norm").param("weight", &[2 * dims.head_dim()], Init::Const(1.0)),
            out: builder.push("o_proj").param("weight", &[width, 2 * width], Init::linear(2 * width)),
        }
    }
}

impl Mixer for DeltaNet {
    fn forward(&self, x: &Tensor, call: &mut Call) -> Result<Tensor> {
        let (batch, steps, width) = x.dims3()?;
        let keys = (batch, steps, self.heads, self.head_dim);
        let q = l2norm(view(&self.q.forward(x, 0, call)?, keys))?;
        let k = l2norm(view(&self.k.forward(x, 1, call)?, keys))?;
        let v = view(&self.v.forward(x, 2, call)?, (batch, steps, self.heads, 2 * self.head_dim));
        let beta = sigmoid(&linear(x, &self.beta, None)?, 1.0)?;
        call.note(&BETA, steps, [&beta], |[beta]| Ok(beta))?;
        let scale = (self.head_dim as f64).powf(-0.5);
        let (o, state) = gated_delta_rule(&q, &k, v, &beta, None, scale, call.recall_arg(3))?;
        call.keep(3, state);
        let o = rms_norm(view(&o, (batch, steps, 2 * width)), &self.norm, 1e-5, RmsEps::Inside)?;
        linear(&o, &self.out, None)
    }
}
