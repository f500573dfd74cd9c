//! Sweep files of the released code, as they are: W&B grids over the options of its `train.py`.
//!
//! Each combination of the grid, with the options of `command` under it and the defaults of the program under
//! those, becomes the fields of a configuration. Options without a bearing on results are skipped; a value that
//! asks for something this program does not do is refused.

use anyhow::Result;
use serde_yaml::{Mapping, Value};

use super::file::{Expansion, Fields};
use crate::bail_input;
use crate::config::load::{Layer, shown};
use crate::error::nearest;

/// An option of the released program.
struct Flag {
    name: &'static str,
    /// Its values where the file has none; several are a grid of their own.
    default: &'static [Preset],
}

#[derive(Clone, Copy)]
enum Preset {
    Text(&'static str),
    Whole(u64),
    Number(f64),
    No,
    /// What the program works out from other options.
    Unset,
}
use Preset::{No, Number, Text, Unset, Whole};

const fn flag(name: &'static str, default: &'static [Preset]) -> Flag {
    Flag { name, default }
}

/// Options that bear on a run, with the defaults of the released program.
const FLAGS: &[Flag] = &[
    flag("model", &[Text("mamba")]),
    flag("layers", &[Whole(4)]),
    flag("feat_size", &[Whole(256)]),
    flag("d_state", &[Whole(64)]),
    flag("seed", &[Whole(42), Whole(123), Whole(456)]),
    flag("lr", &[Number(0.001)]),
    flag("wd", &[Number(0.0)]),
    flag("warmup_steps", &[Unset]),
    flag("batch_size", &[Whole(64)]),
    flag("optimizer", &[Text("adam")]),
    flag("scheduler", &[Text("cosine_schedule_with_warmup")]),
    flag("dropout", &[Number(0.2)]),
    flag("base_set", &[Text("gsc")]),
    flag("classify", &[No]),
    flag("dataset_size", &[Whole(200_000)]),
    flag("test_size", &[Whole(1000)]),
    flag("test_bs", &[Whole(50)]),
    flag("train_seqlen_min", &[Whole(1)]),
    flag("train_seqlen_max", &[Whole(30)]),
    flag("test_seqlen_max", &[Unset]),
    flag("train_gap_min", &[Number(20.0)]),
    flag("train_gap_max", &[Number(300.0)]),
    flag("dist_dur", &[Text("uniform")]),
    flag("train_noise", &[Number(0.0)]),
    flag("test_dur", &[Unset]),
    flag("test_pretrained", &[No]),
    flag("amb", &[Whole(7)]),
    flag("amb_depth", &[Whole(16)]),
    flag("vocab", &[Whole(16)]),
    flag("grammar_scale", &[No]),
    flag("grammar_gap", &[No]),
    flag("gap_start", &[Whole(0)]),
    flag("gap_prob", &[Number(1.0)]),
    flag("rope_base", &[Whole(1000)]),
    flag("slide_window", &[Whole(0)]),
    flag("act_function", &[Text("none")]),
    flag("same_seed", &[Text("True")]),
];

/// Options that change nothing here: where things are kept, what is shown, and what the released program reads
/// and ignores or overwrites.
const WITHOUT_BEARING: &[&str] = &[
    "att_dropout",
    "debug",
    "dt_rank",
    "dt_relu",
    "early_stop",
    "gap_kldiv",
    "gpu_device",
    "grad_acc",
    "hash_save",
    "n_head",
    "only_createset",
    "only_createsweep",
    "patience",
    "pos_encoding",
    "pt_epochs",
    "read_from_file",
    "run_main",
    "save_model",
    "save_plots",
    "sweep_id",
    "sweep_name",
    "task_seed",
    "taylor_order",
    "test_noise",
    "test_seqlen_min",
    "visualize_layers",
];

/// One combination.
struct Options<'a> {
    origin: &'a str,
    values: Vec<(&'static str, Value)>,
}

/// Spreads out a W&B sweep file.
pub fn expand(file: &Mapping, origin: &str, name: String) -> Result<Expansion> {
    let method = file.get("method").and_then(Value::as_str).unwrap_or("");
    if method != "grid" {
        bail_input!("{origin}: method is `{method}`; only W&B sweeps with `method: grid` can be run")
    }
    let mut axes: Vec<(&'static str, Vec<Value>)> =
        FLAGS.iter().map(|flag| (flag.name, flag.default.iter().map(Preset::value).collect())).collect();
    let mut skipped = Vec::new();
    for (option, value) in command(file.get("command"), origin)? {
        set(&mut axes, &mut skipped, origin, &option, vec![value])?;
    }
    let parameters = file.get("parameters").and_then(Value::as_mapping);
    let Some(parameters) = parameters else {
        bail_input!("{origin}: parameters must be a mapping, as in `parameters: {{lr: {{values: [0.001]}}}}`")
    };
    for (option, spec) in parameters {
        let option = option.as_str().unwrap_or_default();
        let values = match (spec.get("values").and_then(Value::as_sequence), spec.get("value")) {
            (Some(values), None) if !values.is_empty() => values.clone(),
            (None, Some(value)) => vec![value.clone()],
            _ => bail_input!(
                "{origin}: parameters.{option} needs `values: […]` or `value: …`, as every grid has"
            ),
        };
        set(&mut axes, &mut skipped, origin, option, values)?;
    }
    // The released program tests a trained model at one duration; here one run is tested at all of them.
    let durations = axes.iter_mut().find(|(name, _)| *name == "test_dur").map(|(_, values)| {
        let all = Value::Sequence(values.iter().filter(|value| !value.is_null()).cloned().collect());
        std::mem::replace(values, vec![all]).len()
    });

    let mut notes = Vec::new();
    if !skipped.is_empty() {
        notes.push(format!("options without a bearing on results: {}", skipped.join(", ")));
    }
    if let Some(n @ 2..) = durations {
        notes.push(format!("every run is trained once and tested at all {n} values of test_dur"));
    }
    notes.push(
        "tested on held-out samples; for those of the released code add --set task.split=as-released, for what it \
         does beside its recipe also --set train.emulate=authors"
            .into(),
    );
    let base = vec![Layer::tree(Value::Null, origin)];
    let (points, left_out) = (Vec::new(), Vec::new());
    let mut expansion = Expansion { name, base, points, left_out, slurm: Mapping::new(), notes };
    let total: usize = axes.iter().map(|(_, values)| values.len()).product();
    for mut index in 0..total {
        let mut values = Vec::with_capacity(axes.len());
        for (name, choices) in axes.iter().rev() {
            values.push((*name, choices[index % choices.len()].clone()));
            index /= choices.len();
        }
        match (Options { origin, values }).fields()? {
            Ok(fields) => expansion.points.push(fields),
            Err(reason) => expansion.leave_out(reason),
        }
    }
    Ok(expansion)
}

/// The options of a command line: `--name`, and what follows it up to the next.
fn command(command: Option<&Value>, origin: &str) -> Result<Vec<(String, Value)>> {
    let words = match command {
        None => return Ok(Vec::new()),
        Some(Value::Sequence(words)) => words,
        Some(other) => bail_input!("{origin}: command is {}; it must be a list of words", shown(other)),
    };
    let option = |word: &Value| word.as_str().and_then(|word| word.strip_prefix("--")).map(str::to_string);
    let mut options: Vec<(String, Value)> = Vec::new();
    for (i, word) in words.iter().enumerate() {
        if let Some(name) = option(word) {
            let value = words.get(i + 1).filter(|next| {
                option(next).is_none() && !next.as_str().is_some_and(|next| next.starts_with("${"))
            });
            options.push((name, value.cloned().unwrap_or(Value::Bool(true))));
        }
    }
    Ok(options)
}

/// Gives an option its values.
fn set(
    axes: &mut [(&'static str, Vec<Value>)],
    skipped: &mut Vec<String>,
    origin: &str,
    option: &str,
    values: Vec<Value>,
) -> Result<()> {
    if let Some((_, slot)) = axes.iter_mut().find(|(name, _)| *name == option) {
        *slot = values;
    } else if WITHOUT_BEARING.contains(&option) {
        if !skipped.iter().any(|known| known == option) {
            skipped.push(option.to_string());
        }
    } else {
        let known = FLAGS.iter().map(|flag| flag.name).chain(WITHOUT_BEARING.iter().copied());
        let near = nearest(option, known).map_or(String::new(), |near| format!("; did you mean `{near}`?"));
        bail_input!("{origin}: `{option}` is no option of the released train.py{near}")
    }
    Ok(())
}

impl Preset {
    fn value(&self) -> Value {
        match *self {
            Text(text) => text.into(),
            Whole(number) => number.into(),
            Number(number) => number.into(),
            No => false.into(),
            Unset => Value::Null,
        }
    }
}

impl Options<'_> {
    fn get(&self, name: &str) -> &Value {
        let found = self.values.iter().find(|(known, _)| *known == name);
        found.map_or(&Value::Null, |(_, value)| value)
    }

    fn number(&self, name: &str) -> Result<f64> {
        match self.get(name).as_f64() {
            Some(number) => Ok(number),
            None => self.refuse(name, "a number"),
        }
    }

    fn text(&self, name: &str) -> Result<&str> {
        match self.get(name).as_str() {
            Some(text) => Ok(text),
            None => self.refuse(name, "a name"),
        }
    }

    /// As the released program reads switches.
    fn switch(&self, name: &str) -> Result<bool> {
        match self.get(name) {
            Value::Bool(on) => Ok(*on),
            Value::String(text) if ["true", "yes", "1"].contains(&&*text.to_lowercase()) => Ok(true),
            Value::String(text) if ["false", "no", "0"].contains(&&*text.to_lowercase()) => Ok(false),
            Value::Number(number) if number.as_u64() == Some(1) => Ok(true),
            Value::Number(number) if number.as_u64() == Some(0) => Ok(false),
            _ => self.refuse(name, "True or False"),
        }
    }

    fn refuse<T>(&self, name: &str, right: &str) -> Result<T> {
        bail_input!("{}: {name} is {}; it must be {right}", self.origin, shown(self.get(name)))
    }

    /// The fields of a configuration, or why the released program does not run this combination.
    fn fields(&self) -> Result<std::result::Result<Fields, &'static str>> {
        if self.text("base_set")? != "one_hot" {
            return self.refuse("base_set", "one_hot: symbols, not recordings");
        }
        if !self.switch("classify")? {
            return self.refuse("classify", "given: the task is to name the state");
        }
        if self.text("act_function")? != "none" {
            return self.refuse("act_function", "none");
        }
        if self.number("slide_window")? != 0.0 {
            return self.refuse("slide_window", "0: the released code ignores it");
        }
        if !self.switch("same_seed")? {
            return self.refuse("same_seed", "True: one seed draws grammar, data and weights");
        }
        if self.text("dist_dur")? != "uniform" {
            return self.refuse("dist_dur", "uniform");
        }
        let (model, mut width) = (self.text("model")?, self.get("feat_size").clone());
        if model == "transformer" {
            match width.as_u64() {
                Some(648) => width = 768.into(),
                Some(1296) => width = 1280.into(),
                Some(960) => return Ok(Err("the released code skips a transformer of width 960")),
                _ => {}
            }
        }
        let (low, high) = (self.number("train_gap_min")?, self.number("train_gap_max")?);
        let (noise, distractors) = (self.number("train_noise")?, self.switch("grammar_gap")?);
        let (scaled, pretrained) = (self.switch("grammar_scale")?, self.switch("test_pretrained")?);
        let durations = match self.get("test_dur") {
            Value::Sequence(durations) => durations.clone(),
            _ => Vec::new(),
        };
        let preset = match () {
            () if distractors => "task3",
            () if pretrained => "task4",
            () if noise > 0.0 || high > low => "task2",
            () if scaled => "task1_complexity",
            () => "task1_model_size",
        };
        let amb = self.number("amb")?;
        let (depth, vocab) = match scaled {
            true => (self.get("amb").clone(), Value::from(amb as u64 + 1)),
            false => (self.get("amb_depth").clone(), self.get("vocab").clone()),
        };
        let length = self.get("train_seqlen_max").clone();
        let tested = self.get("test_seqlen_max");
        if !tested.is_null() && *tested != length {
            return self.refuse("test_seqlen_max", "train_seqlen_max: samples have one length");
        }
        let (samples, batch) = (self.number("dataset_size")?, self.number("batch_size")?);
        let warmup = match self.get("warmup_steps") {
            Value::Null => (0.05 * (samples / batch).ceil()).into(),
            warmup => warmup.clone(),
        };
        let lr_min = match self.text("scheduler")? {
            "cosine_schedule_with_warmup" => 0.0,
            "cosine_schedule_with_warmup_lr_min" => 0.1,
            _ => return self.refuse("scheduler", "cosine_schedule_with_warmup, with or without _lr_min"),
        };
        let optimizer = self.text("optimizer")?;
        let kind = if distractors { "distractor" } else { "blank" };
        let mut fields: Vec<(&str, Value)> = vec![
            ("seed", self.get("seed").clone()),
            ("task.preset", preset.into()),
            ("task.vocab", vocab),
            ("task.ambiguities", self.get("amb").clone()),
            ("task.depth", depth),
            ("task.length", length.clone()),
            ("task.string.min", self.get("train_seqlen_min").clone()),
            ("task.string.max", length),
            ("task.gap.kind", kind.into()),
            ("task.gap.law", "uniform".into()),
            ("task.gap.low", low.into()),
            ("task.gap.high", high.into()),
            ("task.gap.start", self.get("gap_start").clone()),
            ("task.gap.probability", self.get("gap_prob").clone()),
            ("task.test_gap", high.into()),
            ("task.eval_gaps", Value::Sequence(durations)),
            ("task.noise", noise.into()),
            ("task.samples.train", self.get("dataset_size").clone()),
            ("task.samples.test", self.get("test_size").clone()),
            ("model.name", model.into()),
            ("model.layers", self.get("layers").clone()),
            ("model.width", width),
            ("model.state", self.get("d_state").clone()),
            ("model.dropout", self.get("dropout").clone()),
            ("model.rope_base", self.get("rope_base").clone()),
            ("train.batch", self.get("batch_size").clone()),
            ("train.optimizer", optimizer.into()),
            ("train.lr", self.get("lr").clone()),
            ("train.weight_decay", self.get("wd").clone()),
            ("train.warmup", warmup),
            ("train.lr_min", lr_min.into()),
            ("train.eval_batch", self.get("test_bs").clone()),
        ];
        if optimizer == "adamw" {
            fields.push(("train.eps", 1e-15.into()));
        }
        Ok(Ok(fields.into_iter().map(|(path, value)| (path.to_string(), value)).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sweep::Plan;

    /// A sweep of the released repository's kind.
    fn grid(parameters: &str, command: &str) -> String {
        format!(
            "method: grid
metric: {{name: test_acc, goal: maximize}}
parameters:
  amb: {{values: [40]}}
  train_seqlen_max: {{values: [200]}}
  layers: {{values: [8]}}
  seed: {{values: [1, 2, 3, 4]}}
{parameters}
command: [\"${{env}}\", python, \"${{program}}\", --batch_size, 64, --train_gap_min, 0.1, --classify, --base_set,
  one_hot, --save_model, True, --run_main, --test_seqlen_max, 200, --grad_acc, -1, {command} \"${{args}}\"]
"
        )
    }

    fn plan(text: &str) -> Result<Plan> {
        let file = tempfile::Builder::new().suffix(".yaml").tempfile().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Plan::open(file.path(), &[], None, |_| Ok(false))
    }

    const TASK1: &str = "  train_gap_max: {values: [0.1]}
  train_noise: {values: [0.]}
  feat_size: {values: [256, 648, 768, 960]}
  d_state: {values: [128]}
  model: {values: [mamba2, transformer]}
  lr: {values: [0.0005, 0.002]}
  warmup_steps: {values: [476, 1000]}";

    #[test]
    fn the_grammar_scales_and_transformers_change_their_width() {
        let plan = plan(&grid(TASK1, "--grammar_scale, True,")).unwrap();
        // 128 combinations; a transformer of 648 is one of 768, and one of 960 is not run.
        assert_eq!(plan.runs.len(), 128 - 16 - 16);
        let left_out: Vec<usize> = plan.left_out.iter().map(|(_, count)| *count).collect();
        assert_eq!(left_out, [16, 16]);
        let config = &plan.runs.iter().find(|run| run.config.model.name == "transformer").unwrap().config;
        let paper = crate::config::load::parse(
            "task: {preset: task1_complexity}
model: {name: transformer}
train: {lr: 0.0005, warmup: 476}",
            "test",
            &[],
        )
        .unwrap();
        assert_eq!(config.task, paper.task);
        assert_eq!((&config.model, config.train.lr), (&paper.model, 0.0005));
        assert_eq!(
            config.train,
            crate::config::TrainConfig { precision: config.train.precision, ..paper.train }
        );
    }

    #[test]
    fn the_other_tasks_are_those_of_the_presets() {
        let common = "  feat_size: {values: [256]}
  amb_depth: {values: [40]}
  model: {values: [mamba2]}
  warmup_steps: {values: [1000]}
";
        let cases = [
            (
                "task2",
                "train_gap_max: {values: [1.]}\n  train_noise: {values: [0.2]}\n  d_state: {values: [128]}",
                "",
            ),
            (
                "task3",
                "train_gap_max: {values: [0.1]}\n  d_state: {values: [64]}\n  gap_prob: {values: [0.1]}\n  gap_start: \
                 {values: [50]}\n  grammar_gap: {values: [True]}",
                "--warmup_steps, 476,",
            ),
            (
                "task4",
                "train_gap_max: {values: [1.]}\n  train_noise: {values: [0.2]}\n  d_state: {values: [128]}\n  test_dur: \
                 {values: [1, 2, 5, 10]}",
                "--test_pretrained,",
            ),
        ];
        for (preset, parameters, command) in cases {
            let plan =
                plan(&grid(&format!("{common}  {parameters}"), &format!("--vocab, 41, {command}"))).unwrap();
            assert_eq!(plan.runs.len(), 4, "{preset}");
            let config = &plan.runs[0].config;
            let text = format!("task: {{preset: {preset}}}");
            let paper = crate::config::load::parse(&text, "test", &[]).unwrap();
            assert_eq!((&config.task, &config.model), (&paper.task, &paper.model), "{preset}");
            assert_eq!(config.train.warmup, 1000.0, "{preset}: parameters come after the command");
        }
    }

    #[test]
    fn what_cannot_be_run_is_named() {
        let wrong = |parameters: &str, command: &str| {
            format!("{:#}", plan(&grid(parameters, command)).err().unwrap())
        };
        assert!(
            wrong("  lrr: {values: [1]}", "")
                .contains("`lrr` is no option of the released train.py; did you mean `lr`")
        );
        assert!(wrong("  lr: {min: 0, max: 1}", "").contains("parameters.lr needs `values: […]`"));
        assert!(wrong("  base_set: {value: gsc}", "").contains("base_set is `gsc`; it must be one_hot"));
        assert!(
            wrong("  train_gap_max: {value: 0.1}\n  slide_window: {value: 64}", "")
                .contains("slide_window is 64")
        );
        let random = grid(TASK1, "").replace("method: grid", "method: random");
        assert!(format!("{:#}", plan(&random).err().unwrap()).contains("method is `random`"));
    }
}
