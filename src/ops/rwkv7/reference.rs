//! CPU path: rows of one token, or of one token and head.

use num_traits::Float;
use rayon::prelude::*;

use super::{ShiftDims, norm_eps};
use crate::ops::real::{Real, dot, joined};
use crate::ops::rows::{ROWS, add, fill_blocks2, map_rows, sum_parts, sum2};

/// The token before row `row`; `None`: zeros.
fn before<'a, F>(x: &'a [F], start: Option<&'a [F]>, row: usize, dims: ShiftDims) -> Option<&'a [F]> {
    let ShiftDims { steps, width, .. } = dims;
    match row % steps {
        0 => start.map(|start| &start[row / steps * width..][..width]),
        _ => Some(&x[(row - 1) * width..][..width]),
    }
}

/// One mix.
pub fn shift<F: Real>(x: &[F], mix: &[F], start: Option<&[F]>, dims: ShiftDims) -> Vec<F> {
    let width = dims.width;
    map_rows(x.len() / width, width, |row, y: &mut [F]| {
        let before = before(x, start, row, dims);
        for (c, (y, &now)) in y.iter_mut().zip(&x[row * width..]).enumerate() {
            let change = before.map_or(F::zero(), |before| before[c]) - now;
            *y = change.fma(mix[c], now);
        }
    })
}

/// The last token of every sequence.
pub fn last<F: Real>(x: &[F], ShiftDims { steps, width, .. }: ShiftDims) -> Vec<F> {
    x.chunks_exact(steps * width).flat_map(|x| &x[(steps - 1) * width..]).copied().collect()
}

/// Gradients of x, of the mixes and of the state, from those of the mixed tokens [n, B, T, D] and of the last one.
pub fn shift_backward<F: Real>(
    x: &[F],
    mix: &[F],
    start: Option<&[F]>,
    (dy, d_last): (&[F], &[F]),
    dims: ShiftDims,
) -> [Vec<F>; 3] {
    let ShiftDims { batch, steps, width, mixes } = dims;
    let size = x.len();
    let parts: Vec<_> = (0..batch)
        .into_par_iter()
        .map(|b| {
            let mut dx = vec![F::zero(); steps * width];
            let (mut d_mix, mut d_start) = (vec![F::zero(); mixes * width], vec![F::zero(); width]);
            add(&d_last[b * width..][..width], &mut dx[(steps - 1) * width..]);
            for t in 0..steps {
                let row = b * steps + t;
                let (now, before) = (&x[row * width..][..width], before(x, start, row, dims));
                let (earlier, own) = dx[..(t + 1) * width].split_at_mut(t * width);
                let earlier = match t {
                    0 => &mut d_start[..],
                    _ => &mut earlier[(t - 1) * width..],
                };
                for j in 0..mixes {
                    let dy = &dy[j * size + row * width..][..width];
                    let (mix, d_mix) = (&mix[j * width..][..width], &mut d_mix[j * width..][..width]);
                    for c in 0..width {
                        let change = before.map_or(F::zero(), |before| before[c]) - now[c];
                        let moved = dy[c] * mix[c];
                        own[c] += dy[c] - moved;
                        earlier[c] += moved;
                        d_mix[c] = dy[c].fma(change, d_mix[c]);
                    }
                }
            }
            (dx, d_mix, d_start)
        })
        .collect();
    let of_mix: Vec<Vec<F>> = parts.iter().map(|part| part.1.clone()).collect();
    [
        joined(parts.iter().map(|part| &part.0)),
        sum_parts(&of_mix, mixes * width),
        joined(parts.iter().map(|part| &part.2)),
    ]
}

/// 1 / |x|; a zero vector stays zero.
fn unit<F: Real>(x: &[F]) -> F {
    F::one() / Float::max(dot(x, x).sqrt(), F::of(1e-12))
}

/// κ, η ⊙ κ and k̃.
pub fn keys<F: Real>(k: &[F], eta: &[F], k_k: &[F], k_a: &[F], key: usize) -> [Vec<F>; 3] {
    let (rows, heads) = (k.len() / key, k_k.len() / key);
    let kappa = map_rows(rows, key, |row, kappa: &mut [F]| {
        let scale = &k_k[row % heads * key..][..key];
        for ((kappa, &k), &scale) in kappa.iter_mut().zip(&k[row * key..]).zip(scale) {
            *kappa = k * scale;
        }
        let r = unit(kappa);
        kappa.iter_mut().for_each(|x| *x *= r);
    });
    let erase = eta.iter().zip(&kappa).map(|(&eta, &kappa)| eta * kappa).collect();
    let write = map_rows(rows, key, |row, write: &mut [F]| {
        let bend = &k_a[row % heads * key..][..key];
        let given = k[row * key..].iter().zip(&eta[row * key..]).zip(bend);
        for (write, ((&k, &eta), &bend)) in write.iter_mut().zip(given) {
            *write = k * (eta - F::one()).fma(bend, F::one());
        }
    });
    [kappa, erase, write]
}

/// Gradients of k, η, k_k and k_a, from those of κ, η ⊙ κ and k̃.
pub fn keys_backward<F: Real>(
    k: &[F],
    eta: &[F],
    k_k: &[F],
    k_a: &[F],
    [d_kappa, d_erase, d_write]: [&[F]; 3],
    key: usize,
) -> [Vec<F>; 4] {
    let (width, heads) = (k_k.len(), k_k.len() / key);
    let (mut dk, mut d_eta) = (vec![F::zero(); k.len()], vec![F::zero(); k.len()]);
    let parts = fill_blocks2((&mut dk, key), (&mut d_eta, key), |first, dk, d_eta| {
        let mut sums = vec![F::zero(); 2 * width];
        let (d_scale, d_bend) = sums.split_at_mut(width);
        let (mut kappa, mut d) = (vec![F::zero(); key], vec![F::zero(); key]);
        for (i, (dk, d_eta)) in dk.chunks_exact_mut(key).zip(d_eta.chunks_exact_mut(key)).enumerate() {
            let (span, own) = ((first + i) * key, (first + i) % heads * key);
            let row = |x: &'_ [F]| x[span..][..key].to_vec();
            let (k, eta, d_erase, d_write) = (row(k), row(eta), row(d_erase), row(d_write));
            let (scale, bend) = (&k_k[own..][..key], &k_a[own..][..key]);
            for c in 0..key {
                kappa[c] = k[c] * scale[c];
            }
            let r = unit(&kappa);
            for c in 0..key {
                kappa[c] *= r;
                d[c] = eta[c].fma(d_erase[c], d_kappa[span + c]);
            }
            let along = dot(&kappa, &d);
            for c in 0..key {
                let d = r * (d[c] - kappa[c] * along);
                let less = eta[c] - F::one();
                d_scale[own + c] += d * k[c];
                d_bend[own + c] += d_write[c] * k[c] * less;
                d_eta[c] = d_erase[c] * kappa[c] + d_write[c] * k[c] * bend[c];
                dk[c] = d * scale[c] + d_write[c] * less.fma(bend[c], F::one());
            }
        }
        sums
    });
    let sums = sum_parts(&parts, 2 * width);
    [dk, d_eta, sums[..width].to_vec(), sums[width..].to_vec()]
}

/// ô of a row, and 1 / its deviation.
fn standard<F: Real>(o: &[F]) -> (Vec<F>, F) {
    let n = F::of(o.len() as f64);
    let mean = sum2(o, o, |x, _| x) / n;
    let var = sum2(o, o, |x, _| (x - mean) * (x - mean)) / n;
    let r = F::one() / (var + F::of(norm_eps(o.len()))).sqrt();
    (o.iter().map(|&x| (x - mean) * r).collect(), r)
}

/// The outputs, of o, r, k, v and the parameters weight, bias and r_k.
pub fn read<F: Real>(
    [o, r, k, v]: [&[F]; 4],
    [weight, bias, r_k]: [&[F]; 3],
    gate: Option<&[F]>,
    key: usize,
) -> Vec<F> {
    let heads = weight.len() / key;
    map_rows(o.len() / key, key, |row, y: &mut [F]| {
        let (span, own) = (row * key, row % heads * key);
        let (x, _) = standard(&o[span..][..key]);
        let given = r[span..][..key].iter().zip(&k[span..]).zip(&r_k[own..]);
        let bonus: F = given.map(|((&r, &k), &r_k)| r * k * r_k).sum();
        for c in 0..key {
            let read = bonus.fma(v[span + c], x[c].fma(weight[own + c], bias[own + c]));
            y[c] = gate.map_or(read, |gate| read * gate[span + c]);
        }
    })
}

/// Gradients of o, r, k, v, weight, bias, r_k and the gate.
pub fn read_backward<F: Real>(
    [o, r, k, v]: [&[F]; 4],
    [weight, bias, r_k]: [&[F]; 3],
    gate: Option<&[F]>,
    dy: &[F],
    key: usize,
) -> [Vec<F>; 8] {
    let (width, heads) = (weight.len(), weight.len() / key);
    let n = F::of(key as f64);
    // By blocks of rows: the gradients of o, r, k, v and the gate, and the sums for the parameters.
    let blocks = o.len().div_ceil(ROWS * key);
    let parts: Vec<([Vec<F>; 5], Vec<F>)> = (0..blocks)
        .into_par_iter()
        .map(|block| {
            let first = block * ROWS;
            let rows = ROWS.min(o.len() / key - first);
            let mut grads: [Vec<F>; 5] = std::array::from_fn(|_| vec![F::zero(); rows * key]);
            let mut sums = vec![F::zero(); 3 * width];
            for i in 0..rows {
                let (span, own, at) = ((first + i) * key, (first + i) % heads * key, i * key);
                let (x, deviation) = standard(&o[span..][..key]);
                let given = r[span..][..key].iter().zip(&k[span..]).zip(&r_k[own..]);
                let bonus: F = given.map(|((&r, &k), &r_k)| r * k * r_k).sum();
                let mut d = dy[span..][..key].to_vec();
                if let Some(gate) = gate {
                    for c in 0..key {
                        let read = bonus.fma(v[span + c], x[c].fma(weight[own + c], bias[own + c]));
                        grads[4][at + c] = d[c] * read;
                        d[c] *= gate[span + c];
                    }
                }
                let d_bonus = dot(&d, &v[span..][..key]);
                let d_x: Vec<F> = d.iter().zip(&weight[own..]).map(|(&d, &w)| d * w).collect();
                let (mean, along) = (d_x.iter().copied().sum::<F>() / n, dot(&d_x, &x) / n);
                for c in 0..key {
                    let (r, k, r_k) = (r[span + c], k[span + c], r_k[own + c]);
                    sums[own + c] += d[c] * x[c];
                    sums[width + own + c] += d[c];
                    sums[2 * width + own + c] += d_bonus * r * k;
                    grads[0][at + c] = deviation * (d_x[c] - mean - x[c] * along);
                    grads[1][at + c] = d_bonus * k * r_k;
                    grads[2][at + c] = d_bonus * r * r_k;
                    grads[3][at + c] = bonus * d[c];
                }
            }
            (grads, sums)
        })
        .collect();
    let (grads, sums): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
    let sums = sum_parts(&sums, 3 * width);
    let of = |i: usize| grads.iter().flat_map(|part: &[Vec<F>; 5]| &part[i]).copied().collect::<Vec<F>>();
    let sum = |i: usize| sums[i * width..(i + 1) * width].to_vec();
    [of(0), of(1), of(2), of(3), sum(0), sum(1), sum(2), of(4)]
}
