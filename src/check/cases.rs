//! Every op with inputs of given sizes: what the checks and the measurements run.

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use super::case::{Case, Input, Kind};
use super::loss::Loss;
use crate::ops::Arg;
use crate::ops::activations::{gelu, glu, logistic, sigmoid_gate, tanh};
use crate::ops::add::add;
use crate::ops::attention::{causal_attention, forgetting_attention, qk_norm_rope, rope};
use crate::ops::causal_conv1d::{Split, causal_conv1d_silu, causal_conv1d_silu_split};
use crate::ops::delta::{gated_delta_rule, gated_sum_rule};
use crate::ops::dplr::dplr;
use crate::ops::dropout::{Dropout, dropout};
use crate::ops::embedding::embedding;
use crate::ops::gates::{decay_gate, log_sigmoid, sigmoid};
use crate::ops::gla::gla;
use crate::ops::gru::gru;
use crate::ops::head::{PAD, Targets};
use crate::ops::kda::{kda_gate, kda_keys};
use crate::ops::l2norm::l2norm;
use crate::ops::linear::linear;
use crate::ops::mesa::{States, mesa};
use crate::ops::mlstm::{State, mlstm};
use crate::ops::norms::{GateOrder, RmsEps, gated_rms_norm, layer_norm, rms_norm};
use crate::ops::optim::{AdamStep, global_norm};
use crate::ops::philox::{philox4x32, unit_f32};
use crate::ops::residual_norm::residual_dropout_layer_norm;
use crate::ops::rwkv7::{rwkv7_keys, rwkv7_read, token_shift};
use crate::ops::s4d::s4d;
use crate::ops::selective_scan::selective_scan;
use crate::ops::ssd::ssd;
use crate::ops::swiglu::swiglu;

/// One op of the program.
pub struct Op {
    /// The name that `--op` takes.
    pub name: &'static str,
    /// The room of `src/ops`.
    pub room: &'static str,
    /// Whether it multiplies matrices, so that tf32 is a route of its own.
    pub matrices: bool,
    /// Whether it takes activations, so that there is a bf16 route.
    pub activations: bool,
    /// The sizes of a quick check.
    pub quick: fn() -> Vec<Size>,
    /// What a thorough check adds.
    pub thorough: fn() -> Vec<Size>,
    /// The sizes of a measurement.
    pub measured: fn(Scale) -> Vec<Size>,
    pub build: fn(&Size) -> Case,
}

/// The sizes of a model whose ops are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Width 64, 4 heads, 64 sequences of 400 steps.
    Width64,
    /// Width 256, 4 heads, 64 sequences of 400 steps.
    Width256,
    /// Width 1,024, 8 heads, 64 sequences of 400 steps.
    Width1024,
    /// One sequence of 32,768 steps, 16 heads of 128.
    Long1,
    /// Eight sequences of 2,048 steps, 16 heads of 128.
    Long8,
}

impl Scale {
    pub const ALL: [Scale; 5] =
        [Scale::Width64, Scale::Width256, Scale::Width1024, Scale::Long1, Scale::Long8];

    pub fn name(self) -> &'static str {
        match self {
            Scale::Width64 => "width64",
            Scale::Width256 => "width256",
            Scale::Width1024 => "width1024",
            Scale::Long1 => "long1",
            Scale::Long8 => "long8",
        }
    }

    fn size(self) -> Size {
        let (batch, steps, heads, key, value, width) = match self {
            Scale::Width64 => (64, 400, 4, 16, 32, 64),
            Scale::Width256 => (64, 400, 4, 64, 128, 256),
            Scale::Width1024 => (64, 400, 8, 128, 256, 1024),
            Scale::Long1 => (1, 32_768, 16, 128, 128, 2048),
            Scale::Long8 => (8, 2_048, 16, 128, 128, 2048),
        };
        Size { batch, steps, heads, key, value, width, ..Size::default() }
    }

    /// The width of a model of this size; `None` for sizes that are longer than training takes them.
    pub fn model_width(self) -> Option<usize> {
        (!self.long()).then(|| self.size().width)
    }

    fn long(self) -> bool {
        matches!(self, Scale::Long1 | Scale::Long8)
    }
}

/// Sizes of one case; an op takes those it has.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    pub batch: usize,
    pub steps: usize,
    pub heads: usize,
    pub key: usize,
    pub value: usize,
    pub states: usize,
    pub groups: usize,
    /// Householder steps per token.
    pub sub: usize,
    /// Channels, or the width of a row.
    pub width: usize,
    /// Outputs of a linear layer, or classes.
    pub outputs: usize,
    /// With an initial state, and a gradient of the final one.
    pub stateful: bool,
    pub seed: u64,
}

impl Default for Size {
    fn default() -> Self {
        Self {
            batch: 1,
            steps: 1,
            heads: 1,
            key: 64,
            value: 64,
            states: 16,
            groups: 1,
            sub: 1,
            width: 64,
            outputs: 64,
            stateful: false,
            seed: 1,
        }
    }
}

impl Size {
    /// A small case with the same inner sizes: what tells whether the kernels behind this size are right.
    pub fn small(self) -> Self {
        let heads = self.heads.min(2 * self.groups);
        Self { batch: self.batch.min(2), steps: self.steps.min(150), heads, ..self }
    }
}

fn at(batch: usize, steps: usize) -> Size {
    Size { batch, steps, ..Size::default() }
}

/// Both with and without initial state.
fn both(sizes: impl IntoIterator<Item = Size>) -> Vec<Size> {
    sizes.into_iter().flat_map(|size| [false, true].map(|stateful| Size { stateful, ..size })).collect()
}

fn rows(list: &[(usize, usize, usize)]) -> Vec<Size> {
    list.iter().map(|&(batch, steps, width)| Size { width, ..at(batch, steps) }).collect()
}

fn headed(list: &[(usize, usize, usize, usize, usize)]) -> Vec<Size> {
    list.iter()
        .map(|&(batch, steps, heads, key, value)| Size { heads, key, value, ..at(batch, steps) })
        .collect()
}

/// Head dims and lengths that stress tiles of every kind.
fn odd_heads() -> Vec<Size> {
    let mut list = vec![];
    for dim in [64, 72, 81, 96, 120, 128] {
        for steps in [1, 3, 70, 400] {
            list.push((1, steps, 2, dim, if dim % 2 == 0 { 2 * dim } else { dim }));
        }
    }
    list.extend([(1, 2_200, 2, 64, 128), (3, 130, 2, 9, 18), (2, 65, 3, 128, 256), (1, 64, 1, 16, 16)]);
    headed(&list)
}

/// The ops, in the order of their names.
pub const OPS: &[Op] = &[
    Op {
        name: "adam",
        room: "optim",
        matrices: false,
        activations: false,
        quick: || rows(&[(1, 1, 1), (1, 1, 100_003)]),
        thorough: || rows(&[(1, 1, 31), (1, 1, 4_000_000)]),
        measured: |scale| vec![Size { width: parameters(scale), ..at(1, 1) }],
        build: adam_case,
    },
    Op {
        name: "add",
        room: "add",
        matrices: false,
        activations: true,
        quick: || rows(&[(1, 3, 81), (2, 70, 256)]),
        thorough: || rows(&[(1, 1, 1), (3, 400, 120), (1, 2_200, 64)]),
        measured: |scale| vec![scale.size()],
        build: add_case,
    },
    Op {
        name: "attention",
        room: "attention",
        matrices: true,
        activations: true,
        quick: || {
            let mut sizes =
                headed(&[(2, 70, 2, 64, 64), (1, 3, 1, 81, 81), (1, 1, 3, 120, 120), (1, 400, 1, 128, 128)]);
            // Values wider than keys, and keys of earlier steps.
            sizes.extend(headed(&[(1, 130, 1, 72, 96)]));
            sizes.push(Size { sub: 33, ..headed(&[(2, 40, 2, 64, 64)])[0] });
            sizes.extend(headed(&[(1, 8_200, 1, 128, 128)]));
            // Windows: within a tile, over tiles, one step, and keys that no query sees.
            sizes.push(Size { width: 50, ..headed(&[(2, 400, 2, 64, 64)])[0] });
            sizes.push(Size { width: 1, ..headed(&[(1, 130, 1, 128, 128)])[0] });
            sizes.push(Size { width: 5, sub: 200, ..headed(&[(1, 70, 2, 96, 96)])[0] });
            sizes
        },
        thorough: || {
            let mut sizes = odd_heads();
            sizes.iter_mut().for_each(|size| size.value = size.key);
            sizes.push(Size { sub: 300, ..headed(&[(1, 1, 4, 64, 64)])[0] });
            sizes.push(Size { sub: 65, ..headed(&[(2, 100, 2, 96, 96)])[0] });
            // What long sequences have kernels of their own for.
            sizes.extend(headed(&[(1, 8_300, 3, 104, 104)]));
            sizes.push(Size { sub: 300, ..headed(&[(2, 8_192, 1, 128, 128)])[0] });
            for dim in [32, 64, 80, 96, 128] {
                for (steps, window) in [(1, 3), (400, 63), (300, 33)] {
                    sizes.push(Size { width: window, ..headed(&[(1, steps, 2, dim, dim)])[0] });
                }
            }
            sizes
        },
        measured: |scale| vec![Size { value: scale.size().key, ..scale.size() }],
        build: |size| attention_case(size, false),
    },
    Op {
        name: "causal_conv1d",
        room: "causal_conv1d",
        matrices: false,
        activations: true,
        quick: || both(rows(&[(2, 70, 96), (1, 3, 81), (1, 1, 128), (1, 400, 64)])),
        thorough: || both(rows(&[(3, 2, 120), (2, 130, 1024), (1, 2_200, 72), (2, 400, 257)])),
        measured: |scale| {
            let size = scale.size();
            vec![Size { width: if scale.long() { size.width } else { 2 * size.width }, ..size }]
        },
        build: conv_case,
    },
    Op {
        name: "decay_gate",
        room: "gates",
        matrices: false,
        activations: true,
        quick: || headed(&[(2, 70, 4, 1, 1), (1, 1, 3, 1, 1), (1, 400, 16, 1, 1)]),
        thorough: || headed(&[(3, 3, 1, 1, 1), (2, 2_200, 8, 1, 1), (1, 130, 33, 1, 1)]),
        measured: |scale| vec![scale.size()],
        build: decay_gate_case,
    },
    Op {
        name: "delta_rule",
        room: "delta",
        matrices: true,
        activations: true,
        quick: || {
            both(headed(&[(2, 70, 2, 64, 128), (1, 3, 1, 81, 96), (1, 1, 2, 120, 72), (1, 200, 1, 128, 256)]))
        },
        thorough: || both(odd_heads()),
        measured: |scale| vec![scale.size()],
        build: |size| delta_case(size, "delta_rule", false, true),
    },
    Op {
        name: "dplr",
        room: "dplr",
        matrices: false,
        activations: true,
        quick: || {
            both(headed(&[(2, 70, 2, 64, 128), (1, 3, 1, 81, 96), (1, 1, 2, 120, 72), (1, 200, 1, 128, 256)]))
        },
        thorough: || both(odd_heads()),
        measured: |scale| vec![scale.size()],
        build: dplr_case,
    },
    Op {
        name: "dropout",
        room: "dropout",
        matrices: false,
        activations: true,
        quick: || both(rows(&[(2, 70, 96), (1, 3, 81), (1, 1, 1)])),
        thorough: || both(rows(&[(3, 400, 257), (1, 2_200, 64)])),
        measured: |scale| vec![scale.size()],
        build: dropout_case,
    },
    Op {
        name: "embedding",
        room: "embedding",
        matrices: false,
        activations: true,
        quick: || with_outputs(rows(&[(2, 70, 64), (1, 3, 81), (1, 1, 256)]), 11),
        thorough: || with_outputs(rows(&[(4, 400, 120), (1, 2_200, 96), (2, 130, 1024)]), 41),
        measured: |scale| with_outputs(vec![scale.size()], 41),
        build: embedding_case,
    },
    Op {
        name: "forgetting_attention",
        room: "attention",
        matrices: true,
        activations: true,
        quick: || {
            let mut sizes =
                headed(&[(2, 70, 2, 64, 64), (1, 3, 1, 81, 81), (1, 1, 3, 120, 120), (1, 400, 1, 128, 128)]);
            // Values wider than keys, keys of earlier steps, and windows.
            sizes.extend(headed(&[(1, 130, 1, 72, 96), (1, 150, 2, 32, 32)]));
            sizes.push(Size { sub: 33, ..headed(&[(2, 40, 2, 64, 64)])[0] });
            sizes.push(Size { width: 50, ..headed(&[(2, 400, 2, 64, 64)])[0] });
            sizes.push(Size { width: 5, sub: 200, ..headed(&[(1, 70, 2, 96, 96)])[0] });
            sizes
        },
        thorough: || {
            let mut sizes = odd_heads();
            sizes.iter_mut().for_each(|size| size.value = size.key);
            sizes.push(Size { sub: 300, ..headed(&[(1, 1, 4, 64, 64)])[0] });
            for dim in [32, 64, 80, 96, 128] {
                for (steps, window) in [(1, 3), (400, 63), (300, 33)] {
                    sizes.push(Size { width: window, ..headed(&[(1, steps, 2, dim, dim)])[0] });
                }
            }
            sizes
        },
        measured: |scale| vec![Size { value: scale.size().key, ..scale.size() }],
        build: |size| attention_case(size, true),
    },
    Op {
        name: "gated_delta_product",
        room: "delta",
        matrices: true,
        activations: true,
        quick: || {
            let sizes =
                headed(&[(2, 33, 2, 64, 128), (1, 3, 1, 81, 96), (1, 1, 2, 72, 120), (1, 100, 1, 128, 256)]);
            let subs = [4, 2, 4, 3];
            both(sizes.into_iter().zip(subs).map(|(size, sub)| Size { sub, ..size }))
        },
        thorough: || both(odd_heads().into_iter().map(|size| Size { sub: 4, ..size })),
        measured: |scale| vec![Size { sub: 4, ..scale.size() }],
        build: |size| delta_case(size, "gated_delta_product", true, true),
    },
    Op {
        name: "gated_delta_rule",
        room: "delta",
        matrices: true,
        activations: true,
        quick: || {
            both(headed(&[(2, 70, 2, 64, 128), (1, 3, 1, 81, 96), (1, 1, 2, 120, 72), (1, 400, 1, 128, 256)]))
        },
        thorough: || both(odd_heads()),
        measured: |scale| vec![scale.size()],
        build: |size| delta_case(size, "gated_delta_rule", true, true),
    },
    Op {
        name: "gated_rms_norm_after",
        room: "norms",
        matrices: false,
        activations: true,
        quick: || headed(&[(2, 70, 2, 1, 128), (1, 3, 1, 1, 81), (1, 1, 4, 1, 96)]),
        thorough: || {
            headed(&[(2, 400, 4, 1, 120), (1, 2_200, 2, 1, 64), (3, 130, 8, 1, 256), (1, 70, 3, 1, 18)])
        },
        measured: |scale| vec![scale.size()],
        build: |size| gated_norm_case(size, "gated_rms_norm_after", size.value, GateOrder::AfterNorm),
    },
    Op {
        name: "gated_rms_norm_before",
        room: "norms",
        matrices: false,
        activations: true,
        quick: || headed(&[(2, 70, 4, 1, 128), (1, 3, 1, 1, 81), (1, 1, 1, 1, 96)]),
        thorough: || headed(&[(2, 400, 1, 1, 120), (1, 2_200, 1, 1, 64), (3, 130, 8, 1, 256)]),
        measured: |scale| vec![scale.size()],
        build: |size| {
            gated_norm_case(size, "gated_rms_norm_before", size.heads * size.value, GateOrder::BeforeNorm)
        },
    },
    Op {
        name: "gated_rms_norm_sigmoid",
        room: "norms",
        matrices: false,
        activations: true,
        quick: || headed(&[(2, 70, 2, 1, 128), (1, 3, 1, 1, 81), (1, 1, 4, 1, 96)]),
        thorough: || {
            headed(&[(2, 400, 4, 1, 120), (1, 2_200, 2, 1, 64), (3, 130, 8, 1, 256), (1, 70, 3, 1, 18)])
        },
        measured: |scale| vec![scale.size()],
        build: |size| {
            gated_norm_case(size, "gated_rms_norm_sigmoid", size.value, GateOrder::SigmoidAfterNorm)
        },
    },
    Op {
        name: "gated_sum_rule",
        room: "delta",
        matrices: true,
        activations: true,
        quick: || {
            let sizes =
                headed(&[(2, 70, 2, 64, 128), (1, 3, 1, 81, 96), (1, 1, 2, 120, 72), (1, 200, 1, 128, 256)]);
            let subs = [1, 4, 2, 1];
            both(sizes.into_iter().zip(subs).map(|(size, sub)| Size { sub, ..size }))
        },
        thorough: || {
            both(odd_heads().into_iter().enumerate().map(|(i, size)| Size { sub: 1 + i % 3, ..size }))
        },
        measured: |scale| vec![scale.size()],
        build: |size| delta_case(size, "gated_sum_rule", true, false),
    },
    Op {
        name: "gelu",
        room: "activations",
        matrices: false,
        activations: true,
        quick: || rows(&[(2, 70, 256), (1, 1, 3)]),
        thorough: || rows(&[(3, 400, 81)]),
        measured: |scale| vec![scale.size()],
        build: |size| {
            let x = activation("x", Draw::of(size).normal(&[size.batch, size.steps, size.width], 2.0));
            elementwise(size, "gelu", x, gelu)
        },
    },
    Op {
        name: "gla",
        room: "gla",
        matrices: true,
        activations: true,
        quick: || {
            both(headed(&[(2, 70, 2, 64, 128), (1, 3, 1, 81, 96), (1, 1, 2, 120, 72), (1, 400, 1, 128, 256)]))
        },
        thorough: || both(odd_heads()),
        measured: |scale| vec![scale.size()],
        build: gla_case,
    },
    Op {
        name: "global_norm",
        room: "optim",
        matrices: false,
        activations: false,
        quick: || rows(&[(1, 1, 1), (1, 1, 100_003)]),
        thorough: || rows(&[(1, 1, 31), (1, 1, 4_000_000)]),
        measured: |scale| vec![Size { width: parameters(scale), ..at(1, 1) }],
        build: global_norm_case,
    },
    Op {
        name: "glu",
        room: "activations",
        matrices: false,
        activations: true,
        quick: || rows(&[(2, 70, 256), (1, 3, 81), (1, 1, 1)]),
        thorough: || rows(&[(2, 400, 120), (1, 2_200, 64), (3, 130, 1024)]),
        measured: |scale| vec![scale.size()],
        build: |size| {
            let x = activation("x", Draw::of(size).normal(&[size.batch, size.steps, 2 * size.width], 2.0));
            elementwise(size, "glu", x, glu)
        },
    },
    Op {
        name: "gru",
        room: "gru",
        matrices: true,
        activations: true,
        quick: || both(rows(&[(2, 70, 64), (1, 3, 81), (9, 1, 120), (1, 40, 256)])),
        thorough: || both(rows(&[(3, 2, 5), (3, 130, 72), (17, 66, 96), (2, 400, 128), (1, 2_200, 16)])),
        measured: |scale| if scale.long() { vec![] } else { vec![scale.size()] },
        build: gru_case,
    },
    Op {
        name: "head",
        room: "head",
        matrices: true,
        activations: true,
        quick: || {
            let mut sizes = with_outputs(rows(&[(2, 70, 64)]), 1601);
            sizes.extend(with_outputs(rows(&[(1, 1, 120), (3, 30, 81)]), 30));
            sizes
        },
        thorough: || {
            let mut sizes = with_outputs(rows(&[(8, 400, 96), (1, 2_200, 128)]), 1601);
            sizes.extend(with_outputs(rows(&[(2, 3, 72), (1, 130, 256)]), 257));
            sizes
        },
        measured: |scale| with_outputs(vec![scale.size()], 1601),
        build: head_case,
    },
    Op {
        name: "kda_gate",
        room: "kda",
        matrices: false,
        activations: true,
        quick: || headed(&[(2, 70, 2, 64, 1), (1, 3, 1, 81, 1), (1, 1, 3, 120, 1)]),
        thorough: || {
            headed(&[(1, 400, 2, 72, 1), (2, 130, 2, 96, 1), (1, 2_200, 2, 128, 1), (2, 7, 2, 9, 1)])
        },
        measured: |scale| vec![scale.size()],
        build: kda_gate_case,
    },
    Op {
        name: "kda_keys",
        room: "kda",
        matrices: false,
        activations: true,
        quick: || headed(&[(2, 70, 2, 64, 1), (1, 3, 1, 81, 1), (1, 1, 3, 120, 1)]),
        thorough: || {
            headed(&[(1, 400, 2, 72, 1), (2, 130, 2, 96, 1), (1, 2_200, 2, 128, 1), (2, 7, 2, 9, 1)])
        },
        measured: |scale| vec![scale.size()],
        build: kda_keys_case,
    },
    Op {
        name: "l2norm",
        room: "l2norm",
        matrices: false,
        activations: true,
        quick: || headed(&[(2, 70, 2, 64, 1), (1, 3, 1, 81, 1), (1, 1, 3, 120, 1)]),
        thorough: || {
            headed(&[(1, 400, 2, 72, 1), (2, 130, 2, 96, 1), (1, 2_200, 2, 128, 1), (2, 7, 2, 9, 1)])
        },
        measured: |scale| vec![scale.size()],
        build: l2norm_case,
    },
    Op {
        name: "layer_norm",
        room: "norms",
        matrices: false,
        activations: true,
        quick: || rows(&[(2, 70, 256), (1, 3, 81), (1, 1, 96)]),
        thorough: || rows(&[(2, 400, 120), (1, 2_200, 64), (3, 130, 1024), (1, 70, 648)]),
        measured: |scale| vec![scale.size()],
        build: layer_norm_case,
    },
    Op {
        name: "linear",
        room: "linear",
        matrices: true,
        activations: true,
        quick: || {
            let mut sizes = with_outputs(rows(&[(2, 70, 64)]), 256);
            sizes.extend(with_outputs(rows(&[(1, 3, 81), (1, 1, 120)]), 37));
            sizes.extend(with_outputs(rows(&[(2, 100, 41)]), 16));
            sizes
        },
        thorough: || {
            let mut sizes = with_outputs(rows(&[(2, 400, 256), (1, 2_200, 128)]), 512);
            sizes.extend(with_outputs(rows(&[(3, 130, 72), (1, 70, 648)]), 4));
            sizes
        },
        measured: |scale| with_outputs(vec![scale.size()], 2 * scale.size().width),
        build: linear_case,
    },
    Op {
        name: "log_sigmoid",
        room: "gates",
        matrices: false,
        activations: true,
        quick: || rows(&[(2, 70, 256), (1, 1, 3)]),
        thorough: || rows(&[(3, 400, 81)]),
        measured: |scale| vec![scale.size()],
        build: |size| {
            let x = activation("x", Draw::of(size).normal(&[size.batch, size.steps, size.width], 4.0));
            elementwise(size, "log_sigmoid", x, |x| log_sigmoid(x, 16.0))
        },
    },
    Op {
        name: "logistic",
        room: "activations",
        matrices: false,
        activations: true,
        quick: || rows(&[(2, 70, 256), (1, 1, 3)]),
        thorough: || rows(&[(3, 400, 81)]),
        measured: |scale| vec![scale.size()],
        build: |size| {
            let x = activation("x", Draw::of(size).normal(&[size.batch, size.steps, size.width], 2.0));
            elementwise(size, "logistic", x, logistic)
        },
    },
    Op {
        name: "mesa",
        room: "mesa",
        matrices: true,
        activations: true,
        quick: || {
            both(headed(&[(2, 70, 2, 64, 64), (1, 3, 1, 81, 81), (1, 1, 2, 120, 72), (1, 40, 1, 128, 128)]))
        },
        thorough: || {
            both(headed(&[(1, 1, 1, 1, 1), (3, 130, 2, 9, 18), (1, 400, 1, 32, 64), (2, 66, 3, 72, 72)]))
        },
        measured: |scale| {
            if scale.long() { vec![] } else { vec![Size { value: scale.size().key, ..scale.size() }] }
        },
        build: mesa_case,
    },
    Op {
        name: "mlstm",
        room: "mlstm",
        matrices: true,
        activations: true,
        quick: || {
            both(headed(&[(2, 70, 2, 64, 128), (1, 3, 1, 81, 96), (1, 1, 2, 120, 72), (1, 200, 1, 128, 256)]))
        },
        thorough: || both(odd_heads()),
        measured: |scale| vec![scale.size()],
        build: mlstm_case,
    },
    Op {
        name: "qk_norm_rope",
        room: "attention",
        matrices: false,
        activations: true,
        quick: || headed(&[(2, 70, 2, 64, 1), (1, 3, 1, 72, 1), (1, 1, 3, 120, 1)]),
        thorough: || headed(&[(2, 400, 2, 96, 1), (1, 2_200, 1, 128, 1), (2, 130, 4, 18, 1)]),
        measured: |scale| vec![scale.size()],
        build: qk_norm_rope_case,
    },
    Op {
        name: "residual_norm",
        room: "residual_norm",
        matrices: false,
        activations: true,
        quick: || both(rows(&[(2, 70, 256), (1, 3, 81), (1, 1, 96)])),
        thorough: || both(rows(&[(2, 400, 120), (1, 2_200, 64), (3, 130, 1024), (1, 70, 648)])),
        measured: |scale| vec![Size { stateful: true, ..scale.size() }],
        build: residual_norm_case,
    },
    Op {
        name: "rms_norm",
        room: "norms",
        matrices: false,
        activations: true,
        quick: || headed(&[(2, 70, 2, 1, 128), (1, 3, 1, 1, 81), (1, 1, 4, 1, 96)]),
        thorough: || {
            headed(&[(2, 400, 4, 1, 120), (1, 2_200, 2, 1, 64), (3, 130, 1, 1, 1024), (1, 70, 3, 1, 18)])
        },
        measured: |scale| vec![scale.size()],
        build: rms_norm_case,
    },
    Op {
        name: "rope",
        room: "attention",
        matrices: false,
        activations: true,
        quick: || headed(&[(2, 70, 2, 64, 1), (1, 3, 1, 72, 1), (1, 1, 3, 120, 1)]),
        thorough: || headed(&[(2, 400, 2, 96, 1), (1, 2_200, 1, 128, 1), (2, 130, 4, 18, 1)]),
        measured: |scale| vec![scale.size()],
        build: rope_case,
    },
    Op {
        name: "rwkv7_keys",
        room: "rwkv7",
        matrices: false,
        activations: true,
        quick: || headed(&[(2, 70, 2, 64, 1), (1, 3, 1, 81, 1), (1, 1, 3, 120, 1)]),
        thorough: || {
            headed(&[(1, 400, 2, 72, 1), (2, 130, 2, 96, 1), (1, 2_200, 2, 128, 1), (2, 7, 2, 9, 1)])
        },
        measured: |scale| vec![scale.size()],
        build: rwkv7_keys_case,
    },
    Op {
        name: "rwkv7_read",
        room: "rwkv7",
        matrices: false,
        activations: true,
        quick: || both(headed(&[(2, 70, 2, 64, 1), (1, 3, 1, 81, 1), (1, 1, 3, 120, 1)])),
        thorough: || {
            both(headed(&[(1, 400, 2, 72, 1), (2, 130, 2, 96, 1), (1, 2_200, 2, 128, 1), (2, 7, 2, 9, 1)]))
        },
        measured: |scale| vec![scale.size()],
        build: rwkv7_read_case,
    },
    Op {
        name: "s4d",
        room: "s4d",
        matrices: false,
        activations: true,
        quick: || both(scans(&[(2, 70, 64, 16), (1, 3, 81, 34), (1, 1, 120, 256), (1, 400, 40, 128)])),
        thorough: || {
            both(scans(&[
                (1, 1, 1, 2),
                (3, 130, 72, 16),
                (1, 400, 96, 256),
                (1, 2_200, 32, 64),
                (2, 65, 130, 24),
            ]))
        },
        measured: |scale| vec![Size { states: 128, ..scale.size() }],
        build: s4d_case,
    },
    Op {
        name: "selective_scan",
        room: "selective_scan",
        matrices: false,
        activations: true,
        quick: || both(scans(&[(2, 70, 64, 16), (1, 3, 81, 64), (1, 1, 120, 256), (1, 400, 40, 128)])),
        thorough: || {
            both(scans(&[
                (1, 1, 64, 16),
                (3, 130, 72, 16),
                (2, 70, 512, 64),
                (1, 400, 96, 256),
                (1, 2_200, 32, 64),
                (2, 65, 128, 24),
            ]))
        },
        measured: |scale| {
            let size = scale.size();
            let (width, states) =
                if scale.long() { (size.width, [16, 128]) } else { (2 * size.width, [64, 128]) };
            states.map(|states| Size { width, states, ..size }).to_vec()
        },
        build: scan_case,
    },
    Op {
        name: "sigmoid",
        room: "gates",
        matrices: false,
        activations: true,
        quick: || headed(&[(2, 70, 4, 1, 1), (1, 1, 3, 1, 1)]),
        thorough: || headed(&[(3, 400, 81, 1, 1)]),
        measured: |scale| vec![scale.size()],
        build: |size| {
            let x = activation("x", Draw::of(size).normal(&[size.batch, size.steps, size.heads], 4.0));
            elementwise(size, "sigmoid", x, |x| sigmoid(x, 2.0))
        },
    },
    Op {
        name: "sigmoid_gate",
        room: "activations",
        matrices: false,
        activations: true,
        quick: || rows(&[(2, 70, 256), (1, 3, 81), (1, 1, 1)]),
        thorough: || rows(&[(2, 400, 120), (1, 2_200, 64), (3, 130, 1024)]),
        measured: |scale| vec![scale.size()],
        build: sigmoid_gate_case,
    },
    Op {
        name: "ssd",
        room: "ssd",
        matrices: true,
        activations: true,
        quick: || {
            both([
                Size { heads: 2, value: 64, states: 128, ..at(2, 70) },
                Size { heads: 1, value: 81, states: 16, ..at(1, 3) },
                Size { heads: 4, value: 72, states: 64, groups: 2, ..at(1, 1) },
                Size { heads: 1, value: 128, states: 256, ..at(1, 300) },
            ])
        },
        thorough: || {
            let mut sizes = vec![];
            for value in [64, 72, 81, 96, 120, 128] {
                for (steps, states) in [(1, 16), (3, 64), (70, 128), (400, 256)] {
                    sizes.push(Size { heads: 2, value, states, ..at(1, steps) });
                }
            }
            sizes.push(Size { heads: 2, value: 64, states: 128, ..at(1, 2_200) });
            sizes.push(Size { heads: 6, value: 16, states: 24, groups: 3, ..at(2, 130) });
            both(sizes)
        },
        measured: |scale| {
            let size = scale.size();
            let heads = if scale.long() { 16 } else { 2 * size.heads };
            vec![Size { heads, value: size.key, states: 128, ..size }]
        },
        build: ssd_case,
    },
    Op {
        name: "swiglu",
        room: "swiglu",
        matrices: false,
        activations: true,
        quick: || {
            let plain = with_outputs(rows(&[(2, 70, 256), (1, 3, 81)]), 0);
            [rows(&[(2, 70, 256), (1, 3, 81), (1, 1, 1)]), plain].concat()
        },
        thorough: || rows(&[(2, 400, 120), (1, 2_200, 64), (3, 130, 1024)]),
        measured: |scale| vec![Size { width: 4 * scale.size().width, ..scale.size() }],
        build: swiglu_case,
    },
    Op {
        name: "tanh",
        room: "activations",
        matrices: false,
        activations: true,
        quick: || rows(&[(2, 70, 256), (1, 1, 3)]),
        thorough: || rows(&[(3, 400, 81)]),
        measured: |scale| vec![scale.size()],
        build: |size| {
            let x = activation("x", Draw::of(size).normal(&[size.batch, size.steps, size.width], 2.0));
            elementwise(size, "tanh", x, tanh)
        },
    },
    Op {
        name: "token_shift",
        room: "rwkv7",
        matrices: false,
        activations: true,
        quick: || both(with_outputs(rows(&[(2, 70, 256), (1, 3, 81), (3, 1, 300)]), 6)),
        thorough: || both(with_outputs(rows(&[(2, 400, 120), (1, 2_200, 64), (3, 130, 1024)]), 4)),
        measured: |scale| vec![Size { outputs: 6, ..scale.size() }],
        build: token_shift_case,
    },
];

fn with_outputs(sizes: Vec<Size>, outputs: usize) -> Vec<Size> {
    sizes.into_iter().map(|size| Size { outputs, ..size }).collect()
}

fn scans(list: &[(usize, usize, usize, usize)]) -> Vec<Size> {
    list.iter().map(|&(batch, steps, width, states)| Size { width, states, ..at(batch, steps) }).collect()
}

/// About the parameters of a model of eight layers.
fn parameters(scale: Scale) -> usize {
    match scale {
        Scale::Width64 => 450_000,
        Scale::Width256 => 4_700_000,
        _ => 69_000_000,
    }
}

/// Random numbers, a stream for each tensor.
struct Draw {
    seed: u64,
    stream: u32,
}

impl Draw {
    fn of(size: &Size) -> Self {
        Self { seed: size.seed, stream: 0 }
    }

    /// A tensor whose elements are `f(index, four uniform numbers)`.
    fn draw(&mut self, shape: &[usize], f: impl Fn(usize, [f32; 4]) -> f32 + Sync) -> Tensor {
        self.stream += 1;
        let key = [self.seed as u32, (self.seed >> 32) as u32 ^ self.stream];
        let values: Vec<f32> = (0..shape.iter().product::<usize>())
            .into_par_iter()
            .with_min_len(1 << 12)
            .map(|i| f(i, philox4x32([i as u32, (i as u64 >> 32) as u32, 0, 0], key).map(unit_f32)))
            .collect();
        Tensor::from_vec(values, shape, &Device::Cpu).expect("as many values as the shape has")
    }

    fn normal(&mut self, shape: &[usize], scale: f32) -> Tensor {
        self.draw(shape, |_, u| scale * normal(u))
    }

    fn uniform(&mut self, shape: &[usize], low: f32, high: f32) -> Tensor {
        self.draw(shape, |_, u| low + (high - low) * u[0])
    }
}

/// A normal number by Box and Muller.
fn normal(u: [f32; 4]) -> f32 {
    (-2.0 * (1.0 - u[0]).ln()).sqrt() * (std::f32::consts::TAU * u[1]).cos()
}

fn activation(name: &'static str, value: Tensor) -> Input {
    Input { name, kind: Kind::Activation, value }
}

/// An input that stays f32 on every route: decays, write strengths, states.
fn exact(name: &'static str, value: Tensor) -> Input {
    Input { name, kind: Kind::Exact, value }
}

fn param(name: &'static str, value: Tensor) -> Input {
    Input { name, kind: Kind::Param, value }
}

fn weight(name: &'static str, value: Tensor) -> Input {
    Input { name, kind: Kind::Weight, value }
}

/// The elements of a random tensor.
fn elements(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().and_then(|t| t.to_vec1()).expect("a tensor of f32")
}

/// Where every run of blanks shows what the step before it showed: the same row again, as an input that does not
/// change gives the same keys. `row` numbers to a step.
fn blank_runs(x: &Tensor, batch: usize, row: usize) -> Tensor {
    let mut values = elements(x);
    let steps = values.len() / (batch * row).max(1);
    for b in 0..batch {
        for t in (1..steps).filter(|t| t % 8 >= 4) {
            let start = (b * steps + t) * row;
            values.copy_within(start - row..start, start);
        }
    }
    Tensor::from_vec(values, x.shape(), &Device::Cpu).expect("the same shape")
}

/// Rows of length one, as l2norm leaves them.
fn unit_rows(x: &Tensor, row: usize) -> Tensor {
    let mut values = elements(x);
    for row in values.chunks_exact_mut(row) {
        let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt();
        row.iter_mut().for_each(|x| *x /= norm);
    }
    Tensor::from_vec(values, x.shape(), &Device::Cpu).expect("the same shape")
}

fn base(op: &'static str, size: &Size, label: String) -> Case {
    Case {
        op,
        size: label,
        tokens: size.batch * size.steps,
        inputs: vec![],
        outputs: &["y"],
        operations: 0.0,
        backward: 2.0,
        run: Box::new(|_| Ok(vec![])),
    }
}

fn label(size: &Size, rest: std::fmt::Arguments) -> String {
    let state = if size.stateful { " state" } else { "" };
    format!("B{} T{} {rest}{state}", size.batch, size.steps)
}

fn elementwise(
    size: &Size,
    op: &'static str,
    x: Input,
    f: impl Fn(Arg) -> Result<Tensor> + Send + Sync + 'static,
) -> Case {
    let elements = x.value.elem_count();
    Case {
        operations: 10.0 * elements as f64,
        inputs: vec![x],
        run: Box::new(move |x| Ok(vec![f(x[0].clone())?])),
        ..base(op, size, label(size, format_args!("D{}", elements / (size.batch * size.steps))))
    }
}

fn adam_case(size: &Size) -> Case {
    let (n, mut draw) = (size.width, Draw::of(size));
    let step = AdamStep {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 1e-2,
        decoupled: false,
        step: 3,
        grad_scale: 0.5,
    };
    Case {
        tokens: n,
        inputs: vec![
            exact("value", draw.normal(&[n], 1.0)),
            exact("grad", draw.normal(&[n], 1.0)),
            exact("m", draw.normal(&[n], 0.1)),
            exact("v", draw.uniform(&[n], 0.001, 0.1)),
        ],
        outputs: &["value", "m", "v"],
        operations: 14.0 * n as f64,
        backward: 0.0,
        run: Box::new(move |x| {
            let [Arg::Tensor(value), Arg::Tensor(grad), Arg::Tensor(m), Arg::Tensor(v)] = x else {
                candle_core::bail!("adam takes four tensors")
            };
            step.apply(value, grad, m, v)?;
            Ok(vec![value.clone(), m.clone(), v.clone()])
        }),
        ..base("adam", size, format!("{n}"))
    }
}

fn global_norm_case(size: &Size) -> Case {
    let n = size.width;
    Case {
        tokens: n,
        inputs: vec![exact("grad", Draw::of(size).normal(&[n], 1.0))],
        outputs: &["sum of squares"],
        operations: 2.0 * n as f64,
        backward: 0.0,
        run: Box::new(|x| {
            let [Arg::Tensor(grad)] = x else { candle_core::bail!("global_norm takes one tensor") };
            // On a GPU the sum stays there.
            #[cfg(feature = "cuda")]
            if grad.device().is_cuda() {
                return Ok(vec![crate::ops::optim::cuda::sum_of_squares(grad)?]);
            }
            Ok(vec![Tensor::new(&[global_norm(grad)?.powi(2)], &Device::Cpu)?])
        }),
        ..base("global_norm", size, format!("{n}"))
    }
}

fn add_case(size: &Size) -> Case {
    let (shape, mut draw) = ([size.batch, size.steps, size.width], Draw::of(size));
    Case {
        inputs: vec![activation("a", draw.normal(&shape, 1.0)), activation("b", draw.normal(&shape, 1.0))],
        operations: shape.iter().product::<usize>() as f64,
        backward: 0.0,
        run: Box::new(|x| Ok(vec![add(x[0].clone(), x[1].clone())?])),
        ..base("add", size, label(size, format_args!("D{}", size.width)))
    }
}

fn sigmoid_gate_case(size: &Size) -> Case {
    let (shape, mut draw) = ([size.batch, size.steps, size.width], Draw::of(size));
    Case {
        inputs: vec![activation("a", draw.normal(&shape, 1.0)), activation("b", draw.normal(&shape, 2.0))],
        operations: 5.0 * shape.iter().product::<usize>() as f64,
        run: Box::new(|x| Ok(vec![sigmoid_gate(x[0].clone(), x[1].clone())?])),
        ..base("sigmoid_gate", size, label(size, format_args!("D{}", size.width)))
    }
}

/// With `sub` above 1: so many keys of earlier steps. With a width below its default: a window of so many. `forgets`:
/// with log forget gates, as of a layer, and now and then down to −12.
fn attention_case(size: &Size, forgets: bool) -> Case {
    let &Size { batch, steps, heads, key, value, sub, .. } = size;
    let keys = if sub > 1 { steps + sub } else { steps };
    let window = (size.width < Size::default().width).then_some(size.width);
    let mut draw = Draw::of(size);
    let scale = (key as f64).powf(-0.5);
    let (b, h, t, past) = (batch as f64, heads as f64, steps as f64, (keys - steps) as f64);
    let mut inputs = vec![
        activation("q", draw.normal(&[batch, steps, heads, key], 1.0)),
        activation("k", draw.normal(&[batch, keys, heads, key], 1.0)),
        activation("v", draw.normal(&[batch, keys, heads, value], 1.0)),
    ];
    if forgets {
        let gate = |_, u: [f32; 4]| match u[2] {
            kind if kind < 0.03 => -12.0 * u[3],
            _ => -(1.0 + (-2.0 - 2.0 * normal(u)).exp()).ln(),
        };
        inputs.push(exact("g", draw.draw(&[batch, keys, heads], gate)));
    }
    Case {
        inputs,
        operations: b * h * (t * t + 2.0 * t * past) * (key + value) as f64,
        backward: 2.5,
        run: Box::new(move |x| {
            let (q, k, v) = (x[0].clone(), x[1].clone(), x[2].clone());
            Ok(vec![match x.get(3) {
                Some(g) => forgetting_attention(q, k, v, g.clone(), scale, window)?,
                None => causal_attention(q, k, v, scale, window)?,
            }])
        }),
        ..base(
            if forgets { "forgetting_attention" } else { "attention" },
            size,
            match keys - steps {
                0 => label(size, format_args!("H{heads} K{key} V{value}")),
                past => label(size, format_args!("S{} H{heads} K{key} V{value}", past + steps)),
            } + &window.map_or(String::new(), |window| format!(" window {window}")),
        )
    }
}

fn qk_norm_rope_case(size: &Size) -> Case {
    let &Size { batch, steps, heads, key, .. } = size;
    let mut draw = Draw::of(size);
    let shape = [batch, steps, heads, key];
    Case {
        inputs: vec![activation("x", draw.normal(&shape, 1.0)), param("w", draw.uniform(&[key], 0.5, 1.5))],
        operations: 8.0 * shape.iter().product::<usize>() as f64,
        run: Box::new(|x| Ok(vec![qk_norm_rope(x[0].clone(), x[1].clone(), 1000.0, 5)?])),
        ..base("qk_norm_rope", size, label(size, format_args!("H{heads} K{key}")))
    }
}

fn rope_case(size: &Size) -> Case {
    let &Size { batch, steps, heads, key, .. } = size;
    let shape = [batch, steps, heads, key];
    Case {
        inputs: vec![activation("x", Draw::of(size).normal(&shape, 1.0))],
        operations: 3.0 * shape.iter().product::<usize>() as f64,
        backward: 1.0,
        run: Box::new(|x| Ok(vec![rope(x[0].clone(), 10_000.0, 5)?])),
        ..base("rope", size, label(size, format_args!("H{heads} K{key}")))
    }
}

fn conv_case(size: &Size) -> Case {
    const TAPS: usize = 4;
    let &Size { batch, steps, width, stateful, .. } = size;
    let mut draw = Draw::of(size);
    // Further columns behind those that are convolved, and some that nobody uses.
    let (plain, rest) = ([4, width % 8 + 4, 8], 4);
    let columns = if stateful { width + plain.iter().sum::<usize>() + rest } else { width };
    let mut inputs = vec![
        activation("x", draw.normal(&[batch, steps, columns], 1.0)),
        param("weight", draw.normal(&[width, 1, TAPS], 0.5)),
    ];
    // The layers of mamba have a bias, the others have none.
    if !stateful || width % 2 == 0 {
        inputs.push(param("bias", draw.normal(&[width], 0.5)));
    }
    let bias = inputs.len() > 2;
    if stateful {
        inputs.push(activation("state", draw.normal(&[batch, TAPS - 1, width], 1.0)));
    }
    // As queries, keys and values, or as one.
    let parts = [width / 4, width / 4, width - 2 * (width / 4)];
    let outputs: &[&str] = match stateful {
        true => &["y, part 0", "y, part 1", "y, part 2", "plain 0", "plain 1", "plain 2", "final state"],
        false => &["y", "final state"],
    };
    Case {
        inputs,
        outputs,
        operations: (2 * TAPS + 5) as f64 * (batch * steps * width) as f64,
        run: Box::new(move |x| {
            let rest = |i: usize, there: bool| there.then(|| x[i].clone());
            let state = rest(2 + usize::from(bias), stateful);
            let (x, weight, bias) = (x[0].clone(), x[1].clone(), rest(2, bias));
            if stateful {
                let Split { parts: y, plain, state } =
                    causal_conv1d_silu_split(x, weight, bias, state, parts, &plain)?;
                return Ok(y.into_iter().chain(plain).chain([state]).collect());
            }
            let (y, state) = causal_conv1d_silu(x, weight, bias, state)?;
            Ok(vec![y, state])
        }),
        ..base("causal_conv1d", size, label(size, format_args!("D{width}")))
    }
}

/// A log decay: mostly mild, some none at all, some strong to the point of forgetting everything.
fn log_decay(u: [f32; 4]) -> f32 {
    match u[2] {
        kind if kind < 0.05 => 0.0,
        kind if kind < 0.1 => -20.0 * u[0],
        kind if kind < 0.12 => -90.0 - 50.0 * u[0],
        _ => -0.2 * (1.0 - u[0]).ln().abs() - 1e-4,
    }
}

fn delta_case(size: &Size, op: &'static str, gated: bool, erases: bool) -> Case {
    let &Size { batch, steps, heads, key, value, sub, stateful, .. } = size;
    let mut draw = Draw::of(size);
    let rows = steps * sub;
    let keys = blank_runs(&draw.normal(&[batch, rows, heads, key], 1.0), batch, heads * key);
    let most = if sub > 1 { 2.0 } else { 1.0 };
    let mut inputs = vec![
        activation("q", unit_rows(&draw.normal(&[batch, steps, heads, key], 1.0), key)),
        activation("k", unit_rows(&keys, key)),
        activation("v", draw.normal(&[batch, rows, heads, value], 1.0)),
        exact("beta", draw.draw(&[batch, rows, heads], |_, u| most / (1.0 + (-2.0 * normal(u)).exp()))),
    ];
    if gated {
        inputs.push(exact("g", draw.draw(&[batch, steps, heads], |_, u| log_decay(u))));
    }
    if stateful {
        inputs.push(exact("state", draw.normal(&[batch, heads, key, value], 0.5)));
    }
    let scale = (key as f64).powf(-0.5);
    let per_head = (4 * sub + 2) as f64 * (key * value) as f64;
    Case {
        inputs,
        outputs: &["o", "final state"],
        operations: per_head * (batch * steps * heads) as f64,
        run: Box::new(move |x| {
            let g = gated.then(|| x[4].clone());
            let state = stateful.then(|| x[4 + usize::from(gated)].clone());
            let (q, k, v, beta) = (x[0].clone(), x[1].clone(), x[2].clone(), x[3].clone());
            let (o, state) = match erases {
                true => gated_delta_rule(q, k, v, beta, g, scale, state)?,
                false => gated_sum_rule(q, k, v, beta, g, scale, state)?,
            };
            Ok(vec![o, state])
        }),
        ..base(
            op,
            size,
            match sub {
                1 => label(size, format_args!("H{heads} K{key} V{value}")),
                _ => label(size, format_args!("n{sub} H{heads} K{key} V{value}")),
            },
        )
    }
}

fn gla_case(size: &Size) -> Case {
    let &Size { batch, steps, heads, key, value, stateful, .. } = size;
    let mut draw = Draw::of(size);
    let per_key = [batch, steps, heads, key];
    let keys = blank_runs(&draw.normal(&per_key, 1.0), batch, heads * key);
    // log σ / 16 of the layer, and decays down to 1e-5 a step and beyond.
    let decay = |_, u: [f32; 4]| match u[2] {
        kind if kind < 0.03 => -12.0 * u[3],
        kind if kind < 0.04 => -40.0 * u[3],
        _ => -(1.0 + (-2.0 * normal(u)).exp()).ln() / 16.0,
    };
    let mut inputs = vec![
        activation("q", draw.normal(&per_key, 1.0)),
        activation("k", keys),
        activation("v", draw.normal(&[batch, steps, heads, value], 1.0)),
        exact("gk", draw.draw(&per_key, decay)),
    ];
    if stateful {
        inputs.push(exact("state", draw.normal(&[batch, heads, key, value], 1.0)));
    }
    let scale = (key as f64).powf(-0.5);
    Case {
        inputs,
        outputs: &["o", "final state"],
        operations: (4 * key * value) as f64 * (batch * steps * heads) as f64,
        run: Box::new(move |x| {
            let state = stateful.then(|| x[4].clone());
            let (o, state) = gla(x[0].clone(), x[1].clone(), x[2].clone(), x[3].clone(), scale, state)?;
            Ok(vec![o, state])
        }),
        ..base("gla", size, label(size, format_args!("H{heads} K{key} V{value}")))
    }
}

/// Keys of one length as in Kimi delta attention, with reads and writes that are not quite the same.
fn dplr_case(size: &Size) -> Case {
    let &Size { batch, steps, heads, key, value, stateful, .. } = size;
    let mut draw = Draw::of(size);
    let per_key = [batch, steps, heads, key];
    let keys = unit_rows(&blank_runs(&draw.normal(&per_key, 1.0), batch, heads * key), key);
    let rates = |x: &Tensor, rate: Tensor| (x * rate).expect("one shape");
    let mut inputs = vec![
        activation("q", unit_rows(&draw.normal(&per_key, 1.0), key)),
        activation("k", rates(&keys, draw.uniform(&per_key, 0.5, 1.0))),
        activation("v", draw.normal(&[batch, steps, heads, value], 1.0)),
        exact("g", draw.draw(&per_key, |_, u| log_decay(u))),
        activation("a", rates(&keys, draw.uniform(&per_key, 0.5, 1.0))),
        activation("b", rates(&keys, draw.uniform(&per_key, 0.0, 1.0))),
    ];
    if stateful {
        inputs.push(exact("state", draw.normal(&[batch, heads, key, value], 0.5)));
    }
    let scale = (key as f64).powf(-0.5);
    Case {
        inputs,
        outputs: &["o", "final state"],
        operations: (9 * key * value) as f64 * (batch * steps * heads) as f64,
        backward: 2.5,
        run: Box::new(move |x| {
            let [q, k, v, g, a, b] = [0, 1, 2, 3, 4, 5].map(|i| x[i].clone());
            let (o, state) = dplr(q, k, v, g, a, b, scale, stateful.then(|| x[6].clone()))?;
            Ok(vec![o, state])
        }),
        ..base("dplr", size, label(size, format_args!("H{heads} K{key} V{value}")))
    }
}

fn kda_gate_case(size: &Size) -> Case {
    let &Size { batch, steps, heads, key, .. } = size;
    let mut draw = Draw::of(size);
    let per_key = [batch, steps, heads, key];
    Case {
        inputs: vec![
            activation("f", draw.draw(&per_key, raw_step)),
            param("a_log", draw.draw(&[heads], |_, u| (0.1 + 15.9 * u[0]).ln())),
            param("dt_bias", draw.draw(&[heads * key], |_, u| step_bias(u))),
        ],
        outputs: &["g"],
        operations: 10.0 * per_key.iter().product::<usize>() as f64,
        run: Box::new(|x| Ok(vec![kda_gate(x[0].clone(), x[1].clone(), x[2].clone())?])),
        ..base("kda_gate", size, label(size, format_args!("H{heads} K{key}")))
    }
}

fn kda_keys_case(size: &Size) -> Case {
    let &Size { batch, steps, heads, key, .. } = size;
    let mut draw = Draw::of(size);
    let per_key = [batch, steps, heads, key];
    Case {
        inputs: vec![
            activation("k", unit_rows(&draw.normal(&per_key, 1.0), key)),
            exact("g", draw.draw(&per_key, |_, u| log_decay(u))),
            exact("beta", draw.uniform(&[batch, steps, heads], 0.0, 2.0)),
        ],
        outputs: &["read", "write"],
        operations: 10.0 * per_key.iter().product::<usize>() as f64,
        run: Box::new(|x| Ok(kda_keys(x[0].clone(), x[1].clone(), x[2].clone())?.into())),
        ..base("kda_keys", size, label(size, format_args!("H{heads} K{key}")))
    }
}

/// Input gates from closed to far beyond what an exponential holds in f32. Queries see the normaliser from either side,
/// but no sum of it is near zero: the division would multiply every rounding.
fn mlstm_case(size: &Size) -> Case {
    let &Size { batch, steps, heads, key, value, stateful, .. } = size;
    let mut draw = Draw::of(size);
    let (per_key, per_head) = ([batch, steps, heads, key], [batch, steps, heads]);
    let keys = blank_runs(&draw.draw(&per_key, |_, u| normal(u).abs()), batch, heads * key);
    let side = move |i: usize| if (i / key).is_multiple_of(3) { -1.0 } else { 1.0 };
    let input = |_, u: [f32; 4]| if u[2] < 0.05 { 200.0 * u[3] - 100.0 } else { 2.0 * normal(u) };
    let mut inputs = vec![
        activation("q", draw.draw(&per_key, |i, u| side(i) * normal(u).abs())),
        activation("k", keys),
        activation("v", draw.normal(&[batch, steps, heads, value], 1.0)),
        activation("i", draw.draw(&per_head, input)),
        exact("log_f", draw.draw(&per_head, |_, u| log_decay(u))),
    ];
    if stateful {
        inputs.push(exact("memory", draw.normal(&[batch, heads, key, value], 0.5)));
        inputs.push(exact("normaliser", draw.uniform(&[batch, heads, key, 1], 0.0, 1.0)));
        inputs.push(exact("stabiliser", draw.normal(&[batch, heads], 2.0)));
    }
    let scale = (key as f64).powf(-0.5);
    Case {
        inputs,
        outputs: &["h", "final memory", "final normaliser"],
        operations: (4 * key * (value + 1)) as f64 * (batch * steps * heads) as f64,
        run: Box::new(move |x| {
            let [q, k, v, i, log_f] = [0, 1, 2, 3, 4].map(|i| x[i].clone());
            let state = |at: usize| x[at].clone();
            let start = stateful.then(|| State { memory: state(5), normaliser: state(6), most: state(7) });
            let (h, State { memory, normaliser, .. }) = mlstm(q, k, v, i, log_f, scale, start)?;
            Ok(vec![h, memory, normaliser])
        }),
        ..base("mlstm", size, label(size, format_args!("H{heads} K{key} V{value}")))
    }
}

fn rwkv7_keys_case(size: &Size) -> Case {
    let &Size { batch, steps, heads, key, .. } = size;
    let mut draw = Draw::of(size);
    let (per_key, width) = ([batch, steps, heads, key], heads * key);
    Case {
        inputs: vec![
            activation("k", draw.normal(&per_key, 1.0)),
            exact("eta", draw.uniform(&[batch, steps, width], 0.0, 1.0)),
            param("k_k", draw.uniform(&[width], 0.5, 1.0)),
            param("k_a", draw.uniform(&[width], 0.5, 1.5)),
        ],
        outputs: &["kappa", "erase", "write"],
        operations: 9.0 * per_key.iter().product::<usize>() as f64,
        run: Box::new(|x| {
            let [k, eta, k_k, k_a] = [0, 1, 2, 3].map(|i| x[i].clone());
            Ok(rwkv7_keys(k, eta, k_k, k_a)?.into())
        }),
        ..base("rwkv7_keys", size, label(size, format_args!("H{heads} K{key}")))
    }
}

/// `stateful` stands for a gate here.
fn rwkv7_read_case(size: &Size) -> Case {
    let &Size { batch, steps, heads, key, stateful: gated, .. } = size;
    let mut draw = Draw::of(size);
    let (per_key, width) = ([batch, steps, heads, key], heads * key);
    let mut inputs = vec![
        activation("o", draw.normal(&per_key, 1.0)),
        activation("r", draw.normal(&per_key, 1.0)),
        activation("k", draw.normal(&per_key, 0.3)),
        activation("v", draw.normal(&per_key, 1.0)),
        param("weight", draw.uniform(&[width], 0.5, 1.5)),
        param("bias", draw.uniform(&[width], -0.5, 0.5)),
        param("r_k", draw.uniform(&[heads, key], -0.5, 0.5)),
    ];
    if gated {
        inputs.push(activation("gate", draw.normal(&[batch, steps, width], 1.0)));
    }
    let gate = if gated { " gate" } else { "" };
    Case {
        inputs,
        operations: 16.0 * per_key.iter().product::<usize>() as f64,
        run: Box::new(move |x| {
            let (four, three) = ([0, 1, 2, 3].map(|i| x[i].clone()), [4, 5, 6].map(|i| x[i].clone()));
            Ok(vec![rwkv7_read(four, three, gated.then(|| x[7].clone()))?])
        }),
        ..base("rwkv7_read", size, format!("B{batch} T{steps} H{heads} K{key}{gate}"))
    }
}

/// `outputs` stands for the number of mixes here.
fn token_shift_case(size: &Size) -> Case {
    let &Size { batch, steps, width, outputs: mixes, stateful, .. } = size;
    let mut draw = Draw::of(size);
    let mut inputs = vec![
        activation("x", draw.normal(&[batch, steps, width], 1.0)),
        param("mix", draw.uniform(&[mixes, width], 0.0, 1.0)),
    ];
    if stateful {
        inputs.push(activation("state", draw.normal(&[batch, 1, width], 1.0)));
    }
    Case {
        inputs,
        outputs: &["first", "second", "third", "fourth", "fifth", "sixth"],
        operations: (3 * mixes * batch * steps * width) as f64,
        run: Box::new(move |x| {
            let (mixes, last) = token_shift(x[0].clone(), x[1].clone(), stateful.then(|| x[2].clone()))?;
            Ok(mixes.into_iter().chain([last]).take(6).collect())
        }),
        ..base("token_shift", size, label(size, format_args!("D{width} n{mixes}")))
    }
}

fn gru_case(size: &Size) -> Case {
    let &Size { batch, steps, width, stateful, .. } = size;
    let mut draw = Draw::of(size);
    let bound = (width as f32).powf(-0.5);
    let mut inputs = vec![
        activation("gates", draw.normal(&[batch, steps, 3 * width], 1.0)),
        weight("weight", draw.uniform(&[3 * width, width], -bound, bound)),
        param("bias", draw.normal(&[3 * width], 0.5)),
    ];
    if stateful {
        inputs.push(exact("state", draw.uniform(&[batch, width], -1.0, 1.0)));
    }
    Case {
        inputs,
        outputs: &["h", "final state"],
        operations: (6 * width * width + 20 * width) as f64 * (batch * steps) as f64,
        run: Box::new(move |x| {
            let state = stateful.then(|| x[3].clone());
            let (h, state) = gru(x[0].clone(), x[1].clone(), x[2].clone(), state)?;
            Ok(vec![h, state])
        }),
        ..base("gru", size, label(size, format_args!("D{width}")))
    }
}

fn mesa_case(size: &Size) -> Case {
    let &Size { batch, steps, heads, key, value, stateful, .. } = size;
    let mut draw = Draw::of(size);
    let (per_key, per_head) = ([batch, steps, heads, key], [batch, steps, heads]);
    let keys = blank_runs(&draw.normal(&per_key, 1.0), batch, heads * key);
    let mut inputs = vec![
        activation("q", unit_rows(&draw.normal(&per_key, 1.0), key)),
        activation("k", unit_rows(&keys, key)),
        activation("v", draw.normal(&[batch, steps, heads, value], 1.0)),
        exact("beta", draw.draw(&per_head, |_, u| 1.0 / (1.0 + (-2.0 * normal(u)).exp()))),
        exact("g", draw.draw(&per_head, |_, u| log_decay(u))),
        param("lambda", draw.normal(&[heads * key], 0.5)),
    ];
    if stateful {
        inputs.push(exact("state of keys", gram(&draw.normal(&[batch, heads, key, key], 1.0), key)));
        inputs.push(exact("state of values", draw.normal(&[batch, heads, key, value], 0.5)));
    }
    let (k, v) = (key as f64, value as f64);
    Case {
        inputs,
        outputs: &["o", "final state of keys", "final state of values"],
        operations: (4.0 * k * v + 4.0 * k * k + k * k * k / 3.0) * (batch * steps * heads) as f64,
        run: Box::new(move |x| {
            let states = stateful.then(|| States { keys: x[6].clone(), values: x[7].clone() });
            let [q, k, v, beta, g, lambda] = [0, 1, 2, 3, 4, 5].map(|i| x[i].clone());
            let (o, keys, values) = mesa(q, k, v, beta, g, lambda, states)?;
            Ok(vec![o, keys, values])
        }),
        ..base("mesa", size, label(size, format_args!("H{heads} K{key} V{value}")))
    }
}

/// M Mᵀ / n of the n × n matrices of an array: symmetric, and with no direction below zero.
fn gram(x: &Tensor, n: usize) -> Tensor {
    let product = x.matmul(&x.transpose(2, 3).expect("matrices")).and_then(|x| x / n as f64);
    product.expect("square matrices")
}

/// The inverse softplus of a step size between 1e-3 and 0.1, log-uniform, as the layers begin with.
fn step_bias(u: [f32; 4]) -> f32 {
    let dt = (1e-3f32.ln() + (0.1f32 / 1e-3).ln() * u[0]).exp();
    dt + (-(-dt).exp_m1()).ln()
}

/// A raw step size: mostly small beside the bias, some so large that the state is forgotten.
fn raw_step(_: usize, u: [f32; 4]) -> f32 {
    if u[2] < 0.03 { 25.0 * u[3] } else { normal(u) }
}

fn scan_case(size: &Size) -> Case {
    let &Size { batch, steps, width, states, stateful, .. } = size;
    let mut draw = Draw::of(size);
    let (wide, maps) = ([batch, steps, width], [batch, steps, states]);
    let mut inputs = vec![
        activation("u", draw.normal(&wide, 1.0)),
        activation("delta", draw.draw(&wide, raw_step)),
        param("a_log", draw.draw(&[width, states], |i, u| ((i % states + 1) as f32).ln() + 0.1 * normal(u))),
        activation("b", draw.normal(&maps, 1.0)),
        activation("c", draw.normal(&maps, 1.0)),
        param("d", draw.normal(&[width], 1.0)),
        param("delta_bias", draw.draw(&[width], |_, u| step_bias(u))),
    ];
    // The layer has a gate; the op does without one too.
    let gated = !(stateful && width % 2 == 1);
    if gated {
        inputs.push(activation("z", draw.normal(&wide, 1.0)));
    }
    if stateful {
        inputs.push(exact("state", draw.normal(&[batch, width, states], 1.0)));
    }
    Case {
        inputs,
        outputs: &["y", "final state"],
        operations: 9.0 * (batch * steps * width * states) as f64,
        run: Box::new(move |x| {
            let z = gated.then(|| x[7].clone());
            let state = stateful.then(|| x[7 + usize::from(gated)].clone());
            let [u, delta, a_log, b, c, d, bias] = [0, 1, 2, 3, 4, 5, 6].map(|i| x[i].clone());
            let (y, state) = selective_scan(u, delta, a_log, b, c, d, z, bias, state)?;
            Ok(vec![y, state])
        }),
        ..base("selective_scan", size, label(size, format_args!("D{width} N{states}")))
    }
}

fn s4d_case(size: &Size) -> Case {
    let &Size { batch, steps, width, states, stateful, .. } = size;
    let (pairs, mut draw) = (states / 2, Draw::of(size));
    let turn = |i: usize, u| std::f32::consts::PI * (i % pairs) as f32 + 0.1 * normal(u);
    let mut inputs = vec![
        activation("u", draw.normal(&[batch, steps, width], 1.0)),
        param("c", draw.normal(&[width, pairs, 2], 0.7)),
        param("log_dt", draw.uniform(&[width], 1e-3f32.ln(), 0.1f32.ln())),
        param("log_a_real", draw.draw(&[width, pairs], |_, u| 0.5f32.ln() + 0.1 * normal(u))),
        param("a_imag", draw.draw(&[width, pairs], turn)),
        param("d", draw.normal(&[width], 1.0)),
    ];
    if stateful {
        inputs.push(exact("state", draw.normal(&[batch, width, pairs, 2], 1.0)));
    }
    Case {
        inputs,
        outputs: &["y", "final state"],
        operations: 14.0 * (batch * steps * width * pairs) as f64,
        run: Box::new(move |x| {
            let state = stateful.then(|| x[6].clone());
            let [u, c, log_dt, log_a_real, a_imag, d] = [0, 1, 2, 3, 4, 5].map(|i| x[i].clone());
            let (y, state) = s4d(u, c, log_dt, log_a_real, a_imag, d, state)?;
            Ok(vec![y, state])
        }),
        ..base("s4d", size, label(size, format_args!("D{width} N{states}")))
    }
}

fn ssd_case(size: &Size) -> Case {
    let &Size { batch, steps, heads, value, states, groups, stateful, .. } = size;
    let mut draw = Draw::of(size);
    let maps = [batch, steps, groups, states];
    let mut inputs = vec![
        activation("x", draw.normal(&[batch, steps, heads, value], 1.0)),
        activation("dt", draw.draw(&[batch, steps, heads], raw_step)),
        param("a_log", draw.draw(&[heads], |_, u| (1.0 + 15.0 * u[0]).ln())),
        activation("b", draw.normal(&maps, 1.0)),
        activation("c", draw.normal(&maps, 1.0)),
        param("d", draw.normal(&[heads], 1.0)),
        param("dt_bias", draw.draw(&[heads], |_, u| step_bias(u))),
    ];
    if stateful {
        inputs.push(exact("state", draw.normal(&[batch, heads, value, states], 1.0)));
    }
    Case {
        inputs,
        outputs: &["y", "final state"],
        operations: (4 * value * states) as f64 * (batch * steps * heads) as f64,
        run: Box::new(move |x| {
            let state = stateful.then(|| x[7].clone());
            let [v, dt, a_log, b, c, d, bias] = [0, 1, 2, 3, 4, 5, 6].map(|i| x[i].clone());
            let (y, state) = ssd(v, dt, a_log, b, c, d, bias, state)?;
            Ok(vec![y, state])
        }),
        ..base("ssd", size, label(size, format_args!("H{heads} P{value} G{groups} N{states}")))
    }
}

fn decay_gate_case(size: &Size) -> Case {
    let &Size { batch, steps, heads, .. } = size;
    let mut draw = Draw::of(size);
    Case {
        inputs: vec![
            activation("a", draw.draw(&[batch, steps, heads], raw_step)),
            param("a_log", draw.draw(&[heads], |_, u| (0.1 + 15.9 * u[0]).ln())),
            param("dt_bias", draw.draw(&[heads], |_, u| step_bias(u))),
        ],
        outputs: &["g"],
        operations: 10.0 * (batch * steps * heads) as f64,
        run: Box::new(|x| Ok(vec![decay_gate(x[0].clone(), x[1].clone(), x[2].clone())?])),
        ..base("decay_gate", size, label(size, format_args!("H{heads}")))
    }
}

const DROPOUT: Dropout = Dropout { p: 0.2, key: [7, 11], site: 3, first: 5, tied: false };

/// `stateful` stands for a mask that all timesteps share.
fn dropout_case(size: &Size) -> Case {
    let x = activation("x", Draw::of(size).normal(&[size.batch, size.steps, size.width], 1.0));
    let mask = Dropout { tied: size.stateful, ..DROPOUT };
    let tied = if size.stateful { " tied" } else { "" };
    Case {
        backward: 1.0,
        size: format!("B{} T{} D{}{tied}", size.batch, size.steps, size.width),
        ..elementwise(size, "dropout", x, move |x| dropout(x, &mask))
    }
}

fn embedding_case(size: &Size) -> Case {
    let &Size { batch, steps, width, outputs: vocab, .. } = size;
    let mut draw = Draw::of(size);
    let ids: Vec<u32> = elements(&draw.uniform(&[batch * steps], 0.0, 1.0))
        .into_iter()
        .map(|u| if u < 0.4 { u32::MAX } else { ((u - 0.4) / 0.6 * vocab as f32) as u32 })
        .collect();
    let ids = Tensor::from_vec(ids, (batch, steps), &Device::Cpu).expect("a shape of that size");
    Case {
        inputs: vec![
            Input { name: "ids", kind: Kind::Ids, value: ids },
            weight("weight", draw.normal(&[width, vocab], 1.0)),
            param("bias", draw.normal(&[width], 1.0)),
        ],
        operations: (batch * steps * width) as f64,
        run: Box::new(|x| {
            let Arg::Tensor(ids) = &x[0] else { candle_core::bail!("ids are a tensor") };
            Ok(vec![embedding(ids, x[1].clone(), x[2].clone())?])
        }),
        ..base("embedding", size, label(size, format_args!("D{width} vocab {vocab}")))
    }
}

fn linear_case(size: &Size) -> Case {
    let &Size { batch, steps, width, outputs, .. } = size;
    let mut draw = Draw::of(size);
    let mut inputs = vec![
        activation("x", draw.normal(&[batch, steps, width], 1.0)),
        weight("weight", draw.normal(&[outputs, width], (width as f32).powf(-0.5))),
    ];
    // The transformer and the encoder have biases, the recurrent mixers none.
    let bias = outputs != 2 * width;
    if bias {
        inputs.push(param("bias", draw.normal(&[outputs], 1.0)));
    }
    Case {
        inputs,
        operations: 2.0 * (batch * steps * width * outputs) as f64,
        run: Box::new(move |x| Ok(vec![linear(x[0].clone(), x[1].clone(), bias.then(|| x[2].clone()))?])),
        ..base("linear", size, label(size, format_args!("{width} to {outputs}")))
    }
}

fn head_case(size: &Size) -> Case {
    let &Size { batch, steps, width, outputs: classes, .. } = size;
    let mut draw = Draw::of(size);
    let labels = elements(&draw.uniform(&[batch * steps], 0.0, classes as f32));
    // Windows of three steps; the last sequence ends early.
    let padded = |i: usize| batch > 1 && i / steps == batch - 1 && i % steps >= steps.div_ceil(2);
    let targets = Targets {
        labels: labels.into_iter().map(|label| (label as u32).min(classes as u32 - 1)).collect(),
        element: (0..batch * steps).map(|i| if padded(i) { PAD } else { (i % steps / 3) as u32 }).collect(),
        batch,
        steps,
        elements: steps.div_ceil(3),
    };
    let loss = Loss::new(targets);
    Case {
        inputs: vec![
            activation("x", draw.normal(&[batch, steps, width], 1.0)),
            weight("weight", draw.normal(&[classes, width], 2.0 * (width as f32).powf(-0.5))),
            param("bias", draw.normal(&[classes], 0.5)),
        ],
        outputs: &["loss", "votes"],
        operations: 2.0 * (batch * steps * width * classes) as f64,
        run: Box::new(move |x| loss.run(x)),
        ..base("head", size, label(size, format_args!("D{width} C{classes}")))
    }
}

fn l2norm_case(size: &Size) -> Case {
    let &Size { batch, steps, heads, key, .. } = size;
    let shape = [batch, steps, heads, key];
    Case {
        inputs: vec![activation("x", Draw::of(size).normal(&shape, 1.0))],
        operations: 4.0 * shape.iter().product::<usize>() as f64,
        run: Box::new(|x| Ok(vec![l2norm(x[0].clone())?])),
        ..base("l2norm", size, label(size, format_args!("H{heads} K{key}")))
    }
}

fn layer_norm_case(size: &Size) -> Case {
    let &Size { batch, steps, width, .. } = size;
    let mut draw = Draw::of(size);
    Case {
        inputs: vec![
            activation("x", draw.normal(&[batch, steps, width], 1.0)),
            param("w", draw.uniform(&[width], 0.5, 1.5)),
            param("b", draw.normal(&[width], 1.0)),
        ],
        operations: 8.0 * (batch * steps * width) as f64,
        run: Box::new(|x| Ok(vec![layer_norm(x[0].clone(), x[1].clone(), x[2].clone(), 1e-5)?])),
        ..base("layer_norm", size, label(size, format_args!("D{width}")))
    }
}

fn rms_norm_case(size: &Size) -> Case {
    let &Size { batch, steps, heads, value, .. } = size;
    let mut draw = Draw::of(size);
    // The transformer's norm adds its epsilon outside of the root.
    let place = if heads == 1 { RmsEps::Outside } else { RmsEps::Inside };
    Case {
        inputs: vec![
            activation("x", draw.normal(&[batch, steps, heads * value], 1.0)),
            param("w", draw.uniform(&[value], 0.5, 1.5)),
        ],
        operations: 5.0 * (batch * steps * heads * value) as f64,
        run: Box::new(move |x| Ok(vec![rms_norm(x[0].clone(), x[1].clone(), 1e-5, place)?])),
        ..base("rms_norm", size, label(size, format_args!("H{heads} V{value}")))
    }
}

fn gated_norm_case(size: &Size, op: &'static str, group: usize, order: GateOrder) -> Case {
    let &Size { batch, steps, heads, value, .. } = size;
    let mut draw = Draw::of(size);
    let shape = [batch, steps, heads * value];
    Case {
        inputs: vec![
            activation("x", draw.normal(&shape, 1.0)),
            activation("z", draw.normal(&shape, 1.0)),
            param("w", draw.uniform(&[group], 0.5, 1.5)),
        ],
        operations: 11.0 * shape.iter().product::<usize>() as f64,
        run: Box::new(move |x| {
            Ok(vec![gated_rms_norm(x[0].clone(), x[1].clone(), x[2].clone(), 1e-5, order)?])
        }),
        ..base(op, size, label(size, format_args!("H{heads} V{value}")))
    }
}

/// `stateful` stands for dropout here.
fn residual_norm_case(size: &Size) -> Case {
    let &Size { batch, steps, width, stateful, .. } = size;
    let mut draw = Draw::of(size);
    let shape = [batch, steps, width];
    let mask = stateful.then_some(DROPOUT);
    let dropped = if stateful { " dropout" } else { "" };
    Case {
        inputs: vec![
            activation("branch", draw.normal(&shape, 1.0)),
            activation("residual", draw.normal(&shape, 1.0)),
            param("w", draw.uniform(&[width], 0.5, 1.5)),
            param("b", draw.normal(&[width], 1.0)),
        ],
        operations: 12.0 * shape.iter().product::<usize>() as f64,
        run: Box::new(move |x| {
            let [branch, residual, w, b] = [0, 1, 2, 3].map(|i| x[i].clone());
            Ok(vec![residual_dropout_layer_norm(branch, residual, w, b, 1e-5, mask)?])
        }),
        ..base("residual_norm", size, format!("B{batch} T{steps} D{width}{dropped}"))
    }
}

fn swiglu_case(size: &Size) -> Case {
    let &Size { batch, steps, width, outputs, .. } = size;
    let mut draw = Draw::of(size);
    let mut inputs = vec![
        activation("x", draw.normal(&[batch, steps, 2 * width], 1.0)),
        param("beta", draw.uniform(&[1], 0.5, 1.5)),
    ];
    // The transformer has a bias, other models none.
    let bias = outputs > 0;
    if bias {
        inputs.push(param("bias", draw.normal(&[2 * width], 1.0)));
    }
    Case {
        inputs,
        operations: 7.0 * (batch * steps * width) as f64,
        run: Box::new(move |x| Ok(vec![swiglu(x[0].clone(), x[1].clone(), bias.then(|| x[2].clone()))?])),
        ..base("swiglu", size, label(size, format_args!("D{width}{}", if bias { " bias" } else { "" })))
    }
}
