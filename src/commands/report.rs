//! `paceline report`: a plan as one HTML file that needs nothing else.

use crate::failure::Failure;
use crate::job_source::JobSource;
use crate::local::Local;
use crate::screen::Screen;
use crate::trace_file::{self, write_whole};
use paceline_planner::plan::Plan;
use paceline_planner::predict::predict_cluster;
use paceline_planner::prediction::predict;
use paceline_sim::compare::compare;
use paceline_sim::trace::Trace;
use paceline_tui::lanes::Lanes;
use paceline_tui::question::{LocalMachine, ask, ask_program, local_job, on_cluster, simulate};
use paceline_tui::report::{Accuracy, Report, html, perfetto, timeline_svg};
use paceline_tui::search::find;
use paceline_tui::settings::Settings;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// Memory, timeline, plans, accuracy and provenance of a plan (or of a job, for its one configuration), in one HTML file that opens
/// in any browser without a network.
#[derive(Debug, Clone, clap::Args)]
#[command(
    after_help = "Examples:\n  paceline report plan.json\n  paceline report job.toml -o report.html --svg timeline.svg --perfetto timeline.json\n  paceline report plan.json --measured run.json"
)]
pub struct Arguments {
    /// A plan of `paceline plan -o`, or a job file.
    #[arg(value_name = "plan.json|JOB.toml")]
    plan: PathBuf,

    /// Where the report goes (default: beside the plan, `plan.html`).
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Write the timeline as SVG.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,

    /// Write the timeline for ui.perfetto.dev.
    #[arg(long, value_name = "FILE")]
    perfetto: Option<PathBuf>,

    /// A trace of `paceline run --trace`, to be shown beside the prediction.
    #[arg(long, value_name = "FILE")]
    measured: Option<PathBuf>,

    /// How many plans of the job to list; 0 searches none.
    #[arg(long, value_name = "N", default_value_t = 10)]
    top: u32,

    /// Profile of this machine (default: as for `paceline predict`).
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
}

/// The document of `--json`.
#[derive(Debug, Serialize)]
struct Document<'a> {
    format: &'static str,
    output: &'a Path,
    svg: Option<&'a Path>,
    perfetto: Option<&'a Path>,
    prediction: &'a serde_json::Value,
}

/// Runs the command.
pub fn run(screen: &Screen, arguments: &Arguments) -> Result<(), Failure> {
    let local = Local::open(screen, arguments.profile.as_deref())?;
    let local = local.for_views();
    let measured = arguments.measured.as_deref().map(trace_file::read).transpose()?;
    let is_plan = arguments.plan.extension().is_some_and(|extension| extension == "json");
    let mut report =
        if is_plan { of_plan(&arguments.plan, &local, measured.as_ref())? } else { of_job(&arguments.plan, &local)? };
    report.measured = measured.as_ref().map(Lanes::of_trace);
    if arguments.top > 0 {
        let found = find(&report.job, &local, arguments.top as usize, &|_| true).map_err(Failure::bad_input)?;
        report.found = Some(found);
    }
    let output = arguments.output.clone().unwrap_or_else(|| arguments.plan.with_extension("html"));
    write_whole(&output, html(&report).as_bytes())?;
    if let Some(path) = &arguments.svg {
        write_whole(path, timeline_svg(&report.lanes).as_bytes())?;
    }
    if let Some(path) = &arguments.perfetto {
        write_whole(path, &serde_json::to_vec(&perfetto(&report.lanes)).map_err(Failure::internal)?)?;
    }
    screen.say(format!("report written to {}", output.display()));
    screen.document(&Document {
        format: "paceline.report/1",
        output: &output,
        svg: arguments.svg.as_deref(),
        perfetto: arguments.perfetto.as_deref(),
        prediction: &report.json,
    })
}

/// The report of a plan file: exactly the program that `paceline run` executes.
fn of_plan(path: &Path, local: &LocalMachine, measured: Option<&Trace>) -> Result<Report, Failure> {
    let plan = Plan::read(path).map_err(Failure::bad_input)?;
    let program = plan.program().map_err(Failure::bad_input)?;
    let (prediction, trace) =
        predict(&program, &*local.predictor, plan.machine, plan.job.memory_limit).map_err(Failure::internal)?;
    let job = plan.job.table().clone();
    let mut accuracy = residuals(local)?;
    let mut note = "How well each curve of the profile foretells measured points that it has not seen.".to_string();
    if let Some(measured) = measured {
        let comparison = compare(&trace, measured).map_err(Failure::bad_input)?;
        note = "Predicted against measured time of the run, by class of op, and then how well each curve of the profile foretells \
                measured points that it has not seen."
            .into();
        let classes = comparison.classes.iter().map(|class| Accuracy {
            what: format!("run: {}", class.class),
            count: class.count as usize,
            median: class.error().map(f64::abs),
            worst: None,
        });
        accuracy = classes.chain(accuracy).collect();
    }
    Ok(Report {
        answer: ask_program(&Settings::from_table(&job), &plan.job, &program, plan.machine, &prediction, local),
        configuration: plan.configuration.to_string(),
        json: serde_json::to_value(&prediction).map_err(Failure::internal)?,
        lanes: Lanes::of_trace(&trace),
        job,
        measured: None,
        found: None,
        accuracy,
        accuracy_note: note,
    })
}

/// The report of a job's one configuration.
fn of_job(path: &Path, local: &LocalMachine) -> Result<Report, Failure> {
    let source = JobSource { job: Some(path.to_owned()), ..JobSource::default() };
    let job = source.placed_table()?;
    let settings = Settings::from_table(&job);
    let answer = ask(&settings, local).map_err(|error| Failure::bad_input(format!("{}: {error}", path.display())))?;
    let lanes = simulate(&settings, local).map_err(Failure::bad_input)?;
    let (json, configuration, accuracy, note) = if settings.is_local() {
        let (job, configuration) = local_job(&settings).map_err(Failure::bad_input)?;
        let machine = local.machine.for_job(&job);
        let program = configuration.program(&job, machine).map_err(Failure::bad_input)?;
        let predicted = predict(&program, &*local.predictor, machine, job.memory_limit).map_err(Failure::internal)?;
        let json = serde_json::to_value(&predicted.0).map_err(Failure::internal)?;
        let note = "How well each curve of the profile foretells measured points that it has not seen.";
        (json, configuration.to_string(), residuals(local)?, note)
    } else {
        let (request, model, layout, cluster, physics) = on_cluster(&settings).map_err(Failure::bad_input)?;
        let prediction = predict_cluster(&model, &layout, &cluster, &physics).map_err(Failure::bad_input)?;
        let note = "Predictions with the shipped parameters against published runs of others, by source; the last column is the \
                    90th percentile. How each was compared: docs/accuracy.md.";
        (prediction.to_json().map_err(Failure::internal)?, request.to_string(), published(), note)
    };
    Ok(Report {
        answer,
        configuration,
        job,
        json,
        lanes,
        measured: None,
        found: None,
        accuracy,
        accuracy_note: note.into(),
    })
}

fn residuals(local: &LocalMachine) -> Result<Vec<Accuracy>, Failure> {
    let residuals = local.predictor.residuals().map_err(Failure::internal)?;
    let line = |residual: paceline_profiles::Residual| Accuracy {
        what: residual.class.to_string(),
        count: residual.points,
        median: residual.median_error,
        worst: residual.worst_error,
    };
    Ok(residuals.into_iter().map(line).collect())
}

/// The first table of the page on accuracy: source, rows, timed, median and 90th percentile of the error of time.
fn published() -> Vec<Accuracy> {
    let page = include_str!("../../docs/accuracy.md");
    let table = page.lines().skip_while(|line| !line.starts_with('|')).take_while(|line| line.starts_with('|'));
    let share = |text: &str| text.trim_end_matches(" %").parse::<f64>().ok().map(|percent| percent / 100.0);
    // The header and the line under it are no numbers.
    let line = |line: &str| {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let count = cells.get(2)?.parse().ok()?;
        Some(Accuracy {
            what: cells[0].to_owned(),
            count,
            median: cells.get(3).and_then(|cell| share(cell)),
            worst: cells.get(4).and_then(|cell| share(cell)),
        })
    };
    table.filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_errors_are_read_from_the_page() {
        let lines = published();
        assert!(lines.len() > 5 && lines.iter().all(|line| line.count > 0));
        let mpt = lines.iter().find(|line| line.what == "mosaic-mpt").unwrap();
        assert_eq!(mpt.count, 216);
        assert!(mpt.median.is_some_and(|error| error > 0.0 && error < 0.2) && mpt.worst > mpt.median);
    }
}
