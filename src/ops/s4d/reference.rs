//! CPU path of S4D: groups of channels go through the steps, one state of all of them at a time.
//!
//! The gradients need no state of the past. The transition being the same at every step, what a sequence adds
//! to the gradients of Ā and C̄ is a sum over steps of states that a second forward pass carries: h, and s =
//! ∂h/∂Ā with s ← Ā s + h. The gradient of u is the recurrence itself, run from the end.

use rayon::prelude::*;

use crate::ops::real::{Real, joined, sum_in_order};

/// Channels of a task.
const LANES: usize = 16;
/// Steps that a state takes in registers before it is the next one's turn. What is added up is added in the order of
/// single steps: the bits are the same.
const BLOCK: usize = 8;

type Lanes<F> = [F; LANES];

/// A complex number, in f64.
#[derive(Clone, Copy, Default)]
struct Complex {
    re: f64,
    im: f64,
}

impl Complex {
    fn times(self, other: Self) -> Self {
        Self { re: self.re * other.re - self.im * other.im, im: self.re * other.im + self.im * other.re }
    }

    fn conjugate(self) -> Self {
        Self { im: -self.im, ..self }
    }

    fn scaled(self, by: f64) -> Self {
        Self { re: by * self.re, im: by * self.im }
    }

    fn plus(self, other: Self) -> Self {
        Self { re: self.re + other.re, im: self.im + other.im }
    }

    fn inverse(self) -> Self {
        self.conjugate().scaled(1.0 / (self.re * self.re + self.im * self.im))
    }

    /// (e^self − 1) without the cancellation near zero.
    fn exp_m1(self) -> Self {
        let half = (self.im / 2.0).sin();
        let grown = self.re.exp();
        Self { re: self.re.exp_m1() - 2.0 * grown * half * half, im: grown * self.im.sin() }
    }
}

/// One state of one channel: A, Ā, Ā − 1 and (Ā − 1) / A.
struct Discrete {
    a: Complex,
    step: f64,
    kept: Complex,
    less: Complex,
    held: Complex,
}

impl Discrete {
    fn new(log_dt: f64, log_a_real: f64, a_imag: f64) -> Self {
        let (a, step) = (Complex { re: -log_a_real.exp(), im: a_imag }, log_dt.exp());
        let less = a.scaled(step).exp_m1();
        Self { a, step, kept: Complex { re: 1.0 + less.re, ..less }, less, held: less.times(a.inverse()) }
    }
}

/// The arguments of one call, as slices; shapes as in [`super::s4d`].
#[derive(Clone, Copy)]
pub struct S4d<'a, F> {
    pub batch: usize,
    pub steps: usize,
    pub width: usize,
    pub pairs: usize,
    pub u: &'a [F],
    pub c: &'a [F],
    pub log_dt: &'a [F],
    pub log_a_real: &'a [F],
    pub a_imag: &'a [F],
    pub d: &'a [F],
    pub state: Option<&'a [F]>,
}

/// Gradients of the arguments, each with its argument's shape.
pub struct S4dGrads<F> {
    pub u: Vec<F>,
    pub c: Vec<F>,
    pub log_dt: Vec<F>,
    pub log_a_real: Vec<F>,
    pub a_imag: Vec<F>,
    pub d: Vec<F>,
    pub state: Vec<F>,
}

/// Real and imaginary parts of one state of every channel of a group.
#[derive(Clone, Copy)]
struct Pair<F> {
    re: Lanes<F>,
    im: Lanes<F>,
}

impl<F: Real> Pair<F> {
    fn zero() -> Self {
        Self { re: [F::zero(); LANES], im: [F::zero(); LANES] }
    }

    /// self ← (1 + less) · self + b.
    #[inline(always)]
    fn step(&mut self, less: &Self, b_re: &Lanes<F>, b_im: &Lanes<F>) {
        for l in 0..LANES {
            let (re, im) = (self.re[l], self.im[l]);
            self.re[l] = re + less.re[l].fma(re, (-less.im[l]).fma(im, b_re[l]));
            self.im[l] = im + less.re[l].fma(im, less.im[l].fma(re, b_im[l]));
        }
    }
}

/// A state on its second way through the steps: h, s = ∂h/∂Ā, and, without the conjugation, Σ h dy and Σ s dy.
#[derive(Clone, Copy)]
struct Walk<F> {
    h: Pair<F>,
    s: Pair<F>,
    read_sum: Pair<F>,
    slope_sum: Pair<F>,
}

impl<F: Real> Walk<F> {
    fn new(h: Pair<F>) -> Self {
        Self { h, s: Pair::zero(), read_sum: Pair::zero(), slope_sum: Pair::zero() }
    }
}

/// A group of channels: Ā − 1 and 2 C̄ of every state; zeros beyond the last channel. Ā itself is near 1 and raised to
/// the power of the sequence's length: rounding what a state loses at a step is more exact.
struct Group<F> {
    first: usize,
    count: usize,
    less: Vec<Pair<F>>,
    read: Vec<Pair<F>>,
    skip: Lanes<F>,
}

impl<F: Real> S4d<'_, F> {
    fn discrete(&self, channel: usize, pair: usize) -> Discrete {
        let at = channel * self.pairs + pair;
        Discrete::new(self.log_dt[channel].as_f64(), self.log_a_real[at].as_f64(), self.a_imag[at].as_f64())
    }

    fn c(&self, channel: usize, pair: usize) -> Complex {
        let at = 2 * (channel * self.pairs + pair);
        Complex { re: self.c[at].as_f64(), im: self.c[at + 1].as_f64() }
    }

    fn group(&self, first: usize) -> Group<F> {
        let count = LANES.min(self.width - first);
        let mut group = Group {
            first,
            count,
            less: vec![Pair::zero(); self.pairs],
            read: vec![Pair::zero(); self.pairs],
            skip: [F::zero(); LANES],
        };
        for l in 0..count {
            group.skip[l] = self.d[first + l];
            for n in 0..self.pairs {
                let Discrete { less, held, .. } = self.discrete(first + l, n);
                let read = self.c(first + l, n).times(held).scaled(2.0);
                (group.less[n].re[l], group.less[n].im[l]) = (F::of(less.re), F::of(less.im));
                (group.read[n].re[l], group.read[n].im[l]) = (F::of(read.re), F::of(read.im));
            }
        }
        group
    }

    /// A [B, D, N, 2] array's states of a group of channels; zeros for none.
    fn states(&self, array: Option<&[F]>, b: usize, group: &Group<F>) -> Vec<Pair<F>> {
        let mut states = vec![Pair::zero(); self.pairs];
        if let Some(array) = array {
            for l in 0..group.count {
                let from = &array[2 * (b * self.width + group.first + l) * self.pairs..][..2 * self.pairs];
                for (state, from) in states.iter_mut().zip(from.chunks_exact(2)) {
                    (state.re[l], state.im[l]) = (from[0], from[1]);
                }
            }
        }
        states
    }

    /// The inverse of [`S4d::states`] for one group, [channels, N, 2]; imaginary parts times `sign`.
    fn flat(&self, states: &[Pair<F>], count: usize, sign: F) -> Vec<F> {
        let of = |l: usize| states.iter().flat_map(move |state| [state.re[l], sign * state.im[l]]);
        (0..count).flat_map(of).collect()
    }

    /// The channels of a group at step `t` of a [B, T, D] array.
    #[inline(always)]
    fn row(&self, array: &[F], (b, t): (usize, usize), group: &Group<F>) -> Lanes<F> {
        let mut row = [F::zero(); LANES];
        let at = (b * self.steps + t) * self.width + group.first;
        row[..group.count].copy_from_slice(&array[at..at + group.count]);
        row
    }

    /// Runs `f` on every batch entry and group of channels, in parallel, batch entry by batch entry.
    fn map<R: Send>(&self, f: impl Fn(usize, Group<F>) -> R + Sync) -> Vec<R> {
        let groups = self.width.div_ceil(LANES);
        (0..self.batch * groups)
            .into_par_iter()
            .map(|i| f(i / groups, self.group(i % groups * LANES)))
            .collect()
    }

    /// Puts the [T, channels] arrays of [`S4d::map`] together to [B, T, D].
    fn together(&self, parts: &[&[F]]) -> Vec<F> {
        let groups = self.width.div_ceil(LANES);
        let mut out = vec![F::zero(); self.batch * self.steps * self.width];
        let sequence = self.steps * self.width;
        out.par_chunks_mut(sequence).zip(parts.par_chunks(groups)).for_each(|(out, parts)| {
            for (group, part) in parts.iter().enumerate() {
                let (first, count) = (group * LANES, part.len() / self.steps);
                for (row, values) in out.chunks_exact_mut(self.width).zip(part.chunks_exact(count)) {
                    row[first..first + count].copy_from_slice(values);
                }
            }
        });
        out
    }

    /// The outputs and the final state.
    pub fn forward(&self) -> (Vec<F>, Vec<F>) {
        let parts = self.map(|b, group| {
            let mut states = self.states(self.state, b, &group);
            let mut out = Vec::with_capacity(self.steps * group.count);
            let whole = self.steps / BLOCK * BLOCK;
            for t in (0..whole).step_by(BLOCK) {
                self.forward_steps::<BLOCK>((b, t), &group, &mut states, &mut out);
            }
            for t in whole..self.steps {
                self.forward_steps::<1>((b, t), &group, &mut states, &mut out);
            }
            (out, self.flat(&states, group.count, F::one()))
        });
        let y: Vec<&[F]> = parts.iter().map(|part| part.0.as_slice()).collect();
        (self.together(&y), joined(parts.iter().map(|part| &part.1)))
    }

    /// The channels of a group at `N` steps from `t` on of a [B, T, D] array.
    #[inline(always)]
    fn rows<const N: usize>(&self, array: &[F], (b, t): (usize, usize), group: &Group<F>) -> [Lanes<F>; N] {
        std::array::from_fn(|i| self.row(array, (b, t + i), group))
    }

    /// `N` steps from `t` on; their outputs are put behind `out`.
    fn forward_steps<const N: usize>(
        &self,
        at: (usize, usize),
        group: &Group<F>,
        states: &mut [Pair<F>],
        out: &mut Vec<F>,
    ) {
        let none = [F::zero(); LANES];
        let u: [_; N] = self.rows(self.u, at, group);
        let mut y = [none; N];
        for ((state, less), read) in states.iter_mut().zip(&group.less).zip(&group.read) {
            let mut h = *state;
            for (y, u) in y.iter_mut().zip(&u) {
                h.step(less, u, &none);
                for (l, y) in y.iter_mut().enumerate() {
                    *y = read.re[l].fma(h.re[l], (-read.im[l]).fma(h.im[l], *y));
                }
            }
            *state = h;
        }
        for (y, u) in y.iter_mut().zip(&u) {
            for ((y, skip), &u) in y.iter_mut().zip(&group.skip).zip(u) {
                *y = skip.fma(u, *y);
            }
            out.extend_from_slice(&y[..group.count]);
        }
    }

    /// Gradients of the arguments from those of the outputs, `d_y` [B, T, D] and `d_state` [B, D, N, 2].
    pub fn backward(&self, d_y: &[F], d_state: &[F]) -> S4dGrads<F> {
        let parts = self.map(|b, group| {
            let (d_u, state) = self.backward_input(b, &group, d_y, d_state);
            let sums = self.backward_sums(b, &group, d_y, d_state);
            (d_u, state, sums)
        });
        let (n, groups) = (self.pairs, self.width.div_ceil(LANES));
        // Over the batch, in its order; per channel and state the gradients of 2 C̄ and of Ā, per channel that
        // of D.
        let per_group = |group: usize| {
            let of: Vec<&[f64]> = (0..self.batch).map(|b| parts[b * groups + group].2.as_slice()).collect();
            sum_in_order(&of)
        };
        let sums: Vec<f64> = (0..groups).flat_map(per_group).collect();
        let mut grads = S4dGrads {
            u: self.together(&parts.iter().map(|part| part.0.as_slice()).collect::<Vec<_>>()),
            state: joined(parts.iter().map(|part| &part.1)),
            c: Vec::with_capacity(2 * self.width * n),
            log_dt: Vec::with_capacity(self.width),
            log_a_real: Vec::with_capacity(self.width * n),
            a_imag: Vec::with_capacity(self.width * n),
            d: Vec::with_capacity(self.width),
        };
        for (channel, sums) in sums.chunks_exact(4 * n + 1).enumerate() {
            let mut d_log_dt = 0.0;
            for (pair, sums) in sums.chunks_exact(4).enumerate() {
                // The gradient of a complex number z is ∂/∂Re z + i ∂/∂Im z: conj(f′) carries it through f.
                let d_read = Complex { re: sums[0], im: sums[1] }.scaled(2.0);
                let Discrete { a, step, kept, held, .. } = self.discrete(channel, pair);
                let d_c = held.conjugate().times(d_read);
                let d_held = self.c(channel, pair).conjugate().times(d_read);
                let by_a = a.inverse().conjugate();
                let d_kept = Complex { re: sums[2], im: sums[3] }.plus(by_a.times(d_held));
                let through = kept.conjugate().times(d_kept);
                let d_a = through.scaled(step).plus(held.conjugate().times(by_a).times(d_held).scaled(-1.0));
                d_log_dt += step * a.conjugate().times(through).re;
                grads.c.extend([F::of(d_c.re), F::of(d_c.im)]);
                grads.log_a_real.push(F::of(a.re * d_a.re));
                grads.a_imag.push(F::of(d_a.im));
            }
            grads.log_dt.push(F::of(d_log_dt));
            grads.d.push(F::of(sums[4 * n]));
        }
        grads
    }

    /// The gradients of u, [T, channels], and of the initial state, of one batch entry.
    fn backward_input(&self, b: usize, group: &Group<F>, d_y: &[F], d_state: &[F]) -> (Vec<F>, Vec<F>) {
        // Conjugates of the gradients of the states, which the same Ā carries back.
        let mut states = self.states(Some(d_state), b, group);
        states.iter_mut().for_each(|e| e.im.iter_mut().for_each(|im| *im = -*im));
        let mut d_u = vec![F::zero(); self.steps * group.count];
        let whole = self.steps / BLOCK * BLOCK;
        for t in (whole..self.steps).rev() {
            self.reverse_steps::<1>((b, t), group, d_y, &mut states, &mut d_u);
        }
        for t in (0..whole).step_by(BLOCK).rev() {
            self.reverse_steps::<BLOCK>((b, t), group, d_y, &mut states, &mut d_u);
        }
        (d_u, self.flat(&states, group.count, -F::one()))
    }

    /// `N` steps from `t` on, the last first.
    fn reverse_steps<const N: usize>(
        &self,
        at: (usize, usize),
        group: &Group<F>,
        d_y: &[F],
        states: &mut [Pair<F>],
        d_u: &mut [F],
    ) {
        let none = [F::zero(); LANES];
        let dy: [_; N] = self.rows(d_y, at, group);
        let mut sums = [none; N];
        for ((state, less), read) in states.iter_mut().zip(&group.less).zip(&group.read) {
            let mut e = *state;
            for (sum, dy) in sums.iter_mut().zip(&dy).rev() {
                for l in 0..LANES {
                    e.re[l] = read.re[l].fma(dy[l], e.re[l]);
                    e.im[l] = read.im[l].fma(dy[l], e.im[l]);
                    sum[l] += e.re[l];
                }
                e.step(less, &none, &none);
            }
            *state = e;
        }
        for ((d_u, sum), dy) in d_u[at.1 * group.count..].chunks_exact_mut(group.count).zip(&sums).zip(&dy) {
            for (l, d_u) in d_u.iter_mut().enumerate() {
                *d_u = group.skip[l].fma(dy[l], sum[l]);
            }
        }
    }

    /// What one batch entry adds to the gradients of 2 C̄ and Ā, four numbers for each state of a channel, and
    /// to that of D, one more for the channel.
    fn backward_sums(&self, b: usize, group: &Group<F>, d_y: &[F], d_state: &[F]) -> Vec<f64> {
        let states = self.states(self.state, b, group);
        let mut walks: Vec<Walk<F>> = states.into_iter().map(Walk::new).collect();
        let mut d_skip = [F::zero(); LANES];
        let whole = self.steps / BLOCK * BLOCK;
        for t in (0..whole).step_by(BLOCK) {
            self.sum_steps::<BLOCK>((b, t), group, d_y, &mut walks, &mut d_skip);
        }
        for t in whole..self.steps {
            self.sum_steps::<1>((b, t), group, d_y, &mut walks, &mut d_skip);
        }
        let ends = self.states(Some(d_state), b, group);
        let complex = |pair: &Pair<F>, l: usize| Complex { re: pair.re[l].as_f64(), im: pair.im[l].as_f64() };
        let mut sums = Vec::with_capacity(group.count * (4 * self.pairs + 1));
        for (l, d_skip) in d_skip.iter().enumerate().take(group.count) {
            for n in 0..self.pairs {
                let walk = &walks[n];
                let d_read = complex(&walk.read_sum, l).conjugate();
                // y has 2 C̄ h in it, and the final state h alone.
                let through = complex(&group.read[n], l).times(complex(&walk.slope_sum, l)).conjugate();
                let end = complex(&walk.s, l).conjugate().times(complex(&ends[n], l));
                let d_kept = through.plus(end);
                sums.extend([d_read.re, d_read.im, d_kept.re, d_kept.im]);
            }
            sums.push(d_skip.as_f64());
        }
        sums
    }

    /// `N` steps from `t` on.
    fn sum_steps<const N: usize>(
        &self,
        at: (usize, usize),
        group: &Group<F>,
        d_y: &[F],
        walks: &mut [Walk<F>],
        d_skip: &mut Lanes<F>,
    ) {
        let none = [F::zero(); LANES];
        let (u, dy): ([_; N], [_; N]) = (self.rows(self.u, at, group), self.rows(d_y, at, group));
        for (walk, less) in walks.iter_mut().zip(&group.less) {
            let Walk { mut h, mut s, mut read_sum, mut slope_sum } = *walk;
            for (u, dy) in u.iter().zip(&dy) {
                s.step(less, &h.re, &h.im);
                h.step(less, u, &none);
                for (l, &dy) in dy.iter().enumerate() {
                    read_sum.re[l] = h.re[l].fma(dy, read_sum.re[l]);
                    read_sum.im[l] = h.im[l].fma(dy, read_sum.im[l]);
                    slope_sum.re[l] = s.re[l].fma(dy, slope_sum.re[l]);
                    slope_sum.im[l] = s.im[l].fma(dy, slope_sum.im[l]);
                }
            }
            *walk = Walk { h, s, read_sum, slope_sum };
        }
        for (u, dy) in u.iter().zip(&dy) {
            for ((sum, u), &dy) in d_skip.iter_mut().zip(u).zip(dy) {
                *sum = u.fma(dy, *sum);
            }
        }
    }
}
