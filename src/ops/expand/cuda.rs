//! Launching `kernels/expand.cu`.

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor};

use super::{Compact, Noise, Show, Values};
use crate::cuda::{Gpu, Launch, NULL, kernels, suffix};
use crate::ops::upload::upload;

const THREADS: usize = 256;

/// Samples padded to the longest, or a window of their timesteps, on a GPU.
#[derive(Clone, Debug)]
pub struct DeviceBatch {
    pub batch: usize,
    pub steps: usize,
    /// Elements of the longest sample, of all its timesteps.
    pub elements: usize,
    pub features: usize,
    /// [B, T] u32: class id of the symbol shown, or the row of the table of recordings; `BLANK` where there is none.
    pub ids: Tensor,
    /// [B, T] u32: label of the element that a step belongs to.
    pub labels: Tensor,
    /// [B, T] u32: index of that element; `PAD` on padding, and until a recording's last frame.
    pub element: Tensor,
    /// [B, T, V]: symbols plus noise; none where that is one-hot symbols alone.
    pub dense: Option<Tensor>,
    /// Steps of each sample in the window.
    pub lengths: Vec<usize>,
    /// Index of the first sample in its part of the data.
    pub first: u64,
}

impl DeviceBatch {
    /// A batch whose tensors are for [`DeviceSamples::fill`] to write, again and again at the same place:
    /// what a captured graph reads. `dense` is the type of an input that is more than one-hot symbols.
    pub fn empty(
        device: &Device,
        (batch, steps): (usize, usize),
        elements: usize,
        features: usize,
        dense: Option<DType>,
    ) -> Result<Self> {
        let gpu = Gpu::new(device)?;
        let ids = || Ok::<_, candle_core::Error>(gpu.empty((batch, steps), DType::U32)?.into_tensor());
        let dense = dense.map(|dtype| gpu.empty((batch, steps, features), dtype)).transpose()?;
        Ok(Self {
            batch,
            steps,
            elements,
            features,
            ids: ids()?,
            labels: ids()?,
            element: ids()?,
            dense: dense.map(crate::ops::tape::Value::into_tensor),
            lengths: vec![0; batch],
            first: 0,
        })
    }

    /// Steps that are no padding.
    pub fn valid_steps(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// Samples `range` with the padding of the whole; views, nothing is copied.
    pub fn rows(&self, range: Range<usize>) -> Result<Self> {
        let cut = |tensor: &Tensor| tensor.narrow(0, range.start, range.len());
        Ok(Self {
            batch: range.len(),
            ids: cut(&self.ids)?,
            labels: cut(&self.labels)?,
            element: cut(&self.element)?,
            dense: self.dense.as_ref().map(cut).transpose()?,
            lengths: self.lengths[range.clone()].to_vec(),
            first: self.first + range.start as u64,
            ..*self
        })
    }
}

/// A table of recordings on a GPU.
#[derive(Clone)]
pub(super) enum DeviceTable {
    Dense(Tensor),
    Counts { starts: Tensor, entries: Tensor },
}

impl DeviceTable {
    pub(super) fn send(values: &Values, gpu: &Gpu) -> Result<Self> {
        let device = gpu.device();
        Ok(match values {
            Values::Dense(values) => Self::Dense(Tensor::from_slice(values, values.len(), &device)?),
            Values::Counts { starts, entries } => Self::Counts {
                starts: Tensor::from_slice(starts, starts.len(), &device)?,
                // An allocation of no bytes fails.
                entries: match entries.len() {
                    0 => Tensor::zeros(1, DType::U32, &device)?,
                    count => Tensor::from_slice(entries, count, &device)?,
                },
            },
        })
    }
}

/// Several samples on a GPU, to be spread over timesteps window by window.
pub struct DeviceSamples {
    gpu: Gpu,
    packed: Tensor,
    compact: Compact,
    table: Option<DeviceTable>,
    /// Type of an input that is more than one-hot symbols.
    dtype: DType,
    /// Timesteps done.
    at: usize,
}

impl DeviceSamples {
    /// Sends the samples to the GPU, in one copy that the host does not wait for; the table of recordings, if there
    /// is one, only with the first. An input that is more than one-hot symbols will have the type `dtype`.
    pub fn upload(mut compact: Compact, dtype: DType, device: &Device) -> Result<Self> {
        let gpu = Gpu::new(device)?;
        let words = std::mem::take(&mut compact.words);
        let packed = upload(&gpu, &words, words.len())?;
        let table = compact.show.table.as_ref().map(|table| table.on(&gpu)).transpose()?;
        Ok(Self { gpu, packed, compact, table, dtype, at: 0 })
    }

    /// What is known of the samples on the host: lengths, elements, width of the input.
    pub fn compact(&self) -> &Compact {
        &self.compact
    }

    /// Timesteps done.
    pub fn at(&self) -> usize {
        self.at
    }

    /// Whether the first timesteps can come once more: noise that the host draws comes once.
    pub fn can_rewind(&self) -> bool {
        !matches!(self.compact.noise, Noise::Drawn(_))
    }

    /// Goes back to the first timestep.
    pub fn rewind(&mut self) {
        self.at = 0;
    }

    /// The next `len` timesteps of all samples, fewer at the end; none when all are done.
    ///
    /// Element indices and `elements` are those of the whole samples, `lengths` those of the window.
    pub fn next_window(&mut self, len: usize) -> Result<Option<DeviceBatch>> {
        let steps = len.min(self.compact.steps() - self.at.min(self.compact.steps()));
        if steps == 0 {
            return Ok(None);
        }
        let Compact { elements, features, .. } = self.compact;
        let dense = self.compact.is_dense().then_some(self.dtype);
        let shape = (self.compact.batch(), steps);
        let mut window = DeviceBatch::empty(&self.gpu.device(), shape, elements, features, dense)?;
        self.fill(&mut window)?;
        Ok(Some(window))
    }

    /// The next `batch.steps` timesteps, into the tensors of `batch`; after the end they are padding. Gives
    /// whether there were any.
    pub fn fill(&mut self, window: &mut DeviceBatch) -> Result<bool> {
        let gpu = &self.gpu;
        let (batch, steps, features) = (self.compact.batch(), window.steps, self.compact.features);
        if window.batch != batch
            || window.elements < self.compact.elements
            || window.features != features
            || window.dense.is_some() != self.compact.is_dense()
        {
            candle_core::bail!(
                "expand: {batch} samples of {} elements do not fit a batch of {} of {}, or noise, recordings or width \
                 differ",
                self.compact.elements,
                window.batch,
                window.elements
            )
        }
        let Ok(at) = u32::try_from(self.at) else {
            candle_core::bail!("expand: samples are longer than {} timesteps", u32::MAX)
        };
        let Show { frames, .. } = self.compact.show;
        gpu.launch(
            &kernels::EXPAND,
            "expand_window_u32",
            Launch::grid(steps.div_ceil(THREADS), batch, 1, THREADS as u32),
            &[
                gpu.ptr(&self.packed)?,
                gpu.ptr(&window.ids)?,
                gpu.ptr(&window.labels)?,
                gpu.ptr(&window.element)?,
                batch.into(),
                self.compact.total.into(),
                steps.into(),
                at.into(),
                frames.into(),
            ],
        )?;
        if let Some(dense) = &window.dense {
            /// Elements that a block writes, as in the kernel.
            const TILE: usize = 4096;
            let (level, drawn) = match &mut self.compact.noise {
                Noise::Drawn(draw) => (0.0, Some(upload(gpu, &draw(steps), dense.shape())?)),
                Noise::ByPosition { level } => (*level, None),
                Noise::None => (0.0, None),
            };
            let [values, starts, entries] = match &self.table {
                None => [NULL; 3],
                Some(DeviceTable::Dense(values)) => [gpu.ptr(values)?, NULL, NULL],
                Some(DeviceTable::Counts { starts, entries }) => [NULL, gpu.ptr(starts)?, gpu.ptr(entries)?],
            };
            gpu.launch(
                &kernels::EXPAND,
                &format!("expand_dense_{}", suffix(dense.dtype())?),
                Launch::new(dense.elem_count().div_ceil(TILE), THREADS as u32),
                &[
                    gpu.ptr(&self.packed)?,
                    gpu.ptr(&window.ids)?,
                    drawn.as_ref().map_or(Ok(NULL), |drawn| gpu.ptr(drawn))?,
                    values,
                    starts,
                    entries,
                    gpu.ptr(dense)?,
                    batch.into(),
                    steps.into(),
                    features.into(),
                    at.into(),
                    level.into(),
                ],
            )?;
        }
        let done = self.at;
        self.at += steps;
        window.lengths =
            self.compact.lengths.iter().map(|&length| length.saturating_sub(done).min(steps)).collect();
        window.first = self.compact.first;
        Ok(window.valid_steps() > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::sets_of_samples;
    use super::*;
    use crate::task::{BLANK, Batch, PAD};

    fn same(window: &DeviceBatch, expected: &Batch, name: &str) {
        let shape = (expected.batch, expected.steps);
        for (got, want) in [
            (&window.ids, expected.indices()),
            (&window.labels, &expected.labels[..]),
            (&window.element, &expected.element[..]),
        ] {
            assert_eq!(got.dims2().unwrap(), shape, "{name}");
            assert_eq!(&got.flatten_all().unwrap().to_vec1::<u32>().unwrap(), want, "{name}");
        }
        assert_eq!(window.lengths, expected.lengths, "{name}");
        assert_eq!((window.elements, window.first), (expected.elements, expected.first), "{name}");
        assert_eq!(window.dense.is_some(), expected.is_dense(), "{name}");
        if let Some(dense) = &window.dense {
            let want = Tensor::from_vec(expected.dense(), dense.shape(), &Device::Cpu).unwrap();
            let want = want.to_dtype(dense.dtype()).unwrap();
            let bits = |x: &Tensor| {
                let x = x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
                x.flatten_all().unwrap().to_vec1::<f32>().unwrap()
            };
            assert_eq!(bits(dense), bits(&want), "{name}");
        }
    }

    #[test]
    fn windows_on_the_gpu_are_those_of_the_cpu() {
        let Ok(device) = Device::new_cuda(0) else {
            eprintln!("skipped: no GPU");
            return;
        };
        crate::cuda::poison(true);
        for (name, samples) in sets_of_samples() {
            for (dtype, len) in [(DType::F32, 9), (DType::BF16, 9), (DType::F32, 1000)] {
                let mut expected = samples();
                let mut windows =
                    DeviceSamples::upload(samples().compact().unwrap(), dtype, &device).unwrap();
                while let Some(batch) = expected.next_window(len) {
                    let window = windows.next_window(len).unwrap().unwrap();
                    same(&window, &batch, name);
                    same(&window.rows(2..5).unwrap(), &batch.rows(2..5), name);
                }
                assert!(windows.next_window(len).unwrap().is_none());
            }
            // Into tensors that were there before, longer than the samples: padding follows.
            let compact = samples().compact().unwrap();
            let dense = compact.is_dense().then_some(DType::F32);
            let (steps, elements, features) = (compact.steps() + 3, compact.elements(), compact.features());
            let mut window =
                DeviceBatch::empty(&device, (compact.batch(), steps), elements, features, dense).unwrap();
            let mut windows = DeviceSamples::upload(compact, DType::F32, &device).unwrap();
            assert!(windows.fill(&mut window).unwrap());
            let mut batch = samples().into_batch();
            let pad = |x: &[u32], with: u32| -> Vec<u32> {
                x.chunks(steps - 3).flat_map(|row| row.iter().copied().chain([with; 3])).collect()
            };
            batch.symbols = pad(&batch.symbols, BLANK);
            if let Some(shown) = &mut batch.shown {
                shown.rows = pad(&shown.rows, BLANK);
            }
            batch.labels = pad(&batch.labels, 0);
            batch.element = pad(&batch.element, PAD);
            batch.noise = batch.noise.map(|noise| {
                let rows = noise.chunks((steps - 3) * features);
                rows.flat_map(|row| row.iter().copied().chain(vec![0.0; 3 * features])).collect()
            });
            batch.steps = steps;
            same(&window, &batch, name);
            assert!(!windows.fill(&mut window).unwrap());
        }
    }
}
