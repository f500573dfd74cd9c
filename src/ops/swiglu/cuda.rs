//! Launches of `kernels/swiglu.cu`.

use candle_core::{D, DType, Result, Tensor};

use crate::cuda::{Gpu, kernels};
use crate::ops::rows::cuda::{Grid, parameter_sums};
use crate::ops::tape::{Run, Value};

/// Arguments x [.., 2n] and beta; gives `shape`, [.., n].
pub fn forward(args: &[Tensor], shape: &[usize]) -> Result<Value> {
    let (gpu, dtype) = (Gpu::of(&args[0])?, args[0].dtype());
    let n = shape[shape.len() - 1];
    let rows = args[0].elem_count() / (2 * n);
    let y = gpu.empty(shape, dtype)?;
    let (x, at) = (gpu.ptr(&args[0])?, gpu.of_value(&y)?);
    let grid = Grid::new(rows, n, dtype, &[x, at]);
    let list = [x, gpu.ptr(&args[1])?, at, rows.into(), n.into(), grid.log_width.into()];
    gpu.launch(&kernels::SWIGLU, &grid.name("swiglu_forward", dtype)?, grid.map(&gpu), &list)?;
    Ok(y)
}

pub fn backward(run: &Run, dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
    let (args, gpu, dtype) = (&run.args, Gpu::of(dy)?, dy.dtype());
    let n = dy.dim(D::Minus1)?;
    let rows = dy.elem_count() / n;
    let dx = gpu.empty(args[0].shape(), dtype)?.into_tensor();
    let (x, dy, at) = (gpu.ptr(&args[0])?, gpu.ptr(dy)?, gpu.ptr(&dx)?);
    let grid = Grid::new(rows, n, dtype, &[x, dy, at]);
    let launch = grid.sum(1);
    let slabs = (launch.grid.0 * launch.grid.1) as usize;
    let partial = gpu.empty(slabs, DType::F32)?;
    let beta = gpu.ptr(&args[1])?;
    let list = [x, beta, dy, at, gpu.of_value(&partial)?, rows.into(), n.into(), grid.log_width.into()];
    gpu.launch(&kernels::SWIGLU, &grid.name("swiglu_backward", dtype)?, launch, &list)?;
    let dbeta = parameter_sums(&gpu, run, &partial, slabs, &[1])?;
    Ok([Some(dx)].into_iter().chain(dbeta).collect())
}
