//! Launching `kernels/gru.cu`, once for every step.

use candle_core::{DType, Result, Tensor};

use super::{Dims, NAME};
use crate::cuda::{Gpu, KernelArg, Launch, NULL, kernels, suffix};
use crate::ops::linear::cuda::{Mat, weight_gradient};
use crate::ops::rows::cuda::column_sums;
use crate::ops::tape::{Forward, Run, Value};

/// Units and sequences of a block.
const UNITS: usize = 16;
const ROWS: usize = 8;

fn launch(Dims { batch, width, .. }: Dims) -> Launch {
    Launch::grid(width.div_ceil(UNITS), batch.div_ceil(ROWS), 1, (UNITS * ROWS) as u32)
}

/// The states and the last of them; saves the gates.
pub fn forward(dims: Dims, args: &[Tensor], save: bool) -> Result<Forward> {
    let Dims { batch, steps, width } = dims;
    let (gpu, dtype) = (Gpu::of(&args[0])?, args[0].dtype());
    let [x, weight, bias] = [0, 1, 2].map(|i| gpu.ptr(&args[i]));
    let (x, weight, bias) = (x?, weight?, bias?);
    let y = gpu.empty((batch, steps, width), dtype)?;
    let saved = save.then(|| gpu.empty((batch, steps, 4, width), DType::F32)).transpose()?;
    let saved_at = saved.as_ref().map_or(Ok(NULL), |value| gpu.of_value(value))?;
    // Two states take turns; the last step's is given out.
    let states = [gpu.empty((batch, width), DType::F32)?, gpu.empty((batch, width), DType::F32)?];
    let at = [gpu.of_value(&states[0])?, gpu.of_value(&states[1])?];
    let mut h = gpu.ptr_or_null(args.get(3))?;
    let name = format!("gru_forward_{}", suffix(dtype)?);
    for t in 0..steps {
        let next = at[t % 2];
        let list = [x, weight, bias, h, next, gpu.of_value(&y)?, saved_at];
        let sizes = [batch, steps, width, t].map(KernelArg::from);
        gpu.launch(&kernels::GRU, &name, launch(dims), &[&list[..], &sizes].concat())?;
        h = next;
    }
    let [even, odd] = states;
    let last = if steps % 2 == 1 { even } else { odd };
    Ok(Forward { outputs: vec![y, last], saved: saved.into_iter().map(Value::into_tensor).collect() })
}

/// The gradients of the arguments from those of the states and of the last one.
pub fn backward(
    dims: Dims,
    run: &Run,
    dy: Option<&Tensor>,
    d_last: Option<&Tensor>,
) -> Result<Vec<Option<Tensor>>> {
    let Dims { batch, steps, width } = dims;
    let args = &run.args;
    let (gpu, dtype) = (Gpu::of(&args[0])?, args[0].dtype());
    if let Some(d_last) = d_last
        && d_last.dtype() != DType::F32
    {
        candle_core::bail!("{NAME} on a GPU: the gradient of the state in f32, got {:?}", d_last.dtype())
    }
    let (weight, saved, y) = (gpu.ptr(&args[1])?, gpu.ptr(&run.saved[0])?, gpu.ptr(&run.outputs[0])?);
    let (start, dy) = (gpu.ptr_or_null(args.get(3))?, gpu.ptr_or_null(dy)?);
    let carry = match d_last {
        Some(d_last) => gpu.copy(d_last, (batch, width))?,
        None => gpu.zeros((batch, width), DType::F32)?,
    };
    let wide = || gpu.empty((batch, steps, 3 * width), dtype);
    let (dx, da, before) = (wide()?, wide()?, gpu.empty((batch, steps, width), dtype)?);
    let two = [gpu.empty((batch, 3 * width), DType::F32)?, gpu.empty((batch, 3 * width), DType::F32)?];
    let at = [gpu.of_value(&two[0])?, gpu.of_value(&two[1])?];
    let outputs = [gpu.of_value(&dx)?, gpu.of_value(&da)?, gpu.of_value(&before)?];
    let name = format!("gru_backward_{}", suffix(dtype)?);
    let mut behind = NULL;
    // What comes after the first step is the gradient of the initial state.
    let first = if args.len() > 3 { -1 } else { 0 };
    for t in (first..steps as i32).rev() {
        let now = at[t.rem_euclid(2) as usize];
        let list = [weight, saved, y, start, dy, behind, gpu.of_value(&carry)?, now];
        let sizes = [batch.into(), steps.into(), width.into(), KernelArg::from(t)];
        gpu.launch(&kernels::GRU, &name, launch(dims), &[&list[..], &outputs, &sizes].concat())?;
        behind = now;
    }

    let (da, before) = (da.into_tensor(), before.into_tensor());
    let mut grads = vec![Some(dx.into_tensor()), None, None];
    if run.needs[1] {
        let (da, before) = (Mat::of(&gpu, &da, 3 * width)?, Mat::of(&gpu, &before, width)?);
        grads[1] = weight_gradient(&gpu, run, da, before)?;
    }
    if run.needs[2] {
        let into = run.params[2].as_ref().map(|param| param.grad());
        grads[2] = column_sums(&gpu, &da, into.as_ref())?;
    }
    grads.extend((args.len() > 3).then(|| Some(carry.into_tensor())));
    Ok(grads)
}
