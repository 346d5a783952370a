//! Turns on devices: who computes next.
//!
//! Ranks of a device share its core, so the thread of a rank may not run for a whole op of another one. It could not ask for its turn when
//! what it waits for ends; so the thread that ends it asks for it. Turns are then in the order in which ranks could go on, as in the
//! simulator, and a thread is woken when its turn has come.

use super::{Aborted, Fabric};
use crate::effects::Effects;
use crate::slot::Next;
use paceline_sim::cost::Pause;
use paceline_sim::program::Op;
use paceline_sim::units::OpId;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

/// Where the thread of a rank stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Standing {
    /// It does something else.
    #[default]
    Elsewhere,
    /// Before a compute op; not all that this op waits for has ended.
    Waits(u32),
    /// Before a compute op that has asked for the device, or holds it.
    Asked,
}

/// How a rank came to its turn.
pub(crate) struct Turn {
    /// The op that ended last of those it waited for, if it had to wait for them.
    pub waited_for: Option<OpId>,
    /// When it did; when the rank came, if it had not to wait.
    pub waited_until: u64,
    /// From when on it could have computed: all had ended, and its device had been given up.
    pub possible: u64,
    /// What came last, if it had to wait.
    pub pause: Option<Pause>,
}

impl<E: Effects> Fabric<'_, E> {
    /// Waits until all has ended that a compute op waits for, to which its rank came at `clock`, and takes the device for it.
    pub fn await_turn(&self, rank: u32, op: u32, clock: u64) -> Result<Turn, Aborted> {
        let waits = &self.ops(rank)[op as usize].waits;
        if self.effects.is_planned() {
            for wait in waits {
                self.drive(rank, || self.has_ended(rank, wait.0))?;
            }
            let at = self.waited(rank, op, clock).1;
            self.effects.reach(at);
            self.devices[self.bound.device(rank)].asked.fetch_max(at, Ordering::Relaxed);
            self.ask(rank);
        } else if self.stand(rank, op) {
            self.ask(rank);
        }
        let state = &self.ranks[rank as usize];
        self.drive(rank, || state.granted.load(Ordering::Acquire))?;
        state.granted.store(false, Ordering::Relaxed);
        *state.standing.lock().unwrap_or_else(PoisonError::into_inner) = Standing::Elsewhere;
        let (waited_for, waited_until) = self.waited(rank, op, clock);
        let free_at = self.devices[self.bound.device(rank)].free_at.load(Ordering::Relaxed);
        let pause = Pause::before(clock, waited_until, free_at);
        Ok(Turn { waited_for, waited_until, possible: waited_until.max(free_at), pause })
    }

    /// The thread of a rank has come to an op; whether it is to ask for the device itself.
    fn stand(&self, rank: u32, op: u32) -> bool {
        let mut standing = self.ranks[rank as usize].standing.lock().unwrap_or_else(PoisonError::into_inner);
        let asks = *standing != Standing::Asked && self.may_begin(rank, op);
        if asks {
            *standing = Standing::Asked;
        } else if *standing != Standing::Asked {
            *standing = Standing::Waits(op);
        }
        asks
    }

    /// An op of a rank has ended: asks for the device if that was the last that the rank waited for. Whether the rank's thread is to be
    /// woken.
    pub(super) fn ask_for(&self, rank: u32) -> bool {
        {
            let mut standing = self.ranks[rank as usize].standing.lock().unwrap_or_else(PoisonError::into_inner);
            match *standing {
                Standing::Elsewhere => return true,
                Standing::Waits(op) if self.may_begin(rank, op) => *standing = Standing::Asked,
                Standing::Waits(_) | Standing::Asked => return false,
            }
        }
        self.ask(rank)
    }

    /// Asks for the devices of ranks that begin with a compute op, before their threads have begun.
    pub(super) fn ask_for_first(&self) {
        if self.effects.is_planned() {
            return;
        }
        for rank in self.hosted() {
            if self.ops(rank).first().is_some_and(|op| !op.kind.communicates()) {
                *self.ranks[rank as usize].standing.lock().unwrap_or_else(PoisonError::into_inner) = Standing::Asked;
                self.ask(rank);
            }
        }
    }

    /// Asks for the device for a rank; whether it has it at once.
    fn ask(&self, rank: u32) -> bool {
        self.meet_due();
        let taken = self.devices[self.bound.device(rank)].slot.acquire(rank);
        if taken {
            self.ranks[rank as usize].granted.store(true, Ordering::Release);
        }
        taken
    }

    fn ops(&self, rank: u32) -> &[Op] {
        &self.bound.program.ranks[rank as usize].ops
    }

    fn may_begin(&self, rank: u32, op: u32) -> bool {
        self.ops(rank)[op as usize].waits.iter().all(|wait| self.has_ended(rank, wait.0))
    }

    /// Of the ops that an op waited for, the one that ended last, and when; `clock` where none ended after that.
    fn waited(&self, rank: u32, op: u32, clock: u64) -> (Option<OpId>, u64) {
        let records = &self.ranks[rank as usize].records;
        let ends = self.ops(rank)[op as usize].waits.iter();
        let last = ends.map(|&wait| (records[wait.index()].end.load(Ordering::Relaxed), wait)).max_by_key(|end| end.0);
        last.filter(|&(end, _)| end > clock).map_or((None, clock), |(end, wait)| (Some(wait), end))
    }

    /// Gives the device of `rank` up at time `at`. Who has it next shares the core: woken at once, it may compute for a whole op before
    /// this thread has told others what it has done and asked for its next turn. So it is woken when this thread pays.
    pub fn release(&self, rank: u32, at: u64) {
        let next = self.release_device(self.bound.device(rank), at);
        *self.ranks[rank as usize].owed.lock().unwrap_or_else(PoisonError::into_inner) = next;
    }

    /// Wakes whom the thread of `rank` owes it: before it computes, works or sleeps.
    pub fn pay(&self, rank: u32) {
        let owed = self.ranks[rank as usize].owed.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(next) = owed {
            self.wake(next);
        }
    }

    /// Gives a device up; returns the rank that has it next, which is to be woken.
    pub(super) fn release_device(&self, device: usize, at: u64) -> Option<u32> {
        self.devices[device].free_at.store(at, Ordering::Relaxed);
        self.meet_due();
        match self.devices[device].slot.release() {
            Next::Granted(rank) => {
                self.ranks[rank as usize].granted.store(true, Ordering::Release);
                Some(rank)
            }
            // The releasing thread comes to its next wait or turn on this device soon, and does the work there.
            Next::Idle | Next::Work => None,
        }
    }
}
