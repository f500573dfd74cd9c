//! Matrix products that add a bias on their way out, by cublasLt.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, LazyLock, Mutex};

use candle_core::{DType, Result, Tensor};
use cudarc::cublaslt::result;
use cudarc::cublaslt::sys::{
    cublasComputeType_t, cublasLtEpilogue_t, cublasLtHandle_t, cublasLtMatmulAlgo_t,
    cublasLtMatmulDescAttributes_t as Desc, cublasLtMatmulPreferenceAttributes_t as Preference,
    cudaDataType_t,
};

use super::cuda::Mat;
use crate::cuda::{Gpu, tf32_allowed};
use crate::ops::tape::Value;

/// What NVIDIA recommends for compute capability 9.0.
const WORKSPACE: usize = 32 << 20;

/// Everything that the choice of an algorithm depends on: shapes, strides and transpositions, the format, and how
/// the addresses are aligned.
type Key = ([(usize, usize, usize, bool); 3], DType, bool, [u32; 3]);

struct Lt {
    handle: cublasLtHandle_t,
    workspace: Tensor,
    chosen: HashMap<Key, Option<cublasLtMatmulAlgo_t>>,
}

// SAFETY: a handle may be used by any thread, and the lock around it lets one use it at a time.
unsafe impl Send for Lt {}

/// By context.
static LT: LazyLock<Mutex<HashMap<usize, Lt>>> = LazyLock::new(Default::default);

/// The largest power of two that divides an address, up to what cublasLt asks about.
fn alignment(mat: &Mat) -> u32 {
    1 << mat.address().trailing_zeros().min(8)
}

/// cublasLt's descriptions of one product, let go when this is dropped.
struct Described {
    desc: cudarc::cublaslt::sys::cublasLtMatmulDesc_t,
    a: cudarc::cublaslt::sys::cublasLtMatrixLayout_t,
    b: cudarc::cublaslt::sys::cublasLtMatrixLayout_t,
    c: cudarc::cublaslt::sys::cublasLtMatrixLayout_t,
}

impl Drop for Described {
    fn drop(&mut self) {
        // SAFETY: each was made by `describe` and is let go once.
        unsafe {
            let _ = result::destroy_matrix_layout(self.a);
            let _ = result::destroy_matrix_layout(self.b);
            let _ = result::destroy_matrix_layout(self.c);
            let _ = result::destroy_matmul_desc(self.desc);
        }
    }
}

/// c ← a·b + bias, described as cublasLt sees it: columns first, so that it is cᵀ = bᵀ aᵀ, with `a` and `b` here in
/// its order.
fn describe(a: &Mat, b: &Mat, c: &Mat, bias: u64) -> std::result::Result<Described, result::CublasError> {
    let kind = match a.dtype {
        DType::BF16 => cudaDataType_t::CUDA_R_16BF,
        _ => cudaDataType_t::CUDA_R_32F,
    };
    let compute = match a.dtype {
        DType::F32 if tf32_allowed() => cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
        _ => cublasComputeType_t::CUBLAS_COMPUTE_32F,
    };
    let layout = |mat: &Mat| {
        result::create_matrix_layout(kind, mat.columns as u64, mat.rows as u64, mat.stride as i64)
    };
    let operation = |mat: &Mat| i32::from(mat.transposed);
    let described = Described {
        desc: result::create_matmul_desc(compute, cudaDataType_t::CUDA_R_32F)?,
        a: layout(a)?,
        b: layout(b)?,
        c: layout(c)?,
    };
    let (a, b) = (operation(a), operation(b));
    let epilogue = cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
    // CUBLAS_OP_N and CUBLAS_OP_T are 0 and 1.
    // SAFETY: every attribute is given as the type that cublasLt reads, which it copies.
    unsafe {
        let set = |attribute: Desc, value: *const c_void, size: usize| {
            result::set_matmul_desc_attribute(described.desc, attribute, value, size)
        };
        set(Desc::CUBLASLT_MATMUL_DESC_TRANSA, (&raw const a).cast(), size_of_val(&a))?;
        set(Desc::CUBLASLT_MATMUL_DESC_TRANSB, (&raw const b).cast(), size_of_val(&b))?;
        set(Desc::CUBLASLT_MATMUL_DESC_EPILOGUE, (&raw const epilogue).cast(), size_of_val(&epilogue))?;
        set(Desc::CUBLASLT_MATMUL_DESC_BIAS_POINTER, (&raw const bias).cast(), size_of_val(&bias))?;
    }
    Ok(described)
}

/// The algorithm that cublasLt holds for the fastest; none if it has none for this product.
fn choose(lt: &Lt, product: &Described, alignments: [u32; 3]) -> Option<cublasLtMatmulAlgo_t> {
    let preference = result::create_matmul_pref().ok()?;
    // SAFETY: the preference is the one just made, and let go here; its attributes are given as the types that
    // cublasLt reads; handle and descriptions live.
    unsafe {
        let set = |attribute: Preference, value: *const c_void, size: usize| {
            result::set_matmul_pref_attribute(preference, attribute, value, size)
        };
        let found = (|| {
            let most = WORKSPACE;
            set(
                Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const most).cast(),
                size_of_val(&most),
            )?;
            let attributes = [
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
            ];
            let [a, b, c] = alignments;
            for (attribute, bytes) in attributes.into_iter().zip([a, b, c, c]) {
                set(attribute, (&raw const bytes).cast(), size_of_val(&bytes))?;
            }
            result::get_matmul_algo_heuristic(
                lt.handle,
                product.desc,
                product.a,
                product.b,
                product.c,
                product.c,
                preference,
            )
        })();
        let _ = result::destroy_matmul_pref(preference);
        found.ok().map(|found| found.algo)
    }
}

/// c ← a·b + bias, where `bias` has c's columns and all four have one type, f32 or bf16; sums are taken in f32. Gives
/// whether cublasLt has a way to do this; if not, nothing is done.
pub fn gemm_bias(gpu: &Gpu, a: Mat, b: Mat, c: Mat, bias: &Tensor) -> Result<bool> {
    let ((m, k), (k2, n)) = (a.dims(), b.dims());
    if k != k2 || c.dims() != (m, n) || c.transposed || bias.elem_count() != n {
        candle_core::bail!("gemm: {:?} times {:?} into {:?}", a.dims(), b.dims(), c.dims())
    }
    let one_type = a.dtype == b.dtype && a.dtype == c.dtype && a.dtype == bias.dtype();
    if m * n * k == 0 || !one_type {
        return Ok(false);
    }
    let crate::cuda::KernelArg::Ptr(bias) = gpu.ptr(bias)? else { unreachable!("a tensor has an address") };
    let stream = gpu.stream();
    let mut lts = LT.lock().unwrap();
    let lt = match lts.entry(Arc::as_ptr(stream.context()) as usize) {
        std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
        std::collections::hash_map::Entry::Vacant(entry) => entry.insert(Lt {
            handle: result::create_handle().map_err(candle_core::Error::wrap)?,
            workspace: Value::into_tensor(gpu.empty(WORKSPACE, DType::U8)?),
            chosen: HashMap::new(),
        }),
    };
    let product = describe(&b, &a, &c, bias).map_err(candle_core::Error::wrap)?;
    let alignments = [&b, &a, &c].map(alignment);
    let shape = |mat: &Mat| (mat.rows, mat.columns, mat.stride, mat.transposed);
    let key = ([shape(&b), shape(&a), shape(&c)], a.dtype, tf32_allowed(), alignments);
    let algo = match lt.chosen.get(&key) {
        Some(algo) => *algo,
        None => {
            let algo = choose(lt, &product, alignments);
            lt.chosen.insert(key, algo);
            algo
        }
    };
    let Some(algo) = algo else { return Ok(false) };
    let crate::cuda::KernelArg::Ptr(workspace) = gpu.ptr(&lt.workspace)? else {
        unreachable!("a tensor has an address")
    };
    let (one, zero) = (1.0f32, 0.0f32);
    // SAFETY: the addresses are those of living tensors with the dimensions checked above; the stream runs one product
    // at a time, so that all may share the workspace; the scalars are read before the call returns.
    unsafe {
        result::matmul(
            lt.handle,
            product.desc,
            (&raw const one).cast(),
            (&raw const zero).cast(),
            b.address() as *const c_void,
            product.a,
            a.address() as *const c_void,
            product.b,
            c.address() as *const c_void,
            product.c,
            c.address() as *mut c_void,
            product.c,
            &raw const algo,
            workspace as *mut c_void,
            WORKSPACE,
            stream.cu_stream().cast(),
        )
    }
    .map_err(candle_core::Error::wrap)?;
    Ok(true)
}
