//! Every layer and every stack against the PyTorch layers: outputs, loss and all gradients, in float64
//! (against references rounded to f32) and in f32; streaming; gradients that reach every parameter.
//!
//! Tolerances are relative root mean squares over a tensor. The references are float64 results rounded
//! to f32, so float64 runs agree to 1e-6 (rounding is 6e-8 a number; a gradient that sums thousands of
//! them is compared as a whole). f32 runs agree to 2e-5: PyTorch's own f32 runs of the same layers are
//! within 7e-7 of the references, and the sums here are taken in another order.

mod common;

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor, Var};
use common::{Golden, noise, relative_rms};
use selectivbench::config::load::defaults;
use selectivbench::config::{Auto, Block, ModelConfig, Switch};
use selectivbench::model::{
    Builder, Call, Context, Dims, DropoutKey, Grain, Input, MODELS, Mixer, Model, Notes, ParamStore, Part,
    RecNet, Transition, count_parameters, find, width_for_budget,
};
use selectivbench::ops::attention::rope;
use selectivbench::ops::causal_conv1d::causal_conv1d_silu;
use selectivbench::ops::dropout::Dropout;
use selectivbench::ops::gla::gla;
use selectivbench::ops::head::{Targets, head_cross_entropy};
use selectivbench::ops::linear::linear;
use selectivbench::ops::no_grad;
use selectivbench::ops::norms::{GateOrder, RmsEps, gated_rms_norm, rms_norm};

fn config(name: &str, width: usize, layers: usize, state: usize) -> ModelConfig {
    ModelConfig {
        name: name.to_string(),
        layers,
        width,
        state,
        heads: Auto::AUTO,
        dropout: 0.2,
        conv: 4,
        householders: 4,
        rope_base: 1000.0,
        ..defaults().model
    }
}

fn tolerance(dtype: DType) -> f64 {
    if dtype == DType::F64 { 1e-6 } else { 2e-5 }
}

fn params_of(golden: &Golden) -> HashMap<String, Tensor> {
    golden
        .names()
        .filter_map(|name| Some((name.strip_prefix("param.")?.to_string(), golden.f64(name))))
        .collect()
}

fn check_grads(what: &str, store: &ParamStore, golden: &Golden, tolerance: f64) -> Result<()> {
    for param in store.params() {
        let want = golden.f64(&format!("grad.{}", param.name()));
        let error = relative_rms(&param.grad(), &want);
        assert!(error < tolerance, "{what}: gradient of {} is off by {error:.1e}", param.name());
    }
    Ok(())
}

#[test]
fn layers_agree_with_the_pytorch_layers() -> Result<()> {
    for model in MODELS {
        let golden = Golden::open(&format!("layer_{}", model.name));
        for dtype in [DType::F64, DType::F32] {
            let what = format!("{} in {dtype:?}", model.name);
            let builder = Builder::new();
            let dims = Dims::new(model, &config(model.name, 64, 1, 16)).unwrap();
            let mixer = (model.build)(&dims, &builder).unwrap();
            let store = builder.finish(1, dtype, &Device::Cpu)?;
            store.load(&params_of(&golden)).unwrap();
            mixer.check_weights().unwrap();
            let x = Var::from_tensor(&golden.f64("x").to_dtype(dtype)?)?;
            let y = mixer.forward(&x, &mut Call::new(None, None))?;
            let error = relative_rms(&y, &golden.f64("y"));
            assert!(error < tolerance(dtype), "{what}: output is off by {error:.1e}");
            let grads = (&y * golden.f64("w").to_dtype(dtype)?)?.sum_all()?.backward()?;
            let error = relative_rms(grads.get(&x).unwrap(), &golden.f64("grad.x"));
            assert!(error < tolerance(dtype), "{what}: gradient of x is off by {error:.1e}");
            check_grads(&what, &store, &golden, tolerance(dtype))?;
        }
    }
    Ok(())
}

/// The models of the paper, whose whole stacks have references.
fn models_of_the_paper() -> impl Iterator<Item = &'static Model> {
    MODELS[..7].iter()
}

#[test]
fn stacks_agree_with_the_pytorch_models() -> Result<()> {
    for model in models_of_the_paper() {
        let golden = Golden::open(&format!("model_{}", model.name));
        for dtype in [DType::F64, DType::F32] {
            let what = format!("{} in {dtype:?}", model.name);
            let net = RecNet::new(&config(model.name, 64, 2, 16), 11, 30, 1, dtype, &Device::Cpu).unwrap();
            net.load(&params_of(&golden)).unwrap();
            let x = Var::from_tensor(&golden.f64("x").to_dtype(dtype)?)?;
            let logits = no_grad(|| net.logits(Input::Dense(&x), &mut Context::default()))?;
            let error = relative_rms(&logits, &golden.f64("logits"));
            assert!(error < tolerance(dtype), "{what}: logits are off by {error:.1e}");

            let (batch, steps, _) = x.dims3()?;
            let labels = golden.get("labels", DType::I64).flatten_all()?.to_vec1::<i64>()?;
            let mask = golden.f64("mask").flatten_all()?.to_vec1::<f64>()?;
            // One window a valid step: what is checked here is the loss.
            let element: Vec<u32> = (0..batch * steps)
                .map(|i| if mask[i] == 0.0 { u32::MAX } else { (i % steps) as u32 })
                .collect();
            let valid = mask.iter().sum::<f64>();
            let targets = Targets {
                labels: labels.iter().map(|&y| y as u32).collect(),
                element,
                batch,
                steps,
                elements: steps,
            };
            let hidden = net.hidden(Input::Dense(&x), &mut Context::default())?;
            let (weight, bias) = net.decoder();
            let out = head_cross_entropy(&hidden, weight, bias, &targets, valid)?;
            let loss = out.loss.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?;
            let want = golden.f64("loss").sum_all()?.to_scalar::<f64>()?;
            assert!((loss / want - 1.0).abs() < tolerance(dtype), "{what}: loss {loss}, not {want}");
            let grads = out.loss.backward()?;
            let error = relative_rms(grads.get(&x).unwrap(), &golden.f64("grad.x"));
            assert!(error < tolerance(dtype), "{what}: gradient of x is off by {error:.1e}");
            check_grads(&what, net.params(), &golden, tolerance(dtype))?;
            let norm =
                net.params().gradient().to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt();
            let want = golden.f64("grad_norm").sum_all()?.to_scalar::<f64>()?;
            assert!((norm / want - 1.0).abs() < tolerance(dtype), "{what}: norm {norm}, not {want}");
        }
    }
    Ok(())
}

type Owns = fn(&Model) -> Part;
type Field = fn(&mut ModelConfig) -> &mut Switch;

/// The switches by name: whether a model has the part, and where a configuration sets it.
const SWITCHES: [(&str, Owns, Field); 6] = [
    ("decay", |model| model.decay, |config| &mut config.decay),
    ("output_gate", |model| model.output_gate, |config| &mut config.output_gate),
    ("short_conv", |model| model.short_conv, |config| &mut config.short_conv),
    ("negative_eigenvalues", |model| model.negative_eigenvalues, |config| &mut config.negative_eigenvalues),
    ("delta_rule", |model| model.delta_rule, |config| &mut config.delta_rule),
    ("qk_norm", |model| model.qk_norm, |config| &mut config.qk_norm),
];

/// A small configuration of the model, by itself and with every combination of its switches; with the blocks of
/// language models, where it can have them.
fn settings(model: &Model) -> Vec<ModelConfig> {
    let mut all = vec![ModelConfig { householders: 2, ..config(model.name, 16, 2, 8) }];
    if model.transition == Transition::Attention {
        for window in [2, 9] {
            all.push(ModelConfig { window: Auto::Value(window), ..all[0].clone() });
        }
    }
    for (_, part, field) in SWITCHES {
        let other = match part(model) {
            Part::Never | Part::Always => continue,
            Part::Off => Switch::On,
            Part::On => Switch::Off,
        };
        for i in 0..all.len() {
            let mut switched = all[i].clone();
            *field(&mut switched) = other;
            all.push(switched);
        }
    }
    // Without the delta rule nothing is erased, and no eigenvalue is negative.
    all.retain(|config| config.negative_eigenvalues != Switch::On || config.delta_rule != Switch::Off);
    if model.name != "transformer" {
        all.push(ModelConfig { block: Block::Layered, ..all[0].clone() });
    }
    all
}

/// The name of the model and its switches.
fn shown(config: &ModelConfig) -> String {
    let mut config = config.clone();
    let switches = SWITCHES.map(|(name, _, field)| format!("{name} {}", *field(&mut config)));
    format!(
        "{} with {}, window {:?}, block {:?}",
        config.name,
        switches.join(", "),
        config.window,
        config.block
    )
}

/// One layer in f64.
fn layer(config: &ModelConfig) -> Result<(Box<dyn Mixer>, ParamStore)> {
    let builder = Builder::new();
    let model = find(&config.name).unwrap();
    let mixer = (model.build)(&Dims::new(model, config).unwrap(), &builder).unwrap();
    Ok((mixer, builder.finish(3, DType::F64, &Device::Cpu)?))
}

fn values_of(store: &ParamStore) -> Result<HashMap<String, Tensor>> {
    store.named().map(|param| Ok((param.name().to_string(), param.value().copy()?))).collect()
}

/// A layer without a part does what the whole layer does with weights that make the part do nothing.
#[test]
fn a_part_that_is_off_is_one_that_does_nothing() -> Result<()> {
    // silu(NEUTRAL) is 1.
    const NEUTRAL: f64 = 1.278_464_542_761_074;
    let (width, inner) = (16, 32);
    // The first channel of the input is always 1: a weight for it alone is a bias.
    let x = Tensor::randn(0f64, 1.0, (2, 9, width - 1), &Device::Cpu)?;
    let x = Tensor::cat(&[&Tensor::ones((2, 9, 1), DType::F64, &Device::Cpu)?, &x], 2)?;
    let bias = |rows: usize, value: f64| -> Result<Tensor> {
        let first = Tensor::full(value, (rows, 1), &Device::Cpu)?;
        Tensor::cat(&[first, Tensor::zeros((rows, width - 1), DType::F64, &Device::Cpu)?], 1)
    };
    let mut compared = 0;
    for model in MODELS {
        for (name, part, field) in &SWITCHES[..3] {
            // No weight makes retention's fixed decay do nothing: it has a test of its own.
            if matches!(part(model), Part::Never | Part::Always) || (model.name, *name) == ("retnet", "decay")
            {
                continue;
            }
            let mut whole = ModelConfig { householders: 2, ..config(model.name, width, 1, 8) };
            *field(&mut whole) = Switch::On;
            let mut without = whole.clone();
            *field(&mut without) = Switch::Off;
            let ((whole, store), (without, rest)) = (layer(&whole)?, layer(&without)?);
            let mut weights = values_of(&store)?;
            // Leaves of the part, as values that do nothing; and what the layer without it holds instead.
            let mut kept = weights.clone();
            for (tensor, value) in weights.iter_mut() {
                let neutral = match (*name, model.name, tensor.as_str()) {
                    ("decay", "mamba" | "mamba2", "A_log") => Some(value.affine(0.0, -1000.0)?),
                    ("decay", "gla", "gk_proj.1.bias") => Some(value.affine(0.0, 1e6)?),
                    ("decay", "gla", "gk_proj.0.weight" | "gk_proj.1.weight") => None,
                    ("decay", "mesa_net", "a_proj.bias") => Some(value.affine(0.0, 1e6)?),
                    ("decay", "fox", "f_proj.bias") => Some(value.affine(0.0, 1e6)?),
                    ("decay", "fox", "f_proj.weight") => None,
                    ("decay", _, "dt_bias") if model.name.contains("delta") => Some(value.affine(0.0, -1e6)?),
                    ("decay", "kda", "dt_bias") => Some(value.affine(0.0, -1e6)?),
                    ("decay", "kda", "f_proj.0.weight" | "f_proj.1.weight") => None,
                    ("decay", "rwkv7", "w_lora.lora.2.bias") => Some(value.affine(0.0, -1e6)?),
                    ("decay", "rwkv7", "x_w" | "w_lora.lora.0.weight" | "w_lora.lora.2.weight") => None,
                    ("decay", "mlstm", "f_proj.bias") => Some(value.affine(0.0, 1e6)?),
                    ("decay", "mlstm", "f_proj.weight") => None,
                    ("decay", _, "a_proj.weight" | "A_log") => None,
                    ("output_gate", "mamba", "in_proj.weight") => {
                        kept.insert(tensor.clone(), value.narrow(0, 0, inner)?);
                        Some(Tensor::cat(&[value.narrow(0, 0, inner)?, bias(inner, NEUTRAL)?], 0)?)
                    }
                    ("output_gate", "mamba2", "in_proj.weight") => {
                        let rest = value.narrow(0, inner, value.dim(0)? - inner)?;
                        kept.insert(tensor.clone(), rest.clone());
                        Some(Tensor::cat(&[bias(inner, NEUTRAL)?, rest], 0)?)
                    }
                    ("output_gate", "kda", "g_proj.1.bias") => Some(value.affine(0.0, 1e6)?),
                    ("output_gate", "kda", "g_proj.0.weight" | "g_proj.1.weight") => None,
                    // Of a token that is not mixed each channel of the low rank is 1, and of these one is taken.
                    ("output_gate", "rwkv7", "x_g") => Some(value.zeros_like()?),
                    ("output_gate", "rwkv7", "g_lora.lora.0.weight") => Some(bias(value.dim(0)?, 1e6)?),
                    ("output_gate", "rwkv7", "g_lora.lora.2.weight") => {
                        let rest = value.narrow(1, 1, value.dim(1)? - 1)?.zeros_like()?;
                        Some(Tensor::cat(&[value.narrow(1, 0, 1)?.ones_like()?, rest], 1)?)
                    }
                    ("output_gate", "mlstm", "g_proj.weight") => Some(bias(inner, 1e6)?),
                    // A sigmoid, which is 1 far out.
                    ("output_gate", "fox", "g_proj.weight") => Some(bias(width, 1e6)?),
                    ("output_gate", _, "g_proj.weight") => Some(bias(inner, NEUTRAL)?),
                    ("output_gate", _, "g_norm_swish_gate.weight") => {
                        kept.insert("g_norm.weight".into(), value.clone());
                        kept.remove(tensor);
                        continue;
                    }
                    ("short_conv", _, conv) if conv.ends_with("conv1d.weight") => {
                        let (channels, _, taps) = value.dims3()?;
                        let before = Tensor::zeros((channels, 1, taps - 1), DType::F64, &Device::Cpu)?;
                        let now = Tensor::ones((channels, 1, 1), DType::F64, &Device::Cpu)?;
                        Some(Tensor::cat(&[before, now], 2)?)
                    }
                    ("short_conv", _, "conv1d.bias") => Some(value.zeros_like()?),
                    _ => continue,
                };
                *value = neutral.unwrap_or(value.clone());
                // A fused projection keeps the rows that are not the part's.
                if tensor != "in_proj.weight" {
                    kept.remove(tensor);
                }
            }
            store.load(&weights).unwrap();
            rest.load(&kept).unwrap();
            let run = |mixer: &dyn Mixer| no_grad(|| mixer.forward(&x, &mut Call::new(None, None)));
            let (want, got) = (run(whole.as_ref())?, run(without.as_ref())?);
            let error = relative_rms(&got, &want);
            assert!(error < 1e-12, "{} without {name} is off by {error:.1e}", model.name);
            compared += 1;
        }
    }
    assert_eq!(compared, 32);
    Ok(())
}

/// Retention without its decay keeps everything: as gated linear attention without its own, whose keys turn.
#[test]
fn retention_without_decay_keeps_everything() -> Result<()> {
    let golden = Golden::open("layer_retnet");
    let weights = params_of(&golden);
    let weight = |name: &str| &weights[name];
    let config = ModelConfig { decay: Switch::Off, ..config("retnet", 64, 1, 16) };
    let (mixer, store) = layer(&config)?;
    store.load(&weights).unwrap();
    let x = golden.f64("x");
    let got = no_grad(|| mixer.forward(&x, &mut Call::new(None, None)))?;

    let short = |name: &str, heads: (usize, usize, usize, usize)| -> Result<Tensor> {
        let y = linear(&x, weight(&format!("{name}_proj.weight")), None)?;
        causal_conv1d_silu(&y, weight(&format!("{name}_conv1d.weight")), None, None)?.0.reshape(heads)
    };
    let (keys, values) = ((2, 70, 4, 16), (2, 70, 4, 32));
    let (q, k) = (rope(&short("q", keys)?, 10_000.0, 0)?, rope(&short("k", keys)?, 10_000.0, 0)?);
    let keep = Tensor::zeros(keys, DType::F64, &Device::Cpu)?;
    let (o, _) = gla(&q, &k, &short("v", values)?, &keep, 0.25, None)?;
    let gate = linear(&x, weight("g_proj.weight"), None)?;
    let norm = weight("g_norm_swish_gate.weight");
    let y = gated_rms_norm(&o.reshape((2, 70, 128))?, &gate, norm, 1e-5, GateOrder::AfterNorm)?;
    let want = linear(&y, weight("o_proj.weight"), None)?;
    let error = relative_rms(&got, &want);
    assert!(error < 1e-12, "off by {error:.1e}");
    Ok(())
}

/// The parts of Gated DeltaNet that DeltaNet lacks make the one the other, both ways.
#[test]
fn delta_net_and_gated_delta_net_are_one_layer() -> Result<()> {
    let golden = Golden::open("layer_gated_delta_net");
    let on = ModelConfig { decay: Switch::On, output_gate: Switch::On, ..config("delta_net", 64, 1, 16) };
    let (mixer, store) = layer(&on)?;
    store.load(&params_of(&golden)).unwrap();
    let y = mixer.forward(&golden.f64("x"), &mut Call::new(None, None))?;
    assert!(relative_rms(&y, &golden.f64("y")) < 1e-6);

    let golden = Golden::open("layer_delta_net");
    let off =
        ModelConfig { decay: Switch::Off, output_gate: Switch::Off, ..config("gated_delta_net", 64, 1, 16) };
    let (mixer, store) = layer(&off)?;
    store.load(&params_of(&golden)).unwrap();
    let y = mixer.forward(&golden.f64("x"), &mut Call::new(None, None))?;
    assert!(relative_rms(&y, &golden.f64("y")) < 1e-6);
    Ok(())
}

/// The taxonomy, the notes and the parameters of every setting tell of the same parts.
#[test]
fn a_configured_model_is_what_its_taxonomy_says() -> Result<()> {
    let steps = 40;
    let ids = symbols(1, steps, 7)?;
    for config in MODELS.iter().flat_map(settings) {
        let what = shown(&config);
        let model = find(&config.name).unwrap();
        let dims = Dims::new(model, &config).unwrap();
        let taxonomy = model.taxonomy(&dims);
        let net = RecNet::new(&config, 7, 13, 5, DType::F32, &Device::Cpu).unwrap();

        let size = |param: &selectivbench::model::Param| param.shape().iter().product::<usize>();
        let sizes: usize = net.params().params().iter().map(size).sum();
        assert_eq!(count_parameters(&config, 7, 13).unwrap(), sizes, "{what}");
        assert_eq!(net.params().count(), sizes, "{what}");
        let has = |part: &str| net.params().named().any(|param| param.name().contains(part));
        assert_eq!(has("conv1d"), taxonomy.short_conv, "{what}");
        let decays = match config.name.as_str() {
            // Retention's decay is fixed, that of the GRU a gate among others, that of S4D a part of its rates.
            "retnet" => config.decay != Switch::Off,
            "gru" | "s4" => true,
            "mesa_net" => has("a_proj"),
            "rwkv7" => has("w_lora"),
            "mlstm" | "fox" => has("f_proj"),
            _ => has("A_log") || has("gk_proj"),
        };
        assert_eq!(decays, taxonomy.decay.is_some(), "{what}");
        // A fit has weights too, and the sum rule write strengths; learning rates come through a low rank.
        let weighs = config.name.contains("delta") || ["mesa_net", "kda"].contains(&config.name.as_str());
        assert_eq!(has("b_proj"), weighs, "{what}");
        assert_eq!(
            (taxonomy.householders > 0, dims.parts.delta_rule),
            (taxonomy.delta_rule, taxonomy.delta_rule)
        );
        assert_eq!(has("q_norm"), dims.parts.qk_norm, "{what}");
        assert_eq!(has("mlp.gate_proj"), config.block == Block::Layered, "{what}");

        let mut notes = Notes::new(0..steps);
        no_grad(|| net.inspect(Input::Ids(&ids), &mut Context::default(), &mut notes))?;
        let notes = notes.finish();
        let told = |names: &[&str]| notes.iter().any(|note| names.contains(&note.kind.name));
        assert_eq!(told(&["decay", "alpha"]), taxonomy.decay.is_some(), "{what}");
        assert_eq!(told(&["output_gate"]), taxonomy.output_gate, "{what}");
        // Write strengths; those of a fit are no eigenvalues.
        let strengths = config.name.contains("delta") || ["kda", "rwkv7"].contains(&config.name.as_str());
        assert_eq!(told(&["beta"]), strengths, "{what}");
        let Some([low, high]) = taxonomy.eigenvalues else {
            assert!(["transformer", "gru", "fox"].contains(&config.name.as_str()), "{what}");
            continue;
        };
        assert_eq!(high, 1.0, "{what}");
        let identity = taxonomy.decay.is_none() && !taxonomy.delta_rule;
        assert_eq!((low == 1.0, taxonomy.transition == "identity"), (identity, identity), "{what}");
        for note in notes.iter().filter(|note| ["decay", "alpha"].contains(&note.kind.name)) {
            assert!(note.values.iter().all(|a| (0.0..=1.0).contains(a)), "{what}");
            assert!(note.values.iter().any(|a| *a < 0.9999), "{what}");
        }
        if config.name == "s4" {
            continue;
        }
        // 1 − β is the eigenvalue along a key, where it is erased.
        if config.name.contains("delta") && !taxonomy.delta_rule {
            continue;
        }
        let most = |beta: f32| {
            notes.iter().filter(|n| n.kind.name == "beta").all(|n| n.values.iter().all(|b| *b <= beta))
        };
        assert!(most(1.0 - low as f32), "{what}");
        assert_eq!(low == -1.0, taxonomy.delta_rule && !most(1.0), "{what}");
    }
    Ok(())
}

/// Write strengths are doubled, and nothing else.
#[test]
fn negative_eigenvalues_double_the_write_strength() -> Result<()> {
    for model in MODELS.iter().filter(|model| model.negative_eigenvalues != Part::Never) {
        let betas = |switch| -> Result<Vec<f32>> {
            let config = ModelConfig { negative_eigenvalues: switch, ..config(model.name, 16, 1, 8) };
            let net = RecNet::new(&config, 7, 13, 5, DType::F32, &Device::Cpu).unwrap();
            let mut notes = Notes::new(0..20);
            no_grad(|| net.inspect(Input::Ids(&symbols(1, 20, 7)?), &mut Context::default(), &mut notes))?;
            Ok(notes.finish().into_iter().find(|note| note.kind.name == "beta").unwrap().values)
        };
        let doubled: Vec<f32> = betas(Switch::Off)?.iter().map(|beta| 2.0 * beta).collect();
        assert_eq!(betas(Switch::On)?, doubled, "{}", model.name);
    }
    Ok(())
}

/// The paper's dissection.
#[test]
fn the_taxonomy_is_that_of_the_literature() {
    let of = |name: &str| {
        let model = find(name).unwrap();
        model.taxonomy(&Dims::new(model, &config(name, 64, 1, 16)).unwrap())
    };
    for (name, transition, decay, delta, gate, eigenvalues, state) in [
        ("transformer", "key-value cache", None, false, false, None, None),
        ("mamba", "diagonal", Some(Grain::State), false, true, Some([0.0, 1.0]), Some(128 * 16)),
        ("mamba2", "scalar", Some(Grain::Head), false, true, Some([0.0, 1.0]), Some(128 * 16)),
        ("gla", "diagonal", Some(Grain::KeyChannel), false, true, Some([0.0, 1.0]), Some(64 * 32)),
        ("delta_net", "Householder", None, true, false, Some([0.0, 1.0]), Some(64 * 32)),
        (
            "gated_delta_net",
            "scalar x Householder",
            Some(Grain::Head),
            true,
            true,
            Some([0.0, 1.0]),
            Some(64 * 32),
        ),
        (
            "gated_delta_product",
            "scalar x 4 Householders",
            Some(Grain::Head),
            true,
            true,
            Some([-1.0, 1.0]),
            Some(64 * 32),
        ),
        ("gru", "nonlinear", Some(Grain::State), false, false, None, Some(64)),
        ("s4", "complex diagonal", Some(Grain::State), false, false, Some([-1.0, 1.0]), Some(64 * 16)),
        ("mesa_net", "scalar", Some(Grain::Head), false, false, Some([0.0, 1.0]), Some(2 * 64 * 16)),
        ("retnet", "scalar", Some(Grain::Head), false, true, Some([0.0, 1.0]), Some(64 * 32)),
        (
            "kda",
            "diagonal x Householder",
            Some(Grain::KeyChannel),
            true,
            true,
            Some([0.0, 1.0]),
            Some(64 * 16),
        ),
        (
            "rwkv7",
            "diagonal + rank 1",
            Some(Grain::KeyChannel),
            true,
            true,
            Some([(-(-0.5f64).exp()).exp() - 1.0, 1.0]),
            Some(64 * 16),
        ),
        ("mlstm", "scalar", Some(Grain::Head), false, true, Some([0.0, 1.0]), Some(64 * 32 + 64 + 4)),
        ("fox", "decaying key-value cache", Some(Grain::Head), false, false, None, None),
    ] {
        let taxonomy = of(name);
        assert_eq!((taxonomy.transition.as_str(), taxonomy.decay), (transition, decay), "{name}");
        assert_eq!(
            taxonomy.input_dependent_decay,
            decay.is_some() && !["retnet", "s4"].contains(&name),
            "{name}"
        );
        assert_eq!((taxonomy.delta_rule, taxonomy.channel_mixing), (delta, delta || name == "gru"), "{name}");
        assert_eq!((taxonomy.output_gate, taxonomy.eigenvalues), (gate, eigenvalues), "{name}");
        assert_eq!(taxonomy.state_per_layer, state, "{name}");
    }
}

#[test]
fn a_switch_without_a_part_is_refused() {
    for (name, part, field) in SWITCHES {
        for model in MODELS {
            let part = part(model);
            for switch in [Switch::On, Switch::Off] {
                let mut config = config(model.name, 16, 1, 8);
                *field(&mut config) = switch;
                match count_parameters(&config, 7, 13) {
                    Ok(_) => assert_ne!(part, Part::Never, "{} {name}", model.name),
                    Err(error) if part == Part::Always => assert_eq!(
                        error.to_string(),
                        format!("model.{name} is off, but {} cannot do without; set it to auto", model.name)
                    ),
                    Err(error) => {
                        let start = format!("model.{name} is {switch}, but {} has no such part", model.name);
                        assert!(error.to_string().starts_with(&start), "{error}");
                        assert_eq!(selectivbench::error::exit_code(&error), 2);
                        assert_eq!(part, Part::Never, "{} {name}", model.name);
                    }
                }
            }
        }
    }
    let mut mamba = config("mamba", 16, 1, 8);
    mamba.negative_eigenvalues = Switch::On;
    assert_eq!(
        count_parameters(&mamba, 7, 13).unwrap_err().to_string(),
        "model.negative_eigenvalues is on, but mamba has no such part; leave it at auto, or use one of delta_net, \
         gated_delta_net, gated_delta_product, kda"
    );
}

/// What lies before the window of the last layer's windows is never seen: each layer looks one window further back.
#[test]
fn a_window_bounds_what_is_seen() -> Result<()> {
    let (steps, window) = (40, 5);
    for (name, each) in [("transformer", 2 * 16), ("fox", 2 * 16 + 4)] {
        let config = ModelConfig { window: Auto::Value(window), ..config(name, 16, 2, 8) };
        let model = find(name).unwrap();
        let taxonomy = model.taxonomy(&Dims::new(model, &config).unwrap());
        assert_eq!(taxonomy.state_per_layer, Some(each * window));
        reach_of(&config, steps, window)?;
    }

    let wrong = ModelConfig { window: Auto::Value(4), ..self::config("gla", 16, 1, 8) };
    assert_eq!(
        count_parameters(&wrong, 7, 13).unwrap_err().to_string(),
        "model.window is 4, but gla has no attention; leave it at auto, or use transformer or fox"
    );
    Ok(())
}

/// What two layers with this window see of a step that changes.
fn reach_of(config: &ModelConfig, steps: usize, window: usize) -> Result<()> {
    let net = RecNet::new(config, 7, 13, 5, DType::F32, &Device::Cpu).unwrap();
    let logits = |ids: Vec<u32>| -> Result<Vec<Vec<f32>>> {
        let ids = Tensor::from_vec(ids, (1, steps), &Device::Cpu)?;
        no_grad(|| net.logits(Input::Ids(&ids), &mut Context::default()))?.squeeze(0)?.to_vec2()
    };
    let ids: Vec<u32> = (0..steps as u32).map(|t| t * 5 % 7).collect();
    let (changed_at, whole) = (11, logits(ids.clone())?);
    let mut other = ids;
    other[changed_at] = 6 - other[changed_at];
    let reach = changed_at..=changed_at + 2 * (window - 1);
    for (t, (a, b)) in whole.iter().zip(logits(other)?).enumerate() {
        assert_eq!(*a != b, reach.contains(&t), "step {t}");
    }
    Ok(())
}

/// Symbols with blank runs between them, as the tasks have.
fn symbols(batch: usize, steps: usize, vocab: u32) -> Result<Tensor> {
    let ids: Vec<u32> = (0..batch * steps)
        .map(|i| if i % 3 == 2 { u32::MAX } else { (i as u32).wrapping_mul(2_654_435_761) >> 8 })
        .map(|id| if id == u32::MAX { id } else { id % vocab })
        .collect();
    Tensor::from_vec(ids, (batch, steps), &Device::Cpu)
}

#[test]
fn every_parameter_gets_a_gradient() -> Result<()> {
    let (batch, steps) = (3, 30);
    for config in MODELS.iter().flat_map(settings) {
        let net = RecNet::new(&config, 7, 13, 5, DType::F32, &Device::Cpu).unwrap();
        let targets = Targets {
            labels: (0..batch * steps).map(|i| (i % 13) as u32).collect(),
            element: (0..batch * steps).map(|i| (i % steps / 3) as u32).collect(),
            batch,
            steps,
            elements: steps / 3,
        };
        let mut context =
            Context { dropout: Some(DropoutKey { p: 0.2, key: [1, 2], first: 0 }), ..Context::default() };
        let hidden = net.hidden(Input::Ids(&symbols(batch, steps, 7)?), &mut context)?;
        let (weight, bias) = net.decoder();
        let out = head_cross_entropy(&hidden, weight, bias, &targets, (batch * steps) as f64)?;
        out.loss.backward()?;
        for param in net.params().params() {
            let norm = param.grad().sqr()?.sum_all()?.to_scalar::<f32>()?;
            assert!(
                norm > 0.0 && norm.is_finite(),
                "{}: gradient of {} is {norm}",
                shown(&config),
                param.name()
            );
        }
    }
    Ok(())
}

#[test]
fn a_layer_computed_again_gives_the_same_gradients() -> Result<()> {
    let (batch, steps) = (2, 19);
    for config in MODELS.iter().flat_map(settings) {
        let net = RecNet::new(&config, 7, 13, 5, DType::F32, &Device::Cpu).unwrap();
        let gradients = |recompute: bool| -> Result<Vec<f32>> {
            net.params().zero_grad()?;
            let dropout = Some(DropoutKey { p: 0.2, key: [1, 2], first: 0 });
            let mut context = Context { dropout, recompute, ..Context::default() };
            let logits = net.logits(Input::Ids(&symbols(batch, steps, 7)?), &mut context)?;
            logits.sqr()?.sum_all()?.backward()?;
            net.params().gradient().to_vec1()
        };
        assert!(gradients(false)? == gradients(true)?, "{}", shown(&config));
    }
    Ok(())
}

#[test]
fn pieces_give_what_the_whole_gives() -> Result<()> {
    let (batch, steps) = (2, 61);
    // A window of the current step alone asks nothing of queries and keys.
    let narrow =
        ["transformer", "fox"].map(|name| ModelConfig { window: Auto::Value(1), ..config(name, 16, 2, 8) });
    for config in MODELS.iter().flat_map(settings).chain(narrow) {
        let net = RecNet::new(&config, 7, 13, 5, DType::F32, &Device::Cpu).unwrap();
        let ids = symbols(batch, steps, 7)?;
        let whole = no_grad(|| net.logits(Input::Ids(&ids), &mut Context::default()))?;
        let mut context = Context::streaming();
        let mut pieces = Vec::new();
        let mut start = 0;
        for len in [1, 17, 2, 40, 1] {
            let piece = ids.narrow(1, start, len)?;
            pieces.push(no_grad(|| net.logits(Input::Ids(&piece), &mut context))?);
            start += len;
        }
        assert_eq!(start, steps);
        let error = relative_rms(&Tensor::cat(&pieces, 1)?, &whole.to_dtype(DType::F64)?);
        assert!(error < 1e-6, "{}: pieces differ from the whole by {error:.1e}", shown(&config));
    }
    Ok(())
}

/// Layered blocks are those of language models, written out with plain operations; dropout on both branches.
#[test]
fn layered_blocks_are_those_of_language_models() -> Result<()> {
    let (width, inner) = (16, 256);
    for name in ["gla", "delta_net", "gated_delta_net", "fox", "mamba2", "gru"] {
        let config = ModelConfig { block: Block::Layered, ..config(name, width, 2, 8) };
        let net = RecNet::new(&config, 7, 13, 5, DType::F64, &Device::Cpu).unwrap();
        let weights = values_of(net.params())?;
        let post = ModelConfig { block: Block::PostNorm, layers: 1, ..config.clone() };
        let rms = |x: &Tensor, name: &str| -> Result<Tensor> {
            let size = (x.sqr()?.mean_keepdim(2)? + 1e-6)?.sqrt()?;
            x.broadcast_div(&size)?.broadcast_mul(&weights[name])
        };
        let times = |x: &Tensor, name: &str| x.broadcast_matmul(&weights[name].t()?);
        let ids = symbols(2, 30, 7)?;
        let key = DropoutKey { p: 0.3, key: [1, 2], first: 0 };
        for dropout in [None, Some(key)] {
            let drop = |x: &Tensor, site: u32| match dropout {
                None => Ok(x.clone()),
                Some(DropoutKey { p, key, first }) => {
                    selectivbench::ops::dropout::dropout(x, &Dropout { p, key, site, first, tied: false })
                }
            };
            let mut seen = HashMap::new();
            let mut context = Context { dropout, ..Context::default() };
            let hidden = no_grad(|| {
                net.watch(Input::Ids(&ids), &mut context, |name, x| {
                    seen.insert(name.to_string(), x.clone());
                    Ok(())
                })
            })?;
            let mut x = seen["encoder"].clone();
            for l in 0..2 {
                let at = |name: &str| format!("layers.{l}.{name}");
                let (mixer, store) = layer(&post)?;
                let prefix = at("attn.");
                let own = weights.iter().filter_map(|(name, value)| {
                    Some((name.strip_prefix(&prefix)?.to_string(), value.clone()))
                });
                store.load(&own.collect()).unwrap();
                let h = rms(&x, &at("attn_norm.weight"))?;
                let y = no_grad(|| mixer.forward(&h, &mut Call::new(None, None)))?;
                assert!(relative_rms(&seen[&at("attn")], &y) < 1e-12, "{name}");
                x = (&x + drop(&y, 2 * l + 1)?)?;
                let h = rms(&x, &at("mlp_norm.weight"))?;
                let gate = times(&h, &at("mlp.gate_proj.weight"))?.silu()?;
                assert_eq!(gate.dim(2)?, inner);
                let y = times(&(gate * times(&h, &at("mlp.up_proj.weight"))?)?, &at("mlp.down_proj.weight"))?;
                x = (&x + drop(&y, 4 + l)?)?;
            }
            let error = relative_rms(&hidden, &rms(&x, "norm.weight")?);
            assert!(error < 1e-12, "{name}: off by {error:.1e}");
        }
    }
    let refused = ModelConfig { block: Block::Layered, ..config("transformer", 16, 1, 8) };
    let error = count_parameters(&refused, 7, 13).unwrap_err();
    assert_eq!(
        error.to_string(),
        "model.block is layered, but the transformer has residuals and an MLP of its own; leave it at post_norm"
    );
    assert_eq!(selectivbench::error::exit_code(&error), 2);
    Ok(())
}

/// The slope of a loss along a direction in the space of all parameters is what its gradient says, in f64.
#[test]
fn gradients_of_new_parts_equal_finite_differences() -> Result<()> {
    let sum = |x: &Tensor| x.sum_all()?.to_scalar::<f64>();
    for config in ["gla", "gated_delta_net", "gated_delta_product", "fox"].iter().flat_map(|name| {
        let plain = ModelConfig { householders: 2, ..config(name, 16, 2, 8) };
        let layered = ModelConfig { block: Block::Layered, ..plain.clone() };
        let other = match *name {
            "gla" => vec![],
            "fox" => {
                vec![ModelConfig { output_gate: Switch::On, qk_norm: Switch::On, ..plain.clone() }, plain]
            }
            _ => vec![ModelConfig { delta_rule: Switch::Off, ..plain }],
        };
        other.into_iter().chain([layered])
    }) {
        let net = RecNet::new(&config, 7, 13, 5, DType::F64, &Device::Cpu).unwrap();
        let ids = symbols(2, 30, 7)?;
        let weight = noise(1, &[2, 30, 13]);
        let dropout = Some(DropoutKey { p: 0.2, key: [1, 2], first: 0 });
        let loss = || -> Result<Tensor> {
            let mut context = Context { dropout, ..Context::default() };
            (net.logits(Input::Ids(&ids), &mut context)? * &weight)?.sum_all()
        };
        loss()?.backward()?;
        let (value, gradient) = (net.params().value(), net.params().gradient());
        let direction = noise(2, value.dims());
        let at = value.copy()?;
        let step = |by: f64| -> Result<f64> {
            value.slice_set(&(&at + (&direction * by)?)?, 0, 0)?;
            no_grad(loss)?.to_scalar::<f64>()
        };
        // Fourth-order differences.
        let h = 1e-5;
        let want = (8.0 * (step(h)? - step(-h)?) - (step(2.0 * h)? - step(-2.0 * h)?)) / (12.0 * h);
        let got = sum(&(gradient * &direction)?)?;
        let size = sum(&gradient.sqr()?)?.sqrt();
        assert!((got - want).abs() < 1e-7 * size, "{}: {got}, by differences {want}", shown(&config));
    }
    Ok(())
}

/// Without the delta rule: linear attention of keys times write strengths, as gated linear attention computes it.
#[test]
fn without_the_delta_rule_writes_are_added() -> Result<()> {
    for (name, n) in [("delta_net", 1), ("gated_delta_net", 1), ("gated_delta_product", 4)] {
        let golden = Golden::open(&format!("layer_{name}"));
        let weights = params_of(&golden);
        let config = ModelConfig { delta_rule: Switch::Off, ..config(name, 64, 1, 16) };
        let (mixer, store) = layer(&config)?;
        store.load(&weights).unwrap();
        let x = golden.f64("x");
        let got = no_grad(|| mixer.forward(&x, &mut Call::new(None, None)))?;

        let weight = |name: &str| &weights[name];
        let (batch, steps, heads, k, v) = (2, 70, 4, 16, 32);
        let short = |name: &str| -> Result<Tensor> {
            let y = linear(&x, weight(&format!("{name}_proj.weight")), None)?;
            Ok(causal_conv1d_silu(&y, weight(&format!("{name}_conv1d.weight")), None, None)?.0)
        };
        let unit =
            |x: Tensor| x.broadcast_div(&(x.sqr()?.sum_keepdim(candle_core::D::Minus1)? + 1e-6)?.sqrt()?);
        let q = unit(short("q")?.reshape((batch, steps, heads, k))?)?;
        let keys = unit(short("k")?.reshape((batch, steps, n, heads, k))?)?;
        let values = short("v")?.reshape((batch, steps, n, heads, v))?;
        let logits = linear(&x, weight("b_proj.weight"), None)?.reshape((batch, steps, n, heads))?;
        let beta = ((logits.neg()?.exp()? + 1.0)?).recip()?.unsqueeze(4)?;
        // One decay for all channels of a head; the writes of a token are as many heads that share it.
        let g = match name {
            "delta_net" => Tensor::zeros((batch, steps, heads), DType::F64, &Device::Cpu)?,
            _ => {
                let a = linear(&x, weight("a_proj.weight"), None)?.broadcast_add(weight("dt_bias"))?;
                (a.exp()? + 1.0)?.log()?.broadcast_mul(&weight("A_log").exp()?.neg()?)?
            }
        };
        let many = (batch, steps, n, heads, k);
        let all = (batch, steps, n * heads, k);
        let q = q.unsqueeze(2)?.broadcast_as(many)?.reshape(all)?;
        let g = g.reshape((batch, steps, 1, heads, 1))?.broadcast_as(many)?.reshape(all)?;
        let keys = keys.broadcast_mul(&beta)?.reshape(all)?;
        let values = values.reshape((batch, steps, n * heads, v))?;
        let (o, _) = gla(&q, &keys, &values, &g, 0.25, None)?;
        let o = o.reshape((batch, steps, n, heads * v))?.sum(2)?;
        let o = match name {
            "delta_net" => rms_norm(&o, weight("o_norm.weight"), 1e-5, RmsEps::Inside)?,
            _ => {
                let gate = linear(&x, weight("g_proj.weight"), None)?;
                gated_rms_norm(&o, &gate, weight("o_norm.weight"), 1e-5, GateOrder::AfterNorm)?
            }
        };
        let error = relative_rms(&got, &linear(&o, weight("o_proj.weight"), None)?);
        assert!(error < 1e-12, "{name}: off by {error:.1e}");
    }
    let both = ModelConfig {
        delta_rule: Switch::Off,
        negative_eigenvalues: Switch::On,
        ..config("gated_delta_net", 16, 1, 8)
    };
    assert_eq!(
        count_parameters(&both, 7, 13).unwrap_err().to_string(),
        "model.negative_eigenvalues is on, but without the delta rule (model.delta_rule off) nothing is erased; leave \
         it at auto"
    );
    Ok(())
}

/// Normed queries and keys do not see how long they are; the gate is a sigmoid.
#[test]
fn parts_of_the_forgetting_transformer() -> Result<()> {
    let x = Tensor::randn(0f64, 1.0, (2, 9, 16), &Device::Cpu)?;
    let plain = config("fox", 16, 1, 8);
    let run = |config: &ModelConfig, change: &dyn Fn(&str, &Tensor) -> Result<Tensor>| -> Result<Tensor> {
        let (mixer, store) = layer(config)?;
        let values = values_of(&store)?;
        let changed = values.iter().map(|(name, value)| Ok((name.clone(), change(name, value)?)));
        store.load(&changed.collect::<Result<_>>()?).unwrap();
        no_grad(|| mixer.forward(&x, &mut Call::new(None, None)))
    };
    let same = |_: &str, value: &Tensor| Ok(value.clone());
    let longer =
        |name: &str, value: &Tensor| if name == "q_proj.weight" { value * 3e3 } else { Ok(value.clone()) };
    let normed = ModelConfig { qk_norm: Switch::On, ..plain.clone() };
    // As far as the norm's epsilon does.
    assert!(relative_rms(&run(&normed, &longer)?, &run(&normed, &same)?) < 1e-2);
    assert!(relative_rms(&run(&plain, &longer)?, &run(&plain, &same)?) > 0.1);
    let gated = ModelConfig { output_gate: Switch::On, ..plain.clone() };
    let half =
        |name: &str, value: &Tensor| if name == "g_proj.weight" { value * 0.0 } else { Ok(value.clone()) };
    assert!(relative_rms(&(run(&gated, &half)? * 2.0)?, &run(&plain, &same)?) < 1e-12);
    Ok(())
}

/// Parameter counts in millions of the PyTorch models: 8 layers, state 128, 41 inputs, 1,601 classes.
#[test]
fn parameter_counts_are_those_of_the_pytorch_models() {
    let counts: [(usize, [(&str, f64); 7]); 2] = [
        (
            256,
            [
                ("transformer", 8.84),
                ("mamba", 5.30),
                ("mamba2", 4.15),
                ("delta_net", 3.61),
                ("gated_delta_net", 4.67),
                ("gla", 4.72),
                ("gated_delta_product", 9.49),
            ],
        ),
        (
            1024,
            [
                ("transformer", 136.03),
                ("mamba", 60.54),
                ("mamba2", 54.37),
                ("delta_net", 52.23),
                ("gated_delta_net", 69.07),
                ("gla", 69.21),
                ("gated_delta_product", 145.06),
            ],
        ),
    ];
    for (width, models) in counts {
        for (name, millions) in models {
            let count = count_parameters(&config(name, width, 8, 128), 41, 1601).unwrap();
            assert!((count as f64 / 1e6 - millions).abs() < 0.006, "{name} at {width}: {count}");
        }
    }
}

#[test]
fn a_budget_picks_a_near_width() {
    for model in MODELS {
        let base = config(model.name, 8, 8, 128);
        let width = width_for_budget(&base, 41, 1601, 5_000_000).unwrap();
        let count = count_parameters(&ModelConfig { width, ..base }, 41, 1601).unwrap();
        assert!((count as f64 / 5e6 - 1.0).abs() < 0.1, "{} at {width}: {count}", model.name);
    }
}

/// The rates of S4D's recurrence are updated on their own, and have no weight decay.
#[test]
fn some_parameters_have_a_learning_rate_of_their_own() -> Result<()> {
    for model in MODELS {
        let net = RecNet::new(&config(model.name, 16, 2, 8), 7, 13, 5, DType::F32, &Device::Cpu).unwrap();
        let groups = net.params().groups();
        let end = groups.iter().fold(0, |end, group| {
            assert_eq!(group.start, end, "{}", model.name);
            end + group.len
        });
        assert_eq!(end, net.params().value().elem_count(), "{}", model.name);
        let rates: Vec<_> = groups.iter().map(|group| group.most_rate).collect();
        if model.name != "s4" {
            assert_eq!(rates, [None], "{}", model.name);
            continue;
        }
        assert_eq!(rates, [None, Some(1e-3)]);
        net.params().zero_grad()?;
        let ones = Tensor::ones(groups[1].len, DType::F32, &Device::Cpu)?;
        groups[1].of(net.params().gradient())?.slice_set(&ones, 0, 0)?;
        for param in net.params().params() {
            let slow = ["log_dt", "log_A_real", "A_imag"].iter().any(|name| param.name().ends_with(name));
            let marked = param.grad().flatten_all()?.to_vec1::<f32>()?;
            assert!(marked.iter().all(|x| (*x == 1.0) == slow), "{}", param.name());
        }
    }
    Ok(())
}

#[test]
fn an_unknown_model_is_met_with_the_nearest_name() {
    let error = find("gated_deltanet").err().unwrap();
    assert_eq!(error.to_string(), "unknown model `gated_deltanet`; did you mean `gated_delta_net`?");
    assert_eq!(selectivbench::error::exit_code(&error), 2);
}
