//! The clock of a GPU.

use anyhow::Result;
use cudarc::driver::CudaEvent;
use cudarc::driver::sys::CUevent_flags;

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
