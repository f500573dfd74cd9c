//! The mesa layer: a linear regression from keys to values, solved anew at every step.

#[cfg(feature = "cuda")]
mod cuda;
mod reference;

use candle_core::{Device, Result, Tensor};

use self::reference::{Mesa, MesaForward, MesaGrads};
use super::real::Real;
use super::scan::{expect_shape, grad_or_zeros, slice_of_option};
use super::tape::{Arg, Forward, Node, Run, Value, apply};
use crate::{dispatch, slices};

const NAME: &str = "mesa";

/// What a regularisation cannot fall below.
const LEAST: f64 = 0.25;

/// The states of [`mesa`] before the first token.
pub struct States {
    /// [B, H, K, K], symmetric.
    pub keys: Arg,
    /// [B, H, K, V]
    pub values: Arg,
}

/// The readout of a least-squares fit of values to keys.
///
/// | argument | shape | |
/// |---|---|---|
/// | `q`, `k` | [B, T, H, K] | queries and keys |
/// | `v` | [B, T, H, V] | values |
/// | `beta` | [B, T, H] | weight of each token, at least 0 |
/// | `g` | [B, T, H] | log decay, at most 0 |
/// | `lambda` | \[H K\] | regularisation of each key channel: softplus of it, and a quarter |
/// | `states` | | none: zeros |
///
/// Returns the outputs [B, T, H, V] and the final states [B, H, K, K] and [B, H, K, V]. On the CPU all
/// arguments share one dtype, f32 or f64; on a GPU `q`, `k`, `v` and the outputs are f32 or bf16, the others
/// f32. With row vectors, one head and one token:
///
/// ```text
/// A ← e^g A + β kᵀ k      S ← e^g S + β kᵀ v
/// o = q (A + diag λ)⁻¹ S
/// ```
///
/// von Oswald et al. 2025, arXiv:2506.05233, equations 6 to 8. There the system is solved by thirty steps of
/// conjugate gradients; here exactly, by a factorisation: the two agree as far as the steps converge. Every
/// argument is differentiable. On the CPU the forward pass is strictly sequential: a sequence fed in pieces
/// gives the same bits as in one.
///
/// # Errors
/// Shapes or dtypes that do not fit together; a device without this operation.
pub fn mesa(
    q: impl Into<Arg>,
    k: impl Into<Arg>,
    v: impl Into<Arg>,
    beta: impl Into<Arg>,
    g: impl Into<Arg>,
    lambda: impl Into<Arg>,
    states: Option<States>,
) -> Result<(Tensor, Tensor, Tensor)> {
    let node = MesaNode { stateful: states.is_some() };
    let mut args = vec![q.into(), k.into(), v.into(), beta.into(), g.into(), lambda.into()];
    args.extend(states.into_iter().flat_map(|states| [states.keys, states.values]));
    let mut outputs = apply(node, &args)?.into_iter();
    match (outputs.next(), outputs.next(), outputs.next()) {
        (Some(o), Some(keys), Some(values)) => Ok((o, keys, values)),
        _ => candle_core::bail!("{NAME}: expected three outputs"),
    }
}

struct MesaNode {
    stateful: bool,
}

/// Sizes, checked against every argument.
#[derive(Clone, Copy)]
struct Dims {
    batch: usize,
    steps: usize,
    heads: usize,
    key: usize,
    value: usize,
}

impl MesaNode {
    fn dims(&self, args: &[Tensor]) -> Result<Dims> {
        let (batch, steps, heads, key) = args[0].dims4()?;
        let (_, _, _, value) = args[2].dims4()?;
        if steps == 0 || key == 0 || value == 0 {
            candle_core::bail!("{NAME}: {steps} steps, key dim {key}, value dim {value}; none may be 0")
        }
        expect_shape(NAME, "k", &args[1], &[batch, steps, heads, key])?;
        expect_shape(NAME, "v", &args[2], &[batch, steps, heads, value])?;
        expect_shape(NAME, "beta", &args[3], &[batch, steps, heads])?;
        expect_shape(NAME, "g", &args[4], &[batch, steps, heads])?;
        expect_shape(NAME, "lambda", &args[5], &[heads * key])?;
        if self.stateful {
            expect_shape(NAME, "the state of keys", &args[6], &[batch, heads, key, key])?;
            expect_shape(NAME, "the state of values", &args[7], &[batch, heads, key, value])?;
        }
        Ok(Dims { batch, steps, heads, key, value })
    }

    /// Runs `f` on the arguments as slices.
    fn with_slices<F: Real, R>(&self, args: &[Tensor], f: impl FnOnce(Mesa<'_, F>) -> R) -> Result<R> {
        let Dims { batch, steps, heads, key, value } = self.dims(args)?;
        slices!(F; q = &args[0], k = &args[1], v = &args[2], beta = &args[3], g = &args[4], lambda = &args[5]);
        let states = [args.get(6), args.get(7)].map(|state| state.map(Tensor::storage_and_layout));
        let [keys, values] = &states;
        let (keys, values) = (slice_of_option(keys)?, slice_of_option(values)?);
        Ok(f(Mesa { batch, steps, heads, key, value, q, k, v, beta, g, lambda, keys, values }))
    }
}

impl Node for MesaNode {
    fn name(&self) -> &'static str {
        NAME
    }

    fn forward(&self, args: &[Tensor], save: bool) -> Result<Forward> {
        let dims = self.dims(args)?;
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            return cuda::forward(dims, args, save);
        }
        let Dims { batch, steps, heads, key, value } = dims;
        dispatch!(args[0].dtype(), F => {
            let MesaForward::<F> { o, keys, values, checkpoints } =
                self.with_slices(args, |mesa| mesa.forward(save))?;
            let outputs = vec![
                Value::cpu(o, (batch, steps, heads, value)),
                Value::cpu(keys, (batch, heads, key, key)),
                Value::cpu(values, (batch, heads, key, value)),
            ];
            let count = checkpoints.len();
            let saved = match save {
                true => vec![Tensor::from_vec(checkpoints, count, &Device::Cpu)?],
                false => vec![],
            };
            Ok(Forward { outputs, saved })
        })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let args = &run.args;
        let dims = self.dims(args)?;
        let Dims { batch, steps, heads, key, value } = dims;
        let d_o = grad_or_zeros(&grads[0], &[batch, steps, heads, value], &args[0])?;
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            return cuda::backward(dims, run, &d_o, [grads[1].as_ref(), grads[2].as_ref()]);
        }
        let d_keys = grad_or_zeros(&grads[1], &[batch, heads, key, key], &args[0])?;
        let d_values = grad_or_zeros(&grads[2], &[batch, heads, key, value], &args[0])?;
        dispatch!(args[0].dtype(), F => {
            slices!(F; checkpoints = &run.saved[0], d_o = &d_o, d_keys = &d_keys, d_values = &d_values);
            let MesaGrads::<F> { q, k, v, beta, g, lambda, keys, values } =
                self.with_slices(args, |mesa| mesa.backward(checkpoints, d_o, d_keys, d_values))?;
            // Without initial states the last gradients have no argument to go to.
            [q, k, v, beta, g, lambda, keys, values]
                .into_iter()
                .zip(args)
                .map(|(grad, arg)| Tensor::from_vec(grad, arg.shape(), &Device::Cpu).map(Some))
                .collect()
        })
    }
}
