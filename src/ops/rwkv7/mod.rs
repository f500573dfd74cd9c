//! What RWKV-7's time mixing does around the recurrence of [`dplr`](super::dplr).

#[cfg(feature = "cuda")]
mod cuda;
mod reference;

use candle_core::{Device, Result, Tensor};

use super::real::slice_of;
use super::scan::{expect_shape, grad_or_zeros};
use super::tape::{Arg, Forward, Node, Run, Value, apply};
use crate::{dispatch, slices};

/// Mixes that [`token_shift`] makes on a GPU, at most: r, w, k, v, a and g.
pub const MIXES: usize = 6;

/// Every token mixed with the one before it, once for each row μ of `mix`: x + (x_before − x) ⊙ μ.
///
/// `x` is [B, T, D], `mix` [n, D] or [n, 1, D] with n up to [`MIXES`], `state` [B, 1, D] the token before the first;
/// none: zeros. Returns the n mixes, each as `x`, and the last token [B, 1, D]. f32 or f64 on the CPU; on a GPU `mix`
/// is f32 and the others f32 or bf16. Peng et al. 2025, arXiv:2503.14456, section 4.1, "weight
/// preparation".
///
/// # Errors
/// Shapes or dtypes that do not fit together; a device without this operation.
pub fn token_shift(
    x: impl Into<Arg>,
    mix: impl Into<Arg>,
    state: Option<Arg>,
) -> Result<(Vec<Tensor>, Tensor)> {
    let args: Vec<Arg> = [x.into(), mix.into()].into_iter().chain(state).collect();
    let mut mixes = apply(Shift, &args)?;
    match mixes.pop() {
        Some(last) => Ok((mixes, last)),
        None => candle_core::bail!("token_shift: expected outputs"),
    }
}

/// What a key does to the state: where it is read and erased, by how much, and what is written.
///
/// `k` is [B, T, H, K], `eta` [B, T, H·K] the in-context learning rates, `k_k` and `k_a` [H·K]. Returns κ, η ⊙ κ and
/// k̃, each as `k`:
///
/// ```text
/// κ = k ⊙ k_k / |k ⊙ k_k|        of each head
/// k̃ = k ⊙ (1 + (η − 1) ⊙ k_a)
/// ```
///
/// f32 or f64 on the CPU; on a GPU `k` and the results are f32 or bf16, the others f32, and K is at most 128.
/// Peng et al. 2025, arXiv:2503.14456, section 4.1, "weight preparation". A zero vector stays zero.
///
/// # Errors
/// Shapes or dtypes that do not fit together; a device without this operation.
pub fn rwkv7_keys(
    k: impl Into<Arg>,
    eta: impl Into<Arg>,
    k_k: impl Into<Arg>,
    k_a: impl Into<Arg>,
) -> Result<[Tensor; 3]> {
    match <[Tensor; 3]>::try_from(apply(Keys, &[k.into(), eta.into(), k_k.into(), k_a.into()])?) {
        Ok(keys) => Ok(keys),
        Err(_) => candle_core::bail!("rwkv7_keys: expected three outputs"),
    }
}

/// The output of a layer from what its heads read: layer norm of each head, a bonus for the current token, and a gate.
///
/// `o`, `r`, `k` and `v` are [B, T, H, K], `weight`, `bias` and `r_k` have H·K elements, `gate` is [B, T, H·K] or none;
/// returns [B, T, H·K]:
///
/// ```text
/// y = (weight ⊙ (o − mean) / √(var + 1e-5 K) + bias + (Σ r ⊙ k ⊙ r_k) v) ⊙ gate
/// ```
///
/// with mean, variance and sum over a head. f32 or f64 on the CPU; on a GPU the parameters are f32, the others f32 or
/// bf16, and K is at most 128. Peng et al. 2025, arXiv:2503.14456, section 4.1, "WKV bonus and output".
///
/// # Errors
/// Shapes or dtypes that do not fit together; a device without this operation.
pub fn rwkv7_read(
    [o, r, k, v]: [Arg; 4],
    [weight, bias, r_k]: [Arg; 3],
    gate: Option<Arg>,
) -> Result<Tensor> {
    let args: Vec<Arg> = [o, r, k, v, weight, bias, r_k].into_iter().chain(gate).collect();
    Ok(apply(Read, &args)?.remove(0))
}

/// What is added to a head's variance.
fn norm_eps(key: usize) -> f64 {
    1e-5 * key as f64
}

fn tensors<F: candle_core::WithDType>(
    grads: impl IntoIterator<Item = Vec<F>>,
    args: &[Tensor],
) -> Result<Vec<Option<Tensor>>> {
    let pairs = grads.into_iter().zip(args);
    pairs.map(|(grad, arg)| Tensor::from_vec(grad, arg.shape(), &Device::Cpu).map(Some)).collect()
}

struct Shift;

/// Sizes of a token shift, checked against all arguments.
#[derive(Clone, Copy)]
struct ShiftDims {
    batch: usize,
    steps: usize,
    width: usize,
    mixes: usize,
}

impl Shift {
    fn dims(args: &[Tensor]) -> Result<ShiftDims> {
        let (batch, steps, width) = args[0].dims3()?;
        let mixes = args[1].dim(0)?;
        if steps == 0 || width == 0 || mixes == 0 || mixes > MIXES {
            candle_core::bail!("token_shift: {steps} steps, width {width}, {mixes} mixes; 1 to {MIXES} mixes")
        }
        if args[1].elem_count() != mixes * width {
            candle_core::bail!("token_shift: expected mix of shape [n, {width}], got {:?}", args[1].dims())
        }
        if let Some(state) = args.get(2) {
            expect_shape("token_shift", "state", state, &[batch, 1, width])?;
        }
        Ok(ShiftDims { batch, steps, width, mixes })
    }
}

impl Node for Shift {
    fn name(&self) -> &'static str {
        "token_shift"
    }

    fn forward(&self, args: &[Tensor], _: bool) -> Result<Forward> {
        let dims = Self::dims(args)?;
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            return cuda::shift(args, dims);
        }
        let outputs = dispatch!(args[0].dtype(), F => {
            slices!(F; x = &args[0], mix = &args[1], start = args.get(2).unwrap_or(&args[0]));
            let start = args.get(2).map(|_| start);
            let mixes = mix.chunks_exact(dims.width);
            let mut outputs: Vec<Value> = mixes
                .map(|mix| Value::cpu(reference::shift(x, mix, start, dims), args[0].shape()))
                .collect();
            outputs.push(Value::cpu(reference::last(x, dims), (dims.batch, 1, dims.width)));
            outputs
        });
        Ok(Forward { outputs, saved: vec![] })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let args = &run.args;
        let dims = Self::dims(args)?;
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            return cuda::shift_backward(run, dims, grads);
        }
        let ShiftDims { batch, width, mixes, .. } = dims;
        let d_last = grad_or_zeros(&grads[mixes], &[batch, 1, width], &args[0])?;
        dispatch!(args[0].dtype(), F => {
            slices!(F; x = &args[0], mix = &args[1], start = args.get(2).unwrap_or(&args[0]), d_last = &d_last);
            let start = args.get(2).map(|_| start);
            let guards: Vec<_> =
                grads[..mixes].iter().map(|dy| dy.as_ref().map(Tensor::storage_and_layout)).collect();
            let dy = guards.iter().map(|dy| dy.as_ref().map(|(dy, layout)| slice_of::<F>(dy, layout)).transpose());
            let dy = dy.collect::<Result<Vec<_>>>()?;
            tensors(reference::shift_backward(x, mix, start, (&dy, d_last), dims), args)
        })
    }
}

struct Keys;

impl Keys {
    /// [B, T, H, K], checked against all arguments.
    fn dims(args: &[Tensor]) -> Result<[usize; 4]> {
        let (batch, steps, heads, key) = args[0].dims4()?;
        expect_shape("rwkv7_keys", "eta", &args[1], &[batch, steps, heads * key])?;
        expect_shape("rwkv7_keys", "k_k", &args[2], &[heads * key])?;
        expect_shape("rwkv7_keys", "k_a", &args[3], &[heads * key])?;
        Ok([batch, steps, heads, key])
    }
}

impl Node for Keys {
    fn name(&self) -> &'static str {
        "rwkv7_keys"
    }

    fn forward(&self, args: &[Tensor], _: bool) -> Result<Forward> {
        let dims = Self::dims(args)?;
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            return cuda::keys(args, dims);
        }
        let outputs = dispatch!(args[0].dtype(), F => {
            slices!(F; k = &args[0], eta = &args[1], k_k = &args[2], k_a = &args[3]);
            reference::keys(k, eta, k_k, k_a, dims[3]).map(|x| Value::cpu(x, args[0].shape())).into()
        });
        Ok(Forward { outputs, saved: vec![] })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let args = &run.args;
        let dims = Self::dims(args)?;
        let mut given = Vec::with_capacity(3);
        for grad in grads {
            given.push(grad_or_zeros(grad, &dims, &args[0])?);
        }
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            return cuda::keys_backward(run, dims, &given);
        }
        dispatch!(args[0].dtype(), F => {
            slices!(F; k = &args[0], eta = &args[1], k_k = &args[2], k_a = &args[3]);
            slices!(F; d_kappa = &given[0], d_erase = &given[1], d_write = &given[2]);
            let given = [d_kappa, d_erase, d_write];
            tensors(reference::keys_backward(k, eta, k_k, k_a, given, dims[3]), args)
        })
    }
}

/// Arguments: o, r, k, v, weight, bias, r_k, and the gate if there is one.
struct Read;

impl Read {
    /// [B, T, H, K], checked against all arguments.
    fn dims(args: &[Tensor]) -> Result<[usize; 4]> {
        let (batch, steps, heads, key) = args[0].dims4()?;
        for (i, name) in [(1, "r"), (2, "k"), (3, "v")] {
            expect_shape("rwkv7_read", name, &args[i], &[batch, steps, heads, key])?;
        }
        for (i, name) in [(4, "weight"), (5, "bias"), (6, "r_k")] {
            if args[i].elem_count() != heads * key {
                candle_core::bail!(
                    "rwkv7_read: expected {name} with {} elements, got {:?}",
                    heads * key,
                    args[i].dims()
                )
            }
        }
        if let Some(gate) = args.get(7) {
            expect_shape("rwkv7_read", "gate", gate, &[batch, steps, heads * key])?;
        }
        Ok([batch, steps, heads, key])
    }
}

impl Node for Read {
    fn name(&self) -> &'static str {
        "rwkv7_read"
    }

    fn forward(&self, args: &[Tensor], _: bool) -> Result<Forward> {
        let dims = Self::dims(args)?;
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            return cuda::read(args, dims);
        }
        let [batch, steps, heads, key] = dims;
        let value = dispatch!(args[0].dtype(), F => {
            slices!(F; o = &args[0], r = &args[1], k = &args[2], v = &args[3], gate = args.last().unwrap_or(&args[0]));
            slices!(F; weight = &args[4], bias = &args[5], r_k = &args[6]);
            let gate = args.get(7).map(|_| gate);
            let y = reference::read([o, r, k, v], [weight, bias, r_k], gate, key);
            Value::cpu(y, (batch, steps, heads * key))
        });
        Ok(Forward { outputs: vec![value], saved: vec![] })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let args = &run.args;
        let dims = Self::dims(args)?;
        let Some(dy) = &grads[0] else { return Ok(vec![None; args.len()]) };
        #[cfg(feature = "cuda")]
        if dy.device().is_cuda() {
            return cuda::read_backward(run, dims, dy);
        }
        dispatch!(args[0].dtype(), F => {
            slices!(F; o = &args[0], r = &args[1], k = &args[2], v = &args[3], gate = args.last().unwrap_or(&args[0]));
            slices!(F; weight = &args[4], bias = &args[5], r_k = &args[6], dy = dy);
            let gate = args.get(7).map(|_| gate);
            let grads = reference::read_backward([o, r, k, v], [weight, bias, r_k], gate, dy, dims[3]);
            // Without a gate the last gradient has no argument to go to.
            tensors(grads, args)
        })
    }
}
