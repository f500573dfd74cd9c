use clap::Parser;

use selectivbench::{cli, error};

fn main() {
    if let Err(error) = cli::run(cli::Cli::parse()) {
        eprintln!("error: {error:#}");
        std::process::exit(error::exit_code(&error));
    }
}
