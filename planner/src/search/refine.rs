//! What is worth its time on the best plans only: other cuts of the layers, and an order of passes made for their very times and memory.

use super::candidates::OPTIMISED;
use super::{Bound, Limits, Loser, Plans, Reason, Score, Scored, slower_than, smaller};
use crate::configuration::{Configuration, RECOMPUTING};
use crate::job::Job;
use crate::schedules::find;
use rayon::prelude::*;

/// Rounds in which one layer of a plan moves.
const MOST_MOVES: usize = 8;

/// Moves layers of the plans found from stage to stage while that makes their simulated iteration shorter: the cut with the least busiest rank
/// is the best for many microbatches, with few the ramps decide too. Cuts that a candidate names itself are its own.
pub(super) fn recut(plans: &mut Plans, score: &dyn Score, memory: Option<u64>) {
    let fits =
        |plan: &Scored| memory.is_none_or(|limit| plan.prediction.memory.peak_bytes.iter().all(|held| *held <= limit));
    plans.plans.par_iter_mut().for_each(|plan| {
        for _ in 0..MOST_MOVES {
            let stages = plan.configuration.stage_layers.len();
            let moves = (1..stages).flat_map(|right| [(right - 1, right), (right, right - 1)]);
            let better = moves
                .filter(|(from, _)| plan.configuration.stage_layers[*from] > 1)
                .filter_map(|(from, to)| {
                    let mut moved = plan.configuration.clone();
                    moved.stage_layers[from] -= 1;
                    moved.stage_layers[to] += 1;
                    moved.measured = None;
                    score.predict(&moved).ok().filter(&fits)
                })
                .min_by(|a, b| a.prediction.iteration_seconds.total_cmp(&b.prediction.iteration_seconds));
            match better {
                Some(better) if better.prediction.iteration_seconds < plan.prediction.iteration_seconds => {
                    *plan = better
                }
                _ => break,
            }
        }
    });
    plans.plans.sort_by(|a, b| a.prediction.iteration_seconds.total_cmp(&b.prediction.iteration_seconds));
    measure_gap(plans);
}

/// The gap of what is now the best plan. The bound is of the shapes that were searched: what is found beyond them may be below it.
fn measure_gap(plans: &mut Plans) {
    if let Some(best) = plans.plans.first() {
        let seconds = best.prediction.iteration_seconds;
        plans.bound_iteration_seconds = plans.bound_iteration_seconds.min(seconds);
        plans.gap = seconds / plans.bound_iteration_seconds - 1.0;
    }
}

/// Plans whose shapes the schedule optimiser tries.
const OPTIMISED_PLANS: usize = 4;
/// Passes of a step beyond which it takes too long for a search.
const MOST_PASSES: u32 = 30_000;

/// Lets the schedule optimiser try the shapes of the best plans, unless the job names its schedules. What it finds counts as
/// further candidates, and takes its place among the plans.
pub(super) fn optimise(plans: &mut Plans, job: &Job, bound: &dyn Bound, score: &dyn Score, limits: Limits) {
    if !job.schedule.is_empty() {
        return;
    }
    let mut tries: Vec<Configuration> = Vec::new();
    for plan in plans.plans.iter().take(OPTIMISED_PLANS) {
        for candidate in shapes(&plan.configuration, job) {
            if !tries.contains(&candidate) {
                tries.push(candidate);
            }
        }
    }
    let found: Vec<(Configuration, Result<Scored, String>, f64)> = tries
        .into_par_iter()
        .map(|candidate| {
            let least = bound.at_least(&candidate).map_or(f64::INFINITY, |least| least.seconds);
            let scored = score.predict(&candidate);
            (candidate, scored, least)
        })
        .collect();
    for (configuration, scored, least) in found {
        plans.candidates += 1;
        let (counter, reason) = match scored {
            Ok(scored) => {
                let bytes = scored.prediction.memory.peak_bytes.iter().copied().max().unwrap_or(0);
                if limits.memory.is_none_or(|limit| bytes <= limit) {
                    plans.simulated += 1;
                    plans.bound_iteration_seconds = plans.bound_iteration_seconds.min(least);
                    plans.plans.push(scored);
                    continue;
                }
                (&mut plans.pruned.memory, Reason::Memory { bytes })
            }
            Err(why) => (&mut plans.pruned.invalid, Reason::Invalid { why }),
        };
        *counter += 1;
        plans.losers.push(Loser { configuration, reason });
    }
    plans.plans.sort_by(|a, b| {
        // Of two that are as fast, a pattern with a name is the simpler.
        let key = |s: &Scored| s.prediction.iteration_seconds;
        let computed = |s: &Scored| s.configuration.schedule == OPTIMISED;
        key(a)
            .total_cmp(&key(b))
            .then_with(|| computed(a).cmp(&computed(b)))
            .then_with(|| smaller(&a.configuration, &b.configuration))
    });
    let slower = plans.plans.split_off(plans.plans.len().min(limits.top.max(1)));
    let Some(best) = plans.plans.first() else { return };
    for slower in slower.into_iter().rev() {
        let loser = Loser { reason: slower_than(best, &slower), configuration: slower.configuration };
        plans.losers.insert(0, loser);
    }
    measure_gap(plans);
}

/// A plan with the optimiser's schedule, in its own number of chunks and with two. Its own cut of the layers stays where the stages lie
/// on the same devices.
fn shapes(plan: &Configuration, job: &Job) -> Vec<Configuration> {
    let Ok(optimised) = find(OPTIMISED) else { return Vec::new() };
    let own = find(&plan.schedule).and_then(|schedule| schedule.placement(plan.pp, Some(plan.chunks)));
    let Ok(own) = own else { return Vec::new() };
    if plan.pp == 1 || own.copies > 1 || plan.schedule == OPTIMISED || plan.schedule == RECOMPUTING {
        return Vec::new();
    }
    let microbatches = plan.microbatches(job).unwrap_or(u32::MAX);
    let allowed = |chunks: &u32| {
        let stages = plan.pp.saturating_mul(*chunks);
        (job.chunks.is_empty() || job.chunks.contains(chunks))
            && stages <= job.model.layers
            && stages.saturating_mul(microbatches).saturating_mul(3) <= MOST_PASSES
    };
    let mut chunks = vec![plan.chunks, 2];
    chunks.dedup();
    let with = |chunks: u32| {
        let same = optimised.placement(plan.pp, Some(chunks)).is_ok_and(|placement| placement == own);
        Configuration {
            schedule: OPTIMISED.into(),
            chunks,
            stage_layers: if same { plan.stage_layers.clone() } else { Vec::new() },
            measured: None,
            ..plan.clone()
        }
    };
    chunks.into_iter().filter(allowed).map(with).collect()
}
