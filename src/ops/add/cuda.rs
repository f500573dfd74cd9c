//! Launches of `kernels/add.cu`.

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, Device, Layout, Result, Tensor};

use crate::cuda::{Gpu, kernels, suffix};
use crate::ops::rows::cuda::{count, elements, vector};
use crate::ops::tape::Value;

/// a + b, both contiguous, of one shape and type.
pub fn sum(a: &Tensor, b: &Tensor) -> Result<Value> {
    let (gpu, dtype, n) = (Gpu::of(a)?, a.dtype(), a.elem_count());
    if b.dtype() != dtype {
        candle_core::bail!("add: a is {dtype:?}, but b {:?}", b.dtype())
    }
    let out = gpu.empty(a.shape(), dtype)?;
    let args = [gpu.ptr(a)?, gpu.ptr(b)?, gpu.of_value(&out)?, count(n)];
    let launch = elements(&gpu, n, vector(dtype));
    gpu.launch(&kernels::ADD, &format!("add_sum_{}", suffix(dtype)?), launch, &args)?;
    Ok(out)
}

/// dst ← dst + src, of any two types.
pub fn add_assign(dst: &CudaStorage, dl: &Layout, src: &CudaStorage, sl: &Layout) -> Result<()> {
    let (Some((d0, d1)), Some((s0, s1))) = (dl.contiguous_offsets(), sl.contiguous_offsets()) else {
        candle_core::bail!("add_assign: expected contiguous tensors")
    };
    let n = d1 - d0;
    if s1 - s0 != n {
        candle_core::bail!("add_assign: {} elements cannot be added to {n}", s1 - s0)
    }
    let gpu = Gpu::new(&Device::Cuda(dst.device().clone()))?;
    let (to, from) = (suffix(dst.dtype())?, suffix(src.dtype())?);
    let name = if to == from { format!("add_assign_{to}") } else { format!("add_assign_{to}_{from}") };
    let launch = elements(&gpu, n, vector(src.dtype()));
    gpu.launch(&kernels::ADD, &name, launch, &[gpu.address(dst, d0)?, gpu.address(src, s0)?, count(n)])
}
