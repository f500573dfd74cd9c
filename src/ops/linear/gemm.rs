//! Matrix products on slices: a safe, bounds-checked door to the `gemm` crate.
//!
//! Every call runs on the calling thread; who wants threads splits the work into blocks whose size does
//! not depend on the number of threads ([`rows_times`], [`transposed_times`]).

use std::borrow::Cow;

use rayon::prelude::*;

use crate::ops::real::Real;
use crate::ops::rows::sum_parts;

/// A matrix inside a slice, with strides in elements.
#[derive(Clone, Copy)]
pub struct Mat<'a, F> {
    data: &'a [F],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, F> Mat<'a, F> {
    /// A contiguous row-major matrix.
    pub fn new(data: &'a [F], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// A row-major matrix whose rows begin `row_stride` elements apart.
    pub fn strided(data: &'a [F], rows: usize, cols: usize, row_stride: usize) -> Self {
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// Its elements row by row: a view of them if they lie so.
    pub fn in_rows(self) -> Cow<'a, [F]>
    where
        F: Real,
    {
        if self.col_stride == 1 && self.row_stride == self.cols {
            return Cow::Borrowed(&self.data[..self.rows * self.cols]);
        }
        /// Rows that one task copies: as many as a cache line has elements, so that none is fetched twice.
        const ROWS: usize = 16;
        let mut out = vec![F::zero(); self.rows * self.cols];
        out.par_chunks_mut((ROWS * self.cols).max(1)).enumerate().for_each(|(i, out)| {
            for col in 0..self.cols {
                let from = &self.data[i * ROWS * self.row_stride + col * self.col_stride..];
                let column = out[col..].iter_mut().step_by(self.cols);
                column.zip(from.iter().step_by(self.row_stride)).for_each(|(to, &from)| *to = from);
            }
        });
        Cow::Owned(out)
    }

    /// The transpose, without moving anything.
    pub fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// A row-major matrix to write to.
pub struct MatMut<'a, F> {
    data: &'a mut [F],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a, F> MatMut<'a, F> {
    /// A contiguous matrix.
    pub fn new(data: &'a mut [F], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// A matrix whose rows begin `row_stride` elements apart.
    pub fn strided(data: &'a mut [F], rows: usize, cols: usize, row_stride: usize) -> Self {
        Self { data, rows, cols, row_stride }
    }
}

/// C ← alpha·C + beta·A·B, on the calling thread. With `alpha` zero, C is written without being read.
///
/// # Panics
/// If the shapes do not fit together, or a slice is shorter than its shape and strides say: both are
/// mistakes of the calling code, not of its input.
pub fn gemm<F: Real>(c: MatMut<F>, alpha: F, beta: F, a: Mat<F>, b: Mat<F>) {
    assert!(c.rows == a.rows && c.cols == b.cols && a.cols == b.rows, "gemm: the shapes do not fit together");
    assert!(c.row_stride >= c.cols, "gemm: rows of the result overlap");
    let end = |rows: usize, cols: usize, row_stride: usize, col_stride: usize| match (rows, cols) {
        (0, _) | (_, 0) => 0,
        _ => (rows - 1) * row_stride + (cols - 1) * col_stride + 1,
    };
    assert!(end(c.rows, c.cols, c.row_stride, 1) <= c.data.len(), "gemm: the result is too short");
    assert!(
        end(a.rows, a.cols, a.row_stride, a.col_stride) <= a.data.len(),
        "gemm: the left side is too short"
    );
    assert!(
        end(b.rows, b.cols, b.row_stride, b.col_stride) <= b.data.len(),
        "gemm: the right side is too short"
    );
    // SAFETY: the asserts above hold every index that the shapes and strides reach inside its slice; `c`
    // is borrowed mutably, so it overlaps neither `a` nor `b`, and its rows do not overlap; `F` is f32 or
    // f64 (the only types that implement `Real`), which the crate supports.
    #[allow(unsafe_code)]
    unsafe {
        ::gemm::gemm(
            c.rows,
            c.cols,
            a.cols,
            c.data.as_mut_ptr(),
            1,
            c.row_stride as isize,
            alpha != F::zero(),
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            alpha,
            beta,
            false,
            false,
            false,
            ::gemm::Parallelism::None,
        );
    }
}

/// Rows that one product of [`rows_times`] takes.
const BLOCK: usize = 256;

/// X·M + bias for X of `rows` × `m.rows`, row-major.
///
/// Blocks always have the same number of rows (the last is padded), so a row of the result depends on
/// that row of X alone, to the last bit: not on the batch, on pieces of a sequence, or on the threads.
pub fn rows_times<F: Real>(x: &[F], rows: usize, m: Mat<F>, bias: Option<&[F]>) -> Vec<F> {
    let (inner, width) = (m.rows, m.cols);
    let mut y = vec![F::zero(); rows * width];
    if y.is_empty() {
        return y;
    }
    // Row by row it multiplies faster, and every block takes the same.
    let in_rows = m.in_rows();
    let m = Mat::new(&in_rows, inner, width);
    y.par_chunks_mut(BLOCK * width).enumerate().for_each(|(i, y)| {
        let count = y.len() / width;
        let x = &x[i * BLOCK * inner..(i * BLOCK + count) * inner];
        block_times(x, count, BLOCK, m, bias, y);
    });
    y
}

/// One block of [`rows_times`]: `count` rows as part of a product of `block` rows.
pub(crate) fn block_times<F: Real>(
    x: &[F],
    count: usize,
    block: usize,
    m: Mat<F>,
    bias: Option<&[F]>,
    y: &mut [F],
) {
    let (inner, width) = (m.rows, m.cols);
    if count == block {
        gemm(MatMut::new(y, block, width), F::zero(), F::one(), Mat::new(x, block, inner), m);
    } else {
        let mut padded = vec![F::zero(); block * inner];
        padded[..count * inner].copy_from_slice(x);
        let mut out = vec![F::zero(); block * width];
        gemm(MatMut::new(&mut out, block, width), F::zero(), F::one(), Mat::new(&padded, block, inner), m);
        y.copy_from_slice(&out[..count * width]);
    }
    if let Some(bias) = bias {
        for y in y.chunks_exact_mut(width) {
            crate::ops::rows::add(bias, y);
        }
    }
}

/// The right side of many products with few rows, its columns in panels: a product reads them once, in order.
pub struct Panels<F> {
    /// Panel by panel, row by row; columns behind the last are zeros.
    rows: Vec<[F; PANEL]>,
    inner: usize,
}

/// Columns of a panel.
const PANEL: usize = 32;

impl<F: Real> Panels<F> {
    pub fn new(m: Mat<F>) -> Self {
        let (inner, width) = (m.rows, m.cols);
        let at = |row: usize, column: usize| m.data[row * m.row_stride + column * m.col_stride];
        let mut rows = vec![[F::zero(); PANEL]; width.div_ceil(PANEL) * inner];
        for (i, panel) in rows.iter_mut().enumerate() {
            let (first, row) = (i / inner * PANEL, i % inner);
            for (to, column) in panel.iter_mut().zip(first..width) {
                *to = at(row, column);
            }
        }
        Self { rows, inner }
    }

    /// Y ← X·M + bias for X of `ROWS` rows. A row of Y depends on that row of X alone, to the last bit.
    pub fn times<const ROWS: usize>(&self, x: &[F], bias: Option<&[F]>, y: &mut [F]) {
        let (inner, width) = (self.inner, y.len() / ROWS);
        assert_eq!(
            (x.len(), self.rows.len()),
            (ROWS * inner, width.div_ceil(PANEL) * inner),
            "Panels: the shapes"
        );
        let rows: [&[F]; ROWS] = std::array::from_fn(|r| &x[r * inner..(r + 1) * inner]);
        for (panel, first) in self.rows.chunks_exact(inner).zip((0..width).step_by(PANEL)) {
            let sums = panel_times(rows, panel);
            let columns = first..width.min(first + PANEL);
            for (y, sums) in y.chunks_exact_mut(width).zip(&sums) {
                match bias {
                    Some(bias) => {
                        let with_bias =
                            sums.iter().zip(&bias[columns.clone()]).map(|(&sum, &bias)| sum + bias);
                        y[columns.clone()].iter_mut().zip(with_bias).for_each(|(y, sum)| *y = sum);
                    }
                    None => y[columns.clone()].copy_from_slice(&sums[..columns.len()]),
                }
            }
        }
    }
}

/// Products of rows with one panel, all of which stay in registers.
#[inline(always)]
fn panel_times<F: Real, const ROWS: usize>(x: [&[F]; ROWS], panel: &[[F; PANEL]]) -> [[F; PANEL]; ROWS] {
    let mut sums = [[F::zero(); PANEL]; ROWS];
    for (k, weights) in panel.iter().enumerate() {
        for (sums, x) in sums.iter_mut().zip(x) {
            for (sum, &weight) in sums.iter_mut().zip(weights) {
                *sum = x[k].fma(weight, *sum);
            }
        }
    }
    sums
}

/// Aᵀ·B for A of `rows` × `m` and B of `rows` × `n`, both row-major: the gradient of a weight.
///
/// Large results are split over their rows, small ones over the sum, by the shapes alone.
pub fn transposed_times<F: Real>(a: &[F], b: &[F], rows: usize, m: usize, n: usize) -> Vec<F> {
    const OUT_ROWS: usize = 128;
    const SUM_ROWS: usize = 1024;
    /// Elements that all partial sums together may take.
    const PARTIAL: usize = 1 << 22;
    let splits = rows.div_ceil(SUM_ROWS).min(PARTIAL / (m * n).max(1)).clamp(1, 64);
    let per_split = rows.div_ceil(splits).max(1);
    let part = |s: usize| {
        let range = (s * per_split).min(rows)..((s + 1) * per_split).min(rows);
        let mut out = vec![F::zero(); m * n];
        out.par_chunks_mut((OUT_ROWS * n).max(1)).enumerate().for_each(|(i, out)| {
            let (count, first) = (out.len() / n, i * OUT_ROWS);
            if range.is_empty() {
                return;
            }
            let a = Mat::strided(&a[range.start * m + first..], range.len(), count, m);
            let b = Mat::new(&b[range.start * n..], range.len(), n);
            gemm(MatMut::new(out, count, n), F::zero(), F::one(), a.t(), b);
        });
        out
    };
    if splits == 1 {
        return part(0);
    }
    let parts: Vec<Vec<F>> = (0..splits).into_par_iter().map(part).collect();
    sum_parts(&parts, m * n)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, salt: usize) -> Vec<f64> {
        (0..n).map(|i| (((i * 37 + salt * 11) % 101) as f64 - 50.0) / 32.0).collect()
    }

    #[test]
    fn strides_and_accumulation() {
        let (m, k, n) = (5, 7, 3);
        let a = numbers(k * (m + 2), 1);
        let b = numbers(k * (n + 1), 2);
        let c0 = numbers(m * (n + 4), 3);
        let mut c = c0.clone();
        let at = Mat::strided(&a, k, m, m + 2).t();
        gemm(MatMut::strided(&mut c, m, n, n + 4), 0.5, 2.0, at, Mat::strided(&b, k, n, n + 1));
        for i in 0..m {
            for j in 0..n + 4 {
                let old = c0.get(i * (n + 4) + j).copied();
                let want = match j < n {
                    true => {
                        0.5 * c0[i * (n + 4) + j]
                            + 2.0 * (0..k).map(|l| a[l * (m + 2) + i] * b[l * (n + 1) + j]).sum::<f64>()
                    }
                    false => old.unwrap(),
                };
                assert!((c[i * (n + 4) + j] - want).abs() < 1e-12);
            }
        }
    }

    #[test]
    #[should_panic(expected = "too short")]
    fn a_short_slice_is_refused() {
        let (a, b) = (vec![0.0f32; 5], vec![0.0f32; 6]);
        gemm(MatMut::new(&mut [0.0; 4], 2, 2), 0.0, 1.0, Mat::new(&a, 2, 3), Mat::new(&b, 3, 2));
    }

    #[test]
    fn a_result_that_held_nan_is_overwritten() {
        let mut c = [f32::NAN; 4];
        gemm(MatMut::new(&mut c, 2, 2), 0.0, 1.0, Mat::new(&[1.0; 6], 2, 3), Mat::new(&[2.0; 6], 3, 2));
        assert_eq!(c, [6.0; 4]);
    }
}
