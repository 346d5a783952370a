//! The local work of communication on memory that only a device reaches: copies and ordered sums as kernel calls. Results have the
//! same bits as those of [`crate::collectives::perform`]: every sum goes over the members from first to last.

use crate::collectives::{Move, Parts, Place, Shape};
use crate::effects::HostRange;
use paceline_kernels::{Block, Call, DType, Device, KernelError, View};
use paceline_sim::program::Step;
use std::sync::{Mutex, PoisonError};

/// Elements that are summed at a time, in memory of its own.
const BLOCK: usize = 1 << 20;

/// Communication within one device.
pub(crate) struct DeviceExchange<'d> {
    device: &'d dyn Device,
    /// Room for sums, made when it is first needed; whoever sums holds it.
    sums: Mutex<Option<Box<dyn Block>>>,
    failure: Mutex<Option<KernelError>>,
}

impl<'d> DeviceExchange<'d> {
    pub fn new(device: &'d dyn Device) -> DeviceExchange<'d> {
        DeviceExchange { device, sums: Mutex::new(None), failure: Mutex::new(None) }
    }

    /// The first error since this was asked last.
    pub fn take_failure(&self) -> Option<KernelError> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn note(&self, result: Result<(), KernelError>) {
        if let Err(error) = result.and_then(|()| self.device.complete()) {
            self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
    }

    /// Copies a message, to its end.
    ///
    /// # Safety
    /// Both ranges are live memory of the device, and only this call touches them.
    pub unsafe fn copy(&self, from: HostRange, to: HostRange) {
        let words = |range: HostRange| View::at(range.address, range.bytes as usize / 4, DType::U32);
        // SAFETY: the caller's promise.
        self.note(unsafe { self.device.run(&Call::Copy { from: words(from), to: words(to) }) });
    }

    /// Does the part of `member` in one round of a collective, to its end.
    ///
    /// # Safety
    /// As for [`crate::collectives::perform`], with memory of the device.
    pub unsafe fn perform(
        &self,
        step: Step,
        members: &[HostRange],
        groups: usize,
        parts: Parts,
        member: usize,
        dtype: DType,
    ) {
        let shape = Shape { members: members.len(), groups };
        for work in shape.moves(step, parts, member, |member| members[member].shard != 0) {
            // SAFETY: the caller's promise.
            self.note(unsafe { self.work(&work, members, dtype) });
        }
    }

    unsafe fn work(&self, work: &Move, members: &[HostRange], dtype: DType) -> Result<(), KernelError> {
        let width = dtype.bytes();
        let address = |place: Place| match place {
            Place::Array { member, element } => members[member].address + (element * width) as u64,
            Place::Shard { member } => members[member].shard,
        };
        let (addends, part, to, adds) = match work {
            Move::Sum { addends, part, to, adds } => (addends, part, address(*to), *adds),
            &Move::Copy { from, to, len } => {
                let (from, to) = (View::at(address(from), len, dtype), View::at(address(to), len, dtype));
                // SAFETY: the caller's promise.
                return unsafe { self.device.run(&Call::Copy { from, to }) };
            }
        };
        let mut room = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let block = match &mut *room {
            Some(block) => block,
            none => none.insert(self.device.allocate(BLOCK * DType::F64.bytes())?),
        };
        let mut start = part.start;
        while start < part.end {
            let len = BLOCK.min(part.end - start);
            let sum = block.view(0, len, dtype);
            let of = |member: usize| View::at(members[member].address + (start * width) as u64, len, dtype);
            let out = View::at(to + ((start - part.start) * width) as u64, len, dtype);
            let last = if adds { Call::Add { x: sum, into: out } } else { Call::Copy { from: sum, to: out } };
            // SAFETY: the caller's promise; the sum is nobody else's while the lock is held, and calls run in order.
            unsafe {
                self.device.run(&Call::Copy { from: of(addends[0]), to: sum })?;
                for &other in &addends[1..] {
                    self.device.run(&Call::Add { x: of(other), into: sum })?;
                }
                self.device.run(&last)?;
            }
            start += len;
        }
        Ok(())
    }
}
