//! `paceline calibrate --from ...`: what other tools measured on a cluster, as the cluster's file. `paceline predict --cluster FILE`
//! reads it.

use crate::failure::Failure;
use crate::screen::Screen;
use crate::table::{Table, show_percent, show_seconds};
use crate::trace_file::write_whole;
use paceline_planner::predict::ClusterRequest;
use paceline_planner::validate::{CrossValidation, cross_validate_folds, fit, fit_trace, load, validate};
use paceline_profiles::Cluster;
use paceline_profiles::import::nccl_tests::{self, Strictness};
use paceline_profiles::import::torch_trace;
use paceline_sim::cluster::{PARAMETERS, Physics};
use serde_json::{Value, json};
use std::path::Path;

/// Kinds of files.
const KINDS: &str = "nccl-tests, torch-trace, runs";

/// Predictions of all runs in the search of a fit to a user's runs, and in that of each held-out part.
const EVALUATIONS: u64 = 900;
const EVALUATIONS_HELD_OUT: u64 = 300;
/// Parts of which each is foretold by the others.
const FOLDS: usize = 5;

/// Runs the import of `file`; `cluster` is what the measurements are laid over.
pub fn run(
    screen: &Screen,
    kind: &str,
    file: &Path,
    cluster: Option<&str>,
    strict: bool,
    output: Option<&Path>,
) -> Result<(), Failure> {
    if !KINDS.split(", ").any(|known| known == kind) {
        return Err(Failure::bad_input(format!("--from {kind} is not known; allowed: {KINDS}")));
    }
    let text = std::fs::read_to_string(file)
        .map_err(|error| Failure::bad_input(format!("cannot read {}: {error}", file.display())))?;
    let in_file = |error: &dyn std::fmt::Display| Failure::bad_input(format!("{}: {error}", file.display()));
    let named = cluster.map(open).transpose()?;
    let (cluster, mut document) = match (kind, named) {
        ("runs", named) => runs(screen, &text, named, strict, &in_file)?,
        (_, None) => {
            return Err(Failure::bad_input("--cluster is missing: the measurements of which cluster are these?")
                .hint("name a shipped one that comes close, or a file: --cluster p5"));
        }
        ("nccl-tests", Some(cluster)) => nccl(screen, &text, cluster, strict, &in_file)?,
        (_, Some(cluster)) => trace(screen, &text, cluster, &in_file)?,
    };
    let written = cluster.to_toml().map_err(Failure::internal)?;
    match output {
        Some(path) => {
            write_whole(path, written.as_bytes())?;
            screen.say(format!("cluster written to {0}; use it with --cluster {0}", path.display()));
        }
        None => screen.say("keep the cluster with -o FILE.toml, for `paceline predict --cluster FILE.toml`"),
    }
    if let Some(object) = document.as_object_mut() {
        object.insert("format".into(), "paceline.calibration/1".into());
        object.insert("from".into(), kind.into());
        object.insert("output".into(), json!(output));
        object.insert("cluster".into(), serde_json::to_value(&cluster).map_err(Failure::internal)?);
    }
    screen.document(&document)
}

/// A shipped cluster, or one from a file.
pub fn open(name: &str) -> Result<Cluster, Failure> {
    let request = ClusterRequest { cluster: name.into(), ..ClusterRequest::default() };
    request.cluster().map_err(Failure::bad_input)
}

type Imported = Result<(Cluster, Value), Failure>;
type InFile<'a> = &'a dyn Fn(&dyn std::fmt::Display) -> Failure;

fn nccl(screen: &Screen, text: &str, mut cluster: Cluster, strict: bool, in_file: InFile<'_>) -> Imported {
    let strictness = if strict { Strictness::Refuse } else { Strictness::Skip };
    let log = nccl_tests::read(text, strictness).map_err(|error| in_file(&error))?;
    for line in &log.malformed {
        screen.warn(format!("left out {line}"));
    }
    let mut table = Table::new(["run", "test", "ranks", "hosts", "sizes", "latency", "bus bandwidth of the largest"]);
    for (n, run) in log.runs.iter().enumerate() {
        let rows: Vec<_> = log.rows.iter().filter(|row| row.run == n).collect();
        let largest = rows.iter().max_by_key(|row| row.bytes).and_then(|row| row.bus_bandwidth());
        table.row([
            n.to_string(),
            if run.test.is_empty() { "not printed".into() } else { run.test.clone() },
            run.ranks.or(run.counted_ranks).map_or("-".into(), |n| n.to_string()),
            run.hosts.len().to_string(),
            rows.len().to_string(),
            log.fit(n).map_or("-".into(), |line| show_seconds(line.latency_seconds)),
            largest.map_or("-".into(), |b| format!("{:.1} GB/s", b / 1e9)),
        ]);
    }
    table.print(screen)?;
    let (changes, unused) = cluster.apply_log(&log);
    for reason in &unused {
        if strict {
            return Err(in_file(reason));
        }
        screen.warn(format!("not used: {reason}"));
    }
    for change in &changes {
        screen
            .line(format!("  {} = {:.1} (was {:.1}), run {}", change.key, change.after, change.before, change.run))?;
    }
    let changed: Vec<Value> =
        changes.iter().map(|c| json!({"run": c.run, "key": c.key, "before": c.before, "after": c.after})).collect();
    let unused: Vec<String> = unused.iter().map(ToString::to_string).collect();
    let malformed: Vec<Value> = log.malformed.iter().map(|m| json!({"line": m.line, "reason": m.reason})).collect();
    Ok((
        cluster,
        json!({"runs": log.runs.len(), "rows": log.rows.len(), "changes": changed, "unused": unused, "malformed": malformed}),
    ))
}

fn trace(screen: &Screen, text: &str, mut cluster: Cluster, in_file: InFile<'_>) -> Imported {
    let trace = torch_trace::read(text).map_err(|error| in_file(&error))?;
    if trace.malformed > 0 {
        screen.warn(format!("left out {} kernel events without a usable time", trace.malformed));
    }
    screen.line(format!(
        "computes {}, only communicates {}, idles {}",
        show_seconds(trace.compute_seconds),
        show_seconds(trace.exposed_communication_seconds),
        show_seconds(trace.idle_seconds)
    ))?;
    let mut table = Table::new(["operator", "shapes", "kernels", "time"]);
    for operator in trace.operators.iter().take(12) {
        table.row([
            operator.operator.chars().take(48).collect(),
            operator.shapes.chars().take(40).collect(),
            operator.kernels.to_string(),
            show_seconds(operator.seconds),
        ]);
    }
    table.print(screen)?;
    let start = Physics::of(&cluster).map_err(Failure::bad_input)?;
    let fitted = fit_trace(&trace, &cluster, &start).map_err(|error| in_file(&error))?;
    screen.line(format!(
        "\n  {} = {:.3} (was {:.3}) from {} products; median error over their time {} before, {} after, {} on products held out",
        fitted.parameter,
        fitted.after,
        fitted.before,
        fitted.products.len(),
        show_percent(fitted.error_before),
        show_percent(fitted.error_after),
        show_percent(fitted.error_held_out)
    ))?;
    cluster.physics.insert(fitted.parameter.into(), fitted.after);
    cluster.source = format!("{}; {} from a PyTorch trace", cluster.source, fitted.parameter);
    Ok((cluster, json!({"trace": trace, "fit": fitted})))
}

fn runs(screen: &Screen, text: &str, named: Option<Cluster>, strict: bool, in_file: InFile<'_>) -> Imported {
    let mut all = load(text).map_err(|error| in_file(&error))?;
    for (source, (_, skipped)) in &all.sources {
        for (reason, count) in skipped {
            if strict {
                return Err(in_file(&format!("{source}: {count} x {reason}")));
            }
            screen.warn(format!("{source}: left out {count} x {reason}"));
        }
    }
    if let Some(cluster) = &named {
        for case in &mut all.cases {
            case.cluster = cluster.clone();
        }
    }
    let Some(first) = all.cases.first() else {
        return Err(in_file(&"no run in it can be predicted; the warnings say why"));
    };
    let mut cluster = first.cluster.clone();
    if let Some(other) = all.cases.iter().find(|c| c.cluster.gpu.name != cluster.gpu.name) {
        let both = format!("runs of {} and of {}", cluster.gpu.name, other.cluster.gpu.name);
        return Err(in_file(&both).hint("a fit is for one cluster: name it with --cluster, or split the file"));
    }
    let start = Physics::of(&cluster).map_err(Failure::bad_input)?;
    let fitted = fit(all.cases.iter(), &start, EVALUATIONS).map_err(|error| in_file(&error))?;
    let held_out = if all.cases.len() >= 4 {
        cross_validate_folds(&all.cases, &start, EVALUATIONS_HELD_OUT, FOLDS).map_err(|error| in_file(&error))?
    } else {
        screen.warn("fewer than four runs: no error on runs held out can be estimated");
        Vec::new()
    };
    let before = validate(all.clone(), &start);
    let after = validate(all, &fitted.physics);

    let mut table =
        Table::new(["run", "seconds", "before", "after", "error before", "after", "peak GiB", "after", "error"]);
    let number = |value: Option<f64>| value.map_or("-".into(), |v| format!("{v:.3}"));
    let error = |predicted: f64, measured: Option<f64>| {
        measured.map_or("-".into(), |m| format!("{:+.1} %", 100.0 * (predicted / m - 1.0)))
    };
    for (old, new) in before.rows.iter().zip(&after.rows) {
        table.row([
            new.id.clone(),
            number(new.measured_iteration_seconds),
            number(Some(old.predicted_iteration_seconds)),
            number(Some(new.predicted_iteration_seconds)),
            error(old.predicted_iteration_seconds, new.measured_iteration_seconds),
            error(new.predicted_iteration_seconds, new.measured_iteration_seconds),
            number(new.measured_peak_gib),
            number(Some(new.predicted_peak_gib)),
            error(new.predicted_peak_gib, new.measured_peak_gib),
        ]);
    }
    table.print(screen)?;
    screen.line("")?;
    let mut table = Table::new(["parameter", "before", "after", "meaning"]);
    for parameter in PARAMETERS {
        let show = |physics: &Physics| format!("{:.4e}", (parameter.get)(physics));
        table.row([parameter.name.into(), show(&start), show(&fitted.physics), parameter.meaning.to_string()]);
    }
    table.print(screen)?;
    let time = mean(&held_out, |fold| fold.time_median_error);
    let memory = mean(&held_out, |fold| fold.memory_median_error);
    let words = |value: Option<f64>| value.map_or("not known".into(), show_percent);
    screen.line(format!(
        "\n  fitted to {} runs; on runs held out ({} parts, each foretold by the others): median error of time {}, of memory {}",
        fitted.runs,
        held_out.len(),
        words(time),
        words(memory)
    ))?;
    cluster.physics = fitted.physics.by_name();
    cluster.source = format!("{}; parameters fitted to {} runs", cluster.source, fitted.runs);
    let document = json!({
        "runs": fitted.runs,
        "loss_before": fitted.before,
        "loss_after": fitted.after,
        "parameters": fitted.physics.by_name(),
        "held_out": {"folds": held_out, "time_median_error": time, "memory_median_error": memory},
        "residuals": after.rows,
    });
    Ok((cluster, document))
}

fn mean(folds: &[CrossValidation], of: fn(&CrossValidation) -> Option<f64>) -> Option<f64> {
    let values: Vec<f64> = folds.iter().filter_map(of).collect();
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}
