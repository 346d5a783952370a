//! Errors of predictions by source, verdicts about memory, and how well a prediction ranks the layouts of a sweep.

use serde::Serialize;
use std::collections::BTreeMap;

/// One run with its prediction.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Scored {
    /// The run's id.
    pub id: String,
    /// Where it was published.
    pub source: String,
    /// Predicted seconds of an iteration.
    pub predicted_iteration_seconds: f64,
    /// Measured seconds, where they are scored.
    pub measured_iteration_seconds: Option<f64>,
    /// Predicted peak memory in GiB, in the measurement's counter.
    pub predicted_peak_gib: f64,
    /// Measured peak memory in GiB.
    pub measured_peak_gib: Option<f64>,
    /// Whether it is predicted to run out of memory.
    pub predicted_oom: bool,
    /// Whether it did.
    pub measured_oom: bool,
    /// Identifies the sweep: runs of one model, batch and number of GPUs.
    #[serde(skip)]
    pub sweep: String,
    /// Measured tokens per second and GPU, for ranking.
    #[serde(skip)]
    pub speed: Option<f64>,
    /// Predicted tokens per second and GPU.
    #[serde(skip)]
    pub predicted_speed: f64,
}

/// Out-of-memory verdicts: `positive` means out of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Verdicts {
    /// Predicted and happened.
    pub true_positive: u64,
    /// Predicted, but it ran.
    pub false_positive: u64,
    /// Ran as predicted.
    pub true_negative: u64,
    /// Ran out of memory unexpectedly.
    pub false_negative: u64,
}

impl Verdicts {
    /// Share of right verdicts; `None` without any.
    pub fn right(&self) -> Option<f64> {
        let all = self.true_positive + self.false_positive + self.true_negative + self.false_negative;
        (all > 0).then(|| (self.true_positive + self.true_negative) as f64 / all as f64)
    }
}

/// Scores of one source.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SourceScore {
    /// Its name.
    pub source: String,
    /// Its publishers or collectors doubt it.
    pub low_trust: bool,
    /// Its rows in the file.
    pub rows: usize,
    /// Rows whose time is scored.
    pub scored_time: usize,
    /// Rows whose peak is scored.
    pub scored_memory: usize,
    /// Rows that are not predicted, or whose time is not scored, by reason.
    pub skipped: BTreeMap<String, usize>,
    /// Median of the absolute relative errors of time.
    pub time_median_error: Option<f64>,
    /// Their 90th percentile.
    pub time_p90_error: Option<f64>,
    /// Median of the signed relative errors of time.
    pub time_bias: Option<f64>,
    /// Median of the absolute relative errors of the peak.
    pub memory_median_error: Option<f64>,
    /// Their 90th percentile.
    pub memory_p90_error: Option<f64>,
    /// Median of the signed relative errors of the peak.
    pub memory_bias: Option<f64>,
    /// Verdicts.
    pub oom: Verdicts,
    /// Sweeps of at least four timed layouts.
    pub sweeps: usize,
    /// Median over them of Spearman's rank correlation of predicted and measured speed.
    pub rank_correlation: Option<f64>,
    /// Median over them of what choosing the predicted best costs: `1 - its measured speed / the best measured speed`.
    pub regret: Option<f64>,
    /// The mean of the same.
    pub regret_mean: Option<f64>,
}

/// Sources that their collectors rate low: bars read off a chart, links between GPUs or sharding not known, a single run.
const LOW_TRUST: [&str; 3] = ["simumax-a100pcie", "uci-4xa100", "llmc"];

/// A quantile of some values, interpolated; `None` without any.
pub fn quantile(values: &mut [f64], q: f64) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let last = values.len().checked_sub(1)?;
    let at = q * last as f64;
    let (low, part) = (at.floor() as usize, at.fract());
    Some(values[low] + part * (values[(low + 1).min(last)] - values[low]))
}

/// Scores of one source's rows.
pub fn score(source: &str, rows: usize, skipped: BTreeMap<String, usize>, scored: &[&Scored]) -> SourceScore {
    let time: Vec<f64> = scored
        .iter()
        .filter_map(|s| s.measured_iteration_seconds.map(|t| s.predicted_iteration_seconds / t - 1.0))
        .collect();
    let memory: Vec<f64> =
        scored.iter().filter_map(|s| s.measured_peak_gib.map(|m| s.predicted_peak_gib / m - 1.0)).collect();
    let mut oom = Verdicts::default();
    for s in scored {
        *match (s.predicted_oom, s.measured_oom) {
            (true, true) => &mut oom.true_positive,
            (true, false) => &mut oom.false_positive,
            (false, false) => &mut oom.true_negative,
            (false, true) => &mut oom.false_negative,
        } += 1;
    }
    let absolute = |errors: &[f64], q| quantile(&mut errors.iter().map(|e| e.abs()).collect::<Vec<_>>(), q);
    let (sweeps, mut correlations, mut regrets) = sweeps(scored);
    SourceScore {
        source: source.to_owned(),
        low_trust: LOW_TRUST.contains(&source),
        rows,
        scored_time: time.len(),
        scored_memory: memory.len(),
        skipped,
        time_median_error: absolute(&time, 0.5),
        time_p90_error: absolute(&time, 0.9),
        time_bias: quantile(&mut time.clone(), 0.5),
        memory_median_error: absolute(&memory, 0.5),
        memory_p90_error: absolute(&memory, 0.9),
        memory_bias: quantile(&mut memory.clone(), 0.5),
        oom,
        sweeps,
        rank_correlation: quantile(&mut correlations, 0.5),
        regret_mean: (!regrets.is_empty()).then(|| regrets.iter().sum::<f64>() / regrets.len() as f64),
        regret: quantile(&mut regrets, 0.5),
    }
}

/// Layouts that make a sweep worth ranking.
const LEAST_LAYOUTS: usize = 4;

fn sweeps(scored: &[&Scored]) -> (usize, Vec<f64>, Vec<f64>) {
    let mut by_sweep: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
    for s in scored {
        if let Some(speed) = s.speed {
            // What is predicted not to fit would not be chosen.
            let predicted = if s.predicted_oom { 0.0 } else { s.predicted_speed };
            by_sweep.entry(&s.sweep).or_default().push((predicted, speed));
        }
    }
    by_sweep.retain(|_, points| points.len() >= LEAST_LAYOUTS);
    let mut correlations = Vec::new();
    let mut regrets = Vec::new();
    for points in by_sweep.values() {
        correlations.extend(spearman(points));
        let best = points.iter().map(|p| p.1).fold(0.0, f64::max);
        if let Some(chosen) = points.iter().max_by(|a, b| a.0.total_cmp(&b.0)) {
            regrets.push(1.0 - chosen.1 / best);
        }
    }
    (by_sweep.len(), correlations, regrets)
}

/// Ranks with ties sharing their mean.
fn ranks(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let values: Vec<f64> = values.collect();
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    let mut ranks = vec![0.0; values.len()];
    let mut at = 0;
    while at < order.len() {
        let same = order[at..].iter().take_while(|n| values[**n] == values[order[at]]).count();
        for n in &order[at..at + same] {
            ranks[*n] = at as f64 + (same as f64 - 1.0) / 2.0;
        }
        at += same;
    }
    ranks
}

/// Spearman's rank correlation; `None` when one side does not vary.
fn spearman(points: &[(f64, f64)]) -> Option<f64> {
    let (x, y) = (ranks(points.iter().map(|p| p.0)), ranks(points.iter().map(|p| p.1)));
    let mean = (points.len() as f64 - 1.0) / 2.0;
    let product = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| (a - mean) * (b - mean)).sum() };
    let norm = (product(&x, &x) * product(&y, &y)).sqrt();
    (norm > 0.0).then(|| product(&x, &y) / norm)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(predicted: f64, measured: f64, oom: (bool, bool)) -> Scored {
        Scored {
            id: String::new(),
            source: "s".into(),
            predicted_iteration_seconds: predicted,
            measured_iteration_seconds: (!oom.1).then_some(measured),
            predicted_peak_gib: 1.0,
            measured_peak_gib: None,
            predicted_oom: oom.0,
            measured_oom: oom.1,
            sweep: "a".into(),
            speed: (!oom.1).then_some(1.0 / measured),
            predicted_speed: 1.0 / predicted,
        }
    }

    #[test]
    fn errors_verdicts_and_ranks() {
        let ok = (false, false);
        let runs = [
            run(1.1, 1.0, ok),
            run(1.8, 2.0, ok),
            run(3.0, 3.0, ok),
            run(4.0, 5.0, ok),
            run(1.0, 0.9, (true, false)),
            run(1.0, 1.0, (false, true)),
            run(1.0, 1.0, (true, true)),
        ];
        let refs: Vec<&Scored> = runs.iter().collect();
        let s = score("s", 7, BTreeMap::new(), &refs);
        assert_eq!((s.scored_time, s.scored_memory, s.sweeps), (5, 0, 1));
        assert!((s.time_median_error.unwrap() - 0.1).abs() < 1e-9);
        assert!((s.time_p90_error.unwrap() - (0.111_111 + 0.6 * (0.2 - 0.111_111))).abs() < 1e-5);
        assert!(s.time_bias.unwrap().abs() < 1e-9);
        assert_eq!(s.oom, Verdicts { true_positive: 1, false_positive: 1, true_negative: 4, false_negative: 1 });
        assert!((s.oom.right().unwrap() - 5.0 / 7.0).abs() < 1e-12);
        // The fastest is predicted not to fit; the next best is 10 % slower.
        assert!((s.regret.unwrap() - 0.1).abs() < 1e-9);
        assert_eq!(s.memory_median_error, None);
    }

    #[test]
    fn spearman_of_known_lists() {
        assert_eq!(spearman(&[(1.0, 2.0), (2.0, 4.0), (3.0, 9.0)]), Some(1.0));
        assert_eq!(spearman(&[(1.0, 9.0), (2.0, 4.0), (3.0, 2.0)]), Some(-1.0));
        assert_eq!(spearman(&[(1.0, 9.0), (1.0, 4.0)]), None);
        assert!((spearman(&[(1.0, 1.0), (2.0, 3.0), (3.0, 2.0), (4.0, 4.0)]).unwrap() - 0.8).abs() < 1e-12);
    }
}
