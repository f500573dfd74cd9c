//! One run: data, updates, evaluations, checkpoints, metrics, and an exact way back after any end.
//!
//! # The run directory
//!
//! | file | |
//! |---|---|
//! | `config.yaml` | complete and resolved; training from it repeats the run |
//! | `run.json` | where the numbers come from: program, device, numeric route, data ([`Provenance`]) |
//! | `metrics.jsonl`, `events.out.tfevents.*` | training and evaluation, for programs and for TensorBoard |
//! | `checkpoint.safetensors` | weights after the newest evaluation ([`crate::checkpoint`]) |
//! | `state.safetensors` | weights, moments, and where the run stood: what a resume begins from |
//! | `summary.json` | written once, at the end |
//!
//! All are written under a temporary name and renamed, but for the metrics, which only grow: the state
//! knows how long they were, and a resume cuts off what came later. Everything random is a function of
//! the seed and a position, so a resumed run gives the bits of an uninterrupted one.

pub mod breakdown;
pub mod evaluate;
mod events;
#[cfg(feature = "cuda")]
mod gpu;
pub mod interrupt;
mod metrics;
mod progress;
mod provenance;
pub mod schedule;
mod state;
pub mod trainer;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::Device;
use serde::{Deserialize, Serialize};

use self::breakdown::Breakdown;
use self::evaluate::{EvalPlan, Evaluation, evaluate};
use self::metrics::{Metrics, Record};
use self::progress::Progress;
pub use self::progress::count;
pub use self::provenance::Provenance;
use self::state::State;
use self::trainer::{Feed, NotFinite, Trainer};
use crate::checkpoint::{Checkpoint, Writer};
use crate::config::{Config, Emulate, Precision, Split, TaskPreset};
use crate::device::{number_format, peak_memory};
use crate::error::Interrupted;
use crate::task::{Part, Task};
use crate::{bad_input, bail_input, files, model};

/// How a run is carried out.
pub struct Options {
    /// The run directory.
    pub out: PathBuf,
    /// Go on from the state in `out`, if there is one.
    pub resume: bool,
    pub device: Device,
    /// Samples per forward pass at most, whatever the configuration says: what memory has room for.
    pub max_micro_batch: Option<usize>,
}

/// The end of a run, as in `summary.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Summary {
    /// Of the final weights on the test part, or at the task's `test_gap` if there are several gaps.
    pub accuracy: f64,
    /// What an observer that knows the grammar reaches.
    pub ceiling: f64,
    pub loss: f64,
    /// Where the next symbol was predicted: divergence from the target distribution, in nats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl: Option<f64>,
    pub steps: usize,
    pub samples: usize,
    pub parameters: usize,
    /// Floats carried per sequence from step to step by all layers; `null` if they grow with it.
    pub state_size: Option<usize>,
    /// Training and evaluation, pauses left out.
    pub seconds: f64,
    /// While training, evaluations left out.
    pub tokens_per_s: f64,
    /// Seconds that the updates of the last process waited for samples.
    #[serde(default)]
    pub data_wait: f64,
    pub model: String,
    pub task: TaskPreset,
    pub seed: u64,
    pub device: String,
    pub precision: String,
    pub split: Split,
    /// Whether the released code was emulated, and in what.
    pub emulate: Vec<String>,
    pub tests: Vec<Test>,
    pub version: String,
    /// SHA-256 of grammar and task.
    pub data: String,
    pub threads: usize,
    /// Samples per forward pass that memory had room for, where that was less than configured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_micro_batch: Option<usize>,
}

impl Summary {
    /// The summary of a finished run.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("summary.json");
        let text = files::read(&path, "the summary of the run")?;
        serde_json::from_slice(&text).map_err(|e| bad_input!("{} is damaged: {e}", path.display()))
    }
}

/// One test of the final weights.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Test {
    pub gap: f64,
    pub ceiling: f64,
    #[serde(flatten)]
    pub evaluation: Evaluation,
}

/// What of the released training code's behaviour is emulated.
pub fn emulated(config: &Config) -> Vec<String> {
    let what: &[&str] = match config.train.emulate {
        Emulate::None => &[],
        Emulate::Authors => &[
            "test samples are the first training samples",
            "no dropout after the first evaluation",
            "the first update has learning rate 0",
            "micro-batches add up without division, and the last one is reported",
        ],
    };
    what.iter().map(|what| what.to_string()).collect()
}

/// `cpu` or `cuda:N`.
pub fn device_name(device: &Device) -> String {
    match device.location() {
        candle_core::DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        _ => "cpu".into(),
    }
}

/// A run that can begin: everything that the user can have got wrong was checked.
struct Run<'a> {
    config: &'a Config,
    options: &'a Options,
    task: Arc<Task>,
    trainer: Trainer,
    precision: Precision,
    metrics: Metrics,
    /// Seconds of the processes before this one: training and evaluations, and training alone.
    before: (f64, f64),
    /// Tokens trained on by the processes before this one.
    tokens_before: usize,
    begin: Instant,
    /// Time of this process that went into evaluations.
    evaluating: f64,
    /// Time of this process that updates waited for samples.
    waiting: f64,
    tokens: usize,
    writer: Writer,
    /// As it was when last asked for: after the first update and after each evaluation.
    peak_memory: Option<u64>,
    /// Held until the process ends.
    _lock: File,
}

/// Trains as configured; gives the summary that also stands in the run directory.
pub fn run(config: &Config, options: &Options) -> Result<Summary> {
    let precision = number_format(config, &options.device)?;
    let saved = find_state(config, options)?;
    if saved.is_some()
        && let Ok(summary) = Summary::open(&options.out)
    {
        eprintln!("the run in {} is finished: nothing to do", options.out.display());
        return Ok(summary);
    }
    let task = Arc::new(Task::new(&config.task, config.seed)?);
    let mut trainer = Trainer::new(config, task.features(), task.classes(), &options.device)?;
    if let Some(limit) = options.max_micro_batch {
        trainer.limit_micro_batch(limit);
    }
    let mut pending_evaluation = false;
    let (mut metrics_bytes, mut before, mut tokens_before) = (0, (0.0, 0.0), 0);
    if let Some(mut state) = saved {
        trainer
            .restore(state.step, |name| state.tensors.remove(name))
            .map_err(|e| bad_input!("cannot go on from {}: {e}", State::path(&options.out).display()))?;
        if let Some(limit) = state.max_micro_batch {
            trainer.limit_micro_batch(limit);
        }
        pending_evaluation = state.pending_evaluation;
        metrics_bytes = state.metrics_bytes;
        before = (state.seconds, state.training_seconds);
        tokens_before = state.tokens;
    }

    // From here on things are written.
    files::create_folder(&options.out)?;
    let lock = lock(&options.out)?;
    files::delete_unfinished(&options.out);
    let yaml = config.to_yaml();
    files::write_atomic(&options.out.join("config.yaml"), |out| out.write_all(yaml.as_bytes()))?;
    Provenance::write(&options.out, options, precision, &task, trainer.step())?;
    let metrics = Metrics::open(&options.out, metrics_bytes, before.0)?;
    interrupt::listen()?;
    let mut run = Run {
        config,
        options,
        task,
        trainer,
        precision,
        metrics,
        before,
        tokens_before,
        begin: Instant::now(),
        evaluating: 0.0,
        waiting: 0.0,
        tokens: 0,
        writer: Writer::default(),
        peak_memory: None,
        _lock: lock,
    };
    run.announce(metrics_bytes > 0 || run.trainer.step() > 0);
    let mut progress = Progress::new(run.trainer.total(), run.trainer.step());
    let result = run.train(pending_evaluation, &mut progress);
    progress.finish();
    result.map_err(|error| run.explain(error))
}

/// The state to go on from. Refuses a directory in use, and a state of another configuration.
fn find_state(config: &Config, options: &Options) -> Result<Option<State>> {
    let out = &options.out;
    if out.exists() && !out.is_dir() {
        bail_input!("--out {} is a file; it must be a folder", out.display())
    }
    if options.resume {
        return match State::open(out)? {
            Some(state) => state.check_config(config, out).map(|()| Some(state)),
            None if used(out) && !out.join("config.yaml").exists() => {
                bail_input!("{} holds files, but no run to resume; give another --out", out.display())
            }
            None => Ok(None),
        };
    }
    if used(out) {
        bail_input!(
            "{} is not empty; give another --out, or go on with the run in it with --resume",
            out.display()
        )
    }
    Ok(None)
}

/// Whether `dir` holds anything but what a run that was killed at once leaves.
fn used(dir: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(dir) else { return false };
    entries.flatten().map(|entry| entry.file_name()).any(|name| name != LOCK && !files::is_unfinished(&name))
}

/// Held by the process that trains in a run directory.
const LOCK: &str = ".lock";

/// Keeps two processes from training in one directory.
fn lock(dir: &Path) -> Result<File> {
    let path = dir.join(LOCK);
    let file = File::create(&path).map_err(|e| bad_input!("cannot write {}: {e}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(bad_input!(
            "another process is training in {}; wait for it or give another --out",
            dir.display()
        )),
        // A file system without locks: better to train than to refuse.
        Err(std::fs::TryLockError::Error(_)) => Ok(file),
    }
}

/// Whether a process trains in a run directory just now.
pub fn is_locked(dir: &Path) -> bool {
    let file = File::open(dir.join(LOCK));
    file.is_ok_and(|file| matches!(file.try_lock_shared(), Err(std::fs::TryLockError::WouldBlock)))
}

impl Run<'_> {
    fn seconds(&self) -> f64 {
        self.before.0 + self.begin.elapsed().as_secs_f64()
    }

    fn training_seconds(&self) -> f64 {
        self.before.1 + self.begin.elapsed().as_secs_f64() - self.evaluating
    }

    fn tokens_per_s(&self) -> f64 {
        (self.tokens_before + self.tokens) as f64 / self.training_seconds().max(1e-9)
    }

    fn samples(&self) -> usize {
        (self.trainer.step() * self.config.train.batch).min(self.config.task.samples.train)
    }

    fn announce(&self, resumed: bool) {
        let (config, net) = (self.config, self.trainer.net());
        eprintln!(
            "{} of {} parameters on {} ({}), {} threads: {} states behind {} symbols{}, objective {}, split {}, seed {}",
            config.model.name,
            count(net.params().count() as f64),
            device_name(&self.options.device),
            self.precision.name(),
            rayon::current_num_threads(),
            self.task.grammar().states(),
            self.task.grammar().alphabet(),
            self.task.recordings().map_or(String::new(), |recordings| format!(
                ", shown as {}, {} frames of {}",
                config.task.encoding.name(),
                recordings.frames(),
                recordings.table().channels()
            )),
            config.task.objective.name(),
            split_name(config.task.split),
            config.seed,
        );
        for what in emulated(config) {
            eprintln!("as the released code: {what}");
        }
        if resumed {
            eprintln!("going on after update {} of {}", self.trainer.step(), self.trainer.total());
        }
    }

    fn train(&mut self, mut pending_evaluation: bool, progress: &mut Progress) -> Result<Summary> {
        let train = &self.config.train;
        let (interval, total) = (self.trainer.evaluation_interval(), self.trainer.total());
        let mut batches = self.task.stream(
            Part::Train,
            self.samples() as u64,
            self.config.task.samples.train as u64,
            train.batch,
            self.trainer.feed(),
        );
        let (mut checkpoint_due, mut state_due) = (false, false);
        loop {
            let step = self.trainer.step();
            if pending_evaluation {
                if !self.validate(progress)? {
                    return Err(self.stop(true)?);
                }
                checkpoint_due = true;
                self.peak_memory = peak_memory(&self.options.device);
            }
            let idle = self.trainer.under_way() == 0;
            if interrupt::asked() && idle {
                return Err(self.stop(false)?);
            }
            if step == total {
                break;
            }
            state_due |= step > 0 && step.is_multiple_of(train.save_every);
            // Training never waits for a slow disk: what is due is written when the disk is free.
            if state_due && self.writer.is_free()? {
                self.save(false)?;
                state_due = false;
            }
            if checkpoint_due && self.writer.is_free()? {
                let checkpoint = Checkpoint::snapshot(self.config, self.trainer.net(), step)?;
                self.writer.put(self.checkpoint_path(), checkpoint)?;
                checkpoint_due = false;
            }
            if idle {
                self.launch(&mut batches)?;
            }
            // A GPU has the update after this one to go on with, unless something is due between the two.
            let next = step + 1;
            let due = [interval, train.save_every, total].into_iter().any(|every| next.is_multiple_of(every));
            if !(due || state_due || checkpoint_due || interrupt::asked()) && self.trainer.launches_ahead() {
                self.launch(&mut batches)?;
            }
            let stats = self.trainer.finish()?;
            self.tokens += stats.tokens;
            let step = self.trainer.step();
            if self.peak_memory.is_none() {
                self.peak_memory = peak_memory(&self.options.device);
            }
            progress.update(step, &stats);
            if step == 1 || step == total || step.is_multiple_of(train.log_every) {
                self.metrics.write(&Record {
                    step,
                    samples: self.samples(),
                    split: "train",
                    gap: None,
                    loss: stats.loss,
                    accuracy: stats.accuracy,
                    kl: None,
                    lr: Some(stats.lr),
                    grad_norm: Some(stats.grad_norm),
                    tokens_per_s: self.tokens_per_s(),
                    peak_memory: self.peak_memory,
                    accuracy_by: None,
                    seconds: self.seconds(),
                })?;
            }
            pending_evaluation = step.is_multiple_of(interval) || step == total;
        }
        self.save(false)?;
        let checkpoint = Checkpoint::snapshot(self.config, self.trainer.net(), total)?;
        self.writer.put(self.checkpoint_path(), checkpoint)?;
        self.finish(progress)
    }

    /// Launches the update after those that were launched.
    fn launch(&mut self, batches: &mut impl Iterator<Item = Result<Feed>>) -> Result<()> {
        let asked = Instant::now();
        let batch = batches.next().context("the stream of training samples ended early")??;
        self.waiting += asked.elapsed().as_secs_f64();
        self.trainer.launch(batch)
    }

    fn checkpoint_path(&self) -> PathBuf {
        self.options.out.join("checkpoint.safetensors")
    }

    /// Saves what a resume needs.
    fn save(&mut self, pending_evaluation: bool) -> Result<()> {
        let state = state::Position {
            step: self.trainer.step(),
            seconds: self.seconds(),
            training_seconds: self.training_seconds(),
            tokens: self.tokens_before + self.tokens,
            metrics_bytes: self.metrics.sync()?,
            pending_evaluation,
            max_micro_batch: self.trainer.limit(),
        };
        let state = state::snapshot(self.config, &self.trainer, &state)?;
        self.writer.put(State::path(&self.options.out), state)
    }

    /// Saves everything after a request to stop; gives the error that ends the run.
    fn stop(&mut self, pending_evaluation: bool) -> Result<anyhow::Error> {
        self.save(pending_evaluation)?;
        self.writer.wait()?;
        let step = self.trainer.step();
        Checkpoint::save(&self.checkpoint_path(), self.config, self.trainer.net(), step)?;
        let out = self.options.out.display();
        Ok(Interrupted(format!(
            "stopped after update {step} of {}; everything is saved, go on with `selectivbench train \
             {out}/config.yaml --out {out} --resume`",
            self.trainer.total()
        ))
        .into())
    }

    /// One evaluation; `None` if the run was asked to stop meanwhile.
    fn evaluate(&mut self, part: Part, gap: Option<f64>, progress: &Progress) -> Result<Option<Evaluation>> {
        let (samples, train) = (&self.config.task.samples, &self.config.train);
        let (samples, what) = match part {
            Part::Test => (samples.test, "test"),
            _ => (samples.validation, "validation"),
        };
        let chunk = evaluate::chunk(self.config, &self.options.device);
        let mut plan = EvalPlan { part, samples, gap, batch: train.eval_batch, chunk };
        let begin = Instant::now();
        let result = loop {
            let result = evaluate(self.trainer.net(), &self.task, &plan, |done| {
                progress.evaluating(what, done, samples);
                !interrupt::asked()
            });
            match result {
                Err(error) if trainer::is_out_of_memory(&error) && plan.batch > 1 => {
                    plan.batch = plan.batch.div_ceil(2);
                    let batch = plan.batch;
                    progress.line(&format!("out of memory: evaluating {batch} samples at a time"));
                }
                result => break result?,
            }
        };
        self.evaluating += begin.elapsed().as_secs_f64();
        let Some(evaluation) = result else { return Ok(None) };
        self.metrics.write(&Record {
            step: self.trainer.step(),
            samples: self.samples(),
            split: what,
            gap,
            loss: evaluation.loss,
            accuracy: evaluation.accuracy,
            kl: evaluation.kl,
            lr: None,
            grad_norm: None,
            tokens_per_s: evaluation.tokens as f64 / evaluation.seconds,
            peak_memory: None,
            accuracy_by: evaluation.breakdown.as_ref().map(Breakdown::shares),
            seconds: self.seconds(),
        })?;
        Ok(Some(evaluation))
    }

    /// The evaluation that is due; false if the run was asked to stop meanwhile.
    fn validate(&mut self, progress: &Progress) -> Result<bool> {
        let Some(evaluation) = self.evaluate(Part::Validation, None, progress)? else { return Ok(false) };
        progress.line(&format!(
            "after {} samples: validation accuracy {:.2} %, loss {:.4}{}",
            self.samples(),
            100.0 * evaluation.accuracy,
            evaluation.loss,
            kl(&evaluation)
        ));
        Ok(true)
    }

    fn finish(&mut self, progress: &Progress) -> Result<Summary> {
        let config = self.config;
        let mut gaps = vec![config.task.test_gap];
        gaps.extend(config.task.eval_gaps.iter().copied().filter(|gap| *gap != config.task.test_gap));
        let mut tests = Vec::new();
        for gap in gaps {
            let Some(evaluation) = self.evaluate(Part::Test, Some(gap), progress)? else {
                return Err(self.stop(false)?);
            };
            let ceiling = self.task.ceiling(gap)?;
            progress.line(&format!(
                "test at gap {gap}: accuracy {:.2} % ({:.1} % of the ceiling {:.2} %), loss {:.4}{}",
                100.0 * evaluation.accuracy,
                100.0 * evaluation.accuracy / ceiling,
                100.0 * ceiling,
                evaluation.loss,
                kl(&evaluation)
            ));
            tests.push(Test { gap, ceiling, evaluation });
        }
        let net = self.trainer.net();
        let model = model::find(&config.model.name)?;
        let state = (model.state_size)(&model::Dims::new(model, &config.model)?);
        let summary = Summary {
            accuracy: tests[0].evaluation.accuracy,
            ceiling: tests[0].ceiling,
            loss: tests[0].evaluation.loss,
            kl: tests[0].evaluation.kl,
            steps: self.trainer.step(),
            samples: self.samples(),
            parameters: net.params().count(),
            state_size: state.map(|floats| floats * config.model.layers),
            seconds: self.seconds(),
            tokens_per_s: self.tokens_per_s(),
            data_wait: self.waiting,
            model: config.model.name.clone(),
            task: config.task.preset,
            seed: config.seed,
            device: device_name(&self.options.device),
            precision: self.precision.name().into(),
            split: config.task.split,
            emulate: emulated(config),
            tests,
            version: env!("CARGO_PKG_VERSION").into(),
            data: self.task.data_hash()?,
            threads: rayon::current_num_threads(),
            max_micro_batch: self.trainer.limit(),
        };
        self.metrics.sync()?;
        // A run with a summary is finished: everything else is there before.
        self.writer.wait()?;
        let json = serde_json::to_string_pretty(&summary)? + "\n";
        files::write_atomic(&self.options.out.join("summary.json"), |out| out.write_all(json.as_bytes()))?;
        Ok(summary)
    }

    /// Says what a failed run left, and how to go on.
    fn explain(&mut self, error: anyhow::Error) -> anyhow::Error {
        if error.is::<Interrupted>() {
            return error;
        }
        // Its own error, if there is one, is this one or follows from it.
        let _ = self.writer.wait();
        let out = self.options.out.display();
        let step = self.trainer.step();
        if let Some(not_finite) = error.downcast_ref::<NotFinite>() {
            // The weights are still those before the bad update.
            let saved = Checkpoint::save(&self.checkpoint_path(), self.config, self.trainer.net(), step);
            let checkpoint = match saved {
                Ok(()) => {
                    format!("the last good weights, after update {step}, are in {out}/checkpoint.safetensors")
                }
                Err(error) => format!("the last good weights could not be saved ({error:#})"),
            };
            return anyhow::anyhow!(
                "update {} would not be finite: {}; {checkpoint}; a smaller train.lr or a longer train.warmup \
                 may help",
                step + 1,
                not_finite.what
            );
        }
        let state = match State::open(&self.options.out) {
            Ok(Some(state)) => format!(
                "the run is saved up to update {}; mend the cause and go on with `selectivbench train \
                 {out}/config.yaml --out {out} --resume`",
                state.step
            ),
            _ => format!("nothing was saved yet; mend the cause, delete {out} and begin again"),
        };
        error.context(format!("the run stopped after update {step} of {}; {state}", self.trainer.total()))
    }
}

/// `, KL …` where there is one.
fn kl(evaluation: &Evaluation) -> String {
    evaluation.kl.map_or(String::new(), |kl| format!(", KL {kl:.4}"))
}

/// The name of a split in configurations.
pub fn split_name(split: Split) -> &'static str {
    match split {
        Split::HeldOut => "held-out",
        Split::AsReleased => "as-released",
    }
}
