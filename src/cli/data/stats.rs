//! What a grammar is like, and how well it can be followed.

use std::fmt::Write;

use comfy_table::{Table, presets};
use serde_json::json;

use super::Source;
use crate::cli::models::grouped;
use crate::cli::print;
use crate::config::{Encoding, Objective};
use crate::task::oracle::{self, Ceiling};
use crate::train::split_name;

/// Tell what a grammar is like, and how well any model could do
///
/// The Bayes ceiling is the accuracy of an observer that knows the grammar and has seen everything so
/// far; the window curve is the accuracy of one that has seen only the last k elements. Both look at the
/// test part; its size is task.samples.test. With task.objective predict they name the next symbol, whose
/// mean entropy is the least cross-entropy that any model can expect. Where task.encoding shows recordings for the
/// symbols, all of this holds for who tells them apart; they are not read.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  selectivbench data stats configs/quickstart.yaml
  selectivbench data stats configs/quickstart.yaml --set task.preset=task2 --set seed=3 --json")]
pub(super) struct StatsArgs {
    #[command(flatten)]
    source: Source,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Window lengths of the curve.
const WINDOWS: [usize; 11] = [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16];

pub(super) fn run(args: StatsArgs) -> anyhow::Result<()> {
    let task = args.source.symbols()?;
    let (grammar, sampler) = (task.grammar(), task.sampler());
    let mut degrees: Vec<usize> = (0..grammar.states() as u32)
        .filter(|&state| state != grammar.end())
        .map(|state| grammar.successors(state).len())
        .collect();
    degrees.sort_unstable();
    let (least, most) = (degrees.first().copied().unwrap_or(0), degrees.last().copied().unwrap_or(0));
    let mean = degrees.iter().sum::<usize>() as f64 / degrees.len().max(1) as f64;
    let starts: Vec<&str> = grammar.starts().iter().map(|&state| grammar.name(state)).collect();
    let entropy = grammar.topological_entropy();
    let census = oracle::census(&task)?;
    let Ceiling { accuracy: ceiling, hits, entropy: next_entropy, .. } = oracle::ceiling(&task, None)?;
    let predict = task.config().objective == Objective::Predict;
    let curve = oracle::window_curve(&task, &WINDOWS)?;
    let split = split_name(task.config().split);

    if args.json {
        let counts: Vec<_> =
            degrees.chunk_by(|a, b| a == b).map(|same| json!([same[0], same.len()])).collect();
        let curve: Vec<_> =
            WINDOWS.iter().zip(&curve).map(|(k, accuracy)| json!({"k": k, "accuracy": accuracy})).collect();
        let all = json!({
            "seed": task.seed(),
            "split": split,
            "objective": task.config().objective,
            "symbols": grammar.alphabet(),
            "encoding": task.config().encoding,
            "features": task.config().features().ok(),
            "classes": task.classes(),
            "states": grammar.states(),
            "transitions": grammar.transitions(),
            "out_degree": {"min": least, "mean": mean, "max": most, "counts": counts},
            "start_states": starts,
            "attempts": grammar.attempts(),
            "acceptance": sampler.acceptance(),
            "mean_string_length": census.string_length,
            "strings_per_sample": census.strings,
            "topological_entropy": entropy,
            "ceiling": ceiling,
            "ceiling_hits": hits,
            "next_symbol_entropy": predict.then_some(next_entropy),
            "majority": census.majority,
            "window_curve": curve,
        });
        return print(serde_json::to_string_pretty(&all)?);
    }

    let mut facts = Table::new();
    facts.load_style(presets::NOTHING);
    for (name, value) in [
        ("seed", task.seed().to_string()),
        ("attempts until valid", grammar.attempts().to_string()),
        ("symbols, # included", grammar.alphabet().to_string()),
        ("states, # included", grouped(grammar.states())),
        ("classes to tell apart", grouped(task.classes())),
        ("transitions", grouped(grammar.transitions())),
        ("out-degree, least / mean / most", format!("{least} / {mean:.2} / {most}")),
        ("start states", starts.join(" ")),
        ("topological entropy", format!("{entropy:.4}")),
        ("strings accepted", percent(sampler.acceptance())),
        ("mean accepted length, # included", format!("{:.1}", census.string_length)),
        ("strings in a sample, the last one cut", format!("{:.2}", census.strings)),
        ("test part", split.to_string()),
        ("Bayes ceiling, expected", percent(ceiling)),
        ("  and on these samples", percent(hits)),
        (
            if predict { "always the most frequent symbol" } else { "always the most frequent state" },
            percent(census.majority),
        ),
    ] {
        facts.add_row([name, &value]);
    }
    if task.config().encoding != Encoding::OneHot {
        let shown = format!("{}; the ceiling is that of symbols", task.config().encoding.name());
        facts.add_row(["shown as", &shown]);
    }
    if predict {
        facts.add_row(["entropy of the next symbol, in nats", &format!("{next_entropy:.4}")]);
    }
    let mut out = format!("{}\n\nout-degrees\n", facts.trim_fmt());
    // about ten rows, each for as many degrees as that takes
    let step = (most - least + 1).div_ceil(10).max(1);
    let of_row = |degree: usize| (degree - least) / step;
    let rows: Vec<&[usize]> = degrees.chunk_by(|&a, &b| of_row(a) == of_row(b)).collect();
    let longest = rows.iter().map(|row| row.len()).max().unwrap_or(1);
    for row in rows {
        let from = least + of_row(row[0]) * step;
        let range = if step == 1 { from.to_string() } else { format!("{from}-{}", from + step - 1) };
        let bar = bar(row.len() as f64 / longest as f64);
        let _ = writeln!(out, "{range:>9} {:>6}  {bar}", grouped(row.len()));
    }
    let _ = writeln!(out, "\naccuracy of the best guess from the last k elements");
    for (k, accuracy) in WINDOWS.iter().zip(curve) {
        let _ = writeln!(out, "{k:>9} {:>9}  {}", percent(accuracy), bar(accuracy));
    }
    print(out.trim_end())
}

fn percent(share: f64) -> String {
    format!("{:.2} %", 100.0 * share)
}

/// A bar of up to 40 characters, in eighths of one.
fn bar(share: f64) -> String {
    let eighths = (share * 320.0).round() as usize;
    let rest = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"][eighths % 8];
    format!("{}{rest}", "█".repeat(eighths / 8))
}
