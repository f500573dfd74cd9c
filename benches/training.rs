//! One update of every model on the CPU: task 1 at its full grammar, 8 layers, width 64 and 256.
//!
//! `cargo bench --bench training` prints a time for a batch of 8 samples, 400 steps each.

use candle_core::Device;
use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use selectivbench::config::load::defaults;
use selectivbench::model::MODELS;
use selectivbench::task::{Part, Task};
use selectivbench::train::trainer::Trainer;

/// The allocator of the program.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn updates(c: &mut Criterion) {
    let mut config = defaults();
    config.train.batch = 8;
    let task = Task::new(&config.task, config.seed).expect("the task of the paper");
    let batch = task.batch(Part::Train, 0, config.train.batch, None).expect("samples");
    for width in [64, 256] {
        let mut group = c.benchmark_group("update");
        group.sampling_mode(SamplingMode::Flat);
        group.throughput(Throughput::Elements(batch.valid_steps() as u64));
        for model in MODELS {
            config.model.name = model.name.into();
            config.model.width = width;
            let mut trainer =
                Trainer::new(&config, task.features(), task.classes(), &Device::Cpu).expect("a model");
            group.bench_function(BenchmarkId::new(model.name, width), |b| {
                b.iter(|| trainer.update(&batch).expect("an update"));
            });
        }
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(std::time::Duration::from_millis(500))
        .measurement_time(std::time::Duration::from_secs(5));
    targets = updates
}
criterion_main!(benches);
