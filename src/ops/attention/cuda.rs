//! Launching attention on a GPU: `kernels/attention.cu`, where `hopper.rs` has nothing better, and `kernels/qk_norm_rope.cu`.

use candle_core::{DType, Result, Tensor};

use super::hopper::Hopper;
use super::reference::Shape;
use super::rope::Turn;
use crate::cuda::{Gpu, KernelArg, Launch, kernels, route, suffix};
use crate::ops::rows::cuda::parameter_sums;
use crate::ops::tape::{Forward, Run, Value};

/// The tile of a kernel: rows that a block owns, 16 or 32 to a warp, and rows that it walks over at a time.
struct Tile {
    own: usize,
    other: usize,
}

/// Threads of every block.
const THREADS: u32 = 128;

/// Threads of the blocks that sum along time.
const SUM_THREADS: u32 = 256;

/// How a launch is instantiated: the entry points of `kernels/attention.cu` carry these numbers.
struct Variant {
    /// The head dim that both of the call are padded to.
    dim: usize,
    route: &'static str,
    forward: Tile,
    dq: Tile,
    dkdv: Tile,
}

impl Variant {
    fn new(shape: Shape, dtype: DType) -> Result<Self> {
        let (route, widest) = (route(dtype)?, shape.dim.max(shape.values));
        let dims: &[usize] = match route {
            "bf16" => &[32, 64, 80, 96, 128],
            _ => &[32, 64, 96, 128],
        };
        let Some(&dim) = dims.iter().find(|&&dim| widest <= dim) else {
            candle_core::bail!("attention on a GPU: head dims up to 128, got {widest}")
        };
        let tile = |own, other| Tile { own, other };
        let [forward, dq, dkdv] = match (route, dim) {
            ("bf16", 32) => [tile(128, 64), tile(128, 64), tile(128, 64)],
            ("bf16", 64) => [tile(128, 64), tile(128, 32), tile(128, 32)],
            ("bf16", _) => [tile(128, 64), tile(128, 32), tile(64, 64)],
            _ => [tile(64, 32), tile(64, 32), tile(64, 32)],
        };
        Ok(Self { dim, route, forward, dq, dkdv })
    }

    /// With or without forget gates.
    fn name(&self, what: &str, forget: Option<&Forget>) -> String {
        let kind = if forget.is_some() { "forgetting" } else { "attention" };
        format!("{kind}_{what}_{}_{}", self.dim, self.route)
    }

    /// Whether the warps of dkdv work in pairs.
    fn pairs(&self) -> bool {
        self.route == "bf16" && self.dim >= 96
    }

    fn element(&self) -> usize {
        if self.route == "bf16" { 2 } else { 4 }
    }

    /// Bytes of `rows` rows in shared memory, where the head dim runs along the sum of a product (`k`) or not.
    fn rows(&self, rows: usize, k: bool) -> usize {
        rows * (self.dim + if k && self.route != "bf16" { 4 } else { 8 }) * self.element()
    }

    /// Shared memory of the backward kernels, but for their numbers per query.
    fn backward_tiles(&self, tile: &Tile) -> usize {
        self.rows(2 * tile.own + 4 * tile.other, true)
    }
}

/// Forget gates as the kernels take them: the sums of log₂ f up to every query and every key, [B, H, 2, N], as two
/// floats each, N rounded up as in [`per_query`]. And where the backward pass puts what the gradients of the scores sum
/// up to, of every query and of every key.
struct Forget {
    queries: Tensor,
    keys: Tensor,
    rows: Tensor,
    columns: Tensor,
}

impl Forget {
    /// Of the log gates behind q, k and v, where there are some.
    fn of(gpu: &Gpu, shape: Shape, args: &[Tensor]) -> Result<Option<Self>> {
        let Some(g) = args.get(3) else { return Ok(None) };
        if g.dtype() != DType::F32 {
            candle_core::bail!("attention on a GPU: log forget gates in f32, got {:?}", g.dtype())
        }
        let Shape { batch, steps, keys, heads, .. } = shape;
        let sums = |each: usize, n: usize| -> Result<Tensor> {
            Ok(gpu.empty((batch, heads, each, n.next_multiple_of(4)), DType::F32)?.into_tensor())
        };
        let (queries, keys_sums) = (sums(2, steps)?, sums(2, keys)?);
        let (rows, columns) = (sums(1, steps)?, sums(1, keys)?);
        let forget = Self { queries, keys: keys_sums, rows, columns };
        let [queries, keys_at] = forget.pointers(gpu)?;
        let params = [gpu.ptr(g)?, queries, keys_at, steps.into(), keys.into(), heads.into()];
        let launch = Launch::new(batch * heads, SUM_THREADS);
        gpu.launch(&kernels::ATTENTION, "attention_forget_sums", launch, &params)?;
        Ok(Some(forget))
    }

    fn pointers(&self, gpu: &Gpu) -> Result<[KernelArg; 2]> {
        Ok([gpu.ptr(&self.queries)?, gpu.ptr(&self.keys)?])
    }

    /// Bytes of shared memory for the sums of two tiles.
    fn tiles(forget: Option<&Self>, tile: &Tile) -> usize {
        if forget.is_some() { 16 * tile.other } else { 0 }
    }
}

/// A number for every query, [B, H, T] f32 with T rounded up, so that every tile begins at 16 bytes. Tiles are
/// read whole: what stands behind T is zero from the start.
fn per_query(gpu: &Gpu, shape: Shape) -> Result<Tensor> {
    let padded = (shape.batch, shape.heads, shape.steps.next_multiple_of(4));
    let value =
        if padded.2 == shape.steps { gpu.empty(padded, DType::F32) } else { gpu.zeros(padded, DType::F32) };
    Ok(value?.into_tensor())
}

fn sizes(shape: Shape, scale: f64) -> [KernelArg; 7] {
    [
        shape.steps.into(),
        shape.keys.into(),
        shape.heads.into(),
        shape.dim.into(),
        shape.values.into(),
        shape.window.into(),
        (scale as f32).into(),
    ]
}

/// o, and for the backward pass the log₂ of every query's sum of exponentials.
pub fn forward(shape: Shape, args: &[Tensor], scale: f64, save: bool) -> Result<Forward> {
    if scale <= 0.0 {
        candle_core::bail!("attention on a GPU: the scale must be positive, got {scale}")
    }
    let Shape { batch, steps, heads, values, .. } = shape;
    let (gpu, dtype) = (Gpu::of(&args[0])?, args[0].dtype());
    if args.len() == 3
        && let Some(hopper) = Hopper::new(&gpu, shape, dtype, scale)
    {
        return hopper.forward(args, save);
    }
    let variant = Variant::new(shape, dtype)?;
    let forget = Forget::of(&gpu, shape, args)?;
    let forget = forget.as_ref();
    let o = gpu.empty((batch, steps, heads, values), dtype)?;
    let lse = if save { Some(per_query(&gpu, shape)?) } else { None };
    let tile = &variant.forward;
    let tiles = variant.rows(tile.own + 2 * tile.other, false) + variant.rows(2 * tile.other, true);
    let launch = Launch::new(steps.div_ceil(tile.own) * batch * heads, THREADS)
        .shared(tiles + Forget::tiles(forget, tile));
    let mut params = vec![gpu.ptr(&args[0])?, gpu.ptr(&args[1])?, gpu.ptr(&args[2])?, gpu.of_value(&o)?];
    params.push(gpu.ptr_or_null(lse.as_ref())?);
    if let Some(forget) = forget {
        params.extend(forget.pointers(&gpu)?);
    }
    params.extend(sizes(shape, scale));
    gpu.launch(&kernels::ATTENTION, &variant.name("forward", forget), launch, &params)?;
    Ok(Forward { outputs: vec![o], saved: lse.into_iter().collect() })
}

/// Gradients of q, k and v, and of the log forget gates where there are some.
pub fn backward(
    shape: Shape,
    args: &[Tensor],
    (o, lse): (&Tensor, &Tensor),
    dout: &Tensor,
    scale: f64,
) -> Result<Vec<Tensor>> {
    let Shape { batch, steps, keys, heads, .. } = shape;
    let (gpu, dtype) = (Gpu::of(&args[0])?, args[0].dtype());
    if args.len() == 3
        && let Some(hopper) = Hopper::new(&gpu, shape, dtype, scale)
    {
        return hopper.backward(args, (o, lse), dout).map(Vec::from);
    }
    let variant = Variant::new(shape, dtype)?;
    let forget = Forget::of(&gpu, shape, args)?;
    let forget = forget.as_ref();
    let (dout, delta) = (dout.contiguous()?, per_query(&gpu, shape)?);
    let [dq, dk, dv] = [0, 1, 2].map(|i| gpu.empty(args[i].shape(), dtype).map(|value| value.into_tensor()));
    let (dq, dk, dv) = (dq?, dk?, dv?);
    let (q, k, v) = (gpu.ptr(&args[0])?, gpu.ptr(&args[1])?, gpu.ptr(&args[2])?);
    let (lse, dout) = (gpu.ptr(lse)?, gpu.ptr(&dout)?);
    let delta = gpu.ptr(&delta)?;

    let tile = &variant.dq;
    let launch = Launch::new(steps.div_ceil(tile.own) * batch * heads, THREADS)
        .shared(variant.backward_tiles(tile) + 4 * tile.own + Forget::tiles(forget, tile));
    let mut params = vec![q, k, v, gpu.ptr(o)?, lse, dout, delta, gpu.ptr(&dq)?];
    if let Some(forget) = forget {
        params.extend(forget.pointers(&gpu)?);
        params.push(gpu.ptr(&forget.rows)?);
    }
    params.extend(sizes(shape, scale));
    gpu.launch(&kernels::ATTENTION, &variant.name("dq", forget), launch, &params)?;

    // Two numbers per query, lse and delta, of two tiles in f32; warps in pairs give each other scores.
    let tile = &variant.dkdv;
    let given = if variant.pairs() { 2 * tile.own * tile.other } else { 0 };
    let launch = Launch::new(keys.div_ceil(tile.own) * batch * heads, THREADS)
        .shared(variant.backward_tiles(tile) + 16 * tile.other + given + Forget::tiles(forget, tile));
    let mut params = vec![q, k, v, lse, dout, delta, gpu.ptr(&dk)?, gpu.ptr(&dv)?];
    if let Some(forget) = forget {
        params.extend(forget.pointers(&gpu)?);
        params.push(gpu.ptr(&forget.columns)?);
    }
    params.extend(sizes(shape, scale));
    gpu.launch(&kernels::ATTENTION, &variant.name("dkdv", forget), launch, &params)?;
    let mut grads = vec![dq, dk, dv];
    if let Some(Forget { rows, columns, .. }) = forget {
        let dg = gpu.empty(args[3].shape(), DType::F32)?;
        let sums = [gpu.ptr(rows)?, gpu.ptr(columns)?, gpu.of_value(&dg)?];
        let params = [&sums[..], &[steps.into(), keys.into(), heads.into()]].concat();
        let launch = Launch::new(batch * heads, SUM_THREADS);
        gpu.launch(&kernels::ATTENTION, "attention_forget_gradient", launch, &params)?;
        grads.push(dg.into_tensor());
    }
    Ok(grads)
}

impl Turn {
    const THREADS: u32 = 256;
    /// Blocks that sum: three to a multiprocessor of an H100, which are as many as it holds.
    const SUM_BLOCKS: usize = 396;

    fn check(self) -> Result<Self> {
        if self.dim > 128 {
            candle_core::bail!("attention on a GPU: head dims up to 128, got {}", self.dim)
        }
        Ok(self)
    }

    fn tokens(&self, x: &Tensor) -> usize {
        x.elem_count() / (self.heads * self.dim)
    }

    /// Blocks that have all of `tokens` at once; a token is 1 to 16 lanes with four pairs each.
    fn blocks(&self, tokens: usize) -> usize {
        let lanes = (self.dim / 2).div_ceil(4).next_power_of_two();
        tokens.div_ceil(Self::THREADS as usize / lanes)
    }

    fn sizes(&self, tokens: usize) -> [KernelArg; 6] {
        [
            (tokens as i64).into(),
            self.steps.into(),
            self.heads.into(),
            (self.dim / 2).into(),
            self.offset.into(),
            // The kernel takes the bits: in f32 the angles of late positions would be wrong.
            (self.base.log2().to_bits() as i64).into(),
        ]
    }

    pub fn forward(self, x: &Tensor, w: &Tensor) -> Result<Forward> {
        self.check()?;
        let (gpu, tokens) = (Gpu::of(x)?, self.tokens(x));
        let y = gpu.empty(x.shape(), x.dtype())?;
        let mut params = vec![gpu.ptr(x)?, gpu.ptr(w)?, gpu.of_value(&y)?];
        params.extend(self.sizes(tokens));
        let name = format!("qk_norm_rope_forward_{}", suffix(x.dtype())?);
        let launch = Launch::new(self.blocks(tokens), Self::THREADS);
        gpu.launch(&kernels::QK_NORM_ROPE, &name, launch, &params)?;
        Ok(Forward { outputs: vec![y], ..Default::default() })
    }

    /// x turned, without a norm; `sign` −1 turns back.
    pub fn rope(self, x: &Tensor, sign: f64) -> Result<Value> {
        self.check()?;
        let (gpu, tokens) = (Gpu::of(x)?, self.tokens(x));
        let y = gpu.empty(x.shape(), x.dtype())?;
        let mut params = vec![gpu.ptr(x)?, gpu.of_value(&y)?];
        params.extend(self.sizes(tokens));
        params.push((sign as f32).into());
        let launch = Launch::new(self.blocks(tokens), Self::THREADS);
        gpu.launch(&kernels::QK_NORM_ROPE, &format!("rope_{}", suffix(x.dtype())?), launch, &params)?;
        Ok(y)
    }

    /// Gradients of x and w, the arguments.
    pub fn backward(self, run: &Run, dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
        self.check()?;
        let (x, w) = (&run.args[0], &run.args[1]);
        let (gpu, tokens) = (Gpu::of(x)?, self.tokens(x));
        let dy = dy.contiguous()?;
        let blocks = self.blocks(tokens).clamp(1, Self::SUM_BLOCKS);
        let dx = gpu.empty(x.shape(), x.dtype())?.into_tensor();
        let partial = gpu.empty((blocks, self.dim), DType::F32)?;
        let mut params =
            vec![gpu.ptr(x)?, gpu.ptr(w)?, gpu.ptr(&dy)?, gpu.ptr(&dx)?, gpu.of_value(&partial)?];
        params.extend(self.sizes(tokens));
        let name = format!("qk_norm_rope_backward_{}", suffix(x.dtype())?);
        gpu.launch(&kernels::QK_NORM_ROPE, &name, Launch::new(blocks, Self::THREADS), &params)?;
        let dw = parameter_sums(&gpu, run, &partial, blocks, &[1])?;
        Ok([Some(dx)].into_iter().chain(dw).collect())
    }
}
