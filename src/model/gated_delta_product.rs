//! Gated DeltaProduct: several Householder steps per token, so that the transition is a product of them.
//!
//! Siems et al., "DeltaProduct: improving state-tracking in linear RNNs via Householder products",
//! arXiv 2502.10297, section 3. Parameters are those of `fla.layers.GatedDeltaProduct` with
//! `expand_v = 2`; as there, beta reaches 2 (negative eigenvalues).

use super::gated_delta_net::GatedDelta;
use super::{Grain, Model, Part, Transition};

pub(super) const MODEL: Model = Model {
    name: "gated_delta_product",
    recurrence: |parts| match (parts.delta_rule, parts.decay) {
        (true, true) => "S = a prod_j (I - beta_j k_j^T k_j) S + ..",
        (true, false) => "S = prod_j (I - beta_j k_j^T k_j) S + ..",
        (false, true) => "S = a S + sum_j beta_j k_j^T v_j",
        (false, false) => "S = S + sum_j beta_j k_j^T v_j",
    },
    reference: "Siems et al. 2025, arXiv 2502.10297",
    build: |dims, builder| Ok(Box::new(GatedDelta::new(dims, builder, dims.householders))),
    state_size: |dims| Some(2 * dims.width * dims.head_dim()),
    grain: Some(Grain::Head),
    transition: Transition::Linear,
    input_dependent_decay: true,
    householders: |dims| dims.householders,
    decay: Part::On,
    output_gate: Part::On,
    short_conv: Part::On,
    negative_eigenvalues: Part::On,
    delta_rule: Part::On,
    qk_norm: Part::Never,
};
