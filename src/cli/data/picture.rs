//! A sample drawn: which symbol is shown when, what stands in the gaps, and what to name.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::FontTransform;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::config::Objective;
use crate::plot::{COLOURS, Drawn, INK, Picture, centred, font};
use crate::task::batch::BLANK;
use crate::task::grammar::letter;
use crate::task::{Batch, Sample, Task};

const SYMBOL: RGBColor = COLOURS[0];
const DISTRACTOR: RGBColor = COLOURS[1];
const GAP: RGBColor = RGBColor(232, 232, 232);
const FRAME: RGBColor = RGBColor(190, 190, 190);

/// The picture: strips of timesteps below one another, each with the symbols and a band of what to name.
pub(super) struct Scene<'a> {
    task: &'a Task,
    sample: &'a Sample,
    batch: &'a Batch,
    title: &'a str,
    /// Timesteps of a strip.
    strip: usize,
    /// Height of a symbol's row.
    row: i32,
}

/// Space left of, right of and above the strips.
const LEFT: i32 = 64;
const RIGHT: i32 = 20;
const TOP: i32 = 66;
/// Width of a full strip.
const WIDTH: i32 = 1300;
/// Height of that band, and of the ticks below it.
const BAND: i32 = 40;
const TICKS: i32 = 36;
/// Space for the name of the axis.
const BOTTOM: i32 = 18;

impl<'a> Scene<'a> {
    /// `sample`, whose timesteps are `batch`.
    pub(super) fn new(task: &'a Task, sample: &'a Sample, batch: &'a Batch, title: &'a str) -> Self {
        // up to four strips of about 100 timesteps; longer ones beyond
        let strips = batch.steps.div_ceil(110).clamp(1, 4);
        let strip = batch.steps.div_ceil(strips).max(40);
        let row = (360 / task.grammar().alphabet() as i32).clamp(9, 18);
        Self { task, sample, batch, title, strip, row }
    }

    fn strips(&self) -> usize {
        self.batch.steps.div_ceil(self.strip)
    }

    fn raster(&self) -> i32 {
        self.row * self.task.grammar().alphabet() as i32
    }

    /// Where timestep `t` of a strip begins.
    fn x(&self, t: usize) -> i32 {
        LEFT + (t as f64 * f64::from(WIDTH) / self.strip as f64).round() as i32
    }

    fn legend<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>) -> Drawn<B> {
        let distractors = !self.sample.distractors.is_empty();
        let mut entries = vec![(SYMBOL, "symbol".to_string())];
        if distractors {
            entries.push((DISTRACTOR, "distractor".into()));
        }
        let asked = match self.task.config().objective {
            Objective::Classify => "the state before it is still to be named",
            Objective::Predict => "the symbol behind it is still to be predicted",
        };
        entries.push((GAP, format!("gap: {asked}")));
        if self.task.config().noise != 0.0 {
            entries.push((
                WHITE,
                format!("noise up to {} on every input is not drawn", self.task.config().noise),
            ));
        }
        let mut x = LEFT;
        for (colour, text) in entries {
            if colour != WHITE {
                root.draw(&Rectangle::new([(x, 40), (x + 12, 52)], colour.filled()))?;
                x += 18;
            }
            root.draw_text(&text, &font(13).pos(Pos::new(HPos::Left, VPos::Center)), (x, 46))?;
            let (width, _) = root.estimate_text_size(&text, &font(13))?;
            x += width as i32 + 24;
        }
        Ok(())
    }

    /// Timesteps from `first` on, with the upper edge at `top`.
    fn strip<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>, first: usize, top: i32) -> Drawn<B> {
        let grammar = self.task.grammar();
        let last = (first + self.strip).min(self.batch.steps);
        let (middle, bottom) = (top + self.raster(), top + self.raster() + BAND);
        let (left, right) = (self.x(0), self.x(last - first));
        let at = |t: usize| self.x(t - first);

        // Elements: the part behind the symbol is shaded.
        let frames = self.sample.frames as usize;
        let mut next = 0;
        for (&label, behind) in self.sample.labels.iter().zip(self.sample.behind()) {
            let shown = next..next + frames;
            next = shown.end + behind;
            let (begin, end) = (shown.start.max(first), next.min(last));
            if begin >= end {
                continue;
            }
            let gap = at(shown.end.max(first).min(end));
            if gap < at(end) {
                root.draw(&Rectangle::new([(gap, top), (at(end), middle)], GAP.filled()))?;
            }
            let wide = at(end) - at(begin);
            if wide >= 5 {
                let edge = vec![(at(end), top), (at(end), bottom)];
                root.draw(&PathElement::new(edge, FRAME))?;
            }
            if wide >= 10 {
                let upright = if wide < 30 { FontTransform::Rotate270 } else { FontTransform::None };
                let name = centred(12).transform(upright);
                root.draw_text(
                    &self.task.class_name(label),
                    &name,
                    ((at(begin) + at(end)) / 2, (middle + bottom) / 2),
                )?;
            } else {
                let share = f64::from(label) / self.task.classes() as f64;
                let y = bottom - 3 - (share * f64::from(BAND - 5)) as i32;
                root.draw(&Rectangle::new(
                    [(at(begin), y), (at(end).max(at(begin) + 1), y + 1)],
                    INK.filled(),
                ))?;
            }
        }
        for t in (first..last).filter(|&t| self.batch.symbols[t] != BLANK) {
            let y = top + self.batch.symbols[t] as i32 * self.row;
            let colour = if self.batch.distractor[t] { DISTRACTOR } else { SYMBOL };
            let cell = [(at(t), y + 1), (at(t + 1).max(at(t) + 3), y + self.row - 1)];
            root.draw(&Rectangle::new(cell, colour.filled()))?;
        }
        for y in [top, middle, bottom] {
            root.draw(&PathElement::new(vec![(left, y), (right, y)], INK))?;
        }
        for x in [left, right] {
            root.draw(&PathElement::new(vec![(x, top), (x, bottom)], INK))?;
        }

        for class in 0..grammar.alphabet() as u32 {
            let middle = top + class as i32 * self.row + self.row / 2;
            let letter = letter(class).to_string();
            root.draw_text(&letter, &centred((self.row + 1).min(13)), (LEFT - 11, middle))?;
        }
        let upright = centred(14).transform(FontTransform::Rotate270);
        root.draw_text("symbol", &upright, (LEFT - 40, (top + middle) / 2))?;
        let asked = match self.task.config().objective {
            Objective::Classify => "state",
            Objective::Predict => "next",
        };
        root.draw_text(asked, &upright, (LEFT - 40, (middle + bottom) / 2))?;
        let every = tick(self.strip);
        for t in (first..last).filter(|t| t.is_multiple_of(every)) {
            let x = (at(t) + at(t + 1)) / 2;
            root.draw(&PathElement::new(vec![(x, bottom), (x, bottom + 4)], INK))?;
            root.draw_text(&t.to_string(), &centred(12), (x, bottom + 13))?;
        }
        Ok(())
    }
}

impl Picture for Scene<'_> {
    fn size(&self) -> (u32, u32) {
        let height = TOP + self.strips() as i32 * (self.raster() + BAND + TICKS) + BOTTOM;
        ((LEFT + WIDTH + RIGHT) as u32, height as u32)
    }

    fn draw<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>) -> Drawn<B> {
        root.fill(&WHITE)?;
        root.draw_text(self.title, &font(18), (LEFT, 12))?;
        self.legend(root)?;
        for strip in 0..self.strips() {
            let top = TOP + strip as i32 * (self.raster() + BAND + TICKS);
            self.strip(root, strip * self.strip, top)?;
        }
        let (_, height) = self.size();
        root.draw_text("timestep", &centred(14), (LEFT + WIDTH / 2, height as i32 - 14))?;
        root.present()
    }
}

/// Timesteps between two ticks: 1, 2 or 5 times a power of ten, about twenty to a strip.
fn tick(steps: usize) -> usize {
    let enough = |every: &usize| every * 20 >= steps;
    (0..).flat_map(|power| [1, 2, 5].map(|n| n * 10usize.pow(power))).find(enough).unwrap_or(1)
}
