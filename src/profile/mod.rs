//! Times of ops and of training steps, beside what the device can do at all.
//!
//! On a GPU a time lies between two events on the stream around many calls, after a warm-up, over sets of inputs
//! that together are larger than the cache. `host` is what a call takes when the host launches kernel by kernel,
//! `graph` when all of it is launched at once: the kernels alone.

#[cfg(feature = "cuda")]
pub mod gpu;
mod ops;
mod roofline;
mod steps;
mod timing;

pub use ops::{Measured, Options, Pass, ops};
pub use roofline::Roofline;
pub use steps::{Step, StepPart, step};
pub use timing::{Ceilings, Timing};
