//! `selectivbench models`: what there is, how large it gets, and which width a budget buys.

use std::path::PathBuf;

use serde_json::json;

use super::{print, table};
use crate::bail_input;
use crate::config::{Auto, MOST_LAYERS, MOST_SIZE, ModelConfig, count};
use crate::model::{self, Dims, MODELS};

/// List the models with their parameter counts and state sizes.
///
/// Sizes are for the given width and layers, or, with --budget, for the width whose parameter count
/// comes nearest to the budget: equal width is not equal size.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  selectivbench models
  selectivbench models --width 512 --layers 4
  selectivbench models --budget 5e6")]
pub struct ModelsArgs {
    /// Take layers, state size, vocabulary and classes from this configuration
    #[arg(long, value_name = "CONFIG.yaml")]
    config: Option<PathBuf>,
    /// Model width
    #[arg(long, conflicts_with = "budget")]
    width: Option<usize>,
    /// Number of layers
    #[arg(long)]
    layers: Option<usize>,
    /// State size N of mamba and mamba2
    #[arg(long)]
    state: Option<usize>,
    /// Trained parameters to aim at; 5e6 and 5000000 are the same
    #[arg(long, value_name = "N")]
    budget: Option<f64>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: ModelsArgs) -> anyhow::Result<()> {
    let config = match &args.config {
        Some(path) => crate::config::load::load(path, &[])?,
        None => crate::config::load::defaults(),
    };
    let (features, classes) = (config.task.vocab(), config.task.classes());
    let base = ModelConfig {
        width: args.width.unwrap_or(config.model.width),
        layers: args.layers.unwrap_or(config.model.layers),
        state: args.state.unwrap_or(config.model.state),
        heads: Auto::AUTO,
        ..config.model
    };
    count("--width", base.width, 1..=MOST_SIZE)?;
    count("--layers", base.layers, 1..=MOST_LAYERS)?;
    count("--state", base.state, 1..=MOST_SIZE)?;
    let budget = match args.budget {
        Some(budget) if (1.0..=1e12).contains(&budget) => Some(budget as usize),
        Some(budget) => bail_input!("--budget is {budget}; it must be between 1 and 1e12 parameters"),
        None => None,
    };

    let mut rows = Vec::new();
    for model in MODELS {
        let mut config = ModelConfig { name: model.name.to_string(), ..base.clone() };
        if let Some(budget) = budget {
            config.width = model::width_for_budget(&config, features, classes, budget)?;
        }
        // At one given width, a model that cannot have it is still worth listing.
        let counted = Dims::new(&config)
            .and_then(|dims| Ok((model::count_parameters(&config, features, classes)?, dims)));
        rows.push((model, config.width, counted));
    }

    if args.json {
        let list: Vec<_> = rows
            .iter()
            .map(|(model, width, counted)| {
                let (parameters, dims) = counted.as_ref().map_or((None, None), |(p, d)| (Some(p), Some(d)));
                json!({
                    "name": model.name,
                    "recurrence": model.recurrence,
                    "reference": model.reference,
                    "width": width,
                    "layers": base.layers,
                    "heads": dims.map(|dims| dims.heads),
                    "parameters": parameters,
                    "state_per_layer": dims.and_then(|dims| (model.state_size)(dims)),
                })
            })
            .collect();
        return print(serde_json::to_string_pretty(&list)?);
    }

    let mut table =
        table(&["model", "width", "heads", "parameters", "state/layer", "recurrence", "reference"], 1..5);
    for (model, width, counted) in &rows {
        let (heads, parameters, state) = match counted {
            Ok((parameters, dims)) => (
                dims.heads.to_string(),
                grouped(*parameters),
                (model.state_size)(dims).map_or("grows with T".into(), grouped),
            ),
            Err(_) => ("-".into(), "not at this width".into(), "-".into()),
        };
        table.add_row([
            model.name,
            &width.to_string(),
            &heads,
            &parameters,
            &state,
            model.recurrence,
            model.reference,
        ]);
    }
    print(table)?;
    print(format_args!(
        "{} layers, {features} input features, {classes} classes, state {}; state sizes are in floats",
        base.layers, base.state
    ))
}

/// 1234567 as "1,234,567".
pub(super) fn grouped(n: usize) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}
