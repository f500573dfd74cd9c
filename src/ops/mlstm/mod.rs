//! mLSTM: a matrix memory with an exponential input gate, and a normaliser beside it.

#[cfg(feature = "cuda")]
mod cuda;
mod reference;

use candle_core::{Device, Result, Tensor};

use super::gla::gla;
use super::scan::{expect_shape, grad_or_zeros, slice_of_option};
use super::tape::{Arg, Forward, Node, Run, Value, apply};
use crate::{dispatch, slices};

const NAME: &str = "mlstm";

/// What an mLSTM carries from step to step: memory, normaliser and stabiliser. The memory is `memory` times the
/// exponential of `most`, and so is the normaliser.
pub struct State<T> {
    /// [B, H, K, V]
    pub memory: T,
    /// [B, H, K, 1]
    pub normaliser: T,
    /// [B, H]: the running maximum m.
    pub most: T,
}

/// The matrix memory of xLSTM.
///
/// | argument | shape | |
/// |---|---|---|
/// | `q`, `k` | [B, T, H, K] | queries and keys |
/// | `v` | [B, T, H, V] | values |
/// | `i` | [B, T, H] | logarithm of the input gate, of any size |
/// | `log_f` | [B, T, H] | logarithm of the forget gate, at most 0 |
/// | `scale` | | of the keys, K^-½ in the layer |
/// | `state` | | before the first token; none: nothing remembered |
///
/// Returns the outputs [B, T, H, V] and the final state. On the CPU all arguments share one dtype, f32 or f64; on a
/// GPU `q`, `k`, `v`, `i` and the outputs are f32 or bf16, the others f32. With row vectors, one head and one token:
///
/// ```text
/// C ← f C + exp(i) kᵀ (scale v)
/// n ← f n + exp(i) scale k
/// h = q C / max(|q · n|, 1)
/// ```
///
/// Beck et al. 2024, arXiv:2405.04517, equations 19 to 27; Beck et al. 2025, arXiv:2503.13427, section 2. What is
/// computed is their stabilised form: with m = max(log f + m, i), C and n hold exp(−m) times the above, so that a step
/// decays by exp(log f + m_before − m) and writes exp(i − m) k, both at most 1, and h = q C / max(|q · n|, exp(−m)).
/// Both sums are [gated linear attention](gla) of these decays and writes, exactly; n is that of values 1.
///
/// Every argument is differentiable. The outputs do not depend on the stabiliser, which therefore counts as a
/// constant: a gradient of the final state is one of it at the m that there is, and m itself takes none.
///
/// # Errors
/// Shapes or dtypes that do not fit together; a device without this operation.
#[allow(clippy::too_many_arguments)]
pub fn mlstm(
    q: impl Into<Arg>,
    k: impl Into<Arg>,
    v: impl Into<Arg>,
    i: impl Into<Arg>,
    log_f: impl Into<Arg>,
    scale: f64,
    state: Option<State<Arg>>,
) -> Result<(Tensor, State<Tensor>)> {
    let q = q.into();
    let (memory, normaliser, start) = match state {
        Some(State { memory, normaliser, most }) => (Some(memory), Some(normaliser), Some(most)),
        None => (None, None, None),
    };
    let args: Vec<Arg> = [k.into(), i.into(), log_f.into()].into_iter().chain(start).collect();
    let Ok([write, decay, floor, ones, most]) = <[Tensor; 5]>::try_from(apply(Gates, &args)?) else {
        candle_core::bail!("{NAME}: expected five outputs of the gates")
    };
    let (read, memory) = gla(q.clone(), &write, v, &decay, scale, memory)?;
    let (sum, normaliser) = gla(q, &write, &ones, &decay, scale, normaliser)?;
    let h = apply(Read, &[Arg::from(&read), Arg::from(&sum), Arg::from(&floor)])?.remove(0);
    Ok((h, State { memory, normaliser, most }))
}

/// Of k, i, log f and the stabiliser before the first token: the keys as they are written, the log decay of every
/// row of the state, exp(−m), the values 1 of the normaliser, and the last m.
struct Gates;

impl Gates {
    /// [B, T, H, K], checked against all arguments.
    fn dims(args: &[Tensor]) -> Result<[usize; 4]> {
        let (batch, steps, heads, key) = args[0].dims4()?;
        if steps == 0 || key == 0 {
            candle_core::bail!("{NAME}: {steps} steps, key dim {key}; none may be 0")
        }
        expect_shape(NAME, "i", &args[1], &[batch, steps, heads])?;
        expect_shape(NAME, "log_f", &args[2], &[batch, steps, heads])?;
        if let Some(start) = args.get(3) {
            expect_shape(NAME, "the stabiliser", start, &[batch, heads])?;
        }
        Ok([batch, steps, heads, key])
    }
}

impl Node for Gates {
    fn name(&self) -> &'static str {
        NAME
    }

    fn forward(&self, args: &[Tensor], save: bool) -> Result<Forward> {
        let dims = Self::dims(args)?;
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            return cuda::gates(args, dims, save);
        }
        let [batch, steps, heads, _] = dims;
        dispatch!(args[0].dtype(), F => {
            slices!(F; k = &args[0], i = &args[1], log_f = &args[2]);
            let start = args.get(3).map(Tensor::storage_and_layout);
            let start = slice_of_option(&start)?;
            let gates = reference::gates(k, i, log_f, start, dims);
            let saved = match save {
                true => vec![Tensor::from_slice(&gates.m, gates.m.len(), &Device::Cpu)?],
                false => vec![],
            };
            let ones: Vec<F> = vec![1.0; batch * steps * heads];
            let floor: Vec<F> = gates.m.iter().map(|m| (-*m).exp()).collect();
            let outputs = vec![
                Value::cpu(gates.write, args[0].shape()),
                Value::cpu(gates.decay, args[0].shape()),
                Value::cpu(floor, (batch, steps, heads)),
                Value::cpu(ones, (batch, steps, heads, 1)),
                Value::cpu(gates.last, (batch, heads)),
            ];
            Ok(Forward { outputs, saved })
        })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let args = &run.args;
        let dims = Self::dims(args)?;
        let d_write = grad_or_zeros(&grads[0], &dims, &args[0])?;
        let d_decay = grad_or_zeros(&grads[1], &dims, &args[2])?;
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            return cuda::gates_backward(run, dims, &d_write, &d_decay);
        }
        dispatch!(args[0].dtype(), F => {
            slices!(F; k = &args[0], i = &args[1], m = &run.saved[0], d_write = &d_write, d_decay = &d_decay);
            let [dk, di, d_log] = reference::gates_backward(k, i, m, d_write, d_decay, dims[3]);
            let d_log = Tensor::from_vec(d_log, args[2].shape(), &Device::Cpu)?;
            let mut out = vec![
                Some(Tensor::from_vec(dk, args[0].shape(), &Device::Cpu)?),
                Some(Tensor::from_vec(di, args[1].shape(), &Device::Cpu)?),
                Some(d_log.clone()),
            ];
            out.extend(args.get(3).map(|_| of_first(&d_log)).transpose()?.map(Some));
            Ok(out)
        })
    }
}

/// The gradient of the stabiliser before the first token: it enters as a factor of that token's decay.
fn of_first(d_log: &Tensor) -> Result<Tensor> {
    d_log.narrow(1, 0, 1)?.squeeze(1)?.contiguous()
}

/// h of what q reads of the memory, what it reads of the normaliser, and the least divisor.
struct Read;

impl Read {
    /// Values of a row.
    fn value(args: &[Tensor]) -> Result<usize> {
        let (batch, steps, heads, value) = args[0].dims4()?;
        expect_shape(NAME, "the normaliser's part", &args[1], &[batch, steps, heads, 1])?;
        Ok(value)
    }
}

impl Node for Read {
    fn name(&self) -> &'static str {
        NAME
    }

    fn forward(&self, args: &[Tensor], _: bool) -> Result<Forward> {
        let value = Self::value(args)?;
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            return cuda::read(args, value);
        }
        let h = dispatch!(args[0].dtype(), F => {
            slices!(F; num = &args[0], den = &args[1], floor = &args[2]);
            Value::cpu(reference::read(num, den, floor, value), args[0].shape())
        });
        Ok(Forward { outputs: vec![h], saved: vec![] })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let (args, Some(dh)) = (&run.args, &grads[0]) else { return Ok(vec![None; 3]) };
        let value = Self::value(args)?;
        #[cfg(feature = "cuda")]
        if dh.device().is_cuda() {
            return cuda::read_backward(args, value, dh);
        }
        dispatch!(args[0].dtype(), F => {
            slices!(F; num = &args[0], den = &args[1], floor = &args[2], dh = dh);
            let (d_num, d_den) = reference::read_backward(num, den, floor, dh, value);
            Ok(vec![
                Some(Tensor::from_vec(d_num, args[0].shape(), &Device::Cpu)?),
                Some(Tensor::from_vec(d_den, args[1].shape(), &Device::Cpu)?),
                None,
            ])
        })
    }
}
