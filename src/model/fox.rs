//! FoX, the forgetting transformer: softmax attention whose scores lose what a forget gate takes at every step.
//!
//! Lin et al., "Forgetting transformer: softmax attention with a forget gate", arXiv 2503.02130, section 3. Parameters
//! are those of `fla.layers.ForgettingAttention`, which has no rotary embedding: the gates tell positions apart. Its
//! `use_output_gate` is `model.output_gate: on`, its `qk_norm` is `model.qk_norm: on`, here with one weight for all
//! heads, as the transformer has it.

use candle_core::{Result, Tensor};

use super::notes::softplus;
use super::transformer::{kept, tell};
use super::{Builder, Call, Dims, Grain, Init, Kind, Mixer, Model, Param, Part, Rows, Scale, Transition};
use crate::ops::activations::sigmoid_gate;
use crate::ops::attention::{causal_attention, forgetting_attention};
use crate::ops::gates::log_sigmoid;
use crate::ops::linear::linear;
use crate::ops::norms::{RmsEps, rms_norm};
use crate::ops::{Arg, view};

pub(super) const MODEL: Model = Model {
    name: "fox",
    recurrence: |parts| match parts.decay {
        true => "keeps keys and values, whose weights fade by f",
        false => "keeps keys and values",
    },
    reference: "Lin et al. 2025, arXiv 2503.02130",
    build: |dims, builder| Ok(Box::new(Fox::new(dims, builder))),
    state_size: |dims| {
        let gates = if dims.parts.decay { dims.heads } else { 0 };
        dims.window.map(|window| (2 * dims.width + gates) * window)
    },
    grain: Some(Grain::Head),
    transition: Transition::Attention,
    input_dependent_decay: true,
    householders: |_| 0,
    decay: Part::On,
    output_gate: Part::Off,
    short_conv: Part::Never,
    negative_eigenvalues: Part::Never,
    delta_rule: Part::Never,
    qk_norm: Part::Off,
};

const DECAY: Kind =
    Kind { name: "decay", about: "forget gate f of each head", scale: Scale::Decay, rows: Rows::Head };
const OUTPUT_GATE: Kind = Kind {
    name: "output_gate",
    about: "sigmoid(gate), what the output is multiplied with",
    scale: Scale::Linear,
    rows: Rows::Layer,
};

const NORM_EPS: f64 = 1e-5;

struct Fox {
    heads: usize,
    head_dim: usize,
    window: Option<usize>,
    q: Param,
    k: Param,
    v: Param,
    forget: Option<Forget>,
    gate: Option<Param>,
    /// Of queries and of keys.
    norms: Option<[Param; 2]>,
    out: Param,
}

/// Where the forget gates come from.
struct Forget {
    weight: Param,
    bias: Param,
}

impl Fox {
    fn new(dims: &Dims, builder: &Builder) -> Self {
        let (width, heads, head_dim) = (dims.width, dims.heads, dims.head_dim());
        let weight =
            |name: &str, rows: usize| builder.push(name).param("weight", &[rows, width], Init::linear(width));
        let norm = |name: &str| builder.push(name).param("weight", &[head_dim], Init::Const(1.0));
        Self {
            heads,
            head_dim,
            window: dims.window,
            q: weight("q_proj", width),
            k: weight("k_proj", width),
            v: weight("v_proj", width),
            forget: dims.parts.decay.then(|| Forget {
                weight: weight("f_proj", heads),
                bias: builder.push("f_proj").param("bias", &[heads], Init::linear(width)),
            }),
            gate: dims.parts.output_gate.then(|| weight("g_proj", width)),
            norms: dims.parts.qk_norm.then(|| ["q_norm", "k_norm"].map(norm)),
            out: weight("o_proj", width),
        }
    }
}

impl Mixer for Fox {
    fn forward(&self, x: &Tensor, call: &mut Call) -> Result<Tensor> {
        let (batch, steps, width) = x.dims3()?;
        let (mut q, mut k) = (linear(x, &self.q, None)?, linear(x, &self.k, None)?);
        if let Some([of_q, of_k]) = &self.norms {
            q = rms_norm(&q, of_q, NORM_EPS, RmsEps::Inside)?;
            k = rms_norm(&k, of_k, NORM_EPS, RmsEps::Inside)?;
        }
        let v = linear(x, &self.v, None)?;
        let g = match &self.forget {
            None => None,
            Some(Forget { weight, bias }) => {
                let g = log_sigmoid(&linear(x, weight, Some(Arg::from(bias)))?, 1.0)?;
                call.note(&DECAY, steps, [&g], |[g]| g.exp())?;
                Some(g)
            }
        };
        // Keys, values and log gates, behind those of the pieces before.
        let mut seen = vec![k, v];
        seen.extend(g);
        for (slot, new) in seen.iter_mut().enumerate() {
            if let Some(past) = call.recall(slot) {
                *new = Tensor::cat(&[&past, new], 1)?;
            }
        }
        let keys = seen[0].dim(1)?;
        let kept = kept(self.window, keys);
        for (slot, all) in seen.iter().enumerate() {
            call.keep(slot, all.narrow(1, keys - kept, kept)?);
        }
        let (heads, dim) = (self.heads, self.head_dim);
        let scale = (dim as f64).powf(-0.5);
        tell(call, heads, [&q, &seen[0]], seen.get(2), scale, self.window)?;

        let per_head = |x: &Tensor, steps: usize| view(x, (batch, steps, heads, dim));
        let (q, k, v) = (per_head(&q, steps), per_head(&seen[0], keys), per_head(&seen[1], keys));
        let o = match seen.get(2) {
            Some(g) => forgetting_attention(q, k, v, g, scale, self.window)?,
            None => causal_attention(q, k, v, scale, self.window)?,
        };
        let o = view(&o, (batch, steps, width));
        let Some(gate) = &self.gate else { return linear(o, &self.out, None) };
        let gate = linear(x, gate, None)?;
        call.note(&OUTPUT_GATE, steps, [&gate], |[gate]| softplus(&gate.neg()?)?.neg()?.exp()?.unsqueeze(2))?;
        linear(&sigmoid_gate(o, &gate)?, &self.out, None)
    }
}
