//! The as-released profile against what the authors' generator really drew, and the metrics against what
//! their evaluation computed.
//!

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use selectivbench::config::{
    Auto, Config, GapConfig, GapKind, GapLaw, Objective, Split, StringConfig, TaskConfig, TaskPreset,
};
use selectivbench::ops::expand::Show;
use selectivbench::ops::head::{Targets, loss_and_votes};
use selectivbench::task::batch::{Delay, GapRule, GapStream, Noise, NoiseStream};
use selectivbench::task::grammar::{Grammar, GrammarConfig};
use selectivbench::task::next::{self, Divergence};
use selectivbench::task::rng::{Mt19937, Pcg64, SeedSequence};
use selectivbench::task::{Batch, PAD, Part, Sample, Samples, Task};
use serde_json::Value;
use sha2::{Digest, Sha256};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data").join(name)
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(golden(name)).unwrap()).unwrap()
}

fn tensors(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(golden(name), &Device::Cpu).unwrap()
}

fn list(value: &Value) -> &Vec<Value> {
    value.as_array().unwrap_or_else(|| panic!("{value} is no list"))
}

fn numbers(value: &Value) -> Vec<u64> {
    list(value).iter().map(|x| x.as_u64().unwrap()).collect()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text"))
}

fn hex(value: &Value) -> u128 {
    u128::from_str_radix(text(value).trim_start_matches("0x"), 16).unwrap()
}

fn sha256(text: &str) -> String {
    Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Little-endian 32-bit words of a decimal number of any size.
fn words(decimal: &str) -> Vec<u32> {
    let mut words = vec![0u32];
    for digit in decimal.bytes() {
        let mut carry = u64::from(digit - b'0');
        for word in &mut words {
            let value = u64::from(*word) * 10 + carry;
            *word = value as u32;
            carry = value >> 32;
        }
        if carry > 0 {
            words.push(carry as u32);
        }
    }
    words
}

#[test]
fn default_rng_draws_what_numpy_draws() {
    for entry in list(&json("rng.json")["numpy_default_rng"]) {
        let seed = words(text(&entry["seed"]));
        let sequence = SeedSequence::new(&seed);
        let fresh = Pcg64::from_words(&seed);
        assert_eq!(sequence.pool().map(u64::from).to_vec(), numbers(&entry["pool_u32"]));
        let state: Vec<u128> = sequence.state::<4>().map(u128::from).to_vec();
        assert_eq!(state, list(&entry["state_words_u64"]).iter().map(hex).collect::<Vec<_>>());
        assert_eq!(fresh.raw(), (hex(&entry["pcg_state"]), hex(&entry["pcg_inc"])));

        let mut swaps = Vec::new();
        for (key, want) in entry.as_object().unwrap() {
            let mut rng = fresh.clone();
            let parts: Vec<&str> = key.split('_').collect();
            let n = |i: usize| parts[i].parse::<usize>().unwrap();
            match parts[0] {
                "raw" => list(want).iter().for_each(|x| assert_eq!(u128::from(rng.next_u64()), hex(x))),
                "random" if parts.len() == 2 => {
                    list(want).iter().for_each(|x| assert_eq!(rng.random(), x.as_f64().unwrap()));
                }
                "random" => {
                    list(want).iter().for_each(|x| assert_eq!(u128::from(rng.random().to_bits()), hex(x)));
                }
                "integers" => {
                    for want in numbers(want) {
                        assert_eq!(u64::from(rng.integers(n(1) as u32)), want, "{key}");
                    }
                }
                "permutation" if parts[1] == "first" => {
                    for want in numbers(want) {
                        assert_eq!(rng.permutation_first(n(2), &mut swaps) as u64, want, "{key}");
                    }
                }
                "permutation" => {
                    // the program needs the first entry only
                    let want = numbers(want);
                    assert_eq!(rng.permutation_first(want.len(), &mut swaps) as u64, want[0], "{key}");
                }
                "choice" => {
                    let got = rng.choice(n(1), n(2));
                    if let Some(first) = want.get("first8") {
                        let joined: Vec<String> = got.iter().map(usize::to_string).collect();
                        assert_eq!(got[..8].iter().map(|&x| x as u64).collect::<Vec<_>>(), numbers(first));
                        assert_eq!(sha256(&joined.join(",")), text(&want["sha256_of_comma_joined"]));
                    } else {
                        assert_eq!(got.iter().map(|&x| x as u64).collect::<Vec<_>>(), numbers(want));
                    }
                }
                _ => assert!(["seed", "pool", "state", "pcg"].contains(&parts[0]), "{key} is not checked"),
            }
        }
    }
}

#[test]
fn mixed_calls_share_one_buffered_half() {
    let mut swaps = Vec::new();
    for program in list(&json("rng.json")["numpy_mixed_programs"]) {
        let mut rng = Pcg64::new(program["seed"].as_u64().unwrap().into());
        for step in list(&program["steps"]) {
            let n = step["n"].as_u64().unwrap_or(0);
            match text(&step["op"]) {
                "integers" => {
                    assert_eq!(u64::from(rng.integers(n as u32)), step["out"].as_u64().unwrap());
                }
                "random" => assert_eq!(u128::from(rng.random().to_bits()), hex(&step["bits"])),
                "permutation_first" => {
                    let got = rng.permutation_first(n as usize, &mut swaps);
                    assert_eq!(got as u64, step["out"].as_u64().unwrap());
                }
                "choice" => {
                    let got = rng.choice(n as usize, step["k"].as_u64().unwrap() as usize);
                    assert_eq!(got.iter().map(|&x| x as u64).collect::<Vec<_>>(), numbers(&step["out"]));
                }
                op => panic!("{op} is not checked"),
            }
            assert_eq!(rng.raw().0, hex(&step["pcg_state_after"]));
            assert_eq!(rng.buffered().map(u64::from), step["buffered_u32_after"].as_u64());
        }
    }
}

#[test]
fn advance_is_as_many_draws() {
    for draws in [0, 1, 2, 3, 150, 200, 12_345] {
        let (mut stepped, mut jumped) = (Pcg64::new(7), Pcg64::new(7));
        for _ in 0..draws {
            stepped.random();
        }
        jumped.advance(draws);
        assert_eq!(stepped.raw(), jumped.raw());
    }
}

#[test]
fn mersenne_twister_draws_what_its_three_libraries_draw() {
    let golden = json("rng.json");
    for entry in list(&golden["python_random"]) {
        let seed = SeedSequence::words(entry["seed"].as_u64().unwrap().into());
        for (key, want) in entry.as_object().unwrap() {
            let mut rng = Mt19937::from_words(&seed);
            let parts: Vec<&str> = key.split('_').collect();
            match parts[0] {
                "getrandbits32" => {
                    numbers(want).iter().for_each(|&x| assert_eq!(u64::from(rng.next_u32()), x));
                }
                "sample" => {
                    for want in list(want) {
                        let got = rng.python_sample(parts[1].parse().unwrap(), parts[2].parse().unwrap());
                        assert_eq!(got.iter().map(|&x| x as u64).collect::<Vec<_>>(), numbers(want), "{key}");
                    }
                }
                _ => assert_eq!(key, "seed"),
            }
        }
    }
    for entry in list(&golden["numpy_legacy_global"]) {
        let seed = entry["seed"].as_u64().unwrap() as u32;
        for (key, want) in entry.as_object().unwrap() {
            let mut rng = Mt19937::from_u32(seed);
            let mut uniform = || rng.legacy_uniform(0.1, 1.0);
            match key.as_str() {
                "seed" => {}
                "uniform_0.1_1.0" => {
                    list(want).iter().for_each(|x| assert_eq!(uniform(), x.as_f64().unwrap()));
                }
                "uniform_0.1_1.0_bits" => {
                    list(want).iter().for_each(|x| assert_eq!(u128::from(uniform().to_bits()), hex(x)));
                }
                "uniform_rounded_1_decimal" => {
                    let rule = rule(GapKind::Blank, Delay::Uniform(0.1, 1.0));
                    let grammar = Grammar::generate(&toy()).unwrap();
                    let mut stream = GapStream::AsReleased { chance: Pcg64::new(0), numpy: rng };
                    let sample = Sample::draw(&grammar, vec![0; list(want).len()], &rule, &mut stream);
                    let want = list(want).iter().map(|x| (x.as_f64().unwrap() * 10.0).round() as u32);
                    assert_eq!(sample.gaps, want.collect::<Vec<_>>());
                }
                choice => {
                    let n = choice.strip_prefix("choice_index_").expect("a known list").parse().unwrap();
                    numbers(want).iter().for_each(|&x| assert_eq!(rng.legacy_choice(n) as u64, x));
                }
            }
        }
    }
    for entry in list(&golden["torch_cpu_rand"]) {
        let mut rng = Mt19937::from_u32(entry["seed"].as_u64().unwrap() as u32);
        for want in numbers(&entry["rand_f32_as_u24"]) {
            assert_eq!(rng.torch_rand() * 16_777_216.0, want as f32);
        }
    }
}

fn toy() -> GrammarConfig {
    GrammarConfig { vocab: 6, ambiguities: 2, depth: 3, density: 0.4, start_states: 4, seed: 1 }
}

fn rule(kind: GapKind, delay: Delay) -> GapRule {
    GapRule { kind, start: 0, probability: 1.0, delay }
}

fn grammar_config(config: &Value) -> GrammarConfig {
    let number = |key: &str| config[key].as_u64().unwrap() as usize;
    GrammarConfig {
        vocab: number("vocab"),
        ambiguities: number("amb"),
        depth: number("depth"),
        density: config["transition_density"].as_f64().unwrap_or(0.4),
        start_states: config["initial_states"].as_u64().unwrap_or(4) as usize,
        seed: config["seed"].as_u64().unwrap(),
    }
}

/// Next-symbol probabilities of a state, by class id.
fn next_symbols(grammar: &Grammar, state: u32) -> Vec<f64> {
    let mut probabilities = vec![0.0; grammar.alphabet()];
    let next = grammar.successors(state);
    for &target in next {
        probabilities[grammar.symbol(target) as usize] += 1.0 / next.len() as f64;
    }
    probabilities
}

#[test]
fn grammars_are_the_authors() {
    list(&json("grammars.json")["entries"]).par_iter().for_each(|entry| {
        let name = text(&entry["config"]["name"]);
        let grammar = Grammar::generate(&grammar_config(&entry["config"])).unwrap();
        let states = 0..grammar.states() as u32;
        let names: Vec<&str> = states.clone().map(|state| grammar.name(state)).collect();
        let number = |key: &str| entry[key].as_u64().unwrap() as usize;
        assert_eq!(grammar.attempts(), number("attempts"), "{name}");
        assert_eq!(grammar.states(), number("num_states"), "{name}");
        assert_eq!(grammar.states(), number("num_unreduced_states"), "{name}");
        assert_eq!(grammar.alphabet(), number("num_reduced_states"), "{name}");
        assert_eq!(grammar.transitions(), number("num_transitions"), "{name}");
        let degrees = states.clone().filter(|&s| s != grammar.end()).map(|s| grammar.successors(s).len());
        assert_eq!(degrees.clone().min(), Some(number("min_out_degree")), "{name}");
        assert_eq!(degrees.max(), Some(number("max_out_degree")), "{name}");
        let into_end = states.clone().filter(|&s| grammar.successors(s).contains(&grammar.end())).count();
        assert_eq!(into_end, number("transitions_into_eos"), "{name}");
        let starts: Vec<&str> = grammar.starts().iter().map(|&state| grammar.name(state)).collect();
        assert_eq!(starts, list(&entry["start_states"]).iter().map(text).collect::<Vec<_>>(), "{name}");

        let lines = |line: &dyn Fn(u32) -> String| sha256(&states.clone().map(line).collect::<String>());
        assert_eq!(lines(&|s| format!("{}\n", names[s as usize])), text(&entry["states_sha256"]), "{name}");
        assert_eq!(sha256(&grammar.transitions_text()), text(&entry["transitions_sha256"]), "{name}");
        let ids = lines(&|s| format!("{} {}\n", names[s as usize], grammar.label(s)));
        assert_eq!(ids, text(&entry["state_ids_sha256"]), "{name}");

        let entropy = entry["topological_entropy"].as_f64().unwrap();
        let got = grammar.topological_entropy();
        assert!((got - entropy).abs() <= 1e-9 * entropy.abs(), "{name}: entropy {got}, expected {entropy}");

        let transitions = states.clone().flat_map(|state| {
            let next = grammar.successors(state);
            let names = &names;
            next.iter()
                .map(move |&target| (names[state as usize], names[target as usize], 1.0 / next.len() as f64))
        });
        let key = if entry.get("transitions").is_some() { "transitions" } else { "first_transitions" };
        let want = list(&entry[key]);
        let got: Vec<_> = transitions.take(want.len()).collect();
        let want: Vec<_> = want.iter().map(|t| (text(&t[0]), text(&t[1]), t[2].as_f64().unwrap())).collect();
        assert_eq!(got, want, "{name}");
        if key == "transitions" {
            assert_eq!(names, list(&entry["states"]).iter().map(text).collect::<Vec<_>>());
            assert_eq!(transition_count(&grammar), list(&entry["transitions"]).len());
            for &state in &states.clone().collect::<Vec<_>>() {
                let want = entry["state_ids"][names[state as usize]].as_u64();
                assert_eq!(Some(u64::from(grammar.label(state))), want, "{name}");
            }
        } else {
            // the first three and the last three
            let want: Vec<&str> = list(&entry["first_states"]).iter().map(text).collect();
            assert_eq!(names[..3], want[..3], "{name}");
            assert_eq!(names[names.len() - 3..], want[3..], "{name}");
        }
        let probabilities = entry.get("next_symbol_probs").or(entry.get("next_symbol_probs_sample"));
        for (state, want) in probabilities.unwrap().as_object().unwrap() {
            let state = names.iter().position(|name| name == state).unwrap();
            let want: Vec<f64> = list(want).iter().map(|x| x.as_f64().unwrap()).collect();
            assert_eq!(next_symbols(&grammar, state as u32), want[..grammar.alphabet()], "{name}");
            assert!(want[grammar.alphabet()..].iter().all(|&p| p == 0.0), "{name}");
        }
    });
}

fn transition_count(grammar: &Grammar) -> usize {
    (0..grammar.states() as u32).map(|state| grammar.successors(state).len()).sum()
}

#[test]
fn grammars_are_rejected_as_often() {
    for entry in list(&json("reject_stats.json")) {
        let number = |key: &str| entry[key].as_u64().unwrap() as usize;
        let last = text(&entry["seeds"]).strip_prefix("1..").unwrap().parse::<u64>().unwrap();
        let attempts: Vec<usize> = (1..=last)
            .into_par_iter()
            .map(|seed| {
                let (vocab, ambiguities, depth) = (number("vocab"), number("amb"), number("depth"));
                let config = GrammarConfig { vocab, ambiguities, depth, seed, ..toy() };
                Grammar::generate(&config).unwrap().attempts()
            })
            .collect();
        assert_eq!(attempts.iter().sum::<usize>(), number("total_attempts"), "{entry}");
        assert_eq!(attempts.iter().copied().max(), Some(number("max_attempts")), "{entry}");
    }
}

#[test]
fn samples_are_the_authors() {
    let file = std::fs::File::open(golden("sequences.json.gz")).unwrap();
    let sequences: Value = serde_json::from_reader(flate2::read::GzDecoder::new(file)).unwrap();
    let grammars = json("grammars.json");
    list(&sequences["entries"]).par_iter().for_each(|entry| {
        let config = &entry["config"];
        let of_name = |e: &&Value| e["config"]["name"] == config["grammar"];
        let grammar = grammar_config(&list(&grammars["entries"]).iter().find(of_name).unwrap()["config"]);
        let number = |key: &str| config[key].as_u64().unwrap() as usize;
        let task = task(
            &grammar,
            TaskConfig {
                length: number("combined_seq_length"),
                string: StringConfig { min: number("seq_len_min"), max: Auto::Value(number("seq_len_max")) },
                ..task_config(&grammar)
            },
        );
        let mut attempts = 0;
        let (mut hash, mut ends) = (Sha256::new(), 0);
        for index in 0..entry["n_hashed"].as_u64().unwrap() {
            let states = task.states(Part::Train, index).unwrap();
            hash.update(task.line(&states));
            ends += states.iter().filter(|&&state| state == task.grammar().end()).count();
            if let Some(sample) = entry["samples"].get(index as usize) {
                let of = |f: &dyn Fn(u32) -> u32| states.iter().map(|&s| f(s).into()).collect::<Vec<u64>>();
                assert_eq!(of(&|s| task.grammar().symbol(s)), numbers(&sample["class_ids"]));
                assert_eq!(of(&|s| task.grammar().label(s)), numbers(&sample["state_ids"]));
                let names: Vec<&str> = states.iter().map(|&s| task.grammar().name(s)).collect();
                assert_eq!(names.join(" "), text(&sample["state_names"]));
            }
            if index + 1 == entry["n_pristine"].as_u64().unwrap() {
                assert_eq!(digest(hash.clone()), text(&entry["pristine_lines_sha256"]));
            }
            // strings alone, for their attempts
            let mut rng = Pcg64::new(u128::from(grammar.seed) * u128::from(index));
            let mut out = Vec::new();
            while out.len() < task.sampler().length() {
                attempts += task.sampler().string(&mut rng, &mut out).unwrap();
            }
            assert_eq!(out[..states.len()], states);
        }
        let n = entry["n_hashed"].as_f64().unwrap();
        assert_eq!(digest(hash), text(&entry["lines_sha256"]), "{config}");
        assert_eq!(attempts as f64 / n, entry["mean_string_attempts_per_sample"].as_f64().unwrap());
        assert_eq!(ends as f64 / n, entry["mean_eos_per_sample"].as_f64().unwrap());
    });
}

/// Sizes and seeds that no golden file has: transitions and 21 samples each, from a separate implementation
/// whose random calls were compared with numpy's.
#[test]
fn other_sizes_and_large_seeds() {
    for (vocab, ambiguities, depth, density, start_states, seed, length, min, max, attempts, want) in [
        (6, 2, 3, 0.4, 4, (1 << 33) + 5, 20, 1, 20, 47, "f2bc7b923c799a465b1127ee70aa7c29"),
        (6, 2, 3, 0.4, 4, u64::MAX, 20, 1, 20, 9, "2bac5b145d842b5a1e3786859946d109"),
        // more symbols than letters; one start state
        (60, 3, 2, 0.4, 1, 1 << 32, 60, 1, 60, 1, "776bac11040e2c25c4f3f568b6fb924c"),
        // nothing ambiguous
        (9, 0, 1, 0.4, 1, 12_345_678_901, 30, 1, 30, 1, "380f4ba92b8fc0d4195856479694d6f8"),
        // the most instances
        (8, 7, 100, 9.0, 4, (1 << 40) + 9, 50, 1, 50, 1, "d1fa880c1e84c8535eec23fd3f277171"),
        // many start states; lengths cut on both sides
        (41, 40, 3, 0.4, 30, 13, 33, 3, 20, 1, "907ef9006f783821d89270cee30b8c3a"),
    ] {
        let grammar = GrammarConfig { vocab, ambiguities, depth, density, start_states, seed };
        let string = StringConfig { min, max: Auto::Value(max) };
        let task = task(&grammar, TaskConfig { length, string, ..task_config(&grammar) });
        assert_eq!(task.grammar().attempts(), attempts);
        let mut text = task.grammar().transitions_text();
        for index in (0..20).chain([1 << 40]) {
            text += &task.line(&task.states(Part::Train, index).unwrap());
        }
        assert_eq!(sha256(&text)[..32], *want, "{grammar:?}");
    }
}

fn digest(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn untouched_run_of_the_authors_code() {
    let golden = json("pristine_a40_s1.json");
    let grammar = GrammarConfig { vocab: 41, ambiguities: 40, depth: 40, ..toy() };
    let task = task(&grammar, TaskConfig { length: 200, ..task_config(&grammar) });
    assert_eq!(sha256(&task.grammar().transitions_text()), text(&golden["transitions_sha256"]));
    let lines: Vec<String> = (0..golden["n"].as_u64().unwrap())
        .map(|i| task.line(&task.states(Part::Train, i).unwrap()))
        .collect();
    for (line, want) in lines.iter().zip(list(&golden["line_sha256_first_300"])) {
        assert_eq!(sha256(line)[..16], *text(want));
    }
    assert_eq!(sha256(&lines.concat()), text(&golden["lines_sha256"]));
}

/// As released, 20 elements, one blank step after each, without noise.
fn task_config(grammar: &GrammarConfig) -> TaskConfig {
    let base = Config::of(TaskPreset::Task1ModelSize).task;
    TaskConfig {
        vocab: Auto::Value(grammar.vocab),
        ambiguities: grammar.ambiguities,
        depth: Auto::Value(grammar.depth),
        density: grammar.density,
        start_states: grammar.start_states,
        length: 20,
        string: StringConfig { min: 1, max: Auto::AUTO },
        gap: GapConfig { law: GapLaw::Fixed, low: 0.1, high: 0.1, ..base.gap },
        split: Split::AsReleased,
        ..base
    }
}

fn task(grammar: &GrammarConfig, config: TaskConfig) -> Task {
    Task::new(&config, grammar.seed).unwrap()
}

#[test]
fn batches_are_the_authors() {
    for entry in list(&json("batches.json")["batches"]) {
        let name = text(&entry["name"]);
        let params = &entry["params"];
        let predict = !params["classify"].as_bool().unwrap_or(true);
        let number = |key: &str| params[key].as_u64().unwrap() as usize;
        let grammar = grammar_config(params);
        let delay = match params["fixed"].as_f64() {
            Some(delay) => Delay::Fixed(delay),
            None => {
                Delay::Uniform(params["uniform"][0].as_f64().unwrap(), params["uniform"][1].as_f64().unwrap())
            }
        };
        let distractors = params["grammar_gap"].as_bool().unwrap_or(false);
        let rule = GapRule {
            kind: if distractors { GapKind::Distractor } else { GapKind::Blank },
            start: params["gap_start"].as_u64().unwrap_or(0) as usize,
            probability: params["gap_prob"].as_f64().unwrap_or(1.0),
            delay,
        };
        let noise = params["noise"].as_f64().unwrap_or(0.0);
        let config = TaskConfig {
            length: number("L"),
            gap: GapConfig {
                kind: rule.kind,
                law: if matches!(delay, Delay::Fixed(_)) { GapLaw::Fixed } else { GapLaw::Uniform },
                low: params["uniform"][0].as_f64().unwrap_or(0.1),
                high: params["uniform"][1].as_f64().or(params["fixed"].as_f64()).unwrap(),
                start: rule.start,
                probability: rule.probability,
                ..task_config(&grammar).gap
            },
            noise,
            objective: if predict { Objective::Predict } else { Objective::Classify },
            ..task_config(&grammar)
        };
        let task = task(&grammar, config);
        let indices = numbers(&entry["sample_indices"]);

        // With the seeds of the golden run.
        let numpy_base = entry["np_random_seed_base"].as_u64();
        let torch_base = entry["torch_seed_base"].as_u64();
        let combined = params["combine"].as_bool().unwrap_or(true);
        let mut chance = Pcg64::new(grammar.seed.into());
        let mut samples = Vec::new();
        for (k, &index) in (0..).zip(&indices) {
            let states = if combined {
                task.states(Part::Train, index).unwrap()
            } else {
                let mut states = Vec::new();
                let mut rng = Pcg64::new(u128::from(grammar.seed) * u128::from(index));
                task.sampler().string(&mut rng, &mut states).unwrap();
                states
            };
            let seed = numpy_base.map_or(grammar.seed * index, |base| base + k);
            let mut stream = GapStream::AsReleased { chance, numpy: Mt19937::from_u32(seed as u32) };
            let mut sample = Sample::draw(task.grammar(), states, &rule, &mut stream);
            if predict {
                // The symbol that would follow bears on nothing here.
                sample.predict(Split::AsReleased, 1);
            }
            samples.push(sample);
            let GapStream::AsReleased { chance: after, .. } = stream else { unreachable!() };
            chance = after;
        }
        let noise = torch_base.map(|base| Noise {
            level: noise as f32,
            streams: (0..indices.len() as u64)
                .map(|k| NoiseStream::AsReleased(Mt19937::from_u32((base + k) as u32)))
                .collect(),
        });
        let set = Samples::new(samples, grammar.vocab, indices[0], noise, Show::ONE_HOT);
        let want = tensors(text(&entry["file"]));
        let states: Vec<Vec<u32>> = set.as_slice().iter().map(|sample| sample.states.clone()).collect();
        compare(name, &set.into_batch(), &want, &task, &states);

        // Where the golden run seeds its generators as the program does: the same through the task.
        let consecutive = (0..).zip(&indices).all(|(k, &index)| k == index);
        if consecutive && combined && numpy_base.is_none() && torch_base.is_none() {
            let batch = task.batch(Part::Train, 0, indices.len(), None).unwrap();
            compare(name, &batch, &want, &task, &states);
        }
    }
}

fn compare(name: &str, batch: &Batch, want: &HashMap<String, Tensor>, task: &Task, states: &[Vec<u32>]) {
    let f32s = |key: &str| want[key].flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let integers = |key: &str| want[key].flatten_all().unwrap().to_vec1::<i64>().unwrap();
    assert_eq!(want["data"].dims(), [batch.batch, batch.steps, batch.features], "{name}");
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    // not assert_eq: both would be printed
    assert!(bits(batch.dense()) == bits(f32s("data")), "{name}: data");
    let labels: Vec<i64> = batch.labels.iter().map(|&label| label.into()).collect();
    assert_eq!(labels, integers("labels"), "{name}");
    let mask: Vec<f32> = batch.element.iter().map(|&e| f32::from(u8::from(e != PAD))).collect();
    assert_eq!(mask, f32s("mask"), "{name}");
    let lens: Vec<i64> = batch.lengths.iter().map(|&length| length as i64).collect();
    assert_eq!(lens, integers("lens"), "{name}");
    assert_eq!(batch.valid_steps() as f32, mask.iter().sum::<f32>(), "{name}");

    let grammar = task.grammar();
    if let Some(targets) = want.get("target_probs") {
        assert!(mask == f32s("gap_mask"), "{name}: gap_mask");
        let classes = task.classes();
        assert_eq!(targets.dims(), [batch.batch, batch.steps, classes], "{name}");
        let of_step = |(i, &element): (usize, &u32)| match element {
            PAD => vec![0.0; classes],
            element => next::after(task, states[i / batch.steps][element as usize]),
        };
        let targets: Vec<f32> =
            batch.element.iter().enumerate().flat_map(of_step).map(|p| p as f32).collect();
        assert!(targets == f32s("target_probs"), "{name}: target_probs");
        let ids = states.iter().flatten().map(|&state| grammar.label(state) as f32);
        assert_eq!(ids.collect::<Vec<f32>>(), f32s("debug_class_seq"));
        return;
    }
    let (b, e, t) = want["gap_mask"].dims3().unwrap();
    assert_eq!((b, e, t), (batch.batch, batch.elements, batch.steps), "{name}");
    let mut windows = vec![0.0; b * e * t];
    for (i, &element) in batch.element.iter().enumerate().filter(|&(_, &element)| element != PAD) {
        windows[(i / t * e + element as usize) * t + i % t] = 1.0;
    }
    assert!(windows == f32s("gap_mask"), "{name}: gap_mask");

    // class ids of the elements
    if let Some(symbols) = want.get("debug_class_seq") {
        let shown = batch.element.chunks(t).zip(batch.symbols.chunks(t)).flat_map(|(element, symbols)| {
            let first = move |&i: &usize| i == 0 || element[i] != element[i - 1];
            (0..t).filter(first).filter(|&i| element[i] != PAD).map(|i| symbols[i] as f32)
        });
        assert_eq!(shown.collect::<Vec<f32>>(), symbols.flatten_all().unwrap().to_vec1::<f32>().unwrap());
    }
}

#[test]
fn gaps_take_the_authors_number_of_steps() {
    let golden = json("batches.json");
    for row in list(&golden["delay_table"]) {
        let delay = row[0].as_f64().unwrap();
        for (kind, column) in [(GapKind::Blank, 1), (GapKind::Distractor, 2)] {
            let steps = rule(kind, Delay::Fixed(delay)).steps(delay);
            assert_eq!(u64::from(steps), row[column].as_u64().unwrap(), "{delay}, {kind:?}");
        }
    }
}

fn f64_of(value: &Value) -> f64 {
    f64::from_bits(hex(&value["bits"]) as u64)
}

/// The share of windows that vote for their label.
///
/// The authors' rule also counts the windows that padding adds, and counts them as right; here they count
/// only when `padding_is_right`.
fn accuracy(votes: &[u32], batch_labels: &[Option<u32>], padding_is_right: bool) -> f64 {
    let counted = votes.iter().zip(batch_labels).filter(|(_, label)| padding_is_right || label.is_some());
    let (all, hits) = counted.fold((0, 0), |(all, hits), (&vote, label)| {
        (all + 1, hits + usize::from(label.is_none_or(|label| label == vote)))
    });
    hits as f64 / all as f64
}

/// The label of every window, nothing where padding has none.
fn window_labels(targets: &Targets) -> Vec<Option<u32>> {
    let mut labels = vec![None; targets.batch * targets.elements];
    for (i, &element) in targets.element.iter().enumerate().filter(|&(_, &element)| element != PAD) {
        labels[i / targets.steps * targets.elements + element as usize] = Some(targets.labels[i]);
    }
    labels
}

#[test]
fn metrics_are_the_authors() {
    for case in list(&json("metrics.json")["cases"]) {
        if text(&case["kind"]) != "classify" {
            continue;
        }
        let name = text(&case["name"]);
        let want = tensors(text(&case["file"]));
        let (batch, elements, steps) = want["gap_mask"].dims3().unwrap();
        let windows = want["gap_mask"].to_dtype(DType::F64).unwrap().to_vec3::<f64>().unwrap();
        let mut element = vec![PAD; batch * steps];
        for (b, windows) in windows.iter().enumerate() {
            for (e, window) in windows.iter().enumerate() {
                for t in (0..steps).filter(|&t| window[t] != 0.0) {
                    element[b * steps + t] = e as u32;
                }
            }
        }
        let labels = want["labels"].to_dtype(DType::U32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let targets = Targets { labels, element, batch, steps, elements };
        let (loss, votes) = loss_and_votes(&want["logits"], &targets).unwrap();
        let valid = targets.element.iter().filter(|&&element| element != PAD).count();
        let want_loss = f64_of(&case["loss"]);
        assert!((loss / valid as f64 - want_loss).abs() < 1e-12 * want_loss, "{name}: {loss}");

        let windows = window_labels(&targets);
        let padding = windows.iter().filter(|label| label.is_none()).count();
        assert_eq!(padding as u64, case["n_padding_elements"].as_u64().unwrap(), "{name}");
        assert_eq!(accuracy(&votes, &windows, true), f64_of(&case["acc"]), "{name}");
        let predicted = want["predicted_class"].to_dtype(DType::U32).unwrap();
        let predicted: Vec<u32> = predicted.flatten_all().unwrap().to_vec1().unwrap();
        for ((vote, predicted), label) in votes.iter().zip(predicted).zip(&windows) {
            // A window without a step votes for nothing here, for class 0 there.
            assert_eq!(*vote, if label.is_some() { predicted } else { u32::MAX }, "{name}");
        }
    }
}

/// The divergence and the cross-entropy of next-symbol prediction.
#[test]
fn divergences_are_the_authors() {
    let cases = json("metrics.json");
    let cases: Vec<&Value> =
        list(&cases["cases"]).iter().filter(|case| text(&case["kind"]) == "predict").collect();
    assert_eq!(cases.len(), 2);
    for case in cases {
        let name = text(&case["name"]);
        let want = tensors(text(&case["file"]));
        let (batch, steps, classes) = want["logits"].dims3().unwrap();
        let valid: Vec<f32> = want["gap_mask"].flatten_all().unwrap().to_vec1().unwrap();
        let element = valid.iter().map(|&valid| if valid == 1.0 { 0 } else { PAD }).collect();
        let labels = want["labels"].to_dtype(DType::U32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let targets = Targets { labels, element, batch, steps, elements: 1 };
        let count = f64::from(valid.iter().sum::<f32>());
        let (loss, _) = loss_and_votes(&want["logits"], &targets).unwrap();
        let near = |got: f64, key: &str| {
            let want = f64_of(&case[key]);
            assert!(
                (got / count - want).abs() < 1e-12 * want,
                "{name}: {key} {}, expected {want}",
                got / count
            );
        };
        near(loss, "ce_over_gap_mask");
        let rows = |key: &str| want[key].flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let (logits, probabilities) = (rows("logits"), rows("target_probs"));
        let kl = |epsilon: f64| -> f64 {
            let rows = logits.chunks(classes).zip(probabilities.chunks(classes)).zip(&valid);
            rows.filter(|(_, valid)| **valid == 1.0)
                .map(|((logits, target), _)| next::divergence(&next::smoothed(target, epsilon), logits))
                .sum()
        };
        near(kl(0.0), "kl_train");
        near(kl(next::EPSILON), "kl_test_eps1e-6");
    }
}

/// Their whole test loop over a stub model, logits = data · W; all samples are equally long, so that the
/// loss does not depend on the shuffle.
#[test]
fn evaluation_is_the_authors() {
    for case in list(&json("metrics.json")["cases"]) {
        let name = text(&case["name"]);
        if text(&case["kind"]) != "eval" {
            continue;
        }
        let predict = name.starts_with("eval_predict");
        let objective = if predict { Objective::Predict } else { Objective::Classify };
        let params = &case["params"];
        let grammar = grammar_config(params);
        let length = params["L"].as_u64().unwrap() as usize;
        let task = task(&grammar, TaskConfig { length, objective, ..task_config(&grammar) });
        let count = case["test_size"].as_u64().unwrap() as usize;
        let samples = task.samples(Part::Test, 0, count, None).unwrap();
        let divergence =
            next::Targets::new(&task, None).map(|next| Divergence::new(&next, samples.as_slice()));
        assert_eq!(divergence.is_some(), predict);
        let batch = samples.into_batch();
        let w = tensors(text(&case["file"]));
        let [w] = w.values().collect::<Vec<_>>()[..] else { panic!("{name}: one tensor") };
        let data = Tensor::from_vec(batch.dense(), (batch.batch * batch.steps, batch.features), &Device::Cpu);
        let logits = data.unwrap().matmul(w).unwrap().reshape((batch.batch, batch.steps, ())).unwrap();
        let Batch { labels, element, steps, elements, .. } = batch.clone();
        let targets = Targets { labels, element, batch: batch.batch, steps, elements };
        let (loss, votes) = loss_and_votes(&logits, &targets).unwrap();
        let loss = loss / batch.valid_steps() as f64;
        let performance = match divergence {
            None => accuracy(&votes, &window_labels(&targets), true),
            Some(mut divergence) => {
                // In pieces, as an evaluation does.
                for from in (0..steps).step_by(7) {
                    let count = 7.min(steps - from);
                    let piece = logits.narrow(1, from, count).unwrap();
                    let element = targets.element.chunks(steps).flat_map(|row| &row[from..][..count]);
                    let element: Vec<u32> = element.copied().collect();
                    divergence.add(&piece.flatten_all().unwrap().to_vec1().unwrap(), &element);
                }
                let (sum, steps) = divergence.finish();
                assert_eq!(steps, batch.valid_steps());
                sum / steps as f64
            }
        };
        for shuffle in 0..2 {
            let want = case["loss_two_shuffles"][shuffle].as_f64().unwrap();
            assert!((loss - want).abs() < 1e-5, "{name}: loss {loss}, expected {want}");
            let want = case["perf_two_shuffles"][shuffle].as_f64().unwrap();
            assert!((performance - want).abs() < 1e-6, "{name}: {performance}, expected {want}");
        }
    }
}

/// What the authors' streams share, as their own runs showed.
#[test]
fn streams_of_the_released_code() {
    let quirks = json("quirks.json");
    let drawn = |seed: u64, index: u64| {
        let grammar = GrammarConfig { seed, ..toy() };
        task(&grammar, task_config(&grammar)).states(Part::Train, index).unwrap()
    };
    let first = quirks["streams"]["first_start_choice_idx0"].as_u64().unwrap() as usize;
    for seed in 1..5 {
        let grammar = Grammar::generate(&GrammarConfig { seed, ..toy() }).unwrap();
        assert_eq!(drawn(seed, 0)[0], grammar.starts()[first]);
    }
    let task = task(&toy(), task_config(&toy()));
    for index in 0..100 {
        let train = task.states(Part::Train, index).unwrap();
        assert_eq!(train, task.states(Part::Test, index).unwrap(), "the test set is in the training set");
    }
}
