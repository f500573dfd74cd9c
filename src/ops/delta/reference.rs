//! CPU reference of the delta rule family: the recurrence itself, one token after the other.
//!
//! Value columns are independent, so a head is worked through in panels of [`LANES`] columns: the state
//! of a panel is K rows, and everything between the passes over them stays in registers.

use super::super::real::{Real, joined, map_heads, scatter_heads};
use super::super::scan::{CHUNK, LANES, Lanes, Rows, load, panel, store, write};

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

/// What the forward pass computes.
pub struct DeltaForward<F> {
    /// [B, T, H, V]
    pub o: Vec<F>,
    /// [B, H, K, V]
    pub state: Vec<F>,
    /// [B, H, panels, ⌈T/CHUNK⌉, K, LANES]: the states before every CHUNK-th token; empty unless asked for.
    pub checkpoints: Vec<F>,
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
    pub fn forward(&self, save: bool) -> DeltaForward<F> {
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
                    let read = head.token(&mut s, t, column, |_| ());
                    store(&read.map(|x| self.scale * x), o, column);
                }
                for (row, s) in state.chunks_exact_mut(self.value).zip(&s) {
                    store(s, row, column);
                }
            }
            (o, state, checkpoints)
        });
        let o: Vec<&[F]> = parts.iter().map(|part| part.0.as_slice()).collect();
        DeltaForward {
            o: scatter_heads(&o, (self.steps, self.heads, self.value)),
            state: joined(parts.iter().map(|part| &part.1)),
            checkpoints: joined(parts.iter().map(|part| &part.2)),
        }
    }

    /// Gradients of the arguments from those of the outputs, `d_o` [B, T, H, V] and `d_state` [B, H, K, V].
    pub fn backward(&self, checkpoints: &[F], d_o: &[F], d_state: &[F]) -> DeltaGrads<F> {
        let (per_head, per_panel) = (self.kept(), self.kept() / self.panels().count());
        let parts = map_heads(self.batch, self.heads, |b, h| {
            let mut grads = HeadGrads::zeros(self);
            let kept = &checkpoints[(b * self.heads + h) * per_head..][..per_head];
            // The state before a chunk and after each of its tokens.
            let mut states = vec![[F::zero(); LANES]; (CHUNK.min(self.steps) + 1) * self.key];
            for (column, kept) in self.panels().zip(kept.chunks_exact(per_panel)) {
                self.backward_panel((b, h), column, (kept, &mut states), (d_o, d_state), &mut grads);
            }
            grads
        });
        let collect = |part: fn(&HeadGrads<F>) -> &[F], steps: usize, d: usize| {
            let parts: Vec<&[F]> = parts.iter().map(part).collect();
            scatter_heads(&parts, (steps, self.heads, d))
        };
        let (t, n) = (self.steps, self.steps * self.sub);
        DeltaGrads {
            q: collect(|part| &part.q, t, self.key),
            k: collect(|part| &part.k, n, self.key),
            v: collect(|part| &part.v, n, self.value),
            beta: collect(|part| &part.beta, n, 1),
            g: collect(|part| &part.g, t, 1),
            state: joined(parts.iter().map(|part| &part.state)),
        }
    }

    fn backward_panel(
        &self,
        at: (usize, usize),
        column: usize,
        (checkpoints, states): (&[F], &mut [Lanes<F>]),
        (d_o, d_state): (&[F], &[F]),
        grads: &mut HeadGrads<F>,
    ) {
        let (keys, sub) = (self.key, self.sub);
        let head = self.head(at.0, at.1);
        let d_o = Rows::head(d_o, at, (self.steps, self.heads, self.value));
        let mut ds = self.panel(Some(d_state), at, column);
        // Every sub-step's error.
        let mut errors = Vec::with_capacity(CHUNK.min(self.steps) * sub);
        for chunk in (0..self.steps.div_ceil(CHUNK)).rev() {
            let first = chunk * CHUNK;
            let last = self.steps.min(first + CHUNK);
            states[..keys]
                .as_flattened_mut()
                .copy_from_slice(&checkpoints[chunk * keys * LANES..][..keys * LANES]);
            errors.clear();
            for t in first..last {
                let (before, after) = states[(t - first) * keys..(t - first + 2) * keys].split_at_mut(keys);
                after.copy_from_slice(before);
                head.token(after, t, column, |error| errors.push(error));
            }
            for t in (first..last).rev() {
                let (before, after) = states[(t - first) * keys..(t - first + 2) * keys].split_at_mut(keys);
                let decay = head.decay(t);
                let d_read: Lanes<F> = load::<F, LANES>(d_o.at(t), column).map(|x| self.scale * x);
                read_back(after, &d_read, &mut grads.q[t * keys..][..keys]);
                // The gradient of a read is a write.
                let last_key = (t + 1) * sub - 1;
                let mut du = write(&mut ds, F::one(), head.q.at(t), &d_read, head.k.at(last_key));
                for j in (t * sub..=last_key).rev() {
                    let (k, beta) = (head.k.at(j), head.beta.one(j));
                    if j < last_key {
                        du = read(&ds, k);
                    }
                    let error = errors[j - first * sub];
                    let u = error.map(|e| beta * e);
                    let d_error = du.map(|x| beta * x);
                    grads.beta[j] += F::sum_of::<LANES>(&std::array::from_fn(|l| du[l] * error[l]));
                    store(&d_error, &mut grads.v[j * self.value..][..self.value], column);
                    // What was erased depends on the key and on the state; nothing, if nothing was.
                    let d_error = if self.erases { d_error } else { [F::zero(); LANES] };
                    let dk = &mut grads.k[j * keys..][..keys];
                    if j > t * sub {
                        // Within a token nothing decays: the state before the write is found by undoing it.
                        undo(after, &mut ds, k, [&u, &d_error], dk);
                    } else {
                        grads.g[t] += token_back(before, &mut ds, decay, k, [&u, &d_error], dk);
                    }
                }
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
    beta: Vec<F>,
    g: Vec<F>,
    state: Vec<F>,
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
            state: zeros(problem.key * problem.value),
        }
    }
}
