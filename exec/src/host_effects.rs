//! Communication by copies and sums in memory that all ranks reach.

use crate::bind::{Bound, Meeting};
use crate::collectives::{Member, Parts, perform};
use crate::crew::Clock;
use crate::device_exchange::DeviceExchange;
use crate::effects::{Effects, HostRange, Passage, Span};
use crate::numbers::dtype;
use half::bf16;
use paceline_kernels::{DType, Device, KernelError};
use paceline_sim::program::{Step, rounds};
use smallvec::SmallVec;
use std::sync::{Mutex, PoisonError};

/// A collective as the ranks do it.
struct Exchange {
    steps: Vec<Step>,
    dtype: DType,
    parts: Parts,
    /// Fast groups over which its members are spread.
    groups: usize,
    /// By step, where the link between groups is slowed down: how long it is busy, and how long the way takes then.
    delays: Vec<(u64, u64)>,
}

/// Communication by copies and sums in memory that all ranks share: the host's, or that of one device.
pub(crate) struct HostEffects<'d> {
    clock: Clock,
    /// Does the work where the host cannot.
    far: Option<DeviceExchange<'d>>,
    meetings: Vec<Exchange>,
    transfers: Vec<u64>,
    /// When the link between fast groups has served what it was given.
    link_free_at: Mutex<u64>,
}

impl<'d> HostEffects<'d> {
    pub fn new(bound: &Bound, clock: Clock, device: &'d dyn Device) -> HostEffects<'d> {
        let exchange = |meeting: &Meeting| {
            let dtype = dtype(meeting.element);
            let (width, members) = (dtype.bytes() as u64, meeting.members.len() as u32);
            let part = meeting.arrangement.part_of(meeting.bytes, members, width) / width;
            let parts = Parts { len: (meeting.bytes / width) as usize, part: part as usize };
            let group = &bound.program.groups[meeting.group];
            let groups = group.fast_groups();
            let steps = rounds(meeting.collective, meeting.arrangement.algorithm, members, groups);
            let link = group.crossing.and_then(|crossing| crossing.link);
            let delay = |step: &Step| {
                let bytes = step.crossing(members, groups, (part * width).min(meeting.bytes));
                link.filter(|_| bytes > 0).map_or((0, 0), |link| (link.busy(bytes).0, link.latency.0))
            };
            Exchange { delays: steps.iter().map(delay).collect(), steps, dtype, parts, groups: groups as usize }
        };
        HostEffects {
            clock,
            far: (!device.is_host()).then(|| DeviceExchange::new(device)),
            meetings: bound.meetings.iter().map(exchange).collect(),
            transfers: bound.transfers.iter().map(|t| t.bytes).collect(),
            link_free_at: Mutex::new(0),
        }
    }

    /// What went wrong in communication since this was asked last.
    pub fn take_failure(&self) -> Option<KernelError> {
        self.far.as_ref().and_then(DeviceExchange::take_failure)
    }

    fn timed(&self, work: impl FnOnce()) -> Span {
        let start = self.clock.now();
        work();
        let end = self.clock.now();
        Span { start, end, effective: end }
    }
}

impl Effects for HostEffects<'_> {
    fn at(&self, _: u64) -> u64 {
        self.clock.now()
    }

    fn reach(&self, time: u64) -> u64 {
        time
    }

    fn transfer_takes_device(&self, _: usize) -> bool {
        true
    }

    unsafe fn transfer(&self, transfer: usize, from: HostRange, to: HostRange, _: u64) -> Span {
        debug_assert!(from.bytes == to.bytes && from.bytes == self.transfers[transfer]);
        // SAFETY: the caller's promise; buffers of different ranks are different blocks.
        let copy = || unsafe {
            if let Some(far) = &self.far {
                return far.copy(from, to);
            }
            std::ptr::copy_nonoverlapping(from.address as *const u8, to.address as *mut u8, to.bytes as usize);
        };
        self.timed(copy)
    }

    fn rounds(&self, meeting: usize) -> usize {
        self.meetings[meeting].steps.len()
    }

    fn open_round(&self, meeting: usize, round: usize, _: u64) -> Passage {
        let (busy, way) = self.meetings[meeting].delays[round];
        if busy == 0 && way == 0 {
            return Passage::Free;
        }
        let mut free_at = self.link_free_at.lock().unwrap_or_else(PoisonError::into_inner);
        *free_at = self.clock.now().max(*free_at) + busy;
        Passage::Awaited(*free_at + way)
    }

    fn is_delayed(&self) -> bool {
        self.meetings.iter().any(|meeting| meeting.delays.iter().any(|delay| *delay != (0, 0)))
    }

    fn round_takes_device(&self, _: usize, _: usize) -> bool {
        true
    }

    unsafe fn round(&self, meeting: usize, round: usize, member: usize, ranges: &[HostRange], _: u64) -> Span {
        let &Exchange { ref steps, dtype, parts, groups, .. } = &self.meetings[meeting];
        // SAFETY: the caller's promise; blocks are aligned to 64 bytes and the elements have the meeting's type.
        self.timed(|| unsafe {
            if let Some(far) = &self.far {
                return far.perform(steps[round], ranges, groups, parts, member, dtype);
            }
            match dtype {
                DType::F64 => perform(steps[round], &members::<f64>(ranges), groups, parts, member),
                DType::BF16 => perform(steps[round], &members::<bf16>(ranges), groups, parts, member),
                _ => perform(steps[round], &members::<f32>(ranges), groups, parts, member),
            }
        })
    }
}

fn members<T>(ranges: &[HostRange]) -> SmallVec<[Member<T>; 8]> {
    let shard = |address: u64| (address != 0).then_some(address as *mut T);
    ranges.iter().map(|range| Member { array: range.address as *mut T, shard: shard(range.shard) }).collect()
}
