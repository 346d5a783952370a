//! One process per rank, on one host or many: how they meet ([`meet`]), talk ([`Mesh`]) and exchange what their ranks exchange.
//!
//! Messages and collectives of a program go over a device's own network where it has one (NCCL between GPUs,
//! [`network`]), else through the hosts' memory over TCP ([`staged`]), which every device can do.

mod environment;
mod error;
mod frame;
mod mesh;
pub(crate) mod network;
mod rendezvous;
pub(crate) mod share;
pub(crate) mod staged;

pub use environment::Place;
pub use error::{Disagreement, ProcessError};
pub use mesh::Mesh;
pub use rendezvous::{Patience, Terms, meet};

use std::sync::Arc;

/// How a run works together with the other processes.
#[derive(Debug, Clone)]
pub struct Processes {
    /// The connections; rank `n` of the program runs in process `n`.
    pub mesh: Arc<Mesh>,
    /// Whether messages go over the device's own network (it must have one), or through the hosts' memory.
    pub direct: bool,
}

/// Tags of messages, by what they are of.
pub(crate) fn tag(of: Matter, number: u32) -> u64 {
    ((of as u64) << 56) | u64::from(number)
}

/// What a message is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Matter {
    Transfer = 1,
    Meeting = 2,
    Invitation = 3,
    Hidden = 4,
    State = 5,
    Loss = 6,
}
