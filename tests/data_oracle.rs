//! The ceilings against independent figures.

use std::path::Path;
use std::time::Instant;

use selectivbench::config::{
    Auto, GapConfig, GapKind, GapLaw, SampleCounts, Split, StringConfig, TaskConfig, TaskPreset,
};
use selectivbench::task::{Task, oracle};
use serde_json::Value;

/// A paper grammar as released, without gaps; 200 test samples.
fn config(ambiguities: usize) -> TaskConfig {
    TaskConfig {
        preset: TaskPreset::Task1ModelSize,
        vocab: Auto::AUTO,
        ambiguities,
        depth: Auto::AUTO,
        density: 0.4,
        start_states: 4,
        length: 200,
        string: StringConfig { min: 1, max: Auto::AUTO },
        gap: GapConfig {
            kind: GapKind::Blank,
            law: GapLaw::Fixed,
            low: 0.1,
            high: 0.1,
            mu: 0.0,
            sigma: 1.0,
            start: 0,
            probability: 1.0,
        },
        test_gap: 0.1,
        noise: 0.0,
        split: Split::AsReleased,
        samples: SampleCounts { train: 200, validation: 200, test: 200 },
    }
}

#[test]
fn ceilings() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data/ceiling.json");
    let golden: Vec<Value> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    for entry in &golden {
        let number = |key: &str| entry[key].as_u64().unwrap();
        let task = Task::new(&config(number("amb") as usize), number("seed")).unwrap();
        let at = Instant::now();
        let ceiling = oracle::ceiling(&task, None).unwrap();
        println!("{} {} {ceiling:?} {} {:?}", entry["amb"], entry["seed"], entry["map_accuracy"], at.elapsed());
        let mut config = config(number("amb") as usize);
        config.gap.kind = GapKind::Distractor;
        config.gap.probability = 0.1;
        config.gap.start = 50;
        let task = Task::new(&config, number("seed")).unwrap();
        let at = Instant::now();
        let ceiling = oracle::ceiling(&task, None).unwrap();
        println!("   distractor  {ceiling:?} {:?}", at.elapsed());
    }
}

#[test]
fn curve() {
    for amb in [20, 40] {
    let task = Task::new(&config(amb), 2).unwrap();
    let at = Instant::now();
    let ks = [1,2,3,4,5,6,7,8,10,12];
    println!("{:?} {:?}", oracle::window_curve(&task, &ks).unwrap(), at.elapsed());
    println!("{:?}", oracle::majority(&task));
    }
}
