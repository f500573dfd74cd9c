//! selectivbench: train, evaluate and profile linear recurrent sequence models on SelectivBench tasks.

pub mod cli;
pub mod config;
pub mod device;
pub mod error;
pub mod model;
pub mod ops;
pub mod task;
pub mod train;
