//! Reads configurations: presets, YAML, overrides, and what is wrong with them.
//!
//! The user's text and every `--set` are trees that are laid over the tree of the preset's defaults, one
//! after the other. Only then does the tree become a [`Config`], so a wrong type is found in one place.

use std::collections::HashSet;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use serde::Deserialize;
use serde_path_to_error::Segment;
use serde_yaml::{Mapping, Value};

use super::{Config, TaskPreset};
use crate::bail_input;
use crate::error::{BadInput, nearest};

/// Bytes of the longest text that is still taken for a configuration.
const MOST_BYTES: usize = 1 << 16;

/// Brackets that may be open at once; the YAML scanner takes time quadratic in them.
const MOST_OPEN: usize = 64;

/// Reads a configuration file and lays `sets`, each `key.path=value`, over it.
pub fn load(path: &Path, sets: &[String]) -> anyhow::Result<Config> {
    over(Layer::read(path)?, sets)
}

/// Reads a configuration from text that messages call `origin`, and lays `sets` over it.
pub fn parse(text: &str, origin: &str, sets: &[String]) -> anyhow::Result<Config> {
    over(Layer::parse(text, origin)?, sets)
}

fn over(base: Layer, sets: &[String]) -> anyhow::Result<Config> {
    let sets = sets.iter().map(|set| Layer::of_set(set)).collect::<anyhow::Result<Vec<_>>>()?;
    let layers: Vec<&Layer> = std::iter::once(&base).chain(&sets).collect();
    settle(&merged(&layers)?, &layers)
}

/// The text of a file that should hold a configuration, and what messages call it.
pub(crate) fn read_text(path: &Path) -> anyhow::Result<(String, String)> {
    let origin = escaped(&path.display().to_string());
    let mut bytes = Vec::new();
    let read = File::open(path)
        .and_then(|file| file.take(MOST_BYTES as u64 + 1).read_to_end(&mut bytes))
        .map_err(|error| error.kind());
    match read {
        Ok(_) => {}
        Err(ErrorKind::NotFound) => bail_input!("{origin} does not exist; give a configuration file"),
        Err(ErrorKind::IsADirectory) => bail_input!("{origin} is a directory; give a configuration file"),
        Err(kind) => bail_input!("{origin} cannot be read: {kind}"),
    }
    if bytes.len() > MOST_BYTES {
        return Err(too_long(&origin));
    }
    match String::from_utf8(bytes) {
        Ok(text) => Ok((text, origin)),
        Err(error) => bail_input!(
            "{origin} is not UTF-8 text (byte {}); give a configuration file",
            error.utf8_error().valid_up_to() + 1
        ),
    }
}

/// The layers over the defaults of the preset that they name: a complete tree whose values may still be wrong.
pub fn merged(layers: &[&Layer]) -> anyhow::Result<Value> {
    let preset = |layer: &&Layer| TaskPreset::deserialize(layer.tree.get("task")?.get("preset")?).ok();
    let preset = layers.iter().rev().find_map(preset).unwrap_or(TaskPreset::Task1ModelSize);
    let mut tree = tree_of(&Config::preset(preset))?;
    for layer in layers {
        merge(&mut tree, &layer.tree, "")
            .map_err(|sentence| BadInput(format!("{}: {sentence}", layer.origin)))?;
    }
    Ok(tree)
}

/// The configuration that [`merged`] made of `layers`, checked and resolved.
pub fn settle(tree: &Value, layers: &[&Layer]) -> anyhow::Result<Config> {
    let config: Config = serde_path_to_error::deserialize(tree).map_err(|error| {
        let path: Vec<Segment> = error.path().iter().cloned().collect();
        let given = |layer: &&&Layer| at(&layer.tree, &path).is_some();
        let origin = layers.iter().rev().find(given).map_or("", |layer| &layer.origin);
        let value = at(tree, &path).map_or(String::new(), shown);
        let want = expected(tree, &path);
        BadInput(format!("{origin}: {} is {value}; it must be {want}", error.path()))
    })?;
    config.check()?;
    Ok(config.resolved())
}

/// The configuration of an empty file.
pub fn defaults() -> Config {
    Config::of(TaskPreset::Task1ModelSize)
}

impl Config {
    /// The complete configuration as YAML; [`parse`] gives it back as it is.
    pub fn to_yaml(&self) -> String {
        serde_yaml::to_string(self).expect("numbers, words and lists are always YAML")
    }
}

/// Something the user gave, and what to call it in messages.
#[derive(Clone, Debug)]
pub struct Layer {
    origin: String,
    tree: Value,
}

impl Layer {
    /// A configuration file.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let (text, origin) = read_text(path)?;
        Ok(Self { tree: document(&text, &origin)?, origin })
    }

    /// The text of a configuration that messages call `origin`.
    pub fn parse(text: &str, origin: &str) -> anyhow::Result<Self> {
        let origin = escaped(origin);
        Ok(Self { tree: document(text, &origin)?, origin })
    }

    /// A part of a file that messages call `origin`.
    pub fn tree(tree: Value, origin: &str) -> Self {
        Self { tree, origin: origin.to_string() }
    }

    /// A value of the field at `path`, as in `model.width`.
    pub fn field(path: &str, value: Value, origin: &str) -> Self {
        let around =
            |inner: Value, key: &str| Value::Mapping(Mapping::from_iter([(key.trim().into(), inner)]));
        // A path deeper than any key need not become a tree of its depth.
        let keys: Vec<&str> = path.splitn(8, '.').collect();
        Self { origin: origin.to_string(), tree: keys.into_iter().rev().fold(value, around) }
    }

    /// From `key.path=value`.
    pub fn of_set(set: &str) -> anyhow::Result<Self> {
        let origin = format!("--set {}", shortened(&escaped(set)));
        let Some((path, value)) = set.split_once('=') else {
            bail_input!("{origin}: write key.path=value, for example --set train.lr=0.002")
        };
        let value = document(value, &origin)?;
        if value.is_null() {
            bail_input!("{origin}: there is no value after `=`")
        }
        Ok(Self::field(path, value, &origin))
    }
}

/// The only document of a YAML text; null if it is empty.
pub(crate) fn document(text: &str, origin: &str) -> anyhow::Result<Value> {
    if text.len() > MOST_BYTES {
        return Err(too_long(origin));
    }
    if most_open(text) > MOST_OPEN {
        bail_input!("{origin} opens more than {MOST_OPEN} brackets; a configuration is mappings of mappings")
    }
    let control = |c: char| c.is_control() && !matches!(c, '\t' | '\n' | '\r' | '\u{85}');
    if let Some((at, c)) = text.char_indices().find(|&(_, c)| control(c)) {
        let line = text[..at].matches('\n').count() + 1;
        bail_input!("{origin}: line {line} holds the control character {}; remove it", c.escape_unicode())
    }
    if let Some(name) = alias(text) {
        bail_input!("{origin} repeats a part of itself with the alias *{name}; write its values out")
    }
    let document = |inner: serde_yaml::Deserializer| Value::deserialize(inner);
    let error = match serde_yaml::from_str(text) {
        Ok(value) => return Ok(value),
        Err(error) if error.to_string().contains("more than one document") => {
            // What follows a complete value is a document too, if not a valid one.
            match serde_yaml::Deserializer::from_str(text).nth(1).map(document) {
                Some(Err(error)) => error,
                _ => bail_input!("{origin} holds several YAML documents; give one configuration"),
            }
        }
        Err(error) => error,
    };
    let (message, line) = (escaped(&error.to_string()), error.location().map_or(0, |at| at.line()));
    let start = text.lines().nth(line.saturating_sub(1)).unwrap_or("");
    let indent = &start[..start.len() - start.trim_start().len()];
    if line > 0 && indent.contains('\t') {
        bail_input!("{origin}: line {line} is indented with a tab; YAML indents with spaces")
    }
    if let Some((place, key)) = message.split_once("duplicate entry with key ") {
        let key = key.split(" at line ").next().unwrap_or(key).trim_matches('"');
        let place = place.strip_suffix(": ").map_or(String::new(), |place| format!(" of `{place}`"));
        bail_input!("{origin}: the key `{}`{place} is given twice", shortened(key))
    }
    if let Some((place, number)) = message.split_once("invalid type: integer `") {
        let number = number.split('`').next().unwrap_or(number);
        let place = place.strip_suffix(": ").unwrap_or("the configuration");
        bail_input!("{origin}: {place} is {number}; whole numbers must lie between -2^63 and 2^64")
    }
    if message.contains("recursion limit") {
        bail_input!("{origin} nests too deeply in line {line}; a configuration is mappings of mappings")
    }
    bail_input!("{origin} is not valid YAML: {message}")
}

fn too_long(origin: &str) -> anyhow::Error {
    crate::bad_input!("{origin} is longer than {MOST_BYTES} bytes; give a configuration file")
}

/// Brackets open at once, at most; those in comments and quotes count too.
fn most_open(text: &str) -> usize {
    let (mut open, mut most) = (0usize, 0);
    for byte in text.bytes() {
        match byte {
            b'[' | b'{' => open += 1,
            b']' | b'}' => open = open.saturating_sub(1),
            _ => {}
        }
        most = most.max(open);
    }
    most
}

/// A name that is both anchored and used. A few aliases of aliases would fill the memory, and no field
/// needs one.
fn alias(text: &str) -> Option<&str> {
    let names = |mark: char| {
        text.split(mark).skip(1).map(|rest| {
            let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '-' || c == '_'));
            &rest[..end.unwrap_or(rest.len())]
        })
    };
    let anchors: HashSet<&str> = names('&').filter(|name| !name.is_empty()).collect();
    names('*').find(|name| anchors.contains(name))
}

fn tree_of(config: &Config) -> anyhow::Result<Value> {
    Ok(serde_yaml::to_value(config)?)
}

/// Lays `given` over `base`, the values at `path`; the error is a sentence.
fn merge(base: &mut Value, given: &Value, path: &str) -> Result<(), String> {
    match (base, given) {
        // A key without a value keeps its default.
        (_, Value::Null) => {}
        (Value::Mapping(base), Value::Mapping(given)) => {
            for (key, value) in given {
                let name = key.as_str().map_or_else(|| shown(key), |key| shortened(&escaped(key)));
                let inner = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                match base.get_mut(key) {
                    Some(slot) => merge(slot, value, &inner)?,
                    None => return Err(unknown(&inner, &name, path, base)),
                }
            }
        }
        (Value::Mapping(base), given) => {
            let (what, example) = match path {
                "" => ("the configuration".to_string(), "seed: 1".to_string()),
                _ => (path.to_string(), format!("{path}: {{{}: …}}", keys(base).next().unwrap_or(""))),
            };
            let keys = keys(base).collect::<Vec<_>>().join(", ");
            return Err(format!(
                "{what} is {}; it must be a mapping with the keys {keys}, as in `{example}`",
                shown(given)
            ));
        }
        (base, given) => *base = whole(base, given),
    }
    Ok(())
}

/// `given`, or, where a count like 2e5 was written and no fraction is wanted, that count.
fn whole(base: &Value, given: &Value) -> Value {
    match given.as_f64() {
        Some(x) if given.is_f64() && !base.is_f64() && x.fract() == 0.0 && (0.0..9e15).contains(&x) => {
            Value::from(x as u64)
        }
        _ => given.clone(),
    }
}

fn keys(mapping: &Mapping) -> impl Iterator<Item = &str> {
    mapping.keys().filter_map(Value::as_str)
}

fn unknown(path: &str, name: &str, parent: &str, siblings: &Mapping) -> String {
    let near = nearest(name, keys(siblings)).map(|near| match parent {
        "" => near.to_string(),
        _ => format!("{parent}.{near}"),
    });
    // The right key in the wrong place, or as it would be from the top.
    let elsewhere = || {
        let mut paths = Vec::new();
        list_paths(&tree_of(&Config::preset(TaskPreset::Task1ModelSize)).ok()?, "", &mut paths);
        paths.into_iter().find(|known| known.rsplit('.').next() == Some(name))
    };
    match elsewhere().or(near) {
        Some(near) => format!("unknown key `{path}`; did you mean `{near}`?"),
        None => {
            let place = if parent.is_empty() { "the configuration" } else { parent };
            let keys = keys(siblings).collect::<Vec<_>>().join(", ");
            format!("unknown key `{path}`; {place} has the keys {keys}")
        }
    }
}

/// Every key of a tree, from the top.
fn list_paths(tree: &Value, path: &str, out: &mut Vec<String>) {
    for (key, value) in tree.as_mapping().into_iter().flatten() {
        let key = key.as_str().unwrap_or_default();
        let inner = if path.is_empty() { key.to_string() } else { format!("{path}.{key}") };
        out.push(inner.clone());
        list_paths(value, &inner, out);
    }
}

/// The value at `path`.
fn at<'a>(tree: &'a Value, path: &[Segment]) -> Option<&'a Value> {
    path.iter().try_fold(tree, |tree, segment| match segment {
        Segment::Map { key } => tree.get(key.as_str()),
        Segment::Seq { index } => tree.get(*index),
        _ => Some(tree),
    })
}

/// What belongs at `path`, whose value is of a wrong type: found by offering a word that is never right.
fn expected(tree: &Value, path: &[Segment]) -> String {
    const NEVER: &str = "?";
    let mut offer = tree.clone();
    let mut slot = Some(&mut offer);
    for segment in path {
        slot = slot.and_then(|slot| match segment {
            Segment::Map { key } => slot.get_mut(key.as_str()),
            Segment::Seq { index } => slot.get_mut(*index),
            _ => Some(slot),
        });
    }
    if let Some(slot) = slot {
        *slot = NEVER.into();
    }
    let message = match serde_path_to_error::deserialize::<_, Config>(&offer) {
        Err(error) if error.path().iter().map(Segment::to_string).eq(path.iter().map(Segment::to_string)) => {
            error.into_inner().to_string()
        }
        // Any word will do.
        _ => return "a name".to_string(),
    };
    if message.contains("unknown variant") {
        let words: Vec<&str> = message.split('`').skip(3).step_by(2).collect();
        let given = at(tree, path).and_then(Value::as_str).unwrap_or("");
        let near = nearest(&given.to_lowercase(), words.iter().copied());
        let near = near.map_or(String::new(), |near| format!("; did you mean `{near}`?"));
        return match &words[..] {
            [only] => format!("{only}{near}"),
            _ => format!("one of {}{near}", words.join(", ")),
        };
    }
    let want = if message.contains("untagged enum") {
        "a whole number or `auto`"
    } else if message.contains("expected f64") {
        "a number"
    } else if message.contains("sequence") {
        "a list of numbers, such as [1, 2]"
    } else {
        match at(tree, path).and_then(Value::as_f64) {
            Some(x) if x < 0.0 => "a whole number that is not negative",
            Some(x) if x >= u64::MAX as f64 => "a whole number below 2^64",
            _ => "a whole number",
        }
    };
    want.to_string()
}

/// A value in a message.
pub(crate) fn shown(value: &Value) -> String {
    match value {
        Value::Null => "null".to_string(),
        Value::Bool(value) => value.to_string(),
        Value::Number(value) => value.to_string(),
        Value::String(value) => format!("`{}`", shortened(&escaped(value))),
        Value::Sequence(_) => "a list".to_string(),
        Value::Mapping(_) => "a mapping".to_string(),
        Value::Tagged(value) => format!("the tag {}", shortened(&escaped(&value.tag.to_string()))),
    }
}

/// Text on one line.
fn escaped(text: &str) -> String {
    let escape = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(escape).collect()
}

/// Text cut to a length that a message can hold.
fn shortened(text: &str) -> String {
    const MOST: usize = 60;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_string(),
    }
}
