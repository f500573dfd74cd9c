//! What each figure shows: lines of points with the runs behind every point.
//!
//! The pictures (`draw`) and the page (`page`) both show these. Means and spreads are taken from the
//! values of the single runs, so that the page can take them again over the runs that a filter leaves.

use std::collections::BTreeMap;

use super::data::{Data, MODEL_ORDER, Setting, labels, place, without};
use super::facts::Facts;
use super::read::{Fields, Run};
use super::stats::Stats;
use crate::train::breakdown::{AtDistance, Breakdown, Tally};

/// One figure, with a panel for every task that has the data for it.
pub struct Figure {
    /// File name and anchor.
    pub id: &'static str,
    pub title: &'static str,
    /// What is to be seen, in a sentence or two.
    pub about: &'static str,
    pub x: Axis,
    pub panels: Vec<Panel>,
}

/// The horizontal axis.
#[derive(Clone, Copy)]
pub struct Axis {
    pub label: &'static str,
    pub log: bool,
    /// Points stand at a few values that the axis should name.
    pub few: bool,
}

/// One pair of axes.
pub struct Panel {
    pub label: String,
    pub lines: Vec<Line>,
    pub x: (f64, f64),
    pub y: (f64, f64),
    /// Bayes ceiling by x; one point stands for all x.
    pub ceiling: Vec<(f64, f64)>,
    /// Ideal observers of the last k elements, as the ceiling.
    pub observers: Vec<(usize, Vec<(f64, f64)>)>,
}

/// The points of one model.
pub struct Line {
    pub model: String,
    pub label: String,
    /// Place among the lines of the same model: decides the dashes.
    pub variant: usize,
    /// Learning curves are lines with a band, others have a marker at each point.
    pub curve: bool,
    pub points: Vec<Point>,
}

/// A mean over runs.
pub struct Point {
    pub setting: usize,
    pub values: Vec<Value>,
}

/// What one run adds to a point.
#[derive(Clone, Copy, Debug)]
pub struct Value {
    pub run: usize,
    pub x: f64,
    pub y: f64,
    /// The Bayes ceiling there.
    pub ceiling: Option<f64>,
}

impl Point {
    pub fn x(&self) -> f64 {
        self.values.iter().map(|value| value.x).sum::<f64>() / self.values.len().max(1) as f64
    }

    pub fn y(&self) -> Option<Stats> {
        Stats::of(self.values.iter().map(|value| value.y))
    }
}

/// Most points of a learning curve.
const CURVE: usize = 40;

/// `count` evenly chosen places among `n`, first and last included.
pub fn thinned(n: usize, count: usize) -> Vec<usize> {
    if n <= count {
        return (0..n).collect();
    }
    (0..count).map(|i| (i * (n - 1) + (count - 1) / 2) / (count - 1)).collect()
}

/// The validations of a run that figures show.
pub fn curve(run: &Run) -> Vec<(f64, f64)> {
    let places = thinned(run.validation.len(), CURVE);
    places.into_iter().map(|i| (run.validation[i].samples, run.validation[i].accuracy)).collect()
}

/// What one run gives: x, accuracy, and the Bayes ceiling where there is one.
type Series = Vec<(f64, f64, Option<f64>)>;

/// Which runs give what.
type Values<'a> = &'a dyn Fn(&Setting) -> Vec<Vec<Value>>;

/// Everything that the runs can fill.
pub fn figures(data: &Data, facts: &[Facts]) -> Vec<Figure> {
    // One point for a setting: `x` of each run against its accuracy.
    let single = |x: &dyn Fn(&Run) -> Option<f64>, setting: &Setting| -> Vec<Vec<Value>> {
        let value = |&run: &usize| {
            let Run { summary, .. } = &data.runs[run];
            let x = x(&data.runs[run]).filter(|x| x.is_finite())?;
            Some(Value { run, x, y: summary.accuracy, ceiling: Some(summary.ceiling) })
        };
        vec![data.chosen(setting).runs.iter().filter_map(value).collect()]
    };
    // Points for a setting: those of its runs with the same x together.
    let many = |points: &dyn Fn(&Run) -> Series, setting: &Setting| {
        let mut by: BTreeMap<u64, Vec<Value>> = BTreeMap::new();
        for &run in &data.chosen(setting).runs {
            for (x, y, ceiling) in points(&data.runs[run]) {
                by.entry(x.to_bits()).or_default().push(Value { run, x, y, ceiling });
            }
        }
        by.into_values().collect::<Vec<_>>()
    };
    let axis = |label, log, few| Axis { label, log, few };
    let size = ["model.width", "model.layers", "model.state", "model.heads", "model.householders"];
    let complexity = complexity_keys(data);
    let tests = |run: &Run| -> Series {
        run.summary
            .tests
            .iter()
            .map(|test| (test.gap, test.evaluation.accuracy, Some(test.ceiling)))
            .collect()
    };
    let curves = |run: &Run| -> Series {
        curve(run).into_iter().map(|(x, y)| (x, y, Some(run.summary.ceiling))).collect()
    };
    let timesteps = |setting: &Setting| facts[setting.task].timesteps;
    let mut all = Vec::new();
    let mut add = |id, title, about, x, keys: &[&str], values: Values| {
        let mut figure = Figure { id, title, about, x, panels: vec![] };
        figure.panels = panels(data, facts, &figure, keys, values);
        if !figure.panels.is_empty() {
            all.push(figure);
        }
    };

    add(
        "accuracy_by_parameters",
        "Accuracy against size",
        "Test accuracy of the final weights against the number of trained parameters.",
        axis("parameters", true, false),
        &size,
        &|setting| single(&|run| Some(run.summary.parameters as f64), setting),
    );
    add(
        "accuracy_by_complexity",
        "Accuracy against grammar complexity",
        "Test accuracy against the number of letters that stand for several states each.",
        axis("ambiguities", false, true),
        &complexity,
        &|setting| single(&|run| Some(run.config.task.ambiguities as f64), setting),
    );
    add(
        "accuracy_by_gap",
        "Accuracy against gap",
        "Test accuracy with a fixed gap after every element; a time unit is 10 timesteps. \
                        Gaps longer than those trained on show how far a model generalises.",
        axis("gap in the test, in time units", true, true),
        &[],
        &|setting| many(&tests, setting),
    );
    add(
        "learning_curves",
        "Learning curves",
        "Validation accuracy while training; the band is one standard deviation over seeds.",
        axis("training samples", false, false),
        &[],
        &|setting| many(&curves, setting),
    );
    add(
        "accuracy_by_seconds",
        "Cost in time",
        "Test accuracy against the seconds of training and evaluation. Only runs on one kind \
                        of device, undisturbed, can be compared.",
        axis("seconds", true, false),
        &size,
        &|setting| single(&|run| Some(run.summary.seconds), setting),
    );
    add(
        "accuracy_by_tokens",
        "Cost in tokens",
        "Test accuracy against the timesteps trained on.",
        axis("training tokens", true, false),
        &["task.samples.train", "train.eval_every", "train.warmup"],
        &|setting| {
            let tokens = |run: &Run| Some(run.summary.samples as f64 * timesteps(setting)?.round());
            single(&tokens, setting)
        },
    );
    add(
        "accuracy_by_state",
        "Cost in memory",
        "Test accuracy against the numbers that a model carries from step to step for one \
                        sequence. Attention is not in it: its state grows with the sequence.",
        axis("state size, in numbers", true, false),
        &size,
        &|setting| single(&|run| run.summary.state_size.map(|floats| floats as f64), setting),
    );
    add(
        "accuracy_by_gap_before",
        "Accuracy after gaps",
        "Accuracy of single elements by the gap before them: what the memory had to bridge. \
                        All tests of a run together.",
        axis("timesteps of gap before the element", false, true),
        &[],
        &|setting| many(&by_gap, setting),
    );
    add(
        "accuracy_by_distance",
        "Accuracy along a string",
        "Accuracy of single elements by their place in their string; 1 is its first element.",
        axis("elements since the string began", true, false),
        &[],
        &|setting| many(&by_distance, setting),
    );
    add(
        "accuracy_after_distractors",
        "Accuracy after distractors",
        "Accuracy of single elements by the elements since the last distractor; at 0 their own \
                        window holds one.",
        axis("elements since a distractor", false, false),
        &[],
        &|setting| many(&after_distractor, setting),
    );
    all
}

/// The fields that a study of complexity changes: the ambiguities, and depth and vocabulary where they
/// follow from them.
fn complexity_keys(data: &Data) -> Vec<&'static str> {
    let follows = |key: &&str| data.follows(key, "task.ambiguities");
    std::iter::once("task.ambiguities")
        .chain(["task.depth", "task.vocab"].into_iter().filter(follows))
        .collect()
}

fn share(tally: Tally) -> Option<f64> {
    (tally.elements > 0).then(|| tally.accuracy())
}

/// What the tests of a run say about kinds of elements, the main test first.
fn breakdowns(run: &Run) -> impl Iterator<Item = &Breakdown> {
    run.summary.tests.iter().filter_map(|test| test.evaluation.breakdown.as_ref())
}

fn by_gap(run: &Run) -> Series {
    let mut by: BTreeMap<u32, Tally> = BTreeMap::new();
    for one in breakdowns(run).flat_map(|breakdown| &breakdown.by_gap) {
        by.entry(one.gap).or_default().add(one.tally);
    }
    by.into_iter().filter_map(|(gap, sum)| Some((f64::from(gap), share(sum)?, None))).collect()
}

/// Bins stand at their geometric middle.
fn bins(bins: &[AtDistance]) -> Series {
    let middle = |bin: &AtDistance| ((bin.from.max(1) * bin.to.max(1)) as f64).sqrt();
    bins.iter().filter_map(|bin| Some((middle(bin), share(bin.tally)?, None))).collect()
}

/// Of the main test.
fn by_distance(run: &Run) -> Series {
    breakdowns(run).next().map_or(vec![], |breakdown| bins(&breakdown.by_distance))
}

/// Of the main test.
fn after_distractor(run: &Run) -> Series {
    let main = breakdowns(run).next();
    let Some(distractor) = main.and_then(|breakdown| breakdown.distractor.as_ref()) else { return vec![] };
    let on = share(distractor.on).map(|on| (0.0, on, None));
    on.into_iter().chain(bins(&distractor.after)).collect()
}

/// Splits the settings into panels, one for each value of the fields that are neither the model's nor
/// `keys`, and these into lines. Panels with one value of x are left out.
fn panels(data: &Data, facts: &[Facts], figure: &Figure, keys: &[&str], values: Values) -> Vec<Panel> {
    let mut by: BTreeMap<Fields, Vec<&Setting>> = BTreeMap::new();
    // The order of the tasks and of the settings in them.
    let mut order: Vec<Fields> = Vec::new();
    for &setting in data.tasks.iter().flat_map(|task| &task.settings) {
        let setting = &data.settings[setting];
        let fields = without(&setting.fields, |key| key.starts_with("model.") || keys.contains(&key));
        if !by.contains_key(&fields) {
            order.push(fields.clone());
        }
        by.entry(fields).or_default().push(setting);
    }
    let names = labels(&order.iter().collect::<Vec<_>>(), "task.preset", &super::data::TASK_ORDER);
    let panel =
        |(fields, label): (&Fields, String)| panel(data, facts, figure, &by[fields], label, keys, values);
    order.iter().zip(names).filter_map(panel).collect()
}

fn panel(
    data: &Data,
    facts: &[Facts],
    figure: &Figure,
    settings: &[&Setting],
    label: String,
    keys: &[&str],
    values: Values,
) -> Option<Panel> {
    let mut by: Vec<(Fields, Vec<Point>)> = Vec::new();
    for setting in settings {
        let fields = without(&setting.fields, |key| !key.starts_with("model.") || keys.contains(&key));
        let at = by.iter().position(|(known, _)| *known == fields).unwrap_or_else(|| {
            by.push((fields, vec![]));
            by.len() - 1
        });
        let points = values(setting).into_iter().filter(|values| !values.is_empty());
        let setting = data.groups[setting.chosen].setting;
        by[at].1.extend(points.map(|values| Point { setting, values }));
    }
    by.retain(|(_, points)| !points.is_empty());
    let names = labels(&by.iter().map(|(fields, _)| fields).collect::<Vec<_>>(), "model.name", &MODEL_ORDER);
    let curve = figure.id == "learning_curves";
    let mut lines: Vec<Line> = Vec::new();
    for ((fields, mut points), label) in by.into_iter().zip(names) {
        points.sort_by(|a, b| a.x().total_cmp(&b.x()));
        let model = fields["model.name"].clone();
        let variant = lines.iter().filter(|line| line.model == model).count();
        lines.push(Line { model, label, variant, curve, points });
    }
    lines.sort_by_key(|line| (place(&line.model), line.variant));

    let points = || lines.iter().flat_map(|line| &line.points);
    let xs: Vec<f64> = points().map(Point::x).filter(|x| !figure.x.log || *x > 0.0).collect();
    let (least, most) = bounds(xs.iter().copied())?;
    // Means of one number over other numbers of seeds differ in the last bits.
    if most - least <= 1e-9 * most.abs() {
        return None;
    }
    // Only where the task, and not the model, decides x does the ceiling depend on it.
    let by_task = ["accuracy_by_complexity", "accuracy_by_gap"].contains(&figure.id);
    let at = |x: f64| if by_task { x.to_bits() } else { 0 };
    let means = |all: &mut dyn Iterator<Item = (f64, f64)>| -> Vec<(f64, f64)> {
        let mut by: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
        all.for_each(|(x, y)| by.entry(at(x)).or_default().push(y));
        by.into_iter().filter_map(|(x, ys)| Some((f64::from_bits(x), Stats::of(ys)?.mean))).collect()
    };
    let runs = || points().flat_map(|point| point.values.iter());
    let ceiling = means(&mut runs().filter_map(|value| Some((value.x, value.ceiling?))));
    let observer = |k: usize| {
        let of = |point: &Point| {
            let known = &facts[data.settings[point.setting].task].observers;
            Some((point.x(), known.iter().find(|one| one.0 == k)?.1))
        };
        (k, means(&mut points().filter_map(of)))
    };
    // Accuracy of single kinds of elements: what holds on average over all says nothing.
    let observers = match ceiling.is_empty() {
        true => vec![],
        false => {
            super::facts::WINDOWS.iter().map(|&k| observer(k)).filter(|(_, of)| !of.is_empty()).collect()
        }
    };

    let spread = |point: &Point| {
        let y = point.y()?;
        let sd = y.sd.unwrap_or(0.0);
        Some([y.mean - sd, y.mean + sd])
    };
    let ys = points().filter_map(spread).flatten().chain(ceiling.iter().map(|(_, y)| *y));
    let (low, high) = bounds(ys)?;
    let y = vertical(low, high);
    let room = if figure.x.log { (most / least).powf(0.04) } else { 0.04 * (most - least) };
    let x = match (figure.x.log, curve) {
        (true, _) => (least / room, most * room),
        (false, true) => (0.0, most),
        (false, false) => (least - room, most + room),
    };
    let observers = few(observers, &ceiling, y);
    Some(Panel { label, lines, x, y, ceiling, observers })
}

fn bounds(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.filter(|x| x.is_finite()).fold(None, |bounds, x| match bounds {
        None => Some((x, x)),
        Some((low, high)) => Some((low.min(x), high.max(x))),
    })
}

/// The range of accuracies to show: round figures around them, from 0 if they go low.
fn vertical(low: f64, high: f64) -> (f64, f64) {
    let step = [0.01, 0.02, 0.05, 0.1].into_iter().find(|step| (high - low) / step <= 6.0).unwrap_or(0.2);
    let low = if low < 0.4 { 0.0 } else { (low / step - 0.2).floor() * step };
    // More than all is right is only room for a marker.
    (low.max(0.0), ((high / step + 0.2).ceil() * step).min(1.0).max(low + step))
}

/// At most four observers within the range that are apart from each other and from the ceiling.
fn few(
    observers: Vec<(usize, Vec<(f64, f64)>)>,
    ceiling: &[(f64, f64)],
    y: (f64, f64),
) -> Vec<(usize, Vec<(f64, f64)>)> {
    const APART: f64 = 0.07;
    let last = |line: &[(f64, f64)]| line.last().map_or(f64::NAN, |point| point.1);
    let mut taken: Vec<f64> = vec![last(ceiling)];
    let mut few = Vec::new();
    for (k, line) in observers {
        let at = last(&line);
        let within = line.iter().all(|point| (y.0..=y.1).contains(&point.1));
        if within && few.len() < 4 && taken.iter().all(|other| (other - at).abs() > APART * (y.1 - y.0)) {
            taken.push(at);
            few.push((k, line));
        }
    }
    few
}

/// Round values to name on an axis from `low` to `high`.
pub fn ticks(low: f64, high: f64, log: bool) -> Vec<f64> {
    if !log {
        let raw = (high - low) / 5.0;
        let power = 10f64.powf(raw.log10().floor());
        let step =
            power * [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().find(|step| step * power >= raw).unwrap_or(10.0);
        let from = (low / step - 1e-9).ceil() as i64;
        let to = (high / step + 1e-9).floor() as i64;
        return (from..=to).map(|i| i as f64 * step).collect();
    }
    let within = |steps: &[f64]| -> Vec<f64> {
        let powers = (low.log10().floor() as i32)..=(high.log10().ceil() as i32);
        let all = powers.flat_map(|power| steps.iter().map(move |step| step * 10f64.powi(power)));
        all.filter(|x| *x >= low * (1.0 - 1e-9) && *x <= high * (1.0 + 1e-9)).collect()
    };
    let all =
        [&[1.0][..], &[1.0, 3.0], &[1.0, 2.0, 5.0], &[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0]].map(within);
    let [.., finest] = &all;
    match all.iter().find(|ticks| ticks.len() >= 3) {
        Some(ticks) => ticks.clone(),
        None if finest.len() >= 2 => finest.clone(),
        None => vec![low, high],
    }
}

/// The values that an axis names.
pub fn named(axis: Axis, panel: &Panel) -> Vec<f64> {
    let mut xs: Vec<f64> = panel.lines.iter().flat_map(|line| line.points.iter().map(Point::x)).collect();
    xs.sort_by(f64::total_cmp);
    xs.dedup_by(|a, b| (*a - *b).abs() <= 1e-9 * a.abs());
    xs.retain(|x| (panel.x.0..=panel.x.1).contains(x));
    if axis.few && xs.len() <= 10 { xs } else { ticks(panel.x.0, panel.x.1, axis.log) }
}

#[cfg(test)]
mod tests {
    use super::super::data::tests::data;
    use super::super::read::tests::made_up;
    use super::*;
    use crate::train::Test;
    use crate::train::breakdown::AtGap;
    use crate::train::evaluate::Evaluation;

    fn ids(figures: &[Figure]) -> Vec<&str> {
        figures.iter().map(|figure| figure.id).collect()
    }

    fn sized(model: &str, width: usize, seed: u64, accuracy: f64) -> Run {
        let (model, width) = (format!("model.name={model}"), format!("model.width={width}"));
        made_up(&[&model, &width, &format!("seed={seed}")], accuracy, accuracy)
    }

    fn of(runs: Vec<Run>) -> Vec<Figure> {
        let data = data(runs);
        figures(&data, &vec![Facts::default(); data.tasks.len()])
    }

    #[test]
    fn only_figures_with_several_values_of_x() {
        assert_eq!(ids(&of(vec![sized("gla", 32, 1, 0.5)])), ["learning_curves"]);
        let figures = of(vec![sized("gla", 32, 1, 0.5), sized("gla", 64, 1, 0.6)]);
        assert_eq!(ids(&figures), ["accuracy_by_parameters", "learning_curves"]);
    }

    #[test]
    fn points_are_means_over_seeds() {
        let runs = vec![sized("gla", 32, 1, 0.5), sized("gla", 32, 2, 0.7), sized("gla", 64, 1, 0.9)];
        let figures = of(runs);
        let lines = &figures[0].panels[0].lines;
        assert_eq!(lines.len(), 1);
        let points = &lines[0].points;
        let got: Vec<(f64, f64, usize)> =
            points.iter().map(|point| (point.x(), point.y().unwrap().mean, point.values.len())).collect();
        assert_eq!(got, [(32e3, 0.6, 2), (64e3, 0.9, 1)]);
        let ceiling = &figures[0].panels[0].ceiling;
        assert!(ceiling.len() == 1 && (ceiling[0].1 - 0.95).abs() < 1e-12, "{ceiling:?}");
    }

    #[test]
    fn complexity_takes_depth_and_vocabulary_along() {
        let complex = |a: usize, accuracy| made_up(&[&format!("task.ambiguities={a}")], 0.5, accuracy);
        let figures = of(vec![complex(20, 0.8), complex(40, 0.6)]);
        let figure = figures.iter().find(|figure| figure.id == "accuracy_by_complexity").unwrap();
        assert_eq!((figure.panels.len(), figure.panels[0].lines.len()), (1, 1));
        assert_eq!(figure.panels[0].ceiling.len(), 2);
        assert_eq!(named(figure.x, &figure.panels[0]), [20.0, 40.0]);
    }

    #[test]
    fn breakdowns_add_up_over_the_tests_of_a_run() {
        let by = |gap, right, elements| AtGap { gap, tally: Tally { right, elements } };
        let mut run = sized("gla", 32, 1, 0.5);
        let first = Breakdown { by_gap: vec![by(1, 1, 2), by(3, 1, 4)], ..Default::default() };
        let second = Breakdown { by_gap: vec![by(3, 3, 4), by(9, 0, 0)], ..Default::default() };
        let test = run.summary.tests[0].clone();
        run.summary.tests = [Some(first), None, Some(second)]
            .map(|breakdown| {
                let evaluation = Evaluation { breakdown, ..test.evaluation.clone() };
                Test { evaluation, ..test.clone() }
            })
            .into();
        assert_eq!(by_gap(&run), [(1.0, 0.5, None), (3.0, 0.5, None)]);
        let figures = of(vec![run]);
        assert_eq!(ids(&figures), ["learning_curves", "accuracy_by_gap_before"]);
        assert!(figures[1].panels[0].ceiling.is_empty());
    }

    #[test]
    fn curves_are_thinned_evenly() {
        assert_eq!(thinned(3, 5), [0, 1, 2]);
        assert_eq!(thinned(9, 5), [0, 2, 4, 6, 8]);
        let places = thinned(1000, CURVE);
        assert_eq!((places.len(), places[0], places[CURVE - 1]), (CURVE, 0, 999));
    }

    #[test]
    fn ticks_are_round() {
        assert_eq!(ticks(0.0, 1.0, false), [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]);
        assert_eq!(ticks(1e3, 1.2e6, true), [1e3, 1e4, 1e5, 1e6]);
        assert_eq!(ticks(2e4, 6e4, true).first(), Some(&2e4));
        assert_eq!(vertical(0.83, 0.97), (0.8, 1.0));
        assert_eq!(vertical(0.1, 0.97), (0.0, 1.0));
    }
}
