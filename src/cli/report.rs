//! `selectivbench report`: tables, figures and a page from run directories.

use std::path::PathBuf;

use super::{print, table};
use crate::files;
use crate::report::{Report, TUNED, collect, findings, plural, said, tables};

/// Make tables, figures and a web page from run directories.
///
/// Takes the finished runs in and below the given directories; the folder of a sweep will do. Runs that
/// differ only in the seed are averaged; among those that differ only in the tuned hyper-parameters the
/// best by mean validation accuracy stand for all. Prints the settings, the most accurate first, or the
/// runs if there is one of each. With --out it writes report.html (open it in a browser: all in one file),
/// report.md, settings.csv, candidates.csv, runs.csv, and figures as SVG and PNG.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  selectivbench report runs
  selectivbench report runs/mamba2 runs/gla --out report
  selectivbench report runs/sweep --tuned train.lr,train.weight_decay --out report")]
pub struct ReportArgs {
    /// Run directories, or folders of them
    #[arg(required = true, value_name = "DIR")]
    dirs: Vec<PathBuf>,
    /// Write the report here
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Hyper-parameters that the validation chooses between
    #[arg(long, value_name = "KEYS", value_delimiter = ',', default_values = TUNED)]
    tuned: Vec<String>,
}

/// Failures and notes that the terminal shows; all of them stand in the report.
const REMARKS: usize = 5;

pub fn run(args: ReportArgs) -> anyhow::Result<()> {
    let data = collect(&args.dirs, &args.tuned)?;
    if let Some(out) = &args.out {
        files::create_folder(out)?;
    }
    let single = data.groups.len() == data.settings.len() && data.groups.iter().all(|g| g.runs.len() == 1);
    let shown = if single { tables::runs(&data) } else { tables::settings(&data) };
    // The terminal has room for what differs: the columns with one value in all rows go into a line.
    let (shown, constant) = shown.split();
    let names: Vec<&str> = shown.columns.iter().map(|column| &column.name[..]).collect();
    let numbers = (0..shown.columns.len()).filter(|&at| shown.columns[at].number);
    let mut table = table(&names, numbers);
    for row in &shown.rows {
        table.add_row(row.iter().map(|cell| &cell.text[..]));
    }
    print(&table)?;
    if !constant.is_empty() {
        print(format_args!("all: {}", said(&constant)))?;
    }
    if !single {
        for task in &data.tasks {
            print(format_args!("\n{}: {}", task.label, findings(&data, task)))?;
        }
    }
    if data.unfinished > 0 {
        let (runs, are) =
            (plural(data.unfinished, "unfinished run"), if data.unfinished == 1 { "is" } else { "are" });
        print(format_args!("{runs} {are} left out"))?;
    }
    if !data.failed.is_empty() {
        print(format_args!("{}:", plural(data.failed.len(), "failed run")))?;
    }
    let failed = data.failed.iter().map(|failure| format!("  {}: {}", failure.run, failure.reason));
    few(failed)?;
    few(data.notes.iter().map(|note| format!("note: {note}")))?;
    if let Some(out) = &args.out {
        for path in Report::new(&data).write(out)? {
            print(path.display())?;
        }
    }
    Ok(())
}

/// Prints the first few lines, and how many more there are.
fn few(lines: impl ExactSizeIterator<Item = String>) -> anyhow::Result<()> {
    let more = lines.len().saturating_sub(REMARKS);
    lines.take(REMARKS).try_for_each(print)?;
    if more > 0 {
        print(format_args!("  and {more} more; --out writes all of them"))?;
    }
    Ok(())
}
