//! The loop of training: the program runs again and again, and between two runs steps are reported, held-out data is evaluated and
//! checkpoints are written.

use crate::checkpoint::{self, Progress};
use crate::cpu::{CpuHands, StepOrders, StepResult};
use crate::crew::{Lead, StepTimes};
use crate::error::ExecError;
use crate::evaluate::held_out_loss;
use crate::fabric::Fabric;
use crate::host_effects::HostEffects;
use crate::kernel_times::KernelTally;
use crate::lines::Lines;
use crate::memory::MemoryReport;
use crate::processes::ProcessError;
use crate::report::{Observer, RunReport, StepReport};
use crate::settings::RunSettings;
use crate::state::Holders;
use crate::timeline::StepRecord;
use paceline_kernels::KernelError;
use paceline_sim::trace::RankTrace;
use paceline_sim::units::{OpId, RankId};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

/// Steps whose timelines are kept, to choose the median one from.
const KEPT_STEPS: usize = 64;
/// Kernels of a device that runs behind the host's back are timed in one of so many steps, and in the last.
const TIMED_EVERY: u64 = 8;

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

/// A run that is ready to begin.
pub(super) struct Training<'t, 'p, 'a> {
    pub settings: &'t RunSettings,
    pub seed: u64,
    /// Name of the data.
    pub data: &'t str,
    pub holders: &'t Holders<'t, 'a>,
    pub fabric: &'t Fabric<'p, HostEffects<'a>>,
}

/// What came of a run of the program.
struct Ran {
    /// By the slowest process.
    times: StepTimes,
    /// Steps that it did.
    ended: u32,
    /// By process.
    told: Vec<Word>,
}

impl Training<'_, '_, '_> {
    /// Trains from `done` steps on until the last one, the stop flag or an error.
    pub(super) fn train(
        &self,
        done: u64,
        lead: &Lead<HostEffects<'_>>,
        observer: &mut dyn Observer,
    ) -> Result<RunReport, ExecError> {
        let mut so_far = SoFar::default();
        self.evaluate(done, &mut so_far, observer)?;
        let mut step = done;
        while step < self.settings.steps && !so_far.stopped {
            let orders = self.orders(step, done);
            let ran = self.run(orders, lead)?;
            self.note_steps(orders, &ran, &mut so_far, observer)?;
            step += u64::from(ran.ended);
            let last = step == self.settings.steps || so_far.stopped;
            // The first step pays for fresh memory: it is not representative.
            let counts = last || orders.step != done;
            self.note_record(orders, &ran, counts, &mut so_far, observer)?;
            let due = |every: Option<u64>| last || every.is_some_and(|every| every > 0 && step.is_multiple_of(every));
            if due(self.settings.evaluation.map(|evaluation| evaluation.every)) {
                self.evaluate(step, &mut so_far, observer)?;
            }
            if let Some(place) = self.settings.checkpoint.as_ref().filter(|place| due(place.every)) {
                self.save(step, &place.directory, &mut so_far, observer)?;
            }
        }
        self.report(so_far)
    }

    /// What the ranks do next.
    fn orders(&self, step: u64, done: u64) -> StepOrders {
        let steps = self.steps_to_do(step, done);
        let next = step + u64::from(steps);
        let time_kernels = self.holders.job.device.is_host()
            || next == self.settings.steps
            || (step..next).any(|step| step % TIMED_EVERY == 1);
        StepOrders { step, steps, capture_gradients: self.settings.capture_gradients, time_kernels }
    }

    /// Lets the ranks run the program once, and all processes hear of it.
    fn run(&self, orders: StepOrders, lead: &Lead<HostEffects<'_>>) -> Result<Ran, ExecError> {
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
        Ok(Ran { times, ended, told })
    }

    /// Reports the steps that have ended, and notes whether to go on.
    fn note_steps(
        &self,
        orders: StepOrders,
        ran: &Ran,
        so_far: &mut SoFar,
        observer: &mut dyn Observer,
    ) -> Result<(), ExecError> {
        let seconds = ran.times.seconds() / f64::from(ran.ended);
        for n in 0..ran.ended {
            let (loss, gradient_norm) = results(&ran.told, n as usize);
            let number = orders.step + u64::from(n);
            let report = StepReport {
                step: number + 1,
                seconds,
                loss,
                gradient_norm,
                learning_rate: self.settings.optimizer.learning_rate.at(number),
                tokens_per_second: self.tokens_per_step() as f64 / seconds,
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
            Some(_) => ran.told.iter().any(|word| word.stopped),
        };
        Ok(())
    }

    /// Shows the timeline of a run of the program, and keeps it and its kernels' times where it `counts`.
    fn note_record(
        &self,
        orders: StepOrders,
        ran: &Ran,
        counts: bool,
        so_far: &mut SoFar,
        observer: &mut dyn Observer,
    ) -> Result<(), ExecError> {
        let job = self.holders.job;
        let curve = |rank| {
            let records = self.fabric.records(rank as u32);
            let times = |op: u32| {
                let record = &records[op as usize];
                (record.ready.load(Ordering::Relaxed), record.end.load(Ordering::Relaxed))
            };
            self.holders.lock(rank).take_curve(times)
        };
        let ranks = 0..job.program.ranks.len();
        let curves = ranks.map(|rank| if job.hosts(rank) { curve(rank) } else { Vec::new() });
        let record = StepRecord::take(self.fabric, ran.times, curves.collect());
        let step = orders.step + u64::from(ran.ended);
        observer.timeline(step, &|| record.trace(job.program, &self.memory()));
        if !counts {
            self.fabric.exchanges.clear();
            return self.each(|hands| {
                hands.kernels.clear();
                Ok(())
            });
        }
        if orders.time_kernels {
            so_far.busy.push(record.busy(job.program));
        }
        so_far.records.push_back((orders.step + 1, record, ran.ended == job.steps));
        if so_far.records.len() > KEPT_STEPS {
            so_far.records.pop_front();
        }
        Ok(())
    }

    fn save(
        &self,
        step: u64,
        directory: &Path,
        so_far: &mut SoFar,
        observer: &mut dyn Observer,
    ) -> Result<(), ExecError> {
        let (seed, digest) = (self.seed, self.holders.job.passes.digest());
        let progress = Progress { step, seed, digest, data: self.data.into() };
        let state = self.holders.gather()?;
        // Of several processes the first one writes.
        if self.holders.job.hosts(0) {
            let path = checkpoint::save(directory, &progress, &state)?;
            observer.saved(&path);
            so_far.checkpoint = Some(path);
        }
        Ok(())
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

    fn report(&self, so_far: SoFar) -> Result<RunReport, ExecError> {
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
            tokens_per_step: self.tokens_per_step(),
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
            let of = |result: &StepResult| RankWord {
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
