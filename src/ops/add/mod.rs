//! Sums of two tensors: in the graph, into a new tensor, and in place.

#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{CpuStorage, Device, InplaceOp2, Layout, Result, Tensor};
use rayon::prelude::*;

use super::real::Real;
use super::rows::map2;
use super::tape::{Arg, Forward, Node, Run, Value, apply};
use crate::{dispatch, slices};

/// Elements that one task works through.
const BLOCK: usize = 1 << 14;

/// a + b, two tensors of one shape.
pub fn add(a: impl Into<Arg>, b: impl Into<Arg>) -> Result<Tensor> {
    let (a, b) = (a.into(), b.into());
    if a.shape() != b.shape() {
        candle_core::bail!("add: shapes {:?} and {:?} differ", a.shape(), b.shape())
    }
    Ok(apply(Add, &[a, b])?.remove(0))
}

struct Add;

impl Node for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn forward(&self, args: &[Tensor], _: bool) -> Result<Forward> {
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            return Ok(Forward { outputs: vec![cuda::sum(&args[0], &args[1])?], saved: vec![] });
        }
        let value = dispatch!(args[0].dtype(), F => {
            slices!(F; a = &args[0], b = &args[1]);
            Value::cpu(map2::<F>(a, b, |a, b| a + b), args[0].shape())
        });
        Ok(Forward { outputs: vec![value], saved: vec![] })
    }

    fn backward(&self, _: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![grads[0].clone(), grads[0].clone()])
    }
}

/// a + b outside the graph, both contiguous and of one shape.
pub(crate) fn sum(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if a.device().is_cuda() {
        return Ok(cuda::sum(a, b)?.into_tensor());
    }
    dispatch!(a.dtype(), F => {
        slices!(F; x = a, y = b);
        Tensor::from_vec(map2::<F>(x, y, |x, y| x + y), a.shape(), &Device::Cpu)
    })
}

/// dst ← dst + src.
pub(crate) struct AddAssign;

impl InplaceOp2 for AddAssign {
    fn name(&self) -> &'static str {
        "add_assign"
    }

    fn cpu_fwd(&self, dst: &mut CpuStorage, dl: &Layout, src: &CpuStorage, sl: &Layout) -> Result<()> {
        fn add<F: Real>(dst: &mut [F], dl: &Layout, src: &[F], sl: &Layout) -> Result<()> {
            let (Some((d0, d1)), Some((s0, s1))) = (dl.contiguous_offsets(), sl.contiguous_offsets()) else {
                candle_core::bail!("add_assign: expected contiguous tensors")
            };
            dst[d0..d1].par_chunks_mut(BLOCK).zip(src[s0..s1].par_chunks(BLOCK)).for_each(|(dst, src)| {
                super::rows::add(src, dst);
            });
            Ok(())
        }
        match (dst, src) {
            (CpuStorage::F32(dst), CpuStorage::F32(src)) => add(dst, dl, src, sl),
            (CpuStorage::F64(dst), CpuStorage::F64(src)) => add(dst, dl, src, sl),
            _ => candle_core::bail!("add_assign: expected f32 or f64 on both sides"),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        dst: &mut candle_core::CudaStorage,
        dl: &Layout,
        src: &candle_core::CudaStorage,
        sl: &Layout,
    ) -> Result<()> {
        cuda::add_assign(dst, dl, src, sl)
    }
}
