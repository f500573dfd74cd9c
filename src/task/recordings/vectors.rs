//! Vectors of the user's own, from a safetensors file.
//!
//! The file holds `train`, `validation` and `test`, each [symbols, recordings, frames, channels], or one tensor
//! `vectors` that is shown in every part. Fewer dimensions will do: [symbols, recordings, channels] are recordings of
//! one frame, [symbols, channels] one vector for each symbol. Row i is the symbol with class id i (`#` is 0, `A` is 1);
//! more rows than symbols do no harm. Numbers are shown as they are.

use std::collections::HashMap;
use std::path::Path;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};

use super::Recordings;
use crate::ops::expand::Values;
use crate::{bad_input, bail_input, files};

/// The parts, in the order of [`super::Part`].
const PARTS: [&str; 3] = ["train", "validation", "test"];

/// The recordings of the first `symbols` rows, at most `most` of each in each part.
pub(super) fn load(path: &Path, symbols: usize, most: usize) -> Result<Recordings> {
    let parts = open(path)?;
    let (mut counts, mut values) = ([vec![], vec![], vec![]], Vec::new());
    let [_, _, frames, channels] = parts[0].0;
    for ((dims, part), counts) in parts.iter().zip(&mut counts) {
        let [rows, recordings, ..] = *dims;
        if rows < symbols {
            bail_input!("{} holds vectors of {rows} symbols; the task has {symbols}", path.display())
        }
        let shown = recordings.min(most);
        *counts = vec![shown; symbols];
        let shown = part.narrow(0, 0, symbols)?.narrow(1, 0, shown)?;
        values.extend(shown.flatten_all()?.to_vec1::<f32>()?);
    }
    if let Some(bad) = values.iter().find(|x| !x.is_finite()) {
        bail_input!("{} holds {bad}; vectors must be finite", path.display())
    }
    Recordings::new(frames, channels, counts, Values::Dense(values))
}

/// Numbers in a frame.
pub fn channels(path: &Path) -> Result<usize> {
    Ok(open(path)?[0].0[3])
}

/// The tensors of the three parts, each [symbols, recordings, frames, channels].
fn open(path: &Path) -> Result<[([usize; 4], Tensor); 3]> {
    let bytes = files::read(path, "the vectors that task.data names,")?;
    let tensors: HashMap<String, Tensor> = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)
        .map_err(|error| bad_input!("{} is no whole safetensors file ({error})", path.display()))?;
    let part = |name: &'static str| -> Result<([usize; 4], Tensor)> {
        let Some(tensor) = tensors.get(name).or_else(|| tensors.get("vectors")) else {
            bail_input!("{} holds no tensor `{name}`, nor one `vectors` for all parts", path.display())
        };
        let dims = match *tensor.dims() {
            [symbols, channels] => [symbols, 1, 1, channels],
            [symbols, recordings, channels] => [symbols, recordings, 1, channels],
            [symbols, recordings, frames, channels] => [symbols, recordings, frames, channels],
            _ => [0; 4],
        };
        if dims.contains(&0) {
            bail_input!(
                "the tensor for the {name} part in {} has shape {:?}; it must be (symbols, recordings, frames, \
                 channels), (symbols, recordings, channels) or (symbols, channels), none of them 0",
                path.display(),
                tensor.dims()
            )
        }
        Ok((dims, tensor.to_dtype(DType::F32)?.reshape(dims.to_vec())?))
    };
    let [train, validation, test] = PARTS;
    let parts = [part(train)?, part(validation)?, part(test)?];
    if parts.iter().any(|(dims, _)| dims[2..] != parts[0].0[2..]) {
        bail_input!("the tensors in {} must have the same frames and channels in all parts", path.display())
    }
    Ok(parts)
}
