//! CPU reference of gated linear attention: one token after the other, in panels of value columns
//! ([`super::super::panels`]).

use super::super::panels::{Panels, Step, Walked};
use super::super::real::{Real, scatter_heads};
use super::super::scan::{LANES, Lanes, Rows, decays, load, store};

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

    fn panels(&self) -> Panels {
        let &Gla { batch, steps, heads, key, value, .. } = self;
        Panels { batch, steps, heads, key, value }
    }

    /// Computes outputs and final state; with `save` also the checkpoints.
    pub fn forward(&self, save: bool) -> Walked<F> {
        let token =
            |head: &Head<F>, s: &mut [Lanes<F>], t, column| head.token(s, t, column).map(|x| self.scale * x);
        self.panels().forward(self.state, save, |b, h| self.head(b, h), token)
    }

    /// Gradients of the arguments from those of the outputs, `d_o` [B, T, H, V] and `d_state` [B, H, K, V].
    pub fn backward(&self, checkpoints: &[F], d_o: &[F], d_state: &[F]) -> GlaGrads<F> {
        let &Gla { steps, heads, key, value, .. } = self;
        let (parts, state) = self.panels().backward(
            (checkpoints, d_state),
            |b, h| (self.head(b, h), Rows::head(d_o, (b, h), (steps, heads, value))),
            || HeadGrads::zeros(self),
            0,
            |(head, _), s, t, column, _| {
                head.token(s, t, column);
            },
            |(head, d_o), grads: &mut HeadGrads<F>, Step { t, column, before, after, ds, .. }| {
                let v: Lanes<F> = load(head.v.at(t), column);
                let d_read: Lanes<F> = load::<F, LANES>(d_o.at(t), column).map(|x| self.scale * x);
                let span = t * key..(t + 1) * key;
                let grads_of = [&mut grads.q, &mut grads.k, &mut grads.gk].map(|x| &mut x[span.clone()]);
                let inputs = [head.q.at(t), head.k.at(t), head.decay(t)];
                let dv = token_back(ds, [before, after], inputs, [&d_read, &v], grads_of);
                store(&dv, &mut grads.v[t * value..][..value], column);
            },
        );
        let collect = |part: fn(&HeadGrads<F>) -> &[F], d: usize| {
            let parts: Vec<&[F]> = parts.iter().map(part).collect();
            scatter_heads(&parts, (steps, heads, d))
        };
        GlaGrads {
            q: collect(|part| &part.q, key),
            k: collect(|part| &part.k, key),
            v: collect(|part| &part.v, value),
            gk: collect(|part| &part.gk, key),
            state,
        }
    }
}

/// Gradients of one head, summed over its panels in their order.
struct HeadGrads<F> {
    q: Vec<F>,
    k: Vec<F>,
    v: Vec<F>,
    gk: Vec<F>,
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
        }
    }
}
