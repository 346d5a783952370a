//! `paceline predict`: will it fit, how fast will it be?

use crate::commands::cluster;
use crate::failure::Failure;
use crate::job_source::JobSource;
use crate::local::Local;
use crate::screen::{Screen, Style};
use crate::table::{Table, show_percent, show_seconds};
use crate::timeline;
use crate::trace_file;
use paceline_planner::configuration::Configuration;
use paceline_planner::prediction::{Prediction, predict};
use paceline_sim::units::show_bytes;
use std::path::PathBuf;

/// Memory and time of one configuration: every axis of the job has one value, those that it leaves out the simplest.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(
    after_help = "Examples:\n  paceline predict --model demo-3m --seq 256 --global-batch 8 --pp 2 --schedule zb-h1\n  paceline predict job.toml --memory-limit 2GiB --json"
)]
pub struct Arguments {
    #[command(flatten)]
    pub source: JobSource,

    /// Profile of this machine (default: $PACELINE_PROFILE, else what `paceline calibrate` wrote, else the shipped one).
    #[arg(long, value_name = "FILE")]
    pub profile: Option<PathBuf>,

    /// Write the simulated timeline, for `paceline compare`.
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,

    /// Write the simulated timeline for ui.perfetto.dev.
    #[arg(long, value_name = "FILE")]
    pub perfetto: Option<PathBuf>,

    #[command(flatten)]
    pub budget: cluster::Budget,
}

/// Runs the command.
pub fn run(screen: &Screen, arguments: &Arguments) -> Result<(), Failure> {
    if arguments.source.cluster()?.is_some() {
        if arguments.trace.is_some() || arguments.perfetto.is_some() || arguments.profile.is_some() {
            return Err(Failure::bad_input(
                "--trace, --perfetto and --profile are for cluster = \"local\"; leave them out",
            ));
        }
        return cluster::predict(screen, &arguments.source, &arguments.budget);
    }
    let job = arguments.source.read()?;
    let configuration = Configuration::of_job(&job).map_err(Failure::bad_input)?;
    let local = Local::open(screen, arguments.profile.as_deref())?;
    let machine = local.machine.for_job(&job);
    let configuration = configuration.measured(&job, machine, &local.predictor).map_err(Failure::bad_input)?;
    let program = configuration.program(&job, machine).map_err(Failure::bad_input)?;
    let (prediction, trace) =
        predict(&program, &local.predictor, machine, job.memory_limit).map_err(Failure::internal)?;
    trace_file::write_if_asked(screen, &trace, arguments.trace.as_deref(), arguments.perfetto.as_deref())?;
    screen.line(format!(
        "{} on {} device{}, {configuration}",
        job.model.name,
        machine.devices,
        plural(machine.devices)
    ))?;
    show(screen, &prediction)?;
    screen.line("")?;
    timeline::show(screen, &trace)?;
    screen.document(&prediction)
}

fn plural(n: u32) -> &'static str {
    if n == 1 { "" } else { "s" }
}

/// Prints a prediction.
pub fn show(screen: &Screen, prediction: &Prediction) -> Result<(), Failure> {
    let p = prediction;
    let mut headline = format!(
        "{} per iteration, {:.0} tokens/s per device",
        show_seconds(p.iteration_seconds),
        p.tokens_per_second_per_gpu
    );
    if let (Some(mfu), Some(hfu)) = (p.mfu, p.hfu) {
        headline += &format!(", MFU {}, HFU {}", show_percent(mfu), show_percent(hfu));
    }
    screen.line(screen.style(Style::Bold, headline))?;
    let time = &p.time;
    let parts = [
        ("compute", time.compute),
        ("recompute", time.recompute),
        ("optimizer", time.optimizer),
        ("exposed tensor-parallel", time.exposed_tp),
        ("exposed data-parallel", time.exposed_dp),
        ("exposed pipeline", time.exposed_pp),
        ("exposed context-parallel", time.exposed_cp),
        ("exposed expert-parallel", time.exposed_ep),
        ("bubble", time.bubble),
    ];
    screen.line("")?;
    let mut table = Table::new(["time (mean over devices)", "", "share"]);
    for (name, seconds) in parts.into_iter().filter(|&(_, seconds)| seconds > 0.0) {
        table.row([name.to_string(), show_seconds(seconds), show_percent(seconds / p.iteration_seconds)]);
    }
    table.print(screen)?;
    screen.line("")?;
    let mut table = Table::new([
        "memory",
        "peak",
        "parameters",
        "gradients",
        "optimizer",
        "activations",
        "communication",
        "workspace",
        "overhead",
    ]);
    for (rank, (&peak, classes)) in p.memory.peak_bytes.iter().zip(&p.memory.by_class).enumerate() {
        let over = p.memory.limit_bytes.is_some_and(|limit| peak > limit);
        table.styled(
            over.then_some(Style::Bad),
            [
                format!("pipeline rank {rank}"),
                show_bytes(peak),
                show_bytes(classes.parameters),
                show_bytes(classes.gradients),
                show_bytes(classes.optimizer),
                show_bytes(classes.activations),
                show_bytes(classes.communication),
                show_bytes(classes.workspace),
                show_bytes(classes.overhead),
            ],
        );
    }
    table.print(screen)?;
    if let Some(limit) = p.memory.limit_bytes {
        let peak = p.memory.peak_bytes.iter().copied().max().unwrap_or(0);
        screen.line(if p.memory.fits {
            screen.style(Style::Good, format!("  fits: {} of {} per rank", show_bytes(peak), show_bytes(limit)))
        } else {
            let over = show_bytes(peak.saturating_sub(limit));
            screen.style(
                Style::Bad,
                format!("  does not fit: {} per rank allowed, {over} more needed", show_bytes(limit)),
            )
        })?;
    }
    let from = &p.provenance;
    let mut sources = vec![
        format!("{} measured", show_percent(from.measured)),
        format!("{} interpolated", show_percent(from.fitted)),
    ];
    if from.datasheet > 0.0 {
        sources.push(format!("{} from datasheets", show_percent(from.datasheet)));
    }
    if from.assumed > 0.0 {
        sources.push(format!("{} assumed", show_percent(from.assumed)));
    }
    screen.line(format!("\n  Of the predicted time: {}.", sources.join(", ")))
}
