//! What a GPU says of itself, and its clock.

use anyhow::{Context, Result};
use candle_core::Device;
use cudarc::cublas::{self, CudaBlas};
use cudarc::driver::result::{device as driver, mem_pool};
use cudarc::driver::sys::{
    CUevent_flags, CUgraphInstantiate_flags, CUmemPool_attribute, CUstreamCaptureMode,
};
use cudarc::driver::{CudaEvent, CudaGraph};
use serde::Serialize;

use crate::cuda::{self, Gpu};

/// A GPU and the software around it.
#[derive(Clone, Debug, Serialize)]
pub struct Description {
    pub name: String,
    pub compute_capability: String,
    pub multiprocessors: usize,
    /// GiB in all, and not in use.
    pub memory: f64,
    pub memory_free: f64,
    /// Of the driver, where the system tells it.
    pub driver: Option<String>,
    /// The newest CUDA that the driver runs.
    pub driver_cuda: String,
    /// The toolkit that the kernels were compiled with, and for which GPUs.
    pub toolkit: &'static str,
    pub compiled_for: &'static str,
    pub cublas: String,
}

/// Describes a GPU.
pub fn describe(device: &Device) -> Result<Description> {
    const GIB: f64 = (1u64 << 30) as f64;
    let gpu = Gpu::new(device)?;
    let context = gpu.stream().context();
    let (major, minor) = context.compute_capability()?;
    let (free, _) = context.mem_get_info()?;
    let (cuda_major, cuda_minor) = cuda::driver_version().unwrap_or_default();
    let blas = CudaBlas::new(gpu.stream().clone())?;
    let mut version = 0;
    // SAFETY: a living handle, and one number written to a place of ours.
    unsafe { cublas::sys::cublasGetVersion_v2(*blas.handle(), &mut version) }.result()?;
    let driver = std::fs::read_to_string("/proc/driver/nvidia/version").ok();
    let driver = driver.and_then(|text| {
        let is_version = |word: &&str| word.contains('.') && word.starts_with(|c: char| c.is_ascii_digit());
        text.split_whitespace().find(is_version).map(String::from)
    });
    Ok(Description {
        name: context.name()?,
        compute_capability: format!("{major}.{minor}"),
        multiprocessors: gpu.multiprocessors(),
        memory: context.total_mem()? as f64 / GIB,
        memory_free: free as f64 / GIB,
        driver,
        driver_cuda: format!("{cuda_major}.{cuda_minor}"),
        toolkit: cuda::TOOLKIT,
        compiled_for: cuda::COMPILED_FOR,
        cublas: format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100),
    })
}

/// A stretch of work on the stream.
pub struct Stretch {
    begin: CudaEvent,
    end: CudaEvent,
}

impl Stretch {
    /// Waits for its end; in seconds.
    pub fn seconds(&self) -> Result<f64> {
        Ok(f64::from(self.begin.elapsed_ms(&self.end)?) / 1e3)
    }
}

/// A point on the stream that has a time.
pub fn mark(gpu: &Gpu) -> Result<CudaEvent> {
    Ok(gpu.stream().record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?)
}

/// The stretch between two marks.
pub fn between(begin: CudaEvent, end: CudaEvent) -> Stretch {
    Stretch { begin, end }
}

/// Runs `f` and measures what it puts on the stream.
pub fn stretch(gpu: &Gpu, f: impl FnOnce() -> Result<()>) -> Result<Stretch> {
    let begin = mark(gpu)?;
    f()?;
    Ok(Stretch { begin, end: mark(gpu)? })
}

/// Captures what `f` puts on the stream, to be launched at once.
pub fn capture(gpu: &Gpu, f: impl FnOnce() -> Result<()>) -> Result<CudaGraph> {
    let stream = gpu.stream();
    stream.synchronize()?;
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
    let outcome = f();
    if outcome.is_err() {
        // Buffers freed inside of a spoilt capture leave errors behind, which the next call would give.
        let _ = stream.context().check_err();
    }
    // Also after an error: the stream must leave the capture.
    let graph = stream.end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH);
    if outcome.is_err() || graph.is_err() {
        let _ = stream.context().check_err();
    }
    outcome?;
    graph?.context("nothing was captured")
}

/// Forgets the highest use of memory.
pub fn reset_peak(gpu: &Gpu) -> Result<()> {
    let mut zero = 0u64;
    // SAFETY: the pool is the device's own; the attribute takes a u64.
    unsafe {
        let pool = driver::get_default_mem_pool(gpu.stream().context().cu_device())?;
        let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        mem_pool::set_attribute(pool, attribute, (&raw mut zero).cast())?;
    }
    Ok(())
}

/// The highest use of memory since [`reset_peak`], in bytes.
pub fn peak(gpu: &Gpu) -> Result<u64> {
    let mut bytes = 0u64;
    // SAFETY: the pool is the device's own; the attribute gives a u64.
    unsafe {
        let pool = driver::get_default_mem_pool(gpu.stream().context().cu_device())?;
        let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        mem_pool::get_attribute(pool, attribute, (&raw mut bytes).cast())?;
    }
    Ok(bytes)
}
