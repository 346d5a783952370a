//! The table of schedules: name, placement, chunks, and the function that states the order.

use super::{
    MOST_ACTIONS, Request, ScheduleError, bidirectional, classic, dual, interleaved, looped, v_shape, vee, wave,
};
use crate::bounds::least_peaks;
use crate::generators::{self, Problem};
use crate::optimise::{Effort, optimise};
use crate::order::{ComputeOrder, Placement};

/// How many stages a device may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chunks {
    /// This number only.
    Exactly(u32),
    /// Any number from `least` on; `usual` when nothing is asked.
    From { least: u32, usual: u32 },
}

/// The family of a placement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlacementKind {
    /// [`looped`].
    Loop,
    /// [`v_shape`].
    V,
    /// [`bidirectional`].
    Bidirectional,
    /// [`looped`] for one stage per device, [`wave`] (of two: [`v_shape`]) for more.
    Wave,
}

/// One entry of the registry.
#[derive(Debug, Clone, Copy)]
pub struct Schedule {
    /// The name on the command line.
    pub name: &'static str,
    /// One line for people.
    pub summary: &'static str,
    /// Where its stages lie.
    pub placement: PlacementKind,
    /// Stages per device.
    pub chunks: Chunks,
    /// Whether the backward is split into B and W (for some microbatches at least).
    pub split: bool,
    /// Whether the order depends on the counts alone, not on times and limits.
    pub fixed: bool,
    /// States the order. `request` has passed the checks of [`Schedule::check`]; `chunks` is resolved.
    pub build: fn(&Request, u32) -> Result<ComputeOrder, ScheduleError>,
}

impl Schedule {
    /// Stages per device for a request.
    ///
    /// # Errors
    /// When the schedule does not have that number of chunks.
    pub fn chunks_for(&self, asked: Option<u32>) -> Result<u32, ScheduleError> {
        let error = |chunks, allowed: String| ScheduleError::Chunks { schedule: self.name, chunks, allowed };
        match (self.chunks, asked) {
            (Chunks::Exactly(own), None) => Ok(own),
            (Chunks::Exactly(own), Some(v)) if v == own => Ok(own),
            (Chunks::Exactly(own), Some(v)) => Err(error(v, format!("exactly {own}"))),
            (Chunks::From { usual, .. }, None) => Ok(usual),
            (Chunks::From { least, .. }, Some(v)) if v >= least => Ok(v),
            (Chunks::From { least, .. }, Some(v)) => Err(error(v, format!("at least {least}"))),
        }
    }

    /// Where the stages of `devices` devices lie, so that times per stage can be given before the order exists.
    ///
    /// # Errors
    /// As [`Schedule::check`], the microbatches left out.
    pub fn placement(&self, devices: u32, chunks: Option<u32>) -> Result<Placement, ScheduleError> {
        let chunks = self.check(&Request { chunks, ..Request::new(devices, 1) })?;
        Ok(match self.placement {
            PlacementKind::Loop => looped(devices, chunks),
            PlacementKind::V => v_shape(devices),
            PlacementKind::Bidirectional => bidirectional(devices),
            PlacementKind::Wave if chunks == 1 => looped(devices, 1),
            PlacementKind::Wave => wave(devices, chunks),
        })
    }

    /// What holds for every schedule: counts above zero, chunks that it has, an even number of devices for two opposite
    /// pipelines, lists of the right length, and a size that fits in memory. Returns the number of chunks.
    ///
    /// # Errors
    /// The first violation.
    pub fn check(&self, request: &Request) -> Result<u32, ScheduleError> {
        let schedule = self.name;
        for (what, value) in
            [("the number of devices", request.devices), ("the number of microbatches", request.microbatches)]
        {
            if value == 0 {
                return Err(ScheduleError::Zero { schedule, what });
            }
        }
        let chunks = self.chunks_for(request.chunks)?;
        let stages = u64::from(request.devices).saturating_mul(u64::from(chunks));
        let actions = stages.saturating_mul(u64::from(request.microbatches)).saturating_mul(3);
        if actions > MOST_ACTIONS || stages > u64::from(u16::MAX) {
            return Err(ScheduleError::TooLarge { schedule, actions });
        }
        if self.placement == PlacementKind::Bidirectional && !request.devices.is_multiple_of(2) {
            return Err(ScheduleError::OddDevices { schedule, devices: request.devices });
        }
        let lengths = [
            ("times", request.times.as_ref().map(|t| t.stages()), stages as usize),
            ("activation sizes", request.memory.as_ref().map(|m| m.until_b.len()), stages as usize),
            ("memory limits", request.limit.as_ref().map(Vec::len), request.devices as usize),
        ];
        for (what, have, need) in lengths {
            if let Some(have) = have.filter(|have| *have != need) {
                return Err(ScheduleError::Length { schedule, what, have, need });
            }
        }
        Ok(chunks)
    }
}

/// All schedules, simple ones first.
pub const SCHEDULES: &[Schedule] = &[
    Schedule {
        name: "gpipe",
        summary: "all forwards, then all backwards; holds every microbatch",
        placement: PlacementKind::Loop,
        chunks: Chunks::Exactly(1),
        split: false,
        fixed: true,
        build: |r, _| Ok(classic::gpipe(r.devices, r.microbatches)),
    },
    Schedule {
        name: "1f1b",
        summary: "one forward, one backward; device i holds p-i microbatches",
        placement: PlacementKind::Loop,
        chunks: Chunks::Exactly(1),
        split: false,
        fixed: true,
        build: |r, _| Ok(classic::one_f_one_b(r.devices, r.microbatches)),
    },
    Schedule {
        name: "eager-1f1b",
        summary: "1F1B with twice the warm-up, so that a spare forward hides each transfer",
        placement: PlacementKind::Loop,
        chunks: Chunks::Exactly(1),
        split: false,
        fixed: true,
        build: |r, _| Ok(classic::eager_one_f_one_b(r.devices, r.microbatches)),
    },
    Schedule {
        name: "1f1b-r",
        summary: "1F1B with full recomputation: only stage inputs are held between F and R",
        placement: PlacementKind::Loop,
        chunks: Chunks::Exactly(1),
        split: false,
        fixed: true,
        build: |r, _| Ok(classic::recomputed_one_f_one_b(r.devices, r.microbatches)),
    },
    Schedule {
        name: "interleaved",
        summary: "1F1B over several chunks per device, depth first in groups of p microbatches (Megatron)",
        placement: PlacementKind::Loop,
        chunks: Chunks::From { least: 2, usual: 2 },
        split: false,
        fixed: true,
        build: interleaved::depth_first,
    },
    Schedule {
        name: "interleaved-bf",
        summary: "all microbatches through one chunk before the next (breadth first, looped BFS)",
        placement: PlacementKind::Loop,
        chunks: Chunks::From { least: 1, usual: 2 },
        split: false,
        fixed: true,
        build: |r, v| Ok(interleaved::breadth_first(r.devices, r.microbatches, v)),
    },
    Schedule {
        name: "zb-h1",
        summary: "1F1B with W split off and delayed: a third of the bubble at the memory of 1F1B",
        placement: PlacementKind::Loop,
        chunks: Chunks::Exactly(1),
        split: true,
        fixed: true,
        build: |r, _| Ok(classic::zb_h1(r.devices, r.microbatches)),
    },
    Schedule {
        name: "zb-h2",
        summary: "as zb-h1 with twice the warm-up: no bubble in unit time at twice the memory",
        placement: PlacementKind::Loop,
        chunks: Chunks::Exactly(1),
        split: true,
        fixed: true,
        build: |r, _| Ok(classic::zb_h2(r.devices, r.microbatches)),
    },
    Schedule {
        name: "zb-1p",
        summary: "zero-bubble heuristic for the times given, at the memory of 1F1B or --memory-limit",
        placement: PlacementKind::Loop,
        chunks: Chunks::Exactly(1),
        split: true,
        fixed: false,
        build: |r, _| zero_bubble("zb-1p", r, 1),
    },
    Schedule {
        name: "zb-2p",
        summary: "zero-bubble heuristic for the times given, at twice the memory of 1F1B or --memory-limit",
        placement: PlacementKind::Loop,
        chunks: Chunks::Exactly(1),
        split: true,
        fixed: false,
        build: |r, _| zero_bubble("zb-2p", r, 2),
    },
    Schedule {
        name: "zb-v",
        summary: "hand-made V schedule: no bubble in unit time at the memory of 1F1B",
        placement: PlacementKind::V,
        chunks: Chunks::Exactly(2),
        split: true,
        fixed: true,
        build: |r, _| Ok(vee::zb_v(r.devices, r.microbatches)),
    },
    Schedule {
        name: "zb-v-timed",
        summary: "ZB-V as a heuristic for the times given, at the memory of 1F1B or --memory-limit",
        placement: PlacementKind::V,
        chunks: Chunks::Exactly(2),
        split: true,
        fixed: false,
        build: |r, _| {
            let problem = problem("zb-v-timed", r, v_shape(r.devices))?;
            generators::greedy(&problem).map_err(|source| ScheduleError::Order { schedule: "zb-v-timed", source })
        },
    },
    Schedule {
        name: "1f1b-v",
        summary: "V placement with the fused backward: two thirds of the memory of 1F1B",
        placement: PlacementKind::V,
        chunks: Chunks::Exactly(2),
        split: false,
        fixed: true,
        build: |r, _| Ok(vee::one_f_one_b_v(r.devices, r.microbatches)),
    },
    Schedule {
        name: "v-min",
        summary: "V placement with the least memory, about a third of 1F1B",
        placement: PlacementKind::V,
        chunks: Chunks::Exactly(2),
        split: true,
        fixed: true,
        build: |r, _| Ok(vee::v_min(r.devices, r.microbatches)),
    },
    Schedule {
        name: "v-half",
        summary: "V placement with half the memory of 1F1B",
        placement: PlacementKind::V,
        chunks: Chunks::Exactly(2),
        split: true,
        fixed: true,
        build: |r, _| Ok(vee::v_half(r.devices, r.microbatches)),
    },
    Schedule {
        name: "v-zb",
        summary: "V placement without bubble in unit time at the memory of 1F1B, from a block",
        placement: PlacementKind::V,
        chunks: Chunks::Exactly(2),
        split: true,
        fixed: true,
        build: |r, _| Ok(vee::v_zb(r.devices, r.microbatches)),
    },
    Schedule {
        name: "adaptive-v",
        summary: "the best V block for the times given, at the memory of 1F1B or --memory-limit",
        placement: PlacementKind::V,
        chunks: Chunks::Exactly(2),
        split: true,
        fixed: false,
        build: |r, _| {
            let problem = problem("adaptive-v", r, v_shape(r.devices))?;
            generators::adaptive_v(&problem).map_err(|source| ScheduleError::Order { schedule: "adaptive-v", source })
        },
    },
    Schedule {
        name: "optimised",
        summary: "the shortest order found for the times given, with its gap, at the memory of 1F1B or --memory-limit",
        placement: PlacementKind::Wave,
        chunks: Chunks::From { least: 1, usual: 2 },
        split: true,
        fixed: false,
        build: |r, v| {
            let placement = if v == 1 { looped(r.devices, 1) } else { wave(r.devices, v) };
            let problem = problem("optimised", r, placement)?;
            optimise(&problem, Effort::default()).map(|found| found.order)
        },
    },
    Schedule {
        name: "dualpipe",
        summary: "two opposite pipelines over the same devices; parameters twice (DeepSeek-V3)",
        placement: PlacementKind::Bidirectional,
        chunks: Chunks::Exactly(2),
        split: true,
        fixed: true,
        build: |r, _| Ok(dual::dualpipe(r.devices, r.microbatches)),
    },
    Schedule {
        name: "dualpipe-v",
        summary: "half of DualPipe in V placement: one copy of the parameters",
        placement: PlacementKind::V,
        chunks: Chunks::Exactly(2),
        split: true,
        fixed: true,
        build: |r, _| Ok(dual::dualpipe_v(r.devices, r.microbatches)),
    },
];

/// The heuristic with room for `times_p * p` microbatches on every device, or less where the request limits it.
fn zero_bubble(name: &'static str, request: &Request, times_p: u32) -> Result<ComputeOrder, ScheduleError> {
    let p = request.devices;
    let (times, memory) = request.sizes(&looped(p, 1));
    let own = memory.until_b.iter().map(|size| f64::from(times_p * p) * size);
    let limit: Vec<f64> = match &request.limit {
        Some(limits) => own.zip(limits).map(|(own, limit)| own.min(*limit)).collect(),
        None => own.collect(),
    };
    generators::zero_bubble(name, request.microbatches, &times, &memory, &limit)
}

/// What a generator is asked for: the request's sizes on `placement`, and on every device room for `p` microbatches (the
/// memory of 1F1B) or less where the request limits it.
fn problem(name: &'static str, request: &Request, placement: Placement) -> Result<Problem, ScheduleError> {
    let (times, memory) = request.sizes(&placement);
    let whole = |device: u32| placement.stages_of(device).map(|stage| memory.until_b[stage.index()]).sum::<f64>();
    // Where B leaves more for W than it frees, a microbatch at a time may need more than p forwards of it.
    let least = least_peaks(&placement, &memory);
    let limit = (0..request.devices).map(|device| {
        let own = (f64::from(request.devices) * whole(device)).max(least[device as usize]);
        request.limit.as_ref().map_or(own, |limits| own.min(limits[device as usize]))
    });
    let problem = Problem { limit: limit.collect(), microbatches: request.microbatches, placement, times, memory };
    problem.check(name)?;
    Ok(problem)
}

/// The names of all schedules.
pub fn names() -> impl Iterator<Item = &'static str> {
    SCHEDULES.iter().map(|schedule| schedule.name)
}

/// The entry of a name.
///
/// # Errors
/// When there is none; the message lists the known ones.
pub fn find(name: &str) -> Result<&'static Schedule, ScheduleError> {
    SCHEDULES
        .iter()
        .find(|schedule| schedule.name == name)
        .ok_or_else(|| ScheduleError::UnknownName { name: name.to_owned() })
}

/// Builds a schedule by name. The order passes [`ComputeOrder::validate`].
///
/// # Errors
/// When the name is unknown or the schedule does not permit the request.
pub fn build(name: &str, request: &Request) -> Result<ComputeOrder, ScheduleError> {
    let schedule = find(name)?;
    let chunks = schedule.check(request)?;
    let mut order = (schedule.build)(request, chunks)?;
    order.name = schedule.name.to_owned();
    Ok(order)
}
