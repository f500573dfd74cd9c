//! The delta rule, gated delta rule and gated delta product: a matrix state that is erased and rewritten
//! along one key at a time; and the sum rule, which erases nothing.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
mod hopper;
pub mod reference;
#[cfg(feature = "cuda")]
mod sum_rule;

use candle_core::{Device, Result, Tensor};

use self::reference::{Delta, DeltaGrads};
use super::panels::Walked;
use super::real::Real;
use super::scan::{expect_shape, grad_or_zeros, slice_of_option};
use super::tape::{Arg, Forward, Node, Run, apply};
use crate::{dispatch, slices};

/// Gated delta rule with `n` Householder steps per token.
///
/// | argument | shape | |
/// |---|---|---|
/// | `q` | [B, T, H, K] | queries |
/// | `k` | [B, T·n, H, K] | keys; token t has rows t·n to t·n + n − 1 |
/// | `v` | [B, T·n, H, V] | values |
/// | `beta` | [B, T·n, H] | write strengths, 0 to 2 |
/// | `g` | [B, T, H] | log decay, at most 0; none: no decay |
/// | `scale` | | of the outputs, K^-½ in every layer of the family |
/// | `state` | [B, H, K, V] | before the first token; none: zeros |
///
/// Returns the outputs [B, T, H, V] and the final state [B, H, K, V]. All arguments share one dtype, f32
/// or f64; on a GPU `q`, `k` and `v` may be bf16 and the others are f32. With row vectors, one head and
/// one token:
///
/// ```text
/// S ← exp(g) S                        once per token, before its first step
/// S ← S + kᵀ β (v − k S)              n times, with the token's k, v, β in order
/// o = scale · q S                     after the last step
/// ```
///
/// n = 1 without `g` is DeltaNet (Yang et al. 2024, arXiv:2406.06484, eq. 3), with `g` Gated DeltaNet
/// (Yang et al. 2025, arXiv:2412.06464, eq. 10), n > 1 DeltaProduct (Siems et al. 2025,
/// arXiv:2502.10297, section 3). Every argument is differentiable. On a CPU the forward pass
/// is strictly sequential: a sequence fed in pieces gives the same bits as in one.
///
/// # Errors
/// Shapes or dtypes that do not fit together; a device without this operation.
pub fn gated_delta_rule(
    q: impl Into<Arg>,
    k: impl Into<Arg>,
    v: impl Into<Arg>,
    beta: impl Into<Arg>,
    g: Option<Arg>,
    scale: f64,
    state: Option<Arg>,
) -> Result<(Tensor, Tensor)> {
    run(true, [q.into(), k.into(), v.into(), beta.into()], g, scale, state)
}

/// The sum rule in place of the delta rule: linear attention with write strengths, `n` writes a token.
///
/// Arguments, outputs and errors are those of [`gated_delta_rule`]; the step of a token is
///
/// ```text
/// S ← S + kᵀ β v                      n times, with the token's k, v, β in order
/// ```
///
/// Schlag, Irie and Schmidhuber 2021, arXiv:2102.11174, section 4.2, where both rules have their names. On a GPU it
/// is computed as gated linear attention ([`super::gla`]) of the keys β k.
pub fn gated_sum_rule(
    q: impl Into<Arg>,
    k: impl Into<Arg>,
    v: impl Into<Arg>,
    beta: impl Into<Arg>,
    g: Option<Arg>,
    scale: f64,
    state: Option<Arg>,
) -> Result<(Tensor, Tensor)> {
    run(false, [q.into(), k.into(), v.into(), beta.into()], g, scale, state)
}

fn run(
    erases: bool,
    args: [Arg; 4],
    g: Option<Arg>,
    scale: f64,
    state: Option<Arg>,
) -> Result<(Tensor, Tensor)> {
    let node = GatedRule { erases, scale, gated: g.is_some(), stateful: state.is_some() };
    let args: Vec<Arg> = args.into_iter().chain(g).chain(state).collect();
    let mut outputs = apply(node, &args)?.into_iter();
    match (outputs.next(), outputs.next()) {
        (Some(o), Some(state)) => Ok((o, state)),
        _ => candle_core::bail!("{}: expected two outputs", name(erases)),
    }
}

fn name(erases: bool) -> &'static str {
    if erases { "gated_delta_rule" } else { "gated_sum_rule" }
}

struct GatedRule {
    /// Whether a write erases what its key held.
    erases: bool,
    scale: f64,
    gated: bool,
    stateful: bool,
}

/// Sizes, checked against every argument.
#[derive(Clone, Copy)]
struct Dims {
    batch: usize,
    steps: usize,
    sub: usize,
    heads: usize,
    key: usize,
    value: usize,
}

impl GatedRule {
    fn dims(&self, args: &[Tensor]) -> Result<Dims> {
        let name = self.name();
        let (batch, steps, heads, key) = args[0].dims4()?;
        let (_, rows, _, value) = args[2].dims4()?;
        if steps == 0 || rows == 0 || rows % steps != 0 {
            candle_core::bail!(
                "{name}: expected v with a multiple of the {steps} steps of q, got {rows} steps"
            )
        }
        expect_shape(name, "k", &args[1], &[batch, rows, heads, key])?;
        expect_shape(name, "v", &args[2], &[batch, rows, heads, value])?;
        expect_shape(name, "beta", &args[3], &[batch, rows, heads])?;
        if let Some(g) = self.g(args) {
            expect_shape(name, "g", g, &[batch, steps, heads])?;
        }
        if let Some(state) = self.state(args) {
            expect_shape(name, "state", state, &[batch, heads, key, value])?;
        }
        Ok(Dims { batch, steps, sub: rows / steps, heads, key, value })
    }

    fn g<'a>(&self, args: &'a [Tensor]) -> Option<&'a Tensor> {
        self.gated.then(|| &args[4])
    }

    fn state<'a>(&self, args: &'a [Tensor]) -> Option<&'a Tensor> {
        self.stateful.then(|| &args[4 + usize::from(self.gated)])
    }
}

impl GatedRule {
    /// Runs `f` on the arguments as slices.
    fn with_slices<F: Real, R>(&self, args: &[Tensor], f: impl FnOnce(Delta<'_, F>) -> R) -> Result<R> {
        let Dims { batch, steps, sub, heads, key, value } = self.dims(args)?;
        slices!(F; q = &args[0], k = &args[1], v = &args[2], beta = &args[3]);
        let (g, state) = (self.g(args), self.state(args));
        let g = g.map(Tensor::storage_and_layout);
        let state = state.map(Tensor::storage_and_layout);
        let (g, state) = (slice_of_option(&g)?, slice_of_option(&state)?);
        let scale = F::of(self.scale);
        let erases = self.erases;
        Ok(f(Delta { batch, steps, sub, heads, key, value, erases, scale, q, k, v, beta, g, state }))
    }
}

impl Node for GatedRule {
    fn name(&self) -> &'static str {
        name(self.erases)
    }

    fn forward(&self, args: &[Tensor], save: bool) -> Result<Forward> {
        #[cfg(feature = "cuda")]
        if args[0].device().is_cuda() {
            return match self.erases {
                true => cuda::forward(self, args, save),
                false => sum_rule::forward(self, args),
            };
        }
        let Dims { batch, steps, heads, key, value, .. } = self.dims(args)?;
        dispatch!(args[0].dtype(), F => {
            let walked: Walked<F> = self.with_slices(args, |delta| delta.forward(save))?;
            walked.into_forward((batch, steps, heads, value), (batch, heads, key, value), save)
        })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        #[cfg(feature = "cuda")]
        if run.args[0].device().is_cuda() {
            return match self.erases {
                true => cuda::backward(self, run, grads),
                false => sum_rule::backward(self, run, grads),
            };
        }
        let args = &run.args;
        let Dims { batch, steps, heads, key, value, .. } = self.dims(args)?;
        let d_o = grad_or_zeros(&grads[0], &[batch, steps, heads, value], &args[0])?;
        let d_state = grad_or_zeros(&grads[1], &[batch, heads, key, value], &args[0])?;
        dispatch!(args[0].dtype(), F => {
            slices!(F; checkpoints = &run.saved[0], d_o = &d_o, d_state = &d_state);
            let DeltaGrads::<F> { q, k, v, beta, g, state } =
                self.with_slices(args, |delta| delta.backward(checkpoints, d_o, d_state))?;
            let mut out = vec![q, k, v, beta];
            if self.gated {
                out.push(g);
            }
            if self.stateful {
                out.push(state);
            }
            out.into_iter()
                .zip(args)
                .map(|(grad, arg)| Tensor::from_vec(grad, arg.shape(), &Device::Cpu).map(Some))
                .collect()
        })
    }
}
