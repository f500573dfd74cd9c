//! Strings and samples drawn from a grammar.
//!
//! A string starts in one of the start states, moves to an equally likely successor, and is accepted when
//! it reaches `#` with an accepted length; otherwise it is drawn again from the same stream. A sample is
//! accepted strings one after the other, cut to its length.

use crate::bail_input;
use crate::task::grammar::Grammar;
use crate::task::rng::Pcg64;

/// Attempts at one string after which the authors' generator gives up.
pub const ATTEMPTS: usize = 10_001;

/// Draws samples of a fixed length.
pub struct Sampler {
    grammar: Grammar,
    length: usize,
    min: usize,
    max: usize,
    /// Cumulative sums of 1/n, left to right, for every number n of successors.
    cumulative: Vec<Vec<f64>>,
    acceptance: f64,
}

impl Sampler {
    /// `length` elements a sample; accepted strings have `min` to `max` elements, `#` included.
    pub fn new(grammar: Grammar, length: usize, min: usize, max: usize) -> anyhow::Result<Self> {
        let states = 0..grammar.states() as u32;
        let most = states.map(|state| grammar.successors(state).len()).max().unwrap_or(0);
        let cumulative = (0..=most)
            .map(|n| {
                let mut sum = 0.0;
                (0..n)
                    .map(|_| {
                        sum += 1.0 / n as f64;
                        sum
                    })
                    .collect()
            })
            .collect();
        let mut sampler = Self { grammar, length, min, max, cumulative, acceptance: 0.0 };
        let mut after = vec![0.0; sampler.grammar.states()];
        for n in (1..=max).rev() {
            after = sampler.before(&after, n);
        }
        let starts = sampler.grammar.starts();
        sampler.acceptance = starts.iter().map(|&s| after[s as usize]).sum::<f64>() / starts.len() as f64;
        if sampler.acceptance < 1e-5 {
            bail_input!(
                "task.string accepts lengths {min} to {max}, but this grammar (seed included) ends a string there with \
                 probability {:.1e} only; widen task.string or change the grammar",
                sampler.acceptance
            )
        }
        Ok(sampler)
    }

    pub fn grammar(&self) -> &Grammar {
        &self.grammar
    }

    /// Elements of a sample.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Longest accepted string.
    pub fn max(&self) -> usize {
        self.max
    }

    /// Probability that an attempt at a string is accepted.
    pub fn acceptance(&self) -> f64 {
        self.acceptance
    }

    /// The probability that a string is accepted, given its state and that it has `n` elements, from the
    /// same for n + 1 elements.
    pub fn before(&self, after: &[f64], n: usize) -> Vec<f64> {
        let end = self.grammar.end();
        (0..self.grammar.states() as u32)
            .map(|state| {
                if state == end {
                    return if (self.min..=self.max).contains(&n) { 1.0 } else { 0.0 };
                }
                if n >= self.max {
                    return 0.0;
                }
                let next = self.grammar.successors(state);
                next.iter().map(|&t| after[t as usize]).sum::<f64>() / next.len() as f64
            })
            .collect()
    }

    /// Appends one accepted string to `out`; gives the number of attempts.
    pub fn string(&self, rng: &mut Pcg64, out: &mut Vec<u32>) -> anyhow::Result<usize> {
        let (start, end) = (out.len(), self.grammar.end());
        let starts = self.grammar.starts();
        for attempt in 1..=ATTEMPTS {
            out.truncate(start);
            let mut state = starts[rng.integers(starts.len() as u32) as usize];
            out.push(state);
            while state != end && out.len() - start <= self.max {
                let next = self.grammar.successors(state);
                state = match next {
                    [only] => *only,
                    _ => next[self.pick(next.len(), rng.random())],
                };
                out.push(state);
            }
            if state == end && (self.min..=self.max).contains(&(out.len() - start)) {
                return Ok(attempt);
            }
        }
        anyhow::bail!(
            "no string of {} to {} elements in {ATTEMPTS} attempts; widen task.string",
            self.min,
            self.max
        )
    }

    /// How many cumulative sums are at most `u`: equal shares make a guess that is at most one off.
    #[inline(always)]
    fn pick(&self, n: usize, u: f64) -> usize {
        let sums = &self.cumulative[n];
        let mut k = ((u * n as f64) as usize).min(n - 1);
        if sums[k] <= u {
            k = (k + 1).min(n - 1);
        } else if k > 0 && sums[k - 1] > u {
            k -= 1;
        }
        k
    }

    /// The states of one sample.
    pub fn sample(&self, rng: &mut Pcg64) -> anyhow::Result<Vec<u32>> {
        let mut out = Vec::with_capacity(self.length + self.max + 1);
        while out.len() < self.length {
            self.string(rng, &mut out)?;
        }
        out.truncate(self.length);
        Ok(out)
    }
}
