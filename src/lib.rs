//! selectivbench: train and evaluate linear recurrent sequence models on SelectivBench tasks.
//!
//! Dependencies point one way: [`cli`] → [`sweep`] → [`train`] → [`model`] → [`ops`]; [`task`] is the benchmark and
//! knows no model.

pub mod check;
pub mod checkpoint;
pub mod cli;
pub mod config;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod device;
pub mod error;
pub mod files;
pub mod inspect;
pub mod model;
pub mod ops;
pub mod plot;
pub mod profile;
pub mod report;
pub mod sweep;
pub mod task;
pub mod trace;
pub mod train;

/// The README's example builds and runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
