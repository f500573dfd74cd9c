//! Launching `kernels/sum_rule.cu`; the linear attention between its kernels is that of `kernels/gla.cu`.

use candle_core::{DType, Result, Tensor};

use super::{Dims, GatedRule};
use crate::cuda::{Gpu, KernelArg, Launch, NULL, kernels, suffix};
use crate::ops::gla;
use crate::ops::tape::{Forward, Run, Value};

const THREADS: usize = 256;

struct Plan {
    gpu: Gpu,
    dims: Dims,
    dtype: DType,
}

impl Plan {
    fn new(node: &GatedRule, args: &[Tensor]) -> Result<Self> {
        let dtype = args[0].dtype();
        for (i, arg) in args.iter().enumerate() {
            let want = if i < 3 { dtype } else { DType::F32 };
            if arg.dtype() != want {
                candle_core::bail!(
                    "gated_sum_rule on a GPU: expected argument {i} of {want:?}, got {:?}",
                    arg.dtype()
                )
            }
        }
        Ok(Self { gpu: Gpu::of(&args[0])?, dims: node.dims(args)?, dtype })
    }

    /// Launches a kernel that has `n` elements to work through.
    fn launch(&self, kernel: &str, n: usize, args: &[KernelArg]) -> Result<()> {
        let name = format!("sum_rule_{kernel}_{}", suffix(self.dtype)?);
        let blocks = n.div_ceil(THREADS).min(16 * self.gpu.multiprocessors());
        self.gpu.launch(&kernels::SUM_RULE, &name, Launch::new(blocks, THREADS as u32), args)
    }

    /// The rows of tokens at `x`, [B, T, H, dim], as those of their last writes, [B, T n, H, dim], with zeros for the
    /// others; or without `spread` back.
    fn last_writes(&self, x: KernelArg, dim: usize, spread: bool) -> Result<Value> {
        let Dims { batch, steps, sub, heads, .. } = self.dims;
        let rows = if spread { steps * sub } else { steps };
        let y = self.gpu.empty((batch, rows, heads, dim), self.dtype)?;
        let (width, n) = (heads * dim, batch * rows * heads * dim);
        let args = [x, self.gpu.of_value(&y)?, KernelArg::I64(n as i64), width.into(), sub.into()];
        self.launch(if spread { "spread" } else { "pick" }, n, &args)?;
        Ok(y)
    }

    /// [`Plan::last_writes`] of a tensor, where a token has more writes than one.
    fn moved(&self, x: &Tensor, spread: bool) -> Result<Tensor> {
        match self.dims.sub {
            1 => Ok(x.clone()),
            _ => Ok(self.last_writes(self.gpu.ptr(x)?, x.dim(3)?, spread)?.into_tensor()),
        }
    }

    /// The sizes and arguments of linear attention that does the same, one write a step.
    fn attention(&self, node: &GatedRule, args: &[Tensor]) -> Result<(gla::Dims, Vec<Tensor>)> {
        let (gpu, n) = (&self.gpu, args[1].elem_count());
        let Dims { batch, steps, sub, heads, key, value } = self.dims;
        let keys = gpu.empty(args[1].shape(), self.dtype)?;
        let decay = gpu.empty(args[1].shape(), DType::F32)?;
        let pointers = [gpu.ptr(&args[1])?, gpu.ptr(&args[3])?, gpu.ptr_or_null(node.g(args))?];
        let outputs = [gpu.of_value(&keys)?, gpu.of_value(&decay)?];
        let sizes = [KernelArg::I64(n as i64), key.into(), heads.into(), sub.into()];
        self.launch("prepare", n, &[&pointers[..], &outputs, &sizes].concat())?;
        let queries = self.moved(&args[0], true)?;
        let mut attended = vec![queries, keys.into_tensor(), args[2].clone(), decay.into_tensor()];
        attended.extend(node.state(args).cloned());
        Ok((gla::Dims { batch, steps: steps * sub, heads, key, value }, attended))
    }
}

/// o and the final state; nothing is kept for the backward pass.
pub fn forward(node: &GatedRule, args: &[Tensor]) -> Result<Forward> {
    let plan = Plan::new(node, args)?;
    let (dims, attended) = plan.attention(node, args)?;
    let Forward { mut outputs, saved } = gla::cuda::forward(dims, &attended, node.scale)?;
    if plan.dims.sub > 1 {
        outputs[0] = plan.last_writes(plan.gpu.of_value(&outputs[0])?, plan.dims.value, false)?;
    }
    Ok(Forward { outputs, saved })
}

/// The gradients of the arguments, in their order.
pub fn backward(node: &GatedRule, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
    let args = &run.args;
    let plan = Plan::new(node, args)?;
    let (gpu, Dims { batch, steps, sub, heads, key, value }) = (&plan.gpu, plan.dims);
    let (dims, attended) = plan.attention(node, args)?;
    let d_o = match &grads[0] {
        Some(grad) => grad.clone(),
        None => gpu.zeros((batch, steps, heads, value), plan.dtype)?.into_tensor(),
    };
    let d_o = plan.moved(&d_o, true)?;
    let mut inner = gla::cuda::backward(dims, &attended, node.scale, &d_o, grads[1].as_ref())?.into_iter();
    let mut next = || inner.next().expect("five gradients");
    let [dq, d_keys, dv, d_decay, d_state] = [next(), next(), next(), next(), next()];
    let dq = plan.moved(&dq, false)?;

    let rows = batch * steps * sub * heads;
    let dk = gpu.empty(args[1].shape(), plan.dtype)?;
    let d_beta = gpu.empty(args[3].shape(), DType::F32)?;
    let dg = node.g(args).map(|g| gpu.empty(g.shape(), DType::F32)).transpose()?;
    let dg_at = dg.as_ref().map_or(Ok(NULL), |dg| gpu.of_value(dg))?;
    let inputs = [&args[1], &args[3], &d_keys, &d_decay].map(|tensor| gpu.ptr(tensor));
    let inputs = inputs.into_iter().collect::<Result<Vec<_>>>()?;
    let outputs = [gpu.of_value(&dk)?, gpu.of_value(&d_beta)?, dg_at];
    let sizes = [rows, key, heads, sub].map(KernelArg::from);
    plan.launch("gather", 32 * rows, &[&inputs[..], &outputs, &sizes].concat())?;

    let [dk, d_beta] = [dk, d_beta].map(Value::into_tensor);
    let all = [dq, dk, dv, d_beta].into_iter().chain(dg.map(Value::into_tensor));
    let state = node.stateful.then_some(d_state);
    Ok(all.chain(state).map(Some).collect())
}
