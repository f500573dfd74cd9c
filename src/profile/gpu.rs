//! The clock of a GPU.

use anyhow::{Context, Result};
use cudarc::driver::sys::{CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaEvent, CudaGraph};

use crate::cuda::Gpu;

/// A stretch of work on the stream.
pub struct Stretch {
    begin: CudaEvent,
    end: CudaEvent,
}

impl Stretch {
    /// Waits for its end; in seconds.
    pub fn seconds(&self) -> Result<f64> {
        Ok(f64::from(self.begin.elapsed_ms(&self.end)?) / 1e3)
    }
}

/// A point on the stream that has a time.
pub fn mark(gpu: &Gpu) -> Result<CudaEvent> {
    Ok(gpu.stream().record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?)
}

/// The stretch between two marks.
pub fn between(begin: CudaEvent, end: CudaEvent) -> Stretch {
    Stretch { begin, end }
}

/// Runs `f` and measures what it puts on the stream.
pub fn stretch(gpu: &Gpu, f: impl FnOnce() -> Result<()>) -> Result<Stretch> {
    let begin = mark(gpu)?;
    f()?;
    Ok(Stretch { begin, end: mark(gpu)? })
}

/// Captures what `f` puts on the stream, to be launched at once.
pub fn capture(gpu: &Gpu, f: impl FnOnce() -> Result<()>) -> Result<CudaGraph> {
    let stream = gpu.stream();
    stream.synchronize()?;
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
