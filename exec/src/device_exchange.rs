//! The local work of communication on memory that only a device reaches: copies and ordered sums as kernel calls. Results have the
//! same bits as those of [`crate::collectives::perform`]: every sum goes over the members from first to last.
//!
//! Where the device has queues, work is queued on those of the ops ([`Lines`]); else it is done when a function returns.

use crate::bind::Bound;
use crate::collectives::{Move, Parts, Place, Shape};
use crate::effects::HostRange;
use crate::lines::Lines;
use paceline_kernels::{Block, Call, DType, Device, KernelError, View};
use paceline_sim::program::Step;
use std::sync::{Mutex, PoisonError};

/// Elements that are summed at a time, in memory of its own.
const BLOCK: usize = 1 << 20;
/// Bytes of that memory.
pub(crate) const ROOM: u64 = (BLOCK * DType::F64.bytes()) as u64;

/// Communication within one device.
pub(crate) struct DeviceExchange<'d> {
    device: &'d dyn Device,
    lines: Option<&'d Lines<'d>>,
    sums: Sums,
    failure: Mutex<Option<KernelError>>,
}

/// Room for sums, made when it is first needed; whoever sums holds it.
pub(crate) type Sums = Mutex<Option<Box<dyn Block>>>;

/// Where a piece of work is done.
#[derive(Clone, Copy)]
struct Site<'s> {
    device: &'s dyn Device,
    sums: &'s Sums,
}

/// A member's part in a round of a collective.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part {
    pub meeting: usize,
    pub member: usize,
    pub step: Step,
    pub groups: usize,
    pub parts: Parts,
    pub dtype: DType,
}

impl<'d> DeviceExchange<'d> {
    pub fn new(device: &'d dyn Device, lines: Option<&'d Lines<'d>>) -> DeviceExchange<'d> {
        DeviceExchange { device, lines, sums: Sums::default(), failure: Mutex::new(None) }
    }

    /// The first error since this was asked last.
    pub fn take_failure(&self) -> Option<KernelError> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn note(&self, result: Result<(), KernelError>) {
        if let Err(error) = result {
            self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
    }

    /// Moves a message.
    ///
    /// # Safety
    /// Both ranges are live memory of the device, and only this call touches them.
    pub unsafe fn transfer(&self, bound: &Bound, transfer: usize, from: HostRange, to: HostRange) {
        // In the widest words that fill it.
        let dtype = if from.bytes.is_multiple_of(4) { DType::U32 } else { DType::BF16 };
        let words = |range: HostRange| View::at(range.address, range.bytes as usize / dtype.bytes(), dtype);
        let call = Call::Copy { from: words(from), to: words(to) };
        let ends = &bound.transfers[transfer];
        self.note(match self.lines {
            // SAFETY: the caller's promise.
            None => unsafe { self.device.run(&call) }.and_then(|()| self.device.complete()),
            Some(lines) => lines
                .open_transfer(ends.from, ends.to)
                // SAFETY: the caller's promise.
                .and_then(|()| unsafe { lines.of(ends.to).queue.run(&call) })
                .and_then(|()| lines.close_transfer(ends.from, ends.to)),
        });
    }

    /// All members stand before a round of a collective.
    pub fn open_round(&self, meeting: usize, round: usize) {
        if let Some(lines) = self.lines {
            self.note(lines.open_round(meeting, round));
        }
    }

    /// All members have done all rounds.
    pub fn close_meeting(&self, meeting: usize, rounds: usize) {
        if let Some(lines) = self.lines {
            self.note(lines.close_meeting(meeting, rounds));
        }
    }

    /// Does the part of a member in one round of a collective.
    ///
    /// # Safety
    /// As for [`crate::collectives::perform`], with memory of the device.
    pub unsafe fn perform(&self, bound: &Bound, part: &Part, members: &[HostRange]) {
        let at = bound.meetings[part.meeting].members[part.member];
        self.note(match self.lines {
            // SAFETY: the caller's promise.
            None => unsafe { round(self.device, &self.sums, part, members) }.and_then(|()| self.device.complete()),
            Some(lines) => {
                let line = lines.of(at);
                // SAFETY: the caller's promise.
                unsafe { round(&*line.queue, &line.sums, part, members) }.and_then(|()| lines.end(at))
            }
        });
    }
}

/// The part of a member in a round, on a device or a queue of it. `sums` is used there and nowhere else.
///
/// # Safety
/// As for [`DeviceExchange::perform`].
pub(crate) unsafe fn round(
    device: &dyn Device,
    sums: &Sums,
    part: &Part,
    members: &[HostRange],
) -> Result<(), KernelError> {
    let site = Site { device, sums };
    let shape = Shape { members: members.len(), groups: part.groups };
    let moves = shape.moves(part.step, part.parts, part.member, |member| members[member].shard != 0);
    // SAFETY: the caller's promise.
    moves.iter().try_for_each(|work| unsafe { site.work(work, members, part.dtype) })
}

impl Site<'_> {
    unsafe fn work(&self, work: &Move, members: &[HostRange], dtype: DType) -> Result<(), KernelError> {
        let width = dtype.bytes();
        let address = |place: Place| match place {
            Place::Array { member, element } => members[member].address + (element * width) as u64,
            Place::Shard { member } => members[member].shard,
        };
        if let &Move::Copy { from, to, len } = work {
            let (from, to) = (View::at(address(from), len, dtype), View::at(address(to), len, dtype));
            // SAFETY: the caller's promise.
            return unsafe { self.device.run(&Call::Copy { from, to }) };
        }
        let mut room = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let block = match &mut *room {
            Some(block) => block,
            none => none.insert(self.device.allocate(ROOM as usize)?),
        };
        if let &Move::Swap { one, other, len } = work {
            for start in (0..len).step_by(BLOCK) {
                let (len, at) = (BLOCK.min(len - start), (start * width) as u64);
                let (one, other) = (View::at(address(one) + at, len, dtype), View::at(address(other) + at, len, dtype));
                let kept = block.view(0, len, dtype);
                // SAFETY: the caller's promise; the block is nobody else's while the lock is held, and calls run in order.
                unsafe {
                    self.device.run(&Call::Copy { from: one, to: kept })?;
                    self.device.run(&Call::Copy { from: other, to: one })?;
                    self.device.run(&Call::Copy { from: kept, to: other })?;
                }
            }
            return Ok(());
        }
        let Move::Sum { addends, part, to, adds } = work else { return Ok(()) };
        let (to, adds) = (address(*to), *adds);
        let mut start = part.start;
        while start < part.end {
            let len = BLOCK.min(part.end - start);
            let of = |member: usize| View::at(members[member].address + (start * width) as u64, len, dtype);
            let out = View::at(to + ((start - part.start) * width) as u64, len, dtype);
            // SAFETY: the caller's promise; the room is nobody else's while the lock is held, and calls run in order.
            let run = |call: Call| unsafe { self.device.run(&call) };
            if dtype == DType::BF16 {
                // In 32 bits, rounded once.
                let (sum, wide) = (block.view(0, len, DType::F32), block.view(BLOCK * 4, len, DType::F32));
                run(Call::Cast { from: of(addends[0]), to: sum })?;
                let there = adds.then_some(out);
                for other in addends[1..].iter().map(|&other| of(other)).chain(there) {
                    run(Call::Cast { from: other, to: wide })?;
                    run(Call::Add { x: wide, into: sum })?;
                }
                run(Call::Cast { from: sum, to: out })?;
            } else {
                let sum = block.view(0, len, dtype);
                run(Call::Copy { from: of(addends[0]), to: sum })?;
                for &other in &addends[1..] {
                    run(Call::Add { x: of(other), into: sum })?;
                }
                run(if adds { Call::Add { x: sum, into: out } } else { Call::Copy { from: sum, to: out } })?;
            }
            start += len;
        }
        Ok(())
    }
}
