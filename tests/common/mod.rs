//! Shared by the numerical tests: golden tensors, error measures, finite differences.
#![allow(dead_code)]

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Result, Tensor, Var};

/// The tensors of `tests/golden/tensors/<name>.safetensors`.
pub struct Golden(HashMap<String, Tensor>);

impl Golden {
    pub fn open(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tensors");
        let path = path.join(format!("{name}.safetensors"));
        Self(candle_core::safetensors::load(path, &Device::Cpu).expect("a golden file"))
    }

    /// The tensor called `name`, in `dtype`.
    pub fn get(&self, name: &str, dtype: DType) -> Tensor {
        let tensor = self.0.get(name).unwrap_or_else(|| panic!("the golden file holds no {name}"));
        tensor.to_dtype(dtype).expect("a float tensor")
    }

    /// The tensor called `name`, in f64.
    pub fn f64(&self, name: &str) -> Tensor {
        self.get(name, DType::F64)
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// The input `in.<name>`, in `dtype`.
    pub fn input(&self, name: &str, dtype: DType) -> Tensor {
        self.get(&format!("in.{name}"), dtype)
    }
}

/// All elements in f64, row-major.
pub fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).and_then(|t| t.flatten_all()?.to_vec1()).expect("a float tensor")
}

/// √(Σ (got − want)² / Σ want²).
pub fn relative_rms(got: &Tensor, want: &Tensor) -> f64 {
    assert_eq!(got.dims(), want.dims());
    let (got, want) = (values(got), values(want));
    let error: f64 = got.iter().zip(&want).map(|(g, w)| (g - w) * (g - w)).sum();
    let norm: f64 = want.iter().map(|w| w * w).sum();
    // Not `max`: an error of NaN must not pass.
    if norm == 0.0 { error.sqrt() } else { (error / norm).sqrt() }
}

/// Fails when the relative RMS error exceeds `bound` or is not a number.
pub fn assert_close(what: &str, got: &Tensor, want: &Tensor, bound: f64) {
    let error = relative_rms(got, want);
    assert!(error <= bound, "{what}: relative RMS error {error:.2e}, allowed {bound:.0e}");
}

/// Fails unless both hold the same bits.
pub fn assert_same_bits(what: &str, a: &Tensor, b: &Tensor) {
    assert_eq!(a.dims(), b.dims(), "{what}");
    let bits = |t: &Tensor| values(t).into_iter().map(f64::to_bits).collect::<Vec<_>>();
    assert_eq!(bits(a), bits(b), "{what}");
}

/// Reproducible numbers, roughly normal with mean 0 and deviation 1, in f32 precision.
pub fn noise(seed: u64, shape: &[usize]) -> Tensor {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678_9abc_def1;
    let mut uniform = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 11) as f64 / (1u64 << 53) as f64
    };
    let count: usize = shape.iter().product();
    let data: Vec<f64> = (0..count)
        .map(|_| ((0..4).map(|_| uniform()).sum::<f64>() - 2.0) * 3f64.sqrt())
        .map(|x| f64::from(x as f32))
        .collect();
    Tensor::from_vec(data, shape, &Device::Cpu).expect("a shape of that size")
}

/// Σ over the outputs of output · fixed noise: a loss that reaches every element of every output.
pub fn probe_loss(outputs: &[Tensor]) -> Result<Tensor> {
    let mut loss = Tensor::zeros((), outputs[0].dtype(), &Device::Cpu)?;
    for (i, output) in outputs.iter().enumerate() {
        let weight = noise(1000 + i as u64, output.dims()).to_dtype(output.dtype())?;
        loss = (loss + (output * weight)?.sum_all()?)?;
    }
    Ok(loss)
}

/// Outputs of `f`, and the gradient of every input under [`probe_loss`].
pub fn run_with_grads(
    inputs: &[Tensor],
    f: impl Fn(&[Tensor]) -> Result<Vec<Tensor>>,
) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
    let vars: Vec<Var> = inputs.iter().map(Var::from_tensor).collect::<Result<_>>()?;
    let args: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let outputs = f(&args)?;
    let grads = probe_loss(&outputs)?.backward()?;
    let grads = args.iter().map(|arg| grads.get(arg).expect("a gradient for every input").clone()).collect();
    Ok((outputs, grads))
}

/// Compares every gradient of `f` at f64 `inputs` with central differences; `names` are for the message.
///
/// Looks at up to 24 elements of each input, spread evenly.
pub fn check_gradients(
    names: &[&str],
    inputs: &[Tensor],
    bound: f64,
    f: impl Fn(&[Tensor]) -> Result<Vec<Tensor>>,
) {
    assert_eq!(names.len(), inputs.len());
    let (_, grads) = run_with_grads(inputs, &f).expect("forward and backward");
    let loss = |inputs: &[Tensor]| -> f64 {
        probe_loss(&f(inputs).expect("forward")).and_then(|l| l.to_scalar()).expect("a scalar")
    };
    for (i, name) in names.iter().enumerate() {
        let (x, grad) = (values(&inputs[i]), values(&grads[i]));
        let size = (grad.iter().map(|g| g * g).sum::<f64>() / grad.len() as f64).sqrt();
        let stride = x.len().div_ceil(24);
        for at in (0..x.len()).step_by(stride) {
            // Fourth-order differences: exact enough at a step that rounding does not disturb.
            let h = 1e-3 * x[at].abs().max(0.1);
            let shifted = |step: f64| {
                let mut x = x.clone();
                x[at] += step;
                let mut inputs = inputs.to_vec();
                inputs[i] = Tensor::from_vec(x, inputs[i].dims(), &Device::Cpu).expect("the same shape");
                loss(&inputs)
            };
            let near = shifted(h) - shifted(-h);
            let far = shifted(2.0 * h) - shifted(-2.0 * h);
            let want = (8.0 * near - far) / (12.0 * h);
            let error = (grad[at] - want).abs() / want.abs().max(size).max(1e-3);
            assert!(
                error <= bound,
                "gradient of {name}[{at}]: {} by backward, {want} by differences ({error:.1e})",
                grad[at]
            );
        }
    }
}
