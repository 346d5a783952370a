//! A device's compute slot: one holder at a time, first come first served. Compute ops of several ranks and the local
//! work of communication (copies of messages, reductions of shards) take turns here exactly as the simulator assumes.
//!
//! A compute op needs its own thread, so its turn is granted to a rank. Communication work can be done by any thread
//! that waits on the device, so it is queued as data: a receiver that waits does the copy itself, with no
//! hand-over between threads.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The slot of one device. `W` describes a piece of communication work.
#[derive(Debug)]
pub struct Slot<W> {
    state: Mutex<State<W>>,
    /// What a look without the lock shows: [`HELD`], [`IDLE`] or [`WORK`].
    hint: AtomicU8,
}

/// Somebody has the slot.
const HELD: u8 = 0;
/// Nobody has it or waits for it.
const IDLE: u8 = 1;
/// Nobody has it, and communication work is first in line.
const WORK: u8 = 2;

#[derive(Debug)]
struct State<W> {
    held: bool,
    queue: VecDeque<Turn<W>>,
}

#[derive(Debug)]
enum Turn<W> {
    Compute(u32),
    Work(W),
}

/// What became of a released slot.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// Nobody waits.
    Idle,
    /// It now belongs to this rank, whose thread must be woken.
    Granted(u32),
    /// Communication work is first in line: a thread that waits on this device will take it.
    Work,
}

impl<W> Default for Slot<W> {
    fn default() -> Self {
        let state = State { held: false, queue: VecDeque::with_capacity(64) };
        Slot { state: Mutex::new(state), hint: AtomicU8::new(IDLE) }
    }
}

impl<W> Slot<W> {
    fn lock(&self) -> MutexGuard<'_, State<W>> {
        // The state is valid after every statement, so a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the slot for a compute op of `rank` (true), or queues for it (false): then the rank owns it when a
    /// [`Slot::release`] answers [`Next::Granted`] with its number.
    pub fn acquire(&self, rank: u32) -> bool {
        let mut state = self.lock();
        let free = !state.held && state.queue.is_empty();
        if free {
            state.held = true;
            self.note(&state);
        } else {
            state.queue.push_back(Turn::Compute(rank));
        }
        free
    }

    /// Queues communication work. True if the slot is idle, so that a waiting thread has to be told.
    pub fn push(&self, work: W) -> bool {
        let mut state = self.lock();
        state.queue.push_back(Turn::Work(work));
        self.note(&state);
        !state.held
    }

    /// Brings the hint up to date after a change under the lock.
    fn note(&self, state: &State<W>) {
        let hint = if state.held {
            HELD
        } else if state.queue.is_empty() {
            IDLE
        } else {
            WORK
        };
        self.hint.store(hint, Ordering::Release);
    }

    /// Whether [`Slot::take`] would give work.
    pub fn has_work(&self) -> bool {
        self.hint.load(Ordering::Acquire) == WORK
    }

    /// Whether nobody has the slot or waits for it.
    pub fn is_idle(&self) -> bool {
        self.hint.load(Ordering::Acquire) == IDLE
    }

    /// Takes the slot for the communication work that is first in line, if any.
    pub fn take(&self) -> Option<W> {
        if !self.has_work() {
            return None;
        }
        let mut state = self.lock();
        if state.held || !matches!(state.queue.front(), Some(Turn::Work(_))) {
            return None;
        }
        let Some(Turn::Work(work)) = state.queue.pop_front() else { return None };
        state.held = true;
        self.note(&state);
        Some(work)
    }

    /// Drops all work that waits. Nobody may hold the slot or queue for it.
    pub fn clear(&self) {
        let mut state = self.lock();
        debug_assert!(!state.held, "a slot is cleared between steps");
        state.queue.clear();
        self.note(&state);
    }

    /// Gives the slot up to the next in line.
    pub fn release(&self) -> Next {
        let mut state = self.lock();
        debug_assert!(state.held, "a slot is released by its holder");
        if let Some(&Turn::Compute(rank)) = state.queue.front() {
            state.queue.pop_front();
            return Next::Granted(rank);
        }
        state.held = false;
        self.note(&state);
        if state.queue.is_empty() { Next::Idle } else { Next::Work }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_are_taken_in_the_order_they_were_asked_for() {
        let slot = Slot::<&str>::default();
        assert!(slot.acquire(0));
        assert!(!slot.acquire(1));
        assert!(!slot.push("copy"), "the slot is held: its holder will see the work");
        assert!(!slot.acquire(2));
        assert_eq!(slot.take(), None, "the slot is held");
        assert_eq!(slot.release(), Next::Granted(1));
        assert_eq!(slot.take(), None, "rank 1 holds the slot");
        assert_eq!(slot.release(), Next::Work);
        assert!(!slot.acquire(3), "work that came first goes first");
        assert_eq!(slot.take(), Some("copy"));
        assert_eq!(slot.release(), Next::Granted(2));
        assert_eq!(slot.release(), Next::Granted(3));
        assert_eq!(slot.release(), Next::Idle);
        assert!(slot.acquire(4), "nobody holds the slot");
    }

    #[test]
    fn work_for_an_idle_slot_asks_for_a_thread() {
        let slot = Slot::<u32>::default();
        assert!(slot.push(7));
        assert!(!slot.acquire(0), "the work came first");
        assert_eq!(slot.take(), Some(7));
        assert_eq!(slot.release(), Next::Granted(0));
    }
}
