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
use common::{Golden, relative_rms};
use selectivbench::config::{Auto, ModelConfig};
use selectivbench::model::{
    Builder, Call, Context, Dims, DropoutKey, Input, MODELS, ParamStore, RecNet, count_parameters, find,
    width_for_budget,
};
use selectivbench::ops::head::{Targets, head_cross_entropy};
use selectivbench::ops::no_grad;

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
            let dims = Dims::new(&config(model.name, 64, 1, 16)).unwrap();
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

#[test]
fn stacks_agree_with_the_pytorch_models() -> Result<()> {
    for model in MODELS {
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
    for model in MODELS {
        let net = RecNet::new(&config(model.name, 32, 2, 8), 7, 13, 5, DType::F32, &Device::Cpu).unwrap();
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
            assert!(norm > 0.0 && norm.is_finite(), "{}: gradient of {} is {norm}", model.name, param.name());
        }
    }
    Ok(())
}

#[test]
fn pieces_give_what_the_whole_gives() -> Result<()> {
    let (batch, steps) = (2, 61);
    for model in MODELS {
        let net = RecNet::new(&config(model.name, 32, 2, 8), 7, 13, 5, DType::F32, &Device::Cpu).unwrap();
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
        assert!(error < 1e-6, "{}: pieces differ from the whole by {error:.1e}", model.name);
    }
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

#[test]
fn an_unknown_model_is_met_with_the_nearest_name() {
    let error = find("gated_deltanet").err().unwrap();
    assert_eq!(error.to_string(), "unknown model `gated_deltanet`; did you mean `gated_delta_net`?");
    assert_eq!(selectivbench::error::exit_code(&error), 2);
}
