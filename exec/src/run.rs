//! Training: a program, step after step, from the first parameters or a checkpoint to the last step, the stop flag or an
//! error.

use crate::bind::Bound;
use crate::checkpoint::{self, Progress};
use crate::cpu::{CpuHands, Job, StepOrders};
use crate::crew::{Clock, with_crew};
use crate::data::Dataset;
use crate::device_exchange;
use crate::error::{CheckpointError, ExecError};
use crate::evaluate::held_out_loss;
use crate::fabric::Fabric;
use crate::host_effects::HostEffects;
use crate::kernel_times::KernelTally;
use crate::lines::Lines;
use crate::memory::{ALIGNMENT, MemoryReport};
use crate::processes::{Mesh, ProcessError};
use crate::report::{Observer, RunReport, StepReport};
use crate::seam::Passes;
use crate::settings::RunSettings;
use crate::state::Holders;
use crate::timeline::StepRecord;
use paceline_kernels::{Device, KernelError};
use paceline_sim::arena;
use paceline_sim::memory::walk;
use paceline_sim::program::{MemoryClass, OpKind, Program};
use paceline_sim::trace::RankTrace;
use paceline_sim::units::{OpId, RankId, show_bytes};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::Ordering;

/// Steps whose timelines are kept, to choose the median one from.
const KEPT_STEPS: usize = 64;
/// Kernels of a device that runs behind the host's back are timed in one of so many steps, and in the last.
const TIMED_EVERY: u64 = 8;
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

/// What a run has gathered.
#[derive(Default)]
struct SoFar {
    steps: Vec<StepReport>,
    held_out: Vec<(u64, f64)>,
    /// The latest runs of the program, by the number of their first step, and whether they came to their end.
    records: VecDeque<(u64, StepRecord, bool)>,
    /// Nanoseconds of compute ops in each of the steps whose kernels are counted.
    busy: Vec<u64>,
    checkpoint: Option<PathBuf>,
    stopped: bool,
}

struct Training<'t, 'p, 'a> {
    settings: &'t RunSettings,
    seed: u64,
    data: &'t str,
    holders: &'t Holders<'t, 'a>,
    fabric: &'t Fabric<'p, HostEffects<'a>>,
}

impl Training<'_, '_, '_> {
    fn train(
        &self,
        done: u64,
        lead: &crate::crew::Lead<HostEffects<'_>>,
        observer: &mut dyn Observer,
    ) -> Result<RunReport, ExecError> {
        let (settings, program) = (self.settings, self.holders.job.program);
        let tokens_per_step = self.tokens_per_step();
        let mut so_far = SoFar::default();
        self.evaluate(done, &mut so_far, observer)?;
        let mut step = done;
        while step < settings.steps && !so_far.stopped {
            let wanted = self.steps_to_do(step, done);
            let next = step + u64::from(wanted);
            let time_kernels = self.holders.job.device.is_host()
                || next == settings.steps
                || (step..next).any(|step| step % TIMED_EVERY == 1);
            let capture_gradients = settings.capture_gradients;
            let orders = StepOrders { step, steps: wanted, capture_gradients, time_kernels };
            // What was done between steps is not on the ranks' queues.
            let job = self.holders.job;
            job.device.complete().map_err(ExecError::Device)?;
            self.each(|hands| hands.prepare(orders))?;
            // All processes begin together, so that their times can be compared.
            self.tell(())?;
            job.lines.map_or(Ok(()), Lines::begin).map_err(ExecError::Device)?;
            let mut times = lead.step()?;
            if let Some(source) = self.fabric.effects.take_failure() {
                return Err(ExecError::Kernel { rank: RankId(0), op: OpId(0), source });
            }
            if let Some(lines) = job.lines {
                // Threads that have left a step early may have queued something for others since.
                let finish = |rank| lines.finish(rank as u32);
                let finished = self.holders.hosted().try_for_each(finish);
                finished.and_then(|()| lines.resolve(self.fabric, times.begin)).map_err(ExecError::Device)?;
            }
            self.each(|hands| hands.conclude())?;
            let ended = self.holders.lock(self.holders.hosted().next().unwrap_or(0)).done();
            let told = self.tell(self.word(times.end - times.begin, ended))?;
            times.end = times.begin + told.iter().map(|word| word.nanoseconds).max().unwrap_or(0);
            let seconds = times.seconds() / f64::from(ended);
            for n in 0..ended {
                let (loss, gradient_norm) = results(&told, n as usize);
                let number = step + u64::from(n);
                let report = StepReport {
                    step: number + 1,
                    seconds,
                    loss,
                    gradient_norm,
                    learning_rate: settings.optimizer.learning_rate.at(number),
                    tokens_per_second: tokens_per_step as f64 / seconds,
                };
                observer.step(&report);
                so_far.steps.push(report);
                for (what, value) in [("the loss", loss), ("the gradient norm", gradient_norm)] {
                    if !value.is_finite() {
                        return Err(ExecError::Diverged { step: number + 1, what, value });
                    }
                }
            }
            // Several processes stop together: after the step in which all have heard of it.
            so_far.stopped = match self.holders.job.mesh {
                None => self.asked_to_stop(),
                Some(_) => told.iter().any(|word| word.stopped),
            };
            let first = step + 1;
            step += u64::from(ended);
            let last = step == settings.steps || so_far.stopped;
            let hosts = |rank| self.holders.job.hosts(rank);
            let curve = |rank| {
                let records = self.fabric.records(rank as u32);
                let times = |op: u32| {
                    let record = &records[op as usize];
                    (record.ready.load(Ordering::Relaxed), record.end.load(Ordering::Relaxed))
                };
                self.holders.lock(rank).take_curve(times)
            };
            let curves = (0..program.ranks.len()).map(|rank| if hosts(rank) { curve(rank) } else { Vec::new() });
            let record = StepRecord::take(self.fabric, times, curves.collect());
            observer.timeline(step, &|| record.trace(program, &self.memory()));
            if first == done + 1 && !last {
                // The first step pays for fresh memory: it is not representative.
                self.fabric.exchanges.clear();
                self.each(|hands| {
                    hands.kernels.clear();
                    Ok(())
                })?;
            } else {
                if time_kernels {
                    so_far.busy.push(record.busy(program));
                }
                so_far.records.push_back((first, record, ended == self.holders.job.steps));
                if so_far.records.len() > KEPT_STEPS {
                    so_far.records.pop_front();
                }
            }
            let due = |every: Option<u64>| last || every.is_some_and(|every| every > 0 && step.is_multiple_of(every));
            if due(settings.evaluation.map(|evaluation| evaluation.every)) {
                self.evaluate(step, &mut so_far, observer)?;
            }
            if let Some(place) = settings.checkpoint.as_ref().filter(|place| due(place.every)) {
                let (seed, digest) = (self.seed, self.holders.job.passes.digest());
                let progress = Progress { step, seed, digest, data: self.data.into() };
                let state = self.holders.gather()?;
                // Of several processes the first one writes.
                if self.holders.job.hosts(0) {
                    let path = checkpoint::save(&place.directory, &progress, &state)?;
                    observer.saved(&path);
                    so_far.checkpoint = Some(path);
                }
            }
        }
        self.report(so_far, tokens_per_step)
    }

    /// How many steps of the program to do before something has to be done between two steps. The first step goes alone.
    fn steps_to_do(&self, step: u64, done: u64) -> u32 {
        let settings = self.settings;
        let due = [
            settings.evaluation.map(|evaluation| evaluation.every),
            settings.checkpoint.as_ref().and_then(|place| place.every),
        ];
        let until = |every: u64| every - step % every;
        let pauses = due.into_iter().flatten().filter(|&every| every > 0).map(until);
        let most = if step == done { 1 } else { u64::from(self.holders.job.steps) };
        pauses.chain([settings.steps - step]).fold(most, u64::min) as u32
    }

    fn evaluate(&self, step: u64, so_far: &mut SoFar, observer: &mut dyn Observer) -> Result<(), ExecError> {
        let Some(evaluation) = self.settings.evaluation else { return Ok(()) };
        self.holders.refresh()?;
        let loss = held_out_loss(self.holders, evaluation.sequences)?;
        so_far.held_out.push((step, loss));
        observer.evaluated(step, loss);
        Ok(())
    }

    fn report(&self, so_far: SoFar, tokens_per_step: u64) -> Result<RunReport, ExecError> {
        let program = self.holders.job.program;
        let known = self.memory();
        let own: Vec<MemoryReport> = self.holders.hosted().map(|rank| known[rank].clone()).collect();
        let memory: Vec<MemoryReport> = self.tell(own)?.concat();
        let hands: Vec<_> = self.holders.hosted().map(|rank| self.holders.lock(rank)).collect();
        let in_kernels: u64 = hands.iter().map(|hands| hands.kernels.total()).sum();
        let kernels = KernelTally::merge(hands.iter().map(|hands| &hands.kernels));
        drop(hands);
        let mut records = Vec::from(so_far.records);
        if records.iter().any(|(_, _, whole)| *whole) {
            records.retain(|(_, _, whole)| *whole);
        }
        records.sort_by_key(|(_, record, _)| record.times.end - record.times.begin);
        let (trace_step, record, _) = &records[records.len() / 2];
        let (mut gradients, mut parameters) = (BTreeMap::new(), BTreeMap::new());
        if self.settings.capture_gradients {
            gradients = self.holders.gradients()?;
            parameters = self.holders.gather()?.into_iter().map(|(name, tensor)| (name, tensor.values)).collect();
        }
        let mut trace = record.trace(program, &memory);
        let own: Vec<RankTrace> = self.holders.hosted().map(|rank| trace.ranks[rank].clone()).collect();
        trace.ranks = self.tell(own)?.concat();
        Ok(RunReport {
            steps: so_far.steps,
            held_out: so_far.held_out,
            tokens_per_step,
            trace,
            trace_step: *trace_step,
            memory,
            kernels,
            // What a device does behind the host's back, the host's clock does not tell.
            exchanges: if self.holders.job.device.is_host() { self.fabric.exchanges.times() } else { Vec::new() },
            outside_kernels: 1.0 - in_kernels as f64 / so_far.busy.iter().sum::<u64>().max(1) as f64,
            busy_seconds: so_far.busy.iter().map(|&nanoseconds| nanoseconds as f64 * 1e-9).collect(),
            stopped: so_far.stopped,
            checkpoint: so_far.checkpoint,
            gradients,
            parameters,
        })
    }

    /// What each rank holds and held at most.
    fn memory(&self) -> Vec<MemoryReport> {
        let unknown = MemoryReport { peak_bytes: 0, peak_by_class: BTreeMap::new(), reserved_bytes: 0 };
        let of =
            |rank| if self.holders.job.hosts(rank) { self.holders.lock(rank).memory.report() } else { unknown.clone() };
        (0..self.holders.job.program.ranks.len()).map(of).collect()
    }

    fn tokens_per_step(&self) -> u64 {
        let job = self.holders.job;
        let replicas = job.program.ranks.iter().map(|rank| rank.coordinates.data + 1).max().unwrap_or(1);
        u64::from(replicas)
            * u64::from(job.program.microbatches)
            * u64::from(job.passes.sequences())
            * u64::from(job.passes.seq())
    }

    fn asked_to_stop(&self) -> bool {
        self.settings.stop.as_ref().is_some_and(|stop| stop.load(Ordering::Relaxed))
    }

    /// What this process has to say of steps that have ended.
    fn word(&self, nanoseconds: u64, ended: u32) -> Word {
        let stopped = self.asked_to_stop();
        let mut ranks = Vec::new();
        for rank in self.holders.hosted() {
            let hands = self.holders.lock(rank);
            let of = |result: &crate::cpu::StepResult| RankWord {
                losses: result.losses.iter().map(|&loss| f64::from(loss)).sum::<f64>().to_bits(),
                count: result.losses.len() as u32,
                squared_norm: result.squared_norm.map(f64::to_bits),
            };
            ranks.push(hands.results[..ended as usize].iter().map(of).collect());
        }
        Word { nanoseconds, stopped, ranks }
    }

    /// The words of all processes, in order; that of this one alone where it is the only one.
    fn tell<T: Serialize + DeserializeOwned>(&self, own: T) -> Result<Vec<T>, ExecError> {
        let Some(mesh) = self.holders.job.mesh else { return Ok(vec![own]) };
        let damaged = |error: serde_json::Error| ProcessError::System {
            doing: "reading the results of another process",
            why: error.to_string(),
        };
        let bytes = serde_json::to_vec(&own).map_err(damaged)?;
        let all = mesh.all(bytes)?;
        Ok(all.iter().map(|bytes| serde_json::from_slice(bytes)).collect::<Result<_, _>>().map_err(damaged)?)
    }

    fn each(&self, mut act: impl FnMut(&mut CpuHands) -> Result<(), KernelError>) -> Result<(), ExecError> {
        for rank in self.holders.hosted() {
            act(&mut self.holders.lock(rank)).map_err(|source| ExecError::Kernel {
                rank: RankId(rank as u32),
                op: OpId(0),
                source,
            })?;
        }
        Ok(())
    }
}

/// What a process tells the others of steps that have ended.
#[derive(Debug, Serialize, Deserialize)]
struct Word {
    nanoseconds: u64,
    /// Its stop flag is set.
    stopped: bool,
    /// By rank and step.
    ranks: Vec<Vec<RankWord>>,
}

/// Sums as bits, which travel unchanged.
#[derive(Debug, Serialize, Deserialize)]
struct RankWord {
    losses: u64,
    count: u32,
    squared_norm: Option<u64>,
}

/// Mean loss and gradient norm of a step of the program that has ended.
fn results(told: &[Word], step: usize) -> (f64, f64) {
    let (mut sum, mut count, mut squared) = (0.0, 0u32, None);
    for word in told.iter().flat_map(|word| &word.ranks).map(|steps| &steps[step]) {
        sum += f64::from_bits(word.losses);
        count += word.count;
        squared = squared.or(word.squared_norm.map(f64::from_bits));
    }
    (sum / f64::from(count), squared.unwrap_or(f64::NAN).sqrt())
}
