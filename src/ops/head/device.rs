//! The head on a GPU: decoder, loss, votes and their gradients over blocks of sequences.

use std::sync::{Arc, Mutex};

use candle_core::{DType, Result, Tensor};

use super::cuda::{Ballot, BiasSums, DeviceTargets, Totals, stride};
use super::{HeadOutput, Targets, check_decoder};
use crate::cuda::Gpu;
use crate::ops::linear::cuda::{Mat, gemm, scale};
use crate::ops::tape::{Arg, Forward, Node, Run, apply};
use crate::ops::upload::upload;

/// Logits that exist at the same time, about. Many: with few rows the products and the passes between them do not
/// fill a GPU, which costs more than that the logits leave its cache.
const LOGITS_AT_ONCE: usize = 1 << 26;

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
        let pass = Pass { x, weight: &padded(&gpu, weight)?, bias, targets, factor: None };
        pass.run(&gpu, &mut self.ballot, None, |_| Ok(()))?;
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

/// The weight [C, D] with rows of zeros up to the stride of the logits: an odd number of classes costs cuBLAS's
/// products more than half of their speed.
fn padded(gpu: &Gpu, weight: &Tensor) -> Result<Tensor> {
    let (classes, width) = weight.dims2()?;
    match stride(classes) {
        ld if ld == classes => Ok(weight.clone()),
        ld => Ok(gpu.copy(weight, (ld, width))?.into_tensor()),
    }
}

struct Pass<'a> {
    x: &'a Tensor,
    /// As [`padded`] gives it.
    weight: &'a Tensor,
    bias: &'a Tensor,
    targets: &'a DeviceTargets,
    factor: Option<&'a Tensor>,
}

/// A block of rows: the first, how many, and their logits, by then the gradient of the logits.
struct Block {
    first: usize,
    rows: usize,
    logits: Mat,
}

impl Pass<'_> {
    /// Sequences whose logits exist at the same time: as many in every block, but for the last.
    fn sequences(&self) -> Result<usize> {
        let (batch, steps, _) = self.x.dims3()?;
        let most = (LOGITS_AT_ONCE / (steps * self.weight.dim(0)?).max(1)).clamp(1, batch.max(1));
        Ok(batch.div_ceil(batch.div_ceil(most).max(1)))
    }

    /// Logits, losses and votes block by block; `then` sees each block.
    fn run(
        &self,
        gpu: &Gpu,
        ballot: &mut Ballot,
        mut sums: Option<&mut BiasSums>,
        mut then: impl FnMut(Block) -> Result<()>,
    ) -> Result<Option<Tensor>> {
        let (batch, steps, width) = self.x.dims3()?;
        let ld = self.weight.dim(0)?;
        let losses = gpu.empty((batch, steps), DType::F32)?.into_tensor();
        let sequences = self.sequences()?;
        let x = Mat::of(gpu, self.x, width)?;
        let weight = Mat::of(gpu, self.weight, width)?;
        // One buffer for all blocks.
        let buffer = gpu.empty((sequences * steps, ld), self.x.dtype())?.into_tensor();
        for b in (0..batch).step_by(sequences.max(1)) {
            let count = sequences.min(batch - b);
            let (first, rows) = (b * steps, count * steps);
            let tensor = buffer.narrow(0, 0, rows)?;
            let logits = Mat::of(gpu, &tensor, ld)?;
            gemm(gpu, x.rows(first, rows), weight.t(), logits, false)?;
            let sums = sums.as_deref_mut();
            ballot.rows(&tensor, Some(self.bias), b, self.targets, self.factor, &losses, sums)?;
            then(Block { first, rows, logits })?;
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
        let (batch, steps, width) = x.dims3()?;
        let (classes, _) = weight.dims2()?;
        let mut ballot = Ballot::new(&gpu, batch, self.elements, classes, false)?;
        let weight = &padded(&gpu, weight)?;
        let pass = Pass { x, weight, bias, targets: &self.targets, factor: Some(&self.factor) };
        let mut saved = vec![];
        let loss = if save {
            let ld = weight.dim(0)?;
            let dx = gpu.empty(x.shape(), x.dtype())?.into_tensor();
            let dw = gpu.empty((ld, width), DType::F32)?.into_tensor();
            let db = gpu.empty(classes, DType::F32)?.into_tensor();
            let mut sums = BiasSums::new(&gpu, classes, pass.sequences()? * steps)?;
            let (x_mat, dx_mat) = (Mat::of(&gpu, x, width)?, Mat::of(&gpu, &dx, width)?);
            let (w_mat, dw_mat) = (Mat::of(&gpu, weight, width)?, Mat::of(&gpu, &dw, width)?);
            let loss = pass.run(&gpu, &mut ballot, Some(&mut sums), |Block { first, rows, logits }| {
                gemm(&gpu, logits, w_mat, dx_mat.rows(first, rows), false)?;
                gemm(&gpu, logits.t(), x_mat.rows(first, rows), dw_mat, first > 0)
            })?;
            sums.finish(&db)?;
            saved = vec![dx, dw.narrow(0, 0, classes)?, db];
            loss
        } else {
            pass.run(&gpu, &mut ballot, None, |_| Ok(()))?
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
