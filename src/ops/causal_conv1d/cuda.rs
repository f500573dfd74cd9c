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
/// Steps of a thread where there are many; runs share W − 1 steps, which the backward pass computes twice.
const FORWARD_RUN: usize = 20;
const BACKWARD_RUN: usize = 40;
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
    fn new(pass: &str, shape: Shape, dtype: DType, longest: usize, rows: &[KernelArg]) -> Result<Self> {
        let Shape { batch, steps, width, taps } = shape;
        if taps > 8 || steps == 0 {
            candle_core::bail!(
                "causal_conv1d on a GPU: at most 8 taps and at least one step, got {taps} and {steps}"
            )
        }
        let aligned = |row: &KernelArg| !matches!(row, KernelArg::Ptr(at) if at % 16 != 0);
        let fits = taps <= 4 && width.is_multiple_of(VECTOR) && rows.iter().all(aligned);
        let vector = if fits { VECTOR } else { 1 };
        // Runs of equal length, as many as fill the GPU, and not longer than the longest.
        let threads = batch * (width / vector);
        let runs = MANY_THREADS.div_ceil(threads).min(steps.div_ceil(8)).max(steps.div_ceil(longest));
        let run = steps.div_ceil(runs).next_multiple_of(4);
        let padded = if taps <= 4 { 4 } else { 8 };
        let name = format!("causal_conv1d_{pass}_w{padded}_v{vector}_{}", suffix(dtype)?);
        Ok(Self { name, vector, run, runs: batch * steps.div_ceil(run) })
    }

    /// A warp for every run of 32 vectors of channels.
    fn launch(&self, shape: Shape) -> Launch {
        let slabs = self.runs.div_ceil(WARPS);
        Launch::grid(shape.width.div_ceil(32 * self.vector), slabs, 1, THREADS as u32)
    }

    /// What ends the arguments of both kernels.
    fn sizes(&self, shape: Shape) -> [KernelArg; 5] {
        [shape.batch, shape.steps, shape.width, shape.taps, self.run].map(KernelArg::from)
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
    let y = gpu.empty((batch, steps, width), dtype)?;
    let state = gpu.empty((batch, taps - 1, width), dtype)?;
    let mut params = node.inputs(&gpu, args)?.to_vec();
    params.extend([gpu.of_value(&y)?, gpu.of_value(&state)?]);
    let rows = [params[0], params[3], params[4]];
    let plan = Plan::new("forward", node.shape, dtype, FORWARD_RUN, &rows)?;
    params.extend(plan.sizes(node.shape));
    gpu.launch(&kernels::CAUSAL_CONV1D, &plan.name, plan.launch(node.shape), &params)?;
    Ok(Forward { outputs: vec![y, state], saved: vec![] })
}

/// The gradients of all arguments, from those of y and of the final state.
pub fn backward(node: &CausalConv1d, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
    let (shape, args) = (node.shape, &run.args);
    let Shape { batch, steps, width, taps } = shape;
    let (gpu, dtype) = (Gpu::of(&args[0])?, args[0].dtype());
    let dy = match &grads[0] {
        Some(dy) => dy.contiguous()?,
        None => gpu.zeros((batch, steps, width), dtype)?.into_tensor(),
    };
    let dfinal = grads[1].as_ref().map(Tensor::contiguous).transpose()?;
    let dx = gpu.empty((batch, steps, width), dtype)?.into_tensor();
    let dstate = match node.state {
        Some(i) if run.needs[i] => Some(gpu.empty(args[i].shape(), dtype)?.into_tensor()),
        _ => None,
    };

    let mut params = node.inputs(&gpu, args)?.to_vec();
    params.extend([gpu.ptr(&dy)?, gpu.ptr_or_null(dfinal.as_ref())?, gpu.ptr(&dx)?]);
    params.push(gpu.ptr_or_null(dstate.as_ref())?);
    let rows = [params[0], params[3], params[4], params[5]];
    let plan = Plan::new("backward", shape, dtype, BACKWARD_RUN, &rows)?;
    let slabs = plan.runs.div_ceil(WARPS);
    let partial = gpu.empty((slabs, taps + 1, width), DType::F32)?;
    params.push(gpu.of_value(&partial)?);
    params.extend(plan.sizes(shape));
    gpu.launch(&kernels::CAUSAL_CONV1D, &plan.name, plan.launch(shape), &params)?;

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
