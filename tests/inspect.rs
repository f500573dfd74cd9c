//! What layers tell of themselves is what their weights say; `inspect` on every model, and on long samples.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use assert_cmd::cargo::cargo_bin_cmd;
use candle_core::{DType, Device, Tensor};
use selectivbench::config::Config;
use selectivbench::config::load::parse;
use selectivbench::inspect::{inspect, window};
use selectivbench::model::notes::{Quantity, age};
use selectivbench::model::{Context, Input, MODELS, Notes, RecNet};
use selectivbench::task::{Part, Task};
use selectivbench::train::evaluate::{EvalPlan, evaluate};
use selectivbench::train::trainer::Trainer;
use serde_json::Value;

const TINY: &str = "
seed: 3
task:
  preset: task2
  ambiguities: 4
  depth: 3
  length: 12
  gap: {low: 0.1, high: 0.3}
  test_gap: 0.2
  samples: {train: 160, validation: 20, test: 40}
model: {layers: 2, width: 16, state: 8, householders: 3}
train: {batch: 8, warmup: 10, eval_every: 160}
";

const SYMBOLS: [u32; 7] = [1, 9, 3, 9, 9, 2, 1];
const FEATURES: usize = 5;

fn config(model: &str) -> Config {
    parse(TINY, "test", &[format!("model.name={model}")]).unwrap()
}

fn net(model: &str) -> RecNet {
    RecNet::new(&config(model).model, FEATURES, 13, 7, DType::F32, &Device::Cpu).unwrap()
}

/// What the layers tell of the steps `window`, in pieces of `piece` steps.
fn told(net: &RecNet, window: std::ops::Range<usize>, piece: usize) -> Vec<Quantity> {
    let mut notes = Notes::new(window);
    let mut context = Context::streaming();
    for symbols in SYMBOLS.chunks(piece) {
        let ids = Tensor::from_slice(symbols, (1, symbols.len()), &Device::Cpu).unwrap();
        net.inspect(Input::Ids(&ids), &mut context, &mut notes).unwrap();
    }
    notes.finish()
}

/// The parameters of a model in f64, and the sums that its first layer begins with.
struct Weights(HashMap<String, (Vec<f64>, usize)>);

impl Weights {
    fn of(net: &RecNet) -> Self {
        let entry = |tensor: &Tensor| {
            let columns = *tensor.dims().last().unwrap();
            (tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap(), columns)
        };
        Self(net.params().named().map(|p| (p.name().to_string(), entry(&p.value()))).collect())
    }

    fn vector(&self, name: &str) -> &[f64] {
        &self.0.get(name).unwrap_or_else(|| panic!("no parameter {name}")).0
    }

    /// Rows `rows` of a matrix times `x`.
    fn times(&self, name: &str, rows: std::ops::Range<usize>, x: &[f64]) -> Vec<f64> {
        let (values, columns) = &self.0[name];
        let dot = |row: usize| values[row * columns..][..*columns].iter().zip(x).map(|(w, x)| w * x).sum();
        rows.map(dot).collect()
    }

    /// The input of the first layer at every step.
    fn encoded(&self) -> Vec<Vec<f64>> {
        let bias = self.vector("encoder.bias");
        let column = |id: u32| {
            let (values, columns) = &self.0["encoder.weight"];
            let weight =
                |row: usize| if id < FEATURES as u32 { values[row * columns + id as usize] } else { 0.0 };
            (0..bias.len()).map(|row| weight(row) + bias[row]).collect()
        };
        SYMBOLS.into_iter().map(column).collect()
    }
}

fn softplus(x: f64) -> f64 {
    x.exp().ln_1p()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn silu(x: &f64) -> f64 {
    x * sigmoid(*x)
}

/// Compares a quantity of the first layer with `want(step)`, row after row and channel after channel.
fn check(model: &str, told: &[Quantity], name: &str, want: impl Fn(usize) -> Vec<f64>) {
    let quantity = told.iter().find(|q| q.layer == 0 && q.kind.name == name).expect(name);
    assert_eq!(quantity.steps(), SYMBOLS.len());
    for t in 0..SYMBOLS.len() {
        let got: Vec<f32> = (0..quantity.rows).flat_map(|row| quantity.at(t, row)).copied().collect();
        let want = want(t);
        assert_eq!(got.len(), want.len(), "{model}: {name}");
        for (got, want) in got.iter().zip(&want) {
            let error = (f64::from(*got) - want).abs();
            assert!(
                error < 2e-5 * want.abs().max(1e-2),
                "{model}: {name} at step {t}: {got}, by hand {want}"
            );
        }
    }
}

#[test]
fn layers_tell_what_their_weights_say() {
    const WIDTH: usize = 16;
    const HEADS: usize = 4;
    let weights_of = |model: &str| {
        let net = net(model);
        let weights = Weights::of(&net);
        (told(&net, 0..SYMBOLS.len(), SYMBOLS.len()), weights.encoded(), weights)
    };
    for (model, steps, scale) in
        [("delta_net", 1, 1.0), ("gated_delta_net", 1, 1.0), ("gated_delta_product", 3, 2.0)]
    {
        let (told, x, w) = weights_of(model);
        // As projected: step by step, in each the heads; as told: head by head, in each the steps.
        check(model, &told, "beta", |t| {
            let beta = w.times("layers.0.b_proj.weight", 0..steps * HEADS, &x[t]);
            let told = (0..HEADS).flat_map(|head| (0..steps).map(move |step| step * HEADS + head));
            told.map(|at| scale * sigmoid(beta[at])).collect()
        });
        if model == "delta_net" {
            continue;
        }
        check(model, &told, "alpha", |t| {
            let a = w.times("layers.0.a_proj.weight", 0..HEADS, &x[t]);
            let (rates, bias) = (w.vector("layers.0.A_log"), w.vector("layers.0.dt_bias"));
            (0..HEADS).map(|h| (-rates[h].exp() * softplus(a[h] + bias[h])).exp()).collect()
        });
        check(model, &told, "output_gate", |t| {
            w.times("layers.0.g_proj.weight", 0..2 * WIDTH, &x[t]).iter().map(silu).collect()
        });
    }

    let (told, x, w) = weights_of("gla");
    check("gla", &told, "decay", |t| {
        let low = w.times("layers.0.gk_proj.0.weight", 0..16, &x[t]);
        let g = w.times("layers.0.gk_proj.1.weight", 0..WIDTH, &low);
        let bias = w.vector("layers.0.gk_proj.1.bias");
        (0..WIDTH).map(|i| sigmoid(g[i] + bias[i]).powf(1.0 / 16.0)).collect()
    });
    check("gla", &told, "output_gate", |t| {
        w.times("layers.0.g_proj.weight", 0..2 * WIDTH, &x[t]).iter().map(silu).collect()
    });

    let (told, x, w) = weights_of("fox");
    check("fox", &told, "decay", |t| {
        let f = w.times("layers.0.f_proj.weight", 0..HEADS, &x[t]);
        f.iter().zip(w.vector("layers.0.f_proj.bias")).map(|(f, bias)| sigmoid(f + bias)).collect()
    });

    let (told, x, w) = weights_of("mamba2");
    let (inner, heads, states) = (2 * WIDTH, 2 * HEADS, 8);
    let dt = |t: usize| -> Vec<f64> {
        let first = 2 * inner + 2 * states;
        let dt = w.times("layers.0.in_proj.weight", first..first + heads, &x[t]);
        dt.iter().zip(w.vector("layers.0.dt_bias")).map(|(dt, bias)| softplus(dt + bias)).collect()
    };
    check("mamba2", &told, "dt", dt);
    check("mamba2", &told, "decay", |t| {
        dt(t).iter().zip(w.vector("layers.0.A_log")).map(|(dt, a)| (-dt * a.exp()).exp()).collect()
    });
    check("mamba2", &told, "output_gate", |t| {
        w.times("layers.0.in_proj.weight", 0..inner, &x[t]).iter().map(silu).collect()
    });

    let (told, x, w) = weights_of("mamba");
    let inputs: Vec<Vec<f64>> = x.iter().map(|x| w.times("layers.0.in_proj.weight", 0..inner, x)).collect();
    let (taps, bias) = (w.vector("layers.0.conv1d.weight"), w.vector("layers.0.conv1d.bias"));
    let dt = |t: usize| -> Vec<f64> {
        let conv = |channel: usize| {
            let tap = |back: usize| taps[4 * channel + 3 - back] * inputs[t - back][channel];
            silu(&(bias[channel] + (0..=t.min(3)).map(tap).sum::<f64>()))
        };
        let u: Vec<f64> = (0..inner).map(conv).collect();
        let low = w.times("layers.0.x_proj.weight", 0..1, &u);
        let dt = w.times("layers.0.dt_proj.weight", 0..inner, &low);
        dt.iter().zip(w.vector("layers.0.dt_proj.bias")).map(|(dt, bias)| softplus(dt + bias)).collect()
    };
    check("mamba", &told, "dt", dt);
    check("mamba", &told, "decay", |t| {
        let rates = w.vector("layers.0.A_log");
        let decay = |n: usize| {
            let each = dt(t).into_iter().enumerate().map(|(d, dt)| (-dt * rates[d * states + n].exp()).exp());
            each.sum::<f64>() / inner as f64
        };
        (0..states).map(decay).collect()
    });
    check("mamba", &told, "output_gate", |t| {
        w.times("layers.0.in_proj.weight", inner..2 * inner, &x[t]).iter().map(silu).collect()
    });
}

/// Queries of zero attend to everything alike.
#[test]
fn attention_without_queries_is_even() {
    let net = net("transformer");
    for param in net.params().named().filter(|param| param.name().starts_with("layers.0.q_proj")) {
        param.value().slice_set(&param.value().zeros_like().unwrap(), 0, 0).unwrap();
    }
    let told = told(&net, 0..SYMBOLS.len(), SYMBOLS.len());
    check("transformer", &told, "entropy", |t| vec![((t + 1) as f64).ln(); 4]);
    check("transformer", &told, "attention", |t| {
        let mut shares = vec![0.0; 16];
        (0..=t).for_each(|back| shares[age(back)] += 1.0 / (t + 1) as f64);
        shares
    });
}

/// Queries of zero see of everything what the gates behind it have left.
#[test]
fn forgetting_attention_without_queries_follows_its_gates() {
    let net = net("fox");
    let name = |name: &str| name == "layers.0.q_proj.weight";
    let param = net.params().named().find(|param| name(param.name())).unwrap();
    param.value().slice_set(&param.value().zeros_like().unwrap(), 0, 0).unwrap();
    let told = told(&net, 0..SYMBOLS.len(), SYMBOLS.len());
    let gates = told.iter().find(|q| q.layer == 0 && q.kind.name == "decay").unwrap();
    check("fox", &told, "attention", |t| {
        let mut shares = vec![0.0; 16];
        for head in 0..4 {
            let left = |s: usize| (s + 1..=t).map(|l| f64::from(gates.at(l, head)[0])).product::<f64>();
            let total: f64 = (0..=t).map(left).sum();
            (0..=t).for_each(|s| shares[age(t - s)] += left(s) / total / 4.0);
        }
        shares
    });
}

#[test]
fn pieces_and_windows_tell_what_the_whole_tells() {
    for model in MODELS {
        let net = net(model.name);
        let whole = told(&net, 0..SYMBOLS.len(), SYMBOLS.len());
        let pieces = told(&net, 2..6, 3);
        assert!(!whole.is_empty() && whole.len() == pieces.len(), "{}", model.name);
        for (whole, piece) in whole.iter().zip(&pieces) {
            assert_eq!((whole.layer, whole.kind, piece.steps()), (piece.layer, piece.kind, 4));
            let each = whole.rows * whole.channels;
            for (a, b) in whole.values[2 * each..6 * each].iter().zip(&piece.values) {
                assert!((a - b).abs() < 1e-5, "{}: {} in pieces: {b}, not {a}", model.name, whole.kind.name);
            }
        }
    }
}

/// Sample by sample what an evaluation counts; with noise, gaps and distractors.
#[test]
fn answers_are_the_votes_of_an_evaluation() {
    for (sets, gap) in [(vec![], Some(0.2)), (vec![], Some(30.0)), (vec!["task.preset=task3"], Some(0.4))] {
        let mut sets: Vec<String> = sets.into_iter().map(String::from).collect();
        sets.extend(
            [
                "model.name=gla",
                "train.lr=0.01",
                "task.samples.train=400",
                "task.gap={start: 2, probability: 0.7}",
            ]
            .map(String::from),
        );
        let config = parse(TINY, "test", &sets).unwrap();
        let task = Task::new(&config.task, config.seed).unwrap();
        let (features, classes) = (task.features(), task.classes());
        let mut trainer = Trainer::new(&config, features, classes, &Device::Cpu).unwrap();
        for update in 0..40 {
            trainer.update(&task.batch(Part::Train, 8 * update, 8, None).unwrap()).unwrap();
        }
        let net = trainer.net();
        let plan = EvalPlan { part: Part::Test, samples: 8, gap, batch: 4, chunk: 100 };
        let counts = evaluate(net, &task, &plan, |_| true).unwrap().unwrap();
        let mut right = 0;
        for index in 0..8 {
            let samples = task.samples(Part::Test, index, 1, gap).unwrap();
            let looked_at = window(&samples.as_slice()[0], 1, 50);
            let seen = inspect(net, &task, samples, looked_at).unwrap();
            right += seen.right();
            assert_eq!(seen.elements.len(), 12);
            for element in &seen.elements {
                assert!(element.confidence <= 1.0 + 1e-9 && element.right_share <= element.confidence);
                assert_eq!(element.right(), element.right_share == element.confidence);
            }
            assert!(seen.quantities.iter().all(|quantity| quantity.steps() == seen.steps().len()));
        }
        let own = (counts.accuracy * 96.0).round() as usize;
        assert_eq!(right, own, "gap {gap:?}");
        assert!(own > 0, "a net that is never right tests nothing");
    }
}

fn run(dir: &Path, args: &[&str]) -> Output {
    Command::new(cargo_bin_cmd!("selectivbench").get_program()).current_dir(dir).args(args).output().unwrap()
}

fn ok(dir: &Path, args: &[&str]) -> String {
    let output = run(dir, args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn every_model_is_looked_at() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    fs::write(dir.join("tiny.yaml"), TINY).unwrap();
    for model in MODELS {
        let set = format!("model.name={}", model.name);
        ok(dir, &["train", "tiny.yaml", "--out", model.name, "--set", &set]);
        let text = ok(dir, &["inspect", model.name, "--sample", "3"]);
        let marks = text.matches(['✓', '✗']).count();
        // One more of each in the line that explains them.
        assert_eq!(marks, 12 + 2, "{text}");
        assert!(!text.contains('\x1b'), "colour without a terminal: {text}");
        let json = ok(dir, &["inspect", model.name, "--sample", "3", "--json", "--out", "pictures"]);
        let json: Value = serde_json::from_str(&json).unwrap();
        let elements = json["elements"].as_array().unwrap();
        let right = elements.iter().filter(|element| element["right"] == true).count();
        assert_eq!((elements.len(), Value::from(right)), (12, json["right"].clone()));
        assert!(text.contains(&format!("{right} of 12 elements right")), "{text}");
        let quantities = json["quantities"].as_array().unwrap();
        let last = quantities.last().unwrap();
        assert_eq!((&last["layer"], last["mean"].as_array().unwrap().len()), (&Value::from(1), 36));
        let pictures = json["pictures"].as_array().unwrap();
        assert_eq!(pictures.len(), quantities.len(), "two layers, two formats");
        for path in pictures {
            let bytes = fs::read(dir.join(path.as_str().unwrap())).unwrap();
            let begin: &[u8] = if path.as_str().unwrap().ends_with("svg") { b"<svg" } else { b"\x89PNG" };
            assert!(bytes.starts_with(begin), "{path}");
        }
    }
    // A long gap: the window that is drawn stays short, unless it is asked for.
    let long = ok(dir, &["inspect", "gla", "--gap", "30", "--out", "long"]);
    assert!(long.contains("elements 0 to 0,"), "{long}");
    let long = ok(dir, &["inspect", "gla", "--gap", "30", "--out", "long", "--from", "2", "--to", "12"]);
    assert!(long.contains("elements 2 to 11,"), "{long}");
    let own = ok(dir, &["inspect", "gla", "--text", "A1.. #. A1.×200 #"]);
    assert!(own.contains("a sample of your own") && own.contains("·×200"), "{own}");
}

#[test]
fn bad_input_is_one_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    fs::write(dir.join("tiny.yaml"), TINY).unwrap();
    ok(dir, &["train", "tiny.yaml", "--out", "run"]);
    let cases: &[(&[&str], &str)] = &[
        (&["nowhere"], "nowhere"),
        (&["run", "--sample", "40"], "--sample is 40"),
        (&["run", "--gap", "-1"], "--gap"),
        (&["run", "--from", "12"], "--from is 12"),
        (&["run", "--from", "3", "--to", "3"], "--to is 3"),
        (&["run", "--to", "13"], "--to is 13"),
        (&["run", "--text", "A9"], "--text holds \"A9\""),
        (&["run", "--text", " "], "--text is empty"),
        (&["run", "--out", "tiny.yaml"], "tiny.yaml"),
        (&["run", "--device", "gpu"], "--device"),
    ];
    for (args, part) in cases {
        let Output { status, stderr, .. } = run(dir, &[&["inspect"], *args].concat());
        let stderr = String::from_utf8(stderr).unwrap();
        assert_eq!(status.code(), Some(2), "{args:?}: {stderr}");
        assert!(stderr.lines().count() == 1 && stderr.contains(part), "{args:?}: {stderr}");
    }
}
