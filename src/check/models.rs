//! Whole models: loss and every gradient of a small stack, and training that repeats to the bit.

use std::collections::HashMap;
use std::time::Instant;

use anyhow::Context as _;
use candle_core::{DType, Device, Result, Tensor};

use super::case::{Named, Place, Results, Route};
use super::loss::Loss;
use super::{Checked, Compared, compare, differing, first_line, guarded};
use crate::config::load::parse;
use crate::config::{Config, ModelConfig};
use crate::model::{Context, DropoutKey, Input, MODELS, RecNet};
use crate::ops::Arg;
use crate::ops::head::{PAD, Targets};
use crate::ops::philox::{philox4x32, unit_f32};
use crate::task::{BLANK, Part, Task};
use crate::train::evaluate::{EvalPlan, evaluate};
use crate::train::trainer::Trainer;

/// Gradients of whole models that may be off by more than [`gradient_tolerance`] in bf16: those of few values that
/// sum over all steps with signs that cancel. The allowances are one and a half times what the authors' kernels
/// show on the same layers and an H100 (their loss and outputs are off by 1e-2), rounded up.
const BF16_EXCEPTIONS: &[(&str, f64)] = &[
    // The decay's low rank projection sees the whole state through one number a channel.
    (".gk_proj.", 0.25),
    // Turned and normed queries and keys: most of the gradient along the row cancels.
    (".q_norm.weight", 0.15),
    (".k_norm.weight", 0.15),
    // The softmax does not see a constant added to its keys: what is left of this gradient is small.
    (".k_proj.bias", 0.15),
    // A norm follows what a query reads: the part of the gradient that would only scale it cancels.
    (".q_proj.weight", 0.15),
    (".q_conv1d.weight", 0.15),
    (".k_proj.weight", 0.15),
    (".k_conv1d.weight", 0.15),
    // One number a head or channel, summed over all steps.
    (".A_log", 0.1),
    (".f_proj.", 0.1),
    (".dt_bias", 0.1),
    (".dt_proj.bias", 0.1),
    (".a_proj.weight", 0.1),
    (".b_proj.weight", 0.1),
    (".b_proj.bias", 0.1),
    (".lambda_params", 0.1),
];

/// How far the gradient of a parameter of a whole model may be off.
fn gradient_tolerance(model: &str, param: &str, route: Route) -> f64 {
    // What is rounded before it, the systems of a mesa layer multiply by their condition numbers.
    let more = match (route, model) {
        (_, "mesa_net") => 3.0,
        (Route::F32, _) => 1.0,
        // A norm before every mixer and MLP: most of a gradient along its row cancels.
        (Route::Bf16, _) if model.contains("model.block=layered") => 2.0,
        _ => 1.0,
    };
    let wide = BF16_EXCEPTIONS.iter().find(|(part, _)| param.contains(part));
    let tolerance = match (route, wide) {
        (Route::F32, _) => 2e-5,
        (Route::Tf32, Some((_, tolerance))) => tolerance / 4.0,
        (Route::Tf32, None) => 1e-2,
        (Route::Bf16, Some((_, tolerance))) => *tolerance,
        (Route::Bf16, None) => 4e-2,
    };
    more * tolerance
}

const FEATURES: usize = 11;
const CLASSES: usize = 30;
const BATCH: usize = 2;
const STEPS: usize = 70;

/// Models that differ from those of the registry by fields of the configuration, which stand behind the name.
pub const VARIANTS: &[&str] = &[
    "gla model.block=layered",
    "gated_delta_net model.block=layered",
    "gated_delta_product model.delta_rule=off",
    "fox model.block=layered model.output_gate=on model.qk_norm=on",
];

/// The model of a variant.
pub fn model_of(name: &str) -> &str {
    name.split_once(' ').map_or(name, |(model, _)| model)
}

/// The fields that choose a model or a variant of one.
fn sets(name: &str) -> Vec<String> {
    format!("model.name={name}").split(' ').map(String::from).collect()
}

fn model_config(name: &str) -> anyhow::Result<ModelConfig> {
    // Heads of 64, for which there are kernels of their own.
    let text = "model: {layers: 2, width: 128, heads: 2, state: 16, dropout: 0.2, conv: 4, householders: 2}";
    Ok(parse(text, "the check", &sets(name))?.model)
}

/// Weights by name, moved away from the zeros and ones that they begin with, as the route can hold them.
fn weights(config: &ModelConfig, route: Route) -> anyhow::Result<HashMap<String, Tensor>> {
    let net = RecNet::new(config, FEATURES, CLASSES, 3, DType::F32, &Device::Cpu)?;
    let trained: Vec<&str> = net.params().params().iter().map(|param| param.name()).collect();
    (net.params().named().enumerate())
        .map(|(i, param)| {
            let mut value = param.value();
            if trained.contains(&param.name()) && value.rank() == 1 {
                let noise = |at| 0.4 * unit_f32(philox4x32([at as u32, i as u32, 0, 0], [5, 9])[0]) - 0.2;
                let noise: Vec<f32> = (0..value.elem_count()).map(noise).collect();
                value = (&value + Tensor::from_vec(noise, value.shape(), &Device::Cpu)?)?;
            }
            if route == Route::Bf16 && value.rank() == 2 {
                value = value.to_dtype(DType::BF16)?.to_dtype(DType::F32)?;
            }
            Ok((param.name().to_string(), value.copy()?))
        })
        .collect()
}

/// Loss and gradients of one batch with dropout.
fn run(config: &ModelConfig, weights: &HashMap<String, Tensor>, place: &Place) -> anyhow::Result<Results> {
    let (device, dtype) = match place {
        Place::Reference(_) => (&Device::Cpu, DType::F64),
        Place::On(device, route) => (device, route.dtype()),
    };
    let net = RecNet::new(config, FEATURES, CLASSES, 1, dtype, device)?;
    net.load(weights)?;
    net.params().zero_grad()?;
    let symbols: Vec<u32> = (0..BATCH * STEPS)
        .map(|i| philox4x32([i as u32, 0, 0, 0], [3, 1])[0])
        .map(|x| if x % 3 == 0 { BLANK } else { (x >> 8) % FEATURES as u32 })
        .collect();
    let ids = Tensor::from_vec(symbols.clone(), (BATCH, STEPS), device)?;
    let padded = |i: usize| i / STEPS == BATCH - 1 && i % STEPS >= STEPS - 9;
    let targets = Targets {
        labels: symbols.iter().map(|x| (x ^ 0x55) % CLASSES as u32).collect(),
        element: (0..BATCH * STEPS).map(|i| if padded(i) { PAD } else { (i % STEPS / 2) as u32 }).collect(),
        batch: BATCH,
        steps: STEPS,
        elements: STEPS / 2,
    };
    let dropout = DropoutKey { p: config.dropout, key: [1, 2], first: 0 };
    let mut context = Context { dropout: Some(dropout), ..Context::default() };
    let hidden = net.hidden(Input::Ids(&ids), &mut context)?;
    let (weight, bias) = net.decoder();
    let loss = Loss::new(targets).run(&[Arg::from(&hidden), Arg::from(weight), Arg::from(bias)])?.remove(0);
    loss.backward()?;
    let named = |name: &str, value: &Tensor| {
        Ok::<_, candle_core::Error>(Named { name: name.into(), value: value.to_device(&Device::Cpu)? })
    };
    let grads = net.params().params().iter().map(|param| named(param.name(), &param.grad()));
    Ok(Results { outputs: vec![named("loss", &loss)?], grads: grads.collect::<Result<_>>()? })
}

fn row(op: String, size: String, route: Route) -> Checked {
    Checked { op, size, route, tensors: vec![], unrepeatable: vec![], failure: None, seconds: 0.0 }
}

/// A small stack of a model on a device against the CPU in f64.
pub fn check_model(name: &str, device: &Device, route: Route) -> Checked {
    let begin = Instant::now();
    let size = format!("B{BATCH} T{STEPS} 2 layers, width 128");
    let mut checked = row(format!("model {name}"), size, route);
    let outcome = guarded(|| {
        Ok((|| -> anyhow::Result<(Vec<Compared>, Vec<String>)> {
            let config = model_config(name)?;
            let weights = weights(&config, route)?;
            let want = run(&config, &weights, &Place::Reference(route))?;
            let place = Place::On(device.clone(), route);
            route.select();
            let runs = (run(&config, &weights, &place), run(&config, &weights, &place));
            Route::F32.select();
            let (first, second) = (runs.0?, runs.1?);
            let mut tensors = vec![];
            for (got, want) in first.outputs.iter().zip(&want.outputs) {
                let allowed = super::tolerance("model", &got.name, route);
                tensors.push(compare(got.name.clone(), &got.value, &want.value, allowed)?);
            }
            for (got, want) in first.grads.iter().zip(&want.grads) {
                let allowed = gradient_tolerance(name, &got.name, route);
                tensors.push(compare(format!("gradient of {}", got.name), &got.value, &want.value, allowed)?);
            }
            let mut unrepeatable = differing(&first.outputs, &second.outputs)?;
            unrepeatable.extend(differing(&first.grads, &second.grads)?);
            Ok((tensors, unrepeatable))
        })())
    });
    Route::F32.select();
    match outcome.and_then(|inner| inner) {
        Ok((tensors, unrepeatable)) => (checked.tensors, checked.unrepeatable) = (tensors, unrepeatable),
        Err(error) => checked.failure = Some(first_line(&format!("{error:#}"))),
    }
    checked.seconds = begin.elapsed().as_secs_f64();
    checked
}

/// Losses of `updates` updates on a device, and the weights behind them.
fn train(name: &str, device: &Device, route: Route, updates: usize) -> anyhow::Result<(Vec<f64>, Tensor)> {
    const BATCH: usize = 16;
    let set = [sets(name), vec![format!("train.precision={}", route.name())]].concat();
    let (config, task) = small_task(&set)?;
    let mut trainer = Trainer::new(&config, task.features(), task.classes(), device)?;
    // As a run feeds it: packed samples to a GPU.
    let feed = trainer.feed();
    let mut losses = vec![];
    for update in 0..updates {
        let samples = task.samples(Part::Train, (BATCH * update) as u64, BATCH, None)?;
        losses.push(trainer.update_with(feed(samples)?)?.loss);
    }
    Ok((losses, trainer.net().params().value().to_device(&Device::Cpu)?))
}

/// Trains a model twice from one seed: the same bits; and on the CPU in f32, which it must follow.
pub fn check_training(name: &str, device: &Device, route: Route, updates: usize) -> Checked {
    /// Updates over which the losses of two devices stay together.
    const TOGETHER: usize = 10;
    let begin = Instant::now();
    let mut checked = row(format!("training {name}"), format!("{updates} updates, twice"), route);
    let allowed = if route == Route::F32 { 1e-4 } else { 1e-2 };
    let outcome = guarded(|| {
        Ok((|| {
            let first = train(name, device, route, updates)?;
            let second = train(name, device, route, updates)?;
            let (want, _) = train(name, &Device::Cpu, Route::F32, updates.min(TOGETHER))?;
            anyhow::Ok((first, second, want))
        })())
    });
    Route::F32.select();
    match outcome.and_then(|inner| inner).and_then(|(first, second, want)| {
        let losses = |losses: &[f64]| Tensor::new(&losses[..want.len()], &Device::Cpu);
        let compared = compare("loss beside the CPU".into(), &losses(&first.0)?, &losses(&want)?, allowed)?;
        let named = |value: Tensor| [Named { name: "weights".into(), value }];
        let mut unrepeatable = differing(&named(first.1), &named(second.1))?;
        if first.0.iter().zip(&second.0).any(|(a, b)| a.to_bits() != b.to_bits()) {
            unrepeatable.push("loss".into());
        }
        Ok((vec![compared], unrepeatable))
    }) {
        Ok((tensors, unrepeatable)) => (checked.tensors, checked.unrepeatable) = (tensors, unrepeatable),
        Err(error) => checked.failure = Some(first_line(&format!("{error:#}"))),
    }
    checked.seconds = begin.elapsed().as_secs_f64();
    checked
}

/// A task of few states; `set` adds to it.
fn small_task(set: &[String]) -> anyhow::Result<(Config, Task)> {
    let text = "
seed: 5
task: {preset: task2, ambiguities: 8, depth: 4, length: 20, samples: {train: 8000, test: 500}}
model: {layers: 2, width: 64, state: 32, dropout: 0.1}
train: {batch: 16, warmup: 10}";
    let config = parse(text, "the check", set)?;
    let task = Task::new(&config.task, config.seed)?;
    Ok((config, task))
}

/// Evaluates a fresh model in pieces with carried state, on a device and on the CPU.
pub fn check_evaluation(name: &str, device: &Device, route: Route) -> Checked {
    let begin = Instant::now();
    let plan = EvalPlan { part: Part::Test, samples: 12, gap: Some(0.7), batch: 5, chunk: 37 };
    let mut checked = row(format!("evaluation {name}"), "12 samples in pieces of 37 steps".into(), route);
    let outcome = guarded(|| {
        Ok((|| {
            let (config, task) = small_task(&sets(name))?;
            let run = |dtype, device: &Device| {
                let net = RecNet::new(&config.model, task.features(), task.classes(), 1, dtype, device)?;
                evaluate(&net, &task, &plan, |_| true)?.context("the evaluation ended early")
            };
            let want = run(DType::F32, &Device::Cpu)?;
            route.select();
            let got = run(route.dtype(), device);
            Route::F32.select();
            anyhow::Ok((got?, want))
        })())
    });
    Route::F32.select();
    match outcome.and_then(|inner| inner).and_then(|(got, want)| {
        let pair = |x: f64| Tensor::new(&[x], &Device::Cpu);
        let allowed = super::tolerance("evaluation", "loss", route);
        let loss = compare("loss".into(), &pair(got.loss)?, &pair(want.loss)?, allowed)?;
        // A vote between two classes that are as near as the rounding may go either way.
        let near = if route == Route::F32 { 0.02 } else { 0.1 };
        let apart = (got.accuracy - want.accuracy).abs();
        let accuracy = Compared { error: apart, tolerance: near, ..loss.clone() };
        let accuracy =
            Compared { got: got.accuracy, want: want.accuracy, tensor: "accuracy".into(), ..accuracy };
        if (got.tokens, got.timesteps) != (want.tokens, want.timesteps) {
            anyhow::bail!("{} tokens were counted, not {}", got.tokens, want.tokens)
        }
        Ok(vec![loss, accuracy])
    }) {
        Ok(tensors) => checked.tensors = tensors,
        Err(error) => checked.failure = Some(first_line(&format!("{error:#}"))),
    }
    checked.seconds = begin.elapsed().as_secs_f64();
    checked
}

/// Recordings of a task's symbols, three in each part, of 5 frames and 19 channels.
#[cfg(feature = "cuda")]
fn recordings(task: &Task, counts: bool) -> anyhow::Result<crate::task::recordings::Recordings> {
    use crate::ops::expand::Values;
    const FRAMES: usize = 5;
    const CHANNELS: usize = 19;
    let symbols = task.grammar().alphabet();
    let rows = 9 * symbols * FRAMES;
    let random = |i: usize| philox4x32([i as u32, 0, 0, 0], [7, 3])[0];
    let values = if counts {
        let (mut starts, mut entries) = (vec![0], vec![]);
        for row in 0..rows {
            let channels = (0..CHANNELS).map(|channel| (channel as u32, random(row * CHANNELS + channel)));
            entries.extend(
                channels.filter(|(_, x)| x.is_multiple_of(4)).map(|(c, x)| (c << 16) | ((x >> 8) % 9)),
            );
            starts.push(entries.len() as u32);
        }
        Values::Counts { starts, entries }
    } else {
        Values::Dense((0..rows * CHANNELS).map(|i| 4.0 * unit_f32(random(i)) - 2.0).collect())
    };
    let counts = std::array::from_fn(|_| vec![3; symbols]);
    crate::task::recordings::Recordings::new(FRAMES, CHANNELS, counts, values)
}

/// Samples spread over timesteps on a GPU, window by window, against the CPU: symbols or recordings, labels, elements,
/// noise.
#[cfg(feature = "cuda")]
pub fn check_expansion(device: &Device) -> Vec<Checked> {
    use crate::ops::expand::DeviceSamples;
    let settings: [(&str, &[&str]); 7] = [
        ("gaps", &[]),
        ("gaps and noise", &["task.noise=0.7"]),
        ("distractors", &["task.gap.kind=distractor", "task.gap.high=2"]),
        (
            "distractors and noise, as released",
            &["task.gap.kind=distractor", "task.gap.high=2", "task.noise=0.7", "task.split=as-released"],
        ),
        ("recordings", &["task.noise=0"]),
        ("counts and noise", &["task.noise=0.7"]),
        ("recordings as distractors", &["task.gap.kind=distractor", "task.gap.high=0.4", "task.noise=0.7"]),
    ];
    let check = |(size, set): (&str, &[&str])| {
        let begin = Instant::now();
        let mut checked = row("expand".into(), size.into(), Route::F32);
        let outcome = guarded(|| {
            Ok((|| {
                let set: Vec<String> = set.iter().map(|set| set.to_string()).collect();
                let (_, mut task) = small_task(&set)?;
                if size.starts_with("recordings") || size.starts_with("counts") {
                    let recordings = recordings(&task, size.starts_with("counts"))?;
                    task = task.with(recordings)?;
                }
                let samples = || task.samples(Part::Train, 3, 5, None);
                let mut want = samples()?;
                let mut got = DeviceSamples::upload(samples()?.compact()?, DType::F32, device)?;
                let mut tensors = vec![];
                let mut window = 0;
                while let Some(want) = want.next_window(23) {
                    let got = got.next_window(23)?.context("the GPU has fewer windows")?;
                    let shape = (want.batch, want.steps);
                    let mut same = |name: &str, got: &Tensor, want: &Tensor| {
                        let got = got.to_device(&Device::Cpu)?;
                        tensors.push(compare(format!("{name} of window {window}"), &got, want, 0.0)?);
                        anyhow::Ok(())
                    };
                    let host = |values: &[u32]| Tensor::from_slice(values, shape, &Device::Cpu);
                    same("symbols", &got.ids, &want.ids(&Device::Cpu)?)?;
                    same("elements", &got.element, &host(&want.element)?)?;
                    // What stands on padding is of no consequence.
                    let element = &want.element;
                    let kept = |labels: &[u32]| {
                        let kept = |(label, element): (&u32, &u32)| if *element == PAD { 0 } else { *label };
                        labels.iter().zip(element).map(kept).collect::<Vec<u32>>()
                    };
                    let labels = got.labels.flatten_all()?.to_vec1::<u32>()?;
                    same("labels", &host(&kept(&labels))?, &host(&kept(&want.labels))?)?;
                    if want.is_dense() {
                        let shape = (want.batch, want.steps, want.features);
                        let dense = got.dense.context("the GPU has no dense input")?;
                        same("input", &dense, &Tensor::from_vec(want.dense(), shape, &Device::Cpu)?)?;
                    }
                    window += 1;
                }
                anyhow::Ok(tensors)
            })())
        });
        match outcome.and_then(|inner| inner) {
            Ok(tensors) => checked.tensors = tensors,
            Err(error) => checked.failure = Some(first_line(&format!("{error:#}"))),
        }
        checked.seconds = begin.elapsed().as_secs_f64();
        checked
    };
    settings.into_iter().map(check).collect()
}

/// The models, in the order of the registry.
pub fn names() -> impl Iterator<Item = &'static str> {
    MODELS.iter().map(|model| model.name)
}
