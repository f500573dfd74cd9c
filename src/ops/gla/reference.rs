//! CPU reference of gated linear attention: one token after the other.
//!
//! Value columns are independent, so a head is worked through in panels of [`LANES`] columns: the state
//! of a panel is K rows, and a token is one pass over them.

use super::super::real::{Real, joined, map_heads, scatter_heads};
use super::super::scan::{CHUNK, LANES, Lanes, Rows, decays, load, panel, store};

/// The arguments of one call, as slices; shapes as in [`super::gla`].
#[derive(Clone, Copy)]
pub struct Gla<'a, F> {
    pub batch: usize,
    pub steps: usize,
    pub heads: usize,
    pub key: usize,
    pub value: usize,
    pub scale: F,
    pub q: &'a [F],
    pub k: &'a [F],
    pub v: &'a [F],
    pub gk: &'a [F],
    pub state: Option<&'a [F]>,
}

/// What the forward pass computes.
pub struct GlaForward<F> {
    /// [B, T, H, V]
    pub o: Vec<F>,
    /// [B, H, K, V]
    pub state: Vec<F>,
    /// [B, H, panels, ⌈T/CHUNK⌉, K, LANES]: the states before every CHUNK-th token; empty unless asked for.
    pub checkpoints: Vec<F>,
}

/// Gradients of the arguments, each with its argument's shape.
pub struct GlaGrads<F> {
    pub q: Vec<F>,
    pub k: Vec<F>,
    pub v: Vec<F>,
    pub gk: Vec<F>,
    pub state: Vec<F>,
}

/// One head of the problem.
struct Head<'a, F> {
    q: Rows<'a, F>,
    k: Rows<'a, F>,
    v: Rows<'a, F>,
    /// exp(gk), [T, K]
    decay: Vec<F>,
    keys: usize,
}

impl<F: Real> Head<'_, F> {
    /// Takes the state of a panel through token `t`; returns q·S.
    #[inline(always)]
    fn token(&self, s: &mut [Lanes<F>], t: usize, column: usize) -> Lanes<F> {
        let v: Lanes<F> = load(self.v.at(t), column);
        let mut o = [F::zero(); LANES];
        let rows = s.iter_mut().zip(self.decay(t)).zip(self.k.at(t)).zip(self.q.at(t));
        for (((s, &decay), &k), &q) in rows {
            for l in 0..LANES {
                s[l] = k.fma(v[l], decay * s[l]);
                o[l] = q.fma(s[l], o[l]);
            }
        }
        o
    }

    fn decay(&self, t: usize) -> &[F] {
        &self.decay[t * self.keys..][..self.keys]
    }
}

/// Takes the gradient `ds` of the state behind a token to that of the state `before` it, and adds those of q, k and
/// gk; returns that of v. Not inlined: among other loops the compiler finds no registers for this one.
#[inline(never)]
fn token_back<F: Real>(
    ds: &mut [Lanes<F>],
    [before, after]: [&[Lanes<F>]; 2],
    [q, k, decay]: [&[F]; 3],
    [d_read, v]: [&Lanes<F>; 2],
    [dq, dk, dg]: [&mut [F]; 3],
) -> Lanes<F> {
    let mut dv = [F::zero(); LANES];
    let rows = ds.iter_mut().zip(before).zip(after).zip(dq.iter_mut().zip(dk).zip(dg));
    for ((((ds, before), after), ((dq, dk), dg)), ((&q, &k), &decay)) in rows.zip(q.iter().zip(k).zip(decay))
    {
        let [mut to_q, mut to_k, mut to_g] = [[F::zero(); LANES]; 3];
        for l in 0..LANES {
            let d = q.fma(d_read[l], ds[l]);
            let d_before = decay * d;
            dv[l] = k.fma(d, dv[l]);
            to_q[l] = after[l] * d_read[l];
            to_k[l] = d * v[l];
            to_g[l] = d_before * before[l];
            ds[l] = d_before;
        }
        *dq += F::sum_of(&to_q);
        *dk += F::sum_of(&to_k);
        *dg += F::sum_of(&to_g);
    }
    dv
}

impl<F: Real> Gla<'_, F> {
    fn head(&self, b: usize, h: usize) -> Head<'_, F> {
        let rows = |data, d| Rows::head(data, (b, h), (self.steps, self.heads, d));
        let gk = rows(self.gk, self.key);
        Head {
            q: rows(self.q, self.key),
            k: rows(self.k, self.key),
            v: rows(self.v, self.value),
            decay: decays(gk, self.steps),
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

    /// Numbers in a head's checkpoints.
    fn kept(&self) -> usize {
        self.panels().count() * self.steps.div_ceil(CHUNK) * self.key * LANES
    }

    /// Computes outputs and final state; with `save` also the checkpoints.
    pub fn forward(&self, save: bool) -> GlaForward<F> {
        let parts = map_heads(self.batch, self.heads, |b, h| {
            let head = self.head(b, h);
            let mut o = vec![F::zero(); self.steps * self.value];
            let mut state = vec![F::zero(); self.key * self.value];
            let mut checkpoints = Vec::with_capacity(if save { self.kept() } else { 0 });
            for column in self.panels() {
                let mut s = self.panel(self.state, (b, h), column);
                for (t, o) in o.chunks_exact_mut(self.value).enumerate() {
                    if save && t % CHUNK == 0 {
                        checkpoints.extend_from_slice(s.as_flattened());
                    }
                    let read = head.token(&mut s, t, column);
                    store(&read.map(|x| self.scale * x), o, column);
                }
                for (row, s) in state.chunks_exact_mut(self.value).zip(&s) {
                    store(s, row, column);
                }
            }
            (o, state, checkpoints)
        });
        let o: Vec<&[F]> = parts.iter().map(|part| part.0.as_slice()).collect();
        GlaForward {
            o: scatter_heads(&o, (self.steps, self.heads, self.value)),
            state: joined(parts.iter().map(|part| &part.1)),
            checkpoints: joined(parts.iter().map(|part| &part.2)),
        }
    }

    /// Gradients of the arguments from those of the outputs, `d_o` [B, T, H, V] and `d_state` [B, H, K, V].
    pub fn backward(&self, checkpoints: &[F], d_o: &[F], d_state: &[F]) -> GlaGrads<F> {
        let (per_head, per_panel) = (self.kept(), self.kept() / self.panels().count());
        let parts = map_heads(self.batch, self.heads, |b, h| {
            let head = self.head(b, h);
            let mut grads = HeadGrads::zeros(self);
            let kept = &checkpoints[(b * self.heads + h) * per_head..][..per_head];
            // The state before a chunk and after each of its tokens.
            let mut states = vec![[F::zero(); LANES]; (CHUNK.min(self.steps) + 1) * self.key];
            for (column, kept) in self.panels().zip(kept.chunks_exact(per_panel)) {
                self.backward_panel(&head, (b, h), column, (kept, &mut states), (d_o, d_state), &mut grads);
            }
            grads
        });
        let collect = |part: fn(&HeadGrads<F>) -> &[F], d: usize| {
            let parts: Vec<&[F]> = parts.iter().map(part).collect();
            scatter_heads(&parts, (self.steps, self.heads, d))
        };
        GlaGrads {
            q: collect(|part| &part.q, self.key),
            k: collect(|part| &part.k, self.key),
            v: collect(|part| &part.v, self.value),
            gk: collect(|part| &part.gk, self.key),
            state: joined(parts.iter().map(|part| &part.state)),
        }
    }

    fn backward_panel(
        &self,
        head: &Head<'_, F>,
        at: (usize, usize),
        column: usize,
        (checkpoints, states): (&[F], &mut [Lanes<F>]),
        (d_o, d_state): (&[F], &[F]),
        grads: &mut HeadGrads<F>,
    ) {
        let keys = self.key;
        let d_o = Rows::head(d_o, at, (self.steps, self.heads, self.value));
        let mut ds = self.panel(Some(d_state), at, column);
        for chunk in (0..self.steps.div_ceil(CHUNK)).rev() {
            let first = chunk * CHUNK;
            let last = self.steps.min(first + CHUNK);
            states[..keys]
                .as_flattened_mut()
                .copy_from_slice(&checkpoints[chunk * keys * LANES..][..keys * LANES]);
            for t in first..last {
                let (before, after) = states[(t - first) * keys..(t - first + 2) * keys].split_at_mut(keys);
                after.copy_from_slice(before);
                head.token(after, t, column);
            }
            for t in (first..last).rev() {
                let (before, after) = states[(t - first) * keys..(t - first + 2) * keys].split_at(keys);
                let v: Lanes<F> = load(head.v.at(t), column);
                let d_read: Lanes<F> = load::<F, LANES>(d_o.at(t), column).map(|x| self.scale * x);
                let span = t * keys..(t + 1) * keys;
                let grads_of = [&mut grads.q, &mut grads.k, &mut grads.gk].map(|x| &mut x[span.clone()]);
                let inputs = [head.q.at(t), head.k.at(t), head.decay(t)];
                let dv = token_back(&mut ds, [before, after], inputs, [&d_read, &v], grads_of);
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
    gk: Vec<F>,
    state: Vec<F>,
}

impl<F: Real> HeadGrads<F> {
    fn zeros(problem: &Gla<'_, F>) -> Self {
        let zeros = |n: usize| vec![F::zero(); n];
        let t = problem.steps;
        Self {
            q: zeros(t * problem.key),
            k: zeros(t * problem.key),
            v: zeros(t * problem.value),
            gk: zeros(t * problem.key),
            state: zeros(problem.key * problem.value),
        }
    }
}
