//! Where a model is right: its votes counted by the gap before an element, by the element's place in its string,
//! and on and after distractors.
//!
//! Counts come from what a sample knows (states, gaps, distractors) and from the votes, which are the same on every
//! device. They are counts, not shares, so that they can be added up over runs.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::config::GapKind;
use crate::task::{Grammar, Sample, Task};

/// Distances up to this have a bin of their own; beyond it a bin ends at each power of two.
const SINGLE: usize = 16;

/// Right votes among elements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    pub right: usize,
    pub elements: usize,
}

impl Tally {
    fn count(&mut self, right: bool) {
        self.right += usize::from(right);
        self.elements += 1;
    }

    /// Counts those of `other` too.
    pub fn add(&mut self, other: Tally) {
        self.right += other.right;
        self.elements += other.elements;
    }

    /// right / elements; NaN without elements.
    pub fn accuracy(&self) -> f64 {
        self.right as f64 / self.elements as f64
    }
}

/// Elements with the same gap before them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AtGap {
    /// Timesteps between the element before and this one; 0 for the first element of a sample.
    pub gap: u32,
    #[serde(flatten)]
    pub tally: Tally,
}

/// Elements at a distance of `from` to `to`, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AtDistance {
    pub from: usize,
    pub to: usize,
    #[serde(flatten)]
    pub tally: Tally,
}

impl AtDistance {
    /// `3`, or `17-32`.
    pub fn name(&self) -> String {
        range(self.from, self.to)
    }
}

/// Where a task has distractors.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AtDistractors {
    /// Elements with a distractor in their own window.
    pub on: Tally,
    /// Elements by their distance from the last such element before them: 1 for the next one. Those with a
    /// distractor of their own are counted here too; those before the first distractor are not.
    pub after: Vec<AtDistance>,
}

/// The votes of an evaluation, counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Breakdown {
    /// Every element, ascending by gap.
    pub by_gap: Vec<AtGap>,
    /// Every element, by the number of elements since its string began: 1 for the first.
    pub by_distance: Vec<AtDistance>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distractor: Option<AtDistractors>,
}

/// Where an element stands in its sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Timesteps between the element before and this one.
    pub gap: u32,
    /// Elements since the string began; 1 for its first.
    pub distance: usize,
    /// Whether a distractor is shown in the element's window.
    pub distractor: bool,
    /// Elements since the last one with a distractor; 1 right behind it.
    pub since_distractor: Option<usize>,
}

/// The places of a sample's elements, in order.
pub fn places(grammar: &Grammar, sample: &Sample) -> impl Iterator<Item = Place> {
    let (mut gap, mut distance, mut since) = (0, 0, None);
    sample.states.iter().zip(&sample.gaps).map(move |(&state, &behind)| {
        distance += 1;
        since = since.map(|since| since + 1);
        let distractor = behind > 0 && !sample.distractors.is_empty();
        let place = Place { gap, distance, distractor, since_distractor: since };
        gap = behind;
        if state == grammar.end() {
            distance = 0;
        }
        if distractor {
            since = Some(0);
        }
        place
    })
}

/// Tallies of distances, by the first and the last that they hold.
type Bins = BTreeMap<(usize, usize), Tally>;

/// Counts the votes of an evaluation, batch by batch.
pub struct Counter<'a> {
    grammar: &'a Grammar,
    by_gap: BTreeMap<u32, Tally>,
    by_distance: Bins,
    distractor: Option<(Tally, Bins)>,
}

impl<'a> Counter<'a> {
    pub fn new(task: &'a Task) -> Self {
        let distractors = task.config().gap.kind == GapKind::Distractor;
        Self {
            grammar: task.grammar(),
            by_gap: BTreeMap::new(),
            by_distance: BTreeMap::new(),
            distractor: distractors.then(Default::default),
        }
    }

    /// Counts the votes [B, E] of a batch, E the elements of the longest sample.
    pub fn add(&mut self, samples: &[Sample], votes: &[u32]) {
        let elements = votes.len() / samples.len().max(1);
        for (sample, votes) in samples.iter().zip(votes.chunks_exact(elements.max(1))) {
            let labels = sample.labels.iter().zip(votes);
            for ((label, vote), place) in labels.zip(places(self.grammar, sample)) {
                let right = vote == label;
                self.by_gap.entry(place.gap).or_default().count(right);
                self.by_distance.entry(bin(place.distance)).or_default().count(right);
                let Some((on, after)) = &mut self.distractor else { continue };
                if place.distractor {
                    on.count(right);
                }
                if let Some(since) = place.since_distractor {
                    after.entry(bin(since)).or_default().count(right);
                }
            }
        }
    }

    pub fn finish(self) -> Breakdown {
        let distances =
            |bins: Bins| bins.into_iter().map(|((from, to), tally)| AtDistance { from, to, tally }).collect();
        Breakdown {
            by_gap: self.by_gap.into_iter().map(|(gap, tally)| AtGap { gap, tally }).collect(),
            by_distance: distances(self.by_distance),
            distractor: self.distractor.map(|(on, after)| AtDistractors { on, after: distances(after) }),
        }
    }
}

/// The bin of a distance: 1, 2, …, 16, 17-32, 33-64, …
fn bin(distance: usize) -> (usize, usize) {
    if distance <= SINGLE { (distance, distance) } else { octave(distance) }
}

/// 1, 2, 3-4, 5-8, 9-16, …
fn octave(distance: usize) -> (usize, usize) {
    let to = distance.next_power_of_two();
    (to / 2 + 1, to)
}

fn range(from: usize, to: usize) -> String {
    if from == to { from.to_string() } else { format!("{from}-{to}") }
}

impl Breakdown {
    /// Shares of right votes for `metrics.jsonl`, which must stay short: to five digits, distances by powers of
    /// two. As `{"gap": {"3": 0.9}, "distance": {"1": 0.5, "3-4": 0.8}, "distractor": {"on": …, "after_1": …}}`.
    pub fn shares(&self) -> Value {
        let share = |tally: &Tally| json!((tally.accuracy() * 1e5).round() / 1e5);
        let by_octave = |bins: &[AtDistance], prefix: &str| -> Map<String, Value> {
            let mut wide = Bins::new();
            bins.iter().for_each(|bin| wide.entry(octave(bin.to)).or_default().add(bin.tally));
            wide.iter()
                .map(|(&(from, to), tally)| (format!("{prefix}{}", range(from, to)), share(tally)))
                .collect()
        };
        let gaps: Map<_, _> = self.by_gap.iter().map(|at| (at.gap.to_string(), share(&at.tally))).collect();
        let mut all = json!({ "gap": gaps, "distance": by_octave(&self.by_distance, "") });
        if let Some(distractor) = self.distractor.as_ref().filter(|distractor| distractor.on.elements > 0) {
            let mut shares = Map::from_iter([("on".to_string(), share(&distractor.on))]);
            shares.extend(by_octave(&distractor.after, "after_"));
            all["distractor"] = shares.into();
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::load::parse;
    use crate::task::Part;

    fn task(sets: &[&str]) -> Task {
        let text = "
seed: 3
task: {preset: task2, ambiguities: 4, depth: 3, length: 40, string: {max: 20}}";
        let sets: Vec<String> = sets.iter().map(|set| format!("task.{set}")).collect();
        let config = parse(text, "test", &sets).unwrap();
        Task::new(&config.task, config.seed).unwrap()
    }

    fn at_gap(gap: u32, right: usize, elements: usize) -> AtGap {
        AtGap { gap, tally: Tally { right, elements } }
    }

    fn at(from: usize, to: usize, right: usize, elements: usize) -> AtDistance {
        AtDistance { from, to, tally: Tally { right, elements } }
    }

    #[test]
    fn bins_touch_and_hold_their_distances() {
        let mut last = 0;
        for distance in 1..2000 {
            for bin in [bin, octave] {
                let (from, to) = bin(distance);
                assert!(from <= distance && distance <= to, "{distance} in {from}-{to}");
            }
            let (from, to) = bin(distance);
            assert!(from == last + 1 || to == last);
            last = to;
        }
        assert_eq!([1, 2, 3, 4, 5, 9].map(octave), [(1, 1), (2, 2), (3, 4), (3, 4), (5, 8), (9, 16)]);
        assert_eq!([16, 17, 32, 33].map(bin), [(16, 16), (17, 32), (17, 32), (33, 64)]);
    }

    /// Two samples by hand: strings of 3 and 2 elements and the begin of one; gaps of 0, 2 and 5.
    #[test]
    fn a_sample_counted_by_hand() {
        let task = task(&["gap.kind=distractor"]);
        let grammar = task.grammar();
        let (end, other) = (grammar.end(), grammar.starts()[0]);
        let states = vec![other, other, end, other, end, other];
        let first = Sample::new(grammar, states.clone(), vec![2, 0, 5, 0, 0, 2], vec![1; 9]);
        let plain = Sample::new(grammar, states[..2].to_vec(), vec![0, 0], vec![]);
        let (yes, no) = (|state| grammar.label(state), u32::MAX);
        let votes = [
            [yes(other), no, yes(end), no, yes(end), yes(other)],
            // The second sample is shorter: what it has no element for does not count.
            [no, yes(other), no, no, no, no],
        ];
        let mut counter = Counter::new(&task);
        counter.add(&[first, plain], votes.as_flattened());
        let got = counter.finish();
        // Gaps before the elements: 0 2 0 5 0 0, and 0 0.
        assert_eq!(got.by_gap, [at_gap(0, 5, 6), at_gap(2, 0, 1), at_gap(5, 0, 1)]);
        // Distances: 1 2 3, 1 2, 1, and 1 2.
        assert_eq!(got.by_distance, [at(1, 1, 2, 4), at(2, 2, 2, 3), at(3, 3, 1, 1)]);
        let distractor = got.distractor.clone().unwrap();
        // In the windows of elements 0, 2 and 5; since the last one: - 1 2 1 2 3.
        assert_eq!(distractor.on, Tally { right: 3, elements: 3 });
        assert_eq!(distractor.after, [at(1, 1, 0, 2), at(2, 2, 2, 2), at(3, 3, 1, 1)]);

        let shares = got.shares();
        assert_eq!(shares["gap"], json!({ "0": 0.83333, "2": 0.0, "5": 0.0 }));
        assert_eq!(shares["distance"], json!({ "1": 0.5, "2": 0.66667, "3-4": 1.0 }));
        assert_eq!(
            shares["distractor"],
            json!({ "on": 1.0, "after_1": 0.0, "after_2": 1.0, "after_3-4": 1.0 })
        );
    }

    /// Every law of gaps, both splits: sums are the elements, and places agree with the timesteps shown.
    #[test]
    fn counts_agree_with_what_a_model_sees() {
        for sets in [
            &["gap.law=fixed"][..],
            &["gap.law=lognormal", "gap.mu=-1", "gap.low=0", "gap.high=30"],
            &["gap.start=7", "gap.probability=0.4", "split=as-released"],
            &["gap.kind=distractor", "gap.start=3", "gap.probability=0.3"],
            &["gap.kind=distractor", "gap.probability=0.3", "split=as-released"],
        ] {
            let task = task(sets);
            for (part, gap) in [(Part::Train, None), (Part::Test, Some(0.0)), (Part::Test, Some(0.4))] {
                let mut samples = task.samples(part, 2, 6, gap).unwrap();
                // The vote is right where the element's number is even.
                let votes: Vec<u32> = samples
                    .as_slice()
                    .iter()
                    .flat_map(|sample| {
                        let label = |(i, &state)| if i % 2 == 0 { task.grammar().label(state) } else { PAD };
                        sample.states.iter().enumerate().map(label)
                    })
                    .collect();
                let mut counter = Counter::new(&task);
                counter.add(samples.as_slice(), &votes);
                let got = counter.finish();
                let sum = |tallies: Vec<Tally>| {
                    tallies.into_iter().fold(Tally::default(), |mut sum, tally| {
                        sum.add(tally);
                        sum
                    })
                };
                let all = Tally { right: 6 * 20, elements: 6 * 40 };
                assert_eq!(sum(got.by_gap.iter().map(|at| at.tally).collect()), all, "{sets:?}");
                assert_eq!(sum(got.by_distance.iter().map(|at| at.tally).collect()), all, "{sets:?}");

                // Steps before an element, found in the timesteps: by gap, and with a distractor inside.
                let places: Vec<Vec<Place>> =
                    samples.as_slice().iter().map(|s| places(task.grammar(), s).collect()).collect();
                let batch = samples.next_window(usize::MAX).unwrap();
                let (mut on, mut steps) = (0, 0);
                for (b, places) in places.iter().enumerate() {
                    let row = b * batch.steps..b * batch.steps + batch.lengths[b];
                    let windows = batch.element[row.clone()].chunk_by(|a, b| a == b);
                    let mut last = 0;
                    let mut at = row.start;
                    for (window, place) in windows.zip(places) {
                        assert_eq!(place.gap, last);
                        let shown = batch.distractor[at..at + window.len()].contains(&true);
                        assert_eq!(place.distractor, shown);
                        on += usize::from(shown);
                        last = window.len() as u32 - 1;
                        at += window.len();
                    }
                    steps += at - row.start;
                }
                assert_eq!(steps, batch.valid_steps());
                assert_eq!(
                    got.distractor.map(|d| d.on.elements),
                    sets[0].ends_with("distractor").then_some(on)
                );
            }
        }
    }

    const PAD: u32 = u32::MAX;

    #[test]
    fn a_breakdown_survives_json() {
        let counts = Breakdown {
            by_gap: vec![at_gap(0, 1, 2)],
            by_distance: vec![at(17, 32, 1, 2)],
            distractor: None,
        };
        let text = serde_json::to_string(&counts).unwrap();
        assert_eq!(
            text,
            r#"{"by_gap":[{"gap":0,"right":1,"elements":2}],"by_distance":[{"from":17,"to":32,"right":1,"elements":2}]}"#
        );
        assert_eq!(serde_json::from_str::<Breakdown>(&text).unwrap(), counts);
    }
}
