//! The page: one HTML file that needs nothing else.
//!
//! Text, tables and static figures are in the HTML; the script (`assets/report.js`) draws the figures
//! from JSON in the page, so that filters act on them, and shows what stands behind a point or a row.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::path::{Component, Path, PathBuf};

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::data::{Data, TaskGroup, place};
use super::figures::{Figure, Line, Panel, curve};
use super::read::{Fields, Run};
use super::stats::student;
use super::style::{DARK, marker};
use super::tables::{self, Table, percent, seconds};
use super::{METHOD, Report, chart, file_name, findings, said};
use crate::config::Objective;
use crate::plot::{self, COLOURS};
use crate::train::{count, split_name};

const HTML: &str = include_str!("../../assets/report.html");
const CSS: &str = include_str!("../../assets/report.css");
const JS: &str = include_str!("../../assets/report.js");

/// Bytes of static figures in the page, at most; they serve readers without JavaScript.
const STATIC: usize = 1_500_000;

/// Tasks whose summaries are open at once.
const OPEN: usize = 6;

/// The page of a report that stands in `out`.
pub fn page(report: &Report, out: &Path) -> Result<String> {
    let data = report.data;
    let candidates = tables::candidates(data);
    let choice = match candidates.rows.is_empty() {
        true => String::new(),
        false => format!(
            "<section id=\"choice\" aria-labelledby=\"choice-title\"><h2 id=\"choice-title\">How the \
             hyper-parameters were chosen</h2>\n<p class=\"muted\">Candidates differ only in {}; the one with the \
             highest mean validation accuracy over seeds stands for its setting. The test has no say.</p>\n{}</section>",
            escape(&data.tuned.join(", ")),
            table(&candidates, "group")
        ),
    };
    let choice_link = if candidates.rows.is_empty() { "" } else { "<a href=\"#choice\">Choice</a> " };
    let remarks = report.remarks();
    let remarks = match remarks.is_empty() {
        true => String::new(),
        false => {
            let items: String = remarks.iter().map(|remark| format!("<li>{}</li>", escape(remark))).collect();
            format!("<h3>What is not in it</h3><ul>{items}</ul>")
        }
    };
    let colours = |palette: &[plotters::style::RGBColor; COLOURS.len()]| {
        let one = |(i, c): (usize, &plotters::style::RGBColor)| {
            format!("--m{i}:#{:02x}{:02x}{:02x};", c.0, c.1, c.2)
        };
        palette.iter().enumerate().map(one).collect::<String>()
    };
    let (light, dark) = (colours(&COLOURS), colours(&DARK));
    // Paper is white, whatever the screen is.
    let colours = format!(
        ":root{{{light}}}\n@media (prefers-color-scheme: dark){{:root{{{dark}}}}}\n@media print{{:root{{{light}}}}}"
    );
    Ok(fill(
        HTML,
        &[
            ("version", env!("CARGO_PKG_VERSION")),
            ("title", "SelectivBench report"),
            ("counted", &format!("{}.", report.counted())),
            ("colours", &colours),
            ("css", CSS),
            ("js", JS),
            ("overview", &overview(data)),
            ("cards", &cards(data)),
            ("figures", &figures(report)?),
            ("settings", &table(&tables::settings(data), "setting")),
            ("choice_link", choice_link),
            ("candidates", &choice),
            ("runs", &table(&tables::runs(data), "run")),
            ("method", &escape(METHOD)),
            ("remarks", &remarks),
            // `</script>` would end the element; in JSON `\u003c` is the same character.
            ("json", &json_of(report, out).to_string().replace('<', "\\u003c")),
        ],
    ))
}

/// Puts values in the place of `{{name}}`; what stands in a value is left alone.
fn fill(template: &str, values: &[(&str, &str)]) -> String {
    let mut parts = template.split("{{");
    let mut out = parts.next().unwrap_or_default().to_string();
    for part in parts {
        let value = part.split_once("}}").and_then(|(name, rest)| {
            values.iter().find(|(known, _)| *known == name).map(|(_, value)| (value, rest))
        });
        match value {
            Some((value, rest)) => out += &format!("{value}{rest}"),
            None => out += &format!("{{{{{part}"),
        }
    }
    out
}

/// Text for HTML, in elements and attributes.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            c => out.push(c),
        }
    }
    out
}

/// The variable of a model's colour.
fn variable(model: &str) -> usize {
    place(model) % COLOURS.len()
}

/// A model's marker as a picture in the text.
fn mark(model: &str) -> String {
    let points: Vec<String> =
        marker(model).into_iter().map(|(x, y)| format!("{:.1},{:.1}", 5.0 * x, 5.0 * y)).collect();
    format!(
        "<svg class=\"mark\" viewBox=\"-8 -8 16 16\" aria-hidden=\"true\"><polygon points=\"{}\" \
         style=\"fill:var(--m{})\"/></svg>",
        points.join(" "),
        variable(model)
    )
}

/// Every model on every task at a glance; nothing for one task.
fn overview(data: &Data) -> String {
    if data.tasks.len() < 2 {
        return String::new();
    }
    let mut models: Vec<&str> = data.settings.iter().map(|setting| &setting.model[..]).collect();
    models.sort_by_key(|model| place(model));
    models.dedup();
    let rankings: Vec<Vec<usize>> = data.tasks.iter().map(|task| data.ranking(task)).collect();
    let mut out = String::from(
        "<div class=\"scroll overview\" tabindex=\"0\" role=\"region\" aria-label=\"All tasks\"><table><thead><tr>\
         <th scope=\"col\">test accuracy</th>",
    );
    for task in &data.tasks {
        let _ = write!(out, "<th scope=\"col\" class=\"num\">{}</th>", escape(&task.label));
    }
    out += "</tr></thead><tbody>\n";
    for model in models {
        let _ =
            write!(out, "<tr data-model=\"{0}\"><th scope=\"row\">{1} {0}</th>", escape(model), mark(model));
        for ranking in &rankings {
            let at = ranking.iter().position(|&setting| data.settings[setting].model == model);
            let setting = at.map(|at| &data.settings[ranking[at]]);
            let _ = match setting.and_then(|setting| data.chosen(setting).accuracy) {
                Some(accuracy) => {
                    let class = if at == Some(0) { " class=\"best\"" } else { "" };
                    let sd = accuracy.sd.map_or(String::new(), |sd| format!(" ± {:.1}", 100.0 * sd));
                    write!(
                        out,
                        "<td{class}>{:.1} %<span class=\"muted\">{sd}</span></td>",
                        100.0 * accuracy.mean
                    )
                }
                None => write!(out, "<td></td>"),
            };
        }
        out += "</tr>\n";
    }
    out + "</tbody></table></div>\n"
}

/// The summary of every task.
fn cards(data: &Data) -> String {
    let all: Vec<String> = data.tasks.iter().map(|task| card(data, task)).collect();
    match all.get(OPEN..) {
        Some(rest) if !rest.is_empty() => format!(
            "{}<details><summary>{} more tasks</summary><div class=\"cards\">{}</div></details>",
            all[..OPEN].concat(),
            rest.len(),
            rest.concat()
        ),
        _ => all.concat(),
    }
}

fn card(data: &Data, task: &TaskGroup) -> String {
    let ranking = data.ranking(task);
    let mut rows = String::new();
    for &setting in &ranking {
        let known = &data.settings[setting];
        let (Some(accuracy), Some(ceiling), Some(time)) = (
            data.chosen(known).accuracy,
            data.over_seeds(known, |run| run.summary.ceiling),
            data.over_seeds(known, |run| run.summary.seconds),
        ) else {
            continue;
        };
        let run = data.chosen_runs(known)[0];
        let state =
            run.summary.state_size.map_or("state grows".into(), |x| format!("state {}", count(x as f64)));
        let sd = accuracy.sd.map_or("n = 1".into(), |sd| format!("± {:.2}", 100.0 * sd));
        let few = if data.chosen(known).incomplete { " · fewer seeds than others" } else { "" };
        let _ = write!(
            rows,
            "<li data-setting=\"{setting}\"><span>{} <a href=\"#setting-{setting}\">{}</a></span>\
             <span class=\"bar\" aria-hidden=\"true\"><i style=\"width:{:.2}%;background:var(--m{})\"></i>\
             <b style=\"left:{:.2}%\"></b></span>\
             <span class=\"value\"><b>{}</b> <span class=\"muted\">{sd}</span></span>\
             <span class=\"cost\">{} parameters · {state} · {}{few}</span></li>",
            mark(&known.model),
            escape(&known.label),
            100.0 * accuracy.mean.clamp(0.0, 1.0),
            variable(&known.model),
            100.0 * ceiling.mean.clamp(0.0, 1.0),
            percent(accuracy.mean),
            count(run.summary.parameters as f64),
            seconds(time.mean),
        );
    }
    let run = &data.runs[data.groups[data.settings[task.settings[0]].chosen].runs[0]];
    let summary = &run.summary;
    let emulated = if summary.emulate.is_empty() { "" } else { ", as the released code" };
    format!(
        "<article class=\"card\"><h3>{} <small>{} states · {}{}{emulated} · {} · version {}</small></h3>\n<p>{}</p>\n\
         <ol class=\"rank\">{rows}</ol></article>\n",
        escape(&task.label),
        run.config.task.states(),
        if run.config.task.objective == Objective::Predict { "next symbol · " } else { "" },
        split_name(summary.split),
        escape(&summary.precision),
        escape(&summary.version),
        escape(&findings(data, task)),
    )
}

/// The figures as pictures, which the script replaces.
fn figures(report: &Report) -> Result<String> {
    let (mut out, mut bytes) = (String::new(), 0);
    for (i, figure) in report.figures.iter().enumerate() {
        let mut plots = String::new();
        for panel in &figure.panels {
            let svg = if bytes < STATIC { plot::svg(&chart(figure, panel))? } else { String::new() };
            bytes += svg.len();
            plots += &match svg.is_empty() {
                false => svg,
                true => {
                    let name = file_name(figure, panel);
                    format!("<p><a href=\"figures/{name}.svg\">{}</a></p>", escape(&panel.label))
                }
            };
        }
        let _ = write!(
            out,
            "<div class=\"figure\" id=\"{}\"><h3>{}</h3>\n<p class=\"muted\">{}</p>\n\
             <div class=\"plots\" data-figure=\"{i}\"><noscript>{plots}</noscript></div></div>\n",
            figure.id,
            escape(figure.title),
            escape(figure.about),
        );
    }
    Ok(out)
}

/// A table that can be sorted; rows lead to what they are about.
fn table(table: &Table, kind: &str) -> String {
    let (table, constant) = table.split();
    let mut out = String::from(
        "<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"Table\"><table class=\"sortable\"><thead><tr>",
    );
    for column in &table.columns {
        let class = if column.number { " class=\"num\"" } else { "" };
        let _ = write!(
            out,
            "<th scope=\"col\" data-key=\"{}\"{class}>{}</th>",
            escape(&column.key),
            escape(&column.name)
        );
    }
    out += "</tr></thead><tbody>\n";
    for (cells, about) in table.rows.iter().zip(&table.about) {
        let id = if kind == "group" { String::new() } else { format!(" id=\"{kind}-{about}\"") };
        let chosen = table
            .columns
            .iter()
            .zip(cells)
            .any(|(column, cell)| column.key == "chosen" && cell.text == "yes");
        let class = if chosen { " class=\"chosen\"" } else { "" };
        let _ = write!(out, "<tr data-about=\"{about}\"{id}{class}>");
        for (at, (column, cell)) in table.columns.iter().zip(cells).enumerate() {
            let mut text = escape(&cell.text);
            if at == 0 && kind != "group" {
                text = format!("<a href=\"#{kind}-{about}\">{text}</a>");
            }
            let class = match (column.number, &column.key[..]) {
                (true, _) => " class=\"num\"",
                (false, "reason") => " class=\"wrap\"",
                _ => "",
            };
            let value = if cell.raw == cell.text {
                String::new()
            } else {
                format!(" data-v=\"{}\"", escape(&cell.raw))
            };
            let _ = write!(out, "<td{class}{value}>{text}</td>");
        }
        out += "</tr>\n";
    }
    out += "</tbody></table></div>";
    if !constant.is_empty() {
        let _ = write!(out, "<p class=\"small muted\">All: {}.</p>", escape(&said(&constant)));
    }
    out
}

/// What the script draws from.
fn json_of(report: &Report, out: &Path) -> Value {
    let data = report.data;
    let mut names: Vec<&str> = data.settings.iter().map(|setting| &setting.model[..]).collect();
    names.sort_by_key(|name| place(name));
    names.dedup();
    let model = |name: &str| names.iter().position(|known| *known == name);
    let models: Vec<Value> = names
        .iter()
        .map(|name| {
            let points: Vec<_> = marker(name).into_iter().map(|(x, y)| [rounded(x), rounded(y)]).collect();
            json!({"name": name, "colour": variable(name), "marker": points})
        })
        .collect();

    let group_of = data.group_of();
    let configs: Vec<&Fields> = data.runs.iter().map(|run| &run.fields).collect();
    let (config, config_of) = common(&configs);
    let origins: Vec<Fields> = data.runs.iter().map(provenance).collect();
    let (origin, origin_of) = common(&origins.iter().collect::<Vec<_>>());
    let mut grids: Vec<Vec<f64>> = Vec::new();
    let mut grid_of: HashMap<String, usize> = HashMap::new();
    let here = std::path::absolute(out).unwrap_or_else(|_| out.to_path_buf());
    let mut runs = Vec::new();
    for (i, run) in data.runs.iter().enumerate() {
        let summary = &run.summary;
        let (xs, ys): (Vec<f64>, Vec<f64>) = curve(run).into_iter().unzip();
        let grid = *grid_of.entry(format!("{xs:?}")).or_insert_with(|| {
            grids.push(xs);
            grids.len() - 1
        });
        let tests: Vec<_> = summary
            .tests
            .iter()
            .map(|test| {
                let evaluation = &test.evaluation;
                [test.gap, rounded(evaluation.accuracy), rounded(test.ceiling), rounded(evaluation.loss)]
            })
            .collect();
        let group = group_of[i];
        runs.push(json!({
            "name": run.name,
            "folder": relative(&run.dir, &here),
            "model": model(&summary.model),
            "task": data.settings[data.groups[group].setting].task,
            "width": run.config.model.width,
            // Seeds may be larger than what JavaScript counts exactly.
            "seed": summary.seed.to_string(),
            "group": group,
            "config": config_of[i],
            "accuracy": rounded(summary.accuracy),
            "ceiling": rounded(summary.ceiling),
            "loss": rounded(summary.loss),
            "validation": run.last_validation().map(rounded),
            "parameters": summary.parameters,
            "state": summary.state_size,
            "seconds": rounded(summary.seconds),
            "speed": summary.tokens_per_s.round(),
            "tests": tests,
            "grid": grid,
            "curve": ys.iter().map(|y| (y * 1e4).round() as i64).collect::<Vec<_>>(),
            "provenance": origin_of[i],
        }));
    }
    let stats = |stats: Option<super::stats::Stats>| {
        stats.map(|stats| json!([rounded(stats.mean), stats.sd.map(rounded)]))
    };
    let groups: Vec<Value> = data
        .groups
        .iter()
        .map(|group| {
            json!({
                "setting": group.setting,
                "tuned": group.tuned.iter().map(|(_, value)| value).collect::<Vec<_>>(),
                "runs": group.runs,
                "validation": stats(group.validation),
                "incomplete": group.incomplete,
            })
        })
        .collect();
    let settings: Vec<Value> = data
        .settings
        .iter()
        .map(|setting| {
            json!({
                "label": setting.label, "task": setting.task, "model": model(&setting.model),
                "groups": setting.groups, "chosen": setting.chosen, "reason": setting.reason,
            })
        })
        .collect();
    let most = data.groups.iter().map(|group| group.runs.len()).max().unwrap_or(1);
    json!({
        "models": models,
        "tasks": data.tasks.iter().map(|task| &task.label).collect::<Vec<_>>(),
        "tuned": data.tuned.iter().map(|key| super::data::short(key)).collect::<Vec<_>>(),
        "student": (1..most.max(2)).map(student).collect::<Vec<_>>(),
        "config": config,
        "provenance": origin,
        "grids": grids,
        "runs": runs,
        "groups": groups,
        "settings": settings,
        "figures": report.figures.iter().map(|figure| figure_json(figure, &model)).collect::<Vec<_>>(),
    })
}

fn figure_json(figure: &Figure, model: &dyn Fn(&str) -> Option<usize>) -> Value {
    let points = |points: &[(f64, f64)]| points.iter().map(|(x, y)| [*x, rounded(*y)]).collect::<Vec<_>>();
    let line = |line: &Line| {
        let mut value = json!({"model": model(&line.model), "label": line.label, "variant": line.variant});
        if line.curve {
            // The points are in the runs.
            let mut runs: Vec<usize> =
                line.points.iter().flat_map(|p| p.values.iter().map(|v| v.run)).collect();
            runs.sort_unstable();
            runs.dedup();
            value["runs"] = json!(runs);
        } else {
            let of = |point: &super::figures::Point| {
                let values: Vec<_> =
                    point.values.iter().map(|v| json!([v.run, rounded(v.x), rounded(v.y)])).collect();
                json!([point.setting, values])
            };
            value["points"] = line.points.iter().map(of).collect();
        }
        value
    };
    let panel = |panel: &Panel| {
        json!({
            "name": panel.label,
            "x": panel.x,
            "y": panel.y,
            "ceiling": points(&panel.ceiling),
            "observers": panel.observers.iter().map(|(k, of)| json!([k, points(of)])).collect::<Vec<_>>(),
            "lines": panel.lines.iter().map(line).collect::<Vec<_>>(),
        })
    };
    json!({
        "title": figure.title,
        "x": {"label": figure.x.label, "log": figure.x.log, "few": figure.x.few},
        "panels": figure.panels.iter().map(panel).collect::<Vec<_>>(),
    })
}

/// Six digits are more than a picture shows.
fn rounded(x: f64) -> f64 {
    format!("{x:.5e}").parse().unwrap_or(x)
}

/// The most frequent value of every key, and for each set what differs from it; `null` where a set has
/// no such key.
fn common(sets: &[&Fields]) -> (Fields, Vec<Map<String, Value>>) {
    let mut counts: BTreeMap<&str, BTreeMap<&str, usize>> = BTreeMap::new();
    for (key, value) in sets.iter().flat_map(|set| set.iter()) {
        *counts.entry(key).or_default().entry(value).or_default() += 1;
    }
    let most = |by: &BTreeMap<&str, usize>| {
        by.iter().max_by_key(|(_, n)| **n).map_or(String::new(), |(value, _)| value.to_string())
    };
    let base: Fields = counts.iter().map(|(key, by)| (key.to_string(), most(by))).collect();
    let differs = |set: &&Fields| {
        let of = |(key, value): (&String, &String)| match set.get(key) {
            Some(own) if own == value => None,
            own => Some((key.clone(), own.map_or(Value::Null, |own| own.clone().into()))),
        };
        base.iter().filter_map(of).collect()
    };
    let differs = sets.iter().map(differs).collect();
    (base, differs)
}

/// Where a run comes from: `run.json`, and what the summary says of it.
fn provenance(run: &Run) -> Fields {
    fn walk(value: &Value, path: &str, out: &mut Fields) {
        match value {
            Value::Object(map) => map.iter().for_each(|(key, value)| {
                walk(value, &if path.is_empty() { key.clone() } else { format!("{path}.{key}") }, out);
            }),
            Value::Null => {}
            Value::String(text) => _ = out.insert(path.into(), text.clone()),
            value => _ = out.insert(path.into(), value.to_string()),
        }
    }
    let summary = &run.summary;
    let mut fields = Fields::new();
    for (key, value) in [
        ("version", summary.version.clone()),
        ("device", summary.device.clone()),
        ("precision", summary.precision.clone()),
        ("objective", run.config.task.objective.name().into()),
        ("split", split_name(summary.split).into()),
        ("emulated", summary.emulate.join("; ")),
        ("data", summary.data.clone()),
        ("threads", summary.threads.to_string()),
    ] {
        if !value.is_empty() {
            fields.insert(key.into(), value);
        }
    }
    run.provenance.iter().for_each(|value| walk(value, "", &mut fields));
    fields
}

/// `path` as seen from the folder `from`, with forward slashes.
fn relative(path: &Path, from: &Path) -> String {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    let shared = path.components().zip(from.components()).take_while(|(a, b)| a == b).count();
    let up = from.components().skip(shared).map(|_| Component::ParentDir);
    let relative: PathBuf = up.chain(path.components().skip(shared)).collect();
    relative.display().to_string().replace('\\', "/")
}

#[cfg(test)]
mod tests {
    use super::super::data::tests::data;
    use super::super::read::tests::made_up;
    use super::*;

    #[test]
    fn templates_are_filled_once() {
        assert_eq!(fill("a {{x}} {{y}} {{z", &[("x", "{{y}}"), ("y", "2")]), "a {{y}} 2 {{z");
    }

    #[test]
    fn folders_are_told_from_where_the_page_is() {
        let of = |path: &str, from: &str| relative(Path::new(path), Path::new(from));
        assert_eq!(of("/a/runs/x", "/a/report"), "../runs/x");
        assert_eq!(of("/a/report/x", "/a/report"), "x");
    }

    #[test]
    fn what_differs_from_most() {
        let set = |pairs: &[(&str, &str)]| -> Fields {
            pairs.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
        };
        let sets = [set(&[("a", "1"), ("b", "x")]), set(&[("a", "1")]), set(&[("a", "2"), ("b", "x")])];
        let (base, differs) = common(&sets.iter().collect::<Vec<_>>());
        assert_eq!(base, set(&[("a", "1"), ("b", "x")]));
        assert_eq!(Value::from(differs[0].clone()), json!({}));
        assert_eq!(Value::from(differs[1].clone()), json!({"b": null}));
        assert_eq!(Value::from(differs[2].clone()), json!({"a": "2"}));
    }

    #[test]
    fn a_page_holds_nothing_from_outside_and_escapes_names() {
        let mut run = made_up(&["task.ambiguities=4", "task.length=12"], 0.5, 0.5);
        run.name = "<b>\"&</script>".into();
        let mut other = made_up(&["task.ambiguities=4", "task.length=12", "seed=2"], 0.4, 0.6);
        other.validation.clear();
        let data = data(vec![run, other]);
        let page = page(&Report::new(&data), Path::new("/report")).unwrap();
        assert!(page.contains("&lt;b&gt;&quot;&amp;&lt;/script&gt;") && !page.contains("<b>\""));
        let text = page.replace("http://www.w3.org/2000/svg", "");
        for outside in ["http:", "https:", "url(", "@import", "src=", "NaN"] {
            assert!(!text.split("<script>").next().unwrap().contains(outside), "{outside}");
        }
        let json = page.split_once("application/json\">").unwrap().1.split_once("</script>").unwrap().0;
        let value: Value = serde_json::from_str(json).unwrap();
        assert_eq!(value["runs"][0]["name"], "<b>\"&</script>");
        assert_eq!(value["runs"].as_array().unwrap().len(), 2);
    }
}
