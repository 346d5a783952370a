//! Work beside other work: queues of one device, and the moments by which they wait for each other.
//!
//! A host that only queues runs ahead of its device: it says what waits for what, and waits itself only where it reads a value.

use crate::device::{Device, KernelError};

/// A moment in the work of a device (an event, in CUDA's words): plain data, known to all queues of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Moment(pub(crate) u64);

/// Work that a queue has kept to do it again and again (a graph, in CUDA's words): plain data, known to that queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sequence(pub(crate) usize);

/// An order of work of its own on a device: its calls run one after the other, beside those of other queues.
///
/// A download waits for everything that was queued here; an upload may be queued, with a copy of what it reads.
pub trait Queue: Device {
    /// The moment comes when everything that was queued here so far has ended.
    ///
    /// # Errors
    /// See [`KernelError`].
    fn set(&self, moment: Moment) -> Result<(), KernelError>;

    /// What is queued here from now on begins after the moment, as it was set last; at once where it never was.
    ///
    /// # Errors
    /// See [`KernelError`].
    fn follow(&self, moment: Moment) -> Result<(), KernelError>;

    /// From now on until [`Queue::kept`], what is run here is kept instead of done: calls only, all of which have been run here before.
    ///
    /// # Errors
    /// See [`KernelError`].
    fn keep(&self) -> Result<(), KernelError>;

    /// What was kept, ready to be done.
    ///
    /// # Errors
    /// See [`KernelError`]. Nothing is kept then.
    fn kept(&self) -> Result<Sequence, KernelError>;

    /// Does what was kept, as if its calls were run again: the same operands at the same addresses.
    ///
    /// # Safety
    /// As for [`Device::run`] of all its calls.
    unsafe fn replay(&self, sequence: Sequence) -> Result<(), KernelError>;
}

/// A device on which work goes on beside other work.
pub trait Queues: Send + Sync {
    /// Opens a queue. Memory of the device is memory of its queues.
    ///
    /// # Errors
    /// See [`KernelError`].
    fn open(&self) -> Result<Box<dyn Queue>, KernelError>;

    /// Most bytes of device memory that a queue takes for itself once it computes.
    fn room(&self) -> u64 {
        0
    }

    /// A moment that was not set yet.
    ///
    /// # Errors
    /// See [`KernelError`].
    fn moment(&self) -> Result<Moment, KernelError>;

    /// Gives moments back, which nobody uses any more.
    fn release(&self, moments: &[Moment]);

    /// Lets the host wait for a moment, as it was set last.
    ///
    /// # Errors
    /// What went wrong in work before it, where that is known.
    fn reach(&self, moment: Moment) -> Result<(), KernelError>;

    /// Seconds from a moment to a later one by the device's clock. Both have come.
    ///
    /// # Errors
    /// See [`KernelError`].
    fn seconds(&self, from: Moment, to: Moment) -> Result<f64, KernelError>;
}
