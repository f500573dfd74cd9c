//! Which device a command computes on, and in which number format.

use candle_core::{DType, Device};

use crate::config::{Config, Emulate, Precision};
use crate::error::nearest;
use crate::{bad_input, bail_input};

/// What a build without CUDA says to somebody who wants it.
pub const NO_CUDA: &str = "this build computes on the CPU only (build it with `--features cuda` for GPUs)";

/// The device that `auto`, `cpu` or `cuda:N` names. `auto` is the first GPU if there is one that can be used,
/// else the CPU.
pub fn parse_device(text: &str) -> anyhow::Result<Device> {
    match text {
        "cpu" => Ok(Device::Cpu),
        "auto" if gpu_count() > 0 => cuda(0),
        "auto" => Ok(Device::Cpu),
        _ => match text.strip_prefix("cuda:").map(str::parse) {
            Some(Ok(index)) => cuda(index),
            Some(Err(_)) => {
                bail_input!("--device is {text:?}; the number of the GPU is missing, as in `cuda:0`")
            }
            None => Err(match nearest(text, ["auto", "cpu", "cuda:0"]) {
                Some(near) => bad_input!("--device is {text:?}; did you mean `{near}`?"),
                None => bad_input!("--device is {text:?}; it must be auto, cpu or cuda:N"),
            }),
        },
    }
}

/// GPUs that the driver shows; none without a driver.
#[cfg(feature = "cuda")]
pub fn gpu_count() -> usize {
    crate::cuda::count()
}

/// GPUs that the driver shows; none without a driver.
#[cfg(not(feature = "cuda"))]
pub fn gpu_count() -> usize {
    0
}

#[cfg(feature = "cuda")]
fn cuda(index: usize) -> anyhow::Result<Device> {
    crate::cuda::open(index).map_err(|why| bad_input!("--device is `cuda:{index}`, but {why}"))
}

#[cfg(not(feature = "cuda"))]
fn cuda(index: usize) -> anyhow::Result<Device> {
    bail_input!("--device is `cuda:{index}`, but {NO_CUDA}")
}

/// The most memory that this process has used so far, in bytes: of a GPU, or of the machine where it computes on
/// the CPU. `None` where the system does not tell.
pub fn peak_memory(device: &Device) -> Option<u64> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return crate::cuda::Gpu::new(device).ok().and_then(|gpu| crate::cuda::about::peak(&gpu).ok());
    }
    // The peak that getrusage gives is no less than that of the process which started this one.
    let status =
        if device.is_cpu() { std::fs::read_to_string("/proc/self/status").ok()? } else { return None };
    let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"))?;
    Some(1024 * kib.trim().parse::<u64>().ok()?)
}

/// Forgets what [`peak_memory`] has seen so far, where the system can.
pub fn reset_peak_memory(device: &Device) -> anyhow::Result<()> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return crate::cuda::about::reset_peak(&crate::cuda::Gpu::new(device)?);
    }
    let _ = device;
    // Linux takes a 5 for this; elsewhere the peak stays that of the whole process.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
    Ok(())
}

/// What the hardware is called: the name of the GPU, or of the CPU where the system tells it.
pub fn hardware(device: &Device) -> Option<String> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return crate::cuda::Gpu::new(device).ok()?.stream().context().name().ok();
    }
    let info = if device.is_cpu() { std::fs::read_to_string("/proc/cpuinfo").ok()? } else { return None };
    let field = info.lines().find_map(|line| line.strip_prefix("model name"))?;
    Some(field.split_once(':')?.1.trim().to_string())
}

/// The instruction sets that this build was compiled for.
pub fn simd() -> Vec<&'static str> {
    macro_rules! compiled_for {
        ($($feature:tt)*) => { [$(($feature, cfg!(target_feature = $feature))),*] };
    }
    let sets = compiled_for!("sse4.2" "avx" "avx2" "fma" "f16c" "avx512f" "avx512bf16" "neon" "sve");
    sets.into_iter().filter_map(|(name, has)| has.then_some(name)).collect()
}

/// What `train.precision` means on a GPU or on the CPU; never `auto`.
///
/// `auto` is f32 on the CPU and where the released code is emulated, else bf16: activations in bf16, weights,
/// moments, states and sums in f32.
pub fn resolve_precision(config: &Config, gpu: bool) -> Precision {
    match config.train.precision {
        Precision::Auto if gpu && config.train.emulate != Emulate::Authors => Precision::Bf16,
        Precision::Auto => Precision::F32,
        other => other,
    }
}

/// [`resolve_precision`] on a device, which must have it. On a GPU tf32 is switched on or off for the process.
pub fn number_format(config: &Config, device: &Device) -> anyhow::Result<Precision> {
    let precision = resolve_precision(config, !device.is_cpu());
    if device.is_cpu() && precision != Precision::F32 {
        bail_input!("train.precision is {}, but cpu computes in f32; set it to auto or f32", precision.name())
    }
    #[cfg(feature = "cuda")]
    crate::cuda::allow_tf32(precision == Precision::Tf32);
    Ok(precision)
}

impl Precision {
    /// As in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Precision::Auto => "auto",
            Precision::F32 => "f32",
            Precision::Tf32 => "tf32",
            Precision::Bf16 => "bf16",
        }
    }

    /// The type of activations.
    pub fn dtype(self) -> DType {
        if self == Precision::Bf16 { DType::BF16 } else { DType::F32 }
    }
}
