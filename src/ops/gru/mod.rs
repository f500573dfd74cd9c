//! Gated recurrent unit: a state that goes through a matrix and a nonlinearity at every step.

#[cfg(feature = "cuda")]
mod cuda;
mod reference;

use candle_core::{Device, Result, Tensor};

use self::reference::{Gru, GruGrads};
use super::scan::{expect_shape, grad_or_zeros, slice_of_option};
use super::tape::{Arg, Forward, Node, Run, Value, apply};
use crate::{dispatch, slices};

const NAME: &str = "gru";

/// The recurrence of a gated recurrent unit.
///
/// | argument | shape | |
/// |---|---|---|
/// | `gates` | [B, T, 3D] | what the inputs give to r, z and n, in this order, with their bias |
/// | `weight` | [3D, D] | what the state gives to them |
/// | `bias` | \[3D\] | |
/// | `state` | [B, D] | before the first token; none: zeros |
///
/// Returns the states [B, T, D] and the last of them [B, D]. On the CPU all arguments share one dtype, f32 or
/// f64; on a GPU `gates`, `weight` and the states are f32 or bf16, the others f32, as is the state that is
/// carried; products with `weight` take states and gradients in the type of the activations. With
/// a = h Wᵀ + bias in three parts, for one sequence and token:
///
/// ```text
/// r = σ(r_x + r_a)    z = σ(z_x + z_a)    n = tanh(n_x + r n_a)
/// h ← (1 − z) n + z h
/// ```
///
/// Cho et al. 2014, arXiv:1406.1078, in the form of PyTorch's `nn.GRU`, which applies r behind the product.
/// Every argument is differentiable. A sequence fed in pieces gives the same bits as in one.
///
/// # Errors
/// Shapes or dtypes that do not fit together; a device without this operation.
pub fn gru(
    gates: impl Into<Arg>,
    weight: impl Into<Arg>,
    bias: impl Into<Arg>,
    state: Option<Arg>,
) -> Result<(Tensor, Tensor)> {
    let node = GruNode { stateful: state.is_some() };
    let mut args = vec![gates.into(), weight.into().into_weight(), bias.into()];
    args.extend(state);
    let mut outputs = apply(node, &args)?.into_iter();
    match (outputs.next(), outputs.next()) {
        (Some(h), Some(state)) => Ok((h, state)),
        _ => candle_core::bail!("{NAME}: expected two outputs"),
    }
}

struct GruNode {
    stateful: bool,
}

/// Sizes, checked against every argument.
#[derive(Clone, Copy)]
struct Dims {
    batch: usize,
    steps: usize,
    width: usize,
}

impl GruNode {
    fn dims(&self, args: &[Tensor]) -> Result<Dims> {
        let (batch, steps, _) = args[0].dims3()?;
        let width = args[1].dim(1)?;
        if steps == 0 || width == 0 {
            candle_core::bail!("{NAME}: {steps} steps, width {width}; neither may be 0")
        }
        expect_shape(NAME, "gates", &args[0], &[batch, steps, 3 * width])?;
        expect_shape(NAME, "weight", &args[1], &[3 * width, width])?;
        expect_shape(NAME, "bias", &args[2], &[3 * width])?;
        if self.stateful {
            expect_shape(NAME, "state", &args[3], &[batch, width])?;
        }
        Ok(Dims { batch, steps, width })
    }
}

impl Node for GruNode {
    fn name(&self) -> &'static str {
        NAME
    }

    fn keeps(&self) -> &'static [usize] {
        &[0]
    }

    fn forward(&self, args: &[Tensor], save: bool) -> Result<Forward> {
        let dims = self.dims(args)?;
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            return cuda::forward(dims, args, save);
        }
        // The backward pass finds everything in the states.
        let _ = save;
        let Dims { batch, steps, width } = dims;
        dispatch!(args[0].dtype(), F => {
            slices!(F; gates = &args[0], weight = &args[1], bias = &args[2]);
            let state = args.get(3).map(Tensor::storage_and_layout);
            let state = slice_of_option::<F>(&state)?;
            let (h, last) = Gru { batch, steps, width, gates, weight, bias, state }.forward();
            let outputs = vec![Value::cpu(h, (batch, steps, width)), Value::cpu(last, (batch, width))];
            Ok(Forward { outputs, saved: vec![] })
        })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let args = &run.args;
        let dims = self.dims(args)?;
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            return cuda::backward(dims, run, grads[0].as_ref(), grads[1].as_ref());
        }
        let Dims { batch, steps, width } = dims;
        let d_h = grad_or_zeros(&grads[0], &[batch, steps, width], &args[0])?;
        let d_last = grad_or_zeros(&grads[1], &[batch, width], &args[0])?;
        dispatch!(args[0].dtype(), F => {
            slices!(F; gates = &args[0], weight = &args[1], bias = &args[2], h = &run.outputs[0]);
            slices!(F; d_h = &d_h, d_last = &d_last);
            let state = args.get(3).map(Tensor::storage_and_layout);
            let state = slice_of_option::<F>(&state)?;
            let GruGrads { gates, weight, bias, state } =
                Gru { batch, steps, width, gates, weight, bias, state }.backward(h, d_h, d_last);
            // Without an initial state the last gradient has no argument to go to.
            [gates, weight, bias, state]
                .into_iter()
                .zip(args)
                .map(|(grad, arg)| Tensor::from_vec(grad, arg.shape(), &Device::Cpu).map(Some))
                .collect()
        })
    }
}
