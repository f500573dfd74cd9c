//! Configuration: what a run is made of, every field with its default.
//!
//! `schema` holds the types, `load` reads YAML and `--set` overrides into them and names what is wrong.

pub mod load;
pub mod schema;

pub use schema::*;
