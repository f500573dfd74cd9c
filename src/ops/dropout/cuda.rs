//! Launches of `kernels/dropout.cu`, and a mask as the kernels take it.

use candle_core::{Result, Tensor};

use super::Dropout;
use crate::cuda::{Gpu, KernelArg, NULL, kernels};
use crate::ops::rows::cuda::Grid;
use crate::ops::tape::Value;

/// The arguments of a kernel that drops: key, p, 1/(1−p), first, site, steps. No mask: a null key.
pub struct MaskArgs {
    key: Option<Tensor>,
    args: [KernelArg; 5],
}

impl MaskArgs {
    pub fn new(gpu: &Gpu, dropout: Option<&Dropout>) -> Result<Self> {
        let Some(dropout) = dropout else {
            return Ok(Self { key: None, args: [NULL, 0f32.into(), 1f32.into(), 0u32.into(), 0u32.into()] });
        };
        let key = dropout.device_key(gpu)?;
        let args = [
            gpu.ptr(&key)?,
            (dropout.p as f32).into(),
            ((1.0 / (1.0 - dropout.p)) as f32).into(),
            dropout.first.into(),
            dropout.site.into(),
        ];
        Ok(Self { key: Some(key), args })
    }

    /// For rows that are `steps` timesteps a sample. The mask must outlive the launch.
    pub fn args(&self, steps: usize) -> impl Iterator<Item = KernelArg> {
        debug_assert!(self.key.is_some() || matches!(self.args[0], NULL));
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
    list.extend([rows.into(), width.into(), grid.log_width.into()]);
    list.extend(mask.args(steps));
    gpu.launch(&kernels::DROPOUT, &grid.name("dropout_apply", dtype)?, grid.map(&gpu), &list)?;
    Ok(y)
}
