//! Launching the kernels of `kernels/*.cu` on Candle's device, memory and stream.
//!
//! Everything runs on one stream, in the order of its launch: a buffer that a tensor lets go is used again
//! only by what is launched later. Nothing here waits for the GPU.

pub mod about;
pub mod graph;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::WrapErr;
use candle_core::{CudaDevice, CudaStorage, DType, Device, Result, Shape, Storage, Tensor};
use cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
use cudarc::driver::sys::CUmemPool_attribute;
use cudarc::driver::sys::{
    CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave, CUtensorMapL2promotion,
    CUtensorMapSwizzle, cuTensorMapEncodeTiled,
};
use cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaStream, DevicePtr, DeviceRepr, DriverError, LaunchConfig,
    PushKernelArg,
};
use cudarc::nvrtc::Ptx;

use crate::ops::tape::Value;

/// One compiled file of `kernels/`.
pub struct Module {
    pub name: &'static str,
    image: &'static [u8],
    /// The one compute capability that it runs on, where there is only one.
    only: Option<(i32, i32)>,
}

/// The compiled files, by name: `kernels::DELTA` is `kernels/delta.cu`.
pub mod kernels {
    use super::Module;
    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}

/// GPUs that the driver shows; none without a driver.
pub fn count() -> usize {
    CudaContext::device_count().ok().and_then(|count| usize::try_from(count).ok()).unwrap_or(0)
}

/// The driver's CUDA version, as in (13, 0).
pub fn driver_version() -> Option<(i32, i32)> {
    let mut version = 0;
    // SAFETY: the call writes one integer.
    let result = unsafe { cudarc::driver::sys::cuDriverGetVersion(&raw mut version) };
    (result == cudarc::driver::sys::CUresult::CUDA_SUCCESS).then_some((version / 1000, version % 1000 / 10))
}

/// The CUDA version that the kernels were compiled by, as in `13.0`.
pub const TOOLKIT: &str = env!("SELECTIVBENCH_CUDA_VERSION");

/// The compute capabilities that the kernels were compiled for, as in `80,90`.
pub const COMPILED_FOR: &str = env!("SELECTIVBENCH_CUDA_CAPS");

/// GPU `index`, ready for kernels; the same one each time. Says what is in the way.
pub fn open(index: usize) -> std::result::Result<Device, String> {
    static OPEN: LazyLock<Mutex<HashMap<usize, Device>>> = LazyLock::new(Default::default);
    let mut open = OPEN.lock().unwrap();
    if let Some(device) = open.get(&index) {
        return Ok(device.clone());
    }
    let count = count();
    if count == 0 {
        return Err("there is no GPU, or no NVIDIA driver for it".into());
    }
    if index >= count {
        let last = count - 1;
        return Err(format!("there is no such GPU; the last one is cuda:{last}"));
    }
    let major = TOOLKIT.split('.').next().and_then(|major| major.parse().ok()).unwrap_or(0);
    if let Some((have, minor)) = driver_version()
        && have < major
    {
        return Err(format!(
            "its driver is for CUDA {have}.{minor} and the program was built with CUDA {TOOLKIT}; install a newer \
             driver, or build with an older toolkit"
        ));
    }
    let why = |error: &dyn std::fmt::Display| {
        let text = error.to_string();
        format!("it cannot be used: {}", text.lines().next().unwrap_or(""))
    };
    let context = CudaContext::new(index).map_err(|error| why(&error))?;
    let (cap_major, cap_minor) = context.compute_capability().map_err(|error| why(&error))?;
    if cap_major < 8 {
        return Err(format!(
            "it has compute capability {cap_major}.{cap_minor}, and the kernels need 8.0 (Ampere) or newer"
        ));
    }
    let device = Device::new_cuda_with_stream(index).map_err(|error| why(&error))?;
    let cuda = device.as_cuda_device().map_err(|error| why(&error))?;
    // SAFETY: everything runs on the one stream of this device, so no event is needed to order two uses of a
    // buffer.
    unsafe { cuda.disable_event_tracking() };
    keep_memory(&context).map_err(|error| why(&error))?;
    open.insert(index, device.clone());
    Ok(device)
}

/// Lets the driver's pool keep freed memory: by default it gives everything back at each synchronisation.
fn keep_memory(context: &CudaContext) -> std::result::Result<(), DriverError> {
    let mut most = u64::MAX;
    // SAFETY: the pool is the device's own; the attribute takes a u64.
    unsafe {
        let pool = cudarc::driver::result::device::get_default_mem_pool(context.cu_device())?;
        let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        cudarc::driver::result::mem_pool::set_attribute(pool, attribute, (&raw mut most).cast())
    }
}

/// Whether matrix products of f32 tensors may round their operands to tf32.
static TF32: AtomicBool = AtomicBool::new(false);

/// Lets matrix products of f32 tensors round their operands to tf32, in the whole process.
pub fn allow_tf32(allow: bool) {
    TF32.store(allow, Ordering::Relaxed);
}

/// Whether [`allow_tf32`] is on.
pub fn tf32_allowed() -> bool {
    TF32.load(Ordering::Relaxed)
}

/// Whether new buffers are filled with NaN, so that a kernel that leaves elements unwritten shows.
static POISON: AtomicBool = AtomicBool::new(false);

/// Fills new buffers with NaN from now on.
pub fn poison(on: bool) {
    POISON.store(on, Ordering::Relaxed);
}

/// The suffix of elementwise kernels for activations of this type.
pub fn suffix(dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("f32"),
        DType::BF16 => Ok("bf16"),
        other => candle_core::bail!("a GPU computes in f32 or bf16, not in {other:?}"),
    }
}

/// The suffix of kernels that multiply matrices, for activations of this type.
pub fn route(dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 if tf32_allowed() => Ok("tf32"),
        other => suffix(other),
    }
}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub enum KernelArg {
    /// An address in device memory.
    Ptr(u64),
    I32(i32),
    U32(u32),
    I64(i64),
    F32(f32),
    Map(TensorMap),
}

/// A tensor as TMA sees it: the driver's `CUtensorMap`.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct TensorMap([u64; 16]);

// SAFETY: plain numbers, which a kernel takes as they are.
unsafe impl DeviceRepr for TensorMap {}

/// The address that stands for an argument left out.
pub const NULL: KernelArg = KernelArg::Ptr(0);

impl From<i32> for KernelArg {
    fn from(x: i32) -> Self {
        KernelArg::I32(x)
    }
}

impl From<u32> for KernelArg {
    fn from(x: u32) -> Self {
        KernelArg::U32(x)
    }
}

impl From<i64> for KernelArg {
    fn from(x: i64) -> Self {
        KernelArg::I64(x)
    }
}

impl From<f32> for KernelArg {
    fn from(x: f32) -> Self {
        KernelArg::F32(x)
    }
}

/// A size; sizes that kernels take as `int` are far below 2³¹.
impl From<usize> for KernelArg {
    fn from(x: usize) -> Self {
        KernelArg::I32(i32::try_from(x).expect("a size below 2^31"))
    }
}

/// The shape of a launch.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    pub grid: (u32, u32, u32),
    pub block: u32,
    /// Dynamic shared memory, in bytes.
    pub shared: usize,
    /// Whether all blocks run at the same time, so that they can wait for each other.
    pub together: bool,
}

impl Launch {
    /// `blocks` blocks of `threads` threads, in one dimension.
    pub fn new(blocks: usize, threads: u32) -> Self {
        Self::grid(blocks, 1, 1, threads)
    }

    /// A grid of two or three dimensions.
    pub fn grid(x: usize, y: usize, z: usize, threads: u32) -> Self {
        let size = |n: usize| u32::try_from(n).expect("a grid below 2^32");
        Self { grid: (size(x), size(y), size(z)), block: threads, shared: 0, together: false }
    }

    /// With dynamic shared memory.
    pub fn shared(self, bytes: usize) -> Self {
        Self { shared: bytes, ..self }
    }

    /// With all blocks at the same time; more than fit on the device are an error.
    pub fn together(self) -> Self {
        Self { together: true, ..self }
    }
}

/// A GPU, as the launchers see it.
#[derive(Clone)]
pub struct Gpu {
    device: CudaDevice,
    stream: Arc<CudaStream>,
}

/// A loaded function and the dynamic shared memory that it was prepared for.
struct Loaded {
    function: CudaFunction,
    shared: usize,
}

/// Loaded functions by context, module and name.
type Functions = HashMap<(usize, &'static str), (Arc<CudaModule>, HashMap<String, Loaded>)>;

static FUNCTIONS: LazyLock<Mutex<Functions>> = LazyLock::new(Default::default);

impl Gpu {
    /// The GPU that a tensor lives on.
    pub fn of(tensor: &Tensor) -> Result<Self> {
        Self::new(tensor.device())
    }

    pub fn new(device: &Device) -> Result<Self> {
        let device = device.as_cuda_device()?.clone();
        Ok(Self { stream: device.cuda_stream(), device })
    }

    pub fn device(&self) -> Device {
        Device::Cuda(self.device.clone())
    }

    pub fn cuda(&self) -> &CudaDevice {
        &self.device
    }

    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Multiprocessors of the GPU.
    pub fn multiprocessors(&self) -> usize {
        use cudarc::driver::sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as COUNT;
        static CACHE: LazyLock<Mutex<HashMap<usize, usize>>> = LazyLock::new(Default::default);
        let context = self.stream.context();
        *CACHE.lock().unwrap().entry(context.ordinal()).or_insert_with(|| {
            context.attribute(COUNT).ok().and_then(|count| usize::try_from(count).ok()).unwrap_or(1)
        })
    }

    /// The most shared memory that a block can have, in bytes.
    pub fn most_shared(&self) -> usize {
        use cudarc::driver::sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN as MOST;
        static CACHE: LazyLock<Mutex<HashMap<usize, usize>>> = LazyLock::new(Default::default);
        let context = self.stream.context();
        *CACHE.lock().unwrap().entry(context.ordinal()).or_insert_with(|| {
            context.attribute(MOST).ok().and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(48 << 10)
        })
    }

    /// Whether a module was compiled for this GPU, or for any.
    pub fn runs(&self, module: &Module) -> bool {
        static CACHE: LazyLock<Mutex<HashMap<usize, (i32, i32)>>> = LazyLock::new(Default::default);
        let context = self.stream.context();
        let capability = |_: &usize| context.compute_capability().unwrap_or_default();
        module.only.is_none_or(|only| {
            let mut cache = CACHE.lock().unwrap();
            let ordinal = context.ordinal();
            !module.image.is_empty() && *cache.entry(ordinal).or_insert_with_key(capability) == only
        })
    }

    /// A contiguous tensor [batch, rows, heads, columns] of bf16 for copies of `copied` rows, up to 256, and 64
    /// columns of one head, as `kernels/wgmma.cuh` has them. It starts at 16 bytes, and so does each of its rows.
    pub fn tensor_map(&self, at: KernelArg, dims: [usize; 4], copied: usize) -> Result<KernelArg> {
        let KernelArg::Ptr(at) = at else { candle_core::bail!("expected an address, got {at:?}") };
        let [batch, rows, heads, columns] = dims.map(|size| size as u64);
        let sizes = [columns, heads, rows, batch];
        let strides = [2 * columns, 2 * columns * heads, 2 * columns * heads * rows];
        let copied = u32::try_from(copied).expect("at most 256 rows");
        let mut map = CUtensorMap { opaque: [0; 16] };
        // SAFETY: reads the arrays, whose lengths fit four dimensions, and writes `map`; the tensor's memory is
        // touched by kernels only.
        let result = unsafe {
            cuTensorMapEncodeTiled(
                &raw mut map,
                CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                4,
                at as *mut std::ffi::c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                [64, 1, copied, 1].as_ptr(),
                [1; 4].as_ptr(),
                CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        match result.result() {
            Ok(()) => Ok(KernelArg::Map(TensorMap(map.opaque))),
            Err(error) => candle_core::bail!("no tensor map of {dims:?} at {at:#x}: {error}"),
        }
    }

    /// A new contiguous value whose elements are for a kernel to write.
    pub fn empty(&self, shape: impl Into<Shape>, dtype: DType) -> Result<Value> {
        let shape = shape.into();
        // An allocation of no bytes fails.
        let n = shape.elem_count().max(1);
        macro_rules! alloc {
            ($type:ty) => {{
                // SAFETY: the elements are written by the kernel that the buffer was asked for; until then
                // nobody reads them, and any bytes are valid numbers.
                let slice = unsafe { self.device.alloc::<$type>(n)? };
                if POISON.load(Ordering::Relaxed) {
                    let (ptr, _guard) = slice.device_ptr(&self.stream);
                    // SAFETY: the range is the allocation just made, on the stream that uses it.
                    unsafe {
                        cudarc::driver::result::memset_d8_async(
                            ptr,
                            0xff,
                            n * size_of::<$type>(),
                            self.stream.cu_stream(),
                        )
                        .w()?;
                    }
                }
                CudaStorage::wrap_cuda_slice(slice, self.device.clone())
            }};
        }
        let storage = match dtype {
            DType::F32 => alloc!(f32),
            DType::BF16 => alloc!(half::bf16),
            DType::U32 => alloc!(u32),
            DType::F64 => alloc!(f64),
            DType::U8 => alloc!(u8),
            other => candle_core::bail!("no GPU buffers of {other:?}"),
        };
        Ok(Value { storage: Storage::Cuda(storage), shape })
    }

    /// A value of zeros.
    pub fn zeros(&self, shape: impl Into<Shape>, dtype: DType) -> Result<Value> {
        let value = self.empty(shape, dtype)?;
        let KernelArg::Ptr(ptr) = self.of_value(&value)? else { unreachable!("a buffer has an address") };
        let bytes = value.shape.elem_count() * dtype.size_in_bytes();
        if bytes > 0 {
            // SAFETY: the range is the allocation just made, on the stream that uses it.
            unsafe {
                cudarc::driver::result::memset_d8_async(ptr, 0, bytes, self.stream.cu_stream()).w()?;
            }
        }
        Ok(value)
    }

    /// A copy of a contiguous tensor, seen in another shape; zeros behind it where that has more elements.
    pub fn copy(&self, tensor: &Tensor, shape: impl Into<Shape>) -> Result<Value> {
        let copy = self.empty(shape, tensor.dtype())?;
        let size = tensor.dtype().size_in_bytes();
        let (bytes, all) = (tensor.elem_count() * size, copy.shape.elem_count() * size);
        let (KernelArg::Ptr(from), KernelArg::Ptr(to)) = (self.ptr(tensor)?, self.of_value(&copy)?) else {
            unreachable!("buffers have addresses")
        };
        if all < bytes {
            candle_core::bail!("copy: {:?} into {:?}", tensor.shape(), copy.shape)
        }
        let (stream, rest) = (self.stream.cu_stream(), all - bytes);
        // SAFETY: both ranges lie in living buffers of this device, on the stream that uses them.
        unsafe {
            cudarc::driver::result::memcpy_dtod_async(to, from, bytes, stream).w()?;
            if rest > 0 {
                cudarc::driver::result::memset_d8_async(to + bytes as u64, 0, rest, stream).w()?;
            }
        }
        Ok(copy)
    }

    /// `tensor`, or a copy where it starts between two addresses of 16 bytes.
    pub fn aligned(&self, tensor: &Tensor) -> Result<Tensor> {
        match self.ptr(tensor)? {
            KernelArg::Ptr(at) if at % 16 != 0 => {
                Ok(self.copy(tensor, tensor.shape().clone())?.into_tensor())
            }
            _ => Ok(tensor.clone()),
        }
    }

    /// The address of a value's first element.
    pub fn of_value(&self, value: &Value) -> Result<KernelArg> {
        match &value.storage {
            Storage::Cuda(storage) => self.address(storage, 0),
            _ => candle_core::bail!("expected a value on the GPU"),
        }
    }

    /// The address of a contiguous tensor's first element. The tensor must outlive the launch call, not the
    /// kernel: memory is given back in the order of the stream.
    pub fn ptr(&self, tensor: &Tensor) -> Result<KernelArg> {
        let (storage, layout) = tensor.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else { candle_core::bail!("expected a tensor on the GPU") };
        match layout.contiguous_offsets() {
            Some((start, _)) => self.address(storage, start),
            None => candle_core::bail!("expected a contiguous tensor of shape {:?}", layout.shape()),
        }
    }

    /// [`Gpu::ptr`], or the null address for none.
    pub fn ptr_or_null(&self, tensor: Option<&Tensor>) -> Result<KernelArg> {
        tensor.map_or(Ok(NULL), |tensor| self.ptr(tensor))
    }

    pub(crate) fn address(&self, storage: &CudaStorage, offset: usize) -> Result<KernelArg> {
        macro_rules! address {
            ($type:ty) => {
                storage.as_cuda_slice::<$type>()?.device_ptr(&self.stream).0
            };
        }
        let dtype = storage.dtype();
        let base = match dtype {
            DType::F32 => address!(f32),
            DType::BF16 => address!(half::bf16),
            DType::U32 => address!(u32),
            DType::F64 => address!(f64),
            DType::U8 => address!(u8),
            other => candle_core::bail!("no kernel takes {other:?}"),
        };
        Ok(KernelArg::Ptr(base + (offset * dtype.size_in_bytes()) as u64))
    }

    /// Launches kernel `name` of `module`.
    ///
    /// The arguments must be those of the kernel, in their order and of their types, and every address that
    /// it reads or writes must be of a buffer of this device that is large enough: each launcher stands next
    /// to its op and is run by the op's checks under poisoned memory and the sanitizer.
    pub fn launch(
        &self,
        module: &'static Module,
        name: &str,
        launch: Launch,
        args: &[KernelArg],
    ) -> Result<()> {
        if launch.grid.0 == 0 || launch.grid.1 == 0 || launch.grid.2 == 0 {
            return Ok(());
        }
        let function = self.function(module, name, launch.shared)?;
        let mut builder = self.stream.launch_builder(&function);
        for arg in args {
            match arg {
                KernelArg::Ptr(x) => builder.arg(x),
                KernelArg::I32(x) => builder.arg(x),
                KernelArg::U32(x) => builder.arg(x),
                KernelArg::I64(x) => builder.arg(x),
                KernelArg::F32(x) => builder.arg(x),
                KernelArg::Map(x) => builder.arg(x),
            };
        }
        let config = LaunchConfig {
            grid_dim: launch.grid,
            block_dim: (launch.block, 1, 1),
            shared_mem_bytes: u32::try_from(launch.shared).expect("shared memory below 4 GiB"),
        };
        // SAFETY: the contract in the documentation above; a launch that the driver refuses is an error.
        match unsafe {
            if launch.together { builder.launch_cooperative(config) } else { builder.launch(config) }
        } {
            Ok(_) => Ok(()),
            Err(error) => candle_core::bail!("kernel {name} with {launch:?}: {error}"),
        }
    }

    fn function(&self, module: &'static Module, name: &str, shared: usize) -> Result<CudaFunction> {
        /// More than this a function must be prepared for.
        const DEFAULT_SHARED: usize = 48 << 10;
        let context = self.stream.context();
        let mut functions = FUNCTIONS.lock().unwrap();
        let key = (Arc::as_ptr(context) as usize, module.name);
        let (module, functions) = match functions.entry(key) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => match context.load_module(Ptx::from_binary(module.image.to_vec())) {
                Ok(loaded) => entry.insert((loaded, HashMap::new())),
                Err(error) => candle_core::bail!(
                    "the kernels of {}.cu, compiled for compute capability {COMPILED_FOR} by CUDA {TOOLKIT}, \
                     cannot be loaded: {error}",
                    module.name
                ),
            },
        };
        if !functions.contains_key(name) {
            let function = match module.load_function(name) {
                Ok(function) => function,
                Err(error) => candle_core::bail!("there is no kernel {name}: {error}"),
            };
            functions.insert(name.into(), Loaded { function, shared: DEFAULT_SHARED });
        }
        let loaded = functions.get_mut(name).expect("just put in");
        if shared > loaded.shared {
            let bytes = i32::try_from(shared).expect("shared memory below 2 GiB");
            let attribute = CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            if let Err(error) = loaded.function.set_attribute(attribute, bytes) {
                candle_core::bail!("kernel {name} needs {shared} bytes of shared memory a block: {error}")
            }
            loaded.shared = shared;
        }
        Ok(loaded.function.clone())
    }
}
