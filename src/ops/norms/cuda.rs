//! Launches of `kernels/norms.cu`.

use candle_core::{DType, Result, Tensor};

use super::{GateOrder, LayerNorm, RmsEps, RmsNorm};
use crate::cuda::{Gpu, KernelArg, NULL, kernels};
use crate::ops::rows::cuda::{Teams, parameter_sums};
use crate::ops::tape::{Forward, Run};

/// Rows and their length, for a norm whose weight is `w`.
fn shape(x: &Tensor, w: &Tensor) -> (usize, usize) {
    let width = w.elem_count();
    (x.elem_count() / width.max(1), width)
}

pub fn layer_norm(node: &LayerNorm, args: &[Tensor]) -> Result<Forward> {
    let (gpu, dtype) = (Gpu::of(&args[0])?, args[0].dtype());
    let (rows, width) = shape(&args[0], &args[1]);
    let y = gpu.empty(args[0].shape(), dtype)?;
    let mut list = args.iter().map(|arg| gpu.ptr(arg)).collect::<Result<Vec<_>>>()?;
    list.push(gpu.of_value(&y)?);
    let teams = Teams::new(width, dtype, &list)?.ahead(1);
    list.extend([rows.into(), width.into(), teams.log_lanes(), (node.eps as f32).into()]);
    gpu.launch(&kernels::NORMS, &teams.name("norms_layer_forward"), teams.map(&gpu, rows), &list)?;
    Ok(Forward { outputs: vec![y], saved: vec![] })
}

pub fn layer_norm_backward(node: &LayerNorm, run: &Run, dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
    let (args, gpu, dtype) = (&run.args, Gpu::of(dy)?, dy.dtype());
    let (rows, width) = shape(&args[0], &args[1]);
    let dx = gpu.empty(args[0].shape(), dtype)?.into_tensor();
    let mut list = vec![gpu.ptr(&args[0])?, gpu.ptr(&args[1])?, gpu.ptr(dy)?, gpu.ptr(&dx)?];
    let teams = Teams::new(width, dtype, &list)?.ahead(2);
    let launch = teams.sum(rows);
    let slabs = launch.grid.0 as usize;
    let partial = gpu.empty((slabs, 2, width), DType::F32)?;
    list.push(gpu.of_value(&partial)?);
    list.extend([rows.into(), width.into(), teams.log_lanes(), (node.eps as f32).into()]);
    gpu.launch(&kernels::NORMS, &teams.name("norms_layer_backward"), launch, &list)?;
    let parameters = parameter_sums(&gpu, run, &partial, slabs, &[1, 2])?;
    Ok([Some(dx)].into_iter().chain(parameters).collect())
}

impl RmsNorm {
    fn kernel(&self, pass: &str) -> String {
        let op = match self.gate {
            None => "rms",
            Some(GateOrder::AfterNorm) => "rms_after",
            Some(GateOrder::BeforeNorm) => "rms_before",
            Some(GateOrder::SigmoidAfterNorm) => "rms_sigmoid",
        };
        format!("norms_{op}_{pass}")
    }

    /// What ends the arguments of both kernels.
    fn tail(&self, teams: &Teams, rows: usize, width: usize) -> [KernelArg; 5] {
        let outside = i32::from(self.place == RmsEps::Outside);
        [rows.into(), width.into(), teams.log_lanes(), (self.eps as f32).into(), outside.into()]
    }
}

/// Arguments x, w, and the gate z if there is one.
pub fn rms_norm(node: &RmsNorm, args: &[Tensor]) -> Result<Forward> {
    let (gpu, dtype) = (Gpu::of(&args[0])?, args[0].dtype());
    let (rows, width) = shape(&args[0], &args[1]);
    let y = gpu.empty(args[0].shape(), dtype)?;
    let mut list =
        vec![gpu.ptr(&args[0])?, gpu.ptr_or_null(args.get(2))?, gpu.ptr(&args[1])?, gpu.of_value(&y)?];
    let teams = Teams::new(width, dtype, &list)?;
    list.extend(node.tail(&teams, rows, width));
    gpu.launch(&kernels::NORMS, &teams.name(&node.kernel("forward")), teams.map(&gpu, rows), &list)?;
    Ok(Forward { outputs: vec![y], saved: vec![] })
}

pub fn rms_norm_backward(node: &RmsNorm, run: &Run, dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
    let (args, gpu, dtype) = (&run.args, Gpu::of(dy)?, dy.dtype());
    let (rows, width) = shape(&args[0], &args[1]);
    let dx = gpu.empty(args[0].shape(), dtype)?.into_tensor();
    let dz = args.get(2).map(|z| Ok::<_, candle_core::Error>(gpu.empty(z.shape(), dtype)?.into_tensor()));
    let dz = dz.transpose()?;
    let mut list = vec![
        gpu.ptr(&args[0])?,
        gpu.ptr_or_null(args.get(2))?,
        gpu.ptr(&args[1])?,
        gpu.ptr(dy)?,
        gpu.ptr(&dx)?,
        dz.as_ref().map_or(Ok(NULL), |dz| gpu.ptr(dz))?,
    ];
    let teams = Teams::new(width, dtype, &list)?;
    let launch = teams.sum(rows);
    let slabs = launch.grid.0 as usize;
    let partial = gpu.empty((slabs, width), DType::F32)?;
    list.push(gpu.of_value(&partial)?);
    list.extend(node.tail(&teams, rows, width));
    gpu.launch(&kernels::NORMS, &teams.name(&node.kernel("backward")), launch, &list)?;
    let dw = parameter_sums(&gpu, run, &partial, slabs, &[1])?;
    Ok([Some(dx)].into_iter().chain(dw).chain(dz.map(Some)).collect())
}
