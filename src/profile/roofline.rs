//! The roofline: operations per second over operations per byte, under what the device reaches at best.

use plotters::coord::Shift;
use plotters::coord::combinators::IntoLogRange;
use plotters::prelude::*;

use super::ops::Measured;
use super::timing::Ceilings;
use crate::plot::{COLOURS, Drawn, FONT, INK, Picture, font};

/// A picture of measured ops.
pub struct Roofline<'a> {
    pub title: &'a str,
    pub ops: &'a [Measured],
    pub ceilings: &'a Ceilings,
}

/// An op's pass: its label, operations per byte, operations per second, and whether both passes.
struct Point<'a> {
    op: &'a Measured,
    intensity: f64,
    speed: f64,
    both: bool,
}

impl Roofline<'_> {
    fn points(&self) -> Vec<Point<'_>> {
        let mut points = vec![];
        for op in self.ops {
            for (pass, both) in [(&op.forward, false), (&op.both, true)] {
                let Some(pass) = pass else { continue };
                let (intensity, speed) = (pass.operations / pass.bytes, pass.operations_per_s);
                if intensity > 0.0 && speed > 0.0 {
                    points.push(Point { op, intensity, speed, both });
                }
            }
        }
        points
    }
}

impl Picture for Roofline<'_> {
    fn size(&self) -> (u32, u32) {
        (1100, 720)
    }

    fn draw<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>) -> Drawn<B> {
        root.fill(&WHITE)?;
        root.draw_text(self.title, &font(17), (24, 12))?;
        let points = self.points();
        let span = |values: &dyn Fn(&Point) -> f64, low: f64, high: f64| {
            let least = points.iter().map(values).fold(low, f64::min);
            least / 2.0..points.iter().map(values).fold(high, f64::max) * 2.0
        };
        let top = self.ceilings.matmul.iter().map(|(_, rate)| *rate).fold(1e9, f64::max);
        let ridge = top / self.ceilings.copy;
        let x = span(&|point| point.intensity, 0.1, 2.0 * ridge);
        let y = span(&|point| point.speed, top / 1e4, top);
        let mut chart = ChartBuilder::on(root)
            .margin(24)
            .margin_top(40)
            .x_label_area_size(52)
            .y_label_area_size(76)
            .build_cartesian_2d(x.clone().log_scale(), y.clone().log_scale())?;
        let label = (FONT, 14).into_font().color(&INK);
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .bold_line_style(RGBColor(225, 225, 225))
            .axis_style(INK)
            .x_desc("operations per byte that must be moved")
            .y_desc("operations per second")
            .x_label_formatter(&|x| number(*x))
            .y_label_formatter(&|y| crate::train::count(*y))
            .label_style(label.clone())
            .axis_desc_style((FONT, 15).into_font().color(&INK))
            .draw()?;

        let copy = self.ceilings.copy;
        let roof = |rate: f64| {
            let ridge = rate / copy;
            [(y.start / copy).max(x.start), ridge, x.end].map(|at| (at, rate.min(at * copy)))
        };
        for (i, (route, rate)) in self.ceilings.matmul.iter().enumerate() {
            let style = INK.mix(0.75 - 0.2 * i as f64).stroke_width(2);
            chart.draw_series(LineSeries::new(roof(*rate), style))?;
            let text = format!("matmul {}: {}op/s", route.name(), crate::train::count(*rate));
            let at = (x.end / 40.0, rate * 1.06);
            chart.draw_series([Text::new(text, at, (FONT, 13).into_font().color(&INK))])?;
        }
        let at = (x.start * 1.3, (x.start * 1.3 * copy * 1.6).max(y.start * 1.5));
        let text = format!("copy: {}B/s", crate::train::count(copy));
        chart.draw_series([Text::new(text, at, (FONT, 13).into_font().color(&INK))])?;

        let mut names: Vec<&str> = self.ops.iter().map(|op| op.op).collect();
        names.dedup();
        for point in &points {
            let place = names.iter().position(|name| *name == point.op.op).unwrap_or(0);
            let colour = COLOURS[place % COLOURS.len()];
            let at = (point.intensity, point.speed);
            let style = if point.both { colour.filled() } else { colour.stroke_width(2) };
            chart.draw_series([Circle::new(at, 5, style)])?;
            if point.both || point.op.both.is_none() {
                let text = EmptyElement::at(at)
                    + Text::new(point.op.op, (8, -6), (FONT, 12).into_font().color(&colour));
                chart.draw_series([text])?;
            }
        }
        let key = "ring: forward    disc: forward and backward";
        root.draw_text(key, &font(13), (760, 14))?;
        root.present()
    }
}

/// 0.25, 4, 100.
fn number(x: f64) -> String {
    if x < 1.0 { format!("{x:.2}") } else { format!("{x:.0}") }
}
