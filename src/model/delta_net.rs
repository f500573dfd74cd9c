//! DeltaNet: the delta rule, which erases what a key held before it writes.
//!
//! Yang et al., "Parallelizing linear transformers with the delta rule over sequence length",
//! arXiv 2406.06484, section 2. Parameters are those of `fla.layers.DeltaNet` with `expand_k = 1`,
//! `expand_v = 2` and short convolutions: those of Gated DeltaNet without decay and output gate.

use super::gated_delta_net::GatedDelta;
use super::{Grain, Model, Part, Transition};

pub(super) const MODEL: Model = Model {
    name: "delta_net",
    recurrence: |parts| match (parts.delta_rule, parts.decay) {
        (true, true) => "S = a (I - beta k^T k) S + beta k^T v",
        (true, false) => "S = (I - beta k^T k) S + beta k^T v",
        (false, true) => "S = a S + beta k^T v",
        (false, false) => "S = S + beta k^T v",
    },
    reference: "Yang et al. 2024, arXiv 2406.06484",
    build: |dims, builder| Ok(Box::new(GatedDelta::new(dims, builder, 1))),
    state_size: |dims| Some(2 * dims.width * dims.head_dim()),
    grain: Some(Grain::Head),
    transition: Transition::Linear,
    input_dependent_decay: true,
    householders: |_| 1,
    decay: Part::Off,
    output_gate: Part::Off,
    short_conv: Part::On,
    negative_eigenvalues: Part::Off,
    delta_rule: Part::On,
    qk_norm: Part::Never,
};
