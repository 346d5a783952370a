//! Training: a program, step after step, from the first parameters or a checkpoint to the last step, the stop flag or an
//! error.

use crate::bind::Bound;
use crate::checkpoint::{self, Progress};
use crate::cpu::{CpuHands, Job, StepOrders};
use crate::crew::{Clock, with_crew};
use crate::data::Dataset;
use crate::error::{CheckpointError, ExecError};
use crate::evaluate::held_out_loss;
use crate::fabric::Fabric;
use crate::host_effects::HostEffects;
use crate::kernel_times::KernelTally;
use crate::memory::MemoryReport;
use crate::report::{Observer, RunReport, StepReport};
use crate::seam::Passes;
use crate::settings::RunSettings;
use crate::state::Holders;
use crate::timeline::StepRecord;
use paceline_kernels::{Device, KernelError};
use paceline_sim::program::Program;
use paceline_sim::units::{OpId, RankId};
use std::collections::{BTreeMap, VecDeque};
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
    let sampler = data.sampler(passes.seq(), passes.vocab(), seed)?;
    let clock = Clock::start();
    let job = Job {
        program,
        device,
        clock,
        passes,
        sampler: &sampler,
        optimizer: settings.optimizer,
        poison: settings.poison,
        steps: program.steps(),
    };
    let hands: Vec<Mutex<CpuHands>> = (0..program.ranks.len())
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
    let roomy = program.devices.len() <= cores;
    let spins = if roomy { SPINS } else { 0 };
    let pin = settings.pin.unwrap_or(roomy && program.ranks.len() > program.devices.len());
    let fabric = Fabric::new(&bound, HostEffects::new(&bound, clock, device), spins);
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
    /// Nanoseconds of compute ops over the steps whose kernels are counted.
    busy: u64,
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
            self.each(|hands| hands.prepare(orders))?;
            let times = lead.step()?;
            if let Some(source) = self.fabric.effects.take_failure() {
                return Err(ExecError::Kernel { rank: RankId(0), op: OpId(0), source });
            }
            self.each(|hands| hands.conclude())?;
            let ended = self.holders.lock(0).done();
            let seconds = times.seconds() / f64::from(ended);
            for n in 0..ended {
                let (loss, gradient_norm) = self.results(n as usize);
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
            so_far.stopped = settings.stop.as_ref().is_some_and(|stop| stop.load(Ordering::Relaxed));
            let first = step + 1;
            step += u64::from(ended);
            let last = step == settings.steps || so_far.stopped;
            let curves = (0..program.ranks.len()).map(|rank| std::mem::take(&mut self.holders.lock(rank).curve));
            let record = StepRecord::take(self.fabric, times, curves.collect());
            observer.timeline(step, &|| record.trace(program, &self.memory()));
            if first == done + 1 && !last {
                // The first step pays for fresh memory: it is not representative.
                self.each(|hands| {
                    hands.kernels.clear();
                    Ok(())
                })?;
            } else {
                if time_kernels {
                    so_far.busy += record.busy(program);
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
                let path = checkpoint::save(&place.directory, &progress, &self.holders.gather()?)?;
                observer.saved(&path);
                so_far.checkpoint = Some(path);
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
        let loss = held_out_loss(self.holders, evaluation.sequences)?;
        so_far.held_out.push((step, loss));
        observer.evaluated(step, loss);
        Ok(())
    }

    fn report(&self, so_far: SoFar, tokens_per_step: u64) -> Result<RunReport, ExecError> {
        let program = self.holders.job.program;
        let memory = self.memory();
        let hands: Vec<_> = (0..program.ranks.len()).map(|rank| self.holders.lock(rank)).collect();
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
        Ok(RunReport {
            steps: so_far.steps,
            held_out: so_far.held_out,
            tokens_per_step,
            trace: record.trace(program, &memory),
            trace_step: *trace_step,
            memory,
            kernels,
            outside_kernels: 1.0 - in_kernels as f64 / so_far.busy.max(1) as f64,
            stopped: so_far.stopped,
            checkpoint: so_far.checkpoint,
            gradients,
            parameters,
        })
    }

    /// What each rank holds and held at most.
    fn memory(&self) -> Vec<MemoryReport> {
        (0..self.holders.hands.len()).map(|rank| self.holders.lock(rank).memory.report()).collect()
    }

    fn tokens_per_step(&self) -> u64 {
        let job = self.holders.job;
        let replicas = job.program.ranks.iter().map(|rank| rank.coordinates.data + 1).max().unwrap_or(1);
        u64::from(replicas)
            * u64::from(job.program.microbatches)
            * u64::from(job.passes.sequences())
            * u64::from(job.passes.seq())
    }

    /// Mean loss and gradient norm of a step of the program that has ended.
    fn results(&self, step: usize) -> (f64, f64) {
        let (mut sum, mut count, mut squared) = (0.0, 0u32, None);
        for rank in 0..self.holders.hands.len() {
            let hands = self.holders.lock(rank);
            let result = &hands.results[step];
            sum += result.losses.iter().map(|&loss| f64::from(loss)).sum::<f64>();
            count += result.losses.len() as u32;
            squared = squared.or(result.squared_norm);
        }
        (sum / f64::from(count), squared.unwrap_or(f64::NAN).sqrt())
    }

    fn each(&self, mut act: impl FnMut(&mut CpuHands) -> Result<(), KernelError>) -> Result<(), ExecError> {
        for rank in 0..self.holders.hands.len() {
            act(&mut self.holders.lock(rank)).map_err(|source| ExecError::Kernel {
                rank: RankId(rank as u32),
                op: OpId(0),
                source,
            })?;
        }
        Ok(())
    }
}
