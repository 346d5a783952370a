//! What devices of several processes do together: a network of their own, between memories that no host touches.

use crate::device::{KernelError, View};
use std::fmt::Debug;

/// A device's part in something that it does with others.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Joint {
    /// Sends to a member.
    Send { from: View, to: u32 },
    /// Receives from a member as many elements as it sends.
    Receive { to: View, from: u32 },
    /// Sums over all members, for all members.
    AllReduce { x: View },
    /// Sums over all members; member `i` gets part `i` of as many equal parts as there are members. `to` may be that part of `from`.
    ReduceScatter { from: View, to: View },
    /// Puts the parts of all members side by side. `from` may be the own part of `to`.
    AllGather { from: View, to: View },
    /// Sums over all members, for member `root`; what others find in `to` is unspecified. `to` may be `from`.
    Reduce { from: View, to: View, root: u32 },
    /// Copies `from` of member `root` to `to` of all; `from` of the others is not read. `to` may be `from`.
    Broadcast { from: View, to: View, root: u32 },
}

/// A way into a network.
pub trait Network: Send + Sync {
    /// What connects, with its version: all members need the same.
    ///
    /// # Errors
    /// [`KernelError::Unavailable`] says what is missing.
    fn version(&self) -> Result<String, KernelError>;

    /// Makes an invitation, which one member makes and gives to all.
    ///
    /// # Errors
    /// See [`KernelError`].
    fn invite(&self) -> Result<Vec<u8>, KernelError>;

    /// Comes to a channel as member number `member`; returns when all members have come, or with an error when `given_up`.
    ///
    /// # Errors
    /// See [`KernelError`].
    fn open(
        &self,
        invitation: &[u8],
        members: u32,
        member: u32,
        given_up: &dyn Fn() -> bool,
    ) -> Result<Box<dyn Channel>, KernelError>;
}

/// Some devices that are connected. Channels are independent of each other: what waits on one holds up no other.
pub trait Channel: Send + Sync + Debug {
    /// Does all of a batch at once, to its end; returns with an error when `given_up` while it waits for others.
    ///
    /// # Safety
    /// The views are of living memory of the device; until it returns nobody writes to what is read or touches what is written, on
    /// any device. All members bring batches that fit together, in the same order.
    unsafe fn run(&self, batch: &[Joint], given_up: &dyn Fn() -> bool) -> Result<(), KernelError>;
}
