//! What an op costs. The engine asks; a cost model answers from a profile (or from given times).

use crate::program::{Arrangement, Collective, Element, Group, Op, Program};
use crate::units::{Nanos, RankId};
use smallvec::SmallVec;

mod fixed;
mod profile;

pub use fixed::{FixedTimes, StageTimes};
pub use profile::{CostError, ProfileCost, context_of, kernels_of};

/// A source of op costs. Implementations are pure: the same question gets the same answer.
pub trait CostModel: Sync {
    /// Time on the device of a compute-stream op (per-op overhead included).
    fn compute(&self, program: &Program, rank: RankId, op: &Op) -> Nanos;

    /// Cost of moving `bytes` between two ranks once both have arrived.
    fn transfer(&self, program: &Program, from: RankId, to: RankId, bytes: u64) -> Round;

    /// The rounds of a collective once all members have arrived. Each round ends for all members together.
    fn collective(&self, program: &Program, exchange: Exchange, group: &Group) -> SmallVec<[Round; 2]>;

    /// How late a rank begins an op that it had to wait for.
    fn pauses(&self, _program: &Program, _rank: RankId) -> Pauses {
        Pauses::default()
    }
}

/// From the moment when an op that had to wait can begin to its begin: a thread has to wake up. Meanwhile it holds its device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pauses {
    /// After another op on its device.
    pub turn: Nanos,
    /// After an op that it waited for.
    pub wake: Nanos,
}

impl Pauses {
    /// How long one of these is; nothing where there is none.
    pub fn of(self, pause: Option<Pause>) -> Nanos {
        match pause {
            Some(Pause::Turn) => self.turn,
            Some(Pause::Wake) => self.wake,
            None => Nanos::ZERO,
        }
    }
}

/// Why a rank begins an op late.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pause {
    /// It had to wait for its device last.
    Turn,
    /// It had to wait for another op last.
    Wake,
}

impl Pause {
    /// Before an op to which its rank came at `clock`, for which all had ended at `ready`, and for which its device was free at `free`.
    pub fn before(clock: u64, ready: u64, free: u64) -> Option<Pause> {
        if free > ready {
            Some(Pause::Turn)
        } else if ready > clock {
            Some(Pause::Wake)
        } else {
            None
        }
    }
}

/// A collective as its cost depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Exchange {
    /// What it does.
    pub collective: Collective,
    /// Size of the whole array.
    pub bytes: u64,
    /// What it is an array of.
    pub element: Element,
    /// How the array is cut.
    pub arrangement: Arrangement,
}

/// One exchange: the link between fast groups is busy for `link` as soon as it is free, `wire` passes on the way, then `work` occupies
/// the device of each receiver (zero where hardware moves data beside compute). Where it finds the device idle, it begins `late`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Round {
    /// Time that the links between fast groups on its way are busy, which serve one exchange after the other ([`crate::program::Links`]).
    pub link: Nanos,
    /// Time that passes on the way.
    pub wire: Nanos,
    /// Time on the device of each member that receives.
    pub work: Nanos,
    /// Until a waiting thread is awake, where the device was idle and no rank asks for it before; nothing where there is no work.
    pub late: Nanos,
}
