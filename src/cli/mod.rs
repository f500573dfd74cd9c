//! The command line: one file per subcommand.

mod cells;
mod data;
mod devices;
mod doctor;
mod eval;
mod inspect;
mod models;
mod predict;
mod profile;
mod report;
mod sweep;
mod tasks;
mod train;
mod transfer;

use std::io::Write;

use clap::{Parser, Subcommand};
use comfy_table::{CellAlignment, ContentArrangement, LineStyle, Table, presets};

use crate::bad_input;
use crate::task::Part;

/// Version, commit, and what the build computes on.
#[cfg(not(feature = "cuda"))]
const LONG_VERSION: &str =
    concat!(env!("CARGO_PKG_VERSION"), "\ncommit ", env!("SELECTIVBENCH_COMMIT"), "\ncpu");
#[cfg(feature = "cuda")]
const LONG_VERSION: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    "\ncommit ",
    env!("SELECTIVBENCH_COMMIT"),
    "\ncpu, cuda ",
    env!("SELECTIVBENCH_CUDA_VERSION"),
    " for compute capability ",
    env!("SELECTIVBENCH_CUDA_CAPS")
);

/// Train, evaluate and profile linear recurrent sequence models on SelectivBench tasks.
#[derive(Parser, Debug)]
#[command(
    version,
    long_version = LONG_VERSION,
    max_term_width = 100,
    after_help = "Exit codes: 0 done, 1 failed while running, 2 bad input or configuration, 130 interrupted.

Start here:
  selectivbench train configs/quickstart.yaml"
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Threads to compute with [default: one per core]
    #[arg(long, global = true, value_name = "N")]
    threads: Option<usize>,
}

#[derive(Subcommand, Debug)]
enum Command {
    Train(train::TrainArgs),
    Eval(eval::EvalArgs),
    Inspect(inspect::InspectArgs),
    Predict(predict::PredictArgs),
    Import(transfer::ImportArgs),
    Export(transfer::ExportArgs),
    Sweep(sweep::SweepArgs),
    Report(report::ReportArgs),
    Data(data::DataArgs),
    Models(models::ModelsArgs),
    Tasks(tasks::TasksArgs),
    Devices(devices::DevicesArgs),
    Doctor(doctor::DoctorArgs),
    Profile(profile::ProfileArgs),
}

/// Runs one subcommand.
pub fn run(cli: Cli) -> anyhow::Result<()> {
    if let Some(threads) = cli.threads {
        if !(1..=1024).contains(&threads) {
            return Err(bad_input!("--threads is {threads}; it must be between 1 and 1024"));
        }
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    }
    match cli.command {
        Command::Train(args) => train::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Predict(args) => predict::run(args),
        Command::Import(args) => transfer::import(args),
        Command::Export(args) => transfer::export(args),
        Command::Sweep(args) => sweep::run(args, cli.threads),
        Command::Report(args) => report::run(args),
        Command::Data(args) => data::run(args),
        Command::Models(args) => models::run(args),
        Command::Tasks(args) => tasks::run(args),
        Command::Devices(args) => devices::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Profile(args) => profile::run(args),
    }
}

/// Prints to stdout; ends quietly where the reader has gone away (`| head`).
pub(crate) fn print(text: impl std::fmt::Display) -> anyhow::Result<()> {
    match writeln!(std::io::stdout(), "{text}") {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        result => Ok(result?),
    }
}

/// A table with these columns, those in `numbers` flush right.
pub(crate) fn table(columns: &[&str], numbers: impl IntoIterator<Item = usize>) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::UTF8_HORIZONTAL_ONLY.row_separator(LineStyle::none()))
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(columns);
    for column in numbers {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// The same table as Markdown.
pub(crate) fn markdown(mut table: Table) -> String {
    table.load_style(presets::ASCII_MARKDOWN).set_content_arrangement(ContentArrangement::Disabled);
    format!("{table}\n")
}

/// A part, as an argument.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum PartName {
    Train,
    Validation,
    Test,
}

impl From<PartName> for Part {
    fn from(name: PartName) -> Self {
        match name {
            PartName::Train => Part::Train,
            PartName::Validation => Part::Validation,
            PartName::Test => Part::Test,
        }
    }
}
