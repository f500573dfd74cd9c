//! RMS norm of queries or keys per head, then rotation by position.

use candle_core::{Device, Result, Tensor};

use crate::ops::real::{Real, dot};
use crate::ops::rows::{fill_blocks, map_rows, sum_parts};
use crate::ops::tape::{Arg, Forward, Node, Run, Value, apply};
use crate::{dispatch, slices};

/// Added to the root mean square, outside the root.
const EPS: f64 = 1e-8;

/// w ⊙ x / (√(mean x²) + 1e-8) per head, then rotary position embedding.
///
/// x [B, T, H, D] with D even, w \[D\]; gives [B, T, H, D]. The halves (x₁, x₂) of a head turn by
/// θ = (offset + t) · base^(−2i/D): y₁ = x₁ cos θ + x₂ sin θ, y₂ = −x₁ sin θ + x₂ cos θ, the sign of the
/// authors' released code (the opposite of the usual one). `offset` is the position of the first step.
/// Source: Su et al., "RoFormer", 2021.
pub fn qk_norm_rope(x: impl Into<Arg>, w: impl Into<Arg>, base: f64, offset: usize) -> Result<Tensor> {
    let (x, w) = (x.into(), w.into());
    let (_, steps, heads, dim) = x.shape().dims4()?;
    check_dim(dim)?;
    if w.shape().elem_count() != dim {
        candle_core::bail!("attention: the norm's weight has shape {:?}, expected [{dim}]", w.shape())
    }
    Ok(apply(QkNormRope(Turn { steps, heads, dim, base, offset }), &[x, w])?.remove(0))
}

/// Rotary position embedding alone.
///
/// x [B, T, H, D] with D even; gives [B, T, H, D]. The halves (x₁, x₂) of a head turn by θ as in
/// [`qk_norm_rope`], with the usual sign: y₁ = x₁ cos θ − x₂ sin θ, y₂ = x₁ sin θ + x₂ cos θ.
pub fn rope(x: impl Into<Arg>, base: f64, offset: usize) -> Result<Tensor> {
    let x = x.into();
    let (_, steps, heads, dim) = x.shape().dims4()?;
    check_dim(dim)?;
    Ok(apply(Rope(Turn { steps, heads, dim, base, offset }), &[x])?.remove(0))
}

fn check_dim(dim: usize) -> Result<()> {
    if dim == 0 || !dim.is_multiple_of(2) {
        candle_core::bail!("attention: rotary embedding needs an even head dimension, got {dim}")
    }
    Ok(())
}

/// Rows of heads, and by how much they turn.
#[derive(Clone, Copy)]
pub(super) struct Turn {
    pub steps: usize,
    pub heads: usize,
    pub dim: usize,
    pub base: f64,
    pub offset: usize,
}

struct Rope(Turn);

impl Rope {
    /// Turns every head; `sign` −1 turns back.
    fn turned(&self, x: &Tensor, sign: f64) -> Result<Value> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return self.0.rope(x, sign);
        }
        Ok(dispatch!(x.dtype(), F => {
            slices!(F; values = x);
            let (dim, angles) = (self.0.dim, self.0.angles::<F>());
            let y = map_rows(values.len() / dim, dim, |row, y: &mut [F]| {
                y.copy_from_slice(&values[row * dim..(row + 1) * dim]);
                let (cos, sin) = self.0.angle(&angles, row);
                turn(y, cos, sin, F::of(-sign));
            });
            Value::cpu(y, x.shape())
        }))
    }
}

impl Node for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn forward(&self, args: &[Tensor], _: bool) -> Result<Forward> {
        Ok(Forward { outputs: vec![self.turned(&args[0], 1.0)?], saved: vec![] })
    }

    fn backward(&self, _: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let Some(dy) = &grads[0] else { return Ok(vec![None]) };
        // The transpose of a rotation turns back.
        let dx = self.turned(dy, -1.0)?;
        Ok(vec![Some(dx.into_tensor())])
    }
}

struct QkNormRope(Turn);

impl Turn {
    /// cos and sin of every step and pair, [T, D] with the cosines of a step first.
    fn angles<F: Real>(&self) -> Vec<F> {
        let half = self.dim / 2;
        map_rows(self.steps, self.dim, |t, row: &mut [F]| {
            let (cos, sin) = row.split_at_mut(half);
            for (i, (cos, sin)) in cos.iter_mut().zip(sin).enumerate() {
                let frequency = self.base.powf(-2.0 * i as f64 / self.dim as f64);
                let (s, c) = ((self.offset + t) as f64 * frequency).sin_cos();
                (*cos, *sin) = (F::of(c), F::of(s));
            }
        })
    }

    fn angle<'a, F>(&self, angles: &'a [F], row: usize) -> (&'a [F], &'a [F]) {
        let t = row / self.heads % self.steps;
        angles[t * self.dim..(t + 1) * self.dim].split_at(self.dim / 2)
    }
}

impl QkNormRope {
    fn run<F: Real>(&self, x: &[F], w: &[F]) -> Vec<F> {
        let (dim, angles) = (self.0.dim, self.0.angles::<F>());
        map_rows(x.len() / dim, dim, |row, y: &mut [F]| {
            let x = &x[row * dim..(row + 1) * dim];
            let (r, _) = rms(x);
            for ((y, &x), &w) in y.iter_mut().zip(x).zip(w) {
                *y = x * r * w;
            }
            let (cos, sin) = self.0.angle(&angles, row);
            turn(y, cos, sin, F::one());
        })
    }

    /// Gradients of x and w.
    fn run_backward<F: Real>(&self, x: &[F], w: &[F], dy: &[F]) -> (Vec<F>, Vec<F>) {
        let (dim, angles) = (self.0.dim, self.0.angles::<F>());
        let mut dx = dy.to_vec();
        let parts = fill_blocks(&mut dx, dim, |first, block| {
            let mut dw = vec![F::zero(); dim];
            for (i, dx) in block.chunks_exact_mut(dim).enumerate() {
                let row = first + i;
                let x = &x[row * dim..(row + 1) * dim];
                let (cos, sin) = self.0.angle(&angles, row);
                // The transpose of a rotation turns back.
                turn(dx, cos, sin, -F::one());
                let (r, c) = rms(x);
                for (((dx, dw), &x), &w) in dx.iter_mut().zip(&mut dw).zip(x).zip(w) {
                    *dw = dx.fma(x * r, *dw);
                    *dx *= w;
                }
                let along = c * dot(dx, x);
                for (dx, &x) in dx.iter_mut().zip(x) {
                    *dx = r * *dx - x * along;
                }
            }
            dw
        });
        (dx, sum_parts(&parts, dim))
    }
}

/// r = 1 / (√(mean x²) + eps), and c with dr/dx = −c x (zero at x = 0, where the root has no derivative).
fn rms<F: Real>(x: &[F]) -> (F, F) {
    let n = F::of(x.len() as f64);
    let root = (dot(x, x) / n).sqrt();
    let r = F::one() / (root + F::of(EPS));
    (r, if root > F::zero() { r * r / (n * root) } else { F::zero() })
}

/// Turns the halves of `x`; `sign` −1 turns back.
fn turn<F: Real>(x: &mut [F], cos: &[F], sin: &[F], sign: F) {
    let (a, b) = x.split_at_mut(cos.len());
    for (((a, b), &cos), &sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
        let sin = sign * sin;
        (*a, *b) = (*a * cos + *b * sin, *b * cos - *a * sin);
    }
}

impl Node for QkNormRope {
    fn name(&self) -> &'static str {
        "qk_norm_rope"
    }

    fn forward(&self, args: &[Tensor], _: bool) -> Result<Forward> {
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            return self.0.forward(&args[0], &args[1]);
        }
        let value = dispatch!(args[0].dtype(), F => {
            slices!(F; x = &args[0], w = &args[1]);
            Value::cpu(self.run(x, w), args[0].shape())
        });
        Ok(Forward { outputs: vec![value], saved: vec![] })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let (args, Some(dy)) = (&run.args, &grads[0]) else { return Ok(vec![None; 2]) };
        #[cfg(feature = "cuda")]
        if dy.device().is_cuda() {
            return self.0.backward(run, dy);
        }
        dispatch!(dy.dtype(), F => {
            slices!(F; x = &args[0], w = &args[1], dy = dy);
            let (dx, dw) = self.run_backward(x, w, dy);
            Ok(vec![
                Some(Tensor::from_vec(dx, args[0].shape(), &Device::Cpu)?),
                Some(Tensor::from_vec(dw, args[1].shape(), &Device::Cpu)?),
            ])
        })
    }
}
