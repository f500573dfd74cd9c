//! CPU path of the state space duality recurrence.
//!
//! Forward one token after the other: the P columns of a head's state are independent of each other, so a head is
//! worked through in panels of [`LANES`] columns. Backward in chunks of tokens, as matrix products: within a chunk
//! the recurrence is masked attention (Dao and Gu 2024, arXiv:2405.21060, section 6), whose gradients need no state
//! but the one before the chunk.

use rayon::prelude::*;

use super::super::panels::Walked;
use super::super::real::{Real, dot, joined, map_heads, scatter_heads, sigmoid, softplus, sum_in_order};
use super::super::scan::{CHUNK, LANES, Lanes, Rows, load, store, write};
use crate::ops::linear::gemm::{Mat, MatMut, gemm};

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

/// One head: its rows, and the step sizes and decays of every token.
struct Head<'a, F> {
    x: Rows<'a, F>,
    b: Rows<'a, F>,
    c: Rows<'a, F>,
    dt: Vec<F>,
    decay: Vec<F>,
    /// −exp(a_log)
    rate: F,
}

impl<F: Real> Ssd<'_, F> {
    fn head(&self, b: usize, h: usize) -> Head<'_, F> {
        let group = h / (self.heads / self.groups);
        let raw = Rows::head(self.dt, (b, h), (self.steps, self.heads, 1));
        let dt: Vec<F> = (0..self.steps).map(|t| softplus(raw.one(t) + self.dt_bias[h])).collect();
        let rate = -self.a_log[h].exp();
        Head {
            x: Rows::head(self.x, (b, h), (self.steps, self.heads, self.dim)),
            b: self.maps(self.b, (b, group)),
            c: self.maps(self.c, (b, group)),
            decay: dt.iter().map(|&dt| (rate * dt).exp()).collect(),
            dt,
            rate,
        }
    }

    /// Computes outputs [B, T, H, P] and final state [B, H, P, N]; with `save` also the states before every CHUNK-th
    /// token, [B, H, ⌈T/CHUNK⌉, N, P].
    pub fn forward(&self, save: bool) -> Walked<F> {
        let (dim, n) = (self.dim, self.states);
        let size = dim * n;
        let parts = map_heads(self.batch, self.heads, |b, h| {
            let head = self.head(b, h);
            let start = self.state.map(|state| &state[(b * self.heads + h) * size..][..size]);
            let mut y = vec![F::zero(); self.steps * dim];
            let mut state = vec![F::zero(); size];
            let chunks = if save { self.steps.div_ceil(CHUNK) } else { 0 };
            let mut checkpoints = vec![F::zero(); chunks * size];
            for column in (0..dim).step_by(LANES) {
                let width = LANES.min(dim - column);
                let mut s = vec![[F::zero(); LANES]; n];
                if let Some(start) = start {
                    for (l, row) in start.chunks_exact(n).skip(column).take(width).enumerate() {
                        s.iter_mut().zip(row).for_each(|(s, &x)| s[l] = x);
                    }
                }
                for (t, y) in y.chunks_exact_mut(dim).enumerate() {
                    if save && t % CHUNK == 0 {
                        let kept = checkpoints[t / CHUNK * size..][..size].chunks_exact_mut(dim);
                        kept.zip(&s).for_each(|(row, s)| store(s, row, column));
                    }
                    let x: Lanes<F> = load(head.x.at(t), column);
                    let u = x.map(|x| head.dt[t] * x);
                    let read = write(&mut s, head.decay[t], head.b.at(t), &u, head.c.at(t));
                    let skip: Lanes<F> = std::array::from_fn(|l| self.d[h].fma(x[l], read[l]));
                    store(&skip, y, column);
                }
                for (l, row) in state.chunks_exact_mut(n).skip(column).take(width).enumerate() {
                    row.iter_mut().zip(&s).for_each(|(x, s)| *x = s[l]);
                }
            }
            (y, state, checkpoints)
        });
        let y: Vec<&[F]> = parts.iter().map(|part| part.0.as_slice()).collect();
        Walked {
            o: scatter_heads(&y, (self.steps, self.heads, dim)),
            state: joined(parts.iter().map(|part| &part.1)),
            checkpoints: joined(parts.iter().map(|part| &part.2)),
        }
    }

    /// Gradients of the arguments from those of the outputs, `d_y` [B, T, H, P] and `d_state` [B, H, P, N].
    pub fn backward(&self, checkpoints: &[F], d_y: &[F], d_state: &[F]) -> SsdGrads<F> {
        let per_group = self.heads / self.groups;
        let groups: Vec<_> = (0..self.batch * self.groups)
            .into_par_iter()
            .map(|i| {
                let (b, group) = (i / self.groups, i % self.groups);
                let scores = self.scores((b, group));
                let heads: Vec<HeadGrads<F>> = (0..per_group)
                    .into_par_iter()
                    .map(|h| {
                        self.backward_head((b, group * per_group + h), &scores, checkpoints, d_y, d_state)
                    })
                    .collect();
                self.collect_group((b, group), heads)
            })
            .collect();

        let heads = || groups.iter().flat_map(|group| &group.heads);
        let heads_of = |part: fn(&HeadGrads<F>) -> &[F], d: usize| {
            scatter_heads(&heads().map(part).collect::<Vec<_>>(), (self.steps, self.heads, d))
        };
        let groups_of = |part: fn(&GroupGrads<F>) -> &[F]| {
            let parts: Vec<&[F]> = groups.iter().map(part).collect();
            scatter_heads(&parts, (self.steps, self.groups, self.states))
        };
        let per_head = |part: fn(&HeadGrads<F>) -> f64| -> Vec<F> {
            (0..self.heads).map(|h| F::of(heads().skip(h).step_by(self.heads).map(part).sum())).collect()
        };
        SsdGrads {
            x: heads_of(|part| &part.x, self.dim),
            dt: heads_of(|part| &part.dt, 1),
            a_log: per_head(|part| part.a_log),
            b: groups_of(|part| &part.b),
            c: groups_of(|part| &part.c),
            d: per_head(|part| part.d),
            dt_bias: per_head(|part| part.dt_bias),
            state: joined(heads().map(|head| &head.state)),
        }
    }

    /// The tokens of every chunk: the first, and how many.
    fn chunks(&self) -> impl DoubleEndedIterator<Item = (usize, usize)> + ExactSizeIterator {
        let steps = self.steps;
        (0..steps.div_ceil(CHUNK)).map(move |i| (i * CHUNK, CHUNK.min(steps - i * CHUNK)))
    }

    /// The maps of a group, `b` or `c`.
    fn maps<'a>(&self, maps: &'a [F], at: (usize, usize)) -> Rows<'a, F> {
        Rows::head(maps, at, (self.steps, self.groups, self.states))
    }

    /// C Bᵀ of every chunk, which all heads of a group share.
    fn scores(&self, at: (usize, usize)) -> Vec<Vec<F>> {
        let [b, c] = [self.b, self.c].map(|maps| self.maps(maps, at));
        let product = |(first, len): (usize, usize)| {
            let mut scores = vec![F::zero(); len * len];
            let (b, c) = (b.mat(first, len), c.mat(first, len));
            gemm(MatMut::new(&mut scores, len, len), F::zero(), F::one(), c, b.t());
            scores
        };
        self.chunks().map(product).collect()
    }

    fn backward_head(
        &self,
        at: (usize, usize),
        scores: &[Vec<F>],
        checkpoints: &[F],
        d_y: &[F],
        d_state: &[F],
    ) -> HeadGrads<F> {
        let (dim, n, steps) = (self.dim, self.states, self.steps);
        let (zero, one) = (F::zero(), F::one());
        let head = self.head(at.0, at.1);
        let (index, size) = (at.0 * self.heads + at.1, dim * n);
        let kept = &checkpoints[index * scores.len() * size..][..scores.len() * size];
        let d_y = Rows::head(d_y, at, (steps, self.heads, dim));
        // [N, P], as the checkpoints
        let mut ds = Mat::new(&d_state[index * size..][..size], dim, n).t().in_rows().into_owned();
        let mut grads = HeadGrads {
            x: vec![zero; steps * dim],
            dt: vec![zero; steps],
            b: vec![zero; steps * n],
            c: vec![zero; steps * n],
            scores: vec![],
            state: vec![],
            a_log: 0.0,
            d: 0.0,
            dt_bias: 0.0,
        };
        let raw = Rows::head(self.dt, at, (steps, self.heads, 1));
        for ((first, len), (scores, before)) in
            self.chunks().zip(scores.iter().zip(kept.chunks_exact(size))).rev()
        {
            let decays = Decays::new(&head.decay[first..first + len]);
            let rows = |width| first * width..(first + len) * width;
            // What is written, and what is left of it at the end; what reads of the state before give.
            let scaled = |x: Rows<F>, by: &dyn Fn(usize) -> F| -> Vec<F> {
                let mut rows = Vec::with_capacity(len * dim);
                (0..len).for_each(|i| rows.extend(x.at(first + i).iter().map(|&x| by(i) * x)));
                rows
            };
            let u = scaled(head.x, &|i| head.dt[first + i]);
            let left = scaled(head.x, &|i| decays.to_end[i] * head.dt[first + i]);
            let d_read = scaled(d_y, &|i| decays.from_start[i]);
            let [u, left, d_read] = [&u, &left, &d_read].map(|x| Mat::new(x, len, dim));
            let [b, c, dy] = [head.b, head.c, d_y].map(|x| x.mat(first, len));
            let state = Mat::new(before, n, dim);

            // What passes between tokens of the chunk: y = (scores ⊙ decays) u.
            let mut d_pairs = vec![zero; len * len];
            gemm(MatMut::new(&mut d_pairs, len, len), zero, one, dy, u.t());
            let (weights, d_log_decay) = decays.mask(scores, &mut d_pairs);
            // What comes from the state before, and what goes into the state behind.
            gemm(MatMut::new(&mut grads.c[rows(n)], len, n), zero, one, d_read, state.t());
            gemm(MatMut::new(&mut grads.b[rows(n)], len, n), zero, one, left, Mat::new(&ds, n, dim).t());
            let mut du = vec![zero; len * dim];
            gemm(MatMut::new(&mut du, len, dim), zero, one, b, Mat::new(&ds, n, dim));
            for (row, &decay) in du.chunks_exact_mut(dim).zip(&decays.to_end) {
                row.iter_mut().for_each(|x| *x *= decay);
            }
            gemm(MatMut::new(&mut du, len, dim), one, one, Mat::new(&weights, len, len).t(), dy);

            // A token's decay touches every pair around it, what is read at or behind it, and what was written
            // before it.
            let through = decays.whole() * dot(&ds, before);
            let each = |grad: &[F], maps: Rows<F>| -> Vec<f64> {
                let rows = grad[rows(n)].chunks_exact(n).enumerate();
                rows.map(|(i, grad)| dot(grad, maps.at(first + i)).as_f64()).collect()
            };
            let (read, written) = (each(&grads.c, head.c), each(&grads.b, head.b));
            let mut passing = through.as_f64() + read.iter().sum::<f64>();
            for i in 0..len {
                let t = first + i;
                let d_log = d_log_decay[i] + passing;
                passing += written[i] - read[i];
                let (x, dy, du) = (head.x.at(t), d_y.at(t), &du[i * dim..][..dim]);
                for ((dx, &du), &dy) in grads.x[t * dim..][..dim].iter_mut().zip(du).zip(dy) {
                    *dx = head.dt[t].fma(du, self.d[at.1] * dy);
                }
                grads.d += dot(x, dy).as_f64();
                // The log decay is rate·dt, and rate = −exp(a_log) is its own derivative by a_log.
                let (rate, dt) = (head.rate.as_f64(), head.dt[t].as_f64());
                grads.a_log += d_log * rate * dt;
                let d_dt = rate * d_log + dot(x, du).as_f64();
                let d_raw = d_dt * sigmoid(raw.one(t) + self.dt_bias[at.1]).as_f64();
                grads.dt_bias += d_raw;
                grads.dt[t] = F::of(d_raw);
            }
            gemm(MatMut::new(&mut ds, n, dim), decays.whole(), one, c.t(), d_read);
            grads.scores.push(d_pairs);
        }
        grads.scores.reverse();
        grads.state = Mat::new(&ds, n, dim).t().in_rows().into_owned();
        grads
    }

    /// Sums what the heads of a group give to its maps.
    fn collect_group(&self, at: (usize, usize), mut heads: Vec<HeadGrads<F>>) -> GroupGrads<F> {
        let sum = |part: fn(&HeadGrads<F>) -> &[F]| sum_in_order(&heads.iter().map(part).collect::<Vec<_>>());
        let (mut b, mut c) = (sum(|part| &part.b), sum(|part| &part.c));
        for (i, (first, len)) in self.chunks().enumerate() {
            let scores =
                sum_in_order(&heads.iter().map(|head| head.scores[i].as_slice()).collect::<Vec<_>>());
            let scores = Mat::new(&scores, len, len);
            let rows = first * self.states..(first + len) * self.states;
            let [from, to] = [self.b, self.c].map(|maps| self.maps(maps, at).mat(first, len));
            let add = |grad: &mut [F], scores, maps| {
                gemm(
                    MatMut::new(&mut grad[rows.clone()], len, self.states),
                    F::one(),
                    F::one(),
                    scores,
                    maps,
                );
            };
            add(&mut c, scores, from);
            add(&mut b, scores.t(), to);
        }
        for head in &mut heads {
            (head.b, head.c, head.scores) = (vec![], vec![], vec![]);
        }
        GroupGrads { heads, b, c }
    }
}

/// Products of decays within a chunk.
struct Decays<F> {
    /// [len, len]: of the tokens behind j up to i, for j ≤ i; zeros above.
    between: Vec<F>,
    /// Up to a token and with it.
    from_start: Vec<F>,
    /// Behind a token.
    to_end: Vec<F>,
}

impl<F: Real> Decays<F> {
    fn new(decay: &[F]) -> Self {
        let len = decay.len();
        let mut between = vec![F::zero(); len * len];
        let mut from_start = Vec::with_capacity(len);
        let mut product = F::one();
        for (i, &decay) in decay.iter().enumerate() {
            let (above, row) = between.split_at_mut(i * len);
            if i > 0 {
                let above = &above[(i - 1) * len..];
                row[..i].iter_mut().zip(above).for_each(|(x, &above)| *x = decay * above);
            }
            row[i] = F::one();
            product *= decay;
            from_start.push(product);
        }
        let to_end = between[len * (len - 1)..].to_vec();
        Self { between, from_start, to_end }
    }

    /// Of all tokens.
    fn whole(&self) -> F {
        self.from_start.last().copied().unwrap_or(F::one())
    }

    /// Masks and decays `scores` to weights, makes the gradient of the weights that of the scores, and gives what goes
    /// to each token's log decay: the sum over all pairs around it.
    fn mask(&self, scores: &[F], grad: &mut [F]) -> (Vec<F>, Vec<f64>) {
        let len = self.from_start.len();
        let weights: Vec<F> =
            scores.iter().zip(&self.between).map(|(&score, &decay)| score * decay).collect();
        // Of each token as the later of a pair, and as the earlier.
        let (mut later, mut earlier) = (vec![0.0; len], vec![0.0; len]);
        for i in 0..len {
            let (row, weights) = (&grad[i * len..][..i], &weights[i * len..][..i]);
            for ((&grad, &weight), earlier) in row.iter().zip(weights).zip(&mut earlier) {
                let pair = (grad * weight).as_f64();
                later[i] += pair;
                *earlier += pair;
            }
        }
        grad.iter_mut().zip(&self.between).for_each(|(grad, &decay)| *grad *= decay);
        // A step back leaves the pairs whose later token is behind, and takes those whose earlier one is.
        let mut around = vec![0.0; len];
        let mut sum = 0.0;
        for i in (0..len).rev() {
            sum += later[i] - earlier[i];
            around[i] = sum;
        }
        (weights, around)
    }
}

/// Gradients of one head.
struct HeadGrads<F> {
    x: Vec<F>,
    dt: Vec<F>,
    /// What goes to the maps through the states; to be summed over the heads of a group.
    b: Vec<F>,
    c: Vec<F>,
    /// [chunks, len, len]: of C Bᵀ, likewise.
    scores: Vec<Vec<F>>,
    state: Vec<F>,
    a_log: f64,
    d: f64,
    dt_bias: f64,
}

/// Gradients of the maps of a group, and of its heads.
struct GroupGrads<F> {
    heads: Vec<HeadGrads<F>>,
    b: Vec<F>,
    c: Vec<F>,
}
