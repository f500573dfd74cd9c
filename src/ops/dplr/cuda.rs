//! Launching `kernels/dplr.cu`.

use candle_core::{DType, Result, Tensor};

use super::{Dims, NAME};
use crate::cuda::{Gpu, KernelArg, Launch, NULL, kernels, suffix};
use crate::ops::tape::{Forward, Run, Value};

/// Steps in shared memory at a time, and steps of a sum of the log decays' gradients.
const TILE: usize = 8;
const CHUNK: usize = 64;
/// Value columns of a thread.
const COLUMNS: usize = 4;
/// Blocks that are enough for the GPU that the layouts are made for: a layout, and with it the order of every sum,
/// is a function of the shape alone on all GPUs with as much shared memory.
const ENOUGH_BLOCKS: usize = 132;

/// Bytes of shared memory of the kernel that has most, `reverse`.
fn shared(room: usize, columns: usize, threads: usize) -> usize {
    4 * (2 * TILE * (5 * room + 3 * columns) + 2 * TILE * threads / 32 * room)
}

/// One call: its sizes, and how its kernels are laid out.
struct Plan {
    gpu: Gpu,
    dtype: DType,
    dims: Dims,
    scale: f32,
    /// Keys that the kernels have room for, and the lanes that share a value column.
    room: usize,
    lanes: usize,
    threads: usize,
    /// Blocks of a head.
    splits: usize,
}

impl Plan {
    fn new(dims: Dims, args: &[Tensor], scale: f64) -> Result<Self> {
        let dtype = args[0].dtype();
        for (i, arg) in args.iter().enumerate() {
            let want = if [3, 6].contains(&i) { DType::F32 } else { dtype };
            if arg.dtype() != want {
                candle_core::bail!(
                    "{NAME} on a GPU: expected argument {i} of {want:?}, got {:?}",
                    arg.dtype()
                )
            }
        }
        let Some(room) = [16, 32, 64, 96, 128].into_iter().find(|&room| dims.key <= room) else {
            candle_core::bail!("{NAME} on a GPU: key dims up to 128, got {}", dims.key)
        };
        let lanes = if room <= 64 { 4 } else { 8 };
        let columns = |threads: usize| threads / lanes * COLUMNS;
        let blocks = |threads: usize| dims.batch * dims.heads * dims.value.div_ceil(columns(threads));
        let gpu = Gpu::of(&args[0])?;
        let mut threads = 32 * lanes;
        // Small blocks spread few heads over the GPU, do not idle where there are few columns, and fit everywhere.
        while threads > 32
            && (columns(threads / 2) >= dims.value
                || blocks(threads) < ENOUGH_BLOCKS
                || shared(room, columns(threads), threads) > gpu.most_shared())
        {
            threads /= 2;
        }
        let splits = dims.value.div_ceil(columns(threads));
        let scale = scale as f32;
        Ok(Self { gpu, dtype, dims, scale, room, lanes, threads, splits })
    }

    fn heads(&self) -> usize {
        self.dims.batch * self.dims.heads
    }

    fn chunks(&self) -> usize {
        self.dims.steps.div_ceil(CHUNK)
    }

    /// Launches one of the kernels that walk over time, with so many arrays of keys and of values in shared memory.
    fn walk(&self, pass: &str, [keys, values]: [usize; 2], sums: bool, args: &[KernelArg]) -> Result<()> {
        let Dims { steps, heads, key, value, .. } = self.dims;
        let columns = self.threads / self.lanes * COLUMNS;
        let tiles = 2 * TILE * (keys * self.room + values * columns);
        let sums = if sums { 2 * TILE * self.threads / 32 * self.room } else { 0 };
        let launch = Launch::new(self.heads() * self.splits, self.threads as u32).shared(4 * (tiles + sums));
        let name = format!("dplr_{pass}_k{}_{}", self.room, suffix(self.dtype)?);
        let sizes = [steps, heads, key, value, self.splits].map(KernelArg::from);
        self.gpu.launch(&kernels::DPLR, &name, launch, &[args, &[self.scale.into()], &sizes].concat())
    }
}

/// o and the final state; saves what the tokens read before they erased.
pub fn forward(dims: Dims, args: &[Tensor], scale: f64, save: bool) -> Result<Forward> {
    let plan = Plan::new(dims, args, scale)?;
    let (gpu, Dims { batch, steps, heads, key, value }) = (&plan.gpu, dims);
    let o = gpu.empty((batch, steps, heads, value), plan.dtype)?;
    let last = gpu.empty((batch, heads, key, value), DType::F32)?;
    let read = if save { Some(gpu.empty((batch, steps, heads, value), DType::F32)?) } else { None };
    let mut list = args[..6].iter().map(|arg| gpu.ptr(arg)).collect::<Result<Vec<_>>>()?;
    let read_at = read.as_ref().map_or(Ok(NULL), |read| gpu.of_value(read))?;
    list.extend([gpu.ptr_or_null(args.get(6))?, gpu.of_value(&o)?, read_at, gpu.of_value(&last)?]);
    plan.walk("forward", [5, 1], false, &list)?;
    let saved = read.into_iter().map(Value::into_tensor).collect();
    Ok(Forward { outputs: vec![o, last], saved })
}

/// The gradients of the arguments, in their order, from those of o and of the final state.
pub fn backward(
    dims: Dims,
    run: &Run,
    scale: f64,
    d_o: &Tensor,
    d_last: Option<&Tensor>,
) -> Result<Vec<Option<Tensor>>> {
    let args = &run.args;
    let plan = Plan::new(dims, args, scale)?;
    let (gpu, Dims { batch, steps, heads, key, value }) = (&plan.gpu, dims);
    let [read] = &run.saved[..] else { candle_core::bail!("{NAME}: the forward pass kept nothing") };
    let [q, k, v, g, a, b] = [0, 1, 2, 3, 4, 5].map(|i| gpu.ptr(&args[i]));
    let (q, k, v, g, a, b) = (q?, k?, v?, g?, a?, b?);
    let (read, d_o, start) = (gpu.ptr(read)?, gpu.ptr(d_o)?, gpu.ptr_or_null(args.get(6))?);

    let (splits, chunks) = (plan.splits, plan.chunks());
    let share = || gpu.empty(vec![2, splits, batch, steps, heads, key], DType::F32);
    // Of dk and db, dq and da.
    let (written, readers) = (share()?, share()?);
    let numbers = plan.room / plan.lanes * COLUMNS;
    let kept = gpu.empty((plan.heads() * splits, chunks, numbers, plan.threads), DType::F32)?;
    let ends = gpu.empty((plan.heads() * splits, chunks, key), DType::F32)?;
    let (kept, ends) = (gpu.of_value(&kept)?, gpu.of_value(&ends)?);
    let dv = gpu.empty((batch, steps, heads, value), plan.dtype)?;
    let d_read = gpu.empty((batch, steps, heads, value), DType::F32)?;
    let d_start = if args.len() > 6 { Some(gpu.empty(args[6].shape(), DType::F32)?) } else { None };
    let d_start_at = d_start.as_ref().map_or(Ok(NULL), |value| gpu.of_value(value))?;

    let inputs = [q, k, v, g, a, b, read, d_o, gpu.ptr_or_null(d_last)?];
    let outputs = [gpu.of_value(&dv)?, gpu.of_value(&d_read)?, gpu.of_value(&written)?, kept, d_start_at];
    plan.walk("reverse", [5, 3], true, &[&inputs[..], &outputs].concat())?;

    let inputs = [k, v, g, b, read, d_o, gpu.of_value(&d_read)?, start];
    plan.walk("replay", [3, 4], true, &[&inputs[..], &[kept, gpu.of_value(&readers)?, ends]].concat())?;

    let like_keys = |dtype: DType| gpu.empty((batch, steps, heads, key), dtype);
    let (dq, dk, dg) = (like_keys(plan.dtype)?, like_keys(plan.dtype)?, like_keys(DType::F32)?);
    let (da, db) = (like_keys(plan.dtype)?, like_keys(plan.dtype)?);
    let mut list = vec![q, k, a, b, gpu.of_value(&readers)?, gpu.of_value(&written)?, ends];
    for value in [&dq, &dk, &da, &db, &dg] {
        list.push(gpu.of_value(value)?);
    }
    list.extend([steps, heads, key, splits].map(KernelArg::from));
    let launch = Launch::grid(plan.heads(), chunks, 1, 128);
    gpu.launch(&kernels::DPLR, &format!("dplr_gather_{}", suffix(plan.dtype)?), launch, &list)?;
    let grads = [dq, dk, dv, dg, da, db].into_iter().chain(d_start);
    Ok(grads.map(|value| Some(value.into_tensor())).collect())
}
