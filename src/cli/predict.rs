//! `selectivbench predict`: logits of a checkpoint for given inputs.

use std::path::PathBuf;

use candle_core::{DType, Tensor};

use super::print;
use crate::checkpoint::{Checkpoint, Snapshot, read_tensors};
use crate::device::parse_device;
use crate::model::{Context, Input};
use crate::ops::no_grad;
use crate::train::evaluate;
use crate::{bad_input, bail_input, files};

/// Compute the logits of a checkpoint for inputs from a file.
///
/// Reads the tensor `x` of shape (batch, time, features) and writes the tensor `logits` of shape (batch,
/// time, classes), f32.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example:
  selectivbench predict runs/quickstart --input x.safetensors --output logits.safetensors")]
pub struct PredictArgs {
    /// A run directory or a checkpoint file
    #[arg(value_name = "CHECKPOINT")]
    checkpoint: PathBuf,
    #[arg(long, value_name = "IN.safetensors")]
    input: PathBuf,
    #[arg(long, value_name = "OUT.safetensors")]
    output: PathBuf,
    /// Where to compute: auto, cpu or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
}

pub fn run(args: PredictArgs) -> anyhow::Result<()> {
    let device = parse_device(&args.device)?;
    let checkpoint = Checkpoint::open(&args.checkpoint)?;
    let (tensors, _) = read_tensors(&args.input, "the input")?;
    let input = args.input.display();
    let x = tensors.get("x").ok_or_else(|| bad_input!("{input} holds no tensor `x`"))?;
    let (batch, steps) = match x.dims() {
        &[batch, steps, features] if features == checkpoint.features && batch > 0 && steps > 0 => {
            (batch, steps)
        }
        other => bail_input!(
            "x in {input} has shape {other:?}; it must be (batch, time, {}) with at least one of each",
            checkpoint.features
        ),
    };
    files::check_writable(&args.output)?;
    let net = checkpoint.model(&device)?;
    let train = &checkpoint.config.train;
    let chunk = evaluate::chunk(&checkpoint.config, &device);
    let mut rows = Vec::new();
    for first in (0..batch).step_by(train.eval_batch) {
        let x = x.narrow(0, first, train.eval_batch.min(batch - first))?;
        let mut context = Context::streaming();
        let pieces = (0..steps)
            .step_by(chunk)
            .map(|t| {
                let piece = x.narrow(1, t, chunk.min(steps - t))?.contiguous()?;
                let piece = piece.to_device(&device)?.to_dtype(net.dtype())?;
                no_grad(|| net.logits(Input::Dense(&piece), &mut context))?.to_dtype(DType::F32)
            })
            .collect::<candle_core::Result<Vec<Tensor>>>()?;
        rows.push(Tensor::cat(&pieces, 1)?);
    }
    let logits = Tensor::cat(&rows, 0)?;
    Snapshot::of([("logits", &logits)], vec![])?.write(&args.output)?;
    print(format_args!("logits of shape {:?} are in {}", logits.dims(), args.output.display()))
}
