//! How fast samples are drawn, on one core: the paper's largest grammar (1,601 states), 200 elements.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use selectivbench::config::{Config, TaskPreset};
use selectivbench::task::{Part, Task};

/// Samples of a batch.
const BATCH: usize = 64;

fn samples(criterion: &mut Criterion) {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a pool of one thread");
    let mut group = criterion.benchmark_group("data");
    group.throughput(Throughput::Elements(BATCH as u64));
    for (name, preset) in
        [("task1", TaskPreset::Task1ModelSize), ("task2", TaskPreset::Task2), ("task3", TaskPreset::Task3)]
    {
        // the presets leave the grammar at its largest
        let task = Task::new(&Config::of(preset).task, 1).expect("the preset is valid");
        let mut first = 0;
        let mut next = || {
            first += BATCH as u64;
            first
        };
        if preset == TaskPreset::Task1ModelSize {
            group.bench_function("states", |bencher| {
                bencher.iter(|| {
                    let first = next();
                    for index in first..first + BATCH as u64 {
                        black_box(task.states(Part::Train, index).expect("a sample"));
                    }
                });
            });
        }
        group.bench_function(format!("{name}/compact"), |bencher| {
            bencher
                .iter(|| pool.install(|| task.samples(Part::Train, next(), BATCH, None).expect("samples")));
        });
        group.bench_function(format!("{name}/batch"), |bencher| {
            bencher.iter(|| pool.install(|| task.batch(Part::Train, next(), BATCH, None).expect("a batch")));
        });
    }
    group.finish();
}

criterion_group!(benches, samples);
criterion_main!(benches);
