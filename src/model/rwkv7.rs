//! RWKV-7: a transition that is diagonal plus low rank, with decays, in-context learning rates and erasing keys of
//! every channel.
//!
//! Peng et al., "RWKV-7 \"Goose\" with expressive dynamic state evolution", arXiv 2503.14456, section 4.1: the time
//! mixing block. Parameters are those of `fla.layers.RWKV7Attention` with `head_dim = width / heads`. What a
//! layer alone does not know is left out: values mixed with those of the first layer (the value residual), and starts
//! that depend on the layer's number, which are those of the first layer. Matrices begin as the released code's,
//! uniform, but the output and the low rank maps as those of the other models here, where that code has zeros.

use candle_core::{DType, Result, Tensor};

use super::{Builder, Call, Dims, Grain, Init, Kind, Mixer, Model, Param, Part, Rows, Scale, Transition};
use crate::ops::activations::{logistic, tanh};
use crate::ops::dplr::dplr;
use crate::ops::gates::sigmoid;
use crate::ops::linear::linear;
use crate::ops::rwkv7::{rwkv7_keys, rwkv7_read, token_shift};
use crate::ops::{Arg, view};

/// Minus the strongest log decay, e^-½.
const MOST_DECAY: f64 = 0.606_530_659_712_633_4;

pub(super) const MODEL: Model = Model {
    name: "rwkv7",
    recurrence: |parts| match parts.decay {
        true => "S = (diag(w) - (a . k)^T k) S + k~^T v",
        false => "S = (I - (a . k)^T k) S + k~^T v",
    },
    reference: "Peng et al. 2025, arXiv 2503.14456",
    build: |dims, builder| Ok(Box::new(Rwkv7::new(dims, builder))),
    state_size: |dims| Some(dims.width * dims.head_dim()),
    grain: Some(Grain::KeyChannel),
    transition: Transition::LowRank { least_decay: 0.545_239_211_892_605 },
    input_dependent_decay: true,
    householders: |_| 1,
    decay: Part::On,
    output_gate: Part::On,
    short_conv: Part::Never,
    negative_eigenvalues: Part::Never,
    delta_rule: Part::Always,
    qk_norm: Part::Never,
};

const DECAY: Kind =
    Kind { name: "decay", about: "w, of each key channel", scale: Scale::Decay, rows: Rows::Head };
const RATE: Kind = Kind {
    name: "beta",
    about: "a, in-context learning rate of each key channel",
    scale: Scale::Linear,
    rows: Rows::Head,
};
const OUTPUT_GATE: Kind = Kind {
    name: "output_gate",
    about: "g, what the output is multiplied with",
    scale: Scale::Linear,
    rows: Rows::Layer,
};

/// Where the mixes of a token with the one before it stand: those of r, k, v and a, and of w and g where there are
/// a decay and a gate.
const MIXES: [&str; 4] = ["r", "k", "v", "a"];

struct Rwkv7 {
    heads: usize,
    head_dim: usize,
    mix: Param,
    r: Param,
    k: Param,
    v: Param,
    /// The learning rate's map.
    rate: LowRank,
    decay: Option<LowRank>,
    gate: Option<LowRank>,
    k_k: Param,
    k_a: Param,
    r_k: Param,
    norm: [Param; 2],
    out: Param,
}

/// A map through few channels.
struct LowRank {
    down: Param,
    up: Param,
    bias: Option<Param>,
}

impl LowRank {
    fn new(builder: &Builder, name: &str, width: usize, rank: usize, bias: Option<Vec<f64>>) -> Self {
        let b = builder.push(name);
        let up = b.push("lora.2");
        Self {
            down: b.push("lora.0").param("weight", &[rank, width], Init::linear(width)),
            up: up.param("weight", &[width, rank], Init::Uniform(0.1 / (rank as f64).sqrt())),
            bias: bias.map(|bias| up.param("bias", &[width], Init::Values(bias))),
        }
    }

    fn forward(&self, x: &Tensor, squash: impl Fn(Tensor) -> Result<Tensor>) -> Result<Tensor> {
        linear(&squash(linear(x, &self.down, None)?)?, &self.up, self.bias.as_ref().map(Arg::from))
    }
}

impl Rwkv7 {
    fn new(dims: &Dims, builder: &Builder) -> Self {
        let (width, head_dim) = (dims.width, dims.head_dim());
        let channels = |f: &dyn Fn(f64, f64) -> f64| -> Vec<f64> {
            // Of each channel: its place in the layer, −½ to ½, and in its head, −1 to 1 and bent.
            let end = |n: usize| (n.max(2) - 1) as f64;
            let place = |n: usize| {
                let zigzag = 2.0 * (n % head_dim) as f64 / end(head_dim) - 1.0;
                f(n as f64 / end(width) - 0.5, zigzag * zigzag.abs())
            };
            (0..width).map(place).collect()
        };
        let mix = |name: &str, power: f64| {
            let share = |n: usize| 1.0 - (n as f64 / width as f64).powf(power);
            let init = Init::Values((0..width).map(share).collect());
            builder.param(&format!("x_{name}"), &[1, 1, width], init)
        };
        let rank = |times: f64| (times * (width as f64).sqrt() / 32.0).round().max(1.0) as usize * 32;
        let inner = rank(2.5 * head_dim as f64 / 64.0);
        let weight = |name: &str, bound: f64| {
            let init = Init::Uniform(bound / (width as f64).sqrt());
            builder.push(name).param("weight", &[width, width], init)
        };
        let [r, k, v, a] = MIXES;
        let mut mixes = vec![mix(r, 0.2), mix(k, 0.7), mix(v, 0.7), mix(a, 0.9)];
        mixes.extend(dims.parts.decay.then(|| mix("w", 0.9)));
        mixes.extend(dims.parts.output_gate.then(|| mix("g", 0.2)));
        Self {
            heads: dims.heads,
            head_dim,
            mix: builder.stack(&mixes.iter().collect::<Vec<_>>(), 1),
            k_k: builder.param("k_k", &[width], Init::Values(channels(&|at, _| 0.71 - 0.1 * at))),
            k_a: builder.param("k_a", &[width], Init::Const(1.02)),
            r_k: builder.param("r_k", &[dims.heads, head_dim], Init::Const(-0.04)),
            r: weight("r_proj", 0.5),
            k: weight("k_proj", 0.05),
            v: weight("v_proj", 0.5),
            out: weight("o_proj", 1.0),
            decay: dims.parts.decay.then(|| {
                let bias = channels(&|at, zigzag| -6.0 + 6.0 * (at + 0.5) + 0.5 + 2.5 * zigzag);
                LowRank::new(builder, "w_lora", width, inner, Some(bias))
            }),
            rate: {
                let bias = channels(&|at, zigzag| -0.19 + 0.3 * zigzag + 0.4 * at);
                LowRank::new(builder, "a_lora", width, inner, Some(bias))
            },
            gate: dims.parts.output_gate.then(|| LowRank::new(builder, "g_lora", width, rank(5.0), None)),
            norm: {
                let norm = builder.push("g_norm");
                let param = |name: &str, value: f64| norm.param(name, &[width], Init::Const(value));
                [param("weight", 1.0), param("bias", 0.0)]
            },
        }
    }
}

impl Mixer for Rwkv7 {
    fn forward(&self, x: &Tensor, call: &mut Call) -> Result<Tensor> {
        let (batch, steps, _) = x.dims3()?;
        let rows = (batch, steps, self.heads, self.head_dim);
        let (mixes, last) = token_shift(x, &self.mix, call.recall_arg(0))?;
        call.keep(0, last);
        let mut mixes = mixes.into_iter();
        let mut next = || mixes.next().expect("as many as were declared");
        let r = linear(&next(), &self.r, None)?;
        let k = linear(&next(), &self.k, None)?;
        let v = linear(&next(), &self.v, None)?;
        let a = sigmoid(&self.rate.forward(&next(), Ok)?, 1.0)?;
        call.note(&RATE, steps, [&a], |[a]| a.reshape(rows))?;
        let g = match &self.decay {
            // The log of a decay that keeps everything.
            None => {
                let dtype = if x.dtype() == DType::BF16 { DType::F32 } else { x.dtype() };
                Tensor::zeros(rows, dtype, x.device())?
            }
            Some(decay) => {
                let g = sigmoid(&decay.forward(&next(), |x| tanh(&x))?, -MOST_DECAY)?;
                call.note(&DECAY, steps, [&g], |[g]| g.reshape(rows)?.exp())?;
                g
            }
        };
        let gate = match &self.gate {
            None => None,
            Some(gate) => {
                let gate = gate.forward(&next(), |x| logistic(&x))?;
                call.note(&OUTPUT_GATE, steps, [&gate], |[gate]| gate.unsqueeze(2))?;
                Some(gate)
            }
        };
        let [kappa, erase, write] = rwkv7_keys(view(&k, rows), &a, &self.k_k, &self.k_a)?;
        let (r, v) = (view(&r, rows), view(&v, rows));
        let state = call.recall_arg(1);
        let (o, state) = dplr(r.clone(), &write, v.clone(), view(&g, rows), &kappa, &erase, 1.0, state)?;
        call.keep(1, state);
        let [weight, bias] = &self.norm;
        let params = [weight, bias, &self.r_k].map(Arg::from);
        let y = rwkv7_read([Arg::from(&o), r, Arg::from(&write), v], params, gate.map(Arg::Tensor))?;
        linear(&y, &self.out, None)
    }
}
