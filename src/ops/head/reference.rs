//! CPU path of the head.

use rayon::prelude::*;

use super::{PAD, Targets, Vote};
use crate::ops::linear::gemm::{Mat, MatMut, block_times, gemm};
use crate::ops::real::Real;
use crate::ops::rows::{ROWS, add, sum_parts};

/// Steps whose logits exist at the same time.
pub const ROWS_AT_ONCE: usize = 2048;

/// The window of one sequence that is still growing: its element and the sum of its probabilities.
#[derive(Clone, Default)]
pub struct Window {
    element: Option<u32>,
    sum: Vec<f64>,
}

impl Window {
    /// Adds the probabilities of one step.
    fn add<F: Real>(&mut self, element: u32, probabilities: &[F], votes: &mut [u32]) {
        if self.element != Some(element) {
            self.close(votes);
            self.element = Some(element);
            self.sum.clear();
            self.sum.resize(probabilities.len(), 0.0);
        }
        for (sum, p) in self.sum.iter_mut().zip(probabilities) {
            *sum += p.as_f64();
        }
    }

    /// Casts the vote of the window that grew until now.
    pub fn close(&mut self, votes: &mut [u32]) {
        let Some(element) = self.element.take() else { return };
        let mut best = 0;
        for (class, &sum) in self.sum.iter().enumerate() {
            if sum > self.sum[best] {
                best = class;
            }
        }
        votes[element as usize] = best as u32;
    }
}

/// Gradients of x, W and b, formed beside the logits.
pub struct Gradient<F> {
    pub x: Vec<F>,
    pub w: Vec<F>,
    pub b: Vec<F>,
    /// What the derivative of a step's loss is multiplied with.
    scale: F,
}

impl<F: Real> Gradient<F> {
    pub fn new(x: usize, w: usize, b: usize, denominator: f64) -> Self {
        let zeros = |n| vec![F::zero(); n];
        Self { x: zeros(x), w: zeros(w), b: zeros(b), scale: F::of(1.0 / denominator) }
    }
}

/// Turns logits into probabilities; gives log Σ e^logit − logit of the label.
fn softmax<F: Real>(logits: &mut [F], label: usize) -> f64 {
    // Sixteen running maxima, so that it vectorises.
    let mut lanes = [F::neg_infinity(); 16];
    for chunk in logits.chunks(16) {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    let max = lanes.into_iter().fold(F::neg_infinity(), |a, b| if b > a { b } else { a });
    let own = (logits[label] - max).as_f64();
    logits.iter_mut().for_each(|x| *x = (*x - max).exp_fast());
    let sum = crate::ops::rows::sum2(logits, logits, |x, _| x);
    let inverse = F::one() / sum;
    logits.iter_mut().for_each(|x| *x *= inverse);
    sum.as_f64().ln() - own
}

impl Vote {
    /// Takes the logits of the rows from `first` on: turns them into probabilities, adds to the windows
    /// and the losses.
    pub(super) fn take<F: Real>(&mut self, targets: &Targets, first: usize, logits: &mut [F]) {
        let classes = self.classes;
        let losses: Vec<f64> = logits
            .par_chunks_mut(classes)
            .with_min_len(16)
            .enumerate()
            .map(|(i, row)| match targets.element[first + i] {
                PAD => 0.0,
                _ => softmax(row, targets.labels[first + i] as usize),
            })
            .collect();
        self.steps += targets.element[first..first + losses.len()].iter().filter(|&&e| e != PAD).count();

        // Sequences are independent; inside one, steps come in order.
        let end = first + losses.len();
        let (from, to) = (first / targets.steps, (end - 1) / targets.steps + 1);
        let sequences = self.open[from..to]
            .par_iter_mut()
            .zip(&mut self.votes[from..to])
            .zip(&mut self.loss[from..to])
            .enumerate();
        let probabilities = &*logits;
        sequences.for_each(|(i, ((window, votes), loss))| {
            let b = from + i;
            for row in (b * targets.steps).max(first)..((b + 1) * targets.steps).min(end) {
                let element = targets.element[row];
                if element != PAD {
                    let at = row - first;
                    window.add(element, &probabilities[at * classes..(at + 1) * classes], votes);
                    *loss += losses[at];
                }
            }
        });
    }
}

/// Loss, votes and, if asked for, gradients of x [rows, D] against W [C, D] and b \[C\].
pub fn run<F: Real>(
    x: &[F],
    w: &[F],
    b: &[F],
    targets: &Targets,
    vote: &mut Vote,
    mut gradient: Option<&mut Gradient<F>>,
) {
    /// Rows of the weight's gradient that one task forms.
    const CLASSES: usize = 32;
    let (rows, classes) = (targets.labels.len(), b.len());
    let width = w.len() / classes;
    let decoder = Mat::new(w, classes, width);
    let mut logits = vec![F::zero(); ROWS_AT_ONCE.min(rows) * classes];
    for first in (0..rows).step_by(ROWS_AT_ONCE) {
        let end = (first + ROWS_AT_ONCE).min(rows);
        let (count, x) = (end - first, &x[first * width..end * width]);
        if targets.element[first..end].iter().all(|&e| e == PAD) {
            continue;
        }
        let logits = &mut logits[..count * classes];
        logits.par_chunks_mut(ROWS * classes).zip(x.par_chunks(ROWS * width)).for_each(|(logits, x)| {
            block_times(x, x.len() / width, ROWS, decoder.t(), Some(b), logits);
        });
        vote.take(targets, first, logits);

        let Some(gradient) = gradient.as_deref_mut() else { continue };
        let scale = gradient.scale;
        let parts: Vec<Vec<F>> = logits
            .par_chunks_mut(ROWS * classes)
            .zip(gradient.x[first * width..end * width].par_chunks_mut(ROWS * width))
            .enumerate()
            .map(|(i, (rows, dx))| {
                let mut db = vec![F::zero(); classes];
                for (j, row) in rows.chunks_exact_mut(classes).enumerate() {
                    let at = first + i * ROWS + j;
                    if targets.element[at] == PAD {
                        row.fill(F::zero());
                        continue;
                    }
                    row[targets.labels[at] as usize] -= F::one();
                    row.iter_mut().for_each(|p| *p *= scale);
                    add(row, &mut db);
                }
                block_times(rows, rows.len() / classes, ROWS, decoder, None, dx);
                db
            })
            .collect();
        add(&sum_parts(&parts, classes), &mut gradient.b);
        let dlogits = &*logits;
        gradient.w.par_chunks_mut(CLASSES * width).enumerate().for_each(|(i, dw)| {
            let n = dw.len() / width;
            let part = Mat::strided(&dlogits[i * CLASSES..], count, n, classes).t();
            gemm(MatMut::new(dw, n, width), F::one(), F::one(), part, Mat::new(x, count, width));
        });
    }
}
