//! Tables, figures and one self-contained page from run directories.
//!
//! `read` opens the runs, `data` says which belong together, `figures` what there is to see; `tables`,
//! `draw` and `page` show it. What `data` decides (what is averaged, how hyper-parameters were chosen)
//! every form of the report says.

mod data;
mod draw;
mod facts;
mod figures;
mod findings;
mod page;
mod read;
mod stats;
mod style;
pub mod tables;

use std::path::{Path, PathBuf};

use anyhow::Result;

use self::draw::Chart;
use self::figures::{Figure, Panel};
use crate::plot::{self, Format};
use crate::{bail_input, files};

pub use self::data::{Data, TUNED};
pub use self::findings::findings;
pub use self::read::Collection;

/// How the numbers are to be read.
const METHOD: &str = "Accuracy is that of the final weights on the test samples, as the mean over seeds; sd is \
    the standard deviation over seeds, 95 % ± half the confidence interval of the mean (Student's t), n the number \
    of seeds. Among runs that differ only in the tuned hyper-parameters those with the highest mean validation \
    accuracy at the end of training stand for all; the test chooses nothing. The ceiling is what an observer reaches \
    that knows the grammar and has seen everything so far; \"last k\" is one that has seen only the last k elements. \
    Where the next symbol is predicted (objective predict), accuracy and ceiling are those of the next symbol, and KL \
    is the mean divergence from its target distribution in nats: the ideal observer's on held-out samples, the \
    grammar's own as released. Runs of different objective, split, emulation, number format or version are never \
    averaged or ranked together.";

/// A report that can be written.
pub struct Report<'a> {
    data: &'a Data,
    figures: Vec<Figure>,
    /// What was left out or repaired.
    notes: Vec<String>,
}

impl<'a> Report<'a> {
    /// Works out what the figures need beside the runs.
    pub fn new(data: &'a Data) -> Self {
        let mut notes = data.notes.clone();
        let facts = facts::facts(data, &mut notes);
        let figures = figures::figures(data, &facts);
        Self { data, figures, notes }
    }

    /// Writes `report.html`, `report.md`, the tables as CSV, and in `figures` every panel as SVG and PNG;
    /// gives the names of the files.
    pub fn write(&self, out: &Path) -> Result<Vec<PathBuf>> {
        let mut written = Vec::new();
        let mut write = |name: &str, text: &str| -> Result<()> {
            let path = out.join(name);
            files::write_atomic(&path, |file| file.write_all(text.as_bytes()))?;
            written.push(path);
            Ok(())
        };
        write("report.html", &page::page(self, out)?)?;
        write("report.md", &self.markdown())?;
        write("settings.csv", &tables::settings(self.data).csv()?)?;
        write("candidates.csv", &tables::candidates(self.data).csv()?)?;
        write("runs.csv", &tables::runs(self.data).csv()?)?;
        let folder = out.join("figures");
        files::create_folder(&folder)?;
        for figure in &self.figures {
            for panel in &figure.panels {
                for (extension, format) in [("svg", Format::Svg), ("png", Format::Png)] {
                    let path = folder.join(format!("{}.{extension}", file_name(figure, panel)));
                    plot::save(&chart(figure, panel), &path, format)?;
                    written.push(path);
                }
            }
        }
        Ok(written)
    }

    fn markdown(&self) -> String {
        let data = self.data;
        let mut text = format!("# Report\n\n{}.\n\n", self.counted());
        for task in &data.tasks {
            text += &format!("## {}\n\n{}\n\n", task.label, findings(data, task));
        }
        text += &format!("## Settings\n\n{METHOD}\n\n");
        let mut table = |table: tables::Table| {
            let (table, constant) = table.split();
            text += &table.markdown();
            if !constant.is_empty() {
                text += &format!("\nAll: {}.\n", said(&constant));
            }
        };
        table(tables::settings(data));
        let candidates = tables::candidates(data);
        if !candidates.rows.is_empty() {
            text += "\n## How the hyper-parameters were chosen\n\n";
            text += &candidates.markdown();
        }
        for figure in &self.figures {
            text += &format!("\n## {}\n\n{}\n\n", figure.title, figure.about);
            for panel in &figure.panels {
                text += &format!("![{}](figures/{}.svg)\n\n", panel.label, file_name(figure, panel));
            }
        }
        if !self.remarks().is_empty() {
            text += "\n## What is not in it\n\n";
            self.remarks().iter().for_each(|remark| text += &format!("- {remark}\n"));
        }
        text + "\nEvery run stands in `runs.csv`; `report.html` leads from each point to its runs.\n"
    }

    /// 56 runs of 28 settings on 1 task; …
    fn counted(&self) -> String {
        let data = self.data;
        let runs = data.groups.iter().map(|group| group.runs.len()).sum();
        let mut text = [
            plural(runs, "finished run"),
            plural(data.settings.len(), "setting"),
            plural(data.tasks.len(), "task"),
        ]
        .join(", ");
        if data.unfinished > 0 {
            text += &format!("; {} left out", plural(data.unfinished, "unfinished run"));
        }
        if !data.failed.is_empty() {
            text += &format!("; {}", plural(data.failed.len(), "failed run"));
        }
        text
    }

    /// Failed runs and notes, one sentence each.
    fn remarks(&self) -> Vec<String> {
        let failed =
            self.data.failed.iter().map(|failure| format!("{} failed: {}", failure.run, failure.reason));
        failed.chain(self.notes.iter().cloned()).collect()
    }
}

/// model mamba2, split held-out
pub fn said(constant: &[(String, String)]) -> String {
    constant.iter().map(|(name, text)| format!("{name} {text}")).collect::<Vec<_>>().join(", ")
}

/// 1 run, 2 runs.
pub fn plural(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

fn chart<'a>(figure: &'a Figure, panel: &'a Panel) -> Chart<'a> {
    Chart { title: figure.title, axis: figure.x, panel }
}

/// The name of a panel's files, without the extension.
fn file_name(figure: &Figure, panel: &Panel) -> String {
    if figure.panels.len() == 1 {
        return figure.id.into();
    }
    let words: Vec<String> = panel
        .label
        .split(|c: char| !(c.is_alphanumeric() || c == '.'))
        .filter(|word| !word.is_empty())
        .map(str::to_lowercase)
        .collect();
    format!("{}-{}", figure.id, words.join("-"))
}

/// The finished runs in and below `dirs`, grouped; refuses folders without any.
pub fn collect(dirs: &[PathBuf], tuned: &[String]) -> Result<Data> {
    let collection = Collection::open(dirs)?;
    if collection.runs.is_empty() {
        let dirs: Vec<String> = dirs.iter().map(|dir| dir.display().to_string()).collect();
        let mut text = format!("no finished run in {}", dirs.join(", "));
        let counts = [(collection.unfinished.len(), "unfinished"), (collection.failed.len(), "failed")];
        let counts: Vec<String> =
            counts.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}")).collect();
        if !counts.is_empty() {
            text += &format!(" ({})", counts.join(", "));
        }
        let reasons = collection.failed.iter().map(|failure| &failure.reason).chain(&collection.notes);
        if let Some(reason) = reasons.into_iter().next() {
            text += &format!("; {reason}");
        }
        bail_input!("{text}")
    }
    Data::new(collection, tuned)
}
