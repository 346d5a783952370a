//! Exchanges with other processes: which they are, and by stream, what waits for the thread that carries it.

use super::{Consequence, Consequences, Fabric};
use crate::bind::{OpRef, Partner};
use crate::effects::{Effects, HostRange, Span};
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, PoisonError};

/// A queue per communication stream of the rank that this process runs.
#[derive(Debug, Default)]
pub(super) struct Carriage {
    queues: Mutex<Vec<VecDeque<OpRef>>>,
    changed: Condvar,
}

impl Carriage {
    pub fn new(streams: usize) -> Carriage {
        Carriage { queues: Mutex::new(vec![VecDeque::new(); streams]), changed: Condvar::new() }
    }

    /// Number of streams.
    pub fn streams(&self) -> usize {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// An op stands before its peers in other processes.
    pub fn give(&self, stream: usize, op: OpRef) {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)[stream].push_back(op);
        self.changed.notify_all();
    }

    /// The next op of a stream; waits for one. `None` when it is `over`.
    pub fn take(&self, stream: usize, over: impl Fn() -> bool) -> Option<OpRef> {
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if over() {
                return None;
            }
            if let Some(op) = queues[stream].pop_front() {
                return Some(op);
            }
            queues = self.changed.wait(queues).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets all threads look whether it is over.
    pub fn wake(&self) {
        // Under the lock, so that each thread has either seen that it is over or waits already.
        drop(self.queues.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }
}

impl<E: Effects> Fabric<'_, E> {
    /// The ranks that this process runs.
    pub fn hosted(&self) -> impl Iterator<Item = u32> {
        (0..self.ranks.len() as u32).filter(|&rank| self.effects.hosts(rank))
    }

    /// Streams whose exchanges are carried to other processes, each by a thread that calls [`Fabric::carry`].
    pub fn carried_streams(&self) -> usize {
        if self.alone { 0 } else { self.carriage.streams() }
    }

    /// Carries the exchanges of a stream until the run ends.
    pub fn carry(&self, stream: usize) {
        while let Some(op) = self.carriage.take(stream, || self.aborted()) {
            let partner = self.bound.partners[op.rank as usize][op.op as usize];
            let range = match partner {
                Partner::None => HostRange::default(),
                Partner::Sender(t) => self.transfers[t as usize].from.load(),
                Partner::Receiver(t) => self.transfers[t as usize].to.load(),
                Partner::Member { meeting, member } => self.meetings[meeting as usize].ranges[member as usize].load(),
            };
            // SAFETY: the op has arrived and has not ended, so the program lets nobody else touch its range.
            match unsafe { self.effects.carry(partner, range) } {
                Err(error) => return self.abort(error),
                Ok(Span { start, effective: end, .. }) => {
                    let mut consequences = Consequences::new();
                    consequences.push(Consequence::Ended { op, met: start, start, end });
                    self.settle(consequences);
                }
            }
        }
    }

    /// Whether an op meets ranks of other processes.
    pub fn is_carried(&self, partner: Partner) -> bool {
        let away = |op: OpRef| !self.effects.hosts(op.rank);
        match partner {
            _ if self.alone => false,
            Partner::None => false,
            Partner::Sender(t) => away(self.bound.transfers[t as usize].to),
            Partner::Receiver(t) => away(self.bound.transfers[t as usize].from),
            Partner::Member { meeting, .. } => self.bound.meetings[meeting as usize].members.iter().any(|&op| away(op)),
        }
    }
}
