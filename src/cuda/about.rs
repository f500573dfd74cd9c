//! What a GPU says of itself, and how much of its memory was used.

use anyhow::Result;
use candle_core::Device;
use cudarc::cublas::{self, CudaBlas};
use cudarc::driver::result::{device, mem_pool};
use cudarc::driver::sys::CUmemPool_attribute;
use serde::Serialize;

use super::{COMPILED_FOR, Gpu, TOOLKIT, driver_version};

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
    let (cuda_major, cuda_minor) = driver_version().unwrap_or_default();
    let blas = CudaBlas::new(gpu.stream().clone())?;
    let mut version = 0;
    // SAFETY: a living handle, and one number written to a place of ours.
    unsafe { cublas::sys::cublasGetVersion_v2(*blas.handle(), &mut version) }.result()?;
    Ok(Description {
        name: context.name()?,
        compute_capability: format!("{major}.{minor}"),
        multiprocessors: gpu.multiprocessors(),
        memory: context.total_mem()? as f64 / GIB,
        memory_free: free as f64 / GIB,
        driver: driver(),
        driver_cuda: format!("{cuda_major}.{cuda_minor}"),
        toolkit: TOOLKIT,
        compiled_for: COMPILED_FOR,
        cublas: format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100),
    })
}

/// The version of the driver, where the system tells it.
pub fn driver() -> Option<String> {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    let is_version = |word: &&str| word.contains('.') && word.starts_with(|c: char| c.is_ascii_digit());
    text.split_whitespace().find(is_version).map(String::from)
}

/// Forgets the highest use of memory.
pub fn reset_peak(gpu: &Gpu) -> Result<()> {
    let mut zero = 0u64;
    // SAFETY: the pool is the device's own; the attribute takes a u64.
    unsafe {
        let pool = device::get_default_mem_pool(gpu.stream().context().cu_device())?;
        let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        mem_pool::set_attribute(pool, attribute, (&raw mut zero).cast())?;
    }
    Ok(())
}

/// The highest use of memory by this process since it began or since [`reset_peak`], in bytes.
pub fn peak(gpu: &Gpu) -> Result<u64> {
    let mut bytes = 0u64;
    // SAFETY: the pool is the device's own; the attribute gives a u64.
    unsafe {
        let pool = device::get_default_mem_pool(gpu.stream().context().cu_device())?;
        let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        mem_pool::get_attribute(pool, attribute, (&raw mut bytes).cast())?;
    }
    Ok(bytes)
}
