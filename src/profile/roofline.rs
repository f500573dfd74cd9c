//! The roofline: operations per second over operations per byte, under what the device reaches at best.

use plotters::coord::Shift;
use plotters::coord::combinators::IntoLogRange;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::ops::Measured;
use super::timing::Ceilings;
use crate::plot::{COLOURS, Drawn, FONT, INK, Picture, font};

/// A picture of measured ops.
pub struct Roofline<'a> {
    pub title: &'a str,
    pub ops: &'a [Measured],
    pub ceilings: &'a Ceilings,
}

/// A line of the list beside the picture.
enum Entry<'a> {
    Size(&'a str),
    /// Index of a point.
    Op(usize),
}

/// One op: both passes, or the forward pass of what has no other.
struct Point<'a> {
    op: &'a Measured,
    intensity: f64,
    speed: f64,
}

impl Roofline<'_> {
    /// The list of ops, a number for each point, in columns: the name of every size if there are several, then its points.
    fn legend<'a>(&self, points: &[Point<'a>]) -> Vec<Entry<'a>> {
        let mut entries = vec![];
        let several = points.windows(2).any(|pair| pair[0].op.scale != pair[1].op.scale);
        for (i, point) in points.iter().enumerate() {
            if several && (i == 0 || points[i - 1].op.scale != point.op.scale) {
                entries.push(Entry::Size(point.op.scale));
            }
            entries.push(Entry::Op(i));
        }
        entries
    }

    fn points(&self) -> Vec<Point<'_>> {
        let mut points = vec![];
        for op in self.ops {
            let Some(pass) = op.both.as_ref().or(op.forward.as_ref()) else { continue };
            let (intensity, speed) = (pass.operations / pass.bytes, pass.operations_per_s);
            if intensity > 0.0 && speed > 0.0 {
                points.push(Point { op, intensity, speed });
            }
        }
        points
    }
}

impl Picture for Roofline<'_> {
    fn size(&self) -> (u32, u32) {
        let columns = self.legend(&self.points()).len().div_ceil(ROWS).max(1);
        ((LEGEND + COLUMN * columns as i32) as u32, HEIGHT)
    }

    fn draw<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>) -> Drawn<B> {
        root.fill(&WHITE)?;
        root.draw_text(self.title, &font(17), (24, 12))?;
        let points = self.points();
        let span = |values: &dyn Fn(&Point) -> f64, low: f64, high: f64| {
            let least = points.iter().map(values).fold(low, f64::min);
            least / 2.0..points.iter().map(values).fold(high, f64::max) * 2.0
        };
        let Ceilings { copy, matmul } = self.ceilings;
        let top = matmul.iter().map(|(_, rate)| *rate).fold(1e9, f64::max);
        let x = span(&|point| point.intensity, 0.2, 2.0 * top / copy);
        let y = span(&|point| point.speed, top / 1e2, top);
        let (left, right) = root.split_horizontally(LEGEND);
        let mut chart = ChartBuilder::on(&left)
            .margin(24)
            .margin_top(40)
            .x_label_area_size(52)
            .y_label_area_size(76)
            .build_cartesian_2d(x.clone().log_scale(), y.clone().log_scale())?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .bold_line_style(RGBColor(225, 225, 225))
            .axis_style(INK)
            .x_desc("operations per byte that must be moved")
            .y_desc("operations per second")
            .x_label_formatter(&|x| number(*x))
            .y_label_formatter(&|y| crate::train::count(*y))
            .label_style((FONT, 14).into_font().color(&INK))
            .axis_desc_style((FONT, 15).into_font().color(&INK))
            .draw()?;

        // The copy's slope up to each matrix product's roof.
        for (i, (route, rate)) in matmul.iter().enumerate() {
            let style = INK.mix(0.75 - 0.2 * i as f64).stroke_width(2);
            let roof =
                [(y.start / copy).max(x.start), rate / copy, x.end].map(|at| (at, rate.min(at * copy)));
            chart.draw_series(LineSeries::new(roof, style))?;
            let text = format!("{}FLOP/s, {} matrix product", crate::train::count(*rate), route.name());
            let place = chart.backend_coord(&(x.end, *rate));
            let style = font(12).pos(Pos::new(HPos::Right, VPos::Bottom));
            root.draw_text(&text, &style, (place.0, place.1 - 2))?;
        }
        let corner = chart.backend_coord(&((y.start / copy).max(x.start), y.start));
        root.draw_text(
            &format!("{}B/s, copy", crate::train::count(*copy)),
            &font(12).pos(Pos::new(HPos::Left, VPos::Bottom)),
            (corner.0 + 30, corner.1 - 8),
        )?;

        right.draw_text("forward and backward", &font(13), (0, 40))?;
        for (i, point) in points.iter().enumerate() {
            let colour = COLOURS[i % COLOURS.len()];
            let at = (point.intensity, point.speed);
            chart.draw_series([Circle::new(at, 4, colour.filled())])?;
            let place = chart.backend_coord(&at);
            root.draw_text(&(i + 1).to_string(), &font(12).color(&colour), (place.0 + 6, place.1 - 13))?;
        }
        for (line, entry) in self.legend(&points).into_iter().enumerate() {
            let place = (COLUMN * (line / ROWS) as i32, 62 + 17 * (line % ROWS) as i32);
            match entry {
                Entry::Size(name) => right.draw_text(name, &font(13), place)?,
                Entry::Op(i) => {
                    let op = points[i].op;
                    let only = if op.both.is_none() { ", forward" } else { "" };
                    let states = op.size.split(' ').find(|part| part.starts_with('N')).unwrap_or("");
                    let text = format!("{} {}{only} {states}", i + 1, op.op);
                    right.draw_text(&text, &font(12).color(&COLOURS[i % COLOURS.len()]), place)?;
                }
            }
        }
        root.present()
    }
}

const HEIGHT: u32 = 700;
/// Where the list of ops begins, the width of its columns, and how many lines they have.
const LEGEND: i32 = 900;
const COLUMN: i32 = 220;
const ROWS: usize = 36;

/// 0.25, 4, 100.
fn number(x: f64) -> String {
    if x < 1.0 { format!("{x:.2}") } else { format!("{x:.0}") }
}
