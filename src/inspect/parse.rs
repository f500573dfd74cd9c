//! Samples that the user wrote.

use anyhow::Result;

use crate::bail_input;
use crate::config::Objective;
use crate::task::grammar::letter;
use crate::task::{Sample, Task};

/// Elements and timesteps of a gap at most.
const MOST: usize = 100_000;

/// Reads a sample as `A3.. B1 #.×10 C0(AB)`: states by name, each with the gap behind it, which is a dot a timestep
/// or distractors in brackets. Where the next symbol is to be predicted, the last state is only what comes next.
pub fn parse(task: &Task, text: &str) -> Result<Sample> {
    let grammar = task.grammar();
    let (mut states, mut gaps, mut distractors) = (vec![], vec![], vec![]);
    let mut blanks = false;
    for (i, word) in text.split_whitespace().enumerate() {
        let end = word.find(['.', '·', '(']).unwrap_or(word.len());
        let (name, gap) = word.split_at(end);
        let known = |state: &u32| grammar.name(*state) == name;
        let Some(state) = (0..grammar.states() as u32).find(known) else {
            bail_input!(
                "--text holds {name:?}; it must be a state of the grammar, such as {} or #",
                grammar.name(grammar.starts()[0])
            )
        };
        let dots = gap.chars().take_while(|c| ['.', '·'].contains(c)).count();
        let rest: String = gap.chars().skip(dots).collect();
        let times = rest.strip_prefix(['x', '×']).and_then(|count| count.parse::<usize>().ok());
        let shown = rest.strip_prefix('(').and_then(|inside| inside.strip_suffix(')'));
        let steps = match (dots, times, shown) {
            (dots, None, None) if rest.is_empty() => dots,
            (1, Some(times), None) if times <= MOST => times,
            (0, None, Some(shown)) => {
                for symbol in shown.chars() {
                    let class = (0..grammar.alphabet() as u32).find(|&class| letter(class) == symbol);
                    let Some(class) = class else {
                        bail_input!(
                            "--text holds the distractor {symbol:?}, which is no symbol of the grammar"
                        )
                    };
                    distractors.push(class);
                }
                shown.chars().count()
            }
            _ => bail_input!(
                "--text holds {word:?}; behind a state there may be dots (`..`), a number of them up to {MOST} \
                 (`.×10`), or distractors in brackets (`(AB)`)"
            ),
        };
        blanks |= shown.is_none() && steps > 0;
        states.push(state);
        gaps.push(steps as u32);
        if i >= MOST {
            bail_input!("--text holds more than {MOST} elements")
        }
    }
    if states.is_empty() {
        bail_input!("--text is empty; it must hold states, as in `{} #`", grammar.name(grammar.starts()[0]))
    }
    if blanks && !distractors.is_empty() {
        bail_input!("--text holds blank timesteps and distractors; a sample has the one or the other")
    }
    let config = task.config();
    if config.objective == Objective::Classify {
        return Ok(Sample::new(grammar, states, gaps, distractors));
    }
    let (Some(next), true) = (states.pop(), states.len() > 1) else {
        bail_input!(
            "--text holds one state; where the next symbol is to be predicted it must hold at least two"
        )
    };
    let behind = gaps.pop().map_or(0, |gap| gap as usize);
    distractors.truncate(distractors.len().saturating_sub(behind));
    let mut sample = Sample::new(grammar, states, gaps, distractors);
    sample.predict(config.split, grammar.symbol(next));
    Ok(sample)
}

/// The first element of a sample that the grammar does not allow where it stands.
pub fn first_broken(task: &Task, sample: &Sample) -> Option<usize> {
    let grammar = task.grammar();
    let allowed = |before: Option<u32>, state: u32| match before {
        Some(before) if before != grammar.end() => grammar.successors(before).contains(&state),
        _ => grammar.starts().contains(&state),
    };
    let before = std::iter::once(None).chain(sample.states.iter().copied().map(Some));
    before.zip(&sample.states).position(|(before, &state)| !allowed(before, state))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::Part;

    #[test]
    fn what_is_written_is_read() {
        let text = "task: {preset: task3, ambiguities: 4, depth: 3, length: 12}";
        let config = crate::config::load::parse(text, "test", &[]).unwrap();
        let task = Task::new(&config.task, 1).unwrap();
        let sample = parse(&task, "A1.. #  B0.×12 C2·").unwrap();
        let names: Vec<&str> = sample.states.iter().map(|&state| task.grammar().name(state)).collect();
        assert_eq!((names, sample.gaps), (vec!["A1", "#", "B0", "C2"], vec![2, 0, 12, 1]));
        let sample = parse(&task, "A1(AB) # B0(D)").unwrap();
        assert_eq!((sample.gaps, sample.distractors), (vec![2, 0, 1], vec![1, 2, 4]));
        for (text, part) in [
            ("", "empty"),
            ("A9", "\"A9\""),
            ("a1", "\"a1\""),
            ("A1..x3", "A1..x3"),
            ("A1(A", "A1(A"),
            ("A1(Z)", "'Z'"),
            ("A1. B0(D)", "blank timesteps and distractors"),
        ] {
            let error = parse(&task, text).unwrap_err().to_string();
            assert!(error.starts_with("--text") && error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn samples_of_the_task_are_allowed() {
        let text = "task: {preset: task2, ambiguities: 4, depth: 3, length: 30}";
        let config = crate::config::load::parse(text, "test", &[]).unwrap();
        let task = Task::new(&config.task, 1).unwrap();
        let states = task.states(Part::Test, 0).unwrap();
        let mut sample = Sample::new(task.grammar(), states, vec![0; 30], vec![]);
        assert_eq!(first_broken(&task, &sample), None);
        // Some element that is not the first of its string, replaced by one that cannot follow there.
        let inside = |i: &usize| sample.states[*i - 1] != task.grammar().end();
        let at = (1..30).find(inside).unwrap();
        let next = task.grammar().successors(sample.states[at - 1]);
        sample.states[at] = (0..task.grammar().states() as u32).find(|state| !next.contains(state)).unwrap();
        assert_eq!(first_broken(&task, &sample), Some(at));
    }
}
