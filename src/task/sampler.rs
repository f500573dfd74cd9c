//! Strings and samples drawn from a grammar.
//!
//! A string starts in one of the start states, moves to an equally likely successor, and is accepted when
//! it reaches `#` with an accepted length; otherwise it is drawn again from the same stream. A sample is
//! accepted strings one after the other, cut to its length.

use std::sync::Arc;

use crate::bail_input;
use crate::task::grammar::Grammar;
use crate::task::rng::{Pcg64, unit_f64};

/// Attempts at one string after which the authors' generator gives up.
pub const ATTEMPTS: usize = 10_001;

/// Least probability of acceptance: below it, most strings would take more than [`ATTEMPTS`].
const LEAST_ACCEPTANCE: f64 = 1e-5;

/// A state, and where its successors stand in the list of all hops: one load per element drawn.
#[derive(Clone, Copy)]
struct Hop {
    first: u32,
    state: u16,
    count: u16,
}

/// Draws samples of a fixed length.
pub struct Sampler {
    grammar: Arc<Grammar>,
    length: usize,
    min: usize,
    max: usize,
    starts: Vec<Hop>,
    /// The successors of all states, state after state.
    hops: Vec<Hop>,
    shares: Shares,
    acceptance: f64,
}

impl Sampler {
    /// `length` elements a sample; accepted strings have `min` to `max` elements, `#` included.
    pub fn new(grammar: Grammar, length: usize, min: usize, max: usize) -> anyhow::Result<Self> {
        let states = 0..grammar.states() as u32;
        let mut first = 0;
        let nodes: Vec<Hop> = states
            .clone()
            .map(|state| {
                let count = grammar.successors(state).len();
                let node = Hop { first, state: state as u16, count: count as u16 };
                first += count as u32;
                node
            })
            .collect();
        let of = |list: &[u32]| list.iter().map(|&s| nodes[s as usize]).collect::<Vec<_>>();
        let most = nodes.iter().map(|node| node.count).max().unwrap_or(0);
        let mut sampler = Self {
            starts: of(grammar.starts()),
            hops: states.flat_map(|state| of(grammar.successors(state))).collect(),
            grammar: Arc::new(grammar),
            length,
            min,
            max,
            shares: Shares::new(most.into()),
            acceptance: 0.0,
        };
        let mut after = vec![0.0; sampler.grammar.states()];
        for n in (1..=max).rev() {
            after = sampler.before(&after, n);
        }
        let starts = sampler.grammar.starts();
        sampler.acceptance = starts.iter().map(|&s| after[s as usize]).sum::<f64>() / starts.len() as f64;
        if sampler.acceptance < LEAST_ACCEPTANCE {
            bail_input!(
                "task.string accepts lengths {min} to {max}, but this grammar (seed included) ends a string there with \
                 probability {:.1e} only; widen task.string or change the grammar",
                sampler.acceptance
            )
        }
        Ok(sampler)
    }

    pub fn grammar(&self) -> &Arc<Grammar> {
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
        let start = out.len();
        // one more than is accepted: the authors' generator draws that element before it gives up
        out.resize(start + self.max + 1, 0);
        let Some((head, tail)) = out[start..].split_first_mut() else { unreachable!("at least one slot") };
        // a copy, so that its state stays in registers
        let mut draws = rng.clone();
        for attempt in 1..=ATTEMPTS {
            let mut hop = self.starts[draws.integers(self.starts.len() as u32) as usize];
            *head = hop.state.into();
            let mut length = 1;
            for slot in tail.iter_mut() {
                // the only successor is taken without a draw
                let i = match hop.count {
                    0 => break,
                    1 => 0,
                    n => self.shares.pick(n.into(), draws.random_bits()),
                };
                hop = self.hops[hop.first as usize + i];
                *slot = hop.state.into();
                length += 1;
            }
            if hop.count == 0 && (self.min..=self.max).contains(&length) {
                out.truncate(start + length);
                *rng = draws;
                return Ok(attempt);
            }
        }
        anyhow::bail!(
            "no string of {} to {} elements in {ATTEMPTS} attempts; widen task.string",
            self.min,
            self.max
        )
    }

    /// The states of a sample's first `count` elements; with more than its length, those that would follow.
    pub fn elements(&self, rng: &mut Pcg64, count: usize) -> anyhow::Result<Vec<u32>> {
        let mut out = Vec::with_capacity(count + self.max + 1);
        while out.len() < count {
            self.string(rng, &mut out)?;
        }
        out.truncate(count);
        Ok(out)
    }
}

/// Picks one of n equal shares as the authors do: by the number of cumulative sums of 1/n, added left to
/// right in float64, that are at most u = bits / 2⁵³.
///
/// Were the sums exact, that number would be g = ⌊bits · n / 2⁵³⌋. Sum j is at most u from
/// K = ⌈sum · 2⁵³⌉ bits on and its exact value from (j + 1) · 2⁵³ / n on, so the two disagree only where
/// bits · n is within |K · n - (j + 1) · 2⁵³| of a multiple of 2⁵³. `margin` is the largest of these
/// distances; inside it the sums are searched, outside it g is the answer.
struct Shares {
    /// By the number of shares.
    sums: Vec<Vec<f64>>,
    margin: u64,
}

impl Shares {
    const ONE: u64 = 1 << 53;

    /// For up to `most` shares.
    fn new(most: usize) -> Self {
        let sums: Vec<Vec<f64>> = (0..=most)
            .map(|n| {
                let share = 1.0 / n as f64;
                let add = |sum: &mut f64, _| {
                    *sum += share;
                    Some(*sum)
                };
                (0..n).scan(0.0, add).collect()
            })
            .collect();
        let margin = |n: usize, j: usize| {
            let first = (sums[n][j] * Self::ONE as f64).ceil() as u64;
            (first * n as u64).abs_diff((j as u64 + 1) * Self::ONE)
        };
        let margin = (1..=most).flat_map(|n| (0..n).map(move |j| (n, j))).map(|(n, j)| margin(n, j)).max();
        Self { margin: margin.unwrap_or(0), sums }
    }

    #[inline(always)]
    fn pick(&self, n: usize, bits: u64) -> usize {
        let product = bits * n as u64;
        let rest = product % Self::ONE;
        if rest.wrapping_sub(self.margin) < Self::ONE - 2 * self.margin {
            return (product / Self::ONE) as usize;
        }
        self.search(n, bits)
    }

    #[cold]
    fn search(&self, n: usize, bits: u64) -> usize {
        let u = unit_f64(bits);
        // rounding can leave the last sum below 1
        self.sums[n].partition_point(|&sum| sum <= u).min(n - 1)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Most symbols that can follow a state.
    const MOST: usize = crate::task::grammar::LETTERS + 1;

    proptest! {
        #[test]
        fn pick_is_the_search(n in 2..=MOST, bits in 0..Shares::ONE) {
            let shares = Shares::new(MOST);
            prop_assert_eq!(shares.pick(n, bits), shares.search(n, bits));
        }
    }

    /// The quick way is wrong only where a cumulative sum is rounded: every number near every sum.
    #[test]
    fn pick_is_the_search_near_every_sum() {
        let shares = Shares::new(MOST);
        assert!(shares.margin < 1 << 13, "the quick way is the rule");
        for n in 2..=MOST {
            for j in 0..=n as u64 {
                let at = (u128::from(j) * u128::from(Shares::ONE) / n as u128) as u64;
                for bits in at.saturating_sub(300)..(at + 300).min(Shares::ONE) {
                    assert_eq!(shares.pick(n, bits), shares.search(n, bits), "{n} shares, {bits}");
                }
            }
        }
    }
}
