//! CPU path of the short convolution. Parts of its channels are worked through one after the other, each into a
//! buffer of its own.

use std::ops::Range;

use crate::ops::real::{Real, silu, silu_grad};
use crate::ops::rows::{add, fill_blocks, map_rows, sum_parts};

#[derive(Clone, Copy)]
pub struct Shape {
    pub batch: usize,
    pub steps: usize,
    pub width: usize,
    pub taps: usize,
}

#[derive(Clone, Copy)]
pub struct Input<'a, F> {
    /// Rows of `columns`, of which the first are convolved.
    pub x: &'a [F],
    pub columns: usize,
    pub weight: &'a [F],
    pub bias: Option<&'a [F]>,
    pub state: Option<&'a [F]>,
}

/// Columns of x, and the gradient of what was made of them, contiguous; none: zeros.
pub struct Part<'a, F> {
    pub columns: Range<usize>,
    pub grad: Option<&'a [F]>,
}

pub struct Grads<F> {
    pub x: Vec<F>,
    pub weight: Vec<F>,
    pub bias: Vec<F>,
    pub state: Vec<F>,
}

/// Row `s` of batch entry `b` of the inputs with the state in front: the first step is row W−1.
/// `None` stands for zeros.
fn extended<'a, F: Real>(shape: Shape, input: Input<'a, F>, b: usize, s: usize) -> Option<&'a [F]> {
    let Shape { steps, width, taps, .. } = shape;
    if s + 1 >= taps {
        let row = b * steps + s + 1 - taps;
        Some(&input.x[row * input.columns..][..width])
    } else {
        let row = b * (taps - 1) + s;
        input.state.map(|state| &state[row * width..][..width])
    }
}

/// Of some channels, [D, W] to [W, channels]: the loops run over channels.
fn by_tap<F: Real>(shape: Shape, weight: &[F], channels: &Range<usize>) -> Vec<F> {
    let of_tap = |tap: usize| channels.clone().map(move |channel| weight[channel * shape.taps + tap]);
    (0..shape.taps).flat_map(of_tap).collect()
}

/// The values of some channels before the activation at step `t`.
fn pre_activation<F: Real>(
    shape: Shape,
    input: Input<F>,
    channels: &Range<usize>,
    weight: &[F],
    (b, t): (usize, usize),
    out: &mut [F],
) {
    match input.bias {
        Some(bias) => out.copy_from_slice(&bias[channels.clone()]),
        None => out.fill(F::zero()),
    }
    for (j, w) in weight.chunks_exact(channels.len()).enumerate() {
        if let Some(x) = extended(shape, input, b, t + j) {
            for ((out, &w), &x) in out.iter_mut().zip(w).zip(&x[channels.clone()]) {
                *out = w.fma(x, *out);
            }
        }
    }
}

/// The outputs of some channels, contiguous.
pub fn forward<F: Real>(shape: Shape, input: Input<F>, channels: Range<usize>) -> Vec<F> {
    let weight = by_tap(shape, input.weight, &channels);
    map_rows(shape.batch * shape.steps, channels.len(), |row, y: &mut [F]| {
        pre_activation(shape, input, &channels, &weight, (row / shape.steps, row % shape.steps), y);
        y.iter_mut().for_each(|y| *y = silu(*y));
    })
}

/// Some columns of rows of `width`.
pub fn columns<F: Real>(rows: &[F], width: usize, columns: Range<usize>) -> Vec<F> {
    map_rows(rows.len() / width.max(1), columns.len(), |row, out: &mut [F]| {
        out.copy_from_slice(&rows[row * width..][columns.clone()]);
    })
}

/// The columns of parts of these widths that stand side by side from `first` on.
pub fn side_by_side(first: usize, widths: &[usize]) -> impl Iterator<Item = Range<usize>> {
    widths.iter().scan(first, |end, width| {
        *end += width;
        Some(*end - width..*end)
    })
}

pub fn final_state<F: Real>(shape: Shape, input: Input<F>) -> Vec<F> {
    let kept = shape.taps - 1;
    let mut out = vec![F::zero(); shape.batch * kept * shape.width];
    for (i, out) in out.chunks_exact_mut(shape.width).enumerate() {
        if let Some(x) = extended(shape, input, i / kept, shape.steps + i % kept) {
            out.copy_from_slice(x);
        }
    }
    out
}

/// The gradient of some channels before the activation, and for each tap and then the bias that of its weights.
fn before_activation<F: Real>(
    shape: Shape,
    input: Input<F>,
    channels: &Range<usize>,
    weight: &[F],
    dy: &[F],
) -> (Vec<F>, Vec<F>) {
    let Shape { batch, steps, taps, .. } = shape;
    let width = channels.len();
    let mut da = vec![F::zero(); batch * steps * width];
    let parts: Vec<Vec<F>> = fill_blocks(&mut da, width, |first, block| {
        let mut sums = vec![F::zero(); (taps + 1) * width];
        let (dw, db) = sums.split_at_mut(taps * width);
        for (i, da) in block.chunks_exact_mut(width).enumerate() {
            let (b, t) = ((first + i) / steps, (first + i) % steps);
            pre_activation(shape, input, channels, weight, (b, t), da);
            for (da, &dy) in da.iter_mut().zip(&dy[(first + i) * width..]) {
                *da = dy * silu_grad(*da);
            }
            for (j, dw) in dw.chunks_exact_mut(width).enumerate() {
                if let Some(x) = extended(shape, input, b, t + j) {
                    for ((dw, &da), &x) in dw.iter_mut().zip(&*da).zip(&x[channels.clone()]) {
                        *dw = da.fma(x, *dw);
                    }
                }
            }
            add(da, db);
        }
        sums
    });
    (da, sum_parts(&parts, (taps + 1) * width))
}

/// Gradients of the arguments from those of the outputs in their parts, of the columns that are given as they are, and of
/// the final state.
pub fn backward<F: Real>(
    shape: Shape,
    input: Input<F>,
    parts: &[Part<F>],
    plain: &[Part<F>],
    d_final: Option<&[F]>,
) -> Grads<F> {
    let Shape { batch, steps, width, taps } = shape;
    let kept = taps - 1;
    let (mut d_weight, mut d_bias) = (vec![F::zero(); width * taps], vec![F::zero(); width]);
    let mut before = Vec::with_capacity(parts.len());
    for Part { columns: channels, grad } in parts {
        let weight = by_tap(shape, input.weight, channels);
        let da = grad.map(|dy| {
            let (da, sums) = before_activation(shape, input, channels, &weight, dy);
            for (i, channel) in channels.clone().enumerate() {
                let of_tap = |tap: usize| sums[tap * channels.len() + i];
                d_weight[channel * taps..][..taps].iter_mut().enumerate().for_each(|(j, d)| *d = of_tap(j));
                d_bias[channel] = of_tap(taps);
            }
            da
        });
        before.push((channels, weight, da));
    }
    // Row s of the extended inputs reaches the steps s−W+1 ..= s, and the final state from row T on.
    let reach = |b: usize, s: usize, out: &mut [F]| {
        for (channels, weight, da) in &before {
            let (n, out) = (channels.len(), &mut out[(*channels).clone()]);
            if let (Some(d_final), Some(row)) = (d_final, s.checked_sub(steps)) {
                out.copy_from_slice(&d_final[(b * kept + row) * width..][(*channels).clone()]);
            }
            let Some(da) = da else { continue };
            for (j, w) in weight.chunks_exact(n).enumerate().take(s + 1).filter(|(j, _)| s - j < steps) {
                let da = &da[(b * steps + s - j) * n..];
                for ((out, &w), &da) in out.iter_mut().zip(w).zip(da) {
                    *out = w.fma(da, *out);
                }
            }
        }
    };
    let x = map_rows(batch * steps, input.columns, |row, dx: &mut [F]| {
        reach(row / steps, row % steps + kept, dx);
        for Part { columns, grad } in plain {
            if let Some(grad) = grad {
                dx[columns.clone()].copy_from_slice(&grad[row * columns.len()..][..columns.len()]);
            }
        }
    });
    let state = match input.state {
        Some(_) => map_rows(batch * kept, width, |row, ds: &mut [F]| reach(row / kept, row % kept, ds)),
        None => vec![],
    };
    Grads { x, weight: d_weight, bias: d_bias, state }
}
