//! CPU reference of the state space duality recurrence: one token after the other.
//!
//! The P rows of a head's state are independent of each other; each is N numbers, in tiles of `TILE`.

use rayon::prelude::*;

use super::super::real::{Real, map_heads, scatter_heads, sigmoid, softplus, sum_in_order};
use super::super::scan::{CHUNK, Rows, load, sum};

/// Numbers in a tile: the tiles of a row cover N, padded with zeros.
/// Loops over 16 are unrolled into scalar code before they are vectorised.
const TILE: usize = 32;

type Tile<F> = [F; TILE];

/// Rows of the state that go through the tokens together: their states stay in cache.
const BLOCK: usize = 16;

/// The arguments of one call, as slices; shapes as in [`super::ssd`].
#[derive(Clone, Copy)]
pub struct Ssd<'a, F> {
    pub batch: usize,
    pub steps: usize,
    pub heads: usize,
    /// P
    pub dim: usize,
    pub groups: usize,
    /// N
    pub states: usize,
    pub x: &'a [F],
    pub dt: &'a [F],
    pub a_log: &'a [F],
    pub b: &'a [F],
    pub c: &'a [F],
    pub d: &'a [F],
    pub dt_bias: &'a [F],
    pub state: Option<&'a [F]>,
}

/// What the forward pass computes.
pub struct SsdForward<F> {
    /// [B, T, H, P]
    pub y: Vec<F>,
    /// [B, H, P, N]
    pub state: Vec<F>,
    /// [B, H, ⌈T/CHUNK⌉, P, N padded]: the states before every CHUNK-th token; empty unless asked for.
    pub checkpoints: Vec<F>,
}

/// Gradients of the arguments, each with its argument's shape.
pub struct SsdGrads<F> {
    pub x: Vec<F>,
    pub dt: Vec<F>,
    pub a_log: Vec<F>,
    pub b: Vec<F>,
    pub c: Vec<F>,
    pub d: Vec<F>,
    pub dt_bias: Vec<F>,
    pub state: Vec<F>,
}

/// One head: B and C in tiles, the step sizes and decays of every token.
struct Head<'a, F> {
    x: Rows<'a, F>,
    /// [T, tiles]
    b: Vec<Tile<F>>,
    c: Vec<Tile<F>>,
    dt: Vec<F>,
    decay: Vec<F>,
    /// −exp(a_log)
    rate: F,
    tiles: usize,
}

/// Cuts rows into tiles.
fn tiles<'a, F: Real>(rows: impl Iterator<Item = &'a [F]>) -> Vec<Tile<F>> {
    rows.flat_map(|row| (0..row.len()).step_by(TILE).map(move |at| load(row, at))).collect()
}

impl<F: Real> Head<'_, F> {
    /// Takes one row of the state through token `t`: h ← a h + dt x B; returns C·h.
    #[inline(always)]
    fn token(&self, h: &mut [Tile<F>], t: usize, x: F) -> F {
        let (b, c) = (&self.b[t * self.tiles..][..self.tiles], &self.c[t * self.tiles..][..self.tiles]);
        let (decay, x) = (self.decay[t], self.dt[t] * x);
        let mut y = [F::zero(); TILE];
        for ((h, b), c) in h.iter_mut().zip(b).zip(c) {
            for l in 0..TILE {
                h[l] = x.fma(b[l], decay * h[l]);
                y[l] = c[l].fma(h[l], y[l]);
            }
        }
        sum(y)
    }
}

impl<F: Real> Ssd<'_, F> {
    fn head(&self, b: usize, h: usize) -> Head<'_, F> {
        let group = h / (self.heads / self.groups);
        let shared = (self.steps, self.groups, self.states);
        let cut = |data| {
            let rows = Rows::head(data, (b, group), shared);
            tiles((0..self.steps).map(|t| rows.at(t)))
        };
        let raw = Rows::head(self.dt, (b, h), (self.steps, self.heads, 1));
        let dt: Vec<F> = (0..self.steps).map(|t| softplus(raw.one(t) + self.dt_bias[h])).collect();
        let rate = -self.a_log[h].exp();
        Head {
            x: Rows::head(self.x, (b, h), (self.steps, self.heads, self.dim)),
            b: cut(self.b),
            c: cut(self.c),
            decay: dt.iter().map(|&dt| (rate * dt).exp()).collect(),
            dt,
            rate,
            tiles: self.states.div_ceil(TILE),
        }
    }

    /// Computes outputs and final state; with `save` also the checkpoints.
    pub fn forward(&self, save: bool) -> SsdForward<F> {
        let (dim, n) = (self.dim, self.states);
        let parts = map_heads(self.batch, self.heads, |b, h| {
            let head = self.head(b, h);
            let size = dim * n;
            let mut state = match self.state {
                Some(state) => tiles(state[(b * self.heads + h) * size..][..size].chunks_exact(n)),
                None => vec![[F::zero(); TILE]; dim * head.tiles],
            };
            let mut y = vec![F::zero(); self.steps * dim];
            let chunks = if save { self.steps.div_ceil(CHUNK) } else { 0 };
            let mut checkpoints = vec![F::zero(); chunks * dim * head.tiles * TILE];
            // Block by block through all tokens: a block stays in the first cache.
            for (block, state) in state.chunks_mut(BLOCK * head.tiles).enumerate() {
                let p0 = block * BLOCK;
                for (t, y) in y.chunks_exact_mut(dim).enumerate() {
                    if save && t % CHUNK == 0 {
                        let at = (t / CHUNK * dim + p0) * head.tiles * TILE;
                        checkpoints[at..at + state.len() * TILE].copy_from_slice(state.as_flattened());
                    }
                    let x = &head.x.at(t)[p0..];
                    let rows = y[p0..].iter_mut().zip(state.chunks_exact_mut(head.tiles)).zip(x);
                    for ((y, row), &x) in rows {
                        *y = self.d[h].fma(x, head.token(row, t, x));
                    }
                }
            }
            let last: Vec<F> =
                state.chunks_exact(head.tiles).flat_map(|row| &row.as_flattened()[..n]).copied().collect();
            (y, last, checkpoints)
        });
        let y: Vec<&[F]> = parts.iter().map(|part| part.0.as_slice()).collect();
        SsdForward {
            y: scatter_heads(&y, (self.steps, self.heads, dim)),
            state: parts.iter().flat_map(|part| &part.1).copied().collect(),
            checkpoints: parts.iter().flat_map(|part| &part.2).copied().collect(),
        }
    }

    /// Gradients of the arguments from those of the outputs, `d_y` [B, T, H, P] and `d_state` [B, H, P, N].
    pub fn backward(&self, checkpoints: &[F], d_y: &[F], d_state: &[F]) -> SsdGrads<F> {
        let (heads, groups) = (self.heads, self.groups);
        // Batch entry by batch entry: the gradients of B and C before their sum over heads are large.
        let parts: Vec<_> = (0..self.batch)
            .into_par_iter()
            .map(|b| {
                let mut parts: Vec<HeadGrads<F>> = (0..heads)
                    .into_par_iter()
                    .map(|h| self.backward_head((b, h), checkpoints, d_y, d_state))
                    .collect();
                let grouped = |part: fn(&HeadGrads<F>) -> &[F]| -> Vec<Vec<F>> {
                    parts
                        .chunks_exact(heads / groups)
                        .map(|heads| sum_in_order(&heads.iter().map(part).collect::<Vec<_>>()))
                        .collect()
                };
                let shared = Shared { b: grouped(|part| &part.b), c: grouped(|part| &part.c) };
                for part in &mut parts {
                    part.b = Vec::new();
                    part.c = Vec::new();
                }
                (parts, shared)
            })
            .collect();

        let heads_of = |part: fn(&HeadGrads<F>) -> &[F], d: usize| {
            let rows: Vec<&[F]> = parts.iter().flat_map(|(heads, _)| heads.iter().map(part)).collect();
            scatter_heads(&rows, (self.steps, heads, d))
        };
        let groups_of = |part: fn(&Shared<F>) -> &[Vec<F>]| {
            let rows: Vec<&[F]> =
                parts.iter().flat_map(|(_, shared)| part(shared)).map(Vec::as_slice).collect();
            scatter_heads(&rows, (self.steps, groups, self.states))
        };
        let per_head = |part: fn(&HeadGrads<F>) -> f64| -> Vec<F> {
            (0..heads).map(|h| F::of(parts.iter().map(|(heads, _)| part(&heads[h])).sum())).collect()
        };
        SsdGrads {
            x: heads_of(|part| &part.x, self.dim),
            dt: heads_of(|part| &part.dt, 1),
            a_log: per_head(|part| part.a_log),
            b: groups_of(|shared| &shared.b),
            c: groups_of(|shared| &shared.c),
            d: per_head(|part| part.d),
            dt_bias: per_head(|part| part.dt_bias),
            state: parts.iter().flat_map(|(heads, _)| heads.iter().flat_map(|h| &h.state)).copied().collect(),
        }
    }

    fn backward_head(&self, at: (usize, usize), checkpoints: &[F], d_y: &[F], d_state: &[F]) -> HeadGrads<F> {
        let (b, h) = at;
        let (dim, n, steps) = (self.dim, self.states, self.steps);
        let head = self.head(b, h);
        let tiles_n = head.tiles;
        let chunks = steps.div_ceil(CHUNK);
        let per_chunk = dim * tiles_n * TILE;
        let checkpoints = &checkpoints[(b * self.heads + h) * chunks * per_chunk..][..chunks * per_chunk];
        let d_y = Rows::head(d_y, at, (steps, self.heads, dim));
        let index = b * self.heads + h;
        let mut dh = tiles(d_state[index * dim * n..][..dim * n].chunks_exact(n));

        let mut db = vec![[F::zero(); TILE]; steps * tiles_n];
        let mut dc = vec![[F::zero(); TILE]; steps * tiles_n];
        let mut dx = vec![F::zero(); steps * dim];
        // Per token: gradients of its step size as it scales x, and of its log decay.
        let mut d_scale = vec![F::zero(); steps];
        let mut d_log_decay = vec![F::zero(); steps];
        let mut d_skip = 0.0;
        let mut states = vec![[F::zero(); TILE]; (CHUNK.min(steps) + 1) * BLOCK.min(dim) * tiles_n];
        for chunk in (0..chunks).rev() {
            let (first, last) = (chunk * CHUNK, steps.min((chunk + 1) * CHUNK));
            for p0 in (0..dim).step_by(BLOCK) {
                let rows = BLOCK.min(dim - p0);
                let width = rows * tiles_n;
                states[..width]
                    .as_flattened_mut()
                    .copy_from_slice(&checkpoints[chunk * per_chunk + p0 * tiles_n * TILE..][..width * TILE]);
                for t in first..last {
                    let (before, after) =
                        states[(t - first) * width..(t - first + 2) * width].split_at_mut(width);
                    after.copy_from_slice(before);
                    for (row, &x) in after.chunks_exact_mut(tiles_n).zip(&head.x.at(t)[p0..]) {
                        head.token(row, t, x);
                    }
                }
                for t in (first..last).rev() {
                    let (before, after) =
                        states[(t - first) * width..(t - first + 2) * width].split_at(width);
                    let (decay, dt) = (head.decay[t], head.dt[t]);
                    let span = t * tiles_n..(t + 1) * tiles_n;
                    let (b, c) = (&head.b[span.clone()], &head.c[span.clone()]);
                    let (db, dc) = (&mut db[span.clone()], &mut dc[span]);
                    let mut d_decay = [F::zero(); TILE];
                    for p in 0..rows {
                        let (x, dy) = (head.x.at(t)[p0 + p], d_y.at(t)[p0 + p]);
                        let scaled = dt * x;
                        let dh = &mut dh[(p0 + p) * tiles_n..][..tiles_n];
                        let (before, after) =
                            (&before[p * tiles_n..][..tiles_n], &after[p * tiles_n..][..tiles_n]);
                        let mut d_scaled = [F::zero(); TILE];
                        for i in 0..tiles_n {
                            for l in 0..TILE {
                                dc[i][l] = dy.fma(after[i][l], dc[i][l]);
                                let d = dy.fma(c[i][l], dh[i][l]);
                                db[i][l] = scaled.fma(d, db[i][l]);
                                d_scaled[l] = d.fma(b[i][l], d_scaled[l]);
                                d_decay[l] = d.fma(before[i][l], d_decay[l]);
                                dh[i][l] = decay * d;
                            }
                        }
                        let d_scaled = sum(d_scaled);
                        dx[t * dim + p0 + p] = dt.fma(d_scaled, self.d[h] * dy);
                        d_scale[t] = x.fma(d_scaled, d_scale[t]);
                        d_skip += (x * dy).as_f64();
                    }
                    d_log_decay[t] += decay * sum(d_decay);
                }
            }
        }

        let raw = Rows::head(self.dt, at, (steps, self.heads, 1));
        let mut d_dt = Vec::with_capacity(steps);
        let (mut d_a_log, mut d_dt_bias) = (0.0, 0.0);
        for t in 0..steps {
            // The log decay is rate·dt, and rate = −exp(a_log) is its own derivative by a_log.
            d_a_log += (d_log_decay[t] * head.rate * head.dt[t]).as_f64();
            let d = head.rate.fma(d_log_decay[t], d_scale[t]) * sigmoid(raw.one(t) + self.dt_bias[h]);
            d_dt_bias += d.as_f64();
            d_dt.push(d);
        }
        let unpad = |tiles: Vec<Tile<F>>| -> Vec<F> {
            tiles.chunks_exact(tiles_n).flat_map(|row| &row.as_flattened()[..n]).copied().collect()
        };
        HeadGrads {
            x: dx,
            dt: d_dt,
            a_log: d_a_log,
            b: unpad(db),
            c: unpad(dc),
            d: d_skip,
            dt_bias: d_dt_bias,
            state: unpad(dh),
        }
    }
}

/// Gradients of one head; those of B and C are yet to be summed over the heads of a group.
struct HeadGrads<F> {
    x: Vec<F>,
    dt: Vec<F>,
    a_log: f64,
    b: Vec<F>,
    c: Vec<F>,
    d: f64,
    dt_bias: f64,
    state: Vec<F>,
}

/// Gradients of B and C of one batch entry, by group.
struct Shared<F> {
    b: Vec<Vec<F>>,
    c: Vec<Vec<F>>,
}
