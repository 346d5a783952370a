//! What a run measures of one op, written by whichever thread brings it about.

use paceline_sim::trace::WaitReason;
use paceline_sim::units::OpId;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// What is measured of one op.
#[derive(Debug, Default)]
pub(crate) struct Record {
    pub ready: AtomicU64,
    pub start: AtomicU64,
    pub end: AtomicU64,
    /// `end` as the clock showed it (differs in paced runs only, where threads wake a little late).
    pub observed_end: AtomicU64,
    /// When a communication op stood before its peers.
    pub arrived: AtomicU64,
    wait: AtomicU32,
    /// The epoch (step) in which the op last ended.
    pub ended: AtomicU32,
}

const NO_WAIT: u32 = u32::MAX;
const DEVICE_WAIT: u32 = u32::MAX - 1;
const PEER_WAIT: u32 = u32::MAX - 2;

impl Record {
    pub fn set_wait(&self, wait: Option<WaitReason>) {
        let code = match wait {
            None => NO_WAIT,
            Some(WaitReason::Device) => DEVICE_WAIT,
            Some(WaitReason::Peer) => PEER_WAIT,
            Some(WaitReason::Op(op)) => op.0,
        };
        self.wait.store(code, Ordering::Relaxed);
    }

    pub fn wait(&self) -> Option<WaitReason> {
        match self.wait.load(Ordering::Relaxed) {
            NO_WAIT => None,
            DEVICE_WAIT => Some(WaitReason::Device),
            PEER_WAIT => Some(WaitReason::Peer),
            op => Some(WaitReason::Op(OpId(op))),
        }
    }
}
