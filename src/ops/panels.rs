//! The walk of a recurrence over matrix states [B, H, K, V] through time, token after token.
//!
//! Value columns are independent, so a head is worked through in panels of [`LANES`] columns: the state of a panel is K
//! rows. The forward pass keeps the state before every [`CHUNK`]-th token; the backward pass computes those between
//! again, chunk by chunk from the last.

use candle_core::{Device, Result, Shape, Tensor};

use super::real::{Real, joined, map_heads, scatter_heads};
use super::scan::{CHUNK, LANES, Lanes, load, store};
use super::tape::{Forward, Value};

/// The sizes of the states.
#[derive(Clone, Copy)]
pub struct Panels {
    pub batch: usize,
    pub steps: usize,
    pub heads: usize,
    pub key: usize,
    pub value: usize,
}

/// What the forward pass computes.
pub struct Walked<F> {
    /// [B, T, H, V]
    pub o: Vec<F>,
    /// [B, H, K, V]
    pub state: Vec<F>,
    /// [B, H, panels, ⌈T/CHUNK⌉, K, LANES]: the states before every CHUNK-th token; empty unless asked for.
    pub checkpoints: Vec<F>,
}

impl<F: Real> Walked<F> {
    /// As a node gives it: outputs and final states in these shapes, and with `save` the checkpoints.
    pub fn into_forward(self, o: impl Into<Shape>, state: impl Into<Shape>, save: bool) -> Result<Forward> {
        let count = self.checkpoints.len();
        let saved = match save {
            true => vec![Tensor::from_vec(self.checkpoints, count, &Device::Cpu)?],
            false => vec![],
        };
        Ok(Forward { outputs: vec![Value::cpu(self.o, o), Value::cpu(self.state, state)], saved })
    }
}

/// A token of the backward pass, in one panel.
pub struct Step<'a, F> {
    pub t: usize,
    pub column: usize,
    /// The states before and after it.
    pub before: &'a [Lanes<F>],
    pub after: &'a mut [Lanes<F>],
    /// The gradient of the state after it, which becomes that of the state before.
    pub ds: &'a mut [Lanes<F>],
    /// What the forward pass of the token kept.
    pub kept: &'a [Lanes<F>],
}

impl Panels {
    /// The first column of every panel.
    fn columns(self) -> impl ExactSizeIterator<Item = usize> {
        (0..self.value).step_by(LANES)
    }

    /// Numbers in the checkpoints of a panel.
    fn kept(self) -> usize {
        self.steps.div_ceil(CHUNK) * self.key * LANES
    }

    /// The panel from `column` on of one state of [K, V] numbers; zeros for none.
    fn load<F: Real>(self, state: Option<&[F]>, column: usize) -> Vec<Lanes<F>> {
        match state {
            Some(state) => state.chunks_exact(self.value).map(|row| load(row, column)).collect(),
            None => vec![[F::zero(); LANES]; self.key],
        }
    }

    /// The state of batch entry `b` and head `h` among all.
    fn of<F>(self, states: &[F], (b, h): (usize, usize)) -> &[F] {
        let size = self.key * self.value;
        &states[(b * self.heads + h) * size..][..size]
    }

    /// Takes all states through all tokens, from `start` or from zeros. `token` takes the state of a panel of a head
    /// through token t and gives the output in its columns.
    pub fn forward<F: Real, H>(
        self,
        start: Option<&[F]>,
        save: bool,
        head: impl Fn(usize, usize) -> H + Sync,
        token: impl Fn(&H, &mut [Lanes<F>], usize, usize) -> Lanes<F> + Sync,
    ) -> Walked<F> {
        let parts = map_heads(self.batch, self.heads, |b, h| {
            let head = head(b, h);
            let start = start.map(|states| self.of(states, (b, h)));
            let mut o = vec![F::zero(); self.steps * self.value];
            let mut state = vec![F::zero(); self.key * self.value];
            let mut checkpoints =
                Vec::with_capacity(if save { self.columns().len() * self.kept() } else { 0 });
            for column in self.columns() {
                let mut s = self.load(start, column);
                for (t, o) in o.chunks_exact_mut(self.value).enumerate() {
                    if save && t % CHUNK == 0 {
                        checkpoints.extend_from_slice(s.as_flattened());
                    }
                    store(&token(&head, &mut s, t, column), o, column);
                }
                for (row, s) in state.chunks_exact_mut(self.value).zip(&s) {
                    store(s, row, column);
                }
            }
            (o, state, checkpoints)
        });
        let o: Vec<&[F]> = parts.iter().map(|part| part.0.as_slice()).collect();
        Walked {
            o: scatter_heads(&o, (self.steps, self.heads, self.value)),
            state: joined(parts.iter().map(|part| &part.1)),
            checkpoints: joined(parts.iter().map(|part| &part.2)),
        }
    }

    /// Takes the gradient `d_state` of the final states back through all tokens; gives the gradients of every head, and
    /// those of the states before the first token, [B, H, K, V].
    ///
    /// `token` takes the state of a panel through token t again, and keeps `per_token` rows for `back`, which takes the
    /// gradient through the token and adds to those of the head, begun by `grads`. What it adds is summed over panels
    /// in their order.
    pub fn backward<F: Real, H, G: Send>(
        self,
        (checkpoints, d_state): (&[F], &[F]),
        head: impl Fn(usize, usize) -> H + Sync,
        grads: impl Fn() -> G + Sync,
        per_token: usize,
        token: impl Fn(&H, &mut [Lanes<F>], usize, usize, &mut Vec<Lanes<F>>) + Sync,
        back: impl Fn(&H, &mut G, Step<F>) + Sync,
    ) -> (Vec<G>, Vec<F>) {
        let (keys, per_head) = (self.key, self.columns().len() * self.kept());
        let parts = map_heads(self.batch, self.heads, |b, h| {
            let (head, mut grads) = (head(b, h), grads());
            let mut d_start = vec![F::zero(); keys * self.value];
            // The state before a chunk and after each of its tokens, and what these keep.
            let longest = CHUNK.min(self.steps);
            let mut states = vec![[F::zero(); LANES]; (longest + 1) * keys];
            let mut kept = Vec::with_capacity(longest * per_token);
            let checkpoints = checkpoints[(b * self.heads + h) * per_head..].chunks_exact(self.kept());
            for (column, checkpoints) in self.columns().zip(checkpoints) {
                let mut ds = self.load(Some(self.of(d_state, (b, h))), column);
                for (chunk, start) in checkpoints.chunks_exact(keys * LANES).enumerate().rev() {
                    let first = chunk * CHUNK;
                    let last = self.steps.min(first + CHUNK);
                    states[..keys].as_flattened_mut().copy_from_slice(start);
                    kept.clear();
                    for t in first..last {
                        let (before, after) =
                            states[(t - first) * keys..(t - first + 2) * keys].split_at_mut(keys);
                        after.copy_from_slice(before);
                        token(&head, after, t, column, &mut kept);
                    }
                    for t in (first..last).rev() {
                        let (before, after) =
                            states[(t - first) * keys..(t - first + 2) * keys].split_at_mut(keys);
                        let kept = &kept[(t - first) * per_token..][..per_token];
                        back(&head, &mut grads, Step { t, column, before, after, ds: &mut ds, kept });
                    }
                }
                for (row, ds) in d_start.chunks_exact_mut(self.value).zip(&ds) {
                    store(ds, row, column);
                }
            }
            (grads, d_start)
        });
        let (grads, d_start): (Vec<G>, Vec<Vec<F>>) = parts.into_iter().unzip();
        (grads, joined(d_start.iter()))
    }
}
