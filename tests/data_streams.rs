//! Windows are pieces of the whole batch; the held-out parts share no stream; threads and the bounds of
//! batches change nothing.

use std::collections::HashSet;

use proptest::prelude::*;
use selectivbench::config::{
    Auto, Config, GapConfig, GapKind, GapLaw, Split, StringConfig, TaskConfig, TaskPreset,
};
use selectivbench::task::rng::{Pcg64, SeedSequence};
use selectivbench::task::{BLANK, Batch, PAD, Part, Purpose, Task, held_out_words};

/// A small grammar with irregular gaps and noise.
fn config(split: Split, kind: GapKind, law: GapLaw) -> TaskConfig {
    let base = Config::of(TaskPreset::Task2).task;
    TaskConfig {
        vocab: Auto::Value(7),
        ambiguities: 2,
        depth: Auto::Value(3),
        length: 12,
        string: StringConfig { min: 1, max: Auto::AUTO },
        gap: GapConfig { kind, law, low: 0.1, high: 0.6, mu: -1.0, sigma: 0.5, start: 2, probability: 0.7 },
        split,
        ..base
    }
}

const PARTS: [Part; 3] = [Part::Train, Part::Validation, Part::Test];

/// Steps `steps` of row `b`: symbols, labels, elements, distractors, noise.
type Row = (Vec<u32>, Vec<u32>, Vec<u32>, Vec<bool>, Vec<u32>);

fn row(batch: &Batch, b: usize, steps: std::ops::Range<usize>) -> Row {
    let at = b * batch.steps + steps.start..b * batch.steps + steps.end;
    let noise = batch.noise.as_ref().map_or(vec![], |noise| {
        noise[at.start * batch.features..at.end * batch.features].iter().map(|x| x.to_bits()).collect()
    });
    (
        batch.symbols[at.clone()].to_vec(),
        batch.labels[at.clone()].to_vec(),
        batch.element[at.clone()].to_vec(),
        batch.distractor[at].to_vec(),
        noise,
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn windows_are_pieces_of_the_batch(
        released: bool,
        distractors: bool,
        law in prop::sample::select(vec![GapLaw::Uniform, GapLaw::Lognormal, GapLaw::Fixed]),
        part in prop::sample::select(PARTS.to_vec()),
        noise in prop::sample::select(vec![0.0, 0.2]),
        gap in prop::option::of(0.0..1.0f64),
        first in 0..5u64,
        count in 1..4usize,
        cuts in prop::collection::vec(1..30usize, 1..200),
    ) {
        let split = if released { Split::AsReleased } else { Split::HeldOut };
        let kind = if distractors { GapKind::Distractor } else { GapKind::Blank };
        let task = Task::new(&TaskConfig { noise, ..config(split, kind, law) }, 3).unwrap();
        let whole = task.batch(part, first, count, gap).unwrap();
        let mut samples = task.samples(part, first, count, gap).unwrap();
        prop_assert_eq!(samples.steps(), whole.steps);
        prop_assert_eq!(samples.lengths(), &whole.lengths);
        prop_assert_eq!(samples.valid_steps(), whole.valid_steps());
        let (mut at, mut cuts) = (0, cuts.into_iter());
        // what the cuts leave comes in one piece
        while let Some(window) = samples.next_window(cuts.next().unwrap_or(usize::MAX)) {
            prop_assert_eq!(
                (window.batch, window.elements, window.features, window.first),
                (count, whole.elements, whole.features, first)
            );
            for b in 0..count {
                prop_assert_eq!(row(&window, b, 0..window.steps), row(&whole, b, at..at + window.steps));
                let length = whole.lengths[b].saturating_sub(at).min(window.steps);
                prop_assert_eq!(window.lengths[b], length);
            }
            at += window.steps;
        }
        prop_assert_eq!(at, whole.steps);

        // A batch is its rows, and padding is empty.
        for b in 0..count {
            let only = whole.rows(b..b + 1);
            prop_assert_eq!(row(&only, 0, 0..whole.steps), row(&whole, b, 0..whole.steps));
            let (symbols, labels, element, distractor, noise) = row(&whole, b, whole.lengths[b]..whole.steps);
            prop_assert!(symbols.iter().all(|&symbol| symbol == BLANK) && labels.iter().all(|&y| y == 0));
            prop_assert!(element.iter().all(|&e| e == PAD) && !distractor.contains(&true));
            prop_assert!(noise.iter().all(|&x| x == 0));
        }
    }

    #[test]
    fn held_out_words_are_different_for_different_arguments(
        a in any::<(u64, u64)>(), b in any::<(u64, u64)>(), i in 0..9usize, j in 0..9usize, same: (bool, bool),
    ) {
        // equal seeds and indices are the interesting case
        let b = (if same.0 { a.0 } else { b.0 }, if same.1 { a.1 } else { b.1 });
        prop_assume!((a, i) != (b, j));
        let words = |(seed, index), i: usize| held_out_words(seed, PARTS[i / 3], PURPOSES[i % 3], index);
        prop_assert_ne!(words(a, i), words(b, j));
        // An as-released sample has the words of a product: at most four.
        prop_assert!(SeedSequence::words(u128::from(a.0) * u128::from(a.1)).len() <= 4);
    }
}

const PURPOSES: [Purpose; 3] = [Purpose::Strings, Purpose::Gaps, Purpose::Noise];

/// Streams with different words, and those of the released code, begin with different numbers.
#[test]
fn first_draws_are_different() {
    let mut seen = HashSet::new();
    for seed in (0..12).chain([1 << 32, u64::MAX]) {
        for part in PARTS {
            for purpose in PURPOSES {
                for index in (0..100).chain([1 << 32]) {
                    let draw = Pcg64::from_words(&held_out_words(seed, part, purpose, index)).next_u64();
                    assert!(seen.insert(draw), "{seed} {part:?} {purpose:?} {index}");
                }
            }
        }
    }
    for product in 0..2000 {
        assert!(seen.insert(Pcg64::new(product).next_u64()));
    }
}

/// No sample of one part is a sample of another.
#[test]
fn parts_share_no_sample() {
    let config = TaskConfig { length: 60, ..config(Split::HeldOut, GapKind::Blank, GapLaw::Uniform) };
    let task = Task::new(&config, 3).unwrap();
    let mut seen = HashSet::new();
    for part in PARTS {
        for index in 0..500 {
            assert!(seen.insert(task.states(part, index).unwrap()), "{part:?} {index}");
        }
    }
}

#[test]
fn threads_and_bounds_of_batches_change_nothing() {
    for split in [Split::HeldOut, Split::AsReleased] {
        for kind in [GapKind::Blank, GapKind::Distractor] {
            let task = Task::new(&config(split, kind, GapLaw::Uniform), 4).unwrap();
            let made = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| task.batch(Part::Train, 5, 32, None).unwrap())
            };
            let (one, four) = (made(1), made(4));
            assert_eq!(one.lengths, four.lengths);
            for b in 0..32 {
                assert_eq!(row(&one, b, 0..one.steps), row(&four, b, 0..one.steps));
            }
            for (first, count) in [(5, 1), (9, 7), (30, 7)] {
                let piece = task.batch(Part::Train, first, count, None).unwrap();
                for b in 0..count {
                    let steps = 0..piece.lengths[b];
                    assert_eq!(row(&piece, b, steps.clone()), row(&one, first as usize - 5 + b, steps));
                }
            }
        }
    }
}

#[test]
fn stream_gives_all_samples_in_order() {
    let task = Task::new(&config(Split::HeldOut, GapKind::Blank, GapLaw::Uniform), 3).unwrap();
    let whole = task.batch(Part::Train, 3, 17, None).unwrap();
    let mut at = 0;
    for batch in std::sync::Arc::new(task).stream(Part::Train, 3, 20, 5, |samples| Ok(samples.into_batch())) {
        let batch = batch.unwrap();
        assert_eq!(batch.first, 3 + at as u64);
        for b in 0..batch.batch {
            let steps = 0..batch.lengths[b];
            assert_eq!(row(&batch, b, steps.clone()), row(&whole, at + b, steps));
        }
        at += batch.batch;
    }
    assert_eq!(at, 17);
}

#[test]
fn a_gap_out_of_range_is_refused() {
    let task = Task::new(&config(Split::HeldOut, GapKind::Blank, GapLaw::Uniform), 3).unwrap();
    for gap in [-0.1, f64::NAN, f64::INFINITY, 1e9] {
        let error = task.samples(Part::Test, 0, 1, Some(gap)).err().expect("refused");
        assert_eq!(selectivbench::error::exit_code(&error), 2, "{error}");
    }
}
