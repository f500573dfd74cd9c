//! Linear layers on a GPU: matrix products by cuBLAS, the rest by `kernels/linear.cu`.

use candle_core::{DType, Result, Tensor};
use cudarc::cublas::sys::{cublasComputeType_t, cublasGemmAlgo_t, cublasOperation_t, cudaDataType_t};

use super::lt::gemm_bias;
use crate::cuda::{Gpu, KernelArg, Launch, kernels, suffix, tf32_allowed};
use crate::ops::rows::cuda::column_sums;
use crate::ops::tape::{Forward, Run, Value};

/// A row-major matrix in device memory.
#[derive(Clone, Copy)]
pub struct Mat {
    data: KernelArg,
    pub(super) dtype: DType,
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Elements from one row to the next.
    pub(super) stride: usize,
    pub(super) transposed: bool,
}

impl Mat {
    pub fn new(data: KernelArg, dtype: DType, rows: usize, columns: usize) -> Self {
        Self { data, dtype, rows, columns, stride: columns, transposed: false }
    }

    /// A contiguous tensor as a matrix of `columns` columns.
    pub fn of(gpu: &Gpu, tensor: &Tensor, columns: usize) -> Result<Self> {
        let rows = tensor.elem_count() / columns.max(1);
        Ok(Self::new(gpu.ptr(tensor)?, tensor.dtype(), rows, columns))
    }

    /// Rows `first..first + count`.
    pub fn rows(self, first: usize, count: usize) -> Self {
        let address = self.address() + (first * self.stride * self.dtype.size_in_bytes()) as u64;
        Self { data: KernelArg::Ptr(address), rows: count, ..self }
    }

    /// With rows that lie `stride` elements apart.
    pub fn stride(self, stride: usize) -> Self {
        Self { stride, ..self }
    }

    /// The transpose, without moving anything.
    pub fn t(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    /// Rows and columns as seen, transposition included.
    pub(super) fn dims(&self) -> (usize, usize) {
        if self.transposed { (self.columns, self.rows) } else { (self.rows, self.columns) }
    }

    pub(super) fn address(&self) -> u64 {
        match self.data {
            KernelArg::Ptr(address) => address,
            _ => unreachable!("a matrix lies at an address"),
        }
    }

    fn kind(&self) -> Result<cudaDataType_t> {
        match self.dtype {
            DType::F32 => Ok(cudaDataType_t::CUDA_R_32F),
            DType::BF16 => Ok(cudaDataType_t::CUDA_R_16BF),
            other => candle_core::bail!("no matrix products of {other:?} on a GPU"),
        }
    }
}

/// c ← a·b, or c ← c + a·b. a and b have one type, f32 or bf16; sums are taken in f32. c is not transposed.
pub fn gemm(gpu: &Gpu, a: Mat, b: Mat, c: Mat, accumulate: bool) -> Result<()> {
    let ((m, k), (k2, n)) = (a.dims(), b.dims());
    if k != k2 || c.dims() != (m, n) || c.transposed || a.dtype != b.dtype {
        candle_core::bail!(
            "gemm: {:?} {:?} times {:?} {:?} into {:?}",
            a.dims(),
            a.dtype,
            b.dims(),
            b.dtype,
            c.dims()
        )
    }
    if m * n == 0 {
        return Ok(());
    }
    let int = |size: usize| i32::try_from(size).map_err(candle_core::Error::wrap);
    let operation = |mat: &Mat| match mat.transposed {
        true => cublasOperation_t::CUBLAS_OP_T,
        false => cublasOperation_t::CUBLAS_OP_N,
    };
    let compute = match a.dtype {
        DType::F32 if tf32_allowed() => cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
        _ => cublasComputeType_t::CUBLAS_COMPUTE_32F,
    };
    let (one, beta) = (1.0f32, if accumulate { 1.0f32 } else { 0.0 });
    // cuBLAS counts columns first, so it sees every matrix transposed: cᵀ = bᵀ aᵀ.
    // SAFETY: the addresses are those of living tensors with the dimensions checked above, on the stream
    // that the handle was made for; the scalars are read before the call returns.
    unsafe {
        cudarc::cublas::result::gemm_ex(
            *gpu.cuda().cublas_handle().handle(),
            operation(&b),
            operation(&a),
            int(n)?,
            int(m)?,
            int(k)?,
            (&raw const one).cast(),
            b.address() as *const _,
            b.kind()?,
            int(b.stride)?,
            a.address() as *const _,
            a.kind()?,
            int(a.stride)?,
            (&raw const beta).cast(),
            c.address() as *mut _,
            c.kind()?,
            int(c.stride)?,
            compute,
            cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    }
    .map_err(candle_core::Error::wrap)
}

/// y[row, :] += bias.
pub fn add_bias(gpu: &Gpu, y: KernelArg, dtype: DType, bias: &Tensor, elements: usize) -> Result<()> {
    let n = bias.elem_count();
    let vector = 16 / dtype.size_in_bytes();
    let blocks = elements.div_ceil(256 * vector).clamp(1, 8 * gpu.multiprocessors());
    let args = [y, gpu.ptr(bias)?, (elements as i64).into(), n.into()];
    let name = format!("linear_bias_{}", suffix(dtype)?);
    gpu.launch(&kernels::LINEAR, &name, Launch::new(blocks, 256), &args)
}

/// x ← x · factor, where `factor` is one f32 on the device; costs nothing where it is 1.
pub fn scale(gpu: &Gpu, x: &Tensor, factor: &Tensor) -> Result<()> {
    let n = x.elem_count();
    let blocks = n.div_ceil(1024).clamp(1, 4 * gpu.multiprocessors());
    let args = [gpu.ptr(x)?, gpu.ptr(factor)?, (n as i64).into()];
    gpu.launch(
        &kernels::LINEAR,
        &format!("linear_scale_{}", suffix(x.dtype())?),
        Launch::new(blocks, 256),
        &args,
    )
}

/// Arguments: x, weight, and the bias if there is one.
pub(super) fn forward(args: &[Tensor], shape: &[usize]) -> Result<Forward> {
    let (x, weight) = (&args[0], &args[1]);
    let gpu = Gpu::of(x)?;
    let (outputs, inputs) = weight.dims2()?;
    let y = gpu.empty(shape, x.dtype())?;
    let rows = x.elem_count() / inputs.max(1);
    let at = gpu.of_value(&y)?;
    let (a, b) = (Mat::of(&gpu, x, inputs)?, Mat::of(&gpu, weight, inputs)?.t());
    let into = Mat::new(at, x.dtype(), rows, outputs);
    match args.get(2) {
        Some(bias) if gemm_bias(&gpu, a, b, into, bias)? => {}
        bias => {
            gemm(&gpu, a, b, into, false)?;
            if let Some(bias) = bias {
                add_bias(&gpu, at, x.dtype(), &bias.to_dtype(DType::F32)?, rows * outputs)?;
            }
        }
    }
    Ok(Forward { outputs: vec![y], saved: vec![] })
}

pub(super) fn backward(run: &Run, dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
    let (x, weight) = (&run.args[0], &run.args[1]);
    let gpu = Gpu::of(x)?;
    let (outputs, inputs) = weight.dims2()?;
    let mut grads = vec![None; run.args.len()];
    let dy_mat = Mat::of(&gpu, dy, outputs)?;
    if run.needs[0] {
        let weight = Mat::of(&gpu, weight, inputs)?;
        match &run.sums[0] {
            Some(sum) => gemm(&gpu, dy_mat, weight, Mat::of(&gpu, sum, inputs)?, true)?,
            None => {
                let dx = gpu.empty(x.shape(), x.dtype())?.into_tensor();
                gemm(&gpu, dy_mat, weight, Mat::of(&gpu, &dx, inputs)?, false)?;
                grads[0] = Some(dx);
            }
        }
    }
    if run.needs[1] {
        grads[1] = weight_gradient(&gpu, run, dy_mat, Mat::of(&gpu, x, inputs)?)?;
    }
    if run.needs.get(2) == Some(&true) {
        let into = run.params[2].as_ref().map(|param| param.grad());
        grads[2] = column_sums(&gpu, dy, into.as_ref())?;
    }
    Ok(grads)
}

/// dW = dyᵀ x, added to a parameter's gradient on the spot.
pub(crate) fn weight_gradient(gpu: &Gpu, run: &Run, dy: Mat, x: Mat) -> Result<Option<Tensor>> {
    if let Some(param) = &run.params[1] {
        let grad = param.grad();
        gemm(gpu, dy.t(), x, Mat::of(gpu, &grad, x.columns)?, true)?;
        return Ok(None);
    }
    let weight: &Tensor = &run.args[1];
    let dw: Value = gpu.empty(weight.shape(), weight.dtype())?;
    gemm(gpu, dy.t(), x, Mat::new(gpu.of_value(&dw)?, weight.dtype(), dy.columns, x.columns), false)?;
    Ok(Some(dw.into_tensor()))
}
