//! Repeated measurements, and the two ceilings of a device.

use std::time::Instant;

use anyhow::{Error, Result};
#[cfg(feature = "cuda")]
use candle_core::DType;
use candle_core::{Device, Tensor};
use rayon::prelude::*;
use serde::Serialize;

use crate::check::Route;
#[cfg(feature = "cuda")]
use crate::cuda::{Gpu, graph};

/// Seconds of one call.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Timing {
    pub median: f64,
    pub least: f64,
    pub most: f64,
    /// Calls between two looks at the clock.
    pub calls: usize,
}

impl Timing {
    /// Of rounds of `calls` calls each.
    pub(super) fn of(mut rounds: Vec<f64>, calls: usize) -> Self {
        rounds.sort_by(f64::total_cmp);
        let call = |i: usize| rounds[i] / calls as f64;
        Self { median: call(rounds.len() / 2), least: call(0), most: call(rounds.len() - 1), calls }
    }

    /// How far the rounds lie apart, as a share of the median.
    pub fn spread(&self) -> f64 {
        (self.most - self.least) / self.median
    }
}

/// The clock of a device.
pub enum Clock {
    Host,
    #[cfg(feature = "cuda")]
    Gpu(Gpu),
}

impl Clock {
    pub fn of(device: &Device) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if device.is_cuda() {
            return Ok(Clock::Gpu(Gpu::new(device)?));
        }
        let _ = device;
        Ok(Clock::Host)
    }

    /// Seconds that `f` takes, or what it puts on the stream.
    pub fn seconds(&self, f: impl FnOnce() -> Result<()>) -> Result<f64> {
        match self {
            Clock::Host => {
                let begin = Instant::now();
                f()?;
                Ok(begin.elapsed().as_secs_f64())
            }
            #[cfg(feature = "cuda")]
            Clock::Gpu(gpu) => super::gpu::stretch(gpu, f)?.seconds(),
        }
    }

    /// Rounds, the time that one should take at least, and the time for which calls of a millisecond or more are made
    /// before: a GPU at its power limit takes a while to settle on a clock.
    fn plan(&self) -> (usize, f64, f64) {
        match self {
            Clock::Host => (5, 0.0, 0.0),
            #[cfg(feature = "cuda")]
            Clock::Gpu(_) => (11, 0.01, 0.3),
        }
    }

    /// Time of one of the `sets` calls that `all` makes.
    pub fn time(&self, sets: usize, mut all: impl FnMut() -> Result<()>) -> Result<Timing> {
        let (rounds, least, settle) = self.plan();
        self.seconds(&mut all)?;
        let once = self.seconds(&mut all)?;
        if once >= 1e-3 {
            self.seconds(|| (0..(settle / once) as usize).try_for_each(|_| all()))?;
        }
        let repeats = ((least / once.max(1e-7)).ceil() as usize).clamp(1, 2000);
        let times = (0..rounds)
            .map(|_| self.seconds(|| (0..repeats).try_for_each(|_| all())))
            .collect::<Result<Vec<_>>>()?;
        Ok(Timing::of(times, repeats * sets))
    }

    /// [`Clock::time`] with everything that `all` launches captured and launched as one; `None` where that
    /// cannot be.
    pub fn time_graph(&self, sets: usize, mut all: impl FnMut() -> Result<()>) -> Result<Option<Timing>> {
        #[cfg(feature = "cuda")]
        if let Clock::Gpu(gpu) = self {
            graph::rehearse(gpu, &mut all)?;
            return match graph::capture(gpu, &mut all) {
                Ok(graph) => self.time(sets, || graph.launch().map_err(Error::from)).map(Some),
                Err(_) => {
                    // An error inside of a capture is of no consequence for the stream.
                    gpu.stream().synchronize()?;
                    Ok(None)
                }
            };
        }
        let _ = (sets, &mut all);
        Ok(None)
    }
}

/// What a device reaches at best.
#[derive(Clone, Debug, Serialize)]
pub struct Ceilings {
    /// Bytes read and written per second by a large copy.
    pub copy: f64,
    /// Operations per second of a large matrix product, for each route.
    pub matmul: Vec<(Route, f64)>,
}

impl Ceilings {
    /// Measures them for these routes and for f32.
    pub fn measure(device: &Device, routes: &[Route]) -> Result<Self> {
        let clock = Clock::of(device)?;
        let (bytes, side) = if device.is_cuda() { (2usize << 30, 8192) } else { (1usize << 28, 2048) };
        let copy = copy(&clock, device, bytes)?;
        let mut matmul = vec![];
        for route in Route::ALL.into_iter().filter(|route| *route == Route::F32 || routes.contains(route)) {
            let random = || Tensor::randn(0f32, 1.0, (side, side), device)?.to_dtype(route.dtype());
            let (a, b) = (random()?, random()?);
            route.select();
            let time = clock.time(1, || a.matmul(&b).map(drop).map_err(Error::from));
            Route::F32.select();
            matmul.push((route, 2.0 * (side as f64).powi(3) / time?.median));
        }
        Ok(Self { copy: 2.0 * bytes as f64 / copy, matmul })
    }

    /// Operations per second on a route; of f32 for what is no matrix product.
    pub fn operations(&self, route: Route, matrices: bool) -> f64 {
        let of = |wanted| self.matmul.iter().find(|(route, _)| *route == wanted).map(|(_, rate)| *rate);
        matrices.then(|| of(route)).flatten().or(of(Route::F32)).unwrap_or(f64::NAN)
    }
}

/// Seconds that a copy of so many bytes takes.
fn copy(clock: &Clock, device: &Device, bytes: usize) -> Result<f64> {
    #[cfg(feature = "cuda")]
    if let Clock::Gpu(gpu) = clock {
        let from = Tensor::ones(bytes / 4, DType::F32, device)?;
        return Ok(clock.time(1, || gpu.copy(&from, from.shape()).map(drop).map_err(Error::from))?.median);
    }
    let _ = device;
    const BLOCK: usize = 1 << 16;
    let (from, mut to) = (vec![1u64; bytes / 8], vec![0u64; bytes / 8]);
    let time = clock.time(1, || {
        to.par_chunks_mut(BLOCK).zip(from.par_chunks(BLOCK)).for_each(|(to, from)| to.copy_from_slice(from));
        std::hint::black_box(&mut to);
        Ok(())
    })?;
    Ok(time.median)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timing_is_the_median_of_its_rounds() {
        let timing = Timing::of(vec![5.0, 1.0, 3.0, 2.0, 4.0], 2);
        assert_eq!((timing.median, timing.least, timing.most), (1.5, 0.5, 2.5));
        assert!((timing.spread() - 4.0 / 3.0).abs() < 1e-12);
    }

    #[test]
    fn ops_without_matrix_products_are_held_against_f32() {
        let ceilings = Ceilings { copy: 1.0, matmul: vec![(Route::F32, 50.0), (Route::Bf16, 800.0)] };
        assert_eq!(ceilings.operations(Route::Bf16, true), 800.0);
        assert_eq!(ceilings.operations(Route::Bf16, false), 50.0);
        assert_eq!(ceilings.operations(Route::Tf32, true), 50.0);
    }
}
