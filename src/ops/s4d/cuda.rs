//! Launching `kernels/s4d.cu`.

use candle_core::{DType, Result, Tensor};

use super::{Dims, NAME};
use crate::cuda::{Gpu, KernelArg, Launch, NULL, kernels, suffix};
use crate::ops::tape::{Forward, Value};

/// Threads of a block.
const THREADS: usize = 128;

/// One call: its sizes, and how its kernels are instantiated.
struct Plan {
    gpu: Gpu,
    dtype: DType,
    dims: Dims,
    /// Lanes that share a channel, and the pairs of states that each of them has.
    lanes: usize,
    each: usize,
    /// Ā − 1 and 2 C̄, [D, N, 4].
    coef: Value,
}

impl Plan {
    fn new(dims: Dims, args: &[Tensor]) -> Result<Self> {
        let (gpu, dtype, Dims { width, pairs, .. }) = (Gpu::of(&args[0])?, args[0].dtype(), dims);
        let variants = [(8, 2), (8, 4), (8, 8), (16, 8)];
        let Some((lanes, each)) = variants.into_iter().find(|(lanes, each)| pairs <= lanes * each) else {
            candle_core::bail!("{NAME} on a GPU: at most 128 pairs of states, got {pairs}")
        };
        let coef = gpu.empty((width, pairs, 4), DType::F32)?;
        let launch = Launch::new((width * pairs).div_ceil(256), 256);
        let mut list = args[1..5].iter().map(|arg| gpu.ptr(arg)).collect::<Result<Vec<_>>>()?;
        list.extend([gpu.of_value(&coef)?, width.into(), pairs.into()]);
        gpu.launch(&kernels::S4D, "s4d_discrete", launch, &list)?;
        Ok(Self { gpu, dtype, dims, lanes, each, coef })
    }

    /// Launches a kernel that goes through the steps.
    fn launch(&self, kernel: &str, args: &[KernelArg], more: &[KernelArg]) -> Result<()> {
        let Dims { batch, steps, width, pairs } = self.dims;
        let name = format!("s4d_{kernel}_{}x{}_{}", self.lanes, self.each, suffix(self.dtype)?);
        let launch = Launch::grid((width * self.lanes).div_ceil(THREADS), batch, 1, THREADS as u32);
        let sizes = [steps, width, pairs].map(KernelArg::from);
        let args = [&[self.gpu.of_value(&self.coef)?], args, &sizes, more].concat();
        self.gpu.launch(&kernels::S4D, &name, launch, &args)
    }

    /// The outputs and the final state for inputs `x`; in reverse the gradients of inputs and initial state.
    fn scan(&self, x: &Tensor, d: &Tensor, start: Option<&Tensor>, reverse: bool) -> Result<[Value; 2]> {
        let (gpu, Dims { batch, width, pairs, .. }) = (&self.gpu, self.dims);
        let y = gpu.empty(x.shape(), self.dtype)?;
        let end = gpu.empty((batch, width, pairs, 2), DType::F32)?;
        let list =
            [gpu.ptr(x)?, gpu.ptr(d)?, gpu.ptr_or_null(start)?, gpu.of_value(&y)?, gpu.of_value(&end)?];
        self.launch("scan", &list, &[i32::from(reverse).into()])?;
        Ok([y, end])
    }
}

/// y and the final state; nothing is kept for the backward pass.
pub fn forward(dims: Dims, args: &[Tensor]) -> Result<Forward> {
    let outputs = Plan::new(dims, args)?.scan(&args[0], &args[5], args.get(6), false)?;
    Ok(Forward { outputs: outputs.into(), saved: vec![] })
}

/// The gradients of the arguments, in their order, from those of y and of the final state.
pub fn backward(dims: Dims, args: &[Tensor], dy: &Tensor, d_state: Option<&Tensor>) -> Result<Vec<Tensor>> {
    let plan = Plan::new(dims, args)?;
    let (gpu, Dims { batch, width, pairs, .. }) = (&plan.gpu, dims);
    let [du, d_initial] = plan.scan(dy, &args[5], d_state, true)?;
    let sums = gpu.empty((batch, width, pairs, 4), DType::F32)?;
    let skips = gpu.empty((batch, width), DType::F32)?;
    let start = args.get(6).map_or(Ok(NULL), |state| gpu.ptr(state))?;
    let (sums_at, skips_at) = (gpu.of_value(&sums)?, gpu.of_value(&skips)?);
    let list = [gpu.ptr(&args[0])?, gpu.ptr(dy)?, start, gpu.ptr_or_null(d_state)?, sums_at, skips_at];
    plan.launch("sums", &list, &[])?;

    let params = [1, 2, 3, 4, 5]
        .map(|i| gpu.empty(args[i].shape(), DType::F32))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let mut list = args[1..5].iter().map(|arg| gpu.ptr(arg)).collect::<Result<Vec<_>>>()?;
    list.extend([sums_at, skips_at]);
    for param in &params {
        list.push(gpu.of_value(param)?);
    }
    list.extend([batch, width, pairs].map(KernelArg::from));
    gpu.launch(&kernels::S4D, "s4d_params", Launch::new(width, THREADS as u32), &list)?;
    let grads = std::iter::once(du).chain(params).chain([d_initial]);
    Ok(grads.map(Value::into_tensor).collect())
}
