//! Named settings, and the default of every field.

use super::*;

impl Config {
    /// A task preset with everything else at its default, complete.
    pub fn of(preset: TaskPreset) -> Self {
        Self::preset(preset).resolved()
    }

    /// All fields as the preset sets them, `auto` where a value follows from other fields.
    pub(super) fn preset(preset: TaskPreset) -> Self {
        Self {
            seed: 1,
            task: TaskConfig::preset(preset),
            model: ModelConfig {
                name: "mamba2".to_string(),
                block: Block::PostNorm,
                layers: 8,
                width: 256,
                state: if preset == TaskPreset::Task3 { 64 } else { 128 },
                heads: Auto::AUTO,
                dropout: 0.2,
                conv: 4,
                householders: 4,
                rope_base: 1000.0,
                window: Auto::AUTO,
                decay: Switch::Auto,
                output_gate: Switch::Auto,
                short_conv: Switch::Auto,
                negative_eigenvalues: Switch::Auto,
                delta_rule: Switch::Auto,
                qk_norm: Switch::Auto,
            },
            train: TrainConfig::paper(),
        }
    }
}

impl TaskPreset {
    pub const ALL: [TaskPreset; 5] = [
        TaskPreset::Task1Complexity,
        TaskPreset::Task1ModelSize,
        TaskPreset::Task2,
        TaskPreset::Task3,
        TaskPreset::Task4,
    ];
}

impl TaskConfig {
    fn preset(preset: TaskPreset) -> Self {
        // One blank step after every element.
        let short = GapConfig {
            kind: GapKind::Blank,
            law: GapLaw::Uniform,
            low: 0.1,
            high: 0.1,
            mu: 0.0,
            sigma: 1.0,
            start: 0,
            probability: 1.0,
        };
        let base = Self {
            preset,
            objective: Objective::Classify,
            encoding: Encoding::OneHot,
            data: TaskConfig::AUTO.into(),
            recordings: Auto::AUTO,
            vocab: Auto::AUTO,
            ambiguities: 40,
            depth: Auto::AUTO,
            density: 0.4,
            start_states: 4,
            length: 200,
            string: StringConfig { min: 1, max: Auto::AUTO },
            gap: short,
            test_gap: 0.1,
            eval_gaps: Vec::new(),
            noise: 0.0,
            split: Split::HeldOut,
            samples: SampleCounts { train: 200_000, validation: 1000, test: 1000 },
        };
        match preset {
            TaskPreset::Task1Complexity | TaskPreset::Task1ModelSize => base,
            TaskPreset::Task2 => {
                Self { gap: GapConfig { high: 1.0, ..short }, test_gap: 1.0, noise: 0.2, ..base }
            }
            TaskPreset::Task3 => Self {
                gap: GapConfig { kind: GapKind::Distractor, start: 50, probability: 0.1, ..short },
                ..base
            },
            TaskPreset::Task4 => {
                Self { preset, eval_gaps: vec![1.0, 2.0, 5.0, 10.0], ..Self::preset(TaskPreset::Task2) }
            }
        }
    }
}

impl TrainConfig {
    fn paper() -> Self {
        Self {
            preset: TrainPreset::Paper,
            batch: 64,
            micro_batch: Auto::AUTO,
            recompute: Recompute::None,
            optimizer: OptimizerKind::Adam,
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            warmup: 1000.0,
            schedule: Schedule::Cosine,
            lr_min: 0.0,
            clip: 1.0,
            eval_every: 5000,
            eval_batch: 50,
            eval_chunk: Auto::AUTO,
            save_every: 250,
            log_every: 10,
            precision: Precision::Auto,
            emulate: Emulate::None,
        }
    }
}
