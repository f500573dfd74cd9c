//! Copies from the host to the GPU that the host does not wait for, and back to a place where it waits later.
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
const RING: usize = 16;

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

/// A place in page-locked memory for a few numbers from the GPU.
pub struct Landing {
    memory: PinnedHostSlice<f64>,
    /// Passed when they are there.
    arrived: Option<CudaEvent>,
}

impl Landing {
    /// For `count` numbers.
    pub fn new(gpu: &Gpu, count: usize) -> Result<Self> {
        // SAFETY: the memory is written by a copy before it is read.
        let memory = unsafe { gpu.stream().context().alloc_pinned_with_flags(count, 0).w()? };
        Ok(Self { memory, arrived: None })
    }

    /// Puts the copy of a contiguous tensor in f64 on the stream.
    pub fn start(&mut self, from: &Tensor) -> Result<()> {
        let gpu = Gpu::of(from)?;
        if from.dtype() != DType::F64 || from.elem_count() != self.memory.len() {
            candle_core::bail!("download: {:?} of {:?} do not fit their place", from.shape(), from.dtype())
        }
        let KernelArg::Ptr(address) = gpu.ptr(from)? else { unreachable!("a tensor has an address") };
        let stream = gpu.stream();
        stream.context().bind_to_thread().w()?;
        let memory = self.memory.as_mut_slice().w()?;
        // SAFETY: both have room for the same numbers, which nobody reads before `arrived` has passed.
        unsafe { cudarc::driver::result::memcpy_dtoh_async(memory, address, stream.cu_stream()).w()? };
        self.arrived = Some(stream.record_event(None).w()?);
        Ok(())
    }

    /// Waits for what was started last.
    pub fn wait(&mut self) -> Result<&[f64]> {
        match self.arrived.take() {
            Some(arrived) => arrived.synchronize().w()?,
            None => candle_core::bail!("download: nothing was started"),
        }
        self.memory.as_slice().w()
    }
}
