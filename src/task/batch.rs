//! From elements to timesteps: gaps, distractors, noise, windows, and padded batches.

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use crate::config::GapKind;
use crate::task::grammar::Grammar;
use crate::task::rng::{Mt19937, Pcg64};

/// Duration of one timestep, in the units of the gaps.
pub const TIMESTEP: f64 = 0.1;

/// A step that shows no symbol.
pub const BLANK: u32 = u32::MAX;

/// The window of a step that belongs to no element.
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

/// Random numbers for the gaps of one sample.
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
        let rounded = |x: f64| (x * 10.0).round_ties_even() / 10.0;
        match self {
            Delay::Fixed(delay) => delay,
            Delay::Uniform(low, high) => rounded(stream.uniform(low, high)),
            Delay::Lognormal { mu, sigma, low, high } => {
                rounded((mu + sigma * stream.normal()).exp().clamp(low, high))
            }
        }
    }
}

/// One sample as timesteps.
#[derive(Clone, Debug, Default)]
pub struct Steps {
    pub symbols: Vec<u32>,
    pub labels: Vec<u32>,
    pub element: Vec<u32>,
    pub distractor: Vec<bool>,
}

/// Spreads the states of a sample over timesteps: each element is its symbol and the gap behind it.
pub fn expand(grammar: &Grammar, states: &[u32], rule: &GapRule, stream: &mut GapStream) -> Steps {
    let mut steps = Steps::default();
    for (e, &state) in states.iter().enumerate() {
        let mut push = |symbol: u32, distractor: bool| {
            steps.symbols.push(symbol);
            steps.labels.push(grammar.label(state));
            steps.element.push(e as u32);
            steps.distractor.push(distractor);
        };
        push(grammar.symbol(state), false);
        // The number is drawn even where the probability is 1, as the authors do.
        if e < rule.start || stream.chance() > rule.probability {
            continue;
        }
        let delay = rule.delay.draw(stream);
        match rule.kind {
            GapKind::Blank => {
                for _ in 0..(delay / TIMESTEP).ceil() as usize {
                    push(BLANK, false);
                }
            }
            GapKind::Distractor => {
                let next = grammar.successors(state);
                let allowed: Vec<u32> = (0..grammar.alphabet() as u32)
                    .filter(|&class| next.iter().all(|&t| grammar.symbol(t) != class))
                    .collect();
                for _ in 0..(delay / TIMESTEP).round_ties_even() as usize {
                    if !allowed.is_empty() {
                        push(allowed[stream.pick(allowed.len())], true);
                    }
                }
            }
        }
    }
    steps
}

/// Samples padded to the longest: what a model sees and what it should say.
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
    /// [B, T] index of that element, [`PAD`] on padding.
    pub element: Vec<u32>,
    /// Steps of each sample.
    pub lengths: Vec<usize>,
    /// [B, T]
    pub distractor: Vec<bool>,
    /// [B, T, V] added to the input; zero on padding.
    pub noise: Option<Vec<f32>>,
    /// Index of the first sample in its part of the data.
    pub first: u64,
}

impl Batch {
    /// Pads `samples`; `noise(i, n)` gives the noise of the i-th sample, which has n steps.
    pub fn assemble(
        samples: &[Steps],
        features: usize,
        first: u64,
        noise: Option<&(dyn Fn(usize, usize) -> Vec<f32> + Sync)>,
    ) -> Self {
        let batch = samples.len();
        let lengths: Vec<usize> = samples.iter().map(|s| s.symbols.len()).collect();
        let steps = lengths.iter().copied().max().unwrap_or(0);
        let elements = samples.iter().filter_map(|s| s.element.last()).max().map_or(0, |&e| e as usize + 1);
        fn pad<T: Copy>(samples: &[Steps], steps: usize, fill: T, of: impl Fn(&Steps) -> &[T]) -> Vec<T> {
            let mut out = Vec::with_capacity(samples.len() * steps);
            for (i, sample) in samples.iter().enumerate() {
                out.extend_from_slice(of(sample));
                out.resize((i + 1) * steps, fill);
            }
            out
        }
        let noise = noise.map(|noise| {
            let mut all = vec![0.0f32; batch * steps * features];
            all.par_chunks_mut((steps * features).max(1)).enumerate().for_each(|(i, out)| {
                let values = noise(i, lengths[i]);
                out[..values.len()].copy_from_slice(&values);
            });
            all
        });
        Self {
            batch,
            steps,
            elements,
            features,
            symbols: pad(samples, steps, BLANK, |s| &s.symbols),
            labels: pad(samples, steps, 0, |s| &s.labels),
            element: pad(samples, steps, PAD, |s| &s.element),
            distractor: pad(samples, steps, false, |s| &s.distractor),
            lengths,
            noise,
            first,
        }
    }

    /// Steps that are no padding.
    pub fn valid_steps(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// [B, T, V]: one-hot symbols plus noise.
    pub fn dense(&self) -> Vec<f32> {
        let mut x = match &self.noise {
            Some(noise) => noise.clone(),
            None => vec![0.0; self.batch * self.steps * self.features],
        };
        for (row, &symbol) in x.chunks_exact_mut(self.features).zip(&self.symbols) {
            if symbol != BLANK {
                row[symbol as usize] += 1.0;
            }
        }
        x
    }

    /// The symbols as a u32 tensor [B, T].
    pub fn ids(&self, device: &Device) -> Result<Tensor> {
        Tensor::from_slice(&self.symbols, (self.batch, self.steps), device)
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
            noise: self.noise.as_ref().map(|noise| cut(noise, &range, steps * self.features)),
            first: self.first + range.start as u64,
        }
    }
}
