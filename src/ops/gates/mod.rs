//! Gates of the recurrences: what turns a projection into a decay or a write strength.

#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use super::real::{self, Real, softplus, sum_in_order};
use super::rows::{map, map2};
use super::scan::expect_shape;
use super::tape::{Arg, Forward, Node, Run, Value, apply};
use crate::{dispatch, slices};

/// Elements that one task takes: enough to outweigh its cost.
const BLOCK: usize = 4096;

/// Log decay per head, g = −exp(a_log) · softplus(a + dt_bias).
///
/// `a` is [B, T, H], `a_log` and `dt_bias` are \[H\], f32 or f64; returns [B, T, H], never above 0.
/// Gated DeltaNet's gate (Yang et al. 2025, arXiv:2412.06464, section 3.4, after Mamba-2); the softplus is
/// its argument above 20, as in PyTorch.
///
/// # Errors
/// Shapes or dtypes that do not fit together; a device without this operation.
pub fn decay_gate(a: impl Into<Arg>, a_log: impl Into<Arg>, dt_bias: impl Into<Arg>) -> Result<Tensor> {
    apply(DecayGate, &[a.into(), a_log.into(), dt_bias.into()]).map(|mut out| out.remove(0))
}

/// scale · σ(x), elementwise on any shape, f32 or f64.
///
/// The write strength β of the delta rules; scale 2 lets the state's eigenvalues go down to −1 (Grazzi et
/// al. 2025, arXiv:2411.12537, section 4).
///
/// # Errors
/// A dtype or device without this operation.
pub fn sigmoid(x: impl Into<Arg>, scale: f64) -> Result<Tensor> {
    apply(Elementwise::Sigmoid { scale }, &[x.into()]).map(|mut out| out.remove(0))
}

/// log σ(x) / divisor, elementwise on any shape, f32 or f64.
///
/// Gated linear attention's log decay with a divisor of 16 (Yang et al. 2024, arXiv:2312.06635, section
/// 4.4).
///
/// # Errors
/// A dtype or device without this operation.
pub fn log_sigmoid(x: impl Into<Arg>, divisor: f64) -> Result<Tensor> {
    apply(Elementwise::LogSigmoid { divisor }, &[x.into()]).map(|mut out| out.remove(0))
}

enum Elementwise {
    Sigmoid { scale: f64 },
    LogSigmoid { divisor: f64 },
}

impl Node for Elementwise {
    fn name(&self) -> &'static str {
        match self {
            Elementwise::Sigmoid { .. } => "sigmoid",
            Elementwise::LogSigmoid { .. } => "log_sigmoid",
        }
    }

    fn forward(&self, args: &[Tensor], _: bool) -> Result<Forward> {
        let x = &args[0];
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return Ok(Forward { outputs: vec![self.forward_cuda(x)?], saved: vec![] });
        }
        let value = dispatch!(x.dtype(), F => {
            slices!(F; data = x);
            let y: Vec<F> = match *self {
                Elementwise::Sigmoid { scale } => {
                    let scale = F::of(scale);
                    map(data, |x| scale * real::sigmoid(x))
                }
                Elementwise::LogSigmoid { divisor } => {
                    let divisor = F::of(divisor);
                    map(data, |x| real::log_sigmoid(x) / divisor)
                }
            };
            Value::cpu(y, x.shape().clone())
        });
        Ok(Forward { outputs: vec![value], saved: vec![] })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let (x, Some(grad)) = (&run.args[0], &grads[0]) else { return Ok(vec![None]) };
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return Ok(vec![Some(self.backward_cuda(x, grad)?)]);
        }
        dispatch!(x.dtype(), F => {
            slices!(F; data = x, grad = grad);
            let dx: Vec<F> = match *self {
                // 1 − σ(x) = σ(−x), without the cancellation.
                Elementwise::Sigmoid { scale } => {
                    let scale = F::of(scale);
                    map2(data, grad, |x, grad| grad * scale * real::sigmoid(x) * real::sigmoid(-x))
                }
                Elementwise::LogSigmoid { divisor } => {
                    let divisor = F::of(divisor);
                    map2(data, grad, |x, grad| grad * real::sigmoid(-x) / divisor)
                }
            };
            Ok(vec![Some(Tensor::from_vec(dx, x.shape(), &Device::Cpu)?)])
        })
    }
}

struct DecayGate;

impl DecayGate {
    fn heads(args: &[Tensor]) -> Result<usize> {
        let (_, _, heads) = args[0].dims3()?;
        expect_shape("decay_gate", "a_log", &args[1], &[heads])?;
        expect_shape("decay_gate", "dt_bias", &args[2], &[heads])?;
        Ok(heads)
    }
}

impl Node for DecayGate {
    fn name(&self) -> &'static str {
        "decay_gate"
    }

    fn forward(&self, args: &[Tensor], _: bool) -> Result<Forward> {
        let heads = Self::heads(args)?;
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            return Ok(Forward { outputs: vec![cuda::decay_gate(args, heads)?], saved: vec![] });
        }
        let value = dispatch!(args[0].dtype(), F => {
            slices!(F; a = &args[0], a_log = &args[1], dt_bias = &args[2]);
            let rates: Vec<F> = a_log.iter().map(|a| -a.exp()).collect();
            let mut g = a.to_vec();
            g.par_chunks_mut((BLOCK * heads).max(1)).for_each(|g| {
                for row in g.chunks_exact_mut(heads) {
                    for ((g, &rate), &bias) in row.iter_mut().zip(&rates).zip(dt_bias) {
                        *g = rate * softplus(*g + bias);
                    }
                }
            });
            Value::cpu(g, args[0].shape().clone())
        });
        Ok(Forward { outputs: vec![value], saved: vec![] })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let args = &run.args;
        let heads = Self::heads(args)?;
        let Some(dg) = &grads[0] else { return Ok(vec![None, None, None]) };
        #[cfg(feature = "cuda")]
        if dg.device().is_cuda() {
            return cuda::decay_gate_backward(run, heads, dg);
        }
        dispatch!(args[0].dtype(), F => {
            slices!(F; a = &args[0], a_log = &args[1], dt_bias = &args[2], dg = dg);
            let rates: Vec<F> = a_log.iter().map(|a| -a.exp()).collect();
            let block = (BLOCK * heads).max(1);
            let mut da = vec![F::default(); a.len()];
            // Per block: the sums for a_log and dt_bias, in f64 as they run over the batch and time.
            let sums: Vec<Vec<f64>> = (da.par_chunks_mut(block), a.par_chunks(block), dg.par_chunks(block))
                .into_par_iter()
                .map(|(da, a, dg)| {
                    let mut sums = vec![0.0; 2 * heads];
                    for i in 0..a.len() {
                        let h = i % heads;
                        let x = a[i] + dt_bias[h];
                        let d = dg[i] * rates[h];
                        da[i] = d * real::sigmoid(x);
                        // The gate is its own derivative by a_log.
                        sums[h] += (d * softplus(x)).as_f64();
                        sums[heads + h] += da[i].as_f64();
                    }
                    sums
                })
                .collect();
            let total = sum_in_order(&sums.iter().map(Vec::as_slice).collect::<Vec<_>>());
            let parameter = |sums: &[f64]| Tensor::new(sums, &Device::Cpu)?.to_dtype(args[0].dtype());
            Ok(vec![
                Some(Tensor::from_vec(da, args[0].shape(), &Device::Cpu)?),
                Some(parameter(&total[..heads])?),
                Some(parameter(&total[heads..])?),
            ])
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Var;

    fn values(x: &Tensor) -> Vec<f64> {
        x.to_dtype(candle_core::DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn log_sigmoid_and_sigmoid_survive_large_arguments() -> Result<()> {
        for dtype in [candle_core::DType::F32, candle_core::DType::F64] {
            let x = Var::new(&[-80.0, -1.0, 0.0, 1.0, 1000.0, -1000.0], &Device::Cpu)?;
            let x = Var::from_tensor(&x.to_dtype(dtype)?)?;
            let y = log_sigmoid(x.as_tensor(), 16.0)?;
            let want = [-80.0, -1.313_261_687_518_223, -(2f64.ln()), -0.313_261_687_518_223, 0.0, -1000.0];
            for (y, want) in values(&y).iter().zip(want) {
                assert!((y * 16.0 - want).abs() <= 1e-6 * want.abs(), "{y} {want}");
            }
            let s = sigmoid(x.as_tensor(), 2.0)?;
            assert!((values(&s)[0] / 2.0 / (-80f64).exp() - 1.0).abs() < 1e-5);
            assert_eq!(
                values(&s)[2..],
                [1.0, 2.0 / (1.0 + (-1f64).exp()), 2.0, 0.0].map(|x| match dtype {
                    candle_core::DType::F32 => f64::from(x as f32),
                    _ => x,
                })
            );
            let grads = (y.sum_all()? + s.sum_all()?)?.backward()?;
            assert!(values(grads.get(x.as_tensor()).unwrap()).iter().all(|g| g.is_finite()));
        }
        Ok(())
    }
}
