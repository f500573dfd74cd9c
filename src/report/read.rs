//! Run directories and sweep folders, whatever state they are in.
//!
//! A run that cannot be read is left out with a note; it never keeps a report of the others from being made.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::Value;

use crate::bad_input;
use crate::config::{self, Config, Emulate};
use crate::train::Summary;

/// The fields of a configuration as text, by their paths (`train.lr`).
pub type Fields = BTreeMap<String, String>;

/// A finished run.
#[derive(Clone, Debug)]
pub struct Run {
    pub dir: PathBuf,
    /// The end of `dir`, as long as it takes to tell the runs apart.
    pub name: String,
    pub config: Config,
    pub fields: Fields,
    pub summary: Summary,
    /// At every evaluation, in the order of the samples seen.
    pub validation: Vec<Evaluated>,
    /// `run.json`, of runs that have one.
    pub provenance: Option<Value>,
}

/// A validation while training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluated {
    pub samples: f64,
    pub accuracy: f64,
    pub loss: f64,
}

/// A run of a sweep that ended without a result.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    pub run: String,
    pub reason: String,
}

/// What was found in and below some folders.
#[derive(Debug, Default)]
pub struct Collection {
    /// Finished runs, in the order of their folders.
    pub runs: Vec<Run>,
    /// Run directories without a summary, failed ones left out.
    pub unfinished: Vec<PathBuf>,
    pub failed: Vec<Failure>,
    /// What was left out or repaired, one sentence each.
    pub notes: Vec<String>,
}

impl Collection {
    /// Looks in and below `dirs`.
    pub fn open(dirs: &[PathBuf]) -> Result<Self> {
        let (mut finished, mut unfinished, mut seen) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        let mut found = Self::default();
        // (id, failure)
        let mut failures: BTreeMap<String, Failure> = BTreeMap::new();
        let mut queue = dirs.to_vec();
        while let Some(dir) = queue.pop() {
            let entries =
                std::fs::read_dir(&dir).map_err(|e| bad_input!("cannot read {}: {e}", dir.display()))?;
            // Links may lead to a folder twice, or in a circle.
            if !seen.insert(std::fs::canonicalize(&dir).unwrap_or_else(|_| dir.clone())) {
                continue;
            }
            if dir.join("summary.json").exists() {
                finished.insert(dir);
                continue;
            }
            if dir.join("config.yaml").exists()
                && ["state.safetensors", "metrics.jsonl"].iter().any(|file| dir.join(file).exists())
            {
                unfinished.insert(dir.clone());
            }
            if dir.file_name().is_some_and(|name| name == "ledger") {
                failures.extend(read_failures(&dir));
            }
            queue.extend(entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()));
        }
        for dir in finished {
            match Run::open(&dir, &mut found.notes) {
                Ok(run) => found.runs.push(run),
                Err(error) => found.notes.push(format!("{} is left out: {error:#}", dir.display())),
            }
        }
        // A failed run of a sweep has a folder too, called <label>-<the first 8 digits of its id>.
        let failed = |dir: &PathBuf| {
            let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
            failures.keys().any(|id| id.get(..8).is_some_and(|id| name.ends_with(&format!("-{id}"))))
        };
        found.unfinished = unfinished.into_iter().filter(|dir| !failed(dir)).collect();
        found.failed = failures.into_values().collect();
        found.name_runs();
        Ok(found)
    }

    /// Gives every run the shortest end of its path that no other has.
    fn name_runs(&mut self) {
        let end = |dir: &Path, parts: usize| {
            let all: Vec<_> = dir.iter().map(|part| part.to_string_lossy().into_owned()).collect();
            all[all.len().saturating_sub(parts)..].join("/")
        };
        let dirs: Vec<PathBuf> = self.runs.iter().map(|run| run.dir.clone()).collect();
        let longest = dirs.iter().map(|dir| dir.iter().count()).max().unwrap_or(1);
        let mut left: Vec<usize> = (0..dirs.len()).collect();
        for parts in 1..=longest {
            let mut count: HashMap<String, usize> = HashMap::new();
            dirs.iter().for_each(|dir| *count.entry(end(dir, parts)).or_default() += 1);
            for &i in &left {
                self.runs[i].name = end(&dirs[i], parts);
            }
            left.retain(|&i| count[&end(&dirs[i], parts)] > 1);
        }
    }
}

/// The entries `<id>.failed.json` of a sweep's ledger, by id.
fn read_failures(ledger: &Path) -> Vec<(String, Failure)> {
    let Ok(entries) = std::fs::read_dir(ledger) else { return vec![] };
    let failure = |entry: std::fs::DirEntry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        let id = name.strip_suffix(".failed.json")?.to_string();
        let value: Value = std::fs::read(entry.path())
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default();
        let text = |key: &str, other: &str| value[key].as_str().unwrap_or(other).to_string();
        let reason = text("reason", "the ledger's entry is damaged and does not say why");
        Some((id.clone(), Failure { run: text("run", &id), reason }))
    };
    entries.flatten().filter_map(failure).collect()
}

impl Run {
    /// Reads a finished run. What is missing beside configuration and summary goes into `notes`.
    pub fn open(dir: &Path, notes: &mut Vec<String>) -> Result<Self> {
        let summary = Summary::open(dir)?;
        let config = config::load::load(&dir.join("config.yaml"), &[])?;
        let fields = fields(&config);
        let mut run = Self {
            dir: dir.to_path_buf(),
            name: String::new(),
            fields,
            config,
            summary,
            validation: vec![],
            provenance: std::fs::read(dir.join("run.json"))
                .ok()
                .and_then(|bytes| serde_json::from_slice(&bytes).ok()),
        };
        match std::fs::read(dir.join("metrics.jsonl")) {
            Ok(text) => {
                let (validation, damaged) = read_metrics(&String::from_utf8_lossy(&text));
                run.validation = validation;
                let path = dir.join("metrics.jsonl");
                match damaged {
                    0 => {}
                    1 => notes.push(format!("1 line of {} is damaged and left out", path.display())),
                    n => notes.push(format!("{n} lines of {} are damaged and left out", path.display())),
                }
            }
            Err(error) => notes.push(format!("{} has no learning curve: {error}", dir.display())),
        }
        Ok(run)
    }

    /// Accuracy of the last validation: what hyper-parameters are chosen by.
    pub fn last_validation(&self) -> Option<f64> {
        self.validation.last().map(|last| last.accuracy)
    }

    /// What tells experiments apart: every field that can change the result, but for the seed.
    ///
    /// The number format is the one that was used, not the word `auto`, and the version belongs to it. How
    /// often is saved and logged and in what portions is evaluated changes nothing; the micro-batch does
    /// where the released code is emulated, which does not divide by it.
    pub fn identity(&self) -> Fields {
        let mut fields = self.fields.clone();
        for key in ["seed", "train.save_every", "train.log_every", "train.eval_batch", "train.eval_chunk"] {
            fields.remove(key);
        }
        if self.config.train.emulate == Emulate::None {
            fields.remove("train.micro_batch");
        }
        fields.insert("train.precision".into(), self.summary.precision.clone());
        fields.insert("version".into(), self.summary.version.clone());
        fields
    }
}

/// Validations in the order of their samples, and how many lines could not be read.
fn read_metrics(text: &str) -> (Vec<Evaluated>, usize) {
    let (mut validation, mut damaged) = (Vec::new(), 0);
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let Ok(record) = serde_json::from_str::<Value>(line) else {
            damaged += 1;
            continue;
        };
        if record["split"] != "validation" {
            continue;
        }
        let number = |key: &str| record[key].as_f64();
        match (number("samples"), number("accuracy")) {
            (Some(samples), Some(accuracy)) => {
                validation.push(Evaluated { samples, accuracy, loss: number("loss").unwrap_or(f64::NAN) });
            }
            _ => damaged += 1,
        }
    }
    validation.sort_by(|a, b| a.samples.total_cmp(&b.samples));
    (validation, damaged)
}

/// Every field of a configuration as text.
pub fn fields(config: &Config) -> Fields {
    fn walk(value: &Value, path: &str, out: &mut Fields) {
        match value {
            Value::Object(map) => {
                for (key, value) in map {
                    let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                    walk(value, &path, out);
                }
            }
            value => {
                out.insert(path.to_string(), text(value));
            }
        }
    }
    let mut out = Fields::new();
    walk(&serde_json::to_value(config).unwrap_or_default(), "", &mut out);
    out
}

/// A value as people write it: 100, not 100.0; words without quotes.
fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(values) => values.iter().map(text).collect::<Vec<_>>().join(", "),
        Value::Number(number) => number.as_f64().filter(|_| number.is_f64()).map_or_else(
            || number.to_string(),
            |x| if x != 0.0 && x.abs() < 1e-4 { format!("{x:e}") } else { x.to_string() },
        ),
        value => value.to_string(),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::config::load;

    /// A finished run that never ran: its configuration has `sets` laid over the defaults.
    pub fn made_up(sets: &[&str], validation: f64, accuracy: f64) -> Run {
        let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
        let config = load::parse("", "a test", &sets).unwrap();
        let summary = serde_json::json!({
            "accuracy": accuracy, "ceiling": 0.95, "loss": 0.3, "steps": 100, "samples": 6400,
            "parameters": 1000 * config.model.width, "state_size": 512, "seconds": 12.0,
            "tokens_per_s": 1e5, "model": config.model.name, "task": config.task.preset,
            "seed": config.seed, "device": "cpu", "precision": "f32", "split": config.task.split,
            "emulate": [], "version": "0.1.0", "data": "0", "threads": 1,
            "tests": [{"gap": 0.1, "ceiling": 0.95, "accuracy": accuracy, "loss": 0.3, "samples": 10,
                       "timesteps": 20, "tokens": 200, "seconds": 0.1}],
        });
        let name =
            format!("{}-{}-{}-{}", config.model.name, config.model.width, config.train.lr, config.seed);
        Run {
            dir: PathBuf::from("runs").join(&name),
            name,
            fields: fields(&config),
            config,
            summary: serde_json::from_value(summary).unwrap(),
            validation: vec![
                Evaluated { samples: 3200.0, accuracy: validation / 2.0, loss: 1.0 },
                Evaluated { samples: 6400.0, accuracy: validation, loss: 0.3 },
            ],
            provenance: None,
        }
    }

    #[test]
    fn damaged_lines_of_metrics_are_counted_and_passed_over() {
        let text = r#"{"step":1,"samples":8,"split":"train","loss":3.0,"accuracy":0.1}
{"step":2,"samples":16,"split":"validation","loss":2.0,"accuracy":0.25}
not json
{"step":3,"samples":20,"split":"validation","loss":2.0,"accuracy":null}

{"step":4,"samples":32,"split":"validation","loss":1.0,"accuracy":0.5}
{"step":5,"samples":40,"split":"validation","lo"#;
        let (validation, damaged) = read_metrics(text);
        let pairs: Vec<_> = validation.iter().map(|one| (one.samples, one.accuracy)).collect();
        assert_eq!((pairs, damaged), (vec![(16.0, 0.25), (32.0, 0.5)], 3));
        assert_eq!(read_metrics(""), (vec![], 0));
    }

    #[test]
    fn fields_are_text_by_path() {
        let run = made_up(&["train.lr=0.004", "train.warmup=100", "task.eval_gaps=[1, 2.5]"], 0.5, 0.5);
        for (key, want) in [
            ("train.lr", "0.004"),
            ("train.warmup", "100"),
            ("task.eval_gaps", "1, 2.5"),
            ("train.eps", "1e-8"),
            ("task.gap.kind", "blank"),
        ] {
            assert_eq!(run.fields[key], want);
        }
    }

    #[test]
    fn identity_holds_what_can_change_the_result() {
        let base = made_up(&[], 0.5, 0.5);
        let same = |sets: &[&str]| made_up(sets, 0.1, 0.2).identity() == base.identity();
        assert!(same(&["seed=9"]) && same(&["train.save_every=7"]) && same(&["train.micro_batch=2"]));
        assert!(!same(&["train.lr=0.5"]) && !same(&["task.split=as-released"]));
        let emulated =
            |micro| made_up(&["task.split=as-released", "train.emulate=authors", micro], 0.1, 0.2).identity();
        assert_ne!(emulated("train.micro_batch=2"), emulated("train.micro_batch=4"));
        let (mut other, mut newer) = (base.clone(), base.clone());
        other.summary.precision = "bf16".into();
        newer.summary.version = "0.2.0".into();
        assert_ne!(other.identity(), base.identity());
        assert_ne!(newer.identity(), base.identity());
    }
}
