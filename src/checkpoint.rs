//! Checkpoints: weights under the names of the PyTorch layers, and what is needed to use them again.
//!
//! A checkpoint is a safetensors file. Its metadata holds `format` (the version of this layout),
//! `version` (of the program), `config` (resolved YAML) and `step` (updates made). The bytes are a function
//! of the contents.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;
use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

use crate::config::{self, Config};
use crate::device::number_format;
use crate::model::{self, RecNet};
use crate::task::Task;
use crate::{bad_input, bail_input, files};

/// The layout that this program writes and reads.
const FORMAT: &str = "1";

/// A checkpoint in memory.
pub struct Checkpoint {
    pub config: Config,
    /// Updates that were made.
    pub step: usize,
    /// Width of the input.
    pub features: usize,
    pub classes: usize,
    tensors: HashMap<String, Tensor>,
}

/// The checkpoint that a run directory or a file name stands for.
pub fn locate(path: &Path) -> PathBuf {
    if path.is_dir() { path.join("checkpoint.safetensors") } else { path.to_path_buf() }
}

impl Checkpoint {
    /// Reads the checkpoint of a run directory, or a checkpoint file.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let path = locate(path);
        let bytes = files::read(&path, "the checkpoint")?;
        let (tensors, metadata) = parse(&bytes, &path)?;
        let what = path.display();
        let field = |name: &str| {
            metadata.get(name).ok_or_else(|| {
                bad_input!(
                    "{what} holds tensors but no `{name}`: it is no checkpoint of this program; turn weights \
                     of the PyTorch layers into one with `selectivbench import`"
                )
            })
        };
        let format = field("format")?;
        if format != FORMAT {
            bail_input!(
                "{what} is a checkpoint of format {format} (written by version {}); this is version {} and reads \
                 format {FORMAT}",
                metadata.get("version").map_or("?", String::as_str),
                env!("CARGO_PKG_VERSION")
            )
        }
        let step = field("step")?
            .parse()
            .map_err(|_| bad_input!("{what} is damaged: its `step` is no whole number"))?;
        let config = config::load::parse(field("config")?, &format!("the configuration in {what}"), &[])?;
        Self::new(config, step, tensors).with_context(|| what.to_string())
    }

    /// Wraps weights of the PyTorch layers.
    pub fn from_weights(config: Config, tensors: HashMap<String, Tensor>) -> anyhow::Result<Self> {
        let checkpoint = Self::new(config, 0, tensors)?;
        checkpoint.model(&Device::Cpu)?;
        Ok(checkpoint)
    }

    /// Takes the sizes of the first and the last layer from the weights, and checks that all of them fit.
    fn new(config: Config, step: usize, tensors: HashMap<String, Tensor>) -> anyhow::Result<Self> {
        let dims = |name: &str| match tensors.get(name).map(Tensor::dims) {
            Some(&[rows, columns]) if rows > 0 && columns > 0 => Ok((rows, columns)),
            Some(other) => {
                Err(bad_input!("the tensor {name} has shape {other:?}; it must have two dimensions"))
            }
            None => Err(bad_input!("the weights lack the tensor {name}")),
        };
        let (features, classes) = (dims("encoder.weight")?.1, dims("decoder.weight")?.0);
        model::check_weights(&config.model, features, classes, &tensors)?;
        Ok(Self { config, step, features, classes, tensors })
    }

    /// The model with these weights.
    pub fn model(&self, device: &Device) -> anyhow::Result<RecNet> {
        let Self { config, features, classes, .. } = self;
        let dtype = match device {
            // Whatever it was trained in.
            Device::Cpu => DType::F32,
            gpu => number_format(config, gpu)?.dtype(),
        };
        let net = RecNet::new(&config.model, *features, *classes, config.seed, dtype, device)?;
        net.load(&self.tensors)?;
        Ok(net)
    }

    /// Refuses a task that the model, which was read from `path`, does not fit.
    pub fn check_task(&self, path: &Path, task: &Task) -> anyhow::Result<()> {
        if (task.features(), task.classes()) != (self.features, self.classes) {
            bail_input!(
                "{} takes {} input features and tells {} classes apart, but its task has {} of them and {} \
                 classes: it was trained on another one",
                path.display(),
                self.features,
                self.classes,
                task.features(),
                task.classes()
            )
        }
        Ok(())
    }

    /// The weights by name.
    pub fn tensors(&self) -> &HashMap<String, Tensor> {
        &self.tensors
    }

    /// The checkpoint of a model after `step` updates, to be written.
    pub fn snapshot(config: &Config, net: &RecNet, step: usize) -> anyhow::Result<Snapshot> {
        let tensors = net.params().named().map(|p| (p.name().to_string(), p.value())).collect();
        let (features, classes) = (net.features(), net.classes());
        Self { config: config.clone(), step, features, classes, tensors }.to_snapshot()
    }

    /// [`Checkpoint::snapshot`], written.
    pub fn save(path: &Path, config: &Config, net: &RecNet, step: usize) -> anyhow::Result<()> {
        Self::snapshot(config, net, step)?.write(path)
    }

    /// Writes the checkpoint.
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        self.to_snapshot()?.write(path)
    }

    fn to_snapshot(&self) -> anyhow::Result<Snapshot> {
        let metadata = vec![
            ("format", FORMAT.to_string()),
            ("version", env!("CARGO_PKG_VERSION").to_string()),
            ("config", self.config.to_yaml()),
            ("step", self.step.to_string()),
        ];
        Snapshot::of(self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)), metadata)
    }
}

/// Tensors by name in f32, and the metadata, of a safetensors file that the user named.
pub fn read_tensors(
    path: &Path,
    what: &str,
) -> anyhow::Result<(HashMap<String, Tensor>, HashMap<String, String>)> {
    parse(&files::read(path, what)?, path)
}

fn parse(bytes: &[u8], path: &Path) -> anyhow::Result<(HashMap<String, Tensor>, HashMap<String, String>)> {
    let broken = |error: &dyn std::fmt::Display| {
        bad_input!(
            "{} is no whole safetensors file ({error}): it may be cut off or of another kind",
            path.display()
        )
    };
    let file = SafeTensors::deserialize(bytes).map_err(|e| broken(&e))?;
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| broken(&e))?;
    let mut tensors = HashMap::new();
    for (name, view) in file.tensors() {
        let tensor = candle_core::safetensors::Load::load(&view, &Device::Cpu)
            .and_then(|tensor| in_f32(&tensor))
            .map_err(|e| bad_input!("the tensor {name} in {} cannot be used: {e}", path.display()))?;
        tensors.insert(name, tensor);
    }
    Ok((tensors, header.metadata().clone().unwrap_or_default()))
}

/// The tensor in f32; fails where that would lose something.
fn in_f32(tensor: &Tensor) -> candle_core::Result<Tensor> {
    let single = tensor.to_dtype(DType::F32)?;
    if tensor.dtype() == DType::F64 {
        let values = |tensor: &Tensor| tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
        if values(&single)?.iter().zip(values(tensor)?).any(|(a, b)| *a != b && !b.is_nan()) {
            candle_core::bail!("it holds f64 numbers that f32 cannot hold; convert it to f32 first")
        }
    }
    Ok(single)
}

/// f32 tensors and metadata on their way into a safetensors file, apart from what training goes on to change.
pub struct Snapshot {
    tensors: Vec<(String, Vec<usize>, Vec<f32>)>,
    metadata: Vec<(&'static str, String)>,
}

impl Snapshot {
    /// Copies the tensors to memory of its own.
    pub fn of<'a>(
        tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
        metadata: Vec<(&'static str, String)>,
    ) -> anyhow::Result<Self> {
        let copy = |(name, tensor): (&str, &Tensor)| {
            // A buffer of its own first: to bring a view to the host Candle brings all of the buffer behind it.
            let values = tensor.force_contiguous()?.flatten_all()?.to_vec1::<f32>()?;
            Ok((name.to_string(), tensor.dims().to_vec(), values))
        };
        let tensors = tensors.into_iter().map(copy).collect::<candle_core::Result<_>>()?;
        Ok(Self { tensors, metadata })
    }

    /// Writes the file; its bytes depend on nothing else.
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        let bytes = |values: &[f32]| -> Vec<u8> { values.iter().flat_map(|x| x.to_le_bytes()).collect() };
        let tensors: Vec<_> =
            self.tensors.iter().map(|(name, shape, values)| (name, shape, bytes(values))).collect();
        let views = tensors
            .iter()
            .map(|(name, shape, bytes)| {
                Ok((*name, TensorView::new(safetensors::Dtype::F32, shape.to_vec(), bytes)?))
            })
            .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
        let metadata = self.metadata.iter().map(|(key, value)| (key.to_string(), value.clone())).collect();
        let mut bytes = safetensors::serialize(views, Some(metadata))?;
        sort_metadata(&mut bytes)?;
        files::write_atomic(path, |out| out.write_all(&bytes))
    }
}

/// Writes snapshots while training goes on, one at a time.
#[derive(Default)]
pub struct Writer {
    running: Option<JoinHandle<anyhow::Result<Written>>>,
    /// The disk is left alone until then.
    rest: Option<Instant>,
}

struct Written {
    end: Instant,
    took: Duration,
}

impl Writer {
    /// Begins to write a file, once the one before is written; fails if that failed.
    pub fn put(&mut self, path: PathBuf, snapshot: Snapshot) -> anyhow::Result<()> {
        self.wait()?;
        self.running = Some(std::thread::spawn(move || {
            let begin = Instant::now();
            snapshot.write(&path)?;
            let end = Instant::now();
            Ok(Written { end, took: end - begin })
        }));
        Ok(())
    }

    /// Whether to write now what can wait: writing takes a tenth of the time at most, so that a slow disk does not
    /// hold up whatever else goes to it. Fails if the file before could not be written.
    pub fn is_free(&mut self) -> anyhow::Result<bool> {
        if self.running.as_ref().is_some_and(|running| !running.is_finished()) {
            return Ok(false);
        }
        self.wait()?;
        Ok(self.rest.is_none_or(|rest| Instant::now() >= rest))
    }

    /// Waits until everything is written.
    pub fn wait(&mut self) -> anyhow::Result<()> {
        match self.running.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(result)) => {
                let Written { end, took } = result?;
                self.rest = Some(end + 9 * took);
                Ok(())
            }
            Some(Err(panic)) => std::panic::resume_unwind(panic),
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // An error has nowhere to go from here; what fails before is told by `put` and `wait`.
        let _ = self.running.take().map(JoinHandle::join);
    }
}

/// The library writes metadata in the random order of a hash map: brings it into the order of its keys.
fn sort_metadata(bytes: &mut [u8]) -> anyhow::Result<()> {
    let (size, rest) = bytes.split_at_mut(8);
    let size = u64::from_le_bytes(size.try_into().expect("eight bytes")) as usize;
    let header = &mut rest[..size];
    let mut value: serde_json::Value = serde_json::from_slice(header)?;
    let metadata = value["__metadata__"].take();
    let sorted: BTreeMap<String, String> = serde_json::from_value(metadata)?;
    value["__metadata__"] = serde_json::to_value(sorted)?;
    let sorted = serde_json::to_vec(&value)?;
    // The same entries in another order take the same room.
    anyhow::ensure!(sorted.len() <= size, "the header of a safetensors file grew");
    header.fill(b' ');
    header[..sorted.len()].copy_from_slice(&sorted);
    Ok(())
}
