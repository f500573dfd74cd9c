//! The benchmark: grammars, the samples drawn from them, and how well any model could do.
//!
//! # Two profiles
//!
//! `split: as-released` draws what the authors' generator draws, bit for bit. Sample i comes from
//! `default_rng(seed · i)` whatever its part, so validation and test samples are the first training
//! samples. Where the released code leaves the streams of gaps and noise to its worker processes, sample i
//! seeds numpy's global generator and PyTorch's with `seed · i mod 2³²`, as its own on-the-fly mode does
//! with the former; whether there is a gap is drawn from one generator that runs on from sample to sample.
//!
//! `split: held-out`, the default, uses the same grammar and one stream for each (seed, part, purpose,
//! index): PCG64 over the seed sequence of the five words [seed low, seed high, tag, index low, index
//! high], where the tag is different for every part and purpose. So no two streams have the same words,
//! and none has those of an as-released sample (a product of two 64-bit numbers has at most four). Each
//! stream is used for one sample only: neither the number of threads nor the size of batches matters, and
//! any sample can be drawn without those before it.
//!
//! Noise is drawn by position with Philox: counter [channel / 4, step, index low, index high], key from
//! the hash of the words (seed, tag), so that windows, batches and a GPU can draw the same. The hash leaves
//! 64 bits of them: keys of two seeds may collide, which for noise does no harm.
//!
//! Symbols are shown as one-hot vectors, or as recordings ([`recordings`]).

pub mod batch;
pub mod grammar;
pub mod next;
pub mod oracle;
pub mod recordings;
pub mod rng;
pub mod sampler;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

pub use batch::{BLANK, Batch, PAD, Sample, Samples};
pub use grammar::Grammar;

use crate::bail_input;
use crate::config::{GapConfig, GapKind, GapLaw, Objective, Split, TaskConfig};
use crate::ops::expand::Show;
use batch::{Delay, GapRule, GapStream, Noise, NoiseStream};
use grammar::{GrammarConfig, letter};
use recordings::Recordings;
use rng::{Mt19937, Pcg64, SeedSequence};
use sampler::Sampler;

/// Longest gap that can be asked for, in time units.
const LONGEST_GAP: f64 = 1e6;

/// A part of the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Train,
    Validation,
    Test,
}

impl Part {
    pub fn name(self) -> &'static str {
        match self {
            Part::Train => "train",
            Part::Validation => "validation",
            Part::Test => "test",
        }
    }
}

/// What a stream of the held-out profile is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    Strings,
    Gaps,
    Noise,
    Recordings,
}

/// Entropy words of a held-out stream; different for different arguments.
pub fn held_out_words(seed: u64, part: Part, purpose: Purpose, index: u64) -> [u32; 5] {
    let tag = 0x5eb0_0000 | (part as u32) << 4 | purpose as u32;
    [seed as u32, (seed >> 32) as u32, tag, index as u32, (index >> 32) as u32]
}

/// A configured task: its grammar, and any of its samples.
pub struct Task {
    config: TaskConfig,
    seed: u64,
    sampler: Sampler,
    recordings: Option<Recordings>,
    ceiling: std::sync::OnceLock<f64>,
}

impl Task {
    /// Generates the grammar and reads the recordings of `task.encoding`. Fails with a message for the user where no
    /// grammar or string is possible, or recordings are missing.
    pub fn new(config: &TaskConfig, seed: u64) -> anyhow::Result<Self> {
        let task = Self::of_symbols(config, seed)?;
        match Recordings::load(config, task.grammar().alphabet())? {
            Some(recordings) => task.with(recordings),
            None => Ok(task),
        }
    }

    /// The task without its recordings: the same symbols, states, gaps and ceilings, but nothing for a model to see.
    pub fn of_symbols(config: &TaskConfig, seed: u64) -> anyhow::Result<Self> {
        let grammar = Grammar::generate(&GrammarConfig {
            vocab: config.vocab(),
            ambiguities: config.ambiguities,
            depth: config.depth(),
            density: config.density,
            start_states: config.start_states,
            seed,
        })?;
        let sampler = Sampler::new(grammar, config.length, config.string.min, config.max_string())?;
        Ok(Self { config: config.clone(), seed, sampler, recordings: None, ceiling: Default::default() })
    }

    /// The task with these recordings of its symbols.
    pub fn with(self, recordings: Recordings) -> anyhow::Result<Self> {
        self.config.check_frames(recordings.frames())?;
        Ok(Self { recordings: Some(recordings), ..self })
    }

    /// The recordings that its symbols are shown as; none where they are one-hot.
    pub fn recordings(&self) -> Option<&Recordings> {
        self.recordings.as_ref()
    }

    pub fn config(&self) -> &TaskConfig {
        &self.config
    }

    pub fn seed(&self) -> u64 {
        self.seed
    }

    pub fn grammar(&self) -> &Grammar {
        self.sampler.grammar()
    }

    pub fn sampler(&self) -> &Sampler {
        &self.sampler
    }

    /// Configured number of samples of a part.
    pub fn count(&self, part: Part) -> usize {
        let counts = &self.config.samples;
        match part {
            Part::Train => counts.train,
            Part::Validation => counts.validation,
            Part::Test => counts.test,
        }
    }

    /// Width of the input.
    pub fn features(&self) -> usize {
        self.recordings.as_ref().map_or(self.config.vocab(), |recordings| recordings.table().channels())
    }

    /// Number of classes to tell apart: states, or the symbols that may come next.
    pub fn classes(&self) -> usize {
        self.config.classes()
    }

    /// What a class stands for: the name of a state, or a symbol.
    pub fn class_name(&self, class: u32) -> String {
        let grammar = self.grammar();
        match self.config.objective {
            // A vocabulary may be larger than the alphabet.
            Objective::Predict if class as usize >= grammar.alphabet() => "?".into(),
            Objective::Predict => letter(class).to_string(),
            Objective::Classify => {
                let state = (0..grammar.states() as u32).find(|&state| grammar.label(state) == class);
                state.map_or(String::new(), |state| grammar.name(state).into())
            }
        }
    }

    /// The states of sample `index`.
    pub fn states(&self, part: Part, index: u64) -> anyhow::Result<Vec<u32>> {
        self.elements(part, index, self.config.length)
    }

    /// The states of the first `count` elements of sample `index`, and of those that would follow.
    fn elements(&self, part: Part, index: u64, count: usize) -> anyhow::Result<Vec<u32>> {
        let mut rng = match self.config.split {
            Split::AsReleased => Pcg64::new(u128::from(self.seed) * u128::from(index)),
            Split::HeldOut => Pcg64::from_words(&held_out_words(self.seed, part, Purpose::Strings, index)),
        };
        self.sampler.elements(&mut rng, count)
    }

    /// A sample's line in the authors' `train` and `test` files: class ids, state names and length.
    pub fn line(&self, states: &[u32]) -> String {
        use std::fmt::Write;
        let grammar = self.grammar();
        let mut line = String::with_capacity(12 * states.len() + 16);
        for (i, &state) in states.iter().enumerate() {
            let _ = write!(line, "{}{}", if i == 0 { "[" } else { ", " }, grammar.symbol(state));
        }
        line.push_str("]::");
        for (i, &state) in states.iter().enumerate() {
            line.push_str(if i == 0 { "['" } else { "', '" });
            line.push_str(grammar.name(state));
        }
        let _ = writeln!(line, "']::{}", states.len());
        line
    }

    /// The gaps of a part: drawn in training, fixed in validation and test; `gap` fixes another duration.
    pub fn gap_rule(&self, part: Part, gap: Option<f64>) -> GapRule {
        let config = &self.config.gap;
        let &GapConfig { law, low, high, mu, sigma, .. } = config;
        let delay = match (gap, part, law) {
            (Some(gap), ..) => Delay::Fixed(gap),
            (None, Part::Validation | Part::Test, _) => Delay::Fixed(self.config.test_gap),
            (None, Part::Train, GapLaw::Fixed) => Delay::Fixed(high),
            (None, Part::Train, GapLaw::Uniform) => Delay::Uniform(low, high),
            (None, Part::Train, GapLaw::Lognormal) => Delay::Lognormal { mu, sigma, low, high },
        };
        GapRule { kind: config.kind, start: config.start, probability: config.probability, delay }
    }

    fn gap_stream(&self, part: Part, index: u64) -> GapStream {
        match self.config.split {
            Split::HeldOut => {
                GapStream::HeldOut(Pcg64::from_words(&held_out_words(self.seed, part, Purpose::Gaps, index)))
            }
            Split::AsReleased => {
                // One draw for every element that a gap can follow, from sample to sample.
                let draws = self.config.length.saturating_sub(self.config.gap.start) as u128;
                let mut chance = Pcg64::new(self.seed.into());
                chance.advance(draws * u128::from(index));
                GapStream::AsReleased { chance, numpy: Mt19937::from_u32(self.released_seed(index)) }
            }
        }
    }

    /// What the released code seeds a sample's 32-bit generators with.
    fn released_seed(&self, index: u64) -> u32 {
        self.seed.wrapping_mul(index) as u32
    }

    /// The noise of samples `first..first + count`, or nothing where there is none.
    fn noise(&self, part: Part, first: u64, count: usize) -> Option<Noise> {
        let [seed_low, seed_high, tag, ..] = held_out_words(self.seed, part, Purpose::Noise, 0);
        let [key] = SeedSequence::new(&[seed_low, seed_high, tag]).state::<1>();
        let key = [key as u32, (key >> 32) as u32];
        let stream = |index| match self.config.split {
            Split::HeldOut => NoiseStream::HeldOut { key, index },
            Split::AsReleased => NoiseStream::AsReleased(Mt19937::from_u32(self.released_seed(index))),
        };
        let streams = || (first..first + count as u64).map(stream).collect();
        (self.config.noise != 0.0).then(|| Noise { level: self.config.noise as f32, streams: streams() })
    }

    /// Samples `first..first + count` of a part; `gap` replaces the part's own law of gap durations.
    ///
    /// Samples are drawn in parallel; each depends on its index alone.
    pub fn samples(&self, part: Part, first: u64, count: usize, gap: Option<f64>) -> anyhow::Result<Samples> {
        if let Some(gap) = gap
            && !(0.0..=LONGEST_GAP).contains(&gap)
        {
            bail_input!("a gap of {gap} is asked for; it must be between 0 and {LONGEST_GAP} time units")
        }
        let rule = self.gap_rule(part, gap);
        let samples = (first..first + count as u64)
            .into_par_iter()
            .map(|index| {
                let (states, next) = self.states_and_next(part, index)?;
                let stream = &mut self.gap_stream(part, index);
                let mut sample = Sample::draw(self.grammar(), states, &rule, stream);
                if let Some(next) = next {
                    sample.predict(self.config.split, next);
                }
                self.record(&mut sample, part, index);
                Ok(sample)
            })
            .collect::<anyhow::Result<_>>()?;
        Ok(Samples::new(samples, self.features(), first, self.noise(part, first, count), self.show()))
    }

    /// A sample of the user's own, without noise, shown as the first one of the test part would be.
    pub fn own(&self, mut sample: Sample) -> Samples {
        self.record(&mut sample, Part::Test, 0);
        Samples::new(vec![sample], self.features(), 0, None, self.show())
    }

    /// Draws the recordings of sample `index`, if its symbols are recordings.
    fn record(&self, sample: &mut Sample, part: Part, index: u64) {
        match &self.recordings {
            Some(recordings) => {
                let words = held_out_words(self.seed, part, Purpose::Recordings, index);
                sample.record(recordings, part, &mut Pcg64::from_words(&words));
            }
            None => sample.frames = self.config.encoding.frames() as u32,
        }
    }

    fn show(&self) -> Show {
        match &self.recordings {
            Some(recordings) => Show { frames: recordings.frames(), table: Some(recordings.table().clone()) },
            None => Show { frames: self.config.encoding.frames(), table: None },
        }
    }

    /// [`Task::samples`], spread over all their timesteps.
    pub fn batch(&self, part: Part, first: u64, count: usize, gap: Option<f64>) -> anyhow::Result<Batch> {
        Ok(self.samples(part, first, count, gap)?.into_batch())
    }

    /// Samples `first..total` of a part in batches, made ahead on a thread of their own, which also calls
    /// `prepare` on each.
    ///
    /// The last batch may be short. Dropping the stream ends its thread.
    pub fn stream<T: Send + 'static>(
        self: &Arc<Self>,
        part: Part,
        first: u64,
        total: u64,
        batch: usize,
        prepare: impl Fn(Samples) -> anyhow::Result<T> + Send + 'static,
    ) -> BatchStream<T> {
        /// Batches that wait to be taken.
        const AHEAD: usize = 4;
        let (send, batches) = sync_channel(AHEAD);
        let task = self.clone();
        std::thread::spawn(move || {
            let mut at = first;
            while at < total {
                let count = (total - at).min(batch as u64);
                let made = task.samples(part, at, count as usize, None).and_then(&prepare);
                let failed = made.is_err();
                if send.send(made).is_err() || failed {
                    return;
                }
                at += count;
            }
        });
        BatchStream { batches }
    }

    /// The accuracy that no model exceeds where the test gap is `gap`; see [`oracle::ceiling`].
    pub fn ceiling(&self, gap: f64) -> anyhow::Result<f64> {
        let work_out = || Ok(oracle::ceiling(self, Some(gap))?.accuracy);
        // Blanks of any length tell nothing: one figure for all of them.
        if self.config.gap.kind == GapKind::Distractor {
            return work_out();
        }
        if let Some(&known) = self.ceiling.get() {
            return Ok(known);
        }
        let ceiling = work_out()?;
        Ok(*self.ceiling.get_or_init(|| ceiling))
    }

    /// SHA-256 over what decides the data: grammar, configuration and recordings, wherever they lie.
    pub fn data_hash(&self) -> anyhow::Result<String> {
        let mut hash = Sha256::new();
        hash.update(self.grammar().transitions_text());
        let config = TaskConfig { data: TaskConfig::AUTO.into(), ..self.config.clone() };
        hash.update(serde_json::to_string(&(self.seed, config))?);
        if let Some(recordings) = &self.recordings {
            hash.update(recordings.fingerprint());
        }
        Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

/// Batches in the order of their samples.
pub struct BatchStream<T> {
    batches: Receiver<anyhow::Result<T>>,
}

impl<T> Iterator for BatchStream<T> {
    type Item = anyhow::Result<T>;

    fn next(&mut self) -> Option<Self::Item> {
        self.batches.recv().ok()
    }
}

impl TaskConfig {
    /// Symbols, `#` included.
    pub fn vocab(&self) -> usize {
        self.vocab.or(self.ambiguities + 1)
    }

    /// States of an ambiguous letter.
    pub fn depth(&self) -> usize {
        self.depth.or(self.ambiguities)
    }

    /// Longest accepted string.
    pub fn max_string(&self) -> usize {
        self.string.max.or(self.length)
    }
}
