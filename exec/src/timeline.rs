//! A measured step in the schema of [`paceline_sim::trace`].

use crate::crew::StepTimes;
use crate::effects::Effects;
use crate::fabric::Fabric;
use crate::memory::MemoryReport;
use crate::record::Record;
use paceline_sim::program::{OpKind, Program};
use paceline_sim::trace::{Event, Origin, RankTrace, TRACE_FORMAT, Trace, WaitReason};
use paceline_sim::units::{Nanos, OpId};
use std::sync::atomic::Ordering;

/// When an op ran, nanoseconds since the run began.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OpTimes {
    ready: u64,
    start: u64,
    end: u64,
    wait: Option<WaitReason>,
}

impl OpTimes {
    fn of(record: &Record) -> OpTimes {
        OpTimes {
            ready: record.ready.load(Ordering::Relaxed),
            start: record.start.load(Ordering::Relaxed),
            end: record.observed_end.load(Ordering::Relaxed),
            wait: record.wait(),
        }
    }
}

/// Everything measured of one step, before it is put into the schema.
#[derive(Debug, Clone)]
pub(crate) struct StepRecord {
    pub times: StepTimes,
    /// By rank and op.
    pub ops: Vec<Vec<OpTimes>>,
    /// By rank: live bytes after each change.
    pub memory: Vec<Vec<(u64, u64)>>,
}

impl StepRecord {
    /// Copies what the fabric recorded of the step that has just ended.
    pub fn take<E: Effects>(fabric: &Fabric<E>, times: StepTimes, memory: Vec<Vec<(u64, u64)>>) -> StepRecord {
        let ranks = 0..fabric.bound.program.ranks.len() as u32;
        // What an abandoned step did not come to takes no time.
        let never = OpTimes { ready: times.end, start: times.end, end: times.end, wait: None };
        let of = |rank, (op, record)| if fabric.has_ended(rank, op) { OpTimes::of(record) } else { never };
        let all = |rank| (0..).zip(fabric.records(rank)).map(|op| of(rank, op)).collect();
        let ops = ranks.map(all).collect();
        StepRecord { times, ops, memory }
    }

    /// Nanoseconds that compute ops took, and the time between them that no wait explains, over all ranks. Where ranks
    /// share a device, the time between two ops of one rank is mostly another's, and is left out.
    pub fn busy(&self, program: &Program) -> u64 {
        let alone = |device| program.ranks.iter().filter(|rank| rank.device == device).count() == 1;
        let mut sum = 0;
        for (rank, times) in program.ranks.iter().zip(&self.ops) {
            let alone = alone(rank.device);
            for (op, t) in rank.ops.iter().zip(times) {
                use OpKind::{Compute, GradientNorm, Join, Optimizer, OptimizerAhead, Validate};
                if let Compute { .. }
                | GradientNorm
                | Optimizer { .. }
                | OptimizerAhead { .. }
                | Validate { .. }
                | Join = op.kind
                {
                    sum += t.end - if alone && t.wait.is_none() { t.ready } else { t.start };
                }
            }
        }
        sum
    }

    /// The step as a trace; time zero is its begin.
    pub fn trace(&self, program: &Program, memory: &[MemoryReport]) -> Trace {
        let since = |time: u64| Nanos(time.saturating_sub(self.times.begin));
        let ranks = program.ranks.iter().enumerate().map(|(r, rank)| {
            let events = rank.ops.iter().zip(&self.ops[r]).enumerate().map(|(o, (op, times))| Event {
                op: OpId(o as u32),
                kind: op.kind,
                stream: op.stream,
                ready: since(times.ready),
                start: since(times.start),
                end: since(times.end),
                wait: times.wait,
            });
            RankTrace {
                events: events.collect(),
                memory: self.memory[r].iter().map(|&(at, bytes)| (since(at), bytes)).collect(),
                peak_bytes: memory[r].peak_bytes,
                peak_by_class: memory[r].peak_by_class.clone(),
            }
        });
        Trace {
            format: TRACE_FORMAT.into(),
            origin: Origin::Measured,
            makespan: since(self.times.end),
            ranks: ranks.collect(),
        }
    }
}
