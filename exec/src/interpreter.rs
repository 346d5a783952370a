//! One step of one rank: its ops in issue order, as the contract in [`paceline_sim::program`] says.

use crate::effects::{Effects, HostRange};
use crate::error::ExecError;
use crate::fabric::{Aborted, Fabric, NOTICEABLE, Turn};
use paceline_sim::cost::Pause;
use paceline_sim::program::Stream;
use paceline_sim::trace::WaitReason;
use std::sync::atomic::Ordering;

/// What a rank itself does for an op: memory and computation.
pub(crate) trait Hands {
    /// Starts the life of the buffers that an op allocates.
    fn allocate(&mut self, op: u32, at: u64) -> Result<(), ExecError>;

    /// The memory that a communication op sends, receives into or works on.
    fn range(&self, op: u32) -> Result<HostRange, ExecError>;

    /// Computes, from `start` on; returns when it has ended.
    fn compute(&mut self, op: u32, start: u64) -> Result<u64, ExecError>;

    /// Ends the life of the buffers that an op frees.
    fn free(&mut self, op: u32, at: u64);

    /// Waits for everything that was only queued, at the end of a step.
    fn finish(&mut self) -> Result<(), ExecError> {
        Ok(())
    }

    /// Whether the rank, and every other one at the same op of its own program, ends the program here: the rest
    /// is void.
    fn leaves(&self, _op: u32) -> bool {
        false
    }
}

/// Runs the present step of a rank, on its thread, from time `begin` on.
pub(crate) fn run_step<E: Effects>(
    fabric: &Fabric<E>,
    rank: u32,
    hands: &mut impl Hands,
    begin: u64,
) -> Result<(), Aborted> {
    let stopped = |error| {
        fabric.abort(error);
        Aborted
    };
    let records = fabric.records(rank);
    // When the last compute-stream op ended.
    let mut clock = begin;
    for (o, op) in fabric.bound.program.ranks[rank as usize].ops.iter().enumerate() {
        let index = o as u32;
        let issued = fabric.effects.at(clock);
        if !op.alloc.is_empty() {
            hands.allocate(index, issued).map_err(stopped)?;
        }
        if op.kind.communicates() {
            fabric.issue(rank, index, hands.range(index).map_err(stopped)?, issued);
            if op.stream != Stream::COMPUTE {
                continue;
            }
            fabric.drive(rank, || fabric.has_ended(rank, index))?;
            clock = records[o].end.load(Ordering::Relaxed);
        } else {
            let record = &records[o];
            let Turn { waited_for, waited_until, possible, pause } = fabric.await_turn(rank, index, clock)?;
            fabric.pay(rank);
            let start = fabric.effects.at(possible + fabric.effects.pauses(rank).of(pause).0);
            if let Some(pause) = pause {
                fabric.exchanges.pause(pause, start.saturating_sub(possible));
            }
            let end = hands.compute(index, start).map_err(stopped)?;
            let observed = fabric.effects.reach(end);
            fabric.release(rank, end);
            record.ready.store(clock, Ordering::Relaxed);
            record.start.store(start, Ordering::Relaxed);
            record.end.store(end, Ordering::Relaxed);
            record.observed_end.store(observed, Ordering::Relaxed);
            let for_device = if pause == Some(Pause::Turn) { start - waited_until } else { 0 };
            record.set_wait(if for_device > NOTICEABLE.max(waited_until - clock) {
                Some(WaitReason::Device)
            } else {
                waited_for.filter(|_| waited_until - clock > NOTICEABLE).map(WaitReason::Op)
            });
            fabric.end(rank, index);
            clock = end;
        }
        if !op.free.is_empty() {
            hands.free(index, clock);
        }
        if hands.leaves(index) {
            fabric.leave(rank)?;
            return hands.finish().map_err(stopped);
        }
    }
    fabric.drive(rank, || fabric.is_quiet(rank))?;
    fabric.pay(rank);
    hands.finish().map_err(stopped)?;
    fabric.effects.reach(fabric.streams_end(rank));
    Ok(())
}
