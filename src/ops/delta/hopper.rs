//! Launching `kernels/delta_sm90a.cu`: all but `delta_prepare`, in bf16 on GPUs of compute capability 9.0.

use candle_core::{DType, Result, Tensor};

use super::Dims;
use super::cuda::CHUNK;
use crate::cuda::{Gpu, KernelArg, Launch, kernels};

/// Value columns of a warpgroup, and the warpgroups of a block that multiply.
const SLICE: usize = 64;
const GROUPS: usize = 2;

/// Chunks that a block has under way.
const STAGES: usize = 2;

/// What a stage has besides tiles: the rows of a chunk and barriers, in whole kilobytes.
const REST: usize = 2 << 10;
/// What `gradients` has besides tiles, in whole kilobytes.
const GRADIENT_REST: usize = 8 << 10;

/// The kernels of one call.
pub struct Hopper {
    gpu: Gpu,
    batch: usize,
    steps: usize,
    heads: usize,
    key: usize,
    value: usize,
    sub: usize,
    chunks: usize,
}

impl Hopper {
    /// None where the kernels of `delta.cu` are to be used.
    pub fn new(gpu: &Gpu, dims: &Dims, dtype: DType) -> Option<Self> {
        let &Dims { batch, steps, sub, heads, key, value } = dims;
        // Rows of 16 bytes are what TMA copies.
        let fits = key.is_multiple_of(8) && value.is_multiple_of(8);
        (fits && dtype == DType::BF16 && gpu.runs(&kernels::DELTA_SM90A)).then(|| Self {
            gpu: gpu.clone(),
            batch,
            steps,
            heads,
            key,
            value,
            sub,
            chunks: steps.div_ceil(CHUNK / sub),
        })
    }

    /// Tokens of a chunk.
    fn tokens(&self) -> usize {
        CHUNK / self.sub
    }

    /// Tokens that the kernels pad a chunk's to.
    fn padded(&self) -> usize {
        if self.tokens() <= 16 { 16 } else { 64 }
    }

    /// Keys that the kernels pad to.
    fn keys(&self) -> usize {
        if self.key <= 64 { 64 } else { 128 }
    }

    /// The shape of P, which `delta_prepare_bf16` writes.
    pub fn p_shape(&self) -> (usize, usize, usize, usize) {
        (self.batch * self.heads, self.chunks, self.padded(), CHUNK)
    }

    /// The map of a tensor by tokens or by sub-steps, [B, T or T·n, H, columns].
    fn by_tokens(&self, at: KernelArg, columns: usize) -> Result<KernelArg> {
        self.gpu.tensor_map(at, [self.batch, self.steps, self.heads, columns], self.tokens())
    }
    fn by_steps(&self, at: KernelArg, columns: usize) -> Result<KernelArg> {
        let rows = self.steps * self.sub;
        self.gpu.tensor_map(at, [self.batch, rows, self.heads, columns], self.tokens() * self.sub)
    }
    /// The map of a workspace with `rows` rows of every chunk.
    fn by_chunks(&self, at: KernelArg, rows: usize, columns: usize) -> Result<KernelArg> {
        let all = self.batch * self.heads * self.chunks;
        self.gpu.tensor_map(at, [all, rows, 1, columns], CHUNK)
    }

    fn p_map(&self, at: KernelArg) -> Result<KernelArg> {
        let (groups, chunks, tokens, columns) = self.p_shape();
        self.gpu.tensor_map(at, [groups * chunks, tokens, 1, columns], tokens)
    }

    /// Launches a walk. `values` is how many rows of values a stage has, `staged` how many rows a warpgroup writes.
    fn walk(&self, pass: &str, values: usize, staged: usize, args: &[KernelArg]) -> Result<()> {
        let (keys, tokens) = (self.keys(), self.padded());
        let stage = 2 * ((CHUNK + tokens) * keys + GROUPS * values * SLICE + (CHUNK + tokens) * CHUNK) + REST;
        let shared = STAGES * stage + 2 * GROUPS * staged * SLICE;
        let blocks = self.batch * self.heads * self.value.div_ceil(GROUPS * SLICE);
        self.launch(&format!("delta_{pass}_{keys}_{tokens}_sm90a"), blocks, shared, args)
    }

    /// Launches a kernel, whose arguments end with the sizes, for as many blocks of work.
    fn launch(&self, name: &str, blocks: usize, shared: usize, args: &[KernelArg]) -> Result<()> {
        let threads = u32::try_from(128 * (1 + GROUPS)).expect("a few warpgroups");
        let launch = Launch::new(blocks.min(self.gpu.multiprocessors()), threads).shared(shared);
        let sizes = [self.batch, self.steps, self.heads, self.key, self.value, self.sub].map(KernelArg::from);
        self.gpu.launch(&kernels::DELTA_SM90A, name, launch, &[args, &sizes].concat())
    }

    /// Writes o, the last state and, for the backward pass, the states and Vh of all chunks.
    pub fn forward(
        &self,
        [q, k, v]: [&Tensor; 3],
        [m, p, rows, state]: [KernelArg; 4],
        [o, last]: [KernelArg; 2],
        kept: Option<[KernelArg; 2]>,
    ) -> Result<()> {
        let [q, k, v] = [q, k, v].map(|tensor| self.gpu.aligned(tensor));
        let (q, k, v) = (q?, k?, v?);
        let o = self.by_tokens(o, self.value)?;
        let maps = match kept {
            Some([s, vh]) => {
                [self.by_chunks(s, self.key, self.value)?, self.by_chunks(vh, CHUNK, self.value)?]
            }
            None => [o, o],
        };
        let args = [
            self.by_tokens(self.gpu.ptr(&q)?, self.key)?,
            self.by_steps(self.gpu.ptr(&k)?, self.key)?,
            self.by_steps(self.gpu.ptr(&v)?, self.value)?,
            self.by_chunks(m, CHUNK, CHUNK)?,
            self.p_map(p)?,
            rows,
            state,
            o,
            last,
            i32::from(kept.is_some()).into(),
            maps[0],
            maps[1],
        ];
        self.walk("forward", CHUNK, self.keys() + CHUNK + self.padded(), &args)
    }

    /// Writes Z to `dv`, the gradients of all chunks' last states to `ds`, and that of the initial state.
    pub fn reverse(
        &self,
        [q, k, d_o]: [&Tensor; 3],
        [m, p, rows, d_last]: [KernelArg; 4],
        [dv, ds, d_state]: [KernelArg; 3],
    ) -> Result<()> {
        let [q, k, d_o] = [q, k, d_o].map(|tensor| self.gpu.aligned(tensor));
        let (q, k, d_o) = (q?, k?, d_o?);
        let args = [
            self.by_tokens(self.gpu.ptr(&q)?, self.key)?,
            self.by_steps(self.gpu.ptr(&k)?, self.key)?,
            self.by_chunks(m, CHUNK, CHUNK)?,
            self.p_map(p)?,
            rows,
            self.by_tokens(self.gpu.ptr(&d_o)?, self.value)?,
            d_last,
            self.by_steps(dv, self.value)?,
            self.by_chunks(ds, self.key, self.value)?,
            d_state,
        ];
        self.walk("reverse", self.padded(), self.keys() + CHUNK, &args)
    }

    /// Everything that `reverse` leaves. Makes dV of the Z in `dv`.
    pub fn gradients(
        &self,
        [q, k, v, d_o]: [&Tensor; 4],
        [rows, s, vh, ds]: [KernelArg; 4],
        [dq, dk, dv, d_beta, dg]: [KernelArg; 5],
        scale: f64,
    ) -> Result<()> {
        let [q, k, v, d_o] = [q, k, v, d_o].map(|tensor| self.gpu.aligned(tensor));
        let (q, k, v, d_o) = (q?, k?, v?, d_o?);
        let args = [
            self.by_tokens(self.gpu.ptr(&q)?, self.key)?,
            self.by_steps(self.gpu.ptr(&k)?, self.key)?,
            self.by_steps(self.gpu.ptr(&v)?, self.value)?,
            rows,
            self.by_chunks(s, self.key, self.value)?,
            self.by_chunks(vh, CHUNK, self.value)?,
            self.by_chunks(ds, self.key, self.value)?,
            self.by_tokens(self.gpu.ptr(&d_o)?, self.value)?,
            self.by_tokens(dq, self.key)?,
            self.by_steps(dk, self.key)?,
            self.by_steps(dv, self.value)?,
            d_beta,
            dg,
            (scale as f32).into(),
        ];
        let keys = self.keys();
        // Slices of values with states, then keys, queries and their gradients, one of values, and P and L.
        let tiles = STAGES * (4 * CHUNK + 2 * keys) * SLICE + 4 * CHUNK * keys + 3 * CHUNK * CHUNK;
        let shared = 2 * tiles + GRADIENT_REST;
        let blocks = self.batch * self.heads * self.chunks;
        self.launch(&format!("delta_gradients_{keys}_sm90a"), blocks, shared, &args)
    }
}
