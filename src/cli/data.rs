//! `selectivbench data`: look at samples, write them to files, see what a grammar is like, and find recordings.

mod export;
mod fetch;
mod picture;
mod show;
mod stats;

use std::path::PathBuf;

use super::PartName;
use crate::config::load::load;
use crate::task::Task;

/// Look at samples, write them to files, see what a grammar is like, and find recordings.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  selectivbench data show configs/quickstart.yaml
  selectivbench data stats configs/quickstart.yaml --set seed=3
  selectivbench data export configs/quickstart.yaml --out data/quickstart
  selectivbench data fetch gsc")]
pub struct DataArgs {
    #[command(subcommand)]
    command: DataCommand,
}

#[derive(clap::Subcommand, Debug)]
enum DataCommand {
    Show(show::ShowArgs),
    Export(export::ExportArgs),
    Stats(stats::StatsArgs),
    Fetch(fetch::FetchArgs),
}

pub fn run(args: DataArgs) -> anyhow::Result<()> {
    match args.command {
        DataCommand::Show(args) => show::run(args),
        DataCommand::Export(args) => export::run(args),
        DataCommand::Stats(args) => stats::run(args),
        DataCommand::Fetch(args) => fetch::run(args),
    }
}

/// The task that a subcommand is about.
#[derive(clap::Args, Debug)]
struct Source {
    #[arg(value_name = "CONFIG.yaml")]
    config: PathBuf,
    /// Set a field of the configuration; may be given several times
    #[arg(long, value_name = "key.path=value")]
    set: Vec<String>,
}

impl Source {
    fn task(&self) -> anyhow::Result<Task> {
        let config = load(&self.config, &self.set)?;
        Task::new(&config.task, config.seed)
    }

    /// The task without its recordings, for what is about symbols alone.
    fn symbols(&self) -> anyhow::Result<Task> {
        let config = load(&self.config, &self.set)?;
        Task::of_symbols(&config.task, config.seed)
    }
}
