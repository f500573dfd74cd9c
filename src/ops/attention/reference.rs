//! CPU path of causal attention: tiles of queries and keys, with a running maximum and sum.

use rayon::prelude::*;

use crate::ops::linear::gemm::{Mat, MatMut, gemm};
use crate::ops::real::{Real, dot, map_heads, scatter_heads};
use crate::ops::rows::sum2;

const QUERIES: usize = 64;
const KEYS: usize = 128;

#[derive(Clone, Copy)]
pub struct Shape {
    pub batch: usize,
    pub steps: usize,
    pub keys: usize,
    pub heads: usize,
    pub dim: usize,
    pub values: usize,
    /// Keys that a query sees at most.
    pub window: usize,
}

impl Shape {
    /// The end of the keys that query `t` sees.
    fn seen(&self, t: usize) -> usize {
        self.keys - self.steps + t + 1
    }

    /// The first key that query `t` sees.
    fn first(&self, t: usize) -> usize {
        self.seen(t).saturating_sub(self.window)
    }

    /// Those that query `t` sees of the `n` keys from `key` on, counted from there.
    fn within(&self, t: usize, key: usize, n: usize) -> std::ops::Range<usize> {
        self.first(t).saturating_sub(key).min(n)..self.seen(t).saturating_sub(key).min(n)
    }

    /// `count` rows from `first` on of head `h`, of an array [B, length, H, d].
    fn rows<'a, F: Real>(
        &self,
        x: &'a [F],
        (b, h): (usize, usize),
        (length, d): (usize, usize),
        first: usize,
        count: usize,
    ) -> Mat<'a, F> {
        let start = ((b * length + first) * self.heads + h) * d;
        Mat::strided(&x[start..], count, d, self.heads * d)
    }
}

/// The sums of g [B, S, H] along time, up to each key and with it, as [B, H, S]. In f64: they reach thousands, and what
/// counts are their differences.
pub fn cumulative<F: Real>(shape: Shape, g: &[F]) -> Vec<f64> {
    let Shape { batch, keys, heads, .. } = shape;
    let mut sums = vec![0.0; batch * heads * keys];
    for (head, sums) in sums.chunks_exact_mut(keys).enumerate() {
        let (b, h) = (head / heads, head % heads);
        let mut total = 0.0;
        for (s, sum) in sums.iter_mut().enumerate() {
            total += g[(b * keys + s) * heads + h].as_f64();
            *sum = total;
        }
    }
    sums
}

/// Adds to the scores of query `t` with the keys from `key` on what was forgotten since each of them; `sums` are those
/// of one head.
fn forget<F: Real>(shape: Shape, sums: &[f64], t: usize, key: usize, scores: &mut [F]) {
    let own = sums[shape.seen(t) - 1];
    for (score, sum) in scores.iter_mut().zip(&sums[key..]) {
        *score += F::of(own - sum);
    }
}

/// The output [B, T, H, V] and the log of every query's sum of exponentials [B, T, H]. `sums`: of the log forget gates.
pub fn forward<F: Real>(
    shape: Shape,
    (q, k, v): (&[F], &[F], &[F]),
    sums: Option<&[f64]>,
    scale: F,
) -> (Vec<F>, Vec<F>) {
    let Shape { batch, steps, heads, values, .. } = shape;
    let mut o = vec![F::zero(); batch * steps * heads * values];
    let mut lse = vec![F::zero(); batch * steps * heads];
    // A task has all heads of a few queries of one sequence: what it writes is contiguous.
    let sequence = steps * heads;
    o.par_chunks_mut((sequence * values).max(1))
        .zip(lse.par_chunks_mut(sequence.max(1)))
        .enumerate()
        .for_each(|(b, (o, lse))| {
            o.par_chunks_mut(QUERIES * heads * values)
                .zip(lse.par_chunks_mut(QUERIES * heads))
                .enumerate()
                .for_each(|(i, (o, lse))| {
                    let mut tile = Tile::new(shape);
                    for h in 0..heads {
                        tile.queries(shape, (q, k, v), sums, scale, (b, h, i * QUERIES), o, lse);
                    }
                });
        });
    (o, lse)
}

/// Scratch of one task.
struct Tile<F> {
    scores: Vec<F>,
    out: Vec<F>,
    max: Vec<F>,
    sum: Vec<F>,
}

impl<F: Real> Tile<F> {
    fn new(shape: Shape) -> Self {
        Self {
            scores: vec![F::zero(); QUERIES * KEYS],
            out: vec![F::zero(); QUERIES * shape.values],
            max: vec![F::zero(); QUERIES],
            sum: vec![F::zero(); QUERIES],
        }
    }

    /// One head of a tile of queries from `first` on; `o` and `lse` hold all heads of the tile.
    #[allow(clippy::too_many_arguments)]
    fn queries(
        &mut self,
        shape: Shape,
        (q, k, v): (&[F], &[F], &[F]),
        sums: Option<&[f64]>,
        scale: F,
        (b, h, first): (usize, usize, usize),
        o: &mut [F],
        lse: &mut [F],
    ) {
        let Shape { keys, heads, dim, values, .. } = shape;
        let count = lse.len() / heads;
        let queries = shape.rows(q, (b, h), (shape.steps, dim), first, count);
        let sums = sums.map(|sums| &sums[(b * heads + h) * keys..][..keys]);
        let out = &mut self.out[..count * values];
        out.fill(F::zero());
        self.max.fill(F::neg_infinity());
        self.sum.fill(F::zero());
        for key in (shape.first(first)..shape.seen(first + count - 1)).step_by(KEYS) {
            let n = KEYS.min(keys - key);
            let scores = &mut self.scores[..count * n];
            let tile = shape.rows(k, (b, h), (keys, dim), key, n);
            gemm(MatMut::new(scores, count, n), F::zero(), scale, queries, tile.t());
            let rows = scores.chunks_exact_mut(n).zip(out.chunks_exact_mut(values));
            for (i, (row, out)) in rows.enumerate() {
                let seen = shape.within(first + i, key, n);
                row[..seen.start].fill(F::zero());
                row[seen.end..].fill(F::zero());
                if seen.is_empty() {
                    continue;
                }
                let start = key + seen.start;
                let row = &mut row[seen];
                if let Some(sums) = sums {
                    forget(shape, sums, first + i, start, row);
                }
                let max = row.iter().fold(self.max[i], |a, &b| if b > a { b } else { a });
                let old = if max > self.max[i] { (self.max[i] - max).exp_fast() } else { F::one() };
                row.iter_mut().for_each(|x| *x = (*x - max).exp_fast());
                self.sum[i] = self.sum[i] * old + sum2(&*row, &*row, |x, _| x);
                self.max[i] = max;
                out.iter_mut().for_each(|x| *x *= old);
            }
            let tile = shape.rows(v, (b, h), (keys, values), key, n);
            gemm(MatMut::new(out, count, values), F::one(), F::one(), Mat::new(scores, count, n), tile);
        }
        for (i, out) in out.chunks_exact(values).enumerate() {
            let inverse = F::one() / self.sum[i];
            let row = (i * heads + h) * values;
            for (o, &x) in o[row..row + values].iter_mut().zip(out) {
                *o = x * inverse;
            }
            lse[i * heads + h] = self.max[i] + self.sum[i].ln();
        }
    }
}

/// Gradients of q, k and v, and of the log forget gates where there are `sums`.
pub fn backward<F: Real>(
    shape: Shape,
    (q, k, v): (&[F], &[F], &[F]),
    sums: Option<&[f64]>,
    (o, lse): (&[F], &[F]),
    dout: &[F],
    scale: F,
) -> [Vec<F>; 4] {
    let Shape { batch, steps, keys, heads, dim, values, .. } = shape;
    let parts = map_heads(batch, heads, |b, h| {
        let mut dq = vec![F::zero(); steps * dim];
        let mut dk = vec![F::zero(); keys * dim];
        let mut dv = vec![F::zero(); keys * values];
        let sums = sums.map(|sums| &sums[(b * heads + h) * keys..][..keys]);
        // Gradients of the sums: a score has that of its query in it, and less that of its key.
        let mut d_sums = vec![0.0; if sums.is_some() { keys } else { 0 }];
        // do·o of every query: what the softmax takes off each score's gradient.
        let along: Vec<F> = (0..steps)
            .map(|t| {
                let row = ((b * steps + t) * heads + h) * values;
                dot(&o[row..row + values], &dout[row..row + values])
            })
            .collect();
        let mut p = vec![F::zero(); QUERIES * KEYS.min(keys)];
        let mut ds = vec![F::zero(); QUERIES * KEYS.min(keys)];
        for first in (0..steps).step_by(QUERIES) {
            let count = QUERIES.min(steps - first);
            let queries = shape.rows(q, (b, h), (steps, dim), first, count);
            let douts = shape.rows(dout, (b, h), (steps, values), first, count);
            for key in (shape.first(first)..shape.seen(first + count - 1)).step_by(KEYS) {
                let n = KEYS.min(keys - key);
                let (p, ds) = (&mut p[..count * n], &mut ds[..count * n]);
                let k_tile = shape.rows(k, (b, h), (keys, dim), key, n);
                let v_tile = shape.rows(v, (b, h), (keys, values), key, n);
                gemm(MatMut::new(p, count, n), F::zero(), scale, queries, k_tile.t());
                gemm(MatMut::new(ds, count, n), F::zero(), F::one(), douts, v_tile.t());
                for (i, (p, ds)) in p.chunks_exact_mut(n).zip(ds.chunks_exact_mut(n)).enumerate() {
                    let t = first + i;
                    let (lse, along) = (lse[(b * steps + t) * heads + h], along[t]);
                    let seen = shape.within(t, key, n);
                    for x in [&mut *p, &mut *ds] {
                        x[..seen.start].fill(F::zero());
                        x[seen.end..].fill(F::zero());
                    }
                    let start = key + seen.start;
                    let (p, ds) = (&mut p[seen.clone()], &mut ds[seen]);
                    if let Some(sums) = sums {
                        forget(shape, sums, t, start, p);
                    }
                    for (p, ds) in p.iter_mut().zip(&mut *ds) {
                        *p = (*p - lse).exp_fast();
                        *ds = *p * (*ds - along);
                    }
                    if sums.is_some() {
                        for (d, ds) in d_sums[start..].iter_mut().zip(&*ds) {
                            *d -= ds.as_f64();
                        }
                        d_sums[shape.seen(t) - 1] += ds.iter().map(|ds| ds.as_f64()).sum::<f64>();
                    }
                    ds.iter_mut().for_each(|ds| *ds *= scale);
                }
                let (p, ds) = (Mat::new(p, count, n), Mat::new(ds, count, n));
                let (one, dv) = (F::one(), &mut dv[key * values..(key + n) * values]);
                gemm(MatMut::new(dv, n, values), one, one, p.t(), douts);
                let dk = &mut dk[key * dim..(key + n) * dim];
                gemm(MatMut::new(dk, n, dim), one, one, ds.t(), queries);
                let dq = &mut dq[first * dim..(first + count) * dim];
                gemm(MatMut::new(dq, count, dim), one, one, ds, k_tile);
            }
        }
        // A gate is in the sums of all that come after it.
        let mut total = 0.0;
        let mut dg = vec![F::zero(); d_sums.len()];
        for (dg, d) in dg.iter_mut().zip(&d_sums).rev() {
            total += d;
            *dg = F::of(total);
        }
        [dq, dk, dv, dg]
    });
    let together = |i: usize, length: usize, d: usize| {
        let parts: Vec<&[F]> = parts.iter().map(|part| part[i].as_slice()).collect();
        scatter_heads(&parts, (length, heads, d))
    };
    let dg = if sums.is_some() { together(3, keys, 1) } else { vec![] };
    [together(0, steps, dim), together(1, keys, dim), together(2, keys, values), dg]
}
