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
