//! Launching `kernels/selective_scan.cu`.

use super::{Dims, NAME, SelectiveScanNode};
use crate::cuda::{Gpu, KernelArg, Launch, NULL, kernels, suffix};
use crate::ops::tape::{Forward, Run};
use candle_core::{DType, Result, Tensor};

/// Steps between checkpoints, and steps that the backward kernel takes at a time.
const CHUNK: usize = 64;
const SUB: usize = 8;
/// States of a lane of the backward kernel, and its warps on a multiprocessor.
const OWN: usize = 4;
const WARPS: usize = 8;
/// Warps of `kernels/selective_scan_sm90a.cu` that serve them.
const SERVERS: usize = 4;
/// Threads of a block of the kernels that add up.
const THREADS: usize = 256;
/// Multiprocessors of the GPU that the layouts below are made for: a layout, and with it the order of every
/// sum, is a function of the shape alone.
const PROCESSORS: usize = 132;

/// The layout of a walk over time: forward, or what segments add to the states between them.
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

    /// Few states a thread fill the GPU where there are few states, many need fewer loads and sums. Segments
    /// of time cost the states twice: they are for sequences so long and few that most of the GPU would have
    /// nothing to do.
    fn forward(dims: &Dims, dtype: DType) -> (Self, Segments) {
        let all = dims.batch * dims.channels * dims.states;
        let (own, side) = match dims.states {
            n if n > 128 || all >= PROCESSORS * 8192 => (16, 2),
            n if n > 64 || all >= PROCESSORS * 1024 => (4, 2),
            _ => (2, 1),
        };
        // Threads that run side by side, and steps that a segment is worth.
        const RESIDENT: usize = PROCESSORS * 512;
        const STEPS: usize = 4 * CHUNK;
        let walk = Self::new(dims, dtype, 4, 2);
        let wanted = (RESIDENT / walk.all(dims)).min(dims.steps / STEPS);
        if wanted > 2 {
            (walk, Segments::new(dims.steps, wanted))
        } else {
            (Self::new(dims, dtype, own, side), Segments::new(dims.steps, 1))
        }
    }

    fn carry(dims: &Dims, dtype: DType) -> Self {
        Self::new(dims, dtype, 8, 1)
    }

    fn channels(&self) -> usize {
        self.threads / self.lanes * self.side
    }

    fn shared(&self) -> usize {
        let (channels, padded) = (self.channels(), self.own * self.lanes);
        self.tile * (2 * (3 * channels + 2 * padded) * self.element + 4 * (3 * channels + 4 + 2 * padded))
    }

    /// Threads for all channels and batch entries.
    fn all(&self, dims: &Dims) -> usize {
        dims.channels.div_ceil(self.channels()) * dims.batch * self.threads
    }

    fn launch(&self, dims: &Dims, segments: usize) -> Launch {
        let blocks = dims.channels.div_ceil(self.channels());
        Launch::grid(blocks, dims.batch, segments, self.threads as u32).shared(self.shared())
    }
}

/// Segments of time that are worked on side by side.
#[derive(Clone, Copy)]
struct Segments {
    count: usize,
    /// Chunks of one.
    chunks: usize,
}

impl Segments {
    /// At most `wanted` segments of equally many chunks.
    fn new(steps: usize, wanted: usize) -> Self {
        let all = steps.div_ceil(CHUNK);
        let chunks = all.div_ceil(wanted);
        Self { count: all.div_ceil(chunks), chunks }
    }

    fn steps(&self) -> KernelArg {
        KernelArg::from(self.chunks * CHUNK)
    }
}

/// The layout of the backward kernel.
#[derive(Clone, Copy)]
struct Plan {
    /// States of a channel, with those that only fill up: 4 for each of its lanes.
    padded: usize,
    /// Warps that walk over time and channels of a block.
    warps: usize,
    group: usize,
    /// Whether SERVERS further warps prepare and finish for them.
    served: bool,
    segments: Segments,
}

impl Plan {
    /// The layout that takes least time by [`Plan::cycles`].
    fn new(gpu: &Gpu, dims: &Dims, dtype: DType) -> Self {
        let padded = OWN * dims.states.div_ceil(OWN).next_power_of_two().max(4);
        // As the kernels are compiled: as many channels as there is shared memory for.
        let (warps, group) = match (padded, dtype) {
            (16, DType::BF16) => (4, 128),
            (64, DType::BF16) => (4, 64),
            (16 | 32 | 64, _) => (8, 128),
            (128, _) => (8, 64),
            _ => (8, 32),
        };
        let served = padded >= 128 && gpu.runs(&kernels::SELECTIVE_SCAN_SM90A);
        let plan =
            |wanted| Self { padded, warps, group, served, segments: Segments::new(dims.steps, wanted) };
        let chunks = dims.steps.div_ceil(CHUNK);
        (1..=chunks.min(64)).map(plan).min_by_key(|plan| plan.cycles(dims)).expect("a step at least")
    }

    fn groups(&self, dims: &Dims) -> usize {
        dims.channels.div_ceil(self.group)
    }

    fn threads(&self) -> u32 {
        32 * (self.warps + if self.served { SERVERS } else { 0 }) as u32
    }

    /// Blocks on a multiprocessor.
    fn resident(&self) -> usize {
        WARPS / self.warps
    }

    /// What the blocks are given one after the other.
    fn items(&self, dims: &Dims) -> usize {
        self.groups(dims) * dims.batch * self.segments.count
    }

    /// Bytes of shared memory, as the kernel lays it out.
    fn shared(&self, dtype: DType) -> usize {
        let (group, padded) = (self.group, self.padded);
        4 * (3 * group * padded + 1280 * self.warps + 4 + 108 * group + 36 * padded)
            + SUB * (5 * group + 2 * padded) * dtype.size_in_bytes()
    }

    /// A rough estimate of the time.
    fn cycles(&self, dims: &Dims) -> usize {
        // 26 instructions for a state and step at 128 a cycle, and what a block of SUB steps costs besides.
        let resident = self.resident();
        let chunk = resident * CHUNK * self.group * self.padded * 26 / 128 + CHUNK / SUB * 3000;
        let rounds = self.items(dims).div_ceil(resident * PROCESSORS);
        let states = dims.batch * dims.channels * dims.states;
        let chunks = dims.steps.div_ceil(CHUNK);
        let carry = if self.segments.count > 1 { 20_000 + chunks * states * 4 / PROCESSORS } else { 0 };
        rounds * self.segments.chunks * chunk + carry
    }
}

/// The states between segments, [B, segments - 1, D, N]; or, with `back`, their gradients. `x`: u or the
/// gradient of y; `map`: B or C; `edge`: the state that there is at the beginning, or its gradient at the end.
struct Carry {
    name: &'static str,
    x: KernelArg,
    map: KernelArg,
    gate: KernelArg,
    edge: KernelArg,
    back: bool,
}

impl Carry {
    /// None where there is one segment. `inputs`: those of all large kernels.
    fn run(
        self,
        gpu: &Gpu,
        dims: &Dims,
        dtype: DType,
        inputs: &[KernelArg],
        segments: Segments,
    ) -> Result<Option<Tensor>> {
        let &Dims { batch, channels, states, .. } = dims;
        let edges = segments.count - 1;
        if edges == 0 {
            return Ok(None);
        }
        let carry = gpu.empty((batch, edges, channels, states), DType::F32)?;
        let sums = gpu.empty((batch, edges, channels), DType::F32)?;
        let (carry_ptr, sums_ptr) = (gpu.of_value(&carry)?, gpu.of_value(&sums)?);
        let walk = Walk::carry(dims, dtype);
        let mut params = vec![self.x, inputs[1], inputs[2], self.map, inputs[6], self.gate, self.edge];
        params.extend([carry_ptr, sums_ptr]);
        params.extend(sizes(dims));
        params.extend([KernelArg::from(walk.lanes), KernelArg::from(walk.tile), segments.steps()]);
        let name = format!("{NAME}_{}_{}", self.name, suffix(dtype)?);
        gpu.launch(&kernels::SELECTIVE_SCAN, &name, walk.launch(dims, edges), &params)?;
        let mut params = vec![carry_ptr, sums_ptr, inputs[2]];
        params.extend([batch, edges, channels, states, usize::from(self.back)].map(KernelArg::from));
        let launch = Launch::new((batch * channels * states).div_ceil(THREADS), THREADS as u32);
        gpu.launch(&kernels::SELECTIVE_SCAN, &format!("{NAME}_chain"), launch, &params)?;
        Ok(Some(carry.into_tensor()))
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
    let plan = Plan::new(&gpu, &dims, dtype);
    let (rows, padded) = (plan.groups(&dims) * plan.group, plan.padded);
    if save {
        let shape = (batch, steps.div_ceil(CHUNK), rows, padded);
        // What no state fills must be finite.
        let full = (rows, padded) == (channels, states);
        let checkpoints = if full { gpu.empty(shape, DType::F32)? } else { gpu.zeros(shape, DType::F32)? };
        saved.push(checkpoints.into_tensor());
        if node.gated {
            saved.push(gpu.empty((batch, steps, channels), dtype)?.into_tensor());
        }
    }
    let (walk, segments) = Walk::forward(&dims, dtype);
    let mut params = node.inputs(&gpu, args)?;
    let edge = gpu.ptr_or_null(node.state(args))?;
    let enter = Carry { name: "enter", x: params[0], map: params[3], gate: NULL, edge, back: false };
    let carry = enter.run(&gpu, &dims, dtype, &params, segments)?;
    params.push(edge);
    params.extend([gpu.of_value(&y)?, gpu.ptr_or_null(saved.get(1))?]);
    params.extend([gpu.of_value(&state)?, gpu.ptr_or_null(saved.first())?]);
    params.push(gpu.ptr_or_null(carry.as_ref())?);
    params.extend(sizes(&dims));
    params.extend([KernelArg::from(walk.lanes), KernelArg::from(walk.tile), segments.steps()]);
    params.extend([rows, padded].map(KernelArg::from));
    let name = format!("{NAME}_forward_s{}x{}_{}", walk.own, walk.side, suffix(dtype)?);
    gpu.launch(&kernels::SELECTIVE_SCAN, &name, walk.launch(&dims, segments.count), &params)?;
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
    let plan = Plan::new(&gpu, &dims, dtype);
    let segments = plan.segments;
    let leave = Carry { name: "leave", x: dy, map: inputs[4], gate: inputs[7], edge: dfinal, back: true };
    let carry = leave.run(&gpu, &dims, dtype, &inputs, segments)?;

    let new = |i: usize| gpu.empty(args[i].shape(), args[i].dtype()).map(|value| value.into_tensor());
    let (du, ddelta, db, dc) = (new(0)?, new(1)?, new(3)?, new(4)?);
    let dz = if node.gated { Some(new(7)?) } else { None };
    let dstate = if node.stateful { Some(new(args.len() - 1)?) } else { None };
    let (padded, groups) = (plan.padded, plan.groups(&dims));
    let blocks = plan.items(&dims).min(plan.resident() * gpu.multiprocessors());
    let maps = gpu.empty((2, groups, batch * steps, padded), DType::F32)?;
    let slabs = batch * segments.count;
    let parameters = gpu.empty((slabs, channels * (states + 2)), DType::F32)?;
    let scratch = gpu.empty((blocks, CHUNK / SUB - 1, plan.group, padded), DType::F32)?;
    let mut params = inputs.clone();
    params.extend([gpu.ptr_or_null(run.saved.get(1))?, dy, dfinal]);
    params.extend([gpu.ptr(&run.saved[0])?, gpu.ptr_or_null(carry.as_ref())?]);
    params.extend([gpu.ptr(&du)?, gpu.ptr(&ddelta)?, gpu.ptr_or_null(dz.as_ref())?]);
    params.push(gpu.ptr_or_null(dstate.as_ref())?);
    params.extend([gpu.of_value(&maps)?, gpu.of_value(&parameters)?, gpu.of_value(&scratch)?]);
    params.extend(sizes(&dims));
    params.extend([segments.count, segments.chunks].map(KernelArg::from));
    let launch = Launch::new(blocks, plan.threads()).shared(plan.shared(dtype));
    let (module, suffix_of_module) =
        if plan.served { (&kernels::SELECTIVE_SCAN_SM90A, "_sm90a") } else { (&kernels::SELECTIVE_SCAN, "") };
    let name = format!("{NAME}_backward_l{}_{}{suffix_of_module}", plan.padded / OWN, suffix(dtype)?);
    gpu.launch(module, &name, launch, &params)?;

    let mut params = vec![gpu.of_value(&maps)?, gpu.ptr(&db)?, gpu.ptr(&dc)?];
    params.extend([groups, batch * steps, states, padded].map(KernelArg::from));
    let launch = Launch::new((2 * batch * steps * padded / OWN).div_ceil(THREADS), THREADS as u32);
    gpu.launch(&kernels::SELECTIVE_SCAN, &format!("{NAME}_sum_maps_{}", suffix(dtype)?), launch, &params)?;

    // Gradients of the parameters are added to their own where there is one.
    let mut new = [None, None, None];
    let (mut params, mut add) = (vec![gpu.of_value(&parameters)?, inputs[2]], 0);
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
