//! `paceline demo`, and `paceline` alone: the whole loop on this machine. Measure it, plan a job, train under the best plan,
//! hold prediction against measurement, correct the profile by some runs, and see how well it then foretells others.

mod configurations;
mod trial;

use crate::commands::{calibrate, compare as comparing, plan};
use crate::failure::Failure;
use crate::interrupt;
use crate::local::{self, Demand, Local};
use crate::screen::{Screen, Style};
use crate::table::{Table, show_percent, show_seconds};
use crate::trace_file::write_whole;
use crate::training::{self, Follow};
use paceline_exec::RunReport;
use paceline_kernels::CpuDevice;
use paceline_planner::configuration::Configuration;
use paceline_planner::job::Job;
use paceline_planner::plan::Plan;
use paceline_planner::prediction::predict;
use paceline_profiles::{Predictor, Row, recalibrate};
use paceline_sim::compare::compare;
use serde::Serialize;
use std::path::PathBuf;
use std::time::Instant;
use trial::{Bench, Rounds, Trial};

/// The job of the demonstration.
const JOB: &str = include_str!("../../../examples/demo.toml");

/// Calibrates, plans, trains, compares and recalibrates on this machine, on a bundled job. Takes about three minutes.
#[derive(Debug, Clone, clap::Args)]
#[command(
    after_help = "Examples:\n  paceline demo\n  paceline demo --json > demo.json\n  paceline demo --output loop/   (keeps profile, plan and traces)"
)]
pub struct Arguments {
    /// Keep the profile, the plan and the traces in this directory.
    #[arg(long, short, value_name = "DIR")]
    output: Option<PathBuf>,

    /// Seconds of calibration.
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0, value_parser = seconds)]
    calibrate: f64,

    /// Seconds of training under the best plan.
    #[arg(long, value_name = "SECONDS", default_value_t = 45.0, value_parser = seconds)]
    train: f64,

    /// Steps of each run of a configuration; the first warms up.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u64).range(3..))]
    steps: u64,

    /// How often each configuration runs; the run in the middle counts.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
}

impl Default for Arguments {
    fn default() -> Self {
        Arguments { output: None, calibrate: 30.0, train: 45.0, steps: 4, rounds: 5 }
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (1.0..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("a number of seconds from 1 to 3600 is needed".into()),
    }
}

/// The document of `--json`.
#[derive(Debug, Serialize)]
struct Document {
    format: &'static str,
    runs: Vec<Run>,
    median_error_before: f64,
    median_error_after: f64,
    worst_error_after: f64,
    peak_bytes_equal: bool,
    /// The plan that was trained at length.
    trained: Trained,
    /// Configurations whose runs corrected the profile; none of them is among `runs`.
    taught_by: Vec<Configuration>,
    /// Runs left out because other work shared the cores.
    disturbed: u32,
    /// Half of the range of runs of one configuration over the run in the middle, the median over those that ran more than once: what the
    /// machine itself leaves open.
    variation: Option<f64>,
    seconds: f64,
}

#[derive(Debug, Serialize)]
struct Run {
    configuration: Configuration,
    predicted_seconds_before: f64,
    predicted_seconds_after: f64,
    measured_seconds: f64,
    /// Of the fastest and the slowest of its runs.
    measured_range_seconds: [f64; 2],
    /// How many runs these are, without those that other work disturbed.
    measured_runs: usize,
    error_before: f64,
    error_after: f64,
    predicted_peak_bytes: Vec<u64>,
    measured_peak_bytes: Vec<u64>,
    loss_first: f64,
    loss_last: f64,
}

#[derive(Debug, Serialize)]
struct Trained {
    configuration: Configuration,
    steps: u64,
    predicted_seconds: f64,
    measured_seconds: f64,
    tokens_per_second: f64,
    held_out_loss_first: f64,
    held_out_loss_last: f64,
}

/// Runs the command.
pub fn run(screen: &Screen, arguments: &Arguments) -> Result<(), Failure> {
    let begin = Instant::now();
    let stop = interrupt::flag()?;
    if let Some(directory) = &arguments.output {
        std::fs::create_dir_all(directory)
            .map_err(|error| Failure::bad_input(format!("cannot make {}: {error}", directory.display())))?;
    }
    let table = JOB.parse().map_err(Failure::internal)?;
    let job = Job::from_table(table, "examples/demo.toml").map_err(Failure::internal)?;
    let data = training::dataset(&job.train)?;

    let demand = Demand::of(&job, local::cores())?;
    let (keys, settings) = (&demand.keys, demand.settings(arguments.calibrate, None));
    screen.step(format!(
        "calibrate: {} kernel shapes of {} and the grid around them, on {} cores",
        keys.len(),
        job.model.name,
        settings.devices
    ));
    let profile = local::calibrate(screen, &CpuDevice::new(), keys, &settings, &stop)?;
    let local = Local::with(CpuDevice::new(), profile, "calibrated just now".into())?;

    screen.step("plan: search all configurations of the job by simulation");
    let plans = plan::find(screen, &job, &local, 5)?;
    plan::show(screen, &plans, 4)?;
    let best = &plans.plans[0];
    let chosen = Plan {
        configuration: best.configuration.clone(),
        prediction: best.prediction.clone(),
        machine: local.machine.for_job(&job),
        job: job.clone(),
    };

    let steps = ((arguments.train / best.prediction.iteration_seconds) as u64).clamp(20, 2000);
    screen.step(format!("train: {steps} steps under the best plan, {}", chosen.configuration));
    let bench = Bench { local: &local, job: &job, data: &data, stop: &stop };
    let report = train(screen, &bench, &chosen, steps)?;
    bench.refuse_if_stopped()?;
    let trained = trained(&chosen, &report);

    screen.step("compare: predicted against measured, the median step of that run");
    let program = chosen.program().map_err(Failure::internal)?;
    let (_, predicted) = predict(&program, &local.predictor, chosen.machine, None).map_err(Failure::internal)?;
    let comparison = compare(&predicted, &report.trace).map_err(Failure::internal)?;
    comparing::show(screen, &comparison)?;
    comparing::show_causes(screen, &comparing::causes(&program, &local.predictor, &report.trace)?)?;

    screen.step(format!(
        "measure: every configuration in {} rounds, those that correct the profile and those that test it",
        arguments.rounds
    ));
    let rounds = Rounds { number: arguments.rounds, steps: arguments.steps };
    let mut all = configurations::teachers();
    let taught = all.len();
    all.extend(configurations::tested());
    let mut teachers = bench.run(screen, all, rounds)?;
    let tested = teachers.split_off(taught);
    let disturbed = teachers.iter().chain(&tested).map(|trial| trial.disturbed).sum();

    screen.step("recalibrate: correct the profile by those that teach");
    let mut rows: Vec<Row> = Vec::new();
    let mut taught_by = Vec::new();
    for trial in teachers {
        if let Some(learnt) = trial.rows(&local.predictor) {
            rows.extend(learnt);
            taught_by.push(trial.configuration);
        }
    }
    let corrected = recalibrate(&local.profile, &rows).map_err(Failure::internal)?;
    calibrate::show_corrections(screen, &corrected.classes)?;
    let after = Predictor::new(&corrected.profile).map_err(Failure::internal)?;

    screen.step("validate: those that test, which the correction has not seen");
    let runs: Vec<Run> =
        tested.into_iter().map(|trial| held_against(&bench, trial, &after)).collect::<Result<_, _>>()?;
    let errors = |error: fn(&Run) -> f64| runs.iter().map(|run| error(run).abs()).collect::<Vec<f64>>();
    let (before, after) = (errors(|run| run.error_before), errors(|run| run.error_after));
    let document = Document {
        format: "paceline.demo/1",
        median_error_before: median(before),
        median_error_after: median(after.clone()),
        worst_error_after: after.into_iter().fold(0.0, f64::max),
        peak_bytes_equal: runs.iter().all(|run| run.predicted_peak_bytes == run.measured_peak_bytes),
        variation: variation(&runs),
        runs,
        trained,
        taught_by,
        disturbed,
        seconds: begin.elapsed().as_secs_f64(),
    };
    if let Some(directory) = &arguments.output {
        corrected.profile.save(&directory.join("profile.csv")).map_err(Failure::bad_input)?;
        chosen.write(&directory.join("plan.json")).map_err(Failure::bad_input)?;
        for (name, trace) in [("predicted.json", &predicted), ("measured.json", &report.trace)] {
            write_whole(&directory.join(name), &serde_json::to_vec(trace).map_err(Failure::internal)?)?;
        }
        let text = serde_json::to_vec_pretty(&document).map_err(Failure::internal)?;
        write_whole(&directory.join("demo.json"), &text)?;
        screen.say(format!("profile, plan and traces kept in {}", directory.display()));
    }
    show(screen, &document)?;
    screen.document(&document)
}

fn train(screen: &Screen, bench: &Bench, plan: &Plan, steps: u64) -> Result<RunReport, Failure> {
    let mut settings = training::settings(&plan.job, bench.data, steps)?;
    settings.stop = Some(bench.stop.clone());
    let program = plan.program().map_err(Failure::internal)?;
    let mut follow = Follow::new(screen, "train", steps);
    paceline_exec::run(&program, &bench.local.device, &settings, bench.data, &mut follow).map_err(training::failure)
}

fn trained(plan: &Plan, report: &RunReport) -> Trained {
    let loss = |at: Option<&(u64, f64)>| at.map_or(f64::NAN, |&(_, loss)| loss);
    Trained {
        configuration: plan.configuration.clone(),
        steps: report.steps.len() as u64,
        predicted_seconds: plan.prediction.iteration_seconds,
        measured_seconds: report.median_seconds(),
        tokens_per_second: report.tokens_per_step as f64 / report.median_seconds(),
        held_out_loss_first: loss(report.held_out.first()),
        held_out_loss_last: loss(report.held_out.last()),
    }
}

fn held_against(bench: &Bench, trial: Trial, after: &Predictor) -> Result<Run, Failure> {
    let [least, measured_seconds, most] = trial.seconds();
    let machine = bench.local.machine.for_job(bench.job);
    let predicted =
        |predictor: &Predictor| predict(&trial.program, predictor, machine, None).map_err(Failure::internal);
    let (before, trace) = predicted(&bench.local.predictor)?;
    let (after, _) = predicted(after)?;
    let predicted_peak_bytes: Vec<u64> = trace.ranks.iter().map(|rank| rank.peak_bytes).collect();
    let peaks = |report: &RunReport| report.memory.iter().map(|memory| memory.peak_bytes).collect::<Vec<u64>>();
    // All runs are alike but for their times; one that is not shall be seen.
    let unlike = trial.reports.iter().find(|report| peaks(report) != predicted_peak_bytes);
    let report = unlike.unwrap_or(&trial.reports[0]);
    let loss = |step: Option<&paceline_exec::StepReport>| step.map_or(f64::NAN, |step| step.loss);
    Ok(Run {
        predicted_seconds_before: before.iteration_seconds,
        predicted_seconds_after: after.iteration_seconds,
        measured_seconds,
        measured_range_seconds: [least, most],
        measured_runs: trial.reports.len(),
        error_before: before.iteration_seconds / measured_seconds - 1.0,
        error_after: after.iteration_seconds / measured_seconds - 1.0,
        predicted_peak_bytes,
        measured_peak_bytes: peaks(report),
        loss_first: loss(report.steps.first()),
        loss_last: loss(report.steps.last()),
        configuration: trial.configuration,
    })
}

fn variation(runs: &[Run]) -> Option<f64> {
    let repeated = runs.iter().filter(|run| run.measured_runs > 1);
    let half_range =
        |run: &Run| (run.measured_range_seconds[1] - run.measured_range_seconds[0]) / 2.0 / run.measured_seconds;
    let halves: Vec<f64> = repeated.map(half_range).collect();
    (!halves.is_empty()).then(|| median(halves))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

fn show(screen: &Screen, demo: &Document) -> Result<(), Failure> {
    let t = &demo.trained;
    screen.line(format!(
        "\nTrained {} steps under {}: {} per step (predicted {}), {:.0} tokens/s, held-out loss {:.3} -> {:.3}",
        t.steps,
        t.configuration,
        show_seconds(t.measured_seconds),
        show_seconds(t.predicted_seconds),
        t.tokens_per_second,
        t.held_out_loss_first,
        t.held_out_loss_last
    ))?;
    screen.line(format!(
        "Loop closed in {:.0} s; prediction against measurement, in runs that the correction did not see:\n",
        demo.seconds
    ))?;
    let mut table = Table::new([
        "configuration",
        "ranks",
        "measured",
        "by round",
        "predicted",
        "error",
        "recalibrated",
        "error",
        "peak bytes of the fullest rank",
    ]);
    let signed = |error: f64| format!("{:+.1} %", error * 100.0);
    for run in &demo.runs {
        let equal = run.predicted_peak_bytes == run.measured_peak_bytes;
        let peak = |bytes: &[u64]| bytes.iter().copied().max().unwrap_or(0);
        let (predicted, measured) = (peak(&run.predicted_peak_bytes), peak(&run.measured_peak_bytes));
        table.styled(
            (!equal).then_some(Style::Bad),
            [
                run.configuration.to_string(),
                run.measured_peak_bytes.len().to_string(),
                show_seconds(run.measured_seconds),
                if run.measured_runs > 1 {
                    run.measured_range_seconds.map(|seconds| signed(seconds / run.measured_seconds - 1.0)).join(" to ")
                } else {
                    "one run".into()
                },
                show_seconds(run.predicted_seconds_before),
                signed(run.error_before),
                show_seconds(run.predicted_seconds_after),
                signed(run.error_after),
                if equal { format!("{measured} =") } else { format!("{measured}, predicted {predicted}") },
            ],
        );
    }
    table.print(screen)?;
    screen.line(screen.style(
        Style::Bold,
        format!(
            "  median error {} before recalibration, {} after; worst after {}; peak bytes {}",
            show_percent(demo.median_error_before),
            show_percent(demo.median_error_after),
            show_percent(demo.worst_error_after),
            if demo.peak_bytes_equal { "equal on every rank" } else { "DIFFER" }
        ),
    ))?;
    let left_out = match demo.disturbed {
        0 => String::new(),
        n => format!(" ({n} runs left out, whose cores other work shared)"),
    };
    match demo.variation {
        Some(variation) => screen.line(format!(
            "  the same configuration varied by +-{} from round to round{left_out}; no prediction can be seen to be nearer",
            show_percent(variation)
        )),
        None => Ok(()),
    }
}
