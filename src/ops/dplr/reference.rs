//! CPU reference of the generalised delta rule: one token after the other, in panels of value columns
//! ([`super::super::panels`]); a token is two passes over a panel's state.

use super::super::panels::{Panels, Step, Walked};
use super::super::real::{Real, scatter_heads};
use super::super::scan::{LANES, Lanes, Rows, decays, load, store};

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

/// Makes of `ds` the gradient of the state `after` a token, and adds those of q, k and b; returns those of v and of what
/// was read. Not inlined, as [`kept_back`]: among other loops the compiler finds no registers for this one.
#[inline(never)]
fn written_back<F: Real>(
    ds: &mut [Lanes<F>],
    after: &[Lanes<F>],
    [q, k, b]: [&[F]; 3],
    [d_read, v, u]: [&Lanes<F>; 3],
    [dq, dk, db]: [&mut [F]; 3],
) -> [Lanes<F>; 2] {
    let [mut dv, mut du] = [[F::zero(); LANES]; 2];
    let rows = ds.iter_mut().zip(after).zip(dq.iter_mut().zip(dk).zip(db));
    for (((ds, after), ((dq, dk), db)), ((&q, &k), &b)) in rows.zip(q.iter().zip(k).zip(b)) {
        let [mut to_q, mut to_k, mut to_b] = [[F::zero(); LANES]; 3];
        for l in 0..LANES {
            let d = q.fma(d_read[l], ds[l]);
            ds[l] = d;
            dv[l] = k.fma(d, dv[l]);
            du[l] = (-b).fma(d, du[l]);
            to_q[l] = after[l] * d_read[l];
            to_k[l] = d * v[l];
            to_b[l] = -d * u[l];
        }
        *dq += F::sum_of(&to_q);
        *dk += F::sum_of(&to_k);
        *db += F::sum_of(&to_b);
    }
    [dv, du]
}

/// Takes `ds` on to the gradient of the state `before` the token, with `du` that of what it read there, and adds those of
/// a and g.
#[inline(never)]
fn kept_back<F: Real>(
    ds: &mut [Lanes<F>],
    before: &[Lanes<F>],
    [a, decay]: [&[F]; 2],
    du: &Lanes<F>,
    [da, dg]: [&mut [F]; 2],
) {
    let rows = ds.iter_mut().zip(before).zip(da.iter_mut().zip(dg));
    for (((ds, before), (da, dg)), (&a, &decay)) in rows.zip(a.iter().zip(decay)) {
        let [mut to_a, mut to_g] = [[F::zero(); LANES]; 2];
        for l in 0..LANES {
            let d = decay * ds[l];
            to_a[l] = du[l] * before[l];
            to_g[l] = d * before[l];
            ds[l] = a.fma(du[l], d);
        }
        *da += F::sum_of(&to_a);
        *dg += F::sum_of(&to_g);
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
            decay: decays(g, self.steps),
            keys: self.key,
        }
    }

    fn panels(&self) -> Panels {
        let &Dplr { batch, steps, heads, key, value, .. } = self;
        Panels { batch, steps, heads, key, value }
    }

    /// Computes outputs and final state; with `save` also the checkpoints.
    pub fn forward(&self, save: bool) -> Walked<F> {
        let token = |head: &Head<F>, s: &mut [Lanes<F>], t, column| {
            let [_, o] = head.token(s, t, column);
            o.map(|x| self.scale * x)
        };
        self.panels().forward(self.state, save, |b, h| self.head(b, h), token)
    }

    /// Gradients of the arguments from those of the outputs, `d_o` [B, T, H, V] and `d_state` [B, H, K, V].
    pub fn backward(&self, checkpoints: &[F], d_o: &[F], d_state: &[F]) -> DplrGrads<F> {
        let &Dplr { steps, heads, key, value, .. } = self;
        let (parts, state) = self.panels().backward(
            (checkpoints, d_state),
            |b, h| (self.head(b, h), Rows::head(d_o, (b, h), (steps, heads, value))),
            || HeadGrads::zeros(self),
            1,
            |(head, _), s, t, column, kept| {
                let [read, _] = head.token(s, t, column);
                kept.push(read);
            },
            |(head, d_o), grads: &mut HeadGrads<F>, Step { t, column, before, after, ds, kept }| {
                let v: Lanes<F> = load(head.v.at(t), column);
                let d_read: Lanes<F> = load::<F, LANES>(d_o.at(t), column).map(|x| self.scale * x);
                let span = t * key..(t + 1) * key;
                let [dq, dk, db] = [&mut grads.q, &mut grads.k, &mut grads.b].map(|x| &mut x[span.clone()]);
                let inputs = [head.q.at(t), head.k.at(t), head.b.at(t)];
                let [dv, du] = written_back(ds, after, inputs, [&d_read, &v, &kept[0]], [dq, dk, db]);
                let [da, dg] = [&mut grads.a, &mut grads.g].map(|x| &mut x[span.clone()]);
                kept_back(ds, before, [head.a.at(t), head.decay(t)], &du, [da, dg]);
                store(&dv, &mut grads.v[t * value..][..value], column);
            },
        );
        let collect = |part: fn(&HeadGrads<F>) -> &[F], d: usize| {
            let parts: Vec<&[F]> = parts.iter().map(part).collect();
            scatter_heads(&parts, (steps, heads, d))
        };
        DplrGrads {
            q: collect(|part| &part.q, key),
            k: collect(|part| &part.k, key),
            v: collect(|part| &part.v, value),
            g: collect(|part| &part.g, key),
            a: collect(|part| &part.a, key),
            b: collect(|part| &part.b, key),
            state,
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
}

impl<F: Real> HeadGrads<F> {
    fn zeros(problem: &Dplr<'_, F>) -> Self {
        let rows = |d: usize| vec![F::zero(); problem.steps * d];
        let keys = || rows(problem.key);
        Self { q: keys(), k: keys(), v: rows(problem.value), g: keys(), a: keys(), b: keys() }
    }
}
