//! What a sweep consists of: its runs, each with an identity.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_yaml::{Mapping, Value};
use sha2::{Digest, Sha256};

use super::file::{self, Expansion, Fields, same};
use crate::config::load::{Layer, merged, settle, shown};
use crate::config::{Config, Encoding, GapConfig, GapLaw, Precision, TaskConfig};
use crate::device::resolve_precision;
use crate::{bad_input, bail_input, files, model};

/// A run of a sweep.
#[derive(Clone, Debug)]
pub struct Planned {
    /// 16 hexadecimal digits: the hash of everything in `config` that can change the result.
    pub id: String,
    pub config: Config,
    /// Its values of the fields in [`Plan::varying`].
    pub values: Vec<String>,
    /// Trained values of the model.
    pub parameters: usize,
}

impl Planned {
    /// The name of its run directory: readable, and unlike that of any other run.
    pub fn folder(&self) -> String {
        let Config { seed, task, model, train } = &self.config;
        let task = serde_json::to_value(task.preset).ok();
        let task = task.as_ref().and_then(|task| task.as_str()).unwrap_or("task");
        format!("{task}-{}-w{}-lr{}-s{seed}-{}", model.name, model.width, train.lr, &self.id[..8])
    }

    /// What the run takes, in floating-point operations: six for each parameter and timestep of training, two
    /// in evaluations.
    pub fn work(&self) -> f64 {
        let Config { task, train, .. } = &self.config;
        let tested = |gap: f64| (task.length as f64) * (1.0 + 10.0 * gap * task.gap.probability);
        let evaluations =
            (task.samples.train / train.eval_every.max(train.batch)).max(1) * task.samples.validation;
        let tests: f64 = std::iter::once(&task.test_gap).chain(&task.eval_gaps).map(|gap| tested(*gap)).sum();
        let timesteps = 3.0 * task.samples.train as f64 * mean_steps(task)
            + evaluations as f64 * tested(task.test_gap)
            + task.samples.test as f64 * tests;
        2.0 * self.parameters as f64 * timesteps
    }
}

/// Timesteps of a training sample, on average.
pub fn mean_steps(task: &TaskConfig) -> f64 {
    let GapConfig { law, low, high, mu, sigma, probability, .. } = task.gap;
    let gap = match law {
        GapLaw::Fixed => high,
        GapLaw::Uniform => 0.5 * (low + high),
        GapLaw::Lognormal => (mu + 0.5 * sigma * sigma).exp().clamp(low, high),
    };
    // A timestep is a tenth of a time unit.
    task.length as f64 * (1.0 + probability * 10.0 * gap)
}

/// A sweep file, read and checked.
pub struct Plan {
    pub name: String,
    /// The sweep file.
    pub file: PathBuf,
    /// The folder of the sweep.
    pub dir: PathBuf,
    pub runs: Vec<Planned>,
    /// Fields that differ between runs.
    pub varying: Vec<String>,
    /// Combinations that are no run of their own, by reason.
    pub left_out: Vec<(String, usize)>,
    pub notes: Vec<String>,
}

impl Plan {
    /// Reads a sweep file, with `sets`, each `key.path=value`, laid over all its runs. `gpu` tells from
    /// the settings of Slurm where it will run, which decides what `train.precision: auto` means; `out` is the folder, `runs/<name>` if not given.
    pub fn open(
        path: &Path,
        sets: &[String],
        out: Option<&Path>,
        gpu: impl FnOnce(&Mapping) -> Result<bool>,
    ) -> Result<Self> {
        let sets = sets.iter().map(|set| Layer::of_set(set)).collect::<Result<Vec<_>>>()?;
        let Expansion { name, base, points, mut left_out, slurm, notes } = file::read(path, &sets)?;
        let gpu = gpu(&slurm)?;
        let origin = path.display().to_string();
        let varying = varying(&points);
        let (mut runs, mut known): (Vec<Planned>, HashMap<String, usize>) = (Vec::new(), HashMap::new());
        let mut twice = 0;
        for fields in &points {
            let values: Vec<String> = varying.iter().map(|path| value_of(fields, path)).collect();
            let in_run = |error: anyhow::Error| match values.is_empty() {
                true => error,
                false => bad_input!("{origin}: the run with {}: {error:#}", pairs(&varying, &values)),
            };
            let own: Vec<Layer> =
                fields.iter().map(|(path, value)| Layer::field(path, value.clone(), &origin)).collect();
            let layers: Vec<&Layer> = base.iter().chain(&own).chain(&sets).collect();
            let tree = merged(&layers)?;
            let mut config = settle(&tree, &layers).map_err(in_run)?;
            config.train.precision = resolve_precision(&config, gpu);
            if config.train.precision != Precision::F32 && !gpu {
                return Err(in_run(bad_input!(
                    "train.precision is {}, but cpu computes in f32; set it to auto or f32",
                    config.train.precision.name()
                )));
            }
            let (features, classes) = (config.task.features().map_err(in_run)?, config.task.classes());
            let parameters = model::count_parameters(&config.model, features, classes).map_err(in_run)?;
            let id = identity(&config)?;
            match known.entry(id.clone()) {
                std::collections::hash_map::Entry::Occupied(_) => twice += 1,
                std::collections::hash_map::Entry::Vacant(slot) => {
                    slot.insert(runs.len());
                    runs.push(Planned { id, config, values, parameters });
                }
            }
        }
        if twice > 0 {
            left_out.push(("the same run as another".into(), twice));
        }
        if runs.is_empty() {
            bail_input!("{origin} makes no run: every combination is left out")
        }
        let dir = out.map_or_else(|| Path::new("runs").join(&name), Path::to_path_buf);
        let is_run = dir.join("config.yaml").exists() || dir.join("summary.json").exists();
        if dir.exists() && (!dir.is_dir() || is_run) {
            bail_input!("{} is not the folder of a sweep; give another --out", dir.display())
        }
        Ok(Self { name, file: path.to_path_buf(), dir, runs, varying, left_out, notes })
    }

    /// The run directory of a run.
    pub fn run_dir(&self, run: &Planned) -> PathBuf {
        self.dir.join("runs").join(run.folder())
    }

    /// Makes the folder, and keeps the sweep file in it.
    pub fn create(&self) -> Result<()> {
        let runs = self.dir.join("runs");
        files::create_folder(&runs)?;
        files::create_folder(&self.dir.join("ledger"))?;
        let text = files::read(&self.file, "the sweep file")?;
        files::write_atomic(&self.dir.join("sweep.yaml"), |out| out.write_all(&text))
    }
}

/// The identity of a run: a hash of the program's version and every field that can change the result.
fn identity(config: &Config) -> Result<String> {
    let mut value = serde_json::to_value(config)?;
    // How often a run is saved and how often it reports its training leave no trace in its results.
    if let Some(train) = value["train"].as_object_mut() {
        train.retain(|field, _| !["save_every", "log_every"].contains(&field.as_str()));
    }
    // Nor does where a data set lies; and one-hot symbols come from no files.
    if let Some(task) = value["task"].as_object_mut() {
        let without: &[&str] = match config.task.encoding {
            Encoding::OneHot => &["encoding", "data", "recordings"],
            Encoding::Gsc | Encoding::Shd | Encoding::Ssc => &["data"],
            Encoding::Vectors => &[],
        };
        task.retain(|field, _| !without.contains(&field.as_str()));
    }
    let hash = Sha256::digest(format!("selectivbench {}\n{value}", env!("CARGO_PKG_VERSION")));
    Ok(hash.iter().take(8).map(|byte| format!("{byte:02x}")).collect())
}

/// Whether the configuration in a run directory is that of the run.
pub fn is_run(config: &Config, id: &str) -> bool {
    identity(config).is_ok_and(|own| own == id)
}

/// The fields that are not the same in all points, in their order.
fn varying(points: &[Fields]) -> Vec<String> {
    let mut names: Vec<&str> = Vec::new();
    let mut first: HashMap<&str, &Value> = HashMap::new();
    let mut count: HashMap<&str, usize> = HashMap::new();
    let mut differs: HashMap<&str, bool> = HashMap::new();
    for (path, value) in points.iter().flatten() {
        let known = *first.entry(path).or_insert_with(|| {
            names.push(path);
            value
        });
        *differs.entry(path).or_default() |= !same(known, value);
        *count.entry(path).or_default() += 1;
    }
    names.retain(|name| differs[name] || count[name] < points.len());
    names.into_iter().map(str::to_string).collect()
}

/// A field's value as text; empty where the run does not set it. The last one counts.
fn value_of(fields: &Fields, path: &str) -> String {
    let found = fields.iter().rev().find(|(known, _)| known == path);
    found.map_or(String::new(), |(_, value)| match value {
        Value::String(text) => text.clone(),
        Value::Sequence(values) => values.iter().map(shown).collect::<Vec<_>>().join(" "),
        value => shown(value),
    })
}

/// `model.name=gla, seed=1`.
pub fn pairs(names: &[String], values: &[String]) -> String {
    let set = names.iter().zip(values).filter(|(_, value)| !value.is_empty());
    set.map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(", ")
}
