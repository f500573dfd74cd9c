//! Launches of `kernels/residual_norm.cu`.

use candle_core::{DType, Result, Tensor};

use super::ResidualNorm;
use crate::cuda::{Gpu, KernelArg, NULL, kernels};
use crate::ops::dropout::cuda::mask_args;
use crate::ops::rows::cuda::{Teams, parameter_sums};
use crate::ops::tape::{Forward, Run};

impl ResidualNorm {
    /// What ends the arguments of both kernels.
    fn tail(&self, teams: &Teams, rows: usize, width: usize, mask: [KernelArg; 6]) -> Vec<KernelArg> {
        let mut tail = vec![rows.into(), width.into(), teams.log_lanes(), (self.eps as f32).into()];
        tail.extend(mask);
        tail
    }
}

fn check(args: &[Tensor]) -> Result<()> {
    if args[0].dtype() != args[1].dtype() {
        candle_core::bail!(
            "residual_norm: the branch is {:?}, but the residual {:?}",
            args[0].dtype(),
            args[1].dtype()
        )
    }
    Ok(())
}

pub fn forward(node: &ResidualNorm, args: &[Tensor]) -> Result<Forward> {
    check(args)?;
    let (gpu, dtype) = (Gpu::of(&args[0])?, args[0].dtype());
    let width = args[2].elem_count();
    let rows = args[0].elem_count() / width.max(1);
    let y = gpu.empty(args[0].shape(), dtype)?;
    let mask = mask_args(&gpu, node.dropout.as_ref(), node.steps)?;
    let mut list = args.iter().map(|arg| gpu.ptr(arg)).collect::<Result<Vec<_>>>()?;
    list.push(gpu.of_value(&y)?);
    let teams = Teams::new(width, dtype, &list)?.ahead(2);
    list.extend(node.tail(&teams, rows, width, mask));
    let name = teams.name("residual_norm_forward");
    gpu.launch(&kernels::RESIDUAL_NORM, &name, teams.map(&gpu, rows), &list)?;
    Ok(Forward { outputs: vec![y], saved: vec![] })
}

pub fn backward(node: &ResidualNorm, run: &Run, dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
    let (args, gpu, dtype) = (&run.args, Gpu::of(dy)?, dy.dtype());
    let width = args[2].elem_count();
    let rows = dy.elem_count() / width.max(1);
    let dresidual = gpu.empty(dy.shape(), dtype)?.into_tensor();
    // Without dropout both gradients are the same.
    let masked = node.dropout.is_some() && run.needs[0];
    let dbranch = if masked { Some(gpu.empty(dy.shape(), dtype)?.into_tensor()) } else { None };
    let mask = mask_args(&gpu, node.dropout.as_ref(), node.steps)?;
    let mut list = vec![
        gpu.ptr(&args[0])?,
        gpu.ptr(&args[1])?,
        gpu.ptr(&args[2])?,
        gpu.ptr(dy)?,
        dbranch.as_ref().map_or(Ok(NULL), |tensor| gpu.ptr(tensor))?,
        gpu.ptr(&dresidual)?,
    ];
    let teams = Teams::new(width, dtype, &list)?.ahead(3);
    let launch = teams.sum(rows);
    let slabs = launch.grid.0 as usize;
    let partial = gpu.empty((slabs, 2, width), DType::F32)?;
    list.push(gpu.of_value(&partial)?);
    list.extend(node.tail(&teams, rows, width, mask));
    gpu.launch(&kernels::RESIDUAL_NORM, &teams.name("residual_norm_backward"), launch, &list)?;
    let parameters = parameter_sums(&gpu, run, &partial, slabs, &[2, 3])?;
    let dbranch = if masked { dbranch } else { Some(dresidual.clone()) };
    Ok([dbranch, Some(dresidual)].into_iter().chain(parameters).collect())
}
