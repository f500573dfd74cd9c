//! `selectivbench inspect`: what a model did on a sample, and what its layers computed meanwhile.

use std::ops::Range;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::cells::{self, Cell, Role};
use super::{PartName, print};
use crate::checkpoint::Checkpoint;
use crate::device::parse_device;
use crate::inspect::{Inspection, figures, first_broken, inspect, parse, window};
use crate::model::notes::Quantity;
use crate::plot::{self, Format};
use crate::task::grammar::letter;
use crate::task::{Part, Sample, Samples, Task};
use crate::train::split_name;
use crate::{bail_input, files};

/// Show what a model did on a sample: its answer at every element and, as pictures, the decays, write strengths and
/// gates of its layers over time
///
/// Each cell is the window of one element: its symbol and the timesteps behind it, the state to name (or the next
/// symbol, with task.objective predict), and the model's answer with its share of the vote in percent. Where the
/// answer is wrong (✗) it stands beside its share and that of the right one. A double bar ends a string.
///
/// With --out there is one picture for every quantity that the layers tell, a panel per layer, as SVG and PNG.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  selectivbench inspect runs/quickstart --out pictures
  selectivbench inspect runs/quickstart --sample 7 --gap 2 --from 10 --to 25
  selectivbench inspect runs/quickstart --text 'A3.. B1. #.' --json")]
pub struct InspectArgs {
    /// A run directory or a checkpoint file
    #[arg(value_name = "RUN_OR_CHECKPOINT")]
    checkpoint: PathBuf,
    /// Which sample of the part
    #[arg(long, default_value_t = 0, value_name = "N")]
    sample: u64,
    /// Which part of the data
    #[arg(long, value_enum, default_value = "test")]
    part: PartName,
    /// Gap after every element, in time units, instead of the part's own; a timestep is 0.1
    #[arg(long, allow_negative_numbers = true)]
    gap: Option<f64>,
    /// A sample of your own, without noise: states by name, each with the gap behind it, a dot a timestep
    /// (`A3..`, `A3.×20`) or distractors in brackets (`A3(BC)`)
    #[arg(long, value_name = "STATES", conflicts_with_all = ["sample", "part", "gap"])]
    text: Option<String>,
    /// First element to show
    #[arg(long, default_value_t = 0, value_name = "E")]
    from: usize,
    /// Element to stop before [default: what fits into 240 timesteps]
    #[arg(long, value_name = "E")]
    to: Option<usize>,
    /// Where to compute: auto, cpu or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
    /// The folder for pictures
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Print JSON: every element, and what the layers told
    #[arg(long)]
    json: bool,
}

/// Timesteps that a picture is legible with.
const LEGIBLE: usize = 240;

pub fn run(args: InspectArgs) -> anyhow::Result<()> {
    let device = parse_device(&args.device)?;
    let checkpoint = Checkpoint::open(&args.checkpoint)?;
    let config = &checkpoint.config;
    let task = Task::new(&config.task, config.seed)?;
    checkpoint.check_task(&args.checkpoint, &task)?;
    let (samples, name) = samples(&args, &task)?;
    let [sample] = samples.as_slice() else { unreachable!("one sample is asked for") };
    let broken = args.text.is_some().then(|| first_broken(&task, sample)).flatten();
    let window = chosen(&args, sample)?;
    if let Some(out) = &args.out {
        files::create_folder(out)?;
    }

    let net = checkpoint.model(&device)?;
    let seen = inspect(&net, &task, samples, window)?;
    let (right, count) = (seen.right(), seen.elements.len());
    let title = format!(
        "{} after update {}, {name}: {right} of {count} elements right ({:.1} %)",
        config.model.name,
        checkpoint.step,
        100.0 * right as f64 / count as f64
    );
    let mut pictures = Vec::new();
    if let Some(out) = &args.out {
        for figure in figures(&task, &seen, &title) {
            for (extension, format) in [("svg", Format::Svg), ("png", Format::Png)] {
                let path = out.join(format!("{}.{extension}", figure.kind.name));
                plot::save(&figure, &path, format)?;
                pictures.push(path);
            }
        }
    }
    if args.json {
        let all = json!({
            "checkpoint": args.checkpoint,
            "model": config.model.name,
            "step": checkpoint.step,
            "sample": name,
            "right": right,
            "elements": elements(&task, &seen),
            "quantities": seen.quantities.iter().map(|q| quantity(q, seen.steps())).collect::<Vec<_>>(),
            "pictures": pictures,
        });
        return print(serde_json::to_string(&all)?);
    }

    let (width, colour) = cells::terminal();
    let shown = &seen.window;
    let part = match shown.len() {
        all if all == count => String::new(),
        _ => format!("\nelements {} to {}, see --from and --to", shown.start, shown.end - 1),
    };
    print(format_args!("{title}{part}\n\n{}", text(&task, &seen, width, colour).trim_end()))?;
    if let Some(i) = broken {
        print(format_args!(
            "\nthe grammar does not allow element {i}, {}, there",
            task.grammar().name(seen.elements[i].state)
        ))?;
    }
    let svg: Vec<String> = pictures.iter().step_by(2).map(|path| path.display().to_string()).collect();
    match (&args.out, seen.quantities.is_empty()) {
        (Some(_), false) => print(format_args!("\npictures, as SVG and PNG: {}", svg.join(" "))),
        (Some(_), true) => print("\nno pictures: the layers of this model tell nothing of themselves"),
        (None, _) => print("\npictures of what the layers computed: add --out DIR"),
    }
}

/// The sample that is asked for, and what to call it.
fn samples(args: &InspectArgs, task: &Task) -> anyhow::Result<(Samples, String)> {
    if let Some(text) = &args.text {
        let sample = parse(task, text)?;
        return Ok((task.own(sample), "a sample of your own".into()));
    }
    let part = Part::from(args.part);
    let count = task.count(part);
    if args.sample >= count as u64 {
        bail_input!(
            "--sample is {}; task.samples.{} is {count}, so it must be below that",
            args.sample,
            part.name()
        )
    }
    if let Some(gap) = args.gap {
        task.config().check_gap("--gap", gap)?;
    }
    let name = format!(
        "{} sample {} ({}, seed {}{})",
        part.name(),
        args.sample,
        split_name(task.config().split),
        task.seed(),
        args.gap.map_or(String::new(), |gap| format!(", gap {gap}"))
    );
    Ok((task.samples(part, args.sample, 1, args.gap)?, name))
}

/// The elements to look at closely.
fn chosen(args: &InspectArgs, sample: &Sample) -> anyhow::Result<Range<usize>> {
    let (from, count) = (args.from, sample.states.len());
    if from >= count {
        bail_input!("--from is {from}; the sample has {count} elements, so it must be below that")
    }
    match args.to {
        None => Ok(window(sample, from, LEGIBLE)),
        Some(to) if (from + 1..=count).contains(&to) => Ok(from..to),
        Some(to) => bail_input!("--to is {to}; it must be above --from, {from}, and at most {count}"),
    }
}

/// The elements of the window in cells.
fn text(task: &Task, seen: &Inspection, width: usize, colour: bool) -> String {
    let grammar = task.grammar();
    let percent = |share: f64| format!("{:.0}", 100.0 * share);
    let cells: Vec<Cell> = cells::symbols(&seen.sample)
        .into_iter()
        .zip(&seen.elements)
        .skip(seen.window.start)
        .take(seen.window.len())
        .map(|(symbol, element)| {
            let answer = if element.right() {
                (format!("✓ {}", percent(element.confidence)), Role::Right)
            } else {
                let (answer, share) = (task.class_name(element.answer), percent(element.confidence));
                (format!("✗ {answer} {share}/{}", percent(element.right_share)), Role::Wrong)
            };
            let label = (task.class_name(element.label), Role::State);
            let bar = if element.state == grammar.end() { '║' } else { '│' };
            Cell { lines: vec![symbol, vec![label], vec![answer]], bar }
        })
        .collect();
    format!(
        "{}; below them {}, and\n✓ its share of the vote in %, or ✗ the wrong answer and its share / that of the right one\n\n{}",
        cells::legend(&seen.sample),
        cells::asked(task),
        cells::lay_out(&cells, seen.window.start, width, colour)
    )
}

fn elements(task: &Task, seen: &Inspection) -> Vec<Value> {
    let grammar = task.grammar();
    let each = |(i, element): (usize, &crate::inspect::Element)| {
        json!({
            "element": i,
            "timestep": element.first,
            "symbol": letter(seen.sample.symbols[i]),
            "state": grammar.name(element.state),
            "label": task.class_name(element.label),
            "answer": task.class_name(element.answer),
            "right": element.right(),
            "confidence": element.confidence,
            "right_share": element.right_share,
            "gap_before": element.place.gap,
            "distance": element.place.distance,
            "distractor": element.place.distractor,
            "since_distractor": element.place.since_distractor,
        })
    };
    seen.elements.iter().enumerate().map(each).collect()
}

/// A quantity over the timesteps of the window: for every step and row the mean over its channels, and where there
/// are several the least and the largest.
fn quantity(quantity: &Quantity, steps: Range<usize>) -> Value {
    let each = |f: &dyn Fn(&[f32]) -> f32| -> Vec<Vec<f32>> {
        let rows = |t: usize| (0..quantity.rows).map(|row| f(quantity.at(t, row))).collect();
        (0..quantity.steps()).map(rows).collect()
    };
    let mut value = json!({
        "layer": quantity.layer,
        "name": quantity.kind.name,
        "about": quantity.kind.about,
        "rows": (0..quantity.rows).map(|row| quantity.kind.rows.label(row)).collect::<Vec<_>>(),
        "channels": quantity.channels,
        "first_timestep": steps.start,
        "mean": each(&|values| values.iter().sum::<f32>() / values.len() as f32),
    });
    if quantity.channels > 1 {
        value["least"] = json!(each(&|values| values.iter().copied().fold(f32::INFINITY, f32::min)));
        value["largest"] = json!(each(&|values| values.iter().copied().fold(f32::NEG_INFINITY, f32::max)));
    }
    value
}
