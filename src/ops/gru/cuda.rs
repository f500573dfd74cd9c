//! Launching `kernels/gru.cu`.

use candle_core::{DType, Result, Tensor};

use super::{Dims, NAME};
use crate::cuda::{Gpu, KernelArg, Launch, NULL, kernels, route, suffix};
use crate::ops::linear::cuda::{Mat, weight_gradient};
use crate::ops::rows::cuda::column_sums;
use crate::ops::tape::{Forward, Run, Value};

/// Units of a tile, warps of a block and, at a time, sequences in a tile of a product.
const UNITS: usize = 16;
const WARPS: usize = 8;
const SEQUENCES: usize = 8;

/// How the blocks of a walk share out the units and the sequences.
struct Walk {
    gpu: Gpu,
    dims: Dims,
    dtype: DType,
    /// Blocks side by side over the units.
    across: usize,
    /// Groups of so many blocks, which share out the sequences.
    teams: usize,
    /// Tiles of SEQUENCES sequences that a block takes at a time, and how many such rows of tiles there are.
    tiles: usize,
    rows: usize,
}

impl Walk {
    fn new(gpu: &Gpu, dims: Dims, dtype: DType) -> Self {
        let across = dims.width.div_ceil(UNITS).min(gpu.multiprocessors());
        let most = gpu.multiprocessors() / across;
        let rows = |tiles: usize| dims.batch.div_ceil(SEQUENCES * tiles);
        let tiles = [1, 2, 4].into_iter().find(|&tiles| rows(tiles) <= most).unwrap_or(4);
        let rows = rows(tiles);
        Self { gpu: gpu.clone(), dims, dtype, across, teams: rows.min(most), tiles, rows }
    }

    /// Launches a pass whose steps each make `products` of `given` numbers a unit with the weights, over `rounds` steps.
    fn launch(
        &self,
        name: &str,
        (products, given): (usize, usize),
        rounds: usize,
        weight: &Tensor,
        args: &[KernelArg],
    ) -> Result<()> {
        let (gpu, Dims { batch, steps, width }) = (&self.gpu, self.dims);
        // Terms of a tensor core's product, and bytes of a word that holds a number and its step.
        let (terms, bytes) = if self.dtype == DType::BF16 { (16, 4) } else { (8, 8) };
        let units = width.div_ceil(UNITS);
        let per_gate = units * UNITS / terms;
        // Of a tile of units and of all: 16 bytes of weights a lane.
        let own = 3 * per_gate * 32;
        let lanes = units * own;
        let weights = gpu.empty((lanes, 4), DType::F32)?;
        let params =
            [gpu.ptr(weight)?, gpu.of_value(&weights)?, width.into(), i32::from(products == 1).into()];
        let launch = Launch::new(lanes.div_ceil(256), 256);
        gpu.launch(&kernels::GRU, &format!("gru_arrange_{}", suffix(self.dtype)?), launch, &params)?;

        let sequences = self.rows * self.tiles * SEQUENCES;
        let words = gpu.zeros(2 * sequences * given * per_gate * terms * bytes, DType::U8)?;
        // Partial sums of two tiles, and the weights of a block where they fit.
        let sums = 2 * WARPS * products * UNITS * (SEQUENCES * self.tiles + 1) * 4;
        let cached = self.across == units && sums + 16 * own <= gpu.most_shared();
        let launch = Launch::new(self.across * self.teams, (WARPS * 32) as u32).together();
        let launch = launch.shared(sums + if cached { 16 * own } else { 0 });
        let mut params = vec![gpu.of_value(&weights)?, gpu.of_value(&words)?];
        params.extend(args);
        params.extend([rounds, batch, steps, width, self.across, usize::from(cached)].map(KernelArg::from));
        gpu.launch(
            &kernels::GRU,
            &format!("gru_{name}_{}_{}", route(self.dtype)?, self.tiles),
            launch,
            &params,
        )
    }
}

/// The states and the last of them; saves the gates.
pub fn forward(dims: Dims, args: &[Tensor], save: bool) -> Result<Forward> {
    let Dims { batch, steps, width } = dims;
    let (gpu, dtype) = (Gpu::of(&args[0])?, args[0].dtype());
    let y = gpu.empty((batch, steps, width), dtype)?;
    let saved = save.then(|| gpu.empty((batch, steps, 4, width), DType::F32)).transpose()?;
    let last = match args.get(3) {
        Some(state) => gpu.copy(state, (batch, width))?,
        None => gpu.zeros((batch, width), DType::F32)?,
    };
    let saved_at = saved.as_ref().map_or(Ok(NULL), |value| gpu.of_value(value))?;
    let list = [gpu.ptr(&args[0])?, gpu.ptr(&args[2])?, gpu.of_value(&last)?, gpu.of_value(&y)?, saved_at];
    Walk::new(&gpu, dims, dtype).launch("forward", (3, 1), steps, &args[1], &list)?;
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
    let carry = match d_last {
        Some(d_last) => gpu.copy(d_last, (batch, width))?,
        None => gpu.zeros((batch, width), DType::F32)?,
    };
    let wide = || gpu.empty((batch, steps, 3 * width), dtype);
    let (dx, da, before) = (wide()?, wide()?, gpu.empty((batch, steps, width), dtype)?);
    let inputs = [gpu.ptr(&run.saved[0])?, gpu.ptr(&run.outputs[0])?, gpu.ptr_or_null(args.get(3))?];
    let outputs = [&carry, &dx, &da, &before].map(|value| gpu.of_value(value));
    let mut list = inputs.to_vec();
    list.push(gpu.ptr_or_null(dy)?);
    list.extend(outputs.into_iter().collect::<Result<Vec<_>>>()?);
    // What comes after the first step is the gradient of the initial state.
    let rounds = steps + usize::from(args.len() > 3);
    Walk::new(&gpu, dims, dtype).launch("backward", (1, 3), rounds, &args[1], &list)?;

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
