//! The ceilings against independent figures.

use std::path::Path;

use selectivbench::config::{Auto, Config, GapConfig, GapKind, Objective, Split, TaskConfig, TaskPreset};
use selectivbench::task::next::{Divergence, Targets};
use selectivbench::task::{PAD, Part, Task, oracle};
use serde_json::Value;

/// A paper grammar, as released; 200 test samples.
fn config(ambiguities: usize) -> TaskConfig {
    let mut task = Config::of(TaskPreset::Task1ModelSize).task;
    task.ambiguities = ambiguities;
    (task.vocab, task.depth) = (Auto::AUTO, Auto::AUTO);
    task.split = Split::AsReleased;
    task.samples.test = 200;
    task
}

/// Hits of a filter that leaves the accepted lengths out, and of equally probable states takes that which
/// began in the first start state: the observer behind the golden figures.
fn plain_hits(task: &Task) -> f64 {
    let grammar = task.grammar();
    let (mut hits, mut elements) = (0, 0);
    for index in 0..200 {
        let mut now = vec![(grammar.end(), 1.0)];
        for state in task.states(Part::Test, index).unwrap() {
            let mut next: Vec<(u32, f64)> = Vec::new();
            for (from, weight) in now {
                let list = if from == grammar.end() { grammar.starts() } else { grammar.successors(from) };
                for &to in list.iter().filter(|&&to| grammar.symbol(to) == grammar.symbol(state)) {
                    match next.iter_mut().find(|(known, _)| *known == to) {
                        Some((_, sum)) => *sum += weight / list.len() as f64,
                        None => next.push((to, weight / list.len() as f64)),
                    }
                }
            }
            let total: f64 = next.iter().map(|(_, weight)| weight).sum();
            next.iter_mut().for_each(|(_, weight)| *weight /= total);
            let best = next.iter().fold((0, 0.0), |best, &this| if this.1 > best.1 { this } else { best });
            hits += usize::from(best.0 == state);
            elements += 1;
            now = next;
        }
    }
    hits as f64 / elements as f64
}

#[test]
fn ceilings_of_the_paper_grammars() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data/ceiling.json");
    let golden: Vec<Value> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    for entry in &golden {
        let number = |key: &str| entry[key].as_f64().unwrap();
        let task = Task::new(&config(number("amb") as usize), number("seed") as u64).unwrap();
        let want = number("map_accuracy");
        assert!((plain_hits(&task) - want).abs() < 1e-5, "{entry}");
        // The golden figure counts how ties between two start states fell out.
        let ceiling = oracle::ceiling(&task, None).unwrap();
        assert_eq!(ceiling.elements, 200 * 200);
        assert!((ceiling.accuracy - want).abs() < 3e-4, "{ceiling:?}, expected {want}");
        assert!((ceiling.hits - want).abs() < 1e-3, "{ceiling:?}, expected {want}");
        assert_eq!(task.ceiling(0.1).unwrap(), ceiling.accuracy);
        assert_eq!(
            oracle::ceiling(&task, Some(1.0)).unwrap().accuracy,
            ceiling.accuracy,
            "blanks tell nothing"
        );
        let strings = oracle::census(&task).unwrap().strings;
        assert!((strings - number("strings_per_sample")).abs() < 1e-9);
    }
}

/// Probabilities that the observer names are the frequencies that come true.
#[test]
fn observers_are_calibrated_among_distractors() {
    for (gap, probability, start) in [(0.1, 0.1, 5), (0.1, 0.5, 0), (0.3, 0.3, 2), (0.2, 1.0, 0)] {
        let mut config = config(40);
        (config.ambiguities, config.vocab, config.depth) = (3, Auto::Value(5), Auto::Value(3));
        (config.length, config.string.max) = (24, Auto::AUTO);
        config.gap = GapConfig { kind: GapKind::Distractor, start, probability, ..config.gap };
        config.test_gap = gap;
        config.split = Split::HeldOut;
        config.samples.test = 6000;
        let task = Task::new(&config, 2).unwrap();
        let ceiling = oracle::ceiling(&task, None).unwrap();
        assert!((ceiling.accuracy - ceiling.hits).abs() < 3e-3, "{ceiling:?}");
        assert!(ceiling.accuracy < 0.999, "something is uncertain: {ceiling:?}");
        assert_ne!(task.ceiling(0.5).unwrap(), task.ceiling(gap).unwrap());
    }
}

/// The ideal's probabilities of the next symbol are the frequencies that come true, its own divergence is 0, and
/// what knows less diverges.
#[test]
fn the_ideal_predicts_the_next_symbol() {
    for (kind, split) in [
        (GapKind::Blank, Split::HeldOut),
        (GapKind::Distractor, Split::HeldOut),
        (GapKind::Blank, Split::AsReleased),
    ] {
        let mut config = config(6);
        config.objective = Objective::Predict;
        (config.length, config.string.max) = (30, Auto::AUTO);
        config.gap = GapConfig { kind, probability: 0.4, ..config.gap };
        (config.test_gap, config.split, config.samples.test) = (0.2, split, 2000);
        let task = Task::new(&config, 2).unwrap();
        let ceiling = oracle::ceiling(&task, None).unwrap();
        assert!((ceiling.accuracy - ceiling.hits).abs() < 6e-3, "{kind:?}, {split:?}: {ceiling:?}");
        assert!(ceiling.accuracy < 0.9, "{ceiling:?}");

        let targets = Targets::new(&task, None).unwrap();
        let samples = task.samples(Part::Test, 0, 2000, None).unwrap();
        let mean = |logits: &dyn Fn(&[f64]) -> Vec<f32>| {
            let mut divergence = Divergence::new(&targets, samples.as_slice());
            let steps = samples.steps();
            let each = samples.as_slice().iter().flat_map(|sample| {
                let of = targets.of(sample);
                let rows: Vec<Vec<f32>> = (0..of.steps()).map(|step| logits(of.at(step))).collect();
                let padding = vec![0.0; (steps - of.steps()) * task.classes()];
                rows.concat().into_iter().chain(padding).collect::<Vec<f32>>()
            });
            let element = samples
                .as_slice()
                .iter()
                .flat_map(|sample| (0..steps).map(|step| if step < sample.steps() { 0 } else { PAD }));
            divergence.add(&each.collect::<Vec<f32>>(), &element.collect::<Vec<u32>>());
            let (sum, count) = divergence.finish();
            assert_eq!(count, samples.valid_steps());
            sum / count as f64
        };
        let ideal = mean(&|target| target.iter().map(|p| p.max(1e-30).ln() as f32).collect());
        assert!(ideal.abs() < 1e-6, "{ideal}");
        let blunt = mean(&|target| target.iter().map(|p| (p + 0.1).ln() as f32).collect());
        assert!(blunt > 0.05, "{blunt}");
        if split == Split::AsReleased {
            continue;
        }

        // The cross-entropy with what came is the entropy, in expectation.
        let (mut loss, mut elements) = (0.0, 0.0);
        for sample in samples.as_slice() {
            let (of, mut step) = (targets.of(sample), 0);
            for (&label, &gap) in sample.labels.iter().zip(&sample.gaps) {
                // At the end of its window; with distractors the observer does not know that it is the end.
                step += gap as usize;
                loss -= of.at(step)[label as usize].ln();
                elements += 1.0;
                step += 1;
            }
        }
        let (loss, blank) = (loss / elements, kind == GapKind::Blank);
        assert!(!blank || (loss - ceiling.entropy).abs() < 0.01, "{loss}, {ceiling:?}");
        assert!(blank || loss > ceiling.entropy + 0.02, "{loss}, {ceiling:?}");
        // Blanks are no news; all that was seen is in a window as long as the sample.
        let whole = oracle::window_curve(&task, &[1, 31]).unwrap();
        assert!(whole[0] < whole[1], "{whole:?}");
        assert!(!blank || (whole[1] - ceiling.hits).abs() < 2e-3, "{whole:?}, {ceiling:?}");
    }
}

/// The published curve is of an observer to whom all states of a symbol are equally likely at the head of
/// the window; knowing where strings begin helps by a few points where the window is short.
#[test]
fn window_curves() {
    let ks = [1, 2, 3, 4, 5, 6, 7, 8, 10];
    for (ambiguities, published) in [
        (20, [0.05, 0.29, 0.56, 0.78, 0.91, 0.97, 0.99, 0.998, 1.0]),
        (40, [0.025, 0.155, 0.37, 0.60, 0.82, 0.91, 0.97, 0.98, 0.999]),
    ] {
        let task = Task::new(&config(ambiguities), 2).unwrap();
        let curve = oracle::window_curve(&task, &ks).unwrap();
        for (got, want) in curve.iter().zip(published) {
            assert!(*got > want - 0.005 && *got < want + 0.065, "{curve:?}");
        }
        let majority = oracle::census(&task).unwrap().majority;
        assert!(majority < curve[0] && majority > 0.008, "{majority}");
        // all that was seen is in the window
        let whole = oracle::window_curve(&task, &[201]).unwrap()[0];
        assert!((whole - oracle::ceiling(&task, None).unwrap().hits).abs() < 1e-3);
    }
}
