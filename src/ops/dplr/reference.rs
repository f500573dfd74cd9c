//! CPU reference of the generalised delta rule: one token after the other.
//!
//! Value columns are independent, so a head is worked through in panels of [`LANES`] columns: the state
//! of a panel is K rows, and a token is two passes over them.

use super::super::real::{Real, map_heads, scatter_heads};
use super::super::scan::{CHUNK, LANES, Lanes, Rows, load, panel, store, sum};

/// The arguments of one call, as slices; shapes as in [`super::dplr`].
#[derive(Clone, Copy)]
pub struct Dplr<'a, F> {
    pub batch: usize,
    pub steps: usize,
    pub heads: usize,
    pub key: usize,
    pub value: usize,
    pub scale: F,
    pub q: &'a [F],
    pub k: &'a [F],
    pub v: &'a [F],
    pub g: &'a [F],
    pub a: &'a [F],
    pub b: &'a [F],
    pub state: Option<&'a [F]>,
}

/// What the forward pass computes.
pub struct DplrForward<F> {
    /// [B, T, H, V]
    pub o: Vec<F>,
    /// [B, H, K, V]
    pub state: Vec<F>,
    /// [B, H, panels, ⌈T/CHUNK⌉, K, LANES]: the states before every CHUNK-th token; empty unless asked for.
    pub checkpoints: Vec<F>,
}

/// Gradients of the arguments, each with its argument's shape.
pub struct DplrGrads<F> {
    pub q: Vec<F>,
    pub k: Vec<F>,
    pub v: Vec<F>,
    pub g: Vec<F>,
    pub a: Vec<F>,
    pub b: Vec<F>,
    pub state: Vec<F>,
}

/// One head of the problem.
struct Head<'a, F> {
    q: Rows<'a, F>,
    k: Rows<'a, F>,
    v: Rows<'a, F>,
    a: Rows<'a, F>,
    b: Rows<'a, F>,
    /// exp(g), [T, K]
    decay: Vec<F>,
    keys: usize,
}

impl<F: Real> Head<'_, F> {
    /// Takes the state of a panel through token `t`; returns a·S of the state before and q·S of the one after.
    #[inline(always)]
    fn token(&self, s: &mut [Lanes<F>], t: usize, column: usize) -> [Lanes<F>; 2] {
        let v: Lanes<F> = load(self.v.at(t), column);
        let mut u = [F::zero(); LANES];
        for (s, &a) in s.iter().zip(self.a.at(t)) {
            for l in 0..LANES {
                u[l] = a.fma(s[l], u[l]);
            }
        }
        let mut o = [F::zero(); LANES];
        let rows = s.iter_mut().zip(self.decay(t)).zip(self.k.at(t)).zip(self.b.at(t)).zip(self.q.at(t));
        for ((((s, &decay), &k), &b), &q) in rows {
            for l in 0..LANES {
                s[l] = (-b).fma(u[l], k.fma(v[l], decay * s[l]));
                o[l] = q.fma(s[l], o[l]);
            }
        }
        [u, o]
    }

    fn decay(&self, t: usize) -> &[F] {
        &self.decay[t * self.keys..][..self.keys]
    }
}

impl<F: Real> Dplr<'_, F> {
    fn head(&self, b: usize, h: usize) -> Head<'_, F> {
        let rows = |data, d| Rows::head(data, (b, h), (self.steps, self.heads, d));
        let g = rows(self.g, self.key);
        Head {
            q: rows(self.q, self.key),
            k: rows(self.k, self.key),
            v: rows(self.v, self.value),
            a: rows(self.a, self.key),
            b: rows(self.b, self.key),
            decay: (0..self.steps).flat_map(|t| g.at(t)).map(|g| g.exp_fast()).collect(),
            keys: self.key,
        }
    }

    fn panels(&self) -> impl Iterator<Item = usize> {
        (0..self.value).step_by(LANES)
    }

    /// The panel from `column` on of a [B, H, K, V] array; zeros for none.
    fn panel(&self, array: Option<&[F]>, (b, h): (usize, usize), column: usize) -> Vec<Lanes<F>> {
        panel(array, b * self.heads + h, (self.key, self.value), column)
    }

    /// Computes outputs and final state; with `save` also the checkpoints.
    pub fn forward(&self, save: bool) -> DplrForward<F> {
        let parts = map_heads(self.batch, self.heads, |b, h| {
            let head = self.head(b, h);
            let mut o = vec![F::zero(); self.steps * self.value];
            let mut state = vec![F::zero(); self.key * self.value];
            let mut checkpoints = Vec::new();
            for column in self.panels() {
                let mut s = self.panel(self.state, (b, h), column);
                for (t, o) in o.chunks_exact_mut(self.value).enumerate() {
                    if save && t % CHUNK == 0 {
                        checkpoints.extend_from_slice(s.as_flattened());
                    }
                    let [_, read] = head.token(&mut s, t, column);
                    store(&read.map(|x| self.scale * x), o, column);
                }
                for (row, s) in state.chunks_exact_mut(self.value).zip(&s) {
                    store(s, row, column);
                }
            }
            (o, state, checkpoints)
        });
        let o: Vec<&[F]> = parts.iter().map(|part| part.0.as_slice()).collect();
        DplrForward {
            o: scatter_heads(&o, (self.steps, self.heads, self.value)),
            state: parts.iter().flat_map(|part| &part.1).copied().collect(),
            checkpoints: parts.iter().flat_map(|part| &part.2).copied().collect(),
        }
    }

    /// Gradients of the arguments from those of the outputs, `d_o` [B, T, H, V] and `d_state` [B, H, K, V].
    pub fn backward(&self, checkpoints: &[F], d_o: &[F], d_state: &[F]) -> DplrGrads<F> {
        let per_panel = self.steps.div_ceil(CHUNK) * self.key * LANES;
        let per_head = self.panels().count() * per_panel;
        let parts = map_heads(self.batch, self.heads, |b, h| {
            let head = self.head(b, h);
            let mut grads = HeadGrads::zeros(self);
            let kept = &checkpoints[(b * self.heads + h) * per_head..][..per_head];
            for (column, kept) in self.panels().zip(kept.chunks_exact(per_panel)) {
                self.backward_panel(&head, (b, h), column, kept, (d_o, d_state), &mut grads);
            }
            grads
        });
        let collect = |part: fn(&HeadGrads<F>) -> &[F], d: usize| {
            let parts: Vec<&[F]> = parts.iter().map(part).collect();
            scatter_heads(&parts, (self.steps, self.heads, d))
        };
        DplrGrads {
            q: collect(|part| &part.q, self.key),
            k: collect(|part| &part.k, self.key),
            v: collect(|part| &part.v, self.value),
            g: collect(|part| &part.g, self.key),
            a: collect(|part| &part.a, self.key),
            b: collect(|part| &part.b, self.key),
            state: parts.iter().flat_map(|part| &part.state).copied().collect(),
        }
    }

    fn backward_panel(
        &self,
        head: &Head<'_, F>,
        at: (usize, usize),
        column: usize,
        checkpoints: &[F],
        (d_o, d_state): (&[F], &[F]),
        grads: &mut HeadGrads<F>,
    ) {
        let keys = self.key;
        let d_o = Rows::head(d_o, at, (self.steps, self.heads, self.value));
        let mut ds = self.panel(Some(d_state), at, column);
        // The state before the chunk and after each of its tokens, and what the tokens read.
        let mut states = vec![[F::zero(); LANES]; (CHUNK.min(self.steps) + 1) * keys];
        let mut reads = vec![[F::zero(); LANES]; CHUNK.min(self.steps)];
        for chunk in (0..self.steps.div_ceil(CHUNK)).rev() {
            let first = chunk * CHUNK;
            let last = self.steps.min(first + CHUNK);
            states[..keys]
                .as_flattened_mut()
                .copy_from_slice(&checkpoints[chunk * keys * LANES..][..keys * LANES]);
            for t in first..last {
                let (before, after) = states[(t - first) * keys..(t - first + 2) * keys].split_at_mut(keys);
                after.copy_from_slice(before);
                [reads[t - first], _] = head.token(after, t, column);
            }
            for t in (first..last).rev() {
                let (before, after) = states[(t - first) * keys..(t - first + 2) * keys].split_at(keys);
                let u = &reads[t - first];
                let v: Lanes<F> = load(head.v.at(t), column);
                let d_read: Lanes<F> = load::<F, LANES>(d_o.at(t), column).map(|x| self.scale * x);
                let (q, k, a, b) = (head.q.at(t), head.k.at(t), head.a.at(t), head.b.at(t));
                let span = t * keys..(t + 1) * keys;
                // The gradient of the state after the token, and with it those of v and of what was read.
                let (mut dv, mut du) = ([F::zero(); LANES], [F::zero(); LANES]);
                let (dq, dk, db) =
                    (&mut grads.q[span.clone()], &mut grads.k[span.clone()], &mut grads.b[span.clone()]);
                for i in 0..keys {
                    let mut lanes = [[F::zero(); LANES]; 3];
                    for l in 0..LANES {
                        let d = q[i].fma(d_read[l], ds[i][l]);
                        ds[i][l] = d;
                        dv[l] = k[i].fma(d, dv[l]);
                        du[l] = (-b[i]).fma(d, du[l]);
                        lanes[0][l] = after[i][l] * d_read[l];
                        lanes[1][l] = d * v[l];
                        lanes[2][l] = -d * u[l];
                    }
                    let [q, k, b] = lanes.map(sum);
                    dq[i] += q;
                    dk[i] += k;
                    db[i] += b;
                }
                let (da, dg) = (&mut grads.a[span.clone()], &mut grads.g[span]);
                for (i, &decay) in head.decay(t).iter().enumerate() {
                    let mut lanes = [[F::zero(); LANES]; 2];
                    for l in 0..LANES {
                        let d = decay * ds[i][l];
                        lanes[0][l] = du[l] * before[i][l];
                        lanes[1][l] = d * before[i][l];
                        ds[i][l] = a[i].fma(du[l], d);
                    }
                    let [a, g] = lanes.map(sum);
                    da[i] += a;
                    dg[i] += g;
                }
                store(&dv, &mut grads.v[t * self.value..][..self.value], column);
            }
        }
        for (row, ds) in grads.state.chunks_exact_mut(self.value).zip(&ds) {
            store(ds, row, column);
        }
    }
}

/// Gradients of one head, summed over its panels in their order.
struct HeadGrads<F> {
    q: Vec<F>,
    k: Vec<F>,
    v: Vec<F>,
    g: Vec<F>,
    a: Vec<F>,
    b: Vec<F>,
    state: Vec<F>,
}

impl<F: Real> HeadGrads<F> {
    fn zeros(problem: &Dplr<'_, F>) -> Self {
        let rows = |d: usize| vec![F::zero(); problem.steps * d];
        let keys = || rows(problem.key);
        Self {
            q: keys(),
            k: keys(),
            v: rows(problem.value),
            g: keys(),
            a: keys(),
            b: keys(),
            state: vec![F::zero(); problem.key * problem.value],
        }
    }
}
