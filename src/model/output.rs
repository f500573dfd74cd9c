//! What flash-linear-attention's layers do with the values they read: an RMS norm of each head, with a gate or without.

use candle_core::{Result, Tensor};

use super::{Builder, Call, Dims, Init, Kind, Param, Rows, Scale};
use crate::ops::linear::linear;
use crate::ops::norms::{GateOrder, RmsEps, gated_rms_norm, rms_norm};
use crate::ops::view;

const OUTPUT_GATE: Kind = Kind {
    name: "output_gate",
    about: "silu(gate), what the output is multiplied with",
    scale: Scale::Linear,
    rows: Rows::Layer,
};

/// `g_proj.weight`, if the layer has an output gate.
pub fn gate(dims: &Dims, builder: &Builder) -> Option<Param> {
    let width = dims.width;
    let gate = || builder.push("g_proj").param("weight", &[2 * width, width], Init::linear(width));
    dims.parts.output_gate.then(gate)
}

/// The norm's weight in the layers of fla that name it after the gate that it is fused with.
pub fn fused_norm(dims: &Dims, builder: &Builder) -> Param {
    let name = if dims.parts.output_gate { "g_norm_swish_gate" } else { "g_norm" };
    builder.push(name).param("weight", &[2 * dims.head_dim()], Init::Const(1.0))
}

/// Of the values `o`, [B, T, H, V] or in the same order, read from a layer whose input is `x`, [B, T, width]: norm ⊙ ô ⊙ silu(gate x), or
/// norm ⊙ ô, as [B, T, 2 width].
pub fn norm_and_gate(
    o: &Tensor,
    x: &Tensor,
    norm: &Param,
    gate: Option<&Param>,
    call: &mut Call,
) -> Result<Tensor> {
    let (batch, steps, width) = x.dims3()?;
    let o = view(o, (batch, steps, 2 * width));
    let Some(gate) = gate else { return rms_norm(o, norm, 1e-5, RmsEps::Inside) };
    let gate = linear(x, gate, None)?;
    call.note(&OUTPUT_GATE, steps, [&gate], |[gate]| gate.silu()?.unsqueeze(2))?;
    gated_rms_norm(o, &gate, norm, 1e-5, GateOrder::AfterNorm)
}
