//! One sample, as text and as a picture.

use std::fmt::Write;
use std::io::IsTerminal;
use std::path::PathBuf;

use super::picture::Scene;
use super::{PartName, Source};
use crate::cli::print;
use crate::plot::{self, Format};
use crate::task::{Part, Sample, Task};
use crate::train::split_name;
use crate::{bail_input, files};

/// Show one sample in the terminal, and with --picture as a picture
///
/// Each cell is the window of one element: its symbol and the timesteps behind it, and below it the
/// state that a model has to name during all of them.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  selectivbench data show configs/quickstart.yaml
  selectivbench data show configs/quickstart.yaml --part train --index 7 --gap 0.5
  selectivbench data show configs/quickstart.yaml --set task.preset=task3 --picture sample.svg")]
pub(super) struct ShowArgs {
    #[command(flatten)]
    source: Source,
    /// Which sample of the part
    #[arg(long, default_value_t = 0)]
    index: u64,
    /// Which part of the data
    #[arg(long, value_enum, default_value = "test")]
    part: PartName,
    /// Gap after every element, in time units, instead of the part's own; a timestep is 0.1
    #[arg(long)]
    gap: Option<f64>,
    /// Also draw the sample: FILE.svg or FILE.png
    #[arg(long, value_name = "FILE")]
    picture: Option<PathBuf>,
}

pub(super) fn run(args: ShowArgs) -> anyhow::Result<()> {
    let format = args.picture.as_deref().map(|path| Format::of("--picture", path)).transpose()?;
    if let Some(path) = &args.picture {
        files::check_writable(path)?;
    }
    let task = args.source.task()?;
    let part = Part::from(args.part);
    let count = task.count(part);
    if args.index >= count as u64 {
        bail_input!(
            "--index is {}; task.samples.{} is {count}, so it must be below that",
            args.index,
            part.name()
        )
    }
    let samples = task.samples(part, args.index, 1, args.gap)?;
    let [sample] = samples.as_slice() else { unreachable!("one sample is asked for") };
    let title = format!(
        "{} sample {} ({}), seed {}: {} elements, {} timesteps",
        part.name(),
        args.index,
        split_name(task.config().split),
        task.seed(),
        sample.states.len(),
        sample.steps()
    );
    let out = std::io::stdout();
    let colour = out.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let width = terminal_size::terminal_size_of(&out).map_or(100, |(width, _)| width.0 as usize);
    print(format_args!("{title}\n\n{}", text(&task, sample, width, colour).trim_end()))?;
    if let (Some(path), Some(format)) = (&args.picture, format) {
        let sample = sample.clone();
        let batch = samples.into_batch();
        plot::save(&Scene::new(&task, &sample, &batch, &title), path, format)?;
        print(format_args!("\npicture: {}", path.display()))?;
    }
    Ok(())
}

/// What a piece of text stands for.
#[derive(Clone, Copy)]
enum Role {
    Symbol,
    Gap,
    Distractor,
    State,
    Frame,
}

impl Role {
    /// Text of this role, coloured if wanted. Roles differ without colour too.
    fn paint(self, text: &str, colour: bool) -> String {
        let code = match self {
            Role::Symbol => "1",
            Role::Gap | Role::Frame => "2",
            Role::Distractor => "33",
            Role::State => "36",
        };
        if colour && !text.is_empty() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.into() }
    }
}

/// Blanks and distractors that are written out; more of them are counted.
const WRITTEN: usize = 4;

/// The sample in cells, as many to a line as fit.
fn text(task: &Task, sample: &Sample, width: usize, colour: bool) -> String {
    let grammar = task.grammar();
    let mut out = String::new();
    let note = if sample.distractors.is_empty() {
        "symbols, with · for a timestep without one, above the states to name"
    } else {
        "symbols, with distractors in (), above the states to name"
    };
    let _ = writeln!(out, "{note}\n");

    let mut distractors = sample.distractors.iter().map(|&class| crate::task::grammar::letter(class));
    let cells: Vec<(char, String, Role, &str)> = sample
        .states
        .iter()
        .zip(&sample.gaps)
        .map(|(&state, &gap)| {
            let (gap, symbol) = (gap as usize, crate::task::grammar::letter(grammar.symbol(state)));
            let (behind, role) = match gap {
                _ if !sample.distractors.is_empty() => {
                    let shown: String = distractors.by_ref().take(gap).collect();
                    let text = match gap {
                        0 => String::new(),
                        1..=WRITTEN => format!("({shown})"),
                        _ => {
                            let first: String = shown.chars().take(WRITTEN).collect();
                            format!("({first}…{} more)", gap - WRITTEN)
                        }
                    };
                    (text, Role::Distractor)
                }
                ..=WRITTEN => ("·".repeat(gap), Role::Gap),
                _ => (format!("·×{gap}"), Role::Gap),
            };
            (symbol, behind, role, grammar.name(state))
        })
        .collect();

    let gutter = cells.len().to_string().len().max(3);
    let size = |(_, behind, _, name): &(char, String, Role, &str)| {
        (1 + behind.chars().count()).max(name.chars().count())
    };
    let mut first = 0;
    while first < cells.len() {
        let mut used = gutter + 3;
        let fits = |cell: &&(char, String, Role, &str)| {
            used += size(cell) + 2;
            used <= width
        };
        let count = cells[first..].iter().take_while(fits).count().max(1);
        let bar = Role::Frame.paint("│", colour);
        let (mut above, mut below) = (format!("{first:gutter$} {bar}"), format!("{:gutter$} {bar}", ""));
        for cell in &cells[first..first + count] {
            let (symbol, behind, role, name) = cell;
            let pad = |used: usize| " ".repeat(size(cell) - used);
            above += &Role::Symbol.paint(&symbol.to_string(), colour);
            above += &role.paint(behind, colour);
            above += &format!("{} {bar}", pad(1 + behind.chars().count()));
            below += &Role::State.paint(name, colour);
            below += &format!("{} {bar}", pad(name.chars().count()));
        }
        let _ = writeln!(out, "{above}\n{below}\n");
        first += count;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, TaskPreset};

    #[test]
    fn cells_are_aligned_and_fit() {
        let mut config = Config::of(TaskPreset::Task3);
        config.task.gap.start = 0;
        config.task.gap.probability = 0.5;
        let task = Task::new(&config.task, 1).unwrap();
        for gap in [0.1, 0.4, 2.0] {
            let samples = task.samples(Part::Test, 0, 1, Some(gap)).unwrap();
            let text = text(&task, &samples.as_slice()[0], 60, false);
            let lines: Vec<&str> = text.lines().filter(|line| line.contains('│')).collect();
            assert!(lines.iter().all(|line| line.chars().count() <= 60), "{text}");
            for pair in lines.chunks(2) {
                let bars = |line: &str| {
                    line.chars().enumerate().filter(|c| c.1 == '│').map(|c| c.0).collect::<Vec<_>>()
                };
                assert_eq!(bars(pair[0]), bars(pair[1]));
            }
        }
    }
}
