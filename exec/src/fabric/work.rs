//! The work of communication: messages and the rounds of collectives, from the moment that everybody has come until the last part
//! is done, and the links that some of them have to pass first.

use super::{AtomicRange, Consequence, Consequences, Fabric, Passing, Work};
use crate::effects::{Effects, HostRange, Passage};
use smallvec::SmallVec;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// What a rank found on the links.
pub(super) enum Watch {
    /// Something was due, or the rank has to look after something else.
    Met,
    /// Something is due, but not soon: it may sleep that long.
    Later(Duration),
    /// Nothing is due, or others look.
    Nothing,
}

/// Nanoseconds before something has passed its links from which on a waiting rank looks instead of sleeping: more than a sleep is late.
const SOON: u64 = 200_000;
/// Nanoseconds after which the watcher takes that no rank has looked.
const LATE: u64 = 20_000;

impl<E: Effects> Fabric<'_, E> {
    /// Hands work to the device of a rank, or does it at once if it takes no device.
    pub(super) fn give(&self, rank: u32, work: Work, takes_device: bool, consequences: &mut Consequences) {
        if !takes_device {
            self.effect(work, 0, consequences);
            return;
        }
        let slot = &self.devices[self.bound.device(rank)].slot;
        // Somebody may take it at once, so what was idle is noted before.
        let idle = slot.is_idle();
        match work {
            Work::Transfer { transfer } => self.transfers[transfer as usize].to_idle.store(idle, Ordering::Relaxed),
            Work::Round { meeting, .. } => {
                self.meetings[meeting as usize].to_idle.fetch_add(u32::from(idle), Ordering::Relaxed);
            }
        }
        if slot.push(work) {
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

    /// Watches the link for times at which every rank computes: lets what has passed it begin its work. Runs until the run ends. A thread
    /// that sleeps until a time wakes up some tens of microseconds later, so ranks that wait look by themselves, see
    /// [`Fabric::meet_passage`], and the watcher leaves them that long.
    pub fn watch_link(&self, now: impl Fn() -> u64) {
        let mut wire = self.wire.lock().unwrap_or_else(PoisonError::into_inner);
        while !self.aborted() {
            let Some(&Reverse((at, _))) = wire.peek() else {
                wire = self.wire_changed.wait(wire).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = (at + LATE).saturating_sub(now());
            if left > 0 {
                let time = Duration::from_nanos(left);
                wire = self.wire_changed.wait_timeout(wire, time).unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            drop(wire);
            self.pass(now());
            wire = self.wire.lock().unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A rank with nothing to do looks for what passes a link soon, while it is `waiting`.
    pub(super) fn meet_passage(&self, waiting: impl Fn() -> bool) -> Watch {
        let at = self.due.load(Ordering::Relaxed);
        // Where cores are short, another rank computes on this one.
        if at == u64::MAX || self.spins == 0 || !waiting() {
            return Watch::Nothing;
        }
        // Where the clock is a plan's, nothing is awaited.
        let left = at.saturating_sub(self.effects.at(0));
        if left > SOON {
            return Watch::Later(Duration::from_nanos(left - SOON / 2));
        }
        while waiting() {
            let now = self.effects.at(0);
            if now >= at {
                self.pass(now);
                break;
            }
            std::hint::spin_loop();
        }
        Watch::Met
    }

    /// Lets everything begin its work that has passed its links meanwhile. Who asks for a device or gives one up does this first: what
    /// has passed before takes its turn before, as the simulator has it.
    pub(super) fn meet_due(&self) {
        let at = self.due.load(Ordering::Relaxed);
        // Where the clock is a plan's, nothing is awaited.
        if at == u64::MAX {
            return;
        }
        let now = self.effects.at(0);
        if now >= at {
            self.pass(now);
        }
    }

    /// Lets everything begin its work that has passed its links.
    fn pass(&self, now: u64) {
        loop {
            let (at, passing) = {
                let mut wire = self.wire.lock().unwrap_or_else(PoisonError::into_inner);
                let Some(&Reverse((at, passing))) = wire.peek().filter(|next| next.0.0 <= now) else { return };
                wire.pop();
                self.note_due(&wire);
                (at, passing)
            };
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
        }
    }

    fn note_due(&self, wire: &BinaryHeap<Reverse<(u64, Passing)>>) {
        self.due.store(wire.peek().map_or(u64::MAX, |next| next.0.0), Ordering::Relaxed);
    }

    /// Lets ranks that wait, or the watcher, begin work that has passed the links on its way.
    pub(super) fn await_passage(&self, at: u64, passing: Passing) {
        let mut wire = self.wire.lock().unwrap_or_else(PoisonError::into_inner);
        wire.push(Reverse((at, passing)));
        self.note_due(&wire);
        drop(wire);
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
        state.to_idle.store(0, Ordering::Relaxed);
        state.last_begun.store(0, Ordering::Relaxed);
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
        let next = self.release_device(device, end);
        self.settle(consequences);
        if let Some(next) = next {
            self.wake(next);
        }
    }

    /// Does work on a device that is free from `free_at` on; returns when it is free again.
    fn effect(&self, work: Work, free_at: u64, consequences: &mut Consequences) -> u64 {
        match work {
            Work::Transfer { transfer: t } => {
                let state = &self.transfers[t as usize];
                let met = state.latest.load(Ordering::Relaxed);
                let passed = state.passed.load(Ordering::Relaxed);
                // SAFETY: both ops have arrived and neither has ended, so the program lets nobody else touch the ranges.
                let receiver = self.bound.transfers[t as usize].to.rank;
                let earliest = self.begin(receiver, passed, free_at, self.effects.late_transfer(t as usize));
                let span = unsafe { self.effects.transfer(t as usize, state.from.load(), state.to.load(), earliest) };
                if state.to_idle.load(Ordering::Relaxed) {
                    self.exchanges.message(t as usize, span.start.saturating_sub(passed));
                }
                let bound = &self.bound.transfers[t as usize];
                for op in [bound.from, bound.to] {
                    consequences.push(Consequence::Ended { op, met, start: span.start, end: span.effective });
                }
                span.end
            }
            Work::Round { meeting, member } => {
                let state = &self.meetings[meeting as usize];
                let round = state.round.load(Ordering::Relaxed) as usize;
                let late = self.effects.late_round(meeting as usize, round);
                let rank = self.bound.meetings[meeting as usize].members[member as usize].rank;
                let since = self.begin(rank, state.since.load(Ordering::Relaxed), free_at, late);
                let ranges: SmallVec<[HostRange; 8]> = state.ranges.iter().map(AtomicRange::load).collect();
                // SAFETY: all members are in this round and stay until each has done its part.
                let span = unsafe { self.effects.round(meeting as usize, round, member as usize, &ranges, since) };
                self.exchanges.work(meeting as usize, round, span.end.saturating_sub(span.start));
                state.last_begun.fetch_max(span.start, Ordering::Relaxed);
                state.until.fetch_max(span.effective, Ordering::Relaxed);
                if state.remaining.fetch_sub(1, Ordering::AcqRel) == 1 {
                    if state.to_idle.load(Ordering::Relaxed) as usize == ranges.len() {
                        let begun = state.last_begun.load(Ordering::Relaxed);
                        self.exchanges
                            .round(meeting as usize, begun.saturating_sub(state.since.load(Ordering::Relaxed)));
                    }
                    state.since.store(state.until.load(Ordering::Relaxed), Ordering::Relaxed);
                    state.round.store(round as u32 + 1, Ordering::Relaxed);
                    self.begin_round(meeting, consequences);
                }
                span.end
            }
        }
    }

    /// When work for a rank begins that could begin at `since`, on a device that is free from `free_at` on: `late`, by plan, if the device
    /// was idle before and no rank asks for it meanwhile.
    fn begin(&self, rank: u32, since: u64, free_at: u64, late: u64) -> u64 {
        if free_at > since {
            return free_at;
        }
        let asked = self.devices[self.bound.device(rank)].asked.load(Ordering::Relaxed);
        if asked < since { since + late } else { asked.min(since + late) }
    }
}
