//! Launching `kernels/delta_sm90a.cu`: the delta rule in bf16 on GPUs of compute capability 9.0.

use candle_core::{DType, Result, Tensor};

use super::Dims;
use super::cuda::CHUNK;
use crate::cuda::{Gpu, KernelArg, Launch, kernels};

/// Value columns of a warpgroup, and the warpgroups of a block that multiply.
const SLICE: usize = 64;
const GROUPS: usize = 2;

/// Numbers of a sub-step that `delta_prepare` leaves.
pub const ROWS: usize = 5;

/// Chunks that a block has under way.
const STAGES: usize = 2;

/// What a stage has besides tiles: the rows of a chunk and barriers, in whole kilobytes.
const REST: usize = 2 << 10;
/// What `delta_prepare` and `delta_gradients` have besides tiles, in whole kilobytes.
const PREPARE_REST: usize = 1 << 10;
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

    /// The shape of P.
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
    /// The map of what is kept of every chunk, `rows` rows by slices of values.
    fn by_slices(&self, at: KernelArg, rows: usize) -> Result<KernelArg> {
        let all = self.batch * self.heads * self.chunks * self.value.div_ceil(SLICE);
        self.gpu.tensor_map(at, [all, rows, 1, SLICE], CHUNK)
    }
    fn m_map(&self, at: KernelArg) -> Result<KernelArg> {
        self.gpu.tensor_map(at, [self.batch * self.heads * self.chunks, CHUNK, 1, CHUNK], CHUNK)
    }
    fn p_map(&self, at: KernelArg) -> Result<KernelArg> {
        let (groups, chunks, tokens, columns) = self.p_shape();
        self.gpu.tensor_map(at, [groups * chunks, tokens, 1, columns], tokens)
    }

    /// Launches a kernel, whose arguments end with the sizes.
    fn launch(&self, name: &str, launch: Launch, args: &[KernelArg]) -> Result<()> {
        let sizes = [self.batch, self.steps, self.heads, self.key, self.value, self.sub].map(KernelArg::from);
        self.gpu.launch(&kernels::DELTA_SM90A, name, launch, &[args, &sizes].concat())
    }

    /// As many blocks as there is work for, one a multiprocessor.
    fn persistent(&self, work: usize, shared: usize) -> Launch {
        let threads = u32::try_from(128 * (1 + GROUPS)).expect("a few warpgroups");
        Launch::new(work.min(self.gpu.multiprocessors()), threads).shared(shared)
    }

    /// Launches a walk. `values` is how many rows of values a stage has, `staged` how many rows a warpgroup writes.
    fn walk(&self, pass: &str, values: usize, staged: usize, args: &[KernelArg]) -> Result<()> {
        let (keys, tokens) = (self.keys(), self.padded());
        let stage = 2 * ((CHUNK + tokens) * keys + GROUPS * values * SLICE + (CHUNK + tokens) * CHUNK) + REST;
        let shared = STAGES * stage + 2 * GROUPS * staged * SLICE;
        let work = self.batch * self.heads * self.value.div_ceil(GROUPS * SLICE);
        let launch = self.persistent(work, shared);
        self.launch(&format!("delta_{pass}_{keys}_{tokens}_sm90a"), launch, args)
    }

    /// Writes M, P and the rows, o, the last state and, for the backward pass, the states and Vh of all chunks.
    pub fn forward(
        &self,
        [q, k, v]: [&Tensor; 3],
        [beta, g, state]: [KernelArg; 3],
        [m, p, rows]: [KernelArg; 3],
        [o, last]: [KernelArg; 2],
        kept: Option<[KernelArg; 2]>,
        scale: f64,
    ) -> Result<()> {
        let [q, k, v] = [q, k, v].map(|tensor| self.gpu.aligned(tensor));
        let (q, k, v) = (q?, k?, v?);
        let q = self.by_tokens(self.gpu.ptr(&q)?, self.key)?;
        let k = self.by_steps(self.gpu.ptr(&k)?, self.key)?;
        let v = self.by_steps(self.gpu.ptr(&v)?, self.value)?;
        let p = self.p_map(p)?;

        let (keys, tokens) = (self.keys(), self.padded());
        // P, then keys and queries; L and M in f32 take their place.
        let tiles = (2 * (CHUNK + tokens) * keys).max(4 * 2 * CHUNK * (CHUNK + 4));
        let shared = (2 * tokens * CHUNK + tiles + PREPARE_REST).next_multiple_of(1 << 10);
        let launch = Launch::new(self.batch * self.heads * self.chunks, 128).shared(shared);
        let args = [q, k, beta, g, m, p, rows, (scale as f32).into()];
        self.launch(&format!("delta_prepare_{keys}_{tokens}_sm90a"), launch, &args)?;

        let o = self.by_tokens(o, self.value)?;
        let [s_map, vh_map] = match kept {
            Some([s, vh]) => [self.by_slices(s, self.key)?, self.by_slices(vh, CHUNK)?],
            None => [o, o],
        };
        let keeps = i32::from(kept.is_some()).into();
        let m = self.m_map(m)?;
        let args = [q, k, v, m, p, rows, state, o, last, keeps, s_map, vh_map];
        self.walk("forward", CHUNK, keys + CHUNK + tokens, &args)
    }

    /// Writes the gradients of all that is differentiable; `ds` is for those of the chunks' last states.
    pub fn backward(
        &self,
        [q, k, v, d_o]: [&Tensor; 4],
        [m, p, rows, s, vh, ds]: [KernelArg; 6],
        [d_last, d_state]: [KernelArg; 2],
        [dq, dk, dv, d_beta, dg]: [KernelArg; 5],
        scale: f64,
    ) -> Result<()> {
        let [q, k, v, d_o] = [q, k, v, d_o].map(|tensor| self.gpu.aligned(tensor));
        let (q, k, v, d_o) = (q?, k?, v?, d_o?);
        let q = self.by_tokens(self.gpu.ptr(&q)?, self.key)?;
        let k = self.by_steps(self.gpu.ptr(&k)?, self.key)?;
        let v = self.by_steps(self.gpu.ptr(&v)?, self.value)?;
        let d_o = self.by_tokens(self.gpu.ptr(&d_o)?, self.value)?;
        let (m, p) = (self.m_map(m)?, self.p_map(p)?);
        let (s, ds) = (self.by_slices(s, self.key)?, self.by_slices(ds, self.key)?);
        let (vh, dv) = (self.by_slices(vh, CHUNK)?, self.by_steps(dv, self.value)?);

        let keys = self.keys();
        // Leaves Z in dv, which the other kernel makes dV of.
        let args = [q, k, m, p, rows, d_o, d_last, dv, ds, d_state];
        self.walk("reverse", self.padded(), keys + CHUNK, &args)?;

        // Slices of values with states, then keys, queries and their gradients, one slice of dV, and dP and dL.
        let tiles = STAGES * (4 * CHUNK + 2 * keys) * SLICE + 4 * CHUNK * keys + 3 * CHUNK * CHUNK;
        let launch = self.persistent(self.batch * self.heads * self.chunks, 2 * tiles + GRADIENT_REST);
        let (dq, dk) = (self.by_tokens(dq, self.key)?, self.by_steps(dk, self.key)?);
        let args = [q, k, v, rows, s, vh, ds, d_o, dq, dk, dv, d_beta, dg, (scale as f32).into()];
        self.launch(&format!("delta_gradients_{keys}_sm90a"), launch, &args)
    }
}
