//! CPU path of the gated recurrent unit: a few sequences at a time go through the steps together.

use rayon::prelude::*;

use crate::ops::linear::gemm::{Mat, Panels, rows_times, transposed_times};
use crate::ops::real::{Real, sigmoid};
use crate::ops::rows::column_sums;

/// Sequences of one task.
const BLOCK: usize = 4;

/// Y ← X·M + bias for the `count` rows of one task.
fn times<F: Real>(m: &Panels<F>, count: usize, x: &[F], bias: Option<&[F]>, y: &mut [F]) {
    match count {
        1 => m.times::<1>(x, bias, y),
        2 => m.times::<2>(x, bias, y),
        3 => m.times::<3>(x, bias, y),
        _ => m.times::<BLOCK>(x, bias, y),
    }
}

/// The arguments of one call, as slices; shapes as in [`super::gru`].
#[derive(Clone, Copy)]
pub struct Gru<'a, F> {
    pub batch: usize,
    pub steps: usize,
    pub width: usize,
    pub gates: &'a [F],
    pub weight: &'a [F],
    pub bias: &'a [F],
    pub state: Option<&'a [F]>,
}

/// Gradients of the arguments, each with its argument's shape.
pub struct GruGrads<F> {
    pub gates: Vec<F>,
    pub weight: Vec<F>,
    pub bias: Vec<F>,
    pub state: Vec<F>,
}

/// The gates r, z and n of all units at one step.
struct Gates<F> {
    r: Vec<F>,
    z: Vec<F>,
    n: Vec<F>,
}

/// The three parts of a row.
fn parts<F>(row: &[F]) -> [&[F]; 3] {
    let (first, rest) = row.split_at(row.len() / 3);
    let (second, third) = rest.split_at(rest.len() / 2);
    [first, second, third]
}

impl<F: Real> Gates<F> {
    fn new(width: usize) -> Self {
        let zeros = || vec![F::zero(); width];
        Self { r: zeros(), z: zeros(), n: zeros() }
    }

    /// From the rows that input (`x`) and state (`a`) give. One exponential a loop: such loops vectorise.
    fn compute(&mut self, x: &[F], a: &[F]) {
        let ([x_r, x_z, x_n], [a_r, a_z, a_n]) = (parts(x), parts(a));
        let two = F::of(2.0);
        for ((r, &x), &a) in self.r.iter_mut().zip(x_r).zip(a_r) {
            *r = sigmoid(x + a);
        }
        for ((z, &x), &a) in self.z.iter_mut().zip(x_z).zip(a_z) {
            *z = sigmoid(x + a);
        }
        for (((n, &r), &x), &a) in self.n.iter_mut().zip(&self.r).zip(x_n).zip(a_n) {
            // tanh, as a logistic function.
            *n = two.fma(sigmoid(two * r.fma(a, x)), -F::one());
        }
    }
}

impl<F: Real> Gru<'_, F> {
    /// All states, and the last ones.
    pub fn forward(&self) -> (Vec<F>, Vec<F>) {
        let (width, sequence) = (self.width, self.steps * self.width);
        let weight = Panels::new(Mat::new(self.weight, 3 * width, width).t());
        let mut h = vec![F::zero(); self.batch * sequence];
        let mut last = vec![F::zero(); self.batch * width];
        h.par_chunks_mut(BLOCK * sequence).zip(last.par_chunks_mut(BLOCK * width)).enumerate().for_each(
            |(block, (h, state))| {
                let (first, count) = (block * BLOCK, state.len() / width);
                if let Some(start) = self.state {
                    state.copy_from_slice(&start[first * width..][..count * width]);
                }
                let mut a = vec![F::zero(); count * 3 * width];
                let mut gates = Gates::new(width);
                for t in 0..self.steps {
                    times(&weight, count, state, Some(self.bias), &mut a);
                    for (i, (state, a)) in
                        state.chunks_exact_mut(width).zip(a.chunks_exact(3 * width)).enumerate()
                    {
                        let x = &self.gates[((first + i) * self.steps + t) * 3 * width..][..3 * width];
                        gates.compute(x, a);
                        for ((h, &z), &n) in state.iter_mut().zip(&gates.z).zip(&gates.n) {
                            *h = z.fma(*h - n, n);
                        }
                        h[i * sequence + t * width..][..width].copy_from_slice(state);
                    }
                }
            },
        );
        (h, last)
    }

    /// The state before every step, [B, T, D].
    fn before(&self, h: &[F]) -> Vec<F> {
        let (width, sequence) = (self.width, self.steps * self.width);
        let mut before = vec![F::zero(); h.len()];
        for (b, (before, h)) in before.chunks_exact_mut(sequence).zip(h.chunks_exact(sequence)).enumerate() {
            if let Some(state) = self.state {
                before[..width].copy_from_slice(&state[b * width..][..width]);
            }
            before[width..].copy_from_slice(&h[..sequence - width]);
        }
        before
    }

    /// Gradients of the arguments from those of the outputs, `d_h` [B, T, D] and `d_last` [B, D], and the
    /// states `h`.
    pub fn backward(&self, h: &[F], d_h: &[F], d_last: &[F]) -> GruGrads<F> {
        let (width, rows) = (self.width, self.batch * self.steps);
        let wide = 3 * width;
        let before = self.before(h);
        let a = rows_times(&before, rows, Mat::new(self.weight, wide, width).t(), Some(self.bias));
        let weight = Panels::new(Mat::new(self.weight, wide, width));
        // Of the gates as the input gives to them, and as the state does.
        let mut d_x = vec![F::zero(); rows * wide];
        let mut d_a = vec![F::zero(); rows * wide];
        let mut d_state = d_last.to_vec();
        let sequences = BLOCK * self.steps * wide;
        d_x.par_chunks_mut(sequences)
            .zip(d_a.par_chunks_mut(sequences))
            .zip(d_state.par_chunks_mut(BLOCK * width))
            .enumerate()
            .for_each(|(block, ((d_x, d_a), carry))| {
                let (first, count) = (block * BLOCK, carry.len() / width);
                let mut now = vec![F::zero(); count * wide];
                let mut through = vec![F::zero(); count * width];
                let mut gates = Gates::new(width);
                for t in (0..self.steps).rev() {
                    for (i, (carry, now)) in
                        carry.chunks_exact_mut(width).zip(now.chunks_exact_mut(wide)).enumerate()
                    {
                        let row = (first + i) * self.steps + t;
                        let (x, a) = (&self.gates[row * wide..][..wide], &a[row * wide..][..wide]);
                        let (d_h, before) = (&d_h[row * width..][..width], &before[row * width..][..width]);
                        let own = (i * self.steps + t) * wide;
                        let d_x = &mut d_x[own..own + wide];
                        gates.compute(x, a);
                        let Gates { r, z, n } = &gates;
                        let a_n = parts(a)[2];
                        // The slices have one length, so that no index is checked.
                        let (r, z, n, a_n) = (&r[..width], &z[..width], &n[..width], &a_n[..width]);
                        let (d_h, before) = (&d_h[..width], &before[..width]);
                        let (d_r, rest) = now.split_at_mut(width);
                        let (d_z, d_n) = rest.split_at_mut(width);
                        let (carry, d_n) = (&mut carry[..width], &mut d_n[..width]);
                        for u in 0..width {
                            let d = carry[u] + d_h[u];
                            d_n[u] = d * (F::one() - z[u]) * (F::one() - n[u] * n[u]);
                            d_z[u] = d * (before[u] - n[u]) * z[u] * (F::one() - z[u]);
                            d_r[u] = d_n[u] * a_n[u] * r[u] * (F::one() - r[u]);
                            carry[u] = d * z[u];
                        }
                        d_x.copy_from_slice(now);
                        // The state gives to n through r.
                        now[2 * width..].iter_mut().zip(r).for_each(|(d, &r)| *d *= r);
                        d_a[own..own + wide].copy_from_slice(now);
                    }
                    times(&weight, count, &now, None, &mut through);
                    crate::ops::rows::add(&through, carry);
                }
            });
        GruGrads {
            weight: transposed_times(&d_a, &before, rows, wide, width),
            bias: column_sums(&d_a, wide),
            gates: d_x,
            state: d_state,
        }
    }
}
