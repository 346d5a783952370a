//! The event engine: interprets a program with the times of a cost model, in integer nanoseconds, so that the same
//! question always gets the same answer.
//!
//! The rules are those of [`crate::program`], which the executor follows too: a rank issues its ops in order; streams are
//! first in, first out; sends meet receives and groups meet for collectives; a device is held by one compute op or one
//! piece of communication work at a time, first come first served. What happens at one instant happens in a fixed order.
//!
//! [`Compiled`] prepares a program once; [`Compiled::run`] is a loop over arrays without allocation per op, for searches
//! that simulate thousands of programs.

mod compiled;
mod state;
mod timeline;

pub use compiled::Compiled;
pub use timeline::Timeline;

use crate::cost::CostModel;
use crate::program::{OpRef, PartnerError, Program};
use crate::trace::Trace;
use thiserror::Error;

/// Why a program cannot be simulated.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum EngineError {
    /// Ops do not meet.
    #[error(transparent)]
    Partners(#[from] PartnerError),
    /// An op waits for one that is not before it.
    #[error("{op} waits for op{wait}, which does not come before it")]
    Wait { op: OpRef, wait: usize },
    /// A rank on a device that does not exist.
    #[error("{op} runs on device {device} of {devices}")]
    Device { op: OpRef, device: usize, devices: usize },
    /// A pass or an optimizer step on a communication stream.
    #[error("{op} computes on stream {stream}; only stream 0 computes")]
    Stream { op: OpRef, stream: u8 },
    /// Every rank waits for another.
    #[error("deadlock: {}", standing.join("; "))]
    Deadlock { standing: Vec<String> },
    /// More ops than are numbered.
    #[error("the program has more than {limit} ops")]
    TooLarge { limit: usize },
}

/// Simulates one step of a program.
///
/// # Errors
/// When ops do not meet, or wait for each other in a circle.
pub fn simulate(program: &Program, costs: &dyn CostModel) -> Result<Trace, EngineError> {
    let compiled = Compiled::new(program)?;
    Ok(compiled.run(costs)?.trace(program))
}

#[cfg(test)]
mod tests;
