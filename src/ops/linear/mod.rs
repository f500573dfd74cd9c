//! Linear layer: y = x Wᵀ + b.

#[cfg(feature = "cuda")]
pub mod cuda;
pub mod gemm;
#[cfg(feature = "cuda")]
mod lt;

use candle_core::{Device, Result, Tensor};

use self::gemm::{Mat, rows_times, transposed_times};
use super::rows::column_sums;
use super::tape::{Arg, Forward, Node, Run, Value, apply};
use crate::{dispatch, slices};

/// y = x Wᵀ + b over the last dimension.
///
/// x [.., I], weight [O, I], bias \[O\], all f32 or all f64, on a GPU f32 or bf16 (the bias bf16 or f32); gives
/// [.., O].
/// As PyTorch's `nn.Linear`.
pub fn linear(x: impl Into<Arg>, weight: impl Into<Arg>, bias: Option<Arg>) -> Result<Tensor> {
    let (x, weight) = (x.into(), weight.into().into_weight());
    let (x_shape, w_shape) = (x.shape(), weight.shape());
    let (outputs, inputs) = w_shape.dims2()?;
    if x_shape.dims().last() != Some(&inputs) {
        candle_core::bail!(
            "linear: x has shape {x_shape:?}, but the weight {w_shape:?} takes {inputs} inputs"
        )
    }
    if let Some(bias) = &bias
        && bias.shape().elem_count() != outputs
    {
        candle_core::bail!("linear: the bias has shape {:?}, expected [{outputs}]", bias.shape())
    }
    let args: Vec<Arg> = [x, weight].into_iter().chain(bias.map(Arg::into_weight)).collect();
    Ok(apply(Linear, &args)?.remove(0))
}

struct Linear;

impl Node for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn fresh(&self) -> bool {
        true
    }

    fn forward(&self, args: &[Tensor], _: bool) -> Result<Forward> {
        let (outputs, inputs) = args[1].dims2()?;
        let mut shape = args[0].dims().to_vec();
        let rows = shape[..shape.len() - 1].iter().product();
        *shape.last_mut().expect("x has a last dimension") = outputs;
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            return cuda::forward(args, &shape);
        }
        let value = dispatch!(args[0].dtype(), F => {
            slices!(F; x = &args[0], w = &args[1]);
            let w = Mat::new(w, outputs, inputs).t();
            let y = match args.get(2) {
                Some(bias) => {
                    slices!(F; bias = bias);
                    rows_times(x, rows, w, Some(bias))
                }
                None => rows_times(x, rows, w, None),
            };
            Value::cpu(y, shape)
        });
        Ok(Forward { outputs: vec![value], saved: vec![] })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let (x, weight) = (&run.args[0], &run.args[1]);
        let Some(dy) = &grads[0] else { return Ok(vec![None; run.args.len()]) };
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return cuda::backward(run, dy);
        }
        let (outputs, inputs) = weight.dims2()?;
        let rows = x.elem_count() / inputs.max(1);
        dispatch!(x.dtype(), F => {
            slices!(F; xs = x, w = weight, dy = dy);
            let mut out = vec![None; run.args.len()];
            if run.needs[0] {
                let dx = rows_times(dy, rows, Mat::new(w, outputs, inputs), None);
                out[0] = Some(Tensor::from_vec(dx, x.shape(), &Device::Cpu)?);
            }
            if run.needs[1] {
                let dw = transposed_times(dy, xs, rows, outputs, inputs);
                out[1] = Some(Tensor::from_vec(dw, (outputs, inputs), &Device::Cpu)?);
            }
            if run.needs.get(2) == Some(&true) {
                out[2] = Some(Tensor::from_vec(column_sums(dy, outputs), run.args[2].shape(), &Device::Cpu)?);
            }
            Ok(out)
        })
    }
}
