//! Launching `kernels/mesa.cu`; the linear attention around the solves is that of `kernels/gla.cu`.

use candle_core::{DType, Result, Tensor};

use super::{Dims, NAME};
use crate::cuda::{Gpu, KernelArg, Launch, NULL, kernels, suffix};
use crate::ops::gla;
use crate::ops::tape::{Forward, Run, Value};

const THREADS: usize = 256;
/// What the registers of a block hold.
const MOST_KEY: usize = 128;
/// The steps that a block is worth.
const LEAST_STEPS: usize = 8;
/// Steps of `mesa_carry` between barriers.
const SPAN: usize = 8;

struct Plan<'a> {
    gpu: Gpu,
    dtype: DType,
    dims: Dims,
    args: &'a [Tensor],
}

impl<'a> Plan<'a> {
    fn new(dims: Dims, args: &'a [Tensor]) -> Result<Self> {
        if dims.key > MOST_KEY {
            candle_core::bail!("{NAME} on a GPU: key dims up to {MOST_KEY}, got {}", dims.key)
        }
        Ok(Self { gpu: Gpu::of(&args[0])?, dtype: args[0].dtype(), dims, args })
    }

    fn name(&self, kernel: &str) -> Result<String> {
        Ok(format!("mesa_{kernel}_{}", suffix(self.dtype)?))
    }

    /// A new tensor of the size of the keys.
    fn like_keys(&self, dtype: DType) -> Result<Tensor> {
        Ok(self.gpu.empty(self.args[1].shape(), dtype)?.into_tensor())
    }

    /// The keys times β, and the log decay of every channel.
    fn prepare(&self) -> Result<[Tensor; 2]> {
        let (gpu, n) = (&self.gpu, self.args[1].elem_count());
        let (keys, decay) = (self.like_keys(self.dtype)?, self.like_keys(DType::F32)?);
        let mut list = [1, 3, 4].map(|i| gpu.ptr(&self.args[i])).into_iter().collect::<Result<Vec<_>>>()?;
        list.extend([gpu.ptr(&keys)?, gpu.ptr(&decay)?, KernelArg::I64(n as i64), self.dims.key.into()]);
        let launch = Launch::new(n.div_ceil(THREADS).min(16 * gpu.multiprocessors()), THREADS as u32);
        gpu.launch(&kernels::MESA, &self.name("prepare")?, launch, &list)?;
        Ok([keys, decay])
    }

    /// Segments of time that are worked on side by side, and the steps of one.
    fn segments(&self) -> (usize, usize) {
        let Dims { batch, steps, heads, key, .. } = self.dims;
        // About nine times as many blocks as run side by side on 132 multiprocessors: few of them are idle at the end.
        let blocks = 132 * if key <= 64 { 48 } else { 16 };
        let wanted = (blocks / (batch * heads)).clamp(1, steps.div_ceil(LEAST_STEPS));
        let length = steps.div_ceil(wanted);
        (steps.div_ceil(length), length)
    }

    /// Launches `carry` or `solve`, which has blocks for so many heads or segments of heads.
    fn tiles(
        &self,
        kernel: &str,
        blocks: usize,
        shared: impl Fn(usize, usize) -> usize,
        args: &[KernelArg],
    ) -> Result<()> {
        let key = self.dims.key;
        let (side, (segments, length)) = (if key <= 64 { 4 } else { 8 }, self.segments());
        let rows = key.div_ceil(side);
        // A thread for every tile and for every channel.
        let threads = (rows * (rows + 3) / 2).max(rows * side).next_multiple_of(32);
        let sizes = [self.dims.steps, self.dims.heads, key, segments, length].map(KernelArg::from);
        let launch = Launch::new(blocks, threads as u32).shared(4 * shared(rows * side, side));
        self.gpu.launch(
            &kernels::MESA,
            &self.name(&format!("{kernel}{side}"))?,
            launch,
            &[args, &sizes].concat(),
        )
    }

    /// A before every segment but the first.
    fn edges(&self) -> Result<Option<Tensor>> {
        let (gpu, Dims { batch, heads, key, .. }, (segments, _)) = (&self.gpu, self.dims, self.segments());
        if segments == 1 {
            return Ok(None);
        }
        let edges = gpu.empty((batch * heads, segments - 1, key, key), DType::F32)?.into_tensor();
        let mut list = [1, 3, 4].map(|i| gpu.ptr(&self.args[i])).into_iter().collect::<Result<Vec<_>>>()?;
        list.extend([gpu.ptr_or_null(self.args.get(6))?, gpu.ptr(&edges)?]);
        self.tiles("carry", batch * heads, |width, _| 2 * SPAN * (width + 2), &list)?;
        Ok(Some(edges))
    }

    /// Solves for `rhs`; `more` are the final state, −x, what x is multiplied with, and where the sums go.
    fn solve(&self, rhs: &Tensor, x: &Tensor, more: [KernelArg; 4]) -> Result<()> {
        let (gpu, Dims { batch, heads, .. }) = (&self.gpu, self.dims);
        let [end, minus, other, shares] = more;
        let edges = self.edges()?;
        let mut list =
            [1, 3, 4, 5].map(|i| gpu.ptr(&self.args[i])).into_iter().collect::<Result<Vec<_>>>()?;
        let start = gpu.ptr_or_null(self.args.get(6))?;
        list.extend([gpu.ptr(rhs)?, start, gpu.ptr_or_null(edges.as_ref())?, end, gpu.ptr(x)?]);
        list.extend([minus, other, shares]);
        let blocks = batch * heads * self.segments().0;
        self.tiles("solve", blocks, |width, side| width * (width + side + 7), &list)
    }

    /// The sizes of linear attention with values of `value` columns.
    fn attention(&self, value: usize) -> gla::Dims {
        let Dims { batch, steps, heads, key, .. } = self.dims;
        gla::Dims { batch, steps, heads, key, value }
    }
}

/// The outputs and the final states; saves the solutions.
pub fn forward(dims: Dims, args: &[Tensor], save: bool) -> Result<Forward> {
    let plan = Plan::new(dims, args)?;
    let (gpu, Dims { batch, heads, key, value, .. }) = (&plan.gpu, dims);
    let [keys, decay] = plan.prepare()?;
    let (x, end) = (plan.like_keys(plan.dtype)?, gpu.empty((batch, heads, key, key), DType::F32)?);
    plan.solve(&args[0], &x, [gpu.of_value(&end)?, NULL, NULL, NULL])?;
    let mut attended = vec![x.clone(), keys, args[2].clone(), decay];
    attended.extend(args.get(7).cloned());
    let mut outputs = gla::cuda::forward(plan.attention(value), &attended, 1.0)?.outputs;
    outputs.insert(1, end);
    Ok(Forward { outputs, saved: if save { vec![x] } else { vec![] } })
}

/// The gradients of the arguments, in their order, from those of the outputs and of the final states.
pub fn backward(
    dims: Dims,
    run: &Run,
    d_o: &Tensor,
    [d_keys, d_values]: [Option<&Tensor>; 2],
) -> Result<Vec<Option<Tensor>>> {
    let (args, plan) = (&run.args, Plan::new(dims, &run.args)?);
    let (gpu, dtype, Dims { batch, steps, heads, key, value }) = (&plan.gpu, plan.dtype, dims);
    let (x, [keys, decay]) = (&run.saved[0], plan.prepare()?);
    // The outputs are linear attention of the solutions.
    let mut attended = vec![x.clone(), keys.clone(), args[2].clone(), decay.clone()];
    attended.extend(args.get(7).cloned());
    let mut outer = gla::cuda::backward(plan.attention(value), &attended, 1.0, d_o, d_values)?.into_iter();
    let mut next = || outer.next().expect("five gradients");
    let [dx, first, dv, decay1, d_start_values] = [next(), next(), next(), next(), next()];

    let (dq, minus) = (plan.like_keys(dtype)?, plan.like_keys(dtype)?);
    let parts = batch * plan.segments().0;
    let shares = gpu.empty((parts, heads, key), DType::F32)?;
    plan.solve(&dx, &dq, [NULL, gpu.ptr(&minus)?, gpu.ptr(x)?, gpu.of_value(&shares)?])?;

    // And so is what the systems read of A.
    let mut attended = vec![x.clone(), keys, args[1].clone(), decay];
    attended.extend(args.get(6).cloned());
    let mut inner =
        gla::cuda::backward(plan.attention(key), &attended, 1.0, &minus, d_keys)?.into_iter().skip(1);
    let mut next = || inner.next().expect("five gradients");
    let [second, values, decay2, d_start_keys] = [next(), next(), next(), next()];
    // Half of either order: A is symmetric.
    let d_start_keys = ((&d_start_keys + d_start_keys.transpose(2, 3)?)? * 0.5)?;

    let dk = plan.like_keys(dtype)?;
    let per_head = || -> Result<Value> { gpu.empty((batch, steps, heads), DType::F32) };
    let (d_beta, dg) = (per_head()?, per_head()?);
    let rows = batch * steps * heads;
    let mut list = vec![gpu.ptr(&args[1])?, gpu.ptr(&args[3])?];
    for tensor in [&first, &second, &values, &decay1, &decay2, &dk] {
        list.push(gpu.ptr(tensor)?);
    }
    list.extend([gpu.of_value(&d_beta)?, gpu.of_value(&dg)?, rows.into(), key.into()]);
    let launch = Launch::new(rows.div_ceil(THREADS / 32).min(32 * gpu.multiprocessors()), THREADS as u32);
    gpu.launch(&kernels::MESA, &plan.name("gather")?, launch, &list)?;

    let d_lambda = gpu.empty(heads * key, DType::F32)?;
    let list = [gpu.ptr(&args[5])?, gpu.of_value(&shares)?, gpu.of_value(&d_lambda)?];
    let list = [&list[..], &[parts.into(), (heads * key).into()]].concat();
    let launch = Launch::new((heads * key).div_ceil(THREADS), THREADS as u32);
    gpu.launch(&kernels::MESA, "mesa_lambda", launch, &list)?;
    let [d_beta, dg, d_lambda] = [d_beta, dg, d_lambda].map(Value::into_tensor);
    let grads = [dq, dk, dv, d_beta, dg, d_lambda, d_start_keys, d_start_values];
    Ok(grads.into_iter().take(args.len()).map(Some).collect())
}
