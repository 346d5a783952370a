//! The local work of communication on memory that only a device reaches: copies and ordered sums as kernel calls. Results have the
//! same bits as those of [`crate::collectives::perform`]: every sum goes over the members from first to last.

use crate::collectives::{Parts, Step};
use crate::fabric::HostRange;
use paceline_kernels::{Block, Call, DType, Device, KernelError, View};
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
    pub unsafe fn perform(&self, step: Step, members: &[HostRange], parts: Parts, member: usize, dtype: DType) {
        // SAFETY: the caller's promise.
        self.note(match step {
            Step::Reduce => unsafe { self.reduce(members, parts, member, dtype) },
            Step::Gather => unsafe { self.gather(members, parts, member, dtype) },
        });
    }

    unsafe fn reduce(
        &self,
        members: &[HostRange],
        parts: Parts,
        member: usize,
        dtype: DType,
    ) -> Result<(), KernelError> {
        let part = parts.of(member);
        let mut room = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let block = match &mut *room {
            Some(block) => block,
            none => none.insert(self.device.allocate(BLOCK * DType::F64.bytes())?),
        };
        let at = |address: u64, element: usize, len| View::at(address + (element * dtype.bytes()) as u64, len, dtype);
        let mut start = part.start;
        while start < part.end {
            let len = BLOCK.min(part.end - start);
            let sum = block.view(0, len, dtype);
            let of = |range: &HostRange| at(range.address, start, len);
            let own = &members[member];
            let last = match own.shard {
                0 => Call::Copy { from: sum, to: of(own) },
                shard => Call::Add { x: sum, into: at(shard, start - part.start, len) },
            };
            // SAFETY: the caller's promise; the sum is nobody else's while the lock is held, and calls run in order.
            unsafe {
                self.device.run(&Call::Copy { from: of(&members[0]), to: sum })?;
                for other in &members[1..] {
                    self.device.run(&Call::Add { x: of(other), into: sum })?;
                }
                self.device.run(&last)?;
            }
            start += len;
        }
        Ok(())
    }

    unsafe fn gather(
        &self,
        members: &[HostRange],
        parts: Parts,
        member: usize,
        dtype: DType,
    ) -> Result<(), KernelError> {
        for (owner, held) in members.iter().enumerate() {
            let part = parts.of(owner);
            let offset = (part.start * dtype.bytes()) as u64;
            let from = match held.shard {
                0 if owner == member => continue,
                0 => held.address + offset,
                shard => shard,
            };
            let to = View::at(members[member].address + offset, part.len(), dtype);
            // SAFETY: the caller's promise.
            unsafe { self.device.run(&Call::Copy { from: View::at(from, part.len(), dtype), to }) }?;
        }
        Ok(())
    }
}
