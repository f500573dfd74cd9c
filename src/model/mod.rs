//! Models: the stack around every mixer, and one file per mixer.

pub mod param;
