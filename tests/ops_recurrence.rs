//! The recurrences against the authors' layers, finite differences and themselves.

mod common;

use candle_core::{DType, Result, Tensor, Var};
use common::*;
use selectivbench::ops::delta::{gated_delta_rule, gated_sum_rule};
use selectivbench::ops::dplr::dplr;
use selectivbench::ops::gates;
use selectivbench::ops::gla::gla;
use selectivbench::ops::gru::gru;
use selectivbench::ops::kda::{kda_gate, kda_keys};
use selectivbench::ops::mesa::{States, mesa};
use selectivbench::ops::mlstm::{State, mlstm};
use selectivbench::ops::rwkv7::{rwkv7_keys, rwkv7_read, token_shift};
use selectivbench::ops::s4d::s4d;
use selectivbench::ops::selective_scan::selective_scan;
use selectivbench::ops::ssd::ssd;

/// The bounds on relative RMS errors against the golden tensors.
const BOUNDS: [(DType, f64); 2] = [(DType::F64, 1e-10), (DType::F32, 1e-5)];

/// A golden tensor in the op's layout: most need nothing.
type Layout = fn(&str, Tensor) -> Result<Tensor>;

fn as_is(_: &str, tensor: Tensor) -> Result<Tensor> {
    Ok(tensor)
}

/// Runs `f` on the golden inputs called `names` and compares outputs, final state and every gradient.
/// `layout` brings golden tensors into the op's layout, `back` gradients of the op to the golden's.
fn check_golden(
    file: &str,
    names: &[&str],
    layout: Layout,
    f: impl Fn(&[Tensor]) -> Result<(Tensor, Tensor)>,
) -> Result<()> {
    let golden = Golden::open(file);
    for (dtype, bound) in BOUNDS {
        let vars: Vec<Var> = names
            .iter()
            .map(|name| Var::from_tensor(&layout(name, golden.input(name, dtype))?))
            .collect::<Result<_>>()?;
        let args: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        let (o, state) = f(&args)?;
        let w_o = layout("o", golden.get("w.o", dtype))?;
        let w_state = golden.get("w.final_state", dtype);
        let loss = ((&o * w_o)?.sum_all()? + (&state * w_state)?.sum_all()?)?;
        let grads = loss.backward()?;
        let mut worst = 0.0f64;
        let mut compare = |what: &str, got: &Tensor, want: Tensor| {
            worst = worst.max(relative_rms(got, &want));
            assert_close(&format!("{file} {dtype:?} {what}"), got, &want, bound);
        };
        compare("o", &o, layout("o", golden.get("out.o", DType::F64))?);
        compare("final_state", &state, golden.get("out.final_state", DType::F64));
        for (name, arg) in names.iter().zip(&args) {
            let grad = grads.get(arg).expect("a gradient for every input");
            let want = layout(name, golden.get(&format!("grad.{name}"), DType::F64))?;
            compare(&format!("gradient of {name}"), grad, want);
        }
        println!("{file} {dtype:?}: worst relative RMS error {worst:.1e}");
    }
    Ok(())
}

/// The recurrences as functions of a list of tensors, for the checks that all of them share.
struct Case {
    name: &'static str,
    /// Names of the inputs; the last is the initial state.
    inputs: Vec<&'static str>,
    /// Which inputs have a time axis (axis 1).
    timed: Vec<bool>,
    /// Inputs for a batch, a number of steps, a key dim and a value dim.
    make: fn(usize, usize, usize, usize) -> Vec<Tensor>,
    run: fn(&[Tensor]) -> Result<(Tensor, Tensor)>,
}

fn unit_rows(x: Tensor) -> Tensor {
    let norm = x.sqr().and_then(|x| x.sum_keepdim(candle_core::D::Minus1)?.sqrt()).expect("rows");
    x.broadcast_div(&norm).expect("rows")
}

fn sigmoid(x: Tensor, scale: f64) -> Tensor {
    ((x.neg().and_then(|x| x.exp()).expect("numbers") + 1.0).and_then(|x| x.recip()).expect("numbers")
        * scale)
        .expect("numbers")
}

/// Log decays: negative, about `scale` in size.
fn log_decay(x: Tensor, scale: f64) -> Tensor {
    (x.abs().expect("numbers") * -scale).expect("numbers")
}

const HEADS: usize = 2;

fn delta_inputs(n: usize, batch: usize, steps: usize, k: usize, v: usize) -> Vec<Tensor> {
    vec![
        unit_rows(noise(1, &[batch, steps, HEADS, k])),
        unit_rows(noise(2, &[batch, steps * n, HEADS, k])),
        noise(3, &[batch, steps * n, HEADS, v]),
        sigmoid(noise(4, &[batch, steps * n, HEADS]), 2.0),
        log_decay(noise(5, &[batch, steps, HEADS]), 0.3),
        noise(6, &[batch, HEADS, k, v]),
    ]
}

fn run_delta(x: &[Tensor]) -> Result<(Tensor, Tensor)> {
    gated_delta_rule(&x[0], &x[1], &x[2], &x[3], Some((&x[4]).into()), 0.7, Some((&x[5]).into()))
}

fn run_sum(x: &[Tensor]) -> Result<(Tensor, Tensor)> {
    gated_sum_rule(&x[0], &x[1], &x[2], &x[3], Some((&x[4]).into()), 0.7, Some((&x[5]).into()))
}

fn run_ssd(x: &[Tensor]) -> Result<(Tensor, Tensor)> {
    ssd(&x[0], &x[1], &x[2], &x[3], &x[4], &x[5], &x[6], Some((&x[7]).into()))
}

fn scan_inputs(batch: usize, steps: usize, n: usize, channels: usize) -> Vec<Tensor> {
    vec![
        noise(1, &[batch, steps, channels]),
        noise(2, &[batch, steps, channels]),
        noise(3, &[channels, n]),
        noise(4, &[batch, steps, n]),
        noise(5, &[batch, steps, n]),
        noise(6, &[channels]),
        noise(7, &[batch, steps, channels]),
        noise(8, &[channels]),
        noise(9, &[batch, channels, n]),
    ]
}

fn run_scan(x: &[Tensor]) -> Result<(Tensor, Tensor)> {
    let (z, state) = (Some((&x[6]).into()), Some((&x[8]).into()));
    selective_scan(&x[0], &x[1], &x[2], &x[3], &x[4], &x[5], z, &x[7], state)
}

fn gla_inputs(batch: usize, steps: usize, k: usize, v: usize) -> Vec<Tensor> {
    vec![
        noise(1, &[batch, steps, HEADS, k]),
        noise(2, &[batch, steps, HEADS, k]),
        noise(3, &[batch, steps, HEADS, v]),
        log_decay(noise(4, &[batch, steps, HEADS, k]), 0.3),
        noise(5, &[batch, HEADS, k, v]),
    ]
}

fn dplr_inputs(batch: usize, steps: usize, k: usize, v: usize) -> Vec<Tensor> {
    let keys = || [batch, steps, HEADS, k];
    let key = unit_rows(noise(2, &keys()));
    let rate = |seed: u64| sigmoid(noise(seed, &keys()), 1.0);
    vec![
        unit_rows(noise(1, &keys())),
        (&key * rate(7)).unwrap(),
        noise(3, &[batch, steps, HEADS, v]),
        log_decay(noise(4, &keys()), 0.3),
        (&key * rate(8)).unwrap(),
        (&key * rate(9)).unwrap(),
        noise(5, &[batch, HEADS, k, v]),
    ]
}

fn run_dplr(x: &[Tensor]) -> Result<(Tensor, Tensor)> {
    dplr(&x[0], &x[1], &x[2], &x[3], &x[4], &x[5], 0.7, Some((&x[6]).into()))
}

fn cases() -> Vec<Case> {
    vec![
        Case {
            name: "dplr",
            inputs: vec!["q", "k", "v", "g", "a", "b", "state"],
            timed: vec![true, true, true, true, true, true, false],
            make: dplr_inputs,
            run: run_dplr,
        },
        Case {
            name: "gla",
            inputs: vec!["q", "k", "v", "gk", "state"],
            timed: vec![true, true, true, true, false],
            make: gla_inputs,
            run: |x| gla(&x[0], &x[1], &x[2], &x[3], 0.7, Some((&x[4]).into())),
        },
        Case {
            name: "gru",
            inputs: vec!["gates", "weight", "bias", "state"],
            timed: vec![true, false, false, false],
            make: |b, t, k, _| {
                vec![
                    noise(1, &[b, t, 3 * k]),
                    (noise(2, &[3 * k, k]) * (k as f64).powf(-0.5)).unwrap(),
                    noise(3, &[3 * k]),
                    noise(4, &[b, k]),
                ]
            },
            run: |x| gru(&x[0], &x[1], &x[2], Some((&x[3]).into())),
        },
        Case {
            name: "s4d",
            inputs: vec!["u", "c", "log_dt", "log_a_real", "a_imag", "d", "state"],
            timed: vec![true, false, false, false, false, false, false],
            make: |b, t, k, v| {
                vec![
                    noise(1, &[b, t, v]),
                    noise(2, &[v, k, 2]),
                    ((noise(3, &[v]) * 0.5).unwrap() - 3.0).unwrap(),
                    (noise(4, &[v, k]) * 0.5).unwrap(),
                    (noise(5, &[v, k]) * 2.0).unwrap(),
                    noise(6, &[v]),
                    noise(7, &[b, v, k, 2]),
                ]
            },
            run: |x| {
                let state = Some((&x[6]).into());
                s4d(&x[0], &x[1], &x[2], &x[3], &x[4], &x[5], state)
            },
        },
        Case {
            name: "selective_scan",
            inputs: vec!["u", "delta", "a_log", "b", "c", "d", "z", "delta_bias", "state"],
            timed: vec![true, true, false, true, true, false, true, false, false],
            make: scan_inputs,
            run: run_scan,
        },
        Case {
            name: "selective_scan without a gate",
            inputs: vec!["u", "delta", "a_log", "b", "c", "d", "delta_bias", "state"],
            timed: vec![true, true, false, true, true, false, false, false],
            make: |b, t, k, v| {
                let mut inputs = scan_inputs(b, t, k, v);
                inputs.remove(6);
                inputs
            },
            run: |x| {
                let state = Some((&x[7]).into());
                selective_scan(&x[0], &x[1], &x[2], &x[3], &x[4], &x[5], None, &x[6], state)
            },
        },
        Case {
            name: "ssd",
            inputs: vec!["x", "dt", "a_log", "b", "c", "d", "dt_bias", "state"],
            timed: vec![true, true, false, true, true, false, false, false],
            make: |b, t, k, v| {
                let (heads, groups) = (4, 2);
                vec![
                    noise(1, &[b, t, heads, v]),
                    noise(2, &[b, t, heads]),
                    noise(3, &[heads]),
                    noise(4, &[b, t, groups, k]),
                    noise(5, &[b, t, groups, k]),
                    noise(6, &[heads]),
                    noise(7, &[heads]),
                    noise(8, &[b, heads, v, k]),
                ]
            },
            run: run_ssd,
        },
        Case {
            name: "delta_rule",
            inputs: vec!["q", "k", "v", "beta", "state"],
            timed: vec![true, true, true, true, false],
            make: |b, t, k, v| {
                let mut inputs = delta_inputs(1, b, t, k, v);
                inputs.remove(4);
                inputs
            },
            run: |x| gated_delta_rule(&x[0], &x[1], &x[2], &x[3], None, 0.7, Some((&x[4]).into())),
        },
        Case {
            name: "gated_delta_rule",
            inputs: vec!["q", "k", "v", "beta", "g", "state"],
            timed: vec![true, true, true, true, true, false],
            make: |b, t, k, v| delta_inputs(1, b, t, k, v),
            run: run_delta,
        },
        Case {
            name: "gated_delta_product",
            inputs: vec!["q", "k", "v", "beta", "g", "state"],
            timed: vec![true, true, true, true, true, false],
            make: |b, t, k, v| delta_inputs(3, b, t, k, v),
            run: run_delta,
        },
        Case {
            name: "sum_rule",
            inputs: vec!["q", "k", "v", "beta", "state"],
            timed: vec![true, true, true, true, false],
            make: |b, t, k, v| {
                let mut inputs = delta_inputs(1, b, t, k, v);
                inputs.remove(4);
                inputs
            },
            run: |x| gated_sum_rule(&x[0], &x[1], &x[2], &x[3], None, 0.7, Some((&x[4]).into())),
        },
        Case {
            name: "gated_sum_rule",
            inputs: vec!["q", "k", "v", "beta", "g", "state"],
            timed: vec![true, true, true, true, true, false],
            make: |b, t, k, v| delta_inputs(3, b, t, k, v),
            run: run_sum,
        },
    ]
}

fn both((a, b): (Tensor, Tensor)) -> Vec<Tensor> {
    vec![a, b]
}

#[test]
fn delta_rule_golden() -> Result<()> {
    check_golden("op_delta_rule", &["q", "k", "v", "beta", "h0"], as_is, |x| {
        gated_delta_rule(&x[0], &x[1], &x[2], &x[3], None, 0.25, Some((&x[4]).into()))
    })
}

#[test]
fn gated_delta_golden() -> Result<()> {
    for file in ["op_gated_delta_rule", "op_gated_delta_product"] {
        check_golden(file, &["q", "k", "v", "beta", "g", "h0"], as_is, |x| {
            gated_delta_rule(&x[0], &x[1], &x[2], &x[3], Some((&x[4]).into()), 0.25, Some((&x[5]).into()))
        })?;
    }
    Ok(())
}

/// The golden file has A = −exp(a_log) and its gradient; capitals as in Mamba-2.
#[test]
fn ssd_golden() -> Result<()> {
    let names = ["x", "dt", "A", "B", "C", "D", "dt_bias", "h0"];
    check_golden("op_ssd", &names, as_is, |x| {
        ssd(&x[0], &x[1], &x[2].neg()?.log()?, &x[3], &x[4], &x[5], &x[6], Some((&x[7]).into()))
    })
}

/// The golden file is time-last and has A = −exp(a_log) and its gradient.
#[test]
fn selective_scan_golden() -> Result<()> {
    let names = ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "h0"];
    let time_second = |name: &str, x: Tensor| match name {
        "u" | "delta" | "z" | "B" | "C" | "o" => x.transpose(1, 2)?.contiguous(),
        _ => Ok(x),
    };
    check_golden("op_selective_scan", &names, time_second, |x| {
        let mut x = x.to_vec();
        x[2] = x[2].neg()?.log()?;
        run_scan(&x)
    })
}

#[test]
fn gla_golden() -> Result<()> {
    check_golden("op_gla", &["q", "k", "v", "gk", "h0"], as_is, |x| {
        gla(&x[0], &x[1], &x[2], &x[3], 0.25, Some((&x[4]).into()))
    })
}

/// One decay per head is gated linear attention with the decay repeated over K.
#[test]
fn simple_gla_golden() -> Result<()> {
    check_golden("op_simple_gla", &["q", "k", "v", "g", "h0"], as_is, |x| {
        let gk = x[3].unsqueeze(3)?.broadcast_as(x[0].shape())?;
        gla(&x[0], &x[1], &x[2], &gk, 0.25, Some((&x[4]).into()))
    })
}

const SHAPES: [(usize, usize, usize, usize); 4] = [(1, 1, 3, 2), (2, 4, 5, 9), (1, 67, 2, 3), (1, 3, 17, 40)];

/// Which is also the sum rule with write strengths of 1.
#[test]
fn sum_rule_golden() -> Result<()> {
    check_golden("op_simple_gla", &["q", "k", "v", "g", "h0"], as_is, |x| {
        let beta = Tensor::ones(x[3].shape(), x[3].dtype(), x[3].device())?;
        gated_sum_rule(&x[0], &x[1], &x[2], &beta, Some((&x[3]).into()), 0.25, Some((&x[4]).into()))
    })
}

/// Several writes a token are gated linear attention of the keys β k, one write a step: the token's decay before the
/// first, its query behind the last. So a GPU computes them.
#[test]
fn several_writes_are_gated_linear_attention() -> Result<()> {
    let (batch, steps, n, k, v) = (2, 37, 3, 7, 5);
    let x = delta_inputs(n, batch, steps, k, v);
    let run = |x: &[Tensor]| -> Result<Vec<Tensor>> {
        let decay = x[4].reshape((batch, steps, 1, HEADS))?;
        let decay = decay.pad_with_zeros(2, 0, n - 1)?.reshape((batch, steps * n, HEADS, 1))?;
        let decay = decay.broadcast_as((batch, steps * n, HEADS, k))?;
        let q = x[0].unsqueeze(2)?.pad_with_zeros(2, n - 1, 0)?.reshape((batch, steps * n, HEADS, k))?;
        let keys = x[1].broadcast_mul(&x[3].unsqueeze(3)?)?;
        let (o, state) = gla(&q, &keys, &x[2], &decay, 0.7, Some((&x[5]).into()))?;
        let o = o.reshape((batch, steps, n, HEADS, v))?.narrow(2, n - 1, 1)?.squeeze(2)?;
        Ok(vec![o, state])
    };
    let (want, of_want) = run_with_grads(&x, run)?;
    let (got, of_got) = run_with_grads(&x, |x| run_sum(x).map(both))?;
    for (got, want) in got.iter().chain(&of_got).zip(want.iter().chain(&of_want)) {
        assert_close("several writes", got, want, 1e-13);
    }
    Ok(())
}

#[test]
fn gradients_equal_finite_differences() {
    for case in cases() {
        for (batch, steps, k, v) in SHAPES {
            println!("{} B {batch} T {steps} K {k} V {v}", case.name);
            let inputs = (case.make)(batch, steps, k, v);
            check_gradients(&case.inputs, &inputs, 1e-7, |x| (case.run)(x).map(both));
        }
    }
    let gate = [noise(1, &[2, 5, 3]), noise(2, &[3]), noise(3, &[3])];
    check_gradients(&["a", "a_log", "dt_bias"], &gate, 1e-7, |x| {
        Ok(vec![gates::decay_gate(&x[0], &x[1], &x[2])?])
    });
    check_gradients(&["x"], &gate[..1], 1e-7, |x| {
        Ok(vec![gates::sigmoid(&x[0], 2.0)?, gates::log_sigmoid(&x[0], 16.0)?])
    });
}

/// The loss may use either output alone, and the initial state may be absent.
#[test]
fn outputs_are_differentiable_one_by_one() {
    for case in cases() {
        let inputs = (case.make)(2, 3, 3, 4);
        check_gradients(&case.inputs, &inputs, 1e-7, |x| (case.run)(x).map(|out| vec![out.0]));
        // The final state does not depend on what only reads it: the gradient is zero, or there is none.
        let vars: Vec<Var> = inputs.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
        let args: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        let state = (case.run)(&args).unwrap().1;
        let grads = state.sum_all().unwrap().backward().unwrap();
        let last = grads.get(args.last().unwrap()).unwrap();
        assert!(values(last).iter().any(|&g| g != 0.0), "{}", case.name);
        assert!(values(grads.get(&args[0]).unwrap()).iter().all(|g| g.is_finite()), "{}", case.name);
    }
}

fn in_f32(inputs: &[Tensor]) -> Vec<Tensor> {
    inputs.iter().map(|x| x.to_dtype(DType::F32).unwrap()).collect()
}

/// f32 against f64, outputs and every gradient, at lengths around the chunk and odd dims.
#[test]
fn single_precision_is_close_to_double() -> Result<()> {
    let shapes = [1, 2, 15, 16, 17, 63, 64, 65, 130].map(|t| (1, t, 5, 9));
    for case in cases() {
        for (batch, steps, k, v) in
            shapes.into_iter().chain([(3, 17, 9, 5), (1, 65, 81, 33), (3, 65, 16, 81)])
        {
            let inputs = (case.make)(batch, steps, k, v);
            let (wide_out, wide) = run_with_grads(&inputs, |x| (case.run)(x).map(both))?;
            let (out, grads) = run_with_grads(&in_f32(&inputs), |x| (case.run)(x).map(both))?;
            let what = format!("{} B {batch} T {steps} K {k} V {v}", case.name);
            for (i, (out, want)) in out.iter().zip(&wide_out).enumerate() {
                assert_close(&format!("{what} output {i}"), out, want, 1e-5);
            }
            for ((name, grad), want) in case.inputs.iter().zip(&grads).zip(&wide) {
                assert_close(&format!("{what} gradient of {name}"), grad, want, 1e-5);
            }
        }
    }
    Ok(())
}

/// A sequence fed in pieces, the state carried over, gives the bits of the sequence in one piece.
#[test]
fn pieces_give_the_bits_of_one_piece() -> Result<()> {
    for case in cases() {
        let inputs = in_f32(&(case.make)(2, 130, 7, 35));
        let (whole, last) = (case.run)(&inputs)?;
        let mut state = inputs.last().unwrap().clone();
        let mut outputs = vec![];
        let mut start = 0;
        for piece in [1, 2, 61, 64, 2] {
            let mut part: Vec<Tensor> = inputs
                .iter()
                .zip(&case.timed)
                .map(|(x, &timed)| match timed {
                    true => {
                        let per_step = x.dim(1)? / 130;
                        x.narrow(1, start * per_step, piece * per_step)?.contiguous()
                    }
                    false => Ok(x.clone()),
                })
                .collect::<Result<_>>()?;
            *part.last_mut().unwrap() = state;
            let (o, next) = (case.run)(&part)?;
            outputs.push(o);
            state = next;
            start += piece;
        }
        assert_eq!(start, 130);
        assert_same_bits(case.name, &Tensor::cat(&outputs, 1)?, &whole);
        assert_same_bits(case.name, &state, &last);
    }
    Ok(())
}

/// Outputs and gradients do not depend on the number of threads, nor on recording for a backward pass.
#[test]
fn thread_count_does_not_matter() -> Result<()> {
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    for case in cases() {
        let inputs = in_f32(&(case.make)(3, 70, 6, 70));
        let run = || run_with_grads(&inputs, |x| (case.run)(x).map(both));
        let (one, three) = (pool(1).install(run)?, pool(3).install(run)?);
        let bare = (case.run)(&inputs)?;
        for (a, b) in one.0.iter().chain(&one.1).zip(three.0.iter().chain(&three.1)) {
            assert_same_bits(case.name, a, b);
        }
        assert_same_bits(case.name, &one.0[0], &bare.0);
    }
    Ok(())
}

/// Kimi delta attention with one decay per head is the gated delta rule.
#[test]
fn a_shared_decay_makes_the_gated_delta_rule() -> Result<()> {
    let x = delta_inputs(1, 2, 70, 5, 9);
    let (want, last) = run_delta(&x)?;
    let g = x[4].unsqueeze(3)?.broadcast_as(x[1].shape())?.contiguous()?;
    let [read, write] = kda_keys(&x[1], &g, &x[3])?;
    let (o, state) = dplr(&x[0], &write, &x[2], &g, &read, &write, 0.7, Some((&x[5]).into()))?;
    assert_close("outputs", &o, &want, 1e-13);
    assert_close("final state", &state, &last, 1e-13);
    Ok(())
}

/// Gates that close altogether: finite, and as in double precision.
#[test]
fn strong_decays_of_channels_are_stable() -> Result<()> {
    for decay in [-20.0, -200.0, -1e4] {
        let mut inputs = dplr_inputs(2, 70, 16, 8);
        let mask = noise(9, inputs[3].dims()).gt(0.0)?.to_dtype(DType::F64)?;
        inputs[3] = (mask * decay)?;
        let (wide_out, wide) = run_with_grads(&inputs, |x| run_dplr(x).map(both))?;
        let (out, grads) = run_with_grads(&in_f32(&inputs), |x| run_dplr(x).map(both))?;
        for (got, want) in out.iter().chain(&grads).zip(wide_out.iter().chain(&wide)) {
            assert_close(&format!("log decay {decay}"), got, want, 1e-5);
        }
    }
    Ok(())
}

#[test]
fn what_stands_around_the_recurrence_has_its_gradients() {
    let (batch, steps, k) = (2, 5, 3);
    let (per_key, width) = ([batch, steps, HEADS, k], HEADS * k);
    let rows = |seed: u64| noise(seed, &per_key);
    let flat = |seed: u64| noise(seed, &[batch, steps, width]);
    let gate = [rows(1), noise(2, &[HEADS]), noise(3, &[width])];
    check_gradients(&["f", "a_log", "dt_bias"], &gate, 1e-7, |x| Ok(vec![kda_gate(&x[0], &x[1], &x[2])?]));
    let keys = [rows(1), log_decay(rows(2), 0.3), noise(3, &[batch, steps, HEADS])];
    check_gradients(&["k", "g", "beta"], &keys, 1e-7, |x| Ok(kda_keys(&x[0], &x[1], &x[2])?.into()));
    let shift = [flat(1), noise(2, &[4, 1, width]), noise(3, &[batch, 1, width])];
    check_gradients(&["x", "mix", "state"], &shift, 1e-7, |x| {
        let (mut mixes, last) = token_shift(&x[0], &x[1], Some((&x[2]).into()))?;
        mixes.push(last);
        Ok(mixes)
    });
    let keys = [rows(1), sigmoid(flat(2), 1.0), noise(3, &[width]), noise(4, &[width])];
    check_gradients(&["k", "eta", "k_k", "k_a"], &keys, 1e-7, |x| {
        Ok(rwkv7_keys(&x[0], &x[1], &x[2], &x[3])?.into())
    });
    let params = [noise(5, &[width]), noise(6, &[width]), noise(7, &[HEADS, k])];
    let read = [vec![rows(1), rows(2), rows(3), rows(4)], params.to_vec(), vec![flat(8)]].concat();
    let names = ["o", "r", "k", "v", "weight", "bias", "r_k", "gate"];
    for count in [7, 8] {
        check_gradients(&names[..count], &read[..count], 1e-7, |x| {
            let activations = [0, 1, 2, 3].map(|i| (&x[i]).into());
            let params = [4, 5, 6].map(|i| (&x[i]).into());
            Ok(vec![rwkv7_read(activations, params, x.get(7).map(Into::into))?])
        });
    }
}

/// q, k, v, i, log f, and a memory, a normaliser and a stabiliser.
fn mlstm_inputs(batch: usize, steps: usize, k: usize, v: usize, most: f64) -> Vec<Tensor> {
    vec![
        noise(1, &[batch, steps, HEADS, k]),
        noise(2, &[batch, steps, HEADS, k]),
        noise(3, &[batch, steps, HEADS, v]),
        in_f32(&[(noise(4, &[batch, steps, HEADS]) * most).unwrap()])[0].to_dtype(DType::F64).unwrap(),
        log_decay(noise(5, &[batch, steps, HEADS]), 0.3),
        noise(6, &[batch, HEADS, k, v]),
        noise(7, &[batch, HEADS, k, 1]),
        noise(8, &[batch, HEADS]),
    ]
}

/// The outputs, and the final memory and normaliser without the stabiliser's factor, which counts as a constant.
fn run_mlstm(x: &[Tensor]) -> Result<Vec<Tensor>> {
    let start = State { memory: (&x[5]).into(), normaliser: (&x[6]).into(), most: (&x[7]).into() };
    let (h, State { memory, normaliser, most }) = mlstm(&x[0], &x[1], &x[2], &x[3], &x[4], 0.7, Some(start))?;
    let factor = most.detach().exp()?.unsqueeze(2)?.unsqueeze(3)?;
    Ok(vec![h, memory.broadcast_mul(&factor)?, normaliser.broadcast_mul(&factor)?])
}

/// The recurrence as the paper has it, without a stabiliser.
#[test]
fn mlstm_is_the_plain_recurrence() -> Result<()> {
    let (batch, steps, k, v) = (2, 70, 5, 9);
    let x = mlstm_inputs(batch, steps, k, v, 2.0);
    let out = run_mlstm(&x)?;
    let factor = x[7].exp()?.unsqueeze(2)?.unsqueeze(3)?;
    let (mut memory, mut sum) = (x[5].broadcast_mul(&factor)?, x[6].broadcast_mul(&factor)?);
    for t in 0..steps {
        let at = |i: usize| x[i].narrow(1, t, 1)?.squeeze(1)?.contiguous();
        let gate = |i: usize| at(i)?.exp()?.unsqueeze(2)?.unsqueeze(3);
        let write = at(1)?.unsqueeze(3)?.broadcast_mul(&gate(3)?)?;
        memory = (memory.broadcast_mul(&gate(4)?)? + write.matmul(&at(2)?.unsqueeze(2)?)?)?;
        sum = (sum.broadcast_mul(&gate(4)?)? + write)?;
        let q = (at(0)?.unsqueeze(2)? * 0.7)?.contiguous()?;
        let divisor = q.matmul(&sum)?.abs()?.maximum(1.0)?;
        let want = q.matmul(&memory)?.broadcast_div(&divisor)?.squeeze(2)?;
        assert_close(&format!("step {t}"), &out[0].narrow(1, t, 1)?.squeeze(1)?, &want, 1e-12);
    }
    assert_close("memory", &out[1], &memory, 1e-12);
    assert_close("normaliser", &out[2], &sum, 1e-12);
    Ok(())
}

#[test]
fn mlstm_gradients_precision_and_pieces() -> Result<()> {
    let names = ["q", "k", "v", "i", "log_f", "memory", "normaliser", "stabiliser"];
    for (batch, steps, k, v) in SHAPES {
        check_gradients(&names, &mlstm_inputs(batch, steps, k, v, 0.5), 1e-6, run_mlstm);
    }
    // Input gates that no float holds: h alone, as the rest has their size; and without divisors near zero, which
    // multiply every rounding.
    let mut inputs = mlstm_inputs(2, 130, 16, 9, 40.0);
    for i in [0, 1, 6] {
        inputs[i] = inputs[i].abs()?;
    }
    let h = |x: &[Tensor]| Ok(vec![run_mlstm(x)?.remove(0)]);
    let (wide_out, wide) = run_with_grads(&inputs, h)?;
    let (out, grads) = run_with_grads(&in_f32(&inputs), h)?;
    for (got, want) in out.iter().chain(&grads).zip(wide_out.iter().chain(&wide)) {
        // A stabiliser of 100 has steps of 8e-6, and every step may round it.
        assert_close("mlstm in f32", got, want, 1e-4);
    }
    let inputs = in_f32(&mlstm_inputs(2, 130, 7, 35, 2.0));
    let whole = mlstm(&inputs[0], &inputs[1], &inputs[2], &inputs[3], &inputs[4], 0.7, None)?;
    let (mut state, mut outputs, mut start) = (None, vec![], 0);
    for piece in [1, 2, 61, 64, 2] {
        let part = |i: usize| inputs[i].narrow(1, start, piece)?.contiguous();
        let from = state.map(|State { memory, normaliser, most }: State<Tensor>| State {
            memory: (&memory).into(),
            normaliser: (&normaliser).into(),
            most: (&most).into(),
        });
        let (h, next) = mlstm(&part(0)?, &part(1)?, &part(2)?, &part(3)?, &part(4)?, 0.7, from)?;
        outputs.push(h);
        state = Some(next);
        start += piece;
    }
    assert_same_bits("mlstm in pieces", &Tensor::cat(&outputs, 1)?, &whole.0);
    assert_same_bits("mlstm's memory", &state.unwrap().memory, &whole.1.memory);
    Ok(())
}

/// DeltaProduct is the delta rule on a sequence n times as long: g at a token's first step, q at its last.
#[test]
fn product_equals_the_expanded_delta_rule() -> Result<()> {
    let (n, batch, steps, k, v) = (3, 2, 30, 5, 9);
    let x = delta_inputs(n, batch, steps, k, v);
    let (o, state) = run_delta(&x)?;
    let zeros = |x: &Tensor| x.zeros_like();
    let spread = |x: &Tensor, place: usize| -> Result<Tensor> {
        let parts = (0..n).map(|j| if j == place { Ok(x.clone()) } else { zeros(x) });
        let stacked = Tensor::stack(&parts.collect::<Result<Vec<_>>>()?, 2)?;
        let mut dims = x.dims().to_vec();
        dims[1] *= n;
        stacked.reshape(dims)
    };
    let mut expanded = x.clone();
    expanded[0] = spread(&x[0], n - 1)?;
    expanded[4] = spread(&x[4], 0)?;
    let (long, long_state) = run_delta(&expanded)?;
    let read = long.reshape((batch, steps, n, HEADS, v))?.narrow(2, n - 1, 1)?.squeeze(2)?;
    assert_close("outputs", &o, &read, 1e-13);
    assert_close("final state", &state, &long_state, 1e-13);
    Ok(())
}

/// Blank stretches give runs of nearly and of exactly equal keys; with β near 2 errors must not build up.
#[test]
fn runs_of_equal_keys_stay_exact() -> Result<()> {
    let (steps, k, v) = (640, 64, 32);
    let common = noise(1, &[1, 1, HEADS, k]);
    // Half the sequence has keys that are 95 % common, half repeats one key in long runs.
    let own = (noise(2, &[1, steps / 2, HEADS, k]) * 0.05)?;
    let similar = own.broadcast_add(&(&common * 0.95)?)?;
    let runs = noise(3, &[1, steps / 128, 1, HEADS, k]).broadcast_as((1, steps / 128, 64, HEADS, k))?;
    let key = unit_rows(Tensor::cat(&[similar, runs.reshape((1, steps / 2, HEADS, k))?], 1)?);
    let key = key.to_dtype(DType::F32)?.to_dtype(DType::F64)?;
    let beta = Tensor::full(1.9f32, (1, steps, HEADS), key.device())?.to_dtype(DType::F64)?;
    let g = (Tensor::ones((1, steps, HEADS), DType::F64, key.device())? * -1e-3)?.to_dtype(DType::F32)?;
    let inputs = [
        unit_rows(noise(4, &[1, steps, HEADS, k])).to_dtype(DType::F32)?.to_dtype(DType::F64)?,
        key,
        noise(5, &[1, steps, HEADS, v]),
        beta,
        g.to_dtype(DType::F64)?,
        noise(6, &[1, HEADS, k, v]),
    ];
    for gated in [false, true] {
        let run = |x: &[Tensor]| {
            let g = gated.then(|| (&x[4]).into());
            let (o, state) = gated_delta_rule(&x[0], &x[1], &x[2], &x[3], g, 0.125, Some((&x[5]).into()))?;
            // Keeps an unused gate in the graph.
            Ok(vec![(o + x[4].sum_all()?.broadcast_as((1, steps, HEADS, v))?)?, state])
        };
        let (wide_out, wide) = run_with_grads(&inputs, run)?;
        let (out, grads) = run_with_grads(&in_f32(&inputs), run)?;
        for (got, want) in out.iter().chain(&grads).zip(wide_out.iter().chain(&wide)) {
            println!("equal keys, gated {gated}: {:.1e}", relative_rms(got, want));
            assert_close("equal keys", got, want, 1e-5);
        }
    }
    Ok(())
}

/// Closed gates, down to a log decay of −20 a step and beyond: finite, and as in double precision.
#[test]
fn strong_decays_are_stable() -> Result<()> {
    for decay in [0.0, -11.5, -20.0, -200.0] {
        let mut inputs = gla_inputs(2, 70, 16, 8);
        let mask = noise(9, inputs[3].dims()).gt(0.0)?.to_dtype(DType::F64)?;
        inputs[3] = (mask * decay)?;
        let run = |x: &[Tensor]| gla(&x[0], &x[1], &x[2], &x[3], 0.25, Some((&x[4]).into())).map(both);
        let (wide_out, wide) = run_with_grads(&inputs, run)?;
        let (out, grads) = run_with_grads(&in_f32(&inputs), run)?;
        for (got, want) in out.iter().chain(&grads).zip(wide_out.iter().chain(&wide)) {
            assert_close(&format!("log decay {decay}"), got, want, 1e-5);
        }
    }
    Ok(())
}

/// q, k, v, β, g, λ, a matrix M for the state M Mᵀ of keys, and the state of values.
fn mesa_inputs(batch: usize, steps: usize, k: usize, v: usize) -> Vec<Tensor> {
    vec![
        unit_rows(noise(1, &[batch, steps, HEADS, k])),
        unit_rows(noise(2, &[batch, steps, HEADS, k])),
        noise(3, &[batch, steps, HEADS, v]),
        gates::sigmoid(&noise(4, &[batch, steps, HEADS]), 1.0).unwrap(),
        log_decay(noise(5, &[batch, steps, HEADS]), 0.3),
        noise(6, &[HEADS * k]),
        noise(7, &[batch, HEADS, k, k]),
        noise(8, &[batch, HEADS, k, v]),
    ]
}

fn run_mesa(x: &[Tensor]) -> Result<Vec<Tensor>> {
    let keys = x[6].matmul(&x[6].transpose(2, 3)?)?;
    let states = States { keys: (&keys).into(), values: (&x[7]).into() };
    let (o, keys, values) = mesa(&x[0], &x[1], &x[2], &x[3], &x[4], &x[5], Some(states))?;
    Ok(vec![o, keys, values])
}

/// The readout is linear attention of queries that solve the system, and the system has an inverse.
#[test]
fn mesa_solves_its_system() -> Result<()> {
    let (batch, steps, k, v) = (2, 9, 5, 3);
    let x = mesa_inputs(batch, steps, k, v);
    let start = x[6].matmul(&x[6].transpose(2, 3)?)?;
    let out = run_mesa(&x)?;
    let at = |i: usize, t: usize| x[i].narrow(1, t, 1)?.squeeze(1)?.contiguous();
    let (mut keys, mut values) = (start, x[7].clone());
    let lambda = (x[5].exp()? + 1.0)?.log()?.affine(1.0, 0.25)?.reshape((1, HEADS, k))?;
    for t in 0..steps {
        let (key, decay) = (at(1, t)?, at(4, t)?.exp()?.reshape((batch, HEADS, 1, 1))?);
        let weighted = key.broadcast_mul(&at(3, t)?.unsqueeze(2)?)?.unsqueeze(3)?;
        keys = (keys.broadcast_mul(&decay)? + weighted.matmul(&key.unsqueeze(2)?)?)?;
        values = (values.broadcast_mul(&decay)? + weighted.matmul(&at(2, t)?.unsqueeze(2)?)?)?;
        // Conjugate gradients, as many steps as there are unknowns and then some.
        let times = |x: &Tensor| -> Result<Tensor> {
            keys.matmul(&x.unsqueeze(3)?)?.squeeze(3)? + x.broadcast_mul(&lambda)?
        };
        let inner = |a: &Tensor, b: &Tensor| (a * b)?.sum_keepdim(2);
        let mut solution = at(0, t)?.zeros_like()?;
        let (mut residual, mut direction) = (at(0, t)?, at(0, t)?);
        for _ in 0..k + 3 {
            let (image, size) = (times(&direction)?, inner(&residual, &residual)?);
            let step = (&size / (inner(&direction, &image)? + 1e-30)?)?;
            solution = (solution + direction.broadcast_mul(&step)?)?;
            residual = (residual - image.broadcast_mul(&step)?)?;
            let next = (inner(&residual, &residual)? / (size + 1e-30)?)?;
            direction = (&residual + direction.broadcast_mul(&next)?)?;
        }
        let want = solution.unsqueeze(2)?.matmul(&values)?.squeeze(2)?;
        assert_close("mesa", &out[0].narrow(1, t, 1)?.squeeze(1)?, &want, 1e-9);
    }
    assert_close("keys", &out[1], &keys, 1e-13);
    assert_close("values", &out[2], &values, 1e-13);
    Ok(())
}

#[test]
fn mesa_gradients_precision_and_pieces() -> Result<()> {
    let names = ["q", "k", "v", "beta", "g", "lambda", "M", "values"];
    for (batch, steps, k, v) in SHAPES {
        let inputs = mesa_inputs(batch, steps, k, v);
        check_gradients(&names, &inputs, 1e-6, run_mesa);
        let (wide_out, wide) = run_with_grads(&inputs, run_mesa)?;
        let (out, grads) = run_with_grads(&in_f32(&inputs), run_mesa)?;
        for (got, want) in out.iter().chain(&grads).zip(wide_out.iter().chain(&wide)) {
            assert_close("mesa in f32", got, want, 2e-5);
        }
    }
    let inputs = in_f32(&mesa_inputs(2, 70, 5, 9));
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let run = || run_with_grads(&inputs, run_mesa);
    let (one, three) = (pool(1).install(run)?, pool(3).install(run)?);
    for (a, b) in one.0.iter().chain(&one.1).zip(three.0.iter().chain(&three.1)) {
        assert_same_bits("mesa", a, b);
    }
    let mut state = None;
    let mut outputs = vec![];
    for (start, len) in [(0, 1), (1, 64), (65, 5)] {
        let part: Vec<Tensor> =
            inputs[..5].iter().map(|x| x.narrow(1, start, len)?.contiguous()).collect::<Result<_>>()?;
        let (keys, values) = match state {
            Some(state) => state,
            None => (inputs[6].matmul(&inputs[6].transpose(2, 3)?)?, inputs[7].clone()),
        };
        let states = States { keys: (&keys).into(), values: (&values).into() };
        let (o, keys, values) =
            mesa(&part[0], &part[1], &part[2], &part[3], &part[4], &inputs[5], Some(states))?;
        outputs.push(o);
        state = Some((keys, values));
    }
    assert_same_bits("mesa in pieces", &Tensor::cat(&outputs, 1)?, &one.0[0]);
    Ok(())
}

#[test]
fn wrong_shapes_are_named() {
    let x = delta_inputs(1, 1, 4, 3, 5);
    let wrong = noise(1, &[1, 4, HEADS, 4]);
    let error = gated_delta_rule(&x[0], &wrong, &x[2], &x[3], None, 1.0, None).unwrap_err().to_string();
    assert!(
        error.contains("gated_delta_rule: expected k of shape [1, 4, 2, 3], got [1, 4, 2, 4]"),
        "{error}"
    );
}
