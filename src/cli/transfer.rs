//! `selectivbench import` and `export`: weights in the names and shapes of the PyTorch layers.

use std::path::PathBuf;

use super::print;
use crate::checkpoint::{Checkpoint, Snapshot, read_tensors};
use crate::config::load::load;
use crate::files;

/// Make a checkpoint from weights of the PyTorch layers.
///
/// The weights are a safetensors file with the names and shapes of the PyTorch layers (`encoder.weight`,
/// `layers.0.in_proj.weight`, ...). The numbers of input features and classes come from them, all else
/// about the model from the configuration.
#[derive(clap::Args, Debug)]
pub struct ImportArgs {
    #[arg(long, value_name = "CONFIG.yaml")]
    config: PathBuf,
    /// Set a field of the configuration; may be given several times
    #[arg(long, value_name = "key.path=value")]
    set: Vec<String>,
    #[arg(long, value_name = "STATE.safetensors")]
    weights: PathBuf,
    /// The checkpoint to write
    #[arg(long, value_name = "CHECKPOINT")]
    out: PathBuf,
}

/// Write the weights of a checkpoint in the names and shapes of the PyTorch layers.
#[derive(clap::Args, Debug)]
pub struct ExportArgs {
    /// A run directory or a checkpoint file
    #[arg(value_name = "CHECKPOINT")]
    checkpoint: PathBuf,
    /// The weights to write
    #[arg(long, value_name = "STATE.safetensors")]
    out: PathBuf,
}

pub fn import(args: ImportArgs) -> anyhow::Result<()> {
    let config = load(&args.config, &args.set)?;
    let (tensors, _) = read_tensors(&args.weights, "the weights")?;
    files::check_writable(&args.out)?;
    let checkpoint = Checkpoint::from_weights(config, tensors)?;
    checkpoint.write(&args.out)?;
    print(format_args!(
        "{} with {} input features and {} classes is in {}",
        checkpoint.config.model.name,
        checkpoint.features,
        checkpoint.classes,
        args.out.display()
    ))
}

pub fn export(args: ExportArgs) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::open(&args.checkpoint)?;
    files::check_writable(&args.out)?;
    let tensors = checkpoint.tensors();
    Snapshot::of(tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)), vec![])?.write(&args.out)?;
    print(format_args!("{} tensors are in {}", tensors.len(), args.out.display()))
}
