//! One picture per quantity: a panel per layer, time from left to right, and below them what the model saw and how
//! it answered.

use std::ops::Range;

use plotters::coord::Shift;
use plotters::element::BitMapElement;
use plotters::prelude::*;
use plotters::style::FontTransform;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::Inspection;
use crate::model::notes::{Kind, Quantity, Rows, Scale};
use crate::plot::{COLOURS, Drawn, INK, Picture, centred, font};
use crate::task::grammar::letter;
use crate::task::{Sample, Task};

const SYMBOL: RGBColor = COLOURS[0];
const DISTRACTOR: RGBColor = COLOURS[4];
/// [`DISTRACTOR`], dark enough for small letters.
const DISTRACTOR_LETTER: RGBColor = RGBColor(166, 108, 0);
const WRONG: RGBColor = COLOURS[1];
const GAP: RGBColor = RGBColor(240, 240, 240);
const FRAME: RGBColor = RGBColor(190, 190, 190);

/// Space left of, right of and above the panels; width of a panel.
const LEFT: i32 = 96;
const RIGHT: i32 = 16;
const TOP: i32 = 78;
const WIDTH: i32 = 788;
/// Between two panels.
const SPACE: i32 = 10;
/// The rows below the panels: the vote, the symbols, the states, the axis.
const VOTE: i32 = 44;
const LETTERS: i32 = 16;
const STATES: i32 = 26;
const AXIS: i32 = 40;

/// More rows than this are no lines but a heat map.
const LINES: usize = COLOURS.len();
/// More channels than this are told apart by their rank only.
const ORDERED: usize = 8;

/// The picture of one quantity.
pub struct Figure<'a> {
    pub kind: &'static Kind,
    task: &'a Task,
    inspection: &'a Inspection,
    title: &'a str,
    layers: Vec<&'a Quantity>,
    /// Rows in use: ages that no step has are left out.
    rows: usize,
    style: Style,
    /// Of every layer and step, where they are drawn.
    bands: Vec<Vec<Band>>,
    axis: Axis,
}

/// The pictures of everything that the layers told.
pub fn figures<'a>(task: &'a Task, inspection: &'a Inspection, title: &'a str) -> Vec<Figure<'a>> {
    let mut kinds: Vec<&'static Kind> = Vec::new();
    for quantity in &inspection.quantities {
        if !kinds.contains(&quantity.kind) {
            kinds.push(quantity.kind);
        }
    }
    kinds.into_iter().map(|kind| Figure::new(kind, task, inspection, title)).collect()
}

/// How the panels of a quantity look.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Style {
    /// A line for every row.
    Lines,
    /// Quantiles over the channels of the only row.
    Bands,
    /// A colour for every row, channel and step.
    Heat,
}

/// The channels of a step: pairs of quantiles, and means.
struct Band {
    deciles: (f64, f64),
    quartiles: (f64, f64),
    median: f64,
    mean: f64,
}

impl Band {
    fn of(values: &[f32]) -> Self {
        let mut sorted: Vec<f64> = values.iter().map(|&value| value.into()).collect();
        sorted.sort_by(f64::total_cmp);
        let quantile = |share: f64| sorted[(share * (sorted.len() - 1) as f64).round() as usize];
        Self {
            deciles: (quantile(0.1), quantile(0.9)),
            quartiles: (quantile(0.25), quantile(0.75)),
            median: quantile(0.5),
            mean: sorted.iter().sum::<f64>() / sorted.len() as f64,
        }
    }
}

impl<'a> Figure<'a> {
    fn new(kind: &'static Kind, task: &'a Task, inspection: &'a Inspection, title: &'a str) -> Self {
        let layers: Vec<&Quantity> = inspection.quantities.iter().filter(|q| q.kind == kind).collect();
        let used = |row: &usize| {
            let mut values = layers.iter().flat_map(|q| (0..q.steps()).flat_map(|t| q.at(t, *row)));
            kind.rows != Rows::Age || values.any(|&value| value > 0.0)
        };
        let rows = (0..layers[0].rows).rev().find(used).map_or(1, |last| last + 1);
        let style = match (rows, layers[0].channels) {
            (1, 2..) => Style::Bands,
            (..=LINES, 1) if kind.rows != Rows::Age => Style::Lines,
            _ => Style::Heat,
        };
        let bands: Vec<Vec<Band>> = match style {
            Style::Bands => {
                layers.iter().map(|q| (0..q.steps()).map(|t| Band::of(q.at(t, 0))).collect()).collect()
            }
            _ => vec![],
        };
        let drawn = bands.iter().flatten().flat_map(|band| [band.deciles.0, band.mean, band.deciles.1]);
        let every =
            layers.iter().filter(|_| bands.is_empty()).flat_map(|q| q.values.iter().map(|&x| f64::from(x)));
        let axis = Axis::new(kind.scale, drawn.chain(every));
        Self { kind, task, inspection, title, layers, rows, style, bands, axis }
    }

    fn channels(&self) -> usize {
        self.layers[0].channels
    }

    /// Height of a panel.
    fn panel(&self) -> i32 {
        let rows = (self.rows * self.channels()) as i32;
        match self.style {
            Style::Lines | Style::Bands => 96,
            Style::Heat if rows <= 16 => (rows * 12).max(60),
            Style::Heat if rows <= 64 => (rows * 2).max(96),
            Style::Heat => 128,
        }
    }

    fn top(&self, panel: usize) -> i32 {
        TOP + panel as i32 * (self.panel() + SPACE)
    }

    /// Where a timestep of the sample begins.
    fn x(&self, step: usize) -> i32 {
        let steps = self.inspection.steps();
        LEFT + ((step - steps.start) as f64 * f64::from(WIDTH) / steps.len() as f64).round() as i32
    }

    /// The middle of a timestep of the window.
    fn middle(&self, step: usize) -> i32 {
        let steps = self.inspection.steps().len() as f64;
        LEFT + ((step as f64 + 0.5) * f64::from(WIDTH) / steps).round() as i32
    }

    /// Gaps shaded, behind lines.
    fn background<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>, panel: Range<i32>) -> Drawn<B> {
        for element in &self.inspection.elements[self.inspection.window.clone()] {
            let frames = self.inspection.sample.frames as usize;
            if element.steps > frames {
                let (from, to) = (self.x(element.first + frames), self.x(element.first + element.steps));
                let colour = if element.place.distractor { DISTRACTOR.mix(0.2) } else { GAP.to_rgba() };
                root.draw(&Rectangle::new([(from, panel.start), (to, panel.end)], colour.filled()))?;
            }
        }
        Ok(())
    }

    /// Where strings begin.
    fn strings<B: DrawingBackend>(
        &self,
        root: &DrawingArea<B, Shift>,
        rows: Range<i32>,
        colour: RGBColor,
    ) -> Drawn<B> {
        for element in &self.inspection.elements[self.inspection.window.clone()] {
            if element.place.distance == 1 && element.first > self.inspection.steps().start {
                let x = self.x(element.first);
                root.draw(&PathElement::new([(x, rows.start), (x, rows.end)], colour))?;
            }
        }
        Ok(())
    }

    /// Lines or bands of layer `layer` of those shown.
    fn lines<B: DrawingBackend>(
        &self,
        root: &DrawingArea<B, Shift>,
        layer: usize,
        panel: Range<i32>,
    ) -> Drawn<B> {
        let quantity = self.layers[layer];
        let y = |value: f64| panel.end - (self.axis.place(value) * f64::from(self.panel())).round() as i32;
        let line = |f: &dyn Fn(usize) -> f64| -> Vec<(i32, i32)> {
            (0..quantity.steps()).map(|t| (self.middle(t), y(f(t)))).collect()
        };
        if self.style == Style::Lines {
            for (row, colour) in (0..self.rows).zip(COLOURS) {
                let points = line(&|t| quantity.at(t, row)[0].into());
                root.draw(&PathElement::new(points, colour.stroke_width(2)))?;
            }
            return Ok(());
        }
        let bands = &self.bands[layer];
        let area = |range: &dyn Fn(&Band) -> (f64, f64)| {
            let mut outline = line(&|t| range(&bands[t]).0);
            outline.extend(line(&|t| range(&bands[t]).1).into_iter().rev());
            outline
        };
        root.draw(&Polygon::new(area(&|band| band.deciles), SYMBOL.mix(0.25)))?;
        root.draw(&Polygon::new(area(&|band| band.quartiles), SYMBOL.mix(0.35)))?;
        root.draw(&PathElement::new(line(&|t| bands[t].median), SYMBOL.stroke_width(2)))?;
        root.draw(&PathElement::new(line(&|t| bands[t].mean), WRONG.stroke_width(1)))
    }

    /// The ticks of the axis beside a panel.
    fn ticks<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>, panel: Range<i32>) -> Drawn<B> {
        let style = font(11).pos(Pos::new(HPos::Right, VPos::Center));
        let mut last = i32::MAX;
        for &(place, ref name) in &self.axis.ticks {
            let y = panel.end - (place * f64::from(self.panel())).round() as i32;
            // Those that would touch the one below are left out.
            if last - y < 11 {
                continue;
            }
            last = y;
            root.draw(&PathElement::new([(LEFT - 4, y), (LEFT, y)], INK))?;
            root.draw_text(name, &style, (LEFT - 7, y))?;
        }
        Ok(())
    }

    fn heat<B: DrawingBackend>(
        &self,
        root: &DrawingArea<B, Shift>,
        quantity: &Quantity,
        panel: Range<i32>,
    ) -> Drawn<B> {
        let (steps, channels) = (quantity.steps(), quantity.channels);
        // Channels have no order of their own: by their mean, the largest on top.
        let order = |row: usize| {
            let mut order: Vec<usize> = (0..channels).collect();
            if channels > ORDERED {
                let sum =
                    |channel: usize| (0..steps).map(|t| f64::from(quantity.at(t, row)[channel])).sum::<f64>();
                let sums: Vec<f64> = (0..channels).map(sum).collect();
                order.sort_by(|&a, &b| sums[b].total_cmp(&sums[a]));
            }
            order
        };
        let bands: Vec<(usize, usize)> = (0..self.rows)
            .flat_map(|row| order(row).into_iter().map(move |channel| (row, channel)))
            .collect();
        // What falls into one pixel is averaged.
        let share = |pixel: usize, pixels: usize, of: usize| {
            let first = pixel * of / pixels;
            first..((pixel + 1) * of / pixels).max(first + 1)
        };
        let (width, height) = (WIDTH as usize, panel.len());
        let mut pixels = Vec::with_capacity(3 * width * height);
        for y in 0..height {
            let bands = &bands[share(y, height, bands.len())];
            for x in 0..width {
                let times = share(x, width, steps);
                let sum: f64 = times
                    .clone()
                    .flat_map(|t| bands.iter().map(move |&(row, channel)| (t, row, channel)))
                    .map(|(t, row, channel)| self.axis.place(quantity.at(t, row)[channel].into()))
                    .sum();
                let RGBColor(r, g, b) = colour(sum / (times.len() * bands.len()) as f64);
                pixels.extend([r, g, b]);
            }
        }
        let size = (width as u32, height as u32);
        if let Some(image) = BitMapElement::with_owned_buffer((LEFT, panel.start), size, pixels) {
            root.draw(&image)?;
        }
        // Names of rows where there is room, and lines between rows of many channels.
        let each = f64::from(height as i32) / self.rows as f64;
        let style = font(11).pos(Pos::new(HPos::Right, VPos::Center));
        let every = (12.0 / each).ceil() as usize;
        for row in 0..self.rows {
            let y = panel.start + (each * (row as f64 + 0.5)).max(5.0) as i32;
            if row % every == 0 {
                root.draw_text(&self.kind.rows.label(row), &style, (LEFT - 6, y))?;
            }
            if row > 0 && channels > 1 {
                let y = panel.start + (each * row as f64).round() as i32;
                root.draw(&PathElement::new([(LEFT, y), (LEFT + WIDTH, y)], WHITE))?;
            }
        }
        Ok(())
    }

    fn legend<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>) -> Drawn<B> {
        let mut x = LEFT;
        let mut entry = |mark: &dyn Fn(i32) -> Drawn<B>, text: &str| -> Drawn<B> {
            mark(x)?;
            root.draw_text(text, &font(12).pos(Pos::new(HPos::Left, VPos::Center)), (x + 20, 60))?;
            let (width, _) = root.estimate_text_size(text, &font(12))?;
            x += width as i32 + 36;
            Ok(())
        };
        let line = |x: i32, colour: RGBColor, width: u32| {
            root.draw(&PathElement::new([(x, 60), (x + 15, 60)], colour.stroke_width(width)))
        };
        let block = |x: i32, colour: RGBAColor, half: i32| {
            root.draw(&Rectangle::new([(x, 60 - half), (x + 15, 60 + half)], colour.filled()))
        };
        match self.style {
            Style::Lines => {
                for (row, colour) in (0..self.rows).zip(COLOURS) {
                    entry(&|x| line(x, colour, 2), &self.kind.rows.label(row))?;
                }
            }
            Style::Bands => {
                entry(&|x| line(x, SYMBOL, 2), &format!("median of {} channels", self.channels()))?;
                entry(&|x| block(x, SYMBOL.mix(0.5), 4), "25-75 %")?;
                entry(&|x| block(x, SYMBOL.mix(0.25), 6), "10-90 %")?;
                entry(&|x| line(x, WRONG, 1), "mean")?;
            }
            Style::Heat => return self.colour_bar(root),
        }
        let distractors = !self.inspection.sample.distractors.is_empty();
        let (gap, name) =
            if distractors { (DISTRACTOR.mix(0.2), "distractors") } else { (GAP.to_rgba(), "gap") };
        if self.inspection.sample.gaps.iter().any(|&gap| gap > 0) {
            entry(&|x| block(x, gap, 6), name)?;
        }
        entry(&|x| root.draw(&PathElement::new([(x + 8, 53), (x + 8, 67)], INK)), "a string begins")
    }

    fn colour_bar<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>) -> Drawn<B> {
        const LONG: i32 = 260;
        for i in 0..LONG {
            let x = LEFT + i;
            let colour = colour(f64::from(i) / f64::from(LONG - 1));
            root.draw(&Rectangle::new([(x, 46), (x + 1, 56)], colour.filled()))?;
        }
        let mut last = i32::MIN;
        for &(place, ref name) in &self.axis.ticks {
            let x = LEFT + (place * f64::from(LONG)).round() as i32;
            let (width, _) = root.estimate_text_size(name, &font(11))?;
            if x - (width as i32) / 2 < last {
                continue;
            }
            last = x + width as i32 / 2 + 4;
            root.draw(&PathElement::new([(x, 56), (x, 60)], INK))?;
            root.draw_text(name, &centred(11), (x, 67))?;
        }
        let note = match (self.channels(), self.kind.rows) {
            (1, Rows::Age) => "rows: timesteps back; white lines: a string begins",
            (1, _) => "white lines: a string begins",
            (..=ORDERED, _) => "white lines: a string begins; Householder steps from top to bottom",
            _ => "white lines: a string begins; channels by their mean",
        };
        let style = font(12).pos(Pos::new(HPos::Left, VPos::Center));
        root.draw_text(note, &style, (LEFT + LONG + 28, 52))
    }

    /// The vote, the symbols and the states, from `top` on.
    fn elements<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>, top: i32) -> Drawn<B> {
        let (letters, states) = (top + VOTE + 2, top + VOTE + LETTERS);
        let grammar = self.task.grammar();
        let right_end = font(11).pos(Pos::new(HPos::Right, VPos::Center));
        let names = [("vote", top + VOTE / 2), ("symbol", letters + 8), ("state", states + STATES / 2)];
        for (name, y) in names {
            root.draw_text(name, &right_end, (LEFT - 26, y))?;
        }
        for (share, y) in [("100 %", top + 5), ("0", top + VOTE - 4)] {
            root.draw_text(share, &font(9).pos(Pos::new(HPos::Right, VPos::Center)), (LEFT - 3, y))?;
        }
        let window = self.inspection.window.clone();
        let mut shown = self.inspection.sample.distractors.iter();
        let Sample { gaps, frames, distractors, .. } = &self.inspection.sample;
        if !distractors.is_empty() {
            let before: u32 = gaps[..window.start].iter().sum();
            shown = distractors[before as usize..].iter();
        }
        let step = f64::from(WIDTH) / self.inspection.steps().len() as f64;
        for (element, &gap) in self.inspection.elements[window.clone()].iter().zip(&gaps[window]) {
            let (from, to) = (self.x(element.first), self.x(element.first + element.steps));
            let to = to.max(from + 1);
            // The share of the right state: blue where it won.
            let colour = if element.right() { SYMBOL } else { WRONG };
            let y = top + VOTE - (element.right_share * f64::from(VOTE)).round() as i32;
            root.draw(&Rectangle::new([(from, y), (to, top + VOTE)], colour.filled()))?;
            if !element.right() {
                root.draw(&Rectangle::new([(from, top), (to, y)], WRONG.mix(0.25).filled()))?;
            }
            if to - from >= 4 {
                root.draw(&PathElement::new([(to, top), (to, top + VOTE)], WHITE))?;
            }
            let mut symbols = vec![(letter(grammar.symbol(element.state)), INK)];
            symbols
                .extend(shown.by_ref().take(gap as usize).map(|&class| (letter(class), DISTRACTOR_LETTER)));
            for (i, (symbol, colour)) in symbols.into_iter().enumerate() {
                let x = self.x(element.first + i * *frames as usize);
                if step >= 8.0 || (i == 0 && to - from >= 9) {
                    let at = (x + (step / 2.0).max(5.0) as i32, letters + 8);
                    root.draw_text(&symbol.to_string(), &centred(11).color(&colour), at)?;
                } else {
                    root.draw(&Rectangle::new([(x, letters + 3), (x + 1, letters + 12)], colour.filled()))?;
                }
            }
            if to - from >= 11 {
                let upright = if to - from < 24 { FontTransform::Rotate270 } else { FontTransform::None };
                let at = ((from + to) / 2, states + STATES / 2 - 2);
                root.draw_text(grammar.name(element.state), &centred(10).transform(upright), at)?;
            }
        }
        let bottom = top + VOTE + LETTERS + STATES;
        self.strings(root, top..bottom, INK)?;
        for y in [top, top + VOTE] {
            root.draw(&PathElement::new([(LEFT, y), (LEFT + WIDTH, y)], FRAME))?;
        }
        root.draw(&PathElement::new([(LEFT, bottom), (LEFT + WIDTH, bottom)], INK))?;
        let steps = self.inspection.steps();
        let every = round_step(steps.len() as f64 / 14.0).ceil() as usize;
        for t in steps.clone().filter(|t| t.is_multiple_of(every)) {
            let x = self.middle(t - steps.start);
            root.draw(&PathElement::new([(x, bottom), (x, bottom + 4)], INK))?;
            root.draw_text(&t.to_string(), &centred(11), (x, bottom + 11))?;
        }
        let note = "timestep; vote: share of the right state, orange where another one won";
        root.draw_text(note, &centred(12), (LEFT + WIDTH / 2, bottom + 29))
    }
}

impl Picture for Figure<'_> {
    fn size(&self) -> (u32, u32) {
        let height = self.top(self.layers.len()) + VOTE + LETTERS + STATES + AXIS;
        ((LEFT + WIDTH + RIGHT) as u32, height as u32)
    }

    fn draw<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>) -> Drawn<B> {
        root.fill(&WHITE)?;
        root.draw_text(&format!("{}: {}", self.kind.name, self.kind.about), &font(16), (12, 8))?;
        root.draw_text(self.title, &font(12), (12, 29))?;
        self.legend(root)?;
        for (i, quantity) in self.layers.iter().enumerate() {
            let panel = self.top(i)..self.top(i) + self.panel();
            if self.style == Style::Heat {
                self.heat(root, quantity, panel.clone())?;
                self.strings(root, panel.clone(), WHITE)?;
            } else {
                self.background(root, panel.clone())?;
                self.strings(root, panel.clone(), INK)?;
                self.lines(root, i, panel.clone())?;
                self.ticks(root, panel.clone())?;
            }
            let frame = [(LEFT, panel.start), (LEFT + WIDTH, panel.end)];
            root.draw(&Rectangle::new(frame, INK))?;
            let upright = centred(12).transform(FontTransform::Rotate270);
            root.draw_text(
                &format!("layer {}", quantity.layer + 1),
                &upright,
                (14, (panel.start + panel.end) / 2),
            )?;
        }
        self.elements(root, self.top(self.layers.len()))?;
        root.present()
    }
}

/// The colour of a place between 0 and 1: dark is little.
fn colour(place: f64) -> RGBColor {
    ViridisRGB.get_color(place.clamp(0.0, 1.0) as f32)
}

/// From values to places between 0 and 1, and the values that are named.
struct Axis {
    scale: Scale,
    low: f64,
    high: f64,
    ticks: Vec<(f64, String)>,
}

impl Axis {
    /// Around `values`; those that are not finite are left out.
    fn new(scale: Scale, values: impl Iterator<Item = f64>) -> Self {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values.map(|value| stretched(scale, value)).filter(|value| value.is_finite()) {
            (low, high) = (low.min(value), high.max(value));
        }
        if low > high {
            (low, high) = (0.0, 1.0);
        }
        let ticks: Vec<f64> = match scale {
            Scale::Decay => vec![0.0, 0.5, 0.9, 0.99, 0.999, 0.9999],
            Scale::Log => (-8..8).flat_map(|power| [1.0, 3.0].map(|n| n * 10f64.powi(power))).collect(),
            Scale::Linear => {
                let step = round_step((high - low.min(0.0)).max(1e-6) / 4.0);
                // Around 0 where that is near.
                let first = if low >= 0.0 && low < 2.0 * (high - low) { 0.0 } else { (low / step).floor() };
                (0..12).map(|i| (first + f64::from(i)) * step).collect()
            }
        };
        // From the tick below the least to the one above the largest value.
        let places: Vec<f64> = ticks.iter().map(|&tick| stretched(scale, tick)).collect();
        let below = places.iter().copied().rfind(|&place| place <= low + 1e-9).unwrap_or(low);
        let above = places.iter().copied().find(|&place| place >= high - 1e-9).unwrap_or(high);
        let (low, high) = (below, if above > below { above } else { below + 1.0 });
        let inside = |place: f64| (low - 1e-9..=high + 1e-9).contains(&place);
        let ticks = ticks.iter().zip(&places).filter(|(_, place)| inside(**place));
        let ticks = ticks.map(|(tick, place)| ((place - low) / (high - low), named(*tick))).collect();
        Self { scale, low, high, ticks }
    }

    fn place(&self, value: f64) -> f64 {
        ((stretched(self.scale, value) - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
    }
}

/// What is linear along an axis.
fn stretched(scale: Scale, value: f64) -> f64 {
    match scale {
        Scale::Decay => -(1.0 - value).max(1e-4).log10(),
        Scale::Log => value.max(1e-8).log10(),
        Scale::Linear => value,
    }
}

fn named(tick: f64) -> String {
    // Without what rounding leaves behind.
    let rounded = format!("{tick:.6}");
    let short = rounded.trim_end_matches('0').trim_end_matches('.');
    if short == "-0" { "0".into() } else { short.into() }
}

/// The least of 1, 2, 5, 10, … times a power of ten that is not below `step`.
fn round_step(step: f64) -> f64 {
    let power = 10f64.powf(step.max(1e-9).log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|n| n * power).find(|&n| n >= step * (1.0 - 1e-9)).unwrap_or(power)
}
