//! Launches of `kernels/swiglu.cu`.

use candle_core::{D, DType, Result, Tensor};

use crate::cuda::{Gpu, NULL, kernels};
use crate::ops::rows::cuda::{Grid, parameter_sums};
use crate::ops::tape::{Run, Value};

/// Arguments x [.., 2n], beta, and the bias if there is one; gives `shape`, [.., n].
pub fn forward(args: &[Tensor], shape: &[usize]) -> Result<Value> {
    let (gpu, dtype) = (Gpu::of(&args[0])?, args[0].dtype());
    let n = shape[shape.len() - 1];
    let rows = args[0].elem_count() / (2 * n);
    let y = gpu.empty(shape, dtype)?;
    let (x, at) = (gpu.ptr(&args[0])?, gpu.of_value(&y)?);
    let grid = Grid::new(rows, n, dtype, &[x, at]);
    let (beta, bias) = (gpu.ptr(&args[1])?, gpu.ptr_or_null(args.get(2))?);
    let list = [x, beta, bias, at, rows.into(), n.into(), grid.log_width.into()];
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
    let bias = args.get(2);
    let launch = grid.sum(if bias.is_some() { 8 } else { 1 });
    let (tiles, slabs) = (launch.grid.0 as usize, launch.grid.1 as usize);
    let partial = gpu.empty(tiles * slabs, DType::F32)?;
    let partial_bias = bias.map(|_| gpu.empty((slabs, 2 * n), DType::F32)).transpose()?;
    let list = [
        x,
        gpu.ptr(&args[1])?,
        gpu.ptr_or_null(bias)?,
        dy,
        at,
        gpu.of_value(&partial)?,
        partial_bias.as_ref().map_or(Ok(NULL), |partial| gpu.of_value(partial))?,
        rows.into(),
        n.into(),
        grid.log_width.into(),
    ];
    gpu.launch(&kernels::SWIGLU, &grid.name("swiglu_backward", dtype)?, launch, &list)?;
    let mut grads = vec![Some(dx)];
    grads.extend(parameter_sums(&gpu, run, &partial, tiles * slabs, &[1])?);
    if let Some(partial) = &partial_bias {
        grads.extend(parameter_sums(&gpu, run, partial, slabs, &[2])?);
    }
    Ok(grads)
}
