//! The recurrences against the authors' layers, finite differences and themselves.

mod common;

use candle_core::{DType, Result, Tensor, Var};
use common::*;
use selectivbench::ops::delta::gated_delta_rule;
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

fn cases() -> Vec<Case> {
    vec![
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
fn gradients_equal_finite_differences() {
    for case in cases() {
        for (batch, steps, k, v) in [(1, 1, 3, 2), (2, 4, 5, 9), (1, 67, 2, 3)] {
            let inputs = (case.make)(batch, steps, k, v);
            println!("{} B {batch} T {steps} K {k} V {v}", case.name);
            check_gradients(&case.inputs, &inputs, 1e-7, |x| (case.run)(x).map(both));
        }
    }
}
