//! The tail of every layer in one pass: residual sum, dropout, layer norm.

#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{Device, Result, Tensor};

use super::dropout::Dropout;
use super::norms::{layer_norm_row, layer_norm_row_backward};
use super::real::Real;
use super::rows::{fill_blocks, fill_blocks2, sum_parts};
use super::tape::{Arg, Forward, Node, Run, Value, apply};
use crate::{dispatch, slices};

/// LayerNorm(residual + dropout(branch)) over the last dimension.
///
/// branch [B, T, D], residual [B, T, D], w \[D\], b \[D\]; without `dropout` the branch is added as it is.
/// Nothing is kept for the backward pass: mask, sum and statistics are found again.
pub fn residual_dropout_layer_norm(
    branch: impl Into<Arg>,
    residual: impl Into<Arg>,
    w: impl Into<Arg>,
    b: impl Into<Arg>,
    eps: f64,
    dropout: Option<Dropout>,
) -> Result<Tensor> {
    let (branch, residual, w, b) = (branch.into(), residual.into(), w.into(), b.into());
    let (_, steps, width) = branch.shape().dims3()?;
    if residual.shape() != branch.shape()
        || w.shape().elem_count() != width
        || b.shape().elem_count() != width
    {
        candle_core::bail!(
            "residual_norm: branch {:?}, residual {:?}, weight {:?}, bias {:?} do not fit together",
            branch.shape(),
            residual.shape(),
            w.shape(),
            b.shape()
        )
    }
    if let Some(dropout) = &dropout {
        dropout.check()?;
    }
    Ok(apply(ResidualNorm { eps, dropout, steps }, &[branch, residual, w, b])?.remove(0))
}

struct ResidualNorm {
    eps: f64,
    dropout: Option<Dropout>,
    steps: usize,
}

struct Input<'a, F> {
    branch: &'a [F],
    residual: &'a [F],
    w: &'a [F],
}

impl ResidualNorm {
    /// The dropout factors of a row, and what the norm sees.
    fn sum<F: Real>(&self, input: &Input<F>, row: usize, mask: &mut [F], sum: &mut [F]) {
        let range = row * mask.len()..(row + 1) * mask.len();
        let (branch, residual) = (&input.branch[range.clone()], &input.residual[range]);
        match &self.dropout {
            Some(dropout) => dropout.factors(row / self.steps, row % self.steps, mask),
            None => mask.fill(F::one()),
        }
        for (((sum, &mask), &branch), &residual) in sum.iter_mut().zip(&*mask).zip(branch).zip(residual) {
            *sum = mask * branch + residual;
        }
    }

    fn run<F: Real>(&self, input: Input<F>, b: &[F]) -> Vec<F> {
        let width = b.len();
        let mut y = vec![F::zero(); input.branch.len()];
        fill_blocks(&mut y, width, |first, block| {
            let (mut mask, mut sum) = (vec![F::zero(); width], vec![F::zero(); width]);
            for (i, y) in block.chunks_exact_mut(width).enumerate() {
                self.sum(&input, first + i, &mut mask, &mut sum);
                layer_norm_row(&sum, input.w, b, self.eps, y);
            }
        });
        y
    }

    /// Gradients of branch, residual, w, b.
    fn run_backward<F: Real>(&self, input: Input<F>, dy: &[F]) -> [Vec<F>; 4] {
        let width = input.w.len();
        let mut dbranch = vec![F::zero(); dy.len()];
        let mut dresidual = vec![F::zero(); dy.len()];
        let parts =
            fill_blocks2((&mut dbranch, width), (&mut dresidual, width), |first, dbranch, dresidual| {
                let mut sum = vec![F::zero(); width];
                let mut sums = vec![F::zero(); 2 * width];
                let (dw, db) = sums.split_at_mut(width);
                let rows = dbranch.chunks_exact_mut(width).zip(dresidual.chunks_exact_mut(width));
                for (i, (dbranch, dresidual)) in rows.enumerate() {
                    let row = first + i;
                    self.sum(&input, row, dbranch, &mut sum);
                    let dy = &dy[row * width..(row + 1) * width];
                    layer_norm_row_backward(&sum, input.w, dy, self.eps, dresidual, (dw, db));
                    // dbranch holds the mask.
                    dbranch.iter_mut().zip(dresidual).for_each(|(db, dr)| *db *= *dr);
                }
                sums
            });
        let mut dw = sum_parts(&parts, 2 * width);
        let db = dw.split_off(width);
        [dbranch, dresidual, dw, db]
    }
}

impl Node for ResidualNorm {
    fn name(&self) -> &'static str {
        "residual_norm"
    }

    fn fresh(&self) -> bool {
        // Without it both inputs may have one gradient.
        self.dropout.is_some()
    }

    fn forward(&self, args: &[Tensor], _: bool) -> Result<Forward> {
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            return cuda::forward(self, args);
        }
        let value = dispatch!(args[0].dtype(), F => {
            slices!(F; branch = &args[0], residual = &args[1], w = &args[2], b = &args[3]);
            Value::cpu(self.run(Input { branch, residual, w }, b), args[0].shape())
        });
        Ok(Forward { outputs: vec![value], saved: vec![] })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let (args, Some(dy)) = (&run.args, &grads[0]) else { return Ok(vec![None; 4]) };
        #[cfg(feature = "cuda")]
        if dy.device().is_cuda() {
            return cuda::backward(self, run, dy);
        }
        dispatch!(dy.dtype(), F => {
            slices!(F; branch = &args[0], residual = &args[1], w = &args[2], dy = dy);
            let grads = self.run_backward(Input { branch, residual, w }, dy);
            grads
                .into_iter()
                .zip(args)
                .map(|(grad, arg)| Ok(Some(Tensor::from_vec(grad, arg.shape(), &Device::Cpu)?)))
                .collect()
        })
    }
}
