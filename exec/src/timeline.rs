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

    /// Nanoseconds that compute ops took, and the time before them that nothing explains: the op had been issued, what it waits for had
    /// ended, and its device did nothing else. Over all ranks.
    pub fn busy(&self, program: &Program) -> u64 {
        let mut sum = 0;
        for device in 0..program.devices.len() {
            let ranks = || (0..program.ranks.len()).filter(|&rank| program.ranks[rank].device.index() == device);
            // What the device does: (begin, end, from when on a compute op could have begun).
            let mut turns: Vec<(u64, u64, Option<u64>)> = Vec::new();
            for rank in ranks() {
                let times = &self.ops[rank];
                for (op, t) in program.ranks[rank].ops.iter().zip(times) {
                    match op.kind {
                        OpKind::Send { .. } => {}
                        OpKind::Recv { .. } | OpKind::Collective { .. } => turns.push((t.start, t.end, None)),
                        _ => {
                            let waits = op.waits.iter().map(|wait| times[wait.index()].end);
                            turns.push((t.start, t.end, Some(waits.fold(t.ready, u64::max))));
                        }
                    }
                }
            }
            turns.sort_unstable();
            let mut free_at = 0;
            for (start, end, could) in turns {
                if let Some(could) = could {
                    sum += end - could.max(free_at).min(start);
                }
                free_at = free_at.max(end);
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
