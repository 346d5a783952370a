//! `paceline compare`: predicted against measured, op class by op class, rank by rank.

use crate::failure::Failure;
use crate::local::Local;
use crate::screen::{Screen, Style};
use crate::table::{Table, show_percent, show_seconds};
use crate::timeline;
use crate::trace_file;
use paceline_planner::plan::Plan;
use paceline_planner::prediction::{Costs, predict};
use paceline_profiles::Predictor;
use paceline_sim::attribution::Attribution;
use paceline_sim::compare::{Comparison, compare};
use paceline_sim::program::Program;
use paceline_sim::trace::Trace;
use paceline_sim::units::show_bytes;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// Holds a predicted step against a measured one.
#[derive(Debug, Clone, clap::Args)]
#[command(
    after_help = "Example:\n  paceline run plan.json --steps 20 --trace measured.json\n  paceline compare plan.json measured.json"
)]
pub struct Arguments {
    /// A plan, which is then simulated, or a trace that `paceline predict --trace` wrote.
    #[arg(value_name = "PREDICTED")]
    predicted: PathBuf,

    /// A trace that `paceline run --trace` wrote.
    #[arg(value_name = "MEASURED")]
    measured: PathBuf,

    /// Profile with which a plan is simulated (default: as for `paceline predict`).
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
}

/// The document of `--json`.
#[derive(Debug, Serialize)]
struct Document<'a> {
    format: &'static str,
    /// Relative error of the predicted step time, signed.
    error: f64,
    peak_bytes_equal: bool,
    #[serde(flatten)]
    comparison: &'a Comparison,
    /// Where the error comes from; absent where the prediction is a trace and not a plan.
    #[serde(skip_serializing_if = "Option::is_none")]
    causes: Option<&'a Attribution>,
}

/// Runs the command.
pub fn run(screen: &Screen, arguments: &Arguments) -> Result<(), Failure> {
    let measured = trace_file::read(&arguments.measured)?;
    let (predicted, replayed) = predicted_trace(screen, &arguments.predicted, arguments.profile.as_deref())?;
    let comparison = compare(&predicted, &measured).map_err(Failure::bad_input)?;
    for (name, trace) in [("predicted", &predicted), ("measured", &measured)] {
        screen.line(screen.style(Style::Bold, name))?;
        timeline::show(screen, trace)?;
        screen.line("")?;
    }
    show(screen, &comparison)?;
    let causes = replayed.map(|(program, local)| causes(&program, &local.predictor, &measured)).transpose()?;
    if let Some(causes) = &causes {
        show_causes(screen, causes)?;
    }
    screen.document(&Document {
        format: "paceline.comparison/1",
        error: comparison.error(),
        peak_bytes_equal: peaks_equal(&comparison),
        comparison: &comparison,
        causes: causes.as_ref(),
    })
}

/// Where the error of a predicted step comes from.
pub fn causes(program: &Program, predictor: &Predictor, measured: &Trace) -> Result<Attribution, Failure> {
    let (costs, _) = predictor.of(program).map_err(Failure::internal)?;
    Attribution::of(program, &*costs, measured).map_err(Failure::bad_input)
}

/// Prints the causes that matter.
pub fn show_causes(screen: &Screen, causes: &Attribution) -> Result<(), Failure> {
    screen.line("")?;
    let mut table = Table::new(["measured minus predicted, by cause", "seconds", "of the step"]);
    let signed = |seconds: f64| format!("{}{}", if seconds < 0.0 { "-" } else { "+" }, show_seconds(seconds.abs()));
    let share = |seconds: f64| format!("{:+.1} %", 100.0 * seconds / causes.measured_seconds);
    let (mut small, mut parts) = (0.0, causes.parts.clone());
    parts.sort_by(|a, b| b.seconds.abs().total_cmp(&a.seconds.abs()));
    for part in parts {
        if part.seconds.abs() < SMALL * causes.measured_seconds {
            small += part.seconds;
        } else {
            table.row([part.cause.to_string(), signed(part.seconds), share(part.seconds)]);
        }
    }
    table.row(["smaller ones together".into(), signed(small), share(small)]);
    table.print(screen)
}

/// Causes below this share of the step are shown together.
const SMALL: f64 = 5e-4;

/// What is held against the measurement; of a plan also the program and the machine that it was predicted on.
type Predicted = (Trace, Option<(Program, Local)>);

fn predicted_trace(screen: &Screen, path: &Path, profile: Option<&Path>) -> Result<Predicted, Failure> {
    let is_plan = std::fs::read_to_string(path)
        .ok()
        .and_then(|text| serde_json::from_str::<serde_json::Value>(&text).ok())
        .and_then(|value| {
            value.get("format").and_then(|format| format.as_str()).map(|f| f.starts_with("paceline.plan/"))
        })
        .unwrap_or(false);
    if !is_plan {
        return Ok((trace_file::read(path)?, None));
    }
    let plan = Plan::read(path).map_err(Failure::bad_input)?;
    let local = Local::open(screen, profile)?;
    let program = plan.program().map_err(Failure::bad_input)?;
    let (now, trace) =
        predict(&program, &local.predictor, plan.machine, plan.job.memory_limit).map_err(Failure::internal)?;
    let [then, now] = [plan.prediction.iteration_seconds, now.iteration_seconds];
    if (now / then - 1.0).abs() > OTHER_PROFILE {
        screen.warn(format!(
            "{} was made with other times: it says {} per step, this profile {}; `--profile` names the one it was made with",
            path.display(),
            show_seconds(then),
            show_seconds(now)
        ));
    }
    Ok((trace, Some((program, local))))
}

/// Relative difference from which on a plan was made with another profile, or an earlier state of it.
const OTHER_PROFILE: f64 = 1e-3;

/// Every rank's peak is what was predicted.
pub fn peaks_equal(comparison: &Comparison) -> bool {
    comparison.ranks.iter().all(|rank| rank.predicted_peak_bytes == rank.measured_peak_bytes)
}

/// Prints a comparison.
pub fn show(screen: &Screen, comparison: &Comparison) -> Result<(), Failure> {
    let signed = |error: f64| format!("{:+.1} %", error * 100.0);
    let mut table = Table::new(["op class", "count", "predicted", "measured", "error", "share of ops"]);
    let all: f64 = comparison.classes.iter().map(|class| class.measured_seconds).sum();
    for class in &comparison.classes {
        table.row([
            class.class.clone(),
            class.count.to_string(),
            show_seconds(class.predicted_seconds),
            show_seconds(class.measured_seconds),
            class.error().map_or("-".into(), signed),
            show_percent(class.measured_seconds / all.max(f64::MIN_POSITIVE)),
        ]);
    }
    table.print(screen)?;
    screen.line("")?;
    let mut table = Table::new([
        "rank",
        "compute predicted",
        "measured",
        "end predicted",
        "measured",
        "peak predicted",
        "peak measured",
    ]);
    for rank in &comparison.ranks {
        let equal = rank.predicted_peak_bytes == rank.measured_peak_bytes;
        table.styled(
            (!equal).then_some(Style::Bad),
            [
                rank.rank.to_string(),
                show_seconds(rank.predicted_compute_seconds),
                show_seconds(rank.measured_compute_seconds),
                show_seconds(rank.predicted_end_seconds),
                show_seconds(rank.measured_end_seconds),
                show_bytes(rank.predicted_peak_bytes),
                show_bytes(rank.measured_peak_bytes),
            ],
        );
    }
    table.print(screen)?;
    screen.line(format!(
        "\n  step: predicted {}, measured {}, error {}; peak bytes {}",
        show_seconds(comparison.predicted_seconds),
        show_seconds(comparison.measured_seconds),
        signed(comparison.error()),
        if peaks_equal(comparison) { "equal on every rank" } else { "differ" }
    ))
}
