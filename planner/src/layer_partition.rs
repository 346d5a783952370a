//! Layers to stages: contiguous runs such that the busiest device does as little as can be, under a memory limit per device, embedding
//! and head included. With many microbatches the iteration is the busiest device's work and ramps that any cut has.
//!
//! - [`partition`]: exact by dynamic programming where a device has one stage, or where stage `k` shares its devices with stage `n-1-k` only (V
//!   placement, two opposite pipelines). Stages are then cut in pairs from the outside inwards.
//! - [`in_flight`]: how many microbatches a schedule holds, which turns a limit into one on layers.
//! - [`Vocabulary`]: embedding and head at the ends, or split over all devices (vocabulary parallelism, Yeung et al., arXiv 2411.05288).

use crate::order::{ComputeOrder, Placement};
use paceline_sim::program::Pass;
use thiserror::Error;

/// What each layer costs, in forward order, the embedding first and the head last.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LayerCosts {
    /// Work on one microbatch: forward and backward.
    pub seconds: Vec<f64>,
    /// What a device holds of it for good: parameters, gradients, optimizer states.
    pub fixed: Vec<f64>,
    /// What one microbatch in flight holds of it.
    pub activation: Vec<f64>,
}

/// Where embedding and head are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Vocabulary {
    /// In the first and the last stage.
    #[default]
    Ends,
    /// An equal part of both on every device, for one microbatch at a time; stages hold blocks only.
    Spread,
}

/// Why layers cannot be cut.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum PartitionError {
    /// Lists of different lengths.
    #[error("{have} values for {what}, {need} needed")]
    Length { what: &'static str, have: usize, need: usize },
    /// More stages than layers.
    #[error("{layers} layers cannot be cut into {stages} stages of at least one; take fewer pipeline ranks or chunks")]
    TooFewLayers { layers: usize, stages: usize },
    /// No cut fits.
    #[error(
        "no cut keeps every device within its limit: the cut that is best without limits takes {needed:.0} on device {device}, which has {limit:.0}; raise the limit, recompute, or take more pipeline ranks"
    )]
    NothingFits { device: usize, needed: f64, limit: f64 },
}

/// The combinations of microbatches in flight on a device, by local stage in forward order, that no other one of the device exceeds.
pub type InFlight = Vec<Vec<u32>>;

/// What every device of an order has in flight (from F to W or the fused backward), by device.
pub fn in_flight(order: &ComputeOrder) -> Vec<InFlight> {
    let of_device = |(device, list): (u32, &Vec<crate::order::Action>)| {
        let stages: Vec<_> = order.placement.stages_of(device).collect();
        let mut held = vec![0u32; stages.len()];
        let mut highest: InFlight = Vec::new();
        for action in list {
            let Some(place) = stages.iter().position(|stage| *stage == action.stage) else { continue };
            match action.pass {
                Pass::F => held[place] += 1,
                Pass::W | Pass::BW => {
                    let covers = |a: &[u32], b: &[u32]| a.iter().zip(b).all(|(a, b)| a >= b);
                    if !highest.iter().any(|other| covers(other, &held)) {
                        highest.retain(|other| !covers(&held, other));
                        highest.push(held.clone());
                    }
                    held[place] = held[place].saturating_sub(1);
                }
                Pass::B | Pass::R => {}
            }
        }
        highest
    };
    (0..).zip(&order.actions).map(of_device).collect()
}

/// The number of layers of every stage of one copy of the model, such that the busiest device does as little as can be; among
/// such cuts one with loads close to equal. `limit` is by device; without one, memory does not matter. `in_flight` is by device too.
///
/// Exact for one stage per device and for nested pairs; with other placements the heaviest stage is made as light as can be, and each
/// stage of a device has an equal part of its limit. With `Vocabulary::Spread` the result counts blocks only.
///
/// # Errors
/// When lists do not fit each other, there are too few layers, or no cut fits the limit.
pub fn partition(
    costs: &LayerCosts,
    placement: &Placement,
    in_flight: &[InFlight],
    limit: Option<&[f64]>,
    vocabulary: Vocabulary,
) -> Result<Vec<u32>, PartitionError> {
    let layers = costs.seconds.len();
    let devices = placement.devices();
    let stages = placement.stages_per_copy();
    let lengths = [
        ("the bytes of layers", costs.fixed.len(), layers),
        ("the activations of layers", costs.activation.len(), layers),
        ("the microbatches in flight", in_flight.len(), devices),
        ("the limits", limit.map_or(devices, <[f64]>::len), devices),
    ];
    for (what, have, need) in lengths {
        if have != need {
            return Err(PartitionError::Length { what, have, need });
        }
    }
    let ends = if vocabulary == Vocabulary::Spread { 2.min(layers) } else { 0 };
    if layers < stages + ends || stages == 0 {
        return Err(PartitionError::TooFewLayers { layers: layers - ends, stages });
    }
    let case = Case::new(costs, placement, in_flight, limit, vocabulary);
    if let Some(cuts) = case.best(true) {
        return Ok(cuts);
    }
    let free = case.best(false).unwrap_or_default();
    let (device, needed, limit) = case.fullest(&free);
    Err(PartitionError::NothingFits { device, needed, limit })
}

/// Stages of one copy that share their devices: one, or a pair with the first one earlier.
#[derive(Debug, Clone)]
struct Shell {
    stages: (usize, Option<usize>),
    /// Microbatches in flight of both, and the device with its limit.
    demands: Vec<([f64; 2], usize, f64)>,
}

/// Sums over the layers before each layer.
struct Case {
    seconds: Vec<f64>,
    fixed: Vec<f64>,
    activation: Vec<f64>,
    shells: Vec<Shell>,
    stages: usize,
}

/// Load of the busiest device so far, and the sum of squares of all loads.
type Load = (f64, f64);
const IMPOSSIBLE: Load = (f64::INFINITY, f64::INFINITY);

fn lighter(a: Load, b: Load) -> bool {
    // Loads that differ by rounding only are equal.
    a.0 < b.0 * (1.0 - 1e-12) || a.0 <= b.0 * (1.0 + 1e-12) && a.1 < b.1
}

impl Case {
    fn new(
        costs: &LayerCosts,
        placement: &Placement,
        in_flight: &[InFlight],
        limit: Option<&[f64]>,
        vocabulary: Vocabulary,
    ) -> Case {
        let n = placement.stages_per_copy();
        let layers = costs.seconds.len();
        let devices = placement.devices();
        let spread = vocabulary == Vocabulary::Spread;
        let range = if spread { 1..layers - 1 } else { 0..layers };
        let sums = |list: &[f64]| {
            let mut before = vec![0.0];
            for value in &list[range.clone()] {
                before.push(before[before.len() - 1] + value.max(0.0));
            }
            before
        };
        // What every device has of the ends, whatever the cut. Its work is the same for all and decides nothing.
        let share = if spread {
            let ends = [0, layers - 1].map(|end| costs.fixed[end] + costs.activation[end]);
            ends.iter().sum::<f64>() / devices as f64
        } else {
            0.0
        };
        let local: Vec<Vec<usize>> =
            (0..devices as u32).map(|d| placement.stages_of(d).map(|s| s.index() % n).collect()).collect();
        let single = local.iter().all(|stages| stages.iter().all(|stage| *stage == stages[0]));
        let nested = n.is_multiple_of(2)
            && local.iter().all(|stages| stages.len() == 2 && stages[0] + stages[1] == n - 1 && stages[0] != stages[1]);
        let room = |device: usize| limit.map_or(f64::INFINITY, |limit| limit[device] - share);
        let mut shells: Vec<Shell> = if nested {
            (0..n / 2).map(|k| Shell { stages: (k, Some(n - 1 - k)), demands: Vec::new() }).collect()
        } else {
            (0..n).map(|k| Shell { stages: (k, None), demands: Vec::new() }).collect()
        };
        for (device, stages) in local.iter().enumerate() {
            for (place, &stage) in stages.iter().enumerate() {
                let Some(shell) = shells.iter_mut().find(|shell| shell.stages.0 == stage) else { continue };
                for held in &in_flight[device] {
                    let counts = match shell.stages.1 {
                        Some(_) => [held[place], held[1 - place]],
                        None => [held[place], 0],
                    };
                    let parts = if nested || single { 1.0 } else { stages.len() as f64 };
                    shell.demands.push((counts.map(f64::from), device, room(device) / parts));
                }
            }
        }
        Case {
            seconds: sums(&costs.seconds),
            fixed: sums(&costs.fixed),
            activation: sums(&costs.activation),
            shells,
            stages: n,
        }
    }

    fn layers(&self) -> usize {
        self.seconds.len() - 1
    }

    fn of(sums: &[f64], (from, to): (usize, usize)) -> f64 {
        sums[to] - sums[from]
    }

    /// The work of a shell that holds the layers of two ranges.
    fn work(&self, first: (usize, usize), second: (usize, usize)) -> f64 {
        Case::of(&self.seconds, first) + Case::of(&self.seconds, second)
    }

    /// By device: what it holds, and its limit.
    fn held<'a>(
        &'a self,
        shell: &'a Shell,
        first: (usize, usize),
        second: (usize, usize),
    ) -> impl Iterator<Item = (usize, f64, f64)> + 'a {
        let fixed = Case::of(&self.fixed, first) + Case::of(&self.fixed, second);
        let (a, b) = (Case::of(&self.activation, first), Case::of(&self.activation, second));
        shell.demands.iter().map(move |([n, m], device, limit)| (*device, fixed + n * a + m * b, *limit))
    }

    fn fits(&self, shell: &Shell, first: (usize, usize), second: (usize, usize)) -> bool {
        self.held(shell, first, second).all(|(_, held, limit)| held <= limit * (1.0 + 1e-12))
    }

    fn best(&self, limited: bool) -> Option<Vec<u32>> {
        if self.shells.iter().all(|shell| shell.stages.1.is_none()) {
            return self.linear(limited);
        }
        // What is no busier than a little above an equal share is found soonest; only then is more allowed.
        let share = self.seconds[self.layers()] / self.shells.len() as f64;
        [1.1, 1.5, 3.0, f64::INFINITY].iter().find_map(|most| self.nested(limited, most * share))
    }

    /// One stage after the other: `best[end]` over layers `0..end`.
    fn linear(&self, limited: bool) -> Option<Vec<u32>> {
        let layers = self.layers();
        let mut best = vec![IMPOSSIBLE; layers + 1];
        best[0] = (0.0, 0.0);
        let mut from = Vec::with_capacity(self.stages);
        for shell in &self.shells {
            let mut next = vec![IMPOSSIBLE; layers + 1];
            let mut starts = vec![0; layers + 1];
            for end in 1..=layers {
                for start in (0..end).rev() {
                    let work = self.work((start, end), (0, 0));
                    if work > next[end].0 * (1.0 + 1e-12) {
                        break;
                    }
                    let found = (best[start].0.max(work), best[start].1 + work * work);
                    if lighter(found, next[end]) && (!limited || self.fits(shell, (start, end), (0, 0))) {
                        next[end] = found;
                        starts[end] = start;
                    }
                }
            }
            best = next;
            from.push(starts);
        }
        if best[layers].0.is_infinite() {
            return None;
        }
        let mut end = layers;
        let mut sizes: Vec<u32> = from
            .iter()
            .rev()
            .map(|starts| {
                let size = end - starts[end];
                end = starts[end];
                size as u32
            })
            .collect();
        sizes.reverse();
        Some(sizes)
    }

    /// Pairs from the outside inwards: `best[(a, b)]` when layers `0..a` and `b..` are cut and `a..b` are left. No device does
    /// more than `most`; `None` when that cannot be.
    fn nested(&self, limited: bool, most: f64) -> Option<Vec<u32>> {
        let layers = self.layers();
        let width = layers + 1;
        let mut best = vec![IMPOSSIBLE; width * width];
        best[layers] = (0.0, 0.0);
        let mut from: Vec<Vec<(u32, u32)>> = Vec::with_capacity(self.shells.len());
        for (depth, shell) in self.shells.iter().enumerate() {
            let left = self.shells.len() - 1 - depth;
            let mut next = vec![IMPOSSIBLE; width * width];
            let mut outer = vec![(0, 0); width * width];
            for a in depth..layers {
                for b in a + 2..=layers - depth {
                    let before = best[a * width + b];
                    if before.0.is_infinite() {
                        continue;
                    }
                    for inner_a in (a + 1..b).take_while(|inner_a| inner_a + 2 * left < b) {
                        // Two layers at least for each shell further inside; the innermost one takes all that is left.
                        let lowest = inner_a + 2 * left;
                        let highest = if left == 0 { lowest } else { b - 1 };
                        if self.work((a, inner_a), (highest, b)) > most && left > 0 {
                            break;
                        }
                        for inner_b in (lowest..=highest).rev() {
                            let (first, second) = ((a, inner_a), (inner_b, b));
                            let work = self.work(first, second);
                            if work > most {
                                break;
                            }
                            let place = inner_a * width + inner_b;
                            let found = (before.0.max(work), before.1 + work * work);
                            if lighter(found, next[place]) && (!limited || self.fits(shell, first, second)) {
                                next[place] = found;
                                outer[place] = (a as u32, b as u32);
                            }
                        }
                    }
                }
            }
            best = next;
            from.push(outer);
        }
        let (place, load) = (0..=layers)
            .map(|a| (a, best[a * width + a]))
            .fold((0, IMPOSSIBLE), |kept, (a, load)| if lighter(load, kept.1) { (a, load) } else { kept });
        if load.0.is_infinite() {
            return None;
        }
        let (mut a, mut b) = (place, place);
        let mut sizes = vec![0; self.stages];
        for (shell, outer) in self.shells.iter().zip(&from).rev() {
            let (before_a, before_b) = outer[a * width + b];
            sizes[shell.stages.0] = a as u32 - before_a;
            if let Some(second) = shell.stages.1 {
                sizes[second] = before_b - b as u32;
            }
            (a, b) = (before_a as usize, before_b as usize);
        }
        Some(sizes)
    }

    /// The device that is furthest over its limit with a cut, what it takes, and its limit.
    fn fullest(&self, sizes: &[u32]) -> (usize, f64, f64) {
        let mut ends = vec![0usize];
        for size in sizes {
            ends.push(ends[ends.len() - 1] + *size as usize);
        }
        let range = |stage: usize| ends.get(stage).zip(ends.get(stage + 1)).map_or((0, 0), |(a, b)| (*a, *b));
        let held = self.shells.iter().flat_map(|shell| {
            self.held(shell, range(shell.stages.0), shell.stages.1.map_or((0, 0), range)).collect::<Vec<_>>()
        });
        held.fold((0, 0.0, f64::INFINITY), |kept, found| if found.1 - found.2 > kept.1 - kept.2 { found } else { kept })
    }
}

#[cfg(test)]
mod tests;
