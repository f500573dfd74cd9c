//! Work that is captured once and then launched as one.

use anyhow::{Context, Result};
use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};

use super::Gpu;
use super::about::trim;

/// Runs `f` before it is captured: loads what it needs, and keeps what Candle copies from the host for it where a
/// captured launch will find it.
pub fn rehearse<T>(gpu: &Gpu, f: impl FnOnce() -> T) -> T {
    let _cache = gpu.cuda().enable_cuda_graph_htod_cache();
    f()
}

/// Captures what `f` puts on the stream, to be launched at once, again and again, with the same addresses.
///
/// `f` must have been [`rehearse`]d with the same sizes, and must let go of everything it allocates.
pub fn capture(gpu: &Gpu, f: impl FnOnce() -> Result<()>) -> Result<CudaGraph> {
    let stream = gpu.stream();
    let _cache = gpu.cuda().enable_cuda_graph_htod_cache();
    stream.synchronize()?;
    // A graph has its memory from a pool of its own.
    trim(gpu)?;
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
    let outcome = f();
    if outcome.is_err() {
        // Buffers freed inside of a spoilt capture leave errors behind, which the next call would give.
        let _ = stream.context().check_err();
    }
    // Also after an error: the stream must leave the capture.
    let graph = stream.end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH);
    if outcome.is_err() || graph.is_err() {
        let _ = stream.context().check_err();
    }
    outcome?;
    graph?.context("nothing was captured")
}
