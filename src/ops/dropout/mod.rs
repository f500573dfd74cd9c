//! Dropout whose mask is a function of position.

#[cfg(feature = "cuda")]
pub(crate) mod cuda;

use candle_core::{Device, Result, Tensor};

use super::philox::{philox4x32, unit_f32};
use super::real::Real;
use super::rows::map_rows;
use super::tape::{Arg, Forward, Node, Run, Value, apply};
use crate::{dispatch, slices};

/// A mask over [B, T, D], drawn by position, so that micro-batches, any number of threads and a GPU
/// draw the same.
///
/// Element (b, t, c) is lane c mod 4 of the Philox block at counter [c/4, t, first + b, site] under
/// `key`; it is kept, scaled by 1/(1−p), where that lane as a number in [0, 1) is at least p in f32.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability of zero, in [0, 1).
    pub p: f64,
    pub key: [u32; 2],
    /// Which of a model's dropouts this is.
    pub site: u32,
    /// Index of the first sample inside the whole batch.
    pub first: u32,
    /// All timesteps of a sample share the mask of the first.
    pub tied: bool,
}

impl Dropout {
    pub(crate) fn check(&self) -> Result<()> {
        if !(0.0..1.0).contains(&self.p) {
            candle_core::bail!("dropout: p must be in [0, 1), got {}", self.p)
        }
        Ok(())
    }

    /// The factors of one row: 0 or 1/(1−p).
    pub(crate) fn factors<F: Real>(&self, b: usize, t: usize, out: &mut [F]) {
        let (keep, p) = (F::of(1.0 / (1.0 - self.p)), self.p as f32);
        let sample = self.first.wrapping_add(b as u32);
        let t = if self.tied { 0 } else { t };
        for (c, out) in out.chunks_mut(4).enumerate() {
            let bits = philox4x32([c as u32, t as u32, sample, self.site], self.key);
            for (out, bits) in out.iter_mut().zip(bits) {
                *out = if unit_f32(bits) >= p { keep } else { F::zero() };
            }
        }
    }
}

/// y = x ⊙ mask over x [B, T, D].
///
/// Source: Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", 2014.
pub fn dropout(x: impl Into<Arg>, dropout: &Dropout) -> Result<Tensor> {
    dropout.check()?;
    let x = x.into();
    x.shape().dims3()?;
    Ok(apply(*dropout, &[x])?.remove(0))
}

impl Dropout {
    fn mask<F: Real>(&self, x: &[F], steps: usize, width: usize) -> Vec<F> {
        map_rows(x.len() / width.max(1), width, |row, y: &mut [F]| {
            self.factors(row / steps, row % steps, y);
            for (y, &x) in y.iter_mut().zip(&x[row * width..]) {
                *y *= x;
            }
        })
    }
}

impl Node for Dropout {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn forward(&self, args: &[Tensor], _: bool) -> Result<Forward> {
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            return Ok(Forward { outputs: vec![cuda::apply(self, &args[0])?], saved: vec![] });
        }
        let (_, steps, width) = args[0].dims3()?;
        let value = dispatch!(args[0].dtype(), F => {
            slices!(F; x = &args[0]);
            Value::cpu(self.mask(x, steps, width), args[0].shape())
        });
        Ok(Forward { outputs: vec![value], saved: vec![] })
    }

    fn backward(&self, _: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let Some(dy) = &grads[0] else { return Ok(vec![None]) };
        #[cfg(feature = "cuda")]
        if dy.device().is_cuda() {
            return Ok(vec![Some(cuda::apply(self, dy)?.into_tensor())]);
        }
        let (_, steps, width) = dy.dims3()?;
        dispatch!(dy.dtype(), F => {
            slices!(F; grad = dy);
            Ok(vec![Some(Tensor::from_vec(self.mask(grad, steps, width), dy.shape(), &Device::Cpu)?)])
        })
    }
}
