//! What a schedule states, and nothing else: which passes every pipeline rank computes, in which order. Sends, receives,
//! collectives, allocations and frees are added by the lowering passes, once for all schedules.

use paceline_sim::program::Pass;
use paceline_sim::units::{MicrobatchId, StageId};
use serde::{Deserialize, Serialize};
use std::fmt;

/// One pass of one microbatch on one stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Action {
    /// Which pass.
    pub pass: Pass,
    /// Global stage.
    pub stage: StageId,
    /// Microbatch, `0..m`.
    pub microbatch: MicrobatchId,
}

impl fmt::Display for Action {
    /// `<stage><pass><microbatch>`, for example `3B0`, with our letters (`B` is the input gradient).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}{}", self.stage.0, self.pass, self.microbatch.0)
    }
}

/// Which pipeline rank holds which stage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// For people: `loop`, `v`, `bidirectional`, `custom`.
    pub name: String,
    /// The pipeline rank of every stage.
    pub device_of_stage: Vec<u32>,
    /// Copies of the model: 1, or 2 where a second pipeline runs the other way (DualPipe). Stages of copy `c` are
    /// `c * n .. (c + 1) * n` with `n = stages / copies`; stage `c * n + k` holds the layers of stage `k`.
    pub copies: u32,
}

/// The compute order of every pipeline rank.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComputeOrder {
    /// The schedule's name as the command line knows it.
    pub name: String,
    /// Microbatches per step.
    pub microbatches: u32,
    /// Where the stages are.
    pub placement: Placement,
    /// By pipeline rank.
    pub actions: Vec<Vec<Action>>,
}
