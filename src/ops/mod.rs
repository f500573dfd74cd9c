//! Operations: each a folder with its public function, its CPU reference and its gradient.
//!
//! Letters: B batch, T timesteps, H heads, K key dim, V value dim, D width or channels, N state, P head
//! dim of Mamba-2, G groups, C classes, W taps. Tensors are contiguous, batch first, time second.

pub mod activations;
pub mod add;
pub mod attention;
pub mod causal_conv1d;
pub mod delta;
pub mod dplr;
pub mod dropout;
pub mod embedding;
pub mod expand;
pub mod gates;
pub mod gla;
pub mod gru;
pub mod head;
pub mod kda;
pub mod l2norm;
pub mod linear;
pub mod mesa;
pub mod mlstm;
pub mod norms;
pub mod optim;
pub mod panels;
pub mod philox;
pub mod real;
pub mod residual_norm;
pub mod rows;
pub mod rwkv7;
pub mod s4d;
pub mod scan;
pub mod selective_scan;
pub mod ssd;
pub mod swiglu;
pub mod tape;
#[cfg(feature = "cuda")]
pub mod upload;

pub use tape::{Arg, Node, no_grad, view};
