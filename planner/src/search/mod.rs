//! The best configurations of a job: enumerate, bound, simulate what the bounds leave, and say why the others lost.
//!
//! Three rooms that know nothing of each other: [`candidates`] lists the space, a [`Bound`] says from below what a candidate
//! takes without lowering it, a [`Score`] says exactly what it takes. [`best`] drives any three of them: candidates come in
//! order of their bound, and those whose bound is above the worst plan kept are never simulated. [`refine`] then works on the few that are
//! left: layers move between stages, and the schedule optimiser has a try at each shape.

pub mod bound;
pub mod candidates;
mod refine;
pub mod score;

use crate::configuration::{Configuration, Machine};
use crate::job::{Job, LOCAL};
use crate::prediction::{Costs, Prediction};
use crate::states::GuidelineRank;
use bound::LayerBound;
use paceline_sim::units::show_bytes;
use rayon::prelude::*;
use score::Simulation;
use serde::{Deserialize, Serialize};
use std::time::Instant;
use thiserror::Error;

/// The format of search results as JSON.
pub const PLANS_FORMAT: &str = "paceline.plans/1";

/// What a candidate takes at least.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct AtLeast {
    /// Seconds of a step.
    pub seconds: f64,
    /// Bytes of the fullest rank.
    pub bytes: u64,
}

/// Says from below what a candidate takes, cheaply.
pub trait Bound: Sync {
    /// A lower bound.
    ///
    /// # Errors
    /// Why the candidate cannot be.
    fn at_least(&self, candidate: &Configuration) -> Result<AtLeast, String>;
}

/// Says what a candidate takes.
pub trait Score: Sync {
    /// Bytes of the fullest rank.
    ///
    /// # Errors
    /// Why the candidate cannot be.
    fn bytes(&self, candidate: &Configuration) -> Result<u64, String>;

    /// Everything.
    ///
    /// # Errors
    /// Why the candidate cannot be.
    fn predict(&self, candidate: &Configuration) -> Result<Scored, String>;
}

/// A candidate with what it takes; layers are cut for good.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scored {
    /// The candidate.
    pub configuration: Configuration,
    /// What it takes.
    pub prediction: Prediction,
    /// What PaRO's closed form says of its state partition, where the bandwidth between ranks is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guideline: Option<GuidelineRank>,
}

/// What a search is asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Plans to return.
    pub top: usize,
    /// Most bytes per rank.
    pub memory: Option<u64>,
}

/// How far a search is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// Candidates in all.
    pub candidates: usize,
    /// Candidates that are decided.
    pub decided: usize,
    /// Seconds per step of the best so far.
    pub best: Option<f64>,
}

/// What a search found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plans {
    /// [`PLANS_FORMAT`].
    pub format: String,
    /// Configurations that the job allows, those that turned out impossible included.
    pub candidates: usize,
    /// Those that were left out.
    pub pruned: Pruned,
    /// Those that were simulated.
    pub simulated: usize,
    /// Wall-clock seconds of the search.
    pub search_seconds: f64,
    /// No configuration of the space that fits into memory takes less.
    pub bound_iteration_seconds: f64,
    /// How far the best plan is above that, relative to it.
    pub gap: f64,
    /// The best first.
    pub plans: Vec<Scored>,
    /// Why the others lost, the nearest first.
    pub losers: Vec<Loser>,
}

/// Candidates that were not simulated to the end, by reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Pruned {
    /// They hold more than the limit.
    pub memory: usize,
    /// Their bound is above the worst plan returned.
    pub bound: usize,
    /// They cannot be, for example a number of microbatches that their schedule does not permit.
    pub invalid: usize,
}

/// A candidate that lost.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Loser {
    /// The candidate.
    pub configuration: Configuration,
    /// Why.
    pub reason: Reason,
}

/// Why a candidate lost.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "reason")]
pub enum Reason {
    /// Its fullest rank holds more than the limit.
    Memory { bytes: u64 },
    /// It cannot take less than this, which is more than the worst plan returned.
    Bound { seconds: f64 },
    /// It is slower than the best, most of it by one part of its time.
    Slower { seconds: f64, mostly: Part, by_seconds: f64 },
    /// It cannot be.
    Invalid { why: String },
}

/// The part of time by which a candidate lost most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Its passes take longer (smaller microbatches, shared devices).
    Compute,
    /// It waits more.
    Bubble,
    /// It recomputes.
    Recompute,
    /// More of its communication shows.
    Communication,
    /// Its optimizer takes longer.
    Optimizer,
}

/// Why a search returns nothing.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum SearchError {
    /// Nothing fits into memory.
    #[error(
        "no plan fits: every rank may hold {}, and the smallest plan ({configuration}) needs {} ({needed} bytes); raise memory_limit to that, or allow recompute, more pipeline ranks or smaller microbatches",
        show_bytes(*.limit), show_bytes(*.needed)
    )]
    NothingFits { limit: u64, needed: u64, configuration: Box<Configuration> },
    /// Not this machine.
    #[error(
        "cluster = {cluster:?}: the search covers cluster = \"local\" only; leave the key out, or predict single layouts of that cluster"
    )]
    Cluster { cluster: String },
    /// Nothing can be.
    #[error("no configuration of this job can be: {why}")]
    NothingPossible { why: String },
}

/// Searches the space of a job on a machine. `progress` is called now and then and may stop the search by returning `false`;
/// what was found until then is returned.
///
/// # Errors
/// When nothing fits, or nothing can be.
pub fn search(
    job: &Job,
    machine: Machine,
    costs: &dyn Costs,
    top: usize,
    progress: &(dyn Fn(Progress) -> bool + Sync),
) -> Result<Plans, SearchError> {
    if job.cluster != LOCAL {
        return Err(SearchError::Cluster { cluster: job.cluster.clone() });
    }
    let machine = machine.for_job(job);
    let candidates = candidates::of_job(job, machine);
    if candidates.is_empty() && job.sharing.keep_gathered {
        let why =
            "keep_gathered = true needs replicas that cut parameters; allow dp above 1, or leave keep_gathered out";
        return Err(SearchError::NothingPossible { why: why.into() });
    }
    let bound = LayerBound::new(job, machine, costs);
    let score = Simulation { job, machine, costs, cuts: &bound };
    let limits = Limits { top, memory: job.memory_limit };
    let mut plans = best(candidates, &bound, &score, limits, progress)?;
    refine::recut(&mut plans, &score, limits.memory);
    refine::optimise(&mut plans, job, &bound, &score, limits);
    Ok(plans)
}

/// Candidates simulated between two looks at the bounds.
const BATCH: usize = 32;

/// The best of some candidates.
///
/// # Errors
/// When nothing fits, or nothing can be.
pub fn best(
    candidates: Vec<Configuration>,
    bound: &dyn Bound,
    score: &dyn Score,
    limits: Limits,
    progress: &(dyn Fn(Progress) -> bool + Sync),
) -> Result<Plans, SearchError> {
    let begin = Instant::now();
    let total = candidates.len();
    let top = limits.top.max(1);
    let too_much = |bytes: u64| limits.memory.is_some_and(|limit| bytes > limit);
    let mut pruned = Pruned::default();
    let mut losers: Vec<Loser> = Vec::new();
    let mut open: Vec<(AtLeast, Configuration)> = Vec::new();
    let bounds: Vec<_> = candidates.par_iter().map(|candidate| bound.at_least(candidate)).collect();
    let mut too_large: Vec<Configuration> = Vec::new();
    for (configuration, least) in candidates.into_iter().zip(bounds) {
        match least {
            Err(why) => {
                pruned.invalid += 1;
                losers.push(Loser { configuration, reason: Reason::Invalid { why } });
            }
            Ok(least) if too_much(least.bytes) => {
                pruned.memory += 1;
                too_large.push(configuration.clone());
                losers.push(Loser { configuration, reason: Reason::Memory { bytes: least.bytes } });
            }
            Ok(least) => open.push((least, configuration)),
        }
    }
    open.sort_by(|a, b| a.0.seconds.total_cmp(&b.0.seconds));

    let mut scored: Vec<Scored> = Vec::new();
    let mut lowest = f64::INFINITY;
    let mut simulated = 0;
    let mut place = 0;
    let mut stopped = false;
    while place < open.len() && !stopped {
        let worst = if scored.len() < top { f64::INFINITY } else { scored[top - 1].prediction.iteration_seconds };
        if open[place].0.seconds > worst {
            break;
        }
        let end = open.len().min(place + BATCH);
        let batch: Vec<(f64, Configuration, Result<Outcome, String>)> = open[place..end]
            .par_iter()
            .map(|(least, candidate)| (least.seconds, candidate.clone(), outcome(score, candidate, &too_much)))
            .collect();
        place = end;
        for (seconds, configuration, result) in batch {
            match result {
                Err(why) => {
                    pruned.invalid += 1;
                    losers.push(Loser { configuration, reason: Reason::Invalid { why } });
                }
                Ok(Outcome::TooLarge(bytes)) => {
                    pruned.memory += 1;
                    too_large.push(configuration.clone());
                    losers.push(Loser { configuration, reason: Reason::Memory { bytes } });
                }
                Ok(Outcome::Fits(found)) => {
                    simulated += 1;
                    lowest = lowest.min(seconds);
                    scored.push(*found);
                }
            }
        }
        scored.sort_by(|a, b| {
            let key = |s: &Scored| s.prediction.iteration_seconds;
            key(a).total_cmp(&key(b)).then_with(|| smaller(&a.configuration, &b.configuration))
        });
        let best = scored.first().map(|found| found.prediction.iteration_seconds);
        stopped = !progress(Progress { candidates: total, decided: total - open.len() + place, best });
    }
    for (least, configuration) in open.drain(place..) {
        lowest = lowest.min(least.seconds);
        pruned.bound += 1;
        losers.push(Loser { configuration, reason: Reason::Bound { seconds: least.seconds } });
    }
    let Some(best) = scored.first().cloned() else {
        return Err(nothing(score, too_large, &losers, limits));
    };
    for slower in scored.split_off(top.min(scored.len())) {
        losers.push(Loser { reason: slower_than(&best, &slower), configuration: slower.configuration });
    }
    losers.sort_by(|a, b| nearness(&a.reason).total_cmp(&nearness(&b.reason)));
    let seconds = best.prediction.iteration_seconds;
    let bound_iteration_seconds = lowest.min(seconds);
    Ok(Plans {
        format: PLANS_FORMAT.into(),
        candidates: total,
        pruned,
        simulated,
        search_seconds: begin.elapsed().as_secs_f64(),
        bound_iteration_seconds,
        gap: seconds / bound_iteration_seconds - 1.0,
        plans: scored,
        losers,
    })
}

enum Outcome {
    TooLarge(u64),
    Fits(Box<Scored>),
}

fn outcome(
    score: &dyn Score,
    candidate: &Configuration,
    too_much: &(impl Fn(u64) -> bool + Sync),
) -> Result<Outcome, String> {
    let bytes = score.bytes(candidate)?;
    if too_much(bytes) {
        return Ok(Outcome::TooLarge(bytes));
    }
    Ok(Outcome::Fits(Box::new(score.predict(candidate)?)))
}

/// Of two that are as fast, the simpler: fewer ranks, fewer chunks, larger microbatches.
fn smaller(a: &Configuration, b: &Configuration) -> std::cmp::Ordering {
    let key = |c: &Configuration| (c.ranks(), c.chunks, c.recompute as u8, c.states, u32::MAX - c.micro_batch);
    key(a).cmp(&key(b)).then_with(|| a.schedule.cmp(&b.schedule))
}

/// The least that would be needed, exactly.
fn nothing(score: &dyn Score, too_large: Vec<Configuration>, losers: &[Loser], limits: Limits) -> SearchError {
    let least = too_large
        .into_par_iter()
        .filter_map(|candidate| score.bytes(&candidate).ok().map(|bytes| (bytes, candidate)))
        .min_by(|a, b| a.0.cmp(&b.0).then_with(|| smaller(&a.1, &b.1)));
    match (least, limits.memory) {
        (Some((needed, configuration)), Some(limit)) => {
            SearchError::NothingFits { limit, needed, configuration: Box::new(configuration) }
        }
        _ => {
            let why = losers.iter().find_map(|loser| match &loser.reason {
                Reason::Invalid { why } => Some(format!("{}: {why}", loser.configuration)),
                _ => None,
            });
            let usual = "no combination of dp, pp, micro_batch and chunks divides the batch and the layers";
            SearchError::NothingPossible { why: why.unwrap_or_else(|| usual.into()) }
        }
    }
}

fn slower_than(best: &Scored, slower: &Scored) -> Reason {
    let (a, b) = (&best.prediction.time, &slower.prediction.time);
    let differences = [
        (Part::Compute, b.compute - a.compute),
        (Part::Bubble, b.bubble - a.bubble),
        (Part::Recompute, b.recompute - a.recompute),
        (Part::Communication, b.exposed_dp + b.exposed_pp - a.exposed_dp - a.exposed_pp),
        (Part::Optimizer, b.optimizer - a.optimizer),
    ];
    let mut worst = differences[0];
    for difference in differences {
        if difference.1 > worst.1 {
            worst = difference;
        }
    }
    Reason::Slower { seconds: slower.prediction.iteration_seconds, mostly: worst.0, by_seconds: worst.1 }
}

/// Simulated ones first, then those pruned by bound, by memory, and the impossible.
fn nearness(reason: &Reason) -> f64 {
    match reason {
        Reason::Slower { seconds, .. } => *seconds,
        Reason::Bound { seconds } => 1e12 + seconds,
        Reason::Memory { bytes } => 1e14 + *bytes as f64,
        Reason::Invalid { .. } => f64::INFINITY,
    }
}

#[cfg(test)]
mod tests;
