//! One look for pictures and page: every model has its colour and its marker everywhere.

use super::data::place;
use crate::plot::COLOURS;
use plotters::style::RGBColor;

/// Colour of a model.
pub fn colour(model: &str) -> RGBColor {
    COLOURS[place(model) % COLOURS.len()]
}

/// The palette on a dark ground: the same hues, black turned white, what is too dark made lighter.
pub const DARK: [RGBColor; COLOURS.len()] = [
    RGBColor(46, 150, 219),
    RGBColor(240, 124, 46),
    RGBColor(24, 184, 140),
    RGBColor(219, 146, 185),
    RGBColor(240, 178, 50),
    RGBColor(128, 204, 245),
    RGBColor(240, 240, 240),
];

/// Outline of a model's marker, about 1 from its middle.
pub fn marker(model: &str) -> Vec<(f64, f64)> {
    let turn = |corners: usize, from: f64| {
        let angle = move |i| from + i as f64 * std::f64::consts::TAU / corners as f64;
        (0..corners).map(|i| (angle(i).cos(), angle(i).sin())).collect::<Vec<_>>()
    };
    let scaled = |by: f64, points: Vec<(f64, f64)>| -> Vec<(f64, f64)> {
        points.into_iter().map(|(x, y)| (by * x, by * y)).collect()
    };
    let (up, quarter) = (-std::f64::consts::FRAC_PI_2, std::f64::consts::FRAC_PI_4);
    // Beyond seven models the colours come again, with the next marker.
    let place = place(model);
    match (place + place / COLOURS.len()) % COLOURS.len() {
        0 => turn(20, 0.0),
        1 => scaled(1.2, turn(4, quarter)),
        2 => scaled(1.25, turn(3, up)),
        3 => scaled(1.25, turn(4, up)),
        4 => scaled(1.25, turn(3, -up)),
        5 => {
            let (arm, reach) = (0.42, 1.2);
            let corner = [(arm, -reach), (arm, -arm), (reach, -arm)];
            (0..4)
                .flat_map(|quarter| {
                    let (sin, cos) = (f64::from(quarter) * -up).sin_cos();
                    corner.map(|(x, y)| (x * cos - y * sin, x * sin + y * cos))
                })
                .collect()
        }
        _ => {
            let star = turn(10, up).into_iter().enumerate();
            star.map(|(i, (x, y))| if i % 2 == 0 { (1.4 * x, 1.4 * y) } else { (0.6 * x, 0.6 * y) }).collect()
        }
    }
}

/// Lengths of dash and space of the lines of one model, in pixels; the first is solid.
pub const DASHES: [Option<(i32, i32)>; 4] = [None, Some((7, 4)), Some((2, 3)), Some((12, 3))];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::MODELS;

    #[test]
    fn no_two_models_look_alike() {
        let looks: Vec<_> =
            MODELS.iter().map(|m| (colour(m.name), format!("{:?}", marker(m.name)))).collect();
        for (i, look) in looks.iter().enumerate() {
            assert!(!looks[..i].contains(look), "{}", MODELS[i].name);
        }
    }
}
