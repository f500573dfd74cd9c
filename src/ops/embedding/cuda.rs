//! Launching `kernels/embedding.cu`.

use candle_core::{DType, Result, Tensor};

use crate::cuda::{Gpu, Launch, NULL, kernels, suffix};
use crate::ops::tape::{Forward, Run};

/// Columns of a block, as in the kernels.
const COLUMNS: usize = 64;

/// A table of all symbols is made for at most this much shared memory a block.
const FORWARD_SHARED: usize = 48 << 10;

/// Shared memory of the backward pass: what every GPU has, and an H100 twice.
const BACKWARD_SHARED: usize = 96 << 10;

/// Row stride of a table of the backward pass, in bytes.
const TABLE_ROW: usize = (COLUMNS + 2) * 4;

pub fn forward(args: &[Tensor], dtype: DType) -> Result<Forward> {
    const THREADS: usize = 256;
    /// Three to a multiprocessor of an H100.
    const BLOCKS: usize = 396;
    let gpu = Gpu::of(&args[0])?;
    let (batch, steps) = args[0].dims2()?;
    let (width, vocab) = args[1].dims2()?;
    if args[1..].iter().any(|param| param.dtype() != DType::F32) {
        candle_core::bail!("embedding on a GPU: weight and bias must be f32")
    }
    let rows = batch * steps;
    let y = gpu.empty((batch, steps, width), dtype)?;
    let element = dtype.size_in_bytes();
    let table = (vocab + 1) * (COLUMNS * element + 16);
    let tabled = table <= FORWARD_SHARED;
    let tiles = width.div_ceil(COLUMNS);
    let slabs = BLOCKS.div_ceil(tiles).min(rows.div_ceil(COLUMNS));
    gpu.launch(
        &kernels::EMBEDDING,
        &format!("embedding_forward_{}", suffix(dtype)?),
        Launch::grid(slabs, tiles, 1, THREADS as u32).shared(if tabled { table } else { 0 }),
        &[
            gpu.ptr(&args[0])?,
            gpu.ptr(&args[1])?,
            gpu.ptr(&args[2])?,
            gpu.of_value(&y)?,
            rows.into(),
            width.into(),
            vocab.into(),
            i32::from(tabled).into(),
        ],
    )?;
    Ok(Forward { outputs: vec![y], ..Default::default() })
}

pub fn backward(run: &Run, dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
    /// Two to a multiprocessor of an H100.
    const BLOCKS: usize = 264;
    const MOST_WARPS: usize = 16;
    let gpu = Gpu::of(dy)?;
    let (width, vocab) = run.args[1].dims2()?;
    let rows = run.args[0].elem_count();
    let symbols = (vocab + 1).min(BACKWARD_SHARED / TABLE_ROW);
    let warps = (BACKWARD_SHARED / (symbols * TABLE_ROW)).min(MOST_WARPS);
    let tiles = width.div_ceil(COLUMNS);
    let slabs = BLOCKS.div_ceil(tiles).min(rows.div_ceil(32 * warps)).max(1);
    let part = gpu.empty((slabs, width, vocab + 1), DType::F32)?;
    gpu.launch(
        &kernels::EMBEDDING,
        &format!("embedding_backward_{}", suffix(dy.dtype())?),
        Launch::grid(slabs, tiles, (vocab + 1).div_ceil(symbols), 32 * warps as u32)
            .shared(warps * symbols * TABLE_ROW),
        &[
            gpu.ptr(&run.args[0])?,
            gpu.ptr(dy)?,
            gpu.of_value(&part)?,
            rows.into(),
            width.into(),
            vocab.into(),
            symbols.into(),
        ],
    )?;
    // A parameter's gradient grows where it is.
    let mut grads = vec![None; 3];
    let mut target = |i: usize| {
        if !run.needs[i] {
            return Ok::<_, candle_core::Error>((NULL, 0));
        }
        if let Some(param) = &run.params[i] {
            return Ok((gpu.ptr(&param.grad())?, 1));
        }
        let grad = gpu.empty(run.args[i].shape(), DType::F32)?.into_tensor();
        let address = gpu.ptr(&grad)?;
        grads[i] = Some(grad);
        Ok((address, 0))
    };
    let ((dw, add_w), (db, add_b)) = (target(1)?, target(2)?);
    gpu.launch(
        &kernels::EMBEDDING,
        "embedding_sum_f32",
        Launch::new(width, 128),
        &[gpu.of_value(&part)?, dw, db, slabs.into(), width.into(), vocab.into(), add_w.into(), add_b.into()],
    )?;
    Ok(grads)
}
