#[derive(clap::Args, Debug)]
pub struct DataArgs {}
pub fn run(_: DataArgs) -> anyhow::Result<()> { Ok(()) }
