//! Which runs belong together, and which hyper-parameters are the best.
//!
//! * A *group* is runs that differ in nothing but the seed: over them means are taken.
//! * A *setting* is groups that differ in nothing but the tuned hyper-parameters. One group stands for it,
//!   chosen by mean validation accuracy; the test never decides.
//! * A *task* is settings that differ in nothing but the model: they can be compared.
//!
//! Split, emulation, number format and version are a part of all three, so that figures of different
//! kinds are never averaged or ranked together.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::Result;

use super::read::{Collection, Failure, Fields, Run};
use super::stats::Stats;
use crate::bail_input;
use crate::error::nearest;
use crate::model::MODELS;

/// The hyper-parameters that the paper's recipe tunes.
pub const TUNED: [&str; 2] = ["train.lr", "train.warmup"];

/// Runs that differ in nothing but the seed.
#[derive(Clone, Debug)]
pub struct Group {
    pub setting: usize,
    /// Tuned hyper-parameters and their values.
    pub tuned: Vec<(String, String)>,
    /// In the order of their seeds.
    pub runs: Vec<usize>,
    /// Accuracy of the last validation.
    pub validation: Option<Stats>,
    /// On the test part.
    pub accuracy: Option<Stats>,
    /// Fewer seeds than another group of its task.
    pub incomplete: bool,
}

/// Groups that differ in nothing but the tuned hyper-parameters.
#[derive(Clone, Debug)]
pub struct Setting {
    pub task: usize,
    pub model: String,
    /// The model, and its width and what else tells it from the others of its task.
    pub label: String,
    /// What all its groups share.
    pub fields: Fields,
    /// The candidates, in the order of the tuned values.
    pub groups: Vec<usize>,
    /// The group that stands for the setting.
    pub chosen: usize,
    /// Why that one.
    pub reason: String,
}

/// Settings that differ in nothing but the model.
#[derive(Clone, Debug)]
pub struct TaskGroup {
    pub label: String,
    pub fields: Fields,
    /// By model in the order of the registry, then by size.
    pub settings: Vec<usize>,
}

/// All of it.
#[derive(Debug)]
pub struct Data {
    pub runs: Vec<Run>,
    pub groups: Vec<Group>,
    pub settings: Vec<Setting>,
    pub tasks: Vec<TaskGroup>,
    /// Keys of the tuned hyper-parameters.
    pub tuned: Vec<String>,
    pub unfinished: usize,
    pub failed: Vec<Failure>,
    pub notes: Vec<String>,
}

impl Data {
    /// Groups the runs of `collection`.
    pub fn new(collection: Collection, tuned: &[String]) -> Result<Self> {
        let Collection { mut runs, unfinished, failed, mut notes } = collection;
        // The same run in two folders is one run.
        let mut known: BTreeMap<(Fields, u64), PathBuf> = BTreeMap::new();
        runs.retain(|run| {
            let key = (run.identity(), run.summary.seed);
            let first = known.entry(key).or_insert_with(|| run.dir.clone());
            if *first != run.dir {
                notes.push(format!(
                    "{} is left out: {} has the same configuration and seed",
                    run.dir.display(),
                    first.display()
                ));
            }
            *first == run.dir
        });
        if let Some(run) = runs.first() {
            // What cannot change a result cannot be tuned.
            let identity = run.identity();
            let keys = || identity.keys().map(String::as_str).filter(|key| run.fields.contains_key(*key));
            if let Some(key) = tuned.iter().find(|key| !keys().any(|known| known == *key)) {
                let near = nearest(key, keys()).unwrap_or("train.lr");
                bail_input!("--tuned {key}: no field of that name can be tuned; did you mean {near}?")
            }
        }
        let is_tuned = |key: &str| tuned.iter().any(|tuned| tuned == key);

        // [setting's fields][tuned values] runs, everything in a lasting order
        let mut all: BTreeMap<Fields, BTreeMap<Sortable, Vec<usize>>> = BTreeMap::new();
        for (i, run) in runs.iter().enumerate() {
            let (values, shared): (Fields, Fields) =
                run.identity().into_iter().partition(|(key, _)| is_tuned(key));
            let values = tuned.iter().map(|key| values.get(key).cloned().unwrap_or_default()).collect();
            all.entry(shared).or_default().entry(Sortable(values)).or_default().push(i);
        }
        let mut data = Self {
            runs,
            groups: vec![],
            settings: vec![],
            tasks: vec![],
            tuned: tuned.to_vec(),
            unfinished: unfinished.len(),
            failed,
            notes: vec![],
        };
        for (fields, candidates) in all {
            let setting = data.settings.len();
            let first = data.groups.len();
            for (values, mut runs) in candidates {
                runs.sort_by_key(|&run| data.runs[run].summary.seed);
                let over = |value: &dyn Fn(&Run) -> Option<f64>| {
                    Stats::of(runs.iter().filter_map(|&run| value(&data.runs[run])))
                };
                data.groups.push(Group {
                    setting,
                    tuned: tuned.iter().cloned().zip(values.0).collect(),
                    validation: over(&Run::last_validation),
                    accuracy: over(&|run| Some(run.summary.accuracy)),
                    runs,
                    incomplete: false,
                });
            }
            let groups: Vec<usize> = (first..data.groups.len()).collect();
            let (chosen, reason) = choose(&data.groups[first..]);
            let model = data.runs[data.groups[first].runs[0]].summary.model.clone();
            let label = String::new();
            let chosen = first + chosen;
            data.settings.push(Setting { task: 0, model, label, fields, groups, chosen, reason });
        }
        data.notes = notes;
        data.find_tasks();
        data.mark_incomplete();
        Ok(data)
    }

    fn find_tasks(&mut self) {
        let mut tasks: BTreeMap<Fields, Vec<usize>> = BTreeMap::new();
        for (i, setting) in self.settings.iter().enumerate() {
            let fields = without(&setting.fields, |key| key.starts_with("model."));
            tasks.entry(fields).or_default().push(i);
        }
        let mut tasks: Vec<(Fields, Vec<usize>)> = tasks.into_iter().collect();
        tasks.sort_by(|a, b| {
            let value = |fields: &Fields, key: &str| fields.get(key).cloned().unwrap_or_default();
            let by = |key: &str| compare(&value(&a.0, key), &value(&b.0, key));
            TASK_ORDER.iter().map(|key| by(key)).find(|order| order.is_ne()).unwrap_or(Ordering::Equal)
        });
        let fields: Vec<&Fields> = tasks.iter().map(|(fields, _)| fields).collect();
        let labels = labels(&fields, "task.preset", &TASK_ORDER);
        for (i, ((fields, mut settings), label)) in tasks.into_iter().zip(labels).enumerate() {
            let size = |&setting: &usize| {
                let setting = &self.settings[setting];
                (place(&setting.model), self.chosen_runs(setting)[0].summary.parameters)
            };
            settings.sort_by_key(size);
            let models: Vec<Fields> = settings
                .iter()
                .map(|&setting| without(&self.settings[setting].fields, |key| !key.starts_with("model.")))
                .collect();
            let names = self::labels(&models.iter().collect::<Vec<_>>(), "model.name", &MODEL_ORDER);
            for (&setting, name) in settings.iter().zip(names) {
                (self.settings[setting].task, self.settings[setting].label) = (i, name);
            }
            self.tasks.push(TaskGroup { label, fields, settings });
        }
    }

    fn mark_incomplete(&mut self) {
        for task in &self.tasks {
            let groups: Vec<usize> =
                task.settings.iter().flat_map(|&setting| self.settings[setting].groups.clone()).collect();
            let most = groups.iter().map(|&group| self.groups[group].runs.len()).max().unwrap_or(0);
            for group in groups {
                self.groups[group].incomplete = self.groups[group].runs.len() < most;
            }
        }
    }

    /// The group that stands for a setting.
    pub fn chosen(&self, setting: &Setting) -> &Group {
        &self.groups[setting.chosen]
    }

    /// The runs of the group that stands for a setting.
    pub fn chosen_runs(&self, setting: &Setting) -> Vec<&Run> {
        self.chosen(setting).runs.iter().map(|&run| &self.runs[run]).collect()
    }

    /// The group of every run.
    pub fn group_of(&self) -> Vec<usize> {
        let mut of = vec![0; self.runs.len()];
        for (i, group) in self.groups.iter().enumerate() {
            group.runs.iter().for_each(|&run| of[run] = i);
        }
        of
    }

    /// Statistics over the seeds of the group that stands for a setting.
    pub fn over_seeds(&self, setting: &Setting, value: impl Fn(&Run) -> f64) -> Option<Stats> {
        Stats::of(self.chosen_runs(setting).into_iter().map(value))
    }

    /// The best setting of each model of a task, by validation; the most accurate on the test first.
    pub fn ranking(&self, task: &TaskGroup) -> Vec<usize> {
        let mut best: BTreeMap<usize, usize> = BTreeMap::new();
        let validation = |setting: usize| self.chosen(&self.settings[setting]).validation.map(|v| v.mean);
        let seeds = |setting: usize| self.chosen(&self.settings[setting]).runs.len();
        for &setting in &task.settings {
            let slot = best.entry(place(&self.settings[setting].model)).or_insert(setting);
            // More seeds first: one lucky run must not stand for a model.
            let better =
                seeds(setting).cmp(&seeds(*slot)).then(total(validation(setting), validation(*slot)));
            if better.is_gt() {
                *slot = setting;
            }
        }
        let mut ranked: Vec<usize> = best.into_values().collect();
        let accuracy = |setting: usize| self.chosen(&self.settings[setting]).accuracy.map(|a| a.mean);
        ranked.sort_by(|&a, &b| total(accuracy(b), accuracy(a)));
        ranked
    }

    /// How much more accurate `a` is than `b`, seed by seed: the same seed means the same grammar and
    /// the same samples. None without common seeds.
    pub fn lead(&self, a: usize, b: usize) -> Option<Stats> {
        let seeds = |setting: usize| -> BTreeMap<u64, f64> {
            let runs = self.chosen_runs(&self.settings[setting]);
            runs.iter().map(|run| (run.summary.seed, run.summary.accuracy)).collect()
        };
        let (a, b) = (seeds(a), seeds(b));
        Stats::of(a.iter().filter_map(|(seed, accuracy)| Some(accuracy - b.get(seed)?)))
    }

    /// Whether in all settings the value of `key` is one for each value of `from`.
    pub fn follows(&self, key: &str, from: &str) -> bool {
        let mut by: BTreeMap<Option<&String>, Option<&String>> = BTreeMap::new();
        self.settings.iter().all(|setting| {
            let value = setting.fields.get(key);
            *by.entry(setting.fields.get(from)).or_insert(value) == value
        })
    }

    /// Keys of fields that do not have the same value in all settings.
    pub fn varying(&self) -> BTreeSet<&str> {
        let Some(first) = self.settings.first() else { return BTreeSet::new() };
        let mut keys: BTreeSet<&str> =
            self.settings.iter().flat_map(|s| s.fields.keys()).map(String::as_str).collect();
        keys.retain(|key| {
            self.settings.iter().any(|setting| setting.fields.get(*key) != first.fields.get(*key))
        });
        keys
    }
}

/// The candidate with the highest mean validation accuracy among those with the most seeds, and why.
fn choose(candidates: &[Group]) -> (usize, String) {
    let n = |group: &Group| group.validation.map_or(0, |v| v.n);
    let most = candidates.iter().map(n).max().unwrap_or(0);
    let mean = |i: usize| candidates[i].validation.map(|v| v.mean);
    let eligible: Vec<usize> = (0..candidates.len()).filter(|&i| n(&candidates[i]) == most).collect();
    // The first of equals.
    let best =
        eligible.iter().copied().reduce(|best, i| if total(mean(i), mean(best)).is_gt() { i } else { best });
    let best = best.unwrap_or(0);
    if most == 0 {
        let reason = match candidates.len() {
            1 => "the only candidate; no validation was recorded",
            _ => "the first candidate: no validation was recorded",
        };
        return (best, reason.into());
    }
    if candidates.len() == 1 {
        return (best, "the only candidate".into());
    }
    let mut reason = format!("highest mean validation accuracy of {} candidates", eligible.len());
    if eligible.iter().any(|&i| i != best && mean(i) == mean(best)) {
        reason += "; another is equal, this is the first";
    }
    match candidates.len() - eligible.len() {
        0 => {}
        1 => reason += "; 1 with fewer seeds was not considered",
        left => reason += &format!("; {left} with fewer seeds were not considered"),
    }
    (best, reason)
}

/// None is less than any number.
fn total(a: Option<f64>, b: Option<f64>) -> Ordering {
    match (a, b) {
        (Some(a), Some(b)) => a.total_cmp(&b),
        (a, b) => a.is_some().cmp(&b.is_some()),
    }
}

/// The place of a model in the registry: it decides colour, marker and order.
pub fn place(model: &str) -> usize {
    MODELS.iter().position(|known| known.name == model).unwrap_or(MODELS.len())
}

/// Texts in the order of the numbers that they are, if they are.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Sortable(Vec<String>);

impl Ord for Sortable {
    fn cmp(&self, other: &Self) -> Ordering {
        let pairs = self.0.iter().zip(&other.0).map(|(a, b)| compare(a, b).then_with(|| a.cmp(b)));
        pairs.into_iter().find(|order| order.is_ne()).unwrap_or(Ordering::Equal)
    }
}

impl PartialOrd for Sortable {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Numbers by value, words by letter.
pub fn compare(a: &str, b: &str) -> Ordering {
    match (a.parse::<f64>(), b.parse::<f64>()) {
        (Ok(a), Ok(b)) => a.total_cmp(&b),
        _ => a.cmp(b),
    }
}

pub fn without(fields: &Fields, leave_out: impl Fn(&str) -> bool) -> Fields {
    fields.iter().filter(|(key, _)| !leave_out(key)).map(|(k, v)| (k.clone(), v.clone())).collect()
}

/// What tells tasks apart, the most telling first.
pub const TASK_ORDER: [&str; 12] = [
    "task.preset",
    "task.objective",
    "task.encoding",
    "task.ambiguities",
    "task.split",
    "train.emulate",
    "train.precision",
    "version",
    "task.gap.kind",
    "task.length",
    "task.noise",
    "task.samples.train",
];

/// What tells models of one name apart, the most telling first.
pub const MODEL_ORDER: [&str; 5] =
    ["model.name", "model.width", "model.layers", "model.state", "model.householders"];

/// A label for each of `sets`: its `name`, and as many more fields as it takes to tell those of one
/// name apart, those in `order` first.
pub fn labels(sets: &[&Fields], name: &str, order: &[&str]) -> Vec<String> {
    let value = |set: usize, key: &str| sets[set].get(key).map_or("none", String::as_str);
    let mut keys: Vec<&str> = order.to_vec();
    let rest: BTreeSet<&str> = sets.iter().flat_map(|set| set.keys()).map(String::as_str).collect();
    keys.extend(rest.into_iter().filter(|key| !order.contains(key)));
    let label = |set: usize| {
        let alike: Vec<usize> = (0..sets.len()).filter(|&i| value(i, name) == value(set, name)).collect();
        // The keys that all of one name show, so that their labels are of one kind.
        let mut shown = Vec::new();
        let mut parts = vec![alike];
        for key in keys.iter().filter(|key| **key != name) {
            let split = |part: &Vec<usize>| {
                let mut by: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
                part.iter().for_each(|&i| by.entry(value(i, key)).or_default().push(i));
                by.into_values().collect::<Vec<_>>()
            };
            let finer: Vec<Vec<usize>> = parts.iter().flat_map(split).collect();
            if finer.len() > parts.len() {
                shown.push(*key);
                parts = finer;
            }
        }
        let mut label = value(set, name).to_string();
        for (i, key) in shown.into_iter().enumerate() {
            label += &format!("{}{} {}", if i == 0 { " · " } else { ", " }, short(key), value(set, key));
        }
        label
    };
    (0..sets.len()).map(label).collect()
}

/// A key without its section.
pub fn short(key: &str) -> &str {
    key.split_once('.').map_or(key, |(_, rest)| rest)
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::read::tests::made_up;
    use super::*;

    pub fn data(runs: Vec<Run>) -> Data {
        let tuned: Vec<String> = TUNED.iter().map(|key| key.to_string()).collect();
        Data::new(Collection { runs, ..Default::default() }, &tuned).unwrap()
    }

    fn run(model: &str, lr: &str, seed: u64, validation: f64, accuracy: f64) -> Run {
        let seed = format!("seed={seed}");
        made_up(&[&format!("model.name={model}"), &format!("train.lr={lr}"), &seed], validation, accuracy)
    }

    #[test]
    fn the_validation_chooses_and_not_the_test() {
        let data = data(vec![
            run("mamba2", "0.001", 1, 0.60, 0.99),
            run("mamba2", "0.001", 2, 0.62, 0.99),
            run("mamba2", "0.004", 2, 0.72, 0.70),
            run("mamba2", "0.004", 1, 0.70, 0.60),
        ]);
        assert_eq!((data.groups.len(), data.settings.len(), data.tasks.len()), (2, 1, 1));
        let setting = &data.settings[0];
        let chosen = data.chosen(setting);
        assert_eq!(chosen.tuned[0], ("train.lr".to_string(), "0.004".to_string()));
        assert_eq!(setting.reason, "highest mean validation accuracy of 2 candidates");
        let accuracy = chosen.accuracy.unwrap();
        assert!((accuracy.mean - 0.65).abs() < 1e-12 && accuracy.n == 2);
        assert!((accuracy.sd.unwrap() - 0.005f64.sqrt()).abs() < 1e-12);
        let seeds: Vec<u64> = data.chosen_runs(setting).iter().map(|run| run.summary.seed).collect();
        assert_eq!(seeds, [1, 2]);
    }

    #[test]
    fn of_equals_the_first_is_chosen_and_it_is_said() {
        let data = data(vec![run("gla", "0.004", 1, 0.5, 0.9), run("gla", "0.0005", 1, 0.5, 0.1)]);
        assert_eq!(data.chosen(&data.settings[0]).tuned[0].1, "0.0005");
        assert!(data.settings[0].reason.contains("another is equal"), "{}", data.settings[0].reason);
    }

    #[test]
    fn a_candidate_with_fewer_seeds_is_marked_and_not_chosen() {
        let data = data(vec![
            run("gla", "0.001", 1, 0.5, 0.5),
            run("gla", "0.001", 2, 0.5, 0.5),
            run("gla", "0.004", 1, 0.9, 0.9),
        ]);
        let setting = &data.settings[0];
        assert_eq!(data.chosen(setting).tuned[0].1, "0.001");
        assert!(setting.reason.ends_with("1 with fewer seeds was not considered"), "{}", setting.reason);
        let incomplete: Vec<bool> = data.groups.iter().map(|group| group.incomplete).collect();
        assert_eq!(incomplete, [false, true]);
    }

    #[test]
    fn runs_without_validation_are_never_chosen_before_others() {
        let mut silent = run("gla", "0.0001", 1, 0.9, 0.9);
        silent.validation.clear();
        let alone = data(vec![silent.clone()]);
        assert_eq!(alone.settings[0].reason, "the only candidate; no validation was recorded");
        assert_eq!(alone.groups[0].validation, None);
        assert_eq!(alone.groups[0].accuracy.unwrap(), Stats { n: 1, mean: 0.9, sd: None });
        let two = data(vec![silent, run("gla", "0.001", 1, 0.2, 0.2)]);
        assert_eq!(two.chosen(&two.settings[0]).tuned[0].1, "0.001");
    }

    #[test]
    fn what_must_not_be_averaged_is_kept_apart() {
        let base = run("gla", "0.001", 1, 0.5, 0.5);
        let (mut half, mut newer) = (base.clone(), base.clone());
        half.summary.precision = "bf16".into();
        newer.summary.version = "9.0.0".into();
        let released = made_up(&["model.name=gla", "task.split=as-released"], 0.5, 0.5);
        let data = data(vec![base, half, newer, released]);
        assert_eq!((data.groups.len(), data.tasks.len()), (4, 4));
        let labels: BTreeSet<&str> = data.tasks.iter().map(|task| &task.label[..]).collect();
        assert_eq!(labels.len(), 4, "{labels:?}");
    }

    #[test]
    fn the_same_run_twice_counts_once() {
        let mut copy = run("gla", "0.001", 1, 0.5, 0.5);
        copy.dir = "elsewhere".into();
        let data = data(vec![run("gla", "0.001", 1, 0.5, 0.5), copy]);
        assert_eq!(data.groups[0].runs, [0]);
        assert!(data.notes[0].contains("elsewhere is left out"), "{:?}", data.notes);
    }

    #[test]
    fn a_model_is_ranked_by_its_test_but_its_size_is_chosen_by_validation() {
        let sized = |model: &str, width: usize, validation, accuracy| {
            made_up(&[&format!("model.name={model}"), &format!("model.width={width}")], validation, accuracy)
        };
        let data =
            data(vec![sized("gla", 32, 0.5, 0.9), sized("gla", 64, 0.6, 0.5), sized("mamba2", 32, 0.4, 0.7)]);
        let ranking = data.ranking(&data.tasks[0]);
        let labels: Vec<&str> = ranking.iter().map(|&setting| &data.settings[setting].label[..]).collect();
        assert_eq!(labels, ["mamba2", "gla · width 64"]);
        let lead = data.lead(ranking[0], ranking[1]).unwrap();
        assert!((lead.mean - 0.2).abs() < 1e-12 && lead.n == 1);
    }

    #[test]
    fn leads_are_over_common_seeds() {
        let data = data(vec![
            run("gla", "0.001", 1, 0.5, 0.6),
            run("gla", "0.001", 2, 0.5, 0.9),
            run("mamba2", "0.001", 2, 0.5, 0.8),
            run("mamba2", "0.001", 3, 0.5, 0.1),
        ]);
        let ranking = data.ranking(&data.tasks[0]);
        assert!((data.lead(ranking[0], ranking[1]).unwrap().mean - 0.1).abs() < 1e-12);
    }

    #[test]
    fn an_unknown_tuned_field_is_refused() {
        let runs = vec![run("gla", "0.001", 1, 0.5, 0.5)];
        let error = Data::new(Collection { runs, ..Default::default() }, &["train.rl".into()]).unwrap_err();
        assert!(error.to_string().contains("did you mean train.lr"), "{error}");
    }

    #[test]
    fn labels_say_what_differs_and_no_more() {
        let sets: Vec<Fields> = [("a", "1", "x"), ("a", "2", "y"), ("b", "1", "x")]
            .iter()
            .map(|(name, width, other)| {
                let pairs = [("model.name", name), ("model.width", width), ("model.zeta", other)];
                pairs.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
            })
            .collect();
        let labels = labels(&sets.iter().collect::<Vec<_>>(), "model.name", &["model.width"]);
        assert_eq!(labels, ["a · width 1", "a · width 2", "b"]);
    }
}
