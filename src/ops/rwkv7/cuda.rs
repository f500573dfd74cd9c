//! Launching `kernels/rwkv7.cu`.

use candle_core::{DType, Result, Tensor};

use super::{MIXES, ShiftDims, norm_eps};
use crate::cuda::{Gpu, KernelArg, Launch, NULL, kernels, suffix};
use crate::ops::rows::cuda::{THREADS, head_rows, parameter_sums};
use crate::ops::tape::{Forward, Run, Value};

/// Blocks of a kernel that sums: a function of the shape alone.
const SUM_BLOCKS: usize = 1056;

fn pointers(gpu: &Gpu, tensors: &[Tensor]) -> Result<Vec<KernelArg>> {
    tensors.iter().map(|tensor| gpu.ptr(tensor)).collect()
}

/// Fails unless the arguments `exact` are f32 and the others of one type, which is returned.
fn types(op: &str, args: &[Tensor], exact: &[usize]) -> Result<DType> {
    let dtype = args[0].dtype();
    for (i, arg) in args.iter().enumerate() {
        let want = if exact.contains(&i) { DType::F32 } else { dtype };
        if arg.dtype() != want {
            candle_core::bail!("{op} on a GPU: expected argument {i} of {want:?}, got {:?}", arg.dtype())
        }
    }
    Ok(dtype)
}

pub fn shift(args: &[Tensor], dims: ShiftDims) -> Result<Forward> {
    let (gpu, dtype) = (Gpu::of(&args[0])?, types("token_shift", args, &[1])?);
    let ShiftDims { batch, steps, width, mixes } = dims;
    let mut outputs = (0..mixes).map(|_| gpu.empty(args[0].shape(), dtype)).collect::<Result<Vec<_>>>()?;
    outputs.push(gpu.empty((batch, 1, width), dtype)?);
    let mut list = vec![gpu.ptr(&args[0])?, gpu.ptr(&args[1])?, gpu.ptr_or_null(args.get(2))?];
    let mut mixed = outputs[..mixes].iter();
    for _ in 0..MIXES {
        list.push(mixed.next().map_or(Ok(NULL), |value| gpu.of_value(value))?);
    }
    list.push(gpu.of_value(&outputs[mixes])?);
    list.extend([batch * steps, steps, width].map(KernelArg::from));
    let tiles = width.div_ceil(THREADS);
    let blocks = (batch * steps).min((32 * gpu.multiprocessors()).div_ceil(tiles));
    let launch = Launch::grid(blocks, tiles, 1, THREADS as u32);
    gpu.launch(&kernels::RWKV7, &format!("rwkv7_shift_forward_{}", suffix(dtype)?), launch, &list)?;
    Ok(Forward { outputs, saved: vec![] })
}

pub fn shift_backward(run: &Run, dims: ShiftDims, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
    let args = &run.args;
    let (gpu, dtype) = (Gpu::of(&args[0])?, args[0].dtype());
    let ShiftDims { batch, steps, width, mixes } = dims;
    let tiles = width.div_ceil(THREADS);
    let slabs = (batch * steps).div_ceil(16).min(SUM_BLOCKS.div_ceil(tiles));
    let dx = gpu.empty(args[0].shape(), dtype)?;
    let d_start = args.get(2).map(|state| gpu.empty(state.shape(), dtype)).transpose()?;
    let partial = gpu.empty((slabs, mixes, width), DType::F32)?;
    let mut list = vec![gpu.ptr(&args[0])?, gpu.ptr(&args[1])?, gpu.ptr_or_null(args.get(2))?];
    let mut d_mixed = grads[..mixes].iter();
    for _ in 0..MIXES {
        list.push(gpu.ptr_or_null(d_mixed.next().and_then(Option::as_ref))?);
    }
    list.extend([gpu.ptr_or_null(grads[mixes].as_ref())?, gpu.of_value(&dx)?]);
    list.push(d_start.as_ref().map_or(Ok(NULL), |value| gpu.of_value(value))?);
    list.push(gpu.of_value(&partial)?);
    list.extend([batch * steps, steps, width, mixes].map(KernelArg::from));
    let launch = Launch::grid(slabs, tiles, 1, THREADS as u32);
    gpu.launch(&kernels::RWKV7, &format!("rwkv7_shift_backward_{}", suffix(dtype)?), launch, &list)?;
    let d_mix = parameter_sums(&gpu, run, &partial, slabs, &[1])?;
    let d_start = d_start.map(|value| Some(value.into_tensor()));
    Ok([Some(dx.into_tensor())].into_iter().chain(d_mix).chain(d_start).collect())
}

pub fn keys(args: &[Tensor], [batch, steps, heads, key]: [usize; 4]) -> Result<Forward> {
    let (gpu, dtype) = (Gpu::of(&args[0])?, types("rwkv7_keys", args, &[1, 2, 3])?);
    let launch = head_rows("rwkv7_keys", batch * steps, heads, key)?;
    let outputs = (0..3).map(|_| gpu.empty(args[0].shape(), dtype)).collect::<Result<Vec<_>>>()?;
    let mut list = pointers(&gpu, args)?;
    for value in &outputs {
        list.push(gpu.of_value(value)?);
    }
    list.extend([batch * steps, key].map(KernelArg::from));
    gpu.launch(&kernels::RWKV7, &format!("rwkv7_keys_forward_{}", suffix(dtype)?), launch, &list)?;
    Ok(Forward { outputs, saved: vec![] })
}

/// `given`: the gradients of κ, η ⊙ κ and k̃.
pub fn keys_backward(
    run: &Run,
    [batch, steps, heads, key]: [usize; 4],
    given: &[Tensor],
) -> Result<Vec<Option<Tensor>>> {
    let args = &run.args;
    let (gpu, dtype) = (Gpu::of(&args[0])?, args[0].dtype());
    let launch = head_rows("rwkv7_keys", batch * steps, heads, key)?;
    let slabs = launch.grid.0 as usize;
    let (dk, d_eta) = (gpu.empty(args[0].shape(), dtype)?, gpu.empty(args[1].shape(), DType::F32)?);
    let partial = gpu.empty((slabs, 2, heads * key), DType::F32)?;
    let mut list = [pointers(&gpu, args)?, pointers(&gpu, given)?].concat();
    for value in [&dk, &d_eta, &partial] {
        list.push(gpu.of_value(value)?);
    }
    list.extend([batch * steps, key].map(KernelArg::from));
    gpu.launch(&kernels::RWKV7, &format!("rwkv7_keys_backward_{}", suffix(dtype)?), launch, &list)?;
    let parameters = parameter_sums(&gpu, run, &partial, slabs, &[2, 3])?;
    let grads = [dk, d_eta].map(|value| Some(value.into_tensor()));
    Ok(grads.into_iter().chain(parameters).collect())
}

/// The arguments in the order of the kernels: activations, gate, parameters.
fn read_pointers(gpu: &Gpu, args: &[Tensor]) -> Result<Vec<KernelArg>> {
    let gate = gpu.ptr_or_null(args.get(7))?;
    Ok([pointers(gpu, &args[..4])?, vec![gate], pointers(gpu, &args[4..7])?].concat())
}

pub fn read(args: &[Tensor], [batch, steps, heads, key]: [usize; 4]) -> Result<Forward> {
    let (gpu, dtype) = (Gpu::of(&args[0])?, types("rwkv7_read", args, &[4, 5, 6])?);
    let launch = head_rows("rwkv7_read", batch * steps, heads, key)?;
    let y = gpu.empty((batch, steps, heads * key), dtype)?;
    let mut list = read_pointers(&gpu, args)?;
    list.extend([gpu.of_value(&y)?, (norm_eps(key) as f32).into()]);
    list.extend([batch * steps, key].map(KernelArg::from));
    gpu.launch(&kernels::RWKV7, &format!("rwkv7_read_forward_{}", suffix(dtype)?), launch, &list)?;
    Ok(Forward { outputs: vec![y], saved: vec![] })
}

pub fn read_backward(
    run: &Run,
    [batch, steps, heads, key]: [usize; 4],
    dy: &Tensor,
) -> Result<Vec<Option<Tensor>>> {
    let args = &run.args;
    let (gpu, dtype) = (Gpu::of(&args[0])?, args[0].dtype());
    let launch = head_rows("rwkv7_read", batch * steps, heads, key)?;
    let slabs = launch.grid.0 as usize;
    let grads = (0..4).map(|i| gpu.empty(args[i].shape(), dtype)).collect::<Result<Vec<_>>>()?;
    let d_gate = args.get(7).map(|gate| gpu.empty(gate.shape(), dtype)).transpose()?;
    let of_norm = gpu.empty((slabs, 2, heads * key), DType::F32)?;
    let of_bonus = gpu.empty((slabs, heads * key), DType::F32)?;
    let mut list = read_pointers(&gpu, args)?;
    list.push(gpu.ptr(dy)?);
    for value in &grads {
        list.push(gpu.of_value(value)?);
    }
    list.push(d_gate.as_ref().map_or(Ok(NULL), |value| gpu.of_value(value))?);
    list.extend([gpu.of_value(&of_norm)?, gpu.of_value(&of_bonus)?, (norm_eps(key) as f32).into()]);
    list.extend([batch * steps, key].map(KernelArg::from));
    gpu.launch(&kernels::RWKV7, &format!("rwkv7_read_backward_{}", suffix(dtype)?), launch, &list)?;
    let norm = parameter_sums(&gpu, run, &of_norm, slabs, &[4, 5])?;
    let bonus = parameter_sums(&gpu, run, &of_bonus, slabs, &[6])?;
    let tensor = |value: Value| Some(value.into_tensor());
    Ok(grads.into_iter().map(tensor).chain(norm).chain(bonus).chain(d_gate.map(tensor)).collect())
}
