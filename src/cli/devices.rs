//! `selectivbench devices`: what there is to compute on.

use candle_core::utils::cuda_is_available;
use serde_json::json;

use super::print;
use crate::device::{NO_CUDA, gpu_count, simd};

/// List the devices that --device can name.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  selectivbench devices
  selectivbench devices --json")]
pub struct DevicesArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: DevicesArgs) -> anyhow::Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads = rayon::current_num_threads();
    let simd = simd();
    let gpus = gpu_count();
    if args.json {
        let mut list = vec![json!({ "name": "cpu", "cores": cores, "threads": threads, "simd": simd })];
        list.extend((0..gpus).map(|index| json!({ "name": format!("cuda:{index}") })));
        let all = json!({ "devices": list, "cuda": cuda_is_available() });
        return print(serde_json::to_string_pretty(&all)?);
    }
    let simd = if simd.is_empty() { "no SIMD beyond the baseline".to_string() } else { simd.join(" ") };
    print(format_args!("cpu     {cores} cores, {threads} threads, {simd}"))?;
    for index in 0..gpus {
        print(format_args!("cuda:{index}"))?;
    }
    if !cuda_is_available() {
        print(NO_CUDA)?;
    } else if gpus == 0 {
        print("no GPU was found")?;
    }
    Ok(())
}
