//! CPU reference of the selective scan: one token after the other.
//!
//! Channels are independent but for B and C, which all of them share. A task takes `GROUP` channels of
//! one batch entry; the state of a channel is N numbers, in tiles of `TILE`.

use rayon::prelude::*;

use super::super::real::{Real, joined, sigmoid, silu, silu_grad, softplus, sum_in_order};
use super::super::scan::{CHUNK, LANES, Rows, load};

/// Numbers in a tile: the tiles of a row cover N, padded with zeros.
/// Loops over 16 are unrolled into scalar code before they are vectorised.
const TILE: usize = LANES;

type Tile<F> = [F; TILE];

/// Channels of one task, which sums its part of the gradients of B and C.
const GROUP: usize = 32;

/// Channels that the backward pass takes through a chunk together: their states and decays stay in cache.
const BLOCK: usize = 8;

/// The arguments of one call, as slices; shapes as in [`super::selective_scan`].
#[derive(Clone, Copy)]
pub struct SelectiveScan<'a, F> {
    pub batch: usize,
    pub steps: usize,
    /// D
    pub channels: usize,
    /// N
    pub states: usize,
    pub u: &'a [F],
    pub delta: &'a [F],
    pub a_log: &'a [F],
    pub b: &'a [F],
    pub c: &'a [F],
    pub d: &'a [F],
    pub delta_bias: &'a [F],
    pub z: Option<&'a [F]>,
    pub state: Option<&'a [F]>,
}

/// What the forward pass computes.
pub struct SelectiveScanForward<F> {
    /// [B, T, D]
    pub y: Vec<F>,
    /// [B, D, N]
    pub state: Vec<F>,
    /// Per batch entry and group of channels: the states before every CHUNK-th token,
    /// [⌈T/CHUNK⌉, channels of the group, N padded]; empty unless asked for.
    pub checkpoints: Vec<F>,
}

/// Gradients of the arguments, each with its argument's shape.
pub struct SelectiveScanGrads<F> {
    pub u: Vec<F>,
    pub delta: Vec<F>,
    pub a_log: Vec<F>,
    pub b: Vec<F>,
    pub c: Vec<F>,
    pub d: Vec<F>,
    pub delta_bias: Vec<F>,
    pub z: Vec<F>,
    pub state: Vec<F>,
}

/// Cuts rows of N numbers into tiles.
fn tiles<F: Real>(rows: &[F], n: usize) -> Vec<Tile<F>> {
    rows.chunks_exact(n).flat_map(|row| (0..n).step_by(TILE).map(move |at| load(row, at))).collect()
}

/// The rows of N numbers behind tiles.
fn untile<F: Real>(tiles: &[Tile<F>], n: usize) -> Vec<F> {
    tiles.chunks_exact(n.div_ceil(TILE)).flat_map(|row| &row.as_flattened()[..n]).copied().collect()
}

/// A group of channels of one batch entry.
struct Group<'a, F> {
    /// Rows of all D channels.
    u: Rows<'a, F>,
    z: Option<Rows<'a, F>>,
    /// −exp(a_log), [channels, tiles]
    a: Vec<Tile<F>>,
    /// [T, tiles]
    b: Vec<Tile<F>>,
    c: Vec<Tile<F>>,
    /// [T, channels]
    dt: Vec<F>,
    d: &'a [F],
    /// The first channel of the group.
    first: usize,
    width: usize,
    tiles: usize,
}

impl<F: Real> Group<'_, F> {
    /// Takes the state of channel `i` of the group through token `t`: h ← exp(Δ A) h + Δ u B; puts exp(Δ A)
    /// in `decay` and returns C·h + D u.
    #[inline(always)]
    fn token(&self, h: &mut [Tile<F>], decay: &mut [Tile<F>], t: usize, i: usize) -> F {
        let n = self.tiles;
        let (a, b, c) = (&self.a[i * n..][..n], &self.b[t * n..][..n], &self.c[t * n..][..n]);
        let (dt, u) = (self.dt[t * self.width + i], self.u.at(t)[self.first + i]);
        let x = dt * u;
        let mut y = [F::zero(); TILE];
        for ((((h, e), a), b), c) in h.iter_mut().zip(decay).zip(a).zip(b).zip(c) {
            for l in 0..TILE {
                e[l] = (dt * a[l]).exp_fast();
                h[l] = x.fma(b[l], e[l] * h[l]);
                y[l] = c[l].fma(h[l], y[l]);
            }
        }
        self.d[self.first + i].fma(u, F::sum_of(&y))
    }
}

impl<F: Real> SelectiveScan<'_, F> {
    fn groups(&self) -> usize {
        self.channels.div_ceil(GROUP)
    }

    fn padded(&self) -> usize {
        self.states.next_multiple_of(TILE)
    }

    fn group(&self, b: usize, group: usize) -> Group<'_, F> {
        let (channels, n, steps) = (self.channels, self.states, self.steps);
        let first = group * GROUP;
        let width = GROUP.min(channels - first);
        let bias = &self.delta_bias[first..first + width];
        let rows = |data| Rows::head(data, (b, 0), (steps, 1, channels));
        let raw = rows(self.delta);
        let mut dt = Vec::with_capacity(steps * width);
        for t in 0..steps {
            dt.extend(raw.at(t)[first..].iter().zip(bias).map(|(&raw, &bias)| softplus(raw + bias)));
        }
        let rates: Vec<F> = self.a_log[first * n..][..width * n].iter().map(|a| -a.exp()).collect();
        Group {
            u: rows(self.u),
            z: self.z.map(rows),
            a: tiles(&rates, n),
            b: tiles(&self.b[b * steps * n..][..steps * n], n),
            c: tiles(&self.c[b * steps * n..][..steps * n], n),
            dt,
            d: self.d,
            first,
            width,
            tiles: n.div_ceil(TILE),
        }
    }

    /// Puts per-group [T, channels] arrays together to [B, T, D].
    fn assemble(&self, parts: &[&[F]]) -> Vec<F> {
        let (channels, steps) = (self.channels, self.steps);
        let mut out = vec![F::zero(); self.batch * steps * channels];
        for (out, parts) in out.chunks_exact_mut(steps * channels).zip(parts.chunks_exact(self.groups())) {
            for (group, part) in parts.iter().enumerate() {
                let first = group * GROUP;
                let width = GROUP.min(channels - first);
                for (row, part) in out.chunks_exact_mut(channels).zip(part.chunks_exact(width)) {
                    row[first..first + width].copy_from_slice(part);
                }
            }
        }
        out
    }

    /// Computes outputs and final state; with `save` also the checkpoints.
    pub fn forward(&self, save: bool) -> SelectiveScanForward<F> {
        let (channels, n) = (self.channels, self.states);
        let parts: Vec<_> = (0..self.batch * self.groups())
            .into_par_iter()
            .map(|index| {
                let (b, group) = (index / self.groups(), index % self.groups());
                let group = self.group(b, group);
                let (first, width) = (group.first, group.width);
                let mut h = match self.state {
                    Some(state) => tiles(&state[(b * channels + first) * n..][..width * n], n),
                    None => vec![[F::zero(); TILE]; width * group.tiles],
                };
                let mut decay = vec![[F::zero(); TILE]; group.tiles];
                let mut y = vec![F::zero(); self.steps * width];
                let mut checkpoints = Vec::new();
                for (t, y) in y.chunks_exact_mut(width).enumerate() {
                    if save && t % CHUNK == 0 {
                        checkpoints.extend_from_slice(h.as_flattened());
                    }
                    for (i, (y, h)) in y.iter_mut().zip(h.chunks_exact_mut(group.tiles)).enumerate() {
                        *y = group.token(h, &mut decay, t, i);
                    }
                    if let Some(z) = group.z {
                        for (y, &z) in y.iter_mut().zip(&z.at(t)[first..]) {
                            *y *= silu(z);
                        }
                    }
                }
                (y, untile(&h, n), checkpoints)
            })
            .collect();
        let y: Vec<&[F]> = parts.iter().map(|part| part.0.as_slice()).collect();
        SelectiveScanForward {
            y: self.assemble(&y),
            state: joined(parts.iter().map(|part| &part.1)),
            checkpoints: joined(parts.iter().map(|part| &part.2)),
        }
    }

    /// Gradients of the arguments from those of the outputs, `d_y` [B, T, D] and `d_state` [B, D, N].
    pub fn backward(&self, checkpoints: &[F], d_y: &[F], d_state: &[F]) -> SelectiveScanGrads<F> {
        // Batch entry by batch entry: the gradients of B and C before their sum over groups are large.
        let parts: Vec<_> = (0..self.batch)
            .into_par_iter()
            .map(|b| {
                let mut groups: Vec<GroupGrads<F>> = (0..self.groups())
                    .into_par_iter()
                    .map(|group| self.backward_group(b, group, checkpoints, d_y, d_state))
                    .collect();
                let total = |part: fn(&GroupGrads<F>) -> &[F]| {
                    sum_in_order(&groups.iter().map(part).collect::<Vec<_>>())
                };
                let shared = (total(|part| &part.b), total(|part| &part.c));
                for group in &mut groups {
                    group.b = Vec::new();
                    group.c = Vec::new();
                }
                (groups, shared)
            })
            .collect();

        let by_channel = |part: fn(&GroupGrads<F>) -> &[F]| {
            let parts: Vec<&[F]> = parts.iter().flat_map(|(groups, _)| groups.iter().map(part)).collect();
            self.assemble(&parts)
        };
        let over_batch = |part: fn(&GroupGrads<F>) -> &[f64]| -> Vec<F> {
            let group = |group: usize| {
                sum_in_order(&parts.iter().map(|(groups, _)| part(&groups[group])).collect::<Vec<_>>())
            };
            (0..self.groups()).flat_map(group).map(F::of).collect()
        };
        SelectiveScanGrads {
            u: by_channel(|part| &part.u),
            delta: by_channel(|part| &part.delta),
            a_log: over_batch(|part| &part.a_log),
            b: joined(parts.iter().map(|(_, shared)| &shared.0)),
            c: joined(parts.iter().map(|(_, shared)| &shared.1)),
            d: over_batch(|part| &part.d),
            delta_bias: over_batch(|part| &part.delta_bias),
            z: if self.z.is_some() { by_channel(|part| &part.z) } else { Vec::new() },
            state: parts
                .iter()
                .flat_map(|(groups, _)| groups.iter().flat_map(|g| &g.state))
                .copied()
                .collect(),
        }
    }

    fn backward_group(
        &self,
        b: usize,
        group: usize,
        checkpoints: &[F],
        d_y: &[F],
        d_state: &[F],
    ) -> GroupGrads<F> {
        let (channels, n, steps) = (self.channels, self.states, self.steps);
        let group = self.group(b, group);
        let (first, width, row) = (group.first, group.width, group.tiles);
        let chunks = steps.div_ceil(CHUNK);
        let checkpoints = &checkpoints[(b * channels + first) * chunks * self.padded()..];
        let d_out = Rows::head(d_y, (b, 0), (steps, 1, channels));
        let raw = Rows::head(self.delta, (b, 0), (steps, 1, channels));
        let mut dh = tiles(&d_state[(b * channels + first) * n..][..width * n], n);

        let zeros = |rows: usize| vec![[F::zero(); TILE]; rows * row];
        let (mut da, mut db, mut dc) = (zeros(width), zeros(steps), zeros(steps));
        let mut du = vec![F::zero(); steps * width];
        let mut d_delta = vec![F::zero(); steps * width];
        let mut dz = vec![F::zero(); if group.z.is_some() { steps * width } else { 0 }];
        let mut dd = vec![0.0; width];
        let mut d_bias = vec![0.0; width];

        // Of one block and chunk: the state before the chunk and after each token; the decays; the outputs
        // before the gate.
        let (longest, block) = (CHUNK.min(steps), BLOCK.min(width));
        let mut states = zeros((longest + 1) * block);
        let mut decays = zeros(longest * block);
        let mut plain = vec![F::zero(); longest * block];
        for chunk in (0..chunks).rev() {
            let (start, end) = (chunk * CHUNK, steps.min((chunk + 1) * CHUNK));
            for i0 in (0..width).step_by(BLOCK) {
                let rows = BLOCK.min(width - i0);
                let span = rows * row;
                states[..span]
                    .as_flattened_mut()
                    .copy_from_slice(&checkpoints[(chunk * width + i0) * row * TILE..][..span * TILE]);
                for t in start..end {
                    let at = t - start;
                    let (before, after) = states[at * span..(at + 2) * span].split_at_mut(span);
                    after.copy_from_slice(before);
                    let decays = &mut decays[at * span..][..span];
                    for (i, (h, e)) in
                        after.chunks_exact_mut(row).zip(decays.chunks_exact_mut(row)).enumerate()
                    {
                        plain[at * rows + i] = group.token(h, e, t, i0 + i);
                    }
                }
                for t in (start..end).rev() {
                    let at = t - start;
                    let (before, after) = states[at * span..(at + 2) * span].split_at(span);
                    let decays = &decays[at * span..][..span];
                    let (b, c) = (&group.b[t * row..][..row], &group.c[t * row..][..row]);
                    let (db, dc) = (&mut db[t * row..][..row], &mut dc[t * row..][..row]);
                    for i in 0..rows {
                        // Index of the channel in the group, and of its number in [T, channels] arrays.
                        let (own, index) = (i0 + i, t * width + i0 + i);
                        let mut dy = d_out.at(t)[first + own];
                        if let Some(z) = group.z {
                            let z = z.at(t)[first + own];
                            dz[index] = dy * plain[at * rows + i] * silu_grad(z);
                            dy *= silu(z);
                        }
                        let (dt, u) = (group.dt[index], group.u.at(t)[first + own]);
                        let x = dt * u;
                        let (a, da) = (&group.a[own * row..][..row], &mut da[own * row..][..row]);
                        let dh = &mut dh[own * row..][..row];
                        let (before, after) = (&before[i * row..][..row], &after[i * row..][..row]);
                        let e = &decays[i * row..][..row];
                        let mut dx = [F::zero(); TILE];
                        let mut d_dt = [F::zero(); TILE];
                        for j in 0..row {
                            for l in 0..TILE {
                                let d = dy.fma(c[j][l], dh[j][l]);
                                dc[j][l] = dy.fma(after[j][l], dc[j][l]);
                                db[j][l] = x.fma(d, db[j][l]);
                                dx[l] = d.fma(b[j][l], dx[l]);
                                dh[j][l] = e[j][l] * d;
                                let d_log = dh[j][l] * before[j][l];
                                d_dt[l] = a[j][l].fma(d_log, d_dt[l]);
                                da[j][l] = dt.fma(d_log, da[j][l]);
                            }
                        }
                        let dx = F::sum_of(&dx);
                        du[index] = dt.fma(dx, self.d[first + own] * dy);
                        dd[own] += (dy * u).as_f64();
                        let d_dt = u.fma(dx, F::sum_of(&d_dt));
                        let pre = raw.at(t)[first + own] + self.delta_bias[first + own];
                        d_delta[index] = d_dt * sigmoid(pre);
                        d_bias[own] += d_delta[index].as_f64();
                    }
                }
            }
        }
        // A = −exp(a_log) is its own derivative by a_log.
        for (da, a) in da.as_flattened_mut().iter_mut().zip(group.a.as_flattened()) {
            *da *= *a;
        }
        GroupGrads {
            u: du,
            delta: d_delta,
            a_log: untile(&da, n).into_iter().map(F::as_f64).collect(),
            b: untile(&db, n),
            c: untile(&dc, n),
            d: dd,
            delta_bias: d_bias,
            z: dz,
            state: untile(&dh, n),
        }
    }
}

/// Gradients of one group of channels of one batch entry; those of B and C are yet to be summed over the
/// groups, those of the parameters over the batch.
struct GroupGrads<F> {
    u: Vec<F>,
    delta: Vec<F>,
    a_log: Vec<f64>,
    b: Vec<F>,
    c: Vec<F>,
    d: Vec<f64>,
    delta_bias: Vec<f64>,
    z: Vec<F>,
    state: Vec<F>,
}
