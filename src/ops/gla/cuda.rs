//! Launching `kernels/gla.cu`.

use candle_core::{DType, Result, Tensor};

use super::{Dims, NAME};
use crate::cuda::{Gpu, KernelArg, Launch, NULL, kernels, route};
use crate::ops::tape::{Forward, Value};

/// Padding of rows in shared memory, in elements.
const PAD: usize = 8;
/// Tokens in shared memory at a time, and in a block of them.
const STAGE: usize = 32;
const BLOCK: usize = 16;
/// Tokens between two states that one backward kernel keeps for the next.
const SPAN: usize = 256;
/// Rows of a tile with the inner factors of a block's queries.
const QUERY_ROWS: usize = 24;
/// Warps of a block, at least.
const WARPS: usize = 2;
/// Rows of K of a block of gla_dq and gla_dk.
const KEY_ROWS: usize = 128;

/// One call: its sizes, and how its kernels are instantiated.
struct Plan {
    gpu: Gpu,
    dtype: DType,
    route: &'static str,
    dims: Dims,
    scale: f32,
    /// Stages of a segment: a sequence is cut where its heads alone leave the GPU idle.
    per_segment: usize,
    segments: usize,
}

/// What the kernels read: q, k and g, and one of the values and their gradients.
#[derive(Clone, Copy)]
struct Inputs {
    q: KernelArg,
    k: KernelArg,
    g: KernelArg,
    z: KernelArg,
}

/// What a number of columns is padded to: the variant of a kernel that has them in registers.
fn padded(columns: usize) -> Result<usize> {
    match [64, 128, 256].into_iter().find(|&n| columns <= n) {
        Some(n) => Ok(n),
        None => candle_core::bail!("{NAME} on a GPU: head dims up to 256, got {columns}"),
    }
}

impl Plan {
    fn new(dims: Dims, args: &[Tensor], scale: f64) -> Result<Self> {
        let dtype = args[0].dtype();
        if args[3].dtype() != DType::F32 {
            candle_core::bail!("{NAME} on a GPU: log decays in f32, got {:?}", args[3].dtype())
        }
        let gpu = Gpu::of(&args[0])?;
        let stages = dims.steps.div_ceil(STAGE);
        let blocks = dims.batch * dims.heads * dims.key.div_ceil(KEY_ROWS);
        let wanted = (gpu.multiprocessors() / blocks).max(1);
        // A segment is worth its extra pass from a few spans on, and ends where a state is kept.
        let per_segment = stages.div_ceil(wanted).max(4 * SPAN / STAGE).next_multiple_of(SPAN / STAGE);
        let segments = stages.div_ceil(per_segment);
        let scale = scale as f32;
        Ok(Self { gpu, dtype, route: route(dtype)?, dims, scale, per_segment, segments })
    }

    fn empty<const N: usize>(&self, shape: [usize; N], dtype: DType) -> Result<Value> {
        self.gpu.empty(shape.to_vec(), dtype)
    }

    /// Bytes of `tiles` tiles of a stage in shared memory, with rows of `columns` elements of `size` bytes.
    fn tiles(&self, tiles: usize, columns: usize, size: usize) -> usize {
        tiles * STAGE * (columns + PAD) * size
    }

    /// Bytes of what a stage of keys and queries becomes: a tile of keys, one of queries, A or D, exp(L).
    fn decayed(&self, columns: usize) -> usize {
        let size = self.dtype.size_in_bytes();
        let queries = STAGE / BLOCK * QUERY_ROWS * (columns + PAD) * size;
        self.tiles(1, columns, size) + queries + self.tiles(1, BLOCK, size) + STAGE / BLOCK * columns * 4
    }

    /// Stages in shared memory: two, unless rows of f32 have `wide` columns.
    fn buffers(&self, columns: usize, wide: usize) -> usize {
        if self.dtype == DType::F32 && columns >= wide { 1 } else { 2 }
    }

    /// Launches gla_values, o and the final state from z = v, in reverse dv from z = do; or gla_states, what
    /// becomes of a state of zeros in every segment, and what is left of any.
    fn values(
        &self,
        kernel: &str,
        inputs: Inputs,
        start: KernelArg,
        outputs: [KernelArg; 3],
        reverse: bool,
    ) -> Result<()> {
        let Dims { batch, steps, heads, key, value } = self.dims;
        let (columns, size) = (padded(key)?, self.dtype.size_in_bytes());
        // Few large blocks share the work on q, k and g; many small ones fill the GPU.
        let tiles = value.div_ceil(16);
        let wanted = 2 * self.gpu.multiprocessors() / (batch * heads * self.segments);
        // As many warps as their registers allow.
        let most = if columns == 256 { 8 } else { 16 };
        let slices = tiles.div_ceil(most).max(wanted.min(tiles.div_ceil(4)));
        let warps = tiles.div_ceil(slices).max(WARPS);
        let slices = tiles.div_ceil(warps);
        let stage =
            self.tiles(2, columns, size) + self.tiles(1, 16 * warps, size) + self.tiles(1, columns, 4);
        let shared = self.buffers(columns, 256) * stage + self.decayed(columns);
        let launch = Launch::grid(batch * heads * slices, self.segments, 1, 32 * warps as u32).shared(shared);
        let Inputs { q, k, g, z } = inputs;
        let sizes = [steps, heads, key, value, slices, self.per_segment].map(KernelArg::from);
        let flags = [self.scale.into(), i32::from(reverse).into()];
        let args = [&[q, k, g, z, start], &outputs[..], &sizes, &flags].concat();
        let name = format!("{kernel}_n{columns}_{}", self.route);
        self.gpu.launch(&kernels::GLA, &name, launch, &args)
    }

    /// The state before every segment (in reverse: after it), given the one that the sequence begins with;
    /// none where the sequence is in one piece.
    fn segment_states(&self, inputs: Inputs, start: KernelArg, reverse: bool) -> Result<Option<Value>> {
        if self.segments == 1 {
            return Ok(None);
        }
        let Dims { batch, heads, key, value, .. } = self.dims;
        let ends = self.empty([self.segments, batch * heads, key, value], DType::F32)?;
        let decays = self.empty([self.segments, batch * heads, key], DType::F32)?;
        let (at, decays) = (self.gpu.of_value(&ends)?, self.gpu.of_value(&decays)?);
        self.values("gla_states", inputs, NULL, [NULL, at, decays], reverse)?;
        let sizes = [self.segments, key, value].map(KernelArg::from);
        let args = [&[at, decays, start], &sizes[..], &[i32::from(reverse).into()]].concat();
        let launch = Launch::grid(batch * heads, (key * value).div_ceil(256), 1, 256);
        self.gpu.launch(&kernels::GLA, "gla_scan", launch, &args)?;
        Ok(Some(ends))
    }

    /// Launches gla_dq or gla_dk: dq, or dk, dg and the gradient of the initial state.
    fn keys(
        &self,
        kernel: &str,
        inputs: [KernelArg; 6],
        outputs: [KernelArg; 5],
        keep_end: bool,
    ) -> Result<()> {
        let Dims { batch, steps, heads, key, value } = self.dims;
        let (columns, size) = (padded(value)?, self.dtype.size_in_bytes());
        let rows = key.next_multiple_of(16).clamp(16 * WARPS, KEY_ROWS);
        let stage = self.tiles(2, columns, size) + self.tiles(2, rows, size) + self.tiles(1, rows, 4);
        let shared = self.buffers(columns, 128) * stage + self.decayed(rows) + (STAGE + rows) * 4;
        let blocks = batch * heads * key.div_ceil(KEY_ROWS);
        let launch = Launch::grid(blocks, self.segments, 1, 2 * rows as u32).shared(shared);
        let sizes = [steps, heads, key, value, self.per_segment].map(KernelArg::from);
        let flags = [self.scale.into(), i32::from(keep_end).into()];
        let name = format!("{kernel}_n{columns}_{}", self.route);
        self.gpu.launch(&kernels::GLA, &name, launch, &[&inputs[..], &outputs, &sizes, &flags].concat())
    }
}

/// o and the final state; nothing is kept for the backward pass.
pub fn forward(dims: Dims, args: &[Tensor], scale: f64) -> Result<Forward> {
    let plan = Plan::new(dims, args, scale)?;
    let (gpu, Dims { batch, steps, heads, key, value }) = (&plan.gpu, plan.dims);
    let [q, k, v, g] = [0, 1, 2, 3].map(|i| gpu.ptr(&args[i]));
    let start = gpu.ptr_or_null(args.get(4))?;
    let o = plan.empty([batch, steps, heads, value], plan.dtype)?;
    let state = plan.empty([batch, heads, key, value], DType::F32)?;
    let inputs = Inputs { q: q?, k: k?, g: g?, z: v? };
    let starts = plan.segment_states(inputs, start, false)?;
    let start = starts.as_ref().map_or(Ok(start), |value| gpu.of_value(value))?;
    plan.values("gla_values", inputs, start, [gpu.of_value(&o)?, gpu.of_value(&state)?, NULL], false)?;
    Ok(Forward { outputs: vec![o, state], saved: vec![] })
}

/// The gradients of q, k, v, the log decays and the initial state, from those of o and of the final state.
pub fn backward(
    dims: Dims,
    args: &[Tensor],
    scale: f64,
    d_o: &Tensor,
    d_state: Option<&Tensor>,
) -> Result<Vec<Tensor>> {
    let plan = Plan::new(dims, args, scale)?;
    let (gpu, dtype, Dims { batch, steps, heads, key, value }) = (&plan.gpu, plan.dtype, plan.dims);
    let [q, k, v, g] = [0, 1, 2, 3].map(|i| gpu.ptr(&args[i]));
    let (q, k, v, g, d_o) = (q?, k?, v?, g?, gpu.ptr(d_o)?);
    let (start, end) = (gpu.ptr_or_null(args.get(4))?, gpu.ptr_or_null(d_state)?);
    let (forward, reverse) = (Inputs { q, k, g, z: v }, Inputs { q, k, g, z: d_o });
    let starts = plan.segment_states(forward, start, false)?;
    let start = starts.as_ref().map_or(Ok(start), |value| gpu.of_value(value))?;
    let ends = plan.segment_states(reverse, end, true)?;
    let keep_end = ends.is_some() || d_state.is_some();
    let end = ends.as_ref().map_or(Ok(end), |value| gpu.of_value(value))?;

    let dv = plan.empty([batch, steps, heads, value], dtype)?;
    plan.values("gla_values", reverse, end, [gpu.of_value(&dv)?, NULL, NULL], true)?;

    let (dq, dk) =
        (plan.empty([batch, steps, heads, key], dtype)?, plan.empty([batch, steps, heads, key], dtype)?);
    let dg = plan.empty([batch, steps, heads, key], DType::F32)?;
    let d_initial = plan.empty([batch, heads, key, value], DType::F32)?;
    // States and products as the lanes of a warp hold them, by tiles of 16 rows of K.
    let tiles = batch * heads * key.div_ceil(16);
    let kept = plan.empty([tiles, steps.div_ceil(SPAN), 16, padded(value)?], DType::F32)?;
    let products = plan.empty([tiles, steps.div_ceil(BLOCK), 16, BLOCK], DType::F32)?;
    let shared = [gpu.of_value(&kept)?, gpu.of_value(&products)?];
    let outputs = [gpu.of_value(&dq)?, NULL, NULL, shared[0], shared[1]];
    plan.keys("gla_dq", [k, q, g, d_o, v, start], outputs, keep_end)?;
    let outputs = [gpu.of_value(&dk)?, gpu.of_value(&dg)?, gpu.of_value(&d_initial)?, shared[0], shared[1]];
    plan.keys("gla_dk", [q, k, g, v, d_o, end], outputs, false)?;
    Ok([dq, dk, dv, dg, d_initial].into_iter().map(Value::into_tensor).collect())
}
