//! Symbols as real signals (`task.encoding`): each is shown as a recording, frame by frame.
//!
//! | encoding | a recording | frames | channels |
//! |---|---|---|---|
//! | `gsc` | a word of Google Speech Commands, as MFCC ([`speech`], [`mfcc`]) | 101 of 10 ms | 13 |
//! | `shd`, `ssc` | spikes of the Heidelberg data sets, counted ([`spikes`]) | 140 of 10 ms | 700 |
//! | `vectors` | vectors of the user's own ([`vectors`]) | as the file has it | as the file has it |
//!
//! The symbol with class id i is shown as a recording of the data set's label i: `#` as the first label, `A` as the
//! second. The parts of the task are told apart by recording: what is shown in the test was never shown in training.
//! Data sets come with their own parts; of SHD, which has no validation, every tenth training recording of a label is
//! kept for it, the first of ten.
//!
//! Which recording is shown at which element is drawn from a stream of the sample's own
//! ([`super::Purpose::Recordings`]): elements in their order, then distractors in theirs, uniform over the recordings of
//! the symbol. It depends on nothing but seed, part and index.
//!
//! A symbol takes as many timesteps as a recording has frames. Gaps keep their meaning: 0.1 of duration is one blank
//! frame, all zero, or one distractor, which is a recording too. A model is asked for a state from the last frame of its
//! symbol on, through the gap; before, neither loss nor vote counts it. So what an observer can know at the steps that
//! count is what it can know of symbols, and the ceilings of [`super::oracle`] hold if recordings are told apart.

pub mod mfcc;
pub mod speech;
pub mod spikes;
pub mod vectors;

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use anyhow::Result;
use sha2::{Digest, Sha256};

use super::Part;
use super::rng::Pcg64;
use crate::bail_input;
use crate::config::{Encoding, TaskConfig};
use crate::ops::expand::{Table, Values};

/// The recordings of every symbol in every part.
#[derive(Debug)]
pub struct Recordings {
    frames: usize,
    symbols: usize,
    /// Frame f of recording r is row r · frames + f.
    table: Arc<Table>,
    /// The first recording of each symbol, part after part; the last is their number.
    first: Vec<u32>,
    fingerprint: OnceLock<String>,
}

impl Recordings {
    /// Reads what a task asks for, the recordings of `symbols` symbols; none where it shows one-hot vectors.
    pub fn load(config: &TaskConfig, symbols: usize) -> Result<Option<Self>> {
        let (path, most) = (PathBuf::from(&config.data), config.recordings.or(usize::MAX));
        Ok(Some(match config.encoding {
            Encoding::OneHot => return Ok(None),
            Encoding::Gsc => speech::load(&path, symbols, most)?,
            Encoding::Shd => spikes::load(&spikes::SHD, &path, symbols, most)?,
            Encoding::Ssc => spikes::load(&spikes::SSC, &path, symbols, most)?,
            Encoding::Vectors => vectors::load(&path, symbols, most)?,
        }))
    }

    /// Recordings `[part][symbol]`, as many as `counts` says, whose frames of `channels` are `values`.
    pub fn new(frames: usize, channels: usize, counts: [Vec<usize>; 3], values: Values) -> Result<Self> {
        let symbols = counts[0].len();
        let mut first = vec![0];
        let mut total = 0;
        for count in counts.iter().flatten() {
            total += count;
            first.push(u32::try_from(total)?);
        }
        let table = Table::new(channels, values)?;
        if frames == 0 || table.rows() != total * frames || counts.iter().any(|part| part.len() != symbols) {
            anyhow::bail!("{total} recordings of {frames} frames are not {table:?}")
        }
        Ok(Self { frames, symbols, table: Arc::new(table), first, fingerprint: OnceLock::new() })
    }

    /// Timesteps of a recording.
    pub fn frames(&self) -> usize {
        self.frames
    }

    /// All frames of all recordings.
    pub fn table(&self) -> &Arc<Table> {
        &self.table
    }

    /// The recordings of a symbol in a part.
    pub fn of(&self, part: Part, symbol: u32) -> std::ops::Range<u32> {
        let at = part as usize * self.symbols + symbol as usize;
        self.first[at]..self.first[at + 1]
    }

    /// One of the recordings of a symbol in a part.
    pub(super) fn draw(&self, part: Part, symbol: u32, rng: &mut Pcg64) -> u32 {
        let all = self.of(part, symbol);
        all.start + rng.integers(all.len() as u32)
    }

    /// SHA-256 over what is shown.
    pub fn fingerprint(&self) -> &str {
        fn words(hash: &mut Sha256, words: impl Iterator<Item = u32>) {
            words.for_each(|word| hash.update(word.to_le_bytes()));
        }
        self.fingerprint.get_or_init(|| {
            let mut hash = Sha256::new();
            words(&mut hash, [self.frames as u32, self.table.channels() as u32].into_iter());
            words(&mut hash, self.first.iter().copied());
            match self.table.values() {
                Values::Dense(values) => words(&mut hash, values.iter().map(|value| value.to_bits())),
                Values::Counts { starts, entries } => {
                    words(&mut hash, starts.iter().chain(entries).copied());
                }
            }
            hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
        })
    }
}

/// A recording of a data set, before it is read.
struct Found<K> {
    part: Part,
    label: usize,
    key: K,
}

/// What is shown of a data set: the numbers of recordings `[part][symbol]`, at most `most` each, the first ones; and
/// those recordings, part by part and symbol by symbol.
fn choose<K>(
    mut found: Vec<Found<K>>,
    symbols: usize,
    most: usize,
    missing: impl Fn(Part, usize) -> anyhow::Error,
) -> Result<([Vec<usize>; 3], Vec<K>)> {
    found.sort_by_key(|one| (one.part as usize, one.label));
    let mut counts = [vec![0; symbols], vec![0; symbols], vec![0; symbols]];
    let mut keys = Vec::new();
    for Found { part, label, key } in found.into_iter().filter(|one| one.label < symbols) {
        let count = &mut counts[part as usize][label];
        if *count < most {
            *count += 1;
            keys.push(key);
        }
    }
    for part in [Part::Train, Part::Validation, Part::Test] {
        if let Some(label) = counts[part as usize].iter().position(|&count| count == 0) {
            return Err(missing(part, label));
        }
    }
    Ok((counts, keys))
}

/// The folder of a data set that `task.data` names.
fn check_folder(path: &Path, name: &str) -> Result<()> {
    if !path.is_dir() {
        bail_input!(
            "task.data is {}, which is no folder; it must be the one of the data set (`selectivbench data fetch {name}` \
             says where to get it)",
            path.display()
        )
    }
    Ok(())
}
