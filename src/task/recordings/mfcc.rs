//! Mel-frequency cepstral coefficients of one second of sound, by the settings of the authors' code.
//!
//! 16 kHz; frames of 25 ms every 10 ms under a periodic Hann window, centred in an FFT of 512, the signal mirrored at
//! both ends; power; 40 triangular filters, equally wide on the mel scale 2595 log₁₀(1 + f / 700) from 0 to 8 kHz;
//! decibels, no lower than 80 below the loudest of the recording; orthonormal DCT-II, the first 13 coefficients.
//! (`torchaudio.transforms.MFCC` with these numbers, Davis and Mermelstein 1980.)

use std::f64::consts::PI;
use std::sync::Arc;

use realfft::{RealFftPlanner, RealToComplex};

/// Samples a second, and in a recording.
pub const RATE: usize = 16_000;
/// Coefficients of a frame.
pub const COEFFICIENTS: usize = 13;
/// Frames of a recording.
pub const FRAMES: usize = RATE / HOP + 1;

const FFT: usize = 512;
const WINDOW: usize = RATE / 40;
const HOP: usize = RATE / 100;
const MELS: usize = 40;

/// The tables of the transform.
pub struct Mfcc {
    fft: Arc<dyn RealToComplex<f64>>,
    window: Vec<f64>,
    /// Each filter's first bin and weights.
    filters: Vec<(usize, Vec<f64>)>,
    /// [COEFFICIENTS, MELS]
    dct: Vec<f64>,
}

impl Default for Mfcc {
    fn default() -> Self {
        let window = (0..WINDOW).map(|i| 0.5 - 0.5 * (2.0 * PI * i as f64 / WINDOW as f64).cos()).collect();
        let top = 2595.0 * (1.0 + RATE as f64 / 2.0 / 700.0).log10();
        let edge = |i: usize| 700.0 * (10f64.powf(top * i as f64 / (MELS + 1) as f64 / 2595.0) - 1.0);
        let filter = |mel: usize| {
            let [low, middle, high] = [edge(mel), edge(mel + 1), edge(mel + 2)];
            let weight = |bin: usize| {
                let f = (bin * RATE) as f64 / FFT as f64;
                ((f - low) / (middle - low)).min((high - f) / (high - middle)).max(0.0)
            };
            let first = (0..=FFT / 2).find(|&bin| weight(bin) > 0.0).unwrap_or(0);
            (first, (first..=FFT / 2).map(weight).take_while(|&weight| weight > 0.0).collect())
        };
        let cosine = |c: usize, mel: usize| {
            let scale = if c == 0 { 1.0 } else { 2.0 };
            (scale / MELS as f64).sqrt() * (PI * c as f64 * (mel as f64 + 0.5) / MELS as f64).cos()
        };
        Self {
            fft: RealFftPlanner::new().plan_fft_forward(FFT),
            window,
            filters: (0..MELS).map(filter).collect(),
            dct: (0..COEFFICIENTS).flat_map(|c| (0..MELS).map(move |mel| cosine(c, mel))).collect(),
        }
    }
}

impl Mfcc {
    /// The coefficients [FRAMES, COEFFICIENTS] of samples between -1 and 1: the first second of them, with silence
    /// behind it where they are fewer.
    pub fn of(&self, samples: &[f32]) -> Vec<f32> {
        let sample = |at: isize| {
            // Mirrored at the first and at the last sample.
            let last = RATE as isize - 1;
            let at = if at < 0 { -at } else { at };
            let at = if at > last { 2 * last - at } else { at };
            samples.get(at as usize).map_or(0.0, |&x| f64::from(x))
        };
        let (mut x, mut spectrum) = (self.fft.make_input_vec(), self.fft.make_output_vec());
        let mut scratch = self.fft.make_scratch_vec();
        let mut decibels = Vec::with_capacity(FRAMES * MELS);
        for frame in 0..FRAMES {
            let first = (frame * HOP) as isize - (WINDOW / 2) as isize;
            x.fill(0.0);
            let inside = x[(FFT - WINDOW) / 2..].iter_mut().zip(&self.window).enumerate();
            inside.for_each(|(i, (x, window))| *x = window * sample(first + i as isize));
            self.fft
                .process_with_scratch(&mut x, &mut spectrum, &mut scratch)
                .expect("buffers of the transform's own sizes");
            let energy = |(first, weights): &(usize, Vec<f64>)| {
                let bins = spectrum[*first..].iter().zip(weights);
                bins.map(|(bin, weight)| weight * bin.norm_sqr()).sum::<f64>()
            };
            decibels.extend(self.filters.iter().map(|filter| 10.0 * energy(filter).max(1e-10).log10()));
        }
        let loudest = decibels.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        decibels.iter_mut().for_each(|x| *x = x.max(loudest - 80.0));
        let coefficient = |mels: &[f64], row: &[f64]| row.iter().zip(mels).map(|(w, x)| w * x).sum::<f64>();
        decibels
            .chunks_exact(MELS)
            .flat_map(|mels| self.dct.chunks_exact(MELS).map(move |row| coefficient(mels, row) as f32))
            .collect()
    }
}
