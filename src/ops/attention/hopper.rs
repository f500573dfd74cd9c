//! Launching `kernels/attention_sm90a.cu`: attention in bf16 on GPUs of compute capability 9.0.

use candle_core::{DType, Result, Tensor};

use super::reference::Shape;
use crate::cuda::{Gpu, KernelArg, Launch, kernels};
use crate::ops::tape::Forward;

/// How a kernel is compiled: warpgroups that multiply, with 64 rows each, and the rows that they walk over at a
/// time.
struct Tile {
    groups: usize,
    other: usize,
}

/// Tiles of queries that dkdv has under way.
const DEPTH: usize = 3;

/// From so many steps on all gradients are made in one pass, for head dims that are padded to 128: on an H100 one pass
/// takes a tenth less time at 8,192 steps, and a tenth more at 4,096.
const LONG: usize = 8192;

/// Bytes of shared memory for the barriers of a block.
const BARRIERS: usize = 256;

/// What heads that are worked on at the same time may read again and again: a part of the L2 cache.
const TOGETHER: usize = 16 << 20;

impl Tile {
    fn own(&self) -> usize {
        64 * self.groups
    }

    /// A launch for `rows` rows of every head, with `tiles` rows of tiles in shared memory.
    fn launch(&self, gpu: &Gpu, heads: usize, rows: usize, shared: usize) -> Launch {
        let tiles = rows.div_ceil(self.own()) * heads;
        let threads = u32::try_from(128 * (1 + self.groups)).expect("a few warpgroups");
        Launch::new(tiles.min(gpu.multiprocessors()), threads).shared(shared + BARRIERS)
    }
}

/// Attention of one shape.
pub struct Hopper {
    gpu: Gpu,
    shape: Shape,
    scale: f64,
    /// The head dim that both of the call are padded to.
    dim: usize,
}

impl Hopper {
    /// None where the kernels of `attention.cu` are to be used.
    pub fn new(gpu: &Gpu, shape: Shape, dtype: DType, scale: f64) -> Option<Self> {
        // Rows of 16 bytes are what TMA copies; the other head dims would be padded by more than a third.
        let fits = shape.dim.is_multiple_of(8) && shape.values.is_multiple_of(8);
        let windowed = shape.window < shape.keys;
        let dim = match shape.dim.max(shape.values) {
            33..=64 => 64,
            97..=128 => 128,
            _ => return None,
        };
        (fits && !windowed && dtype == DType::BF16 && gpu.runs(&kernels::ATTENTION_SM90A)).then(|| Self {
            gpu: gpu.clone(),
            shape,
            scale,
            dim,
        })
    }

    fn name(&self, what: &str) -> String {
        format!("attention_{what}_{}_sm90a", self.dim)
    }

    /// Bytes of so many rows in shared memory.
    fn rows(&self, rows: usize) -> usize {
        2 * rows * self.dim
    }

    /// A number for every query, [B, H, T] f32 with T rounded up to whole tiles of 64. Kernels write all of it.
    fn per_query(&self) -> Result<Tensor> {
        let Shape { batch, steps, heads, .. } = self.shape;
        Ok(self.gpu.empty((batch, heads, steps.next_multiple_of(64)), DType::F32)?.into_tensor())
    }

    /// The sizes that every kernel takes: `rows` are owned, `other` rows of every head read again and again.
    fn sizes(&self, tile: &Tile, rows: usize, other: usize) -> [KernelArg; 6] {
        let Shape { batch, steps, keys, heads, dim, values, .. } = self.shape;
        // Long heads need others beside them, so that the last tiles of all are short ones. Short ones do not,
        // and are best read once and left.
        let most = TOGETHER / (2 * other * (dim + values));
        let together = rows.div_ceil(tile.own()).min(most).clamp(1, batch * heads);
        let scale = self.scale as f32;
        [steps.into(), keys.into(), heads.into(), batch.into(), together.into(), scale.into()]
    }

    /// A tensor as TMA sees it.
    fn map(&self, tensor: &Tensor) -> Result<KernelArg> {
        self.gpu.tensor_map(self.gpu.ptr(tensor)?, tensor.dims4()?.into(), 64)
    }

    /// o, and for the backward pass the log₂ of every query's sum of exponentials.
    pub fn forward(&self, args: &[Tensor], save: bool) -> Result<Forward> {
        let (gpu, Shape { batch, steps, keys, heads, values, .. }) = (&self.gpu, self.shape);
        let [q, k, v] = [0, 1, 2].map(|i| self.gpu.aligned(&args[i]));
        let (q, k, v) = (q?, k?, v?);
        let o = gpu.empty((batch, steps, heads, values), DType::BF16)?;
        let lse = if save { Some(self.per_query()?) } else { None };
        let tile = Tile { groups: if self.dim == 64 { 3 } else { 2 }, other: 128 };
        let shared = self.rows(2 * tile.own() + 4 * tile.other);
        let mut params = vec![self.map(&q)?, self.map(&k)?, self.map(&v)?];
        params.push(gpu.tensor_map(gpu.of_value(&o)?, [batch, steps, heads, values], 64)?);
        params.push(gpu.ptr_or_null(lse.as_ref())?);
        params.extend(self.sizes(&tile, steps, keys));
        let launch = tile.launch(gpu, batch * heads, steps, shared);
        gpu.launch(&kernels::ATTENTION_SM90A, &self.name("forward"), launch, &params)?;
        Ok(Forward { outputs: vec![o], saved: lse.into_iter().collect() })
    }

    /// Gradients of q, k and v.
    pub fn backward(
        &self,
        args: &[Tensor],
        (o, lse): (&Tensor, &Tensor),
        dout: &Tensor,
    ) -> Result<[Tensor; 3]> {
        let (gpu, Shape { batch, steps, keys, heads, values, .. }) = (&self.gpu, self.shape);
        let [q, k, v] = [0, 1, 2].map(|i| self.gpu.aligned(&args[i]));
        let (q, k, v) = (q?, k?, v?);
        let (o, dout, delta) =
            (self.gpu.aligned(o)?, self.gpu.aligned(&dout.contiguous()?)?, self.per_query()?);
        let empty = |i: usize| Ok(gpu.empty(args[i].shape(), DType::BF16)?.into_tensor());
        let (dq, dk, dv): (Result<_>, Result<_>, Result<_>) = (empty(0), empty(1), empty(2));
        let (dq, dk, dv): (Tensor, Tensor, Tensor) = (dq?, dk?, dv?);
        let [lse, delta] = [lse, &delta].map(|tensor| gpu.ptr(tensor));
        let (lse, delta) = (lse?, delta?);
        let inputs = [self.map(&q)?, self.map(&k)?, self.map(&v)?];

        if self.dim == 128 && steps >= LONG {
            let grads = [self.map(&dq)?, self.map(&dk)?, self.map(&dv)?];
            self.backward_long(inputs, &o, &dout, (lse, delta), grads)?;
            return Ok([dq, dk, dv]);
        }

        let tile = Tile { groups: 2, other: 128 };
        let shared = self.rows(3 * tile.own() + 4 * tile.other);
        let mut params = inputs.to_vec();
        params.extend([gpu.ptr(&o)?, self.map(&dout)?, self.map(&dq)?, lse, delta, values.into()]);
        params.extend(self.sizes(&tile, steps, keys));
        let launch = tile.launch(gpu, batch * heads, steps, shared);
        gpu.launch(&kernels::ATTENTION_SM90A, &self.name("dq"), launch, &params)?;

        // With lse and delta of every query under way.
        let tile = Tile { groups: 2, other: 64 };
        let shared = self.rows(4 * tile.own() + 2 * DEPTH * tile.other) + 8 * DEPTH * tile.other;
        let mut params = inputs.to_vec();
        params.extend([self.map(&dout)?, self.map(&dk)?, self.map(&dv)?, lse, delta]);
        params.extend(self.sizes(&tile, keys, steps));
        let launch = tile.launch(gpu, batch * heads, keys, shared);
        gpu.launch(&kernels::ATTENTION_SM90A, &self.name("dkdv"), launch, &params)?;
        Ok([dq, dk, dv])
    }

    /// Fills the gradients of q, k and v, whose maps `grads` are, in one pass.
    fn backward_long(
        &self,
        [q, k, v]: [KernelArg; 3],
        o: &Tensor,
        dout: &Tensor,
        (lse, delta): (KernelArg, KernelArg),
        [dq, dk, dv]: [KernelArg; 3],
    ) -> Result<()> {
        /// Floats of a part of dq.
        const PART: usize = 64 * 64;
        let (gpu, Shape { batch, steps, keys, heads, values, .. }) = (&self.gpu, self.shape);
        let rows = batch * heads * steps.next_multiple_of(64);
        let parts = rows * self.dim / PART;
        let (sums, turns) = (gpu.empty((parts, PART), DType::F32)?, gpu.empty(parts, DType::U32)?);
        let (sums, turns) = (gpu.of_value(&sums)?, gpu.of_value(&turns)?);

        let mut params = vec![gpu.ptr(o)?, gpu.ptr(dout)?, delta, turns, parts.into()];
        params.extend([steps, heads, values].map(KernelArg::from));
        params.push((rows as i64).into());
        let launch = Launch::new((8 * rows).div_ceil(256), 256);
        gpu.launch(&kernels::ATTENTION_SM90A, "attention_delta_sm90a", launch, &params)?;

        let tile = Tile { groups: 2, other: 64 };
        let (own, other) = (tile.own(), tile.other);
        // k and v, two tiles of q and do, gradients to be stored; two tiles of ds, two parts of dq, lse and delta.
        let shared = self.rows(2 * own + 4 * other + 128) + 4 * other * own + 8 * PART + 16 * other;
        let mut params = vec![q, k, v, self.map(dout)?, dk, dv, lse, delta, sums, turns];
        params.extend(self.sizes(&tile, keys, steps));
        let launch = tile.launch(gpu, batch * heads, keys, shared);
        gpu.launch(&kernels::ATTENTION_SM90A, &self.name("backward"), launch, &params)?;

        let params = [sums, dq, steps.into(), heads.into(), (self.scale as f32).into()];
        let launch = Launch::new(parts, 128).shared(2 * PART);
        gpu.launch(&kernels::ATTENTION_SM90A, "attention_round_sm90a", launch, &params)
    }
}
