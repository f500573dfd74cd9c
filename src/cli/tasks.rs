//! `selectivbench tasks`: the presets, what the authors vary in each, and how large they are.

use serde_json::json;

use super::models::grouped;
use super::{print, table};
use crate::config::{Config, GapKind, TaskConfig, TaskPreset};
use crate::task::batch::TIMESTEP;

/// Where the tasks were published.
const REFERENCE: &str = "Bouhadjar et al. 2026, arXiv 2601.12598";

/// List the task presets with their sizes.
///
/// Sizes are those of the defaults; every field can be overridden in a configuration. Timesteps are the
/// mean of a sample.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  selectivbench tasks
  selectivbench tasks --json")]
pub struct TasksArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: TasksArgs) -> anyhow::Result<()> {
    let tasks: Vec<TaskConfig> = TaskPreset::ALL.iter().map(|&preset| Config::of(preset).task).collect();
    if args.json {
        let list: Vec<_> = tasks
            .iter()
            .map(|task| {
                json!({
                    "name": task.preset,
                    "varies": varies(task.preset),
                    "symbols": task.vocab(),
                    "classes": task.classes(),
                    "train_steps": train_steps(task),
                    "test_steps": test_steps(task),
                    "noise": task.noise,
                    "gap": task.gap,
                    "test_gap": task.test_gap,
                    "eval_gaps": task.eval_gaps,
                    "train_samples": task.samples.train,
                    "train_tokens": train_tokens(task),
                    "reference": REFERENCE,
                })
            })
            .collect();
        return print(serde_json::to_string_pretty(&list)?);
    }

    let header = &[
        "task",
        "symbols",
        "classes",
        "train steps",
        "test steps",
        "noise",
        "tokens/run",
        "gaps",
        "what varies",
    ];
    let mut table = table(header, 1..7);
    for task in &tasks {
        table.add_row([
            name(task.preset)?,
            task.vocab().to_string(),
            grouped(task.states()),
            grouped(train_steps(task)),
            test_steps(task).iter().map(|&steps| grouped(steps)).collect::<Vec<_>>().join(" "),
            task.noise.to_string(),
            grouped(train_tokens(task)),
            gaps(task),
            varies(task.preset).to_string(),
        ]);
    }
    print(table)?;
    print(format_args!("timesteps are the mean of a sample; {REFERENCE}"))
}

/// The name in configurations.
fn name(preset: TaskPreset) -> anyhow::Result<String> {
    Ok(serde_yaml::to_string(&preset)?.trim().to_string())
}

/// What the authors' sweep changes from run to run, beside model, width, learning rate and warm-up.
fn varies(preset: TaskPreset) -> &'static str {
    match preset {
        TaskPreset::Task1Complexity => "task.ambiguities: 20 24 26 30 34 38 40",
        TaskPreset::Task1ModelSize => "model.width: 256 to 1296",
        TaskPreset::Task2 => "length of blank gaps, noise",
        TaskPreset::Task3 => "symbols that break the rules",
        TaskPreset::Task4 => "test gaps beyond the trained ones",
    }
}

fn gaps(task: &TaskConfig) -> String {
    let gap = &task.gap;
    let kind = match gap.kind {
        GapKind::Blank => "blank",
        GapKind::Distractor => "distractor",
    };
    let mut text = match gap.low == gap.high {
        true => format!("{kind} {}", gap.low),
        false => format!("{kind} {} to {}", gap.low, gap.high),
    };
    if gap.probability < 1.0 {
        text += &format!(", p {} from element {}", gap.probability, gap.start);
    }
    text
}

/// Mean timesteps of a sample whose gaps last `gap` on average.
fn mean_steps(task: &TaskConfig, gap: f64) -> usize {
    let gaps = task.length.saturating_sub(task.gap.start) as f64 * task.gap.probability;
    task.length + (gaps * (gap / TIMESTEP)).round() as usize
}

fn train_steps(task: &TaskConfig) -> usize {
    // All presets draw uniformly.
    mean_steps(task, (task.gap.low + task.gap.high) / 2.0)
}

fn test_steps(task: &TaskConfig) -> Vec<usize> {
    let gaps = if task.eval_gaps.is_empty() { &[task.test_gap] } else { &task.eval_gaps[..] };
    gaps.iter().map(|&gap| mean_steps(task, gap)).collect()
}

/// Timesteps that a model sees while it trains.
fn train_tokens(task: &TaskConfig) -> usize {
    train_steps(task) * task.samples.train
}
