//! `paceline-kernels`: the numerical operators behind one trait, [`Device`]. It does not know about plans.
//!
//! An operator is data: a [`Call`] names its operands as [`View`]s into blocks that a device allocated. So a call can be
//! checked, timed, recorded, or captured in one place, and a device implements one entry point.

mod call;
mod check;
mod cpu;
mod cuda;
mod device;
mod late;
mod network;
mod queue;
mod streams;
mod thread_network;

pub use call::*;
pub use check::{Access, Extent, Operand, Operands};
pub use cpu::CpuDevice;
pub use cuda::{CudaDevice, CudaLibraries, EmulatedGpu, Gpu};
pub use device::*;
pub use late::LateDevice;
pub use network::{Channel, Joint, Network};
pub use queue::{Moment, Queue, Queues, Sequence};
pub use streams::Pace;
pub use thread_network::ThreadNetwork;
