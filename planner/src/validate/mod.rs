//! Holds predictions against measured runs of other people: errors by source, verdicts, and fits of the few parameters.

mod case;
mod columns;
mod fit;
mod plot;
mod recipe;
mod row;
mod score;
mod traced;
mod words;

pub use case::{Case, case};
pub use fit::{CrossValidation, Fit, FitError, Split, cross_validate, cross_validate_folds, fit};
pub use plot::scatter;
pub use recipe::{Recipe, recipe};
pub use row::{NEEDED, ReadError, Row, read};
pub use score::{Scored, SourceScore, Verdicts, quantile, score};
pub use traced::{TraceFit, TraceFitError, TracedProduct, fit_trace};

use crate::predict::ClusterPrediction;
use paceline_sim::cluster::Physics;
use rayon::prelude::*;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;

/// What a validation comes to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Validation {
    /// The document's kind.
    pub format: &'static str,
    /// Scores by source, in the order of their names.
    pub sources: Vec<SourceScore>,
    /// Every predicted run, in the order of the file.
    pub rows: Vec<Scored>,
}

/// A file's runs: those that can be predicted, and why the others cannot.
#[derive(Debug, Clone, Default)]
pub struct Cases {
    /// In the order of the file.
    pub cases: Vec<Case>,
    /// Rows of every source, and reasons to skip.
    pub sources: BTreeMap<String, (usize, BTreeMap<String, usize>)>,
}

/// Reads a file of measured runs.
///
/// # Errors
/// When it is no such file.
pub fn load(text: &str) -> Result<Cases, ReadError> {
    let mut all = Cases::default();
    for row in read(text)? {
        let source = match row.text("source") {
            "" => row.text("id").rsplit_once('-').map_or("unnamed", |(s, _)| s).to_owned(),
            s => s.to_owned(),
        };
        let (rows, skipped) = all.sources.entry(source).or_default();
        *rows += 1;
        match case(&row) {
            Ok(case) => {
                if let Some(reason) = case.time_skipped {
                    *skipped.entry(format!("time: {reason}")).or_default() += 1;
                }
                all.cases.push(case);
            }
            Err(reason) => *skipped.entry(reason).or_default() += 1,
        }
    }
    Ok(all)
}

const GIB: f64 = (1u64 << 30) as f64;

fn scored(case: &Case, prediction: &ClusterPrediction) -> Scored {
    let peaks = if case.allocated { &prediction.memory.allocated_bytes } else { &prediction.memory.peak_bytes };
    let layout = &case.layout;
    let speed = |seconds: f64| (layout.global_batch() * layout.seq) as f64 / seconds / layout.gpus() as f64;
    Scored {
        id: case.id.clone(),
        source: case.source.clone(),
        predicted_iteration_seconds: prediction.iteration_seconds,
        measured_iteration_seconds: case.seconds,
        predicted_peak_gib: peaks.iter().copied().fold(0.0, f64::max) / GIB,
        measured_peak_gib: case.peak_gib,
        predicted_oom: !prediction.memory.fits,
        measured_oom: case.oom,
        sweep: format!("{} {} {} {}", case.model.name, layout.seq, layout.gpus(), layout.global_batch()),
        speed: case.seconds.map(speed),
        predicted_speed: speed(prediction.iteration_seconds),
    }
}

/// Predicts every run and scores the predictions.
pub fn validate(mut all: Cases, physics: &Physics) -> Validation {
    let predicted: Vec<Result<Scored, (String, String)>> = all
        .cases
        .par_iter()
        .map(|case| {
            let prediction = case.predict(physics);
            prediction.map(|p| scored(case, &p)).map_err(|e| (case.source.clone(), e.to_string()))
        })
        .collect();
    let mut rows = Vec::with_capacity(predicted.len());
    for result in predicted {
        match result {
            Ok(row) => rows.push(row),
            Err((source, reason)) => {
                let (_, skipped) = all.sources.entry(source).or_default();
                *skipped.entry(reason).or_default() += 1;
            }
        }
    }
    let sources = all
        .sources
        .into_iter()
        .map(|(source, (count, skipped))| {
            let own: Vec<&Scored> = rows.iter().filter(|r| r.source == source).collect();
            score(&source, count, skipped, &own)
        })
        .collect();
    Validation { format: "paceline.validation/1", sources, rows }
}

impl Validation {
    /// The document of `validate --json`, with the rows or without.
    ///
    /// # Errors
    /// When a figure is no finite number, which JSON cannot hold.
    pub fn to_json(&self, rows: bool) -> Result<serde_json::Value, serde_json::Error> {
        let mut document = serde_json::to_value(self)?;
        if let Some(object) = document.as_object_mut().filter(|_| !rows) {
            object.remove("rows");
        }
        Ok(document)
    }

    /// Every run as CSV, with its prediction.
    pub fn to_csv(&self) -> String {
        let mut text = String::from(
            "id,source,measured_iteration_seconds,predicted_iteration_seconds,measured_peak_gib,predicted_peak_gib,measured_oom,predicted_oom\n",
        );
        let cell = |value: Option<f64>| value.map_or(String::new(), |v| v.to_string());
        for row in &self.rows {
            let _ = writeln!(
                text,
                "{},{},{},{},{},{},{},{}",
                row.id,
                row.source,
                cell(row.measured_iteration_seconds),
                row.predicted_iteration_seconds,
                cell(row.measured_peak_gib),
                row.predicted_peak_gib,
                row.measured_oom,
                row.predicted_oom
            );
        }
        text
    }

    /// The scores as a table in Markdown.
    pub fn to_markdown(&self) -> String {
        let mut text = String::from(
            "| source | rows | timed | time median | p90 | bias | peaks | memory median | p90 | bias | OOM right | rank | regret |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
        );
        let percent = |value: Option<f64>| value.map_or("–".to_owned(), |v| format!("{:.1} %", 100.0 * v));
        for s in &self.sources {
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
                s.source,
                s.rows,
                s.scored_time,
                percent(s.time_median_error),
                percent(s.time_p90_error),
                percent(s.time_bias),
                s.scored_memory,
                percent(s.memory_median_error),
                percent(s.memory_p90_error),
                percent(s.memory_bias),
                percent(s.oom.right()),
                s.rank_correlation.map_or("–".to_owned(), |r| format!("{r:.2}")),
                percent(s.regret),
            );
        }
        text
    }
}

#[cfg(test)]
mod tests;
