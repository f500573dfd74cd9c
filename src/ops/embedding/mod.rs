//! Encoder of symbols: the columns of a linear layer's weight, found by index.

#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use super::rows::{add, map_rows, sum_parts};
use super::tape::{Arg, Forward, Node, Run, Value, apply};
use crate::{dispatch, slices};

/// y = W·onehot(id) + b, without the one-hot vectors: what a linear encoder gives on symbols.
///
/// ids [B, T] u32, weight [D, Vocab], bias \[D\]; gives [B, T, D], of the type that matrix products have with
/// the weight. An id of Vocab or more is a blank step, whose input is all zero: its row is the bias.
pub fn embedding(ids: &Tensor, weight: impl Into<Arg>, bias: impl Into<Arg>) -> Result<Tensor> {
    // A parameter is looked up in its own format, and the result has that of its copy for products.
    let (weight, dtype) = match weight.into() {
        Arg::Param(param) | Arg::Weight(param) => {
            let dtype = param.weight().dtype();
            (Arg::Param(param), dtype)
        }
        Arg::Tensor(tensor) => (Arg::from(&tensor), tensor.dtype()),
        Arg::View(tensor, shape) => {
            let dtype = tensor.dtype();
            (Arg::View(tensor, shape), dtype)
        }
    };
    embedding_as(dtype, ids, weight, bias)
}

/// [`embedding`] with a result of another type: bf16 from a weight and bias in f32, on a GPU.
pub fn embedding_as(
    dtype: DType,
    ids: &Tensor,
    weight: impl Into<Arg>,
    bias: impl Into<Arg>,
) -> Result<Tensor> {
    let (weight, bias) = (weight.into(), bias.into());
    let (width, _) = weight.shape().dims2()?;
    if ids.dtype() != DType::U32 || ids.rank() != 2 {
        candle_core::bail!(
            "embedding: ids must be u32 of shape [B, T], got {:?} of {:?}",
            ids.dtype(),
            ids.shape()
        )
    }
    if bias.shape().elem_count() != width {
        candle_core::bail!("embedding: the bias has shape {:?}, expected [{width}]", bias.shape())
    }
    Ok(apply(Embedding { dtype }, &[ids.into(), weight, bias])?.remove(0))
}

struct Embedding {
    /// Of the result.
    dtype: DType,
}

impl Node for Embedding {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn forward(&self, args: &[Tensor], _: bool) -> Result<Forward> {
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            return cuda::forward(args, self.dtype);
        }
        let (batch, steps) = args[0].dims2()?;
        let (width, vocab) = args[1].dims2()?;
        let ids = args[0].flatten_all()?.to_vec1::<u32>()?;
        let value = dispatch!(self.dtype, F => {
            slices!(F; w = &args[1], b = &args[2]);
            // One row per symbol, and one for blanks.
            let table: Vec<F> = (0..=vocab)
                .flat_map(|id| (0..width).map(move |d| if id < vocab { w[d * vocab + id] + b[d] } else { b[d] }))
                .collect();
            let y = map_rows(batch * steps, width, |r, y: &mut [F]| {
                let id = (ids[r] as usize).min(vocab);
                y.copy_from_slice(&table[id * width..(id + 1) * width]);
            });
            Value::cpu(y, (batch, steps, width))
        });
        Ok(Forward { outputs: vec![value], saved: vec![] })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        /// More than elsewhere: every block holds a sum for every symbol.
        const BLOCK: usize = 2048;
        let Some(dy) = &grads[0] else { return Ok(vec![None; 3]) };
        #[cfg(feature = "cuda")]
        if dy.device().is_cuda() {
            return cuda::backward(run, dy);
        }
        let (width, vocab) = run.args[1].dims2()?;
        let ids = run.args[0].flatten_all()?.to_vec1::<u32>()?;
        dispatch!(dy.dtype(), F => {
            slices!(F; dy = dy);
            let parts: Vec<Vec<F>> = ids
                .par_chunks(BLOCK)
                .zip(dy.par_chunks(BLOCK * width))
                .map(|(ids, dy)| {
                    let mut sum = vec![0.0; (vocab + 1) * width];
                    for (&id, dy) in ids.iter().zip(dy.chunks_exact(width)) {
                        let id = (id as usize).min(vocab);
                        add(dy, &mut sum[id * width..(id + 1) * width]);
                    }
                    sum
                })
                .collect();
            let by_symbol = sum_parts(&parts, (vocab + 1) * width);
            let mut db = vec![0.0; width];
            by_symbol.chunks_exact(width).for_each(|row| add(row, &mut db));
            let dw: Vec<F> =
                (0..width).flat_map(|d| (0..vocab).map(move |id| (d, id))).map(|(d, id)| by_symbol[id * width + d]).collect();
            Ok(vec![
                None,
                Some(Tensor::from_vec(dw, (width, vocab), &Device::Cpu)?),
                Some(Tensor::from_vec(db, run.args[2].shape(), &Device::Cpu)?),
            ])
        })
    }
}
