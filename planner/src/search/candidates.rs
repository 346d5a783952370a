//! The space of a job: every combination of its axes that is worth a look.

use crate::configuration::{Configuration, Machine, RECOMPUTING};
use crate::job::Job;
use crate::schedules::{Chunks, SCHEDULES};
use paceline_sim::partition::StatePartition;
use paceline_sim::program::Recompute;

/// Most stages per rank that a search tries on its own.
const MOST_CHUNKS: u32 = 4;

/// The schedule that searches by itself.
pub(super) const OPTIMISED: &str = "optimised";

/// All candidates. Axes that the job names take the values that it names; others
/// - `dp`, `pp`: no more ranks than devices, unless the job itself asks for more;
/// - `chunks`: what the schedule has, up to four;
/// - `schedule`: all but [`OPTIMISED`], which takes long for each candidate and tries only the shapes of the best; without a pipeline
///   they are all the same, so one;
/// - `micro_batch`: divisors of a replica's batch;
/// - `recompute`: all kinds;
/// - `states`: where there are replicas, whole or cut, the more the rarer a class is needed; parameters are cut where the job wants
///   gathered ones to stay.
pub fn of_job(job: &Job, machine: Machine) -> Vec<Configuration> {
    let or = |given: &[u32], free: Vec<u32>| if given.is_empty() { free } else { given.to_vec() };
    let batch = job.global_batch;
    let fewest_pp = job.pp.iter().copied().min().unwrap_or(1);
    let mut all = Vec::new();
    for dp in or(&job.dp, (1..=(machine.devices / fewest_pp).max(1)).collect()) {
        if !batch.is_multiple_of(dp) {
            continue;
        }
        for pp in or(&job.pp, (1..=(machine.devices / dp).max(1)).collect()) {
            if pp > job.model.layers {
                continue;
            }
            for micro_batch in or(&job.micro_batch, divisors(batch / dp)) {
                if !(batch / dp).is_multiple_of(micro_batch) {
                    continue;
                }
                for (schedule, chunks) in schedules(job, pp) {
                    for recompute in recomputations(job, schedule) {
                        for states in partitions(job, dp, schedule).into_iter().filter(|states| job.can_have(states)) {
                            all.push(Configuration {
                                dp,
                                pp,
                                chunks,
                                schedule: schedule.into(),
                                micro_batch,
                                recompute,
                                states,
                                sharing: job.sharing,
                                stage_layers: Vec::new(),
                                measured: None,
                                collectives: Vec::new(),
                            });
                        }
                    }
                }
            }
        }
    }
    all
}

fn divisors(n: u32) -> Vec<u32> {
    let small = (1..=n.isqrt()).filter(|d| n.is_multiple_of(*d));
    let mut all: Vec<u32> = small.flat_map(|d| [d, n / d]).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Schedules with their numbers of chunks.
fn schedules(job: &Job, pp: u32) -> Vec<(&'static str, u32)> {
    let mut all = Vec::new();
    for schedule in SCHEDULES {
        let wanted = match job.schedule.as_slice() {
            [] if pp == 1 => schedule.name == "1f1b",
            [] => schedule.name != OPTIMISED,
            named => named.iter().any(|name| name == schedule.name),
        };
        if !wanted {
            continue;
        }
        let chunks: Vec<u32> = match schedule.chunks {
            Chunks::Exactly(own) => vec![own],
            Chunks::From { least, .. } => {
                let most = (job.model.layers / pp).min(MOST_CHUNKS.max(least));
                if job.chunks.is_empty() { (least..=most).collect() } else { job.chunks.clone() }
            }
        };
        let allowed =
            |v: &u32| (job.chunks.is_empty() || job.chunks.contains(v)) && pp.saturating_mul(*v) <= job.model.layers;
        all.extend(chunks.into_iter().filter(allowed).map(|chunks| (schedule.name, chunks)));
    }
    all
}

fn recomputations(job: &Job, schedule: &str) -> Vec<Recompute> {
    let all = match job.recompute.as_slice() {
        [] => vec![Recompute::None, Recompute::Selective, Recompute::Full],
        named => named.to_vec(),
    };
    if schedule == RECOMPUTING { all.into_iter().filter(|kind| *kind == Recompute::Full).collect() } else { all }
}

/// Whole, or parameters cut no finer than gradients and these no finer than optimizer states: any other partition holds as much of
/// some class as one of these and gathers or reduces more. Groups only where the job names their size.
fn partitions(job: &Job, dp: u32, schedule: &str) -> Vec<StatePartition> {
    match job.states.as_slice() {
        // Two copies of the model beside each other share no collective within a microbatch.
        [] if schedule == "dualpipe" => vec![StatePartition::NONE, StatePartition::ZERO1],
        [] if dp > 1 => {
            let groups = job.sharing.group_size.is_some_and(|size| size > 1 && size < dp);
            let sorted = |s: &StatePartition| s.parameters <= s.gradients && s.gradients <= s.optimizer;
            StatePartition::all().filter(|states| sorted(states) && (groups || !states.has_groups())).collect()
        }
        [] => vec![StatePartition::NONE],
        named => named.to_vec(),
    }
}
