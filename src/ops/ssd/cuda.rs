//! Launching `kernels/ssd.cu`.

use candle_core::{DType, Result, Tensor};

use super::{Dims, NAME};
use crate::cuda::{Gpu, KernelArg, Launch, NULL, kernels, route, suffix};
use crate::ops::rows::cuda::parameter_sums;
use crate::ops::tape::{Forward, Run, Value};

/// Padding of rows in shared memory, in elements.
const PAD: usize = 8;
/// Rows of P of a block that carries a state, 16 to a warp.
const STATE_ROWS: usize = 128;
/// f32 numbers per token of a chunk in shared memory: of one chunk, and all of the kernel of the gradients.
const DECAYS: usize = 5;
const GRAD_NUMBERS: usize = 34;

/// One call: its sizes, and how its kernels are instantiated.
#[derive(Clone)]
struct Plan {
    gpu: Gpu,
    dtype: DType,
    route: &'static str,
    dims: Dims,
    /// N is padded to this in shared memory and registers.
    columns: usize,
    /// Tokens of a chunk.
    chunk: usize,
    chunks: usize,
    /// Heads of a block that carries a state: they share B, C and their product.
    heads: usize,
    /// Chunks of a segment: a sequence is cut where its heads alone leave the GPU idle.
    per_segment: usize,
    segments: usize,
}

impl Plan {
    fn new(dims: Dims, args: &[Tensor]) -> Result<Self> {
        let (gpu, dtype) = (Gpu::of(&args[0])?, args[0].dtype());
        let route = route(dtype)?;
        let Some(columns) = [64, 128, 256].into_iter().find(|&n| dims.states <= n) else {
            candle_core::bail!("{NAME} on a GPU: at most 256 states, got {}", dims.states)
        };
        let chunk = if route == "bf16" { 64 } else { 32 };
        let chunks = dims.steps.div_ceil(chunk);
        let plan =
            Self { gpu, dtype, route, dims, columns, chunk, chunks, heads: 1, per_segment: 0, segments: 1 };
        let processors = plan.gpu.multiprocessors();
        // As many as have room in a block, divide a group and leave the GPU full.
        let share = |&heads: &usize| {
            route == "bf16"
                && dims.dim.is_multiple_of(16)
                && heads * dims.dim <= STATE_ROWS
                && (dims.heads / dims.groups).is_multiple_of(heads)
                && dims.batch * dims.heads / heads >= 3 * processors / 2
                && Self { heads, ..plan.clone() }.forward_launch().shared <= plan.gpu.most_shared()
        };
        let heads = [4, 2].into_iter().find(share).unwrap_or(1);
        let blocks = dims.batch * dims.heads / heads * dims.dim.div_ceil(STATE_ROWS);
        let wanted = if 2 * blocks <= processors { 2 * processors / blocks } else { 1 };
        // A segment is worth its two extra passes from a few chunks on.
        let per_segment = chunks.div_ceil(wanted).max(chunks.min(8));
        Ok(Self { heads, per_segment, segments: chunks.div_ceil(per_segment), ..plan })
    }

    fn launch(&self, kernel: &str, launch: Launch, args: &[KernelArg]) -> Result<()> {
        let name = format!("ssd_{kernel}_n{}_{}", self.columns, self.route);
        self.gpu.launch(&kernels::SSD, &name, launch, args)
    }

    fn empty<const N: usize>(&self, shape: [usize; N], dtype: DType) -> Result<Value> {
        self.gpu.empty(shape.to_vec(), dtype)
    }

    /// Bytes of `rows` rows of `columns` elements in shared memory.
    fn tile(&self, rows: usize, columns: usize) -> usize {
        rows * (columns + PAD) * self.dtype.size_in_bytes()
    }

    /// The launch of a kernel that carries states, with `tiles` of B or C in shared memory, and `more` bytes for
    /// every head.
    fn carrying(&self, tiles: usize, more: usize) -> Launch {
        let Dims { batch, heads, dim, .. } = self.dims;
        let warps = (self.heads * dim.div_ceil(16)).min(STATE_ROWS / 16);
        let shared = self.tile(2 * self.chunk, 16 * warps)
            + self.tile(tiles * self.chunk, self.columns)
            + self.heads * (more + 2 * DECAYS * self.chunk * 4);
        let blocks = batch * heads / self.heads * dim.div_ceil(STATE_ROWS);
        Launch::grid(blocks, self.segments, 1, 32 * warps as u32).shared(shared)
    }

    fn forward_launch(&self) -> Launch {
        self.carrying(3, self.tile(self.chunk, self.chunk))
    }

    /// The name of a kernel that carries states.
    fn carrier(&self, kernel: &str) -> String {
        format!("{kernel}{}", if self.heads > 1 { "_heads" } else { "" })
    }

    /// The sizes that every kernel ends its arguments with.
    fn sizes(&self) -> [KernelArg; 5] {
        let Dims { steps, heads, dim, groups, states, .. } = self.dims;
        [steps, heads, dim, groups, states].map(KernelArg::from)
    }

    /// Launches ssd_states. `start`: before the first chunk (in reverse: after the last), one for every segment
    /// if they are several.
    fn states(&self, args: &States, start: KernelArg, all: KernelArg, end: [KernelArg; 2]) -> Result<()> {
        let [t, h, p, g, n] = self.sizes();
        let States { u, v, dt, a_log, dt_bias, reverse } = *args;
        let sizes = [t, h, p, g, n, self.per_segment.into(), i32::from(reverse).into(), self.heads.into()];
        let args = [&[u, v, dt, a_log, dt_bias, start, all], &end[..], &sizes].concat();
        self.launch(&self.carrier("states"), self.carrying(2, 0), &args)
    }

    /// The state before every segment (in reverse: after it), given the one that the sequence begins with.
    fn segment_states(&self, args: &States, start: KernelArg) -> Result<Value> {
        let Dims { batch, heads, dim, states, .. } = self.dims;
        let (gpu, count) = (&self.gpu, batch * heads);
        let ends = self.empty([self.segments, count, dim, states], DType::F32)?;
        let decay = self.empty([self.segments, count], DType::F32)?;
        let (at, decay_at) = (gpu.of_value(&ends)?, gpu.of_value(&decay)?);
        self.states(args, NULL, NULL, [at, decay_at])?;
        let sizes = [self.segments.into(), (dim * states).into(), i32::from(args.reverse).into()];
        let args = [&[at, decay_at, start], &sizes[..]].concat();
        let launch = Launch::grid(count, (dim * states).div_ceil(256), 1, 256);
        gpu.launch(&kernels::SSD, "ssd_scan", launch, &args)?;
        Ok(ends)
    }
}

/// What ssd_states goes through.
#[derive(Clone, Copy)]
struct States {
    u: KernelArg,
    v: KernelArg,
    dt: KernelArg,
    a_log: KernelArg,
    dt_bias: KernelArg,
    reverse: bool,
}

/// y and the final state; saves the states before every chunk.
pub fn forward(dims: Dims, args: &[Tensor], save: bool) -> Result<Forward> {
    let plan = Plan::new(dims, args)?;
    let (gpu, Dims { batch, steps, heads, dim, states, .. }) = (&plan.gpu, plan.dims);
    let ptrs = args.iter().map(|arg| gpu.ptr(arg)).collect::<Result<Vec<_>>>()?;
    let [x, dt, a_log, b, c, d, dt_bias] = ptrs[..7] else { unreachable!("seven arguments and a state") };
    let start = ptrs.get(7).copied().unwrap_or(NULL);

    let y = plan.empty([batch, steps, heads, dim], plan.dtype)?;
    let state = plan.empty([batch, heads, dim, states], DType::F32)?;
    let saved = save.then(|| plan.empty([batch, heads, plan.chunks, dim, states], plan.dtype)).transpose()?;
    let segments = match plan.segments {
        1 => None,
        _ => Some(plan.segment_states(&States { u: x, v: b, dt, a_log, dt_bias, reverse: false }, start)?),
    };
    let start = segments.as_ref().map_or(Ok(start), |value| gpu.of_value(value))?;
    let saved_at = saved.as_ref().map_or(Ok(NULL), |value| gpu.of_value(value))?;
    let outputs = [start, gpu.of_value(&y)?, gpu.of_value(&state)?, saved_at];
    let sizes = [&plan.sizes()[..], &[plan.per_segment.into(), plan.heads.into()]].concat();
    let launch = plan.forward_launch();
    plan.launch(
        &plan.carrier("forward"),
        launch,
        &[&[x, dt, a_log, b, c, d, dt_bias], &outputs[..], &sizes].concat(),
    )?;
    Ok(Forward { outputs: vec![y, state], saved: saved.into_iter().map(Value::into_tensor).collect() })
}

/// The gradients of the arguments, in their order, and of the initial state, from those of y and of the final state.
pub fn backward(dims: Dims, run: &Run, dy: &Tensor, d_state: Option<&Tensor>) -> Result<Vec<Option<Tensor>>> {
    let (args, saved) = (&run.args, &run.saved[0]);
    let plan = Plan::new(dims, args)?;
    let (gpu, dtype) = (&plan.gpu, plan.dtype);
    let Dims { batch, steps, heads, dim, groups, states } = plan.dims;
    let ptrs = args[..7].iter().map(|arg| gpu.ptr(arg)).collect::<Result<Vec<_>>>()?;
    let [x, dt, a_log, b, c, d, dt_bias] = ptrs[..] else { unreachable!("seven arguments") };
    let (dy, start) = (gpu.ptr(dy)?, gpu.ptr_or_null(d_state)?);

    // The gradient of the state after every chunk, and of the initial state.
    let d_states = plan.empty([batch, heads, plan.chunks, dim, states], dtype)?;
    let d_initial = plan.empty([batch, heads, dim, states], DType::F32)?;
    let reverse = States { u: dy, v: c, dt, a_log, dt_bias, reverse: true };
    let segments = match plan.segments {
        1 => None,
        _ => Some(plan.segment_states(&reverse, start)?),
    };
    let start = segments.as_ref().map_or(Ok(start), |value| gpu.of_value(value))?;
    plan.states(&reverse, start, gpu.of_value(&d_states)?, [gpu.of_value(&d_initial)?, NULL])?;

    // Blocks that share the heads of a group: what they have must be added up, so only as many as fill the GPU.
    let blocks = (3 * gpu.multiprocessors() / 2).div_ceil(batch * plan.chunks * groups).min(heads / groups);
    let dx = plan.empty([batch, steps, heads, dim], dtype)?;
    let d_dt = plan.empty([batch, steps, heads], dtype)?;
    let maps = || plan.empty([batch, steps, groups, states], dtype);
    let (db, dc) = (maps()?, maps()?);
    let partial = match blocks {
        1 => None,
        _ => Some(plan.empty([2, blocks, batch, steps, groups, states], DType::F32)?),
    };
    let partial_at = partial.as_ref().map_or(Ok(NULL), |value| gpu.of_value(value))?;
    let shares = plan.empty([batch * plan.chunks, 3, heads], DType::F32)?;
    let (chunk, slice) = (plan.chunk, plan.chunk);
    // Slices of the operands in shared memory: two, one of them on its way, where there is room.
    let shared = |slices: usize| {
        plan.tile(2 * chunk + slices * 2 * slice, plan.columns)
            + plan.tile(slices * 2 * chunk, slice)
            + plan.tile(2 * chunk, chunk)
            + GRAD_NUMBERS * chunk * 4
    };
    let ahead = plan.route == "bf16" && plan.columns <= 128 && shared(2) <= gpu.most_shared();
    let (kernel, shared) = if ahead { ("grads_ahead", shared(2)) } else { ("grads", shared(1)) };
    // Warps for 16 tokens, as in the kernel.
    let sides = if plan.route == "bf16" { 4 } else { 2 };
    let threads = (chunk / 16 * sides * 32) as u32;
    let launch = Launch::grid(plan.chunks, groups * blocks, batch, threads).shared(shared);
    let inputs = [x, dt, a_log, b, c, d, dt_bias, dy, gpu.ptr(saved)?, gpu.of_value(&d_states)?];
    let (db_at, dc_at) = (gpu.of_value(&db)?, gpu.of_value(&dc)?);
    let outputs =
        [gpu.of_value(&dx)?, gpu.of_value(&d_dt)?, db_at, dc_at, partial_at, gpu.of_value(&shares)?];
    plan.launch(kernel, launch, &[&inputs[..], &outputs, &plan.sizes()].concat())?;

    if blocks > 1 {
        let size = batch * steps * groups * states;
        let launch = Launch::grid(size.div_ceil(1024).min(16 * gpu.multiprocessors()), 2, 1, 256);
        let args = [partial_at, db_at, dc_at, KernelArg::I64(size as i64), blocks.into()];
        gpu.launch(&kernels::SSD, &format!("ssd_sum_{}", suffix(dtype)?), launch, &args)?;
    }
    let params = parameter_sums(gpu, run, &shares, batch * plan.chunks, &[2, 5, 6])?;
    let [d_a_log, d_d, d_dt_bias] = <[_; 3]>::try_from(params).expect("three parameters");
    let [dx, d_dt, db, dc, d_initial] = [dx, d_dt, db, dc, d_initial].map(|value| Some(value.into_tensor()));
    Ok(vec![dx, d_dt, d_a_log, db, dc, d_d, d_dt_bias, d_initial])
}
