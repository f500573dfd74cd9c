//! Launches of `kernels/dropout.cu`, and a mask as the kernels take it.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex};

use candle_core::{Result, Tensor};

use super::Dropout;
use crate::cuda::{Gpu, KernelArg, NULL, kernels};
use crate::ops::rows::cuda::Grid;
use crate::ops::tape::Value;
use crate::ops::upload::{upload, write};

/// The newest key and where it lies, by context.
type Keys = HashMap<usize, ([u32; 2], Tensor)>;

/// All masks of an update share one key, which is written once and before the update's kernels, so that a
/// captured update finds each new key at the same place.
static KEYS: LazyLock<Mutex<Keys>> = LazyLock::new(Default::default);

/// Puts `key` where the kernels launched from here on look for it.
fn device_key(gpu: &Gpu, key: [u32; 2]) -> Result<KernelArg> {
    let mut keys = KEYS.lock().unwrap();
    let context = Arc::as_ptr(gpu.stream().context()) as usize;
    match keys.get_mut(&context) {
        Some((newest, place)) => {
            if *newest != key {
                write(gpu, &key, place)?;
                *newest = key;
            }
            gpu.ptr(place)
        }
        None => {
            let place = upload(gpu, &key, 2)?;
            let address = gpu.ptr(&place)?;
            keys.insert(context, (key, place));
            Ok(address)
        }
    }
}

/// Puts the key of the next update in its place, before the update is launched: what a captured update needs.
pub fn set_key(gpu: &Gpu, key: [u32; 2]) -> Result<()> {
    device_key(gpu, key).map(drop)
}

/// The arguments of a kernel that drops: key, p, 1/(1−p), first, site, steps, for rows that are `steps`
/// timesteps a sample. No mask: a null key.
pub fn mask_args(gpu: &Gpu, dropout: Option<&Dropout>, steps: usize) -> Result<[KernelArg; 6]> {
    let steps = steps.into();
    let Some(dropout) = dropout else {
        return Ok([NULL, 0f32.into(), 1f32.into(), 0u32.into(), 0u32.into(), steps]);
    };
    Ok([
        device_key(gpu, dropout.key)?,
        (dropout.p as f32).into(),
        ((1.0 / (1.0 - dropout.p)) as f32).into(),
        dropout.first.into(),
        dropout.site.into(),
        steps,
    ])
}

/// x ⊙ mask over x [B, T, D].
pub fn apply(dropout: &Dropout, x: &Tensor) -> Result<Value> {
    let (batch, steps, width) = x.dims3()?;
    let (gpu, dtype) = (Gpu::of(x)?, x.dtype());
    let y = gpu.empty(x.shape(), dtype)?;
    let mut list = vec![gpu.ptr(x)?, gpu.of_value(&y)?];
    let rows = batch * steps;
    let grid = Grid::new(rows, width, dtype, &list);
    list.extend([KernelArg::from(rows), width.into(), grid.log_width.into()]);
    list.extend(mask_args(&gpu, Some(dropout), steps)?);
    list.push(i32::from(dropout.tied).into());
    gpu.launch(&kernels::DROPOUT, &grid.name("dropout_apply", dtype)?, grid.map(&gpu), &list)?;
    Ok(y)
}
