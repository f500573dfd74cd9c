//! Launches of the kernels over rows and plain arrays (`kernels/rows.cuh`), sums over rows, casts.
//!
//! Where a kernel sums, the number of its blocks is a function of the shape alone: the bits do not depend on
//! the GPU.

use candle_core::{DType, Result, Tensor};

use crate::cuda::{Gpu, KernelArg, Launch, NULL, kernels, suffix};
use crate::ops::tape::{Run, Value};

/// Threads of a block, unless a row takes more than a warp.
pub const THREADS: usize = 256;
/// Blocks that sum: a few for each of the 132 multiprocessors of the GPU in mind.
const SUM_BLOCKS: usize = 528;

/// Elements of a 16-byte vector.
pub fn vector(dtype: DType) -> usize {
    16 / dtype.size_in_bytes()
}

/// Whether rows of `n` elements from these addresses on can be read in 16-byte vectors.
fn vectors_fit(n: usize, dtype: DType, addresses: &[KernelArg]) -> bool {
    let aligned = |address: &KernelArg| !matches!(address, KernelArg::Ptr(at) if at % 16 != 0);
    n.is_multiple_of(vector(dtype)) && addresses.iter().all(aligned)
}

fn log2_ceil(n: usize) -> usize {
    n.next_power_of_two().ilog2() as usize
}

/// Rows of one length, each for a team of threads that holds it in registers.
pub struct Teams {
    width: usize,
    variant: &'static str,
    suffix: &'static str,
    log_lanes: usize,
    /// Matrices whose rows are copied ahead.
    ahead: usize,
}

impl Teams {
    /// For rows of `width` elements of `dtype`, and all the addresses that the kernel reads or writes as rows.
    pub fn new(width: usize, dtype: DType, addresses: &[KernelArg]) -> Result<Self> {
        /// Elements of a thread that has more than one vector.
        const MANY: usize = 16;
        let vector = vector(dtype);
        let (variant, log_lanes) = match vectors_fit(width, dtype, addresses) {
            true if width <= 32 * vector => ("small", log2_ceil(width / vector)),
            true if width <= 32 * MANY => ("wide", 5),
            true if width <= 512 * MANY => ("wide", log2_ceil(width.div_ceil(MANY))),
            false if width <= 32 * MANY => ("odd", log2_ceil(width.min(32))),
            false if width <= 256 * MANY => ("odd", log2_ceil(width.div_ceil(MANY))),
            fits => {
                let limit = if fits { 512 * MANY } else { 256 * MANY };
                candle_core::bail!("rows of {width} elements are too long for a GPU's norms: at most {limit}")
            }
        };
        Ok(Self { width, variant, suffix: suffix(dtype)?, log_lanes, ahead: 0 })
    }

    /// For a kernel that has the next rows of `matrices` matrices copied meanwhile (`rows.cuh`, `Ahead`).
    pub fn ahead(self, matrices: usize) -> Self {
        Self { ahead: matrices, ..self }
    }

    /// The kernel's name, with its variant and suffix.
    pub fn name(&self, kernel: &str) -> String {
        format!("{kernel}_{}_{}", self.variant, self.suffix)
    }

    fn small(&self) -> bool {
        self.variant == "small"
    }

    pub fn log_lanes(&self) -> KernelArg {
        self.log_lanes.into()
    }

    fn threads(&self) -> usize {
        if self.log_lanes > 5 { 1 << self.log_lanes } else { THREADS }
    }

    fn launch(&self, rows: usize, most: usize) -> Launch {
        let threads = self.threads();
        let blocks = rows.div_ceil(threads >> self.log_lanes).min(most);
        // A row of sums for each warp, or two of parameters; then twice a vector of each matrix for each thread.
        let (floats, copies) = if self.small() { (threads / 32, 2 * self.ahead) } else { (2, 0) };
        let shared = floats * self.width * size_of::<f32>() + copies * threads * 16;
        Launch::new(blocks, threads as u32).shared(shared)
    }

    /// For a kernel that only maps rows.
    pub fn map(&self, gpu: &Gpu, rows: usize) -> Launch {
        let resident = if self.small() && self.ahead > 0 { 1024 } else { 2048 };
        self.launch(rows, resident * gpu.multiprocessors() / self.threads())
    }

    /// For a kernel that also sums over the rows; a block writes one slab of partial sums.
    pub fn sum(&self, rows: usize) -> Launch {
        let resident = if self.small() && self.ahead == 0 { 768 } else { 512 };
        self.launch(rows, 132 * resident / self.threads())
    }
}

/// A matrix, spread over blocks of columns by rows.
pub struct Grid {
    pub vectors: bool,
    pub log_width: usize,
    tiles: usize,
    rows: usize,
}

impl Grid {
    /// For `rows` rows of `width` elements, and all the addresses that the kernel reads or writes as such.
    pub fn new(rows: usize, width: usize, dtype: DType, addresses: &[KernelArg]) -> Self {
        let vectors = vectors_fit(width, dtype, addresses);
        let columns = if vectors { width / vector(dtype) } else { width };
        let log_width = log2_ceil(columns.min(THREADS));
        Self { vectors, log_width, tiles: columns.div_ceil(1 << log_width), rows }
    }

    /// The kernel's name for these addresses, with its suffix.
    pub fn name(&self, kernel: &str, dtype: DType) -> Result<String> {
        Ok(format!("{kernel}_{}{}", if self.vectors { "" } else { "odd_" }, suffix(dtype)?))
    }

    fn launch(&self, least_rows: usize, most: usize) -> Launch {
        let height = THREADS >> self.log_width;
        let slabs = self.rows.div_ceil(height * least_rows).min(most / self.tiles).clamp(1, 65_535);
        Launch::grid(self.tiles, slabs, 1, THREADS as u32)
    }

    /// For a kernel that only maps elements.
    pub fn map(&self, gpu: &Gpu) -> Launch {
        self.launch(1, 16 * gpu.multiprocessors())
    }

    /// For a kernel that also sums; every thread takes `least_rows` rows or more while there are that many.
    pub fn sum(&self, least_rows: usize) -> Launch {
        self.launch(least_rows, if self.vectors { SUM_BLOCKS } else { 2 * SUM_BLOCKS })
    }
}

/// For a kernel of `kernels/heads.cuh`: rows of `width` channels for each of `tokens` tokens and each head. Each of
/// the grid's first dimension is a slab of tokens for a sum; their number is a function of the shape alone.
pub fn head_rows(op: &str, tokens: usize, heads: usize, width: usize) -> Result<Launch> {
    /// Tokens of a slab, at least: eight for each of its warps.
    const LEAST: usize = 64;
    if width > 128 {
        candle_core::bail!("{op} on a GPU: head dims up to 128, got {width}")
    }
    let slabs = tokens.div_ceil(LEAST).min((2 * SUM_BLOCKS).div_ceil(heads.max(1)));
    Ok(Launch::grid(slabs, heads, 1, THREADS as u32))
}

/// For a kernel over `n` elements of a plain array in vectors of `vector`.
pub fn elements(gpu: &Gpu, n: usize, vector: usize) -> Launch {
    Launch::new(n.div_ceil(THREADS * vector).min(32 * gpu.multiprocessors()), THREADS as u32)
}

/// Number of elements as kernels over plain arrays take it.
pub fn count(n: usize) -> KernelArg {
    KernelArg::I64(n as i64)
}

/// Where one of the sums over rows goes.
struct Sums {
    at: KernelArg,
    add: bool,
    new: Option<Tensor>,
}

impl Sums {
    const UNWANTED: Sums = Sums { at: NULL, add: false, new: None };

    fn add_to(gpu: &Gpu, into: &Tensor, columns: usize) -> Result<Self> {
        if into.dtype() != DType::F32 || into.elem_count() != columns {
            candle_core::bail!(
                "column sums: expected {columns} f32 numbers to add to, got {:?} {:?}",
                into.dtype(),
                into.shape()
            )
        }
        Ok(Self { at: gpu.ptr(into)?, add: true, new: None })
    }

    fn new(gpu: &Gpu, shape: &[usize]) -> Result<Self> {
        let value = gpu.empty(shape, DType::F32)?;
        Ok(Self { at: gpu.of_value(&value)?, add: false, new: Some(value.into_tensor()) })
    }

    /// Adds the slabs of `partial` [slabs, up to three sums, n].
    fn finish(gpu: &Gpu, partial: &Value, (slabs, n): (usize, usize), sums: &[Sums]) -> Result<()> {
        let columns = n * sums.len();
        let mut args = vec![gpu.of_value(partial)?, slabs.into(), columns.into(), n.into()];
        args.extend((0..3).map(|i| sums.get(i).map_or(NULL, |sums| sums.at)));
        let add = sums.iter().enumerate().map(|(i, sums)| i32::from(sums.add) << i).sum::<i32>();
        args.push(add.into());
        // Without rows there are no slabs, and the sums are zero.
        gpu.launch(&kernels::COLUMNS, "columns_final", Launch::new(columns.div_ceil(32), 1024), &args)
    }
}

/// The gradients of up to three equally long parameters, arguments `of` of a node, from the slabs of partial
/// sums that its backward kernel wrote, `partial` [slabs, parameters, n]: added to the parameter's own gradient
/// where there is one (then none is returned), else as new tensors.
pub fn parameter_sums(
    gpu: &Gpu,
    run: &Run,
    partial: &Value,
    slabs: usize,
    of: &[usize],
) -> Result<Vec<Option<Tensor>>> {
    let n = run.args[of[0]].elem_count();
    let mut sums = of
        .iter()
        .map(|&i| match &run.params[i] {
            _ if !run.needs[i] => Ok(Sums::UNWANTED),
            Some(param) => Sums::add_to(gpu, &param.grad(), n),
            None => Sums::new(gpu, run.args[i].dims()),
        })
        .collect::<Result<Vec<_>>>()?;
    Sums::finish(gpu, partial, (slabs, n), &sums)?;
    Ok(sums.iter_mut().map(|sums| sums.new.take()).collect())
}

/// The sum over the rows of `matrix` [.., D], f32 or bf16, in f32: added to `into` [D] if given, else returned.
pub fn column_sums(gpu: &Gpu, matrix: &Tensor, into: Option<&Tensor>) -> Result<Option<Tensor>> {
    let columns = matrix.dim(candle_core::D::Minus1)?;
    let mut sums = [match into {
        Some(into) => Sums::add_to(gpu, into, columns)?,
        None => Sums::new(gpu, &[columns])?,
    }];
    let (dtype, x) = (matrix.dtype(), gpu.ptr(matrix)?);
    let rows = matrix.elem_count() / columns.max(1);
    let grid = Grid::new(rows, columns, dtype, &[x]);
    let launch = grid.sum(8);
    let slabs = launch.grid.1 as usize;
    let partial = gpu.empty((slabs, columns), DType::F32)?;
    let args = [x, gpu.of_value(&partial)?, count(rows), columns.into(), grid.log_width.into()];
    gpu.launch(&kernels::COLUMNS, &grid.name("columns_partial", dtype)?, launch, &args)?;
    Sums::finish(gpu, &partial, (slabs, columns), &sums)?;
    Ok(sums[0].new.take())
}
