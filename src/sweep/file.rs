//! Sweep files: a base configuration, and what varies.
//!
//! ```yaml
//! name: first                       # folder of the results: runs/first; default: the file's name
//! base: ../quickstart.yaml          # a configuration, beside this file; default: the program's defaults
//! config: {train: {batch: 16}}      # fields of all runs, as in a configuration
//! grid:                             # every combination; a value, a list, or a range
//!   model.name: [mamba2, gla]
//!   model.width: {from: 64, to: 256, factor: 2}
//!   seed: {from: 1, to: 4}          # step 1
//! zip:                              # lists that go side by side
//!   - {task.ambiguities: [6, 8], train.lr: [0.004, 0.002]}
//! when:                             # for some of the combinations: set fields, or vary more of them
//!   - if: {model.name: [mamba, mamba2]}
//!     set: {model.state: 16}
//!     grid: {model.conv: [2, 4]}
//! exclude:                          # combinations to leave out
//!   - {model.name: gla, model.width: 256}
//! slurm: {partition: gpu, time: "04:00:00", gres: "gpu:1"}
//! ```

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_yaml::{Mapping, Value};

use super::wandb;
use crate::bail_input;
use crate::config::load::{Layer, document, merged, read_text, shown};
use crate::error::nearest;

/// More runs than any sweep of this program can want.
const MOST_RUNS: usize = 1_000_000;

/// Fields and their values.
pub type Fields = Vec<(String, Value)>;

/// A sweep file, spread out.
pub struct Expansion {
    pub name: String,
    /// What all runs have in common.
    pub base: Vec<Layer>,
    /// What each run sets, in the order of the file.
    pub points: Vec<Fields>,
    /// Combinations that are no run, by reason.
    pub left_out: Vec<(String, usize)>,
    /// Settings of `--launcher slurm`.
    pub slurm: Mapping,
    /// What the user should know of the reading.
    pub notes: Vec<String>,
}

impl Expansion {
    /// Counts a combination that is left out.
    pub(super) fn leave_out(&mut self, reason: &str) {
        match self.left_out.iter_mut().find(|(known, _)| known == reason) {
            Some((_, count)) => *count += 1,
            None => self.left_out.push((reason.to_string(), 1)),
        }
    }
}

/// Reads a sweep file of this program, or a W&B grid of the released code; `sets` are laid over every run.
pub fn read(path: &Path, sets: &[Layer]) -> Result<Expansion> {
    let (text, origin) = read_text(path)?;
    let Value::Mapping(file) = document(&text, &origin)? else {
        bail_input!("{origin} is no sweep; write for example `grid: {{seed: [1, 2]}}`")
    };
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    if file.contains_key("parameters") {
        return wandb::expand(&file, &origin, stem);
    }
    expand(&file, &origin, stem, path.parent().unwrap_or(Path::new("")), sets)
}

const KEYS: [&str; 8] = ["name", "base", "config", "grid", "zip", "when", "exclude", "slurm"];

fn expand(file: &Mapping, origin: &str, stem: String, folder: &Path, sets: &[Layer]) -> Result<Expansion> {
    check_keys(file, &KEYS, origin, "the sweep")?;
    let part = |name: &str| file.get(name).filter(|value| !value.is_null());
    let name = match part("name") {
        None => stem,
        Some(Value::String(name)) if is_folder_name(name) => name.clone(),
        Some(other) => bail_input!("{origin}: name is {}; it must be the name of a folder", shown(other)),
    };
    let mut base = Vec::new();
    match part("base") {
        None => {}
        Some(Value::String(path)) => base.push(Layer::read(&folder.join(PathBuf::from(path)))?),
        Some(other) => {
            bail_input!("{origin}: base is {}; it must be the path of a configuration file", shown(other))
        }
    }
    if let Some(config) = part("config") {
        base.push(Layer::tree(config.clone(), &format!("{origin}: config")));
    }

    let mut axes = axes(part("grid"), origin, "grid")?;
    for (i, group) in list(part("zip"), origin, "zip")?.iter().enumerate() {
        axes.push(zipped(group, origin, &format!("zip[{i}]"))?);
    }
    check_distinct(&axes, origin)?;
    let mut rules = Vec::new();
    for (i, rule) in list(part("when"), origin, "when")?.iter().enumerate() {
        rules.push(Rule::read(rule, origin, &format!("when[{i}]"))?);
    }
    let mut exclude = Vec::new();
    for (i, condition) in list(part("exclude"), origin, "exclude")?.iter().enumerate() {
        exclude.push(Condition::read(condition, origin, &format!("exclude[{i}]"))?);
    }
    let slurm = match part("slurm") {
        None => Mapping::new(),
        Some(Value::Mapping(slurm)) => slurm.clone(),
        Some(other) => bail_input!(
            "{origin}: slurm is {}; it must be a mapping, as in `slurm: {{partition: gpu}}`",
            shown(other)
        ),
    };
    // Conditions name fields; a name that no configuration has would silently never hold.
    let tree = merged(&base.iter().collect::<Vec<_>>())?;
    for condition in rules.iter().map(|rule| &rule.when).chain(&exclude) {
        condition.check(&tree, origin)?;
    }

    let combinations = axes.iter().try_fold(1usize, |n, axis| n.checked_mul(axis.choices.len()));
    if combinations.is_none_or(|n| n > MOST_RUNS) {
        bail_input!("{origin} makes more than {MOST_RUNS} combinations; split it into several sweeps")
    }
    let (points, left_out) = (Vec::new(), Vec::new());
    let mut expansion = Expansion { name, base, points, left_out, slurm, notes: vec![] };
    let product = Product { origin, exclude: &exclude, sets };
    for fields in combine(&axes) {
        product.add(fields, &rules, &mut expansion)?;
    }
    Ok(expansion)
}

/// Several fields that change together; a single field of a grid is one of them.
struct Axis {
    place: String,
    choices: Vec<Fields>,
}

/// Holds where every field has one of its values.
struct Condition {
    place: String,
    fields: Vec<(String, Vec<Value>)>,
}

struct Rule {
    when: Condition,
    set: Fields,
    axes: Vec<Axis>,
}

struct Product<'a> {
    origin: &'a str,
    exclude: &'a [Condition],
    sets: &'a [Layer],
}

impl Product<'_> {
    /// Adds the runs of one combination: what the remaining `rules` make of it.
    fn add(&self, fields: Fields, rules: &[Rule], expansion: &mut Expansion) -> Result<()> {
        let tree = || -> Result<Value> {
            let own: Vec<Layer> = fields
                .iter()
                .map(|(path, value)| Layer::field(path, value.clone(), &format!("{}: {path}", self.origin)))
                .collect();
            merged(&expansion.base.iter().chain(&own).chain(self.sets).collect::<Vec<_>>())
        };
        if let Some((rule, rest)) = rules.split_first() {
            if !rule.when.holds(&tree()?) {
                return self.add(fields, rest, expansion);
            }
            for more in combine(&rule.axes) {
                let fields = fields.iter().chain(&rule.set).cloned().chain(more).collect();
                self.add(fields, rest, expansion)?;
            }
            return Ok(());
        }
        if !self.exclude.is_empty() {
            let tree = tree()?;
            if self.exclude.iter().any(|condition| condition.holds(&tree)) {
                expansion.leave_out("excluded");
                return Ok(());
            }
        }
        if expansion.points.len() == MOST_RUNS {
            bail_input!("{} makes more than {MOST_RUNS} runs; split it into several sweeps", self.origin)
        }
        expansion.points.push(fields);
        Ok(())
    }
}

/// Every combination of the axes' choices, the last axis fastest.
fn combine(axes: &[Axis]) -> impl Iterator<Item = Fields> {
    let total: usize = axes.iter().map(|axis| axis.choices.len()).product();
    (0..total).map(|mut index| {
        let mut chosen: Vec<&Fields> = Vec::with_capacity(axes.len());
        for axis in axes.iter().rev() {
            chosen.push(&axis.choices[index % axis.choices.len()]);
            index /= axis.choices.len();
        }
        chosen.into_iter().rev().flatten().cloned().collect()
    })
}

impl Condition {
    fn read(value: &Value, origin: &str, place: &str) -> Result<Self> {
        let fields = mapping(value, origin, place)?;
        let fields = fields
            .iter()
            .map(|(key, value)| Ok((field(key, origin, place)?, several(value).to_vec())))
            .collect::<Result<Vec<_>>>()?;
        if fields.is_empty() {
            bail_input!("{origin}: {place} has no field; write for example {{model.name: gla}}")
        }
        Ok(Self { place: place.to_string(), fields })
    }

    fn check(&self, tree: &Value, origin: &str) -> Result<()> {
        for (path, _) in &self.fields {
            if lookup(tree, path).is_none_or(Value::is_mapping) {
                bail_input!(
                    "{origin}: {} asks for {path}, which no configuration has; name a field such as model.name",
                    self.place
                )
            }
        }
        Ok(())
    }

    fn holds(&self, tree: &Value) -> bool {
        self.fields.iter().all(|(path, values)| {
            lookup(tree, path).is_some_and(|own| values.iter().any(|value| same(own, value)))
        })
    }
}

impl Rule {
    fn read(value: &Value, origin: &str, place: &str) -> Result<Self> {
        let rule = mapping(value, origin, place)?;
        check_keys(rule, &["if", "set", "grid"], origin, place)?;
        let Some(condition) = rule.get("if") else {
            bail_input!("{origin}: {place} has no `if`; say for which runs it holds")
        };
        let set = match rule.get("set") {
            None => Vec::new(),
            Some(set) => mapping(set, origin, &format!("{place}.set"))?
                .iter()
                .map(|(key, value)| Ok((field(key, origin, place)?, value.clone())))
                .collect::<Result<_>>()?,
        };
        let axes = axes(rule.get("grid"), origin, &format!("{place}.grid"))?;
        if set.is_empty() && axes.is_empty() {
            bail_input!("{origin}: {place} has neither `set` nor `grid`; say what it changes")
        }
        Ok(Self { when: Condition::read(condition, origin, &format!("{place}.if"))?, set, axes })
    }
}

/// The fields of a grid, each an axis.
fn axes(grid: Option<&Value>, origin: &str, place: &str) -> Result<Vec<Axis>> {
    let Some(grid) = grid else { return Ok(Vec::new()) };
    let mut axes = Vec::new();
    for (key, value) in mapping(grid, origin, place)? {
        let path = field(key, origin, place)?;
        let place = format!("{place}.{path}");
        let choices = values(value, origin, &place)?;
        let choices = choices.into_iter().map(|value| vec![(path.clone(), value)]).collect();
        axes.push(Axis { place, choices });
    }
    Ok(axes)
}

/// Lists of one length, taken side by side.
fn zipped(group: &Value, origin: &str, place: &str) -> Result<Axis> {
    let mut choices: Vec<Fields> = Vec::new();
    for (key, value) in mapping(group, origin, place)? {
        let path = field(key, origin, place)?;
        let values = values(value, origin, &format!("{place}.{path}"))?;
        if choices.is_empty() {
            choices = vec![Vec::new(); values.len()];
        }
        if choices.len() != values.len() {
            bail_input!(
                "{origin}: {place}.{path} has {} values, but the list before it {}; zipped lists are equally long",
                values.len(),
                choices.len()
            )
        }
        choices.iter_mut().zip(values).for_each(|(fields, value)| fields.push((path.clone(), value)));
    }
    if choices.is_empty() {
        bail_input!("{origin}: {place} has no field")
    }
    Ok(Axis { place: place.to_string(), choices })
}

/// No field may stand in two axes: one of them would be ignored.
fn check_distinct(axes: &[Axis], origin: &str) -> Result<()> {
    let mut seen: Vec<(&str, &str)> = Vec::new();
    for axis in axes {
        for (path, _) in &axis.choices[0] {
            if let Some((_, place)) = seen.iter().find(|(known, _)| known == path) {
                bail_input!("{origin}: {path} varies in {place} and in {}; keep one of them", axis.place)
            }
            seen.push((path, &axis.place));
        }
    }
    Ok(())
}

/// The values of an axis: a list, a range, or one value.
fn values(value: &Value, origin: &str, place: &str) -> Result<Vec<Value>> {
    let values = match value {
        Value::Mapping(range) => range_values(range, origin, place)?,
        Value::Sequence(values) => values.clone(),
        Value::Null => Vec::new(),
        one => vec![one.clone()],
    };
    if values.is_empty() {
        bail_input!(
            "{origin}: {place} has no value; give a list such as [1, 2] or a range {{from: 1, to: 4}}"
        )
    }
    for (i, value) in values.iter().enumerate() {
        if values[..i].iter().any(|other| same(other, value)) {
            bail_input!("{origin}: {place} holds {} twice", shown(value))
        }
    }
    Ok(values)
}

/// `{from, to}`, both included, in steps of `step` (default 1) or multiplied by `factor`.
fn range_values(range: &Mapping, origin: &str, place: &str) -> Result<Vec<Value>> {
    check_keys(range, &["from", "to", "step", "factor"], origin, place)?;
    let number = |name: &str| match range.get(name) {
        None => Ok(None),
        Some(value) => match value.as_f64() {
            Some(x) if x.is_finite() => Ok(Some(x)),
            _ => Err(crate::bad_input!("{origin}: {place}.{name} is {}; it must be a number", shown(value))),
        },
    };
    let (Some(from), Some(to)) = (number("from")?, number("to")?) else {
        bail_input!("{origin}: {place} is a range without `from` or `to`; write {{from: 1, to: 4}}")
    };
    let next: Box<dyn Fn(usize) -> f64> = match (number("step")?, number("factor")?) {
        (Some(_), Some(_)) => bail_input!("{origin}: {place} has a step and a factor; keep one of them"),
        (_, Some(factor)) if factor > 1.0 && from > 0.0 => Box::new(move |i| from * factor.powi(i as i32)),
        (_, Some(factor)) => bail_input!(
            "{origin}: {place}.factor is {factor} from {from}; the factor must be above 1 and `from` above 0"
        ),
        (step, None) => match step.unwrap_or(1.0) {
            step if step > 0.0 => Box::new(move |i| from + step * i as f64),
            step => bail_input!("{origin}: {place}.step is {step}; it must be above 0"),
        },
    };
    // A last value that rounding pushed beyond the end still counts.
    let end = to + 1e-9 * to.abs();
    let numbers: Vec<f64> = (0..MOST_RUNS).map(next).take_while(|x| *x <= end).collect();
    let whole =
        ["from", "to", "step", "factor"].iter().all(|name| !range.get(name).is_some_and(Value::is_f64));
    Ok(numbers
        .into_iter()
        .map(|x| match whole {
            true => Value::from(x.round() as i64),
            // Seven digits are what a person would have written; sums of steps carry more.
            false => Value::from(format!("{x:.9e}").parse::<f64>().unwrap_or(x)),
        })
        .collect())
}

/// A list of parts; none if it is missing.
fn list<'a>(value: Option<&'a Value>, origin: &str, place: &str) -> Result<&'a [Value]> {
    match value {
        None => Ok(&[]),
        Some(Value::Sequence(list)) => Ok(list),
        Some(other) => bail_input!(
            "{origin}: {place} is {}; it must be a list, each entry with a dash in front",
            shown(other)
        ),
    }
}

fn mapping<'a>(value: &'a Value, origin: &str, place: &str) -> Result<&'a Mapping> {
    match value {
        Value::Mapping(mapping) => Ok(mapping),
        other => bail_input!(
            "{origin}: {place} is {}; it must be a mapping of fields, as in {{model.width: 64}}",
            shown(other)
        ),
    }
}

fn field(key: &Value, origin: &str, place: &str) -> Result<String> {
    match key.as_str() {
        Some(key) => Ok(key.to_string()),
        None => {
            bail_input!("{origin}: {place} has the key {}; keys are fields such as model.width", shown(key))
        }
    }
}

/// A list's values, or one value.
fn several(value: &Value) -> &[Value] {
    match value {
        Value::Sequence(values) => values,
        one => std::slice::from_ref(one),
    }
}

/// Refuses keys that are none of `known`.
pub(super) fn check_keys(mapping: &Mapping, known: &[&str], origin: &str, place: &str) -> Result<()> {
    for key in mapping.keys() {
        let name = key.as_str().unwrap_or_default();
        if !known.contains(&name) {
            match nearest(name, known.iter().copied()) {
                Some(near) => {
                    bail_input!("{origin}: unknown key {} in {place}; did you mean `{near}`?", shown(key))
                }
                None => bail_input!(
                    "{origin}: unknown key {} in {place}; it has {}",
                    shown(key),
                    known.join(", ")
                ),
            }
        }
    }
    Ok(())
}

/// The value of a field in a configuration tree.
pub fn lookup<'a>(tree: &'a Value, path: &str) -> Option<&'a Value> {
    path.split('.').try_fold(tree, |tree, key| tree.get(key))
}

/// Whether two values mean the same: 1 and 1.0 do.
pub fn same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}

/// Whether a name can be that of a folder on every system.
fn is_folder_name(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with('.')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str) -> Result<Expansion> {
        let Value::Mapping(file) = document(text, "s.yaml").unwrap() else { panic!("{text}") };
        expand(&file, "s.yaml", "s".into(), Path::new(""), &[])
    }

    /// The runs, each as `value value …`.
    fn points(text: &str) -> Vec<String> {
        let expansion = read_text(text).unwrap();
        let text = |fields: &Fields| {
            fields.iter().map(|(_, v)| shown(v).replace('`', "")).collect::<Vec<_>>().join(" ")
        };
        expansion.points.iter().map(text).collect()
    }

    #[test]
    fn grids_ranges_and_zips_are_multiplied() {
        let text = "grid: {model.name: [gla, mamba2], seed: {from: 1, to: 2}}
zip: [{model.width: [32, 64], train.lr: [0.1, 0.2]}]";
        assert_eq!(
            points(text),
            ["gla 1 32 0.1", "gla 1 64 0.2", "gla 2 32 0.1", "gla 2 64 0.2"]
                .into_iter()
                .chain(["mamba2 1 32 0.1", "mamba2 1 64 0.2", "mamba2 2 32 0.1", "mamba2 2 64 0.2"])
                .collect::<Vec<_>>()
        );
        assert_eq!(points("grid: {model.width: {from: 16, to: 100, factor: 2}}"), ["16", "32", "64"]);
        assert_eq!(points("grid: {train.lr: {from: 0.1, to: 0.3, step: 0.1}}"), ["0.1", "0.2", "0.3"]);
        assert_eq!(points("grid: {seed: 7}"), ["7"]);
        assert_eq!(points("name: one"), [""]);
    }

    #[test]
    fn conditions_set_and_vary_and_exclude() {
        let text = "grid: {model.name: [gla, mamba, mamba2], model.width: [32, 64]}
when:
  - {if: {model.name: [mamba, mamba2]}, set: {model.state: 16}}
  - {if: {model.state: 16, model.width: 64}, grid: {model.conv: [2, 4]}}
exclude: [{model.name: gla, model.width: 64}, {model.conv: 2, model.name: mamba}]";
        assert_eq!(
            points(text),
            ["gla 32", "mamba 32 16", "mamba 64 16 4", "mamba2 32 16", "mamba2 64 16 2", "mamba2 64 16 4"]
        );
        let expansion = read_text(text).unwrap();
        assert_eq!(expansion.left_out, [("excluded".to_string(), 2)]);
    }

    #[test]
    fn mistakes_are_named() {
        for (text, part) in [
            ("gird: {seed: 1}", "unknown key `gird` in the sweep; did you mean `grid`?"),
            ("grid: [1]", "grid is a list; it must be a mapping of fields"),
            ("grid: {seed: []}", "grid.seed has no value"),
            ("grid: {seed: [1, 1.0]}", "grid.seed holds 1.0 twice"),
            ("grid: {seed: {from: 1}}", "grid.seed is a range without `from` or `to`"),
            ("grid: {seed: {from: 1, to: 3, step: 0}}", "grid.seed.step is 0; it must be above 0"),
            ("grid: {seed: {from: 0, to: 3, factor: 2}}", "the factor must be above 1 and `from` above 0"),
            ("zip: [{seed: [1, 2], model.width: [32]}]", "zipped lists are equally long"),
            ("grid: {seed: [1, 2]}\nzip: [{seed: [1, 2]}]", "seed varies in grid.seed and in zip[0]"),
            ("when: [{set: {seed: 1}}]", "when[0] has no `if`"),
            ("when: [{if: {seed: 1}}]", "when[0] has neither `set` nor `grid`"),
            ("exclude: [{model.nam: gla}]", "exclude[0] asks for model.nam, which no configuration has"),
            ("exclude: [{model: gla}]", "exclude[0] asks for model, which no configuration has"),
            ("exclude: {seed: 1}", "exclude is a mapping; it must be a list"),
            ("name: a/b", "name is `a/b`; it must be the name of a folder"),
            ("slurm: gpu", "slurm is `gpu`; it must be a mapping"),
            (
                "grid: {seed: {from: 1, to: 2000}, model.width: {from: 1, to: 2000}}",
                "more than 1000000 combinations",
            ),
        ] {
            let error = format!("{:#}", read_text(text).err().unwrap());
            assert!(error.starts_with("s.yaml") && error.contains(part), "{text}: {error}");
        }
    }
}
