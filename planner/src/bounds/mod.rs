//! Lower bounds on the makespan of any compute order with a given placement, number of microbatches, times and memory
//! limits. Every figure here is proven in the comment beside it, so that a schedule's distance from it is a proven gap.
//!
//! - [`lower_bound`]: the highest of the quick bounds, and which one it is.
//! - [`steady`]: the least interval between microbatches by a walk over all states of a small pipeline; [`strongest`] takes it in where it pays.
//! - [`least_peaks`]: the least memory with which each device can work at all.
//!
//! The bounds hold for split and fused backwards alike: splitting a fused backward in place only lets stages before it start
//! earlier. Recomputation adds work and holds less memory, so for an order that recomputes only the bound without
//! limits holds.

mod chains;
mod knapsack;
mod steady;

pub use steady::{MOST_STATES, Steady, steady};

use crate::generators::Problem;
use crate::order::{ComputeOrder, Placement};
use crate::replay::{StageMemory, StageTimes, peaks};
use crate::schedules::action;
use chains::Chains;
use knapsack::{Item, most_work};
use paceline_sim::program::Pass;
use std::fmt;

/// What keeps the makespan from being shorter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// One microbatch through all stages and back.
    CriticalPath,
    /// The work of the busiest device and the idle time that it cannot avoid at its start and its end. With a limit this
    /// includes the memory-limited warm-up and cool-down.
    Device(usize),
    /// Activations live at least as long as their microbatch travels, and the device has room for few at a time.
    Memory(usize),
    /// In no state of the pipeline can the devices, with their memory, go on so that microbatches follow each other faster.
    EveryState,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::CriticalPath => write!(f, "one microbatch's way"),
            Reason::Device(d) => write!(f, "work and ramps of device {d}"),
            Reason::Memory(d) => write!(f, "activation lifetimes on device {d}"),
            Reason::EveryState => write!(f, "every state of the pipeline at this memory"),
        }
    }
}

/// A proven lower bound.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LowerBound {
    /// No order is shorter, in the unit of the times.
    pub makespan: f64,
    /// Why.
    pub reason: Reason,
}

impl LowerBound {
    /// How far `makespan` lies above the bound, as a share of the bound.
    pub fn gap(&self, makespan: f64) -> f64 {
        if self.makespan > 0.0 { (makespan / self.makespan - 1.0).max(0.0) } else { 0.0 }
    }

    fn raise(&mut self, makespan: f64, reason: Reason) {
        if makespan > self.makespan {
            *self = LowerBound { makespan, reason };
        }
    }
}

/// A bound on the makespan of every order of `microbatches` microbatches on `placement` that holds at most `limits` (by
/// device, in the unit of `memory`; none when absent).
///
/// Three families, the highest wins:
/// 1. *Critical path*: a microbatch's F, B and last W follow each other.
/// 2. *Device*: let a device do no more than `front` work in the first `t` and no more than `back` in the last `u` of the makespan
///    `C`. If `C >= t + u`, its whole work is at most `front + back + (C - t - u)`, so `C >= work + (t - front) + (u - back)`. If `C < t + u`,
///    its whole work is at most `front + back`; so work above that proves the first case.
/// 3. *Memory*: activations of `m` microbatches live for at least the time of their way to the last stage and back, and
///    the device has room for `limit`: the sum of size times life is at most `limit` times the time from its first F on.
///
/// # Panics
/// When `times`, `memory` or `limits` cover fewer stages or devices than the placement has.
pub fn lower_bound(
    placement: &Placement,
    microbatches: u32,
    times: &StageTimes,
    memory: &StageMemory,
    limits: Option<&[f64]>,
) -> LowerBound {
    let chains = Chains::new(placement, times);
    let m = f64::from(microbatches);
    let mut bound = LowerBound { makespan: 0.0, reason: Reason::CriticalPath };
    if microbatches == 0 {
        return bound;
    }
    bound.raise(chains.shortest_way(), Reason::CriticalPath);
    let per_copy = placement.stages_per_copy();
    let devices = placement.devices();
    let case = Case { placement, times, memory, chains: &chains, microbatches };
    let local: Vec<Vec<usize>> =
        (0..devices as u32).map(|device| placement.stages_of(device).map(|s| s.index()).collect()).collect();
    // Which copy of the model a microbatch takes is the schedule's choice: the work of a device is what the copies that
    // it would like best leave it, taken together over all devices.
    let share = |device: usize, copy: usize| -> f64 {
        local[device].iter().filter(|s| **s / per_copy == copy).map(|&s| times.f[s] + times.b[s] + times.w[s]).sum()
    };
    let mut ends = Vec::with_capacity(devices);
    for (device, stages) in local.iter().enumerate().filter(|(_, stages)| !stages.is_empty()) {
        let room = limits.map(|limits| limits[device]);
        ends.push((device, case.front_idle(stages, room), case.back_idle(stages, room)));
    }
    let mut best_split = LowerBound { makespan: f64::INFINITY, reason: Reason::CriticalPath };
    let splits: Vec<u32> = if placement.copies == 2 { (0..=microbatches).collect() } else { vec![microbatches] };
    for first in splits {
        let mut split = bound;
        let counts = [f64::from(first), m - f64::from(first)];
        let work = |device: usize| -> f64 {
            (0..placement.copies as usize).map(|copy| counts.get(copy).unwrap_or(&0.0) * share(device, copy)).sum()
        };
        for (device, fronts, backs) in &ends {
            let work = work(*device);
            for front in fronts {
                for back in backs {
                    // Windows that overlap would leave no room for all the work, or lie within a proven makespan.
                    let windows = front.window + back.window;
                    let together = work + front.idle + back.idle;
                    if windows <= split.makespan || together > windows * (1.0 + 1e-9) {
                        split.raise(together, Reason::Device(*device));
                    }
                }
            }
            for ramp in fronts.iter().chain(backs) {
                // No makespan is shorter than one microbatch's way.
                let least = work + ramp.idle;
                let least = if ramp.window <= bound.makespan { least } else { least.min(ramp.window) };
                split.raise(least, Reason::Device(*device));
            }
        }
        if split.makespan < best_split.makespan {
            best_split = split;
        }
    }
    bound = best_split;
    if let (Some(limits), 1) = (limits, placement.copies) {
        for (device, stages) in local.iter().enumerate().filter(|(_, stages)| !stages.is_empty()) {
            bound.raise(case.lifetimes(stages, limits[device]), Reason::Memory(device));
        }
    }
    bound
}

/// A gap that is small enough not to look for a stronger bound.
const CLOSE_ENOUGH: f64 = 0.005;

/// [`lower_bound`] of a problem, and where an order of `makespan` is far from it and the pipeline is small, [`steady`].
///
/// # Panics
/// As [`lower_bound`].
pub fn strongest(problem: &Problem, makespan: f64) -> LowerBound {
    let Problem { placement, microbatches, times, memory, limit } = problem;
    let limits = limit.iter().any(|limit| limit.is_finite()).then_some(limit.as_slice());
    let mut bound = lower_bound(placement, *microbatches, times, memory, limits);
    if bound.gap(makespan) > CLOSE_ENOUGH
        && *microbatches > 0
        && let Some(steady) = steady(problem, makespan / f64::from(*microbatches))
    {
        bound.raise(steady.makespan(*microbatches), Reason::EveryState);
    }
    bound
}

/// A window at the start or the end of the makespan, and how much of it a device idles at least.
#[derive(Debug, Clone, Copy)]
struct Ramp {
    window: f64,
    idle: f64,
}

struct Case<'a> {
    placement: &'a Placement,
    times: &'a StageTimes,
    memory: &'a StageMemory,
    chains: &'a Chains,
    microbatches: u32,
}

impl Case<'_> {
    fn same_copy_after(&self, stage: usize, other: usize) -> bool {
        let per_copy = self.placement.stages_per_copy();
        other > stage && other / per_copy == stage / per_copy
    }

    fn whole(&self, stage: usize) -> f64 {
        self.times.f[stage] + self.times.b[stage] + self.times.w[stage]
    }

    /// Idle time at the start. No F of a device can start before the first microbatch arrives: that window is idle.
    ///
    /// For each stage `s` of the device take the window up to the earliest possible B of `s`. Before it no B or W of `s` runs, so every
    /// F of `s` that has started still holds its activation, and the same is true of stages before `s`, whose B comes later. A later
    /// stage of the same microbatch may have done everything, but only for microbatches whose F of `s` has run. So the work
    /// in the window is at most what fits in memory, counting for each held activation of `s` its F and all passes of the later
    /// stages, and for the others (of another copy, all their passes) nothing held.
    fn front_idle(&self, stages: &[usize], room: Option<f64>) -> Vec<Ramp> {
        let first = stages.iter().map(|&s| self.chains.head_f[s]).fold(f64::INFINITY, f64::min);
        let mut ramps = vec![Ramp { window: first, idle: first }];
        for &gate in stages {
            let window = self.chains.head_b[gate];
            let mut free = 0.0;
            let mut items = Vec::with_capacity(stages.len());
            for &s in stages {
                if self.same_copy_after(gate, s) {
                    continue;
                }
                if self.chains.head_b[s] >= window {
                    let later: f64 = if s == gate {
                        stages.iter().filter(|o| self.same_copy_after(gate, **o)).map(|&o| self.whole(o)).sum()
                    } else {
                        0.0
                    };
                    items.push(Item {
                        size: self.memory.until_b[s],
                        work: self.times.f[s] + later,
                        most: self.microbatches,
                    });
                } else {
                    free += f64::from(self.microbatches) * self.whole(s);
                }
            }
            let done = (free + most_work(&items, room)).min(window - first);
            ramps.push(Ramp { window, idle: (window - done).max(0.0) });
        }
        ramps
    }

    /// Idle time at the end, the mirror of [`Case::front_idle`]: for each stage `s` the window in which no F of `s` can run any more, because
    /// the way to the last stage and back has to follow. All work left then belongs to activations that are held when the
    /// window begins: before their B, or between B and W. A held activation of `s` may have all passes of the later stages before it.
    /// A second window, in which no B of the device can run any more, is left to the W of held activations.
    fn back_idle(&self, stages: &[usize], room: Option<f64>) -> Vec<Ramp> {
        let mut ramps = vec![Ramp { window: 0.0, idle: 0.0 }];
        let waiting = |s: usize| Item { size: self.memory.until_w[s], work: self.times.w[s], most: self.microbatches };
        for &gate in stages {
            let window = self.chains.tail_f[gate];
            let mut free = 0.0;
            let mut items = Vec::with_capacity(2 * stages.len());
            for &s in stages {
                if self.same_copy_after(gate, s) {
                    items.push(waiting(s));
                } else if self.chains.tail_f[s] >= window {
                    let later: f64 = if s == gate {
                        stages.iter().filter(|o| self.same_copy_after(gate, **o)).map(|&o| self.whole(o)).sum()
                    } else {
                        0.0
                    };
                    let work = self.times.b[s] + self.times.w[s] + later;
                    items.push(Item { size: self.memory.until_b[s], work, most: self.microbatches });
                    items.push(waiting(s));
                } else {
                    free += f64::from(self.microbatches) * self.whole(s);
                }
            }
            ramps.push(Ramp { window, idle: (window - free - most_work(&items, room)).max(0.0) });
        }
        let window = stages.iter().map(|&s| self.chains.tail_b[s]).fold(f64::INFINITY, f64::min);
        let items: Vec<Item> = stages.iter().map(|&s| waiting(s)).collect();
        ramps.push(Ramp { window, idle: (window - most_work(&items, room)).max(0.0) });
        ramps
    }

    /// From the first F on, the device holds at most `limit`. The activation of a microbatch on stage `s` is held whole from the start of
    /// its F to the end of its B, at least the way to the last stage and back, and its second part until W has run. Where
    /// all parts have one size, only a whole number of them fits.
    fn lifetimes(&self, stages: &[usize], limit: f64) -> f64 {
        let sizes = stages.iter().flat_map(|&s| [self.memory.until_b[s], self.memory.until_w[s]]);
        let (low, high) = sizes.fold((f64::INFINITY, 0.0f64), |(low, high), size| (low.min(size), high.max(size)));
        if high <= 0.0 {
            return 0.0;
        }
        let room = if high - low <= high * 1e-9 { (limit / high * (1.0 + 1e-9)).floor() * high } else { limit };
        let area: f64 = stages
            .iter()
            .map(|&s| {
                let way = self.chains.head_b[s] + self.times.b[s] - self.chains.head_f[s];
                self.memory.until_b[s] * way + self.memory.until_w[s] * self.times.w[s]
            })
            .sum();
        let first = stages.iter().map(|&s| self.chains.head_f[s]).fold(f64::INFINITY, f64::min);
        if room > 0.0 { first + f64::from(self.microbatches) * area / room } else { 0.0 }
    }
}

/// The least memory with which each device can work at all: one microbatch at a time, each W right after its B. Any other
/// order holds at least this when the last of its first microbatch's forwards on the device has run.
pub fn least_peaks(placement: &Placement, memory: &StageMemory) -> Vec<f64> {
    let per_copy = placement.stages_per_copy() as u32;
    let mut least = vec![0.0f64; placement.devices()];
    for copy in 0..placement.copies {
        let stages = copy * per_copy..(copy + 1) * per_copy;
        let mut actions = vec![Vec::new(); placement.devices()];
        for stage in stages.clone() {
            actions[placement.device_of_stage[stage as usize] as usize].push(action(Pass::F, stage, 0));
        }
        for stage in stages.rev() {
            let list = &mut actions[placement.device_of_stage[stage as usize] as usize];
            list.extend([action(Pass::B, stage, 0), action(Pass::W, stage, 0)]);
        }
        let order = ComputeOrder { name: String::new(), microbatches: 1, placement: placement.clone(), actions };
        for (least, own) in least.iter_mut().zip(peaks(&order, memory).peak) {
            *least = least.max(own);
        }
    }
    least
}

#[cfg(test)]
mod tests;
