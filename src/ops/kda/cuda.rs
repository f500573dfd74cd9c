//! Launching `kernels/kda.cu`.

use candle_core::{DType, Result, Tensor};

use crate::cuda::{Gpu, KernelArg, Launch, kernels, suffix};
use crate::ops::rows::cuda::{head_rows, parameter_sums};
use crate::ops::tape::{Forward, Run, Value};

/// A launch over rows of [B, T, H, K].
struct Plan {
    gpu: Gpu,
    dtype: DType,
    launch: Launch,
    sizes: [KernelArg; 2],
}

impl Plan {
    fn new(op: &str, args: &[Tensor], exact: &[usize], dims: [usize; 4]) -> Result<Self> {
        let dtype = args[0].dtype();
        for &i in exact {
            if args[i].dtype() != DType::F32 {
                candle_core::bail!("{op} on a GPU: expected argument {i} in f32, got {:?}", args[i].dtype())
            }
        }
        let [batch, steps, heads, key] = dims;
        let launch = head_rows(op, batch * steps, heads, key)?;
        Ok(Self { gpu: Gpu::of(&args[0])?, dtype, launch, sizes: [(batch * steps).into(), key.into()] })
    }

    /// Launches a kernel on the arguments of an op and what follows them.
    fn launch(&self, kernel: &str, args: &[Tensor], more: &[KernelArg]) -> Result<()> {
        let mut list = args.iter().map(|arg| self.gpu.ptr(arg)).collect::<Result<Vec<_>>>()?;
        list.extend([more, &self.sizes].concat());
        let name = format!("kda_{kernel}_{}", suffix(self.dtype)?);
        self.gpu.launch(&kernels::KDA, &name, self.launch, &list)
    }
}

pub fn gate(args: &[Tensor], dims: [usize; 4]) -> Result<Forward> {
    let plan = Plan::new("kda_gate", args, &[1, 2], dims)?;
    let g = plan.gpu.empty(args[0].shape(), DType::F32)?;
    plan.launch("gate_forward", args, &[plan.gpu.of_value(&g)?])?;
    Ok(Forward { outputs: vec![g], saved: vec![] })
}

pub fn gate_backward(run: &Run, dims: [usize; 4], dg: &Tensor) -> Result<Vec<Option<Tensor>>> {
    let args = &run.args;
    let plan = Plan::new("kda_gate", args, &[1, 2], dims)?;
    let (gpu, [_, _, heads, key]) = (&plan.gpu, dims);
    let slabs = plan.launch.grid.0 as usize;
    let df = gpu.empty(args[0].shape(), plan.dtype)?;
    let of_log = gpu.empty((slabs, heads), DType::F32)?;
    let of_bias = gpu.empty((slabs, heads * key), DType::F32)?;
    let more = [gpu.ptr(dg)?, gpu.of_value(&df)?, gpu.of_value(&of_log)?, gpu.of_value(&of_bias)?];
    plan.launch("gate_backward", args, &more)?;
    let d_log = parameter_sums(gpu, run, &of_log, slabs, &[1])?;
    let d_bias = parameter_sums(gpu, run, &of_bias, slabs, &[2])?;
    Ok([Some(df.into_tensor())].into_iter().chain(d_log).chain(d_bias).collect())
}

pub fn keys(args: &[Tensor], dims: [usize; 4]) -> Result<Forward> {
    let plan = Plan::new("kda_keys", args, &[1, 2], dims)?;
    let like_k = || plan.gpu.empty(args[0].shape(), plan.dtype);
    let (read, write) = (like_k()?, like_k()?);
    plan.launch("keys_forward", args, &[plan.gpu.of_value(&read)?, plan.gpu.of_value(&write)?])?;
    Ok(Forward { outputs: vec![read, write], saved: vec![] })
}

pub fn keys_backward(
    args: &[Tensor],
    dims: [usize; 4],
    d_read: &Tensor,
    d_write: &Tensor,
) -> Result<Vec<Option<Tensor>>> {
    let plan = Plan::new("kda_keys", args, &[1, 2], dims)?;
    let gpu = &plan.gpu;
    let dk = gpu.empty(args[0].shape(), plan.dtype)?;
    let dg = gpu.empty(args[1].shape(), DType::F32)?;
    let d_beta = gpu.empty(args[2].shape(), DType::F32)?;
    let grads = [dk, dg, d_beta];
    let mut more = vec![gpu.ptr(d_read)?, gpu.ptr(d_write)?];
    for grad in &grads {
        more.push(gpu.of_value(grad)?);
    }
    plan.launch("keys_backward", args, &more)?;
    Ok(grads.into_iter().map(|grad: Value| Some(grad.into_tensor())).collect())
}
