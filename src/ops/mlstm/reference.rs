//! CPU path of the gates and of the division.

use num_traits::Float;

use crate::ops::real::{Real, dot};
use crate::ops::rows::{fill_blocks, fill_blocks2, map_rows};

/// What the gates make of the keys.
pub struct Gates<F> {
    /// exp(i − m) k, [B, T, H, K]
    pub write: Vec<F>,
    /// log f + m_before − m for every row of the state, [B, T, H, K]
    pub decay: Vec<F>,
    /// [B, T, H]
    pub m: Vec<F>,
    /// The last m, [B, H].
    pub last: Vec<F>,
}

pub fn gates<F: Real>(
    k: &[F],
    i: &[F],
    log_f: &[F],
    start: Option<&[F]>,
    [batch, steps, heads, key]: [usize; 4],
) -> Gates<F> {
    let mut last = start.map_or_else(|| vec![F::zero(); batch * heads], <[F]>::to_vec);
    // m, and log f + m_before − m, one number a token and head.
    let (mut m, mut kept) = (Vec::with_capacity(i.len()), Vec::with_capacity(i.len()));
    for (b, most) in last.chunks_exact_mut(heads).enumerate() {
        for at in b * steps * heads..(b + 1) * steps * heads {
            let most = &mut most[at % heads];
            let moved = log_f[at] + *most;
            *most = Float::max(moved, i[at]);
            m.push(*most);
            kept.push(moved - *most);
        }
    }
    let (mut write, mut decay) = (vec![F::zero(); k.len()], vec![F::zero(); k.len()]);
    fill_blocks2((&mut write, key), (&mut decay, key), |first, write, decay| {
        let rows = write.chunks_exact_mut(key).zip(decay.chunks_exact_mut(key)).enumerate();
        for (row, (write, decay)) in rows.map(|(i, rows)| (first + i, rows)) {
            let strength = (i[row] - m[row]).exp();
            write.iter_mut().zip(&k[row * key..]).for_each(|(write, &k)| *write = strength * k);
            decay.fill(kept[row]);
        }
    });
    Gates { write, decay, m, last }
}

/// Gradients of k, i and log f.
pub fn gates_backward<F: Real>(
    k: &[F],
    i: &[F],
    m: &[F],
    d_write: &[F],
    d_decay: &[F],
    key: usize,
) -> [Vec<F>; 3] {
    let mut dk = vec![F::zero(); k.len()];
    let sums = fill_blocks(&mut dk, key, |first, dk| {
        let rows = dk.chunks_exact_mut(key).enumerate();
        rows.map(|(j, dk)| {
            let (row, span) = (first + j, (first + j) * key..(first + j + 1) * key);
            let strength = (i[row] - m[row]).exp();
            dk.iter_mut().zip(&d_write[span.clone()]).for_each(|(dk, &d)| *dk = strength * d);
            (dot(dk, &k[span.clone()]), d_decay[span].iter().copied().sum::<F>())
        })
        .collect::<Vec<(F, F)>>()
    });
    let (di, d_log) = sums.into_iter().flatten().unzip();
    [dk, di, d_log]
}

pub fn read<F: Real>(num: &[F], den: &[F], floor: &[F], value: usize) -> Vec<F> {
    map_rows(den.len(), value, |row, h: &mut [F]| {
        let divisor = Float::max(den[row].abs(), floor[row]);
        h.iter_mut().zip(&num[row * value..]).for_each(|(h, &num)| *h = num / divisor);
    })
}

/// Gradients of what was read of the memory and of the normaliser.
pub fn read_backward<F: Real>(num: &[F], den: &[F], floor: &[F], dh: &[F], value: usize) -> (Vec<F>, Vec<F>) {
    let mut d_num = vec![F::zero(); num.len()];
    let d_den = fill_blocks(&mut d_num, value, |first, d_num| {
        let rows = d_num.chunks_exact_mut(value).enumerate();
        rows.map(|(i, d_num)| {
            let (row, span) = (first + i, (first + i) * value..(first + i + 1) * value);
            let divisor = Float::max(den[row].abs(), floor[row]);
            d_num.iter_mut().zip(&dh[span.clone()]).for_each(|(d, &dh)| *d = dh / divisor);
            match den[row].abs() > floor[row] {
                true => -dot(d_num, &num[span]) / den[row],
                false => F::zero(),
            }
        })
        .collect::<Vec<F>>()
    });
    (d_num, d_den.concat())
}
