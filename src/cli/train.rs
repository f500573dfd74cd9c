//! `selectivbench train`: one run.

use std::path::{Path, PathBuf};

use super::print;
use crate::config::load::load;
use crate::device::parse_device;
use crate::files;
use crate::train::{self, Options};

/// Train one model on one task: updates, evaluations, checkpoints, metrics, and a test at the end.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "The run directory holds config.yaml (complete; training from it repeats the run), metrics.jsonl,
TensorBoard events, checkpoint.safetensors, state.safetensors (for --resume) and summary.json.
Ctrl-C saves everything and says how to go on.

Examples:
  selectivbench train configs/quickstart.yaml
  selectivbench train configs/task2.yaml --set model.name=mamba2 --set model.width=384 --out runs/mamba2
  selectivbench train runs/mamba2/config.yaml --out runs/mamba2 --resume"
)]
pub struct TrainArgs {
    #[arg(value_name = "CONFIG.yaml")]
    config: PathBuf,
    /// Set a field of the configuration; may be given several times
    #[arg(long, value_name = "key.path=value")]
    set: Vec<String>,
    /// Where to compute: auto, cpu or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
    /// The run directory [default: runs/ and the configuration's name, numbered if it is taken]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Go on from the newest state in the run directory; begin where there is none
    #[arg(long)]
    resume: bool,
    /// Stop and save when standard input ends; how a sweep ends its runs
    #[arg(long, hide = true)]
    stop_at_end_of_input: bool,
    /// Samples per forward pass at most, whatever train.micro_batch says
    #[arg(long, hide = true, value_name = "N")]
    max_micro_batch: Option<usize>,
}

pub fn run(args: TrainArgs) -> anyhow::Result<()> {
    let config = load(&args.config, &args.set)?;
    let device = parse_device(&args.device)?;
    let out = args.out.unwrap_or_else(|| {
        let base = default_out(&args.config);
        if args.resume { base } else { files::unused(&base) }
    });
    if args.stop_at_end_of_input {
        train::interrupt::stop_at_end_of_input();
    }
    let options =
        Options { out: out.clone(), resume: args.resume, device, max_micro_batch: args.max_micro_batch };
    let summary = train::run(&config, &options)?;
    let out = out.display();
    let next_gap = match config.task.test_gap {
        gap if gap > 0.0 => format!(" --gap {gap},{}", 2.0 * gap),
        _ => String::new(),
    };
    print(format_args!(
        "accuracy {:.2} %, {:.1} % of the Bayes ceiling {:.2} %{} ({}, {} test samples), after {:.0} s
run directory: {out}
next:
  selectivbench eval {out}{next_gap}
  selectivbench report {out}
  selectivbench data show {out}/config.yaml",
        100.0 * summary.accuracy,
        100.0 * summary.accuracy / summary.ceiling,
        100.0 * summary.ceiling,
        summary.kl.map_or(String::new(), |kl| format!(", KL {kl:.4}")),
        train::split_name(summary.split),
        summary.tests[0].evaluation.samples,
        summary.seconds,
    ))
}

/// `runs/<name>` for a configuration `<name>.yaml`; the directory itself for the one in a run directory.
fn default_out(config: &Path) -> PathBuf {
    let stem = config.file_stem().unwrap_or_default();
    let name = match config.parent().and_then(Path::file_name) {
        Some(run) if stem == "config" => run,
        _ => stem,
    };
    Path::new("runs").join(name)
}
