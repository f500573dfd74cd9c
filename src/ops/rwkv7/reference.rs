//! CPU path: rows of one token, or of one token and head.

use num_traits::Float;
use rayon::prelude::*;

use super::{ShiftDims, norm_eps};
use crate::ops::real::{Real, dot, joined};
use crate::ops::rows::{ROWS, add, fill_blocks2, map_rows, sum_parts, sum2};

/// The token before row `row`; before the first without a state: `zeros`.
fn before<'a, F>(
    x: &'a [F],
    start: Option<&'a [F]>,
    zeros: &'a [F],
    row: usize,
    ShiftDims { steps, width, .. }: ShiftDims,
) -> &'a [F] {
    match row % steps {
        0 => start.map_or(zeros, |start| &start[row / steps * width..][..width]),
        _ => &x[(row - 1) * width..][..width],
    }
}

/// One mix.
pub fn shift<F: Real>(x: &[F], mix: &[F], start: Option<&[F]>, dims: ShiftDims) -> Vec<F> {
    let width = dims.width;
    let zeros = vec![F::zero(); width];
    map_rows(x.len() / width, width, |row, y: &mut [F]| {
        let before = before(x, start, &zeros, row, dims);
        for (((y, &now), &before), &mix) in y.iter_mut().zip(&x[row * width..]).zip(before).zip(mix) {
            *y = (before - now).fma(mix, now);
        }
    })
}

/// The last token of every sequence.
pub fn last<F: Real>(x: &[F], ShiftDims { steps, width, .. }: ShiftDims) -> Vec<F> {
    x.chunks_exact(steps * width).flat_map(|x| &x[(steps - 1) * width..]).copied().collect()
}

/// Gradients of x, of the mixes and of the state, from those of each mix of tokens [B, T, D], where it has one, and of the
/// last token.
pub fn shift_backward<F: Real>(
    x: &[F],
    mix: &[F],
    start: Option<&[F]>,
    (dy, d_last): (&[Option<&[F]>], &[F]),
    dims: ShiftDims,
) -> [Vec<F>; 3] {
    let ShiftDims { batch, steps, width, mixes } = dims;
    let zeros = vec![F::zero(); width];
    let parts: Vec<_> = (0..batch)
        .into_par_iter()
        .map(|b| {
            let mut dx = vec![F::zero(); steps * width];
            let (mut d_mix, mut d_start) = (vec![F::zero(); mixes * width], vec![F::zero(); width]);
            add(&d_last[b * width..][..width], &mut dx[(steps - 1) * width..]);
            for t in 0..steps {
                let row = b * steps + t;
                let (now, before) = (&x[row * width..][..width], before(x, start, &zeros, row, dims));
                let (earlier, own) = dx[..(t + 1) * width].split_at_mut(t * width);
                let earlier = match t {
                    0 => &mut d_start[..],
                    _ => &mut earlier[(t - 1) * width..],
                };
                for (j, dy) in dy.iter().enumerate().filter_map(|(j, dy)| Some((j, (*dy)?))) {
                    let dy = &dy[row * width..][..width];
                    let (mix, d_mix) = (&mix[j * width..][..width], &mut d_mix[j * width..][..width]);
                    for (((own, earlier), &dy), &mix) in own.iter_mut().zip(&mut *earlier).zip(dy).zip(mix) {
                        let moved = dy * mix;
                        *own += dy - moved;
                        *earlier += moved;
                    }
                    for (((d_mix, &dy), &now), &before) in d_mix.iter_mut().zip(dy).zip(now).zip(before) {
                        *d_mix = dy.fma(before - now, *d_mix);
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
        let (mut kappa, mut d, mut less) = (vec![F::zero(); key], vec![F::zero(); key], vec![F::zero(); key]);
        for (i, (dk, d_eta)) in dk.chunks_exact_mut(key).zip(d_eta.chunks_exact_mut(key)).enumerate() {
            let (span, own) = ((first + i) * key, (first + i) % heads * key);
            let (k, eta) = (&k[span..][..key], &eta[span..][..key]);
            let (d_erase, d_write) = (&d_erase[span..][..key], &d_write[span..][..key]);
            let (scale, bend) = (&k_k[own..][..key], &k_a[own..][..key]);
            for ((kappa, &k), &scale) in kappa.iter_mut().zip(k).zip(scale) {
                *kappa = k * scale;
            }
            let r = unit(&kappa);
            kappa.iter_mut().for_each(|x| *x *= r);
            for (((d, &eta), &d_erase), &d_kappa) in d.iter_mut().zip(eta).zip(d_erase).zip(&d_kappa[span..])
            {
                *d = eta.fma(d_erase, d_kappa);
            }
            let along = dot(&kappa, &d);
            for ((d, less), (&kappa, &eta)) in d.iter_mut().zip(&mut less).zip(kappa.iter().zip(eta)) {
                *d = r * (*d - kappa * along);
                *less = eta - F::one();
            }
            for ((d_scale, &d), &k) in d_scale[own..].iter_mut().zip(&d).zip(k) {
                *d_scale += d * k;
            }
            let written = d_write.iter().zip(k);
            for ((d_bend, (&d_write, &k)), &less) in d_bend[own..].iter_mut().zip(written.clone()).zip(&less)
            {
                *d_bend += d_write * k * less;
            }
            let erased = d_erase.iter().zip(&kappa);
            for ((d_eta, (&d_erase, &kappa)), ((&d_write, &k), &bend)) in
                d_eta.iter_mut().zip(erased).zip(written.zip(bend))
            {
                *d_eta = d_erase * kappa + d_write * k * bend;
            }
            let scaled = d.iter().zip(scale);
            for ((dk, (&d, &scale)), ((&d_write, &less), &bend)) in
                dk.iter_mut().zip(scaled).zip(d_write.iter().zip(&less).zip(bend))
            {
                *dk = d * scale + d_write * less.fma(bend, F::one());
            }
        }
        sums
    });
    let sums = sum_parts(&parts, 2 * width);
    [dk, d_eta, sums[..width].to_vec(), sums[width..].to_vec()]
}

/// ô of a row; gives 1 / its deviation.
fn standard<F: Real>(o: &[F], out: &mut [F]) -> F {
    let n = F::of(o.len() as f64);
    let mean = sum2(o, o, |x, _| x) / n;
    let var = sum2(o, o, |x, _| (x - mean) * (x - mean)) / n;
    let r = F::one() / (var + F::of(norm_eps(o.len()))).sqrt();
    for (out, &x) in out.iter_mut().zip(o) {
        *out = (x - mean) * r;
    }
    r
}

/// r ⊙ k of a row; gives Σ r k r_k, the weight of its value.
fn bonus<F: Real>([r, k, r_k]: [&[F]; 3], rk: &mut [F]) -> F {
    for ((rk, &r), &k) in rk.iter_mut().zip(r).zip(k) {
        *rk = r * k;
    }
    dot(rk, r_k)
}

/// What is read before the gate, of ô and the value.
fn unread<F: Real>(x: &mut [F], v: &[F], [weight, bias]: [&[F]; 2], bonus: F) {
    for (((x, &v), &weight), &bias) in x.iter_mut().zip(v).zip(weight).zip(bias) {
        *x = bonus.fma(v, x.fma(weight, bias));
    }
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
        let own = row % heads * key;
        let [o, r, k, v] = [o, r, k, v].map(|x| &x[row * key..][..key]);
        let [weight, bias, r_k] = [weight, bias, r_k].map(|x| &x[own..][..key]);
        let weight_of_v = bonus([r, k, r_k], y);
        standard(o, y);
        unread(y, v, [weight, bias], weight_of_v);
        if let Some(gate) = gate {
            y.iter_mut().zip(&gate[row * key..]).for_each(|(y, &gate)| *y *= gate);
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
    let [mut d_o, mut d_r, mut d_k, mut d_v, mut d_gate] = std::array::from_fn(|_| vec![F::zero(); o.len()]);
    // By blocks of rows, which give the sums for the parameters.
    let size = ROWS * key;
    let of_qk = d_r.par_chunks_mut(size).zip(d_k.par_chunks_mut(size));
    let of_v = d_v.par_chunks_mut(size).zip(d_gate.par_chunks_mut(size));
    let blocks = d_o.par_chunks_mut(size).zip(of_qk).zip(of_v).enumerate();
    let sums: Vec<Vec<F>> = blocks
        .map(|(block, ((d_o, (d_r, d_k)), (d_v, d_gate)))| {
            let mut sums = vec![F::zero(); 3 * width];
            let [mut x, mut d, mut d_x, mut rk] = std::array::from_fn(|_| vec![F::zero(); key]);
            for at in (0..d_o.len()).step_by(key) {
                let span = block * size + at;
                let own = span / key % heads * key;
                let [o, r, k, v] = [o, r, k, v].map(|x| &x[span..][..key]);
                let [weight, bias, r_k] = [weight, bias, r_k].map(|x| &x[own..][..key]);
                let bonus = bonus([r, k, r_k], &mut rk);
                let deviation = standard(o, &mut x);
                d.copy_from_slice(&dy[span..][..key]);
                if let Some(gate) = gate {
                    let d_gate = &mut d_gate[at..][..key];
                    d_gate.copy_from_slice(&x);
                    unread(d_gate, v, [weight, bias], bonus);
                    for ((d_gate, d), &gate) in d_gate.iter_mut().zip(&mut d).zip(&gate[span..]) {
                        *d_gate *= *d;
                        *d *= gate;
                    }
                }
                let d_bonus = dot(&d, v);
                for ((d_x, &d), &weight) in d_x.iter_mut().zip(&d).zip(weight) {
                    *d_x = d * weight;
                }
                let (mean, along) = (sum2(&d_x, &d_x, |d, _| d) / n, dot(&d_x, &x) / n);
                for ((sum, &d), &x) in sums[own..].iter_mut().zip(&d).zip(&x) {
                    *sum += d * x;
                }
                add(&d, &mut sums[width + own..]);
                for (sum, &rk) in sums[2 * width + own..].iter_mut().zip(&rk) {
                    *sum += d_bonus * rk;
                }
                for ((d_o, &d_x), &x) in d_o[at..].iter_mut().zip(&d_x).zip(&x) {
                    *d_o = deviation * (d_x - mean - x * along);
                }
                for ((d_r, &k), &r_k) in d_r[at..].iter_mut().zip(k).zip(r_k) {
                    *d_r = d_bonus * k * r_k;
                }
                for ((d_k, &r), &r_k) in d_k[at..].iter_mut().zip(r).zip(r_k) {
                    *d_k = d_bonus * r * r_k;
                }
                for (d_v, &d) in d_v[at..].iter_mut().zip(&d) {
                    *d_v = bonus * d;
                }
            }
            sums
        })
        .collect();
    let sums = sum_parts(&sums, 3 * width);
    let [d_weight, d_bias, d_rk] = std::array::from_fn(|i| sums[i * width..][..width].to_vec());
    [d_o, d_r, d_k, d_v, d_weight, d_bias, d_rk, d_gate]
}
