//! Gated linear unit with a swish whose slope is trained.

#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{Device, Result, Tensor};

use super::real::{Real, sigmoid};
use super::rows::{fill_blocks, map_rows, sum_parts};
use super::tape::{Arg, Forward, Node, Run, Value, apply};
use crate::{dispatch, slices};

/// a ⊙ σ(β a) ⊙ b, where (a, b) are the halves of the last dimension of x, plus a bias if there is one.
///
/// x [.., 2n], beta \[1\], bias \[2n\]; gives [.., n]. Source: Shazeer, "GLU variants improve transformer", 2020.
pub fn swiglu(x: impl Into<Arg>, beta: impl Into<Arg>, bias: Option<Arg>) -> Result<Tensor> {
    let (x, beta) = (x.into(), beta.into());
    let (shape, last) = (x.shape(), x.shape().dims().last().copied().unwrap_or(0));
    let biases = bias.as_ref().map_or(last, |bias| bias.shape().elem_count());
    if last == 0 || last % 2 != 0 || beta.shape().elem_count() != 1 || biases != last {
        candle_core::bail!(
            "swiglu: x has shape {shape:?}, beta {:?}, and there are {biases} biases; expected an even last dimension, \
             one slope and as many biases as columns",
            beta.shape()
        )
    }
    let args: Vec<Arg> = [x, beta].into_iter().chain(bias).collect();
    Ok(apply(SwiGlu, &args)?.remove(0))
}

struct SwiGlu;

/// x + bias at one column.
fn shifted<F: Real>(x: F, bias: Option<&[F]>, column: usize) -> F {
    bias.map_or(x, |bias| x + bias[column])
}

fn forward<F: Real>(x: &[F], beta: F, bias: Option<&[F]>, n: usize) -> Vec<F> {
    map_rows(x.len() / (2 * n), n, |row, y: &mut [F]| {
        let (a, b) = x[row * 2 * n..(row + 1) * 2 * n].split_at(n);
        for (i, ((y, &a), &b)) in y.iter_mut().zip(a).zip(b).enumerate() {
            let (a, b) = (shifted(a, bias, i), shifted(b, bias, n + i));
            *y = a * sigmoid(beta * a) * b;
        }
    })
}

/// Gradients of x, beta and the bias.
fn backward<F: Real>(x: &[F], beta: F, bias: Option<&[F]>, dy: &[F], n: usize) -> (Vec<F>, F, Vec<F>) {
    let mut dx = vec![F::zero(); x.len()];
    // For each block the gradient of the bias, and behind it that of beta.
    let parts = fill_blocks(&mut dx, 2 * n, |first, block| {
        let mut sums = vec![F::zero(); 2 * n + 1];
        for (i, dx) in block.chunks_exact_mut(2 * n).enumerate() {
            let row = first + i;
            let (a, b) = x[row * 2 * n..(row + 1) * 2 * n].split_at(n);
            let (da, db) = dx.split_at_mut(n);
            let dy = &dy[row * n..(row + 1) * n];
            let mut slope = F::zero();
            for (i, (((da, db), (&a, &b)), &dy)) in
                da.iter_mut().zip(db).zip(a.iter().zip(b)).zip(dy).enumerate()
            {
                let (a, b) = (shifted(a, bias, i), shifted(b, bias, n + i));
                let s = sigmoid(beta * a);
                let bend = a * s * (F::one() - s);
                *da = dy * b * bend.fma(beta, s);
                *db = dy * a * s;
                slope = (dy * b).fma(a * bend, slope);
            }
            sums.iter_mut().zip(dx.iter()).for_each(|(sum, &dx)| *sum += dx);
            sums[2 * n] += slope;
        }
        sums
    });
    let mut sums = sum_parts(&parts, 2 * n + 1);
    let d_beta = sums.pop().expect("beta stands behind the bias");
    (dx, d_beta, sums)
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
            let bias = args.get(2).map(Tensor::to_vec1::<F>).transpose()?;
            Value::cpu(forward(x, beta[0], bias.as_deref(), n), shape)
        });
        Ok(Forward { outputs: vec![value], saved: vec![] })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let (args, Some(dy)) = (&run.args, &grads[0]) else { return Ok(vec![None; run.args.len()]) };
        #[cfg(feature = "cuda")]
        if dy.device().is_cuda() {
            return cuda::backward(run, dy);
        }
        let n = dy.dim(candle_core::D::Minus1)?;
        dispatch!(dy.dtype(), F => {
            slices!(F; x = &args[0], beta = &args[1], dy = dy);
            let bias = args.get(2).map(Tensor::to_vec1::<F>).transpose()?;
            let (dx, d_beta, d_bias) = backward(x, beta[0], bias.as_deref(), dy, n);
            [dx, vec![d_beta], d_bias]
                .into_iter()
                .zip(args)
                .map(|(grad, arg)| Ok(Some(Tensor::from_vec(grad, arg.shape(), &Device::Cpu)?)))
                .collect()
        })
    }
}
