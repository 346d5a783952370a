//! Schedules that are computed for real times and memory limits, where the named ones are fixed patterns.
//!
//! - [`zero_bubble`]: the heuristic of ZB-1P and ZB-2P, one stage per device.

mod zero_bubble;

pub(crate) use zero_bubble::zero_bubble;

use crate::bounds::least_peaks;
use crate::order::Placement;
use crate::replay::StageMemory;
use crate::schedules::ScheduleError;

/// Whether one microbatch at a time fits everywhere.
pub(crate) fn check_limit(
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
