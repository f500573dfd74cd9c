//! Panels as pictures.

use plotters::coord::Shift;
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::figures::{Axis, Line, Panel, named, ticks};
use super::style::{DASHES, colour, marker};
use crate::plot::{Drawn, INK, Picture, font};
use crate::train::count;

/// One panel of a figure.
pub struct Chart<'a> {
    pub title: &'a str,
    pub axis: Axis,
    pub panel: &'a Panel,
}

/// Room around the axes, in pixels.
const LEFT: i32 = 62;
const TOP: i32 = 78;
const WIDTH: i32 = 600;
const HEIGHT: i32 = 400;
/// From the axes to the list of lines: the names of ceiling and observers stand between.
const NAMES: i32 = 74;

const GRID: RGBColor = RGBColor(228, 228, 228);
const MUTED: RGBColor = RGBColor(105, 105, 105);

impl Chart<'_> {
    fn x(&self, x: f64) -> i32 {
        let (low, high) = self.panel.x;
        let share = match self.axis.log {
            true => (x / low).ln() / (high / low).ln(),
            false => (x - low) / (high - low),
        };
        LEFT + (share * f64::from(WIDTH)).round() as i32
    }

    fn y(&self, y: f64) -> i32 {
        let (low, high) = self.panel.y;
        TOP + ((high - y) / (high - low) * f64::from(HEIGHT)).round() as i32
    }

    /// A line by x; a single point stands for all x.
    fn reference(&self, points: &[(f64, f64)]) -> Vec<(i32, i32)> {
        match points {
            [(_, y)] => vec![(LEFT, self.y(*y)), (LEFT + WIDTH, self.y(*y))],
            points => points.iter().map(|&(x, y)| (self.x(x), self.y(y))).collect(),
        }
    }

    fn line<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>, line: &Line) -> Drawn<B> {
        let colour = colour(&line.model);
        let mut means = Vec::new();
        let (mut above, mut below) = (Vec::new(), Vec::new());
        for point in &line.points {
            let Some(y) = point.y().filter(|_| !self.axis.log || point.x() > 0.0) else { continue };
            let x = self.x(point.x());
            means.push((x, self.y(y.mean)));
            let sd = y.sd.unwrap_or(0.0);
            let ends = [y.mean + sd, y.mean - sd].map(|y| self.y(y.clamp(self.panel.y.0, self.panel.y.1)));
            above.push((x, ends[0]));
            below.push((x, ends[1]));
        }
        if line.curve {
            below.reverse();
            root.draw(&Polygon::new([above, below].concat(), colour.mix(0.13)))?;
        } else {
            for (top, bottom) in above.iter().zip(&below).filter(|(top, bottom)| top != bottom) {
                let style = colour.mix(0.7).stroke_width(1);
                root.draw(&PathElement::new([*top, *bottom], style))?;
                for (x, y) in [top, bottom] {
                    root.draw(&PathElement::new([(x - 3, *y), (x + 3, *y)], style))?;
                }
            }
        }
        stroke(root, means.clone(), colour, line.variant)?;
        if !line.curve {
            for (x, y) in means {
                mark(root, line, (x, y))?;
            }
        }
        Ok(())
    }
}

/// A line in the dashes of a variant.
fn stroke<B: DrawingBackend>(
    root: &DrawingArea<B, Shift>,
    points: Vec<(i32, i32)>,
    colour: RGBColor,
    variant: usize,
) -> Drawn<B> {
    let style = colour.stroke_width(2);
    match DASHES[variant % DASHES.len()] {
        None => root.draw(&PathElement::new(points, style)),
        Some((size, spacing)) => root.draw(&DashedPathElement::new(points, size, spacing, style)),
    }
}

/// The marker of a line's model; hollow for every second variant.
fn mark<B: DrawingBackend>(root: &DrawingArea<B, Shift>, line: &Line, at: (i32, i32)) -> Drawn<B> {
    let radius = |(x, y): (f64, f64)| (at.0 + (5.0 * x).round() as i32, at.1 + (5.0 * y).round() as i32);
    let mut outline: Vec<(i32, i32)> = marker(&line.model).into_iter().map(radius).collect();
    let colour = colour(&line.model);
    let hollow = line.variant % 2 == 1;
    root.draw(&Polygon::new(outline.clone(), if hollow { WHITE } else { colour }))?;
    outline.push(outline[0]);
    root.draw(&PathElement::new(outline, if hollow { colour } else { WHITE }.stroke_width(1)))
}

impl Picture for Chart<'_> {
    fn size(&self) -> (u32, u32) {
        let names = self.panel.lines.iter().map(|line| line.label.chars().count()).max().unwrap_or(0);
        let height = (TOP + 30 + 20 * self.panel.lines.len() as i32).max(TOP + HEIGHT + 58);
        ((LEFT + WIDTH + NAMES + 60) as u32 + 7 * names as u32, height as u32)
    }

    fn draw<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>) -> Drawn<B> {
        root.fill(&WHITE)?;
        let panel = self.panel;
        let text = |x, y| Pos::new(x, y);
        root.draw_text(self.title, &font(18), (18, 14))?;
        root.draw_text(&panel.label, &font(13).color(&MUTED), (18, 38))?;
        root.draw_text("accuracy", &font(12).color(&MUTED), (18, TOP - 18))?;

        let bottom = TOP + HEIGHT;
        let decimals = if panel.y.1 - panel.y.0 < 0.05 { 1 } else { 0 };
        for y in ticks(panel.y.0, panel.y.1, false) {
            let at = self.y(y);
            root.draw(&PathElement::new([(LEFT, at), (LEFT + WIDTH, at)], GRID.stroke_width(1)))?;
            let style = font(12).color(&MUTED).pos(text(HPos::Right, VPos::Center));
            root.draw_text(&format!("{:.decimals$} %", 100.0 * y), &style, (LEFT - 8, at))?;
        }
        root.draw(&PathElement::new([(LEFT, bottom), (LEFT + WIDTH, bottom)], INK.stroke_width(1)))?;
        for x in named(self.axis, panel) {
            let at = self.x(x);
            root.draw(&PathElement::new([(at, bottom), (at, bottom + 5)], INK.stroke_width(1)))?;
            let style = font(12).color(&MUTED).pos(text(HPos::Center, VPos::Top));
            root.draw_text(&short_number(x), &style, (at, bottom + 9))?;
        }
        let style = font(13).pos(text(HPos::Center, VPos::Top));
        root.draw_text(self.axis.label, &style, (LEFT + WIDTH / 2, bottom + 30))?;

        for (k, points) in &panel.observers {
            let points = self.reference(points);
            let end = points[points.len() - 1];
            root.draw(&PathElement::new(points, RGBColor(170, 170, 170).stroke_width(1)))?;
            let style = font(11).color(&MUTED).pos(text(HPos::Left, VPos::Center));
            root.draw_text(&format!("last {k}"), &style, (end.0.max(LEFT + WIDTH) + 6, end.1))?;
        }
        if !panel.ceiling.is_empty() {
            let points = self.reference(&panel.ceiling);
            let end = points[points.len() - 1];
            root.draw(&DashedPathElement::new(points, 6, 4, INK.stroke_width(1)))?;
            let style = font(11).pos(text(HPos::Left, VPos::Center));
            root.draw_text("ceiling", &style, (end.0.max(LEFT + WIDTH) + 6, end.1))?;
        }
        for line in &panel.lines {
            self.line(root, line)?;
        }
        let left = LEFT + WIDTH + NAMES;
        for (i, line) in panel.lines.iter().enumerate() {
            let y = TOP + 8 + 20 * i as i32;
            stroke(root, vec![(left, y), (left + 28, y)], colour(&line.model), line.variant)?;
            if !line.curve {
                mark(root, line, (left + 14, y))?;
            }
            let style = font(12).pos(text(HPos::Left, VPos::Center));
            root.draw_text(&line.label, &style, (left + 36, y))?;
        }
        root.present()
    }
}

/// 0.3, 25, 12.5k.
pub fn short_number(x: f64) -> String {
    if x.abs() < 1000.0 {
        return ((x * 100.0).round() / 100.0).to_string();
    }
    let text = count(x);
    let (digits, unit) = text.split_at(text.len() - 1);
    match digits.contains('.') {
        true => format!("{}{unit}", digits.trim_end_matches('0').trim_end_matches('.')),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_on_an_axis_are_short() {
        let got = [0.3, 1.0, 25.0, 0.1 + 0.2, 1000.0, 12500.0, 2e6].map(short_number);
        assert_eq!(got, ["0.3", "1", "25", "0.3", "1k", "12.5k", "2M"]);
    }
}
