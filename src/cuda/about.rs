//! What a GPU says of itself, and how much of its memory was used.

use anyhow::Result;
use candle_core::Device;
use cudarc::cublas::{self, CudaBlas};
use cudarc::driver::result::{device, mem_pool};
use cudarc::driver::sys::{self, CUgraphMem_attribute, CUmemPool_attribute};
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

/// A number of the pool that buffers come from.
fn pool_attribute(gpu: &Gpu, attribute: CUmemPool_attribute) -> Result<u64> {
    let mut bytes = 0u64;
    // SAFETY: the pool is the device's own; the attributes asked for give a u64.
    unsafe {
        let pool = device::get_default_mem_pool(gpu.stream().context().cu_device())?;
        mem_pool::get_attribute(pool, attribute, (&raw mut bytes).cast())?;
    }
    Ok(bytes)
}

/// Forgets the highest use of memory.
pub fn reset_peak(gpu: &Gpu) -> Result<()> {
    let mut zero = 0u64;
    let device = gpu.stream().context().cu_device();
    // SAFETY: the pool is the device's own; both attributes take a u64.
    unsafe {
        let pool = device::get_default_mem_pool(device)?;
        let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        mem_pool::set_attribute(pool, attribute, (&raw mut zero).cast())?;
        let attribute = CUgraphMem_attribute::CU_GRAPH_MEM_ATTR_USED_MEM_HIGH;
        sys::cuDeviceSetGraphMemAttribute(device, attribute, (&raw mut zero).cast()).result()?;
    }
    Ok(())
}

/// The highest use of memory by this process since it began or since [`reset_peak`], in bytes: by kernels that were
/// launched one by one, or by a captured update beside what is kept.
pub fn peak(gpu: &Gpu) -> Result<u64> {
    let mut graphs = 0u64;
    let attribute = CUgraphMem_attribute::CU_GRAPH_MEM_ATTR_USED_MEM_HIGH;
    // SAFETY: the attribute gives a u64.
    unsafe {
        let device = gpu.stream().context().cu_device();
        sys::cuDeviceGetGraphMemAttribute(device, attribute, (&raw mut graphs).cast()).result()?;
    }
    let kept = pool_attribute(gpu, CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
    Ok((kept + graphs).max(pool_attribute(gpu, CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?))
}

/// Gives memory that nothing uses back to the driver, where other pools find it. Waits for nothing.
pub fn trim(gpu: &Gpu) -> Result<()> {
    let device = gpu.stream().context().cu_device();
    // SAFETY: the pool is the device's own; only memory that is free is given back.
    unsafe {
        mem_pool::trim_to(device::get_default_mem_pool(device)?, 0)?;
        sys::cuDeviceGraphMemTrim(device).result()?;
    }
    Ok(())
}
