//! Exchanges with other processes under way: by stream, what waits for the thread that carries it.

use crate::bind::OpRef;
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, PoisonError};

/// A queue per communication stream of the rank that this process runs.
#[derive(Debug, Default)]
pub(crate) struct Carriage {
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
