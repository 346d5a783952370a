//! Named pipeline schedules: a registry from the names of the command line to functions that state a compute order.
//!
//! A schedule states which passes every pipeline rank computes in which order, for any number of devices and
//! microbatches that it permits. Times, memory limits and communication do not belong here; generators that need them
//! read them from the [`Request`].

mod classic;
mod dual;
mod interleaved;
mod placement;
mod registry;
mod vee;

pub use placement::{bidirectional, looped, v_shape, wave};
pub use registry::{Chunks, PlacementKind, SCHEDULES, Schedule, build, find, names};

pub(crate) use vee::zb_v;

use crate::order::{Action, ComputeOrder, Placement};
use crate::replay::{OrderError, StageMemory, StageTimes};
use paceline_sim::program::Pass;
use paceline_sim::units::{MicrobatchId, StageId};
use thiserror::Error;

/// The most actions that [`build`] agrees to list.
pub const MOST_ACTIONS: u64 = 1 << 26;

/// What a schedule is asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Pipeline devices, `p`.
    pub devices: u32,
    /// Microbatches per step, `m`.
    pub microbatches: u32,
    /// Stages per device, `v`; the schedule's own number when absent.
    pub chunks: Option<u32>,
    /// Times per stage, for generators that adapt to them; every pass one unit when absent.
    pub times: Option<StageTimes>,
    /// Activation sizes per stage, in the unit of `limit`; microbatch-stages when absent.
    pub memory: Option<StageMemory>,
    /// The most activation memory per device, for generators that keep a limit.
    pub limit: Option<Vec<f64>>,
}

impl Request {
    /// `devices` devices and `microbatches` microbatches, everything else as the schedule likes it.
    pub fn new(devices: u32, microbatches: u32) -> Request {
        Request { devices, microbatches, chunks: None, times: None, memory: None, limit: None }
    }

    /// With `chunks` stages per device.
    pub fn chunks(mut self, chunks: u32) -> Request {
        self.chunks = Some(chunks);
        self
    }

    /// Times and activation sizes, the defaults where none are given: unit time, microbatch-stages all freed at W.
    pub(crate) fn sizes(&self, placement: &Placement) -> (StageTimes, StageMemory) {
        let times = self.times.clone().unwrap_or_else(|| StageTimes::unit(placement.stages()));
        let memory = self.memory.clone();
        let memory = memory.unwrap_or_else(|| StageMemory::microbatch_stages(placement, self.devices as usize, 0.0));
        (times, memory)
    }
}

/// Why a schedule cannot be built.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum ScheduleError {
    /// A name that is not in the registry.
    #[error("no schedule is called `{name}`; known: {}", names().collect::<Vec<_>>().join(", "))]
    UnknownName { name: String },
    /// A count of zero.
    #[error("{schedule}: {what} is 0; it has to be at least 1")]
    Zero { schedule: &'static str, what: &'static str },
    /// A number of chunks that the schedule does not have.
    #[error("{schedule}: {chunks} chunks per device asked, but the schedule needs {allowed}")]
    Chunks { schedule: &'static str, chunks: u32, allowed: String },
    /// A number of microbatches that does not fit the groups of the schedule.
    #[error(
        "{schedule}: {microbatches} microbatches on {devices} devices, but they have to be a multiple of {devices}; take {}",
        nearest(*.microbatches, *.devices)
    )]
    NotDivisible { schedule: &'static str, microbatches: u32, devices: u32 },
    /// A bidirectional pipeline with an odd number of devices.
    #[error("{schedule}: {devices} devices, but two opposite pipelines need an even number; take {}", .devices + 1)]
    OddDevices { schedule: &'static str, devices: u32 },
    /// More actions than a list can sensibly hold.
    #[error(
        "{schedule}: about {actions} actions; at most {MOST_ACTIONS} are supported, take fewer devices, chunks or microbatches"
    )]
    TooLarge { schedule: &'static str, actions: u64 },
    /// A memory limit that no order of this kind can keep.
    #[error("{schedule}: the limit of device {device} is {limit}, but at least {least} is needed")]
    LimitTooLow { schedule: &'static str, device: usize, limit: f64, least: f64 },
    /// A list in the request with a length that does not fit.
    #[error("{schedule}: {have} values given for {what}, {need} needed")]
    Length { schedule: &'static str, what: &'static str, have: usize, need: usize },
    /// Times in the request that cannot be used.
    #[error("{schedule}: {source}")]
    Order { schedule: &'static str, source: OrderError },
}

fn nearest(microbatches: u32, devices: u32) -> String {
    let below = microbatches / devices * devices;
    match (below, below.checked_add(devices)) {
        (0, Some(above)) => above.to_string(),
        (below, Some(above)) => format!("{below} or {above}"),
        (below, None) => below.to_string(),
    }
}

/// An action from plain numbers.
pub(crate) fn action(pass: Pass, stage: u32, microbatch: u32) -> Action {
    Action { pass, stage: StageId(stage as u16), microbatch: MicrobatchId(microbatch) }
}

impl ComputeOrder {
    /// The same order with the microbatches from `microbatches` on left out. What was valid stays valid, and no device
    /// holds more than before, because microbatches depend on each other only through the order.
    pub fn truncated(mut self, microbatches: u32) -> ComputeOrder {
        for list in &mut self.actions {
            list.retain(|action| action.microbatch.0 < microbatches);
        }
        self.microbatches = self.microbatches.min(microbatches);
        self
    }
}

#[cfg(test)]
mod tests;
