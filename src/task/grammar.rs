//! Rule-based grammars: states behind symbols, and which state may follow which.
//!
//! A symbol is `#` (the end of a string) or a letter; an ambiguous letter stands for several states. The
//! generator is the authors', draw for draw. Every state has at most one successor per symbol, so the
//! current state and the next symbol fix the next state.

use crate::bail_input;
use crate::task::rng::{Mt19937, Pcg64, SeedSequence};

/// Attempts after which a grammar is called impossible; the authors' limit.
const ATTEMPTS: usize = 100_000;

/// Letters that symbols can be.
pub const LETTERS: usize = 52;

/// States of a letter at most: the authors' names of states have at most three characters.
pub const MAX_DEPTH: usize = 100;

/// What a grammar is drawn from.
#[derive(Clone, Copy, Debug)]
pub struct GrammarConfig {
    /// Symbols, `#` included.
    pub vocab: usize,
    /// Ambiguous letters.
    pub ambiguities: usize,
    /// States of an ambiguous letter.
    pub depth: usize,
    pub density: f64,
    pub start_states: usize,
    pub seed: u64,
}

/// A grammar: its states in the order of the authors' list, `#` last.
#[derive(Clone, Debug)]
pub struct Grammar {
    names: Vec<String>,
    /// Class id of each state's symbol: 0 for `#`, then A..Z, a..z.
    symbols: Vec<u32>,
    /// Label of each state: 0 for `#`, then by symbol and instance.
    labels: Vec<u32>,
    starts: Vec<u32>,
    /// Successors of state i are `targets[offsets[i]..offsets[i + 1]]`, ascending.
    offsets: Vec<u32>,
    targets: Vec<u32>,
    alphabet: usize,
    attempts: usize,
}

/// The letter of a class id.
pub fn letter(class: u32) -> char {
    match class {
        0 => '#',
        1..=26 => (b'A' + (class - 1) as u8) as char,
        _ => (b'a' + (class - 27) as u8) as char,
    }
}

impl Grammar {
    /// Draws grammars until one is valid: `#` can be reached from every state and starts no string.
    pub fn generate(config: &GrammarConfig) -> anyhow::Result<Self> {
        let &GrammarConfig { vocab, ambiguities, depth, density, start_states, seed } = config;
        let letters = vocab.saturating_sub(1).min(LETTERS);
        if letters == 0 {
            bail_input!("task.vocab is {vocab}; it must be at least 2: `#` and one letter")
        }
        if ambiguities > letters {
            bail_input!(
                "task.ambiguities is {ambiguities}, but task.vocab {vocab} has only {letters} letters"
            )
        }
        if ambiguities > 0 && !(1..=MAX_DEPTH).contains(&depth) {
            bail_input!("task.depth is {depth}; it must be between 1 and {MAX_DEPTH}")
        }
        let states = letters - ambiguities + ambiguities * depth + 1;
        if start_states == 0 || start_states > states {
            bail_input!("task.start_states is {start_states}; it must be between 1 and the {states} states")
        }
        // depth only matters where a letter is ambiguous
        let density = density / depth.max(1) as f64;

        let mut rng = Pcg64::new(seed.into());
        let mut python = Mt19937::from_words(&SeedSequence::words(rng.integers(100).into()));
        let mut swaps = Vec::new();
        for attempt in 1..=ATTEMPTS {
            let repeated = if ambiguities > 0 { python.python_sample(letters, ambiguities) } else { vec![] };
            // (letter, instance) of every state but `#`
            let single = (0..letters).filter(|l| !repeated.contains(l)).map(|l| (l, None));
            let several = repeated.iter().flat_map(|&l| (0..depth).map(move |i| (l, Some(i))));
            let list: Vec<(usize, Option<usize>)> = single.chain(several).collect();
            let mut members = vec![Vec::new(); letters];
            for (i, (l, _)) in list.iter().enumerate() {
                members[*l].push(i as u32);
            }
            members.push(vec![list.len() as u32]);

            let (mut offsets, mut targets) = (vec![0u32], Vec::new());
            for i in 0..states {
                let first = targets.len();
                for members in &members {
                    let y = rng.permutation_first(members.len(), &mut swaps);
                    if rng.random() < members.len() as f64 * density {
                        targets.push(members[y]);
                    }
                }
                // `#` draws like every state, but nothing follows it.
                if i + 1 == states {
                    targets.truncate(first);
                }
                targets[first..].sort_unstable();
                offsets.push(targets.len() as u32);
            }
            let starts: Vec<u32> = rng.choice(states, start_states).into_iter().map(|s| s as u32).collect();

            let end = (states - 1) as u32;
            if starts.contains(&end) || !all_reach_the_end(&offsets, &targets) {
                continue;
            }
            let mut grammar = Self {
                names: Vec::with_capacity(states),
                symbols: Vec::with_capacity(states),
                labels: vec![0; states],
                starts,
                offsets,
                targets,
                alphabet: letters + 1,
                attempts: attempt,
            };
            for (l, instance) in list {
                let class = l as u32 + 1;
                let name = letter(class);
                grammar.names.push(instance.map_or(name.to_string(), |i| format!("{name}{i}")));
                grammar.symbols.push(class);
            }
            grammar.names.push("#".into());
            grammar.symbols.push(0);
            for (label, &state) in (1..).zip(members[..letters].iter().flatten()) {
                grammar.labels[state as usize] = label;
            }
            return Ok(grammar);
        }
        bail_input!(
            "no valid grammar in {ATTEMPTS} attempts: with task.vocab {vocab}, task.ambiguities {ambiguities}, \
             task.depth {depth} and task.density {} some state always lacks a path to `#`; raise the density \
             or make more letters ambiguous",
            config.density
        )
    }

    /// Number of states, `#` included; also the number of classes to tell apart.
    pub fn states(&self) -> usize {
        self.names.len()
    }

    /// The state `#`.
    pub fn end(&self) -> u32 {
        (self.states() - 1) as u32
    }

    /// Symbols in use, `#` included.
    pub fn alphabet(&self) -> usize {
        self.alphabet
    }

    pub fn transitions(&self) -> usize {
        self.targets.len()
    }

    /// Grammars drawn until one was valid.
    pub fn attempts(&self) -> usize {
        self.attempts
    }

    pub fn starts(&self) -> &[u32] {
        &self.starts
    }

    /// States that may follow `state`, each equally likely, ascending.
    #[inline(always)]
    pub fn successors(&self, state: u32) -> &[u32] {
        let i = state as usize;
        &self.targets[self.offsets[i] as usize..self.offsets[i + 1] as usize]
    }

    pub fn name(&self, state: u32) -> &str {
        &self.names[state as usize]
    }

    /// Class id of a state's symbol.
    #[inline(always)]
    pub fn symbol(&self, state: u32) -> u32 {
        self.symbols[state as usize]
    }

    /// The label that a classifier should give a state.
    #[inline(always)]
    pub fn label(&self, state: u32) -> u32 {
        self.labels[state as usize]
    }

    /// The authors' `transitions` file: `src, dst, prob` a line.
    pub fn transitions_text(&self) -> String {
        use std::fmt::Write;
        let mut text = String::new();
        for state in 0..self.states() as u32 {
            let successors = self.successors(state);
            for &target in successors {
                let p = 1.0 / successors.len() as f64;
                let _ = writeln!(text, "{}, {}, {p:?}", self.name(state), self.name(target));
            }
        }
        text
    }

    /// Topological entropy: the logarithm of the largest eigenvalue of the transition table, in which `#`
    /// leads to the start states.
    ///
    /// Power iteration on I + A: the shift keeps a periodic grammar from oscillating.
    pub fn topological_entropy(&self) -> f64 {
        let n = self.states();
        let mut x = vec![1.0 / n as f64; n];
        let mut last = f64::NAN;
        for round in 0..200_000 {
            let mut y = x.clone();
            for state in 0..n as u32 {
                let from = x[state as usize];
                let next = if state == self.end() { self.starts() } else { self.successors(state) };
                for &target in next {
                    y[target as usize] += from;
                }
            }
            let norm: f64 = y.iter().sum();
            y.iter_mut().for_each(|y| *y /= norm);
            x = y;
            if round % 50 == 49 {
                if (norm - last).abs() < 1e-15 * norm {
                    break;
                }
                last = norm;
            }
        }
        // one exact Rayleigh-like step: the ratio of sums under A alone
        let growth: f64 = (0..n as u32)
            .map(|state| {
                let next = if state == self.end() { self.starts() } else { self.successors(state) };
                x[state as usize] * next.len() as f64
            })
            .sum();
        growth.ln()
    }
}

/// Whether every state has a path to the last one.
fn all_reach_the_end(offsets: &[u32], targets: &[u32]) -> bool {
    let states = offsets.len() - 1;
    let mut before = vec![Vec::new(); states];
    for i in 0..states {
        for &target in &targets[offsets[i] as usize..offsets[i + 1] as usize] {
            before[target as usize].push(i);
        }
    }
    let mut reached = vec![false; states];
    reached[states - 1] = true;
    let mut queue = vec![states - 1];
    let mut count = 1;
    while let Some(state) = queue.pop() {
        for &i in &before[state] {
            if !std::mem::replace(&mut reached[i], true) {
                count += 1;
                queue.push(i);
            }
        }
    }
    count == states
}
