//! From elements to timesteps: gaps, distractors, noise, windows, and padded batches.
//!
//! A [`Sample`] is compact: its states and the gaps between them, whatever their length. [`Samples`]
//! spreads a set of them over timesteps, a window at a time, so that sequences of any length can be
//! walked through in memory that does not grow with them.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use crate::config::GapKind;
use crate::ops::expand::{self, Compact, Sequence, Show, Table};
use crate::ops::philox::{philox4x32, unit_f32};
use crate::task::Part;
use crate::task::grammar::Grammar;
use crate::task::recordings::Recordings;
use crate::task::rng::{Mt19937, Pcg64};

/// Duration of one timestep, in the units of the gaps.
pub const TIMESTEP: f64 = 0.1;

/// A step that shows no symbol.
pub const BLANK: u32 = u32::MAX;

/// The window of a step that belongs to no element, or where its symbol is still being shown.
pub const PAD: u32 = u32::MAX;

/// How long a gap is.
#[derive(Clone, Copy, Debug)]
pub enum Delay {
    Fixed(f64),
    /// Uniform in [low, high], rounded to 0.1.
    Uniform(f64, f64),
    /// exp of a normal number, cut to [low, high] and rounded to 0.1.
    Lognormal {
        mu: f64,
        sigma: f64,
        low: f64,
        high: f64,
    },
}

/// What stands between two elements.
#[derive(Clone, Copy, Debug)]
pub struct GapRule {
    pub kind: GapKind,
    /// First element that a gap can follow.
    pub start: usize,
    pub probability: f64,
    pub delay: Delay,
}

impl GapRule {
    /// Blank timesteps of a gap that lasts `delay`, or its distractors, which with recordings take several timesteps
    /// each. The authors round blanks up and distractors to nearest even.
    pub fn steps(&self, delay: f64) -> u32 {
        match self.kind {
            GapKind::Blank => (delay / TIMESTEP).ceil() as u32,
            GapKind::Distractor => (delay / TIMESTEP).round_ties_even() as u32,
        }
    }
}

/// Random numbers for the gaps of one sample.
#[expect(clippy::large_enum_variant, reason = "one at a time, on the stack")]
pub enum GapStream {
    /// The sample's own stream.
    HeldOut(Pcg64),
    /// The authors' two: one generator for whether there is a gap, numpy's global one for the rest.
    AsReleased { chance: Pcg64, numpy: Mt19937 },
}

impl GapStream {
    fn chance(&mut self) -> f64 {
        match self {
            GapStream::HeldOut(rng) => rng.random(),
            GapStream::AsReleased { chance, .. } => chance.random(),
        }
    }

    fn uniform(&mut self, low: f64, high: f64) -> f64 {
        match self {
            GapStream::HeldOut(rng) => low + (high - low) * rng.random(),
            GapStream::AsReleased { numpy, .. } => numpy.legacy_uniform(low, high),
        }
    }

    /// Standard normal, by Box and Muller.
    fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform(0.0, 1.0)).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform(0.0, 1.0)).cos()
    }

    fn pick(&mut self, n: usize) -> usize {
        match self {
            GapStream::HeldOut(rng) => rng.integers(n as u32) as usize,
            GapStream::AsReleased { numpy, .. } => numpy.legacy_choice(n),
        }
    }
}

impl Delay {
    fn draw(self, stream: &mut GapStream) -> f64 {
        match self {
            Delay::Fixed(delay) => delay,
            Delay::Uniform(low, high) => rounded(stream.uniform(low, high)),
            Delay::Lognormal { mu, sigma, low, high } => {
                rounded((mu + sigma * stream.normal()).exp().clamp(low, high))
            }
        }
    }
}

/// To one decimal, as numpy rounds: halves of the product to even.
fn rounded(x: f64) -> f64 {
    (x * 10.0).round_ties_even() / 10.0
}

/// One sample: its elements and what stands between them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The state of each element.
    pub states: Vec<u32>,
    /// Class id of the symbol shown for each element.
    pub symbols: Vec<u32>,
    /// What a model should say of each element.
    pub labels: Vec<u32>,
    /// Blank timesteps, or distractors, behind each element.
    pub gaps: Vec<u32>,
    /// Class ids shown in the gaps, gap after gap; empty where gaps are blank.
    pub distractors: Vec<u32>,
    /// Timesteps that a symbol is shown for: the frames of a recording, else 1.
    pub frames: u32,
    /// The recording that is shown for each element; empty where symbols are one-hot.
    pub recordings: Vec<u32>,
    /// The recordings of the distractors.
    pub distractor_recordings: Vec<u32>,
}

impl Default for Sample {
    fn default() -> Self {
        Self {
            states: vec![],
            symbols: vec![],
            labels: vec![],
            gaps: vec![],
            distractors: vec![],
            frames: 1,
            recordings: vec![],
            distractor_recordings: vec![],
        }
    }
}

impl Sample {
    /// Elements `states` that are shown as their symbols, each to be named.
    pub fn new(grammar: &Grammar, states: Vec<u32>, gaps: Vec<u32>, distractors: Vec<u32>) -> Self {
        let symbols = states.iter().map(|&state| grammar.symbol(state)).collect();
        let labels = states.iter().map(|&state| grammar.label(state)).collect();
        Self { states, symbols, labels, gaps, distractors, ..Self::default() }
    }

    /// Draws the gaps behind the elements `states`.
    pub fn draw(grammar: &Grammar, states: Vec<u32>, rule: &GapRule, stream: &mut GapStream) -> Self {
        let mut gaps = Vec::with_capacity(states.len());
        let mut distractors = Vec::new();
        for (e, &state) in states.iter().enumerate() {
            // The number is drawn even where the probability is 1, as the authors do.
            if e < rule.start || stream.chance() > rule.probability {
                gaps.push(0);
                continue;
            }
            let delay = rule.delay.draw(stream);
            let mut steps = rule.steps(delay);
            if rule.kind == GapKind::Distractor {
                let next = grammar.successors(state);
                let allowed: Vec<u32> = (0..grammar.alphabet() as u32)
                    .filter(|&class| next.iter().all(|&t| grammar.symbol(t) != class))
                    .collect();
                if allowed.is_empty() {
                    steps = 0;
                }
                distractors.extend((0..steps).map(|_| allowed[stream.pick(allowed.len())]));
            }
            gaps.push(steps);
        }
        Self::new(grammar, states, gaps, distractors)
    }

    /// Draws the recording that each element shows, then that of each distractor, from those of `part`.
    pub fn record(&mut self, recordings: &Recordings, part: Part, rng: &mut Pcg64) {
        let mut draw = |symbols: &[u32]| -> Vec<u32> {
            symbols.iter().map(|&symbol| recordings.draw(part, symbol, rng)).collect()
        };
        self.recordings = draw(&self.symbols);
        self.distractor_recordings = draw(&self.distractors);
        self.frames = recordings.frames() as u32;
    }

    /// Timesteps behind each element's symbol.
    pub fn behind(&self) -> impl Iterator<Item = usize> {
        let each = if self.distractors.is_empty() { 1 } else { self.frames as usize };
        self.gaps.iter().map(move |&gap| gap as usize * each)
    }

    /// Timesteps of all elements and gaps.
    pub fn steps(&self) -> usize {
        self.states.len() * self.frames as usize + self.behind().sum::<usize>()
    }
}

/// Where the noise of one sample comes from.
#[derive(Clone)]
#[expect(clippy::large_enum_variant, reason = "one at a time, on the stack")]
pub enum NoiseStream {
    /// Drawn by position with Philox: counter [channel / 4, step, index low, index high].
    HeldOut { key: [u32; 2], index: u64 },
    /// Drawn in sequence, as by `torch.rand`.
    AsReleased(Mt19937),
}

impl NoiseStream {
    /// Fills the rows `out` [steps, features] of the timesteps from `first` on; rows are asked for in order.
    fn fill(&mut self, first: usize, features: usize, level: f32, out: &mut [f32]) {
        match self {
            NoiseStream::AsReleased(torch) => out.iter_mut().for_each(|x| *x = torch.torch_rand() * level),
            NoiseStream::HeldOut { key, index } => {
                for (t, row) in out.chunks_exact_mut(features).enumerate() {
                    for (group, channels) in row.chunks_mut(4).enumerate() {
                        let counter =
                            [group as u32, (first + t) as u32, *index as u32, (*index >> 32) as u32];
                        let lanes = philox4x32(counter, *key);
                        for (x, bits) in channels.iter_mut().zip(lanes) {
                            *x = unit_f32(bits) * level;
                        }
                    }
                }
            }
        }
    }
}

/// The noise of a set of samples: uniform in [0, level).
pub struct Noise {
    pub level: f32,
    /// One a sample.
    pub streams: Vec<NoiseStream>,
}

impl Noise {
    /// The noise [B, steps, features] of the timesteps from `first` on, of which sample i has `lengths[i]`.
    fn draw(&mut self, first: usize, steps: usize, features: usize, lengths: &[usize]) -> Vec<f32> {
        let row = steps * features;
        let mut values = vec![0.0; lengths.len() * row];
        values.par_chunks_mut(row.max(1)).zip(&mut self.streams).zip(lengths).for_each(
            |((row, stream), &length)| {
                stream.fill(first, features, self.level, &mut row[..length * features]);
            },
        );
        values
    }
}

/// How far a sample has been spread over timesteps.
#[derive(Clone, Copy, Default)]
struct Cursor {
    element: usize,
    /// Steps of the element's window that are done.
    inside: usize,
    /// Distractors shown in the windows before.
    distractor: usize,
}

/// Several samples of a part, to be spread over timesteps window by window.
pub struct Samples {
    samples: Vec<Sample>,
    features: usize,
    first: u64,
    noise: Option<Noise>,
    show: Show,
    lengths: Vec<usize>,
    cursors: Vec<Cursor>,
    /// Timesteps done.
    at: usize,
}

impl Samples {
    /// `samples`, the first with index `first`; `features` is the width of the input.
    pub fn new(samples: Vec<Sample>, features: usize, first: u64, noise: Option<Noise>, show: Show) -> Self {
        let lengths = samples.iter().map(Sample::steps).collect();
        let cursors = vec![Cursor::default(); samples.len()];
        Self { samples, features, first, noise, show, lengths, cursors, at: 0 }
    }

    pub fn as_slice(&self) -> &[Sample] {
        &self.samples
    }

    /// Timesteps of the longest sample.
    pub fn steps(&self) -> usize {
        self.lengths.iter().copied().max().unwrap_or(0)
    }

    /// Timesteps of each sample.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Timesteps that are no padding.
    pub fn valid_steps(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// Elements of the longest sample.
    pub fn elements(&self) -> usize {
        self.samples.iter().map(|sample| sample.states.len()).max().unwrap_or(0)
    }

    /// The next `len` timesteps of all samples, fewer at the end; none when all are done.
    ///
    /// Element indices and `elements` are those of the whole samples, `lengths` those of the window.
    pub fn next_window(&mut self, len: usize) -> Option<Batch> {
        let steps = len.min(self.steps() - self.at);
        (steps > 0).then(|| self.window(steps))
    }

    /// All timesteps at once.
    pub fn into_batch(mut self) -> Batch {
        self.window(self.steps() - self.at)
    }

    /// The samples packed for a GPU, which spreads them over timesteps from the first one on.
    pub fn compact(self) -> Result<Compact> {
        let Self { samples, features, first, noise, show, lengths, .. } = self;
        let position = |i: usize| match noise.as_ref().map(|noise| &noise.streams[i]) {
            Some(&NoiseStream::HeldOut { key, index }) => Some((key, index)),
            _ => None,
        };
        let sequences: Vec<Sequence> = samples
            .iter()
            .enumerate()
            .map(|(i, sample)| Sequence {
                symbols: if show.table.is_some() { &sample.recordings } else { &sample.symbols },
                labels: &sample.labels,
                gaps: &sample.gaps,
                distractors: match show.table {
                    Some(_) => &sample.distractor_recordings,
                    None => &sample.distractors,
                },
                noise: position(i).unwrap_or_default(),
            })
            .collect();
        let by_position = (0..samples.len()).all(|i| position(i).is_some());
        let noise = match noise {
            None => expand::Noise::None,
            Some(Noise { level, .. }) if by_position => expand::Noise::ByPosition { level },
            Some(mut noise) => {
                let mut at = 0;
                expand::Noise::Drawn(Box::new(move |steps| {
                    let left = |&length: &usize| length.saturating_sub(at).min(steps);
                    let left: Vec<usize> = lengths.iter().map(left).collect();
                    let values = noise.draw(at, steps, features, &left);
                    at += steps;
                    values
                }))
            }
        };
        Compact::pack(&sequences, features, first, noise, show)
    }

    fn window(&mut self, steps: usize) -> Batch {
        let (batch, features, at) = (self.samples.len(), self.features, self.at);
        let size = batch * steps;
        let lengths: Vec<usize> =
            self.lengths.iter().map(|&length| length.saturating_sub(at).min(steps)).collect();
        let noise = self.noise.as_mut().map(|noise| noise.draw(at, steps, features, &lengths));
        let mut out = Batch {
            batch,
            steps,
            elements: self.elements(),
            features,
            symbols: vec![BLANK; size],
            labels: vec![0; size],
            element: vec![PAD; size],
            lengths,
            distractor: vec![false; size],
            shown: self.show.table.clone().map(|table| Shown { table, rows: vec![BLANK; size] }),
            noise,
            first: self.first,
        };
        self.at += steps;
        if size == 0 {
            return out;
        }
        let mut recordings: Vec<&mut [u32]> = match &mut out.shown {
            Some(shown) => shown.rows.chunks_mut(steps).collect(),
            None => (0..batch).map(|_| Default::default()).collect(),
        };
        let rows = out.symbols.par_chunks_mut(steps).zip(out.labels.par_chunks_mut(steps));
        let rows = rows.zip(out.element.par_chunks_mut(steps)).zip(out.distractor.par_chunks_mut(steps));
        let rows = rows.zip(&mut recordings).map(|((((symbols, labels), element), distractor), rows)| Row {
            symbols,
            labels,
            element,
            distractor,
            rows,
        });
        rows.zip(&mut self.cursors)
            .zip(&self.samples)
            .zip(&out.lengths)
            .for_each(|(((mut row, cursor), sample), &length)| row.fill(sample, cursor, length));
        out
    }
}

/// The timesteps of one sample in a batch.
struct Row<'a> {
    symbols: &'a mut [u32],
    labels: &'a mut [u32],
    element: &'a mut [u32],
    distractor: &'a mut [bool],
    /// Empty where symbols are one-hot.
    rows: &'a mut [u32],
}

impl Row<'_> {
    /// Fills the first `length` steps with what comes next in `sample`.
    fn fill(&mut self, sample: &Sample, cursor: &mut Cursor, length: usize) {
        let frames = sample.frames as usize;
        let mut t = 0;
        while t < length {
            let Cursor { element, inside, .. } = *cursor;
            let gap = sample.gaps[element] as usize;
            let blank = sample.distractors.is_empty();
            let window = frames + if blank { gap } else { gap * frames };
            let end = length.min(t + window - inside);
            self.labels[t..end].fill(sample.labels[element]);
            // Asked from the symbol's last frame on.
            let asked = (t + (frames - 1).saturating_sub(inside)).min(end);
            self.element[asked..end].fill(element as u32);
            for (t, at) in (t..end).zip(inside..) {
                let distractor = at >= frames;
                if distractor && blank {
                    break;
                }
                let (symbols, recordings, i) = match distractor {
                    false => (&sample.symbols, &sample.recordings, element),
                    true => (
                        &sample.distractors,
                        &sample.distractor_recordings,
                        cursor.distractor + at / frames - 1,
                    ),
                };
                self.symbols[t] = symbols[i];
                self.distractor[t] = distractor;
                if let Some(row) = self.rows.get_mut(t) {
                    *row = recordings[i] * sample.frames + (at % frames) as u32;
                }
            }
            cursor.inside += end - t;
            if cursor.inside == window {
                cursor.element += 1;
                cursor.inside = 0;
                cursor.distractor += if blank { 0 } else { gap };
            }
            t = end;
        }
    }
}

/// What a step shows where symbols are recordings.
#[derive(Clone, Debug)]
pub struct Shown {
    pub table: Arc<Table>,
    /// [B, T] row of the table, [`BLANK`] where there is none.
    pub rows: Vec<u32>,
}

/// Samples padded to the longest, or a window of their timesteps: what a model sees and what it should say.
#[derive(Clone, Debug)]
pub struct Batch {
    pub batch: usize,
    pub steps: usize,
    pub elements: usize,
    pub features: usize,
    /// [B, T] class id of the symbol shown, [`BLANK`] where there is none.
    pub symbols: Vec<u32>,
    /// [B, T] label of the element that a step belongs to.
    pub labels: Vec<u32>,
    /// [B, T] index of that element; [`PAD`] on padding, and until a recording's last frame.
    pub element: Vec<u32>,
    /// Steps of each sample.
    pub lengths: Vec<usize>,
    /// [B, T]
    pub distractor: Vec<bool>,
    /// Where symbols are recordings.
    pub shown: Option<Shown>,
    /// [B, T, V] added to the input; zero on padding.
    pub noise: Option<Vec<f32>>,
    /// Index of the first sample in its part of the data.
    pub first: u64,
}

impl Batch {
    /// Steps that are no padding.
    pub fn valid_steps(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// Steps that a model is asked at: all that are no padding, but for the frames of a recording before its last.
    pub fn asked_steps(&self) -> usize {
        self.element.iter().filter(|&&element| element != PAD).count()
    }

    /// Whether the input is more than one-hot symbols.
    pub fn is_dense(&self) -> bool {
        self.shown.is_some() || self.noise.is_some()
    }

    /// [B, T, V]: symbols, one-hot or as recordings, plus noise.
    pub fn dense(&self) -> Vec<f32> {
        let mut x = match &self.noise {
            Some(noise) => noise.clone(),
            None => vec![0.0; self.batch * self.steps * self.features],
        };
        let rows = x.par_chunks_exact_mut(self.features).zip(self.indices());
        rows.filter(|(_, index)| **index != BLANK).for_each(|(row, &index)| match &self.shown {
            Some(shown) => shown.table.add_row(index as usize, row),
            None => row[index as usize] += 1.0,
        });
        x
    }

    /// [B, T]: class id of the symbol shown, or the row of the table of recordings.
    pub fn indices(&self) -> &[u32] {
        self.shown.as_ref().map_or(&self.symbols, |shown| &shown.rows)
    }

    /// [`Batch::indices`] as a u32 tensor [B, T].
    pub fn ids(&self, device: &Device) -> Result<Tensor> {
        Tensor::from_slice(self.indices(), (self.batch, self.steps), device)
    }

    /// Samples `range` with the padding of the whole.
    pub fn rows(&self, range: std::ops::Range<usize>) -> Self {
        fn cut<T: Clone>(all: &[T], range: &std::ops::Range<usize>, each: usize) -> Vec<T> {
            all[range.start * each..range.end * each].to_vec()
        }
        let steps = self.steps;
        Self {
            batch: range.len(),
            steps,
            elements: self.elements,
            features: self.features,
            symbols: cut(&self.symbols, &range, steps),
            labels: cut(&self.labels, &range, steps),
            element: cut(&self.element, &range, steps),
            lengths: self.lengths[range.clone()].to_vec(),
            distractor: cut(&self.distractor, &range, steps),
            shown: (self.shown.as_ref())
                .map(|Shown { table, rows }| Shown { table: table.clone(), rows: cut(rows, &range, steps) }),
            noise: self.noise.as_ref().map(|noise| cut(noise, &range, steps * self.features)),
            first: self.first + range.start as u64,
        }
    }
}
