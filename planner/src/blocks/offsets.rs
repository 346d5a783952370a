//! A building block: when every pass of one microbatch starts, in slots of one unit, and what follows from that.

use crate::order::{Action, ComputeOrder, Placement};
use crate::replay::{OrderError, Replayer, StageTimes};
use crate::schedules::action;
use paceline_sim::program::Pass;
use thiserror::Error;

/// Slots in which the passes of one microbatch start on one stage. F, B and W take one slot, a fused BW two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offsets {
    /// Forward.
    pub f: u32,
    /// Backward for the input, or the fused backward.
    pub b: u32,
    /// Backward for the weights; `None` when it is fused into `b`.
    pub w: Option<u32>,
}

impl Offsets {
    /// The passes with their first slot and their length.
    pub fn passes(&self) -> impl Iterator<Item = (Pass, u32, u32)> + use<> {
        let backward = if self.w.is_some() { (Pass::B, self.b, 1) } else { (Pass::BW, self.b, 2) };
        [Some((Pass::F, self.f, 1)), Some(backward), self.w.map(|w| (Pass::W, w, 1))].into_iter().flatten()
    }

    /// From the start of F to the end of the pass that frees the activation.
    pub fn lifespan(&self) -> u32 {
        self.w.map_or(self.b + 2, |w| w + 1) - self.f
    }
}

/// One microbatch's passes on every stage, and the distance at which the next microbatch follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// Where the stages are.
    pub placement: Placement,
    /// By stage.
    pub offsets: Vec<Offsets>,
    /// Slots between two consecutive microbatches; efficient when it equals a device's work on one microbatch.
    pub interval: u32,
}

/// Two passes that would need a device at the same time once the block is repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Collision {
    /// The pipeline rank.
    pub device: u32,
    /// The slot, modulo the interval.
    pub slot: u32,
    /// The pass (and its stage) that has it.
    pub first: (Pass, u32),
    /// The pass (and its stage) that wants it too.
    pub second: (Pass, u32),
}

/// Why a block is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum BlockError {
    /// The interval is zero or the offsets do not cover the stages.
    #[error(
        "a block needs an interval above 0 and offsets for each of its {stages} stages; it has {interval} and {have}"
    )]
    Shape { stages: usize, have: usize, interval: u32 },
    /// A pass starts before the pass that it needs has ended.
    #[error("{pass} of stage {stage} starts in slot {slot}, but its input is there from slot {ready} only")]
    TooEarly { pass: Pass, stage: u32, slot: u32, ready: u32 },
}

impl Block {
    /// Whether every pass starts after what it needs. Collisions are asked for with [`Block::collision`].
    ///
    /// # Errors
    /// The first pass that starts too early.
    pub fn check(&self) -> Result<(), BlockError> {
        let stages = self.placement.stages();
        if self.interval == 0 || stages == 0 || self.offsets.len() != stages {
            return Err(BlockError::Shape { stages, have: self.offsets.len(), interval: self.interval });
        }
        let last = stages - 1;
        let length = |offsets: &Offsets| if offsets.w.is_some() { 1 } else { 2 };
        for (stage, own) in self.offsets.iter().enumerate() {
            let forward = if stage == 0 { 0 } else { self.offsets[stage - 1].f + 1 };
            let next = self.offsets.get(stage + 1);
            let backward = next.map_or(own.f + 1, |next| (next.b + length(next)).max(own.f + 1));
            let needs = [
                (Pass::F, own.f, forward),
                (Pass::B, own.b, backward),
                (Pass::W, own.w.unwrap_or(own.b + 1), own.b + 1),
            ];
            for (pass, slot, ready) in needs {
                if slot < ready {
                    return Err(BlockError::TooEarly { pass, stage: stage.min(last) as u32, slot, ready });
                }
            }
        }
        Ok(())
    }

    /// Slots from the start of F to the end of the pass that frees the activation of `stage`.
    pub fn lifespan(&self, stage: usize) -> u32 {
        self.offsets[stage].lifespan()
    }

    /// The most stage activations that a device ever holds when the block is repeated, by device: the sum over its
    /// stages of `ceil(lifespan / interval)`.
    pub fn predicted_peak(&self) -> Vec<u32> {
        let devices = self.placement.device_of_stage.iter().max().map_or(0, |d| d + 1);
        let mut peak = vec![0; devices as usize];
        for (stage, device) in self.placement.device_of_stage.iter().enumerate() {
            peak[*device as usize] += self.lifespan(stage).div_ceil(self.interval);
        }
        peak
    }

    /// The first two passes that fall on the same slot of a device modulo the interval; `None` when the block can be
    /// repeated.
    pub fn collision(&self) -> Option<Collision> {
        let devices = self.predicted_peak().len();
        let mut taken: Vec<Option<(Pass, u32)>> = vec![None; devices * self.interval as usize];
        for (stage, (offsets, device)) in self.offsets.iter().zip(&self.placement.device_of_stage).enumerate() {
            for (pass, start, length) in offsets.passes() {
                for slot in start..start + length {
                    let slot = slot % self.interval;
                    let entry = &mut taken[(device * self.interval + slot) as usize];
                    let second = (pass, stage as u32);
                    if let Some(first) = *entry {
                        return Some(Collision { device: *device, slot, first, second });
                    }
                    *entry = Some(second);
                }
            }
        }
        None
    }

    /// The block of `microbatches` microbatches, each `interval` slots after the one before.
    pub fn repeat(&self, microbatches: u32) -> Slotted {
        let devices = self.predicted_peak().len();
        let mut lists: Vec<Vec<(u64, Action)>> = vec![Vec::new(); devices];
        for (stage, (offsets, device)) in self.offsets.iter().zip(&self.placement.device_of_stage).enumerate() {
            for microbatch in 0..microbatches {
                let shift = u64::from(microbatch) * u64::from(self.interval);
                lists[*device as usize].extend(
                    offsets
                        .passes()
                        .map(|(pass, slot, _)| (shift + u64::from(slot), action(pass, stage as u32, microbatch))),
                );
            }
        }
        let (start, actions) = lists
            .into_iter()
            .map(|mut list| {
                list.sort_unstable();
                list.into_iter().unzip()
            })
            .unzip();
        Slotted {
            order: ComputeOrder { name: String::new(), microbatches, placement: self.placement.clone(), actions },
            start,
        }
    }
}

/// An order together with the slot in which each action starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slotted {
    /// The order.
    pub order: ComputeOrder,
    /// Start slots, by device and place in its list.
    pub start: Vec<Vec<u64>>,
}

impl Slotted {
    /// The slot in which everything has ended.
    pub fn makespan(&self) -> u64 {
        let ends = self
            .order
            .actions
            .iter()
            .zip(&self.start)
            .filter_map(|(list, start)| Some(start.last()? + if list.last()?.pass == Pass::BW { 2 } else { 1 }));
        ends.max().unwrap_or(0)
    }

    /// Keeps the order of every device and starts each action as early as its inputs allow. An order that cannot run
    /// (a repeated block with a collision can be one) stays as it is.
    pub fn squeeze(mut self) -> Slotted {
        let mut replayer = Replayer::default();
        if replayer.run(&self.order, &StageTimes::unit(self.order.placement.stages())).is_ok() {
            for (device, start) in self.start.iter_mut().enumerate() {
                start.clear();
                start.extend(replayer.starts(device).iter().map(|t| *t as u64));
            }
        }
        self
    }

    /// [`Slotted::squeeze`] for callers that want to know.
    ///
    /// # Errors
    /// When the order cannot run.
    pub fn try_squeeze(self) -> Result<Slotted, OrderError> {
        Replayer::default().run(&self.order, &StageTimes::unit(self.order.placement.stages()))?;
        Ok(self.squeeze())
    }
}

/// Splits W off every backward of `block` and puts it into the first slot of its device, modulo the interval, that is
/// free after its B; stages with the earlier B choose first.
pub fn fill_weights(mut block: Block) -> Block {
    let devices = block.predicted_peak().len();
    let interval = block.interval;
    let mut taken = vec![false; devices * interval as usize];
    let at = |device: u32, slot: u32| (device * interval + slot % interval) as usize;
    for (offsets, device) in block.offsets.iter().zip(&block.placement.device_of_stage) {
        taken[at(*device, offsets.f)] = true;
        taken[at(*device, offsets.b)] = true;
    }
    let mut stages: Vec<usize> = (0..block.offsets.len()).collect();
    stages.sort_by_key(|stage| block.offsets[*stage].b);
    for stage in stages {
        let device = block.placement.device_of_stage[stage];
        let after = block.offsets[stage].b + 1;
        // Without a free slot the W stays next to its B, where `collision` will find it.
        let slot = (after..after + interval).find(|slot| !taken[at(device, *slot)]).unwrap_or(after);
        taken[at(device, slot)] = true;
        block.offsets[stage].w = Some(slot);
    }
    block
}
