//! The timeline and memory curve of one step, predicted by the simulator or measured by the executor, in one schema.

mod export;
mod timeline;

pub use timeline::Moment;

use crate::program::{MemoryClass, OpKind, Stream};
use crate::units::{Nanos, OpId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The format written into every trace file.
pub const TRACE_FORMAT: &str = "paceline.trace/1";

/// One step on all ranks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trace {
    /// [`TRACE_FORMAT`].
    pub format: String,
    /// Where it comes from.
    pub origin: Origin,
    /// First start to last end over all ranks.
    pub makespan: Nanos,
    /// By rank.
    pub ranks: Vec<RankTrace>,
}

/// Where a trace comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// The simulator.
    Predicted,
    /// The executor.
    Measured,
}

/// One rank's part of a trace.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RankTrace {
    /// One event per op, in issue order.
    pub events: Vec<Event>,
    /// Memory after each change, in time order: total bytes.
    pub memory: Vec<(Nanos, u64)>,
    /// Highest total.
    pub peak_bytes: u64,
    /// Bytes by class at the first moment of the peak.
    pub peak_by_class: BTreeMap<MemoryClass, u64>,
}

/// When an op ran.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// The op's place in its rank's list.
    pub op: OpId,
    /// What it did.
    pub kind: OpKind,
    /// Where it ran.
    pub stream: Stream,
    /// From here it could have been issued (everything before it in its stream had ended).
    pub ready: Nanos,
    /// When it held its device, or when communication began (all peers there).
    pub start: Nanos,
    /// When it had ended.
    pub end: Nanos,
    /// Why it did not start at `ready`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait: Option<WaitReason>,
}

/// Why an op started later than its stream was free.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WaitReason {
    /// For an earlier op of the same rank (a receive, a collective).
    Op(OpId),
    /// For its device, held by another rank or by communication work.
    Device,
    /// For its peers to arrive.
    Peer,
}
