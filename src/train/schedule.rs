//! The learning rate of every update.

use crate::config::{Config, Emulate, Schedule};

/// What `train.lr` is multiplied with at `update`, counted from 0, of `total`.
///
/// Linear warm-up, then half a cosine from 1 to `lr_min`. The released code multiplies its first update
/// with 0; here the warm-up begins one step further up, unless the released code is emulated.
pub fn multiplier(config: &Config, update: usize, total: usize) -> f64 {
    let train = &config.train;
    let (at, warmup) = (update as f64, train.warmup);
    if at < warmup {
        let done = if train.emulate == Emulate::Authors { at } else { at + 1.0 };
        return (done / warmup).min(1.0);
    }
    match train.schedule {
        Schedule::Constant => 1.0,
        Schedule::Cosine => {
            let progress = (at - warmup) / (total as f64 - warmup);
            let wave = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
            train.lr_min + (1.0 - train.lr_min) * wave
        }
    }
}
