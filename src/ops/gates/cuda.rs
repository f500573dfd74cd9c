//! Launches of `kernels/gates.cu`.

use candle_core::{DType, Result, Tensor};

use super::Elementwise;
use crate::cuda::{Gpu, KernelArg, Launch, kernels, suffix};
use crate::ops::rows::cuda::{THREADS, count, elements, parameter_sums, vector};
use crate::ops::tape::{Run, Value};

impl Elementwise {
    fn kernel(&self, pass: &str, dtype: DType) -> Result<(String, KernelArg)> {
        let (op, scale) = match *self {
            Elementwise::Sigmoid { scale } => ("sigmoid", scale),
            Elementwise::LogSigmoid { divisor } => ("log_sigmoid", 1.0 / divisor),
        };
        Ok((format!("gates_{op}_{pass}_{}", suffix(dtype)?), (scale as f32).into()))
    }

    pub(super) fn forward_cuda(&self, x: &Tensor) -> Result<Value> {
        let (gpu, n) = (Gpu::of(x)?, x.elem_count());
        let y = gpu.empty(x.shape(), DType::F32)?;
        let (name, scale) = self.kernel("forward", x.dtype())?;
        let launch = elements(&gpu, n, vector(x.dtype()));
        gpu.launch(&kernels::GATES, &name, launch, &[gpu.ptr(x)?, gpu.of_value(&y)?, count(n), scale])?;
        Ok(y)
    }

    pub(super) fn backward_cuda(&self, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
        let (gpu, n) = (Gpu::of(x)?, x.elem_count());
        expect_f32(dy)?;
        let dx = gpu.empty(x.shape(), x.dtype())?.into_tensor();
        let (name, scale) = self.kernel("backward", x.dtype())?;
        let launch = elements(&gpu, n, vector(x.dtype()));
        let args = [gpu.ptr(x)?, gpu.ptr(dy)?, gpu.ptr(&dx)?, count(n), scale];
        gpu.launch(&kernels::GATES, &name, launch, &args)?;
        Ok(dx)
    }
}

fn expect_f32(dy: &Tensor) -> Result<()> {
    match dy.dtype() {
        DType::F32 => Ok(()),
        other => candle_core::bail!("gates: the gradient of a gate is f32, not {other:?}"),
    }
}

/// Blocks of rows by heads; at most `most` of them along the rows.
fn decay_launch(rows: usize, heads: usize, most: usize) -> Launch {
    let height = THREADS / heads.clamp(1, THREADS);
    Launch::grid(rows.div_ceil(height).min(most), heads.div_ceil(THREADS), 1, THREADS as u32)
}

pub fn decay_gate(args: &[Tensor], heads: usize) -> Result<Value> {
    let (gpu, dtype) = (Gpu::of(&args[0])?, args[0].dtype());
    let rows = args[0].elem_count() / heads.max(1);
    let g = gpu.empty(args[0].shape(), DType::F32)?;
    let mut list = args.iter().map(|arg| gpu.ptr(arg)).collect::<Result<Vec<_>>>()?;
    list.extend([gpu.of_value(&g)?, rows.into(), heads.into()]);
    let name = format!("gates_decay_forward_{}", suffix(dtype)?);
    gpu.launch(&kernels::GATES, &name, decay_launch(rows, heads, 8 * gpu.multiprocessors()), &list)?;
    Ok(g)
}

pub fn decay_gate_backward(run: &Run, heads: usize, dg: &Tensor) -> Result<Vec<Option<Tensor>>> {
    let args = &run.args;
    let (gpu, dtype) = (Gpu::of(&args[0])?, args[0].dtype());
    expect_f32(dg)?;
    let rows = args[0].elem_count() / heads.max(1);
    let da = gpu.empty(args[0].shape(), dtype)?.into_tensor();
    // A fixed number of blocks: the sums must not depend on the GPU.
    let launch = decay_launch(rows, heads, 264);
    let slabs = launch.grid.0 as usize;
    let partial = gpu.empty((slabs, 2, heads), DType::F32)?;
    let mut list = args.iter().map(|arg| gpu.ptr(arg)).collect::<Result<Vec<_>>>()?;
    list.extend([gpu.ptr(dg)?, gpu.ptr(&da)?, gpu.of_value(&partial)?, rows.into(), heads.into()]);
    gpu.launch(&kernels::GATES, &format!("gates_decay_backward_{}", suffix(dtype)?), launch, &list)?;
    let parameters = parameter_sums(&gpu, run, &partial, slabs, &[1, 2])?;
    Ok([Some(da)].into_iter().chain(parameters).collect())
}
