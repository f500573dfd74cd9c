//! Launches of `kernels/dropout.cu`, and a mask as the kernels take it.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex};

use candle_core::{DeviceLocation, Result, Tensor};

use super::Dropout;
use crate::cuda::{Gpu, KernelArg, NULL, kernels};
use crate::ops::rows::cuda::Grid;
use crate::ops::tape::Value;
use crate::ops::upload::upload;

/// `key` in the memory of a GPU. All dropouts of a step have the same one: it is uploaded once.
fn device_key(gpu: &Gpu, key: [u32; 2]) -> Result<Tensor> {
    static LATEST: LazyLock<Mutex<HashMap<DeviceLocation, ([u32; 2], Tensor)>>> =
        LazyLock::new(Default::default);
    let device = gpu.device();
    let mut latest = LATEST.lock().unwrap();
    match latest.get(&device.location()) {
        Some((known, tensor)) if *known == key && tensor.device().same_device(&device) => Ok(tensor.clone()),
        _ => {
            let tensor = upload(gpu, &key, 2)?;
            latest.insert(device.location(), (key, tensor.clone()));
            Ok(tensor)
        }
    }
}

/// The arguments of a kernel that drops: key, p, 1/(1−p), first, site, steps. No mask: a null key.
pub struct MaskArgs {
    /// Holds the memory of the key.
    _key: Option<Tensor>,
    args: [KernelArg; 5],
}

impl MaskArgs {
    pub fn new(gpu: &Gpu, dropout: Option<&Dropout>) -> Result<Self> {
        let Some(dropout) = dropout else {
            return Ok(Self { _key: None, args: [NULL, 0f32.into(), 1f32.into(), 0u32.into(), 0u32.into()] });
        };
        let key = device_key(gpu, dropout.key)?;
        let args = [
            gpu.ptr(&key)?,
            (dropout.p as f32).into(),
            ((1.0 / (1.0 - dropout.p)) as f32).into(),
            dropout.first.into(),
            dropout.site.into(),
        ];
        Ok(Self { _key: Some(key), args })
    }

    /// For rows that are `steps` timesteps a sample. The mask must outlive the launch.
    pub fn args(&self, steps: usize) -> impl Iterator<Item = KernelArg> {
        self.args.into_iter().chain([steps.into()])
    }
}

/// x ⊙ mask over x [B, T, D].
pub fn apply(dropout: &Dropout, x: &Tensor) -> Result<Value> {
    let (batch, steps, width) = x.dims3()?;
    let (gpu, dtype) = (Gpu::of(x)?, x.dtype());
    let y = gpu.empty(x.shape(), dtype)?;
    let mask = MaskArgs::new(&gpu, Some(dropout))?;
    let mut list = vec![gpu.ptr(x)?, gpu.of_value(&y)?];
    let rows = batch * steps;
    let grid = Grid::new(rows, width, dtype, &list);
    let shape: [KernelArg; 3] = [rows.into(), width.into(), grid.log_width.into()];
    list.extend(shape);
    list.extend(mask.args(steps));
    gpu.launch(&kernels::DROPOUT, &grid.name("dropout_apply", dtype)?, grid.map(&gpu), &list)?;
    Ok(y)
}
