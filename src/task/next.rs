//! Next-symbol prediction (`task.objective: predict`): what is shown, what comes next, and how likely it was.
//!
//! The label of an element is the symbol of the element behind it, held through the element's window; the
//! classes are the symbols. How good the probabilities of a model are is told by the Kullback-Leibler divergence
//! from a target distribution, mean over the timesteps that are asked.
//!
//! # `split: held-out`
//!
//! Nothing is changed in what is shown. The generator goes on one element beyond the sample, so that the last
//! element has a next symbol like any other, and no timestep is left out. The target is the ideal: the exact
//! distribution of the label given everything that a causal observer can know at that timestep: the grammar, the
//! accepted lengths of strings, the rule of gaps, and every symbol shown so far ([`Observer`]). It averages over
//! what nobody can know (in which of the start states with one symbol a string began; which symbols were
//! distractors), so that the ideal itself is a model, whose divergence is 0. A recording is known at its last frame.
//! The end of a sample bears on nothing: strings are drawn to their end and cut.
//!
//! # `split: as-released`
//!
//! What the authors' code makes of the same sample: the symbol shown behind each `#` is overwritten with `#`,
//! labels follow what is shown, and the label of the last element is `#`. The target is the grammar's own
//! distribution behind the true state, which leaves out that only strings of accepted lengths are kept, and is
//! `#` behind `#`. Before it is compared, [`EPSILON`] is added to every probability and the sum is made 1 again,
//! as in the authors' test (their training log, which has no counterpart here, does not). No model reaches 0.

use anyhow::Result;
use rayon::prelude::*;

use super::oracle::Observer;
use super::{PAD, Part, Sample, Task};
use crate::config::{Objective, Split};

/// What the authors' test adds to each probability of a target.
pub const EPSILON: f64 = 1e-6;

impl Task {
    /// The states of sample `index` and, where it is to be predicted, the symbol of the element behind its last.
    pub(super) fn states_and_next(&self, part: Part, index: u64) -> Result<(Vec<u32>, Option<u32>)> {
        let length = self.config().length;
        match self.config().objective {
            Objective::Classify => Ok((self.elements(part, index, length)?, None)),
            Objective::Predict => {
                let mut states = self.elements(part, index, length + 1)?;
                let next = states.pop().map(|state| self.grammar().symbol(state));
                Ok((states, next))
            }
        }
    }
}

impl Sample {
    /// Makes the next symbol the label of each element, as `split` has it; `next` is the symbol behind the last.
    pub fn predict(&mut self, split: Split, next: u32) {
        let mut last = next;
        if split == Split::AsReleased {
            let behind_end = |pair: &[u32]| pair[0] == 0;
            let overwritten: Vec<bool> = self.symbols.windows(2).map(behind_end).collect();
            let behind = self.symbols.iter_mut().skip(1).zip(overwritten);
            behind.filter(|(_, overwritten)| *overwritten).for_each(|(symbol, _)| *symbol = 0);
            last = 0;
        }
        self.labels = self.symbols.iter().skip(1).copied().chain([last]).collect();
    }
}

/// The target distributions of the validation or test part.
pub struct Targets<'a> {
    task: &'a Task,
    /// Of the ideal.
    observer: Option<Observer<'a>>,
}

impl<'a> Targets<'a> {
    /// For samples with the gap `gap`, or the task's `test_gap`; `None` if the task is not to predict.
    pub fn new(task: &'a Task, gap: Option<f64>) -> Option<Self> {
        let config = task.config();
        let observer = || (config.split == Split::HeldOut).then(|| Observer::new(task, gap));
        (config.objective == Objective::Predict).then(|| Self { task, observer: observer() })
    }

    /// The targets of one sample.
    pub fn of(&self, sample: &Sample) -> Distributions {
        let classes = self.task.classes();
        let Some(observer) = &self.observer else {
            let of_state = |&state: &u32| smoothed(&after(self.task, state), EPSILON);
            return Distributions::new(
                sample,
                false,
                classes,
                sample.states.iter().flat_map(of_state).collect(),
            );
        };
        Distributions::new(sample, true, classes, observer.next_symbols(sample))
    }
}

/// The grammar's own distribution of the symbol behind a state, `[classes]`; behind `#`, `#`.
pub fn after(task: &Task, state: u32) -> Vec<f64> {
    let grammar = task.grammar();
    let successors = grammar.successors(state);
    let mut probabilities = vec![0.0; task.classes()];
    for &next in successors {
        probabilities[grammar.symbol(next) as usize] = 1.0 / successors.len() as f64;
    }
    if state == grammar.end() {
        probabilities[0] = 1.0;
    }
    probabilities
}

/// Probabilities with `epsilon` added to each, made to sum to 1 again.
pub fn smoothed(probabilities: &[f64], epsilon: f64) -> Vec<f64> {
    let sum = probabilities.iter().sum::<f64>() + epsilon * probabilities.len() as f64;
    probabilities.iter().map(|p| (p + epsilon) / sum).collect()
}

/// The target distributions over the timesteps of one sample.
pub struct Distributions {
    classes: usize,
    /// The first timestep of each distribution.
    starts: Vec<usize>,
    /// [distributions, classes]
    probabilities: Vec<f64>,
    steps: usize,
}

impl Distributions {
    /// One for each element, or for each symbol shown if distractors tell something too; from its last frame on.
    fn new(sample: &Sample, distractors: bool, classes: usize, probabilities: Vec<f64>) -> Self {
        let (steps, frames) = (sample.steps(), sample.frames as usize);
        let starts = if distractors && !sample.distractors.is_empty() {
            (frames - 1..steps).step_by(frames).collect()
        } else {
            let start = |at: &mut usize, gap: usize| {
                *at += frames + gap;
                Some(*at - gap - 1)
            };
            sample.behind().scan(0, start).collect()
        };
        Self { classes, starts, probabilities, steps }
    }

    /// Timesteps of the sample.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// The target at a timestep of the sample, from the last frame of its first symbol on, `[classes]`.
    pub fn at(&self, step: usize) -> &[f64] {
        let i = self.starts.partition_point(|&start| start <= step) - 1;
        &self.probabilities[i * self.classes..][..self.classes]
    }
}

/// Σ target · ln(target / softmax(logits)), in nats; targets of 0 add nothing.
pub fn divergence<F: Copy + Into<f64>>(target: &[f64], logits: &[F]) -> f64 {
    let logits = || logits.iter().map(|&logit| logit.into());
    let most = logits().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = most + logits().map(|logit| (logit - most).exp()).sum::<f64>().ln();
    let terms = target.iter().zip(logits()).filter(|(p, _)| **p > 0.0);
    terms.map(|(p, logit)| p * (p.ln() - (logit - log_sum))).sum()
}

/// Adds up the divergence over the timesteps of samples that come in pieces.
pub struct Divergence {
    targets: Vec<Distributions>,
    at: usize,
    sum: f64,
    steps: usize,
}

impl Divergence {
    /// For a batch of samples.
    pub fn new(targets: &Targets, samples: &[Sample]) -> Self {
        Self {
            targets: samples.par_iter().map(|sample| targets.of(sample)).collect(),
            at: 0,
            sum: 0.0,
            steps: 0,
        }
    }

    /// Takes the logits [B, T, classes] of the next piece, padding included; `element` [B, T] is [`PAD`] where a step is
    /// not asked.
    pub fn add(&mut self, logits: &[f32], element: &[u32]) {
        let (batch, at) = (self.targets.len(), self.at);
        let Some(first) = self.targets.first() else { return };
        let steps = logits.len() / (batch * first.classes);
        let of_sample = |((targets, logits), element): ((&Distributions, &[f32]), &[u32])| {
            let rows = logits.chunks_exact(targets.classes).zip(element).enumerate();
            let asked = rows.filter(|(_, (_, element))| **element != PAD);
            let of_step = |(t, (row, _)): (usize, (&[f32], _))| divergence(targets.at(at + t), row);
            asked.map(of_step).fold((0.0, 0), |(sum, steps), divergence| (sum + divergence, steps + 1))
        };
        let rows = self.targets.par_iter().zip(logits.par_chunks_exact(steps * first.classes));
        let rows = rows.zip(element.par_chunks_exact(steps));
        // In order, so that the sum does not depend on the threads.
        let sums: Vec<(f64, usize)> = rows.map(of_sample).collect();
        for (sum, inside) in sums {
            self.sum += sum;
            self.steps += inside;
        }
        self.at += steps;
    }

    /// Sum of the divergences, and the timesteps that they are of.
    pub fn finish(self) -> (f64, usize) {
        (self.sum, self.steps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::load::parse;

    fn task(sets: &[&str]) -> Task {
        let text = "
seed: 3
task: {preset: task2, objective: predict, ambiguities: 4, depth: 3, length: 30, string: {max: 12}}";
        let sets: Vec<String> = sets.iter().map(|set| format!("task.{set}")).collect();
        let config = parse(text, "test", &sets).unwrap();
        Task::new(&config.task, config.seed).unwrap()
    }

    #[test]
    fn labels_are_the_next_symbols() {
        let task = task(&[]);
        let (mut ends, mut last) = (0, 0);
        for index in 0..50 {
            let samples = task.samples(Part::Test, index, 1, None).unwrap();
            let sample = &samples.as_slice()[0];
            let states = task.elements(Part::Test, index, 31).unwrap();
            assert_eq!(sample.states, states[..30]);
            let symbols: Vec<u32> = states.iter().map(|&state| task.grammar().symbol(state)).collect();
            assert_eq!((&sample.symbols[..], &sample.labels[..]), (&symbols[..30], &symbols[1..]));
            ends += symbols.iter().filter(|&&symbol| symbol == 0).count();
            last += usize::from(sample.labels[29] != 0);
        }
        assert!(ends > 50 && last > 25, "{ends} ends, {last} last labels that are not the end");
    }

    #[test]
    fn released_samples_are_overwritten_behind_each_end() {
        let mut sample = Sample { symbols: vec![2, 0, 3, 0, 4, 5, 0], ..Default::default() };
        sample.predict(Split::AsReleased, 9);
        assert_eq!(sample.symbols, [2, 0, 0, 0, 0, 5, 0]);
        assert_eq!(sample.labels, [0, 0, 0, 0, 5, 0, 0]);
    }

    #[test]
    fn both_objectives_draw_the_same_elements() {
        for split in ["split=held-out", "split=as-released"] {
            let drawn = |objective: &str| {
                let samples = task(&[split, objective]).samples(Part::Train, 5, 3, None).unwrap();
                samples.as_slice().iter().map(|s| (s.states.clone(), s.gaps.clone())).collect::<Vec<_>>()
            };
            assert_eq!(drawn("objective=predict"), drawn("objective=classify"));
        }
    }

    #[test]
    fn divergence_by_hand() {
        let logits = [0.5f64.ln() + 3.0, 0.25f64.ln() + 3.0, 0.25f64.ln() + 3.0];
        assert!(divergence(&[0.5, 0.25, 0.25], &logits).abs() < 1e-15);
        assert!((divergence(&[1.0, 0.0, 0.0], &logits) - 2f64.ln()).abs() < 1e-15);
        assert_eq!(smoothed(&[1.0, 0.0, 0.0], 1.0), [0.5, 0.25, 0.25]);
    }
}
