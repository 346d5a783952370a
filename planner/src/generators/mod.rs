//! Schedules that are computed for real times and memory limits, where the named ones are fixed patterns.
//!
//! - [`zero_bubble`]: the heuristic of ZB-1P and ZB-2P, one stage per device.
//! - [`adaptive_v`]: the best V block of a large family, for the times and the memory at hand.
//! - [`greedy`]: the same for several stages per device, ZB-V among them.
//! - [`continuous`]: blocks whose offsets are times, not slots, found by modulo scheduling.

mod adaptive;
mod continuous;
mod greedy;
mod v_family;
mod zero_bubble;

pub(crate) use adaptive::{adaptive_v, best_rearranged, ranked};
pub(crate) use continuous::continuous;
pub(crate) use greedy::greedy;
pub(crate) use zero_bubble::zero_bubble;

use crate::bounds::least_peaks;
use crate::order::{Action, ComputeOrder, Placement};
use crate::replay::{StageMemory, StageTimes, peaks};
use crate::schedules::{ScheduleError, action};
use paceline_sim::program::Pass;

/// What to schedule: the stages and where they are, how long they take, what they hold, and what the devices have room for.
#[derive(Debug, Clone)]
pub struct Problem {
    /// Where the stages are.
    pub placement: Placement,
    /// Microbatches per step.
    pub microbatches: u32,
    /// Times by stage, in any one unit.
    pub times: StageTimes,
    /// Activation sizes by stage, in any one unit.
    pub memory: StageMemory,
    /// The most that each device may hold, in that unit; infinite where there is no limit.
    pub limit: Vec<f64>,
}

impl Problem {
    /// Whether an order holds no more than the limit anywhere.
    pub fn fits(&self, order: &ComputeOrder) -> bool {
        // Sums of sizes carry rounding.
        peaks(order, &self.memory).peak.iter().zip(&self.limit).all(|(held, limit)| *held <= limit * (1.0 + 1e-9))
    }

    /// Whether one microbatch at a time fits everywhere.
    ///
    /// # Errors
    /// When it does not: no schedule could keep such a limit.
    pub(crate) fn check(&self, schedule: &'static str) -> Result<(), ScheduleError> {
        check_limit(schedule, &self.placement, &self.memory, &self.limit)
    }

    /// The order with these lists.
    fn with_lists(&self, actions: Vec<Vec<Action>>) -> ComputeOrder {
        ComputeOrder {
            name: String::new(),
            microbatches: self.microbatches,
            placement: self.placement.clone(),
            actions,
        }
    }

    /// One microbatch after the other: the order that needs the least memory.
    pub(crate) fn serial(&self) -> ComputeOrder {
        let per_copy = self.placement.stages_per_copy() as u32;
        let mut actions: Vec<Vec<Action>> = vec![Vec::new(); self.placement.devices()];
        for microbatch in 0..self.microbatches {
            // Two copies of the model share the microbatches, the first half goes through the first.
            let copy = microbatch * self.placement.copies / self.microbatches;
            let stages = copy * per_copy..(copy + 1) * per_copy;
            let mut push = |pass, stage: u32| {
                actions[self.placement.device_of_stage[stage as usize] as usize].push(action(pass, stage, microbatch));
            };
            stages.clone().for_each(|stage| push(Pass::F, stage));
            stages.rev().for_each(|stage| {
                push(Pass::B, stage);
                push(Pass::W, stage);
            });
        }
        self.with_lists(actions)
    }
}

/// Whether one microbatch at a time fits everywhere.
fn check_limit(
    schedule: &'static str,
    placement: &Placement,
    memory: &StageMemory,
    limit: &[f64],
) -> Result<(), ScheduleError> {
    for (device, (limit, least)) in limit.iter().zip(least_peaks(placement, memory)).enumerate() {
        if limit.is_nan() || *limit < least * (1.0 - 1e-9) {
            return Err(ScheduleError::LimitTooLow { schedule, device, limit: *limit, least });
        }
    }
    Ok(())
}
