//! CPU path of the norms. The statistics of a row are cheap: the backward pass finds them again.

use super::{GateOrder, RmsEps};
use crate::ops::real::{Real, dot, sigmoid, silu, silu_grad};
use crate::ops::rows::{fill_blocks, fill_blocks2, map_rows, sum_parts, sum2};

/// Mean and reciprocal standard deviation of a row.
fn moments<F: Real>(x: &[F], eps: f64) -> (F, F) {
    let n = F::of(x.len() as f64);
    let mean = sum2(x, x, |x, _| x) / n;
    let var = sum2(x, x, |x, _| (x - mean) * (x - mean)) / n;
    (mean, F::one() / (var + F::of(eps)).sqrt())
}

/// Layer norm of one row.
#[inline(always)]
pub fn layer_norm_row<F: Real>(x: &[F], w: &[F], b: &[F], eps: f64, y: &mut [F]) {
    let (mean, rstd) = moments(x, eps);
    for (((y, &x), &w), &b) in y.iter_mut().zip(x).zip(w).zip(b) {
        *y = ((x - mean) * rstd).fma(w, b);
    }
}

/// The gradient of one row; adds to those of the weight and the bias.
#[inline(always)]
pub fn layer_norm_row_backward<F: Real>(
    x: &[F],
    w: &[F],
    dy: &[F],
    eps: f64,
    dx: &mut [F],
    (dw, db): (&mut [F], &mut [F]),
) {
    let n = F::of(x.len() as f64);
    let (mean, rstd) = moments(x, eps);
    for ((((dw, db), dx), &w), (&x, &dy)) in dw.iter_mut().zip(db).zip(&mut *dx).zip(w).zip(x.iter().zip(dy))
    {
        *dw = dy.fma((x - mean) * rstd, *dw);
        *db += dy;
        *dx = w * dy;
    }
    // dx = rstd (w dy − mean(w dy) − x̂ mean(w dy x̂)).
    let offset = sum2(dx, dx, |g, _| g) / n;
    let along = sum2(dx, x, |g, x| g * (x - mean)) * rstd / n;
    for (dx, &x) in dx.iter_mut().zip(x) {
        *dx = rstd * (*dx - offset - (x - mean) * rstd * along);
    }
}

pub fn layer_norm<F: Real>(x: &[F], w: &[F], b: &[F], eps: f64) -> Vec<F> {
    let n = w.len();
    map_rows(x.len() / n, n, |row, y: &mut [F]| layer_norm_row(&x[row * n..(row + 1) * n], w, b, eps, y))
}

/// Gradients of x, w and b.
pub fn layer_norm_backward<F: Real>(x: &[F], w: &[F], dy: &[F], eps: f64) -> (Vec<F>, Vec<F>, Vec<F>) {
    let n = w.len();
    let mut dx = vec![F::zero(); x.len()];
    let parts = fill_blocks(&mut dx, n, |first, block| {
        let mut sums = vec![F::zero(); 2 * n];
        let (dw, db) = sums.split_at_mut(n);
        for (i, dx) in block.chunks_exact_mut(n).enumerate() {
            let range = (first + i) * n..(first + i + 1) * n;
            layer_norm_row_backward(&x[range.clone()], w, &dy[range], eps, dx, (dw, db));
        }
        sums
    });
    let sums = sum_parts(&parts, 2 * n);
    (dx, sums[..n].to_vec(), sums[n..].to_vec())
}

/// The factor r of x̂ = r x, and c with dr/dx = −c x.
fn rms<F: Real>(x: &[F], eps: f64, place: RmsEps) -> (F, F) {
    let n = F::of(x.len() as f64);
    let (square, eps) = (dot(x, x) / n, F::of(eps));
    match place {
        RmsEps::Inside => {
            let r = F::one() / (square + eps).sqrt();
            (r, r * r * r / n)
        }
        RmsEps::Outside => {
            let root = square.sqrt();
            let r = F::one() / (root + eps);
            // At zero the root has no derivative, but the product with x vanishes.
            (r, if root > F::zero() { r * r / (n * root) } else { F::zero() })
        }
    }
}

/// A gate that `z` opens, and its derivative.
#[inline(always)]
fn activation<F: Real>(order: GateOrder, z: F) -> (F, F) {
    match order {
        GateOrder::AfterNorm | GateOrder::BeforeNorm => (silu(z), silu_grad(z)),
        GateOrder::SigmoidAfterNorm => {
            let s = sigmoid(z);
            (s, s * (F::one() - s))
        }
    }
}

pub fn rms_norm<F: Real>(
    x: &[F],
    w: &[F],
    gate: Option<(GateOrder, &[F])>,
    eps: f64,
    place: RmsEps,
) -> Vec<F> {
    let n = w.len();
    map_rows(x.len() / n, n, |row, y: &mut [F]| {
        let range = row * n..(row + 1) * n;
        let x = &x[range.clone()];
        match gate {
            None => {
                let (r, _) = rms(x, eps, place);
                for ((y, &x), &w) in y.iter_mut().zip(x).zip(w) {
                    *y = x * r * w;
                }
            }
            Some((order @ (GateOrder::AfterNorm | GateOrder::SigmoidAfterNorm), z)) => {
                let (r, _) = rms(x, eps, place);
                for (((y, &x), &w), &z) in y.iter_mut().zip(x).zip(w).zip(&z[range]) {
                    *y = x * r * w * activation(order, z).0;
                }
            }
            Some((GateOrder::BeforeNorm, z)) => {
                for ((y, &x), &z) in y.iter_mut().zip(x).zip(&z[range]) {
                    *y = x * silu(z);
                }
                let (r, _) = rms(y, eps, place);
                for (y, &w) in y.iter_mut().zip(w) {
                    *y = *y * r * w;
                }
            }
        }
    })
}

/// Adds to dw and gives dx of y = w x̂, for the gradient `dy` of y.
#[inline(always)]
fn rms_row_backward<F: Real>(
    x: &[F],
    w: &[F],
    dy: &[F],
    eps: f64,
    place: RmsEps,
    dx: &mut [F],
    dw: &mut [F],
) {
    let (r, c) = rms(x, eps, place);
    for (((dx, dw), &w), (&x, &dy)) in dx.iter_mut().zip(dw).zip(w).zip(x.iter().zip(dy)) {
        *dw = dy.fma(x * r, *dw);
        *dx = w * dy;
    }
    let along = c * dot(dx, x);
    for (dx, &x) in dx.iter_mut().zip(x) {
        *dx = r * *dx - x * along;
    }
}

/// Gradients of x, w and the gate (empty without one).
pub fn rms_norm_backward<F: Real>(
    x: &[F],
    w: &[F],
    gate: Option<(GateOrder, &[F])>,
    dy: &[F],
    eps: f64,
    place: RmsEps,
) -> (Vec<F>, Vec<F>, Vec<F>) {
    let n = w.len();
    let mut dx = vec![F::zero(); x.len()];
    let Some((order, z)) = gate else {
        let parts = fill_blocks(&mut dx, n, |first, block| {
            let mut dw = vec![F::zero(); n];
            for (i, dx) in block.chunks_exact_mut(n).enumerate() {
                let range = (first + i) * n..(first + i + 1) * n;
                rms_row_backward(&x[range.clone()], w, &dy[range], eps, place, dx, &mut dw);
            }
            dw
        });
        return (dx, sum_parts(&parts, n), vec![]);
    };
    let mut dz = vec![F::zero(); x.len()];
    let parts = fill_blocks2((&mut dx, n), (&mut dz, n), |first, dx, dz| {
        let (mut dw, mut row) = (vec![F::zero(); n], vec![F::zero(); n]);
        for (i, (dx, dz)) in dx.chunks_exact_mut(n).zip(dz.chunks_exact_mut(n)).enumerate() {
            let range = (first + i) * n..(first + i + 1) * n;
            let (x, z, dy) = (&x[range.clone()], &z[range.clone()], &dy[range]);
            match order {
                GateOrder::AfterNorm | GateOrder::SigmoidAfterNorm => {
                    // The norm sees dy times the gate; the gate sees dy w x̂.
                    for ((row, &z), &dy) in row.iter_mut().zip(z).zip(dy) {
                        *row = dy * activation(order, z).0;
                    }
                    rms_row_backward(x, w, &row, eps, place, dx, &mut dw);
                    let (r, _) = rms(x, eps, place);
                    for ((((dz, &z), &x), &w), &dy) in dz.iter_mut().zip(z).zip(x).zip(w).zip(dy) {
                        *dz = dy * w * x * r * activation(order, z).1;
                    }
                }
                GateOrder::BeforeNorm => {
                    for ((row, &z), &x) in row.iter_mut().zip(z).zip(x) {
                        *row = x * silu(z);
                    }
                    rms_row_backward(&row, w, dy, eps, place, dx, &mut dw);
                    for (((dx, dz), &z), &x) in dx.iter_mut().zip(dz).zip(z).zip(x) {
                        *dz = *dx * x * silu_grad(z);
                        *dx *= silu(z);
                    }
                }
            }
        }
        dw
    });
    (dx, sum_parts(&parts, n), dz)
}
