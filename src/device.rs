//! Which device a command computes on.

use candle_core::{Device, utils::cuda_is_available};

use crate::error::nearest;
use crate::{bad_input, bail_input};

/// What a build without CUDA says to somebody who wants it.
pub const NO_CUDA: &str = "this build computes on the CPU only";

/// The device that `auto`, `cpu` or `cuda:N` names. `auto` is the first GPU of a build with CUDA, and the
/// CPU of one without.
pub fn parse_device(text: &str) -> anyhow::Result<Device> {
    match text {
        "cpu" => Ok(Device::Cpu),
        "auto" if cuda_is_available() => cuda(0),
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

fn cuda(index: usize) -> anyhow::Result<Device> {
    if !cuda_is_available() {
        bail_input!("--device is `cuda:{index}`, but {NO_CUDA}")
    }
    Device::new_cuda(index).map_err(|error| {
        let cause = error.to_string();
        bad_input!("--device is `cuda:{index}`, which cannot be used: {}", cause.lines().next().unwrap_or(""))
    })
}
