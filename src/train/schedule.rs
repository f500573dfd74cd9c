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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::load::defaults;

    /// The learning rates that the released code had in force, from `tests/golden`.
    #[test]
    fn the_emulation_has_the_rates_of_the_released_code() {
        let golden = include_str!("../../tests/golden/data/metrics.json");
        let golden: serde_json::Value = serde_json::from_str(golden).unwrap();
        let mut seen = 0;
        for case in golden["schedule"].as_array().unwrap() {
            let mut config = defaults();
            config.train.emulate = Emulate::Authors;
            config.train.lr = case["lr"].as_f64().unwrap();
            config.train.warmup = case["warmup_steps"].as_f64().unwrap();
            config.train.lr_min = match case["scheduler"].as_str().unwrap() {
                "cosine_schedule_with_warmup" => 0.0,
                _ => 0.1,
            };
            let total = case["total_steps"].as_u64().unwrap() as usize;
            for (update, lr) in case["lr_at_update"].as_object().unwrap() {
                let want = lr["value"].as_f64().unwrap();
                let got = config.train.lr * multiplier(&config, update.parse().unwrap(), total);
                assert!((got - want).abs() <= 1e-15 + 1e-12 * want, "{case} {update}: {got}, not {want}");
                seen += 1;
            }
        }
        assert!(seen > 30);
    }

    #[test]
    fn the_clean_warm_up_wastes_no_update() {
        let mut config = defaults();
        config.train.warmup = 10.0;
        assert_eq!(multiplier(&config, 0, 100), 0.1);
        assert_eq!(multiplier(&config, 9, 100), 1.0);
        assert_eq!(multiplier(&config, 10, 100), 1.0);
        assert!(multiplier(&config, 99, 100) < 1e-3);
    }
}
