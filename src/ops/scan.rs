//! What the recurrences share: views of one head, rows of a fixed width, and the spacing of checkpoints.
//!
//! A state lives in rows of [`LANES`] numbers, padded with zeros, so that every inner loop has a constant
//! length and vectorises whatever the head dims are (9, 81, 96, …).

use std::ops::Deref;

use candle_core::{Layout, Result, Storage, Tensor};

use super::linear::gemm::Mat;
use super::real::{Real, slice_of};

/// Steps between two states that the forward pass keeps; the backward pass computes those between again.
pub const CHUNK: usize = 64;

/// Numbers in one row of a state.
pub const LANES: usize = 32;

/// One row of a state.
pub type Lanes<F> = [F; LANES];

/// The [T, D] rows of one head in a [B, T, H, D] array.
#[derive(Clone, Copy)]
pub struct Rows<'a, F> {
    data: &'a [F],
    stride: usize,
    width: usize,
}

impl<'a, F: Real> Rows<'a, F> {
    /// The rows of batch entry `b` and head `h`.
    pub fn head(data: &'a [F], (b, h): (usize, usize), (t, heads, d): (usize, usize, usize)) -> Self {
        let stride = heads * d;
        Self { data: &data[b * t * stride..(b + 1) * t * stride][h * d..], stride, width: d }
    }

    /// Row `t`.
    #[inline(always)]
    pub fn at(&self, t: usize) -> &'a [F] {
        &self.data[t * self.stride..][..self.width]
    }

    /// `len` rows from `first` on, as a matrix.
    pub fn mat(&self, first: usize, len: usize) -> Mat<'a, F> {
        Mat::strided(&self.data[first * self.stride..], len, self.width, self.stride)
    }

    /// The single number in row `t` of an array with D = 1.
    #[inline(always)]
    pub fn one(&self, t: usize) -> F {
        self.data[t * self.stride]
    }
}

/// exp(g) of `steps` rows. Row by row, so that it vectorises.
pub fn decays<F: Real>(g: Rows<F>, steps: usize) -> Vec<F> {
    let mut decays = Vec::with_capacity(steps * g.width);
    (0..steps).for_each(|t| decays.extend(g.at(t).iter().map(|g| g.exp_fast())));
    decays
}

/// Columns `at..at + N` of a row; zeros beyond its end.
#[inline(always)]
pub fn load<F: Real, const N: usize>(row: &[F], at: usize) -> [F; N] {
    match row[at..].first_chunk::<N>() {
        Some(full) => *full,
        None => {
            let mut lanes = [F::zero(); N];
            lanes[..row.len() - at].copy_from_slice(&row[at..]);
            lanes
        }
    }
}

/// Puts lanes back into columns `at..at + N` of a row, as far as the row goes.
#[inline(always)]
pub fn store<F: Real, const N: usize>(lanes: &[F; N], row: &mut [F], at: usize) {
    let n = N.min(row.len() - at);
    row[at..at + n].copy_from_slice(&lanes[..n]);
}

/// S ← decay·S + kᵀu; returns Σ probeᵢ Sᵢ of the new state.
#[inline(always)]
pub fn write<F: Real>(s: &mut [Lanes<F>], decay: F, k: &[F], u: &Lanes<F>, probe: &[F]) -> Lanes<F> {
    let mut out = [F::zero(); LANES];
    for ((row, &k), &p) in s.iter_mut().zip(k).zip(probe) {
        for l in 0..LANES {
            row[l] = k.fma(u[l], decay * row[l]);
            out[l] = p.fma(row[l], out[l]);
        }
    }
    out
}

/// The gradient of an output; zeros where the output took no part in the loss.
pub fn grad_or_zeros(grad: &Option<Tensor>, like: &[usize], arg: &Tensor) -> Result<Tensor> {
    match grad {
        Some(grad) => Ok(grad.clone()),
        None => Tensor::zeros(like, arg.dtype(), arg.device()),
    }
}

/// Fails unless argument `name` of operation `op` has the shape `want`.
pub fn expect_shape(op: &str, name: &str, tensor: &Tensor, want: &[usize]) -> Result<()> {
    if tensor.dims() != want {
        candle_core::bail!("{op}: expected {name} of shape {want:?}, got {:?}", tensor.dims())
    }
    Ok(())
}

/// The elements of an argument that may be absent; `guard` is what `Tensor::storage_and_layout` gave.
pub fn slice_of_option<'a, F: Real>(
    guard: &'a Option<(impl Deref<Target = Storage>, &'a Layout)>,
) -> Result<Option<&'a [F]>> {
    guard.as_ref().map(|(storage, layout)| slice_of(storage, layout)).transpose()
}
