//! What communication does to memory and how long it takes, behind one trait: really done, or only paced.

use crate::bind::Partner;
use crate::error::ExecError;
use paceline_sim::cost::Pauses;

/// When a piece of work ran, in nanoseconds since the run began.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Span {
    pub start: u64,
    /// The device is free again.
    pub end: u64,
    /// The effect is there (later than `end` where a wire follows).
    pub effective: u64,
}

/// A range of memory that ranks exchange.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct HostRange {
    pub address: u64,
    pub bytes: u64,
    /// Of a member of a collective whose part lies apart: where; else 0.
    pub shard: u64,
}

/// When a transfer or a round of a collective may begin its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Passage {
    /// At once.
    Free,
    /// At this time of a plan.
    Planned(u64),
    /// When the clock shows this time: a link between fast groups is busy until then.
    Awaited(u64),
}

/// What communication does and how long it takes: really, or paced.
pub(crate) trait Effects: Sync {
    /// The time at which something happens that could happen from `earliest` on: now, on a real clock.
    fn at(&self, earliest: u64) -> u64;

    /// Returns at `time` (paced), or at once (real); tells the clock's reading (paced), or `time` (real).
    fn reach(&self, time: u64) -> u64;

    /// Whether times are those of a plan: an op that has ended may have its effect later.
    fn is_planned(&self) -> bool {
        false
    }

    /// How late a rank begins what it had to wait for, by plan.
    fn pauses(&self, _rank: u32) -> Pauses {
        Pauses::default()
    }

    /// How late the copy of a transfer begins on a device that was idle, by plan.
    fn late_transfer(&self, _transfer: usize) -> u64 {
        0
    }

    /// How late the work of a round of a collective begins on a device that was idle, by plan.
    fn late_round(&self, _meeting: usize, _round: usize) -> u64 {
        0
    }

    /// Both sides of a transfer have arrived, the later one at `since`: gives it to the links between fast groups, if it crosses.
    fn open_transfer(&self, transfer: usize, since: u64) -> Passage;

    /// Whether this process runs a rank. Where it does not run all, exchanges of ranks are carried by threads of their streams.
    fn hosts(&self, _rank: u32) -> bool {
        true
    }

    /// Does the part of this process's rank in an exchange with ranks of other processes, to its end.
    ///
    /// # Safety
    /// The range is the op's, and lives; only this call touches it.
    unsafe fn carry(&self, _partner: Partner, _range: HostRange) -> Result<Span, ExecError> {
        Err(ExecError::Program("an exchange with another process, where there is none".into()))
    }

    /// The run ends with this error: whoever waits for other processes stops waiting, and they are told.
    fn give_up(&self, _error: &ExecError) {}

    /// Whether a transfer takes its receiver's device.
    fn transfer_takes_device(&self, transfer: usize) -> bool;

    /// Moves a message.
    ///
    /// # Safety
    /// Both ranges live, and only this call touches them.
    unsafe fn transfer(&self, transfer: usize, from: HostRange, to: HostRange, earliest: u64) -> Span;

    /// Rounds of a collective.
    fn rounds(&self, meeting: usize) -> usize;

    /// All members stand before a round, from `since` on: gives its bytes to the links between fast groups, if it crosses.
    fn open_round(&self, meeting: usize, round: usize, since: u64) -> Passage;

    /// All members have done all rounds.
    fn close_meeting(&self, _meeting: usize) {}

    /// Whether anything is [`Passage::Awaited`], so that a thread has to watch the clock.
    fn is_delayed(&self) -> bool;

    /// Whether a round takes the members' devices.
    fn round_takes_device(&self, meeting: usize, round: usize) -> bool;

    /// Does a member's part of a round.
    ///
    /// # Safety
    /// All ranges live, all members have entered the round, and only their calls touch them.
    unsafe fn round(&self, meeting: usize, round: usize, member: usize, ranges: &[HostRange], earliest: u64) -> Span;
}
