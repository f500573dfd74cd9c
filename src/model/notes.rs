//! What a mixer tells of itself while it computes: decays, write strengths, gates, where attention goes.
//!
//! A mixer names each quantity once, with [`Call::note`](super::Call::note); `selectivbench inspect` draws all of
//! them. Nothing is computed or copied where nobody looks.

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor};

/// A kind of quantity, the same in all layers of a model.
#[derive(Debug, PartialEq, Eq)]
pub struct Kind {
    /// A word for files and tables, as in `decay`.
    pub name: &'static str,
    /// What it is, in a few words or a formula.
    pub about: &'static str,
    pub scale: Scale,
    pub rows: Rows,
}

/// How a quantity is best looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Between 0 and 1, where 0.9, 0.99 and 0.999 are as far apart as they are for a memory.
    Decay,
    /// Above 0, by powers of ten.
    Log,
    Linear,
}

/// What the third dimension of a quantity counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    Head,
    State,
    /// All channels of the layer are the fourth dimension.
    Layer,
    /// Timesteps back: 0, 1, 2-3, 4-7, … ([`age`]).
    Age,
}

impl Rows {
    /// The name of row `i`.
    pub fn label(self, i: usize) -> String {
        match self {
            Rows::Head => format!("head {}", i + 1),
            Rows::State => format!("state {}", i + 1),
            Rows::Layer => "layer".into(),
            Rows::Age => match i {
                0 => "now".into(),
                1 => "1 back".into(),
                _ => format!("{}-{}", 1 << (i - 1), (1 << i) - 1),
            },
        }
    }
}

/// The row of [`Rows::Age`] that a number of timesteps belongs to.
pub fn age(steps: usize) -> usize {
    (usize::BITS - steps.leading_zeros()) as usize
}

/// log(1 + eˣ).
pub fn softplus(x: &Tensor) -> Result<Tensor> {
    x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?
}

/// One quantity of one layer, over a window of timesteps.
#[derive(Clone, Debug)]
pub struct Quantity {
    pub layer: usize,
    pub kind: &'static Kind,
    pub rows: usize,
    /// Values of a row at a step.
    pub channels: usize,
    /// [steps, rows, channels]
    pub values: Vec<f32>,
}

impl Quantity {
    pub fn steps(&self) -> usize {
        self.values.len() / (self.rows * self.channels)
    }

    /// The channels of a row at a step of the window.
    pub fn at(&self, step: usize, row: usize) -> &[f32] {
        &self.values[(step * self.rows + row) * self.channels..][..self.channels]
    }
}

/// Collects what the layers tell of one sequence, over a window of its timesteps.
pub struct Notes {
    window: Range<usize>,
    /// Timestep of the sequence at which the piece begins that is being computed.
    at: usize,
    pub(super) layer: usize,
    list: Vec<Quantity>,
}

impl Notes {
    /// For the timesteps `window` of a sequence, which may come in pieces.
    pub fn new(window: Range<usize>) -> Self {
        Self { window, at: 0, layer: 0, list: Vec::new() }
    }

    /// What was told, in the order of layers.
    pub fn finish(self) -> Vec<Quantity> {
        let mut list = self.list;
        list.sort_by_key(|quantity| quantity.layer);
        list
    }

    /// Ends a piece of `steps` timesteps.
    pub(super) fn end_piece(&mut self, steps: usize) {
        self.at += steps;
    }

    /// Takes what `f` makes of the tensors `from`, [1, T, rows] or [1, T, rows, channels] for the T steps of the
    /// piece; `f` is given them on the CPU in f32.
    pub(super) fn take<const N: usize>(
        &mut self,
        kind: &'static Kind,
        steps: usize,
        from: [&Tensor; N],
        f: impl FnOnce([Tensor; N]) -> Result<Tensor>,
    ) -> Result<()> {
        let first = self.window.start.max(self.at);
        let end = self.window.end.min(self.at + steps);
        if first >= end {
            return Ok(());
        }
        let on_cpu = |tensor: &Tensor| tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32);
        let mut given = Vec::with_capacity(N);
        for tensor in from {
            given.push(on_cpu(&tensor.detach())?);
        }
        let Ok(given) = <[Tensor; N]>::try_from(given) else { unreachable!("as many as were given") };
        let value = f(given)?;
        let (rows, channels) = match *value.dims() {
            [1, t, rows] if t == steps => (rows, 1),
            [1, t, rows, channels] if t == steps => (rows, channels),
            _ => candle_core::bail!(
                "{}: a note of shape {:?} for one sequence of {steps} steps",
                kind.name,
                value.shape()
            ),
        };
        let values = value.narrow(1, first - self.at, end - first)?.flatten_all()?.to_vec1::<f32>()?;
        let same = |own: &&mut Quantity| own.layer == self.layer && own.kind == kind;
        match self.list.iter_mut().find(same) {
            Some(own) => own.values.extend(values),
            None => self.list.push(Quantity { layer: self.layer, kind, rows, channels, values }),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_powers_of_two_and_have_names() {
        let rows = [0, 1, 2, 3, 4, 7, 8, 100].map(age);
        assert_eq!(rows, [0, 1, 2, 2, 3, 3, 4, 7]);
        assert_eq!([0, 1, 2, 3].map(|i| Rows::Age.label(i)), ["now", "1 back", "2-3", "4-7"]);
    }

    #[test]
    fn softplus_survives_large_arguments() {
        let x = Tensor::new(&[-100f32, -1.0, 0.0, 1.0, 100.0], &Device::Cpu).unwrap();
        let y: Vec<f32> = softplus(&x).unwrap().to_vec1().unwrap();
        for (y, want) in y.into_iter().zip([0.0, 0.313_261_7, std::f32::consts::LN_2, 1.313_261_7, 100.0]) {
            assert!((y - want).abs() < 1e-6, "{y} {want}");
        }
    }

    /// Pieces of 3 steps, a window from the second to the fifth.
    #[test]
    fn a_window_over_pieces() {
        static KIND: Kind = Kind { name: "x", about: "", scale: Scale::Linear, rows: Rows::Head };
        let mut notes = Notes::new(1..5);
        for piece in 0..3u32 {
            let x = Tensor::arange(6 * piece, 6 * piece + 6, &Device::Cpu).unwrap();
            let x = x.reshape((1, 3, 2)).unwrap();
            notes.take(&KIND, 3, [&x], |[x]| x * 10.0).unwrap();
            notes.end_piece(3);
        }
        let list = notes.finish();
        assert_eq!(list.len(), 1);
        assert_eq!((list[0].steps(), list[0].rows, list[0].channels), (4, 2, 1));
        assert_eq!(list[0].values, [20., 30., 40., 50., 60., 70., 80., 90.]);
    }
}
