//! `selectivbench report`: tables and figures from run directories.

use std::path::PathBuf;

use super::{print, table};
use crate::report::{COLUMNS, cells, collect, write};
use crate::{bail_input, files};

/// Make tables and figures from run directories.
///
/// Prints the finished runs in and below the given directories, the most accurate first, and writes
/// report.md, runs.csv and figures (SVG and PNG) with --out.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  selectivbench report runs
  selectivbench report runs/mamba2 runs/gla --out report")]
pub struct ReportArgs {
    /// Run directories, or folders of them
    #[arg(required = true, value_name = "DIR")]
    dirs: Vec<PathBuf>,
    /// Write the report here
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

pub fn run(args: ReportArgs) -> anyhow::Result<()> {
    let (runs, unfinished) = collect(&args.dirs)?;
    if runs.is_empty() {
        let dirs: Vec<String> = args.dirs.iter().map(|dir| dir.display().to_string()).collect();
        bail_input!("no finished run in {} ({unfinished} unfinished)", dirs.join(", "))
    }
    // The terminal has room for what differs: the columns with one value in all runs go into a line.
    let rows: Vec<_> = runs.iter().map(cells).collect();
    let constant = |column: usize| rows.len() > 1 && rows.iter().all(|row| row[column] == rows[0][column]);
    let (same, shown): (Vec<usize>, Vec<usize>) = (0..COLUMNS.len()).partition(|&column| constant(column));
    let names: Vec<&str> = shown.iter().map(|&column| COLUMNS[column].0).collect();
    let numbers: Vec<usize> = (0..shown.len()).filter(|&i| COLUMNS[shown[i]].1).collect();
    let mut table = table(&names, numbers);
    for row in &rows {
        table.add_row(shown.iter().map(|&column| row[column].as_str()));
    }
    print(&table)?;
    if !same.is_empty() {
        let same: Vec<String> =
            same.iter().map(|&column| format!("{} {}", COLUMNS[column].0, rows[0][column])).collect();
        print(format_args!("all runs: {}", same.join(", ")))?;
    }
    if unfinished > 0 {
        print(format_args!("{unfinished} unfinished runs are left out"))?;
    }
    if let Some(out) = &args.out {
        files::create_folder(out)?;
        for path in write(&runs, out)? {
            print(path.display())?;
        }
    }
    Ok(())
}
