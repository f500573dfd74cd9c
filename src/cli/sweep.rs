//! `selectivbench sweep`: many runs, each exactly once.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::time::Duration;

use serde_yaml::Value;

use super::{print, table};
use crate::bail_input;
use crate::config::load::{document, merged, shown};
use crate::config::{Layer, count};
use crate::device::{gpu_count, parse_device};
use crate::error::Interrupted;
use crate::sweep::board::{self, Counts, span};
use crate::sweep::file::{lookup, same};
use crate::sweep::ledger::{Ledger, State};
use crate::sweep::slurm;
use crate::sweep::worker::{self, Options, Outcome};
use crate::sweep::{Plan, estimate};
use crate::train;

/// Run a grid of runs, resumable, never the same run twice.
///
/// The sweep's folder keeps what is pending, running, done and failed, so any number of processes, GPUs and
/// machines that share it work on one sweep together: just give the same command again. Stop it anywhere and
/// start it again: finished runs stay, interrupted ones go on where they were. W&B sweep files of the released
/// code are read as they are.
#[derive(clap::Args, Debug)]
#[command(after_help = "A sweep file:
  base: configs/quickstart.yaml            # beside the sweep file
  config: {train: {batch: 16}}             # fields of all runs
  grid:
    model.name: [mamba2, gla]
    model.width: {from: 32, to: 128, factor: 2}
    seed: {from: 1, to: 4}
  zip:
    - {task.ambiguities: [6, 8], train.lr: [0.004, 0.002]}
  when:
    - if: {model.name: mamba2}
      set: {model.state: 16}
  exclude:
    - {model.name: gla, model.width: 128}
  slurm: {partition: gpu, gres: gpu:1, time: 04:00:00}

Examples:
  selectivbench sweep configs/sweeps/first.yaml --dry-run
  selectivbench sweep configs/sweeps/first.yaml
  selectivbench sweep configs/sweeps/task2.yaml --devices cuda:0,cuda:1 --per-device 2
  selectivbench sweep configs/sweeps/task2.yaml --only model.name=gla,mamba2 --only seed=1
  selectivbench sweep configs/sweeps/first.yaml --status
  selectivbench sweep configs/sweeps/task2.yaml --launcher slurm --slurm gres=gpu:1 --slurm workers=16
  selectivbench report runs/first --out report")]
pub struct SweepArgs {
    #[arg(value_name = "SWEEP.yaml")]
    file: PathBuf,
    /// Set a field of all runs; may be given several times
    #[arg(long, value_name = "key.path=value")]
    set: Vec<String>,
    /// The sweep's folder [default: runs/ and the sweep's name]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Where to compute: cpu, gpu (all of them), or GPUs such as cuda:0,cuda:1 [default: all GPUs, or the CPU]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    devices: Vec<String>,
    /// Runs at the same time on each device
    #[arg(long, visible_alias = "jobs", value_name = "N", default_value_t = 1)]
    per_device: usize,
    /// Only runs where a field has one of these values; several must all hold
    #[arg(long, value_name = "key.path=value[,value]")]
    only: Vec<String>,
    /// Only the i-th of n parts of the runs, i from 1 on
    #[arg(long, value_name = "i/n")]
    shard: Option<String>,
    /// Give runs that failed another try
    #[arg(long)]
    retry_failed: bool,
    /// Stop at the first run that fails
    #[arg(long)]
    fail_fast: bool,
    /// End when no run is free, without waiting for the runs of other processes
    #[arg(long)]
    no_wait: bool,
    /// Seconds without a sign of life after which a run of another machine is taken over
    #[arg(long, value_name = "SECONDS", default_value_t = 180)]
    lease: u64,
    /// Where to work: on this machine, or as the tasks of a Slurm job array, which Ctrl-C cancels
    #[arg(long, value_enum, default_value_t = Launcher::Local)]
    launcher: Launcher,
    /// Set a field of `slurm:`: partition, time, gres, cpus_per_task, mem, account, qos, workers (tasks at
    /// once), notice (seconds before the end of the time to save), setup (shell) or options (of sbatch); may
    /// be given several times
    #[arg(long, value_name = "key=value")]
    slurm: Vec<String>,
    /// Submit to Slurm and leave; the same command without it follows the jobs
    #[arg(long)]
    detach: bool,
    /// Replace Slurm tasks that died so many times in a row without a run having ended
    #[arg(long, value_name = "N", default_value_t = 3)]
    resubmit: usize,
    /// List the runs, with an estimate of time and memory, and start nothing
    #[arg(long, conflicts_with = "status")]
    dry_run: bool,
    /// Show where the sweep stands, and start nothing
    #[arg(long)]
    status: bool,
}

#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq)]
enum Launcher {
    Local,
    Slurm,
}

pub fn run(args: SweepArgs, threads: Option<usize>) -> anyhow::Result<()> {
    count("--per-device", args.per_device, 1..=256)?;
    count("--lease", args.lease as usize, 10..=1_000_000)?;
    let on_slurm = args.launcher == Launcher::Slurm;
    if !on_slurm && (args.detach || !args.slurm.is_empty()) {
        bail_input!("--slurm and --detach are for --launcher slurm; add it or leave them out")
    }
    let (mut devices, mut settings) = (args.devices.clone(), None);
    let mut plan = Plan::open(&args.file, &args.set, args.out.as_deref(), |slurm| {
        let slurm = slurm::Settings::read(slurm, &args.file.display().to_string(), &args.slurm)?;
        if on_slurm && devices.is_empty() {
            devices = vec![if slurm.gpu() { "gpu" } else { "cpu" }.into()];
        }
        // The devices of other machines cannot be looked at from here.
        if !on_slurm || args.dry_run {
            devices = here(&devices)?;
        }
        settings = on_slurm.then_some(slurm);
        Ok(devices.iter().any(|device| device != "cpu"))
    })?;
    for only in &args.only {
        keep_only(&mut plan, only)?;
    }
    if let Some(shard) = &args.shard {
        keep_shard(&mut plan, shard)?;
    }
    if plan.runs.is_empty() {
        bail_input!("no run is left of {} by --only and --shard", args.file.display())
    }
    announce(&plan);
    if args.status {
        return status(&plan, Duration::from_secs(args.lease));
    }
    if args.dry_run {
        return dry_run(&plan, &devices, args.per_device);
    }
    let outcome = match settings {
        None => work_here(&args, &plan, devices, threads)?,
        Some(settings) => match work_on_slurm(&args, &plan, &devices, threads, settings)? {
            Some(outcome) => outcome,
            None => return print("give the same command without --detach to follow the jobs"),
        },
    };
    let (counts, dir) = (outcome.counts, plan.dir.display());
    if outcome.interrupted {
        return Err(Interrupted(format!(
            "stopped: {counts}; everything is saved, give the same command again to go on"
        ))
        .into());
    }
    if counts.failed > 0 {
        let mut ledger = Ledger::open(&plan.dir, Duration::from_secs(args.lease));
        let snapshot = ledger.look()?;
        let failed = plan.runs.iter().filter(|run| snapshot.state(&run.id) == State::Failed);
        let mut reasons: Vec<String> =
            failed.map(|run| format!("\n  {}: {}", run.folder(), ledger.reason(&run.id))).collect();
        if reasons.len() > MOST_REASONS {
            reasons.truncate(MOST_REASONS);
            reasons.push(format!("\n  … all of them: {dir}/status.csv"));
        }
        anyhow::bail!(
            "{} of {} runs failed; mend the cause and add --retry-failed:{}",
            counts.failed,
            counts.total(),
            reasons.concat()
        )
    }
    print(format_args!(
        "{counts}
folder: {dir}
next:
  selectivbench report {dir} --out report"
    ))
}

/// Works on this machine.
fn work_here(
    args: &SweepArgs,
    plan: &Plan,
    devices: Vec<String>,
    threads: Option<usize>,
) -> anyhow::Result<Outcome> {
    let cores = rayon::current_num_threads();
    let threads = threads.unwrap_or((cores / (args.per_device * devices.len())).max(1));
    let options = Options {
        devices,
        per_device: args.per_device,
        threads,
        retry_failed: args.retry_failed,
        fail_fast: args.fail_fast,
        lease: Duration::from_secs(args.lease),
        wait: !args.no_wait,
    };
    worker::work(plan, &options)
}

/// Lets Slurm work; none if nobody follows it.
fn work_on_slurm(
    args: &SweepArgs,
    plan: &Plan,
    devices: &[String],
    threads: Option<usize>,
    settings: slurm::Settings,
) -> anyhow::Result<Option<Outcome>> {
    let mut command: Vec<OsString> =
        vec![std::env::current_exe()?.into(), "sweep".into(), args.file.clone().into()];
    let mut add = |option: &str, value: &OsStr| command.extend([option.into(), value.into()]);
    add("--out", plan.dir.as_os_str());
    add("--devices", devices.join(",").as_ref());
    add("--per-device", args.per_device.to_string().as_ref());
    add("--lease", args.lease.to_string().as_ref());
    let lists = [("--set", &args.set[..]), ("--only", &args.only[..]), ("--shard", args.shard.as_slice())];
    for (option, values) in lists {
        values.iter().for_each(|value| add(option, value.as_ref()));
    }
    if let Some(threads) = threads {
        add("--threads", threads.to_string().as_ref());
    }
    command.push("--no-wait".into());
    if args.fail_fast {
        command.push("--fail-fast".into());
    }
    let options = slurm::Options {
        detach: args.detach,
        resubmit: args.resubmit,
        retry_failed: args.retry_failed,
        fail_fast: args.fail_fast,
        lease: Duration::from_secs(args.lease),
    };
    slurm::launch(
        plan,
        slurm::Workers { name: plan.name.clone(), dir: plan.dir.clone(), command, settings },
        &options,
    )
}

/// Failures that are told at the end.
const MOST_REASONS: usize = 10;

/// The devices to work on, checked.
fn here(given: &[String]) -> anyhow::Result<Vec<String>> {
    let gpu = given == ["gpu"];
    if given.is_empty() || given == ["auto"] || gpu {
        return Ok(match gpu_count() {
            0 if gpu => {
                bail_input!("--devices is gpu, but no GPU can be used here; see `selectivbench devices`")
            }
            0 => vec!["cpu".into()],
            n => (0..n).map(|index| format!("cuda:{index}")).collect(),
        });
    }
    for (i, device) in given.iter().enumerate() {
        if ["auto", "gpu"].contains(&device.as_str()) || given[..i].contains(device) {
            bail_input!("--devices is {}; name each device once, as in cuda:0,cuda:1", given.join(","))
        }
        parse_device(device)?;
    }
    if given.len() > 1 && given.iter().any(|device| device == "cpu") {
        bail_input!(
            "--devices is {}; a sweep runs on GPUs or on the CPU, whose numbers differ",
            given.join(",")
        )
    }
    Ok(given.to_vec())
}

/// Keeps the runs of `key.path=value[,value]`.
fn keep_only(plan: &mut Plan, only: &str) -> anyhow::Result<()> {
    let origin = format!("--only {only}");
    let Some((path, values)) = only.split_once('=') else {
        bail_input!("{origin}: write key.path=value, for example --only model.name=gla")
    };
    let values =
        values.split(',').map(|value| document(value, &origin)).collect::<anyhow::Result<Vec<_>>>()?;
    let layer = Layer::field(path, values[0].clone(), &origin);
    merged(&[&layer])?;
    let mut known = Vec::new();
    plan.runs.retain(|run| {
        let tree = serde_yaml::to_value(&run.config).unwrap_or(Value::Null);
        let own = lookup(&tree, path).cloned().unwrap_or(Value::Null);
        let keep = values.iter().any(|value| same(&own, value));
        if !known.contains(&own) {
            known.push(own);
        }
        keep
    });
    if plan.runs.is_empty() {
        let known: Vec<String> = known.iter().map(shown).collect();
        bail_input!("{origin}: no run has that; {path} is one of {}", known.join(", "))
    }
    Ok(())
}

/// Keeps every n-th run.
fn keep_shard(plan: &mut Plan, shard: &str) -> anyhow::Result<()> {
    let parts = shard.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
    let Some((i, n)) = parts.filter(|(i, n)| (1..=*n).contains(i)) else {
        bail_input!("--shard is {shard}; it must be i/n with i from 1 to n, as in 2/4")
    };
    let mut index = 0usize;
    plan.runs.retain(|_| {
        index += 1;
        (index - 1) % n == i - 1
    });
    Ok(())
}

/// Says what the sweep consists of.
fn announce(plan: &Plan) {
    eprintln!("sweep {}: {} runs in {}", plan.name, plan.runs.len(), plan.dir.display());
    for (reason, count) in &plan.left_out {
        eprintln!("left out: {count} combinations: {reason}");
    }
    plan.notes.iter().for_each(|note| eprintln!("{note}"));
}

/// Prints where a sweep stands.
fn status(plan: &Plan, lease: Duration) -> anyhow::Result<()> {
    if !plan.dir.join("ledger").is_dir() {
        return print(format_args!("nothing was started yet: {} does not exist", plan.dir.display()));
    }
    let mut ledger = Ledger::open(&plan.dir, lease);
    let snapshot = ledger.look()?;
    let mut table = table(&["run", "state", "where or why"], []);
    for run in &plan.runs {
        match snapshot.state(&run.id) {
            State::Running { owner, device, .. } => {
                table.add_row([run.folder(), "running".into(), format!("{device} {owner}")]);
            }
            State::Failed => {
                table.add_row([run.folder(), "failed".into(), ledger.reason(&run.id)]);
            }
            State::Pending | State::Done => {}
        }
    }
    if table.row_count() > 0 {
        print(table)?;
    }
    board::write_status(plan, &ledger, &snapshot)?;
    print(format_args!(
        "{}; every run: {}",
        Counts::of(plan, &snapshot),
        plan.dir.join("status.csv").display()
    ))
}

/// Lists the runs, and what each will take.
fn dry_run(plan: &Plan, devices: &[String], per_device: usize) -> anyhow::Result<()> {
    let estimates = estimate::estimate(&plan.runs, &parse_device(&devices[0])?)?;
    let mut ledger = Ledger::open(&plan.dir, Duration::MAX);
    let snapshot = if plan.dir.join("ledger").is_dir() { ledger.look()? } else { Default::default() };
    let own = ["run", "state", "parameters", "time", "memory"];
    let columns: Vec<&str> = own.into_iter().chain(plan.varying.iter().map(String::as_str)).collect();
    let mut table = table(&columns, 2..5);
    let (mut rest, mut most) = (0.0, 0.0f64);
    for (run, estimate) in plan.runs.iter().zip(&estimates) {
        let state = snapshot.state(&run.id);
        if state != State::Done {
            rest += estimate.seconds;
        }
        most = most.max(estimate.memory.unwrap_or(0.0));
        let cells = [
            run.id[..8].to_string(),
            state.name().to_string(),
            train::count(run.parameters as f64),
            span(Duration::from_secs_f64(estimate.seconds)),
            estimate.memory.map_or("?".into(), bytes),
        ];
        table.add_row(cells.iter().chain(&run.values));
    }
    print(table)?;
    let slots = (devices.len() * per_device) as f64;
    print(format_args!(
        "{} runs, about {} on {} in all{}; memory of a run up to {}
estimated from updates of the smallest and the largest run of each model, measured on {}; nothing was started",
        plan.runs.len(),
        span(Duration::from_secs_f64(rest / devices.len() as f64)),
        devices.join(" and "),
        if slots > devices.len() as f64 { " (runs at the same time share a device)" } else { "" },
        if most > 0.0 { bytes(most) } else { "?".into() },
        devices[0],
    ))
}

/// 1.2 GiB
fn bytes(bytes: f64) -> String {
    match bytes / f64::from(1 << 20) {
        mib if mib >= 1000.0 => format!("{:.1} GiB", mib / 1024.0),
        mib => format!("{mib:.0} MiB"),
    }
}
