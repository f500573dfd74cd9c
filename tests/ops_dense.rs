//! The dense operations: against golden vectors, plain loops, and central differences in f64.

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor, Var};
use selectivbench::ops::philox::{philox4x32, unit_f32};
use selectivbench::ops::tape::{Arg, no_grad};

/// The tensors of a golden file, by name.
fn golden(path: &str) -> HashMap<String, Tensor> {
    let path = format!("{}/tests/golden/{path}.safetensors", env!("CARGO_MANIFEST_DIR"));
    candle_core::safetensors::load(&path, &Device::Cpu).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn values(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).and_then(|x| x.flatten_all()).and_then(|x| x.to_vec1()).unwrap()
}

/// √(Σ (a−b)² / Σ b²).
fn rel_rms(got: &Tensor, want: &Tensor) -> f64 {
    assert_eq!(got.elem_count(), want.elem_count(), "{:?} against {:?}", got.shape(), want.shape());
    let (got, want) = (values(got), values(want));
    let error: f64 = got.iter().zip(&want).map(|(a, b)| (a - b) * (a - b)).sum();
    let scale: f64 = want.iter().map(|b| b * b).sum();
    if error == 0.0 { 0.0 } else { (error / scale.max(f64::MIN_POSITIVE)).sqrt() }
}

/// Roughly normal numbers, the same for the same `salt`.
fn random(shape: impl Into<candle_core::Shape>, salt: u32) -> Tensor {
    let shape = shape.into();
    let values: Vec<f64> = (0..shape.elem_count() as u32)
        .map(|i| {
            let x = philox4x32([i, 0, 0, salt], [17, 4]);
            (x.iter().map(|&x| unit_f32(x) as f64).sum::<f64>() - 2.0) * 3f64.sqrt()
        })
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Σ over all outputs of output · weight, with weights that differ everywhere.
fn loss(outputs: &[Tensor]) -> Result<Tensor> {
    let mut total = Tensor::zeros((), outputs[0].dtype(), &Device::Cpu)?;
    for (i, output) in outputs.iter().enumerate() {
        if output.elem_count() > 0 {
            let weight = random(output.shape(), 900 + i as u32).to_dtype(output.dtype())?;
            total = (total + (output * weight)?.sum_all()?)?;
        }
    }
    Ok(total)
}

/// The gradient of [`loss`] for every input.
fn gradients(inputs: &[Tensor], f: &dyn Fn(&[Tensor]) -> Result<Vec<Tensor>>) -> Vec<Tensor> {
    let vars: Vec<Var> = inputs.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let grads = loss(&f(&tensors).unwrap()).unwrap().backward().unwrap();
    tensors.iter().map(|x| grads.get(x).cloned().unwrap_or_else(|| x.zeros_like().unwrap())).collect()
}

/// Every gradient of `f` against central differences.
fn check_gradients(name: &str, inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Vec<Tensor>>) {
    const STEP: f64 = 1e-4;
    let grads = gradients(inputs, &f);
    for (i, (input, grad)) in inputs.iter().zip(&grads).enumerate() {
        assert_eq!(grad.shape(), input.shape(), "{name}: shape of gradient {i}");
        let base = values(input);
        let (got, stride) = (values(grad), base.len().div_ceil(60).max(1));
        let scale = got.iter().fold(1e-3, |m: f64, g| m.max(g.abs()));
        // All of a small input, every few of a large one.
        for k in (0..base.len()).step_by(stride) {
            let at = |delta: f64| {
                let mut moved = base.clone();
                moved[k] += delta;
                let mut inputs = inputs.to_vec();
                inputs[i] = Tensor::from_vec(moved, input.shape(), &Device::Cpu).unwrap();
                no_grad(|| loss(&f(&inputs).unwrap()).unwrap().to_scalar::<f64>().unwrap())
            };
            let want = (8.0 * (at(STEP) - at(-STEP)) - (at(2.0 * STEP) - at(-2.0 * STEP))) / (12.0 * STEP);
            assert!(
                (got[k] - want).abs() < 1e-7 * scale,
                "{name}: input {i} element {k}: {} against {want} by differences",
                got[k]
            );
        }
    }
}

/// The bits of all results must not depend on the number of threads.
fn check_threads(name: &str, inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Vec<Tensor>> + Sync) {
    let inputs: Vec<Tensor> = inputs.iter().map(|x| x.to_dtype(DType::F32).unwrap()).collect();
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let outputs = f(&inputs).unwrap();
            let grads = gradients(&inputs, &f);
            outputs.iter().chain(&grads).flat_map(values).map(f64::to_bits).collect::<Vec<_>>()
        })
    };
    let one = run(1);
    for threads in [2, 3, 7] {
        assert!(one == run(threads), "{name}: {threads} threads give other bits than one");
    }
}

fn arg(x: &Tensor) -> Arg {
    Arg::from(x)
}

mod linear {
    use super::*;
    use selectivbench::ops::linear::linear;

    #[test]
    fn matches_candle_matmul() {
        for (rows, i, o) in [(1, 1, 1), (1, 81, 5), (3, 9, 81), (65, 5, 9), (256, 64, 3), (1300, 81, 81)] {
            let (x, w, b) = (random((rows, i), 1), random((o, i), 2), random(o, 3));
            let want = x.matmul(&w.t().unwrap()).unwrap().broadcast_add(&b).unwrap();
            assert!(rel_rms(&linear(&x, &w, Some(arg(&b))).unwrap(), &want) < 1e-14);
            let single = |x: &Tensor| x.to_dtype(DType::F32).unwrap();
            let got = linear(&single(&x), &single(&w), Some(arg(&single(&b)))).unwrap();
            assert!(rel_rms(&got, &want) < 1e-6);
        }
    }

    #[test]
    fn gradients_match_differences() {
        for (b, t, i, o) in [(1, 1, 1, 1), (2, 3, 5, 9), (1, 63, 9, 5), (2, 65, 3, 81), (3, 700, 2, 2)] {
            let inputs = [random((b, t, i), 1), random((o, i), 2), random(o, 3)];
            check_gradients("linear", &inputs, |x| Ok(vec![linear(&x[0], &x[1], Some(arg(&x[2])))?]));
            check_gradients("linear without bias", &inputs[..2], |x| Ok(vec![linear(&x[0], &x[1], None)?]));
        }
    }

    #[test]
    fn threads_and_batch_do_not_matter() {
        let inputs = [random((5, 1111, 81), 1), random((160, 81), 2), random(160, 3)];
        check_threads("linear", &inputs, |x| Ok(vec![linear(&x[0], &x[1], Some(arg(&x[2])))?]));
        // k = 1100 is summed in several parts.
        let (x, w) = (random((2, 300, 1100), 1), random((9, 1100), 2));
        let (x, w) = (x.to_dtype(DType::F32).unwrap(), w.to_dtype(DType::F32).unwrap());
        let whole = linear(&x, &w, None).unwrap();
        for (start, len) in [(0, 1), (17, 2), (43, 257), (299, 1)] {
            let piece = linear(&x.narrow(1, start, len).unwrap(), &w, None).unwrap();
            assert_eq!(values(&piece), values(&whole.narrow(1, start, len).unwrap()));
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_named() {
        let error = linear(&random((2, 4), 1), &random((3, 5), 2), None).unwrap_err().to_string();
        assert!(error.contains("takes 5 inputs"), "{error}");
    }
}

mod embedding {
    use super::*;
    use selectivbench::ops::embedding::embedding;

    fn ids(batch: usize, steps: usize, vocab: u32) -> Tensor {
        let ids: Vec<u32> = (0..(batch * steps) as u32)
            .map(|i| if i % 3 == 2 { u32::MAX } else { (i * 7) % vocab })
            .collect();
        Tensor::from_vec(ids, (batch, steps), &Device::Cpu).unwrap()
    }

    #[test]
    fn equals_the_one_hot_product() {
        let (ids, w, b) = (ids(3, 65, 5), random((9, 5), 1), random(9, 2));
        let one_hot: Vec<f64> = ids
            .flatten_all()
            .unwrap()
            .to_vec1::<u32>()
            .unwrap()
            .iter()
            .flat_map(|&id| (0..5).map(move |v| (v == id) as u8 as f64))
            .collect();
        let one_hot = Tensor::from_vec(one_hot, (3, 65, 5), &Device::Cpu).unwrap();
        let want = selectivbench::ops::linear::linear(&one_hot, &w, Some(arg(&b))).unwrap();
        assert!(rel_rms(&embedding(&ids, &w, &b).unwrap(), &want) < 1e-15);
    }

    #[test]
    fn gradients_match_differences() {
        for (b, t) in [(1, 1), (2, 3), (2, 63), (3, 1500)] {
            let ids = ids(b, t, 5);
            let inputs = [random((9, 5), 1), random(9, 2)];
            check_gradients("embedding", &inputs, |x| Ok(vec![embedding(&ids, &x[0], &x[1])?]));
        }
        let ids = ids(3, 3000, 41);
        let inputs = [random((81, 41), 1), random(81, 2)];
        check_threads("embedding", &inputs, |x| Ok(vec![embedding(&ids, &x[0], &x[1])?]));
    }
}

mod causal_conv1d {
    use super::*;
    use selectivbench::ops::causal_conv1d::{Split, causal_conv1d_silu, causal_conv1d_silu_split};

    #[test]
    fn matches_golden() {
        let g = golden("tensors/op_causal_conv1d_silu");
        for (dtype, tolerance) in [(DType::F64, 1e-10), (DType::F32, 1e-5)] {
            let get = |name: &str| g[name].to_dtype(dtype).unwrap();
            let vars = ["in.x", "in.w", "in.b"].map(|name| Var::from_tensor(&get(name)).unwrap());
            let [x, w, b] = vars.each_ref().map(|v| v.as_tensor());
            let (o, state) = causal_conv1d_silu(x, w, Some(arg(b)), None).unwrap();
            let loss = |y: &Tensor, w: &str| (y * get(w)).unwrap().sum_all().unwrap();
            let grads = (loss(&o, "w.o") + loss(&state, "w.final_state")).unwrap().backward().unwrap();
            for (name, got) in [
                ("out.o", &o),
                ("out.final_state", &state),
                ("grad.x", grads.get(x).unwrap()),
                ("grad.w", grads.get(w).unwrap()),
                ("grad.b", grads.get(b).unwrap()),
            ] {
                let error = rel_rms(got, &g[name]);
                println!("causal_conv1d_silu {dtype:?} {name}: {error:.1e}");
                assert!(error < tolerance, "{name} in {dtype:?}: {error:e}");
            }
        }
    }

    #[test]
    fn gradients_match_differences() {
        for (b, t, d, w) in
            [(1, 1, 5, 4), (2, 2, 9, 4), (2, 3, 3, 4), (1, 63, 5, 4), (2, 65, 9, 4), (2, 7, 3, 2)]
        {
            let inputs = [random((b, t, d), 1), random((d, 1, w), 2), random(d, 3), random((b, w - 1, d), 4)];
            let both = |(y, state)| vec![y, state];
            check_gradients("causal_conv1d", &inputs, |x| {
                causal_conv1d_silu(&x[0], &x[1], Some(arg(&x[2])), Some(arg(&x[3]))).map(both)
            });
            check_gradients("causal_conv1d, x and weight", &inputs[..2], |x| {
                causal_conv1d_silu(&x[0], &x[1], None, None).map(both)
            });
            check_gradients("causal_conv1d, final state", &inputs[..3], |x| {
                Ok(vec![causal_conv1d_silu(&x[0], &x[1], Some(arg(&x[2])), None)?.1])
            });
        }
        let inputs = [random((3, 300, 81), 1), random((81, 4), 2), random(81, 3)];
        check_threads("causal_conv1d", &inputs, |x| {
            causal_conv1d_silu(&x[0], &x[1], Some(arg(&x[2])), None).map(|(y, s)| vec![y, s])
        });
    }

    #[test]
    fn parts_are_those_of_the_whole() {
        let inputs = [random((2, 7, 14), 1), random((10, 4), 2), random(10, 3)];
        let columns = |x: &Tensor, start, len| x.narrow(2, start, len).unwrap().contiguous().unwrap();
        let convolved = columns(&inputs[0], 0, 10);
        let whole = causal_conv1d_silu(&convolved, &inputs[1], Some(arg(&inputs[2])), None).unwrap().0;
        let split =
            |x: &[Tensor]| causal_conv1d_silu_split(&x[0], &x[1], Some(arg(&x[2])), None, [2, 3, 5], &[1, 2]);
        let Split { parts, plain, .. } = split(&inputs).unwrap();
        for (part, (start, len)) in parts.iter().zip([(0, 2), (2, 3), (5, 5)]) {
            assert_eq!(values(part), values(&columns(&whole, start, len)));
        }
        for (part, (start, len)) in plain.iter().zip([(10, 1), (11, 2)]) {
            assert_eq!(values(part), values(&columns(&inputs[0], start, len)));
        }
        check_gradients("causal_conv1d, parts", &inputs, |x| {
            split(x).map(|Split { parts, plain, .. }| parts.into_iter().chain(plain).collect())
        });
        assert!(causal_conv1d_silu_split(&inputs[0], &inputs[1], None, None, [2, 3], &[]).is_err());
        assert!(causal_conv1d_silu_split(&inputs[0], &inputs[1], None, None, [2, 8], &[5]).is_err());
    }

    #[test]
    fn one_tap_has_an_empty_state() {
        let inputs = [random((2, 5, 3), 1), random((3, 1), 2)];
        let (y, state) = causal_conv1d_silu(&inputs[0], &inputs[1], None, None).unwrap();
        assert_eq!((y.dims(), state.dims()), (&[2, 5, 3][..], &[2, 0, 3][..]));
        check_gradients("causal_conv1d, one tap", &inputs, |x| {
            Ok(vec![causal_conv1d_silu(&x[0], &x[1], None, None)?.0])
        });
    }

    #[test]
    fn pieces_give_the_same_bits() {
        let single = |x: Tensor| x.to_dtype(DType::F32).unwrap();
        let (x, w, b) = (single(random((2, 65, 9), 1)), single(random((9, 4), 2)), single(random(9, 3)));
        let (whole, last) = causal_conv1d_silu(&x, &w, Some(arg(&b)), None).unwrap();
        let (mut at, mut state, mut pieces) = (0, None, vec![]);
        for len in [1, 1, 2, 3, 17, 41] {
            let x = x.narrow(1, at, len).unwrap();
            let (y, next) = causal_conv1d_silu(&x, &w, Some(arg(&b)), state.as_ref().map(arg)).unwrap();
            pieces.push(y);
            state = Some(next);
            at += len;
        }
        assert_eq!(values(&Tensor::cat(&pieces, 1).unwrap()), values(&whole));
        assert_eq!(values(&state.unwrap()), values(&last));
    }
}

mod l2norm {
    use super::*;
    use selectivbench::ops::l2norm::l2norm;

    #[test]
    fn value_and_gradient() {
        let x = random((3, 5, 9), 1);
        let want =
            x.broadcast_div(&(x.sqr().unwrap().sum_keepdim(2).unwrap() + 1e-6).unwrap().sqrt().unwrap());
        assert!(rel_rms(&l2norm(&x).unwrap(), &want.unwrap()) < 1e-15);
        for d in [2, 5, 9, 81] {
            check_gradients("l2norm", &[random((2, 3, d), 1)], |x| Ok(vec![l2norm(&x[0])?]));
        }
        let zero = Tensor::zeros((1, 4), DType::F64, &Device::Cpu).unwrap();
        assert_eq!(values(&l2norm(&zero).unwrap()), [0.0; 4]);
        check_threads("l2norm", &[random((700, 9), 1)], |x| Ok(vec![l2norm(&x[0])?]));
    }
}

mod norms {
    use super::*;
    use selectivbench::ops::norms::{GateOrder, RmsEps, gated_rms_norm, layer_norm, rms_norm};

    /// x / √(mean x²) over groups of `n`, with the epsilon inside or outside.
    fn plain_rms(x: &Tensor, n: usize, eps: f64, place: RmsEps) -> Tensor {
        let x2 = x.reshape(((), n)).unwrap();
        let square = (x2.sqr().unwrap().sum_keepdim(1).unwrap() / n as f64).unwrap();
        let root = match place {
            RmsEps::Inside => (square + eps).unwrap().sqrt().unwrap(),
            RmsEps::Outside => (square.sqrt().unwrap() + eps).unwrap(),
        };
        x2.broadcast_div(&root).unwrap().reshape(x.shape()).unwrap()
    }

    fn times_weight(x: &Tensor, w: &Tensor) -> Tensor {
        let n = w.elem_count();
        x.reshape(((), n)).unwrap().broadcast_mul(w).unwrap().reshape(x.shape()).unwrap()
    }

    #[test]
    fn layer_norm_value_and_gradient() {
        let (x, w, b) = (random((3, 5, 81), 1), random(81, 2), random(81, 3));
        let centred = x.broadcast_sub(&x.mean_keepdim(2).unwrap()).unwrap();
        let want = plain_rms(&centred, 81, 1e-5, RmsEps::Inside);
        let want = want.broadcast_mul(&w).unwrap().broadcast_add(&b).unwrap();
        assert!(rel_rms(&layer_norm(&x, &w, &b, 1e-5).unwrap(), &want) < 1e-14);
        for (t, d) in [(1, 5), (2, 9), (3, 81), (63, 3), (65, 2)] {
            let inputs = [random((2, t, d), 1), random(d, 2), random(d, 3)];
            check_gradients("layer_norm", &inputs, |x| Ok(vec![layer_norm(&x[0], &x[1], &x[2], 1e-3)?]));
        }
        check_threads("layer_norm", &[random((3, 300, 9), 1), w_of(9), w_of(9)], |x| {
            Ok(vec![layer_norm(&x[0], &x[1], &x[2], 1e-5)?])
        });
    }

    fn w_of(n: usize) -> Tensor {
        random(n, 7)
    }

    #[test]
    fn rms_norm_value_and_gradient() {
        for (place, eps) in [(RmsEps::Inside, 1e-5), (RmsEps::Outside, 1e-2)] {
            for (t, groups, n) in [(1, 1, 5), (2, 3, 9), (3, 2, 81), (65, 1, 3)] {
                let (x, w) = (random((2, t, groups * n), 1), w_of(n));
                let want = times_weight(&plain_rms(&x, n, eps, place), &w);
                assert!(rel_rms(&rms_norm(&x, &w, eps, place).unwrap(), &want) < 1e-14);
                check_gradients("rms_norm", &[x, w], |x| Ok(vec![rms_norm(&x[0], &x[1], eps, place)?]));
            }
        }
        let zero = Var::zeros((1, 4), DType::F64, &Device::Cpu).unwrap();
        let y = rms_norm(zero.as_tensor(), &w_of(4), 1e-8, RmsEps::Outside).unwrap();
        let grads = y.sum_all().unwrap().backward().unwrap();
        assert!(values(grads.get(zero.as_tensor()).unwrap()).iter().all(|g| g.is_finite()));
        check_threads("rms_norm", &[random((3, 300, 18), 1), w_of(9)], |x| {
            Ok(vec![rms_norm(&x[0], &x[1], 1e-5, RmsEps::Inside)?])
        });
    }

    #[test]
    fn gated_rms_norm_value_and_gradient() {
        for order in [GateOrder::AfterNorm, GateOrder::BeforeNorm, GateOrder::SigmoidAfterNorm] {
            for (t, groups, n) in [(1, 1, 5), (2, 3, 9), (3, 1, 81), (65, 2, 3)] {
                let m = groups * n;
                let (x, z, w) = (random((2, t, m), 1), random((2, t, m), 2), w_of(n));
                let gate = match order {
                    GateOrder::SigmoidAfterNorm => ((z.neg().unwrap().exp().unwrap() + 1.0).unwrap()).recip(),
                    _ => z.silu(),
                };
                let gate = gate.unwrap();
                let want = match order {
                    GateOrder::AfterNorm | GateOrder::SigmoidAfterNorm => {
                        (times_weight(&plain_rms(&x, n, 1e-5, RmsEps::Inside), &w) * gate).unwrap()
                    }
                    GateOrder::BeforeNorm => {
                        times_weight(&plain_rms(&(&x * gate).unwrap(), n, 1e-5, RmsEps::Inside), &w)
                    }
                };
                assert!(rel_rms(&gated_rms_norm(&x, &z, &w, 1e-5, order).unwrap(), &want) < 1e-14);
                check_gradients("gated_rms_norm", &[x, z, w], |x| {
                    Ok(vec![gated_rms_norm(&x[0], &x[1], &x[2], 1e-2, order)?])
                });
            }
            let inputs = [random((3, 300, 18), 1), random((3, 300, 18), 2), w_of(9)];
            check_threads("gated_rms_norm", &inputs, |x| {
                Ok(vec![gated_rms_norm(&x[0], &x[1], &x[2], 1e-5, order)?])
            });
        }
    }
}

mod dropout {
    use super::*;
    use selectivbench::ops::dropout::{Dropout, dropout};
    use selectivbench::ops::norms::layer_norm;
    use selectivbench::ops::residual_norm::residual_dropout_layer_norm;

    const DROPOUT: Dropout = Dropout { p: 0.2, key: [5, 6], site: 3, first: 10, tied: false };

    #[test]
    fn the_mask_is_a_function_of_position() {
        let x = random((2, 65, 9), 1);
        let y = values(&dropout(&x, &DROPOUT).unwrap());
        for (i, (y, x)) in y.iter().zip(values(&x)).enumerate() {
            let (b, t, c) = (i / (65 * 9), i / 9 % 65, i % 9);
            let bits = philox4x32([c as u32 / 4, t as u32, 10 + b as u32, 3], [5, 6])[c % 4];
            let want = if unit_f32(bits) >= 0.2 { x * (1.0 / 0.8) } else { 0.0 };
            assert_eq!(*y, want, "{b} {t} {c}");
        }
        let second = dropout(&x.narrow(0, 1, 1).unwrap(), &Dropout { first: 11, ..DROPOUT }).unwrap();
        assert_eq!(values(&second), y[65 * 9..]);
    }

    #[test]
    fn a_tied_mask_is_that_of_the_first_step() {
        let x = Tensor::ones((2, 65, 9), DType::F64, &Device::Cpu).unwrap();
        let free = values(&dropout(&x, &DROPOUT).unwrap());
        let tied = values(&dropout(&x, &Dropout { tied: true, ..DROPOUT }).unwrap());
        for (i, y) in tied.into_iter().enumerate() {
            assert_eq!(y, free[i / (65 * 9) * 65 * 9 + i % 9]);
        }
    }

    #[test]
    fn keeps_the_mean_and_the_rate() {
        let ones = Tensor::ones((4, 200, 81), DType::F32, &Device::Cpu).unwrap();
        let y = values(&dropout(&ones, &DROPOUT).unwrap());
        let kept = y.iter().filter(|&&y| y > 0.0).count() as f64 / y.len() as f64;
        assert!((kept - 0.8).abs() < 0.005, "{kept}");
        assert!(dropout(&ones, &Dropout { p: 1.0, ..DROPOUT }).is_err());
        let all = dropout(&ones, &Dropout { p: 0.0, ..DROPOUT }).unwrap();
        assert_eq!(values(&all), values(&ones));
    }

    #[test]
    fn gradients_match_differences() {
        for (t, d) in [(1, 5), (2, 9), (3, 81), (65, 2)] {
            check_gradients("dropout", &[random((2, t, d), 1)], |x| Ok(vec![dropout(&x[0], &DROPOUT)?]));
        }
    }

    #[test]
    fn residual_norm_is_its_parts() {
        let inputs = |t, d| [random((2, t, d), 1), random((2, t, d), 2), random(d, 3), random(d, 4)];
        for mask in [None, Some(DROPOUT)] {
            let [branch, residual, w, b] = inputs(65, 81);
            let dropped = mask.map_or(branch.clone(), |mask| dropout(&branch, &mask).unwrap());
            let want = layer_norm(&(dropped + &residual).unwrap(), &w, &b, 1e-5).unwrap();
            let got = residual_dropout_layer_norm(&branch, &residual, &w, &b, 1e-5, mask).unwrap();
            assert!(rel_rms(&got, &want) < 1e-15);
            for (t, d) in [(1, 5), (2, 9), (3, 81), (63, 3)] {
                check_gradients("residual_norm", &inputs(t, d), |x| {
                    Ok(vec![residual_dropout_layer_norm(&x[0], &x[1], &x[2], &x[3], 1e-3, mask)?])
                });
            }
            check_threads("residual_norm", &inputs(300, 81), |x| {
                Ok(vec![residual_dropout_layer_norm(&x[0], &x[1], &x[2], &x[3], 1e-5, mask)?])
            });
        }
    }
}

mod head {
    use super::*;
    use selectivbench::ops::head::{PAD, Targets, Vote, head_cross_entropy, loss_and_votes};
    use selectivbench::ops::linear::linear;

    /// Windows of one to four steps; the sequences end with up to two steps of padding.
    fn targets(batch: usize, steps: usize, classes: usize) -> Targets {
        let (mut labels, mut element, mut elements) = (vec![], vec![], 1);
        for b in 0..batch {
            let (mut e, mut left) = (0, 1);
            for t in 0..steps {
                if left == 0 {
                    e += 1;
                    left = 1 + (b * 5 + t * 7) % 4;
                }
                left -= 1;
                labels.push(((b * 3 + e * 11) % classes) as u32);
                element.push(if t > 0 && t + b % 3 >= steps { PAD } else { e as u32 });
                elements = elements.max(e + 1);
            }
        }
        Targets { labels, element, batch, steps, elements }
    }

    fn piece(all: &Targets, start: usize, len: usize) -> Targets {
        let cut = |x: &[u32]| -> Vec<u32> {
            x.chunks(all.steps).flat_map(|row| row[start..start + len].to_vec()).collect()
        };
        Targets { labels: cut(&all.labels), element: cut(&all.element), steps: len, ..all.clone() }
    }

    /// Loss and votes by the plain definition.
    fn plain(logits: &Tensor, targets: &Targets) -> (f64, Vec<u32>) {
        let classes = logits.dim(2).unwrap();
        let mut sums = vec![vec![0.0; classes]; targets.batch * targets.elements];
        let mut seen = vec![false; sums.len()];
        let mut loss = 0.0;
        for (row, logits) in values(logits).chunks(classes).enumerate() {
            if targets.element[row] == PAD {
                continue;
            }
            let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = logits.iter().map(|x| (x - max).exp()).sum();
            loss += total.ln() + max - logits[targets.labels[row] as usize];
            let window = row / targets.steps * targets.elements + targets.element[row] as usize;
            seen[window] = true;
            for (sum, x) in sums[window].iter_mut().zip(logits) {
                *sum += (x - max).exp() / total;
            }
        }
        let vote = |(sum, seen): (&Vec<f64>, bool)| match seen {
            true => (0..classes).rev().max_by(|&a, &b| sum[a].total_cmp(&sum[b])).unwrap() as u32,
            false => u32::MAX,
        };
        (loss, sums.iter().zip(seen).map(vote).collect())
    }

    #[test]
    fn golden_losses_and_votes() {
        let metrics = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/data/metrics.json"));
        let metrics: serde_json::Value = serde_json::from_slice(&metrics.unwrap()).unwrap();
        let mut seen = 0;
        for case in metrics["cases"].as_array().unwrap() {
            if case["kind"] != "classify" {
                continue;
            }
            seen += 1;
            let name = case["name"].as_str().unwrap();
            let g = golden(&format!("data/metrics/{name}"));
            let (batch, elements, steps) = g["gap_mask"].dims3().unwrap();
            let (gaps, mask) = (values(&g["gap_mask"]), values(&g["mask"]));
            let element = (0..batch * steps).map(|row| {
                let (b, t) = (row / steps, row % steps);
                let inside = |e: &usize| gaps[(b * elements + e) * steps + t] == 1.0;
                match mask[row] == 1.0 {
                    true => (0..elements).find(inside).unwrap() as u32,
                    false => PAD,
                }
            });
            let labels = values(&g["labels"]).iter().map(|&l| l as u32).collect();
            let targets = Targets { labels, element: element.collect(), batch, steps, elements };
            let valid = targets.element.iter().filter(|&&e| e != PAD).count() as f64;
            let (loss, votes) = loss_and_votes(&g["logits"], &targets).unwrap();
            let want = case["loss"]["value"].as_f64().unwrap();
            let error = (loss / valid - want).abs() / want;
            println!("{name}: loss differs by {error:.1e}");
            assert!(error < 1e-12, "{name}: {} against {want}", loss / valid);
            for (vote, want) in votes.iter().zip(values(&g["predicted_class"])) {
                // An element without steps has no vote here; there it counts as class 0.
                assert_eq!(if *vote == u32::MAX { 0.0 } else { *vote as f64 }, want, "{name}");
            }
        }
        assert_eq!(seen, 4);
    }

    #[test]
    fn equals_the_plain_definition() {
        for (b, t, d, c) in [(1, 1, 5, 1), (1, 2, 9, 2), (3, 63, 9, 26), (5, 400, 5, 81), (2, 1100, 3, 5)] {
            let (x, w, bias) = (random((b, t, d), 1), random((c, d), 2), random(c, 3));
            let targets = targets(b, t, c);
            let logits = linear(&x, &w, Some(arg(&bias))).unwrap();
            let (loss, votes) = plain(&logits, &targets);
            let got = head_cross_entropy(&x, &w, &bias, &targets, 7.0).unwrap();
            assert!((got.loss_sum - loss).abs() < 1e-12 * loss.max(1.0));
            assert!((got.loss.to_scalar::<f64>().unwrap() - loss / 7.0).abs() < 1e-12 * loss.max(1.0));
            assert_eq!(got.votes, votes);
            assert_eq!(loss_and_votes(&logits, &targets).unwrap().1, votes);
        }
    }

    #[test]
    fn gradients_match_differences() {
        for (b, t, d, c) in [(1, 1, 5, 3), (2, 3, 9, 2), (3, 65, 5, 40), (3, 800, 2, 5)] {
            let inputs = [random((b, t, d), 1), random((c, d), 2), random(c, 3)];
            let targets = targets(b, t, c);
            // Squared, so that the incoming gradient is not one.
            check_gradients("head", &inputs, |x| {
                Ok(vec![head_cross_entropy(&x[0], &x[1], &x[2], &targets, 3.0)?.loss.sqr()?])
            });
        }
        let inputs = [random((5, 700, 9), 1), random((81, 9), 2), random(81, 3)];
        let targets = targets(5, 700, 81);
        check_threads("head", &inputs, |x| {
            Ok(vec![head_cross_entropy(&x[0], &x[1], &x[2], &targets, 3.0)?.loss])
        });
    }

    #[test]
    fn pieces_vote_as_one() {
        let single = |x: Tensor| x.to_dtype(DType::F32).unwrap();
        let (b, t, d, c) = (3, 701, 9, 26);
        let (x, w, bias) = (single(random((b, t, d), 1)), single(random((c, d), 2)), single(random(c, 3)));
        let all = targets(b, t, c);
        let whole = no_grad(|| head_cross_entropy(&x, &w, &bias, &all, 1.0)).unwrap();
        for salt in 0..4 {
            let mut vote = Vote::new(b, c);
            let (mut at, mut i) = (0, 0);
            while at < t {
                let bits = philox4x32([i, 0, 0, salt], [3, 3])[0] as usize;
                let len = (1 + bits % [3, 40, 300, 700][salt as usize]).min(t - at);
                vote.feed(&x.narrow(1, at, len).unwrap(), &w, &bias, &piece(&all, at, len)).unwrap();
                at += len;
                i += 1;
            }
            let (votes, loss, steps) = vote.finish();
            assert_eq!(votes, whole.votes);
            assert_eq!(loss, whole.loss_sum);
            assert_eq!(steps, all.element.iter().filter(|&&e| e != PAD).count());
        }
    }

    #[test]
    fn a_label_that_is_no_class_is_refused() {
        let mut targets = targets(1, 3, 2);
        targets.labels[1] = 2;
        let result =
            head_cross_entropy(&random((1, 3, 4), 1), &random((2, 4), 2), &random(2, 3), &targets, 1.0);
        assert!(result.err().unwrap().to_string().contains("label 2 of 2 classes"));
    }

    #[test]
    fn nan_reaches_the_loss() {
        let (mut x, targets) = (values(&random((1, 3, 4), 1)), targets(1, 3, 2));
        x[5] = f64::NAN;
        let x = Tensor::from_vec(x, (1, 3, 4), &Device::Cpu).unwrap();
        let out = head_cross_entropy(&x, &random((2, 4), 2), &random(2, 3), &targets, 1.0).unwrap();
        assert!(out.loss_sum.is_nan());
    }
}

mod swiglu {
    use super::*;
    use selectivbench::ops::swiglu::swiglu;

    #[test]
    fn value_and_gradient() {
        let (x, beta) = (random((2, 3, 18), 1), random(1, 2));
        let (a, b) = (x.narrow(2, 0, 9).unwrap(), x.narrow(2, 9, 9).unwrap());
        let gate = (a.broadcast_mul(&beta).unwrap().neg().unwrap().exp().unwrap() + 1.0).unwrap();
        let want = ((a / gate).unwrap() * b).unwrap();
        assert!(rel_rms(&swiglu(&x, &beta, None).unwrap(), &want) < 1e-14);
        let bias = random(18, 3);
        let (shifted, zero) = (x.broadcast_sub(&bias).unwrap(), bias.zeros_like().unwrap());
        assert!(rel_rms(&swiglu(&shifted, &beta, Some(Arg::from(&bias))).unwrap(), &want) < 1e-14);
        assert!(rel_rms(&swiglu(&x, &beta, Some(Arg::from(&zero))).unwrap(), &want) < 1e-14);
        for (t, n) in [(1, 5), (2, 9), (65, 3)] {
            let inputs = [random((2, t, 2 * n), 1), random(1, 2), random(2 * n, 3)];
            check_gradients("swiglu", &inputs[..2], |x| Ok(vec![swiglu(&x[0], &x[1], None)?]));
            check_gradients("swiglu", &inputs, |x| Ok(vec![swiglu(&x[0], &x[1], Some(Arg::from(&x[2])))?]));
        }
        check_threads("swiglu", &[random((3, 300, 18), 1), random(1, 2), random(18, 3)], |x| {
            Ok(vec![swiglu(&x[0], &x[1], Some(Arg::from(&x[2])))?])
        });
        assert!(swiglu(&random((2, 3), 1), &beta, None).is_err());
        assert!(swiglu(&x, &beta, Some(Arg::from(&beta))).is_err());
    }
}

mod activations {
    use super::*;
    use selectivbench::ops::activations::{gelu, glu};

    #[test]
    fn values_and_gradients() {
        // x Φ(x), to sixteen digits.
        let x = Tensor::new(&[-3.0, -1.0, 0.0, 0.5, 2.0, 40.0], &Device::Cpu).unwrap();
        let want = [
            -0.004_049_694_094_890_284,
            -0.158_655_253_931_457_05,
            0.0,
            0.345_731_230_637_006_55,
            1.954_499_736_103_641_6,
            40.0,
        ];
        for (y, want) in values(&gelu(&x).unwrap()).into_iter().zip(want) {
            assert!((y - want).abs() <= 1e-13 * want.abs(), "{y} {want}");
        }
        let x = random((2, 3, 8), 1);
        let y = values(&glu(&x).unwrap());
        for (row, x) in values(&x).chunks(8).enumerate() {
            for i in 0..4 {
                let want = x[i] / (1.0 + (-x[i + 4]).exp());
                assert!((y[4 * row + i] - want).abs() < 1e-14);
            }
        }
        for n in [1, 5] {
            let inputs = [random((2, 3, 2 * n), 2)];
            check_gradients("gelu", &inputs, |x| Ok(vec![gelu(&x[0])?]));
            check_gradients("glu", &inputs, |x| Ok(vec![glu(&x[0])?]));
        }
        let inputs = [random((3, 200, 10), 3)];
        check_threads("gelu", &inputs, |x| Ok(vec![gelu(&x[0])?]));
        check_threads("glu", &inputs, |x| Ok(vec![glu(&x[0])?]));
        let error = glu(&random((2, 3), 1)).unwrap_err();
        assert!(error.to_string().contains("has no halves"), "{error}");
    }
}

mod attention {
    use super::*;
    use selectivbench::ops::attention::{causal_attention, forgetting_attention, qk_norm_rope, rope};

    /// Scores of every pair, in f64; with log forget gates of [B, S, H].
    fn plain([q, k, v]: [&Tensor; 3], g: Option<&Tensor>, scale: f64, window: Option<usize>) -> Tensor {
        let (b, t, h, d) = q.dims4().unwrap();
        let (_, s, _, e) = v.dims4().unwrap();
        let (q, k, v) = (values(q), values(k), values(v));
        let g = g.map_or(vec![0.0; b * s * h], values);
        let mut out = vec![0.0; b * t * h * e];
        for (b, h_, t_) in (0..b * h * t).map(|i| (i / (h * t), i / t % h, i % t)) {
            let score = |j: usize| -> f64 {
                (0..d).map(|c| q[((b * t + t_) * h + h_) * d + c] * k[((b * s + j) * h + h_) * d + c]).sum()
            };
            let seen = s - t + t_ + 1;
            let first = seen.saturating_sub(window.unwrap_or(seen));
            let forgotten = |j: usize| (j + 1..seen).map(|l| g[(b * s + l) * h + h_]).sum::<f64>();
            let weights: Vec<f64> = (first..seen).map(|j| (scale * score(j) + forgotten(j)).exp()).collect();
            let total: f64 = weights.iter().sum();
            for (j, weight) in (first..).zip(&weights) {
                for c in 0..e {
                    out[((b * t + t_) * h + h_) * e + c] +=
                        weight / total * v[((b * s + j) * h + h_) * e + c];
                }
            }
        }
        Tensor::from_vec(out, (b, t, h, e), &Device::Cpu).unwrap()
    }

    #[test]
    fn matches_the_plain_softmax() {
        for (b, t, s, h, d, e) in [
            (1, 1, 1, 1, 1, 1),
            (2, 3, 3, 2, 9, 5),
            (1, 63, 65, 3, 8, 8),
            (2, 65, 65, 2, 81, 81),
            (1, 2, 300, 2, 5, 5),
            (1, 260, 391, 1, 4, 6),
        ] {
            let (q, k, v) = (random((b, t, h, d), 1), random((b, s, h, d), 2), random((b, s, h, e), 3));
            for window in [None, Some(1), Some(2), Some(70), Some(1000)] {
                let want = plain([&q, &k, &v], None, 0.7, window);
                assert!(rel_rms(&causal_attention(&q, &k, &v, 0.7, window).unwrap(), &want) < 1e-13);
                let single = |x: &Tensor| x.to_dtype(DType::F32).unwrap();
                let got = causal_attention(&single(&q), &single(&k), &single(&v), 0.7, window).unwrap();
                assert!(rel_rms(&got, &want) < 2e-6, "{t} of {s}, window {window:?}");

                let g = log_gates((b, s, h));
                let want = plain([&q, &k, &v], Some(&g), 0.7, window);
                let got = forgetting_attention(&q, &k, &v, &g, 0.7, window).unwrap();
                assert!(rel_rms(&got, &want) < 1e-13, "{t} of {s}, forgetting, window {window:?}");
                let [q, k, v, g] = [&q, &k, &v, &g].map(single);
                let got = forgetting_attention(&q, &k, &v, &g, 0.7, window).unwrap();
                assert!(rel_rms(&got, &want) < 2e-6, "{t} of {s}, forgetting, window {window:?}");
            }
        }
    }

    /// Some close to 0, some far below.
    fn log_gates(shape: impl Into<candle_core::Shape>) -> Tensor {
        let x = random(shape, 4).affine(3.0, 1.0).unwrap();
        (x.neg().unwrap().exp().unwrap() + 1.0).unwrap().log().unwrap().neg().unwrap()
    }

    /// The sums of log gates reach thousands, where f32 knows no thousandths: differences must.
    #[test]
    fn long_sums_of_log_gates_stay_exact() {
        let steps = 6000;
        let inputs = [1, 2, 3].map(|salt| random((1, steps, 1, 4), salt));
        let gates = log_gates((1, steps, 1));
        assert!(values(&gates).iter().sum::<f64>() < -3000.0);
        let run = |dtype: DType| {
            let args = inputs.iter().chain([&gates]);
            let vars: Vec<Var> =
                args.map(|x| Var::from_tensor(&x.to_dtype(dtype).unwrap()).unwrap()).collect();
            let [q, k, v, g] = [0, 1, 2, 3].map(|i| vars[i].as_tensor());
            let o = forgetting_attention(q, k, v, g, 0.5, None).unwrap();
            let weight = random((1, steps, 1, 4), 9).to_dtype(dtype).unwrap();
            let grads = (&o * weight).unwrap().sum_all().unwrap().backward().unwrap();
            let grads = vars.iter().map(|var| grads.get(var).unwrap().clone());
            std::iter::once(o.clone()).chain(grads).collect::<Vec<_>>()
        };
        let tolerances = [2e-6, 2e-6, 2e-6, 2e-6, 2e-5];
        for (i, (got, want)) in run(DType::F32).iter().zip(run(DType::F64)).enumerate() {
            let error = rel_rms(got, &want);
            assert!(error < tolerances[i], "tensor {i} is off by {error:.1e}");
        }
    }

    #[test]
    fn large_scores_do_not_overflow() {
        let big = |salt| (random((1, 200, 1, 4), salt) * 60.0).unwrap().to_dtype(DType::F32).unwrap();
        let out = causal_attention(&big(1), &big(2), &big(3), 1.0, None).unwrap();
        assert!(values(&out).iter().all(|x| x.is_finite()));
    }

    #[test]
    fn gradients_match_differences() {
        for (b, t, s, h, d, e) in [(1, 1, 1, 1, 2, 2), (2, 3, 5, 2, 5, 9), (1, 65, 130, 2, 3, 2)] {
            let inputs = [random((b, t, h, d), 1), random((b, s, h, d), 2), random((b, s, h, e), 3)];
            for window in [None, Some(1), Some(3), Some(70)] {
                let run = |x: &[Tensor]| Ok(vec![causal_attention(&x[0], &x[1], &x[2], 0.5, window)?]);
                check_gradients("attention", &inputs, run);
                let mut inputs = inputs.to_vec();
                inputs.push(log_gates((b, s, h)));
                let run =
                    |x: &[Tensor]| Ok(vec![forgetting_attention(&x[0], &x[1], &x[2], &x[3], 0.5, window)?]);
                check_gradients("forgetting attention", &inputs, run);
            }
        }
        let inputs = [1, 2, 3].map(|salt| random((2, 200, 3, 9), salt));
        check_threads("attention", &inputs, |x| Ok(vec![causal_attention(&x[0], &x[1], &x[2], 0.5, None)?]));
        let gates = log_gates((2, 200, 3));
        check_threads("forgetting attention", &[&inputs[..], &[gates]].concat(), |x| {
            Ok(vec![forgetting_attention(&x[0], &x[1], &x[2], &x[3], 0.5, None)?])
        });
        let [q, k, v] = &inputs;
        assert!(forgetting_attention(q, k, v, &random((2, 199, 3), 4), 1.0, None).is_err());
        assert!(
            causal_attention(&inputs[0], &random((2, 3, 3, 9), 1), &random((2, 3, 3, 9), 1), 1.0, None)
                .is_err()
        );
        assert!(causal_attention(&inputs[0], &inputs[1], &inputs[2], 1.0, Some(0)).is_err());
    }

    #[test]
    fn norm_and_rotation() {
        let (x, w) = (random((2, 5, 3, 8), 1), random(8, 2));
        let (xs, ws) = (values(&x), values(&w));
        let mut want = vec![];
        for (row, x) in xs.chunks(8).enumerate() {
            let position = (7 + row / 3 % 5) as f64;
            let rms = (x.iter().map(|x| x * x).sum::<f64>() / 8.0).sqrt() + 1e-8;
            let x: Vec<f64> = x.iter().zip(&ws).map(|(x, w)| x / rms * w).collect();
            let angle = |i: usize| position * 1000f64.powf(-(2.0 * (i % 4) as f64) / 8.0);
            want.extend((0..4).map(|i| x[i] * angle(i).cos() + x[i + 4] * angle(i).sin()));
            want.extend((0..4).map(|i| -x[i] * angle(i).sin() + x[i + 4] * angle(i).cos()));
        }
        let want = Tensor::from_vec(want, x.shape(), &Device::Cpu).unwrap();
        assert!(rel_rms(&qk_norm_rope(&x, &w, 1000.0, 7).unwrap(), &want) < 1e-14);
        for (t, d) in [(1, 2), (3, 10), (65, 4)] {
            let inputs = [random((2, t, 3, d), 1), random(d, 2)];
            check_gradients("qk_norm_rope", &inputs, |x| Ok(vec![qk_norm_rope(&x[0], &x[1], 1000.0, 3)?]));
        }
        let inputs = [random((2, 200, 3, 10), 1), random(10, 2)];
        check_threads("qk_norm_rope", &inputs, |x| Ok(vec![qk_norm_rope(&x[0], &x[1], 1000.0, 0)?]));
        let error = qk_norm_rope(&random((1, 1, 1, 9), 1), &random(9, 2), 1000.0, 0).unwrap_err();
        assert!(error.to_string().contains("even head dimension, got 9"), "{error}");
    }

    #[test]
    fn rotation_alone() {
        let x = random((2, 5, 3, 8), 1);
        let mut want = vec![];
        for (row, x) in values(&x).chunks(8).enumerate() {
            let position = (7 + row / 3 % 5) as f64;
            let angle = |i: usize| position * 10_000f64.powf(-(2.0 * i as f64) / 8.0);
            want.extend((0..4).map(|i| x[i] * angle(i).cos() - x[i + 4] * angle(i).sin()));
            want.extend((0..4).map(|i| x[i] * angle(i).sin() + x[i + 4] * angle(i).cos()));
        }
        let want = Tensor::from_vec(want, x.shape(), &Device::Cpu).unwrap();
        assert!(rel_rms(&rope(&x, 10_000.0, 7).unwrap(), &want) < 1e-14);
        for (t, d) in [(1, 2), (3, 10), (65, 4)] {
            check_gradients("rope", &[random((2, t, 3, d), 1)], |x| Ok(vec![rope(&x[0], 1000.0, 3)?]));
        }
        check_threads("rope", &[random((2, 200, 3, 10), 1)], |x| Ok(vec![rope(&x[0], 1000.0, 0)?]));
        let error = rope(&random((1, 1, 1, 9), 1), 1000.0, 0).unwrap_err();
        assert!(error.to_string().contains("even head dimension, got 9"), "{error}");
    }
}

mod optim {
    use super::*;
    use selectivbench::ops::optim::{AdamStep, clip_scale, global_norm};

    fn step(decoupled: bool, weight_decay: f64) -> AdamStep {
        AdamStep {
            lr: 0.1,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay,
            decoupled,
            step: 1,
            grad_scale: 1.0,
        }
    }

    /// Constant gradients: both corrected moments are exact, so every update moves by lr·g/(|g| + eps).
    #[test]
    fn constant_gradients_move_by_the_learning_rate() {
        let flat = |x: [f64; 3]| Tensor::from_vec(x.to_vec(), 3, &Device::Cpu).unwrap();
        let (value, grad) = (flat([1.0, 2.0, 3.0]), flat([0.5, -4.0, 0.0]));
        let (m, v) = (value.zeros_like().unwrap(), value.zeros_like().unwrap());
        for k in 1..=3 {
            AdamStep { step: k, ..step(false, 0.0) }.apply(&value, &grad, &m, &v).unwrap();
            let moved = 0.1 * k as f64;
            for (got, want) in values(&value).iter().zip([1.0 - moved, 2.0 + moved, 3.0]) {
                assert!((got - want).abs() < 1e-8, "{got} {want}");
            }
        }
        // The same with AdamW: values shrink by 1 − lr·decay first.
        let (value, m, v) = (flat([1.0, 2.0, 3.0]), m.zeros_like().unwrap(), v.zeros_like().unwrap());
        step(true, 0.5).apply(&value, &grad, &m, &v).unwrap();
        for (got, want) in values(&value).iter().zip([0.95 - 0.1, 1.9 + 0.1, 2.85]) {
            assert!((got - want).abs() < 1e-8, "{got} {want}");
        }
        assert!(AdamStep { step: 0, ..step(false, 0.0) }.apply(&value, &grad, &m, &v).is_err());
    }

    #[test]
    fn many_updates_match_plain_f64() {
        const N: usize = 40_001;
        for (dtype, tolerance) in [(DType::F64, 1e-14), (DType::F32, 1e-6)] {
            for (decoupled, decay) in [(false, 0.0), (false, 0.01), (true, 0.01)] {
                // Views of a longer buffer, as the parameters are.
                let buffer = random(N + 7, 1).to_dtype(dtype).unwrap();
                let value = buffer.narrow(0, 3, N).unwrap();
                let (mut x, rest) = (values(&value), values(&buffer.narrow(0, N + 3, 4).unwrap()));
                let (m, v) = (value.zeros_like().unwrap(), value.zeros_like().unwrap());
                let (mut mx, mut vx) = (vec![0.0; N], vec![0.0; N]);
                for k in 1..=5 {
                    let grad = random(N, 10 + k).to_dtype(dtype).unwrap();
                    let rule = AdamStep { step: k as u64, grad_scale: 0.3, ..step(decoupled, decay) };
                    rule.apply(&value, &grad, &m, &v).unwrap();
                    for (i, g) in values(&grad).iter().enumerate() {
                        let mut g = 0.3 * g;
                        if decoupled {
                            x[i] -= 0.1 * decay * x[i];
                        } else {
                            g += decay * x[i];
                        }
                        mx[i] = 0.9 * mx[i] + 0.1 * g;
                        vx[i] = 0.999 * vx[i] + 0.001 * g * g;
                        let (mh, vh) =
                            (mx[i] / (1.0 - 0.9f64.powi(k as i32)), vx[i] / (1.0 - 0.999f64.powi(k as i32)));
                        x[i] -= 0.1 * mh / (vh.sqrt() + 1e-8);
                    }
                }
                let error = rel_rms(&value, &Tensor::from_vec(x, N, &Device::Cpu).unwrap());
                println!("adam {dtype:?} decoupled {decoupled} decay {decay}: {error:.1e}");
                assert!(error < tolerance, "{error:e}");
                assert_eq!(values(&buffer.narrow(0, N + 3, 4).unwrap()), rest);
            }
        }
    }

    #[test]
    fn norm_and_clipping() {
        let x = random(100_003, 1);
        let want = values(&x).iter().map(|x| x * x).sum::<f64>().sqrt();
        let norm = |threads, x: &Tensor| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| global_norm(x).unwrap())
        };
        assert!((norm(1, &x) / want - 1.0).abs() < 1e-13);
        assert_eq!(norm(1, &x).to_bits(), norm(5, &x).to_bits());
        let huge = Tensor::full(1e30f32, 10, &Device::Cpu).unwrap();
        assert!((global_norm(&huge).unwrap() / (1e30 * 10f64.sqrt()) - 1.0).abs() < 1e-6);
        for bad in [f32::NAN, f32::INFINITY] {
            let x = Tensor::new(&[1.0, bad, 2.0], &Device::Cpu).unwrap();
            assert!(!global_norm(&x).unwrap().is_finite());
        }
        assert_eq!(clip_scale(0.5, 1.0), 1.0);
        assert!((clip_scale(4.0, 1.0) - 1.0 / 4.000001).abs() < 1e-15);
        assert!(clip_scale(f64::NAN, 1.0).is_nan());
    }
}

/// Operations without a gradient would cut the graph silently; only the adapter may use them, where
/// nothing is recorded.
#[test]
fn nothing_cuts_the_graph_silently() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = vec![root.join("Cargo.toml")];
    let mut folders = vec![root.join("src")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { folders.push(path) } else { files.push(path) }
        }
    }
    assert!(files.len() > 10);
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        let adapter = file.ends_with("src/ops/tape.rs");
        for word in
            ["candle_nn", "candle-nn", ".softmax", "apply_op1_no_bwd", "apply_op2_no_bwd", "apply_op3_no_bwd"]
        {
            assert!(
                !text.contains(word) || adapter && word.starts_with("apply_op"),
                "{word} in {}",
                file.display()
            );
        }
    }
}
