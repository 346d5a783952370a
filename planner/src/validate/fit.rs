//! Fits the physical parameters to measured runs, every source with the same weight, and checks the fit on sources that it
//! has not seen.
//!
//! Times and peaks count by the absolute logarithm of their ratio, cut off at one e-fold, so that broken runs do not bend the
//! rest; verdicts about memory count by how far the prediction is on the wrong side of the limit. The search is Nelder
//! and Mead's (argmin), in logits of each parameter's place in its range.

use super::{Case, Scored, score, scored};
use argmin::core::{CostFunction, Error, Executor, State};
use argmin::solver::neldermead::NelderMead;
use paceline_sim::cluster::{PARAMETERS, Parameter, Physics};
use rayon::prelude::*;
use serde::Serialize;
use std::collections::BTreeMap;
use thiserror::Error as ThisError;

/// A fit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Fit {
    /// The parameters.
    pub physics: Physics,
    /// The loss at the start.
    pub before: f64,
    /// The loss at the end.
    pub after: f64,
    /// Runs that it is made of.
    pub runs: usize,
}

/// The error of a source by a fit to all others.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CrossValidation {
    /// The source, or the other group, that was left out.
    pub source: String,
    /// Median absolute error of its times.
    pub time_median_error: Option<f64>,
    /// Median absolute error of its peaks.
    pub memory_median_error: Option<f64>,
    /// Share of right verdicts.
    pub oom_right: Option<f64>,
    /// The parameters without it.
    pub physics: Physics,
}

/// A fit that cannot be made.
#[derive(Debug, ThisError)]
pub enum FitError {
    /// Nothing measured.
    #[error("no run has a time, a peak or an out-of-memory outcome that could be fitted")]
    Nothing,
    /// The search failed.
    #[error("fit: {0}")]
    Search(String),
}

/// Runs of a source that take part in a fit at most: enough to show its variety.
const MOST_PER_SOURCE: usize = 160;

/// An evenly spaced choice of the runs of every source; the same every time.
fn choose<'a>(cases: impl Iterator<Item = &'a Case>) -> BTreeMap<&'a str, Vec<&'a Case>> {
    let mut by_source: BTreeMap<&str, Vec<&Case>> = BTreeMap::new();
    for case in cases {
        if (case.seconds.is_some() || case.peak_gib.is_some() || case.oom) && !case.doubtful {
            by_source.entry(&case.source).or_default().push(case);
        }
    }
    for list in by_source.values_mut() {
        let step = list.len().div_ceil(MOST_PER_SOURCE);
        *list = list.iter().copied().step_by(step.max(1)).collect();
    }
    by_source
}

/// Weight of peaks and verdicts beside times.
const MEMORY_WEIGHT: f64 = 1.0;
/// Errors beyond an e-fold count as one.
const CUT: f64 = 1.0;

fn loss(chosen: &BTreeMap<&str, Vec<&Case>>, physics: &Physics) -> f64 {
    let sources: Vec<f64> = chosen
        .values()
        .map(|cases| {
            let errors: Vec<(Option<f64>, Option<f64>)> = cases.par_iter().map(|case| errors(case, physics)).collect();
            let mean = |errors: Vec<f64>| {
                let count = errors.len().max(1) as f64;
                errors.into_iter().sum::<f64>() / count
            };
            mean(errors.iter().filter_map(|e| e.0).collect())
                + MEMORY_WEIGHT * mean(errors.iter().filter_map(|e| e.1).collect())
        })
        .collect();
    sources.iter().sum::<f64>() / sources.len() as f64
}

fn errors(case: &Case, physics: &Physics) -> (Option<f64>, Option<f64>) {
    let Ok(prediction) = case.predict(physics) else {
        return (None, None);
    };
    let distance = |a: f64, b: f64| (a / b).ln().abs().min(CUT);
    let time = case.seconds.map(|t| distance(prediction.iteration_seconds, t));
    let row: Scored = scored(case, &prediction);
    let highest = prediction.memory.peak_bytes.iter().copied().fold(0.0, f64::max);
    let limit = prediction.memory.limit_bytes.max(1.0);
    let memory = match (case.peak_gib, case.oom) {
        (Some(gib), _) => Some(distance(row.predicted_peak_gib, gib)),
        (None, true) => Some(if highest > limit { 0.0 } else { distance(highest, limit) }),
        (None, false) if highest > limit => Some(distance(highest, limit)),
        (None, false) => None,
    };
    (time, memory)
}

/// How strongly a parameter is held at its start: enough that one of which the runs say next to nothing stays sensible.
const HOLD: f64 = 1e-3;

struct Problem<'a, 'b> {
    chosen: &'a BTreeMap<&'b str, Vec<&'b Case>>,
    base: Physics,
    free: &'a [&'static Parameter],
}

fn place(value: f64, (low, high): (f64, f64)) -> f64 {
    let share = ((value - low) / (high - low)).clamp(1e-3, 1.0 - 1e-3);
    (share / (1.0 - share)).ln()
}

fn moved(base: &Physics, free: &[&'static Parameter], places: &[f64]) -> Physics {
    let mut physics = *base;
    for (parameter, place) in free.iter().zip(places) {
        let (low, high) = parameter.range;
        (parameter.set)(&mut physics, low + (high - low) / (1.0 + (-place).exp()));
    }
    physics
}

impl CostFunction for Problem<'_, '_> {
    type Param = Vec<f64>;
    type Output = f64;

    fn cost(&self, places: &Vec<f64>) -> Result<f64, Error> {
        let start = self.free.iter().map(|p| place((p.get)(&self.base), p.range));
        let pull: f64 = places.iter().zip(start).map(|(a, b)| (a - b).powi(2)).sum();
        Ok(loss(self.chosen, &moved(&self.base, self.free, places)) + HOLD * pull)
    }
}

/// The parameters on which the runs depend at all; a fit leaves the others where they are.
fn free(chosen: &BTreeMap<&str, Vec<&Case>>, start: &Physics, before: f64) -> Vec<&'static Parameter> {
    let matters = |parameter: &&'static Parameter| {
        let (low, high) = parameter.range;
        [low, high].into_iter().any(|end| {
            let mut physics = *start;
            (parameter.set)(&mut physics, 0.5 * ((parameter.get)(start) + end));
            loss(chosen, &physics) != before
        })
    };
    PARAMETERS.iter().filter(matters).collect()
}

/// Fits the parameters to runs, beginning at `start`, in at most `evaluations` predictions of all chosen runs.
///
/// # Errors
/// When there is nothing to fit to.
pub fn fit<'a>(cases: impl Iterator<Item = &'a Case>, start: &Physics, evaluations: u64) -> Result<Fit, FitError> {
    let chosen = choose(cases);
    let runs = chosen.values().map(Vec::len).sum();
    if runs == 0 {
        return Err(FitError::Nothing);
    }
    let before = loss(&chosen, start);
    let free = free(&chosen, start, before);
    let mut best: Vec<f64> = free.iter().map(|p| place((p.get)(start), p.range)).collect();
    if best.is_empty() {
        return Ok(Fit { physics: *start, before, after: before, runs });
    }
    // A simplex can collapse early; begun again around its best point, it goes on.
    let steps = [0.8, 0.4, 0.2];
    for step in steps {
        let corner = |n: usize| {
            let mut corner = best.clone();
            corner[n] += step;
            corner
        };
        let simplex = (0..best.len()).map(corner).chain([best.clone()]).collect();
        let search = |e: Error| FitError::Search(e.to_string());
        let solver = NelderMead::new(simplex).with_sd_tolerance(1e-5).map_err(search)?;
        let problem = Problem { chosen: &chosen, base: *start, free: &free };
        let iterations = evaluations / steps.len() as u64;
        let result =
            Executor::new(problem, solver).configure(|state| state.max_iters(iterations)).run().map_err(search)?;
        if let Some(found) = result.state().get_best_param() {
            best.clone_from(found);
        }
    }
    let physics = moved(start, &free, &best);
    Ok(Fit { physics, before, after: loss(&chosen, &physics), runs })
}

/// What is left out of a fit at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Split {
    /// The runs of one source.
    #[default]
    Source,
    /// Those of one GPU.
    Gpu,
    /// Those of one framework, by the first word of its name.
    Launcher,
    /// Those of one family of models, by the letters that their names begin with.
    Family,
}

impl Split {
    fn group(self, case: &Case) -> String {
        let first = |text: &str| {
            let word: String = text.chars().take_while(char::is_ascii_alphabetic).collect();
            if word.is_empty() { "unnamed".to_owned() } else { word.to_ascii_lowercase() }
        };
        match self {
            Split::Source => case.source.clone(),
            Split::Gpu => case.cluster.gpu.name.clone(),
            Split::Launcher => first(&case.framework),
            Split::Family => first(&case.model.name),
        }
    }
}

/// Fits to all runs but those of one group of a split, for each in turn, and scores the group left out.
///
/// # Errors
/// When there is nothing to fit to.
pub fn cross_validate(
    cases: &[Case],
    split: Split,
    start: &Physics,
    evaluations: u64,
) -> Result<Vec<CrossValidation>, FitError> {
    let mut groups: Vec<String> = cases.iter().map(|case| split.group(case)).collect();
    groups.sort_unstable();
    groups.dedup();
    let group = |_: usize, case: &Case| split.group(case);
    groups.iter().map(|left| leave_out(cases, start, evaluations, left, &group)).collect()
}

/// The same with every `folds`-th run left out, for a file of one source: a cluster of one's own.
///
/// # Errors
/// When there is nothing to fit to.
pub fn cross_validate_folds(
    cases: &[Case],
    start: &Physics,
    evaluations: u64,
    folds: usize,
) -> Result<Vec<CrossValidation>, FitError> {
    let folds = folds.clamp(2, cases.len().max(2));
    let group = |n: usize, _: &Case| format!("fold {}", n % folds + 1);
    (1..=folds).map(|n| leave_out(cases, start, evaluations, &format!("fold {n}"), &group)).collect()
}

fn leave_out(
    cases: &[Case],
    start: &Physics,
    evaluations: u64,
    left: &str,
    group: &dyn Fn(usize, &Case) -> String,
) -> Result<CrossValidation, FitError> {
    let (own, others): (Vec<_>, Vec<_>) = cases.iter().enumerate().partition(|(n, case)| group(*n, case) == left);
    let physics = fit(others.into_iter().map(|(_, case)| case), start, evaluations)?.physics;
    let predicted = |(_, case): (usize, &Case)| {
        let prediction = case.predict(&physics).ok()?;
        Some(scored(case, &prediction))
    };
    let rows: Vec<Scored> = own.into_iter().filter_map(predicted).collect();
    let result = score(left, rows.len(), BTreeMap::new(), &rows.iter().collect::<Vec<_>>());
    Ok(CrossValidation {
        source: left.to_owned(),
        time_median_error: result.time_median_error,
        memory_median_error: result.memory_median_error,
        oom_right: result.oom.right(),
        physics,
    })
}
