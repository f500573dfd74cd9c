//! Samples in the terminal: cells side by side, one an element.

use std::fmt::Write;
use std::io::IsTerminal;

use crate::config::Objective;
use crate::task::grammar::letter;
use crate::task::{Sample, Task};

/// What a piece of text stands for.
#[derive(Clone, Copy)]
pub(super) enum Role {
    Symbol,
    Gap,
    Distractor,
    State,
    Right,
    Wrong,
    Frame,
}

impl Role {
    /// Text of this role, coloured if wanted. Roles differ without colour too.
    fn paint(self, text: &str, colour: bool) -> String {
        let code = match self {
            Role::Symbol => "1",
            Role::Gap | Role::Frame | Role::Right => "2",
            Role::Distractor => "33",
            Role::State => "36",
            Role::Wrong => "1;31",
        };
        if colour && !text.is_empty() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.into() }
    }
}

/// A line of a cell.
pub(super) type Line = Vec<(String, Role)>;

/// One element.
pub(super) struct Cell {
    /// As many in every cell.
    pub lines: Vec<Line>,
    /// The bar behind it.
    pub bar: char,
}

/// What an element's cell begins with: its symbol and the timesteps behind it.
pub(super) fn symbols(sample: &Sample) -> Vec<Line> {
    /// Blanks and distractors that are written out; more of them are counted.
    const WRITTEN: usize = 4;
    let mut distractors = sample.distractors.iter().map(|&class| letter(class));
    let elements = sample.symbols.iter().zip(&sample.gaps);
    elements
        .map(|(&symbol, &gap)| {
            let gap = gap as usize;
            let (behind, role) = match gap {
                _ if !sample.distractors.is_empty() => {
                    let shown: String = distractors.by_ref().take(gap).collect();
                    let text = match gap {
                        0 => String::new(),
                        1..=WRITTEN => format!("({shown})"),
                        _ => {
                            let first: String = shown.chars().take(WRITTEN).collect();
                            format!("({first}…{} more)", gap - WRITTEN)
                        }
                    };
                    (text, Role::Distractor)
                }
                ..=WRITTEN => ("·".repeat(gap), Role::Gap),
                _ => (format!("·×{gap}"), Role::Gap),
            };
            vec![(letter(symbol).to_string(), Role::Symbol), (behind, role)]
        })
        .collect()
}

/// What stands for what in [`symbols`].
pub(super) fn legend(sample: &Sample) -> &'static str {
    if sample.distractors.is_empty() {
        "symbols, with · for a timestep without one"
    } else {
        "symbols, with distractors in ()"
    }
}

/// What is asked of each element.
pub(super) fn asked(task: &Task) -> &'static str {
    match task.config().objective {
        Objective::Classify => "the state to name",
        Objective::Predict => "the symbol to predict, the next one",
    }
}

/// The width to wrap to, and whether to colour.
pub(super) fn terminal() -> (usize, bool) {
    let out = std::io::stdout();
    let colour = out.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    (terminal_size::terminal_size_of(&out).map_or(100, |(width, _)| width.0 as usize), colour)
}

/// Cells, as many to a row as fit; the first is element `first`, and each row begins with its element's number.
pub(super) fn lay_out(cells: &[Cell], first: usize, width: usize, colour: bool) -> String {
    let long = |line: &Line| line.iter().map(|(text, _)| text.chars().count()).sum::<usize>();
    let size = |cell: &Cell| cell.lines.iter().map(long).max().unwrap_or(0);
    let gutter = (first + cells.len()).to_string().len().max(3);
    let mut out = String::new();
    let mut at = 0;
    while at < cells.len() {
        let mut used = gutter + 3;
        let fits = |cell: &&Cell| {
            used += size(cell) + 2;
            used <= width
        };
        let count = cells[at..].iter().take_while(fits).count().max(1);
        for line in 0..cells[at].lines.len() {
            let number = if line == 0 { (first + at).to_string() } else { String::new() };
            let _ = write!(out, "{number:gutter$} {}", Role::Frame.paint("│", colour));
            for cell in &cells[at..at + count] {
                for (text, role) in &cell.lines[line] {
                    out += &role.paint(text, colour);
                }
                out += &" ".repeat(size(cell) + 1 - long(&cell.lines[line]));
                out += &Role::Frame.paint(&cell.bar.to_string(), colour);
            }
            out.push('\n');
        }
        out.push('\n');
        at += count;
    }
    out
}
