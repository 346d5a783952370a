//! The adaptive V schedule: every block of the V family that fits, ranked by its length with the real times, the best few
//! rearranged at their ends.

use super::{Problem, v_family};
use crate::blocks::{Block, Goal, justify};
use crate::order::{Action, ComputeOrder};
use crate::replay::{OrderError, Replayer};
use crate::schedules::action;
use paceline_sim::program::Pass;

/// Blocks whose ends are rearranged; in unit time one of the first three of them is the best of all.
const REARRANGED: usize = 6;

/// The best order of the V family, its ends rearranged for the makespan. One microbatch after the other, rearranged, when
/// no block fits.
///
/// # Errors
/// When an order cannot be replayed with the times.
pub(crate) fn adaptive_v(problem: &Problem) -> Result<ComputeOrder, OrderError> {
    best_rearranged(problem, &ranked(problem, REARRANGED)?)
}

/// The best of the first few blocks of [`ranked`], their ends rearranged: the order of [`adaptive_v`].
///
/// # Errors
/// As [`adaptive_v`].
pub(crate) fn best_rearranged(problem: &Problem, ranked: &[ComputeOrder]) -> Result<ComputeOrder, OrderError> {
    let serial = [problem.serial()];
    let candidates = if ranked.is_empty() { &serial } else { &ranked[..ranked.len().min(REARRANGED)] };
    let mut replayer = Replayer::default();
    let mut best: Option<(f64, ComputeOrder)> = None;
    for candidate in candidates {
        let order = justify(candidate, &problem.times, &problem.memory, &problem.limit, Goal::Makespan)?;
        let makespan = replayer.run(&order, &problem.times)?.makespan;
        if best.as_ref().is_none_or(|(least, _)| makespan < *least) {
            best = Some((makespan, order));
        }
    }
    Ok(best.map_or_else(|| problem.serial(), |(_, order)| order))
}

/// The repeated blocks of the V family that fit, the `count` shortest of them (their ends as they are), the shortest first.
///
/// # Errors
/// As [`adaptive_v`].
pub(crate) fn ranked(problem: &Problem, count: usize) -> Result<Vec<ComputeOrder>, OrderError> {
    let p = problem.limit.len() as u32;
    let m = problem.microbatches;
    // Long enough for a steady phase; what follows repeats.
    let short = m.min(2 * p + 4);
    let mut replayer = Replayer::default();
    let mut found: Vec<(f64, Block)> = Vec::new();
    let blocks = v_family::blocks(p, |block| could_fit(problem, block));
    let mut lists: Vec<Vec<Action>> = Vec::new();
    for block in blocks {
        lists_of(&block, short, &mut lists);
        if !fits(problem, &lists) {
            continue;
        }
        let makespan = replayer.run_lists(&problem.placement, short, &lists, &problem.times)?.makespan;
        found.push((makespan + f64::from(m - short) * period(&lists[0], replayer.starts(0), short), block));
    }
    found.sort_by(|a, b| a.0.total_cmp(&b.0));
    found.truncate(count);
    Ok(found.into_iter().map(|(_, block)| block.repeat(m).order).collect())
}

/// Time between microbatches once the order is steady: mean distance of the forwards of stage 0 over the second half.
fn period(list: &[Action], starts: &[f64], microbatches: u32) -> f64 {
    let start = |microbatch| {
        let place = list.iter().position(|a| *a == action(Pass::F, 0, microbatch));
        place.map_or(0.0, |place| starts[place])
    };
    let (from, to) = (microbatches / 2, microbatches - 1);
    if to > from { (start(to) - start(from)) / f64::from(to - from) } else { 0.0 }
}

/// A quick look: the predicted peak is an upper bound that the repeated block can miss by one activation per stage.
fn could_fit(problem: &Problem, block: &Block) -> bool {
    let mut least = vec![0.0; problem.limit.len()];
    for (stage, device) in block.placement.device_of_stage.iter().enumerate() {
        let full = block.lifespan(stage) / block.interval;
        least[*device as usize] += f64::from(full.min(problem.microbatches))
            * problem.memory.until_w[stage].min(problem.memory.until_b[stage]);
    }
    least.iter().zip(&problem.limit).all(|(least, limit)| *least <= limit * (1.0 + 1e-9))
}

/// Whether repeated lists hold no more than the limit anywhere: one counter, because F, B and W of a repeated block allocate
/// and free in their order.
fn fits(problem: &Problem, lists: &[Vec<Action>]) -> bool {
    lists.iter().zip(&problem.limit).all(|(list, limit)| {
        let mut held = 0.0;
        list.iter().all(|action| {
            let stage = action.stage.index();
            held += match action.pass {
                Pass::F | Pass::R => problem.memory.until_b[stage],
                Pass::B => problem.memory.until_w[stage] - problem.memory.until_b[stage],
                Pass::W => -problem.memory.until_w[stage],
                Pass::BW => -problem.memory.until_b[stage],
            };
            held <= limit * (1.0 + 1e-9)
        })
    })
}

/// The actions of every device of a repeated block, in order of their slots: those of one period, sorted once, with the
/// microbatch that has each of them in a given period.
fn lists_of(block: &Block, microbatches: u32, lists: &mut Vec<Vec<Action>>) {
    let devices = block.placement.devices();
    lists.resize(devices, Vec::new());
    for (device, list) in lists.iter_mut().enumerate() {
        list.clear();
        let stages = block.placement.device_of_stage.iter().enumerate().filter(|(_, d)| **d as usize == device);
        let mut cycle: Vec<(u32, u32, Pass, u32)> = stages
            .flat_map(|(stage, _)| {
                let passes = block.offsets[stage].passes();
                passes.map(move |(pass, slot, _)| (slot % block.interval, slot / block.interval, pass, stage as u32))
            })
            .collect();
        cycle.sort_unstable();
        let last = cycle.iter().map(|(_, late, ..)| *late).max().unwrap_or(0);
        for turn in 0..microbatches + last {
            for (_, late, pass, stage) in &cycle {
                if let Some(microbatch) = turn.checked_sub(*late).filter(|n| *n < microbatches) {
                    list.push(action(*pass, *stage, microbatch));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::{StageMemory, StageTimes, replay};
    use crate::schedules::v_shape;

    /// The least bubble of the longest device span in chunk slots with `k` chunk activations per device (the lower envelope of the paper's
    /// adaptive search in unit time).
    fn bubble_slots(p: i64, k: i64) -> i64 {
        (6 * p - 1 - 3 * k).max(4 * p - 3 * k + 2 * ((k + 1) / 2))
    }

    #[test]
    fn unit_time_reaches_the_frontier_at_every_memory() {
        for p in [4u32, 8, 16] {
            for m in [2 * p, 3 * p] {
                for chunks in 2 * ((p + 4) / 3)..=2 * p {
                    let placement = v_shape(p);
                    let problem = Problem {
                        times: StageTimes::unit(2 * p as usize),
                        memory: StageMemory::microbatch_stages(&placement, p as usize, 0.0),
                        limit: vec![f64::from(chunks) / 2.0; p as usize],
                        microbatches: m,
                        placement,
                    };
                    let span = ranked(&problem, REARRANGED)
                        .unwrap()
                        .into_iter()
                        .map(|order| {
                            let order =
                                justify(&order, &problem.times, &problem.memory, &problem.limit, Goal::Span).unwrap();
                            assert!(problem.fits(&order));
                            replay(&order, &problem.times).unwrap().totals.longest_span
                        })
                        .fold(f64::INFINITY, f64::min);
                    let least = bubble_slots(i64::from(p), i64::from(chunks)) as f64;
                    assert!(span - f64::from(6 * m) <= least, "p={p} m={m} k={chunks}: {span}, {least}");
                    // No device but the first can start at once.
                    let found = adaptive_v(&problem).unwrap();
                    let makespan = replay(&found, &problem.times).unwrap().makespan() - f64::from(6 * m);
                    assert!(makespan <= least + f64::from(p - 1), "p={p} m={m} k={chunks}: {makespan}, {least}");
                }
            }
        }
    }
}
