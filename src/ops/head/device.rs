//! The head on a GPU: decoder, loss, votes and their gradients over blocks of sequences.

use std::sync::{Arc, Mutex};

use candle_core::{DType, Result, Tensor};

use super::cuda::{Ballot, BiasSums, DeviceTargets, Totals, stride};
use super::{HeadOutput, Targets, check_decoder};
use crate::cuda::Gpu;
use crate::ops::linear::cuda::{Mat, gemm, scale};
use crate::ops::tape::{Arg, Forward, Node, Run, apply};
use crate::ops::upload::upload;

/// Steps whose logits exist at the same time, about: at 1,601 classes they just fit the cache of an H100.
const ROWS_AT_ONCE: usize = 8192;

/// [`head_cross_entropy`](super::head_cross_entropy) on a GPU, where nothing is read back.
///
/// x [B, T, D], weight [C, D], bias \[C\]; `elements` is the most that a sequence has, `denominator` one f32 on
/// the device: what the gradient of a step's loss is multiplied with. Gives the loss as a differentiable
/// scalar, and the totals.
pub fn head_cross_entropy(
    x: impl Into<Arg>,
    weight: impl Into<Arg>,
    bias: impl Into<Arg>,
    targets: &Arc<DeviceTargets>,
    elements: usize,
    factor: &Tensor,
) -> Result<(Tensor, Totals)> {
    let (x, weight, bias) = (x.into(), weight.into().into_weight(), bias.into());
    check_decoder(&x.shape(), &weight.shape(), &bias.shape())?;
    let totals = Arc::new(Mutex::new(None));
    let node = Head { targets: targets.clone(), elements, factor: factor.clone(), totals: totals.clone() };
    let loss = apply(node, &[x, weight, bias])?.remove(0);
    let totals = totals.lock().expect("no task of this op has panicked").take();
    Ok((loss, totals.expect("the forward pass left them")))
}

/// [`super::head_cross_entropy`] with its targets sent to the GPU and its results read back.
pub(super) fn from_host(
    x: Arg,
    weight: Arg,
    bias: Arg,
    targets: &Targets,
    denominator: f64,
) -> Result<HeadOutput> {
    let (Arg::Tensor(tensor) | Arg::View(tensor, _)) = &x else {
        candle_core::bail!("head: x is a parameter")
    };
    let (gpu, shape) = (Gpu::of(tensor)?, (targets.batch, targets.steps));
    let labels = upload(&gpu, &targets.labels, shape)?;
    let element = upload(&gpu, &targets.element, shape)?;
    let factor = upload(&gpu, &[(1.0 / denominator) as f32], 1)?;
    let on_device = Arc::new(DeviceTargets { labels, element });
    let (loss, totals) = head_cross_entropy(x, weight, bias, &on_device, targets.elements, &factor)?;
    let votes = totals.votes.flatten_all()?.to_vec1()?;
    let loss_sum = totals.loss_sum.to_vec1::<f64>()?[0];
    Ok(HeadOutput { loss, votes, loss_sum })
}

/// Votes and losses of sequences that come in pieces along time, on a GPU.
pub struct DeviceVote {
    ballot: Ballot,
}

impl DeviceVote {
    /// For `batch` sequences of at most `elements` elements.
    pub fn new(gpu: &Gpu, batch: usize, elements: usize, classes: usize) -> Result<Self> {
        Ok(Self { ballot: Ballot::new(gpu, batch, elements, classes, true)? })
    }

    /// Takes the next piece: x [B, t, D] with its own targets, weight [C, D] of the same type, bias \[C\].
    pub fn feed(
        &mut self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        targets: &DeviceTargets,
    ) -> Result<()> {
        check_decoder(x.shape(), weight.shape(), bias.shape())?;
        let gpu = Gpu::of(x)?;
        let pass = Pass { x, weight, bias, targets, factor: None };
        pass.run(&gpu, &mut self.ballot, |_, _| Ok(()))?;
        Ok(())
    }

    pub fn finish(self) -> Result<Totals> {
        self.ballot.finish()
    }
}

struct Head {
    targets: Arc<DeviceTargets>,
    elements: usize,
    factor: Tensor,
    totals: Arc<Mutex<Option<Totals>>>,
}

struct Pass<'a> {
    x: &'a Tensor,
    weight: &'a Tensor,
    bias: &'a Tensor,
    targets: &'a DeviceTargets,
    factor: Option<&'a Tensor>,
}

/// A block of rows: the first, how many, and their logits, by then the gradient of the logits.
struct Block<'a> {
    first: usize,
    rows: usize,
    logits: &'a Tensor,
}

impl Pass<'_> {
    /// Logits, losses and votes block by block; `then` sees each block.
    fn run(
        &self,
        gpu: &Gpu,
        ballot: &mut Ballot,
        mut then: impl FnMut(&Gpu, &Block) -> Result<()>,
    ) -> Result<Option<Tensor>> {
        let (batch, steps, width) = self.x.dims3()?;
        let (classes, _) = self.weight.dims2()?;
        let ld = stride(classes);
        let losses = gpu.empty((batch, steps), DType::F32)?.into_tensor();
        let sequences = (ROWS_AT_ONCE / steps).clamp(1, batch);
        let x = Mat::of(gpu, self.x, width)?;
        let weight = Mat::of(gpu, self.weight, width)?;
        // One buffer for all blocks. Rows are read in whole vectors: what stands behind the last class is zero
        // from the start and stays so.
        let shape = (sequences * steps, ld);
        let dtype = self.x.dtype();
        let buffer =
            if ld == classes { gpu.empty(shape, dtype) } else { gpu.zeros(shape, dtype) }?.into_tensor();
        for b in (0..batch).step_by(sequences) {
            let count = sequences.min(batch - b);
            let (first, rows) = (b * steps, count * steps);
            let logits = buffer.narrow(0, 0, rows)?;
            let into = Mat::new(gpu.ptr(&logits)?, self.x.dtype(), rows, classes).stride(ld);
            gemm(gpu, x.rows(first, rows), weight.t(), into, false)?;
            ballot.rows(&logits, Some(self.bias), b, self.targets, self.factor, &losses)?;
            then(gpu, &Block { first, rows, logits: &logits })?;
        }
        ballot.end_piece(self.targets, &losses, self.factor)
    }
}

impl Node for Head {
    fn name(&self) -> &'static str {
        "head"
    }

    fn forward(&self, args: &[Tensor], save: bool) -> Result<Forward> {
        let (x, weight, bias) = (&args[0], &args[1], &args[2]);
        let gpu = Gpu::of(x)?;
        let (batch, _, width) = x.dims3()?;
        let (classes, _) = weight.dims2()?;
        let mut ballot = Ballot::new(&gpu, batch, self.elements, classes, false)?;
        let pass = Pass { x, weight, bias, targets: &self.targets, factor: Some(&self.factor) };
        let mut saved = vec![];
        let loss = if save {
            let dx = gpu.empty(x.shape(), x.dtype())?.into_tensor();
            let dw = gpu.empty((classes, width), DType::F32)?.into_tensor();
            let db = gpu.empty(classes, DType::F32)?.into_tensor();
            let mut bias_sums = BiasSums::new(&gpu, classes)?;
            let (x_mat, dx_mat) = (Mat::of(&gpu, x, width)?, Mat::of(&gpu, &dx, width)?);
            let (w_mat, dw_mat) = (Mat::of(&gpu, weight, width)?, Mat::of(&gpu, &dw, width)?);
            let loss = pass.run(&gpu, &mut ballot, |gpu, block| {
                bias_sums.add(block.logits)?;
                let ld = stride(classes);
                let dlogits = Mat::new(gpu.ptr(block.logits)?, x.dtype(), block.rows, classes).stride(ld);
                gemm(gpu, dlogits, w_mat, dx_mat.rows(block.first, block.rows), false)?;
                gemm(gpu, dlogits.t(), x_mat.rows(block.first, block.rows), dw_mat, block.first > 0)
            })?;
            bias_sums.finish(&db, false)?;
            saved = vec![dx, dw, db];
            loss
        } else {
            pass.run(&gpu, &mut ballot, |_, _| Ok(()))?
        };
        *self.totals.lock().expect("no task of this op has panicked") = Some(ballot.finish()?);
        let loss = loss.expect("a piece with a factor has a loss");
        Ok(Forward { outputs: vec![gpu.copy(&loss, ())?], saved })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let Some(upstream) = &grads[0] else { return Ok(vec![None; 3]) };
        let gpu = Gpu::of(upstream)?;
        for grad in &run.saved {
            scale(&gpu, grad, upstream)?;
        }
        Ok(run.saved.iter().cloned().map(Some).collect())
    }
}
