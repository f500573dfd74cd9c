//! Google Speech Commands (Warden 2018, arXiv 1804.03209), version 0.02: a folder of WAV files for every word.
//!
//! Parts are those of `validation_list.txt` and `testing_list.txt`; what they do not name is training. Coefficients are
//! put on one scale: less their mean and divided by their standard deviation, coefficient by coefficient, over the
//! training recordings that are shown.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use anyhow::Result;
use rayon::prelude::*;

use super::mfcc::{COEFFICIENTS, FRAMES, Mfcc, RATE};
use super::{Found, Recordings, check_folder, choose};
use crate::ops::expand::Values;
use crate::task::Part;
use crate::task::grammar::letter;
use crate::{bad_input, bail_input};

/// The words, in the order of the labels that the authors' code gives them.
pub const WORDS: [&str; 35] = [
    "yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go", "zero", "one", "two", "three",
    "four", "five", "six", "seven", "eight", "nine", "bed", "bird", "cat", "dog", "happy", "house", "marvin",
    "sheila", "tree", "wow", "backward", "forward", "follow", "learn", "visual",
];

/// The files that name the recordings of a part, one a line as in `bed/0a7c2a8d_nohash_0.wav`.
const LISTS: [(&str, Part); 2] =
    [("validation_list.txt", Part::Validation), ("testing_list.txt", Part::Test)];

/// The recordings of the first `symbols` words, at most `most` of each in each part.
pub(super) fn load(dir: &Path, symbols: usize, most: usize) -> Result<Recordings> {
    check_folder(dir, "gsc")?;
    let missing = |part: Part, label: usize| {
        bad_input!(
            "{} holds no {} recording of the word `{}`, which stands for the symbol {}; take the whole data set, or \
             a smaller task.ambiguities",
            dir.display(),
            part.name(),
            WORDS[label],
            letter(label as u32)
        )
    };
    let (counts, paths) = choose(find(dir, symbols)?, symbols, most, missing)?;
    let mfcc = Mfcc::default();
    let each = |path: &PathBuf| Ok(mfcc.of(&read(path)?));
    let clips: Vec<Vec<f32>> = paths.par_iter().map(each).collect::<Result<_>>()?;
    let mut values = clips.concat();
    let trained = counts[0].iter().sum::<usize>() * FRAMES * COEFFICIENTS;
    standardize(&mut values, trained);
    Recordings::new(FRAMES, COEFFICIENTS, counts, Values::Dense(values))
}

/// Every recording of the first `symbols` words, in the order of words and file names.
fn find(dir: &Path, symbols: usize) -> Result<Vec<Found<PathBuf>>> {
    let mut listed = Vec::new();
    for (name, part) in LISTS {
        listed.push((list(dir, name)?, part));
    }
    let mut found = Vec::new();
    for (label, word) in WORDS.iter().enumerate().take(symbols) {
        let Some(names) = files(dir, word) else {
            bail_input!("{} has no folder `{word}`; it must hold one for every word", dir.display())
        };
        found.extend(names.into_iter().map(|name| {
            let line = format!("{word}/{name}");
            let part = listed.iter().find(|(lines, _)| lines.contains(&line)).map(|(_, part)| *part);
            Found { part: part.unwrap_or(Part::Train), label, key: dir.join(line) }
        }));
    }
    Ok(found)
}

/// The names of the WAV files of a word, sorted; none without its folder.
fn files(dir: &Path, word: &str) -> Option<Vec<String>> {
    let entries = std::fs::read_dir(dir.join(word)).ok()?;
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| name.ends_with(".wav")).collect();
    names.sort_unstable();
    Some(names)
}

/// The lines of a list.
fn list(dir: &Path, name: &str) -> Result<HashSet<String>> {
    let path = dir.join(name);
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(text.lines().map(|line| line.trim().to_string()).collect()),
        Err(error) => {
            bail_input!("cannot read {}, which says what is held out: {error}", path.display())
        }
    }
}

/// The samples of a WAV file, between -1 and 1, the first second of them.
fn read(path: &Path) -> Result<Vec<f32>> {
    let damaged = |error: hound::Error| bad_input!("{} is no whole WAV file: {error}", path.display());
    let mut reader = hound::WavReader::open(path).map_err(damaged)?;
    let spec = reader.spec();
    let right = (spec.channels, spec.sample_rate as usize, spec.bits_per_sample, spec.sample_format);
    if right != (1, RATE, 16, hound::SampleFormat::Int) {
        bail_input!(
            "{} has {} channels of {} bits at {} Hz; it must have 1 of 16 bits, whole numbers, at {RATE} Hz",
            path.display(),
            spec.channels,
            spec.bits_per_sample,
            spec.sample_rate
        )
    }
    let samples = reader.samples::<i16>().take(RATE);
    samples.map(|sample| sample.map(|x| f32::from(x) / 32768.0).map_err(damaged)).collect()
}

/// Gives every coefficient mean 0 and deviation 1 over the first `trained` values.
fn standardize(values: &mut [f32], trained: usize) {
    for c in 0..COEFFICIENTS {
        let rows = || values[..trained].iter().skip(c).step_by(COEFFICIENTS).map(|&x| f64::from(x));
        let n = (trained / COEFFICIENTS) as f64;
        let mean = rows().sum::<f64>() / n;
        let deviation = (rows().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n).sqrt();
        let scale = if deviation > 0.0 { 1.0 / deviation } else { 1.0 };
        for x in values.iter_mut().skip(c).step_by(COEFFICIENTS) {
            *x = ((f64::from(*x) - mean) * scale) as f32;
        }
    }
}

/// What is in a folder, in a sentence; fails with what is missing first.
pub fn inspect(dir: &Path) -> Result<String> {
    for (name, _) in LISTS {
        for line in list(dir, name)? {
            if !dir.join(&line).is_file() {
                bail_input!("{} lacks {line}, which {name} names", dir.display())
            }
        }
    }
    let found = find(dir, WORDS.len())?;
    let (_, paths) = choose(found, WORDS.len(), 1, |part, label| {
        bad_input!("{} holds no {} recording of `{}`", dir.display(), part.name(), WORDS[label])
    })?;
    // One of each word and part stands for all.
    paths.iter().try_for_each(|path| read(path).map(drop))?;
    let count: usize = WORDS.iter().filter_map(|word| files(dir, word)).map(|names| names.len()).sum();
    Ok(format!("{count} recordings of {} words", WORDS.len()))
}
