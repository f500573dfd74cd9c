//! Samples in files.

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::PathBuf;

use indicatif::{ProgressBar, ProgressStyle};
use rayon::prelude::*;
use serde_json::json;

use super::Source;
use crate::cli::models::grouped;
use crate::cli::print;
use crate::task::grammar::letter;
use crate::task::{Part, Sample, Task};
use crate::train::split_name;
use crate::{bail_input, files};

/// Write samples to files
///
/// --format authors writes text in the format of the authors' generator: `transitions` (one `source,
/// target, probability` a line), `train` and `test` (one sample a line: class ids, state names and
/// length). With `task.split: as-released` these are their files, in index order.
///
/// --format safetensors writes train.safetensors, validation.safetensors and test.safetensors, for N
/// samples of L elements with D distractors in all:
///   symbols [N, L] u8        class id of each element: 0 for #, then A..Z, a..z
///   labels [N, L] i32        the state to name, or with task.objective predict the next symbol
///   gaps [N, L] i32          blank timesteps, or distractors, behind each element
///   distractors \[D\] u8       class ids shown in the gaps, gap after gap; empty where gaps are blank
///   distractor_first [N+1] i64   where each sample's distractors begin; the last is D
/// The metadata hold the seed, the split, the objective, the names of the symbols and, by number, of the
/// states. Noise is not written, nor are the recordings that task.encoding shows for the symbols.
///
/// The authors' files are the same for both objectives: their code makes next-symbol samples when it reads
/// them. The tensors are what a model is shown and asked.
#[derive(clap::Args, Debug)]
#[command(
    verbatim_doc_comment,
    after_help = "Examples:
  selectivbench data export configs/quickstart.yaml --out data/quickstart
  selectivbench data export configs/quickstart.yaml --set task.split=as-released --samples 1000 --out data/text
  selectivbench data export configs/quickstart.yaml --format safetensors --out data/tensors --force"
)]
pub(super) struct ExportArgs {
    #[command(flatten)]
    source: Source,
    #[arg(long, value_enum, default_value = "authors")]
    format: Format,
    /// Training samples to write [default: task.samples.train]; validation and test are written whole
    #[arg(long, value_name = "N")]
    samples: Option<usize>,
    /// The folder to write to
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Replace files that are there already
    #[arg(long)]
    force: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Format {
    Authors,
    Safetensors,
}

/// Samples that are in memory at a time.
const CHUNK: usize = 4096;

pub(super) fn run(args: ExportArgs) -> anyhow::Result<()> {
    let task = args.source.symbols()?;
    let train = args.samples.unwrap_or(task.count(Part::Train));
    let count = |part| if part == Part::Train { train } else { task.count(part) };
    let parts: &[Part] = match args.format {
        Format::Authors => &[Part::Train, Part::Test],
        Format::Safetensors => &[Part::Train, Part::Validation, Part::Test],
    };
    let path = |part: Part| match args.format {
        Format::Authors => args.out.join(part.name()),
        Format::Safetensors => args.out.join(format!("{}.safetensors", part.name())),
    };
    let transitions = args.out.join("transitions");
    let mut paths: Vec<PathBuf> = parts.iter().map(|&part| path(part)).collect();
    if let Format::Authors = args.format {
        paths.insert(0, transitions.clone());
    }
    if let Some(path) = paths.iter().find(|path| path.exists())
        && !args.force
    {
        bail_input!("{} is there already; name another --out, or replace it with --force", path.display())
    }
    files::create_folder(&args.out)?;

    let total: usize = parts.iter().map(|&part| count(part)).sum();
    // drawn on stderr, and only where that is a terminal
    let bar = ProgressBar::new(total as u64).with_style(
        ProgressStyle::with_template("{bar:24} {pos}/{len} samples  ETA {eta}")?.progress_chars("━╸─"),
    );
    if let Format::Authors = args.format {
        files::write_atomic(&transitions, |out| out.write_all(task.grammar().transitions_text().as_bytes()))?;
    }
    for &part in parts {
        files::write_atomic_file(&path(part), |file| match args.format {
            Format::Authors => write_text(&task, part, count(part), file, &bar),
            Format::Safetensors => write_tensors(&task, part, count(part), file, &bar),
        })?;
    }
    bar.finish_and_clear();
    let names: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    let counts: Vec<String> =
        parts.iter().map(|&part| format!("{} {}", grouped(count(part)), part.name())).collect();
    print(format_args!(
        "{} samples ({}): {}",
        counts.join(", "),
        split_name(task.config().split),
        names.join(", ")
    ))
}

/// The first and the number of each chunk.
fn chunks(count: usize) -> impl Iterator<Item = (u64, usize)> {
    (0..count).step_by(CHUNK).map(move |first| (first as u64, CHUNK.min(count - first)))
}

/// Lines in the authors' format.
fn write_text(task: &Task, part: Part, count: usize, file: &File, bar: &ProgressBar) -> anyhow::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 20, file);
    for (first, count) in chunks(count) {
        let lines: Vec<String> = (first..first + count as u64)
            .into_par_iter()
            .map(|index| Ok(task.line(&task.states(part, index)?)))
            .collect::<anyhow::Result<_>>()?;
        for line in lines {
            out.write_all(line.as_bytes())?;
        }
        bar.inc(count as u64);
    }
    Ok(out.flush()?)
}

/// A safetensors file, chunk by chunk: each tensor grows at its own place, and the header is written last,
/// in the room left for it, when the number of distractors is known.
fn write_tensors(
    task: &Task,
    part: Part,
    count: usize,
    file: &File,
    bar: &ProgressBar,
) -> anyhow::Result<()> {
    let length = task.sampler().length();
    // No number of distractors has more digits.
    let room = header(task, part, count, u64::MAX >> 1).len().next_multiple_of(8);
    let size = (count * length) as u64;
    let data = 8 + room as u64;
    let mut firsts = Tensor { file, at: data };
    let mut labels = Tensor { file, at: firsts.at + 8 * (count as u64 + 1) };
    let mut gaps = Tensor { file, at: labels.at + 4 * size };
    let mut symbols = Tensor { file, at: gaps.at + 4 * size };
    let mut distractors = Tensor { file, at: symbols.at + size };
    let mut total = 0u64;
    for (first, count) in chunks(count) {
        let samples = task.samples(part, first, count, None)?;
        let samples = samples.as_slice();
        let before = |sample: &Sample| {
            let first = total;
            total += sample.distractors.len() as u64;
            first as i64
        };
        firsts.append(samples.iter().map(before).flat_map(i64::to_le_bytes))?;
        let of_labels = samples.iter().flat_map(|sample| &sample.labels);
        labels.append(of_labels.flat_map(|&label| (label as i32).to_le_bytes()))?;
        let of_gaps = samples.iter().flat_map(|sample| &sample.gaps);
        gaps.append(of_gaps.flat_map(|&gap| (gap as i32).to_le_bytes()))?;
        symbols.append(samples.iter().flat_map(|sample| &sample.symbols).map(|&class| class as u8))?;
        distractors
            .append(samples.iter().flat_map(|sample| &sample.distractors).map(|&class| class as u8))?;
        bar.inc(count as u64);
    }
    firsts.append((total as i64).to_le_bytes())?;
    let mut header = header(task, part, count, total);
    header.push_str(&" ".repeat(room - header.len()));
    Tensor { file, at: 0 }.append((room as u64).to_le_bytes().into_iter().chain(header.bytes()))
}

/// A tensor in a file: where its next bytes go.
struct Tensor<'a> {
    file: &'a File,
    at: u64,
}

impl Tensor<'_> {
    fn append(&mut self, bytes: impl IntoIterator<Item = u8>) -> anyhow::Result<()> {
        let bytes: Vec<u8> = bytes.into_iter().collect();
        let mut file = self.file;
        file.seek(SeekFrom::Start(self.at))?;
        file.write_all(&bytes)?;
        self.at += bytes.len() as u64;
        Ok(())
    }
}

/// The header: every tensor's type, shape and place, in the order of their places.
fn header(task: &Task, part: Part, count: usize, distractors: u64) -> String {
    let grammar = task.grammar();
    let length = task.sampler().length();
    let mut names = vec![""; grammar.states()];
    for state in 0..grammar.states() as u32 {
        names[grammar.label(state) as usize] = grammar.name(state);
    }
    let symbols: String = (0..grammar.alphabet() as u32).map(letter).collect();
    let mut header = serde_json::Map::new();
    let metadata = json!({
        "seed": task.seed().to_string(),
        "split": split_name(task.config().split),
        "objective": task.config().objective,
        "part": part.name(),
        "symbols": symbols,
        "states": names.join(" "),
    });
    header.insert("__metadata__".into(), metadata);
    let mut at = 0u64;
    let mut tensor = |name: &str, dtype: &str, bytes: u64, shape: &[u64]| {
        let end = at.saturating_add(bytes.saturating_mul(shape.iter().product()));
        header.insert(name.into(), json!({"dtype": dtype, "shape": shape, "data_offsets": [at, end]}));
        at = end;
    };
    let each = [count as u64, length as u64];
    tensor("distractor_first", "I64", 8, &[count as u64 + 1]);
    tensor("labels", "I32", 4, &each);
    tensor("gaps", "I32", 4, &each);
    tensor("symbols", "U8", 1, &each);
    tensor("distractors", "U8", 1, &[distractors]);
    serde_json::Value::Object(header).to_string()
}
