//! Which model wins, by how much, at what cost: one paragraph for a task.

use super::data::{Data, TaskGroup};
use super::tables::{percent, seconds};
use crate::train::count;

/// The findings of a task, in sentences.
pub fn findings(data: &Data, task: &TaskGroup) -> String {
    let ranking = data.ranking(task);
    let Some(&first) = ranking.first() else { return String::new() };
    let label = |setting: usize| &data.settings[setting].label[..];
    let best = &data.settings[first];
    let Some(accuracy) = data.chosen(best).accuracy else { return String::new() };
    let runs = data.chosen_runs(best);
    let mut text = match ranking.len() {
        1 => format!("{} reaches {}", label(first), percent(accuracy.mean)),
        _ => format!("{} is the most accurate: {}", label(first), percent(accuracy.mean)),
    };
    match accuracy.sd {
        Some(sd) => text += &format!(" ± {:.2} (standard deviation, n = {})", 100.0 * sd, accuracy.n),
        None => text += " (one seed)",
    }
    if let Some(ceiling) = data.over_seeds(best, |run| run.summary.ceiling) {
        text += &format!(", {:.1} % of the Bayes ceiling", 100.0 * accuracy.mean / ceiling.mean);
    }
    text += ".";
    if let Some(&second) = ranking.get(1) {
        text += &match data.lead(first, second) {
            None => format!(" {} is next; they have no seed in common.", label(second)),
            Some(lead) => {
                let points = 100.0 * lead.mean;
                match lead.interval().map(|half| (points - 100.0 * half, points + 100.0 * half)) {
                    None => format!(" It leads {} by {points:.2} points on one seed.", label(second)),
                    Some((low, high)) => format!(
                        " It leads {} by {points:.2} points; the 95 % interval over {} common seeds is {low:.2} \
                         to {high:.2}{}.",
                        label(second),
                        lead.n,
                        if low > 0.0 { "" } else { ", so the order is not certain" },
                    ),
                }
            }
        };
    }
    let time = |setting: usize| data.over_seeds(&data.settings[setting], |run| run.summary.seconds);
    if let Some(taken) = time(first) {
        text += &format!(" A run takes {}", seconds(taken.mean));
        text += &match runs[0].summary.state_size {
            Some(floats) => format!(" and carries {} numbers of state", count(floats as f64)),
            None => " and carries a state that grows with the sequence".into(),
        };
        let others = ranking[1..].iter().filter_map(|&setting| Some((setting, time(setting)?.mean)));
        text += &match others.min_by(|a, b| a.1.total_cmp(&b.1)) {
            Some((setting, least)) if least < taken.mean => {
                format!("; the fastest, {}, takes {}.", label(setting), seconds(least))
            }
            Some(_) => "; none is faster.".into(),
            None => ".".into(),
        };
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::data::tests::data;
    use super::super::read::tests::made_up;
    use super::*;

    #[test]
    fn the_winner_its_lead_and_its_cost() {
        let run = |model: &str, seed: u64, accuracy: f64, seconds: f64| {
            let mut run = made_up(&[&format!("model.name={model}"), &format!("seed={seed}")], 0.5, accuracy);
            run.summary.seconds = seconds;
            run
        };
        let data = data(vec![
            run("gla", 1, 0.70, 10.0),
            run("gla", 2, 0.80, 10.0),
            run("mamba2", 1, 0.60, 5.0),
            run("mamba2", 2, 0.72, 5.0),
        ]);
        let text = findings(&data, &data.tasks[0]);
        assert!(
            text.starts_with("gla is the most accurate: 75.00 % ± 7.07 (standard deviation, n = 2)"),
            "{text}"
        );
        assert!(text.contains("leads mamba2 by 9.00 points"), "{text}");
        // 12.7062 · 1.414 / √2
        assert!(text.contains("-3.71 to 21.71, so the order is not certain"), "{text}");
        assert!(text.ends_with("the fastest, mamba2, takes 5.0 s."), "{text}");
    }

    #[test]
    fn one_run_says_so() {
        let data = data(vec![made_up(&[], 0.5, 0.5)]);
        let text = findings(&data, &data.tasks[0]);
        assert!(text.starts_with("mamba2 reaches 50.00 % (one seed), 52.6 %"), "{text}");
    }
}
