//! `paceline run`: execute a plan.

use crate::commands::compare;
use crate::distributed::{self, Transport};
use crate::failure::Failure;
use crate::gpu;
use crate::interrupt;
use crate::local::Local;
use crate::screen::{ColorChoice, Screen, Style};
use crate::table::{show_percent, show_seconds};
use crate::trace_file;
use crate::training::{self, Follow};
use paceline_exec::measure::{DISTURBED_RUN, disturbance, rows_of_run, this_machine};
use paceline_exec::{CheckpointSettings, RunReport, rehearse};
use paceline_kernels::Device;
use paceline_planner::plan::Plan;
use paceline_planner::prediction::{Costs, predict};
use paceline_sim::compare::{Comparison, compare};
use paceline_sim::program::Program;
use paceline_sim::trace::Trace;
use paceline_sim::units::show_bytes;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// Trains the model of a plan, exactly as it was simulated, and holds the step times and peaks against the prediction.
#[derive(Debug, Clone, clap::Args)]
#[command(
    after_help = "Examples:\n  paceline run plan.json --steps 100 --trace run.json\n  paceline run plan.json --resume plan.checkpoints --steps 200\n  paceline run plan.json --device paced --steps 3\n  torchrun --no-python --nproc-per-node 2 paceline run plan.json --distributed"
)]
pub struct Arguments {
    /// A plan of `paceline plan -o`.
    #[arg(value_name = "plan.json")]
    plan: PathBuf,

    /// Where it runs: `paced` takes the predicted time of every op without computing, to rehearse a schedule.
    #[arg(long, value_enum, default_value_t = RunDevice::Cpu)]
    device: RunDevice,

    /// Train until this many steps are done (default: the job's).
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    steps: Option<u64>,

    /// Write the timeline of the median step, for `paceline compare`; kernel times go beside it, for `calibrate --from-trace`.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,

    /// Write the timeline of the median step for ui.perfetto.dev.
    #[arg(long, value_name = "FILE")]
    perfetto: Option<PathBuf>,

    /// Go on from a checkpoint: its directory, or that of several, of which the latest counts.
    #[arg(long, value_name = "DIR")]
    resume: Option<PathBuf>,

    /// Where checkpoints go (default: beside the plan, `plan.checkpoints`).
    #[arg(long, value_name = "DIR", conflicts_with = "no_checkpoint")]
    checkpoint: Option<PathBuf>,

    /// Write a checkpoint every N steps too, not only at the end.
    #[arg(long, value_name = "N", conflicts_with = "no_checkpoint", value_parser = clap::value_parser!(u64).range(1..))]
    checkpoint_every: Option<u64>,

    /// Write no checkpoint.
    #[arg(long)]
    no_checkpoint: bool,

    /// Training data instead of the job's: a text file, a directory of texts, or a .bin file of uint16 tokens.
    #[arg(long, value_name = "PATH")]
    data: Option<String>,

    /// Profile for the prediction (default: as for `paceline predict`).
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,

    /// Launch the kernels of each pass as one graph, which is less work for the host (GPUs).
    #[arg(long)]
    graphs: bool,

    /// This process runs one rank of the plan: which one, and where all meet, say RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    /// MASTER_PORT, as torchrun and Slurm set them.
    #[arg(long)]
    distributed: bool,

    /// Over what processes exchange messages (default: nccl between GPUs, else tcp).
    #[arg(long, value_enum, requires = "distributed")]
    transport: Option<Transport>,

    /// Seconds to wait for all processes to come; a process that is silent for a quarter of it counts as lost.
    #[arg(long, value_name = "SECONDS", requires = "distributed", default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=86400))]
    peer_timeout: u64,
}

/// What a plan can run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum RunDevice {
    /// The cores of this machine.
    Cpu,
    /// The first NVIDIA GPU that the driver shows (with --distributed, number LOCAL_RANK); all devices of this process share it.
    Cuda,
    /// The kernels of the GPU, run by the CPU thread for thread: very slow, to try the GPU's way without one.
    EmulatedGpu,
    /// No device: threads that wait as long as was predicted.
    Paced,
}

/// The document of `--json`.
#[derive(Debug, Serialize)]
struct Document {
    format: &'static str,
    steps: Vec<Step>,
    /// Steps done before each and the loss then.
    held_out: Vec<HeldOut>,
    predicted_seconds: f64,
    /// Median step.
    measured_seconds: f64,
    /// Signed, relative to the measured time.
    error: f64,
    tokens_per_second: f64,
    mfu: Option<f64>,
    outside_kernels: f64,
    predicted_peak_bytes: Vec<u64>,
    measured_peak_bytes: Vec<u64>,
    peak_bytes_equal: bool,
    stopped: bool,
    checkpoint: Option<PathBuf>,
    trace: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Step {
    step: u64,
    seconds: f64,
    loss: f64,
    gradient_norm: f64,
    learning_rate: f64,
}

#[derive(Debug, Serialize)]
struct HeldOut {
    steps_done: u64,
    loss: f64,
}

/// Runs the command.
pub fn run(screen: &Screen, arguments: &Arguments) -> Result<(), Failure> {
    if arguments.plan.extension().is_some_and(|extension| extension == "toml") {
        return Err(Failure::bad_input(format!("{} is a job, and what runs is a plan", arguments.plan.display()))
            .hint(format!("paceline plan {} -o plan.json && paceline run plan.json", arguments.plan.display())));
    }
    let mut plan = Plan::read(&arguments.plan).map_err(Failure::bad_input)?;
    if let Some(data) = &arguments.data {
        plan.job.train.data = Some(data.clone());
    }
    let program = plan.program().map_err(Failure::bad_input)?;
    let place = arguments.distributed.then(distributed::place).transpose()?;
    if place.is_some() && arguments.device == RunDevice::Cuda {
        distributed::ensure_connections()?;
    }
    // Of several processes the first one speaks.
    let silent = Screen::new(true, true, ColorChoice::Never);
    let screen = if place.as_ref().is_some_and(|place| place.rank > 0) { &silent } else { screen };
    // First of all, as it may not be there.
    let gpu = self::gpu(arguments.device, place.as_ref().map_or(0, |place| place.local_rank))?;
    let local = Local::open_with(screen, arguments.profile.as_deref(), gpu.as_deref())?;
    let (prediction, predicted) =
        predict(&program, &local.predictor, plan.machine, plan.job.memory_limit).map_err(Failure::internal)?;
    screen.step(format!(
        "{}: {}, predicted {} per step",
        plan.job.model.name,
        plan.configuration,
        show_seconds(prediction.iteration_seconds)
    ));
    if arguments.device == RunDevice::Paced {
        return pace(screen, arguments, &program, &local, &predicted);
    }
    if let Some(other) = gpu.as_ref().and_then(|gpu| local.profile.made_elsewhere(&this_machine(&**gpu))) {
        screen.warn(format!("{other}: the predicted times are those of that device"));
    }
    let device = gpu.as_deref().unwrap_or(&local.device);
    train(screen, arguments, &plan, &program, &local, device, &predicted)
}

/// The GPU that was asked for, if one was.
fn gpu(device: RunDevice, ordinal: u32) -> Result<Option<Box<dyn Device>>, Failure> {
    match device {
        RunDevice::Cuda | RunDevice::EmulatedGpu => gpu::open(device == RunDevice::EmulatedGpu, ordinal).map(Some),
        RunDevice::Cpu | RunDevice::Paced => Ok(None),
    }
}

fn train(
    screen: &Screen,
    arguments: &Arguments,
    plan: &Plan,
    program: &Program,
    local: &Local,
    device: &dyn Device,
    predicted: &Trace,
) -> Result<(), Failure> {
    let place = arguments.distributed.then(distributed::place).transpose()?;
    let steps = arguments.steps.unwrap_or(plan.job.train.steps);
    let data = training::dataset(&plan.job.train)?;
    let mut settings = training::settings(&plan.job, &data, steps)?;
    settings.stop = Some(interrupt::flag()?);
    settings.resume = arguments.resume.clone();
    settings.graphs = arguments.graphs;
    if !arguments.no_checkpoint {
        let beside = || arguments.plan.with_extension("checkpoints");
        let directory = arguments.checkpoint.clone().unwrap_or_else(beside);
        settings.checkpoint = Some(CheckpointSettings { directory, every: arguments.checkpoint_every });
    }
    if let Some(place) = &place {
        let (transport, timeout) = (arguments.transport, arguments.peer_timeout);
        let data = data.name();
        settings.processes = Some(distributed::gather(place, program, &settings, data, device, transport, timeout)?);
    }
    let report = {
        let mut follow = Follow::new(screen, "train", steps);
        paceline_exec::run(program, device, &settings, &data, &mut follow).map_err(training::failure)?
    };
    if place.is_some_and(|place| place.rank > 0) {
        return Ok(());
    }
    trace_file::write_if_asked(screen, &report.trace, arguments.trace.as_deref(), arguments.perfetto.as_deref())?;
    if let Some(path) = &arguments.trace {
        keep_kernel_times(screen, path, program, &report, local, device)?;
    }
    let comparison = compare(predicted, &report.trace).map_err(Failure::internal)?;
    let document = document(program, &report, &comparison, local, arguments.trace.clone());
    show(screen, &document, &comparison)?;
    screen.document(&document)?;
    if report.stopped {
        let done = report.steps.last().map_or(0, |step| step.step);
        let failure = Failure::interrupted(format!("stopped after step {done} of {steps}"));
        return Err(match &report.checkpoint {
            Some(path) => failure.hint(format!(
                "go on with `paceline run {} --resume {} --steps {steps}`",
                arguments.plan.display(),
                path.display()
            )),
            None => failure,
        });
    }
    Ok(())
}

/// Kernel times of an undisturbed run lie beside its trace; those of a disturbed one would teach nonsense.
fn keep_kernel_times(
    screen: &Screen,
    trace: &Path,
    program: &Program,
    report: &RunReport,
    local: &Local,
    device: &dyn Device,
) -> Result<(), Failure> {
    let disturbed = disturbance(report);
    if disturbed > DISTURBED_RUN {
        screen.warn(format!(
            "kernels took {disturbed:.1} times as long as their fastest calls: other work shared these cores, so the kernel times are not kept"
        ));
        return Ok(());
    }
    let rows = rows_of_run(program, report, Some(&local.predictor));
    trace_file::write_kernels(trace, this_machine(device), rows)?;
    screen.say(format!("kernel times written to {}", trace_file::kernels_path(trace).display()));
    Ok(())
}

fn document(
    program: &Program,
    report: &RunReport,
    comparison: &Comparison,
    local: &Local,
    trace: Option<PathBuf>,
) -> Document {
    let measured_seconds = report.median_seconds();
    let tokens_per_second = report.tokens_per_step as f64 / measured_seconds;
    let paceline_sim::program::Workload::Transformer(workload) = &program.workload else {
        unreachable!("the executor trains transformers only")
    };
    let per_token = paceline_sim::model::trained_flops_per_token(workload);
    let rate = local.machine.flops_per_second.map(|rate| rate * program.devices.len() as f64);
    Document {
        format: "paceline.run/1",
        steps: report
            .steps
            .iter()
            .map(|s| Step {
                step: s.step,
                seconds: s.seconds,
                loss: s.loss,
                gradient_norm: s.gradient_norm,
                learning_rate: s.learning_rate,
            })
            .collect(),
        held_out: report.held_out.iter().map(|&(steps_done, loss)| HeldOut { steps_done, loss }).collect(),
        predicted_seconds: comparison.predicted_seconds,
        measured_seconds,
        error: comparison.predicted_seconds / measured_seconds - 1.0,
        tokens_per_second,
        mfu: rate.map(|rate| per_token * tokens_per_second / rate),
        outside_kernels: report.outside_kernels,
        predicted_peak_bytes: comparison.ranks.iter().map(|rank| rank.predicted_peak_bytes).collect(),
        measured_peak_bytes: comparison.ranks.iter().map(|rank| rank.measured_peak_bytes).collect(),
        peak_bytes_equal: compare::peaks_equal(comparison),
        stopped: report.stopped,
        checkpoint: report.checkpoint.clone(),
        trace,
    }
}

fn show(screen: &Screen, run: &Document, comparison: &Comparison) -> Result<(), Failure> {
    compare::show(screen, comparison)?;
    let mut line = format!(
        "  median step {} ({} tokens/s{}), {} outside kernels",
        show_seconds(run.measured_seconds),
        run.tokens_per_second.round(),
        run.mfu.map_or(String::new(), |mfu| format!(", MFU {}", show_percent(mfu))),
        show_percent(run.outside_kernels)
    );
    if let (Some(first), Some(last)) = (run.held_out.first(), run.held_out.last()) {
        line += &format!("; held-out loss {:.3} -> {:.3}", first.loss, last.loss);
    }
    screen.line(screen.style(Style::Bold, line))
}

/// The document of a rehearsal.
#[derive(Debug, Serialize)]
struct Rehearsed {
    format: &'static str,
    device: &'static str,
    predicted_seconds: f64,
    /// Every step.
    step_seconds: Vec<f64>,
    /// The fastest: what the machine's other work delayed least.
    fastest_seconds: f64,
    /// Signed, of the prediction relative to the fastest step.
    error: f64,
    predicted_peak_bytes: Vec<u64>,
    measured_peak_bytes: Vec<u64>,
    peak_bytes_equal: bool,
}

fn pace(
    screen: &Screen,
    arguments: &Arguments,
    program: &Program,
    local: &Local,
    predicted: &Trace,
) -> Result<(), Failure> {
    let steps = u32::try_from(arguments.steps.unwrap_or(3))
        .map_err(|_| Failure::bad_input("--steps: too many for a rehearsal"))?;
    let stop = interrupt::flag()?;
    let (costs, _) = local.predictor.of(program).map_err(Failure::internal)?;
    let rehearsal = rehearse(program, &*costs, steps, Some(&stop)).map_err(training::failure)?;
    trace_file::write_if_asked(screen, &rehearsal.trace, arguments.trace.as_deref(), arguments.perfetto.as_deref())?;
    let predicted_seconds = predicted.makespan.seconds() / f64::from(program.steps());
    let fastest = rehearsal.iteration_seconds.iter().copied().fold(f64::INFINITY, f64::min);
    let predicted_peak_bytes: Vec<u64> = predicted.ranks.iter().map(|rank| rank.peak_bytes).collect();
    let measured_peak_bytes: Vec<u64> = rehearsal.memory.iter().map(|memory| memory.peak_bytes).collect();
    let document = Rehearsed {
        format: "paceline.rehearsal/1",
        device: "paced",
        predicted_seconds,
        fastest_seconds: fastest,
        error: predicted_seconds / fastest - 1.0,
        step_seconds: rehearsal.iteration_seconds,
        peak_bytes_equal: predicted_peak_bytes == measured_peak_bytes,
        predicted_peak_bytes,
        measured_peak_bytes,
    };
    screen.line(format!(
        "  {} ranks rehearsed: predicted {}, fastest of {} steps {} ({:+.1} %), peak bytes {} (highest {})",
        program.ranks.len(),
        show_seconds(document.predicted_seconds),
        document.step_seconds.len(),
        show_seconds(fastest),
        document.error * 100.0,
        if document.peak_bytes_equal { "equal on every rank" } else { "differ" },
        show_bytes(document.measured_peak_bytes.iter().copied().max().unwrap_or(0))
    ))?;
    screen.document(&document)
}
