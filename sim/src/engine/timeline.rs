//! What a simulation finds: when every op ran, as arrays; a trace is made of it when somebody wants to look.

use crate::memory::walk;
use crate::program::Program;
use crate::trace::{Event, Origin, RankTrace, TRACE_FORMAT, Trace, WaitReason};
use crate::units::{Nanos, OpId, RankId};

/// When the ops of a program ran: ops of all ranks one after the other, in rank and issue order.
#[derive(Debug, Clone, PartialEq)]
pub struct Timeline {
    /// By rank, its first op; and one more.
    pub(super) first: Vec<u32>,
    pub(super) ready: Vec<u64>,
    pub(super) start: Vec<u64>,
    pub(super) end: Vec<u64>,
    pub(super) wait: Vec<Option<WaitReason>>,
}

impl Timeline {
    /// From the begin of the step to the end of its last op.
    pub fn makespan(&self) -> Nanos {
        Nanos(self.end.iter().copied().max().unwrap_or(0))
    }

    /// (ready, start, end) of an op.
    pub fn times(&self, rank: RankId, op: OpId) -> (Nanos, Nanos, Nanos) {
        let at = (self.first[rank.index()] + op.0) as usize;
        (Nanos(self.ready[at]), Nanos(self.start[at]), Nanos(self.end[at]))
    }

    /// The step as a trace, with the memory of every rank. `program` is the one that was simulated.
    pub fn trace(&self, program: &Program) -> Trace {
        let ranks = program.ranks.iter().enumerate().map(|(number, rank)| {
            let first = self.first[number] as usize;
            let events = rank.ops.iter().enumerate().map(|(index, op)| Event {
                op: OpId(index as u32),
                kind: op.kind,
                stream: op.stream,
                ready: Nanos(self.ready[first + index]),
                start: Nanos(self.start[first + index]),
                end: Nanos(self.end[first + index]),
                wait: self.wait[first + index],
            });
            let events: Vec<Event> = events.collect();
            let memory = walk(program, RankId(number as u32));
            RankTrace {
                memory: memory.over_time(&events),
                peak_bytes: memory.peak_bytes,
                peak_by_class: memory.peak_by_class,
                events,
            }
        });
        Trace {
            format: TRACE_FORMAT.into(),
            origin: Origin::Predicted,
            makespan: self.makespan(),
            ranks: ranks.collect(),
        }
    }
}
