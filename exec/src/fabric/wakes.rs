//! Who wakes whom, and when. Ranks of one device share a core: a thread that wakes another one there may be put off by the system for as
//! long as that one computes, so it first tells others what it has done, and asks for its next turn.

use super::{Fabric, RankState};
use crate::effects::Effects;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

impl<E: Effects> Fabric<'_, E> {
    pub(super) fn wake_all(&self) {
        (0..self.ranks.len()).for_each(|rank| self.wake(rank as u32));
    }

    /// Wakes the thread of a rank.
    fn wake(&self, rank: u32) {
        let RankState { thread, asleep, .. } = &self.ranks[rank as usize];
        if let Some(thread) = thread.get() {
            if asleep.swap(false, Ordering::Relaxed) {
                self.devices[self.bound.device(rank)].awake.fetch_add(1, Ordering::Relaxed);
            }
            thread.unpark();
        }
    }

    /// Wakes ranks. Those on the device of the `waker` have to wait until its thread pays: they share its core, and the system may let
    /// them run in its place, for a whole op, before it has told others what it has done and asked for its next turn.
    pub(super) fn wake_by(&self, waker: Option<u32>, ranks: &[u32]) {
        for &rank in ranks {
            match waker {
                Some(waker) if waker == rank => {}
                Some(waker) if self.bound.device(waker) == self.bound.device(rank) => self.owe(waker, rank),
                _ => self.wake(rank),
            }
        }
    }

    /// The thread of `waker` shall wake `rank` when it pays.
    pub(super) fn owe(&self, waker: u32, rank: u32) {
        let mut owed = self.ranks[waker as usize].owed.lock().unwrap_or_else(PoisonError::into_inner);
        if !owed.contains(&rank) {
            owed.push(rank);
        }
    }

    /// Wakes whom the thread of `rank` owes it: before it computes, works or sleeps.
    pub fn pay(&self, rank: u32) {
        let owed = std::mem::take(&mut *self.ranks[rank as usize].owed.lock().unwrap_or_else(PoisonError::into_inner));
        owed.into_iter().for_each(|rank| self.wake(rank));
    }
}
