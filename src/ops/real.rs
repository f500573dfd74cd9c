//! The floating-point types of the CPU path and the loops that they share.
//!
//! Every reference implementation is written once for `F: Real` and runs in f32 for training and in f64
//! for checks. Loops are plain slices and zips, so that the compiler vectorises them.

use candle_core::cpu::erf::erfc_f64;
use candle_core::{Result, WithDType};
use rayon::prelude::*;
use wide::{f32x8, f64x8};

/// f32 or f64.
pub trait Real: WithDType + num_traits::Float + std::iter::Sum + Default + std::fmt::Debug {
    /// From an f64 constant.
    fn of(x: f64) -> Self;
    fn as_f64(self) -> f64;
    /// eˣ, branch-free so that it vectorises; within 2 ulp in f32.
    fn exp_fast(self) -> Self;
    /// ln(1 + x) for x from 0 to 1, branch-free so that it vectorises; within 2 ulp in f32.
    fn ln_1p_unit(self) -> Self;
    /// tanh x, branch-free so that it vectorises; within 3 ulp in f32.
    fn tanh_fast(self) -> Self;
    /// The share of a normal distribution below x, and exp(−x²/2), branch-free so that it vectorises; in f32 within 2e-6
    /// of themselves for x ≥ −4, and 2e-5 down to −12.
    fn normal(self) -> (Self, Self);
    /// `self · a + b`, fused where the machine has it.
    fn fma(self, a: Self, b: Self) -> Self;
    /// Sum of `N` numbers, a multiple of 8; the order is fixed. With explicit vectors: the compiler's own way goes
    /// through memory, eight bytes at a time.
    fn sum_of<const N: usize>(x: &[Self; N]) -> Self;
}

impl Real for f64 {
    #[inline(always)]
    fn of(x: f64) -> Self {
        x
    }
    #[inline(always)]
    fn as_f64(self) -> f64 {
        self
    }
    #[inline(always)]
    fn exp_fast(self) -> Self {
        self.exp()
    }
    #[inline(always)]
    fn ln_1p_unit(self) -> Self {
        self.ln_1p()
    }
    #[inline(always)]
    fn tanh_fast(self) -> Self {
        self.tanh()
    }
    #[inline(always)]
    fn normal(self) -> (Self, Self) {
        (0.5 * erfc_f64(-self * std::f64::consts::FRAC_1_SQRT_2), (-0.5 * self * self).exp())
    }
    #[inline(always)]
    fn fma(self, a: Self, b: Self) -> Self {
        if cfg!(target_feature = "fma") { self.mul_add(a, b) } else { self * a + b }
    }
    #[inline(always)]
    fn sum_of<const N: usize>(x: &[Self; N]) -> Self {
        const { assert!(N.is_multiple_of(8)) };
        x.as_chunks().0.iter().fold(f64x8::ZERO, |sum, &x| sum + f64x8::new(x)).reduce_add()
    }
}

impl Real for f32 {
    #[inline(always)]
    fn of(x: f64) -> Self {
        x as f32
    }
    #[inline(always)]
    fn as_f64(self) -> f64 {
        self as f64
    }
    #[inline(always)]
    fn exp_fast(self) -> Self {
        // x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 in two parts (Cody and Waite), then a polynomial.
        let x = self.clamp(-87.336_54, 88.722_83);
        // Adding 1.5 · 2²³ leaves the nearest integer in the low bits: no conversion, which would not
        // vectorise.
        let shifted = x.fma(std::f32::consts::LOG2_E, 12_582_912.0);
        let n = shifted - 12_582_912.0;
        let r = n.fma(-0.693_359_4, x);
        let r = n.fma(2.121_944_4e-4, r);
        let p = 1.987_569_1e-4f32
            .fma(r, 1.398_199_9e-3)
            .fma(r, 8.333_452e-3)
            .fma(r, 4.166_579_6e-2)
            .fma(r, 1.666_666_5e-1)
            .fma(r, 5e-1);
        let p = (p * r).fma(r, r) + 1.0;
        // 2ⁿ in two factors: n reaches 128, where one factor would overflow.
        let n = shifted.to_bits().wrapping_sub(12_582_912.0f32.to_bits()) as i32;
        let half = n >> 1;
        let scale = |k: i32| f32::from_bits((k.wrapping_add(127) as u32) << 23);
        let y = p * scale(half) * scale(n.wrapping_sub(half));
        let y = if self < -103.972_08 { 0.0 } else { y };
        let y = if self > 88.722_83 { f32::INFINITY } else { y };
        if self.is_nan() { self } else { y }
    }
    #[inline(always)]
    fn ln_1p_unit(self) -> Self {
        // ln(1 + x) = 2 artanh(x / (2 + x)), whose series needs seven terms up to x = 1.
        let s = self / (2.0 + self);
        let square = s * s;
        let series = (1.0 / 13.0f32)
            .fma(square, 1.0 / 11.0)
            .fma(square, 1.0 / 9.0)
            .fma(square, 1.0 / 7.0)
            .fma(square, 1.0 / 5.0)
            .fma(square, 1.0 / 3.0);
        2.0 * (series * square).fma(s, s)
    }
    #[inline(always)]
    fn tanh_fast(self) -> Self {
        let x = self.abs();
        let e = (-2.0 * x).exp_fast();
        // Near zero 1 − e cancels: there the series is taken.
        let far = (1.0 - e) / (1.0 + e);
        let square = x * x;
        let series =
            (62.0 / 2835.0f32).fma(square, -17.0 / 315.0).fma(square, 2.0 / 15.0).fma(square, -1.0 / 3.0);
        let near = (series * square).fma(x, x);
        (if x < 0.25 { near } else { far }).copysign(self)
    }
    #[inline(always)]
    fn normal(self) -> (Self, Self) {
        // Φ(−|x|) = t p(t) exp(−x²/2) with t = 1 / (1 + |x| / 4): a fit of degree 8 for |x| below 13.5, whose relative
        // error is below 6e-8.
        let t = 1.0 / 0.25f32.fma(self.abs(), 1.0);
        let fit = 2.629_545_3e-2f32
            .fma(t, -1.556_364_1e-1)
            .fma(t, 3.020_760_7e-1)
            .fma(t, -2.127_480_4e-1)
            .fma(t, 2.066_966_3e-1)
            .fma(t, 3.075_900_7e-2)
            .fma(t, 1.043_218e-1)
            .fma(t, 9.843_28e-2)
            .fma(t, 9.980_266e-2);
        let bell = (-0.5 * self * self).exp_fast();
        let tail = fit * t * bell;
        (if self < 0.0 { tail } else { 1.0 - tail }, bell)
    }
    #[inline(always)]
    fn fma(self, a: Self, b: Self) -> Self {
        if cfg!(target_feature = "fma") { self.mul_add(a, b) } else { self * a + b }
    }
    #[inline(always)]
    fn sum_of<const N: usize>(x: &[Self; N]) -> Self {
        const { assert!(N.is_multiple_of(8)) };
        x.as_chunks().0.iter().fold(f32x8::ZERO, |sum, &x| sum + f32x8::new(x)).reduce_add()
    }
}

/// Logistic function, with the exponential only ever of a negative number: no overflow, and small values stay exact.
#[inline(always)]
pub fn sigmoid<F: Real>(x: F) -> F {
    let e = (-x.abs()).exp_fast();
    let tail = F::one() / (F::one() + e);
    if x < F::zero() { e * tail } else { tail }
}

/// log σ(x).
#[inline(always)]
pub fn log_sigmoid<F: Real>(x: F) -> F {
    (if x < F::zero() { x } else { F::zero() }) - (-x.abs()).exp_fast().ln_1p_unit()
}

/// x·σ(x).
#[inline(always)]
pub fn silu<F: Real>(x: F) -> F {
    x * sigmoid(x)
}

/// Derivative of [`silu`].
#[inline(always)]
pub fn silu_grad<F: Real>(x: F) -> F {
    let s = sigmoid(x);
    s * (F::one() + x * (F::one() - s))
}

/// log(1 + eˣ); above 20 the argument itself, as PyTorch does.
#[inline(always)]
pub fn softplus<F: Real>(x: F) -> F {
    let y = (if x > F::zero() { x } else { F::zero() }) + (-x.abs()).exp_fast().ln_1p_unit();
    if x > F::of(20.0) { x } else { y }
}

/// Σ aᵢ bᵢ with sixteen running sums, so that it vectorises; the order of the sum is fixed.
#[inline(always)]
pub fn dot<F: Real>(a: &[F], b: &[F]) -> F {
    const LANES: usize = 16;
    let n = a.len().min(b.len());
    let (a, b) = (&a[..n], &b[..n]);
    let mut lanes = [F::zero(); LANES];
    let (a_body, b_body) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (a_tail, b_tail) = (a_body.remainder(), b_body.remainder());
    for (x, y) in a_body.zip(b_body) {
        for i in 0..LANES {
            lanes[i] = x[i].fma(y[i], lanes[i]);
        }
    }
    let mut sum = F::sum_of(&lanes);
    for (x, y) in a_tail.iter().zip(b_tail) {
        sum = x.fma(*y, sum);
    }
    sum
}

/// Binds the elements of contiguous CPU tensors to slices: `slices!(F; q = &args[0], k = &args[1]);`.
///
/// The slices borrow guards that live to the end of the enclosing block.
#[macro_export]
macro_rules! slices {
    ($f:ty; $($name:ident = $tensor:expr),+ $(,)?) => {
        $(
            let (guard, layout) = $tensor.storage_and_layout();
            let $name: &[$f] = $crate::ops::real::slice_of::<$f>(&guard, layout)?;
        )+
    };
}

/// The elements behind a storage guard; used by [`slices!`](crate::slices).
pub fn slice_of<'a, F: Real>(
    storage: &'a candle_core::Storage,
    layout: &candle_core::Layout,
) -> Result<&'a [F]> {
    let candle_core::Storage::Cpu(storage) = storage else {
        candle_core::bail!("expected a tensor on the CPU")
    };
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&F::cpu_storage_as_slice(storage)?[start..end]),
        None => candle_core::bail!("expected a contiguous tensor of shape {:?}", layout.shape()),
    }
}

/// Runs the body with `F` bound to the float type of a dtype: `dispatch!(tensor.dtype(), F => body)`.
#[macro_export]
macro_rules! dispatch {
    ($dtype:expr, $f:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $f = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $f = f64;
                $body
            }
            other => candle_core::bail!("the CPU path computes in f32 or f64, not in {other:?}"),
        }
    };
}

/// Runs `f(b, h)` for every batch entry and head, in parallel; results in the order of `b·heads + h`.
pub fn map_heads<R: Send>(batch: usize, heads: usize, f: impl Fn(usize, usize) -> R + Sync) -> Vec<R> {
    (0..batch * heads).into_par_iter().map(|i| f(i / heads, i % heads)).collect()
}

/// Copies head `h` of batch entry `b` out of a [B, T, H, D] array, as [T, D].
pub fn gather_head<F: Real>(
    src: &[F],
    (b, h): (usize, usize),
    (t, heads, d): (usize, usize, usize),
) -> Vec<F> {
    let base = &src[b * t * heads * d..(b + 1) * t * heads * d];
    let mut out = Vec::with_capacity(t * d);
    for row in base.chunks_exact(heads * d) {
        out.extend_from_slice(&row[h * d..(h + 1) * d]);
    }
    out
}

/// Puts per-head [T, D] arrays, ordered as [`map_heads`] gives them, together to [B, T, H, D].
pub fn scatter_heads<F: Real>(parts: &[&[F]], (t, heads, d): (usize, usize, usize)) -> Vec<F> {
    let mut out = vec![F::zero(); parts.len() * t * d];
    out.par_chunks_mut((t * heads * d).max(1)).enumerate().for_each(|(b, out)| {
        for (h, part) in parts[b * heads..(b + 1) * heads].iter().enumerate() {
            for (row, values) in out.chunks_exact_mut(heads * d).zip(part.chunks_exact(d)) {
                row[h * d..(h + 1) * d].copy_from_slice(values);
            }
        }
    });
    out
}

/// Parts behind each other.
pub fn joined<'a, F: Real>(parts: impl Iterator<Item = &'a Vec<F>>) -> Vec<F> {
    parts.map(Vec::as_slice).collect::<Vec<_>>().concat()
}

/// Sums equally long partial results in their order, so that the sum does not depend on the threads.
pub fn sum_in_order<F: Real>(parts: &[&[F]]) -> Vec<F> {
    let mut sum = parts.first().map(|part| part.to_vec()).unwrap_or_default();
    for part in parts.iter().skip(1) {
        for (s, &x) in sum.iter_mut().zip(*part) {
            *s += x;
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fast_exp_is_within_two_ulp() {
        let mut worst = 0.0f64;
        let mut x = -87.3f32;
        while x < 88.7 {
            let want = (x as f64).exp();
            worst = worst.max(((x.exp_fast() as f64 - want) / want).abs());
            x += 0.000_37;
        }
        assert!(worst < 2.0 * f32::EPSILON as f64, "{worst:e}");
        assert_eq!((-200.0f32).exp_fast(), 0.0);
        assert_eq!(f32::NEG_INFINITY.exp_fast(), 0.0);
        assert_eq!(200.0f32.exp_fast(), f32::INFINITY);
        assert_eq!(0.0f32.exp_fast(), 1.0);
        assert!(f32::NAN.exp_fast().is_nan());
    }

    #[test]
    fn fast_functions_are_as_exact_as_they_say() {
        let worst = |from: f32, to: f32, f: fn(f32) -> f32, want: fn(f64) -> f64| {
            let points = (0..100_000).map(|i| from + (to - from) * (i as f32 / 1e5)).filter(|x| *x != 0.0);
            points.map(|x| ((f(x) as f64 - want(x as f64)) / want(x as f64)).abs()).fold(0.0, f64::max)
        };
        let ulp = f32::EPSILON as f64;
        assert!(worst(0.0, 1.0, f32::ln_1p_unit, f64::ln_1p) < 2.0 * ulp);
        assert!(worst(1e-30, 1e-6, f32::ln_1p_unit, f64::ln_1p) < 2.0 * ulp);
        assert!(worst(-10.0, 10.0, f32::tanh_fast, f64::tanh) < 3.0 * ulp);
        assert!(worst(-1e-3, 1e-3, f32::tanh_fast, f64::tanh) < 3.0 * ulp);
        assert_eq!([-100.0f32, 100.0].map(f32::tanh_fast), [-1.0, 1.0]);
        assert_eq!((0.0f32.ln_1p_unit(), 0.0f32.tanh_fast()), (0.0, 0.0));
        assert!(f32::NAN.tanh_fast().is_nan());
        let (cdf, bell) = (|x: f32| x.normal().0, |x: f32| x.normal().1);
        assert!(worst(-4.0, 6.0, cdf, |x| x.normal().0) < 2e-6);
        assert!(worst(-12.0, -4.0, cdf, |x| x.normal().0) < 2e-5);
        assert!(worst(-4.0, 4.0, bell, |x| x.normal().1) < 2e-6);
        assert!(f32::NAN.normal().0.is_nan());
    }

    #[test]
    fn heads_survive_a_round_trip() {
        let (b, t, h, d) = (2, 3, 4, 5);
        let x: Vec<f32> = (0..b * t * h * d).map(|i| i as f32).collect();
        let parts = map_heads(b, h, |b, h_| gather_head(&x, (b, h_), (t, h, d)));
        let parts: Vec<&[f32]> = parts.iter().map(Vec::as_slice).collect();
        assert_eq!(scatter_heads(&parts, (t, h, d)), x);
    }
}
