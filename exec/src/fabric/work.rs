//! The work of communication: messages and the rounds of collectives, from the moment that everybody has come until the last part
//! is done, and the links that some of them have to pass first.

use super::{AtomicRange, Consequence, Consequences, Fabric, Passing, Work};
use crate::effects::{Effects, HostRange, Passage};
use smallvec::SmallVec;
use std::cmp::Reverse;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

impl<E: Effects> Fabric<'_, E> {
    /// Hands work to the device of a rank, or does it at once if it takes no device.
    pub(super) fn give(&self, rank: u32, work: Work, takes_device: bool, consequences: &mut Consequences) {
        if !takes_device {
            self.effect(work, 0, consequences);
        } else if self.devices[self.bound.device(rank)].slot.push(work) {
            self.wake(rank);
        }
    }

    pub(super) fn begin_round(&self, meeting: u32, consequences: &mut Consequences) {
        let state = &self.meetings[meeting as usize];
        let bound = &self.bound.meetings[meeting as usize];
        let round = state.round.load(Ordering::Relaxed) as usize;
        // A collective of one member moves nothing.
        if round == self.effects.rounds(meeting as usize) || bound.members.len() == 1 {
            self.effects.close_meeting(meeting as usize);
            let met = state.began.load(Ordering::Relaxed);
            let end = self.effects.at(state.since.load(Ordering::Relaxed));
            consequences.extend(bound.members.iter().map(|&op| Consequence::Ended { op, met, start: met, end }));
            return;
        }
        match self.effects.open_round(meeting as usize, round, state.since.load(Ordering::Relaxed)) {
            Passage::Free => {}
            Passage::Planned(at) => state.since.store(at, Ordering::Relaxed),
            Passage::Awaited(at) => return self.await_passage(at, Passing::Round(meeting)),
        }
        self.work_on_round(meeting, consequences);
    }

    /// Watches the link: lets rounds begin their work when they have passed it. Runs until the run ends.
    pub fn watch_link(&self, now: impl Fn() -> u64) {
        let mut wire = self.wire.lock().unwrap_or_else(PoisonError::into_inner);
        while !self.aborted() {
            let Some(&Reverse((at, passing))) = wire.peek() else {
                wire = self.wire_changed.wait(wire).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = at.saturating_sub(now());
            if left > 0 {
                let time = Duration::from_nanos(left);
                wire = self.wire_changed.wait_timeout(wire, time).unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            wire.pop();
            drop(wire);
            let mut consequences = Consequences::new();
            match passing {
                Passing::Transfer(transfer) => {
                    self.transfers[transfer as usize].passed.store(at, Ordering::Relaxed);
                    self.work_on_transfer(transfer, &mut consequences);
                }
                Passing::Round(meeting) => {
                    self.meetings[meeting as usize].since.fetch_max(at, Ordering::Relaxed);
                    self.work_on_round(meeting, &mut consequences);
                }
            }
            self.settle(consequences);
            wire = self.wire.lock().unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets the watcher wake up when something has passed the links on its way.
    pub(super) fn await_passage(&self, at: u64, passing: Passing) {
        self.wire.lock().unwrap_or_else(PoisonError::into_inner).push(Reverse((at, passing)));
        self.wire_changed.notify_one();
    }

    /// Both sides have arrived and the wire is passed: the receiver copies.
    pub(super) fn work_on_transfer(&self, transfer: u32, consequences: &mut Consequences) {
        let receiver = self.bound.transfers[transfer as usize].to.rank;
        let takes_device = self.effects.transfer_takes_device(transfer as usize);
        self.give(receiver, Work::Transfer { transfer }, takes_device, consequences);
    }

    /// The wire is passed: every member works.
    fn work_on_round(&self, meeting: u32, consequences: &mut Consequences) {
        let state = &self.meetings[meeting as usize];
        let bound = &self.bound.meetings[meeting as usize];
        let round = state.round.load(Ordering::Relaxed) as usize;
        state.remaining.store(bound.members.len() as u32, Ordering::Relaxed);
        let takes_device = self.effects.round_takes_device(meeting as usize, round);
        for (member, op) in bound.members.iter().enumerate() {
            let work = Work::Round { meeting, member: member as u32 };
            self.give(op.rank, work, takes_device, consequences);
        }
    }

    /// Does work on a device that the calling thread has taken, and gives the device up.
    pub(super) fn perform(&self, device: usize, work: Work) {
        let mut consequences = Consequences::new();
        let free_at = self.devices[device].free_at.load(Ordering::Relaxed);
        let end = self.effect(work, free_at, &mut consequences);
        self.release_device(device, end);
        self.settle(consequences);
    }

    /// Does work on a device that is free from `free_at` on; returns when it is free again.
    fn effect(&self, work: Work, free_at: u64, consequences: &mut Consequences) -> u64 {
        match work {
            Work::Transfer { transfer: t } => {
                let state = &self.transfers[t as usize];
                let met = state.latest.load(Ordering::Relaxed);
                let passed = state.passed.load(Ordering::Relaxed);
                // SAFETY: both ops have arrived and neither has ended, so the program lets nobody else touch the ranges.
                let span = unsafe {
                    self.effects.transfer(t as usize, state.from.load(), state.to.load(), passed.max(free_at))
                };
                let bound = &self.bound.transfers[t as usize];
                for op in [bound.from, bound.to] {
                    consequences.push(Consequence::Ended { op, met, start: span.start, end: span.effective });
                }
                span.end
            }
            Work::Round { meeting, member } => {
                let state = &self.meetings[meeting as usize];
                let round = state.round.load(Ordering::Relaxed) as usize;
                let since = state.since.load(Ordering::Relaxed).max(free_at);
                let ranges: SmallVec<[HostRange; 8]> = state.ranges.iter().map(AtomicRange::load).collect();
                // SAFETY: all members are in this round and stay until each has done its part.
                let span = unsafe { self.effects.round(meeting as usize, round, member as usize, &ranges, since) };
                state.until.fetch_max(span.effective, Ordering::Relaxed);
                if state.remaining.fetch_sub(1, Ordering::AcqRel) == 1 {
                    state.since.store(state.until.load(Ordering::Relaxed), Ordering::Relaxed);
                    state.round.store(round as u32 + 1, Ordering::Relaxed);
                    self.begin_round(meeting, consequences);
                }
                span.end
            }
        }
    }
}
