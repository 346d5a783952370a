//! What a run showed, as rows for the profile: kernels, messages and collectives as they went inside it, and what the executor
//! took besides.

use super::machine;
use super::samples::Summary;
use crate::report::RunReport;
use paceline_profiles::{Class, Conditions, Overhead, Predictor, Row, Source, Subject};
use paceline_sim::cost::context_of;
use paceline_sim::program::{OpKind, Program, Stream};
use std::collections::BTreeMap;

/// The rows of a run of `program`. A kernel's time is its mean over the calls of a typical step: within a run, the same
/// shape finds its operands in the cache at one place of the model and not at another, and only the mean makes the sum of
/// all calls right; what single steps lost to other work of the machine is taken out. The time outside kernels is split
/// over ops and calls as `measured` would split it; without, it is all the ops'.
pub fn rows_of_run(program: &Program, report: &RunReport, measured: Option<&Predictor>) -> Vec<Row> {
    let busy_devices = program.busy_devices();
    let context = context_of(program);
    let row = |subject, seconds: f64, spread: f64, repetitions| Row {
        context: context.map(|context| context.met_by(Class::of(&subject))),
        subject,
        busy_devices,
        median_seconds: seconds.max(1e-9),
        spread_seconds: spread,
        repetitions,
        source: Source::Trace,
        date: machine::today(),
        versions: machine::versions(None),
    };
    let typical = typical(report);
    let mut rows: Vec<Row> = report
        .kernels
        .iter()
        .filter(|times| times.count > 0)
        .map(|times| {
            let mean = times.total_seconds / times.count as f64;
            row(Subject::Kernel(times.key.clone()), mean * typical, 0.0, times.count)
        })
        .collect();

    let mut copies: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
    for (rank, traced) in program.ranks.iter().zip(&report.trace.ranks) {
        for (op, event) in rank.ops.iter().zip(&traced.events) {
            if let OpKind::Recv { buffer, .. } = op.kind {
                let bytes = rank.buffers[buffer.index()].bytes;
                copies.entry(bytes).or_default().push((event.end - event.start).seconds());
            }
        }
    }
    for (bytes, seconds) in copies {
        if let Some(summary) = Summary::of(seconds).filter(|_| bytes > 0) {
            rows.push(row(Subject::Transfer { bytes }, summary.median, summary.spread, summary.count));
        }
    }

    rows.extend(
        report
            .exchanges
            .iter()
            .filter(|times| times.count > 0)
            .map(|times| row(times.subject.clone(), times.total_seconds / times.count as f64, 0.0, times.count)),
    );

    let in_kernels: f64 = report.kernels.iter().map(|times| times.total_seconds).sum::<f64>() * typical;
    let calls: u64 = report.kernels.iter().map(|times| times.count).sum();
    let counted = report.steps.len() - usize::from(report.steps.len() > 1);
    // Runs of the program that these steps make.
    let runs = counted as f64 / f64::from(program.steps());
    let outside = report.outside_kernels / (1.0 - report.outside_kernels).max(f64::EPSILON) * in_kernels;
    // (ops, of which on shared devices)
    let mut ops = [0u64; 2];
    for rank in &program.ranks {
        let shared = program.ranks.iter().filter(|other| other.device == rank.device).count() > 1;
        let own = rank.ops.iter().filter(|op| op.stream == Stream::COMPUTE).count();
        ops[usize::from(shared)] += (own as f64 * runs).round() as u64;
    }
    let under = Conditions { busy: busy_devices, context };
    let cost = |overhead| measured.map_or(0.0, |m| m.overhead(overhead, under).seconds);
    let kinds = [(Overhead::Op, ops[0]), (Overhead::SharedOp, ops[1]), (Overhead::Call, calls)];
    let expected: f64 = kinds.iter().map(|&(overhead, count)| cost(overhead) * count as f64).sum();
    for (overhead, count) in kinds.into_iter().filter(|&(_, count)| count > 0) {
        let seconds = if expected > 0.0 {
            cost(overhead) * outside / expected
        } else if overhead == Overhead::Call {
            continue;
        } else {
            outside / (ops[0] + ops[1]) as f64
        };
        rows.push(row(Subject::Overhead(overhead), seconds, 0.0, count));
    }
    rows
}

/// The rows of several runs of one program: of each subject the run in the middle, so that one run in a slow minute of the machine does
/// not count. Kernels together take as long as in the run that is in the middle by that: where each run is slow in other ones, the sum of
/// their medians lies below it. Repetitions are those of all runs.
pub fn rows_of_runs(program: &Program, reports: &[RunReport], measured: Option<&Predictor>) -> Vec<Row> {
    let each: Vec<Vec<Row>> = reports.iter().map(|report| rows_of_run(program, report, measured)).collect();
    let runs = reports.len() as f64;
    let in_kernels: Vec<f64> = each.iter().map(|rows| kernel_seconds(rows)).collect();
    let mut by_subject: BTreeMap<Subject, Vec<Row>> = BTreeMap::new();
    for row in each.into_iter().flatten() {
        by_subject.entry(row.subject.clone()).or_default().push(row);
    }
    let middle = |mut rows: Vec<Row>| {
        rows.sort_by(|a, b| a.median_seconds.total_cmp(&b.median_seconds));
        let (below, above) = (&rows[(rows.len() - 1) / 2], &rows[rows.len() / 2]);
        let mean = |value: fn(&Row) -> f64| (value(below) + value(above)) / 2.0;
        Row {
            median_seconds: mean(|row| row.median_seconds),
            spread_seconds: mean(|row| row.spread_seconds),
            repetitions: rows.iter().map(|row| row.repetitions).sum(),
            ..below.clone()
        }
    };
    let mut rows: Vec<Row> = by_subject.into_values().map(middle).collect();
    if let Some(usual) = Summary::of(in_kernels).filter(|_| kernel_seconds(&rows) > 0.0) {
        let together = usual.median * runs / kernel_seconds(&rows);
        for row in rows.iter_mut().filter(|row| matches!(row.subject, Subject::Kernel(_))) {
            row.median_seconds *= together;
        }
    }
    rows
}

/// Time of all calls of kernels.
fn kernel_seconds(rows: &[Row]) -> f64 {
    let kernels = rows.iter().filter(|row| matches!(row.subject, Subject::Kernel(_)));
    kernels.map(|row| row.median_seconds * row.repetitions as f64).sum()
}

/// A run whose [`disturbance`] is above this shared its cores with other work and teaches nothing about the machine.
pub const DISTURBED_RUN: f64 = 1.4;

/// How much longer the kernels of a run took than their fastest calls would have, as a ratio from 1: caches and clocks make
/// some difference, other work on the same cores makes a large one.
pub fn disturbance(report: &RunReport) -> f64 {
    let typical = typical(report);
    let fastest: f64 = report.kernels.iter().map(|times| times.least_seconds * times.count as f64).sum();
    let taken: f64 = report.kernels.iter().map(|times| times.total_seconds).sum::<f64>() * typical;
    if fastest > 0.0 { (taken / fastest).max(1.0) } else { 1.0 }
}

/// What ranks did in the median step over what they did in the mean one, of the steps whose kernels are counted. Not the time of
/// the steps: what holds one rank up makes all others wait, but does not make their kernels slower.
fn typical(report: &RunReport) -> f64 {
    let mut busy = report.busy_seconds.clone();
    busy.sort_by(f64::total_cmp);
    let mean = busy.iter().sum::<f64>() / busy.len() as f64;
    let typical = busy.get(busy.len() / 2).map_or(1.0, |median| median / mean);
    if typical.is_finite() { typical } else { 1.0 }
}

#[cfg(test)]
mod tests;
