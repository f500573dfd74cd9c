//! Every op forward and backward, at the sizes that models give it.

use std::cell::RefCell;

use anyhow::{Error, Result};
use candle_core::{Device, Tensor};
use serde::Serialize;

use super::timing::{Ceilings, Clock, Timing};
use crate::check::{Bound, Case, Checked, Op, Place, Route, Scale, Size, check};

/// How ops are measured.
pub struct Options {
    pub device: Device,
    /// The number format of activations.
    pub route: Route,
    /// Whether the CPU is measured beside a GPU.
    pub cpu: bool,
    /// Sequences, where it is not those of the scale.
    pub batch: Option<usize>,
}

/// The passes of an op at one size.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    pub op: &'static str,
    pub size: String,
    pub scale: &'static str,
    pub route: Route,
    pub matrices: bool,
    pub tokens: usize,
    /// Sets of inputs used in turn.
    pub sets: usize,
    /// Relative RMS of the worst output and gradient of a small case.
    pub output_error: Option<f64>,
    pub gradient_error: Option<f64>,
    pub forward: Option<Pass>,
    /// Forward and backward pass together.
    pub both: Option<Pass>,
    /// Why there is no time.
    pub failure: Vec<String>,
}

/// The time of one or both passes.
#[derive(Clone, Debug, Serialize)]
pub struct Pass {
    pub host: Timing,
    pub graph: Option<Timing>,
    /// The least that must be moved: inputs read, outputs written, once each.
    pub bytes: f64,
    /// Operations of the recurrent form.
    pub operations: f64,
    pub tokens_per_s: f64,
    pub bytes_per_s: f64,
    pub operations_per_s: f64,
    /// Of this device's copy and matrix product.
    pub share_of_copy: f64,
    pub share_of_matmul: f64,
    /// Seconds that the CPU would take for as many tokens, in f32.
    pub cpu: Option<f64>,
}

impl Pass {
    /// Of the kernels alone, where that is known.
    pub fn seconds(&self) -> f64 {
        self.graph.unwrap_or(self.host).median
    }

    fn new(
        (host, graph): (Timing, Option<Timing>),
        (bytes, operations, tokens): (usize, f64, usize),
        (copy, matmul): (f64, f64),
    ) -> Self {
        let seconds = graph.unwrap_or(host).median;
        let (bytes_per_s, operations_per_s) = (bytes as f64 / seconds, operations / seconds);
        Self {
            host,
            graph,
            bytes: bytes as f64,
            operations,
            tokens_per_s: tokens as f64 / seconds,
            bytes_per_s,
            operations_per_s,
            share_of_copy: bytes_per_s / copy,
            share_of_matmul: operations_per_s / matmul,
            cpu: None,
        }
    }
}

/// Measures an op at the sizes of a scale.
pub fn ops(op: &Op, scale: Scale, options: &Options, ceilings: &Ceilings) -> Vec<Measured> {
    let route = match options.route {
        Route::Bf16 if !op.activations => Route::F32,
        Route::Tf32 if !op.matrices => Route::F32,
        route => route,
    };
    let sizes = (op.measured)(scale).into_iter();
    let sizes = sizes.map(|size| Size { batch: options.batch.unwrap_or(size.batch), ..size });
    sizes.map(|size| measure(op, scale, &size, route, options, ceilings)).collect()
}

fn measure(
    op: &Op,
    scale: Scale,
    size: &Size,
    route: Route,
    options: &Options,
    ceilings: &Ceilings,
) -> Measured {
    let device = &options.device;
    // The CPU is measured on as many sequences as take it a second.
    let size = if device.is_cpu() { &for_cpu(op, size).unwrap_or(*size) } else { size };
    let small =
        Size { width: if op.activations { size.width } else { size.width.min(100_003) }, ..size.small() };
    #[cfg(feature = "cuda")]
    crate::cuda::poison(true);
    let checked = check(&(op.build)(&small), device, &[route], size.stateful).remove(0);
    #[cfg(feature = "cuda")]
    crate::cuda::poison(false);
    let error = |gradient| Checked::worst(&checked, gradient).map(|compared| compared.error);
    let mut measured = Measured {
        op: op.name,
        size: String::new(),
        scale: scale.name(),
        route,
        matrices: op.matrices,
        tokens: 0,
        sets: 0,
        output_error: error(false),
        gradient_error: error(true),
        forward: None,
        both: None,
        failure: checked.complaints(),
    };
    // A fast kernel that computes something else is of no interest.
    let case = if checked.passed() { (op.build)(size) } else { (op.build)(&small) };
    measured.size = case.size.clone();
    measured.tokens = case.tokens;
    if checked.passed() {
        route.select();
        if let Err(error) = fill(&mut measured, &case, device, ceilings) {
            let line = format!("{error:#}");
            measured.failure.push(format!(
                "{} {}: {}",
                op.name,
                case.size,
                line.lines().next().unwrap_or("")
            ));
        }
        Route::F32.select();
    }
    if options.cpu && device.is_cuda() && measured.forward.is_some() {
        let cpu = for_cpu(op, size).map(|size| on_cpu(&(op.build)(&size), case.tokens));
        if let Some(Ok((forward, both))) = cpu {
            measured.forward.iter_mut().for_each(|pass| pass.cpu = Some(forward));
            measured.both.iter_mut().for_each(|pass| pass.cpu = both);
        }
    }
    measured
}

/// Measures both passes of a case.
fn fill(measured: &mut Measured, case: &Case, device: &Device, ceilings: &Ceilings) -> Result<()> {
    /// More than the caches of any device hold.
    const TOGETHER: usize = 200 << 20;
    const MOST_SETS: usize = 16;
    let route = measured.route;
    let place = Place::On(device.clone(), route);
    let mut bound = vec![case.bind(&place)?];
    let outputs = case.forward(&bound[0])?;
    let forward_bytes = case.forward_bytes(route, &outputs);
    while bound.len() < MOST_SETS && bound.len() * forward_bytes < TOGETHER {
        bound.push(case.bind(&place)?);
    }
    measured.sets = bound.len();
    let limits = (ceilings.copy, ceilings.operations(route, measured.matrices));

    let clock = Clock::of(device)?;
    let forward = || bound.iter().try_for_each(|bound| case.forward(bound).map(drop)).map_err(Error::from);
    let times = (clock.time(bound.len(), forward)?, clock.time_graph(bound.len(), forward)?);
    measured.forward = Some(Pass::new(times, (forward_bytes, case.operations, case.tokens), limits));
    if case.backward == 0.0 {
        return Ok(());
    }

    let passes = Passes::new(case, &bound[0])?;
    let both = || bound.iter().try_for_each(|bound| passes.run(bound));
    let bytes = case.both_bytes(route, &outputs, &passes.gradients);
    drop(outputs);
    let times = (clock.time(bound.len(), both)?, clock.time_graph(bound.len(), both)?);
    let operations = case.operations * (1.0 + case.backward);
    measured.both = Some(Pass::new(times, (bytes, operations, case.tokens), limits));
    Ok(())
}

/// Forward and backward passes with given gradients of the outputs.
struct Passes<'a> {
    case: &'a Case,
    gradients: Vec<Tensor>,
}

impl<'a> Passes<'a> {
    fn new(case: &'a Case, bound: &Bound) -> Result<Self> {
        let gradients = RefCell::new(vec![]);
        // While training nothing but the first output is used.
        case.both(bound, 1, |_, output| {
            let random =
                Tensor::randn(0f32, 1.0, output.shape(), output.device())?.to_dtype(output.dtype())?;
            gradients.borrow_mut().push(random.clone());
            Ok(random)
        })?;
        Ok(Self { case, gradients: gradients.into_inner() })
    }

    fn run(&self, bound: &Bound) -> Result<()> {
        self.case.both(bound, 1, |i, _| Ok(self.gradients[i].clone())).map(drop).map_err(Error::from)
    }
}

/// The size with as many sequences as the CPU can be expected to do in about a second; `None` if one is too much.
fn for_cpu(op: &Op, size: &Size) -> Option<Size> {
    const OPERATIONS: f64 = 3e9;
    const VALUES: f64 = 5e7;
    if !op.activations {
        return Some(*size);
    }
    // Long attention would take minutes to even build.
    let t = size.steps as f64;
    let attention = ["attention", "forgetting_attention"].contains(&op.name);
    if attention && t * t * (size.heads * (size.key + size.value)) as f64 > 20.0 * OPERATIONS {
        return None;
    }
    let one = (op.build)(&Size { batch: 1, ..*size });
    let values: usize = one.inputs.iter().map(|input| input.value.elem_count()).sum();
    let fit = (OPERATIONS / one.operations.max(1.0)).min(VALUES / values as f64);
    (fit >= 0.05).then(|| Size { batch: (fit as usize).clamp(1, size.batch), ..*size })
}

/// Seconds of both passes on the CPU in f32, as if for `tokens`.
fn on_cpu(case: &Case, tokens: usize) -> Result<(f64, Option<f64>)> {
    let bound = case.bind(&Place::On(Device::Cpu, Route::F32))?;
    let scale = tokens as f64 / case.tokens as f64;
    let forward = Clock::Host.time(1, || case.forward(&bound).map(drop).map_err(Error::from))?.median * scale;
    if case.backward == 0.0 {
        return Ok((forward, None));
    }
    let passes = Passes::new(case, &bound)?;
    let both = Clock::Host.time(1, || passes.run(&bound))?.median * scale;
    Ok((forward, Some(both)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::OPS;

    #[test]
    fn a_pass_is_held_against_the_ceilings() {
        let timing = Timing { median: 1e-3, least: 1e-3, most: 1e-3, calls: 1 };
        let pass = Pass::new((timing, None), (3_000_000, 5e9, 1000), (6e9, 1e13));
        assert_eq!((pass.tokens_per_s, pass.bytes_per_s, pass.operations_per_s), (1e6, 3e9, 5e12));
        assert_eq!((pass.share_of_copy, pass.share_of_matmul), (0.5, 0.5));
        let graph = Timing { median: 5e-4, ..timing };
        let pass = Pass::new((timing, Some(graph)), (3_000_000, 5e9, 1000), (6e9, 1e13));
        assert_eq!((pass.seconds(), pass.share_of_copy), (5e-4, 1.0));
    }

    #[test]
    fn the_cpu_is_measured_without_a_gpu() {
        let ceilings = Ceilings { copy: 1e10, matmul: vec![(Route::F32, 1e11)] };
        let op = OPS.iter().find(|op| op.name == "l2norm").unwrap();
        let options = Options { device: Device::Cpu, route: Route::Bf16, cpu: true, batch: None };
        let size = Size { batch: 2, steps: 50, heads: 2, ..Size::default() };
        // bf16 is nothing that the CPU computes in: the check says so, and there is no time.
        let measured = measure(op, Scale::Width256, &size, Route::Bf16, &options, &ceilings);
        assert!(measured.forward.is_none() && !measured.failure.is_empty());
        let measured = measure(op, Scale::Width256, &size, Route::F32, &options, &ceilings);
        assert!(measured.failure.is_empty(), "{:?}", measured.failure);
        assert!(measured.forward.unwrap().seconds() > 0.0 && measured.both.unwrap().share_of_copy > 0.0);
    }
}
