//! Exact event replay of a compute order: one pass at a time per device, in the stated order, each as early as its
//! inputs allow, with a fixed time per transfer between devices. Linear in the number of actions and free of
//! allocation when a [`Replayer`] is reused, so searches can call it in their inner loop.
//!
//! Times are `f64` in any unit. Sums of whole numbers stay exact (below 2^53), so unit-time counts are exact too.

mod memory;
mod validate;

pub use memory::{Peaks, StageMemory, memory_curve, peaks};
pub use validate::{OrderError, Waiting};

use crate::order::{Action, ComputeOrder, Placement};
use paceline_sim::program::Pass;

/// How long the passes of every stage take, in any one unit of time.
#[derive(Debug, Clone, PartialEq)]
pub struct StageTimes {
    /// Forward, by stage. A recomputation (`R`) takes as long.
    pub f: Vec<f64>,
    /// Backward for the input, by stage.
    pub b: Vec<f64>,
    /// Backward for the weights, by stage. A fused backward takes `b + w`.
    pub w: Vec<f64>,
    /// One transfer from a stage to a neighbour on another device; it delays the receiver and occupies nobody.
    pub comm: f64,
}

impl StageTimes {
    /// The same times on each of `stages` stages.
    pub fn uniform(stages: usize, f: f64, b: f64, w: f64, comm: f64) -> StageTimes {
        StageTimes { f: vec![f; stages], b: vec![b; stages], w: vec![w; stages], comm }
    }

    /// Every pass one unit, transfers free: the papers' drawing convention.
    pub fn unit(stages: usize) -> StageTimes {
        StageTimes::uniform(stages, 1.0, 1.0, 1.0, 0.0)
    }

    /// Number of stages covered.
    pub fn stages(&self) -> usize {
        self.f.len()
    }

    /// Time of a pass on a stage.
    ///
    /// # Panics
    /// When the stage is not covered.
    #[inline]
    pub fn of(&self, pass: Pass, stage: usize) -> f64 {
        match pass {
            Pass::F | Pass::R => self.f[stage],
            Pass::B => self.b[stage],
            Pass::W => self.w[stage],
            Pass::BW => self.b[stage] + self.w[stage],
        }
    }

    /// Whether the times cover `stages` stages and are finite and not negative.
    fn check(&self, stages: usize) -> Result<(), OrderError> {
        for (what, list) in [("F", &self.f), ("B", &self.b), ("W", &self.w)] {
            if list.len() != stages {
                return Err(OrderError::TimesLength { what, have: list.len(), stages });
            }
            if let Some(&value) = list.iter().find(|t| !t.is_finite() || **t < 0.0) {
                return Err(OrderError::BadTime { what, value });
            }
        }
        if !self.comm.is_finite() || self.comm < 0.0 {
            return Err(OrderError::BadTime { what: "transfer", value: self.comm });
        }
        Ok(())
    }
}

/// What a replay comes to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Totals {
    /// From time zero to the end of the last action.
    pub makespan: f64,
    /// The longest time from the start of a device's first action to the end of its last one.
    pub longest_span: f64,
    /// Work of all devices together (recomputation included).
    pub work: f64,
    /// Number of devices.
    pub devices: u32,
}

impl Totals {
    /// Idle share of the longest device span: `1 - mean work / longest span`. With equal stages this is the rate of the
    /// zero-bubble and the controllable-memory papers, where a parallelogram counts as free of bubbles.
    pub fn bubble_span(&self) -> f64 {
        rate(self.work / f64::from(self.devices), self.longest_span)
    }

    /// Idle share of the iteration: `1 - mean work / makespan`.
    pub fn bubble_makespan(&self) -> f64 {
        rate(self.work / f64::from(self.devices), self.makespan)
    }
}

fn rate(work: f64, cost: f64) -> f64 {
    if cost > 0.0 { 1.0 - work / cost } else { 0.0 }
}

/// Start and end of every action, and the totals.
#[derive(Debug, Clone, PartialEq)]
pub struct Timing {
    /// Start of every action, by device and place in its list.
    pub start: Vec<Vec<f64>>,
    /// End of every action, by device and place in its list.
    pub end: Vec<Vec<f64>>,
    /// Makespan, spans and work.
    pub totals: Totals,
}

impl Timing {
    /// See [`Totals::makespan`].
    pub fn makespan(&self) -> f64 {
        self.totals.makespan
    }

    /// See [`Totals::bubble_span`].
    pub fn bubble_span(&self) -> f64 {
        self.totals.bubble_span()
    }

    /// See [`Totals::bubble_makespan`].
    pub fn bubble_makespan(&self) -> f64 {
        self.totals.bubble_makespan()
    }
}

/// Replays an order once. Loops should keep a [`Replayer`].
///
/// # Errors
/// When the order names stages or microbatches that do not exist, when an action waits for ever, or when the times do
/// not fit the stages. [`ComputeOrder::validate`] checks more (missing, doubled and misplaced actions).
pub fn replay(order: &ComputeOrder, times: &StageTimes) -> Result<Timing, OrderError> {
    let mut replayer = Replayer::default();
    let totals = replayer.run(order, times)?;
    let mut start = Vec::with_capacity(order.actions.len());
    let mut end = Vec::with_capacity(order.actions.len());
    for (device, list) in order.actions.iter().enumerate() {
        let starts = replayer.starts(device);
        start.push(starts.to_vec());
        end.push(list.iter().zip(starts).map(|(a, t)| t + times.of(a.pass, a.stage.index())).collect());
    }
    Ok(Timing { start, end, totals })
}

/// Not yet run. End times are never negative.
const PENDING: f64 = -1.0;
/// A device that waits for nothing.
const NOTHING: usize = usize::MAX;

/// Replays orders with buffers that are kept from one run to the next.
#[derive(Debug, Clone, Default)]
pub struct Replayer {
    /// End of F, then end of B or BW, by stage and microbatch; [`PENDING`] before.
    ended: Vec<f64>,
    /// Start of every action, all devices in a row.
    starts: Vec<f64>,
    /// Where a device's actions begin in `starts`; one more entry than devices.
    first: Vec<usize>,
    /// The next action of a device, as an index into its list.
    next: Vec<usize>,
    /// When a device becomes free.
    free: Vec<f64>,
    /// The entry of `ended` that a device waits for.
    waits: Vec<usize>,
    /// Devices that may be able to go on.
    ready: Vec<usize>,
}

impl Replayer {
    /// Replays `order`; the start times can be read afterwards with [`Replayer::starts`].
    ///
    /// # Errors
    /// As [`replay`].
    pub fn run(&mut self, order: &ComputeOrder, times: &StageTimes) -> Result<Totals, OrderError> {
        self.run_lists(&order.placement, order.microbatches, &order.actions, times)
    }

    /// [`Replayer::run`] for a search that holds the lists outside a [`ComputeOrder`].
    ///
    /// # Errors
    /// As [`replay`].
    pub fn run_lists(
        &mut self,
        placement: &Placement,
        microbatches: u32,
        actions: &[Vec<Action>],
        times: &StageTimes,
    ) -> Result<Totals, OrderError> {
        let stages = placement.device_of_stage.len();
        let m = microbatches as usize;
        placement.check(actions.len())?;
        times.check(stages)?;
        let backward = stages * m;
        let per_copy = stages / placement.copies as usize;
        let device_of = &placement.device_of_stage;
        self.prepare(actions, 2 * backward);

        let (mut work, mut makespan) = (0.0, 0.0f64);
        while let Some(device) = self.ready.pop() {
            let list = &actions[device];
            let mut clock = self.free[device];
            let mut next = self.next[device];
            while let Some(action) = list.get(next) {
                let stage = action.stage.index();
                let microbatch = action.microbatch.index();
                if stage >= stages || microbatch >= m {
                    return Err(OrderError::Unknown { action: *action, device, stages, microbatches });
                }
                let own = stage * m + microbatch;
                // What must have ended: an input from a neighbour stage, and a pass of the same stage.
                let (remote, from, local) = match action.pass {
                    Pass::F if stage.is_multiple_of(per_copy) => (NOTHING, stage, NOTHING),
                    Pass::F => (own - m, stage - 1, NOTHING),
                    Pass::R => (NOTHING, stage, own),
                    Pass::B | Pass::BW if (stage + 1).is_multiple_of(per_copy) => (NOTHING, stage, own),
                    Pass::B | Pass::BW => (backward + own + m, stage + 1, own),
                    Pass::W => (NOTHING, stage, backward + own),
                };
                let mut start = clock;
                if local != NOTHING {
                    if self.ended[local] == PENDING {
                        self.waits[device] = local;
                        break;
                    }
                    start = start.max(self.ended[local]);
                }
                if remote != NOTHING {
                    if self.ended[remote] == PENDING {
                        self.waits[device] = remote;
                        break;
                    }
                    let transfer = if device_of[from] as usize == device { 0.0 } else { times.comm };
                    start = start.max(self.ended[remote] + transfer);
                }
                let duration = times.of(action.pass, stage);
                clock = start + duration;
                work += duration;
                self.starts[self.first[device] + next] = start;
                next += 1;
                let (produced, consumer) = match action.pass {
                    Pass::F => (own, (!(stage + 1).is_multiple_of(per_copy)).then(|| stage + 1)),
                    Pass::B | Pass::BW => {
                        (backward + own, (!stage.is_multiple_of(per_copy)).then(|| stage.wrapping_sub(1)))
                    }
                    Pass::W | Pass::R => continue,
                };
                self.ended[produced] = clock;
                if let Some(stage) = consumer {
                    let peer = device_of[stage] as usize;
                    if self.waits[peer] == produced {
                        self.waits[peer] = NOTHING;
                        self.ready.push(peer);
                    }
                }
            }
            self.free[device] = clock;
            self.next[device] = next;
            makespan = makespan.max(clock);
        }

        let mut longest_span = 0.0f64;
        for (device, list) in actions.iter().enumerate() {
            if self.next[device] < list.len() {
                return Err(validate::stuck(placement, actions, &self.next, |action| {
                    self.ended[validate::produced(action, m, backward)] != PENDING
                }));
            }
            if !list.is_empty() {
                longest_span = longest_span.max(self.free[device] - self.starts[self.first[device]]);
            }
        }
        Ok(Totals { makespan, longest_span, work, devices: actions.len() as u32 })
    }

    /// Start times of a device's actions in the last run.
    ///
    /// # Panics
    /// When the device was not part of the last run.
    pub fn starts(&self, device: usize) -> &[f64] {
        &self.starts[self.first[device]..self.first[device + 1]]
    }

    fn prepare(&mut self, actions: &[Vec<Action>], ends: usize) {
        let devices = actions.len();
        self.first.clear();
        self.first.push(0);
        for list in actions {
            self.first.push(self.first.last().copied().unwrap_or(0) + list.len());
        }
        reset(&mut self.ended, ends, PENDING);
        reset(&mut self.starts, self.first[devices], 0.0);
        reset(&mut self.next, devices, 0);
        reset(&mut self.free, devices, 0.0);
        reset(&mut self.waits, devices, NOTHING);
        self.ready.clear();
        self.ready.extend((0..devices).rev());
    }
}

fn reset<T: Clone>(list: &mut Vec<T>, len: usize, value: T) {
    list.clear();
    list.resize(len, value);
}

#[cfg(test)]
mod tests;
