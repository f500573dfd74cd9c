//! Times of ops and of training steps, beside what the device can do at all.

#[cfg(feature = "cuda")]
pub mod gpu;
