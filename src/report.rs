//! Tables and figures from run directories.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::Result;
use plotters::coord::Shift;
use plotters::coord::combinators::IntoLogRange;
use plotters::prelude::*;

use crate::config::{self, Config};
use crate::plot::{COLOURS, Drawn, FONT, INK, Picture};
use crate::train::{Summary, split_name};
use crate::{bad_input, files};

/// A finished run.
pub struct Run {
    pub dir: PathBuf,
    pub config: Config,
    pub summary: Summary,
    /// Samples seen and accuracy, at every evaluation.
    pub validation: Vec<(f64, f64)>,
}

impl Run {
    fn open(dir: &Path) -> Result<Self> {
        let summary = Summary::open(dir)?;
        let config = config::load::load(&dir.join("config.yaml"), &[])?;
        let path = dir.join("metrics.jsonl");
        let text = String::from_utf8_lossy(&files::read(&path, "the metrics of the run")?).into_owned();
        let mut validation = Vec::new();
        for line in text.lines() {
            let record: serde_json::Value =
                serde_json::from_str(line).map_err(|e| bad_input!("{} is damaged: {e}", path.display()))?;
            if let ("validation", Some(samples), Some(accuracy)) = (
                record["split"].as_str().unwrap_or(""),
                record["samples"].as_f64(),
                record["accuracy"].as_f64(),
            ) {
                validation.push((samples, accuracy));
            }
        }
        Ok(Self { dir: dir.to_path_buf(), config, summary, validation })
    }

    fn name(&self) -> String {
        self.dir.file_name().unwrap_or(self.dir.as_os_str()).to_string_lossy().into_owned()
    }
}

/// The finished runs in and below `dirs`, the most accurate first; and how many were not finished.
pub fn collect(dirs: &[PathBuf]) -> Result<(Vec<Run>, usize)> {
    let (mut found, mut unfinished) = (BTreeSet::new(), 0);
    let mut queue = dirs.to_vec();
    while let Some(dir) = queue.pop() {
        let entries =
            std::fs::read_dir(&dir).map_err(|e| bad_input!("cannot read {}: {e}", dir.display()))?;
        if dir.join("summary.json").exists() {
            found.insert(dir);
            continue;
        }
        unfinished += usize::from(dir.join("state.safetensors").exists());
        queue.extend(entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()));
    }
    let mut runs = found.iter().map(|dir| Run::open(dir)).collect::<Result<Vec<_>>>()?;
    runs.sort_by(|a, b| b.summary.accuracy.total_cmp(&a.summary.accuracy));
    Ok((runs, unfinished))
}

/// The columns of the tables, and whether they hold numbers.
pub const COLUMNS: [(&str, bool); 16] = [
    ("run", false),
    ("model", false),
    ("task", false),
    ("split", false),
    ("states", true),
    ("seed", true),
    ("width", true),
    ("layers", true),
    ("lr", true),
    ("parameters", true),
    ("state size", true),
    ("accuracy", true),
    ("ceiling", true),
    ("share", true),
    ("loss", true),
    ("seconds", true),
];

/// One run as cells under [`COLUMNS`].
pub fn cells(run: &Run) -> [String; COLUMNS.len()] {
    let (summary, config) = (&run.summary, &run.config);
    [
        run.name(),
        summary.model.clone(),
        serde_json::to_value(summary.task)
            .ok()
            .and_then(|v| Some(v.as_str()?.to_string()))
            .unwrap_or_default(),
        match summary.emulate.is_empty() {
            true => split_name(summary.split).to_string(),
            false => format!("{}, as the released code", split_name(summary.split)),
        },
        config.task.states().to_string(),
        summary.seed.to_string(),
        config.model.width.to_string(),
        config.model.layers.to_string(),
        config.train.lr.to_string(),
        summary.parameters.to_string(),
        summary.state_size.map_or("grows".into(), |floats| floats.to_string()),
        format!("{:.4}", summary.accuracy),
        format!("{:.4}", summary.ceiling),
        format!("{:.4}", summary.accuracy / summary.ceiling),
        format!("{:.4}", summary.loss),
        format!("{:.1}", summary.seconds),
    ]
}

/// Writes `report.md`, `runs.csv`, and the figures as SVG and PNG; gives the names of the files.
pub fn write(runs: &[Run], out: &Path) -> Result<Vec<PathBuf>> {
    let mut written = Vec::new();
    let figures: [(&str, Figure); 2] = [
        ("learning_curves", Figure { runs, kind: Kind::Learning }),
        ("accuracy_by_parameters", Figure { runs, kind: Kind::Parameters }),
    ];
    for (name, figure) in &figures {
        for (extension, format) in [("svg", crate::plot::Format::Svg), ("png", crate::plot::Format::Png)] {
            let path = out.join(format!("{name}.{extension}"));
            crate::plot::save(figure, &path, format)?;
            written.push(path);
        }
    }
    for (name, text) in [("report.md", markdown(runs)), ("runs.csv", csv(runs)?)] {
        let path = out.join(name);
        files::write_atomic(&path, |file| file.write_all(text.as_bytes()))?;
        written.push(path);
    }
    Ok(written)
}

fn markdown(runs: &[Run]) -> String {
    let row = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let mut text = String::from(
        "# Runs\n\nAccuracy is that of the final weights on the test samples; the ceiling is what an observer that knows the grammar reaches, share their ratio.\n\n",
    );
    text += &row(COLUMNS.iter().map(|(name, _)| name.to_string()).collect());
    text +=
        &row(COLUMNS.iter().map(|(_, number)| if *number { "---:" } else { "---" }.to_string()).collect());
    for run in runs {
        text += &row(cells(run).to_vec());
    }
    text += "\n![Learning curves](learning_curves.svg)\n\n![Accuracy by parameters](accuracy_by_parameters.svg)\n";
    text
}

fn csv(runs: &[Run]) -> Result<String> {
    let mut writer = csv::Writer::from_writer(vec![]);
    writer.write_record(COLUMNS.map(|(name, _)| name))?;
    for run in runs {
        writer.write_record(cells(run))?;
    }
    Ok(String::from_utf8(writer.into_inner()?)?)
}

#[derive(Clone, Copy)]
enum Kind {
    /// Validation accuracy against samples seen.
    Learning,
    /// Test accuracy against parameters.
    Parameters,
}

struct Figure<'a> {
    runs: &'a [Run],
    kind: Kind,
}

impl Figure<'_> {
    /// The models in the figure, in the order of the registry; each has a colour.
    fn models(&self) -> Vec<&str> {
        let mut models: Vec<&str> = crate::model::MODELS.iter().map(|model| model.name).collect();
        models.retain(|name| self.runs.iter().any(|run| run.summary.model == *name));
        models
    }

    fn colour(&self, model: &str) -> RGBColor {
        let place = crate::model::MODELS.iter().position(|known| known.name == model).unwrap_or(0);
        COLOURS[place % COLOURS.len()]
    }
}

/// An axis with room on both sides: 1, 2, 5 steps of a logarithmic one are too coarse for few runs.
fn around(values: impl Iterator<Item = f64> + Clone) -> std::ops::Range<f64> {
    let low = values.clone().fold(f64::INFINITY, f64::min);
    let high = values.fold(f64::NEG_INFINITY, f64::max);
    low / 2.0..high * 2.0
}

impl Picture for Figure<'_> {
    fn size(&self) -> (u32, u32) {
        (900, 560)
    }

    fn draw<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>) -> Drawn<B> {
        root.fill(&WHITE)?;
        let most = self.runs.iter().flat_map(|run| &run.validation).map(|(samples, _)| *samples);
        let most = most.fold(1.0, f64::max);
        let mut builder = ChartBuilder::on(root);
        builder.margin(24).x_label_area_size(52).y_label_area_size(64);
        let percent = |y: &f64| format!("{:.0} %", 100.0 * y);
        let label = (FONT, 14).into_font().color(&INK);
        macro_rules! mesh {
            ($chart:ident, $name:expr) => {
                $chart
                    .configure_mesh()
                    .light_line_style(WHITE)
                    .bold_line_style(RGBColor(225, 225, 225))
                    .axis_style(INK)
                    .x_desc($name)
                    .y_desc("accuracy")
                    .y_label_formatter(&percent)
                    .x_label_formatter(&|x| crate::train::count(*x))
                    .label_style(label.clone())
                    .axis_desc_style((FONT, 15).into_font().color(&INK))
                    .draw()?
            };
        }
        macro_rules! legend {
            ($chart:ident) => {
                $chart
                    .configure_series_labels()
                    .position(SeriesLabelPosition::LowerRight)
                    .margin(12)
                    .background_style(WHITE.mix(0.85))
                    .border_style(RGBColor(190, 190, 190))
                    .label_font(label.clone())
                    .draw()?
            };
        }
        // The highest ceiling: a line that no run should cross by more than chance.
        let ceiling = self.runs.iter().map(|run| run.summary.ceiling).fold(0.0, f64::max);
        let dashes = INK.mix(0.6).stroke_width(1);
        match self.kind {
            Kind::Learning => {
                let mut chart = builder.build_cartesian_2d(0.0..most, 0.0..1.0)?;
                mesh!(chart, "training samples");
                chart
                    .draw_series(DashedLineSeries::new([(0.0, ceiling), (most, ceiling)], 6, 4, dashes))?
                    .label("Bayes ceiling")
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], dashes));
                for model in self.models() {
                    let colour = self.colour(model);
                    let runs: Vec<&Run> = self.runs.iter().filter(|run| run.summary.model == model).collect();
                    for (i, run) in runs.iter().enumerate() {
                        let line = LineSeries::new(run.validation.iter().copied(), colour.stroke_width(2));
                        let series = chart.draw_series(line)?;
                        if i == 0 {
                            series.label(model).legend(move |(x, y)| {
                                PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2))
                            });
                        }
                        let dots = run.validation.iter().map(|&point| Circle::new(point, 3, colour.filled()));
                        chart.draw_series(dots)?;
                    }
                }
                legend!(chart);
            }
            Kind::Parameters => {
                let sizes = around(self.runs.iter().map(|run| run.summary.parameters as f64));
                let line = [(sizes.start, ceiling), (sizes.end, ceiling)];
                let mut chart = builder.build_cartesian_2d(sizes.log_scale(), 0.0..1.0)?;
                mesh!(chart, "parameters");
                chart
                    .draw_series(DashedLineSeries::new(line, 6, 4, dashes))?
                    .label("Bayes ceiling")
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], dashes));
                for model in self.models() {
                    let colour = self.colour(model);
                    let runs = self.runs.iter().filter(|run| run.summary.model == model);
                    let points = runs.map(|run| (run.summary.parameters as f64, run.summary.accuracy));
                    chart
                        .draw_series(points.map(|point| Circle::new(point, 5, colour.filled())))?
                        .label(model)
                        .legend(move |(x, y)| Circle::new((x + 9, y), 5, colour.filled()));
                }
                legend!(chart);
            }
        }
        root.present()
    }
}
