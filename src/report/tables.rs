//! Tables of runs, candidates and settings, and their forms: Markdown, CSV, and cells for others.

use anyhow::Result;

use super::data::{Data, short};
use super::read::Run;
use super::stats::Stats;
use crate::config::Emulate;
use crate::train::{count, split_name};

/// A heading.
#[derive(Clone, Debug)]
pub struct Column {
    /// A word for programs.
    pub key: String,
    pub name: String,
    pub number: bool,
    /// Said by another column already, but programs want it by itself.
    pub spare: bool,
}

/// A value.
#[derive(Clone, Debug, PartialEq)]
pub struct Cell {
    /// For people.
    pub text: String,
    /// For programs, and to sort by.
    pub raw: String,
}

/// Rows under columns.
#[derive(Clone, Debug)]
pub struct Table {
    pub columns: Vec<Column>,
    pub rows: Vec<Vec<Cell>>,
    /// What each row is about: an index into the runs, groups or settings.
    pub about: Vec<usize>,
}

impl Table {
    fn new(about: Vec<usize>) -> Self {
        Self { columns: vec![], rows: vec![vec![]; about.len()], about }
    }

    fn column(&mut self, key: &str, name: &str, number: bool, cell: impl Fn(usize) -> Cell) {
        self.columns.push(Column { key: key.into(), name: name.into(), number, spare: false });
        for (row, &about) in self.rows.iter_mut().zip(&self.about) {
            row.push(cell(about));
        }
    }

    /// The table for people, without the columns that have one value in several rows, and these.
    pub fn split(&self) -> (Table, Vec<(String, String)>) {
        let wanted = (0..self.columns.len()).filter(|&at| !self.columns[at].spare);
        // The number of seeds belongs to every mean.
        let same = |at: usize| {
            self.columns[at].key != "n"
                && self.rows.len() > 1
                && self.rows.iter().all(|row| row[at] == self.rows[0][at])
        };
        let (constant, kept): (Vec<usize>, Vec<usize>) = wanted.partition(|&at| same(at));
        let pick = |row: &Vec<Cell>| kept.iter().map(|&at| row[at].clone()).collect();
        let table = Table {
            columns: kept.iter().map(|&at| self.columns[at].clone()).collect(),
            rows: self.rows.iter().map(pick).collect(),
            about: self.about.clone(),
        };
        let constant =
            constant.into_iter().map(|at| (self.columns[at].name.clone(), self.rows[0][at].text.clone()));
        (table, constant.filter(|(_, text)| !text.is_empty()).collect())
    }

    pub fn markdown(&self) -> String {
        let row = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
        let escaped = |text: &str| text.replace('|', "\\|").replace('\n', " ");
        let mut text = row(self.columns.iter().map(|column| escaped(&column.name)).collect());
        text += &row(self.columns.iter().map(|c| if c.number { "---:" } else { "---" }.into()).collect());
        for cells in &self.rows {
            text += &row(cells.iter().map(|cell| escaped(&cell.text)).collect());
        }
        text
    }

    pub fn csv(&self) -> Result<String> {
        let mut writer = csv::Writer::from_writer(vec![]);
        writer.write_record(self.columns.iter().map(|column| &column.key))?;
        for row in &self.rows {
            writer.write_record(row.iter().map(|cell| &cell.raw))?;
        }
        Ok(String::from_utf8(writer.into_inner()?)?)
    }
}

fn word(text: impl Into<String>) -> Cell {
    let text = text.into();
    Cell { raw: text.clone(), text }
}

fn number(value: Option<f64>, text: impl Fn(f64) -> String) -> Cell {
    match value {
        Some(value) => Cell { text: text(value), raw: value.to_string() },
        None => word(""),
    }
}

/// 93.45 %.
pub fn percent(share: f64) -> String {
    format!("{:.2} %", 100.0 * share)
}

fn share(value: Option<f64>) -> Cell {
    number(value, percent)
}

fn decimals(places: usize) -> impl Fn(f64) -> String {
    move |value| format!("{value:.places$}")
}

/// Seconds for people.
pub fn seconds(value: f64) -> String {
    match value {
        s if s < 100.0 => format!("{s:.1} s"),
        s if s < 5400.0 => format!("{:.1} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

fn state(run: &Run) -> Cell {
    run.summary.state_size.map_or(word("grows"), |floats| number(Some(floats as f64), count))
}

fn mode(run: &Run) -> Cell {
    let split = split_name(run.summary.split);
    word(match run.config.train.emulate {
        Emulate::None => split.to_string(),
        Emulate::Authors => format!("{split}, as the released code"),
    })
}

/// The columns that say what a run or a setting is: all before its seed.
fn describe<'a>(
    table: &mut Table,
    data: &'a Data,
    setting: impl Fn(usize) -> usize + Copy,
    run: impl Fn(usize) -> &'a Run + Copy,
) {
    let task = |i: usize| &data.tasks[data.settings[setting(i)].task];
    table.column("model", "model", false, |i| word(&*run(i).summary.model));
    table.column("task", "task", false, |i| word(&*task(i).label));
    table.column("objective", "objective", false, |i| word(run(i).config.task.objective.name()));
    table.column("split", "split", false, |i| mode(run(i)));
    table.column("precision", "precision", false, |i| word(&*run(i).summary.precision));
    table.column("version", "version", false, |i| word(&*run(i).summary.version));
    table.column("states", "states", true, |i| number(Some(run(i).config.task.states() as f64), decimals(0)));
    table.column("width", "width", true, |i| word(&*run(i).fields["model.width"]));
    const SHOWN: [&str; 7] = [
        "task.objective",
        "task.split",
        "train.emulate",
        "train.precision",
        "version",
        "model.name",
        "model.width",
    ];
    for key in data.varying().into_iter().filter(|key| !SHOWN.contains(key)) {
        let value = |i: usize| run(i).fields.get(key).map_or("", String::as_str);
        let numbers = table.about.iter().all(|&i| value(i).parse::<f64>().is_ok());
        // The task's label tells its fields, as far as they tell it from others.
        let spare = !key.starts_with("model.") || data.follows(key, "model.width");
        table.column(key, short(key), numbers, |i| word(value(i)));
        table.columns.last_mut().expect("the column just made").spare = spare;
    }
    for key in &data.tuned {
        table.column(key, short(key), true, |i| word(&*run(i).fields[key]));
    }
}

/// Whether any run has a divergence to show.
fn predicts(data: &Data) -> bool {
    data.runs.iter().any(|run| run.summary.kl.is_some())
}

fn parameters<'a>(table: &mut Table, run: impl Fn(usize) -> &'a Run + Copy) {
    table.column("parameters", "parameters", true, |i| number(Some(run(i).summary.parameters as f64), count));
    table.column("state_size", "state size", true, |i| state(run(i)));
}

/// Every run, tasks in their order and the most accurate first.
pub fn runs(data: &Data) -> Table {
    let group_of = data.group_of();
    let task = |run: usize| data.settings[data.groups[group_of[run]].setting].task;
    let accuracy = |run: usize| data.runs[run].summary.accuracy;
    let mut order: Vec<usize> = (0..data.runs.len()).collect();
    order.sort_by(|&a, &b| task(a).cmp(&task(b)).then(accuracy(b).total_cmp(&accuracy(a))));
    let mut table = Table::new(order);
    let run = |i: usize| &data.runs[i];
    table.column("run", "run", false, |i| word(&*run(i).name));
    describe(&mut table, data, |i| data.groups[group_of[i]].setting, run);
    table.column("seed", "seed", true, |i| word(run(i).summary.seed.to_string()));
    table.column("validation", "validation", true, |i| share(run(i).last_validation()));
    table.column("accuracy", "accuracy", true, |i| share(Some(run(i).summary.accuracy)));
    table.column("ceiling", "ceiling", true, |i| share(Some(run(i).summary.ceiling)));
    let of_ceiling = |run: &Run| Some(run.summary.accuracy / run.summary.ceiling).filter(|x| x.is_finite());
    table.column("share", "of ceiling", true, |i| share(of_ceiling(run(i))));
    table.column("loss", "loss", true, |i| number(Some(run(i).summary.loss), decimals(4)));
    if predicts(data) {
        table.column("kl", "KL", true, |i| number(run(i).summary.kl, decimals(4)));
    }
    parameters(&mut table, run);
    table.column("seconds", "time", true, |i| number(Some(run(i).summary.seconds), seconds));
    table.column("tokens_per_s", "tokens/s", true, |i| number(Some(run(i).summary.tokens_per_s), count));
    table.column("device", "device", false, |i| word(&*run(i).summary.device));
    table
}

/// Every setting, tasks in their order and the most accurate first.
pub fn settings(data: &Data) -> Table {
    let mean = |&i: &usize| data.chosen(&data.settings[i]).accuracy.map_or(f64::NAN, |a| a.mean);
    let ranked = data.tasks.iter().flat_map(|task| {
        let mut settings = task.settings.clone();
        settings.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
        settings
    });
    let mut table = Table::new(ranked.collect());
    let first = |i: usize| &data.runs[data.chosen(&data.settings[i]).runs[0]];
    let over = |i: usize, value: fn(&Run) -> f64| data.over_seeds(&data.settings[i], value);
    describe(&mut table, data, |i| i, first);
    let accuracy = |i: usize| data.chosen(&data.settings[i]).accuracy;
    let validation = |i: usize| data.chosen(&data.settings[i]).validation;
    let complete = |i: usize| !data.chosen(&data.settings[i]).incomplete;
    table.column("complete", "seeds", false, |i| word(if complete(i) { "" } else { "fewer than others" }));
    table.column("n", "n", true, |i| word(data.chosen(&data.settings[i]).runs.len().to_string()));
    table.column("accuracy", "accuracy", true, |i| share(accuracy(i).map(|a| a.mean)));
    table.column("sd", "sd", true, |i| share(accuracy(i).and_then(|a| a.sd)));
    table.column("ci95", "95 % ±", true, |i| share(accuracy(i).and_then(|a| a.interval())));
    table.column("ceiling", "ceiling", true, |i| share(over(i, |run| run.summary.ceiling).map(|c| c.mean)));
    let of_ceiling = |i| over(i, |run| run.summary.accuracy / run.summary.ceiling).map(|s| s.mean);
    table.column("share", "of ceiling", true, |i| share(of_ceiling(i)));
    table.column("loss", "loss", true, |i| {
        number(over(i, |run| run.summary.loss).map(|l| l.mean), decimals(4))
    });
    if predicts(data) {
        let kl = |i| over(i, |run| run.summary.kl.unwrap_or(f64::NAN)).map(|kl| kl.mean);
        table.column("kl", "KL", true, |i| number(kl(i).filter(|kl| kl.is_finite()), decimals(4)));
    }
    table.column("validation", "validation", true, |i| share(validation(i).map(|v| v.mean)));
    table.column("candidates", "candidates", true, |i| word(data.settings[i].groups.len().to_string()));
    parameters(&mut table, first);
    table.column("seconds", "time", true, |i| {
        number(over(i, |run| run.summary.seconds).map(|s| s.mean), seconds)
    });
    let speed = |i| over(i, |run| run.summary.tokens_per_s).map(|s| s.mean);
    table.column("tokens_per_s", "tokens/s", true, |i| number(speed(i), count));
    table
}

/// Every candidate of settings that had a choice, with the reason of the choice.
pub fn candidates(data: &Data) -> Table {
    let settings = data.tasks.iter().flat_map(|task| &task.settings).map(|&i| &data.settings[i]);
    let open = settings.filter(|setting| setting.groups.len() > 1);
    let mut table = Table::new(open.flat_map(|setting| setting.groups.clone()).collect());
    let setting = |i: usize| &data.settings[data.groups[i].setting];
    let chosen = |i: usize| setting(i).chosen == i;
    table.column("task", "task", false, |i| word(&*data.tasks[setting(i).task].label));
    table.column("setting", "setting", false, |i| word(&*setting(i).label));
    for (at, key) in data.tuned.iter().enumerate() {
        table.column(key, short(key), true, |i| word(&*data.groups[i].tuned[at].1));
    }
    let mean = |stats: Option<Stats>| share(stats.map(|stats| stats.mean));
    table.column("n", "n", true, |i| word(data.groups[i].runs.len().to_string()));
    table.column("validation", "validation", true, |i| mean(data.groups[i].validation));
    table.column("sd", "sd", true, |i| share(data.groups[i].validation.and_then(|v| v.sd)));
    table.column("chosen", "chosen", false, |i| word(if chosen(i) { "yes" } else { "" }));
    table.column("reason", "why", false, |i| word(if chosen(i) { &setting(i).reason[..] } else { "" }));
    table
}

#[cfg(test)]
mod tests {
    use super::super::data::tests::data;
    use super::super::read::tests::made_up;
    use super::*;

    fn sample() -> Data {
        let run = |lr: &str, seed: u64, validation, accuracy| {
            made_up(&[&format!("train.lr={lr}"), &format!("seed={seed}")], validation, accuracy)
        };
        data(vec![
            run("0.001", 1, 0.5, 0.6),
            run("0.001", 2, 0.5, 0.8),
            run("0.002", 1, 0.4, 0.9),
            run("0.002", 2, 0.4, 0.9),
        ])
    }

    fn cell<'a>(table: &'a Table, row: usize, key: &str) -> &'a Cell {
        &table.rows[row][table.columns.iter().position(|column| column.key == key).unwrap()]
    }

    #[test]
    fn settings_show_the_chosen_group() {
        let table = settings(&sample());
        assert_eq!(table.rows.len(), 1);
        for (key, want) in [
            ("train.lr", "0.001"),
            ("n", "2"),
            ("candidates", "2"),
            ("validation", "50.00 %"),
            ("accuracy", "70.00 %"),
            ("sd", "14.14 %"),
            ("ceiling", "95.00 %"),
        ] {
            assert_eq!(cell(&table, 0, key).text, want, "{key}");
        }
        assert!((cell(&table, 0, "ci95").raw.parse::<f64>().unwrap() - 12.7062 * 0.1).abs() < 1e-6);
    }

    #[test]
    fn candidates_show_who_was_chosen_and_why() {
        let table = candidates(&sample());
        let chosen: Vec<&str> = (0..2).map(|row| &cell(&table, row, "chosen").text[..]).collect();
        assert_eq!(chosen, ["yes", ""]);
        assert!(cell(&table, 0, "reason").text.contains("of 2 candidates"));
    }

    #[test]
    fn one_run_has_no_spread_and_its_cells_are_empty() {
        let table = settings(&data(vec![made_up(&[], 0.5, 0.5)]));
        assert_eq!((&cell(&table, 0, "sd").text[..], &cell(&table, 0, "ci95").text[..]), ("", ""));
        let text = table.markdown() + &table.csv().unwrap();
        assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
    }

    #[test]
    fn constant_columns_can_be_told_once() {
        let (table, constant) = runs(&sample()).split();
        assert!(constant.contains(&("model".into(), "mamba2".into())));
        assert!(table.columns.iter().any(|column| column.key == "seed"));
        assert!(table.columns.iter().all(|column| column.key != "model"));
        assert_eq!(table.rows.len(), 4);
    }

    #[test]
    fn csv_holds_whole_numbers_and_quotes() {
        let text = runs(&sample()).csv().unwrap();
        let mut reader = csv::Reader::from_reader(text.as_bytes());
        let at = reader.headers().unwrap().iter().position(|key| key == "accuracy").unwrap();
        let first: f64 = reader.records().next().unwrap().unwrap()[at].parse().unwrap();
        assert_eq!(first, 0.9);
    }
}
