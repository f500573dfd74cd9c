//! Checks of every op and every model of a device against the float64 path of the CPU.
//!
//! A check rounds the inputs to what the route can hold, computes outputs and the gradients of Σ output · w for
//! random w in f64 on the CPU, and compares what the device gives on buffers filled with NaN, twice: the second
//! run must give the same bits. The measure is the relative root mean square of each tensor's error.

mod case;
pub mod cases;
mod loss;
pub mod models;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor};
use serde::Serialize;

pub use case::{Bound, Case, Input, Kind, Named, Place, Results, Route};
pub use cases::{OPS, Op, Scale, Size};

/// A tolerance that differs from the route's.
struct Exception {
    op: &'static str,
    /// A name, `gradients` for all of them, or `*` for everything.
    tensor: &'static str,
    route: Route,
    tolerance: f64,
    /// Why the route's tolerance cannot be met.
    #[expect(dead_code, reason = "it is for the reader")]
    reason: &'static str,
}

/// Every tensor that may be off by more than its route allows, or less exactly compared, and why.
const EXCEPTIONS: &[Exception] = &[
    Exception {
        op: "head",
        tensor: "votes",
        route: Route::F32,
        tolerance: 0.0,
        reason: "none: classes, not numbers",
    },
    Exception {
        op: "head",
        tensor: "votes",
        route: Route::Tf32,
        tolerance: 0.05,
        reason: "the share of other winners: two classes can be as near as the rounding",
    },
    Exception {
        op: "head",
        tensor: "votes",
        route: Route::Bf16,
        tolerance: 0.1,
        reason: "the share of other winners: two classes can be as near as the rounding",
    },
    Exception {
        op: "head",
        tensor: "loss",
        route: Route::Bf16,
        tolerance: 3e-2,
        reason: "logits are rounded to bf16: the loss of a few tokens is off by as much as a logit",
    },
    Exception {
        op: "swiglu",
        tensor: "gradient of beta",
        route: Route::F32,
        tolerance: 1e-4,
        reason: "one number, in which up to 400,000 terms of either sign cancel",
    },
    Exception {
        op: "ssd",
        tensor: "gradient of a_log",
        route: Route::F32,
        tolerance: 2e-4,
        reason: "one number a head, in which the steps of very strong decays cancel",
    },
    Exception {
        op: "ssd",
        tensor: "gradient of a_log",
        route: Route::Tf32,
        tolerance: 1e-2,
        reason: "one number a head, in which the steps of very strong decays cancel",
    },
    Exception {
        op: "ssd",
        tensor: "gradient of a_log",
        route: Route::Bf16,
        tolerance: 1e-1,
        reason: "one number a head, in which the steps of very strong decays cancel",
    },
    Exception {
        op: "ssd",
        tensor: "gradient of dt_bias",
        route: Route::F32,
        tolerance: 1e-4,
        reason: "one number a head: of 2,200 tokens, sums that are as long as a chunk cancel",
    },
    Exception {
        op: "ssd",
        tensor: "gradient of dt_bias",
        route: Route::Tf32,
        tolerance: 5e-3,
        reason: "one number a head: of three tokens, what is rounded does not average out",
    },
    Exception {
        op: "ssd",
        tensor: "gradient of dt_bias",
        route: Route::Bf16,
        tolerance: 5e-2,
        reason: "one number a head: of three tokens, what is rounded does not average out",
    },
    Exception {
        op: "attention",
        tensor: "*",
        route: Route::F32,
        tolerance: 3e-5,
        reason: "three tf32 products stand for one of f32, and sums of gradients are as long as the sequence",
    },
    Exception {
        op: "ssd",
        tensor: "*",
        route: Route::F32,
        tolerance: 3e-5,
        reason: "three tf32 products stand for one of f32: a few units in the last place more",
    },
    Exception {
        op: "gated_delta_rule",
        tensor: "*",
        route: Route::F32,
        tolerance: 3e-5,
        reason: "runs of equal keys: the chunk's triangular system has a condition number of a thousand",
    },
    Exception {
        op: "gated_delta_rule",
        tensor: "gradient of g",
        route: Route::Bf16,
        tolerance: 5e-2,
        reason: "a difference of large sums; the released bf16 layers are off by up to 6.5e-2 in what follows from it",
    },
    Exception {
        op: "gated_sum_rule",
        tensor: "gradient of g",
        route: Route::F32,
        tolerance: 3e-5,
        reason: "a sum over the channels of a key, in which terms of either sign cancel",
    },
    Exception {
        op: "gated_sum_rule",
        tensor: "gradient of g",
        route: Route::Bf16,
        tolerance: 3e-2,
        reason: "a sum over the channels of a key, in which terms of either sign cancel",
    },
    Exception {
        op: "forgetting_attention",
        tensor: "gradient of g",
        route: Route::F32,
        tolerance: 1e-4,
        reason: "sums along time, in which what belongs to pairs on the same side of a gate cancels",
    },
    Exception {
        op: "forgetting_attention",
        tensor: "*",
        route: Route::Bf16,
        tolerance: 2e-2,
        reason: "of three tokens: the gradients of q and k are small differences of large products",
    },
    Exception {
        op: "gated_delta_product",
        tensor: "gradient of g",
        route: Route::Bf16,
        tolerance: 5e-2,
        reason: "a difference of large sums; the released bf16 layers are off by up to 6.5e-2 in what follows from it",
    },
    Exception {
        op: "mesa",
        tensor: "*",
        route: Route::F32,
        tolerance: 3e-5,
        reason: "solutions of systems whose condition number reaches a hundred, as runs of equal keys make them",
    },
    Exception {
        op: "mesa",
        tensor: "*",
        route: Route::Tf32,
        tolerance: 5e-3,
        reason: "what the products round, the systems multiply",
    },
    Exception {
        op: "mesa",
        tensor: "*",
        route: Route::Bf16,
        tolerance: 3e-2,
        reason: "what is rounded to bf16, the systems multiply; the released bf16 layer is off by up to 3.5e-2",
    },
    Exception {
        op: "delta_rule",
        tensor: "*",
        route: Route::Tf32,
        tolerance: 5e-3,
        reason: "one token without a past: the gradients of q and k are small differences of large products",
    },
    Exception {
        op: "gated_delta_rule",
        tensor: "*",
        route: Route::Tf32,
        tolerance: 5e-3,
        reason: "one token without a past: the gradients of q and k are small differences of large products",
    },
    Exception {
        op: "gated_delta_rule",
        tensor: "*",
        route: Route::Bf16,
        tolerance: 2e-2,
        reason: "one token without a past: the gradients of q and k are small differences of large products",
    },
    Exception {
        op: "delta_rule",
        tensor: "*",
        route: Route::Bf16,
        tolerance: 2e-2,
        reason: "one token without a past: the gradients of q and k are small differences of large products",
    },
    Exception {
        op: "mlstm",
        tensor: "*",
        route: Route::F32,
        tolerance: 1e-4,
        reason: "decays are differences of a running maximum, whose rounding adds up over the sequence",
    },
    Exception {
        op: "mlstm",
        tensor: "gradients",
        route: Route::Tf32,
        tolerance: 3e-2,
        reason: "divided by |q n|, an output does not see the length of its query, nor one token alone how strongly it was written: \
                 what is left of gradients is small",
    },
    Exception {
        op: "mlstm",
        tensor: "gradients",
        route: Route::Bf16,
        tolerance: 3e-1,
        reason: "divided by |q n|, an output does not see the length of its query, nor one token alone how strongly it was written: \
                 what is left of gradients is small",
    },
];

/// How far the relative RMS of an op's tensor may be off on a route. `gradient of x` for a gradient.
pub fn tolerance(op: &str, tensor: &str, route: Route) -> f64 {
    let matches = |pattern: &str| match pattern {
        "*" => true,
        "gradients" => tensor.starts_with("gradient of "),
        name => name == tensor,
    };
    let exception = EXCEPTIONS.iter().find(|e| e.op == op && matches(e.tensor) && e.route == route);
    match (exception, route) {
        (Some(exception), _) => exception.tolerance,
        (None, Route::F32) => 1e-5,
        (None, Route::Tf32) => 2e-3,
        (None, Route::Bf16) => 1e-2,
    }
}

/// How one tensor compares with its reference.
#[derive(Clone, Debug, Serialize)]
pub struct Compared {
    /// `y`, or `gradient of x`.
    pub tensor: String,
    /// Relative RMS; for classes the share that differs.
    pub error: f64,
    pub tolerance: f64,
    /// Elements that are no number.
    pub not_finite: usize,
    pub elements: usize,
    /// Where the error is largest, what stands there and what should.
    pub worst_at: Vec<usize>,
    pub got: f64,
    pub want: f64,
}

impl Compared {
    pub fn passed(&self) -> bool {
        // An error of NaN does not pass.
        self.error <= self.tolerance
    }

    pub fn is_gradient(&self) -> bool {
        self.tensor.starts_with("gradient of ")
    }

    /// The error as a share of what is tolerated.
    pub fn share(&self) -> f64 {
        if self.error.is_nan() { f64::INFINITY } else { self.error / self.tolerance.max(1e-12) }
    }
}

/// One case on one route.
#[derive(Clone, Debug, Serialize)]
pub struct Checked {
    pub op: String,
    pub size: String,
    pub route: Route,
    pub tensors: Vec<Compared>,
    /// Tensors that a second run gave other bits for.
    pub unrepeatable: Vec<String>,
    /// Why nothing could be compared.
    pub failure: Option<String>,
    pub seconds: f64,
}

impl Checked {
    pub fn passed(&self) -> bool {
        self.failure.is_none() && self.unrepeatable.is_empty() && self.tensors.iter().all(Compared::passed)
    }

    /// The worst output, or the worst gradient: the one that comes nearest to its tolerance or is furthest beyond.
    pub fn worst(&self, gradient: bool) -> Option<&Compared> {
        let tensors = self.tensors.iter().filter(|t| t.is_gradient() == gradient);
        tensors.max_by(|a, b| a.share().total_cmp(&b.share()))
    }

    /// What is wrong, a line each.
    pub fn complaints(&self) -> Vec<String> {
        let head = format!("{} {} {}", self.op, self.size, self.route.name());
        let mut lines: Vec<String> =
            self.failure.iter().map(|failure| format!("{head}: {failure}")).collect();
        for t in self.tensors.iter().filter(|t| !t.passed()) {
            let mut line =
                format!("{head}: {} is off by {:.1e}, allowed {:.0e}", t.tensor, t.error, t.tolerance);
            if t.not_finite > 0 {
                line += &format!("; {} of {} elements are no number", t.not_finite, t.elements);
            }
            line += &format!("; worst at {:?}: {:.5e} in place of {:.5e}", t.worst_at, t.got, t.want);
            lines.push(line);
        }
        if !self.unrepeatable.is_empty() {
            lines.push(format!("{head}: a second run gives other bits in {}", self.unrepeatable.join(", ")));
        }
        lines
    }
}

/// Checks one case on a device by one route. `reference` is what the CPU gave in f64 for inputs rounded as the
/// route rounds them.
fn check_on(case: &Case, device: &Device, route: Route, most: usize, reference: &Results) -> Checked {
    let begin = Instant::now();
    let mut checked = Checked {
        op: case.op.into(),
        size: case.size.clone(),
        route,
        tensors: vec![],
        unrepeatable: vec![],
        failure: None,
        seconds: 0.0,
    };
    let place = Place::On(device.clone(), route);
    route.select();
    let runs =
        guarded(|| Ok((case.results(&place, most)?, case.results(&place, most)?, case.outputs(&place)?)));
    Route::F32.select();
    match runs.and_then(|(first, second, plain)| {
        let (outputs, grads) = (&first.outputs, &first.grads);
        let compare_all = |got: &[Named], want: &[Named], prefix: &str, suffix: &str| {
            let pairs = got.iter().zip(want);
            pairs
                .map(|(got, want)| {
                    let tensor = format!("{prefix}{}", got.name);
                    let allowed = tolerance(case.op, &tensor, route);
                    compare(tensor + suffix, &got.value, &want.value, allowed).map_err(anyhow::Error::from)
                })
                .collect::<anyhow::Result<Vec<_>>>()
        };
        let mut tensors = compare_all(outputs, &reference.outputs, "", "")?;
        tensors.extend(compare_all(grads, &reference.grads, "gradient of ", "")?);
        let differing = differing(outputs, &plain)?;
        if !differing.is_empty() {
            tensors.extend(compare_all(&plain, &reference.outputs, "", " (no backward pass to come)")?);
        }
        let mut unrepeatable = self::differing(outputs, &second.outputs)?;
        let grads = self::differing(grads, &second.grads)?;
        unrepeatable.extend(grads.into_iter().map(|name| format!("gradient of {name}")));
        Ok((tensors, unrepeatable))
    }) {
        Ok((tensors, unrepeatable)) => (checked.tensors, checked.unrepeatable) = (tensors, unrepeatable),
        Err(error) => checked.failure = Some(first_line(&format!("{error:#}"))),
    }
    checked.seconds = begin.elapsed().as_secs_f64();
    checked
}

/// Runs `f`; a panic becomes an error.
fn guarded<T>(f: impl FnOnce() -> Result<T>) -> anyhow::Result<T> {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(result) => Ok(result?),
        Err(panic) => {
            let message = panic.downcast_ref::<String>().map(String::as_str);
            let message = message.or(panic.downcast_ref::<&str>().copied()).unwrap_or("without a message");
            anyhow::bail!("panicked: {message}")
        }
    }
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or("").into()
}

/// Checks a case on a device by every given route.
pub fn check(case: &Case, device: &Device, routes: &[Route], stateful: bool) -> Vec<Checked> {
    // While training nothing uses the final state.
    let most = if stateful { usize::MAX } else { 1 };
    let mut references: Vec<(bool, anyhow::Result<Results>)> = vec![];
    let mut list = vec![];
    for &route in routes {
        let rounded = route == Route::Bf16;
        if references.iter().all(|(r, _)| *r != rounded) {
            let reference = guarded(|| case.results(&Place::Reference(route), most));
            references.push((rounded, reference));
        }
        let reference = references.iter().find(|(r, _)| *r == rounded);
        list.push(match reference {
            Some((_, Ok(reference))) => check_on(case, device, route, most, reference),
            Some((_, Err(error))) => Checked {
                op: case.op.into(),
                size: case.size.clone(),
                route,
                tensors: vec![],
                unrepeatable: vec![],
                failure: Some(format!(
                    "the reference on the CPU fails: {}",
                    first_line(&format!("{error:#}"))
                )),
                seconds: 0.0,
            },
            None => unreachable!("just put in"),
        });
    }
    list
}

/// What to check.
pub struct Plan<'a> {
    pub device: &'a Device,
    pub routes: &'a [Route],
    /// All sizes, and training runs of 50 updates.
    pub thorough: bool,
    /// Fill new buffers with NaN.
    pub poison: bool,
    /// Whether an op, a room, a model, `models` or `training` is wanted.
    pub wanted: &'a dyn Fn(&str) -> bool,
}

/// Checks everything that is wanted.
pub fn run(plan: &Plan) -> Vec<Checked> {
    let &Plan { device, thorough, wanted, .. } = plan;
    let mut list = Vec::new();
    #[cfg(feature = "cuda")]
    crate::cuda::poison(plan.poison);
    for op in OPS.iter().filter(|op| wanted(op.name) || wanted(op.room)) {
        let routes: Vec<Route> =
            routes(op, device).into_iter().filter(|route| plan.routes.contains(route)).collect();
        let mut sizes = (op.quick)();
        if thorough {
            sizes.extend((op.thorough)());
        }
        for size in sizes {
            list.extend(check(&(op.build)(&size), device, &routes, size.stateful));
        }
    }
    #[cfg(feature = "cuda")]
    if device.is_cuda() && wanted("expand") {
        list.extend(models::check_expansion(device));
    }
    let updates = if thorough { 50 } else { 3 };
    for name in models::names().chain(models::VARIANTS.iter().copied()) {
        for &route in plan.routes.iter().filter(|route| device.is_cuda() || **route == Route::F32) {
            let wanted_model = wanted(models::model_of(name));
            if wanted("models") || wanted_model {
                list.push(models::check_model(name, device, route));
                list.push(models::check_evaluation(name, device, route));
            }
            if wanted("training") || wanted_model {
                list.push(models::check_training(name, device, route, updates));
            }
        }
    }
    #[cfg(feature = "cuda")]
    crate::cuda::poison(false);
    list
}

/// The routes of an op on a device.
pub fn routes(op: &Op, device: &Device) -> Vec<Route> {
    let has = |route: &Route| match route {
        Route::F32 => true,
        Route::Tf32 => op.matrices && device.is_cuda(),
        Route::Bf16 => op.activations && device.is_cuda(),
    };
    Route::ALL.into_iter().filter(has).collect()
}

/// The names of tensors that do not hold the same bits.
fn differing(a: &[Named], b: &[Named]) -> Result<Vec<String>> {
    let mut names = vec![];
    for (a, b) in a.iter().zip(b) {
        if a.value.dtype() != b.value.dtype()
            || a.value.dims() != b.value.dims()
            || bits(&a.value)? != bits(&b.value)?
        {
            names.push(a.name.clone());
        }
    }
    Ok(names)
}

fn bits(tensor: &Tensor) -> Result<Vec<u64>> {
    Ok(numbers(tensor)?.into_iter().map(f64::to_bits).collect())
}

/// All elements in f64.
fn numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

/// A reference below this RMS counts as zero: rounding alone makes such numbers, as in the gradient of a softmax
/// over one key.
const NOTHING: f64 = 1e-9;

/// Compares a tensor with its reference: relative RMS, or the absolute one where the reference is zero.
pub fn compare(tensor: String, got: &Tensor, want: &Tensor, tolerance: f64) -> Result<Compared> {
    if got.elem_count() != want.elem_count() {
        candle_core::bail!("{tensor} has shape {:?}, not {:?}", got.shape(), want.shape())
    }
    let classes = want.dtype() == DType::U32;
    let shape = want.dims().to_vec();
    let (got, want) = (numbers(got)?, numbers(want)?);
    let n = got.len().max(1) as f64;
    let (mut error, mut norm, mut other, mut not_finite) = (0.0, 0.0, 0, 0);
    let (mut worst, mut worst_error) = (0, -1.0);
    for (i, (&got, &want)) in got.iter().zip(&want).enumerate() {
        let d = got - want;
        error += d * d;
        norm += want * want;
        other += usize::from(got != want);
        not_finite += usize::from(!got.is_finite());
        let d = if d.is_nan() { f64::INFINITY } else { d.abs() };
        if d > worst_error {
            (worst, worst_error) = (i, d);
        }
    }
    let (rms, size) = ((error / n).sqrt(), (norm / n).sqrt());
    let error = match () {
        () if classes => other as f64 / n,
        () if size < NOTHING => rms,
        () => rms / size,
    };
    let mut worst_at = vec![];
    let mut rest = worst;
    for &dim in shape.iter().rev() {
        worst_at.insert(0, rest % dim.max(1));
        rest /= dim.max(1);
    }
    let at = |values: &[f64]| values.get(worst).copied().unwrap_or(0.0);
    Ok(Compared {
        tensor,
        error,
        tolerance,
        not_finite,
        elements: got.len(),
        worst_at,
        got: at(&got),
        want: at(&want),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(values: &[f64]) -> Tensor {
        Tensor::new(values, &Device::Cpu).unwrap()
    }

    fn error(got: &[f64], want: &[f64]) -> Compared {
        compare("x".into(), &tensor(got), &tensor(want), 1e-5).unwrap()
    }

    #[test]
    fn the_error_is_relative_to_the_whole_tensor() {
        let compared = error(&[3.0, 4.0 + 5e-3], &[3.0, 4.0]);
        assert!((compared.error - 1e-3).abs() < 1e-9 && !compared.passed());
        assert_eq!((compared.worst_at, compared.want), (vec![1], 4.0));
        assert!(error(&[3.0, 4.0], &[3.0, 4.0]).passed());
    }

    #[test]
    fn nan_and_infinity_never_pass() {
        for bad in [f64::NAN, f64::INFINITY] {
            let compared = error(&[1.0, bad], &[1.0, 2.0]);
            assert!(!compared.passed() && compared.not_finite == 1 && compared.worst_at == [1]);
        }
    }

    #[test]
    fn nothing_is_compared_absolutely() {
        assert!(error(&[1e-7], &[1e-18]).passed());
        assert!(!error(&[1e-3], &[1e-18]).passed());
    }

    #[test]
    fn every_op_has_cases_that_run_and_formulas_that_grow() {
        for op in OPS {
            let build = |size: &Size| (op.build)(size);
            for size in (op.quick)().iter().filter(|size| size.steps <= 3) {
                let case = build(size);
                let results = case.results(&Place::Reference(Route::F32), usize::MAX).unwrap();
                assert_eq!(results.outputs.len(), case.outputs.len(), "{}", op.name);
                assert!(case.operations > 0.0, "{}", op.name);
                let twice = build(&Size { batch: 2 * size.batch, ..*size });
                if case.differentiable() {
                    assert_eq!(twice.operations, 2.0 * case.operations, "{}", op.name);
                    assert_eq!(twice.tokens, 2 * case.tokens);
                }
            }
        }
    }

    #[test]
    fn the_convolution_moves_five_tensors_in_both_passes() {
        let op = OPS.iter().find(|op| op.name == "causal_conv1d").unwrap();
        let case = (op.build)(&Size { batch: 2, steps: 50, width: 512, ..Size::default() });
        let bound = case.bind(&Place::On(Device::Cpu, Route::F32)).unwrap();
        let outputs = case.forward(&bound).unwrap();
        let x = (2 * 50 * 512 * 4) as f64;
        let near = |bytes: usize, want: f64| (bytes as f64 / want - 1.0).abs() < 0.1;
        assert!(near(case.forward_bytes(Route::F32, &outputs), 2.0 * x));
        assert!(near(case.both_bytes(Route::F32, &outputs, &outputs[..1]), 5.0 * x));
    }
}
