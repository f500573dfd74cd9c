//! Configurations: presets, what is accepted, what is refused with which sentence, and that no input
//! makes the reader panic or dawdle.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use selectivbench::config::load::{defaults, load, parse};
use selectivbench::config::*;
use selectivbench::device::parse_device;
use selectivbench::error::exit_code;
use selectivbench::sweep::plan::Plan;

fn read(text: &str, sets: &[&str]) -> anyhow::Result<Config> {
    let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
    parse(text, "c.yaml", &sets)
}

/// The sentence that an input is refused with.
fn refusal<T: std::fmt::Debug>(result: anyhow::Result<T>) -> String {
    let error = result.expect_err("should be refused");
    assert_eq!(exit_code(&error), 2, "{error:#}");
    let sentence = format!("{error:#}");
    assert!(!sentence.contains('\n') && !sentence.is_empty(), "{sentence:?} is not one line");
    assert!(sentence.chars().count() < 600, "{sentence:?} is too long");
    sentence
}

/// `input` is refused with a sentence that holds `want`.
#[track_caller]
fn expect<T: std::fmt::Debug>(input: impl std::fmt::Debug, result: anyhow::Result<T>, want: &str) {
    let sentence = refusal(result);
    assert!(sentence.contains(want), "{input:?}\n got {sentence}\nwant {want}");
}

fn configs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("configs")
}

#[test]
fn presets_are_the_authors_tasks() {
    struct Row {
        name: &'static str,
        gap: (GapKind, f64, f64, usize, f64),
        test_gap: f64,
        noise: f64,
        state: usize,
        eval_gaps: &'static [f64],
    }
    use GapKind::{Blank, Distractor};
    let rows = [
        ("task1_complexity", (Blank, 0.1, 0.1, 0, 1.0), 0.1, 0.0, 128, &[][..]),
        ("task1_model_size", (Blank, 0.1, 0.1, 0, 1.0), 0.1, 0.0, 128, &[]),
        ("task2", (Blank, 0.1, 1.0, 0, 1.0), 1.0, 0.2, 128, &[]),
        ("task3", (Distractor, 0.1, 0.1, 50, 0.1), 0.1, 0.0, 64, &[]),
        ("task4", (Blank, 0.1, 1.0, 0, 1.0), 1.0, 0.2, 128, &[1.0, 2.0, 5.0, 10.0]),
    ];
    for (name, gap, test_gap, noise, state, eval_gaps) in rows {
        let row = Row { name, gap, test_gap, noise, state, eval_gaps };
        let config = read(&format!("task: {{preset: {}}}", row.name), &[]).unwrap();
        let task = &config.task;
        assert_eq!((task.vocab, task.ambiguities, task.depth), (Auto::Value(41), 40, Auto::Value(40)));
        assert_eq!((task.density, task.start_states, task.length, task.states()), (0.4, 4, 200, 1601));
        assert_eq!(task.string, StringConfig { min: 1, max: Auto::Value(200) });
        let gap = &task.gap;
        assert_eq!((gap.kind, gap.low, gap.high, gap.start, gap.probability), row.gap, "{name}");
        assert_eq!(gap.law, GapLaw::Uniform);
        assert_eq!((task.test_gap, task.noise), (row.test_gap, row.noise), "{name}");
        assert_eq!(task.eval_gaps, row.eval_gaps, "{name}");
        assert_eq!(task.samples, SampleCounts { train: 200_000, validation: 1000, test: 1000 });
        assert_eq!(task.split, Split::HeldOut);

        let model = &config.model;
        assert_eq!((model.name.as_str(), model.layers, model.width), ("mamba2", 8, 256));
        assert_eq!((model.state, model.heads, model.dropout), (row.state, Auto::Value(4), 0.2));
        assert_eq!((model.conv, model.householders, model.rope_base), (4, 4, 1000.0));

        let train = &config.train;
        assert_eq!((train.batch, train.optimizer, train.micro_batch), (64, OptimizerKind::Adam, Auto::AUTO));
        assert_eq!((train.lr, train.beta1, train.beta2, train.eps), (1e-3, 0.9, 0.999, 1e-8));
        assert_eq!((train.weight_decay, train.clip), (0.0, 1.0));
        assert_eq!((train.warmup, train.schedule, train.lr_min), (1000.0, Schedule::Cosine, 0.0));
        assert_eq!((train.eval_every, train.eval_batch), (5000, 50));
        assert_eq!((train.precision, train.emulate), (Precision::Auto, Emulate::None));
        assert_eq!(config.updates(), 3125);
        assert_eq!(config, Config::of(task.preset));
    }
    assert_eq!(read("", &[]).unwrap(), defaults());
    assert_eq!(defaults(), Config::of(TaskPreset::Task1ModelSize));
}

#[test]
fn what_is_left_out_follows_from_the_rest() {
    for ambiguities in [20, 24, 26, 30, 34, 38, 40] {
        let config = read(&format!("task: {{ambiguities: {ambiguities}}}"), &[]).unwrap();
        assert_eq!(config.task.states(), ambiguities * ambiguities + 1);
        assert_eq!(config.task.vocab(), ambiguities + 1);
    }
    for (width, heads) in
        [(256, 4), (384, 4), (512, 4), (648, 8), (768, 8), (1024, 8), (1152, 16), (1296, 16)]
    {
        let config = read("", &[&format!("model.width={width}")]).unwrap();
        assert_eq!(config.model.heads, Auto::Value(heads), "width {width}");
    }
    assert_eq!(read("task: {length: 50}", &[]).unwrap().task.string.max, Auto::Value(50));
    // There are 52 letters; the input may be wider.
    let config = read("task: {vocab: 60, ambiguities: 2, depth: 3}", &[]).unwrap();
    assert_eq!((config.task.letters(), config.task.states()), (52, 50 + 6 + 1));
}

/// What is accepted, and a path with the value that it gives.
#[test]
fn accepts() {
    let rows: &[(&str, &[&str], &str, &str)] = &[
        ("", &[], "seed", "1"),
        ("# nothing but a comment\n", &[], "seed", "1"),
        ("---\nseed: 7\n", &[], "seed", "7"),
        ("\u{feff}seed: 7", &[], "seed", "7"),
        ("seed: 7\r\ntask:\r\n  length: 50\r\n", &[], "task.length", "50"),
        ("{\"seed\": 7, \"task\": {\"length\": 50}}", &[], "task.length", "50"),
        ("seed: 18446744073709551615", &[], "seed", "18446744073709551615"),
        // A key without a value keeps its default.
        ("task:\nmodel:\n  width:\n", &[], "model.width", "256"),
        ("task: {vocab: ~}", &[], "task.vocab", "41"),
        // Later `--set` wins over earlier, any over the file, and a preset fills only what is left out.
        ("train: {lr: 0.5}", &["train.lr=0.1", "train.lr=2e-3"], "train.lr", "0.002"),
        ("task: {preset: task2}", &["task.preset=task3"], "task.gap.kind", "distractor"),
        ("task: {preset: task3}", &[], "model.state", "64"),
        ("task: {preset: task3}\nmodel: {state: 16}", &[], "model.state", "16"),
        ("task: {preset: task2, noise: 0}", &[], "task.noise", "0.0"),
        ("task: {gap: {high: 0.5}}", &["task.gap={low: 0.2, probability: 0.5}"], "task.gap.high", "0.5"),
        ("", &["task.eval_gaps=[0, 1, 2.5]"], "task.eval_gaps", "- 0.0\n- 1.0\n- 2.5"),
        ("", &["train.micro_batch=16"], "train.micro_batch", "16"),
        ("", &["model.heads = 8"], "model.heads", "8"),
        ("", &["model.heads=auto"], "model.heads", "4"),
        // Counts may be written with an exponent, numbers without a point.
        ("task: {samples: {train: 3e5}}", &[], "task.samples.train", "300000"),
        ("train: {lr: 1}", &[], "train.lr", "1.0"),
        ("train: {warmup: 156.25}", &[], "train.warmup", "156.25"),
        ("train: {warmup: 3125}", &[], "train.warmup", "3125.0"),
        ("task: {samples: {train: 1}}\ntrain: {warmup: 0}", &[], "task.samples.train", "1"),
        ("train: {emulate: authors}", &["task.split=as-released"], "train.emulate", "authors"),
        ("", &["task.split=as-released"], "train.emulate", "none"),
        ("task: {gap: {law: fixed, high: 0}}", &[], "task.gap.high", "0.0"),
        ("task: {gap: {law: lognormal, low: 0, high: 2, mu: -1, sigma: 0}}", &[], "task.gap.mu", "-1.0"),
        ("task: {vocab: 6, ambiguities: 0, depth: 0}", &[], "task.depth", "0"),
        ("task: {length: 10, string: {max: 500}}", &[], "task.string.max", "500"),
        ("task: {gap: {start: 1000}}", &[], "task.gap.start", "1000"),
        ("model: {name: transformer, dropout: 0, width: 8, layers: 1}", &[], "model.width", "8"),
        ("seed: 4000000000\ntask: {split: as-released}", &[], "seed", "4000000000"),
    ];
    for (text, sets, path, want) in rows {
        let config = read(text, sets).unwrap_or_else(|error| panic!("{text:?} {sets:?}: {error:#}"));
        let tree = serde_yaml::to_value(&config).unwrap();
        let value = path.split('.').fold(&tree, |tree, key| &tree[key]);
        assert_eq!(serde_yaml::to_string(value).unwrap().trim_end(), *want, "{text:?} {sets:?}: {path}");
    }
}

#[test]
fn refuses_texts() {
    let rows: &[(&str, &str)] = &[
        // Keys.
        ("sede: 1", "c.yaml: unknown key `sede`; did you mean `seed`?"),
        ("task: {ambiguties: 3}", "c.yaml: unknown key `task.ambiguties`; did you mean `task.ambiguities`?"),
        ("task: {gap: {hihg: 1}}", "c.yaml: unknown key `task.gap.hihg`; did you mean `task.gap.high`?"),
        ("lr: 0.1", "c.yaml: unknown key `lr`; did you mean `train.lr`?"),
        ("task: {low: 0.1}", "c.yaml: unknown key `task.low`; did you mean `task.gap.low`?"),
        (
            "task: {string: {quux: 1}}",
            "c.yaml: unknown key `task.string.quux`; task.string has the keys min, max",
        ),
        ("quux: 1", "c.yaml: unknown key `quux`; the configuration has the keys seed, task, model, train"),
        ("quux:", "c.yaml: unknown key `quux`; the configuration has the keys seed, task, model, train"),
        ("3: 1", "c.yaml: unknown key `3`; the configuration has the keys seed, task, model, train"),
        ("[1]: 1", "c.yaml: unknown key `a list`; the configuration has the keys seed, task, model, train"),
        ("seed: 1\nseed: 2", "c.yaml: the key `seed` is given twice"),
        ("task:\n  noise: 0\n  noise: 0.2", "c.yaml: the key `noise` of `task` is given twice"),
        // Shapes.
        (
            "seed",
            "c.yaml: the configuration is `seed`; it must be a mapping with the keys seed, task, model, train, as in `seed: 1`",
        ),
        ("- seed: 1", "c.yaml: the configuration is a list; it must be a mapping"),
        ("3", "c.yaml: the configuration is 3; it must be a mapping"),
        (
            "model: mamba2",
            "c.yaml: model is `mamba2`; it must be a mapping with the keys name, block, layers, width, state, heads, \
             dropout, conv, householders, rope_base, window, decay, output_gate, short_conv, negative_eigenvalues, \
             delta_rule, qk_norm, as in `model: {name: …}`",
        ),
        (
            "task:\n  gap: 0.1",
            "c.yaml: task.gap is 0.1; it must be a mapping with the keys kind, law, low, high",
        ),
        ("task: [1]", "c.yaml: task is a list; it must be a mapping"),
        ("task: !tag {noise: 1}", "c.yaml: task is the tag !tag; it must be a mapping"),
        ("seed: {a: 1}", "c.yaml: seed is a mapping; it must be a whole number"),
        ("seed: [1]", "c.yaml: seed is a list; it must be a whole number"),
        ("task: {eval_gaps: 3}", "c.yaml: task.eval_gaps is 3; it must be a list of numbers, such as [1, 2]"),
        ("task: {eval_gaps: [1, x]}", "c.yaml: task.eval_gaps[1] is `x`; it must be a number"),
        ("task: {eval_gaps: [1, ~]}", "c.yaml: task.eval_gaps[1] is null; it must be a number"),
        // Types.
        ("seed: abc", "c.yaml: seed is `abc`; it must be a whole number"),
        ("seed: -1", "c.yaml: seed is -1; it must be a whole number that is not negative"),
        ("seed: 1.5", "c.yaml: seed is 1.5; it must be a whole number"),
        (
            "seed: 18446744073709551616",
            "c.yaml: seed is 18446744073709551616; whole numbers must lie between -2^63 and 2^64",
        ),
        ("seed: 1e300", "c.yaml: seed is 1e300; it must be a whole number below 2^64"),
        ("seed: '1'", "c.yaml: seed is `1`; it must be a whole number"),
        ("seed: true", "c.yaml: seed is true; it must be a whole number"),
        ("train: {lr: high}", "c.yaml: train.lr is `high`; it must be a number"),
        ("train: {lr: 1_000}", "c.yaml: train.lr is `1_000`; it must be a number"),
        ("train: {lr: yes}", "c.yaml: train.lr is `yes`; it must be a number"),
        ("train: {batch: 6.5}", "c.yaml: train.batch is 6.5; it must be a whole number"),
        ("model: {heads: four}", "c.yaml: model.heads is `four`; it must be a whole number or `auto`"),
        ("model: {heads: -4}", "c.yaml: model.heads is -4; it must be a whole number or `auto`"),
        ("task: {string: {max: 1.5}}", "c.yaml: task.string.max is 1.5; it must be a whole number or `auto`"),
        ("model: {name: 3}", "c.yaml: model.name is 3; it must be a name"),
        (
            "train: {optimizer: adan}",
            "c.yaml: train.optimizer is `adan`; it must be one of adam, adamw; did you mean `adam`?",
        ),
        ("train: {optimizer: ADAMW}", "it must be one of adam, adamw; did you mean `adamw`?"),
        ("train: {optimizer: sgd}", "c.yaml: train.optimizer is `sgd`; it must be one of adam, adamw"),
        ("train: {optimizer: 3}", "c.yaml: train.optimizer is 3; it must be one of adam, adamw"),
        ("train: {preset: mine}", "c.yaml: train.preset is `mine`; it must be paper"),
        ("train: {precision: fp32}", "it must be one of auto, f32, tf32, bf16; did you mean `f32`?"),
        ("train: {schedule: cos}", "it must be one of cosine, constant; did you mean `cosine`?"),
        ("train: {emulate: author}", "it must be one of none, authors; did you mean `authors`?"),
        ("task: {split: heldout}", "it must be one of held-out, as-released; did you mean `held-out`?"),
        (
            "task: {gap: {law: normal}}",
            "it must be one of uniform, lognormal, fixed; did you mean `lognormal`?",
        ),
        ("task: {gap: {kind: none}}", "it must be one of blank, distractor"),
        ("task: {encoding: mfcc}", "it must be one of one_hot, gsc, shd, ssc, vectors"),
        (
            "task: {preset: task5}",
            "c.yaml: task.preset is `task5`; it must be one of task1_complexity, task1_model_size, task2, task3, task4",
        ),
        ("model: {name: mamba3}", "unknown model `mamba3`; did you mean `mamba2`?"),
        ("model: {name: perceptron}", "unknown model `perceptron`; there are transformer, mamba, mamba2"),
        ("model: {name: ''}", "unknown model ``; there are"),
        // YAML.
        ("task:\n\tnoise: 1", "c.yaml: line 2 is indented with a tab; YAML indents with spaces"),
        ("task:\n  noise: 1\n seed: 2", "c.yaml is not valid YAML: "),
        ("task: {noise: 1", "line 2 column 1"),
        ("seed: 1\ntask: noise: 2\n", "at line 2 column 12"),
        ("seed: *nothing", "c.yaml is not valid YAML: unknown anchor at line 1 column 7"),
        (
            "seed: &a 1\nmodel: {width: *a}",
            "c.yaml repeats a part of itself with the alias *a; write its values out",
        ),
        ("seed: 1\n---\nseed: 2", "c.yaml holds several YAML documents; give one configuration"),
        ("seed: 1\n# \u{1}", "c.yaml: line 2 holds the control character \\u{1}; remove it"),
        ("%YAML 3.0\n---\nseed: 1", "c.yaml is not valid YAML: "),
    ];
    for (text, want) in rows {
        expect(text, read(text, &[]), want);
    }
}

#[test]
fn refuses_flags() {
    let rows: &[(&str, &str)] = &[
        ("train.lr", "--set train.lr: write key.path=value, for example --set train.lr=0.002"),
        ("", "--set : write key.path=value"),
        ("train.lr=", "--set train.lr=: there is no value after `=`"),
        ("train.lr=null", "--set train.lr=null: there is no value after `=`"),
        ("train.lr=abc", "--set train.lr=abc: train.lr is `abc`; it must be a number"),
        ("train.lrr=1", "--set train.lrr=1: unknown key `train.lrr`; did you mean `train.lr`?"),
        ("=1", "--set =1: unknown key ``; the configuration has the keys seed, task, model, train"),
        ("train.=1", "--set train.=1: unknown key `train.`; train has the keys preset, batch"),
        ("train.lr.x=1", "--set train.lr.x=1: train.lr is a mapping; it must be a number"),
        ("a.b.c.d.e.f.g.h.i.j=1", "unknown key `a`"),
        ("model=mamba", "--set model=mamba: model is `mamba`; it must be a mapping with the keys name"),
        ("model.name=mamba=2", "unknown model `mamba=2`; did you mean `mamba2`?"),
        (
            "train.optimizer=[adam]",
            "--set train.optimizer=[adam]: train.optimizer is a list; it must be one of adam",
        ),
        ("task.gap={low: }}", "--set task.gap={low: }} is not valid YAML"),
        (
            "task.eval_gaps=1,2",
            "--set task.eval_gaps=1,2: task.eval_gaps is `1,2`; it must be a list of numbers",
        ),
        ("seed=1\nseed: 2", "--set seed=1\\nseed: 2 is not valid YAML"),
        ("train.lr=-1", "train.lr is -1; it must be greater than 0 and at most 100"),
    ];
    for (set, want) in rows {
        expect(set, read("seed: 3", &[set]), want);
    }
    // The message names where the value came from, not what was overridden.
    let sentence = refusal(read("train: {lr: x}", &["train.batch=y", "seed=2"]));
    assert_eq!(sentence, "--set train.batch=y: train.batch is `y`; it must be a whole number");
    assert!(read("train: {lr: x}", &["train.lr=1"]).is_ok());
}

#[test]
fn refuses_values() {
    let rows: &[(&str, &str)] = &[
        ("task.ambiguities=53", "task.ambiguities is 53; it must be between 0 and 52"),
        ("task.ambiguities=18446744073709551615", "it must be between 0 and 52"),
        (
            "task={vocab: 10, ambiguities: 20}",
            "task.ambiguities is 20, but task.vocab 10 has only 9 letters; set task.vocab to 21 or more, or to auto",
        ),
        ("task={vocab: 1, ambiguities: 0}", "task.vocab is 1; it must be between 2 and 65536"),
        (
            "task.ambiguities=0",
            "task.ambiguities is 0 and task.vocab is auto, which leaves no letter; set task.vocab",
        ),
        ("task.vocab=0", "task.vocab is 0; it must be between 2 and 65536"),
        ("task.vocab=100000", "task.vocab is 100000; it must be between 2 and 65536"),
        ("task.depth=0", "task.depth is 0; it must be between 1 and 100"),
        ("task.depth=101", "task.depth is 101; it must be between 1 and 100"),
        ("task.depth=18446744073709551615", "it must be between 1 and 100"),
        ("task.density=0", "task.density is 0; it must be greater than 0"),
        ("task.density=-0.4", "task.density is -0.4; it must be greater than 0"),
        ("task.density=.nan", "task.density is NaN; it must be greater than 0"),
        ("task.density=.inf", "task.density is inf; it must be greater than 0"),
        ("task.start_states=0", "task.start_states is 0; it must be between 1 and 1600"),
        ("task.start_states=1601", "task.start_states is 1601; it must be between 1 and 1600"),
        ("task.length=0", "task.length is 0; it must be between 1 and 16777216"),
        ("task.length=99999999", "task.length is 99999999; it must be between 1 and 16777216"),
        ("task.string.min=0", "task.string.min is 0; it must be between 1 and 16777216"),
        ("task.string.max=0", "task.string.max is 0; it must be between 1 and 16777216"),
        ("task.string={min: 30, max: 20}", "task.string.min is 30, but task.string.max is 20"),
        ("task={length: 20, string: {min: 30}}", "task.string.min is 30, but task.string.max is 20"),
        (
            "task.gap={low: 0.5, high: 0.2}",
            "task.gap.low is 0.5, but task.gap.high is 0.2, which is less; swap them",
        ),
        ("task.gap={law: lognormal, low: 0.5, high: 0.2}", "task.gap.low is 0.5, but task.gap.high is 0.2"),
        ("task.gap.low=-0.1", "task.gap.low is -0.1; it must be 0 or more"),
        ("task.gap.high=.nan", "task.gap.high is NaN; it must be 0 or more"),
        ("task.gap.high=.inf", "task.gap.high is inf; it must be 0 or more"),
        (
            "task.gap.high=10000",
            "task.gap.high is 10000, which makes sequences of up to 20000200 timesteps with task.length 200; at most \
             16777216 are possible",
        ),
        ("task.test_gap=-1", "task.test_gap is -1; it must be 0 or more"),
        ("task.test_gap=1e300", "task.test_gap is 1e300, which makes sequences of up to 2e303 timesteps"),
        ("task.eval_gaps=[1, -1]", "task.eval_gaps[1] is -1; it must be 0 or more"),
        ("task.eval_gaps=[20000]", "task.eval_gaps[0] is 20000, which makes sequences"),
        ("task.gap.mu=.inf", "task.gap.mu is inf; it must be a finite number"),
        ("task.gap.sigma=-1", "task.gap.sigma is -1; it must be 0 or more"),
        ("task.gap.probability=1.5", "task.gap.probability is 1.5; it must be between 0 and 1"),
        ("task.gap.probability=-0.5", "task.gap.probability is -0.5; it must be between 0 and 1"),
        ("task.noise=-0.2", "task.noise is -0.2; it must be between 0 and 1000"),
        ("task.noise=.nan", "task.noise is NaN; it must be between 0 and 1000"),
        ("task.recordings=0", "task.recordings is 0; it must be between 1 and 65536"),
        (
            "task.encoding=gsc",
            "task.encoding is gsc, which has 35 words, but the task has 41 symbols, # included; set task.ambiguities to \
             34 or less, and task.vocab to 35 or less or to auto",
        ),
        (
            "task.encoding=vectors",
            "task.encoding is vectors, but task.data is auto; set it to a safetensors file",
        ),
        ("task.samples.train=0", "task.samples.train is 0; it must be between 1 and 1000000000000"),
        ("task.samples.validation=0", "task.samples.validation is 0; it must be between 1"),
        ("task.samples.test=0", "task.samples.test is 0; it must be between 1"),
        ("task.samples.train=18446744073709551615", "it must be between 1 and 1000000000000"),
        ("model.layers=0", "model.layers is 0; it must be between 1 and 1024"),
        ("model.width=0", "model.width is 0; it must be between 1 and 65536"),
        ("model.width=1e9", "model.width is 1000000000; it must be between 1 and 65536"),
        ("model.width=18446744073709551615", "it must be between 1 and 65536"),
        (
            "model.width=258",
            "model.width is 258 and model.heads is 4, but the width must be a multiple of the heads; use a width of \
             256 or 260",
        ),
        ("model={width: 1, heads: 3}", "use a width of 3"),
        ("model={width: 100, heads: 7}", "use a width of 98 or 105"),
        ("model.width=1001", "but the width must be a multiple of the heads; use a width of 1000 or 1004"),
        (
            "model={name: transformer, width: 252}",
            "model.width is 252 with 4 heads, a head dim of 63: the transformer's rotary embedding needs an even one",
        ),
        (
            "model={width: 65536, layers: 1024}",
            "model.width is 65536 and model.layers is 1024, which makes about 3e13 parameters; at most 1e11 are possible",
        ),
        ("model.heads=0", "model.heads is 0; it must be between 1 and 65536"),
        ("model.state=0", "model.state is 0; it must be between 1 and 65536"),
        ("model.dropout=1", "model.dropout is 1; it must be at least 0 and less than 1"),
        ("model.dropout=-0.1", "model.dropout is -0.1; it must be at least 0 and less than 1"),
        ("model.dropout=.nan", "model.dropout is NaN; it must be at least 0 and less than 1"),
        ("model.conv=0", "model.conv is 0; it must be between 1 and 1024"),
        ("model.householders=0", "model.householders is 0; it must be between 1 and 64"),
        ("model.rope_base=0", "model.rope_base is 0; it must be between 1 and 1e12"),
        ("model.rope_base=-5", "model.rope_base is -5; it must be between 1 and 1e12"),
        ("train.batch=0", "train.batch is 0; it must be between 1 and 1000000"),
        ("train.micro_batch=0", "train.micro_batch is 0; it must be between 1 and 64"),
        ("train.micro_batch=65", "train.micro_batch is 65; it must be between 1 and 64"),
        ("train.lr=0", "train.lr is 0; it must be greater than 0 and at most 100"),
        ("train.lr=.nan", "train.lr is NaN; it must be greater than 0 and at most 100"),
        ("train.lr=1e300", "train.lr is 1e300; it must be greater than 0 and at most 100"),
        ("train.beta1=1", "train.beta1 is 1; it must be at least 0 and less than 1"),
        ("train.beta2=-0.1", "train.beta2 is -0.1; it must be at least 0 and less than 1"),
        ("train.eps=0", "train.eps is 0; it must be between 1e-30 and 1"),
        ("train.eps=1e-300", "train.eps is 1e-300; it must be between 1e-30 and 1"),
        ("train.weight_decay=-1", "train.weight_decay is -1; it must be between 0 and 100"),
        ("train.warmup=-1", "train.warmup is -1; it must be 0 or more"),
        ("train.warmup=.inf", "train.warmup is inf; it must be 0 or more"),
        (
            "task.samples.train=1000",
            "train.warmup is 1000 updates, but the run has only 16 (1000 samples in batches of 64); set train.warmup to \
             16 or less",
        ),
        ("train.warmup=3125.5", "train.warmup is 3125.5 updates, but the run has only 3125"),
        (
            "train.emulate=authors",
            "train.emulate is authors, but task.split is held-out; the released code's numbers need task.split \
             as-released",
        ),
        ("train.lr_min=1.5", "train.lr_min is 1.5; it must be between 0 and 1"),
        ("train.lr_min=-0.1", "train.lr_min is -0.1; it must be between 0 and 1"),
        ("train.clip=0", "train.clip is 0; it must be greater than 0 and at most 1e30"),
        ("train.clip=.inf", "train.clip is inf; it must be greater than 0"),
        ("train.eval_every=0", "train.eval_every is 0; it must be between 1 and 1000000000000"),
        ("train.eval_batch=0", "train.eval_batch is 0; it must be between 1"),
        ("train.eval_chunk=0", "train.eval_chunk is 0; it must be between 1"),
        ("train.save_every=0", "train.save_every is 0; it must be between 1"),
        ("train.log_every=0", "train.log_every is 0; it must be between 1"),
    ];
    for (set, want) in rows {
        // What fits in no `--set` is a text.
        let result = if set.starts_with('{') { read(set, &[]) } else { read("", &[set]) };
        expect(set, result, want);
    }
}

#[test]
fn refuses_what_is_no_configuration_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let rows = [
        (dir.path().join("none.yaml"), "none.yaml does not exist; give a configuration file"),
        (dir.path().to_path_buf(), " is a directory; give a configuration file"),
        (PathBuf::from(""), " does not exist"),
        (file("latin.yaml", b"seed: 1 # \xe9\n"), "latin.yaml is not UTF-8 text (byte 11)"),
        (
            file("long.yaml", &[b'#'; 1 << 20]),
            "long.yaml is longer than 65536 bytes; give a configuration file",
        ),
        (file("weights.safetensors", &[0xff; 1 << 20]), "is longer than 65536 bytes"),
        (file("nul.yaml", b"seed: \0"), "nul.yaml: line 1 holds the control character \\u{0}; remove it"),
        (file("bad\nname.yaml", b"seed: x"), "bad\\nname.yaml: seed is `x`; it must be a whole number"),
        (dir.path().join("latin.yaml/x"), " cannot be read: "),
    ];
    for (path, want) in rows {
        expect(&path, load(&path, &[]), want);
    }
}

#[test]
fn every_file_in_configs_is_a_run() {
    for entry in std::fs::read_dir(configs()).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            continue;
        }
        let config = load(&path, &[]).unwrap_or_else(|error| panic!("{error:#}"));
        let stem = path.file_stem().unwrap().to_str().unwrap();
        if let Some(preset) = TaskPreset::ALL.iter().find(|p| serde_yaml::to_value(p).unwrap() == stem) {
            assert_eq!(config, Config::of(*preset), "{stem} should spell out its preset");
        }
    }
}

#[test]
fn every_file_in_configs_sweeps_is_a_sweep() {
    for entry in std::fs::read_dir(configs().join("sweeps")).unwrap() {
        let path = entry.unwrap().path();
        let plan = Plan::open(&path, &[], None, |_| Ok(true)).unwrap_or_else(|error| panic!("{error:#}"));
        // The numbers in the comments.
        let text = std::fs::read_to_string(&path).unwrap();
        let said = text.split(" runs").next().unwrap().rsplit([' ', '\n']).next().unwrap().replace(',', "");
        if let Ok(said) = said.parse::<usize>() {
            assert_eq!(plan.runs.len(), said, "{}", path.display());
        }
    }
}

/// Every combination of switches is a configuration, and none is twice.
#[test]
fn the_sweep_over_ablations_is_of_runs() {
    let plan = Plan::open(&configs().join("sweeps/ablations.yaml"), &[], None, |_| Ok(false)).unwrap();
    assert_eq!(plan.left_out, []);
    for (name, runs) in
        [("mamba", 16), ("mamba2", 16), ("gla", 16), ("gated_delta_net", 48), ("gated_delta_product", 48)]
    {
        let of_model = plan.runs.iter().filter(|run| run.config.model.name == name).count();
        assert_eq!(of_model, runs, "{name}");
    }
    assert_eq!(plan.runs.len(), 144);
}

#[test]
fn the_reference_lists_every_field_with_its_default() {
    fn paths(tree: &serde_yaml::Value, at: &str, out: &mut BTreeSet<String>) {
        for (key, value) in tree.as_mapping().into_iter().flatten() {
            let path = format!("{at}.{}", key.as_str().unwrap());
            paths(value, &path, out);
            out.insert(path);
        }
    }
    let text = std::fs::read_to_string(configs().join("reference.yaml")).unwrap();
    assert_eq!(parse(&text, "reference.yaml", &[]).unwrap(), defaults());
    let (mut listed, mut there) = (BTreeSet::new(), BTreeSet::new());
    paths(&serde_yaml::from_str(&text).unwrap(), "", &mut listed);
    paths(&serde_yaml::to_value(defaults()).unwrap(), "", &mut there);
    assert_eq!(listed, there);
}

#[test]
fn devices() {
    assert!(parse_device("cpu").unwrap().is_cpu());
    let rows = [
        ("gpu", "--device is \"gpu\"; "),
        ("CPU", "--device is \"CPU\"; "),
        ("cuda", "--device is \"cuda\"; did you mean `cuda:0`?"),
        ("cuda:", "--device is \"cuda:\"; the number of the GPU is missing, as in `cuda:0`"),
        ("cuda:-1", "the number of the GPU is missing"),
        ("quantum\n", "--device is \"quantum\\n\"; it must be auto, cpu or cuda:N"),
        ("", "--device is \"\"; it must be auto, cpu or cuda:N"),
    ];
    for (text, want) in rows {
        expect(text, parse_device(text), want);
    }
    if !candle_core::utils::cuda_is_available() {
        assert!(parse_device("auto").unwrap().is_cpu());
        assert_eq!(
            refusal(parse_device("cuda:0")),
            "--device is `cuda:0`, but this build computes on the CPU only (build it with `--features cuda` for GPUs)"
        );
    }
}

/// What the program prints, and its exit code.
fn selectivbench(args: &[&str]) -> (String, String, Option<i32>) {
    let output = assert_cmd::Command::cargo_bin("selectivbench").unwrap().args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (text(output.stdout), text(output.stderr), output.status.code())
}

#[test]
fn switched_parts_are_fields_of_a_model() {
    let text = "model: {name: gla, decay: off, output_gate: \"on\", short_conv: auto}";
    let config = parse(text, "c.yaml", &[]).unwrap();
    let model = &config.model;
    assert_eq!((model.decay, model.output_gate, model.short_conv), (Switch::Off, Switch::On, Switch::Auto));
    assert_eq!(parse(&config.to_yaml(), "again", &[]).unwrap(), config);
    let sets = ["model.name=transformer".to_string()];
    let error = parse(text, "c.yaml", &sets).unwrap_err().to_string();
    assert!(error.starts_with("model.decay is off, but transformer has no such part; "), "{error}");
}

#[test]
fn lists_of_models_tasks_and_devices() {
    let names = |json: &serde_json::Value| -> Vec<String> {
        json.as_array().unwrap().iter().map(|entry| entry["name"].as_str().unwrap().to_string()).collect()
    };
    let json = |args: &[&str]| -> serde_json::Value {
        let (out, err, code) = selectivbench(args);
        assert_eq!((err.as_str(), code), ("", Some(0)), "{args:?}");
        serde_json::from_str(&out).unwrap()
    };
    let tasks = json(&["tasks", "--json"]);
    assert_eq!(names(&tasks), ["task1_complexity", "task1_model_size", "task2", "task3", "task4"]);
    // Timesteps as in the authors' data.
    let steps = |key| tasks.as_array().unwrap().iter().map(|task| task[key].clone()).collect::<Vec<_>>();
    assert_eq!(steps("train_steps"), [400, 400, 1300, 215, 1300]);
    assert_eq!(steps("test_steps")[2..4], [serde_json::json!([2200]), serde_json::json!([215])]);
    assert_eq!(tasks[4]["test_steps"], serde_json::json!([2200, 4200, 10_200, 20_200]));

    let devices = json(&["devices", "--json"]);
    assert_eq!(names(&devices["devices"])[0], "cpu");
    assert_eq!(devices["cuda"], candle_core::utils::cuda_is_available());

    let config = configs().join("task3.yaml");
    let models = json(&["models", "--json", "--config", config.to_str().unwrap()]);
    assert_eq!(names(&models).len(), selectivbench::model::MODELS.len());
    // mamba2: 2 · width · state of the configuration.
    assert_eq!(models[2]["state_per_layer"], 2 * 256 * 64);

    // A switched part shows wherever a model can have it, whatever the configuration's own model is.
    let models = json(&["models", "--json", "--set", "model.decay=off", "--budget", "1e6"]);
    assert_eq!(
        names(&models)[2..],
        [
            "gla",
            "delta_net",
            "gated_delta_net",
            "gated_delta_product",
            "retnet",
            "mesa_net",
            "fox",
            "kda",
            "rwkv7",
            "mlstm",
            "transformer",
            "gru",
            "s4"
        ]
    );
    assert_eq!(
        (&models[2]["transition"], &models[2]["decay"]),
        (&"identity".into(), &serde_json::Value::Null)
    );
    assert_eq!(models[2]["recurrence"], "S = S + k^T v");
    assert_eq!(models[4]["transition"], "Householder");
    assert!(
        models[12]["refused"].as_str().unwrap().starts_with("model.decay is off, but transformer has no")
    );
    let models = json(&["models", "--json", "--set", "model.negative_eigenvalues=on"]);
    assert_eq!(names(&models)[..3], ["delta_net", "gated_delta_net", "gated_delta_product"]);
    assert_eq!(models[0]["eigenvalues"], serde_json::json!([-1.0, 1.0]));

    for (command, says) in
        [("tasks", "task1_model_size"), ("devices", "cpu"), ("models", "gated_delta_product")]
    {
        let (out, err, code) = selectivbench(&[command]);
        assert!(out.contains(says), "{out}");
        assert_eq!((err.as_str(), code), ("", Some(0)));
    }
    for (args, says) in [
        (["models", "--width", "0"], "error: --width is 0; it must be between 1 and 65536\n"),
        (
            ["models", "--set", "model.decay=of"],
            "error: --set model.decay=of: model.decay is `of`; it must be one of auto, on, off; did you mean `off`?\n",
        ),
        (["models", "--layers", "2000"], "error: --layers is 2000; it must be between 1 and 1024\n"),
        (["models", "--config", "none.yaml"], "error: none.yaml does not exist; give a configuration file\n"),
    ] {
        let (out, err, code) = selectivbench(&args);
        assert_eq!((out.as_str(), err.as_str(), code), ("", says, Some(2)));
    }
}

#[test]
fn a_bad_configuration_starts_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let config = configs().join("task2.yaml");
    for (flags, says) in [
        (["--set", "train.lr=-1"], "error: train.lr is -1; it must be greater than 0 and at most 100\n"),
        (["--set", "lr=1"], "error: --set lr=1: unknown key `lr`; did you mean `train.lr`?\n"),
        (["--device", "tpu"], "error: --device is \"tpu\"; did you mean `cpu`?\n"),
    ] {
        let args = ["train", config.to_str().unwrap(), "--out", out.to_str().unwrap(), flags[0], flags[1]];
        let (stdout, stderr, code) = selectivbench(&args);
        assert_eq!((stdout.as_str(), stderr.as_str(), code), ("", says, Some(2)));
        assert!(!out.exists());
    }
}

/// Texts that are cheap to write and could be dear to read.
#[test]
fn bombs_are_refused_at_once() {
    let many = |part: &str, n: usize| part.repeat(n);
    let mut laughs = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n".to_string();
    for i in 1..30 {
        laughs += &format!("a{i}: &a{i} [{}]\n", vec![format!("*a{}", i - 1); 9].join(", "));
    }
    let texts = [
        laughs,
        format!("a: &a [{}]\nb: [{}]", many("0,", 10_000), many("*a,", 10_000)),
        many("[", 60_000),
        many("{a: ", 16_000),
        many("- ", 30_000),
        many("? ", 30_000),
        many("a:\n ", 100),
        (0..250).map(|i| format!("{}a:\n", many(" ", i))).collect(),
        many("!<", 30_000),
        many("\"", 60_000),
        many("&a ", 20_000),
        many("*a ", 20_000),
        many("&a *b ", 10_000),
        many("%TAG !a! b\n", 5_000),
        many("---\n", 15_000),
        many("a: 1\n", 12_000),
        many("|\n", 30_000),
        many("'", 65_536),
        (0..6_000).map(|i| format!("k{i}: 1\n")).collect(),
        many("[", 64) + &many("]", 64),
    ];
    for text in texts {
        let start = Instant::now();
        refusal(parse(&text, "bomb", &[]));
        refusal(parse("", "c.yaml", &[format!("task={text}")]));
        let took = start.elapsed();
        assert!(
            took < Duration::from_secs(2),
            "{:?}… took {took:?}",
            text.chars().take(40).collect::<String>()
        );
    }
}

/// Any result but a panic, soon; errors in one line.
fn survives(text: &str, sets: &[String]) {
    let start = Instant::now();
    match parse(text, "fuzz", sets) {
        Ok(config) => assert_eq!(parse(&config.to_yaml(), "again", &[]).unwrap(), config),
        Err(error) => drop(refusal::<()>(Err(error))),
    }
    assert!(start.elapsed() < Duration::from_secs(2));
}

prop_compose! {
    fn task_config()(
        preset in proptest::sample::select(TaskPreset::ALL.to_vec()),
        objective in proptest::sample::select(vec![Objective::Classify, Objective::Predict]),
        encoding in proptest::sample::select(vec![
            Encoding::OneHot, Encoding::Gsc, Encoding::Shd, Encoding::Ssc, Encoding::Vectors,
        ]),
        (data, recordings) in ("[a-z]{1,9}/[a-z ]{1,9}", 1..9usize),
        (ambiguities, extra, depth) in (0..=52usize, 1..10usize, 1..=100usize),
        density in 1e-6..2.0f64,
        start_states in 1..2usize,
        (length, min, longer) in (1..300usize, 1..50usize, 0..100usize),
        kind in proptest::sample::select(vec![GapKind::Blank, GapKind::Distractor]),
        law in proptest::sample::select(vec![GapLaw::Uniform, GapLaw::Lognormal, GapLaw::Fixed]),
        (low, more, mu, sigma) in (0.0..10.0f64, 0.0..10.0f64, -9.0..9.0f64, 0.0..9.0f64),
        (start, probability) in (0..300usize, 0.0..=1.0f64),
        (test_gap, noise) in (0.0..20.0f64, 0.0..2.0f64),
        eval_gaps in proptest::collection::vec(0.0..20.0f64, 0..5),
        (train, validation, test) in (1..10_000_000usize, 1..5000usize, 1..5000usize),
    ) -> TaskConfig {
        TaskConfig {
            preset,
            objective,
            // No data set has a word for every symbol.
            encoding: match encoding.of_set() {
                Some((.., words)) if ambiguities + extra >= words => Encoding::Vectors,
                _ => encoding,
            },
            data,
            recordings: Auto::Value(recordings),
            vocab: Auto::Value(ambiguities + extra + 1),
            ambiguities,
            depth: Auto::Value(depth),
            density,
            start_states,
            length,
            string: StringConfig { min, max: Auto::Value(min + longer) },
            gap: GapConfig { kind, law, low, high: low + more, mu, sigma, start, probability },
            test_gap,
            eval_gaps,
            noise,
            split: Split::HeldOut,
            samples: SampleCounts { train, validation, test },
        }
    }
}

prop_compose! {
    fn model_config()(
        name in proptest::sample::select(selectivbench::model::MODELS.iter().map(|m| m.name).collect::<Vec<_>>()),
        (layers, heads, half, state) in (1..4usize, 1..9usize, 1..40usize, 1..300usize),
        (dropout, conv, householders, rope_base) in (0.0..0.999f64, 1..9usize, 1..6usize, 1.0..1e6f64),
    ) -> ModelConfig {
        ModelConfig {
            name: name.to_string(),
            layers,
            width: 2 * half * heads,
            // Pairs of states.
            state: if name == "s4" { 2 * state } else { state },
            heads: Auto::Value(heads),
            dropout,
            conv,
            householders,
            rope_base,
            ..Config::of(TaskPreset::Task1ModelSize).model
        }
    }
}

prop_compose! {
    fn train_config()(
        (batch, micro) in (1..500usize, 0..3usize),
        optimizer in proptest::sample::select(vec![OptimizerKind::Adam, OptimizerKind::Adamw]),
        (lr, beta1, beta2, eps) in (1e-9..10.0f64, 0.0..0.9999f64, 0.0..0.9999f64, 1e-30..1e-3f64),
        (weight_decay, warmup, lr_min, clip) in (0.0..1.0f64, 0.0..1.0f64, 0.0..=1.0f64, 1e-9..1e9f64),
        schedule in proptest::sample::select(vec![Schedule::Cosine, Schedule::Constant]),
        every in proptest::array::uniform5(1..100_000usize),
        precision in proptest::sample::select(vec![
            Precision::Auto, Precision::F32, Precision::Tf32, Precision::Bf16,
        ]),
        emulate in proptest::sample::select(vec![Emulate::None, Emulate::Authors]),
        recompute in proptest::sample::select(vec![Recompute::None, Recompute::Layers]),
    ) -> TrainConfig {
        TrainConfig {
            preset: TrainPreset::Paper,
            batch,
            micro_batch: if micro == 0 { Auto::AUTO } else { Auto::Value(batch.div_ceil(micro)) },
            recompute,
            optimizer,
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            warmup,
            schedule,
            lr_min,
            clip,
            eval_every: every[0],
            eval_batch: every[1],
            eval_chunk: Auto::Value(every[2]),
            save_every: every[3],
            log_every: every[4],
            precision,
            emulate,
        }
    }
}

/// A valid configuration with some of its text overwritten, cut out or doubled.
fn mutated() -> impl Strategy<Value = String> {
    let junk = proptest::sample::select(vec![
        "",
        " ",
        "\t",
        "\n",
        ":",
        ": ",
        "- ",
        "[",
        "]",
        "{",
        "}",
        "&a ",
        "*a",
        "!!int ",
        "null",
        "-1",
        "1e999",
        ".nan",
        "\"",
        "'",
        "#",
        "|",
        ">",
        "%",
        "---\n",
        "...\n",
        "99999999999999999999",
        "0x10",
        "~",
        "<<: ",
        "\u{0}",
        "é",
        "auto",
    ]);
    let files = ["reference", "task2", "task3", "task4"]
        .map(|name| std::fs::read_to_string(configs().join(name).with_extension("yaml")).unwrap());
    let edit = (any::<proptest::sample::Index>(), 0..12usize, junk);
    (proptest::sample::select(files.to_vec()), proptest::collection::vec(edit, 1..6)).prop_map(
        |(text, edits)| {
            edits
                .into_iter()
                .fold(text.chars().collect::<Vec<char>>(), |mut text, (at, cut, junk)| {
                    let from = at.index(text.len() + 1);
                    let to = (from + cut).min(text.len());
                    text.splice(from..to, junk.chars());
                    text
                })
                .into_iter()
                .collect()
        },
    )
}

fn any_set() -> impl Strategy<Value = String> {
    let keys = proptest::sample::select(vec![
        "seed",
        "task",
        "task.gap",
        "task.gap.low",
        "task.preset",
        "task.vocab",
        "task.eval_gaps",
        "model.name",
        "model.width",
        "model.heads",
        "train.lr",
        "train.warmup",
        "train.micro_batch",
        "train.optimizer",
        "x",
        "",
    ]);
    let value = proptest::sample::select(vec![
        "1",
        "-1",
        "0",
        "1e400",
        "auto",
        "[1]",
        "[",
        "{low: 1}",
        "{low: {low: 1}}",
        "null",
        "",
        "task3",
        "adam",
        "\"",
        "*a",
        "1.5",
        "true",
        "!x 1",
        "18446744073709551615",
        "- 1\n- 2",
        "# c",
    ]);
    prop_oneof![any::<String>(), (keys, value).prop_map(|(key, value)| format!("{key}={value}"))]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn yaml_gives_the_configuration_back(
        seed in any::<u64>(), task in task_config(), model in model_config(), train in train_config(),
    ) {
        let mut config = Config { seed, task, model, train };
        if config.train.emulate == Emulate::Authors {
            // What is released draws symbols, and seed times index must fit into 32 bits.
            config.task.encoding = Encoding::OneHot;
            (config.task.split, config.seed) = (Split::AsReleased, 1 + seed % 400);
        }
        config.check().unwrap();
        prop_assert_eq!(parse(&config.to_yaml(), "again", &[]).unwrap(), config);
    }

    #[test]
    fn no_text_is_too_much(text in any::<String>(), sets in proptest::collection::vec(any_set(), 0..3)) {
        survives(&text, &sets);
    }

    #[test]
    fn no_bytes_are_too_much(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut file, &bytes).unwrap();
        if let Err(error) = load(file.path(), &[]) {
            refusal::<()>(Err(error));
        }
    }

    #[test]
    fn no_edit_is_too_much(text in mutated(), sets in proptest::collection::vec(any_set(), 0..3)) {
        survives(&text, &sets);
    }
}
