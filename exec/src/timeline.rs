//! A measured step in the schema of [`paceline_sim::trace`].

use crate::crew::StepTimes;
use crate::fabric::{Effects, Fabric, Record};
use crate::memory::MemoryReport;
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
        let ops = ranks.map(|rank| fabric.records(rank).iter().map(OpTimes::of).collect()).collect();
        StepRecord { times, ops, memory }
    }

    /// Nanoseconds that compute ops took from end to end, waits left out, over all ranks.
    pub fn busy(&self, program: &Program) -> u64 {
        let ops = program.ranks.iter().zip(&self.ops).flat_map(|(rank, times)| rank.ops.iter().zip(times));
        let computing = ops.filter(|(op, _)| {
            use OpKind::{Compute, GradientNorm, Join, Optimizer};
            matches!(op.kind, Compute { .. } | GradientNorm | Optimizer { .. } | Join)
        });
        computing.map(|(_, t)| t.end - if t.wait.is_some() { t.start } else { t.ready }).sum()
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
