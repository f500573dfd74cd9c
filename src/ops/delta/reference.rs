//! CPU reference of the delta rule family: the recurrence itself, one token after the other, in panels of value columns
//! ([`super::super::panels`]); everything between the passes over a panel's state stays in registers.

use super::super::panels::{Panels, Step, Walked};
use super::super::real::{Real, scatter_heads};
use super::super::scan::{LANES, Lanes, Rows, load, store, write};

/// The arguments of one call, as slices; shapes as in [`super::gated_delta_rule`].
#[derive(Clone, Copy)]
pub struct Delta<'a, F> {
    pub batch: usize,
    /// Tokens.
    pub steps: usize,
    /// Householder steps per token.
    pub sub: usize,
    pub heads: usize,
    pub key: usize,
    pub value: usize,
    /// Whether a write erases what its key held: the delta rule, or else the sum rule.
    pub erases: bool,
    pub scale: F,
    pub q: &'a [F],
    pub k: &'a [F],
    pub v: &'a [F],
    pub beta: &'a [F],
    pub g: Option<&'a [F]>,
    pub state: Option<&'a [F]>,
}

/// Gradients of the arguments, each with its argument's shape.
pub struct DeltaGrads<F> {
    pub q: Vec<F>,
    pub k: Vec<F>,
    pub v: Vec<F>,
    pub beta: Vec<F>,
    pub g: Vec<F>,
    pub state: Vec<F>,
}

/// Σ kᵢ Sᵢ over the rows of the state.
#[inline(always)]
fn read<F: Real>(s: &[Lanes<F>], k: &[F]) -> Lanes<F> {
    // Two running sums hide the latency of the additions.
    let mut even = [F::zero(); LANES];
    let mut odd = [F::zero(); LANES];
    let (rows, keys) = (s.chunks_exact(2), k.chunks_exact(2));
    if let ([row], [key]) = (rows.remainder(), keys.remainder()) {
        for l in 0..LANES {
            even[l] = *key * row[l];
        }
    }
    for (row, key) in rows.zip(keys) {
        for l in 0..LANES {
            even[l] = key[0].fma(row[0][l], even[l]);
            odd[l] = key[1].fma(row[1][l], odd[l]);
        }
    }
    std::array::from_fn(|l| even[l] + odd[l])
}

/// Adds Σ Sᵢ d to the gradient of the key that read the state. Not inlined, as the next two: among other loops the
/// compiler finds no registers for these.
#[inline(never)]
fn read_back<F: Real>(s: &[Lanes<F>], d: &Lanes<F>, dk: &mut [F]) {
    for (dk, s) in dk.iter_mut().zip(s) {
        *dk += F::sum_of::<LANES>(&std::array::from_fn(|l| s[l] * d[l]));
    }
}

/// Takes the state and its gradient back through a write of `u` without decay, and adds the gradient of its key; `d` is
/// that of the error.
#[inline(never)]
fn undo<F: Real>(s: &mut [Lanes<F>], ds: &mut [Lanes<F>], k: &[F], [u, d]: [&Lanes<F>; 2], dk: &mut [F]) {
    for (((s, ds), dk), &k) in s.iter_mut().zip(ds).zip(dk).zip(k) {
        let mut to_k = [F::zero(); LANES];
        for l in 0..LANES {
            s[l] = (-k).fma(u[l], s[l]);
            to_k[l] = ds[l] * u[l] - s[l] * d[l];
            ds[l] = (-k).fma(d[l], ds[l]);
        }
        *dk += F::sum_of(&to_k);
    }
}

/// Takes the gradient of a state back through a write of `u` and the decay of the state `s` before it, and adds the
/// gradient of the key; `d` is that of the error. Returns the gradient of the log decay.
#[inline(never)]
fn token_back<F: Real>(
    s: &[Lanes<F>],
    ds: &mut [Lanes<F>],
    decay: F,
    k: &[F],
    [u, d]: [&Lanes<F>; 2],
    dk: &mut [F],
) -> F {
    let mut d_decay = [F::zero(); LANES];
    for (((s, ds), dk), &k) in s.iter().zip(ds).zip(dk).zip(k) {
        let mut to_k = [F::zero(); LANES];
        for l in 0..LANES {
            let s = decay * s[l];
            to_k[l] = ds[l] * u[l] - s * d[l];
            let d = (-k).fma(d[l], ds[l]);
            d_decay[l] = d.fma(s, d_decay[l]);
            ds[l] = decay * d;
        }
        *dk += F::sum_of(&to_k);
    }
    F::sum_of(&d_decay)
}

/// One head of the problem.
struct Head<'a, F> {
    q: Rows<'a, F>,
    k: Rows<'a, F>,
    v: Rows<'a, F>,
    beta: Rows<'a, F>,
    g: Option<Rows<'a, F>>,
    sub: usize,
    erases: bool,
}

impl<F: Real> Head<'_, F> {
    /// Takes the state of a panel through token `t`; returns q·S, and gives every sub-step's error
    /// v − kS′ to `keep`; without erasing it is v.
    #[inline(always)]
    fn token(&self, s: &mut [Lanes<F>], t: usize, column: usize, mut keep: impl FnMut(Lanes<F>)) -> Lanes<F> {
        let first = t * self.sub;
        let mut decay = self.decay(t);
        let mut seen = read(s, self.k.at(first));
        for j in first..first + self.sub {
            let v: Lanes<F> = load(self.v.at(j), column);
            let beta = self.beta.one(j);
            // k(decay·S) = decay·(kS): the decayed state is never stored on its own.
            let error = if self.erases { std::array::from_fn(|l| v[l] - decay * seen[l]) } else { v };
            keep(error);
            let u: Lanes<F> = error.map(|e| beta * e);
            let probe = if j + 1 < first + self.sub { self.k.at(j + 1) } else { self.q.at(t) };
            seen = write(s, decay, self.k.at(j), &u, probe);
            decay = F::one();
        }
        seen
    }

    fn decay(&self, t: usize) -> F {
        self.g.map_or(F::one(), |g| g.one(t).exp())
    }
}

impl<F: Real> Delta<'_, F> {
    fn head(&self, b: usize, h: usize) -> Head<'_, F> {
        let (t, n, heads) = (self.steps, self.steps * self.sub, self.heads);
        Head {
            q: Rows::head(self.q, (b, h), (t, heads, self.key)),
            k: Rows::head(self.k, (b, h), (n, heads, self.key)),
            v: Rows::head(self.v, (b, h), (n, heads, self.value)),
            beta: Rows::head(self.beta, (b, h), (n, heads, 1)),
            g: self.g.map(|g| Rows::head(g, (b, h), (t, heads, 1))),
            sub: self.sub,
            erases: self.erases,
        }
    }

    fn panels(&self) -> Panels {
        let &Delta { batch, steps, heads, key, value, .. } = self;
        Panels { batch, steps, heads, key, value }
    }

    /// Computes outputs and final state; with `save` also the checkpoints.
    pub fn forward(&self, save: bool) -> Walked<F> {
        let token = |head: &Head<F>, s: &mut [Lanes<F>], t, column| {
            head.token(s, t, column, |_| ()).map(|x| self.scale * x)
        };
        self.panels().forward(self.state, save, |b, h| self.head(b, h), token)
    }

    /// Gradients of the arguments from those of the outputs, `d_o` [B, T, H, V] and `d_state` [B, H, K, V].
    pub fn backward(&self, checkpoints: &[F], d_o: &[F], d_state: &[F]) -> DeltaGrads<F> {
        let &Delta { steps, sub, heads, key, value, .. } = self;
        let (parts, state) = self.panels().backward(
            (checkpoints, d_state),
            |b, h| (self.head(b, h), Rows::head(d_o, (b, h), (steps, heads, value))),
            || HeadGrads::zeros(self),
            sub,
            |(head, _), s, t, column, kept| {
                head.token(s, t, column, |error| kept.push(error));
            },
            |(head, d_o), grads, step| self.back(head, d_o.at(step.t), grads, step),
        );
        let collect = |part: fn(&HeadGrads<F>) -> &[F], steps: usize, d: usize| {
            let parts: Vec<&[F]> = parts.iter().map(part).collect();
            scatter_heads(&parts, (steps, heads, d))
        };
        DeltaGrads {
            q: collect(|part| &part.q, steps, key),
            k: collect(|part| &part.k, steps * sub, key),
            v: collect(|part| &part.v, steps * sub, value),
            beta: collect(|part| &part.beta, steps * sub, 1),
            g: collect(|part| &part.g, steps, 1),
            state,
        }
    }

    /// Takes the gradient of a panel's state through a token; what the token kept are the errors of its sub-steps.
    fn back(&self, head: &Head<F>, d_o: &[F], grads: &mut HeadGrads<F>, step: Step<F>) {
        let Step { t, column, before, after, ds, kept: errors } = step;
        let (keys, sub) = (self.key, self.sub);
        let d_read: Lanes<F> = load::<F, LANES>(d_o, column).map(|x| self.scale * x);
        read_back(after, &d_read, &mut grads.q[t * keys..][..keys]);
        // The gradient of a read is a write.
        let last = (t + 1) * sub - 1;
        let mut du = write(ds, F::one(), head.q.at(t), &d_read, head.k.at(last));
        for (j, error) in (t * sub..last + 1).zip(errors).rev() {
            let (k, beta) = (head.k.at(j), head.beta.one(j));
            if j < last {
                du = read(ds, k);
            }
            let u = error.map(|e| beta * e);
            let d_error = du.map(|x| beta * x);
            grads.beta[j] += F::sum_of::<LANES>(&std::array::from_fn(|l| du[l] * error[l]));
            store(&d_error, &mut grads.v[j * self.value..][..self.value], column);
            // What was erased depends on the key and on the state; nothing, if nothing was.
            let d_error = if self.erases { d_error } else { [F::zero(); LANES] };
            let dk = &mut grads.k[j * keys..][..keys];
            if j > t * sub {
                // Within a token nothing decays: the state before the write is found by undoing it.
                undo(after, ds, k, [&u, &d_error], dk);
            } else {
                grads.g[t] += token_back(before, ds, head.decay(t), k, [&u, &d_error], dk);
            }
        }
    }
}

/// Gradients of one head, summed over its panels in their order.
struct HeadGrads<F> {
    q: Vec<F>,
    k: Vec<F>,
    v: Vec<F>,
    beta: Vec<F>,
    g: Vec<F>,
}

impl<F: Real> HeadGrads<F> {
    fn zeros(problem: &Delta<'_, F>) -> Self {
        let zeros = |n: usize| vec![F::zero(); n];
        let (t, n) = (problem.steps, problem.steps * problem.sub);
        Self {
            q: zeros(t * problem.key),
            k: zeros(n * problem.key),
            v: zeros(n * problem.value),
            beta: zeros(n),
            g: zeros(t),
        }
    }
}
