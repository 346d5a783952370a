//! Activation memory of a compute order: what every device holds after each action. It depends on the order alone, not
//! on the times. Both semantics of the zero-bubble papers: part freed at B and the rest at W, or all at W.

use crate::order::{Action, ComputeOrder, Placement};
use paceline_sim::program::Pass;

/// What one microbatch holds on each stage, in any one unit (microbatch-stages or bytes).
#[derive(Debug, Clone, PartialEq)]
pub struct StageMemory {
    /// Held from F (or R) to B, by stage: `M_B` of the zero-bubble paper.
    pub until_b: Vec<f64>,
    /// Held from B to W, by stage: `M_W`. It may exceed `until_b` where B leaves large output gradients for W.
    pub until_w: Vec<f64>,
    /// Held from F to R, by stage, when the order recomputes.
    pub checkpoint: Vec<f64>,
}

impl StageMemory {
    /// The part of an activation that B frees in a transformer layer with fused attention: with the sizes of the
    /// zero-bubble paper (arXiv 2401.10241, section 2) `M_B = 34 sbh` and `M_W = 32 sbh`, the quadratic `5 a s^2 b` left out.
    pub const FREED_AT_B: f64 = 2.0 / 34.0;
    /// The part of an activation that stays under full recomputation: a layer's input, `2 sbh` of `34 sbh` (Korthikanti et
    /// al., arXiv 2205.05198, section 4).
    pub const CHECKPOINT: f64 = 2.0 / 34.0;

    /// In microbatch-stages, the `M` of the papers: one microbatch on one device's share of the layers holds 1, so a stage
    /// holds `devices / stages of one copy`. B frees the share `freed_at_b`, W the rest.
    pub fn microbatch_stages(placement: &Placement, devices: usize, freed_at_b: f64) -> StageMemory {
        let stages = placement.stages();
        let whole = devices as f64 / placement.stages_per_copy().max(1) as f64;
        StageMemory {
            until_b: vec![whole; stages],
            until_w: vec![whole * (1.0 - freed_at_b); stages],
            checkpoint: vec![whole * StageMemory::CHECKPOINT; stages],
        }
    }

    /// The same sizes when nothing is freed before W.
    pub fn unsplit(&self) -> StageMemory {
        StageMemory { until_w: self.until_b.clone(), ..self.clone() }
    }
}

/// The most that every device holds at a time.
#[derive(Debug, Clone, PartialEq)]
pub struct Peaks {
    /// With part freed at B and the rest at W, by device.
    pub peak: Vec<f64>,
    /// With all freed at W (or BW), by device.
    pub peak_unsplit: Vec<f64>,
}

/// Peaks of an order under both semantics.
///
/// # Panics
/// When `memory` covers fewer stages than the order uses.
pub fn peaks(order: &ComputeOrder, memory: &StageMemory) -> Peaks {
    let highest = |memory: &StageMemory| {
        memory_curve(order, memory).into_iter().map(|curve| curve.into_iter().fold(0.0, f64::max)).collect()
    };
    Peaks { peak: highest(memory), peak_unsplit: highest(&memory.unsplit()) }
}

/// Held by every device after each of its actions' allocations and before its frees: what the device must have room
/// for while the action runs, by device and place in its list.
///
/// # Panics
/// When `memory` covers fewer stages than the order uses.
pub fn memory_curve(order: &ComputeOrder, memory: &StageMemory) -> Vec<Vec<f64>> {
    order.actions.iter().map(|list| curve_of(list, memory)).collect()
}

/// Microbatches of one stage by what they hold. Counted, not summed, so that the curve returns to exactly zero.
#[derive(Clone, Copy, Default)]
struct Held {
    checkpoint: u32,
    until_b: u32,
    until_w: u32,
}

fn curve_of(list: &[Action], memory: &StageMemory) -> Vec<f64> {
    let stages = memory.until_b.len();
    let mut recomputed = vec![false; stages];
    for action in list.iter().filter(|action| action.pass == Pass::R) {
        recomputed[action.stage.index()] = true;
    }
    let mut local: Vec<usize> = list.iter().map(|action| action.stage.index()).collect();
    local.sort_unstable();
    local.dedup();
    let mut held = vec![Held::default(); stages];
    let total = |held: &[Held]| -> f64 {
        local
            .iter()
            .map(|&s| {
                f64::from(held[s].checkpoint) * memory.checkpoint[s]
                    + f64::from(held[s].until_b) * memory.until_b[s]
                    + f64::from(held[s].until_w) * memory.until_w[s]
            })
            .sum()
    };
    let mut curve = Vec::with_capacity(list.len());
    for action in list {
        let s = action.stage.index();
        let before = total(&held);
        match action.pass {
            Pass::F if recomputed[s] => held[s].checkpoint += 1,
            Pass::F => held[s].until_b += 1,
            Pass::R => {
                held[s].checkpoint = held[s].checkpoint.saturating_sub(1);
                held[s].until_b += 1;
            }
            Pass::B => {
                held[s].until_b = held[s].until_b.saturating_sub(1);
                held[s].until_w += 1;
            }
            Pass::W => held[s].until_w = held[s].until_w.saturating_sub(1),
            Pass::BW => held[s].until_b = held[s].until_b.saturating_sub(1),
        }
        curve.push(before.max(total(&held)));
    }
    curve
}
