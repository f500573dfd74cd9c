//! Activation functions that stand alone: the Gaussian error unit, the gated linear unit, a sigmoid gate, and two that
//! saturate.

#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{D, Device, Result, Tensor};

use super::real::{Real, sigmoid};
use super::rows::{map, map_rows, map2};
use super::tape::{Arg, Forward, Node, Run, Value, apply};
use crate::{dispatch, slices};

/// x Φ(x) with the normal distribution Φ, elementwise on any shape, by the error function and not its
/// approximation.
///
/// Source: Hendrycks and Gimpel, "Gaussian error linear units", arXiv:1606.08415, 2016.
pub fn gelu(x: impl Into<Arg>) -> Result<Tensor> {
    Ok(apply(Gelu, &[x.into()])?.remove(0))
}

/// a σ(b), with a and b the halves of the last dimension: x [.., 2n], gives [.., n].
///
/// Source: Dauphin et al., "Language modeling with gated convolutional networks", arXiv:1612.08083, 2016.
pub fn glu(x: impl Into<Arg>) -> Result<Tensor> {
    let x = x.into();
    match x.shape().dims().last() {
        Some(n) if n % 2 == 0 && *n > 0 => Ok(apply(Glu, &[x])?.remove(0)),
        _ => candle_core::bail!("glu: x has shape {:?}, whose last dimension has no halves", x.shape()),
    }
}

/// tanh(x), elementwise on any shape.
pub fn tanh(x: impl Into<Arg>) -> Result<Tensor> {
    Ok(apply(Squash::Tanh, &[x.into()])?.remove(0))
}

/// σ(x) in the type of x, elementwise on any shape; for decays and write strengths, which are f32 on a GPU, see
/// [`gates::sigmoid`](super::gates::sigmoid).
pub fn logistic(x: impl Into<Arg>) -> Result<Tensor> {
    Ok(apply(Squash::Logistic, &[x.into()])?.remove(0))
}

/// a σ(b), a and b of one shape [.., n]: an output gate, as in flash-linear-attention's softmax attention.
pub fn sigmoid_gate(a: impl Into<Arg>, b: impl Into<Arg>) -> Result<Tensor> {
    let (a, b) = (a.into(), b.into());
    if a.shape() != b.shape() || a.shape().elem_count() == 0 {
        candle_core::bail!("sigmoid_gate: a has shape {:?}, its gate {:?}", a.shape(), b.shape())
    }
    Ok(apply(SigmoidGate, &[a, b])?.remove(0))
}

/// Functions that saturate. Their derivatives are taken from x: a value that is rounded to bf16 is too near 1.
enum Squash {
    Tanh,
    Logistic,
}

impl Node for Squash {
    fn name(&self) -> &'static str {
        match self {
            Squash::Tanh => "tanh",
            Squash::Logistic => "logistic",
        }
    }

    fn forward(&self, args: &[Tensor], _: bool) -> Result<Forward> {
        let x = &args[0];
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return Ok(Forward { outputs: vec![cuda::elementwise(self.name(), x, None)?], saved: vec![] });
        }
        let value = dispatch!(x.dtype(), F => {
            slices!(F; data = x);
            let y: Vec<F> = match self {
                Squash::Tanh => map(data, F::tanh_fast),
                Squash::Logistic => map(data, sigmoid),
            };
            Value::cpu(y, x.shape().clone())
        });
        Ok(Forward { outputs: vec![value], saved: vec![] })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let (x, Some(dy)) = (&run.args[0], &grads[0]) else { return Ok(vec![None]) };
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return Ok(vec![Some(cuda::elementwise(self.name(), x, Some(dy))?.into_tensor())]);
        }
        dispatch!(x.dtype(), F => {
            slices!(F; data = x, dy = dy);
            let dx: Vec<F> = match self {
                Squash::Tanh => map2(data, dy, |x, dy| {
                    let y = x.tanh_fast();
                    dy * (1.0 - y * y)
                }),
                Squash::Logistic => map2(data, dy, |x, dy| dy * sigmoid(x) * sigmoid(-x)),
            };
            Ok(vec![Some(Tensor::from_vec(dx, x.shape(), &Device::Cpu)?)])
        })
    }
}

struct Gelu;

impl Node for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn forward(&self, args: &[Tensor], _: bool) -> Result<Forward> {
        let x = &args[0];
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return Ok(Forward { outputs: vec![cuda::elementwise("gelu", x, None)?], saved: vec![] });
        }
        let value = dispatch!(x.dtype(), F => {
            slices!(F; data = x);
            Value::cpu(map::<F>(data, |x| x * x.normal().0), x.shape().clone())
        });
        Ok(Forward { outputs: vec![value], saved: vec![] })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let (x, Some(dy)) = (&run.args[0], &grads[0]) else { return Ok(vec![None]) };
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return Ok(vec![Some(cuda::elementwise("gelu", x, Some(dy))?.into_tensor())]);
        }
        dispatch!(x.dtype(), F => {
            slices!(F; data = x, dy = dy);
            // 1 / √(2π)
            let height = F::of(0.398_942_280_401_432_7);
            let dx = map2(data, dy, |x, dy| {
                let (below, bell) = x.normal();
                dy * (x * height).fma(bell, below)
            });
            Ok(vec![Some(Tensor::from_vec(dx, x.shape(), &Device::Cpu)?)])
        })
    }
}

struct Glu;

impl Node for Glu {
    fn name(&self) -> &'static str {
        "glu"
    }

    fn forward(&self, args: &[Tensor], _: bool) -> Result<Forward> {
        let x = &args[0];
        let mut shape = x.dims().to_vec();
        let n = shape[shape.len() - 1] / 2;
        *shape.last_mut().expect("x has a last dimension") = n;
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return Ok(Forward { outputs: vec![cuda::glu(x, &shape)?], saved: vec![] });
        }
        let value = dispatch!(x.dtype(), F => {
            slices!(F; data = x);
            let y = map_rows(data.len() / (2 * n), n, |row, y: &mut [F]| {
                let (a, b) = data[2 * row * n..][..2 * n].split_at(n);
                for ((y, &a), &b) in y.iter_mut().zip(a).zip(b) {
                    *y = a * sigmoid(b);
                }
            });
            Value::cpu(y, shape)
        });
        Ok(Forward { outputs: vec![value], saved: vec![] })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let (x, Some(dy)) = (&run.args[0], &grads[0]) else { return Ok(vec![None]) };
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return Ok(vec![Some(cuda::glu_backward(x, dy)?.into_tensor())]);
        }
        let n = x.dim(D::Minus1)? / 2;
        dispatch!(x.dtype(), F => {
            slices!(F; data = x, dy = dy);
            let dx = map_rows(data.len() / (2 * n), 2 * n, |row, dx: &mut [F]| {
                let (a, b) = data[2 * row * n..][..2 * n].split_at(n);
                let (da, db) = dx.split_at_mut(n);
                let dy = &dy[row * n..][..n];
                for i in 0..n {
                    let open = sigmoid(b[i]);
                    da[i] = dy[i] * open;
                    db[i] = da[i] * a[i] * (1.0 - open);
                }
            });
            Ok(vec![Some(Tensor::from_vec(dx, x.shape(), &Device::Cpu)?)])
        })
    }
}

struct SigmoidGate;

impl Node for SigmoidGate {
    fn name(&self) -> &'static str {
        "sigmoid_gate"
    }

    fn forward(&self, args: &[Tensor], _: bool) -> Result<Forward> {
        let [a, b] = args else { candle_core::bail!("sigmoid_gate: two arguments") };
        #[cfg(feature = "cuda")]
        if a.device().is_cuda() {
            return Ok(Forward { outputs: vec![cuda::sigmoid_gate(a, b)?], saved: vec![] });
        }
        let value = dispatch!(a.dtype(), F => {
            slices!(F; a_data = a, b_data = b);
            Value::cpu(map2::<F>(a_data, b_data, |a, b| a * sigmoid(b)), a.shape())
        });
        Ok(Forward { outputs: vec![value], saved: vec![] })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let ([a, b], Some(dy)) = (&run.args[..], &grads[0]) else { return Ok(vec![None; 2]) };
        #[cfg(feature = "cuda")]
        if a.device().is_cuda() {
            return Ok(cuda::sigmoid_gate_backward(a, b, dy)?.map(Some).into());
        }
        dispatch!(a.dtype(), F => {
            slices!(F; a_data = a, b_data = b, dy = dy);
            let da: Vec<F> = map2(b_data, dy, |b, dy| dy * sigmoid(b));
            let slope: Vec<F> = map2(a_data, b_data, |a, b| a * sigmoid(b) * sigmoid(-b));
            let db: Vec<F> = map2(&slope, dy, |slope, dy| dy * slope);
            let tensor = |data: Vec<F>| Tensor::from_vec(data, a.shape(), &Device::Cpu).map(Some);
            Ok(vec![tensor(da)?, tensor(db)?])
        })
    }
}
