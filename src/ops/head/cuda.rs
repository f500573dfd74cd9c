//! Launching `kernels/head.cu`: what lies between the matrix products of the head.
//!
//! ```text
//! let mut ballot = Ballot::new(&gpu, batch, elements, classes, streaming)?;    // once per batch
//! let scale = valid_scale(&targets)?;                                          // 1 / valid steps, on the device
//! let losses = gpu.empty((batch, steps), F32)?;                                // once per piece
//! for sequences b0..b1 {
//!     let logits = x[b0·T .. b1·T] Wᵀ;                                         // [rows, stride(C)], without bias
//!     ballot.rows(&logits, bias, b0, &targets, Some(&scale), &losses, sums)?;  // logits become dlogits
//!     dx[b0·T .. b1·T] = dlogits W;  dW += dlogitsᵀ x;
//! }
//! let loss = ballot.end_piece(&targets, &losses, Some(&scale))?;
//! sums.finish(&dbias)?;
//! let totals = ballot.finish()?;
//! ```
//!
//! A block of rows is some sequences with all steps of the piece, so that a window is whole or goes over the
//! edge of a piece. Nothing here waits for the GPU; the totals are read when somebody wants them.

use candle_core::{DType, Result, Tensor};

use crate::cuda::{Gpu, KernelArg, Launch, NULL, kernels, suffix};
use crate::ops::tape::Value;
use crate::ops::upload::{Landing, write};

/// Classes that the kernels have threads for.
const MOST_CLASSES: usize = 4096;

/// The row stride of logits: their rows begin at 16 bytes, and cuBLAS has fast kernels for no other.
/// Columns beyond the classes are finite numbers, which count for nothing, and zero in the gradient.
pub fn stride(classes: usize) -> usize {
    classes.next_multiple_of(8)
}

/// What the steps of a batch, or of a piece of it, should give; [`Targets`](super::Targets) on the device.
pub struct DeviceTargets {
    /// Class of every step, u32 [B, T].
    pub labels: Tensor,
    /// The element whose window a step belongs to, u32 [B, T], ascending along time; [`PAD`](super::PAD) for
    /// padding.
    pub element: Tensor,
}

impl DeviceTargets {
    fn dims(&self) -> Result<(usize, usize)> {
        self.element.dims2()
    }
}

/// 1 / the number of valid steps, f32 [1]: what a mean loss's gradient is multiplied with.
pub fn valid_scale(targets: &DeviceTargets) -> Result<Tensor> {
    let gpu = Gpu::of(&targets.element)?;
    let scale = gpu.empty(1, DType::F32)?.into_tensor();
    let params = [gpu.ptr(&targets.element)?, gpu.ptr(&scale)?, (targets.element.elem_count() as i64).into()];
    gpu.launch(&kernels::HEAD, "head_scale", Launch::new(1, 1024), &params)?;
    Ok(scale)
}

/// Votes and losses of a batch, on the device.
pub struct Ballot {
    gpu: Gpu,
    batch: usize,
    elements: usize,
    classes: usize,
    votes: Tensor,
    answers: Tensor,
    /// Open windows at the beginning and at the end of a piece, unless sequences come whole.
    carry: Option<[Carry; 2]>,
    loss_sum: Tensor,
    steps: Tensor,
    /// Whether a piece has ended.
    begun: bool,
}

/// The open window of every sequence.
struct Carry {
    /// Sums of its probabilities, f32 [B, C].
    sum: Tensor,
    /// Its element, PAD for none, and its label, u32 [2, B].
    state: Tensor,
}

/// What [`Ballot::finish`] gives, on the device.
pub struct Totals {
    /// Σ cross-entropy over the valid steps, f64 [1].
    pub loss_sum: Tensor,
    /// Valid steps, u32 [1].
    pub steps: Tensor,
    /// Windows whose vote is their label, and all windows, u32 [2].
    pub counts: Tensor,
    /// The class that the window of (b, e) votes for, u32 [B, E]; PAD where it has no step.
    pub votes: Tensor,
}

impl Ballot {
    /// For `batch` sequences of at most `elements` elements; `pieces`: they come piece by piece.
    pub fn new(gpu: &Gpu, batch: usize, elements: usize, classes: usize, pieces: bool) -> Result<Self> {
        if classes > MOST_CLASSES {
            candle_core::bail!("head on a GPU: at most {MOST_CLASSES} classes, got {classes}")
        }
        let padded = |shape| -> Result<Tensor> {
            let tensor = gpu.empty(shape, DType::U32)?.into_tensor();
            let n = tensor.elem_count();
            let launch = Launch::new(n.div_ceil(256).min(4 * gpu.multiprocessors()), 256);
            gpu.launch(&kernels::HEAD, "head_fill", launch, &[gpu.ptr(&tensor)?, (n as i64).into()])?;
            Ok(tensor)
        };
        let carry = || -> Result<Carry> {
            let sum = gpu.empty((batch, classes), DType::F32)?.into_tensor();
            Ok(Carry { sum, state: padded((2, batch))? })
        };
        Ok(Self {
            gpu: gpu.clone(),
            batch,
            elements,
            classes,
            votes: padded((batch, elements))?,
            answers: padded((batch, elements))?,
            carry: if pieces { Some([carry()?, carry()?]) } else { None },
            loss_sum: gpu.empty(1, DType::F64)?.into_tensor(),
            steps: gpu.empty(1, DType::U32)?.into_tensor(),
            begun: false,
        })
    }

    /// Takes the logits [rows, stride] of the sequences from `first` on, all steps of the piece of each: adds
    /// to the windows, writes `losses` [B, T] and, given the `scale` of the gradient, f32 [1], turns the
    /// logits into their gradient, whose columns are added to `sums`.
    ///
    /// `bias` f32 \[C\] is added to logits that lack it. `logits` must own its memory.
    #[expect(clippy::too_many_arguments)]
    pub fn rows(
        &self,
        logits: &Tensor,
        bias: Option<&Tensor>,
        first: usize,
        targets: &DeviceTargets,
        scale: Option<&Tensor>,
        losses: &Tensor,
        sums: Option<&mut BiasSums>,
    ) -> Result<()> {
        let (gpu, (batch, steps), (rows, ld)) = (&self.gpu, targets.dims()?, logits.dims2()?);
        if batch != self.batch
            || ld != stride(self.classes)
            || rows % steps != 0
            || first + rows / steps > batch
        {
            candle_core::bail!(
                "head: logits {:?} for sequences from {first} of [{batch}, {steps}], {} classes",
                logits.shape(),
                self.classes
            )
        }
        let mut params = vec![gpu.ptr(logits)?, ld.into(), gpu.ptr_or_null(bias)?];
        params.extend([gpu.ptr(&targets.labels)?, gpu.ptr(&targets.element)?, gpu.ptr_or_null(scale)?]);
        params.extend([gpu.ptr(losses)?, gpu.ptr(&self.votes)?, gpu.ptr(&self.answers)?]);
        match &self.carry {
            Some(carry) => {
                for Carry { sum, state } in carry {
                    params.extend([gpu.ptr(sum)?, gpu.ptr(state)?]);
                }
            }
            None => params.extend([NULL; 4]),
        }
        let (threads, slab) = (threads(self.classes), slab(gpu, self.classes, rows));
        let (partial, more) = match sums {
            Some(sums) => (gpu.of_value(&sums.partial)?, std::mem::replace(&mut sums.begun, true)),
            None => (NULL, false),
        };
        params.extend([partial, i32::from(more).into()]);
        let sizes = [first, rows, slab, batch, steps, self.elements, self.classes];
        params.extend(sizes.map(KernelArg::from));
        let name = format!("head_rows_{threads}_{}", suffix(logits.dtype())?);
        // A thread has 16 columns of the bias and of four rows there.
        let shared = threads as usize * 16 * (4 + 4 * logits.dtype().size_in_bytes());
        gpu.launch(&kernels::HEAD, &name, Launch::new(rows.div_ceil(slab), threads).shared(shared), &params)
    }

    /// Ends a piece: adds its `losses` up, and gives their sum times `scale`, f32 [1], if there is one.
    pub fn end_piece(
        &mut self,
        targets: &DeviceTargets,
        losses: &Tensor,
        scale: Option<&Tensor>,
    ) -> Result<Option<Tensor>> {
        let gpu = &self.gpu;
        let loss = scale.map(|_| gpu.empty(1, DType::F32)).transpose()?.map(|value| value.into_tensor());
        let params = [
            gpu.ptr(losses)?,
            gpu.ptr(&targets.element)?,
            gpu.ptr_or_null(scale)?,
            gpu.ptr(&self.loss_sum)?,
            gpu.ptr(&self.steps)?,
            gpu.ptr_or_null(loss.as_ref())?,
            (losses.elem_count() as i64).into(),
            i32::from(self.begun).into(),
        ];
        gpu.launch(&kernels::HEAD, "head_loss", Launch::new(1, 1024), &params)?;
        self.begun = true;
        if let Some(carry) = &mut self.carry {
            carry.reverse();
        }
        Ok(loss)
    }

    /// Closes the open windows and counts the votes. At least one piece has ended.
    pub fn finish(self) -> Result<Totals> {
        let gpu = &self.gpu;
        let (votes, answers) = (gpu.ptr(&self.votes)?, gpu.ptr(&self.answers)?);
        if let Some([Carry { sum, state }, _]) = &self.carry {
            let params =
                [gpu.ptr(sum)?, gpu.ptr(state)?, votes, answers, self.elements.into(), self.classes.into()];
            gpu.launch(&kernels::HEAD, "head_flush", Launch::new(self.batch, 256), &params)?;
        }
        let counts = gpu.empty(2, DType::U32)?.into_tensor();
        let windows = (self.batch * self.elements) as i64;
        let params = [votes, answers, gpu.ptr(&counts)?, windows.into(), 0i32.into()];
        gpu.launch(&kernels::HEAD, "head_count", Launch::new(1, 1024), &params)?;
        Ok(Totals { loss_sum: self.loss_sum, steps: self.steps, counts, votes: self.votes })
    }
}

/// [`Totals`] side by side, so that the host waits once; two reports may be on their way to it.
pub struct Report {
    /// As `head_report` writes them.
    numbers: Tensor,
    landings: [Landing; 2],
    /// The report that is sent next, and the one that is received next.
    turns: [usize; 2],
}

impl Report {
    /// Numbers of a report.
    const COUNT: usize = 6;

    pub fn new(gpu: &Gpu) -> Result<Self> {
        let numbers = gpu.zeros(Self::COUNT, DType::F64)?.into_tensor();
        let landing = || Landing::new(gpu, Self::COUNT);
        Ok(Self { numbers, landings: [landing()?, landing()?], turns: [0; 2] })
    }

    /// One number, not zero from the first report on whose loss or other number is not finite, until [`Report::clear`].
    pub fn halted(&self) -> Result<Tensor> {
        self.numbers.narrow(0, 5, 1)
    }

    /// Forgets everything.
    pub fn clear(&self) -> Result<()> {
        write(&Gpu::of(&self.numbers)?, &[0f64; Self::COUNT], &self.numbers)
    }

    /// Takes totals, `more`: adds them to those before; and one number besides, f64 [1].
    pub fn add(&self, totals: &Totals, other: Option<&Tensor>, more: bool) -> Result<()> {
        let gpu = Gpu::of(&self.numbers)?;
        let params = [
            gpu.ptr(&totals.loss_sum)?,
            gpu.ptr(&totals.steps)?,
            gpu.ptr(&totals.counts)?,
            gpu.ptr_or_null(other)?,
            gpu.ptr(&self.numbers)?,
            i32::from(more).into(),
        ];
        gpu.launch(&kernels::HEAD, "head_report", Launch::new(1, 1), &params)
    }

    /// Sends what was launched so far on its way.
    pub fn send(&mut self) -> Result<()> {
        let [send, receive] = self.turns;
        if send - receive == self.landings.len() {
            candle_core::bail!("a third report would be on its way")
        }
        self.turns[0] += 1;
        self.landings[send % 2].start(&self.numbers)
    }

    /// Waits for the oldest on its way: the sum of the losses, valid steps, right windows, all windows; and the number
    /// besides.
    pub fn receive(&mut self) -> Result<([f64; 4], f64)> {
        let [send, receive] = self.turns;
        if send == receive {
            candle_core::bail!("no report is on its way")
        }
        self.turns[1] += 1;
        let numbers = self.landings[receive % 2].wait()?;
        Ok(([numbers[0], numbers[1], numbers[2], numbers[3]], numbers[4]))
    }
}

/// Threads of a row: one for 16 columns.
fn threads(classes: usize) -> u32 {
    stride(classes).div_ceil(16).next_power_of_two().max(32) as u32
}

/// Rows of a block, so that all blocks run at the same time, with the threads that a multiprocessor of compute
/// capability 9.0 has room for.
fn slab(gpu: &Gpu, classes: usize, rows: usize) -> usize {
    const THREADS_AT_ONCE: usize = 640;
    rows.div_ceil(gpu.multiprocessors() * THREADS_AT_ONCE / threads(classes) as usize)
}

/// The gradient of the bias: column sums of dlogits over all blocks of rows.
pub struct BiasSums {
    /// [slabs, C]
    partial: Value,
    slabs: usize,
    classes: usize,
    begun: bool,
}

impl BiasSums {
    /// For blocks of at most `rows` rows, the first of which has that many.
    pub fn new(gpu: &Gpu, classes: usize, rows: usize) -> Result<Self> {
        let slabs = rows.div_ceil(slab(gpu, classes, rows));
        let partial = gpu.empty((slabs, classes), DType::F32)?;
        Ok(Self { partial, slabs, classes, begun: false })
    }

    /// Writes the sums to `dbias`, f32 \[C\].
    pub fn finish(self, dbias: &Tensor) -> Result<()> {
        let gpu = Gpu::of(dbias)?;
        let params = [gpu.of_value(&self.partial)?, gpu.ptr(dbias)?, self.slabs.into(), self.classes.into()];
        gpu.launch(&kernels::HEAD, "head_bias", Launch::new(self.classes.div_ceil(32), 1024), &params)
    }
}
