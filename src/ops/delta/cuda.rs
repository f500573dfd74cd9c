//! Launching `kernels/delta.cu`, where `hopper.rs` has nothing better.

use candle_core::{DType, Result, Tensor};

use super::hopper::{self, Hopper};
use super::{Dims, GatedRule};
use crate::cuda::{Gpu, KernelArg, Launch, NULL, kernels, route};
use crate::ops::tape::{Forward, Run};

const NAME: &str = "gated_delta_rule";

/// Sub-steps of a chunk.
pub const CHUNK: usize = 64;
/// Value columns of four warps.
const SLICE: usize = 64;

/// So many blocks are enough for a GPU.
const MANY_BLOCKS: usize = 132;

/// How a call is laid out on the GPU.
struct Plan {
    gpu: Gpu,
    dims: Dims,
    dtype: DType,
    /// Key dim of the kernels: the next that there is.
    key: usize,
    /// Groups of four warps in a block of the walks.
    groups: usize,
    chunks: usize,
    /// Better kernels.
    hopper: Option<Hopper>,
}

impl Plan {
    fn new(node: &GatedRule, args: &[Tensor]) -> Result<Self> {
        let dims = node.dims(args)?;
        let dtype = args[0].dtype();
        for (i, arg) in args.iter().enumerate() {
            let want = if i < 3 { dtype } else { DType::F32 };
            if arg.dtype() != want {
                candle_core::bail!(
                    "{NAME} on a GPU: expected argument {i} of {want:?}, got {:?}",
                    arg.dtype()
                )
            }
        }
        if dims.key > 128 || dims.sub > CHUNK {
            candle_core::bail!(
                "{NAME} on a GPU: key dim {} with {} steps a token; at most 128 and {CHUNK}",
                dims.key,
                dims.sub
            )
        }
        let key = if dims.key <= 64 { 64 } else { 128 };
        // Two groups read q and k once for both; one makes more blocks.
        let pairs = dims.batch * dims.heads * dims.value.div_ceil(2 * SLICE);
        let wide = dtype == DType::BF16 && key == 64 && dims.value > SLICE && pairs >= MANY_BLOCKS;
        let groups = if wide { 2 } else { 1 };
        let chunks = dims.steps.div_ceil(CHUNK / dims.sub);
        let gpu = Gpu::of(&args[0])?;
        let hopper = Hopper::new(&gpu, &dims, dtype);
        Ok(Self { gpu, dims, dtype, key, groups, chunks, hopper })
    }

    fn heads(&self) -> usize {
        self.dims.batch * self.dims.heads
    }

    /// Value columns of what is kept of a chunk.
    fn columns(&self) -> usize {
        match self.hopper {
            Some(_) => self.dims.value.next_multiple_of(SLICE),
            None => self.dims.value,
        }
    }

    /// Bytes of shared memory: `floats` rows of a chunk, and tiles of `keys` rows of keys, `squares` of
    /// sub-steps against sub-steps, `values` of values and `states` states, values and states of `groups`.
    fn shared(&self, floats: usize, [keys, squares, values, states]: [usize; 4], groups: usize) -> usize {
        let element = self.dtype.size_in_bytes();
        let pad = 16 / element;
        let columns = groups * SLICE + 8;
        let tiles = keys * CHUNK * (self.key + pad)
            + squares * CHUNK * (CHUNK + pad)
            + values * CHUNK * columns
            + states * self.key * columns;
        4 * CHUNK * floats + element * tiles
    }

    /// One block a chunk.
    fn chunk(&self, kernel: &str, threads: u32, shared: usize, args: &[KernelArg]) -> Result<()> {
        let launch = Launch::new(self.heads() * self.chunks, threads).shared(shared);
        self.gpu.launch(&kernels::DELTA, kernel, launch, args)
    }

    /// One block a slice of value columns.
    fn walk(&self, pass: &str, shared: usize, args: &[KernelArg]) -> Result<()> {
        let name = format!("delta_{pass}_{}_{}_{}", route(self.dtype)?, self.key, self.groups);
        let slices = self.dims.value.div_ceil(self.groups * SLICE);
        let launch = Launch::new(self.heads() * slices, 128 * self.groups as u32).shared(shared);
        self.gpu.launch(&kernels::DELTA, &name, launch, args)
    }

    /// What ends the arguments of the kernels that see values.
    fn sizes(&self, scale: f64) -> [KernelArg; 6] {
        let Dims { steps, heads, key, value, sub, .. } = self.dims;
        [(scale as f32).into(), steps.into(), heads.into(), key.into(), value.into(), sub.into()]
    }
}

pub fn forward(node: &GatedRule, args: &[Tensor], save: bool) -> Result<Forward> {
    let plan = Plan::new(node, args)?;
    let (gpu, dtype, heads, chunks) = (&plan.gpu, plan.dtype, plan.heads(), plan.chunks);
    let Dims { batch, steps, sub, key, value, .. } = plan.dims;
    let m = gpu.empty((heads, chunks, CHUNK, CHUNK), dtype)?;
    // Numbers of a sub-step.
    let numbers = if plan.hopper.is_some() { hopper::ROWS } else { 2 };
    let rows = gpu.empty((heads, chunks, numbers, CHUNK), DType::F32)?;
    let p = plan.hopper.as_ref().map(|hopper| gpu.empty(hopper.p_shape(), dtype)).transpose()?;
    let (m_at, rows_at) = (gpu.of_value(&m)?, gpu.of_value(&rows)?);
    let beta = gpu.ptr(&args[3])?;
    let (g, state) = (gpu.ptr_or_null(node.g(args))?, gpu.ptr_or_null(node.state(args))?);
    let o = gpu.empty((batch, steps, plan.dims.heads, value), dtype)?;
    let last = gpu.empty((batch, plan.dims.heads, key, value), DType::F32)?;
    let outputs = [gpu.of_value(&o)?, gpu.of_value(&last)?];
    let kept = match save {
        true => vec![
            gpu.empty((heads, chunks, key, plan.columns()), dtype)?,
            gpu.empty((heads, chunks, CHUNK, plan.columns()), dtype)?,
        ],
        false => vec![],
    };
    let kept_at = match &kept[..] {
        [s, vh] => Some([gpu.of_value(s)?, gpu.of_value(vh)?]),
        _ => None,
    };

    if let (Some(hopper), Some(p)) = (&plan.hopper, &p) {
        let inputs = [&args[0], &args[1], &args[2]];
        let parts = [m_at, gpu.of_value(p)?, rows_at];
        hopper.forward(inputs, [beta, g, state], parts, outputs, kept_at, node.scale)?;
    } else {
        let (q, k, v) = (gpu.ptr(&args[0])?, gpu.ptr(&args[1])?, gpu.ptr(&args[2])?);
        let element = dtype.size_in_bytes();
        let padded = key.next_multiple_of(16) + 16 / element;
        let shared = 4 * CHUNK * (2 + 2 * (CHUNK + 4)) + element * CHUNK * padded;
        let sizes = [steps, plan.dims.heads, key, sub].map(KernelArg::from);
        let name = format!("delta_prepare_{}", route(dtype)?);
        plan.chunk(&name, 128, shared, &[&[k, beta, g, m_at, rows_at], &sizes[..]].concat())?;

        let inputs = [q, k, v, m_at, rows_at, state];
        let shared = plan.shared(5, [3, 1, 2, 1], plan.groups);
        let kept = kept_at.unwrap_or([NULL; 2]);
        plan.walk("forward", shared, &[&inputs[..], &outputs, &kept, &plan.sizes(node.scale)].concat())?;
    }

    let saved = match save {
        true => [m, rows].into_iter().chain(kept).chain(p).map(|value| value.into_tensor()).collect(),
        false => vec![],
    };
    Ok(Forward { outputs: vec![o, last], saved })
}

pub fn backward(node: &GatedRule, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
    let args = &run.args;
    let plan = Plan::new(node, args)?;
    let (gpu, dtype) = (&plan.gpu, plan.dtype);
    let Dims { batch, steps, heads, key, value, .. } = plan.dims;
    let [m, rows, s, vh, p @ ..] = &run.saved[..] else {
        candle_core::bail!("{NAME}: the forward pass kept nothing")
    };
    let (m, rows, s, vh) = (gpu.ptr(m)?, gpu.ptr(rows)?, gpu.ptr(s)?, gpu.ptr(vh)?);
    let d_o = match &grads[0] {
        Some(grad) => grad.clone(),
        None => gpu.zeros((batch, steps, heads, value), dtype)?.into_tensor(),
    };
    let d_last = gpu.ptr_or_null(grads[1].as_ref())?;
    let like = |i: usize| gpu.empty(args[i].shape(), args[i].dtype());
    let (dq, dk, dv, d_beta) = (like(0)?, like(1)?, like(2)?, like(3)?);
    let dg = if node.gated { Some(like(4)?) } else { None };
    let d_state = if node.stateful { Some(like(args.len() - 1)?) } else { None };
    let or_null = |value: &Option<_>| value.as_ref().map_or(Ok(NULL), |value| gpu.of_value(value));
    let ds = gpu.empty((plan.heads(), plan.chunks, key, plan.columns()), dtype)?;
    let (dv_at, ds_at) = (gpu.of_value(&dv)?, gpu.of_value(&ds)?);
    let walked = [dv_at, ds_at, or_null(&d_state)?];
    let outputs = [gpu.of_value(&dq)?, gpu.of_value(&dk)?, dv_at, gpu.of_value(&d_beta)?, or_null(&dg)?];
    if let (Some(hopper), [p]) = (&plan.hopper, p) {
        let inputs = [&args[0], &args[1], &args[2], &d_o];
        let parts = [m, gpu.ptr(p)?, rows, s, vh, ds_at];
        hopper.backward(inputs, parts, [d_last, walked[2]], outputs, node.scale)?;
    } else {
        let (q, k, v) = (gpu.ptr(&args[0])?, gpu.ptr(&args[1])?, gpu.ptr(&args[2])?);
        let (d_o, sizes) = (gpu.ptr(&d_o)?, plan.sizes(node.scale));
        let inputs = [q, k, m, rows, d_o, d_last];
        let shared = plan.shared(6, [3, 1, 3, 1], plan.groups);
        plan.walk("reverse", shared, &[&inputs[..], &walked, &sizes].concat())?;

        let name = format!("delta_gradients_{}_{}", route(dtype)?, plan.key);
        // Two stages of a slice of values where one block has a multiprocessor for itself.
        let stages = if plan.key == 128 && dtype == DType::BF16 { 2 } else { 1 };
        let shared = plan.shared(12 + plan.key / 8, [2, 0, 4 * stages, 2 * stages], 1);
        let inputs = [q, k, v, rows, s, vh, ds_at, d_o];
        plan.chunk(&name, 4 * plan.key as u32, shared, &[&inputs[..], &outputs, &sizes].concat())?;
    }

    let all = [dq, dk, dv, d_beta].into_iter().chain(dg).chain(d_state);
    Ok(all.map(|value| Some(value.into_tensor())).collect())
}
