//! Preparing a run: what it begins from, whether it fits, and who takes part in it; then it trains ([`training`]).

mod training;

use crate::bind::Bound;
use crate::checkpoint;
use crate::cpu::{CpuHands, Job};
use crate::crew::{Clock, with_crew};
use crate::data::Dataset;
use crate::device_exchange;
use crate::error::{CheckpointError, ExecError};
use crate::fabric::Fabric;
use crate::host_effects::HostEffects;
use crate::lines::Lines;
use crate::memory::ALIGNMENT;
use crate::processes::Mesh;
use crate::report::{Observer, RunReport};
use crate::seam::Passes;
use crate::settings::RunSettings;
use crate::state::Holders;
use paceline_kernels::Device;
use paceline_sim::arena;
use paceline_sim::memory::walk;
use paceline_sim::program::{MemoryClass, OpKind, Program};
use paceline_sim::units::{RankId, show_bytes};
use std::collections::BTreeSet;
use std::sync::Mutex;
use training::Training;

/// How often a thread looks for work before it sleeps, where each device has a core: some tens of microseconds.
pub(crate) const SPINS: u32 = 2000;

/// Trains a model of any kind: [`crate::run`] with the passes and the device given.
///
/// # Errors
/// See [`ExecError`]. One rank's error ends the run of all.
pub fn run_passes(
    program: &Program,
    passes: &dyn Passes,
    device: &dyn Device,
    settings: &RunSettings,
    data: &Dataset,
    observer: &mut dyn Observer,
) -> Result<RunReport, ExecError> {
    let Some(processes) = &settings.processes else {
        return train_here(program, passes, device, settings, data, observer);
    };
    let trained =
        fits(program, &processes.mesh).and_then(|()| train_here(program, passes, device, settings, data, observer));
    match &trained {
        Ok(_) => processes.mesh.finish()?,
        Err(error) => processes.mesh.give_up(&error.to_string()),
    }
    trained
}

/// Whether a program can run with a process per rank.
fn fits(program: &Program, mesh: &Mesh) -> Result<(), ExecError> {
    let (ranks, size) = (program.ranks.len(), mesh.size());
    if ranks != size as usize {
        return Err(ExecError::Setting {
            key: "WORLD_SIZE",
            value: size.to_string(),
            allowed: format!("the plan has {ranks} ranks: start {ranks} processes, or make a plan for {size} devices"),
        });
    }
    if program.steps() > 1 {
        return Err(ExecError::Program(
            "steps without a barrier (barrier_every) need all ranks in one process; set barrier_every = 1".into(),
        ));
    }
    if program.link().is_some() {
        return Err(ExecError::Program(
            "a rehearsed link between groups (link_bandwidth) needs all ranks in one process".into(),
        ));
    }
    Ok(())
}

/// Refuses a program whose ranks here do not fit into the device's memory together.
fn require_room(job: &Job) -> Result<(), ExecError> {
    let Some((free, total)) = job.device.memory().map_err(ExecError::Device)? else { return Ok(()) };
    let hosted: Vec<usize> = (0..job.program.ranks.len()).filter(|&rank| job.hosts(rank)).collect();
    // Ranks that share memory add up in rooms of their own: one, or where the host runs ahead one per queue of collectives.
    let streams = |rank: &usize| {
        let ops = job.program.ranks[*rank].ops.iter();
        let reduces = ops.filter(|op| matches!(op.kind, OpKind::Collective { .. }));
        reduces.map(|op| op.stream).collect::<BTreeSet<_>>().len() as u64
    };
    let queues = job.device.queues().filter(|_| job.lines.is_some());
    let mut before = match (hosted.len() > 1, queues) {
        (false, _) => 0,
        (true, None) => device_exchange::ROOM,
        (true, Some(_)) => device_exchange::ROOM * hosted.iter().map(streams).sum::<u64>(),
    };
    before += queues.map_or(0, |queues| queues.room() * hosted.len() as u64);
    for rank in hosted {
        let bytes = arena::plan(&job.program.ranks[rank], ALIGNMENT).bytes;
        if before + bytes > free {
            let curve = walk(job.program, RankId(rank as u32));
            let mut classes: Vec<(MemoryClass, u64)> = curve.peak_by_class.into_iter().collect();
            classes.sort_by_key(|&(_, bytes)| std::cmp::Reverse(bytes));
            let said = classes.iter().map(|&(class, bytes)| format!("{class} {}", show_bytes(bytes)));
            return Err(ExecError::NoRoom {
                rank: RankId(rank as u32),
                device: job.device.name(),
                bytes,
                classes: said.collect::<Vec<_>>().join(", "),
                before,
                free,
                total,
            });
        }
        before += bytes;
    }
    Ok(())
}

/// The part of this process.
fn train_here(
    program: &Program,
    passes: &dyn Passes,
    device: &dyn Device,
    settings: &RunSettings,
    data: &Dataset,
    observer: &mut dyn Observer,
) -> Result<RunReport, ExecError> {
    settings.optimizer.validate()?;
    let resumed = settings.resume.as_deref().map(checkpoint::load).transpose()?;
    if let Some((folder, progress, _)) = &resumed {
        checkpoint::require_same_model(folder, progress, &passes.digest())?;
    }
    let done = resumed.as_ref().map_or(0, |(_, progress, _)| progress.step);
    let seed = resumed.as_ref().map_or(settings.seed, |(_, progress, _)| progress.seed);
    if settings.steps <= done {
        return Err(ExecError::Setting {
            key: "steps",
            value: settings.steps.to_string(),
            allowed: format!("{done} steps are done already; give a larger number"),
        });
    }
    let bound = Bound::new(program)?;
    let processes = settings.processes.as_ref();
    let sampler = data.sampler(passes.seq(), passes.vocab(), seed)?;
    let clock = Clock::start();
    // Links between groups are rehearsed by the host's clock: then it has to see what happens when.
    let queues = device.queues().filter(|_| settings.run_ahead && program.link().is_none());
    let hosts = |rank: usize| processes.is_none_or(|processes| processes.mesh.rank() as usize == rank);
    let lines = queues.map(|queues| Lines::open(&bound, queues, hosts)).transpose().map_err(ExecError::Device)?;
    let lines = lines.as_ref();
    let job = Job {
        program,
        device,
        lines,
        clock,
        passes,
        sampler: &sampler,
        optimizer: settings.optimizer,
        poison: settings.poison,
        graphs: settings.graphs,
        steps: program.steps(),
        mesh: processes.map(|processes| &*processes.mesh),
    };
    require_room(&job)?;
    let hands: Vec<Mutex<CpuHands>> = (0..program.ranks.len())
        .filter(|&rank| job.hosts(rank))
        .map(|rank| CpuHands::new(&job, RankId(rank as u32)).map(Mutex::new))
        .collect::<Result<_, _>>()?;
    let holders = Holders { job: &job, hands: &hands };
    match &resumed {
        None => holders.initialise(seed)?,
        Some((folder, _, state)) => holders.scatter(state, |parameter, found| {
            ExecError::Checkpoint(CheckpointError::OtherModel {
                path: folder.clone(),
                key: parameter.name.clone(),
                found: found.map_or("absent".into(), |tensor| format!("{:?}", tensor.shape)),
                expected: format!("{:?}", parameter.shape),
            })
        })?,
    }
    drop(resumed);
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let roomy = processes.is_none() && program.devices.len() <= cores;
    let spins = if roomy { SPINS } else { 0 };
    let pin = settings.pin.unwrap_or(roomy && program.ranks.len() > program.devices.len());
    let mut effects = HostEffects::new(&bound, clock, device, lines);
    if let Some(processes) = processes {
        effects = effects.among(processes, device)?;
    }
    let fabric = Fabric::new(&bound, effects, spins);
    let training = Training { settings, seed, data: data.name(), holders: &holders, fabric: &fabric };
    with_crew(&fabric, clock, &hands, pin, |lead| training.train(done, lead, observer))
}
