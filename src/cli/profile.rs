//! `selectivbench profile`: how fast ops and training steps are, beside what the device can do.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use comfy_table::Table;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::doctor::{choose, describe};
use super::{markdown, print, table};
use crate::check::{OPS, Op, Route, Scale, models};
use crate::device::parse_device;
use crate::error::nearest;
use crate::plot::Format;
use crate::profile::{Ceilings, Measured, Options, Pass, Roofline, Step, ops, step};
use crate::train::{count, device_name};
use crate::{bad_input, bail_input, config, files, plot};

/// Measure every op forward and backward, or whole training steps of a model by part.
///
/// Each op is checked first: where the check fails there is no speed. Bytes are the least that must be moved
/// (inputs read and outputs written once), operations those of the recurrent form; their shares are of a large copy
/// and a large matrix product, measured in the same call. On a GPU `host` is the time of calls that the host
/// launches kernel by kernel, `graph` that of the kernels alone.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  selectivbench profile
  selectivbench profile --op delta,gla --size all --dtype bf16 --picture roofline.svg
  selectivbench profile --model mamba2,gated_delta_net --json steps.json
  selectivbench profile --device cpu --batch 8 --size width64,width256 --markdown cpu.md")]
pub struct ProfileArgs {
    /// Only these ops, or rooms of src/ops [default: all]
    #[arg(long, value_delimiter = ',', value_name = "OP,OP,...")]
    op: Vec<String>,
    /// Training steps of these models, or of `all`; ops only if --op is given too
    #[arg(long, value_delimiter = ',', value_name = "MODEL,MODEL,...")]
    model: Vec<String>,
    /// What to measure: auto, cpu or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
    /// Sizes: width64, width256, width1024 (64 sequences of 400 steps), long1 (one of 32,768), long8 (8 of 2,048), or
    /// all
    #[arg(long, default_value = "width256", value_delimiter = ',', value_name = "SIZE,SIZE,...")]
    size: Vec<String>,
    /// Sequences, in place of those of the size
    #[arg(long, value_name = "N")]
    batch: Option<NonZeroUsize>,
    /// Number format: f32, tf32 or bf16 [default: bf16 on a GPU, f32 on the CPU]
    #[arg(long, value_name = "FORMAT")]
    dtype: Option<String>,
    /// Any field of a configuration for training steps, such as model.state=64 or train.recompute=layers
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Do not measure the CPU beside a GPU
    #[arg(long)]
    no_cpu: bool,
    /// Write everything to a file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the tables to a file, in Markdown
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Draw the roofline to a file, .svg or .png
    #[arg(long, value_name = "FILE")]
    picture: Option<PathBuf>,
}

pub fn run(args: ProfileArgs) -> anyhow::Result<()> {
    let chosen = choose(&args.op)?;
    let models = chosen_models(&args.model)?;
    let scales = chosen_scales(&args.size)?;
    let picture =
        args.picture.as_deref().map(|path| Ok::<_, anyhow::Error>((path, Format::of("--picture", path)?)));
    let picture: Option<(&Path, Format)> = picture.transpose()?;
    for path in args.json.iter().chain(&args.markdown).chain(&args.picture) {
        files::check_writable(path)?;
    }
    let config = config::load::parse("", "the configuration", &args.set)?;
    let device = parse_device(&args.device)?;
    let route = match args.dtype.as_deref() {
        None if device.is_cuda() => Route::Bf16,
        None => Route::F32,
        Some(name) => match Route::ALL.into_iter().find(|route| route.name() == name) {
            Some(route) if route == Route::F32 || device.is_cuda() => route,
            Some(_) => bail_input!("--dtype is {name}, but the CPU computes in f32"),
            None => bail_input!("--dtype is {name:?}; it must be f32, tf32 or bf16"),
        },
    };
    let about = describe(&device)?;
    let ceilings = Ceilings::measure(&device, &[route])?;
    let copy = format!("copy: {}B/s, read and written", count(ceilings.copy));
    let products = ceilings.matmul.iter();
    let products =
        products.map(|(route, rate)| format!("matrix product in {}: {}FLOP/s", route.name(), count(*rate)));
    let rates: Vec<String> = std::iter::once(copy).chain(products).collect();
    print(rates.join("\n"))?;
    let head = format!("{}; {}\n\n", about["name"].as_str().unwrap_or_default(), rates.join("; "));

    let batch = args.batch.map(NonZeroUsize::get);
    let options = Options { device: device.clone(), route, cpu: !args.no_cpu, batch };
    let (mut measured, mut steps): (Vec<Measured>, Vec<Step>) = (vec![], vec![]);
    let mut failures: Vec<String> = vec![];
    // After every measurement: who interrupts keeps what there is.
    let save = |measured: &[Measured], steps: &[Step], failures: &[String]| -> anyhow::Result<()> {
        if let Some(path) = &args.json {
            let all = json!({
                "device": about,
                "format": route,
                "ceilings": ceilings,
                "ops": measured,
                "steps": steps,
                "failures": failures,
            });
            let text = serde_json::to_string_pretty(&all)? + "\n";
            files::write_atomic(path, |out| out.write_all(text.as_bytes()))?;
        }
        if let Some(path) = &args.markdown {
            let ops = (!measured.is_empty()).then(|| op_table(measured));
            let whole = (!steps.is_empty()).then(|| step_table(steps));
            let tables = ops.into_iter().chain(steps.iter().map(parts_table)).chain(whole);
            let text = head.clone() + &tables.map(markdown).collect::<Vec<_>>().join("\n");
            files::write_atomic(path, |out| out.write_all(text.as_bytes()))?;
        }
        Ok(())
    };
    if !args.op.is_empty() || models.is_empty() {
        let wanted: Vec<&Op> = OPS.iter().filter(|op| chosen.has(op.name) || chosen.has(op.room)).collect();
        let bar = ProgressBar::new((scales.len() * wanted.len()) as u64)
            .with_style(ProgressStyle::with_template("{wide_bar} {pos}/{len} {msg}")?);
        for &scale in &scales {
            for op in &wanted {
                bar.set_message(format!("{} {}", op.name, scale.name()));
                let new = ops(op, scale, &options, &ceilings);
                failures.extend(new.iter().flat_map(|op| op.failure.clone()));
                measured.extend(new);
                save(&measured, &steps, &failures)?;
                bar.inc(1);
            }
        }
        bar.finish_and_clear();
        print(op_table(&measured))?;
    }
    for &model in &models {
        for width in scales.iter().filter_map(|scale| scale.model_width()) {
            match step(model, width, &options, &config) {
                Ok(step) => {
                    print(parts_table(&step))?;
                    steps.push(step);
                }
                Err(error) => failures.push(format!("{model} at width {width}: {error:#}")),
            }
            save(&measured, &steps, &failures)?;
        }
    }
    if !steps.is_empty() {
        print(step_table(&steps))?;
    }
    if let Some((path, format)) = picture {
        let sizes: Vec<&str> = scales.iter().map(|scale| scale.name()).collect();
        let title = format!("{} in {}, {}", device_name(&device), route.name(), sizes.join(", "));
        plot::save(&Roofline { title: &title, ops: &measured, ceilings: &ceilings }, path, format)?;
    }
    for line in &failures {
        print(line)?;
    }
    if !failures.is_empty() {
        anyhow::bail!("not everything could be measured: {} complaints, above", failures.len())
    }
    Ok(())
}

fn chosen_models(names: &[String]) -> anyhow::Result<Vec<&'static str>> {
    if names.iter().any(|name| name == "all") {
        return Ok(models::names().collect());
    }
    names.iter().map(|name| Ok(crate::model::find(name)?.name)).collect()
}

fn chosen_scales(names: &[String]) -> anyhow::Result<Vec<Scale>> {
    if names.iter().any(|name| name == "all") {
        return Ok(Scale::ALL.to_vec());
    }
    let known = Scale::ALL.map(Scale::name);
    let find = |name: &String| match Scale::ALL.into_iter().find(|scale| scale.name() == name) {
        Some(scale) => Ok(scale),
        None => Err(match nearest(name, known) {
            Some(near) => bad_input!("--size is {name:?}; did you mean `{near}`?"),
            None => bad_input!("--size is {name:?}; it must be {} or all", known.join(", ")),
        }),
    };
    names.iter().map(find).collect()
}

/// Seconds as milliseconds, with three digits that count.
fn ms(seconds: f64) -> String {
    let ms = 1e3 * seconds;
    let digits = (2.0 - ms.max(1e-4).log10().floor()).clamp(0.0, 4.0) as usize;
    format!("{ms:.digits$}")
}

fn op_table(measured: &[Measured]) -> Table {
    let mut table = table(
        &[
            "op",
            "size",
            "format",
            "pass",
            "error",
            "ms host",
            "ms graph",
            "spread",
            "tokens/s",
            "bytes/s",
            "FLOP/s",
            "of copy",
            "of matmul",
            "CPU ms",
            "faster",
        ],
        4..15,
    );
    for op in measured {
        let passes = [("forward", &op.forward, op.output_error), ("both", &op.both, op.gradient_error)];
        for (name, pass, error) in passes {
            let error = error.map_or("-".into(), |error| format!("{error:.1e}"));
            let head = [op.op.to_string(), op.size.clone(), op.route.name().into(), name.into(), error];
            match pass {
                Some(pass) => table.add_row(head.into_iter().chain(cells(pass))),
                None if !op.failure.is_empty() => {
                    table.add_row(head.into_iter().chain(["FAILED".to_string()]))
                }
                None => continue,
            };
        }
    }
    table
}

fn cells(pass: &Pass) -> [String; 10] {
    let percent = |share: f64| format!("{:.0} %", 100.0 * share);
    let optional = |x: Option<String>| x.unwrap_or("-".into());
    [
        ms(pass.host.median),
        optional(pass.graph.map(|graph| ms(graph.median))),
        percent(pass.graph.unwrap_or(pass.host).spread()),
        count(pass.tokens_per_s),
        count(pass.bytes_per_s),
        count(pass.operations_per_s),
        percent(pass.share_of_copy),
        percent(pass.share_of_matmul),
        optional(pass.cpu.map(ms)),
        optional(pass.cpu.map(|cpu| format!("{:.0}x", cpu / pass.seconds()))),
    ]
}

fn step_table(steps: &[Step]) -> Table {
    let mut table = table(
        &[
            "model",
            "width",
            "format",
            "parameters",
            "batch",
            "ms",
            "spread",
            "on the GPU",
            "tokens/s",
            "data ms",
            "peak GiB",
        ],
        [1, 3, 4, 5, 6, 7, 8, 9, 10],
    );
    for step in steps {
        table.add_row([
            step.model.to_string(),
            step.width.to_string(),
            step.route.name().into(),
            count(step.parameters as f64),
            format!("{} x {}", step.batch, step.steps),
            ms(step.update.median),
            format!("{:.0} %", 100.0 * step.update.spread()),
            step.gpu.map_or("-".into(), ms),
            count(step.tokens_per_s),
            ms(step.data),
            step.peak_memory.map_or("-".into(), |bytes| format!("{:.2}", bytes as f64 / f64::from(1 << 30))),
        ]);
    }
    table
}

/// Where a step's time goes.
fn parts_table(step: &Step) -> Table {
    let name = format!("{} at width {}", step.model, step.width);
    let mut table = table(&[&name, "", "runs", "ms", "share"], 2..5);
    let whole: f64 = step.parts.iter().filter(|part| part.kind == "part").map(|part| part.seconds).sum();
    for part in &step.parts {
        table.add_row([
            part.name.clone(),
            part.kind.clone(),
            part.runs.to_string(),
            ms(part.seconds),
            format!("{:.1} %", 100.0 * part.seconds / whole),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::ms;

    #[test]
    fn times_have_three_digits() {
        assert_eq!([0.123456, 0.0123456, 1.23456e-3, 1.23456e-5].map(ms), ["123", "12.3", "1.23", "0.0123"]);
    }
}
