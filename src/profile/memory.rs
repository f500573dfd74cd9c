//! The highest use of memory: of the device's pool on a GPU, of the process on the CPU.

use anyhow::Result;
use candle_core::Device;

/// Forgets the highest use so far, where the system can.
pub fn reset_peak(device: &Device) -> Result<()> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return super::gpu::reset_peak(&crate::cuda::Gpu::new(device)?);
    }
    let _ = device;
    // Linux takes a 5 for this; elsewhere the peak is that of the whole process.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
    Ok(())
}

/// The highest use since [`reset_peak`], in bytes; none where the system does not tell.
pub fn peak(device: &Device) -> Result<Option<u64>> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return super::gpu::peak(&crate::cuda::Gpu::new(device)?).map(Some);
    }
    let _ = device;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    Ok(kilobytes.map(|kilobytes| 1024 * kilobytes))
}
