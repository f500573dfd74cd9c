//! Launching `kernels/optim.cu`: the norm, and an update that the host need not wait for.

use candle_core::{DType, Device, Result, Tensor};

use super::AdamStep;
use crate::cuda::{Gpu, KernelArg, Launch, NULL, kernels, suffix};
use crate::ops::upload::{upload, write};

const THREADS: usize = 256;

/// The sum of the squares of all elements in f64, one number on the device.
pub fn sum_of_squares(x: &Tensor) -> Result<Tensor> {
    /// Partial sums: four blocks to a multiprocessor of an H100.
    const BLOCKS: usize = 528;
    /// Elements of a thread, if there are few.
    const EACH: usize = 8;
    let gpu = Gpu::of(x)?;
    let n = x.elem_count();
    let blocks = n.div_ceil(THREADS * EACH).clamp(1, BLOCKS);
    let (part, total) = (gpu.empty(blocks, DType::F64)?, gpu.empty(1, DType::F64)?);
    gpu.launch(
        &kernels::OPTIM,
        &format!("optim_squares_{}", suffix(x.dtype())?),
        Launch::new(blocks, THREADS as u32),
        &[gpu.ptr(x)?, gpu.of_value(&part)?, (n as i64).into()],
    )?;
    gpu.launch(
        &kernels::OPTIM,
        "optim_total_f64",
        Launch::new(1, THREADS as u32),
        &[gpu.of_value(&part)?, gpu.of_value(&total)?, blocks.into()],
    )?;
    Ok(total.into_tensor())
}

/// The flat buffers of an update, of equal length: f32, and the shadow bf16.
pub struct Flat<'a> {
    pub value: &'a Tensor,
    pub grad: &'a Tensor,
    pub m: &'a Tensor,
    pub v: &'a Tensor,
    /// Becomes a copy of the new values.
    pub shadow: Option<&'a Tensor>,
}

/// Clipping and Adam or AdamW, with everything that changes from step to step in the memory of the GPU: the
/// launch of one step serves all of them.
pub struct DeviceAdam {
    settings: AdamStep,
    clip: f64,
    /// [`AdamStep::factors`], and the largest norm.
    step: Tensor,
}

impl DeviceAdam {
    /// `settings` without its `lr`, `step` and `grad_scale`; `clip` is the largest norm of a gradient.
    pub fn new(settings: AdamStep, clip: f64, device: &Device) -> Result<Self> {
        let step = Gpu::new(device)?.zeros(4, DType::F64)?.into_tensor();
        Ok(Self { settings, clip, step })
    }

    /// Tells the GPU the learning rate and the number, from 1, of the updates launched from here on. Not part
    /// of a captured step.
    pub fn set_step(&self, lr: f64, step: u64) -> Result<()> {
        if step == 0 {
            candle_core::bail!("adam: updates are numbered from 1")
        }
        let [size, root, keep] = AdamStep { lr, step, ..self.settings }.factors();
        write(&Gpu::of(&self.step)?, &[size, root, keep, self.clip], &self.step)
    }

    /// Updates the buffers in place. `squares` is the [`sum_of_squares`] of the gradient, `loss` one number in
    /// f32; if one of them is not finite, or the number `halted`, f64, is not zero, nothing is touched.
    pub fn apply(&self, flat: &Flat, squares: &Tensor, loss: &Tensor, halted: &Tensor) -> Result<()> {
        if squares.dtype() != DType::F64 || loss.dtype() != DType::F32 || halted.dtype() != DType::F64 {
            candle_core::bail!(
                "adam: expected the sum of squares in f64, the loss in f32 and what halts in f64, got {:?}, {:?} and {:?}",
                squares.dtype(),
                loss.dtype(),
                halted.dtype()
            )
        }
        let gpu = Gpu::of(flat.value)?;
        launch(&gpu, &self.settings, flat, &self.step, [gpu.ptr(squares)?, gpu.ptr(loss)?, gpu.ptr(halted)?])
    }
}

/// [`AdamStep::apply`] on a GPU.
pub fn apply(step: &AdamStep, flat: &Flat) -> Result<()> {
    let gpu = Gpu::of(flat.value)?;
    let [size, root, keep] = step.factors();
    let numbers = upload(&gpu, &[size, root, keep, step.grad_scale], 4)?;
    launch(&gpu, step, flat, &numbers, [NULL; 3])
}

/// `asked`: the sum of squares, the loss and what halts, or null.
fn launch(
    gpu: &Gpu,
    settings: &AdamStep,
    flat: &Flat,
    step: &Tensor,
    [squares, loss, halted]: [KernelArg; 3],
) -> Result<()> {
    /// Blocks that a multiprocessor holds at a time.
    const RESIDENT: usize = 5;
    let Flat { value, grad, m, v, shadow } = *flat;
    let n = value.elem_count();
    let fits = |x: &Tensor, dtype| x.dtype() == dtype && x.elem_count() == n;
    if ![value, grad, m, v].into_iter().all(|x| fits(x, DType::F32))
        || !shadow.is_none_or(|shadow| fits(shadow, DType::BF16))
    {
        candle_core::bail!("adam: expected {n} values, gradients and moments in f32, and a copy in bf16")
    }
    let blocks = n.div_ceil(4 * THREADS).min(RESIDENT * gpu.multiprocessors());
    gpu.launch(
        &kernels::OPTIM,
        "optim_adam_f32",
        Launch::new(blocks, THREADS as u32),
        &[
            gpu.ptr(value)?,
            gpu.ptr(grad)?,
            gpu.ptr(m)?,
            gpu.ptr(v)?,
            gpu.ptr_or_null(shadow)?,
            gpu.ptr(step)?,
            squares,
            loss,
            halted,
            (n as i64).into(),
            ((1.0 - settings.beta1) as f32).into(),
            (settings.beta2 as f32).into(),
            ((1.0 - settings.beta2) as f32).into(),
            (settings.eps as f32).into(),
            settings.l2::<f32>().into(),
        ],
    )
}

#[cfg(test)]
mod tests {
    use super::super::{clip_scale, global_norm};
    use super::*;

    #[test]
    fn updates_have_the_bits_of_the_cpu() {
        let Ok(device) = Device::new_cuda(0) else {
            eprintln!("skipped: no GPU");
            return;
        };
        crate::cuda::poison(true);
        let list = |x: &Tensor| {
            x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap()
        };
        for (n, decoupled) in [(1, false), (1023, true), (100_003, false), (100_003, true)] {
            let wave = |a: f64, b: f64| -> Tensor {
                let x: Vec<f32> = (0..n).map(|i| (a * (b * i as f64).sin()) as f32).collect();
                Tensor::from_vec(x, n, &Device::Cpu).unwrap()
            };
            let cpu = [wave(1.0, 1.3), wave(3.0, 0.7), wave(0.1, 2.1), wave(0.1, 1.1).sqr().unwrap()];
            let there: Vec<Tensor> = cpu.iter().map(|x| x.to_device(&device).unwrap()).collect();
            let shadow = there[0].to_dtype(DType::BF16).unwrap();
            let norm = global_norm(&cpu[1]).unwrap();
            assert!((global_norm(&there[1]).unwrap() / norm - 1.0).abs() < 1e-13);
            let step = AdamStep {
                lr: 1e-2,
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
                weight_decay: 0.1,
                decoupled,
                step: 3,
                grad_scale: clip_scale(norm, 1.0),
            };
            let adam = DeviceAdam::new(step, 1.0, &device).unwrap();
            adam.set_step(1e-2, 3).unwrap();
            let flat =
                Flat { value: &there[0], grad: &there[1], m: &there[2], v: &there[3], shadow: Some(&shadow) };
            let one = |x: f32| Tensor::new(&[x], &device).unwrap();
            let squares = sum_of_squares(&there[1]).unwrap();
            let number = |x: f64| Tensor::new(&[x], &device).unwrap();
            adam.apply(&flat, &squares, &one(f32::NAN), &number(0.0)).unwrap();
            adam.apply(&flat, &number(f64::INFINITY), &one(1.0), &number(0.0)).unwrap();
            adam.apply(&flat, &squares, &one(1.0), &number(1.0)).unwrap();
            for (x, y) in cpu.iter().zip(&there) {
                assert_eq!(list(x), list(y), "nothing is touched");
            }
            adam.apply(&flat, &squares, &one(1.0), &number(0.0)).unwrap();
            step.apply(&cpu[0], &cpu[1], &cpu[2], &cpu[3]).unwrap();
            for (x, y) in cpu.iter().zip(&there) {
                assert_eq!(list(x), list(y));
            }
            assert_eq!(list(&shadow), list(&cpu[0].to_dtype(DType::BF16).unwrap()));
            // Without clipping on the GPU.
            step.apply(&there[0], &there[1], &there[2], &there[3]).unwrap();
            step.apply(&cpu[0], &cpu[1], &cpu[2], &cpu[3]).unwrap();
            for (x, y) in cpu.iter().zip(&there) {
                assert_eq!(list(x), list(y));
            }
        }
    }
}
