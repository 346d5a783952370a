//! Memory of a rank, exactly: the walk over its ops in issue order that the executor makes as well. Buffers live from the
//! issue of the op that allocates them to the end of the op that frees them; of one op all allocations come before all
//! frees.

use crate::program::{MemoryClass, Program};
use crate::trace::Event;
use crate::units::{Nanos, OpId, RankId};
use std::collections::BTreeMap;

/// What a rank's memory holds over its ops.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryWalk {
    /// Live bytes before the first op: what persists.
    pub persistent_bytes: u64,
    /// Highest sum of live bytes.
    pub peak_bytes: u64,
    /// Live bytes by class at the first moment of the peak; classes without bytes are left out.
    pub peak_by_class: BTreeMap<MemoryClass, u64>,
    /// The op during which the peak is first reached; `None` when nothing is allocated beyond what persists.
    pub peak_op: Option<OpId>,
    /// By op: live bytes while it runs, and after it.
    pub by_op: Vec<(u64, u64)>,
}

/// Walks over the ops of a rank. Buffers that are freed without living are counted as they are: the program's check excludes
/// them.
pub fn walk(program: &Program, rank: RankId) -> MemoryWalk {
    let rank = &program.ranks[rank.index()];
    let mut live = [0u64; MemoryClass::ALL.len()];
    let mut total = 0u64;
    for buffer in &rank.persistent {
        let held = &rank.buffers[buffer.index()];
        live[held.class as usize] += held.bytes;
        total += held.bytes;
    }
    let (persistent_bytes, mut peak, mut peak_live, mut peak_op) = (total, total, live, None);
    let mut by_op = Vec::with_capacity(rank.ops.len());
    for (number, op) in (0..).zip(&rank.ops) {
        for buffer in &op.alloc {
            let held = &rank.buffers[buffer.index()];
            live[held.class as usize] += held.bytes;
            total += held.bytes;
        }
        if total > peak {
            (peak, peak_live, peak_op) = (total, live, Some(OpId(number)));
        }
        let during = total;
        for buffer in &op.free {
            let held = &rank.buffers[buffer.index()];
            live[held.class as usize] = live[held.class as usize].saturating_sub(held.bytes);
            total = total.saturating_sub(held.bytes);
        }
        by_op.push((during, total));
    }
    let classes = MemoryClass::ALL.into_iter().map(|class| (class, peak_live[class as usize]));
    MemoryWalk {
        persistent_bytes,
        peak_bytes: peak,
        peak_by_class: classes.filter(|&(_, bytes)| bytes > 0).collect(),
        peak_op,
        by_op,
    }
}

impl MemoryWalk {
    /// Live bytes after each change over the time of a step with these events (one per op): allocations count from the
    /// issue of an op, frees from its end.
    pub fn over_time(&self, events: &[Event]) -> Vec<(Nanos, u64)> {
        let mut curve = vec![(Nanos::ZERO, self.persistent_bytes)];
        let mut note = |at: Nanos, bytes: u64| {
            if curve.last().is_none_or(|&(_, before)| before != bytes) {
                curve.push((at, bytes));
            }
        };
        let mut before = self.persistent_bytes;
        // Ops are issued one after the other, so no change comes before the last one.
        let mut latest = Nanos::ZERO;
        for (event, &(during, after)) in events.iter().zip(&self.by_op) {
            if during != before {
                latest = latest.max(event.ready);
                note(latest, during);
            }
            if after != during {
                latest = latest.max(event.end);
                note(latest, after);
            }
            before = after;
        }
        curve
    }
}
