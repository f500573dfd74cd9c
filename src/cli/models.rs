//! `selectivbench models`: what there is and what it is made of, how large it gets, and which width a budget buys.

use std::path::PathBuf;

use serde_json::json;

use super::{print, table};
use crate::bail_input;
use crate::config::{Config, MOST_LAYERS, MOST_SIZE, count, load};
use crate::model::{self, Dims, Grain, MODELS, Model, Taxonomy};

/// List the models with their sizes and their taxonomy: transition, decay, delta rule, gate, eigenvalues.
///
/// Sizes are for the given width and layers, or, with --budget, for the width whose parameter count
/// comes nearest to the budget: equal width is not equal size. With a part switched in the
/// configuration or by --set, both tables are of the models as they then are.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  selectivbench models
  selectivbench models --width 512 --layers 4
  selectivbench models --budget 5e6
  selectivbench models --set model.decay=off --json")]
pub struct ModelsArgs {
    /// Take layers, state size, switched parts, vocabulary and classes from this configuration
    #[arg(long, value_name = "CONFIG.yaml")]
    config: Option<PathBuf>,
    /// Override a field: --set model.output_gate=off (repeatable)
    #[arg(long, value_name = "KEY.PATH=VALUE")]
    set: Vec<String>,
    /// Model width
    #[arg(long, conflicts_with = "budget")]
    width: Option<usize>,
    /// Number of layers
    #[arg(long)]
    layers: Option<usize>,
    /// State size N of mamba, mamba2 and s4
    #[arg(long)]
    state: Option<usize>,
    /// Trained parameters to aim at; 5e6 and 5000000 are the same
    #[arg(long, value_name = "N")]
    budget: Option<f64>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A model as it is configured.
struct Row {
    model: &'static Model,
    config: Config,
    dims: Dims,
    parameters: usize,
    taxonomy: Taxonomy,
}

impl Row {
    fn new(model: &'static Model, args: &ModelsArgs, budget: Option<usize>) -> anyhow::Result<Self> {
        // With a budget, a width that every number of heads of the `auto` rule divides stands in for the one to come.
        let width = if budget.is_some() { Some(64) } else { args.width };
        let sizes = [("width", width), ("layers", args.layers), ("state", args.state)];
        let sizes = sizes.iter().filter_map(|(field, size)| Some(format!("model.{field}={}", (*size)?)));
        let sets: Vec<String> = std::iter::once("model.heads=auto".to_string())
            .chain(args.set.iter().cloned())
            .chain(sizes)
            .chain([format!("model.name={}", model.name)])
            .collect();
        let mut config = match &args.config {
            Some(path) => load::load(path, &sets)?,
            None => load::parse("{}", "the defaults", &sets)?,
        };
        let (features, classes) = (config.task.features()?, config.task.classes());
        if let Some(budget) = budget {
            // The number of heads that the width to come has.
            config.model.heads = crate::config::Auto::AUTO;
            config.model.width = model::width_for_budget(&config.model, features, classes, budget)?;
        }
        let dims = Dims::new(model, &config.model)?;
        let parameters = model::count_parameters(&config.model, features, classes)?;
        let taxonomy = model.taxonomy(&dims);
        Ok(Self { model, config, dims, parameters, taxonomy })
    }
}

pub fn run(args: ModelsArgs) -> anyhow::Result<()> {
    for (flag, size, most) in [
        ("--width", args.width, MOST_SIZE),
        ("--layers", args.layers, MOST_LAYERS),
        ("--state", args.state, MOST_SIZE),
    ] {
        size.map_or(Ok(()), |size| count(flag, size, 1..=most))?;
    }
    let budget = match args.budget {
        Some(budget) if (1.0..=1e12).contains(&budget) => Some(budget as usize),
        Some(budget) => bail_input!("--budget is {budget}; it must be between 1 and 1e12 parameters"),
        None => None,
    };
    let rows = MODELS.iter().map(|model| (model.name, Row::new(model, &args, budget)));
    let (rows, refused): (Vec<_>, Vec<_>) = rows.partition(|(_, row)| row.is_ok());
    let rows: Vec<Row> = rows.into_iter().filter_map(|(_, row)| row.ok()).collect();
    let mut refused: Vec<_> =
        refused.into_iter().filter_map(|(name, row)| Some((name, row.err()?))).collect();
    // What fits no model is wrong in itself.
    let Some(first) = rows.first() else { return Err(refused.remove(0).1) };

    if args.json {
        let described = rows.iter().map(|Row { model, config, dims, parameters, taxonomy }| {
            let mut row = json!({
                "name": model.name,
                "recurrence": (model.recurrence)(&dims.parts),
                "reference": model.reference,
                "width": dims.width,
                "layers": config.model.layers,
                "heads": dims.heads,
                "parameters": parameters,
            });
            let (Some(row_fields), serde_json::Value::Object(taxonomy)) =
                (row.as_object_mut(), serde_json::to_value(taxonomy)?)
            else {
                unreachable!("both are objects")
            };
            row_fields.extend(taxonomy);
            Ok(row)
        });
        let refused =
            refused.iter().map(|(name, why)| Ok(json!({"name": name, "refused": format!("{why:#}")})));
        let list: Vec<_> = described.chain(refused).collect::<anyhow::Result<_>>()?;
        return print(serde_json::to_string_pretty(&list)?);
    }

    let mut sizes =
        table(&["model", "width", "heads", "parameters", "state/layer", "recurrence", "reference"], 1..5);
    let mut kinds = table(
        &[
            "model",
            "transition",
            "decay",
            "mixes channels",
            "delta rule",
            "output gate",
            "short conv",
            "eigenvalues",
        ],
        [],
    );
    for Row { model, dims, parameters, taxonomy, .. } in &rows {
        sizes.add_row([
            model.name,
            &dims.width.to_string(),
            &dims.heads.to_string(),
            &grouped(*parameters),
            &taxonomy.state_per_layer.map_or("grows with T".into(), grouped),
            (model.recurrence)(&dims.parts),
            model.reference,
        ]);
        let yes = |part: bool| if part { "yes" } else { "-" };
        let of = match taxonomy.decay {
            None => "-",
            Some(Grain::Head) => "a head",
            Some(Grain::KeyChannel) => "a key channel",
            Some(Grain::State) => "a state",
        };
        let from = if taxonomy.input_dependent_decay { ", from the input" } else { "" };
        let eigenvalues = match taxonomy.eigenvalues {
            None => "-".into(),
            Some([low, high]) if low == high => low.to_string(),
            Some([low, high]) if taxonomy.householders > 1 => format!("[{low}, {high}] a factor"),
            Some([low, high]) => format!("[{low}, {high}]"),
        };
        kinds.add_row([
            model.name,
            &taxonomy.transition,
            &format!("{of}{from}"),
            yes(taxonomy.channel_mixing),
            yes(taxonomy.delta_rule),
            yes(taxonomy.output_gate),
            yes(taxonomy.short_conv),
            &eigenvalues,
        ]);
    }
    print(sizes)?;
    print(kinds)?;
    for (name, why) in refused {
        print(format_args!("not {name}: {why:#}"))?;
    }
    let config = &first.config;
    print(format_args!(
        "{} layers, {} input features, {} classes, state {}; state sizes are in floats",
        config.model.layers,
        config.task.vocab(),
        config.task.classes(),
        config.model.state
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
