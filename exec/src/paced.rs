//! A rehearsal: real threads, real meetings, the real program, but ops take the time that a cost model gives them
//! instead of computing. A schedule for many devices can so be run on a laptop and held against the simulator.
//!
//! Deadlines are absolute. Each op begins where its causes ended by plan, not where a sleeping thread happened to
//! wake, so late wake-ups do not add up: whatever order the threads really took, the makespan is the plan's plus the
//! lateness of the last wake-up. Threads only sleep, so many ranks fit on few cores.

use crate::bind::{Bound, Meeting};
use crate::crew::{Clock, StepTimes, with_crew};
use crate::effects::{Effects, HostRange, Passage, Span};
use crate::error::ExecError;
use crate::fabric::Fabric;
use crate::interpreter::Hands;
use crate::memory::{MemoryReport, RankMemory};
use crate::timeline::StepRecord;
use paceline_kernels::{Block, Call, Device, KernelError, View};
use paceline_sim::cost::{CostModel, Exchange, Pauses, Round};
use paceline_sim::program::{Links, Program, RankProgram, Way};
use paceline_sim::trace::Trace;
use paceline_sim::units::{Nanos, OpId, RankId};
use smallvec::SmallVec;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// What a rehearsal showed.
#[derive(Debug, Clone, PartialEq)]
pub struct Rehearsal {
    /// Seconds of each step, from its begin to the end of the last rank; where several steps run without a barrier, their mean.
    pub iteration_seconds: Vec<f64>,
    /// The step with the median time.
    pub trace: Trace,
    /// By rank.
    pub memory: Vec<MemoryReport>,
}

/// Runs a program `steps` times at the pace of `costs`. Ends early, after a whole run, when `stop` becomes true.
///
/// # Errors
/// When the program cannot run, or `steps` is zero.
pub fn rehearse(
    program: &Program,
    costs: &dyn CostModel,
    steps: u32,
    stop: Option<&AtomicBool>,
) -> Result<Rehearsal, ExecError> {
    if steps == 0 {
        return Err(ExecError::Setting { key: "steps", value: "0".into(), allowed: "at least 1 is needed".into() });
    }
    let bound = Bound::new(program)?;
    let clock = Clock::start();
    let fabric = Fabric::new(&bound, Pace::new(&bound, costs, clock), 0);
    let hands: Vec<Mutex<PacedHands>> = (0..program.ranks.len())
        .map(|rank| PacedHands::new(program, RankId(rank as u32), costs).map(Mutex::new))
        .collect::<Result<_, _>>()?;
    let mut records: Vec<StepRecord> = Vec::new();
    with_crew(&fabric, clock, &hands, false, |lead| {
        for _ in 0..steps {
            let times: StepTimes = lead.step()?;
            let curves = hands.iter().map(|hands| std::mem::take(&mut lock(hands).curve)).collect();
            records.push(StepRecord::take(&fabric, times, curves));
            if stop.is_some_and(|stop| stop.load(Ordering::Relaxed)) {
                break;
            }
        }
        Ok(())
    })?;
    let memory: Vec<MemoryReport> = hands.iter().map(|hands| lock(hands).memory.report()).collect();
    let each = f64::from(program.steps());
    let iteration_seconds = records.iter().map(|record| record.times.seconds() / each).collect();
    records.sort_by_key(|record| record.times.end - record.times.begin);
    let trace = records[records.len() / 2].trace(program, &memory);
    Ok(Rehearsal { iteration_seconds, trace, memory })
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Communication at the pace of a cost model.
struct Pace {
    clock: Clock,
    transfers: Vec<Round>,
    meetings: Vec<SmallVec<[Round; 2]>>,
    /// By rank.
    pauses: Vec<Pauses>,
    /// By transfer, and by meeting.
    ways: (Vec<Way>, Vec<Way>),
    /// The links between fast groups, by plan.
    links: Mutex<Links>,
}

impl Pace {
    fn new(bound: &Bound, costs: &dyn CostModel, clock: Clock) -> Pace {
        let program = bound.program;
        let transfers = bound.transfers.iter();
        let meetings = bound.meetings.iter();
        Pace {
            clock,
            ways: (
                bound
                    .transfers
                    .iter()
                    .map(|t| program.way_of_message(RankId(t.from.rank), RankId(t.to.rank)))
                    .collect(),
                bound.meetings.iter().map(|m| program.way_of_round(&program.groups[m.group].ranks)).collect(),
            ),
            links: Mutex::default(),
            pauses: (0..program.ranks.len()).map(|rank| costs.pauses(program, RankId(rank as u32))).collect(),
            transfers: transfers
                .map(|t| costs.transfer(program, RankId(t.from.rank), RankId(t.to.rank), t.bytes))
                .collect(),
            meetings: meetings
                .map(|m| {
                    let &Meeting { collective, bytes, element, arrangement, .. } = m;
                    let exchange = Exchange { collective, bytes, element, arrangement };
                    costs.collective(program, exchange, &program.groups[m.group])
                })
                .collect(),
        }
    }

    fn give(&self, way: &Way, cost: Round, since: u64) -> Passage {
        if cost.link == Nanos::ZERO {
            return Passage::Free;
        }
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        Passage::Planned(links.serve(way, since, cost.link.0))
    }

    fn pass(&self, cost: Round, earliest: u64) -> Span {
        let end = earliest + cost.work.0;
        if cost.work > Nanos::ZERO {
            self.reach(end);
        }
        Span { start: earliest, end, effective: end + cost.wire.0 }
    }
}

impl Effects for Pace {
    fn at(&self, earliest: u64) -> u64 {
        earliest
    }

    fn reach(&self, time: u64) -> u64 {
        loop {
            let now = self.clock.now();
            if now >= time {
                return now;
            }
            std::thread::sleep(Duration::from_nanos(time - now));
        }
    }

    fn is_planned(&self) -> bool {
        true
    }

    fn pauses(&self, rank: u32) -> Pauses {
        self.pauses[rank as usize]
    }

    fn late_transfer(&self, transfer: usize) -> u64 {
        self.transfers[transfer].late.0
    }

    fn late_round(&self, meeting: usize, round: usize) -> u64 {
        self.meetings[meeting][round].late.0
    }

    fn open_transfer(&self, transfer: usize, since: u64) -> Passage {
        self.give(&self.ways.0[transfer], self.transfers[transfer], since)
    }

    fn transfer_takes_device(&self, transfer: usize) -> bool {
        self.transfers[transfer].work > Nanos::ZERO
    }

    unsafe fn transfer(&self, transfer: usize, _: HostRange, _: HostRange, earliest: u64) -> Span {
        self.pass(self.transfers[transfer], earliest)
    }

    fn rounds(&self, meeting: usize) -> usize {
        self.meetings[meeting].len()
    }

    fn open_round(&self, meeting: usize, round: usize, since: u64) -> Passage {
        self.give(&self.ways.1[meeting], self.meetings[meeting][round], since)
    }

    fn is_delayed(&self) -> bool {
        false
    }

    fn round_takes_device(&self, meeting: usize, round: usize) -> bool {
        self.meetings[meeting][round].work > Nanos::ZERO
    }

    unsafe fn round(&self, meeting: usize, round: usize, _: usize, _: &[HostRange], earliest: u64) -> Span {
        self.pass(self.meetings[meeting][round], earliest)
    }
}

/// A rank that waits instead of computing. Its buffers are counted and not backed by memory.
struct PacedHands<'p> {
    rank: &'p RankProgram,
    costs: Vec<Nanos>,
    memory: RankMemory<'static>,
    curve: Vec<(u64, u64)>,
}

impl<'p> PacedHands<'p> {
    fn new(program: &'p Program, id: RankId, costs: &dyn CostModel) -> Result<Self, ExecError> {
        let rank = &program.ranks[id.index()];
        let mut memory = RankMemory::new(&Unbacked, rank.buffers.len(), false);
        for buffer in &rank.persistent {
            let held = &rank.buffers[buffer.index()];
            memory.allocate(buffer.index(), held.class, held.bytes, &Unbacked).map_err(|source| ExecError::Kernel {
                rank: id,
                op: OpId(0),
                source,
            })?;
        }
        memory.settle();
        let costs = rank.ops.iter().map(|op| if op.stream.0 == 0 { costs.compute(program, id, op) } else { Nanos(0) });
        Ok(PacedHands { rank, costs: costs.collect(), memory, curve: Vec::new() })
    }
}

impl Hands for PacedHands<'_> {
    fn allocate(&mut self, op: u32, at: u64) -> Result<(), ExecError> {
        for &buffer in &self.rank.ops[op as usize].alloc {
            let held = &self.rank.buffers[buffer.index()];
            // An unbacked device never refuses.
            let _ = self.memory.allocate(buffer.index(), held.class, held.bytes, &Unbacked);
        }
        self.curve.push((at, self.memory.settle()));
        Ok(())
    }

    fn range(&self, _: u32) -> Result<HostRange, ExecError> {
        Ok(HostRange::default())
    }

    fn compute(&mut self, op: u32, start: u64) -> Result<u64, ExecError> {
        Ok(start + self.costs[op as usize].0)
    }

    fn free(&mut self, op: u32, at: u64) {
        self.rank.ops[op as usize].free.iter().for_each(|buffer| self.memory.free(buffer.index()));
        self.curve.push((at, self.memory.settle()));
    }
}

/// A device with sizes and without memory: it cannot run calls.
struct Unbacked;

struct Sized(usize);

impl Block for Sized {
    fn address(&self) -> u64 {
        0
    }

    fn bytes(&self) -> usize {
        self.0
    }
}

impl Unbacked {
    fn refuse(call: &'static str) -> Result<(), KernelError> {
        Err(KernelError::Shape { call, what: "a paced device has no memory to work on".into() })
    }
}

impl Device for Unbacked {
    fn name(&self) -> String {
        "paced".into()
    }

    fn allocate(&self, bytes: usize) -> Result<Box<dyn Block>, KernelError> {
        Ok(Box::new(Sized(bytes)))
    }

    unsafe fn run(&self, _: &Call) -> Result<(), KernelError> {
        Unbacked::refuse("run")
    }

    unsafe fn upload(&self, _: &[u8], _: View) -> Result<(), KernelError> {
        Unbacked::refuse("upload")
    }

    unsafe fn download(&self, _: View, _: &mut [u8]) -> Result<(), KernelError> {
        Unbacked::refuse("download")
    }
}
