//! `selectivbench doctor`: whether this build computes right on this machine.

use std::iter;
use std::path::PathBuf;

use candle_core::Device;
use serde_json::json;

use super::{markdown, print, table};
use crate::check::{self, Checked, OPS, Plan, Route, models};
use crate::device::{NO_CUDA, gpu_count, parse_device};
use crate::error::nearest;
use crate::train::device_name;
use crate::{bad_input, bail_input, files};

/// Check every op and every model on this machine against the float64 path of the CPU.
///
/// Outputs and all gradients, random inputs, buffers filled with NaN before, every run twice: the second must give
/// the same bits. Without a GPU the f32 path of the CPU is checked.
#[derive(clap::Args, Debug)]
#[command(after_help = "Exit code 1 if a check fails.

Examples:
  selectivbench doctor
  selectivbench doctor --thorough --json doctor.json
  selectivbench doctor --op gated_delta_rule,gla --route bf16")]
pub struct DoctorArgs {
    /// What to check: auto, cpu or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
    /// All sizes, and training runs of 50 updates
    #[arg(long)]
    thorough: bool,
    /// Only these ops or models, or `expand`, `models` or `training`
    #[arg(long, value_delimiter = ',', value_name = "NAME,NAME,...")]
    op: Vec<String>,
    /// Only these number formats: f32, tf32, bf16
    #[arg(long, value_delimiter = ',', value_name = "ROUTE,ROUTE,...")]
    route: Vec<String>,
    /// Leave new buffers as they come, for a tool that looks for memory that nobody wrote
    #[arg(long)]
    no_poison: bool,
    /// Write every tensor's error to a file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the worst error of every op in every format to a file, as a table in Markdown
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
}

pub fn run(args: DoctorArgs) -> anyhow::Result<()> {
    let chosen = choose(&args.op)?;
    let formats = formats(&args.route)?;
    for path in args.json.iter().chain(&args.markdown) {
        files::check_writable(path)?;
    }
    let device = parse_device(&args.device)?;
    let about = describe(&device)?;
    if device.is_cpu() {
        print("checking the f32 path of the CPU against its f64 path")?;
    }

    let begin = std::time::Instant::now();
    let wanted = |name: &str| chosen.has(name);
    let plan = Plan {
        device: &device,
        routes: &formats,
        thorough: args.thorough,
        poison: !args.no_poison,
        wanted: &wanted,
    };
    let list = check::run(&plan);

    print(results(&list))?;
    if let Some(path) = &args.json {
        let all = json!({ "device": about, "passed": list.iter().all(Checked::passed), "checks": list });
        let text = serde_json::to_string_pretty(&all)? + "\n";
        files::write_atomic(path, |out| out.write_all(text.as_bytes()))?;
    }
    if let Some(path) = &args.markdown {
        let text = markdown(errors(&list, &formats));
        files::write_atomic(path, |out| out.write_all(text.as_bytes()))?;
    }
    let failed: Vec<&Checked> = list.iter().filter(|checked| !checked.passed()).collect();
    for line in failed.iter().flat_map(|checked| checked.complaints()) {
        print(line)?;
    }
    let seconds = begin.elapsed().as_secs_f64();
    if !failed.is_empty() {
        let mut ops: Vec<&str> = failed.iter().map(|checked| checked.op.as_str()).collect();
        ops.dedup();
        anyhow::bail!(
            "{} of {} checks failed on {}: {}",
            failed.len(),
            list.len(),
            device_name(&device),
            ops.join(", ")
        )
    }
    print(format_args!("all {} checks passed on {} in {seconds:.1} s", list.len(), device_name(&device)))
}

/// What `--op` names.
pub(super) struct Chosen(Vec<String>);

impl Chosen {
    pub(super) fn has(&self, name: &str) -> bool {
        self.0.is_empty() || self.0.iter().any(|chosen| chosen == name)
    }
}

pub(super) fn choose(names: &[String]) -> anyhow::Result<Chosen> {
    let ops = OPS.iter().flat_map(|op| [op.name, op.room]);
    let known: Vec<&str> = ops.chain(models::names()).chain(["expand", "models", "training"]).collect();
    for name in names {
        if !known.contains(&name.as_str()) {
            return Err(match nearest(name, known.iter().copied()) {
                Some(near) => bad_input!("--op is {name:?}; did you mean `{near}`?"),
                None => bad_input!("--op is {name:?}; there are {}", known.join(", ")),
            });
        }
    }
    Ok(Chosen(names.to_vec()))
}

fn formats(names: &[String]) -> anyhow::Result<Vec<Route>> {
    for name in names {
        if Route::ALL.iter().all(|route| route.name() != name) {
            bail_input!("--route is {name:?}; it must be f32, tf32 or bf16")
        }
    }
    let chosen = |route: &Route| names.is_empty() || names.iter().any(|name| name == route.name());
    Ok(Route::ALL.into_iter().filter(chosen).collect())
}

/// Prints what the device is, and gives it for the file.
pub(super) fn describe(device: &Device) -> anyhow::Result<serde_json::Value> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        let about = crate::cuda::about::describe(device)?;
        print(format_args!(
            "{}: {}, compute capability {}, {} multiprocessors, {:.1} GiB of memory, {:.1} GiB free",
            device_name(device),
            about.name,
            about.compute_capability,
            about.multiprocessors,
            about.memory,
            about.memory_free
        ))?;
        print(format_args!(
            "driver {} for CUDA {}; kernels compiled by CUDA {} for compute capability {}; cuBLAS {}",
            about.driver.as_deref().unwrap_or("of unknown version"),
            about.driver_cuda,
            about.toolkit,
            about.compiled_for,
            about.cublas
        ))?;
        print("number formats: f32, tf32 (matrix products of f32), bf16 (sums and states in f32)")?;
        return Ok(serde_json::to_value(about)?);
    }
    if !cfg!(feature = "cuda") {
        print(NO_CUDA)?;
    } else if gpu_count() == 0 {
        print("there is no GPU, or no NVIDIA driver for it")?;
    }
    Ok(json!({ "name": device_name(device), "threads": rayon::current_num_threads() }))
}

/// A line for every op: its worst output, and its worst gradient with its name, of all sizes in each format.
fn errors(list: &[Checked], formats: &[Route]) -> comfy_table::Table {
    let heads = formats.iter().map(|route| format!("{}: outputs, gradients", route.name()));
    let heads: Vec<String> = iter::once("op".into()).chain(heads).collect();
    let mut table = table(&heads.iter().map(String::as_str).collect::<Vec<_>>(), []);
    let mut ops: Vec<&str> = vec![];
    for checked in list {
        if !ops.contains(&checked.op.as_str()) {
            ops.push(&checked.op);
        }
    }
    for op in ops {
        let cell = |&route: &Route| {
            let of_op = || list.iter().filter(|checked| checked.op == op && checked.route == route);
            let worst = |gradient| {
                let all = of_op().filter_map(|checked| checked.worst(gradient));
                all.max_by(|a, b| a.share().total_cmp(&b.share()))
            };
            if of_op().any(|checked| checked.failure.is_some()) {
                return "FAILED".into();
            }
            match (worst(false), worst(true)) {
                (None, None) => String::new(),
                (Some(output), None) => format!("{:.1e}", output.error),
                (output, Some(gradient)) => format!(
                    "{}, {:.1e} ({})",
                    output.map_or("-".into(), |output| format!("{:.1e}", output.error)),
                    gradient.error,
                    gradient.tensor.trim_start_matches("gradient of ")
                ),
            }
        };
        table.add_row(iter::once(op.to_string()).chain(formats.iter().map(cell)));
    }
    table
}

/// A line for every case and route.
fn results(list: &[Checked]) -> comfy_table::Table {
    let mut table =
        table(&["op", "size", "route", "outputs", "gradients", "worst gradient", "verdict"], 3..5);
    for checked in list {
        let error = |gradient| checked.worst(gradient).map_or("-".into(), |t| format!("{:.1e}", t.error));
        let worst = checked.worst(true).map_or("", |t| t.tensor.trim_start_matches("gradient of "));
        let verdict = match checked {
            _ if checked.failure.is_some() => "FAILED",
            _ if checked.passed() => "ok",
            _ if checked.tensors.iter().all(|t| t.passed()) => "NOT REPEATABLE",
            _ => "WRONG",
        };
        table.add_row([
            checked.op.as_str(),
            &checked.size,
            checked.route.name(),
            &error(false),
            &error(true),
            worst,
            verdict,
        ]);
    }
    table
}
