//! Loops over the rows of row-major arrays: parallel over fixed blocks, so that neither the results nor
//! the order of any sum depend on the number of threads.

#[cfg(feature = "cuda")]
pub mod cuda;

use rayon::prelude::*;

use super::real::Real;

/// Rows that one task works through.
pub const ROWS: usize = 128;

/// Fills `out`, rows of `width`, in blocks of [`ROWS`]: `f(first row, block)`. Gives what the blocks
/// returned, in their order.
pub fn fill_blocks<F: Real, R: Send>(
    out: &mut [F],
    width: usize,
    f: impl Fn(usize, &mut [F]) -> R + Sync,
) -> Vec<R> {
    out.par_chunks_mut((ROWS * width).max(1)).enumerate().map(|(i, block)| f(i * ROWS, block)).collect()
}

/// [`fill_blocks`] for two arrays with equally many rows.
pub fn fill_blocks2<F: Real, R: Send>(
    (a, a_width): (&mut [F], usize),
    (b, b_width): (&mut [F], usize),
    f: impl Fn(usize, &mut [F], &mut [F]) -> R + Sync,
) -> Vec<R> {
    a.par_chunks_mut((ROWS * a_width).max(1))
        .zip(b.par_chunks_mut((ROWS * b_width).max(1)))
        .enumerate()
        .map(|(i, (a, b))| f(i * ROWS, a, b))
        .collect()
}

/// A new array of `rows` × `width`, every row filled by `f(row, values)`.
pub fn map_rows<F: Real>(rows: usize, width: usize, f: impl Fn(usize, &mut [F]) + Sync) -> Vec<F> {
    let mut out = vec![F::zero(); rows * width];
    fill_blocks(&mut out, width, |first, block| {
        for (i, row) in block.chunks_exact_mut(width).enumerate() {
            f(first + i, row);
        }
    });
    out
}

/// Elements that one task of [`map`] takes: enough to outweigh its cost.
const ELEMENTS: usize = 1 << 13;

/// `f` of every element. Blocks are filled by plain loops, which vectorise where `f` does.
pub fn map<F: Real>(x: &[F], f: impl Fn(F) -> F + Sync) -> Vec<F> {
    let mut out = vec![F::zero(); x.len()];
    out.par_chunks_mut(ELEMENTS).zip(x.par_chunks(ELEMENTS)).for_each(|(out, x)| {
        out.iter_mut().zip(x).for_each(|(out, &x)| *out = f(x));
    });
    out
}

/// [`map`] over two arrays of one length.
pub fn map2<F: Real>(x: &[F], y: &[F], f: impl Fn(F, F) -> F + Sync) -> Vec<F> {
    let mut out = vec![F::zero(); x.len()];
    out.par_chunks_mut(ELEMENTS).zip(x.par_chunks(ELEMENTS)).zip(y.par_chunks(ELEMENTS)).for_each(
        |((out, x), y)| {
            out.iter_mut().zip(x).zip(y).for_each(|((out, &x), &y)| *out = f(x, y));
        },
    );
    out
}

/// y ← y + x.
#[inline(always)]
pub fn add<F: Real>(x: &[F], y: &mut [F]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y += x;
    }
}

/// Σ f(xᵢ, yᵢ) with sixteen running sums, so that it vectorises; the order of the sum is fixed.
#[inline(always)]
pub fn sum2<F: Real>(x: &[F], y: &[F], f: impl Fn(F, F) -> F) -> F {
    const LANES: usize = 16;
    let n = x.len().min(y.len());
    let (x, y) = (&x[..n], &y[..n]);
    let mut lanes = [F::zero(); LANES];
    let (x_body, y_body) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let (x_tail, y_tail) = (x_body.remainder(), y_body.remainder());
    for (x, y) in x_body.zip(y_body) {
        for i in 0..LANES {
            lanes[i] += f(x[i], y[i]);
        }
    }
    x_tail.iter().zip(y_tail).fold(F::sum_of(&lanes), |sum, (&x, &y)| sum + f(x, y))
}

/// The sum over the rows of an array of rows of `width`.
pub fn column_sums<F: Real>(x: &[F], width: usize) -> Vec<F> {
    let parts: Vec<Vec<F>> = x
        .par_chunks((ROWS * width).max(1))
        .map(|block| {
            let mut sum = vec![F::zero(); width];
            block.chunks_exact(width).for_each(|row| add(row, &mut sum));
            sum
        })
        .collect();
    sum_parts(&parts, width)
}

/// The sum of partial results of `width` in their order; zeros if there is none.
pub fn sum_parts<F: Real>(parts: &[Vec<F>], width: usize) -> Vec<F> {
    let mut sum = vec![F::zero(); width];
    parts.iter().for_each(|part| add(part, &mut sum));
    sum
}
