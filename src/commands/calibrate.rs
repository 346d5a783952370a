//! `paceline calibrate`: measure this machine, or correct its profile from measured runs.

use crate::commands::import;
use crate::failure::Failure;
use crate::interrupt;
use crate::job_source::JobSource;
use crate::local::{self, Demand, Local};
use crate::profile_store;
use crate::screen::Screen;
use crate::table::{Table, show_percent, show_seconds};
use crate::trace_file;
use paceline_exec::measure::{gpu_shapes, usual_shapes};
use paceline_kernels::{CpuDevice, Device};
use paceline_profiles::{Correction, Predictor, Profile, Residual, Row, Source, recalibrate};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Measures kernels at the shapes of a job (or of usual small models) and around them, messages and collectives over sizes,
/// and the executor's overheads; fits curves over them and says how well these foretell points that they have not seen.
#[derive(Debug, Clone, clap::Args)]
#[command(
    after_help = "Examples:\n  paceline calibrate --model demo-3m --seq 256 --global-batch 8\n  paceline calibrate --seconds 120 -o profile.csv\n  paceline run plan.json --steps 20 --trace run.json && paceline calibrate --from-trace run.json\n  paceline calibrate --from nccl-tests all_reduce.log --cluster p5 -o mine.toml\n  paceline calibrate --from runs runs.csv --cluster mine.toml -o fitted.toml"
)]
pub struct Arguments {
    #[command(flatten)]
    source: JobSource,

    /// What to measure.
    #[arg(long, value_enum, default_value_t = MeasuredDevice::Cpu)]
    device: MeasuredDevice,

    /// Time for everything together (default: 30 with a job, without one 90, and 240 on a GPU).
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    seconds: Option<f64>,

    /// Devices (core slots) that a run keeps busy (default: all cores).
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    devices: Option<u32>,

    /// Correct the profile from a run: a trace of `paceline run --trace`, with the kernel times beside it. May be repeated.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["seconds", "devices", "job"])]
    from_trace: Vec<PathBuf>,

    /// Take measurements of another tool for a cluster (--cluster), and write the cluster with them (-o): logs of nccl-tests,
    /// a Chrome trace of PyTorch's profiler, or a CSV of measured runs.
    #[arg(long, num_args = 2, value_names = ["nccl-tests|torch-trace|runs", "FILE"], conflicts_with_all = ["seconds", "devices", "job", "from_trace"])]
    from: Vec<String>,

    /// With --from: refuse a file with lines or runs that cannot be used, instead of leaving them out.
    #[arg(long, requires = "from")]
    strict: bool,

    /// Where the profile goes; one of the same machine is updated (default: this user's profile).
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,

    /// With --from-trace, the profile to correct (default: as for `paceline predict`).
    #[arg(long, value_name = "FILE", requires = "from_trace")]
    profile: Option<PathBuf>,
}

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum MeasuredDevice {
    /// The cores of this machine.
    Cpu,
    /// The first NVIDIA GPU that the driver shows.
    Cuda,
    /// The GPU's kernels, run by the CPU: to try the measurement, not to predict with.
    EmulatedGpu,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (1.0..=86_400.0).contains(&seconds) => Ok(seconds),
        _ => Err("a number of seconds from 1 to 86400 is needed".into()),
    }
}

/// The document of `--json`.
#[derive(Debug, Serialize)]
struct Document<'a> {
    format: &'static str,
    output: &'a Path,
    device: &'a str,
    host: &'a str,
    cores: u32,
    /// Rows in the profile, by source.
    measured_rows: usize,
    trace_rows: usize,
    seconds: f64,
    /// Of each curve, when the other points foretell a point.
    residuals: &'a [Residual],
    /// What runs corrected.
    corrections: &'a [Correction],
}

/// Runs the command.
pub fn run(screen: &Screen, arguments: &Arguments) -> Result<(), Failure> {
    if let [kind, file] = arguments.from.as_slice() {
        let cluster = arguments.source.flags.cluster.as_deref();
        return import::run(screen, kind, Path::new(file), cluster, arguments.strict, arguments.output.as_deref());
    }
    let begin = Instant::now();
    let output = match &arguments.output {
        Some(path) => path.clone(),
        None => {
            let kept = match arguments.device {
                MeasuredDevice::Cpu => profile_store::user_path(),
                MeasuredDevice::Cuda | MeasuredDevice::EmulatedGpu => profile_store::gpu_path(),
            };
            kept.ok_or_else(|| {
                Failure::bad_input("there is no home directory to keep a profile in; name a file with -o profile.csv")
            })?
        }
    };
    let (profile, corrections) = if arguments.from_trace.is_empty() {
        (measure(screen, arguments)?, Vec::new())
    } else {
        correct(screen, arguments)?
    };
    let profile = profile_store::update(screen, &output, profile)?;
    let predictor = Predictor::new(&profile).map_err(Failure::internal)?;
    let residuals = predictor.residuals().map_err(Failure::internal)?;
    let rows_of = |source: Source| profile.rows.iter().filter(|row| row.source == source).count();
    show_residuals(screen, &residuals)?;
    if !corrections.is_empty() {
        screen.line("")?;
        show_corrections(screen, &corrections)?;
    }
    screen.say(format!("{} rows in {}", profile.rows.len(), output.display()));
    screen.document(&Document {
        format: "paceline.calibration/1",
        output: &output,
        device: &profile.machine.device,
        host: &profile.machine.host,
        cores: profile.machine.cores,
        measured_rows: rows_of(Source::Measured),
        trace_rows: rows_of(Source::Trace),
        seconds: begin.elapsed().as_secs_f64(),
        residuals: &residuals,
        corrections: &corrections,
    })
}

fn measure(screen: &Screen, arguments: &Arguments) -> Result<Profile, Failure> {
    let device: Box<dyn Device> = match arguments.device {
        MeasuredDevice::Cpu => Box::new(CpuDevice::new()),
        gpu => crate::gpu::open(gpu == MeasuredDevice::EmulatedGpu, 0)?,
    };
    let stop = interrupt::flag()?;
    let host = device.is_host();
    let (cores, devices) = if host { (local::cores(), arguments.devices) } else { (1, Some(1)) };
    let budget = |usual: f64| arguments.seconds.unwrap_or(usual);
    let (keys, mut settings) = if arguments.source.is_empty()? {
        let (shapes, seconds) = if host { (usual_shapes(), 90.0) } else { (gpu_shapes(), 240.0) };
        (shapes.into_iter().collect(), local::measure_settings(budget(seconds), devices))
    } else {
        let demand = Demand::of(&arguments.source.read()?, cores)?;
        let settings = demand.settings(budget(30.0), devices);
        (demand.keys, settings)
    };
    let on = match arguments.device {
        MeasuredDevice::Cpu => format!("{} cores", settings.devices),
        gpu => {
            // Several times the largest cache, which the emulated one does not have.
            settings.working_set_bytes = if gpu == MeasuredDevice::Cuda { 1 << 30 } else { 1 << 20 };
            format!("{} ({})", device.name(), device.details())
        }
    };
    screen.step(format!(
        "measuring {} kernel shapes and the grid around them on {on} for about {:.0} s",
        keys.len(),
        settings.budget.as_secs_f64()
    ));
    local::calibrate(screen, &*device, &keys, &settings, &stop)
}

fn correct(screen: &Screen, arguments: &Arguments) -> Result<(Profile, Vec<Correction>), Failure> {
    let local = Local::open(screen, arguments.profile.as_deref())?;
    let mut rows: Vec<Row> = Vec::new();
    for path in &arguments.from_trace {
        trace_file::read(path)?;
        let run = trace_file::read_kernels(path)?;
        if let Some(other) = local.profile.made_elsewhere(&run.machine) {
            return Err(Failure::bad_input(format!("{}: {other}", path.display()))
                .hint("correct a profile with runs of its own machine"));
        }
        rows.extend(run.rows);
    }
    let corrected = recalibrate(&local.profile, &rows).map_err(Failure::internal)?;
    Ok((corrected.profile, corrected.classes))
}

/// Prints how well each curve foretells what it has not seen.
pub fn show_residuals(screen: &Screen, residuals: &[Residual]) -> Result<(), Failure> {
    let mut table = Table::new(["op class", "points", "median error", "worst error"]);
    let share = |error: Option<f64>| error.map_or("-".into(), show_percent);
    for residual in residuals {
        table.row([
            residual.class.to_string(),
            residual.points.to_string(),
            share(residual.median_error),
            share(residual.worst_error),
        ]);
    }
    table.print(screen)?;
    screen.line("  errors of the curves: each point foretold by the others; measured shapes themselves are looked up, not fitted")
}

/// Prints what runs corrected, the largest parts of their time.
pub fn show_corrections(screen: &Screen, corrections: &[Correction]) -> Result<(), Failure> {
    let mut table =
        Table::new(["op class", "calls", "time in runs", "predicted before", "after", "error before", "after"]);
    let signed = |error: f64| format!("{:+.1} %", error * 100.0);
    for class in corrections {
        table.row([
            class.class.to_string(),
            class.count.to_string(),
            show_seconds(class.seconds),
            show_seconds(class.before_seconds),
            show_seconds(class.after_seconds),
            signed(class.error_before()),
            signed(class.error_after()),
        ]);
    }
    table.print(screen)
}
