//! Launches of `kernels/activations.cu`.

use candle_core::{D, Result, Tensor};

use crate::cuda::{Gpu, kernels, suffix};
use crate::ops::rows::cuda::{Grid, count, elements, vector};
use crate::ops::tape::Value;

/// y, or with `dy` the gradient of x; `function` is `gelu`, `tanh` or `logistic`.
pub fn elementwise(function: &str, x: &Tensor, dy: Option<&Tensor>) -> Result<Value> {
    let (gpu, dtype, n) = (Gpu::of(x)?, x.dtype(), x.elem_count());
    let out = gpu.empty(x.shape(), dtype)?;
    let pass = if dy.is_some() { "backward" } else { "forward" };
    let mut list = vec![gpu.ptr(x)?];
    list.extend(dy.map(|dy| gpu.ptr(dy)).transpose()?);
    list.extend([gpu.of_value(&out)?, count(n)]);
    let name = format!("{function}_{pass}_{}", suffix(dtype)?);
    gpu.launch(&kernels::ACTIVATIONS, &name, elements(&gpu, n, vector(dtype)), &list)?;
    Ok(out)
}

/// `shape` is that of the result, [.., n].
pub fn glu(x: &Tensor, shape: &[usize]) -> Result<Value> {
    let (gpu, dtype, n) = (Gpu::of(x)?, x.dtype(), shape[shape.len() - 1]);
    let rows = x.elem_count() / (2 * n);
    let y = gpu.empty(shape, dtype)?;
    let list = [gpu.ptr(x)?, gpu.of_value(&y)?];
    let grid = Grid::new(rows, n, dtype, &list);
    let list = [&list[..], &[rows.into(), n.into(), grid.log_width.into()]].concat();
    gpu.launch(&kernels::ACTIVATIONS, &grid.name("glu_forward", dtype)?, grid.map(&gpu), &list)?;
    Ok(y)
}

/// The gradient of x.
pub fn glu_backward(x: &Tensor, dy: &Tensor) -> Result<Value> {
    let (gpu, dtype, n) = (Gpu::of(x)?, x.dtype(), x.dim(D::Minus1)? / 2);
    let rows = x.elem_count() / (2 * n);
    let dx = gpu.empty(x.shape(), dtype)?;
    let list = [gpu.ptr(x)?, gpu.ptr(dy)?, gpu.of_value(&dx)?];
    let grid = Grid::new(rows, n, dtype, &list);
    let list = [&list[..], &[rows.into(), n.into(), grid.log_width.into()]].concat();
    gpu.launch(&kernels::ACTIVATIONS, &grid.name("glu_backward", dtype)?, grid.map(&gpu), &list)?;
    Ok(dx)
}

/// Rows and columns of what a gate of its own works on.
fn rows_of(x: &Tensor) -> Result<(usize, usize)> {
    let n = x.dim(D::Minus1)?;
    Ok((x.elem_count() / n, n))
}

pub fn sigmoid_gate(a: &Tensor, b: &Tensor) -> Result<Value> {
    let (gpu, dtype, (rows, n)) = (Gpu::of(a)?, a.dtype(), rows_of(a)?);
    let y = gpu.empty(a.shape(), dtype)?;
    let list = [gpu.ptr(a)?, gpu.ptr(b)?, gpu.of_value(&y)?];
    let grid = Grid::new(rows, n, dtype, &list);
    let list = [&list[..], &[rows.into(), n.into(), grid.log_width.into()]].concat();
    gpu.launch(&kernels::ACTIVATIONS, &grid.name("sigmoid_gate_forward", dtype)?, grid.map(&gpu), &list)?;
    Ok(y)
}

/// The gradients of a and b.
pub fn sigmoid_gate_backward(a: &Tensor, b: &Tensor, dy: &Tensor) -> Result<[Tensor; 2]> {
    let (gpu, dtype, (rows, n)) = (Gpu::of(a)?, a.dtype(), rows_of(a)?);
    let (da, db) = (gpu.empty(a.shape(), dtype)?, gpu.empty(a.shape(), dtype)?);
    let list = [gpu.ptr(a)?, gpu.ptr(b)?, gpu.ptr(dy)?, gpu.of_value(&da)?, gpu.of_value(&db)?];
    let grid = Grid::new(rows, n, dtype, &list);
    let list = [&list[..], &[rows.into(), n.into(), grid.log_width.into()]].concat();
    gpu.launch(&kernels::ACTIVATIONS, &grid.name("sigmoid_gate_backward", dtype)?, grid.map(&gpu), &list)?;
    Ok([da, db].map(Value::into_tensor))
}
