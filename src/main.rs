use clap::Parser;

use selectivbench::{cli, error};

/// Activations are large, short-lived and alike: an allocator that keeps their pages saves a quarter of a
/// training step.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    if let Err(error) = cli::run(cli::Cli::parse()) {
        let code = error::exit_code(&error);
        // Being stopped on request is no error.
        let label = if code == error::INTERRUPTED { "" } else { "error: " };
        eprintln!("{label}{error:#}");
        std::process::exit(code);
    }
}
