//! Gated linear unit with a swish whose slope is trained.

#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{Device, Result, Tensor};

use super::real::{Real, sigmoid};
use super::rows::{add, fill_blocks, map_rows, sum_parts};
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

fn forward<F: Real>(x: &[F], beta: F, bias: &[F], n: usize) -> Vec<F> {
    let (a_bias, b_bias) = bias.split_at(n);
    map_rows(x.len() / (2 * n), n, |row, y: &mut [F]| {
        let (a, b) = x[row * 2 * n..(row + 1) * 2 * n].split_at(n);
        for (y, ((&a, &b), (&a_bias, &b_bias))) in
            y.iter_mut().zip(a.iter().zip(b).zip(a_bias.iter().zip(b_bias)))
        {
            let (a, b) = (a + a_bias, b + b_bias);
            *y = a * sigmoid(beta * a) * b;
        }
    })
}

/// Gradients of x, beta and the bias.
fn backward<F: Real>(x: &[F], beta: F, bias: &[F], dy: &[F], n: usize) -> (Vec<F>, F, Vec<F>) {
    let (a_bias, b_bias) = bias.split_at(n);
    let mut dx = vec![F::zero(); x.len()];
    // For each block the gradient of the bias, and behind it what each column gives to that of beta.
    let parts = fill_blocks(&mut dx, 2 * n, |first, block| {
        let mut sums = vec![F::zero(); 3 * n];
        let (of_bias, of_beta) = sums.split_at_mut(2 * n);
        for (i, dx) in block.chunks_exact_mut(2 * n).enumerate() {
            let row = first + i;
            let (a, b) = x[row * 2 * n..(row + 1) * 2 * n].split_at(n);
            let (da, db) = dx.split_at_mut(n);
            let inputs = a.iter().zip(b).zip(a_bias.iter().zip(b_bias)).zip(&dy[row * n..(row + 1) * n]);
            for (((da, db), of_beta), (((&a, &b), (&a_bias, &b_bias)), &dy)) in
                da.iter_mut().zip(db).zip(of_beta.iter_mut()).zip(inputs)
            {
                let (a, b) = (a + a_bias, b + b_bias);
                let s = sigmoid(beta * a);
                let bend = a * s * (F::one() - s);
                *da = dy * b * bend.fma(beta, s);
                *db = dy * a * s;
                *of_beta = (dy * b).fma(a * bend, *of_beta);
            }
            add(dx, of_bias);
        }
        sums
    });
    let mut sums = sum_parts(&parts, 3 * n);
    let d_beta = sums.split_off(2 * n).into_iter().sum();
    (dx, d_beta, sums)
}

/// The bias of 2n columns, zeros if there is none.
fn bias_of<F: Real>(args: &[Tensor], n: usize) -> Result<Vec<F>> {
    args.get(2).map_or(Ok(vec![F::zero(); 2 * n]), Tensor::to_vec1)
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
            let bias = bias_of(args, n)?;
            Value::cpu(forward::<F>(x, beta[0], &bias, n), shape)
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
            let bias = bias_of(args, n)?;
            let (dx, d_beta, d_bias) = backward::<F>(x, beta[0], &bias, dy, n);
            [dx, vec![d_beta], d_bias]
                .into_iter()
                .zip(args)
                .map(|(grad, arg)| Ok(Some(Tensor::from_vec(grad, arg.shape(), &Device::Cpu)?)))
                .collect()
        })
    }
}
