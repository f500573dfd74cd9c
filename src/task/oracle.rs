//! How well any model could do: observers that know the grammar.
//!
//! A state has at most one successor per symbol, so what an observer does not know is where a string
//! began (start states may share a symbol) and, in the presence of distractors, which symbols are
//! elements. What it does know beside the transitions is that only strings which end within the accepted
//! lengths are kept: a path is as likely as the chain makes it, times the probability h(s, n) that a
//! string in state s with n elements is accepted.
//!
//! Where the next symbol is to be predicted ([`super::next`]) the same observers give its distribution.
//!
//! Noise is left out: it is smaller than the step from 0 to 1 that a symbol makes wherever
//! `task.noise` < 1, so every symbol can be read off exactly. With more noise the figures here are only
//! upper bounds.

use rayon::prelude::*;

use super::batch::Delay;
use super::{Part, Sample, Task};
use crate::config::{GapKind, Objective, Split};

/// No successor.
const NONE: u32 = u32::MAX;

/// A hypothesis this much less likely than all together is given up; less than what f64 resolves.
const LEAST: f64 = 1e-16;

/// What an observer of one task knows.
struct Knowledge<'a> {
    task: &'a Task,
    alphabet: usize,
    /// [state, class] the successor with that symbol.
    table: Vec<u32>,
    /// Probability of each move out of a state.
    share: Vec<f64>,
    /// Classes that may be shown as distractors after a state.
    allowed: Vec<usize>,
    /// Accepted strings are at most this long.
    max: usize,
    /// [state, elements so far] the probability that the string is accepted.
    accepted: Vec<f64>,
}

impl<'a> Knowledge<'a> {
    fn new(task: &'a Task) -> Self {
        let grammar = task.grammar();
        let (states, alphabet, max) = (grammar.states(), grammar.alphabet(), task.sampler().max());
        let mut table = vec![NONE; states * alphabet];
        for state in 0..states as u32 {
            for &target in grammar.successors(state) {
                table[state as usize * alphabet + grammar.symbol(target) as usize] = target;
            }
        }
        let degrees = (0..states as u32).map(|state| grammar.successors(state).len());
        let mut accepted = vec![0.0; states * (max + 1)];
        let mut after = vec![0.0; states];
        for n in (1..=max).rev() {
            after = task.sampler().before(&after, n);
            for (row, &h) in accepted.chunks_exact_mut(max + 1).zip(&after) {
                row[n] = h;
            }
        }
        Self {
            task,
            alphabet,
            table,
            share: degrees.clone().map(|degree| 1.0 / degree as f64).collect(),
            allowed: degrees.map(|degree| alphabet - degree).collect(),
            max,
            accepted,
        }
    }

    fn next(&self, state: u32, class: u32) -> Option<u32> {
        let next = self.table[state as usize * self.alphabet + class as usize];
        (next != NONE).then_some(next)
    }

    /// h(state, n); 0 beyond the longest accepted string.
    fn accepted(&self, state: u32, n: usize) -> f64 {
        if n > self.max { 0.0 } else { self.accepted[state as usize * (self.max + 1) + n] }
    }

    /// Start states, each with the probability that an accepted string starts there.
    fn starts(&self) -> impl Iterator<Item = (u32, f64)> {
        let starts = self.task.grammar().starts();
        let total = starts.len() as f64 * self.task.sampler().acceptance();
        starts.iter().map(move |&start| (start, self.accepted(start, 1) / total))
    }

    /// Those of one symbol.
    fn starts_with(&self, class: u32) -> impl Iterator<Item = (u32, f64)> {
        self.starts().filter(move |&(start, _)| self.task.grammar().symbol(start) == class)
    }

    /// The probability that an accepted string in `state` with `n` elements goes on to the successor `next`.
    fn move_to(&self, state: u32, n: usize, next: u32) -> f64 {
        self.share[state as usize] * self.accepted(next, n + 1) / self.accepted(state, n)
    }
}

/// The accuracy of the best observer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ceiling {
    /// Mean probability of the most probable label: the accuracy to expect.
    pub accuracy: f64,
    /// Share of elements whose most probable label was the true one.
    pub hits: f64,
    /// Where the next symbol is predicted: mean entropy of its distribution in nats, the cross-entropy to expect.
    pub entropy: f64,
    /// Elements looked at.
    pub elements: usize,
}

/// The accuracy that no causal model exceeds on the samples of the test part, in expectation.
///
/// The observer knows the grammar, the accepted lengths of strings and the rule of gaps. For each element
/// it has all symbols up to the end of the element's window, and the bounds of this one window, which are
/// known to who counts the votes: so the figure bounds every way of voting over the steps of a window.
/// `gap` replaces the test gap.
pub fn ceiling(task: &Task, gap: Option<f64>) -> anyhow::Result<Ceiling> {
    let observer = Observer::new(task, gap);
    let samples = task.samples(Part::Test, 0, task.config().samples.test, gap)?;
    let each: Vec<Ceiling> = samples.as_slice().par_iter().map(|sample| observer.watch(sample)).collect();
    let mut all = Ceiling::default();
    for one in each {
        all.accuracy += one.accuracy;
        all.hits += one.hits;
        all.entropy += one.entropy;
        all.elements += one.elements;
    }
    let elements = all.elements.max(1) as f64;
    Ok(Ceiling {
        accuracy: all.accuracy / elements,
        hits: all.hits / elements,
        entropy: all.entropy / elements,
        ..all
    })
}

/// Where a sample may be after the symbols seen so far.
#[derive(Clone, Copy)]
struct Hypothesis {
    state: u32,
    /// Elements of the current string.
    string: u32,
    /// Elements of the sample.
    elements: u32,
    /// Distractors still to come before the next element.
    left: u32,
    weight: f64,
}

/// Follows all hypotheses that the symbols of a sample leave, by Bayes' rule.
pub struct Observer<'a> {
    knowledge: Knowledge<'a>,
    /// Distractors in a gap; 0 where gaps are blank.
    distractors: u32,
    /// First element that a gap can follow.
    start: usize,
    probability: f64,
    objective: Objective,
    /// The symbol behind each `#` is shown as `#`, and the label of the last element is `#`.
    overwritten: bool,
}

impl<'a> Observer<'a> {
    /// Of samples of the validation or test part; `gap` replaces the test gap.
    pub fn new(task: &'a Task, gap: Option<f64>) -> Self {
        let rule = task.gap_rule(Part::Test, gap);
        let Delay::Fixed(delay) = rule.delay else { unreachable!("gaps of the test part are fixed") };
        let distractors = match rule.kind {
            // A blank says only that its element is over: its law does not depend on the state.
            GapKind::Blank => 0,
            GapKind::Distractor => rule.steps(delay),
        };
        let (objective, split) = (task.config().objective, task.config().split);
        Self {
            knowledge: Knowledge::new(task),
            distractors,
            start: rule.start,
            probability: rule.probability,
            objective,
            overwritten: objective == Objective::Predict && split == Split::AsReleased,
        }
    }
}

impl Observer<'_> {
    /// Sums over the elements of a sample: probability of the most probable label, hits, and entropy.
    fn watch(&self, sample: &Sample) -> Ceiling {
        let mut sums = Ceiling { elements: sample.states.len(), ..Default::default() };
        let mut probabilities = vec![0.0; self.knowledge.task.classes()];
        self.follow(
            sample,
            |_| {},
            |e, window| {
                let (right, probability) = match self.objective {
                    Objective::Classify => {
                        let (best, probability) = most_probable(window);
                        (best == Some(sample.states[e]), probability)
                    }
                    Objective::Predict => {
                        self.next_symbol(window, &mut probabilities);
                        let best = (1..probabilities.len()).fold(0, |best, class| {
                            if probabilities[class] > probabilities[best] { class } else { best }
                        });
                        let terms = probabilities.iter().filter(|p| **p > 0.0);
                        sums.entropy -= terms.map(|p| p * p.ln()).sum::<f64>();
                        (best == sample.labels[e] as usize, probabilities[best])
                    }
                };
                sums.accuracy += probability;
                sums.hits += f64::from(u8::from(right));
            },
        );
        sums
    }

    /// The distribution of the label at every symbol that is shown, distractors included: [symbols, classes].
    ///
    /// Each is given all symbols up to this one, but not where the windows of elements end.
    pub fn next_symbols(&self, sample: &Sample) -> Vec<f64> {
        let classes = self.knowledge.task.classes();
        let mut all = Vec::new();
        let shown = |now: &[Hypothesis]| {
            all.resize(all.len() + classes, 0.0);
            let row = all.len() - classes;
            self.next_symbol(now, &mut all[row..]);
        };
        self.follow(sample, shown, |_, _| {});
        all
    }

    /// The distribution of the label of the next symbol.
    fn next_symbol(&self, hypotheses: &[Hypothesis], probabilities: &mut [f64]) {
        let (k, grammar) = (&self.knowledge, self.knowledge.task.grammar());
        let total: f64 = hypotheses.iter().map(|h| h.weight).sum();
        probabilities.fill(0.0);
        for h in hypotheses {
            let weight = h.weight / total;
            let end = h.state == grammar.end();
            let mut add = |state: u32, p: f64| probabilities[grammar.symbol(state) as usize] += weight * p;
            if self.overwritten && (end || h.elements as usize == k.task.sampler().length()) {
                add(grammar.end(), 1.0);
            } else if end {
                k.starts().for_each(|(start, p)| add(start, p));
            } else {
                let n = h.string as usize;
                grammar.successors(h.state).iter().for_each(|&next| add(next, k.move_to(h.state, n, next)));
            }
        }
    }

    /// Shows a sample symbol by symbol: `shown` is given the hypotheses after each, `closed` those at the end of
    /// each element's window to who knows where it begins and ends.
    fn follow(
        &self,
        sample: &Sample,
        mut shown: impl FnMut(&[Hypothesis]),
        mut closed: impl FnMut(usize, &mut Vec<Hypothesis>),
    ) {
        let grammar = self.knowledge.task.grammar();
        // As after the end of a string.
        let mut now = vec![Hypothesis { state: grammar.end(), string: 0, elements: 0, left: 0, weight: 1.0 }];
        let mut distractors = sample.distractors.iter();
        for (e, (&class, &gap)) in sample.symbols.iter().zip(&sample.gaps).enumerate() {
            let mut window = Vec::new();
            now.iter().for_each(|h| self.element(h, class, &mut window));
            let mut next = self.inside(&now, class);
            next.extend_from_slice(&window);
            now = settled(next);
            shown(&now);
            let behind = if self.distractors > 0 { gap as usize } else { 0 };
            for &class in distractors.by_ref().take(behind) {
                window = self.inside(&window, class);
                let mut next = self.inside(&now, class);
                now.iter().for_each(|h| self.element(h, class, &mut next));
                now = settled(next);
                shown(&now);
            }
            window.retain(|h| h.left == 0);
            closed(e, &mut window);
        }
    }

    /// What `h` becomes if the symbol `class` is the next element.
    fn element(&self, h: &Hypothesis, class: u32, out: &mut Vec<Hypothesis>) {
        let k = &self.knowledge;
        if h.left > 0 || h.elements as usize >= k.task.sampler().length() {
            return;
        }
        let mut push = |state: u32, string: u32, weight: f64| {
            if weight == 0.0 {
                return;
            }
            let mut push = |left, weight| {
                out.push(Hypothesis { state, string, elements: h.elements + 1, left, weight });
            };
            let gap = self.distractors > 0
                && h.elements as usize >= self.start
                && k.allowed[state as usize] > 0
                && self.probability > 0.0;
            if gap {
                push(self.distractors, weight * self.probability);
            }
            let without = if gap { weight * (1.0 - self.probability) } else { weight };
            if without > 0.0 {
                push(0, without);
            }
        };
        if h.state == k.task.grammar().end() {
            let mut begin = |(start, probability)| push(start, 1, h.weight * probability);
            match self.overwritten && h.elements > 0 {
                false => k.starts_with(class).for_each(begin),
                true if class == 0 => k.starts().for_each(&mut begin),
                true => {}
            }
        } else if let Some(next) = k.next(h.state, class) {
            push(next, h.string + 1, h.weight * k.move_to(h.state, h.string as usize, next));
        }
    }

    /// The hypotheses for which the symbol `class` stands in a gap.
    fn inside(&self, now: &[Hypothesis], class: u32) -> Vec<Hypothesis> {
        let k = &self.knowledge;
        let possible = |h: &&Hypothesis| h.left > 0 && k.next(h.state, class).is_none();
        let shown = |h: &Hypothesis| Hypothesis {
            left: h.left - 1,
            weight: h.weight / k.allowed[h.state as usize] as f64,
            ..*h
        };
        now.iter().filter(possible).map(shown).collect()
    }
}

/// Equal hypotheses in one, weights that sum to one, without what is lost in their rounding.
fn settled(mut all: Vec<Hypothesis>) -> Vec<Hypothesis> {
    let place = |h: &Hypothesis| (h.state, h.string, h.elements, h.left);
    all.sort_unstable_by_key(place);
    all.dedup_by(|h, kept| {
        let same = place(h) == place(kept);
        if same {
            kept.weight += h.weight;
        }
        same
    });
    let total: f64 = all.iter().map(|h| h.weight).sum();
    all.retain(|h| h.weight > LEAST * total);
    all.iter_mut().for_each(|h| h.weight /= total);
    all
}

/// The state with the largest share of the weight, and that share.
fn most_probable(all: &mut [Hypothesis]) -> (Option<u32>, f64) {
    all.sort_unstable_by_key(|h| h.state);
    let total: f64 = all.iter().map(|h| h.weight).sum();
    let states = all.chunk_by(|a, b| a.state == b.state);
    let sums = states.map(|same| (Some(same[0].state), same.iter().map(|h| h.weight).sum::<f64>() / total));
    sums.fold((None, 0.0), |best, this| if this.1 > best.1 { this } else { best })
}

/// The accuracy of an observer that has only the last `k` elements, for each of `ks`, over the elements of
/// the test part: the share of elements whose most probable state, or next symbol, was the true one.
///
/// The observer does not know where in a string or in the sample its window lies, unless the window
/// holds a `#` or reaches back to before the sample. The state s at the head of a window is as likely as s
/// is at place n of an accepted string, over all n: f(s, n) · h(s, n), with f the chain's own distribution.
/// Times the probability of the moves that follow and of acceptance from the state at the window's end,
/// that makes Σ_n f(s, n) · h(end, n + k - 1) · Π share. After a `#`, only the new string counts. Gaps and
/// distractors are not shown. The next symbol's probability is the weight of the window with the symbol
/// behind it. Nothing is overwritten, whatever the split.
pub fn window_curve(task: &Task, ks: &[usize]) -> anyhow::Result<Vec<f64>> {
    let knowledge = Knowledge::new(task);
    let places = Places::new(&knowledge);
    let grammar = task.grammar();
    let count = task.config().samples.test as u64;
    let predict = task.config().objective == Objective::Predict;
    // what is to be told of each element, and its symbols
    let samples: Vec<(Vec<u32>, Vec<u32>)> = (0..count)
        .into_par_iter()
        .map(|index| {
            let (states, next) = task.states_and_next(Part::Test, index)?;
            let symbols: Vec<u32> = states.iter().map(|&state| grammar.symbol(state)).collect();
            Ok(match next {
                Some(next) => (symbols.iter().skip(1).copied().chain([next]).collect(), symbols),
                None => (states, symbols),
            })
        })
        .collect::<anyhow::Result<_>>()?;
    let accuracy = |k: usize| {
        let windows = samples.iter().flat_map(|(right, symbols)| {
            (0..right.len()).map(move |e| (k > e + 1, &symbols[(e + 1).saturating_sub(k)..=e], right[e]))
        });
        let mut windows: Vec<_> = windows.collect();
        // Short windows are often the same: each is looked at once.
        windows.par_sort_unstable();
        let same: Vec<_> = windows.chunk_by(|a, b| (a.0, a.1) == (b.0, b.1)).collect();
        let hits = same.par_iter().map(|same| {
            let (whole, symbols, _) = same[0];
            let guess = if predict { places.next(whole, symbols) } else { places.guess(whole, symbols) };
            same.iter().filter(|(.., right)| Some(*right) == guess).count()
        });
        hits.sum::<usize>() as f64 / windows.len().max(1) as f64
    };
    Ok(ks.iter().map(|&k| accuracy(k)).collect())
}

/// Where in a string a window may lie.
struct Places<'a> {
    knowledge: &'a Knowledge<'a>,
    /// [state, elements so far] the probability that a string comes there, accepted or not.
    reached: Vec<f64>,
    /// States by symbol.
    members: Vec<Vec<u32>>,
}

impl<'a> Places<'a> {
    fn new(knowledge: &'a Knowledge<'a>) -> Self {
        let (grammar, max) = (knowledge.task.grammar(), knowledge.max);
        let states = grammar.states();
        let mut reached = vec![0.0; states * (max + 1)];
        for &start in grammar.starts() {
            reached[start as usize * (max + 1) + 1] += 1.0 / grammar.starts().len() as f64;
        }
        for n in 1..max {
            for state in 0..states {
                let mass = reached[state * (max + 1) + n] * knowledge.share[state];
                for &target in grammar.successors(state as u32) {
                    reached[target as usize * (max + 1) + n + 1] += mass;
                }
            }
        }
        let mut members = vec![Vec::new(); grammar.alphabet()];
        for state in 0..states as u32 {
            members[grammar.symbol(state) as usize].push(state);
        }
        Self { knowledge, reached, members }
    }

    /// The most probable state behind the last symbol of a window; `whole`: the sample begins with it.
    fn guess(&self, whole: bool, symbols: &[u32]) -> Option<u32> {
        let mut weights = self.weights(whole, symbols);
        weights.sort_unstable_by_key(|&(state, _)| state);
        let sums = weights.chunk_by(|a, b| a.0 == b.0);
        most(sums.map(|same| (same[0].0, same.iter().map(|(_, weight)| weight).sum())))
    }

    /// The most probable symbol behind a window.
    fn next(&self, whole: bool, symbols: &[u32]) -> Option<u32> {
        let mut longer = [symbols, &[0]].concat();
        most((0..self.members.len() as u32).map(|class| {
            longer[symbols.len()] = class;
            (class, self.weights(whole, &longer).iter().map(|(_, weight)| weight).sum())
        }))
    }

    /// States behind the last symbol of a window, each with the weight of a way that leads there.
    fn weights(&self, whole: bool, symbols: &[u32]) -> Vec<(u32, f64)> {
        let knowledge = self.knowledge;
        let Some((_, before)) = symbols.split_last() else { return vec![] };
        let end = before.iter().rposition(|&symbol| symbol == 0);
        let [head, ref rest @ ..] = symbols[end.map_or(0, |end| end + 1)..] else { return vec![] };
        let known = whole || end.is_some();
        let row =
            |state: u32| state as usize * (knowledge.max + 1)..(state as usize + 1) * (knowledge.max + 1);
        let weigh = |start: u32| {
            let (state, moves) = rest.iter().try_fold((start, 1.0), |(state, moves), &symbol| {
                knowledge.next(state, symbol).map(|next| (next, moves * knowledge.share[state as usize]))
            })?;
            let place = if known {
                knowledge.accepted(state, rest.len() + 1)
            } else {
                let reached = &self.reached[row(start)][1..];
                let accepted = knowledge.accepted[row(state)].get(1 + rest.len()..).unwrap_or(&[]);
                reached.iter().zip(accepted).map(|(f, h)| f * h).sum()
            };
            Some((state, moves * place))
        };
        if known {
            knowledge.starts_with(head).filter_map(|(start, _)| weigh(start)).collect()
        } else {
            self.members[head as usize].iter().filter_map(|&start| weigh(start)).collect()
        }
    }
}

/// What has the largest weight, the first on ties.
fn most(all: impl Iterator<Item = (u32, f64)>) -> Option<u32> {
    let first = (None, 0.0);
    all.fold(first, |best, this| if this.1 > best.1 { (Some(this.0), this.1) } else { best }).0
}

/// What the test part and its strings are like.
#[derive(Clone, Copy, Debug)]
pub struct Census {
    /// The accuracy of always giving the most frequent label.
    pub majority: f64,
    /// Mean number of strings that a sample holds, the last one mostly cut.
    pub strings: f64,
    /// Mean length of accepted strings, `#` included: expected, not counted.
    pub string_length: f64,
}

/// Counts the states and strings of the test part.
pub fn census(task: &Task) -> anyhow::Result<Census> {
    let (knowledge, end) = (Knowledge::new(task), task.grammar().end());
    let samples = task.samples(Part::Test, 0, task.count(Part::Test), None)?;
    let samples = samples.as_slice();
    let mut counts = vec![0usize; task.classes()];
    samples.iter().flat_map(|sample| &sample.labels).for_each(|&label| counts[label as usize] += 1);
    let most = counts.iter().copied().max().unwrap_or(0);
    let whole = |states: &[u32]| states[..states.len() - 1].iter().filter(|&&state| state == end).count();
    let strings: usize = samples.iter().map(|sample| 1 + whole(&sample.states)).sum();
    let ends = Places::new(&knowledge).reached;
    let ends = &ends[end as usize * (knowledge.max + 1)..];
    let length = |n: usize| n as f64 * ends[n] * knowledge.accepted(end, n);
    Ok(Census {
        majority: most as f64 / counts.iter().sum::<usize>().max(1) as f64,
        strings: strings as f64 / samples.len().max(1) as f64,
        string_length: (1..=knowledge.max).map(length).sum::<f64>() / task.sampler().acceptance(),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashMap};

    use super::*;
    use crate::config::{Auto, Config, TaskPreset};
    use crate::task::Grammar;

    /// For the symbols up to the end of a window and the place where it begins: the weight of each answer.
    type Posterior = HashMap<(Vec<u32>, usize), BTreeMap<u32, f64>>;

    /// What was shown so far.
    #[derive(Clone, Default)]
    struct Shown {
        symbols: Vec<u32>,
        /// Where the last window begins, and its state.
        window: Option<(usize, u32)>,
    }

    /// All accepted strings with their probabilities, by trying every path.
    fn strings(grammar: &Grammar, max: usize) -> Vec<(Vec<u32>, f64)> {
        let starts = grammar.starts().iter().map(|&s| (vec![s], 1.0 / grammar.starts().len() as f64));
        let (mut open, mut all): (Vec<(Vec<u32>, f64)>, Vec<_>) = (starts.collect(), Vec::new());
        while let Some((path, weight)) = open.pop() {
            let last = path[path.len() - 1];
            if last == grammar.end() {
                all.push((path, weight));
            } else if path.len() < max {
                let next = grammar.successors(last);
                open.extend(next.iter().map(|&t| ([&path[..], &[t]].concat(), weight / next.len() as f64)));
            }
        }
        let total: f64 = all.iter().map(|(_, weight)| weight).sum();
        all.iter_mut().for_each(|(_, weight)| *weight /= total);
        all
    }

    /// Every way in which a sample can come about and be shown.
    struct Enumeration<'a> {
        grammar: &'a Grammar,
        strings: Vec<(Vec<u32>, f64)>,
        length: usize,
        start: usize,
        probability: f64,
        distractors: usize,
        overwritten: bool,
        posterior: Posterior,
        /// Weights of the next symbol at the end of a window, and at every symbol, whatever the windows.
        next: Posterior,
        next_anywhere: HashMap<Vec<u32>, BTreeMap<u32, f64>>,
    }

    impl Enumeration<'_> {
        /// `rest` of a string is still to come behind `elements` elements.
        fn walk(&mut self, rest: &[u32], elements: usize, shown: &Shown, weight: f64) {
            let Some((&state, rest)) = rest.split_first() else {
                for (string, share) in self.strings.clone() {
                    self.walk(&string, elements, shown, weight * share);
                }
                return;
            };
            let end = self.grammar.end();
            let behind_end = shown.window.is_some_and(|(_, last)| last == end);
            if let Some((place, _)) = shown.window {
                let cut = self.overwritten && (behind_end || elements == self.length);
                let label = if cut { 0 } else { self.grammar.symbol(state) };
                let symbols = &shown.symbols;
                *self.next.entry((symbols.clone(), place)).or_default().entry(label).or_default() += weight;
                for to in place + 1..=symbols.len() {
                    let labels = self.next_anywhere.entry(symbols[..to].to_vec()).or_default();
                    *labels.entry(label).or_default() += weight;
                }
            }
            if elements == self.length {
                return;
            }
            let place = shown.symbols.len();
            let symbol = if self.overwritten && behind_end { 0 } else { self.grammar.symbol(state) };
            let shown = [&shown.symbols[..], &[symbol]].concat();
            let next: Vec<u32> =
                self.grammar.successors(state).iter().map(|&t| self.grammar.symbol(t)).collect();
            let allowed: Vec<u32> =
                (0..self.grammar.alphabet() as u32).filter(|class| !next.contains(class)).collect();
            let gap = elements >= self.start && !allowed.is_empty() && self.distractors > 0;
            let mut windows = vec![(shown.clone(), weight * if gap { 1.0 - self.probability } else { 1.0 })];
            if gap {
                let mut long = vec![(shown, weight * self.probability)];
                for _ in 0..self.distractors {
                    let share = 1.0 / allowed.len() as f64;
                    let more = |(shown, weight): (Vec<u32>, f64)| {
                        let shown = allowed.iter().map(move |&class| [&shown[..], &[class]].concat());
                        shown.map(move |shown| (shown, weight * share)).collect::<Vec<_>>()
                    };
                    long = long.into_iter().flat_map(more).collect();
                }
                windows.extend(long);
            }
            for (shown, weight) in windows {
                let states = self.posterior.entry((shown.clone(), place)).or_default();
                *states.entry(state).or_default() += weight;
                let window = Some((place, state));
                self.walk(rest, elements + 1, &Shown { symbols: shown, window }, weight);
            }
        }
    }

    #[test]
    fn the_filter_is_exact() {
        for (distractors, probability, start, seed, objective, split) in [
            (0, 1.0, 0, 1, Objective::Classify, Split::HeldOut),
            (1, 0.5, 0, 1, Objective::Classify, Split::HeldOut),
            (1, 0.3, 1, 4, Objective::Classify, Split::HeldOut),
            (2, 0.4, 0, 2, Objective::Classify, Split::HeldOut),
            (0, 1.0, 0, 1, Objective::Predict, Split::HeldOut),
            (1, 0.5, 0, 1, Objective::Predict, Split::HeldOut),
            (2, 0.4, 1, 2, Objective::Predict, Split::HeldOut),
            (0, 1.0, 0, 1, Objective::Predict, Split::AsReleased),
            (1, 0.3, 1, 4, Objective::Predict, Split::AsReleased),
        ] {
            let mut config = Config::of(TaskPreset::Task3).task;
            (config.vocab, config.ambiguities, config.depth) = (Auto::Value(4), 2, Auto::Value(2));
            (config.density, config.start_states, config.length) = (1.2, 4, 5);
            config.string.max = Auto::AUTO;
            (config.gap.start, config.gap.probability) = (start, probability);
            config.test_gap = 0.1 * f64::from(distractors);
            (config.objective, config.split) = (objective, split);
            if distractors == 0 {
                config.gap.kind = GapKind::Blank;
            }
            let task = Task::new(&config, seed).unwrap();
            let mut all = Enumeration {
                grammar: task.grammar(),
                strings: strings(task.grammar(), config.length),
                length: config.length,
                start,
                probability,
                distractors: distractors as usize,
                overwritten: split == Split::AsReleased,
                posterior: Posterior::new(),
                next: Posterior::new(),
                next_anywhere: HashMap::new(),
            };
            all.walk(&[], 0, &Shown::default(), 1.0);
            let predict = objective == Objective::Predict;

            let observer = Observer::new(&task, None);
            assert_eq!(observer.distractors, distractors);
            let samples = task.samples(Part::Test, 0, 100, None).unwrap();
            let mut uncertain = 0;
            for sample in samples.as_slice() {
                let (mut shown, mut want, mut used) = (Vec::new(), 0.0, 0);
                for (&symbol, &gap) in sample.symbols.iter().zip(&sample.gaps) {
                    let place = shown.len();
                    shown.push(symbol);
                    if distractors > 0 {
                        shown.extend(&sample.distractors[used..used + gap as usize]);
                        used += gap as usize;
                    }
                    let posterior = if predict { &all.next } else { &all.posterior };
                    let answers = &posterior[&(shown.clone(), place)];
                    let most = answers.values().copied().fold(0.0, f64::max);
                    want += most / answers.values().sum::<f64>();
                    uncertain += usize::from(answers.len() > 1);
                }
                let got = observer.watch(sample).accuracy;
                assert!((got - want).abs() < 1e-9, "{got}, expected {want} for {sample:?}");
                if !predict {
                    continue;
                }
                let rows = observer.next_symbols(sample);
                let rows: Vec<&[f64]> = rows.chunks_exact(task.classes()).collect();
                assert_eq!(rows.len(), shown.len());
                for (at, row) in rows.into_iter().enumerate() {
                    let labels = &all.next_anywhere[&shown[..=at]];
                    let total: f64 = labels.values().sum();
                    for (class, got) in (0..).zip(row) {
                        let want = labels.get(&class).unwrap_or(&0.0) / total;
                        assert!((got - want).abs() < 1e-9, "{got}, expected {want} at {at} of {sample:?}");
                    }
                }
            }
            assert!(uncertain > 10, "{uncertain} windows leave something open");
        }
    }
}
