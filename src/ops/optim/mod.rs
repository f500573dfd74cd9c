//! Gradient norm, clipping, and Adam over flat buffers.

#[cfg(feature = "cuda")]
pub mod cuda;

use candle_core::{CpuStorage, InplaceOp3, Layout, Result, Tensor};
use rayon::prelude::*;

use super::real::Real;
use crate::{dispatch, slices};

/// Elements that one task works through; fixed, so that sums do not depend on the number of threads.
const BLOCK: usize = 1 << 14;

/// The Euclidean norm of all elements, summed in f64. NaN and infinities come through.
///
/// On a GPU this waits for the result; see `cuda::sum_of_squares` for one that stays there.
pub fn global_norm(grad: &Tensor) -> Result<f64> {
    #[cfg(feature = "cuda")]
    if grad.device().is_cuda() {
        return Ok(cuda::sum_of_squares(&grad.contiguous()?)?.to_vec1::<f64>()?[0].sqrt());
    }
    let squares: Vec<f64> = dispatch!(grad.dtype(), F => {
        slices!(F; grad = grad);
        grad.par_chunks(BLOCK).map(sum_of_squares).collect()
    });
    Ok(squares.iter().sum::<f64>().sqrt())
}

fn sum_of_squares<F: Real>(x: &[F]) -> f64 {
    let mut lanes = [0.0; 8];
    for chunk in x.chunks(8) {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += x.as_f64() * x.as_f64();
        }
    }
    lanes.iter().sum()
}

/// What to multiply gradients of this norm with so that their norm is at most `max`; NaN for NaN.
///
/// As PyTorch's `clip_grad_norm_`: min(1, max / (norm + 1e-6)).
pub fn clip_scale(norm: f64, max: f64) -> f64 {
    let scale = max / (norm + 1e-6);
    if scale > 1.0 { 1.0 } else { scale }
}

/// One update of Adam or AdamW, by PyTorch's formulas.
///
/// Source: Kingma and Ba, "Adam: a method for stochastic optimization", 2015; Loshchilov and Hutter,
/// "Decoupled weight decay regularization", 2019.
#[derive(Clone, Copy, Debug)]
pub struct AdamStep {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    /// Added after the root of the bias-corrected second moment.
    pub eps: f64,
    pub weight_decay: f64,
    /// True: the decay shrinks the values (AdamW). False: it is added to the gradient (Adam).
    pub decoupled: bool,
    /// Number of this update, from 1.
    pub step: u64,
    /// Every gradient is multiplied with this first (clipping).
    pub grad_scale: f64,
}

impl AdamStep {
    /// Updates `value` and the moments `m` and `v` in place; all flat, of the same length and dtype.
    pub fn apply(&self, value: &Tensor, grad: &Tensor, m: &Tensor, v: &Tensor) -> Result<()> {
        if self.step == 0 {
            candle_core::bail!("adam: updates are numbered from 1")
        }
        let n = value.elem_count();
        if [grad, m, v].iter().any(|x| x.elem_count() != n) {
            candle_core::bail!(
                "adam: {n} values, {} gradients, {} and {} moments",
                grad.elem_count(),
                m.elem_count(),
                v.elem_count()
            )
        }
        #[cfg(feature = "cuda")]
        if value.device().is_cuda() {
            return cuda::apply(self, &cuda::Flat { value, grad, m, v, shadow: None });
        }
        // Candle's in-place operations write one tensor each.
        m.inplace_op3(grad, value, &Part::First(*self))?;
        v.inplace_op3(grad, value, &Part::Second(*self))?;
        value.inplace_op3(m, v, &Part::Value(*self))
    }
}

/// One of the three tensors that an update writes.
enum Part {
    /// m ← m + (1−β₁)(g − m), from gradient and value.
    First(AdamStep),
    /// v ← β₂ v + (1−β₂) g², from gradient and value.
    Second(AdamStep),
    /// value ← value − lr m̂ / (√v̂ + eps), from the moments.
    Value(AdamStep),
}

impl Part {
    fn run<F: Real>(&self, dst: &mut [F], a: &[F], b: &[F]) {
        match self {
            Part::First(step) => {
                let (scale, decay, rate) = (F::of(step.grad_scale), step.l2::<F>(), F::of(1.0 - step.beta1));
                each(dst, a, b, |m, grad, value| *m += rate * (grad * scale + decay * value - *m));
            }
            Part::Second(step) => {
                let (scale, decay) = (F::of(step.grad_scale), step.l2::<F>());
                let (beta, rate) = (F::of(step.beta2), F::of(1.0 - step.beta2));
                each(dst, a, b, |v, grad, value| {
                    let grad = grad * scale + decay * value;
                    *v = *v * beta + rate * grad * grad;
                });
            }
            Part::Value(step) => {
                let [size, root, keep] = step.factors().map(F::of);
                let eps = F::of(step.eps);
                each(dst, a, b, |value, m, v| {
                    *value = *value * keep - size * (m / (v.sqrt() / root + eps));
                });
            }
        }
    }
}

/// `f` on every element of `dst` with those of `a` and `b`.
fn each<F: Real>(dst: &mut [F], a: &[F], b: &[F], f: impl Fn(&mut F, F, F) + Sync) {
    dst.par_chunks_mut(BLOCK).zip(a.par_chunks(BLOCK)).zip(b.par_chunks(BLOCK)).for_each(|((dst, a), b)| {
        for ((dst, &a), &b) in dst.iter_mut().zip(a).zip(b) {
            f(dst, a, b);
        }
    });
}

impl AdamStep {
    /// The decay that is added to the gradient.
    fn l2<F: Real>(&self) -> F {
        F::of(if self.decoupled { 0.0 } else { self.weight_decay })
    }

    /// What depends on the step: lr / (1−β₁ᵗ), √(1−β₂ᵗ), and what values are multiplied with.
    fn factors(&self) -> [f64; 3] {
        let count = self.step as f64;
        [
            self.lr / (1.0 - self.beta1.powf(count)),
            (1.0 - self.beta2.powf(count)).sqrt(),
            if self.decoupled { 1.0 - self.lr * self.weight_decay } else { 1.0 },
        ]
    }
}

impl InplaceOp3 for Part {
    fn name(&self) -> &'static str {
        "adam"
    }

    fn cpu_fwd(
        &self,
        dst: &mut CpuStorage,
        dst_layout: &Layout,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<()> {
        let (Some(dst_range), Some(a_range), Some(b_range)) =
            (dst_layout.contiguous_offsets(), a_layout.contiguous_offsets(), b_layout.contiguous_offsets())
        else {
            candle_core::bail!("adam: expected contiguous tensors")
        };
        macro_rules! run {
            ($dst:ident, $a:ident, $b:ident) => {
                self.run(
                    &mut $dst[dst_range.0..dst_range.1],
                    &$a[a_range.0..a_range.1],
                    &$b[b_range.0..b_range.1],
                )
            };
        }
        match (dst, a, b) {
            (CpuStorage::F32(dst), CpuStorage::F32(a), CpuStorage::F32(b)) => run!(dst, a, b),
            (CpuStorage::F64(dst), CpuStorage::F64(a), CpuStorage::F64(b)) => run!(dst, a, b),
            _ => candle_core::bail!("adam: expected values, gradients and moments all in f32 or all in f64"),
        }
        Ok(())
    }
}
