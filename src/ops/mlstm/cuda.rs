//! Launching `kernels/mlstm.cu`; the linear attention between its kernels is that of `kernels/gla.cu`.

use candle_core::{DType, Result, Tensor};

use super::{NAME, of_first};
use crate::cuda::{Gpu, KernelArg, Launch, kernels, suffix};
use crate::ops::rows::cuda::THREADS;
use crate::ops::tape::{Forward, Run, Value};

const WARPS: usize = THREADS / 32;

fn launch(gpu: &Gpu, kernel: &str, dtype: DType, rows: usize, args: &[KernelArg]) -> Result<()> {
    let blocks = rows.div_ceil(WARPS).min(32 * gpu.multiprocessors());
    let name = format!("mlstm_{kernel}_{}", suffix(dtype)?);
    gpu.launch(&kernels::MLSTM, &name, Launch::new(blocks, THREADS as u32), args)
}

/// Saves the stabiliser.
pub fn gates(args: &[Tensor], dims: [usize; 4], save: bool) -> Result<Forward> {
    let (gpu, dtype, [batch, steps, heads, key]) = (Gpu::of(&args[0])?, args[0].dtype(), dims);
    for (at, want) in [(1, dtype), (2, DType::F32)] {
        if args[at].dtype() != want {
            candle_core::bail!(
                "{NAME} on a GPU: expected {} in {want:?}, got {:?}",
                ["i", "log_f"][at - 1],
                args[at].dtype()
            )
        }
    }
    let rows = batch * steps * heads;
    let [k, i, log_f] = [0, 1, 2].map(|at| gpu.ptr(&args[at]));
    let (k, i, log_f, start) = (k?, i?, log_f?, gpu.ptr_or_null(args.get(3))?);
    let m = gpu.empty((batch, steps, heads), DType::F32)?;
    let last = gpu.empty((batch, heads), DType::F32)?;
    let sizes = [batch * heads, steps, heads].map(KernelArg::from);
    let list = [&[i, log_f, start, gpu.of_value(&m)?, gpu.of_value(&last)?], &sizes[..]].concat();
    let blocks = Launch::new((batch * heads).div_ceil(WARPS), THREADS as u32);
    gpu.launch(&kernels::MLSTM, &format!("mlstm_scan_{}", suffix(dtype)?), blocks, &list)?;

    let write = gpu.empty(args[0].shape(), dtype)?;
    let decay = gpu.empty(args[0].shape(), DType::F32)?;
    let floor = gpu.empty((batch, steps, heads), DType::F32)?;
    let ones = gpu.empty((batch, steps, heads, 1), dtype)?;
    let mut list = vec![k, i, log_f, start, gpu.of_value(&m)?];
    for value in [&write, &decay, &floor, &ones] {
        list.push(gpu.of_value(value)?);
    }
    list.extend([rows, steps, heads, key].map(KernelArg::from));
    launch(&gpu, "gates_forward", dtype, rows, &list)?;
    let saved = if save { vec![m.into_tensor()] } else { vec![] };
    Ok(Forward { outputs: vec![write, decay, floor, ones, last], saved })
}

pub fn gates_backward(
    run: &Run,
    dims: [usize; 4],
    d_write: &Tensor,
    d_decay: &Tensor,
) -> Result<Vec<Option<Tensor>>> {
    let args = &run.args;
    let (gpu, dtype, [batch, steps, heads, key]) = (Gpu::of(&args[0])?, args[0].dtype(), dims);
    let [m] = &run.saved[..] else { candle_core::bail!("{NAME}: the forward pass kept nothing") };
    let rows = batch * steps * heads;
    let dk = gpu.empty(args[0].shape(), dtype)?;
    let di = gpu.empty(args[1].shape(), dtype)?;
    let d_log = gpu.empty(args[2].shape(), DType::F32)?;
    let mut list = vec![];
    for tensor in [&args[0], &args[1], m, d_write, d_decay] {
        list.push(gpu.ptr(tensor)?);
    }
    for value in [&dk, &di, &d_log] {
        list.push(gpu.of_value(value)?);
    }
    list.extend([rows, key].map(KernelArg::from));
    launch(&gpu, "gates_backward", dtype, rows, &list)?;
    let mut grads = Vec::from([dk, di, d_log].map(Value::into_tensor));
    if args.len() > 3 {
        grads.push(of_first(&grads[2])?);
    }
    Ok(grads.into_iter().map(Some).collect())
}

pub fn read(args: &[Tensor], value: usize) -> Result<Forward> {
    let (gpu, dtype, rows) = (Gpu::of(&args[0])?, args[0].dtype(), args[1].elem_count());
    let h = gpu.empty(args[0].shape(), dtype)?;
    let mut list = args.iter().map(|arg| gpu.ptr(arg)).collect::<Result<Vec<_>>>()?;
    list.extend([gpu.of_value(&h)?, rows.into(), value.into()]);
    launch(&gpu, "read_forward", dtype, rows, &list)?;
    Ok(Forward { outputs: vec![h], saved: vec![] })
}

pub fn read_backward(args: &[Tensor], value: usize, dh: &Tensor) -> Result<Vec<Option<Tensor>>> {
    let (gpu, dtype, rows) = (Gpu::of(&args[0])?, args[0].dtype(), args[1].elem_count());
    let (d_num, d_den) = (gpu.empty(args[0].shape(), dtype)?, gpu.empty(args[1].shape(), dtype)?);
    let mut list = args.iter().map(|arg| gpu.ptr(arg)).collect::<Result<Vec<_>>>()?;
    list.extend([gpu.ptr(dh)?, gpu.of_value(&d_num)?, gpu.of_value(&d_den)?, rows.into(), value.into()]);
    launch(&gpu, "read_backward", dtype, rows, &list)?;
    Ok(vec![Some(d_num.into_tensor()), Some(d_den.into_tensor()), None])
}
