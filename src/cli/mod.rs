//! The command line: one file per subcommand.

pub mod devices;
pub mod models;
pub mod tasks;
