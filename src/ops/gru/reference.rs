//! CPU path of the gated recurrent unit: a few sequences at a time go through the steps together.

use rayon::prelude::*;

use crate::ops::linear::gemm::{Mat, block_times, rows_times, transposed_times};
use crate::ops::real::{Real, sigmoid};
use crate::ops::rows::column_sums;

/// Sequences of one task. Products always have as many rows, so that a sequence's bits are its own.
const BLOCK: usize = 4;

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

/// One unit at one step: its gates, from what input (`x`) and state (`a`) give to r, z and n.
struct Unit<F> {
    r: F,
    z: F,
    n: F,
}

impl<F: Real> Unit<F> {
    #[inline(always)]
    fn new(x: [F; 3], a: [F; 3]) -> Self {
        let r = sigmoid(x[0] + a[0]);
        let two = F::of(2.0);
        // tanh, as a logistic function.
        let n = two.fma(sigmoid(two * r.fma(a[2], x[2])), -F::one());
        Self { r, z: sigmoid(x[1] + a[1]), n }
    }
}

impl<F: Real> Gru<'_, F> {
    /// The parts of a row of 3D for one unit.
    #[inline(always)]
    fn parts(&self, row: &[F], unit: usize) -> [F; 3] {
        [row[unit], row[self.width + unit], row[2 * self.width + unit]]
    }

    /// All states, and the last ones.
    pub fn forward(&self) -> (Vec<F>, Vec<F>) {
        let (width, sequence) = (self.width, self.steps * self.width);
        let weight = Mat::new(self.weight, 3 * width, width).t();
        let mut h = vec![F::zero(); self.batch * sequence];
        let mut last = vec![F::zero(); self.batch * width];
        h.par_chunks_mut(BLOCK * sequence).zip(last.par_chunks_mut(BLOCK * width)).enumerate().for_each(
            |(block, (h, state))| {
                let (first, count) = (block * BLOCK, state.len() / width);
                if let Some(start) = self.state {
                    state.copy_from_slice(&start[first * width..][..count * width]);
                }
                let mut a = vec![F::zero(); count * 3 * width];
                for t in 0..self.steps {
                    block_times(state, count, BLOCK, weight, Some(self.bias), &mut a);
                    for (i, (state, a)) in
                        state.chunks_exact_mut(width).zip(a.chunks_exact(3 * width)).enumerate()
                    {
                        let x = &self.gates[((first + i) * self.steps + t) * 3 * width..][..3 * width];
                        for (unit, h) in state.iter_mut().enumerate() {
                            let Unit { z, n, .. } = Unit::new(self.parts(x, unit), self.parts(a, unit));
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
        let weight = Mat::new(self.weight, wide, width);
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
                for t in (0..self.steps).rev() {
                    for (i, (carry, now)) in
                        carry.chunks_exact_mut(width).zip(now.chunks_exact_mut(wide)).enumerate()
                    {
                        let row = (first + i) * self.steps + t;
                        let (x, a) = (&self.gates[row * wide..][..wide], &a[row * wide..][..wide]);
                        let (d_h, before) = (&d_h[row * width..][..width], &before[row * width..][..width]);
                        let own = (i * self.steps + t) * wide;
                        let d_x = &mut d_x[own..own + wide];
                        for unit in 0..width {
                            let a = self.parts(a, unit);
                            let Unit { r, z, n } = Unit::new(self.parts(x, unit), a);
                            let d = carry[unit] + d_h[unit];
                            let d_n = d * (F::one() - z) * (F::one() - n * n);
                            let d_z = d * (before[unit] - n) * z * (F::one() - z);
                            let d_r = d_n * a[2] * r * (F::one() - r);
                            carry[unit] = d * z;
                            (d_x[unit], d_x[width + unit], d_x[2 * width + unit]) = (d_r, d_z, d_n);
                            (now[unit], now[width + unit], now[2 * width + unit]) = (d_r, d_z, d_n * r);
                        }
                        d_a[own..own + wide].copy_from_slice(now);
                    }
                    block_times(&now, count, BLOCK, weight, None, &mut through);
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
