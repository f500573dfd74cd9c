//! Every operation on the CPU, forward and backward, at the sizes that the models give it.
//!
//! `cargo bench --bench ops` prints a time for a batch of 8 sequences of 400 steps, width 64 and 256, four
//! heads, d_state 128. Values wide are twice the width, as in every layer.

use candle_core::{Device, Result, Tensor, Var};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use selectivbench::ops::attention::{causal_attention, qk_norm_rope};
use selectivbench::ops::causal_conv1d::causal_conv1d_silu;
use selectivbench::ops::delta::gated_delta_rule;
use selectivbench::ops::dropout::Dropout;
use selectivbench::ops::embedding::embedding;
use selectivbench::ops::gates::{decay_gate, log_sigmoid};
use selectivbench::ops::gla::gla;
use selectivbench::ops::head::{Targets, head_cross_entropy};
use selectivbench::ops::l2norm::l2norm;
use selectivbench::ops::linear::linear;
use selectivbench::ops::norms::{GateOrder, RmsEps, gated_rms_norm, layer_norm, rms_norm};
use selectivbench::ops::optim::{AdamStep, global_norm};
use selectivbench::ops::residual_norm::residual_dropout_layer_norm;
use selectivbench::ops::selective_scan::selective_scan;
use selectivbench::ops::ssd::ssd;
use selectivbench::ops::swiglu::swiglu;
use selectivbench::ops::{Arg, no_grad};

/// The allocator of the program.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const BATCH: usize = 8;
const STEPS: usize = 400;
const HEADS: usize = 4;
const STATE: usize = 128;
const CLASSES: usize = 1601;
const VOCAB: usize = 41;

/// Roughly normal numbers, times `scale`.
fn random(shape: &[usize], scale: f64) -> Tensor {
    let mut x = 0x9e37_79b9_7f4a_7c15u64 ^ shape.iter().fold(1, |hash, &n| hash * 31 + n as u64);
    let mut uniform = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    let n: usize = shape.iter().product();
    let values: Vec<f32> = (0..n).map(|_| (uniform() + uniform() + uniform()) * 2.0 * scale as f32).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).expect("a shape of that size")
}

/// Log decays: negative, small.
fn decays(shape: &[usize]) -> Tensor {
    random(shape, 0.1).abs().and_then(|x| x.neg()).expect("numbers")
}

type Op = Box<dyn Fn(&[Tensor]) -> Result<Tensor>>;

/// Name, inputs, and the operation on them, for one width.
fn cases(width: usize) -> Vec<(&'static str, Vec<Tensor>, Op)> {
    let (d, k) = (width, width / HEADS);
    let v = 2 * k;
    let tokens = |tail: &[usize]| [&[BATCH, STEPS], tail].concat();
    let keys = random(&tokens(&[HEADS, k]), 1.0);
    let unit = no_grad(|| l2norm(&keys)).expect("rows");
    let values = random(&tokens(&[HEADS, v]), 1.0);
    let repeat = |x: &Tensor, n: usize| Tensor::cat(&vec![x.clone(); n], 1).expect("the same shapes");
    let beta = random(&tokens(&[HEADS]), 0.3).abs().expect("numbers");
    let scale = (k as f64).powf(-0.5);
    let targets = Targets {
        labels: (0..BATCH * STEPS).map(|i| (i * 7 % CLASSES) as u32).collect(),
        element: (0..BATCH * STEPS).map(|i| (i % STEPS / 2) as u32).collect(),
        batch: BATCH,
        steps: STEPS,
        elements: STEPS / 2,
    };
    let ids: Vec<u32> =
        (0..BATCH * STEPS).map(|i| if i % 2 == 0 { i as u32 % 41 } else { u32::MAX }).collect();
    let ids = Tensor::from_vec(ids, (BATCH, STEPS), &Device::Cpu).expect("a shape of that size");
    let x = random(&tokens(&[d]), 1.0);
    let wide = random(&tokens(&[2 * d]), 1.0);
    let dropout = Dropout { p: 0.2, key: [1, 2], site: 0, first: 0, tied: false };
    vec![
        (
            "causal_conv1d",
            vec![wide.clone(), random(&[2 * d, 1, 4], 0.5), random(&[2 * d], 0.5)],
            Box::new(|x| Ok(causal_conv1d_silu(&x[0], &x[1], Some(Arg::from(&x[2])), None)?.0)),
        ),
        (
            "selective_scan",
            vec![
                wide.clone(),
                random(&tokens(&[2 * d]), 0.5),
                random(&[2 * d, STATE], 0.5),
                random(&tokens(&[STATE]), 1.0),
                random(&tokens(&[STATE]), 1.0),
                random(&[2 * d], 1.0),
                wide.clone(),
                random(&[2 * d], 0.5),
            ],
            Box::new(|x| {
                let z = Some(Arg::from(&x[6]));
                Ok(selective_scan(&x[0], &x[1], &x[2], &x[3], &x[4], &x[5], z, &x[7], None)?.0)
            }),
        ),
        (
            "ssd",
            vec![
                random(&tokens(&[2 * HEADS, k]), 1.0),
                random(&tokens(&[2 * HEADS]), 0.5),
                random(&[2 * HEADS], 0.5),
                random(&tokens(&[1, STATE]), 1.0),
                random(&tokens(&[1, STATE]), 1.0),
                random(&[2 * HEADS], 1.0),
                random(&[2 * HEADS], 0.5),
            ],
            Box::new(|x| Ok(ssd(&x[0], &x[1], &x[2], &x[3], &x[4], &x[5], &x[6], None)?.0)),
        ),
        (
            "delta_rule",
            vec![unit.clone(), unit.clone(), values.clone(), beta.clone()],
            Box::new(move |x| Ok(gated_delta_rule(&x[0], &x[1], &x[2], &x[3], None, scale, None)?.0)),
        ),
        (
            "gated_delta_rule",
            vec![unit.clone(), unit.clone(), values.clone(), beta.clone(), decays(&tokens(&[HEADS]))],
            Box::new(move |x| {
                let g = Some(Arg::from(&x[4]));
                Ok(gated_delta_rule(&x[0], &x[1], &x[2], &x[3], g, scale, None)?.0)
            }),
        ),
        (
            "gated_delta_product_4",
            vec![
                unit.clone(),
                repeat(&unit, 4),
                repeat(&values, 4),
                repeat(&beta, 4),
                decays(&tokens(&[HEADS])),
            ],
            Box::new(move |x| {
                let g = Some(Arg::from(&x[4]));
                Ok(gated_delta_rule(&x[0], &x[1], &x[2], &x[3], g, scale, None)?.0)
            }),
        ),
        (
            "gla",
            vec![keys.clone(), keys.clone(), values.clone(), decays(&tokens(&[HEADS, k]))],
            Box::new(move |x| Ok(gla(&x[0], &x[1], &x[2], &x[3], scale, None)?.0)),
        ),
        (
            "causal_attention",
            vec![keys.clone(), keys.clone(), keys.clone()],
            Box::new(move |x| causal_attention(&x[0], &x[1], &x[2], scale, None)),
        ),
        (
            "qk_norm_rope",
            vec![keys.clone(), random(&[k], 1.0)],
            Box::new(|x| qk_norm_rope(&x[0], &x[1], 1000.0, 0)),
        ),
        (
            "layer_norm",
            vec![x.clone(), random(&[d], 1.0), random(&[d], 1.0)],
            Box::new(|x| layer_norm(&x[0], &x[1], &x[2], 1e-5)),
        ),
        (
            "rms_norm",
            vec![values.clone(), random(&[v], 1.0)],
            Box::new(|x| rms_norm(&x[0], &x[1], 1e-5, RmsEps::Inside)),
        ),
        (
            "gated_rms_norm",
            vec![wide.clone(), wide.clone(), random(&[2 * d], 1.0)],
            Box::new(|x| gated_rms_norm(&x[0], &x[1], &x[2], 1e-5, GateOrder::BeforeNorm)),
        ),
        ("l2norm", vec![keys.clone()], Box::new(|x| l2norm(&x[0]))),
        (
            "decay_gate",
            vec![random(&tokens(&[HEADS]), 1.0), random(&[HEADS], 1.0), random(&[HEADS], 1.0)],
            Box::new(|x| decay_gate(&x[0], &x[1], &x[2])),
        ),
        ("log_sigmoid", vec![x.clone()], Box::new(|x| log_sigmoid(&x[0], 16.0))),
        (
            "swiglu",
            vec![random(&tokens(&[8 * d]), 1.0), random(&[1], 1.0)],
            Box::new(|x| swiglu(&x[0], &x[1], None)),
        ),
        (
            "residual_norm",
            vec![x.clone(), x.clone(), random(&[d], 1.0), random(&[d], 1.0)],
            Box::new(move |x| residual_dropout_layer_norm(&x[0], &x[1], &x[2], &x[3], 1e-5, Some(dropout))),
        ),
        (
            "embedding",
            vec![random(&[d, VOCAB], 1.0), random(&[d], 1.0)],
            Box::new(move |x| embedding(&ids, &x[0], &x[1])),
        ),
        ("linear", vec![x.clone(), random(&[2 * d, d], 0.1)], Box::new(|x| linear(&x[0], &x[1], None))),
        (
            "head",
            vec![x, random(&[CLASSES, d], 0.1), random(&[CLASSES], 0.1)],
            Box::new(move |x| {
                Ok(head_cross_entropy(&x[0], &x[1], &x[2], &targets, (BATCH * STEPS) as f64)?.loss)
            }),
        ),
    ]
}

fn ops(c: &mut Criterion) {
    for width in [64, 256] {
        for (name, inputs, op) in cases(width) {
            let mut group = c.benchmark_group(name);
            group.throughput(Throughput::Elements((BATCH * STEPS) as u64));
            group.bench_function(BenchmarkId::new("forward", width), |b| {
                b.iter(|| no_grad(|| op(&inputs)).expect("the operation"));
            });
            let vars: Vec<Var> =
                inputs.iter().map(Var::from_tensor).collect::<Result<_>>().expect("variables");
            let args: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
            let w = random(no_grad(|| op(&inputs)).expect("the operation").dims(), 1.0);
            group.bench_function(BenchmarkId::new("forward+backward", width), |b| {
                b.iter(|| {
                    // The gradient of an output is dense, as in a model.
                    let y = op(&args).expect("the operation");
                    let loss = (y * &w).and_then(|y| y.sum_all()).expect("a sum");
                    loss.backward().expect("the gradient")
                });
            });
            group.finish();
        }
    }
}

fn optimizer(c: &mut Criterion) {
    const N: usize = 4_000_000;
    let [value, grad, m] = [(); 3].map(|()| random(&[N], 1e-3));
    let v = m.sqr().expect("numbers");
    let adam = AdamStep {
        lr: 1e-9,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.0,
        decoupled: false,
        step: 1,
        grad_scale: 1.0,
    };
    let mut group = c.benchmark_group("optim");
    group.throughput(Throughput::Elements(N as u64));
    group.bench_function("adam, 4M parameters", |b| {
        b.iter(|| adam.apply(&value, &grad, &m, &v).expect("an update"))
    });
    group.bench_function("global norm, 4M parameters", |b| b.iter(|| global_norm(&grad).expect("a norm")));
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(std::time::Duration::from_millis(300))
        .measurement_time(std::time::Duration::from_millis(1500));
    targets = ops, optimizer
}
criterion_main!(benches);
