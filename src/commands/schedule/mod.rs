//! `paceline schedule`: builds, draws, compares, exports and imports pipeline schedules.

mod on_machine;
mod times;
mod view;

use crate::failure::Failure;
use crate::screen::Screen;
use on_machine::OnMachine;
use paceline_planner::bounds;
use paceline_planner::configuration::RECOMPUTING;
use paceline_planner::drawing::render_svg;
use paceline_planner::interchange::pytorch;
use paceline_planner::optimise::Problem;
use paceline_planner::order::ComputeOrder;
use paceline_planner::replay::{Peaks, Timing, memory_curve, peaks, replay};
use paceline_planner::schedules::{self, Request};
use paceline_sim::program::Pass;
use paceline_sim::units::show_bytes;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::Instant;
use times::{Given, Per, Sizes};

/// One pipeline schedule, or several side by side.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  paceline schedule v-half -p 8 -m 32\n  paceline schedule -p 4 -m 16 --compare 1f1b,zb-h1,v-half --f 18.5 --b 18.1 --w 9.3 --comm 0.6\n  paceline schedule zb-v -p 4 -m 12 --svg zb-v.svg --export pytorch zb-v.csv\n  paceline schedule --import pytorch mine.csv\n  paceline schedule --job job.toml -p 4 --compare 1f1b,zb-v,v-half,optimised --memory-limit 64MiB"
)]
pub struct Arguments {
    /// Name of the schedule; `paceline schedule --list` prints all.
    #[arg(value_name = "NAME", required_unless_present_any = ["compare", "import", "list"], conflicts_with_all = ["compare", "import", "list"])]
    name: Option<String>,

    /// Print the schedules by name.
    #[arg(long)]
    list: bool,

    /// Pipeline devices (default: 4, or what the job says).
    #[arg(short = 'p', long = "devices", value_name = "P")]
    devices: Option<u32>,

    /// Microbatches per step (default: 8).
    #[arg(short = 'm', long = "microbatches", value_name = "M")]
    microbatches: Option<u32>,

    /// Take microbatches, times of the stages, bytes of their activations and the room for them from a job on this machine; the layers are
    /// cut for each schedule so that the busiest device does as little as can be.
    #[arg(long, value_name = "JOB.toml", conflicts_with_all = ["microbatches", "f", "b", "w", "comm", "per", "activation", "memory_fractions", "import"])]
    job: Option<PathBuf>,

    /// Profile of this machine for --job (default: as `paceline predict`).
    #[arg(long, value_name = "FILE", requires = "job")]
    profile: Option<PathBuf>,

    /// Stages per device.
    #[arg(long, value_name = "V")]
    chunks: Option<u32>,

    /// Time of a forward pass: one number, or one per stage.
    #[arg(long, value_name = "TIME[,..]", default_value = "1")]
    f: Given,

    /// Time of a backward for the input: one number, or one per stage.
    #[arg(long, value_name = "TIME[,..]", default_value = "1")]
    b: Given,

    /// Time of a backward for the weights: one number, or one per stage.
    #[arg(long, value_name = "TIME[,..]", default_value = "1")]
    w: Given,

    /// Time of a transfer between neighbouring stages on different devices.
    #[arg(long, value_name = "TIME", default_value_t = 0.0)]
    comm: f64,

    /// What a single number of --f, --b, --w is the time of: one stage, or all stages of a device (then a schedule with V
    /// chunks takes a V-th of it per stage). Default: stage; device with --compare, so that all do the same work.
    #[arg(long, value_enum, value_name = "UNIT")]
    per: Option<Per>,

    /// The most activation memory per device: a bare number counts microbatch-stages; with a unit (`6GiB`), bytes, which needs
    /// --activation. With --job: bytes per device for everything, parameters and optimizer included.
    #[arg(long, value_name = "N|BYTES")]
    memory_limit: Option<String>,

    /// Bytes of one microbatch-stage: the activations of one microbatch on one device.
    #[arg(long, value_name = "BYTES")]
    activation: Option<String>,

    /// Parts of a microbatch's activation that are freed at B and at W.
    #[arg(long, value_name = "B,W")]
    memory_fractions: Option<String>,

    /// Schedules to hold side by side.
    #[arg(long, value_name = "A,B,..", value_delimiter = ',')]
    compare: Option<Vec<String>>,

    /// Draw into an SVG file.
    #[arg(long, value_name = "FILE", conflicts_with = "compare")]
    svg: Option<PathBuf>,

    /// Write for another runtime: `pytorch FILE.csv`.
    #[arg(long, num_args = 2, value_names = ["FORMAT", "FILE"], conflicts_with = "compare")]
    export: Option<Vec<String>>,

    /// Read a schedule of another runtime: `pytorch FILE.csv`.
    #[arg(long, num_args = 2, value_names = ["FORMAT", "FILE"], conflicts_with = "compare")]
    import: Option<Vec<String>>,
}

/// A schedule with all that is said about it, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Document {
    format: &'static str,
    name: String,
    p: usize,
    m: u32,
    chunks: usize,
    placement: String,
    makespan: f64,
    bubble_span: f64,
    bubble_makespan: f64,
    peak: Vec<f64>,
    peak_unsplit: Vec<f64>,
    lower_bound: f64,
    lower_bound_reason: String,
    gap: f64,
    generation_seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    fits: Option<bool>,
    times_per: Per,
    /// `given` where flags say what a pass takes.
    time_unit: &'static str,
    memory_unit: &'static str,
    actions: Vec<Vec<String>>,
}

#[derive(Debug, Serialize)]
struct Comparison {
    format: &'static str,
    schedules: Vec<Document>,
}

/// Devices and microbatches where nothing says how many.
const DEVICES: u32 = 4;
const MICROBATCHES: u32 = 8;

/// A schedule that has been replayed.
struct Studied {
    /// What it solves, where it keeps a limit.
    problem: Option<Problem>,
    order: ComputeOrder,
    timing: Timing,
    curve: Vec<Vec<f64>>,
    document: Document,
}

/// Runs the command.
pub fn run(screen: &Screen, arguments: &Arguments) -> Result<(), Failure> {
    if arguments.list {
        return view::list(screen);
    }
    let machine = arguments.job.as_deref().map(|path| OnMachine::open(screen, path, arguments)).transpose()?;
    let machine = machine.as_ref();
    let export = arguments.export.as_deref().map(|pair| target("--export", pair)).transpose()?;
    if let Some(names) = &arguments.compare {
        let per = arguments.per.unwrap_or(Per::Device);
        let all = names.iter().map(|name| study_named(arguments, machine, name, per));
        let mut all = all.collect::<Result<Vec<_>, _>>()?;
        tighten(&mut all);
        if screen.json() {
            let schedules = all.into_iter().map(|studied| studied.document).collect();
            return screen.document(&Comparison { format: "paceline.schedules/1", schedules });
        }
        headline(screen, machine)?;
        return view::comparison(
            screen,
            all.iter().map(|studied| &studied.document),
            arguments.memory_limit.as_deref(),
        );
    }
    let per = arguments.per.unwrap_or(Per::Stage);
    let mut studied = match (&arguments.import, &arguments.name) {
        (Some(pair), _) => study_file(arguments, target("--import", pair)?, per)?,
        (None, Some(name)) => study_named(arguments, machine, name, per)?,
        (None, None) => return Err(Failure::bad_input("schedule: give a NAME, --compare or --import")),
    };
    tighten(std::slice::from_mut(&mut studied));
    if let Some(path) = export {
        let text = pytorch::write(&studied.order, pytorch::Layout::Dense).map_err(Failure::bad_input)?;
        write(path, &text)?;
        screen.say(format!("wrote {}", path.display()));
    }
    if let Some(path) = &arguments.svg {
        write(path, &render_svg(&studied.order, &studied.timing, &studied.curve))?;
        screen.say(format!("wrote {}", path.display()));
    }
    if studied.document.fits == Some(false) {
        screen.warn(format!(
            "{} needs more than --memory-limit allows; zb-1p, zb-v-timed, adaptive-v and optimised keep a limit",
            studied.document.name
        ));
    }
    if screen.json() {
        return screen.document(&studied.document);
    }
    headline(screen, machine)?;
    view::one(screen, &studied)
}

fn headline(screen: &Screen, machine: Option<&OnMachine>) -> Result<(), Failure> {
    machine.map_or(Ok(()), |machine| screen.line(machine.headline()))
}

fn target<'a>(flag: &str, pair: &'a [String]) -> Result<&'a Path, Failure> {
    match pair {
        [format, file] if format == "pytorch" => Ok(Path::new(file)),
        [format, _] => Err(Failure::bad_input(format!("{flag} {format}: unknown format; known: pytorch"))),
        _ => Err(Failure::bad_input(format!(
            "{flag} needs a format and a file, for example: {flag} pytorch schedule.csv"
        ))),
    }
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    std::fs::write(path, text).map_err(|error| {
        Failure::bad_input(format!(
            "{}: cannot be written ({error}); give a path in a folder that exists",
            path.display()
        ))
    })
}

/// Raises the bounds of schedules that are far from them where a stronger one can be computed: one for all with the same stages.
fn tighten(all: &mut [Studied]) {
    for first in 0..all.len() {
        let Some(problem) = all[first].problem.clone() else { continue };
        let alike = |studied: &Studied| {
            studied.problem.as_ref().is_some_and(|other| {
                (&other.placement, &other.times, &other.memory) == (&problem.placement, &problem.times, &problem.memory)
            })
        };
        if all[..first].iter().any(alike) {
            continue;
        }
        let best = all.iter().filter(|s| alike(s)).map(|s| s.document.makespan).fold(f64::INFINITY, f64::min);
        let bound = bounds::strongest(&problem, best);
        for studied in all.iter_mut().filter(|studied| alike(studied)) {
            let document = &mut studied.document;
            document.lower_bound = bound.makespan;
            document.lower_bound_reason = bound.reason.to_string();
            document.gap = bound.gap(document.makespan);
        }
    }
}

fn study_named(arguments: &Arguments, machine: Option<&OnMachine>, name: &str, per: Per) -> Result<Studied, Failure> {
    let schedule = schedules::find(name).map_err(Failure::bad_input)?;
    // In a comparison, chunks are asked of those schedules that have a choice.
    let chunks = match &arguments.compare {
        Some(_) => arguments.chunks.filter(|&v| schedule.chunks_for(Some(v)).is_ok()),
        None => arguments.chunks,
    };
    let request = match machine {
        Some(machine) => machine.request(schedule, chunks)?,
        None => {
            let devices = arguments.devices.unwrap_or(DEVICES);
            Request { chunks, ..Request::new(devices, arguments.microbatches.unwrap_or(MICROBATCHES)) }
        }
    };
    schedule.check(&request).map_err(Failure::bad_input)?;
    let placement = schedule.placement(request.devices, chunks).map_err(Failure::bad_input)?;
    let sizes = match machine {
        Some(machine) => machine.sizes(schedule, chunks)?,
        None => times::sizes(arguments, &placement, per)?,
    };
    // That schedule holds less than a microbatch's activations.
    if let (Some(limits), false) = (&sizes.limit, name == RECOMPUTING) {
        // A schedule over a limit that others keep is shown as such; a limit that nothing can keep is a mistake.
        let least = bounds::least_peaks(&placement, &sizes.memory);
        for (device, (limit, least)) in limits.iter().zip(least).enumerate() {
            if *limit < least * (1.0 - 1e-9) {
                return Err(Failure::bad_input(too_little(machine.is_some(), name, device, *limit, least)));
            }
        }
    }
    let request = Request {
        times: Some(sizes.times.clone()),
        memory: Some(sizes.memory.clone()),
        limit: sizes.limit.clone(),
        ..request
    };
    let begin = Instant::now();
    let order = schedules::build(name, &request).map_err(Failure::bad_input)?;
    study(order, sizes, per, machine.is_some(), begin.elapsed().as_secs_f64())
}

fn too_little(on_machine: bool, name: &str, device: usize, limit: f64, least: f64) -> String {
    if on_machine {
        let [limit, least] = [limit, least].map(|bytes| show_bytes(bytes as u64));
        format!(
            "memory limit: beside parameters, gradients and optimizer it leaves {limit} on device {device}, below the least possible peak of {name}, which is {least} (one microbatch at a time); raise it by the difference, recompute, or take a smaller micro_batch"
        )
    } else {
        format!(
            "--memory-limit {limit}: below the least possible peak of {name}, which is {least} microbatch-stages (one microbatch at a time)"
        )
    }
}

fn study_file(arguments: &Arguments, path: &Path, per: Per) -> Result<Studied, Failure> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        Failure::bad_input(format!(
            "{}: cannot be read ({error}); give the compute-only CSV of a schedule",
            path.display()
        ))
    })?;
    let name = path.file_stem().map_or_else(|| "imported".into(), |stem| stem.to_string_lossy().into_owned());
    let begin = Instant::now();
    let order =
        pytorch::read(&text, &name).map_err(|error| Failure::bad_input(format!("{}: {error}", path.display())))?;
    let sizes = times::sizes(arguments, &order.placement, per)?;
    study(order, sizes, per, false, begin.elapsed().as_secs_f64())
}

fn study(
    order: ComputeOrder,
    sizes: Sizes,
    per: Per,
    on_machine: bool,
    generation_seconds: f64,
) -> Result<Studied, Failure> {
    let Sizes { times, memory, limit } = sizes;
    let timing = replay(&order, &times).map_err(Failure::bad_input)?;
    let Peaks { peak, peak_unsplit } = peaks(&order, &memory);
    let devices = order.actions.len();
    // An order that recomputes holds less than the bound with limits supposes.
    let recomputes = order.actions.iter().flatten().any(|action| action.pass == Pass::R);
    let makespan = timing.makespan();
    let fits = limit.as_ref().map(|limits| peak.iter().zip(limits).all(|(held, limit)| *held <= limit * (1.0 + 1e-9)));
    let kept = limit.filter(|_| fits == Some(true) && !recomputes);
    let bound = bounds::lower_bound(&order.placement, order.microbatches, &times, &memory, kept.as_deref());
    let document = Document {
        format: "paceline.schedule/1",
        name: order.name.clone(),
        p: devices,
        m: order.microbatches,
        chunks: order.placement.stages() / devices.max(1),
        placement: order.placement.name.clone(),
        makespan,
        bubble_span: timing.bubble_span(),
        bubble_makespan: timing.bubble_makespan(),
        fits,
        peak,
        peak_unsplit,
        lower_bound: bound.makespan,
        lower_bound_reason: bound.reason.to_string(),
        gap: bound.gap(makespan),
        generation_seconds,
        times_per: per,
        time_unit: if on_machine { "seconds" } else { "given" },
        memory_unit: if on_machine { "bytes" } else { "microbatch-stages" },
        actions: order.actions.iter().map(|list| list.iter().map(ToString::to_string).collect()).collect(),
    };
    let curve = memory_curve(&order, &memory);
    let problem = kept.map(|limit| Problem {
        placement: order.placement.clone(),
        microbatches: order.microbatches,
        times,
        memory,
        limit,
    });
    Ok(Studied { problem, order, timing, curve, document })
}
