//! Vectors of length one, as the delta rule wants its keys.

#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{Device, Result, Tensor};

use super::real::{Real, dot};
use super::rows::map_rows;
use super::tape::{Arg, Forward, Node, Run, Value, apply};
use crate::{dispatch, slices};

/// Added to the sum of squares, inside the root.
const EPS: f64 = 1e-6;

/// y = x / √(Σ x² + 1e-6) over the last dimension.
///
/// x [.., n]; gives the same shape. A zero vector stays zero. Source: `l2norm` of flash-linear-attention.
pub fn l2norm(x: impl Into<Arg>) -> Result<Tensor> {
    Ok(apply(L2Norm, &[x.into()])?.remove(0))
}

struct L2Norm;

fn rstd<F: Real>(x: &[F]) -> F {
    F::one() / (dot(x, x) + F::of(EPS)).sqrt()
}

fn forward<F: Real>(x: &[F], n: usize) -> Vec<F> {
    map_rows(x.len() / n, n, |row, y: &mut [F]| {
        let x = &x[row * n..(row + 1) * n];
        let r = rstd(x);
        y.iter_mut().zip(x).for_each(|(y, &x)| *y = x * r);
    })
}

fn backward<F: Real>(x: &[F], dy: &[F], n: usize) -> Vec<F> {
    map_rows(x.len() / n, n, |row, dx: &mut [F]| {
        let (x, dy) = (&x[row * n..(row + 1) * n], &dy[row * n..(row + 1) * n]);
        let r = rstd(x);
        // dx = r (dy − y (dy·y)) with y = r x.
        let along = dot(dy, x) * r * r;
        for ((dx, &x), &dy) in dx.iter_mut().zip(x).zip(dy) {
            *dx = r * (dy - x * along);
        }
    })
}

impl Node for L2Norm {
    fn name(&self) -> &'static str {
        "l2norm"
    }

    fn forward(&self, args: &[Tensor], _: bool) -> Result<Forward> {
        let x = &args[0];
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return Ok(Forward { outputs: vec![cuda::run("forward", &[x])?], saved: vec![] });
        }
        let n = x.dim(candle_core::D::Minus1)?;
        let value = dispatch!(x.dtype(), F => {
            slices!(F; xs = x);
            Value::cpu(forward(xs, n), x.shape())
        });
        Ok(Forward { outputs: vec![value], saved: vec![] })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let (x, Some(dy)) = (&run.args[0], &grads[0]) else { return Ok(vec![None]) };
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return Ok(vec![Some(cuda::run("backward", &[x, dy])?.into_tensor())]);
        }
        let n = x.dim(candle_core::D::Minus1)?;
        dispatch!(x.dtype(), F => {
            slices!(F; xs = x, dy = dy);
            Ok(vec![Some(Tensor::from_vec(backward(xs, dy, n), x.shape(), &Device::Cpu)?)])
        })
    }
}
