//! Launching `kernels/causal_conv1d.cu`.

use candle_core::{DType, Result, Tensor};

use super::CausalConv1d;
use super::reference::Shape;
use crate::cuda::{Gpu, KernelArg, Launch, NULL, kernels, suffix};
use crate::ops::tape::{Forward, Run, Value};

/// Threads of a block.
const THREADS: usize = 128;
/// Runs of steps in a block, one to a warp.
const WARPS: usize = THREADS / 32;
/// Channels of a thread, where the width and the addresses allow that.
const VECTOR: usize = 4;
/// Parts that y may come in, and parts that are given as they are.
const MOST_PARTS: usize = 3;
const MOST_PLAIN: usize = 3;
const PLACES: usize = MOST_PARTS + MOST_PLAIN;
/// Steps of a thread where there are many; runs share W − 1 steps, which the backward pass computes twice.
const FORWARD_RUN: usize = 16;
const BACKWARD_RUN: usize = 52;
/// So many threads fill a GPU.
const MANY_THREADS: usize = 1 << 16;

/// How one pass is laid out.
struct Plan {
    name: String,
    /// Channels of a thread.
    vector: usize,
    /// Steps of a thread.
    run: usize,
    /// Runs of the whole batch.
    runs: usize,
}

impl Plan {
    /// A plan with runs of `longest` steps or fewer; `rows`: the addresses of all rows.
    fn new(
        pass: &str,
        node: &CausalConv1d,
        dtype: DType,
        longest: usize,
        rows: &[KernelArg],
    ) -> Result<Self> {
        let Shape { batch, steps, width, taps } = node.shape;
        if taps > 8 || steps == 0 {
            candle_core::bail!(
                "causal_conv1d on a GPU: at most 8 taps and at least one step, got {taps} and {steps}"
            )
        }
        let aligned = |row: &KernelArg| !matches!(row, KernelArg::Ptr(at) if at % 16 != 0);
        let whole = |width: &usize| width.is_multiple_of(VECTOR);
        let mut widths = node.widths.iter().chain(&node.plain).chain([&node.columns]);
        let fits = taps <= 4 && widths.all(whole) && rows.iter().all(aligned);
        let vector = if fits { VECTOR } else { 1 };
        // Runs of equal length, as many as fill the GPU, and not longer than the longest.
        let threads = batch * (width / vector);
        let runs = MANY_THREADS.div_ceil(threads).min(steps.div_ceil(8)).max(steps.div_ceil(longest));
        let run = steps.div_ceil(runs).next_multiple_of(4);
        let padded = if taps <= 4 { 4 } else { 8 };
        let name = format!("causal_conv1d_{pass}_w{padded}_v{vector}_{}", suffix(dtype)?);
        Ok(Self { name, vector, run, runs: batch * steps.div_ceil(run) })
    }

    /// A warp for every run of 32 vectors of columns.
    fn launch(&self, node: &CausalConv1d) -> Launch {
        let slabs = self.runs.div_ceil(WARPS);
        Launch::grid(node.columns.div_ceil(32 * self.vector), slabs, 1, THREADS as u32)
    }

    /// What ends the arguments of both kernels.
    fn sizes(&self, node: &CausalConv1d) -> Vec<KernelArg> {
        let Shape { batch, steps, width, taps } = node.shape;
        // Parts that there are not end where they begin.
        let end = |first: usize, widths: &[usize], i: usize| first + widths.iter().take(i + 1).sum::<usize>();
        let ends = (0..MOST_PARTS).map(|i| end(0, &node.widths, i));
        let plain = (0..MOST_PLAIN).map(|i| end(width, &node.plain, i));
        let sizes = [batch, steps, node.columns, taps, self.run];
        ends.chain(plain).chain(sizes).map(KernelArg::from).collect()
    }
}

impl CausalConv1d {
    /// The addresses of parts of y or of its gradient at their places, null where there is none.
    fn places<T>(
        &self,
        parts: &[T],
        address: impl Fn(&T) -> Result<KernelArg>,
    ) -> Result<[KernelArg; PLACES]> {
        if self.widths.len() > MOST_PARTS || self.plain.len() > MOST_PLAIN {
            candle_core::bail!(
                "causal_conv1d on a GPU: at most {MOST_PARTS} parts and {MOST_PLAIN} plain ones, got {:?} and {:?}",
                self.widths,
                self.plain
            )
        }
        let mut places = [NULL; PLACES];
        for (i, part) in parts.iter().enumerate() {
            let n = self.widths.len();
            places[if i < n { i } else { MOST_PARTS + i - n }] = address(part)?;
        }
        Ok(places)
    }
}

impl CausalConv1d {
    /// x, the weight, the bias and the state: what begins the arguments of both kernels.
    fn inputs(&self, gpu: &Gpu, args: &[Tensor]) -> Result<[KernelArg; 4]> {
        let optional = |place: Option<usize>| gpu.ptr_or_null(place.map(|i| &args[i]));
        let dtype = args[0].dtype();
        let wanted = [(Some(1), DType::F32), (self.bias, DType::F32), (self.state, dtype)];
        for (place, wanted) in wanted {
            if let Some(i) = place
                && args[i].dtype() != wanted
            {
                candle_core::bail!(
                    "causal_conv1d on a GPU: x is {dtype:?}, the state must be too and the parameters F32; \
                     argument {i} is {:?}",
                    args[i].dtype()
                )
            }
        }
        Ok([gpu.ptr(&args[0])?, gpu.ptr(&args[1])?, optional(self.bias)?, optional(self.state)?])
    }
}

pub fn forward(node: &CausalConv1d, args: &[Tensor]) -> Result<Forward> {
    let Shape { batch, steps, width, taps } = node.shape;
    let (gpu, dtype) = (Gpu::of(&args[0])?, args[0].dtype());
    let part = |width: &usize| gpu.empty((batch, steps, *width), dtype);
    let y = node.widths.iter().chain(&node.plain).map(part).collect::<Result<Vec<_>>>()?;
    let state = gpu.empty((batch, taps - 1, width), dtype)?;
    let mut params = node.inputs(&gpu, args)?.to_vec();
    params.extend(node.places(&y, |part| gpu.of_value(part))?);
    params.push(gpu.of_value(&state)?);
    let rows = [&params[..1], &params[3..]].concat();
    let plan = Plan::new("forward", node, dtype, FORWARD_RUN, &rows)?;
    params.extend(plan.sizes(node));
    gpu.launch(&kernels::CAUSAL_CONV1D, &plan.name, plan.launch(node), &params)?;
    Ok(Forward { outputs: y.into_iter().chain([state]).collect(), saved: vec![] })
}

/// The gradients of all arguments, from those of y and of the final state.
pub fn backward(node: &CausalConv1d, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
    let args = &run.args;
    let Shape { batch, steps, width, taps } = node.shape;
    let (gpu, dtype) = (Gpu::of(&args[0])?, args[0].dtype());
    let (d_final, dy) = grads.split_last().expect("the state is an output");
    let dy = dy.iter().zip(node.widths.iter().chain(&node.plain)).map(|(dy, width)| match dy {
        Some(dy) => dy.contiguous(),
        None => Ok(gpu.zeros((batch, steps, *width), dtype)?.into_tensor()),
    });
    let dy = dy.collect::<Result<Vec<_>>>()?;
    let d_final = d_final.as_ref().map(Tensor::contiguous).transpose()?;
    let dx = gpu.empty(args[0].shape(), dtype)?.into_tensor();
    let dstate = match node.state {
        Some(i) if run.needs[i] => Some(gpu.empty(args[i].shape(), dtype)?.into_tensor()),
        _ => None,
    };

    let mut params = node.inputs(&gpu, args)?.to_vec();
    params.extend(node.places(&dy, |dy| gpu.ptr(dy))?);
    params.extend([gpu.ptr_or_null(d_final.as_ref())?, gpu.ptr(&dx)?, gpu.ptr_or_null(dstate.as_ref())?]);
    let rows = [&params[..1], &params[3..]].concat();
    let plan = Plan::new("backward", node, dtype, BACKWARD_RUN, &rows)?;
    let slabs = plan.runs.div_ceil(WARPS);
    let partial = gpu.empty((slabs, taps + 1, width), DType::F32)?;
    params.push(gpu.of_value(&partial)?);
    params.extend(plan.sizes(node));
    gpu.launch(&kernels::CAUSAL_CONV1D, &plan.name, plan.launch(node), &params)?;

    let (dweight, dbias) = weight_sums(node, &gpu, run, &partial, slabs)?;
    let mut out = vec![Some(dx), dweight];
    out.extend(node.bias.map(|_| dbias));
    out.extend(node.state.map(|_| dstate));
    Ok(out)
}

/// The gradients of the weight and the bias from the slabs of sums: added to a parameter's own, else new.
fn weight_sums(
    node: &CausalConv1d,
    gpu: &Gpu,
    run: &Run,
    partial: &Value,
    slabs: usize,
) -> Result<(Option<Tensor>, Option<Tensor>)> {
    let target = |i: usize| -> Result<(KernelArg, bool, Option<Tensor>)> {
        match &run.params[i] {
            _ if !run.needs[i] => Ok((NULL, false, None)),
            Some(param) => Ok((gpu.ptr(&param.grad())?, true, None)),
            None => {
                let new = gpu.empty(run.args[i].shape(), DType::F32)?.into_tensor();
                Ok((gpu.ptr(&new)?, false, Some(new)))
            }
        }
    };
    let (weight, add_weight, dweight) = target(1)?;
    let (bias, add_bias, dbias) = match node.bias {
        Some(i) => target(i)?,
        None => (NULL, false, None),
    };
    let Shape { width, taps, .. } = node.shape;
    let add = i32::from(add_weight) | i32::from(add_bias) << 1;
    let args =
        [gpu.of_value(partial)?, weight, bias, slabs.into(), width.into(), taps.into(), KernelArg::from(add)];
    let launch = Launch::new((width * (taps + 1)).div_ceil(32), 1024);
    gpu.launch(&kernels::CAUSAL_CONV1D, "causal_conv1d_sums", launch, &args)?;
    Ok((dweight, dbias))
}
