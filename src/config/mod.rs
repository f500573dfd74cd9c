//! Configuration: what a run is made of, every field with its default.
//!
//! `schema` holds the types, `presets` the named settings, `load` reads YAML and `--set` overrides over
//! them, and `check` says what is wrong with a value.

mod check;
pub mod load;
mod presets;
pub mod schema;

pub(crate) use check::{MOST_LAYERS, MOST_SIZE, count};
pub use load::Layer;
pub use schema::*;
