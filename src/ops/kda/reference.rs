//! CPU path: rows of K channels, one for each token and head.

use crate::ops::real::{Real, dot, sigmoid, softplus};
use crate::ops::rows::{fill_blocks, fill_blocks2, map_rows, sum_parts};

/// The log decays.
pub fn gate<F: Real>(f: &[F], a_log: &[F], dt_bias: &[F], key: usize) -> Vec<F> {
    let heads = a_log.len();
    map_rows(f.len() / key, key, |row, g: &mut [F]| {
        let head = row % heads;
        let rate = -a_log[head].exp();
        for ((g, &f), &bias) in g.iter_mut().zip(&f[row * key..]).zip(&dt_bias[head * key..]) {
            *g = rate * softplus(f + bias);
        }
    })
}

/// Gradients of f, a_log and dt_bias.
pub fn gate_backward<F: Real>(f: &[F], a_log: &[F], dt_bias: &[F], dg: &[F], key: usize) -> [Vec<F>; 3] {
    let heads = a_log.len();
    let mut df = vec![F::zero(); f.len()];
    let parts = fill_blocks(&mut df, key, |first, block| {
        let mut sums = vec![F::zero(); heads + dt_bias.len()];
        let (d_log, d_bias) = sums.split_at_mut(heads);
        let mut soft = vec![F::zero(); key];
        for (i, df) in block.chunks_exact_mut(key).enumerate() {
            let (row, head) = (first + i, (first + i) % heads);
            let rate = -a_log[head].exp();
            let (f, dg) = (&f[row * key..][..key], &dg[row * key..][..key]);
            let bias = &dt_bias[head * key..][..key];
            // Loops of one exponential each: those vectorise.
            for ((soft, &f), &bias) in soft.iter_mut().zip(f).zip(bias) {
                *soft = softplus(f + bias);
            }
            for ((df, &f), &bias) in df.iter_mut().zip(f).zip(bias) {
                *df = sigmoid(f + bias);
            }
            for ((df, d_bias), &dg) in df.iter_mut().zip(&mut d_bias[head * key..]).zip(dg) {
                *df *= dg * rate;
                *d_bias += *df;
            }
            // The gate is its own derivative by a_log.
            d_log[head] += rate * dot(dg, &soft);
        }
        sums
    });
    let sums = sum_parts(&parts, heads + dt_bias.len());
    [df, sums[..heads].to_vec(), sums[heads..].to_vec()]
}

/// exp(g) ⊙ k and β k.
pub fn keys<F: Real>(k: &[F], g: &[F], beta: &[F], key: usize) -> [Vec<F>; 2] {
    let (mut read, mut write) = (vec![F::zero(); k.len()], vec![F::zero(); k.len()]);
    fill_blocks2((&mut read, key), (&mut write, key), |first, read, write| {
        let rows = read.chunks_exact_mut(key).zip(write.chunks_exact_mut(key)).enumerate();
        for (row, (read, write)) in rows.map(|(i, rows)| (first + i, rows)) {
            let given = k[row * key..].iter().zip(&g[row * key..]);
            for ((read, write), (&k, &g)) in read.iter_mut().zip(write).zip(given) {
                *read = g.exp_fast() * k;
                *write = beta[row] * k;
            }
        }
    });
    [read, write]
}

/// Gradients of k, g and beta.
pub fn keys_backward<F: Real>(
    k: &[F],
    g: &[F],
    beta: &[F],
    d_read: &[F],
    d_write: &[F],
    key: usize,
) -> [Vec<F>; 3] {
    let (mut dk, mut dg) = (vec![F::zero(); k.len()], vec![F::zero(); k.len()]);
    let d_beta = fill_blocks2((&mut dk, key), (&mut dg, key), |first, dk, dg| {
        let rows = dk.chunks_exact_mut(key).zip(dg.chunks_exact_mut(key)).enumerate();
        rows.map(|(i, (dk, dg))| {
            let (row, span) = (first + i, (first + i) * key..(first + i + 1) * key);
            let (k, g) = (&k[span.clone()], &g[span.clone()]);
            let (d_read, d_write) = (&d_read[span.clone()], &d_write[span]);
            for c in 0..key {
                let d = g[c].exp_fast() * d_read[c];
                dk[c] = beta[row].fma(d_write[c], d);
                dg[c] = d * k[c];
            }
            dot(k, d_write)
        })
        .collect::<Vec<F>>()
    });
    [dk, dg, d_beta.concat()]
}
