//! How errors reach the user: one sentence and an exit code.
//!
//! Everything returns [`anyhow::Result`]. What the user can mend (a configuration, an argument, a file)
//! is raised with [`bad_input!`](crate::bad_input) before any work begins and ends with exit code 2; a
//! run that was stopped on request ends with 130; whatever else goes wrong while running ends with 1.

use std::fmt;

/// The user's input cannot be used; the message names the field, its value and what would be right.
#[derive(Debug)]
pub struct BadInput(pub String);

impl fmt::Display for BadInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadInput {}

/// The user asked the run to stop; the message says what was saved and how to go on.
#[derive(Debug)]
pub struct Interrupted(pub String);

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Interrupted {}

/// Makes an [`anyhow::Error`] that ends the program with exit code 2.
#[macro_export]
macro_rules! bad_input {
    ($($arg:tt)*) => { ::anyhow::Error::new($crate::error::BadInput(format!($($arg)*))) };
}

/// Returns early with [`bad_input!`].
#[macro_export]
macro_rules! bail_input {
    ($($arg:tt)*) => { return Err($crate::bad_input!($($arg)*)) };
}

/// The exit code of a run that was stopped on request.
pub const INTERRUPTED: i32 = 130;

/// The exit code that an error stands for: 2 bad input, 130 interrupted, 1 anything else.
pub fn exit_code(error: &anyhow::Error) -> i32 {
    if error.chain().any(|cause| cause.is::<BadInput>()) {
        2
    } else if error.chain().any(|cause| cause.is::<Interrupted>()) {
        INTERRUPTED
    } else {
        1
    }
}

/// The name in `known` that `name` was probably meant to be, if one is near.
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|candidate| (strsim::normalized_damerau_levenshtein(name, candidate), candidate))
        .filter(|(score, _)| *score >= 0.5)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}
