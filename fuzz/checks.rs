//! What holds for any bytes that are given to the readers of other people's files: no panic, an error or figures that can be used.

use paceline_planner::validate::{self, load};
use paceline_profiles::Cluster;
use paceline_profiles::import::nccl_tests::{self as log, LogError, Strictness};
use paceline_profiles::import::torch_trace;
use paceline_sim::cluster::Physics;

/// A log of nccl-tests: rows are where they say, bandwidths can be computed with, and refusing means the first line that skipping
/// lists.
pub fn nccl_tests(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let skipped = match log::read(&text, Strictness::Skip) {
        Ok(read) => read,
        Err(LogError::NoTable { .. }) => return,
        Err(error) => panic!("refused although lines may be skipped: {error}"),
    };
    let lines = text.lines().count();
    for row in &skipped.rows {
        assert!((1..=lines).contains(&row.line) && row.run < skipped.runs.len(), "{row:?}");
        for figure in [row.seconds(), row.bus_bandwidth()].into_iter().flatten() {
            assert!(figure.is_finite() && figure >= 0.0, "{row:?}");
        }
    }
    assert!(skipped.malformed.iter().all(|m| (1..=lines).contains(&m.line) && !m.reason.is_empty()));
    for run in 0..skipped.runs.len() {
        if let Ok(line) = skipped.fit(run) {
            assert!(line.latency_seconds.is_finite() && line.latency_seconds >= 0.0, "{line:?}");
        }
    }
    match (log::read(&text, Strictness::Refuse), skipped.malformed.first()) {
        (Ok(strict), None) => assert_eq!(strict, skipped),
        (Err(LogError::Malformed(refused)), Some(first)) => assert_eq!(refused, *first),
        (strict, first) => panic!("{strict:?} beside {first:?}"),
    }
    // What is laid over a cluster leaves one that can be.
    if let Ok(known) = paceline_profiles::find_cluster("p5") {
        let mut cluster = known.clone();
        let _ = cluster.apply_log(&skipped);
        cluster.check().expect("a log cannot break a cluster");
    }
}

/// A PyTorch trace: times are finite and not negative, and classes sum to the whole.
pub fn torch_trace(data: &[u8]) {
    let Ok(trace) = torch_trace::read(&String::from_utf8_lossy(data)) else { return };
    assert!(!trace.operators.is_empty());
    let seconds: f64 = trace.operators.iter().map(|o| o.seconds).sum();
    let kernels: u64 = trace.operators.iter().map(|o| o.kernels).sum();
    let classes = trace.by_class();
    assert_eq!(classes.values().map(|c| c.0).sum::<u64>(), kernels);
    for figure in [seconds, trace.compute_seconds, trace.exposed_communication_seconds, trace.idle_seconds] {
        assert!(figure >= 0.0, "{trace:?}");
    }
}

/// Measured runs: every row is predicted with finite figures, or there is a reason why not; the tables can be written.
pub fn runs(data: &[u8]) {
    let Ok(cases) = load(&String::from_utf8_lossy(data)) else { return };
    let rows: usize = cases.sources.values().map(|(rows, _)| rows).sum();
    let validation = validate::validate(cases, &Physics::default());
    for row in &validation.rows {
        assert!(row.predicted_iteration_seconds > 0.0 && row.predicted_iteration_seconds.is_finite(), "{row:?}");
        assert!(row.predicted_peak_gib > 0.0 && row.predicted_peak_gib.is_finite(), "{row:?}");
    }
    let reasons: usize = validation.sources.iter().flat_map(|s| s.skipped.values()).sum();
    assert!(validation.rows.len() + reasons >= rows, "{} rows and {reasons} reasons of {rows}", validation.rows.len());
    validation.to_json(true).expect("figures that JSON can hold");
    assert!(validation.to_csv().lines().count() > validation.rows.len());
}

/// A cluster's file: what is read can be, and is the same when it is written and read again.
pub fn cluster(data: &[u8]) {
    let Ok(cluster) = Cluster::from_toml(&String::from_utf8_lossy(data)) else { return };
    cluster.check().expect("checked when it was read");
    let _ = Physics::of(&cluster);
    let again = Cluster::from_toml(&cluster.to_toml().expect("TOML holds it")).expect("reads what it wrote");
    assert_eq!(again, cluster);
}
