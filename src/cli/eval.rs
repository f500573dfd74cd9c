//! `selectivbench eval`: accuracy of saved checkpoints.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use comfy_table::Table;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::print;
use crate::checkpoint::Checkpoint;
use crate::config::Split;
use crate::device::parse_device;
use crate::task::{Part, Task};
use crate::train::breakdown::{AtDistance, AtGap, Breakdown, Tally};
use crate::train::evaluate::{self, EvalPlan, Evaluation, evaluate};
use crate::train::{count, device_name, split_name};
use crate::{bail_input, files};

/// Evaluate saved checkpoints on the test samples of their task.
///
/// Recurrent models read long sequences in pieces with carried state, so that memory does not grow with
/// the length; --gap 10 makes 20,200 timesteps of a sample of 200 elements.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  selectivbench eval runs/quickstart
  selectivbench eval runs/* --gap 1,2,5,10 --json gaps.json
  selectivbench eval runs/quickstart --breakdown")]
pub struct EvalArgs {
    /// Run directories or checkpoint files
    #[arg(required = true, value_name = "RUN_OR_CHECKPOINT")]
    checkpoints: Vec<PathBuf>,
    /// Fixed gaps after every element, in time units of ten timesteps [default: the configuration's]
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true, value_name = "G,G,...")]
    gap: Vec<f64>,
    /// Number of test samples [default: the configuration's]
    #[arg(long, value_name = "N")]
    samples: Option<usize>,
    /// Draw the samples as this profile does: held-out or as-released [default: the configuration's]
    #[arg(long, value_name = "SPLIT")]
    split: Option<String>,
    /// Samples per forward pass [default: the configuration's]
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Timesteps per piece [default: the configuration's]
    #[arg(long, value_name = "T")]
    chunk: Option<usize>,
    /// Also show where the models are right: by the gap before an element, by the number of elements since its
    /// string began, and on and after distractors
    #[arg(long)]
    breakdown: bool,
    /// Where to compute: auto, cpu or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
    /// Write the results to a file too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// One line of the results.
struct Row {
    path: PathBuf,
    checkpoint: Arc<Checkpoint>,
    parameters: usize,
    gap: f64,
    ceiling: f64,
    evaluation: Evaluation,
}

/// A checkpoint with the task to evaluate it on.
struct Job {
    path: PathBuf,
    checkpoint: Arc<Checkpoint>,
    task: Task,
    plans: Vec<EvalPlan>,
}

pub fn run(args: EvalArgs) -> anyhow::Result<()> {
    let device = parse_device(&args.device)?;
    let split = match args.split.as_deref() {
        None => None,
        Some("held-out") => Some(Split::HeldOut),
        Some("as-released") => Some(Split::AsReleased),
        Some(other) => bail_input!("--split is {other}; it must be held-out or as-released"),
    };
    for (flag, value) in [("--samples", args.samples), ("--batch", args.batch), ("--chunk", args.chunk)] {
        if value == Some(0) {
            bail_input!("{flag} is 0; it must be at least 1")
        }
    }
    if let Some(path) = &args.json {
        files::check_writable(path)?;
    }

    // Everything is read and checked before the first evaluation.
    let mut jobs = Vec::new();
    for path in &args.checkpoints {
        let checkpoint = Arc::new(Checkpoint::open(path)?);
        let mut config = checkpoint.config.clone();
        if let Some(split) = split {
            config.task.split = split;
        }
        let task = Task::new(&config.task, config.seed)?;
        checkpoint.check_task(path, &task)?;
        let mut gaps = args.gap.clone();
        if gaps.is_empty() {
            gaps = config.task.eval_gaps.clone();
        }
        if gaps.is_empty() {
            gaps.push(config.task.test_gap);
        }
        let plans = gaps
            .into_iter()
            .map(|gap| {
                config.task.check_gap("--gap", gap)?;
                Ok(EvalPlan {
                    part: Part::Test,
                    samples: args.samples.unwrap_or(config.task.samples.test),
                    gap: Some(gap),
                    batch: args.batch.unwrap_or(config.train.eval_batch),
                    chunk: args.chunk.unwrap_or(evaluate::chunk(&config, &device)),
                })
            })
            .collect::<anyhow::Result<_>>()?;
        jobs.push(Job { path: path.clone(), checkpoint, task, plans });
    }

    let samples: usize = jobs.iter().flat_map(|job| &job.plans).map(|plan| plan.samples).sum();
    let bar = match std::io::stderr().is_terminal() {
        true => ProgressBar::new(samples as u64)
            .with_style(ProgressStyle::with_template("{bar:24} {pos}/{len} samples  {msg}  ETA {eta}")?),
        false => ProgressBar::hidden(),
    };
    let mut rows = Vec::new();
    let mut done = 0;
    for Job { path, checkpoint, task, plans } in &jobs {
        let net = checkpoint.model(&device)?;
        for plan in plans {
            let gap = plan.gap.unwrap_or(checkpoint.config.task.test_gap);
            bar.set_message(format!("{} at gap {gap}", path.display()));
            let evaluation = evaluate(&net, task, plan, |finished| {
                bar.set_position((done + finished) as u64);
                true
            })?;
            done += plan.samples;
            rows.push(Row {
                path: path.clone(),
                checkpoint: checkpoint.clone(),
                parameters: net.params().count(),
                gap,
                ceiling: task.ceiling(gap)?,
                evaluation: evaluation.context("the evaluation ended early")?,
            });
        }
    }
    bar.finish_and_clear();

    print(table(&rows, split))?;
    if args.breakdown {
        print(breakdown(&rows))?;
    }
    if let Some(path) = &args.json {
        let list: Vec<_> = rows.iter().map(|row| row.json(split, &device_name(&device))).collect();
        let json = serde_json::to_string_pretty(&list)? + "\n";
        files::write_atomic(path, |out| out.write_all(json.as_bytes()))?;
    }
    Ok(())
}

impl Row {
    fn split(&self, split: Option<Split>) -> &'static str {
        split_name(split.unwrap_or(self.checkpoint.config.task.split))
    }

    fn json(&self, split: Option<Split>, device: &str) -> serde_json::Value {
        let config = &self.checkpoint.config;
        json!({
            "checkpoint": self.path,
            "model": config.model.name,
            "parameters": self.parameters,
            "step": self.checkpoint.step,
            "task": config.task.preset,
            "seed": config.seed,
            "split": self.split(split),
            "objective": config.task.objective,
            "gap": self.gap,
            "timesteps": self.evaluation.timesteps,
            "samples": self.evaluation.samples,
            "accuracy": self.evaluation.accuracy,
            "ceiling": self.ceiling,
            "loss": self.evaluation.loss,
            "kl": self.evaluation.kl,
            "breakdown": self.evaluation.breakdown,
            "seconds": self.evaluation.seconds,
            "tokens_per_s": self.evaluation.tokens as f64 / self.evaluation.seconds,
            "device": device,
            "precision": "f32",
        })
    }
}

fn table(rows: &[Row], split: Option<Split>) -> Table {
    let mut table = super::table(
        &[
            "checkpoint",
            "model",
            "objective",
            "split",
            "gap",
            "timesteps",
            "samples",
            "accuracy",
            "ceiling",
            "loss",
            "KL",
            "tokens/s",
        ],
        4..12,
    );
    for row in rows {
        let evaluation = &row.evaluation;
        table.add_row([
            row.path.display().to_string(),
            row.checkpoint.config.model.name.clone(),
            row.checkpoint.config.task.objective.name().into(),
            row.split(split).into(),
            row.gap.to_string(),
            evaluation.timesteps.to_string(),
            evaluation.samples.to_string(),
            format!("{:.2} %", 100.0 * evaluation.accuracy),
            format!("{:.2} %", 100.0 * row.ceiling),
            format!("{:.4}", evaluation.loss),
            evaluation.kl.map_or(String::new(), |kl| format!("{kl:.4}")),
            count(evaluation.tokens as f64 / evaluation.seconds),
        ]);
    }
    table
}

/// Accuracy by group of elements: a row a group, a column an evaluation.
fn breakdown(rows: &[Row]) -> Table {
    /// What the groups have in common, what tells one from the others, and their order.
    type Group = (&'static str, String, usize);
    fn groups(breakdown: &Breakdown) -> Vec<(Group, Tally)> {
        let bins = |what: &'static str, bins: &[AtDistance]| {
            let group = |bin: &AtDistance| ((what, bin.name(), bin.from), bin.tally);
            bins.iter().map(group).collect::<Vec<_>>()
        };
        let gap = |at: &AtGap| (("gap before it", at.gap.to_string(), at.gap as usize), at.tally);
        let mut all: Vec<_> = breakdown.by_gap.iter().map(gap).collect();
        all.extend(bins("place in its string", &breakdown.by_distance));
        if let Some(distractor) = &breakdown.distractor {
            all.push((("distractor", "on it".into(), 0), distractor.on));
            all.extend(bins("after a distractor", &distractor.after));
        }
        all
    }
    let columns: Vec<Vec<(Group, Tally)>> =
        rows.iter().map(|row| row.evaluation.breakdown.as_ref().map_or(vec![], groups)).collect();
    let mut order: Vec<&Group> = columns.iter().flatten().map(|(group, _)| group).collect();
    // Kinds of groups as they come, the groups of a kind in their order.
    let kinds: Vec<&str> = order.iter().map(|group| group.0).collect();
    let place = |group: &&Group| (kinds.iter().position(|kind| *kind == group.0), group.2);
    order.sort_by_key(place);
    order.dedup();

    let names: Vec<String> =
        rows.iter().map(|row| format!("{}\ngap {}", row.path.display(), row.gap)).collect();
    let mut header = vec!["elements by", ""];
    header.extend(names.iter().map(String::as_str));
    let mut table = super::table(&header, 1..header.len());
    for (i, group) in order.iter().enumerate() {
        let first = i == 0 || order[i - 1].0 != group.0;
        let mut cells = vec![if first { group.0.to_string() } else { String::new() }, group.1.clone()];
        cells.extend(columns.iter().map(|column| {
            let tally = column.iter().find(|(own, _)| own == *group).map(|(_, tally)| tally);
            match tally.filter(|tally| tally.elements > 0) {
                Some(tally) => format!("{:.1} % of {}", 100.0 * tally.accuracy(), tally.elements),
                None => "-".into(),
            }
        }));
        table.add_row(cells);
    }
    table
}
