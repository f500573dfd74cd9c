//! Gated linear unit with a swish whose slope is trained.

#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{Device, Result, Tensor};

use super::real::{Real, sigmoid};
use super::rows::{fill_blocks, map_rows};
use super::tape::{Arg, Forward, Node, Run, Value, apply};
use crate::{dispatch, slices};

/// a ⊙ σ(β a) ⊙ b, where (a, b) are the halves of the last dimension.
///
/// x [.., 2n], beta \[1\]; gives [.., n]. Source: Shazeer, "GLU variants improve transformer", 2020.
pub fn swiglu(x: impl Into<Arg>, beta: impl Into<Arg>) -> Result<Tensor> {
    let (x, beta) = (x.into(), beta.into());
    if !matches!(x.shape().dims().last(), Some(m) if *m > 0 && m % 2 == 0) || beta.shape().elem_count() != 1 {
        candle_core::bail!(
            "swiglu: x has shape {:?}, beta {:?}; expected an even last dimension and one slope",
            x.shape(),
            beta.shape()
        )
    }
    Ok(apply(SwiGlu, &[x, beta])?.remove(0))
}

struct SwiGlu;

fn forward<F: Real>(x: &[F], beta: F, n: usize) -> Vec<F> {
    map_rows(x.len() / (2 * n), n, |row, y: &mut [F]| {
        let (a, b) = x[row * 2 * n..(row + 1) * 2 * n].split_at(n);
        for ((y, &a), &b) in y.iter_mut().zip(a).zip(b) {
            *y = a * sigmoid(beta * a) * b;
        }
    })
}

/// Gradients of x and beta.
fn backward<F: Real>(x: &[F], beta: F, dy: &[F], n: usize) -> (Vec<F>, F) {
    let mut dx = vec![F::zero(); x.len()];
    let parts = fill_blocks(&mut dx, 2 * n, |first, block| {
        let mut slope = vec![F::zero(); n];
        for (i, dx) in block.chunks_exact_mut(2 * n).enumerate() {
            let row = first + i;
            let (a, b) = x[row * 2 * n..(row + 1) * 2 * n].split_at(n);
            let (da, db) = dx.split_at_mut(n);
            let dy = &dy[row * n..(row + 1) * n];
            for ((((da, db), slope), (&a, &b)), &dy) in
                da.iter_mut().zip(db).zip(&mut slope).zip(a.iter().zip(b)).zip(dy)
            {
                let s = sigmoid(beta * a);
                let bend = a * s * (F::one() - s);
                *da = dy * b * bend.fma(beta, s);
                *db = dy * a * s;
                *slope = (dy * b).fma(a * bend, *slope);
            }
        }
        slope.into_iter().sum::<F>()
    });
    (dx, parts.into_iter().sum())
}

impl Node for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn forward(&self, args: &[Tensor], _: bool) -> Result<Forward> {
        let mut shape = args[0].dims().to_vec();
        let n = shape[shape.len() - 1] / 2;
        *shape.last_mut().expect("x has a last dimension") = n;
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            return Ok(Forward { outputs: vec![cuda::forward(args, &shape)?], saved: vec![] });
        }
        let value = dispatch!(args[0].dtype(), F => {
            slices!(F; x = &args[0], beta = &args[1]);
            Value::cpu(forward(x, beta[0], n), shape)
        });
        Ok(Forward { outputs: vec![value], saved: vec![] })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let (args, Some(dy)) = (&run.args, &grads[0]) else { return Ok(vec![None; 2]) };
        #[cfg(feature = "cuda")]
        if dy.device().is_cuda() {
            return cuda::backward(run, dy);
        }
        let n = dy.dim(candle_core::D::Minus1)?;
        dispatch!(dy.dtype(), F => {
            slices!(F; x = &args[0], beta = &args[1], dy = dy);
            let (dx, dbeta) = backward(x, beta[0], dy, n);
            Ok(vec![
                Some(Tensor::from_vec(dx, args[0].shape(), &Device::Cpu)?),
                Some(Tensor::from_vec(vec![dbeta], args[1].shape(), &Device::Cpu)?),
            ])
        })
    }
}
