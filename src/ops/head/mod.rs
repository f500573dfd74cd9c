//! Decoder, cross-entropy and the vote of each element's window, without ever holding all logits.

#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(feature = "cuda")]
pub mod device;
mod reference;

use std::sync::{Arc, Mutex};

use candle_core::{Device, Result, Tensor};

use self::reference::{Gradient, ROWS_AT_ONCE};
use super::tape::{Arg, Forward, Node, Run, Value, apply};
use crate::{dispatch, slices};

/// In [`Targets::element`]: the step is padding, or nothing is asked there; without loss and without a vote.
pub const PAD: u32 = u32::MAX;

/// What the steps of a batch, or of a piece of it, should give.
#[derive(Clone, Debug)]
pub struct Targets {
    /// Class of every step, [B·T].
    pub labels: Vec<u32>,
    /// The element whose window a step belongs to, [B·T], ascending along time; [`PAD`] for padding.
    pub element: Vec<u32>,
    pub batch: usize,
    pub steps: usize,
    /// Elements of each sequence.
    pub elements: usize,
}

/// What [`head_cross_entropy`] gives.
pub struct HeadOutput {
    /// Σ cross-entropy over the valid steps / denominator; a differentiable scalar.
    pub loss: Tensor,
    /// The class that the window of (b, e) votes for, [B·E]; `u32::MAX` where it has no step.
    pub votes: Vec<u32>,
    /// Σ cross-entropy over the valid steps.
    pub loss_sum: f64,
}

impl Targets {
    fn check(&self, dims: &[usize], classes: usize) -> Result<()> {
        let rows = self.batch * self.steps;
        if dims.len() != 3 || dims[0] != self.batch || dims[1] != self.steps {
            candle_core::bail!("head: x has shape {dims:?}, the targets [{}, {}]", self.batch, self.steps)
        }
        if self.labels.len() != rows || self.element.len() != rows {
            candle_core::bail!(
                "head: {} labels and {} element indices for {rows} steps",
                self.labels.len(),
                self.element.len()
            )
        }
        for (&label, &element) in self.labels.iter().zip(&self.element) {
            if element != PAD && (label as usize >= classes || element as usize >= self.elements) {
                candle_core::bail!(
                    "head: label {label} of {classes} classes, element {element} of {}",
                    self.elements
                )
            }
        }
        Ok(())
    }
}

/// Cross-entropy of `softmax(x Wᵀ + b)` and the vote of every window.
///
/// x [B, T, D], weight [C, D], bias \[C\]. The loss is summed over the valid steps and divided by
/// `denominator` (their number in the whole batch). A window votes for the class with the largest sum of
/// probabilities over its steps, the first on ties. Logits exist for 2,048 steps at a time; the
/// gradients of x, weight and bias are formed beside them, so that they are computed once.
pub fn head_cross_entropy(
    x: impl Into<Arg>,
    weight: impl Into<Arg>,
    bias: impl Into<Arg>,
    targets: &Targets,
    denominator: f64,
) -> Result<HeadOutput> {
    let (x, weight, bias) = (x.into(), weight.into(), bias.into());
    let classes = check_decoder(&x.shape(), &weight.shape(), &bias.shape())?;
    targets.check(x.shape().dims(), classes)?;
    #[cfg(feature = "cuda")]
    if let Arg::Tensor(tensor) | Arg::View(tensor, _) = &x
        && tensor.device().is_cuda()
    {
        return device::from_host(x.clone(), weight, bias, targets, denominator);
    }
    let vote = Arc::new(Mutex::new(Vote::new(targets.batch, classes)));
    let node = Head { targets: targets.clone(), denominator, vote: vote.clone() };
    let loss = apply(node, &[x, weight, bias])?.remove(0);
    let mut vote = vote.lock().expect("no task of this op has panicked");
    let (votes, loss_sum, _) = std::mem::replace(&mut *vote, Vote::new(0, classes)).finish();
    Ok(HeadOutput { loss, votes, loss_sum })
}

/// Summed cross-entropy and votes of given logits [B, T, C].
pub fn loss_and_votes(logits: &Tensor, targets: &Targets) -> Result<(f64, Vec<u32>)> {
    let classes = logits.dim(candle_core::D::Minus1)?;
    targets.check(logits.dims(), classes)?;
    let logits = logits.contiguous()?;
    let mut vote = Vote::new(targets.batch, classes);
    vote.grow(targets);
    dispatch!(logits.dtype(), F => {
        slices!(F; logits = &logits);
        for first in (0..targets.labels.len()).step_by(ROWS_AT_ONCE) {
            let end = (first + ROWS_AT_ONCE).min(targets.labels.len());
            let mut rows = logits[first * classes..end * classes].to_vec();
            vote.take(targets, first, &mut rows);
        }
    });
    let (votes, loss_sum, _) = vote.finish();
    Ok((loss_sum, votes))
}

fn check_decoder(
    x: &candle_core::Shape,
    weight: &candle_core::Shape,
    bias: &candle_core::Shape,
) -> Result<usize> {
    let (classes, width) = weight.dims2()?;
    if x.dims().last() != Some(&width) || bias.elem_count() != classes || classes == 0 {
        candle_core::bail!("head: x {x:?}, weight {weight:?} and bias {bias:?} do not fit together")
    }
    Ok(classes)
}

/// Votes and loss of sequences that come in pieces along time.
///
/// Keeps one sum of probabilities per sequence, whatever the length; a window may cross pieces.
pub struct Vote {
    classes: usize,
    open: Vec<reference::Window>,
    votes: Vec<Vec<u32>>,
    loss: Vec<f64>,
    steps: usize,
}

impl Vote {
    pub fn new(batch: usize, classes: usize) -> Self {
        Self {
            classes,
            open: vec![reference::Window::default(); batch],
            votes: vec![vec![]; batch],
            loss: vec![0.0; batch],
            steps: 0,
        }
    }

    /// Takes the next piece: x [B, t, D] with its own targets, weight [C, D], bias \[C\].
    ///
    /// Votes are the same as in one piece, to the last bit of every probability.
    pub fn feed(&mut self, x: &Tensor, weight: &Tensor, bias: &Tensor, targets: &Targets) -> Result<()> {
        let classes = check_decoder(x.shape(), weight.shape(), bias.shape())?;
        if classes != self.classes || targets.batch != self.open.len() {
            candle_core::bail!(
                "head: a piece of {} sequences and {classes} classes, expected {} and {}",
                targets.batch,
                self.open.len(),
                self.classes
            )
        }
        targets.check(x.dims(), classes)?;
        self.grow(targets);
        let (x, weight, bias) = (x.contiguous()?, weight.contiguous()?, bias.contiguous()?);
        dispatch!(x.dtype(), F => {
            slices!(F; x = &x, w = &weight, b = &bias);
            reference::run(x, w, b, targets, self, None);
        });
        Ok(())
    }

    /// The votes [B·E] (`u32::MAX` for a window without a step), the summed loss, and the valid steps.
    pub fn finish(mut self) -> (Vec<u32>, f64, usize) {
        for (window, votes) in self.open.iter_mut().zip(&mut self.votes) {
            window.close(votes);
        }
        (self.votes.concat(), self.loss.iter().sum(), self.steps)
    }

    /// Makes room for the votes of all elements.
    fn grow(&mut self, targets: &Targets) {
        for votes in &mut self.votes {
            votes.resize(targets.elements.max(votes.len()), u32::MAX);
        }
    }
}

struct Head {
    targets: Targets,
    denominator: f64,
    vote: Arc<Mutex<Vote>>,
}

impl Node for Head {
    fn name(&self) -> &'static str {
        "head"
    }

    fn forward(&self, args: &[Tensor], save: bool) -> Result<Forward> {
        let mut vote = self.vote.lock().expect("no task of this op has panicked");
        vote.grow(&self.targets);
        dispatch!(args[0].dtype(), F => {
            slices!(F; x = &args[0], w = &args[1], b = &args[2]);
            let mut gradient = save.then(|| Gradient::<F>::new(x.len(), w.len(), b.len(), self.denominator));
            reference::run(x, w, b, &self.targets, &mut vote, gradient.as_mut());
            let loss = vote.loss.iter().sum::<f64>() / self.denominator;
            let saved = match gradient {
                Some(gradient) => vec![
                    Tensor::from_vec(gradient.x, args[0].shape(), &Device::Cpu)?,
                    Tensor::from_vec(gradient.w, args[1].shape(), &Device::Cpu)?,
                    Tensor::from_vec(gradient.b, args[2].shape(), &Device::Cpu)?,
                ],
                None => vec![],
            };
            Ok(Forward { outputs: vec![Value::cpu(vec![loss as F], ())], saved })
        })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let Some(scale) = &grads[0] else { return Ok(vec![None; 3]) };
        let scale = scale.to_dtype(candle_core::DType::F64)?.to_scalar::<f64>()?;
        let scaled = |grad: &Tensor| if scale == 1.0 { Ok(grad.clone()) } else { grad * scale };
        run.saved.iter().map(|grad| scaled(grad).map(Some)).collect()
    }
}
