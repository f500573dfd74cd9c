//! Spiking Heidelberg Digits and Spiking Speech Commands (Cramer et al. 2022, doi 10.1109/TNNLS.2020.3044364): spoken
//! words through a model of the cochlea, as HDF5 files.
//!
//! A file holds `spikes/times` (seconds) and `spikes/units` (channels 0 to 699), a row of variable length for each
//! recording, and `labels`. A frame counts the spikes of each channel as the authors' code bins them: the frame of a
//! spike is the number of edges at or before its time, of 140 edges equally spaced from 0 to 1.4 s. So frames are 1.4 /
//! 139 s long, frame 0 is always empty, and spikes at 1.4 s or later, which would be frame 140, are left out.

use std::path::Path;

use anyhow::Result;
use hdf5_reader::{ByteOrder, Dataset, Datatype, Hdf5File};
use rayon::prelude::*;

use super::{Found, Recordings, check_folder, choose};
use crate::ops::expand::Values;
use crate::task::Part;
use crate::task::grammar::letter;
use crate::{bad_input, bail_input};

/// Frames of a recording.
pub const FRAMES: usize = 140;
/// Channels of the cochlea.
pub const CHANNELS: usize = 700;

/// Where the last edge is, in seconds.
const END: f64 = 1.4;

/// One of the two data sets.
pub struct Set {
    /// As `task.encoding` has it.
    pub name: &'static str,
    pub labels: usize,
    /// Its files, each with the part it is for and its recordings as published.
    pub files: &'static [(&'static str, Part, usize)],
}

pub const SHD: Set = Set {
    name: "shd",
    labels: 20,
    files: &[("shd_train.h5", Part::Train, 8156), ("shd_test.h5", Part::Test, 2264)],
};

pub const SSC: Set = Set {
    name: "ssc",
    labels: 35,
    files: &[
        ("ssc_train.h5", Part::Train, 75_466),
        ("ssc_valid.h5", Part::Validation, 9981),
        ("ssc_test.h5", Part::Test, 20_382),
    ],
};

/// Of the training recordings of a label, the first of every so many is for validation where a set has none.
const HELD_OUT: usize = 10;

/// Recordings that are in memory twice while they are read.
const AT_ONCE: usize = 4096;

/// The recordings of the first `symbols` labels, at most `most` of each in each part.
pub(super) fn load(set: &Set, dir: &Path, symbols: usize, most: usize) -> Result<Recordings> {
    check_folder(dir, set.name)?;
    let files: Vec<SpikeFile> =
        set.files.iter().map(|(name, ..)| SpikeFile::open(set, &dir.join(name))).collect::<Result<_>>()?;
    let validated = set.files.iter().any(|(_, part, _)| *part == Part::Validation);
    let mut found = Vec::new();
    for (file, &(_, part, _)) in files.iter().zip(set.files) {
        let mut seen = vec![0usize; set.labels];
        for (row, &label) in file.labels.iter().enumerate() {
            let held_out = part == Part::Train && !validated && seen[label].is_multiple_of(HELD_OUT);
            seen[label] += 1;
            let part = if held_out { Part::Validation } else { part };
            found.push(Found { part, label, key: (file, row) });
        }
    }
    let (counts, keys) = choose(found, symbols, most, |part, label| {
        bad_input!(
            "{} has no {} recording of label {label}, which stands for the symbol {}; take the whole data set, or a \
             smaller task.ambiguities",
            dir.display(),
            part.name(),
            letter(label as u32)
        )
    })?;
    let each = |(file, row): &(&SpikeFile, usize)| file.frames(*row);
    let (mut starts, mut entries) = (Vec::with_capacity(keys.len() * FRAMES + 1), Vec::new());
    for keys in keys.chunks(AT_ONCE) {
        let recordings: Vec<Vec<[u32; 2]>> = keys.par_iter().map(each).collect::<Result<_>>()?;
        for recording in &recordings {
            let mut rest = &recording[..];
            for frame in 0..FRAMES as u32 {
                starts.push(u32::try_from(entries.len())?);
                let (row, behind) = rest.split_at(rest.partition_point(|entry| entry[0] <= frame));
                entries.extend(row.iter().map(|entry| entry[1]));
                rest = behind;
            }
        }
    }
    starts.push(u32::try_from(entries.len())?);
    Recordings::new(FRAMES, CHANNELS, counts, Values::Counts { starts, entries })
}

/// One file, of which recordings are read as they are asked for.
struct SpikeFile {
    path: String,
    times: Rows,
    units: Rows,
    labels: Vec<usize>,
}

/// Rows of variable length.
struct Rows {
    dataset: Dataset,
    /// Type of a value, and its bytes.
    base: Datatype,
    bytes: usize,
    /// Where each row lies.
    references: Vec<u8>,
}

impl SpikeFile {
    /// Reads all of a file but the spikes.
    fn open(set: &Set, path: &Path) -> Result<Self> {
        let shown = path.display().to_string();
        if !path.is_file() {
            bail_input!(
                "{shown} is missing; `selectivbench data fetch {}` says where to get it and how to unpack it",
                set.name
            )
        }
        let damaged =
            |error: hdf5_reader::error::Error| bad_input!("{shown} is no whole HDF5 file ({error})");
        let file = Hdf5File::open(path).map_err(damaged)?;
        let rows = |name: &str| -> Result<Rows> {
            let dataset = file.dataset(name).map_err(damaged)?;
            let Datatype::VarLen { base, .. } = dataset.dtype().clone() else {
                bail_input!("{name} in {shown} does not hold rows of variable length")
            };
            let bytes = match *base {
                Datatype::FixedPoint { size, .. } | Datatype::FloatingPoint { size, .. } => size as usize,
                _ => bail_input!("{name} in {shown} does not hold numbers"),
            };
            let references = dataset.read_raw_bytes().map_err(damaged)?;
            Ok(Rows { dataset, base: *base, bytes, references })
        };
        let labels = file.dataset("labels").map_err(damaged)?;
        let numbers = numbers(labels.dtype(), &labels.read_raw_bytes().map_err(damaged)?);
        let Some(numbers) = numbers else { bail_input!("labels in {shown} does not hold numbers") };
        if let Some(label) =
            numbers.iter().find(|x| x.fract() != 0.0 || !(0.0..set.labels as f64).contains(*x))
        {
            bail_input!("{shown} holds the label {label}; labels of {} are 0 to {}", set.name, set.labels - 1)
        }
        let labels: Vec<usize> = numbers.iter().map(|&label| label as usize).collect();
        let (times, units) = (rows("spikes/times")?, rows("spikes/units")?);
        for (name, rows) in [("spikes/times", &times), ("spikes/units", &units)] {
            let count = rows.references.len() / rows.dataset.vlen_reference_size();
            if count != labels.len() {
                bail_input!("{shown} holds {} labels, but {count} rows of {name}", labels.len())
            }
        }
        Ok(Self { path: shown, times, units, labels })
    }

    /// The spikes of a recording, counted: [frame, channel · 2¹⁶ + count], ascending.
    fn frames(&self, row: usize) -> Result<Vec<[u32; 2]>> {
        let (times, units) = (self.times.row(row), self.units.row(row));
        let (Some(times), Some(units)) = (times, units) else {
            bail_input!("the spikes of recording {row} in {} cannot be read: the file is damaged", self.path)
        };
        let right = |(time, unit): (&f64, &f64)| *time >= 0.0 && (0.0..CHANNELS as f64).contains(unit);
        if times.len() != units.len() || !times.iter().zip(&units).all(right) {
            bail_input!(
                "recording {row} in {} has {} times and {} units; there must be a time of 0 or more and a unit below \
                 {CHANNELS} for each spike",
                self.path,
                times.len(),
                units.len()
            )
        }
        Ok(count_spikes(times.into_iter().zip(units.into_iter().map(|unit| unit as u32))))
    }
}

impl Rows {
    /// One row; none where the file is damaged.
    fn row(&self, row: usize) -> Option<Vec<f64>> {
        let size = self.dataset.vlen_reference_size();
        let reference = &self.references[row * size..][..size];
        let bytes = self.dataset.resolve_vlen_reference_bytes(reference, self.bytes).ok()?;
        numbers(&self.base, &bytes)
    }
}

/// Numbers as they lie in a file; none of a type that is no number.
fn numbers(dtype: &Datatype, bytes: &[u8]) -> Option<Vec<f64>> {
    let (size, order, read): (u8, _, fn(u64, u32) -> f64) = match *dtype {
        Datatype::FixedPoint { size, signed: false, byte_order } => (size, byte_order, |x, _| x as f64),
        Datatype::FixedPoint { size, signed: true, byte_order } => {
            (size, byte_order, |x, empty| ((x << empty) as i64 >> empty) as f64)
        }
        Datatype::FloatingPoint { size: 2, byte_order } => {
            (2, byte_order, |x, _| half::f16::from_bits(x as u16).into())
        }
        Datatype::FloatingPoint { size: 4, byte_order } => {
            (4, byte_order, |x, _| f32::from_bits(x as u32).into())
        }
        Datatype::FloatingPoint { size: 8, byte_order } => (8, byte_order, |x, _| f64::from_bits(x)),
        _ => return None,
    };
    if !(1..=8).contains(&size) {
        return None;
    }
    let value = |bytes: &[u8]| {
        let mut all = [0; 8];
        all[..bytes.len()].copy_from_slice(bytes);
        if order == ByteOrder::BigEndian {
            all[..bytes.len()].reverse();
        }
        read(u64::from_le_bytes(all), 64 - 8 * u32::from(size))
    };
    Some(bytes.chunks_exact(size as usize).map(value).collect())
}

/// Spikes (seconds, channel) counted: [frame, channel · 2¹⁶ + count], ascending.
fn count_spikes(spikes: impl Iterator<Item = (f64, u32)>) -> Vec<[u32; 2]> {
    let mut places: Vec<[u32; 2]> = spikes
        .map(|(time, channel)| [frame(time) as u32, channel])
        .filter(|at| at[0] < FRAMES as u32)
        .collect();
    places.sort_unstable();
    let count = |same: &[[u32; 2]]| [same[0][0], same[0][1] << 16 | same.len().min(0xffff) as u32];
    places.chunk_by(|a, b| a == b).map(count).collect()
}

/// The frame of a spike.
fn frame(time: f64) -> usize {
    // As numpy.linspace: the last edge is the end itself.
    let edge = |i: usize| if i + 1 == FRAMES { END } else { i as f64 * (END / (FRAMES - 1) as f64) };
    let near = (time.min(END) / END * (FRAMES - 1) as f64) as usize;
    // Rounding can be off by an edge.
    (near.saturating_sub(1)..FRAMES).find(|&i| edge(i) > time).unwrap_or(FRAMES)
}

/// What is in a folder, a sentence for each file; fails with what is missing first.
pub fn inspect(set: &Set, dir: &Path) -> Result<String> {
    let mut out = Vec::new();
    for &(name, _, published) in set.files {
        let file = SpikeFile::open(set, &dir.join(name))?;
        // Every row of a published file is too much to look at; the last lie where a cut file ends.
        for row in (0..file.labels.len()).rev().take(100) {
            file.frames(row)?;
        }
        let count = file.labels.len();
        let note = if count == published { String::new() } else { format!(", {published} as published") };
        out.push(format!("{name}: {count} recordings{note}"));
    }
    Ok(out.join("; "))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_frame_of_a_spike_is_the_number_of_edges_before_it(time in 0.0..2.0f64) {
            let edges = (0..FRAMES).map(|i| if i == 139 { 1.4 } else { i as f64 * (1.4 / 139.0) });
            prop_assert_eq!(frame(time), edges.filter(|&edge| edge <= time).count());
        }

        #[test]
        fn no_spike_is_lost_but_behind_the_end(spikes in prop::collection::vec((0.0..1.6f64, 0..700u32), 0..300)) {
            let counted = count_spikes(spikes.iter().copied());
            prop_assert!(counted.is_sorted());
            let total: u32 = counted.iter().map(|entry| entry[1] & 0xffff).sum();
            prop_assert_eq!(total as usize, spikes.iter().filter(|(time, _)| *time < 1.4).count());
            let of_channel = |entry: &&[u32; 2]| entry[1] >> 16 == 7;
            let sevens: u32 = counted.iter().filter(of_channel).map(|entry| entry[1] & 0xffff).sum();
            let seven = spikes.iter().filter(|(time, channel)| *time < 1.4 && *channel == 7).count();
            prop_assert_eq!(sevens as usize, seven);
        }
    }

    #[test]
    fn edges_belong_to_the_frame_that_begins_with_them() {
        let width = 1.4 / 139.0;
        for i in 0..139 {
            assert_eq!(frame(i as f64 * width), i + 1);
        }
        assert_eq!([frame(1.4), frame(1.39), frame(9.0)], [140, 139, 140]);
    }

    #[test]
    fn numbers_of_all_types() {
        let order = ByteOrder::BigEndian;
        let int = |size, signed| Datatype::FixedPoint { size, signed, byte_order: order };
        assert_eq!(numbers(&int(2, true), &[0xff, 0xfe, 0, 7]), Some(vec![-2.0, 7.0]));
        assert_eq!(numbers(&int(2, false), &[0xff, 0xfe]), Some(vec![65534.0]));
        let float = |size| Datatype::FloatingPoint { size, byte_order: ByteOrder::LittleEndian };
        assert_eq!(numbers(&float(2), &[0, 0x3e]), Some(vec![1.5]));
        assert_eq!(numbers(&float(4), &1.25f32.to_le_bytes()), Some(vec![1.25]));
        assert_eq!(numbers(&float(8), &(-0.1f64).to_le_bytes()), Some(vec![-0.1]));
        assert_eq!(numbers(&Datatype::Opaque { size: 1, tag: String::new() }, &[1]), None);
    }
}
