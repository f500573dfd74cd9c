//! CPU path of the short convolution.

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
    pub x: &'a [F],
    pub weight: &'a [F],
    pub bias: Option<&'a [F]>,
    pub state: Option<&'a [F]>,
}

pub struct Grads<F> {
    pub x: Vec<F>,
    pub weight: Vec<F>,
    pub bias: Vec<F>,
    pub state: Vec<F>,
}

/// Row `s` of batch entry `b` of the inputs with the state in front: the first step is row W−1.
/// `None` stands for zeros.
fn extended<'a, F: Real>(
    shape: Shape,
    x: &'a [F],
    state: Option<&'a [F]>,
    b: usize,
    s: usize,
) -> Option<&'a [F]> {
    let Shape { steps, width, taps, .. } = shape;
    if s + 1 >= taps {
        let row = b * steps + s + 1 - taps;
        Some(&x[row * width..(row + 1) * width])
    } else {
        let row = b * (taps - 1) + s;
        state.map(|state| &state[row * width..(row + 1) * width])
    }
}

/// [D, W] to [W, D]: the loops run over channels.
fn by_tap<F: Real>(shape: Shape, weight: &[F]) -> Vec<F> {
    let Shape { width, taps, .. } = shape;
    (0..taps * width).map(|i| weight[(i % width) * taps + i / width]).collect()
}

/// The value before the activation at step `t`.
fn pre_activation<F: Real>(shape: Shape, input: Input<F>, taps: &[F], b: usize, t: usize, out: &mut [F]) {
    match input.bias {
        Some(bias) => out.copy_from_slice(bias),
        None => out.fill(F::zero()),
    }
    for (j, w) in taps.chunks_exact(shape.width).enumerate() {
        if let Some(x) = extended(shape, input.x, input.state, b, t + j) {
            for ((out, &w), &x) in out.iter_mut().zip(w).zip(x) {
                *out = w.fma(x, *out);
            }
        }
    }
}

pub fn forward<F: Real>(shape: Shape, input: Input<F>) -> Vec<F> {
    let taps = by_tap(shape, input.weight);
    map_rows(shape.batch * shape.steps, shape.width, |row, y: &mut [F]| {
        pre_activation(shape, input, &taps, row / shape.steps, row % shape.steps, y);
        y.iter_mut().for_each(|y| *y = silu(*y));
    })
}

/// Columns `start..start + len` of rows of `width`.
pub fn columns<F: Real>(rows: &[F], width: usize, start: usize, len: usize) -> Vec<F> {
    map_rows(rows.len() / width.max(1), len, |row, out: &mut [F]| {
        out.copy_from_slice(&rows[row * width + start..][..len]);
    })
}

/// Where parts of these widths begin that stand side by side from `first` on.
pub fn starts(first: usize, widths: &[usize]) -> impl Iterator<Item = usize> {
    widths.iter().scan(first, |end, width| {
        *end += width;
        Some(*end - width)
    })
}

/// The columns of rows in parts of these widths, each contiguous.
pub fn split<F: Real>(rows: Vec<F>, widths: &[usize]) -> Vec<Vec<F>> {
    if widths.len() == 1 {
        return vec![rows];
    }
    let width = widths.iter().sum();
    starts(0, widths).zip(widths).map(|(start, &len)| columns(&rows, width, start, len)).collect()
}

pub fn final_state<F: Real>(shape: Shape, input: Input<F>) -> Vec<F> {
    let kept = shape.taps - 1;
    let mut out = vec![F::zero(); shape.batch * kept * shape.width];
    for (i, out) in out.chunks_exact_mut(shape.width).enumerate() {
        if let Some(x) = extended(shape, input.x, input.state, i / kept, shape.steps + i % kept) {
            out.copy_from_slice(x);
        }
    }
    out
}

pub fn backward<F: Real>(shape: Shape, input: Input<F>, dy: &[F], dfinal: &[F]) -> Grads<F> {
    let Shape { batch, steps, width, taps } = shape;
    let kept = taps - 1;
    let weight = by_tap(shape, input.weight);

    // The gradient before the activation, and with it the sums for the weight and the bias.
    let mut da = vec![F::zero(); batch * steps * width];
    let parts: Vec<Vec<F>> = fill_blocks(&mut da, width, |first, block| {
        let mut sums = vec![F::zero(); (taps + 1) * width];
        let (dw, db) = sums.split_at_mut(taps * width);
        for (i, da) in block.chunks_exact_mut(width).enumerate() {
            let (b, t) = ((first + i) / steps, (first + i) % steps);
            pre_activation(shape, input, &weight, b, t, da);
            for (da, &dy) in da.iter_mut().zip(&dy[(first + i) * width..]) {
                *da = dy * silu_grad(*da);
            }
            for (j, dw) in dw.chunks_exact_mut(width).enumerate() {
                if let Some(x) = extended(shape, input.x, input.state, b, t + j) {
                    for ((dw, &da), &x) in dw.iter_mut().zip(&*da).zip(x) {
                        *dw = da.fma(x, *dw);
                    }
                }
            }
            add(da, db);
        }
        sums
    });
    let sums = sum_parts(&parts, (taps + 1) * width);

    // Row s of the extended inputs reaches the steps s−W+1 ..= s, and the final state from row T on.
    let reach = |b: usize, s: usize, out: &mut [F]| {
        if s >= steps {
            let row = b * kept + s - steps;
            out.copy_from_slice(&dfinal[row * width..(row + 1) * width]);
        }
        for (j, w) in weight.chunks_exact(width).enumerate() {
            if j <= s && s - j < steps {
                let da = &da[(b * steps + s - j) * width..];
                for ((out, &w), &da) in out.iter_mut().zip(w).zip(da) {
                    *out = w.fma(da, *out);
                }
            }
        }
    };
    let x = map_rows(batch * steps, width, |row, dx: &mut [F]| reach(row / steps, row % steps + kept, dx));
    let state = match input.state {
        Some(_) => map_rows(batch * kept, width, |row, ds: &mut [F]| reach(row / kept, row % kept, ds)),
        None => vec![],
    };
    Grads {
        x,
        weight: (0..width * taps).map(|i| sums[(i % taps) * width + i / taps]).collect(),
        bias: sums[taps * width..].to_vec(),
        state,
    }
}
