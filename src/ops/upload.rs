//! Copies from the host to the GPU that the host does not wait for.
//!
//! A copy from ordinary memory may wait until the GPU has done all that was launched before. Here the numbers
//! go through page-locked memory, a ring of a few buffers, so that the host can be some steps ahead; it waits
//! only when it comes round to a buffer whose copy has not been made yet.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex};

use candle_core::cuda_backend::WrapErr;
use candle_core::{DType, Result, Tensor, WithDType};
use cudarc::driver::{CudaEvent, PinnedHostSlice};

use crate::cuda::{Gpu, KernelArg};

/// Copies that may be under way at a time.
const RING: usize = 8;

#[derive(Default)]
struct Buffer {
    memory: Option<PinnedHostSlice<u8>>,
    /// Passed when the GPU has read the memory.
    read: Option<CudaEvent>,
}

#[derive(Default)]
struct Ring {
    buffers: [Buffer; RING],
    next: usize,
}

/// Rings by context.
static RINGS: LazyLock<Mutex<HashMap<usize, Ring>>> = LazyLock::new(Default::default);

/// A new tensor that holds `data`.
pub fn upload<T: WithDType>(gpu: &Gpu, data: &[T], shape: impl Into<candle_core::Shape>) -> Result<Tensor> {
    let tensor = gpu.empty(shape, T::DTYPE)?.into_tensor();
    write(gpu, data, &tensor)?;
    Ok(tensor)
}

/// Overwrites the first elements of a contiguous tensor with `data`.
pub fn write<T: WithDType>(gpu: &Gpu, data: &[T], to: &Tensor) -> Result<()> {
    if !matches!(T::DTYPE, DType::F32 | DType::F64 | DType::U32) {
        candle_core::bail!("upload: numbers of {:?} are not uploaded", T::DTYPE)
    }
    if to.dtype() != T::DTYPE || to.elem_count() < data.len() {
        candle_core::bail!(
            "upload: {} numbers of {:?} into {:?} of {:?}",
            data.len(),
            T::DTYPE,
            to.shape(),
            to.dtype()
        )
    }
    let KernelArg::Ptr(address) = gpu.ptr(to)? else { unreachable!("a tensor has an address") };
    let bytes = size_of_val(data);
    let stream = gpu.stream();
    let context = stream.context();
    context.bind_to_thread().w()?;
    let mut rings = RINGS.lock().unwrap();
    let ring = rings.entry(std::sync::Arc::as_ptr(context) as usize).or_default();
    let buffer = &mut ring.buffers[ring.next];
    ring.next = (ring.next + 1) % RING;
    if let Some(read) = buffer.read.take() {
        read.synchronize().w()?;
    }
    if buffer.memory.as_ref().is_none_or(|memory| memory.len() < bytes) {
        let size = bytes.next_power_of_two().max(1 << 12);
        // SAFETY: bytes need no initialisation before they are written, and only written bytes are read.
        buffer.memory = Some(unsafe { context.alloc_pinned::<u8>(size).w()? });
    }
    let memory = buffer.memory.as_mut().expect("just made").as_mut_ptr().w()?;
    // SAFETY: the numbers are plain old data of `bytes` bytes, the buffer has room for them and nobody else
    // writes to it before `read` has passed; the tensor has room too and is written in the order of the stream.
    unsafe {
        std::ptr::copy_nonoverlapping(data.as_ptr().cast::<u8>(), memory, bytes);
        let bytes = std::slice::from_raw_parts(memory, bytes);
        cudarc::driver::result::memcpy_htod_async(address, bytes, stream.cu_stream()).w()?;
    }
    buffer.read = Some(stream.record_event(None).w()?);
    Ok(())
}
