//! What a GPU says of itself.

use anyhow::Result;
use candle_core::Device;
use cudarc::cublas::{self, CudaBlas};
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
