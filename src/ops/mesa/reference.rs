//! CPU path of the mesa layer: one token after the other, with a Cholesky factorisation at each.

use super::LEAST;
use crate::ops::real::{Real, dot, joined, map_heads, scatter_heads, sigmoid, softplus};
use crate::ops::scan::{CHUNK, Rows};

/// Columns of a factor that are worked on at a time.
const TILE: usize = 32;

/// The arguments of one call, as slices; shapes as in [`super::mesa`].
#[derive(Clone, Copy)]
pub struct Mesa<'a, F> {
    pub batch: usize,
    pub steps: usize,
    pub heads: usize,
    pub key: usize,
    pub value: usize,
    pub q: &'a [F],
    pub k: &'a [F],
    pub v: &'a [F],
    pub beta: &'a [F],
    pub g: &'a [F],
    pub lambda: &'a [F],
    pub keys: Option<&'a [F]>,
    pub values: Option<&'a [F]>,
}

/// What the forward pass computes.
pub struct MesaForward<F> {
    /// [B, T, H, V]
    pub o: Vec<F>,
    /// [B, H, K, K]
    pub keys: Vec<F>,
    /// [B, H, K, V]
    pub values: Vec<F>,
    /// [B, H, ⌈T/CHUNK⌉, K, K + V]: the states before every CHUNK-th token; empty unless asked for.
    pub checkpoints: Vec<F>,
}

/// Gradients of the arguments, each with its argument's shape.
pub struct MesaGrads<F> {
    pub q: Vec<F>,
    pub k: Vec<F>,
    pub v: Vec<F>,
    pub beta: Vec<F>,
    pub g: Vec<F>,
    pub lambda: Vec<F>,
    pub keys: Vec<F>,
    pub values: Vec<F>,
}

/// One head of the problem. A state is K rows of K + V numbers: those of the keys, then those of the values.
struct Head<'a, F> {
    q: Rows<'a, F>,
    k: Rows<'a, F>,
    v: Rows<'a, F>,
    beta: Rows<'a, F>,
    g: Rows<'a, F>,
    lambda: Vec<F>,
    key: usize,
    value: usize,
}

/// y ← a y + b x
fn combine<F: Real>(y: &mut [F], a: F, b: F, x: &[F]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = b.fma(x, a * *y);
    }
}

impl<F: Real> Head<'_, F> {
    fn width(&self) -> usize {
        self.key + self.value
    }

    /// Takes the state through token `t`.
    fn token(&self, state: &mut [F], t: usize) {
        let (k, v, decay) = (self.k.at(t), self.v.at(t), self.g.one(t).exp());
        for (row, &own) in state.chunks_exact_mut(self.width()).zip(k) {
            let (keys, values) = row.split_at_mut(self.key);
            combine(keys, decay, self.beta.one(t) * own, k);
            combine(values, decay, self.beta.one(t) * own, v);
        }
    }

    /// Numbers in a row of a factor: whole tiles.
    fn pitch(&self) -> usize {
        self.key.next_multiple_of(TILE)
    }

    /// The upper triangle of U with Uᵀ U = A + diag λ (Cholesky), in rows; what lies below is of no use.
    fn factor(&self, state: &[F], factor: &mut [F]) {
        let (n, pitch) = (self.key, self.pitch());
        for (i, row) in state.chunks_exact(self.width()).enumerate() {
            let (above, own) = factor.split_at_mut(i * pitch);
            let own = &mut own[..pitch];
            own[..n].copy_from_slice(&row[..n]);
            own[i] += self.lambda[i];
            // A tile of the row stays in registers while the rows above are taken off.
            for first in (i / TILE * TILE..pitch).step_by(TILE) {
                let own = &mut own[first..first + TILE];
                let mut sums: [F; TILE] = std::array::from_fn(|j| own[j]);
                for above in above.chunks_exact(pitch) {
                    let times = -above[i];
                    for (sum, &x) in sums.iter_mut().zip(&above[first..first + TILE]) {
                        *sum = times.fma(x, *sum);
                    }
                }
                own.copy_from_slice(&sums);
            }
            let root = own[i].sqrt();
            own[i] = root;
            let inverse = F::one() / root;
            own[i + 1..].iter_mut().for_each(|x| *x *= inverse);
        }
    }

    /// (A + diag λ)⁻¹ x in place, from the factor.
    fn solve(&self, factor: &[F], x: &mut [F]) {
        let pitch = self.pitch();
        for (i, row) in factor.chunks_exact(pitch).enumerate() {
            x[i] /= row[i];
            let (done, rest) = x.split_at_mut(i + 1);
            combine(rest, F::one(), -done[i], &row[i + 1..]);
        }
        for (i, row) in factor.chunks_exact(pitch).enumerate().rev() {
            let (own, done) = x.split_at_mut(i + 1);
            own[i] = (own[i] - dot(&row[i + 1..][..done.len()], done)) / row[i];
        }
    }
}

impl<F: Real> Mesa<'_, F> {
    fn head(&self, at: (usize, usize)) -> Head<'_, F> {
        let rows = |data, d| Rows::head(data, at, (self.steps, self.heads, d));
        let lambda = &self.lambda[at.1 * self.key..][..self.key];
        Head {
            q: rows(self.q, self.key),
            k: rows(self.k, self.key),
            v: rows(self.v, self.value),
            beta: rows(self.beta, 1),
            g: rows(self.g, 1),
            lambda: lambda.iter().map(|&x| softplus(x) + F::of(LEAST)).collect(),
            key: self.key,
            value: self.value,
        }
    }

    /// Both states of a head side by side; zeros for none.
    fn joined(&self, keys: Option<&[F]>, values: Option<&[F]>, (b, h): (usize, usize)) -> Vec<F> {
        let (index, n, width) = (b * self.heads + h, self.key, self.key + self.value);
        let mut state = vec![F::zero(); n * width];
        for (part, at, size) in [(keys, 0, n), (values, n, self.value)] {
            let Some(part) = part else { continue };
            let part = part[index * n * size..][..n * size].chunks_exact(size);
            for (row, from) in state.chunks_exact_mut(width).zip(part) {
                row[at..at + size].copy_from_slice(from);
            }
        }
        state
    }

    /// The inverse of [`Mesa::joined`].
    fn split(&self, state: &[F]) -> [Vec<F>; 2] {
        let rows = || state.chunks_exact(self.key + self.value).map(|row| row.split_at(self.key));
        [rows().flat_map(|row| row.0).copied().collect(), rows().flat_map(|row| row.1).copied().collect()]
    }

    /// Computes outputs and final states; with `save` also the checkpoints.
    pub fn forward(&self, save: bool) -> MesaForward<F> {
        let n = self.key;
        let parts = map_heads(self.batch, self.heads, |b, h| {
            let head = self.head((b, h));
            let mut state = self.joined(self.keys, self.values, (b, h));
            let (mut factor, mut x) = (vec![F::zero(); n * head.pitch()], vec![F::zero(); n]);
            let mut o = vec![F::zero(); self.steps * self.value];
            let mut checkpoints = Vec::new();
            for (t, o) in o.chunks_exact_mut(self.value).enumerate() {
                if save && t % CHUNK == 0 {
                    checkpoints.extend_from_slice(&state);
                }
                head.token(&mut state, t);
                head.factor(&state, &mut factor);
                x.copy_from_slice(head.q.at(t));
                head.solve(&factor, &mut x);
                for (row, &x) in state.chunks_exact(head.width()).zip(&x) {
                    combine(o, F::one(), x, &row[n..]);
                }
            }
            (o, self.split(&state), checkpoints)
        });
        let o: Vec<&[F]> = parts.iter().map(|part| part.0.as_slice()).collect();
        let state = |i: usize| joined(parts.iter().map(|part| &part.1[i]));
        MesaForward {
            o: scatter_heads(&o, (self.steps, self.heads, self.value)),
            keys: state(0),
            values: state(1),
            checkpoints: joined(parts.iter().map(|part| &part.2)),
        }
    }

    /// Gradients of the arguments from those of the outputs: `d_o` [B, T, H, V] and the states'.
    pub fn backward(&self, checkpoints: &[F], d_o: &[F], d_keys: &[F], d_values: &[F]) -> MesaGrads<F> {
        let parts = map_heads(self.batch, self.heads, |b, h| {
            self.backward_head((b, h), checkpoints, d_o, self.joined(Some(d_keys), Some(d_values), (b, h)))
        });
        let rows = |part: fn(&HeadGrads<F>) -> &[F], d: usize| {
            let parts: Vec<&[F]> = parts.iter().map(part).collect();
            scatter_heads(&parts, (self.steps, self.heads, d))
        };
        // Over the batch, in its order.
        let lambda = (0..self.heads).flat_map(|h| {
            let parts = &parts;
            (0..self.key).map(move |i| {
                let of = parts.iter().skip(h).step_by(self.heads).map(|part| part.lambda[i].as_f64());
                F::of(of.sum::<f64>()) * sigmoid(self.lambda[h * self.key + i])
            })
        });
        MesaGrads {
            q: rows(|part| &part.q, self.key),
            k: rows(|part| &part.k, self.key),
            v: rows(|part| &part.v, self.value),
            beta: rows(|part| &part.beta, 1),
            g: rows(|part| &part.g, 1),
            lambda: lambda.collect(),
            keys: joined(parts.iter().map(|part| &part.states[0])),
            values: joined(parts.iter().map(|part| &part.states[1])),
        }
    }

    /// `d_state`: the gradient of the final states of the head, side by side.
    fn backward_head(
        &self,
        at: (usize, usize),
        checkpoints: &[F],
        d_o: &[F],
        mut d_state: Vec<F>,
    ) -> HeadGrads<F> {
        let (n, steps, head) = (self.key, self.steps, self.head(at));
        let (width, chunks) = (head.width(), steps.div_ceil(CHUNK));
        let size = n * width;
        let checkpoints = &checkpoints[(at.0 * self.heads + at.1) * chunks * size..][..chunks * size];
        let d_o = Rows::head(d_o, at, (steps, self.heads, self.value));
        let mut grads = HeadGrads {
            q: vec![F::zero(); steps * n],
            k: vec![F::zero(); steps * n],
            v: vec![F::zero(); steps * self.value],
            beta: vec![F::zero(); steps],
            g: vec![F::zero(); steps],
            lambda: vec![F::zero(); n],
            states: [vec![], vec![]],
        };
        let mut states = vec![F::zero(); (CHUNK.min(steps) + 1) * size];
        let (mut factor, mut x) = (vec![F::zero(); n * head.pitch()], vec![F::zero(); n]);
        let mut along = vec![F::zero(); width];
        for chunk in (0..chunks).rev() {
            let (first, last) = (chunk * CHUNK, steps.min((chunk + 1) * CHUNK));
            states[..size].copy_from_slice(&checkpoints[chunk * size..][..size]);
            for t in first..last {
                let (before, after) = states[(t - first) * size..(t - first + 2) * size].split_at_mut(size);
                after.copy_from_slice(before);
                head.token(after, t);
            }
            for t in (first..last).rev() {
                let (before, state) = states[(t - first) * size..(t - first + 2) * size].split_at(size);
                let (k, v, beta, decay) = (head.k.at(t), head.v.at(t), head.beta.one(t), head.g.one(t).exp());
                head.factor(state, &mut factor);
                x.copy_from_slice(head.q.at(t));
                head.solve(&factor, &mut x);
                // The gradient of x, and through the system that of q.
                let d_q = &mut grads.q[t * n..][..n];
                for (d, row) in d_q.iter_mut().zip(state.chunks_exact(width)) {
                    *d = dot(&row[n..], d_o.at(t));
                }
                head.solve(&factor, d_q);
                for (i, row) in d_state.chunks_exact_mut(width).enumerate() {
                    let (keys, values) = row.split_at_mut(n);
                    combine(keys, F::one(), -d_q[i], &x);
                    combine(values, F::one(), x[i], d_o.at(t));
                    grads.lambda[i] -= d_q[i] * x[i];
                }
                // kᵀ-weighted rows of the states' gradient, and how the token takes part in it.
                along.fill(F::zero());
                let d_k = &mut grads.k[t * n..][..n];
                let mut d_decay = F::zero();
                for (i, row) in d_state.chunks_exact_mut(width).enumerate() {
                    combine(&mut along, F::one(), k[i], row);
                    d_k[i] = beta * (dot(&row[..n], k) + dot(&row[n..], v));
                    d_decay += dot(row, &before[i * width..][..width]);
                    row.iter_mut().for_each(|d| *d *= decay);
                }
                grads.beta[t] = dot(&along[..n], k) + dot(&along[n..], v);
                combine(d_k, F::one(), beta, &along[..n]);
                combine(&mut grads.v[t * self.value..][..self.value], F::one(), beta, &along[n..]);
                grads.g[t] = decay * d_decay;
            }
        }
        let [keys, values] = self.split(&d_state);
        // Half of either order: the state is symmetric, and so is its gradient.
        let half = F::of(0.5);
        let symmetric = (0..n * n).map(|i| half * (keys[i] + keys[i % n * n + i / n])).collect();
        grads.states = [symmetric, values];
        grads
    }
}

/// Gradients of one head; that of λ of one batch entry.
struct HeadGrads<F> {
    q: Vec<F>,
    k: Vec<F>,
    v: Vec<F>,
    beta: Vec<F>,
    g: Vec<F>,
    lambda: Vec<F>,
    states: [Vec<F>; 2],
}
