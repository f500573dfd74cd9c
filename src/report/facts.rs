//! What can be said of the tasks at hand without any model: the window-k ideal observers, and timesteps.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use anyhow::Result;

use super::data::{Data, TaskGroup};
use crate::config::TaskConfig;
use crate::task::oracle::window_curve;
use crate::task::{Part, Task};

/// Window lengths that are looked at; figures show a few of them.
pub const WINDOWS: [usize; 11] = [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16];

/// Test samples that the observers look at: enough for three digits.
const SAMPLES: usize = 200;

/// Time for the observers of all tasks together.
const TIME: Duration = Duration::from_secs(20);

/// Largest table of states and places that is worked out for a picture.
const MOST: usize = 50_000_000;

/// Of one task, as means over its seeds.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Accuracy of the best observer of the last k elements; empty where it was not worked out.
    pub observers: Vec<(usize, f64)>,
    /// Timesteps of a training sample.
    pub timesteps: Option<f64>,
}

/// The facts of every task of `data`. What takes too long is left out, with a note.
pub fn facts(data: &Data, notes: &mut Vec<String>) -> Vec<Facts> {
    let (begin, mut known) = (Instant::now(), HashMap::new());
    let facts = |task: &TaskGroup| {
        let configs: BTreeMap<u64, &TaskConfig> = task
            .settings
            .iter()
            .flat_map(|&setting| data.chosen_runs(&data.settings[setting]))
            .map(|run| (run.summary.seed, &run.config.task))
            .collect();
        let mut all = Vec::new();
        for (seed, config) in configs {
            let mut config = config.clone();
            config.samples.test = config.samples.test.min(SAMPLES);
            config.eval_gaps.clear();
            if begin.elapsed() > TIME || config.states() * config.max_string() > MOST {
                notes.push(format!(
                    "{}: the window-k observers are left out, they take long; `data stats` works them out",
                    task.label
                ));
                return Facts::default();
            }
            let key = (seed, serde_json::to_string(&config).unwrap_or_default());
            let one =
                known.entry(key).or_insert_with(|| of_task(&config, seed).map_err(|e| format!("{e:#}")));
            match one {
                Ok(one) => all.push(one.clone()),
                Err(error) => {
                    notes.push(format!("{}: there are no window-k observers: {error}", task.label));
                    return Facts::default();
                }
            }
        }
        let n = all.len().max(1) as f64;
        let mean = |at: usize| all.iter().map(|one: &(Vec<f64>, f64)| one.0[at]).sum::<f64>() / n;
        Facts {
            observers: WINDOWS.iter().enumerate().map(|(at, &k)| (k, mean(at))).collect(),
            timesteps: Some(all.iter().map(|one| one.1).sum::<f64>() / n),
        }
    };
    data.tasks.iter().map(facts).collect()
}

/// Accuracy for each of [`WINDOWS`], and mean timesteps of a training sample.
fn of_task(config: &TaskConfig, seed: u64) -> Result<(Vec<f64>, f64)> {
    let task = Task::of_symbols(config, seed)?;
    let samples = task.samples(Part::Train, 0, SAMPLES.min(config.samples.train), None)?;
    let samples = samples.as_slice();
    let steps = samples.iter().map(|sample| sample.steps() as f64).sum::<f64>();
    let timesteps = steps / samples.len().max(1) as f64;
    Ok((window_curve(&task, &WINDOWS)?, timesteps))
}

#[cfg(test)]
mod tests {
    use super::super::data::tests::data;
    use super::super::read::tests::made_up;
    use super::*;

    #[test]
    fn observers_see_more_with_longer_windows() {
        let small = ["task.ambiguities=4", "task.length=12", "task.samples.test=50"];
        let sets = [&small[..], &["task.gap={kind: blank, low: 0.3, high: 0.3}"]].concat();
        let (data, mut notes) = (data(vec![made_up(&sets, 0.5, 0.5)]), vec![]);
        let facts = facts(&data, &mut notes);
        assert!(notes.is_empty(), "{notes:?}");
        let curve = &facts[0].observers;
        assert_eq!(curve.len(), WINDOWS.len());
        assert!(curve[0].1 < curve[3].1 && curve[10].1 <= 1.0, "{curve:?}");
        // 12 elements, each with 3 blanks behind it
        assert_eq!(facts[0].timesteps, Some(48.0));
    }
}
