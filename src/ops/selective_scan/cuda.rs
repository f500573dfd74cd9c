//! Launching `kernels/selective_scan.cu`.

use candle_core::{DType, Result, Tensor};
use cudarc::driver::sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN as MAX_SHARED;

use super::{Dims, NAME, SelectiveScanNode};
use crate::cuda::{Gpu, KernelArg, Launch, NULL, kernels, suffix};
use crate::ops::tape::{Forward, Run};

/// Steps between checkpoints, and steps that the backward kernel takes at a time.
const CHUNK: usize = 64;
const SUB: usize = 8;
/// States of a lane, and threads of a block, of the backward kernel.
const OWN: usize = 4;
const THREADS: usize = 256;
/// Multiprocessors of the GPU that the layouts below are made for: a layout, and with it the order of every
/// sum, is a function of the shape alone.
const PROCESSORS: usize = 132;

/// The layout of a walk over time, forward or for the carry.
struct Walk {
    /// States and channels of a thread.
    own: usize,
    side: usize,
    /// Threads that share a channel.
    lanes: usize,
    threads: usize,
    /// Steps staged at a time.
    tile: usize,
    element: usize,
}

impl Walk {
    /// Threads of `own` states of `side` channels.
    fn new(dims: &Dims, dtype: DType, own: usize, side: usize) -> Self {
        /// Four blocks of 128 threads run side by side on a multiprocessor.
        const SHARED: usize = 54 << 10;
        let lanes = dims.states.div_ceil(own).next_power_of_two();
        // Many lanes a channel make few channels a block, which read B and C again and again.
        let threads = if own * side >= 32 && lanes >= 8 { 256 } else { 128 };
        let mut walk = Self { own, side, lanes, threads, tile: SUB, element: dtype.size_in_bytes() };
        while walk.threads > lanes.max(32)
            && (walk.shared() > SHARED || walk.threads / 2 / lanes * side >= dims.channels)
        {
            walk.threads /= 2;
        }
        while walk.tile < 32 && 2 * walk.shared() <= SHARED {
            walk.tile *= 2;
        }
        walk
    }

    /// Few states a thread fill the GPU where there are few states, many need fewer loads and sums.
    fn forward(dims: &Dims, dtype: DType) -> Self {
        let all = dims.batch * dims.channels * dims.states;
        let (own, side) = match dims.states {
            n if n > 128 || all >= PROCESSORS * 8192 => (16, 2),
            n if n > 64 || all >= PROCESSORS * 1024 => (4, 2),
            _ => (2, 1),
        };
        Self::new(dims, dtype, own, side)
    }

    fn carry(dims: &Dims, dtype: DType) -> Self {
        Self::new(dims, dtype, if dims.states > 64 { 8 } else { 2 }, 1)
    }

    fn channels(&self) -> usize {
        self.threads / self.lanes * self.side
    }

    fn shared(&self) -> usize {
        let (channels, padded) = (self.channels(), self.own * self.lanes);
        self.tile * (2 * (3 * channels + 2 * padded) * self.element + 4 * (3 * channels + 4 + 2 * padded))
    }

    fn launch(&self, dims: &Dims) -> Launch {
        let blocks = dims.channels.div_ceil(self.channels());
        Launch::grid(blocks, dims.batch, 1, self.threads as u32).shared(self.shared())
    }
}

/// The layout of the backward kernel.
#[derive(Clone, Copy)]
struct Plan {
    /// Threads that share a channel, and how often they step over its states.
    lanes: usize,
    tiles: usize,
    /// Channels of a block.
    group: usize,
    /// Segments of time that are worked on side by side, and chunks of one.
    segments: usize,
    per_segment: usize,
}

impl Plan {
    /// The layout that takes least time by [`Plan::cycles`] and fits in `limit` bytes of shared memory.
    fn new(dims: &Dims, dtype: DType, limit: usize) -> Result<Self> {
        let lanes = dims.states.div_ceil(OWN).next_power_of_two().clamp(2, 32);
        let tiles = dims.states.div_ceil(OWN * lanes).next_power_of_two();
        let chunks = dims.steps.div_ceil(CHUNK);
        let least = THREADS / lanes;
        let mut best: Option<(usize, Self)> = None;
        let mut group = 256;
        while group >= least {
            for wanted in 1..=chunks.min(64) {
                let per_segment = chunks.div_ceil(wanted);
                let plan = Self { lanes, tiles, group, segments: chunks.div_ceil(per_segment), per_segment };
                let cycles = plan.cycles(dims);
                if plan.shared(dtype) <= limit && best.is_none_or(|(least, _)| cycles < least) {
                    best = Some((cycles, plan));
                }
            }
            group /= 2;
        }
        match best {
            Some((_, plan)) if dims.states <= 256 => Ok(plan),
            _ => candle_core::bail!("{NAME} on a GPU: at most 256 states, got {}", dims.states),
        }
    }

    fn padded(&self) -> usize {
        OWN * self.lanes * self.tiles
    }

    fn groups(&self, dims: &Dims) -> usize {
        dims.channels.div_ceil(self.group)
    }

    /// What the blocks are given one after the other.
    fn items(&self, dims: &Dims) -> usize {
        self.groups(dims) * dims.batch * self.segments
    }

    /// Bytes of shared memory, as the kernel lays it out.
    fn shared(&self, dtype: DType) -> usize {
        let (group, padded) = (self.group, self.padded());
        let sums = (THREADS * 2 * self.lanes).max(group * padded);
        4 * (3 * group * padded + sums + 2 * (53 * group + 18 * padded))
            + SUB * (5 * group + 2 * padded) * dtype.size_in_bytes()
    }

    /// A rough estimate of the time.
    fn cycles(&self, dims: &Dims) -> usize {
        let chunks = dims.steps.div_ceil(CHUNK);
        // 22 instructions for a state and step at 128 a cycle, and what a block of SUB steps costs besides.
        let chunk = CHUNK * self.group * self.padded() * 22 / 128 + CHUNK / SUB * 3000;
        let main = self.items(dims).div_ceil(PROCESSORS) * self.per_segment * chunk;
        // Sums over channels: written once, read once, at 1,700 bytes a cycle.
        let maps = self.groups(dims) * dims.batch * dims.steps * self.padded() * 16 / 1700;
        let states = dims.batch * dims.channels * dims.states;
        let carry = if self.segments > 1 { chunks * (2500 + states * 4 / PROCESSORS) } else { 0 };
        main + maps + carry
    }
}

impl SelectiveScanNode {
    /// u, delta, a_log, b, c, d, delta_bias and z: what begins the arguments of the large kernels.
    fn inputs(&self, gpu: &Gpu, args: &[Tensor]) -> Result<Vec<KernelArg>> {
        let dtype = args[0].dtype();
        let z = self.z(args);
        for (name, activation) in
            [("delta", Some(&args[1])), ("b", Some(&args[3])), ("c", Some(&args[4])), ("z", z)]
        {
            if let Some(activation) = activation
                && activation.dtype() != dtype
            {
                candle_core::bail!("{NAME}: u is {dtype:?} and {name} {:?}", activation.dtype())
            }
        }
        for arg in [&args[2], &args[5], &args[6]].into_iter().chain(self.state(args)) {
            if arg.dtype() != DType::F32 {
                candle_core::bail!("{NAME} on a GPU: parameters and states are F32, got {:?}", arg.dtype())
            }
        }
        let mut inputs = args[..7].iter().map(|arg| gpu.ptr(arg)).collect::<Result<Vec<_>>>()?;
        inputs.push(gpu.ptr_or_null(z)?);
        Ok(inputs)
    }
}

fn sizes(dims: &Dims) -> [KernelArg; 4] {
    [dims.batch, dims.steps, dims.channels, dims.states].map(KernelArg::from)
}

/// y and the final state; saved for the backward pass: the states before every chunk, and y before the gate.
pub fn forward(node: &SelectiveScanNode, args: &[Tensor], save: bool) -> Result<Forward> {
    let dims = node.dims(args)?;
    let Dims { batch, steps, channels, states } = dims;
    if states > 256 {
        candle_core::bail!("{NAME} on a GPU: at most 256 states, got {states}")
    }
    let (gpu, dtype) = (Gpu::of(&args[0])?, args[0].dtype());
    let y = gpu.empty((batch, steps, channels), dtype)?;
    let state = gpu.empty((batch, channels, states), DType::F32)?;
    let mut saved = vec![];
    if save {
        saved.push(gpu.empty((batch, steps.div_ceil(CHUNK), channels, states), DType::F32)?.into_tensor());
        if node.gated {
            saved.push(gpu.empty((batch, steps, channels), dtype)?.into_tensor());
        }
    }
    let walk = Walk::forward(&dims, dtype);
    let mut params = node.inputs(&gpu, args)?;
    params.push(gpu.ptr_or_null(node.state(args))?);
    params.extend([gpu.of_value(&y)?, gpu.ptr_or_null(saved.get(1))?]);
    params.extend([gpu.of_value(&state)?, gpu.ptr_or_null(saved.first())?]);
    params.extend(sizes(&dims));
    params.extend([walk.lanes, walk.tile].map(KernelArg::from));
    let name = format!("{NAME}_forward_s{}x{}_{}", walk.own, walk.side, suffix(dtype)?);
    gpu.launch(&kernels::SELECTIVE_SCAN, &name, walk.launch(&dims), &params)?;
    Ok(Forward { outputs: vec![y, state], saved })
}

/// The gradients of all arguments, from those of y and of the final state.
pub fn backward(
    node: &SelectiveScanNode,
    run: &Run,
    grads: &[Option<Tensor>],
) -> Result<Vec<Option<Tensor>>> {
    let args = &run.args;
    let dims = node.dims(args)?;
    let Dims { batch, steps, channels, states } = dims;
    let (gpu, dtype) = (Gpu::of(&args[0])?, args[0].dtype());
    let dy = match &grads[0] {
        Some(dy) => dy.contiguous()?,
        None => gpu.zeros((batch, steps, channels), dtype)?.into_tensor(),
    };
    let dfinal = grads[1].as_ref().map(Tensor::contiguous).transpose()?;
    let dy = gpu.ptr(&dy)?;
    let dfinal = gpu.ptr_or_null(dfinal.as_ref())?;
    let inputs = node.inputs(&gpu, args)?;
    let [_, delta, a_log, _, c, _, delta_bias, z] = inputs[..] else { unreachable!("eight inputs") };

    let context = gpu.stream().context();
    let limit = context.attribute(MAX_SHARED).ok().and_then(|bytes| usize::try_from(bytes).ok());
    let plan = Plan::new(&dims, dtype, limit.unwrap_or(48 << 10))?;
    let segments = plan.segments;
    let mut carry = None;
    if segments > 1 {
        let value = gpu.empty((batch, segments - 1, channels, states), DType::F32)?;
        let walk = Walk::carry(&dims, dtype);
        let mut params = vec![dy, delta, a_log, c, delta_bias, z, dfinal, gpu.of_value(&value)?];
        params.extend(sizes(&dims));
        params.extend([walk.lanes, walk.tile, plan.per_segment * CHUNK].map(KernelArg::from));
        let name = format!("{NAME}_carry_s{}_{}", walk.own, suffix(dtype)?);
        gpu.launch(&kernels::SELECTIVE_SCAN, &name, walk.launch(&dims), &params)?;
        carry = Some(value.into_tensor());
    }

    let new = |i: usize| gpu.empty(args[i].shape(), args[i].dtype()).map(|value| value.into_tensor());
    let (du, ddelta, db, dc) = (new(0)?, new(1)?, new(3)?, new(4)?);
    let dz = if node.gated { Some(new(7)?) } else { None };
    let dstate = if node.stateful { Some(new(args.len() - 1)?) } else { None };
    let (padded, groups) = (plan.padded(), plan.groups(&dims));
    let blocks = plan.items(&dims).min(gpu.multiprocessors());
    let maps = gpu.empty((2, groups, batch * steps, padded), DType::F32)?;
    let slabs = batch * segments;
    let parameters = gpu.empty((slabs, channels * (states + 2)), DType::F32)?;
    let scratch = gpu.empty((blocks, CHUNK / SUB - 1, plan.group, padded), DType::F32)?;
    let mut params = inputs.clone();
    params.extend([gpu.ptr_or_null(run.saved.get(1))?, dy, dfinal]);
    params.extend([gpu.ptr(&run.saved[0])?, gpu.ptr_or_null(carry.as_ref())?]);
    params.extend([gpu.ptr(&du)?, gpu.ptr(&ddelta)?, gpu.ptr_or_null(dz.as_ref())?]);
    params.push(gpu.ptr_or_null(dstate.as_ref())?);
    params.extend([gpu.of_value(&maps)?, gpu.of_value(&parameters)?, gpu.of_value(&scratch)?]);
    params.extend(sizes(&dims));
    params.extend([plan.lanes, plan.tiles, plan.group, segments, plan.per_segment].map(KernelArg::from));
    let launch = Launch::new(blocks, THREADS as u32).shared(plan.shared(dtype));
    let name = format!("{NAME}_backward_{}", suffix(dtype)?);
    gpu.launch(&kernels::SELECTIVE_SCAN, &name, launch, &params)?;

    let mut params = vec![gpu.of_value(&maps)?, gpu.ptr(&db)?, gpu.ptr(&dc)?];
    params.extend([groups, batch * steps, states, padded].map(KernelArg::from));
    let launch = Launch::new((2 * batch * steps * padded / OWN).div_ceil(THREADS), THREADS as u32);
    gpu.launch(&kernels::SELECTIVE_SCAN, &format!("{NAME}_sum_maps_{}", suffix(dtype)?), launch, &params)?;

    // Gradients of the parameters are added to their own where there is one.
    let mut new = [None, None, None];
    let (mut params, mut add) = (vec![gpu.of_value(&parameters)?, a_log], 0);
    for (bit, i) in [2, 5, 6].into_iter().enumerate() {
        params.push(match &run.params[i] {
            _ if !run.needs[i] => NULL,
            Some(param) => {
                add |= 1 << bit;
                gpu.ptr(&param.grad())?
            }
            None => {
                let value = gpu.empty(args[i].shape(), DType::F32)?.into_tensor();
                gpu.ptr(new[bit].insert(value))?
            }
        });
    }
    params.extend([slabs, channels, states].map(KernelArg::from));
    params.push(KernelArg::I32(add));
    let launch = Launch::new((channels * (states + 2)).div_ceil(THREADS), THREADS as u32);
    gpu.launch(&kernels::SELECTIVE_SCAN, &format!("{NAME}_sum_parameters"), launch, &params)?;

    let [da_log, dd, ddelta_bias] = new;
    let mut out = vec![Some(du), Some(ddelta), da_log, Some(db), Some(dc), dd, ddelta_bias];
    if node.gated {
        out.push(dz);
    }
    if node.stateful {
        out.push(dstate);
    }
    Ok(out)
}
