//! The reader of checkpoints against damage of every kind: it answers with one sentence, never a panic.

use std::path::Path;

use candle_core::{DType, Device};
use proptest::prelude::*;
use selectivbench::checkpoint::Checkpoint;
use selectivbench::config::Config;
use selectivbench::config::load::parse;
use selectivbench::error::exit_code;
use selectivbench::model::{MODELS, RecNet};

fn small(model: &str) -> Config {
    let text = format!(
        "model: {{name: {model}, layers: 1, width: 8, state: 4}}\ntask: {{ambiguities: 2, depth: 2}}"
    );
    parse(&text, "test", &[]).unwrap()
}

fn written(model: &str, path: &Path) -> Vec<u8> {
    let config = small(model);
    let net = RecNet::new(&config.model, 3, 5, 7, DType::F32, &Device::Cpu).unwrap();
    Checkpoint::save(path, &config, &net, 12).unwrap();
    std::fs::read(path).unwrap()
}

/// Opens these bytes as a checkpoint, and makes the model if that goes well.
fn open(dir: &Path, bytes: &[u8]) -> Result<(), TestCaseError> {
    let path = dir.join("fuzzed.safetensors");
    std::fs::write(&path, bytes).unwrap();
    if let Err(error) = Checkpoint::open(&path).and_then(|c| c.model(&Device::Cpu)) {
        let text = format!("{error:#}");
        prop_assert_eq!(exit_code(&error), 2, "{}", text);
        prop_assert_eq!(text.lines().count(), 1, "{}", text);
    }
    Ok(())
}

#[test]
fn what_was_saved_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    for model in MODELS {
        let path = dir.path().join("c.safetensors");
        let bytes = written(model.name, &path);
        let checkpoint = Checkpoint::open(&path).unwrap();
        assert_eq!(checkpoint.config, small(model.name));
        assert_eq!((checkpoint.step, checkpoint.features, checkpoint.classes), (12, 3, 5));
        checkpoint.write(&path).unwrap();
        assert!(std::fs::read(&path).unwrap() == bytes, "{}: the bytes changed", model.name);
    }
}

#[test]
fn a_file_that_was_cut_off_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = written("mamba2", &dir.path().join("c.safetensors"));
    for len in (0..bytes.len()).step_by(bytes.len() / 200) {
        std::fs::write(dir.path().join("cut"), &bytes[..len]).unwrap();
        let error = Checkpoint::open(&dir.path().join("cut")).err().expect("a cut file is refused");
        assert_eq!(exit_code(&error), 2);
        assert!(error.to_string().contains("cut is no whole safetensors file"), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        open(tempfile::tempdir().unwrap().path(), &bytes)?;
    }

    /// A header of any JSON-like text with a right length in front.
    #[test]
    fn any_header(header in "[\\[\\]{}:,\"a-z0-9_. -]{0,300}", body in prop::collection::vec(any::<u8>(), 0..64)) {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(body);
        open(tempfile::tempdir().unwrap().path(), &bytes)?;
    }

    /// A good checkpoint with some bytes changed, mostly in its header.
    #[test]
    fn changed_bytes(changes in prop::collection::vec((0.0..1.0f64, any::<u8>(), any::<bool>()), 1..6)) {
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = written("gated_delta_net", &dir.path().join("c.safetensors"));
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize + 8;
        for (place, value, anywhere) in changes {
            let range = if anywhere { bytes.len() } else { header };
            bytes[(place * range as f64) as usize] = value;
        }
        open(dir.path(), &bytes)?;
    }

    /// Digits of the header changed: other shapes, offsets, sizes, all of them plausible.
    #[test]
    fn changed_digits(changes in prop::collection::vec((any::<prop::sample::Index>(), b'0'..=b'9'), 1..4)) {
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = written("transformer", &dir.path().join("c.safetensors"));
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize + 8;
        let digits: Vec<usize> = (8..header).filter(|&i| bytes[i].is_ascii_digit()).collect();
        for (index, digit) in changes {
            bytes[digits[index.index(digits.len())]] = digit;
        }
        open(dir.path(), &bytes)?;
    }
}
