//! Launches of `kernels/l2norm.cu`.

use candle_core::{D, Result, Tensor};

use crate::cuda::{Gpu, kernels};
use crate::ops::rows::cuda::Teams;
use crate::ops::tape::Value;

/// The kernel of one pass, from its inputs, all of one shape, to its output.
pub fn run(pass: &str, inputs: &[&Tensor]) -> Result<Value> {
    let (gpu, x) = (Gpu::of(inputs[0])?, inputs[0]);
    let width = x.dim(D::Minus1)?;
    let rows = x.elem_count() / width.max(1);
    let out = gpu.empty(x.shape(), x.dtype())?;
    let mut list = inputs.iter().map(|input| gpu.ptr(input)).collect::<Result<Vec<_>>>()?;
    list.push(gpu.of_value(&out)?);
    let teams = Teams::new(width, x.dtype(), &list)?;
    list.extend([rows.into(), width.into(), teams.log_lanes()]);
    gpu.launch(&kernels::L2NORM, &teams.name(&format!("l2norm_{pass}")), teams.map(&gpu, rows), &list)?;
    Ok(out)
}
