//! From compact samples to timesteps on a GPU, where a batch need not be sent step by step.
//!
//! The host packs the samples of a batch into one buffer, a few numbers per element ([`Compact`]); the GPU
//! makes of it what `task::Samples` makes on the CPU, which is the reference: symbols, labels, element numbers
//! and the input with noise, a window of timesteps at a time.
//!
//! ```text
//!   task::Samples ── compact() ──► Compact ── DeviceSamples::upload() ──► next_window() ──► DeviceBatch
//!     (any thread)                   one copy to the GPU                    kernels/expand.cu
//! ```

#[cfg(feature = "cuda")]
mod cuda;
mod table;

use std::sync::Arc;

use candle_core::Result;

#[cfg(feature = "cuda")]
pub use cuda::{DeviceBatch, DeviceSamples};
pub use table::{Table, Values};

/// What stands for no symbol, no element, no distractors.
const NONE: u32 = u32::MAX;

/// Numbers that describe a sample; see `kernels/expand.cu`.
const META: usize = 8;

/// Where the noise in the input comes from.
pub enum Noise {
    None,
    /// Philox by position, times `level`: drawn by the GPU.
    ByPosition {
        level: f32,
    },
    /// Drawn by the host: given a number of steps, the noise [B, steps, features] of the next ones.
    Drawn(Box<dyn FnMut(usize) -> Vec<f32> + Send>),
}

/// What is shown for an item: a one-hot symbol at one step, or a recording at several.
#[derive(Clone)]
pub struct Show {
    /// Steps of an item, F.
    pub frames: usize,
    /// Item i is rows i·F to (i + 1)·F of it; none: a one-hot symbol.
    pub table: Option<Arc<Table>>,
}

impl Show {
    /// One-hot symbols.
    pub const ONE_HOT: Self = Self { frames: 1, table: None };
}

/// A sample, as its parts lie in memory. An item is a symbol or the number of a recording ([`Show`]).
pub struct Sequence<'a> {
    /// Item shown for each element.
    pub symbols: &'a [u32],
    /// What the steps of each element should give.
    pub labels: &'a [u32],
    /// Blank timesteps, or distractors, behind each element.
    pub gaps: &'a [u32],
    /// Items shown in the gaps, gap after gap; empty where gaps are blank.
    pub distractors: &'a [u32],
    /// Key and index of noise by position.
    pub noise: ([u32; 2], u64),
}

/// The samples of a batch, ready for the GPU.
pub struct Compact {
    /// As the kernels read it.
    words: Vec<u32>,
    /// Elements of all samples.
    total: usize,
    /// Elements of the longest sample.
    elements: usize,
    /// Timesteps of each sample.
    lengths: Vec<usize>,
    features: usize,
    first: u64,
    noise: Noise,
    show: Show,
}

impl Compact {
    /// Packs `samples`, the first with index `first`; `features` is the width of the input.
    pub fn pack(samples: &[Sequence], features: usize, first: u64, noise: Noise, show: Show) -> Result<Self> {
        let frames = show.frames as u64;
        if frames == 0 || show.table.as_ref().is_some_and(|table| table.channels() != features) {
            candle_core::bail!("expand: recordings of {frames} frames do not fit {features} features")
        }
        let total = samples.iter().map(|sample| sample.symbols.len()).sum::<usize>();
        let elements = samples.iter().map(|sample| sample.symbols.len()).max().unwrap_or(0);
        let shown: usize = samples.iter().map(|sample| sample.distractors.len()).sum();
        let size = META * samples.len() + 3 * total + shown;
        if i32::try_from(size).is_err() {
            candle_core::bail!("expand: a batch with {total} elements and {shown} distractors is too large")
        }
        let mut words = Vec::with_capacity(size);
        let mut lengths = Vec::with_capacity(samples.len());
        let (mut element, mut distractor) = (0, META * samples.len() + 3 * total);
        for sample in samples {
            let gaps: u64 = sample.gaps.iter().map(|&gap| u64::from(gap)).sum();
            let behind = if sample.distractors.is_empty() { gaps } else { gaps * frames };
            let Ok(length) = u32::try_from(sample.symbols.len() as u64 * frames + behind) else {
                candle_core::bail!("expand: a sample is longer than {} timesteps", u32::MAX)
            };
            if sample.gaps.len() != sample.symbols.len()
                || sample.labels.len() != sample.symbols.len()
                || !(sample.distractors.is_empty() || sample.distractors.len() as u64 == gaps)
            {
                candle_core::bail!(
                    "expand: the labels, gaps and distractors of a sample do not fit its symbols"
                )
            }
            let shown = if sample.distractors.is_empty() { NONE } else { distractor as u32 };
            let ([key_low, key_high], index) = sample.noise;
            words.extend([element as u32, sample.symbols.len() as u32, length, shown]);
            words.extend([key_low, key_high, index as u32, (index >> 32) as u32]);
            lengths.push(length as usize);
            element += sample.symbols.len();
            distractor += sample.distractors.len();
        }
        for sample in samples {
            let (mut at, frames) = (0, show.frames as u32);
            let step = if sample.distractors.is_empty() { 1 } else { frames };
            for gap in sample.gaps {
                words.push(at);
                // The last sum may be the length, which fits.
                at += frames + gap * step;
            }
        }
        samples.iter().for_each(|sample| words.extend(sample.labels));
        samples.iter().for_each(|sample| words.extend(sample.symbols));
        samples.iter().for_each(|sample| words.extend(sample.distractors));
        Ok(Self { words, total, elements, lengths, features, first, noise, show })
    }

    /// The buffer, as the kernels read it.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// Number of samples.
    pub fn batch(&self) -> usize {
        self.lengths.len()
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

    /// Elements of all samples.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Elements of the longest sample.
    pub fn elements(&self) -> usize {
        self.elements
    }

    /// Width of the input.
    pub fn features(&self) -> usize {
        self.features
    }

    /// Index of the first sample in its part of the data.
    pub fn first(&self) -> u64 {
        self.first
    }

    /// Whether the input is more than one-hot symbols.
    pub fn is_dense(&self) -> bool {
        self.show.table.is_some() || !matches!(self.noise, Noise::None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::load::parse;
    use crate::task::recordings::Recordings;
    use crate::task::{BLANK, PAD, Part, Samples, Task};

    /// Symbol or row, label and element of step `at` of sample `b`, found as the kernel finds them.
    fn step(compact: &Compact, b: usize, at: usize) -> [u32; 3] {
        let (words, total, at) = (compact.words(), compact.total, at as u32);
        let frames = compact.show.frames as u32;
        let [first, count, length, distractors] = words[META * b..][..4] else { unreachable!() };
        if at >= length {
            return [BLANK, 0, PAD];
        }
        let elements = &words[META * compact.batch() + first as usize..];
        let element = elements[..count as usize].partition_point(|&start| start <= at) - 1;
        let inside = at - elements[element];
        let symbol = match inside {
            _ if inside < frames => elements[2 * total + element] * frames + inside,
            _ if distractors == NONE => BLANK,
            _ => {
                let item = words[distractors as usize + (at / frames) as usize - element - 1];
                item * frames + at % frames
            }
        };
        let asked = inside + 1 >= frames;
        [symbol, elements[total + element], if asked { element as u32 } else { PAD }]
    }

    /// Three recordings of each symbol in each part, of `frames` frames and 6 channels; every second one counts.
    fn recordings(symbols: usize, frames: usize, counts: bool) -> Recordings {
        let rows = 9 * symbols * frames;
        let value = |i: usize| (i * 7 + i / 5) % 11;
        let values = if counts {
            let (mut starts, mut entries) = (vec![0], vec![]);
            for row in 0..rows {
                let of_row = (0..6).map(|channel| (channel, value(6 * row + channel as usize) as u32));
                entries.extend(of_row.filter(|(_, count)| count % 3 == 1).map(|(c, count)| c << 16 | count));
                starts.push(entries.len() as u32);
            }
            Values::Counts { starts, entries }
        } else {
            Values::Dense((0..6 * rows).map(|i| value(i) as f32 / 7.0 - 0.5).collect())
        };
        Recordings::new(frames, 6, std::array::from_fn(|_| vec![3; symbols]), values).unwrap()
    }

    /// Samples with blanks and with distractors, with noise by position, in sequence, and without, of one-hot symbols
    /// and of recordings; and what they were set up with.
    pub(super) fn sets_of_samples() -> impl Iterator<Item = (&'static str, impl Fn() -> Samples)> {
        const TEXT: &str = "
seed: 3
task: {preset: task2, ambiguities: 4, depth: 3, length: 12}
model: {name: gla, layers: 1, width: 16}";
        [
            "task.preset=task2 task.noise=0.2",
            "task.preset=task3 task.gap.start=2 task.gap.probability=0.6 task.gap.high=0.3",
            "task.preset=task1_complexity task.split=as-released",
            "task.preset=task2 task.noise=0.2 task.split=as-released",
            "task.preset=task2 task.noise=0 frames=4",
            "task.preset=task2 task.noise=0.2 frames=3 counts",
            "task.preset=task3 task.gap.start=2 task.gap.probability=0.6 task.gap.high=0.3 frames=3",
            "task.preset=task3 task.gap.start=2 task.gap.high=0.2 task.noise=0.2 frames=1 counts",
        ]
        .into_iter()
        .map(|sets| {
            let (list, shown) = sets.split_once(" frames=").unwrap_or((sets, ""));
            let list: Vec<String> = list.split(' ').map(String::from).collect();
            let config = parse(TEXT, "test", &list).unwrap();
            let mut task = Task::new(&config.task, config.seed).unwrap();
            if let Some(frames) = shown.chars().next() {
                let frames = frames.to_digit(10).unwrap() as usize;
                let symbols = task.grammar().alphabet();
                task = task.with(recordings(symbols, frames, shown.ends_with("counts"))).unwrap();
            }
            (sets, move || task.samples(Part::Train, 5, 7, None).unwrap())
        })
    }

    #[test]
    fn packed_samples_hold_what_windows_show() {
        for (sets, samples) in sets_of_samples() {
            let (mut windows, mut compact) = (samples(), samples().compact().unwrap());
            assert_eq!((compact.steps(), compact.lengths()), (windows.steps(), windows.lengths()));
            assert_eq!((compact.elements(), compact.first()), (windows.elements(), 5));
            let (mut at, mut distractors) = (0, 0);
            while let Some(window) = windows.next_window(9) {
                for i in 0..window.batch * window.steps {
                    let (b, t) = (i / window.steps, i % window.steps);
                    let shown = [window.indices()[i], window.labels[i], window.element[i]];
                    assert_eq!(step(&compact, b, at + t), shown, "{sets:?}, sample {b}, step {}", at + t);
                    distractors += usize::from(window.distractor[i]);
                }
                match &mut compact.noise {
                    Noise::None => assert!(window.noise.is_none()),
                    Noise::Drawn(draw) => assert_eq!(Some(draw(window.steps)), window.noise),
                    Noise::ByPosition { level } => assert_eq!(*level, 0.2),
                }
                at += window.steps;
            }
            assert_eq!(distractors > 0, sets.starts_with("task.preset=task3"));
        }
    }
}
