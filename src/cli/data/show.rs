//! One sample, as text and as a picture.

use std::path::PathBuf;

use super::picture::Scene;
use super::{PartName, Source};
use crate::cli::cells::{self, Cell, Role};
use crate::cli::print;
use crate::plot::{self, Format};
use crate::task::{Part, Sample, Task};
use crate::train::split_name;
use crate::{bail_input, files};

/// Show one sample in the terminal, and with --picture as a picture
///
/// Each cell is the window of one element: its symbol and the timesteps behind it, and below it the
/// state that a model has to name during all of them, or with task.objective predict the next symbol.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  selectivbench data show configs/quickstart.yaml
  selectivbench data show configs/quickstart.yaml --part train --index 7 --gap 0.5
  selectivbench data show configs/quickstart.yaml --set task.preset=task3 --picture sample.svg")]
pub(super) struct ShowArgs {
    #[command(flatten)]
    source: Source,
    /// Which sample of the part
    #[arg(long, default_value_t = 0)]
    index: u64,
    /// Which part of the data
    #[arg(long, value_enum, default_value = "test")]
    part: PartName,
    /// Gap after every element, in time units, instead of the part's own; a timestep is 0.1
    #[arg(long)]
    gap: Option<f64>,
    /// Also draw the sample: FILE.svg or FILE.png
    #[arg(long, value_name = "FILE")]
    picture: Option<PathBuf>,
}

pub(super) fn run(args: ShowArgs) -> anyhow::Result<()> {
    let format = args.picture.as_deref().map(|path| Format::of("--picture", path)).transpose()?;
    if let Some(path) = &args.picture {
        files::check_writable(path)?;
    }
    let task = args.source.task()?;
    let part = Part::from(args.part);
    let count = task.count(part);
    if args.index >= count as u64 {
        bail_input!(
            "--index is {}; task.samples.{} is {count}, so it must be below that",
            args.index,
            part.name()
        )
    }
    let samples = task.samples(part, args.index, 1, args.gap)?;
    let [sample] = samples.as_slice() else { unreachable!("one sample is asked for") };
    let title = format!(
        "{} sample {} ({}), seed {}: {} elements, {} timesteps",
        part.name(),
        args.index,
        split_name(task.config().split),
        task.seed(),
        sample.states.len(),
        sample.steps()
    );
    let (width, colour) = cells::terminal();
    print(format_args!("{title}\n\n{}", text(&task, sample, width, colour).trim_end()))?;
    if let (Some(path), Some(format)) = (&args.picture, format) {
        let sample = sample.clone();
        let batch = samples.into_batch();
        plot::save(&Scene::new(&task, &sample, &batch, &title), path, format)?;
        print(format_args!("\npicture: {}", path.display()))?;
    }
    Ok(())
}

/// The sample in cells, as many to a line as fit.
fn text(task: &Task, sample: &Sample, width: usize, colour: bool) -> String {
    let name = |&label: &u32| (task.class_name(label), Role::State);
    let cells: Vec<Cell> = cells::symbols(sample)
        .into_iter()
        .zip(&sample.labels)
        .map(|(symbol, label)| Cell { lines: vec![symbol, vec![name(label)]], bar: '│' })
        .collect();
    let legend = cells::legend(sample);
    let asked = cells::asked(task);
    format!("{legend}; below them {asked}\n\n{}", cells::lay_out(&cells, 0, width, colour))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, TaskPreset};

    #[test]
    fn cells_are_aligned_and_fit() {
        let mut config = Config::of(TaskPreset::Task3);
        config.task.gap.start = 0;
        config.task.gap.probability = 0.5;
        let task = Task::new(&config.task, 1).unwrap();
        for gap in [0.1, 0.4, 2.0] {
            let samples = task.samples(Part::Test, 0, 1, Some(gap)).unwrap();
            let text = text(&task, &samples.as_slice()[0], 60, false);
            let lines: Vec<&str> = text.lines().filter(|line| line.contains('│')).collect();
            assert!(lines.iter().all(|line| line.chars().count() <= 60), "{text}");
            for pair in lines.chunks(2) {
                let bars = |line: &str| {
                    line.chars().enumerate().filter(|c| c.1 == '│').map(|c| c.0).collect::<Vec<_>>()
                };
                assert_eq!(bars(pair[0]), bars(pair[1]));
            }
        }
    }
}
