//! What a model did on one sample, element by element, and what its layers computed meanwhile.

mod figure;
mod parse;

use std::ops::Range;

use anyhow::Result;
use candle_core::{DType, Tensor};

pub use self::figure::{Figure, figures};
pub use self::parse::{first_broken, parse};
use crate::model::notes::{Notes, Quantity};
use crate::model::{Context, Input, RecNet};
use crate::ops::no_grad;
use crate::task::{PAD, Sample, Samples, Task};
use crate::train::breakdown::{Place, places};

/// Timesteps per forward pass.
const CHUNK: usize = 256;

/// One element and the model's answer.
#[derive(Clone, Copy, Debug)]
pub struct Element {
    pub state: u32,
    /// What the window should vote for: the class of the state, or the next symbol.
    pub label: u32,
    /// The class that it votes for.
    pub answer: u32,
    /// Share of the vote of the answer: its probability, mean over the steps of the window.
    pub confidence: f64,
    /// Share of the vote of the label.
    pub right_share: f64,
    pub place: Place,
    /// Timestep at which the symbol is shown.
    pub first: usize,
    /// Timesteps of its symbol and of the gap behind it.
    pub steps: usize,
    /// Those that vote: from the symbol's last on.
    pub votes: usize,
}

impl Element {
    pub fn right(&self) -> bool {
        self.answer == self.label
    }
}

/// A sample through a model.
pub struct Inspection {
    pub sample: Sample,
    /// All elements of the sample.
    pub elements: Vec<Element>,
    /// The elements that are looked at closely.
    pub window: Range<usize>,
    /// What the layers told, over the timesteps of the window.
    pub quantities: Vec<Quantity>,
}

impl Inspection {
    /// The timesteps of the window.
    pub fn steps(&self) -> Range<usize> {
        let inside = &self.elements[self.window.clone()];
        let end = inside.last().map_or(0, |last| last.first + last.steps);
        inside.first().map_or(0, |first| first.first)..end
    }

    pub fn right(&self) -> usize {
        self.elements.iter().filter(|element| element.right()).count()
    }
}

/// The elements from `from` on whose windows take about `steps` timesteps, at least one.
pub fn window(sample: &Sample, from: usize, steps: usize) -> Range<usize> {
    let mut used = 0;
    let fits = |behind: &usize| {
        used += sample.frames as usize + behind;
        used <= steps
    };
    from..from + sample.behind().skip(from).take_while(fits).count().max(1)
}

/// Runs `samples`, which hold one sample, through a model; looks closely at the elements `window`.
pub fn inspect(net: &RecNet, task: &Task, mut samples: Samples, window: Range<usize>) -> Result<Inspection> {
    let [sample] = samples.as_slice() else { anyhow::bail!("one sample is looked at") };
    let (sample, grammar, classes) = (sample.clone(), task.grammar(), net.classes());
    let mut first = 0;
    let mut elements: Vec<Element> = places(grammar, &sample)
        .zip(sample.states.iter().zip(&sample.labels).zip(sample.behind()))
        .map(|(place, ((&state, &label), behind))| {
            let (steps, votes) = (sample.frames as usize + behind, 1 + behind);
            first += steps;
            let (answer, confidence, right_share) = (0, 0.0, 0.0);
            Element {
                state,
                label,
                answer,
                confidence,
                right_share,
                place,
                first: first - steps,
                steps,
                votes,
            }
        })
        .collect();
    let empty = Inspection { sample, elements: elements.clone(), window, quantities: vec![] };

    let device = net.params().value().device();
    let mut notes = Notes::new(empty.steps());
    let mut context = Context::streaming();
    let mut votes = vec![0.0; classes];
    let mut open = None;
    let mut close = |element: usize, votes: &mut Vec<f64>| {
        let (mut best, e) = (0, &mut elements[element]);
        for (class, &vote) in votes.iter().enumerate() {
            if vote > votes[best] {
                best = class;
            }
        }
        let share = |label: usize| votes[label] / e.votes as f64;
        (e.confidence, e.right_share) = (share(best), share(e.label as usize));
        e.answer = best as u32;
        votes.fill(0.0);
    };
    while let Some(piece) = samples.next_window(CHUNK) {
        let logits = no_grad(|| {
            let (dense, ids);
            let input = if piece.is_dense() {
                let shape = (1, piece.steps, piece.features);
                dense = Tensor::from_vec(piece.dense(), shape, device)?.to_dtype(net.dtype())?;
                Input::Dense(&dense)
            } else {
                ids = piece.ids(device)?;
                Input::Ids(&ids)
            };
            net.inspect(input, &mut context, &mut notes)?
                .to_dtype(DType::F32)?
                .flatten_all()?
                .to_vec1::<f32>()
        })?;
        for (&element, logits) in piece.element.iter().zip(logits.chunks_exact(classes)) {
            if element == PAD {
                continue;
            }
            if let Some(last) = open.replace(element as usize).filter(|&last| last != element as usize) {
                close(last, &mut votes);
            }
            let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let exp: Vec<f64> = logits.iter().map(|&logit| f64::from(logit - most).exp()).collect();
            let total: f64 = exp.iter().sum();
            votes.iter_mut().zip(&exp).for_each(|(vote, exp)| *vote += exp / total);
        }
    }
    if let Some(last) = open {
        close(last, &mut votes);
    }
    Ok(Inspection { elements, quantities: notes.finish(), ..empty })
}
