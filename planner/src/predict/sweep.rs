//! The best layouts of a model on a cluster: every combination of the axes that the request leaves open, each predicted.

use super::request::{ClusterRequest, RequestError};
use super::{ClusterPrediction, predict_cluster};
use crate::states::{GuidelineRank, rank_layout};
use paceline_sim::cluster::{Architecture, LayoutError, Physics};
use paceline_sim::partition::{Level, StatePartition};
use rayon::prelude::*;
use serde::Serialize;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// A layout that fits, and its prediction.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ClusterPlan {
    /// The request with every axis set.
    pub configuration: ClusterRequest,
    /// What it is predicted to take.
    pub prediction: ClusterPrediction,
    /// What PaRO's closed form says of its state partition.
    pub guideline: GuidelineRank,
}

/// Why candidates were not predicted or not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Pruned {
    /// Predicted to need more memory than there is.
    pub memory: usize,
    /// Whose bound on time is above the best found. Predictions are cheap enough that none is left out for it.
    pub bound: usize,
    /// Impossible combinations.
    pub invalid: usize,
}

/// What a sweep found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ClusterSweep {
    /// The document's kind.
    pub format: &'static str,
    /// Combinations looked at.
    pub candidates: usize,
    /// Those that are not among the plans.
    pub pruned: Pruned,
    /// Combinations predicted.
    pub simulated: usize,
    /// Time that the search took.
    pub search_seconds: f64,
    /// No layout can be faster: the model's FLOPs, causal attention counted by half, at the stated rate.
    pub bound_iteration_seconds: f64,
    /// How far the best plan is above the bound, as a share of the bound; none without a plan.
    pub gap: Option<f64>,
    /// The best plans, fastest first.
    pub plans: Vec<ClusterPlan>,
    /// Where nothing fits, the combination that lacks the least memory.
    pub nearest: Option<ClusterPlan>,
}

/// How far a sweep is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SweepProgress {
    /// Combinations in all.
    pub candidates: usize,
    /// Combinations that are decided.
    pub decided: usize,
    /// Those of them that are no plan.
    pub pruned: Pruned,
    /// The fastest that fits so far, in seconds per iteration.
    pub best: Option<f64>,
    /// No layout can be faster.
    pub bound: f64,
}

/// What has been decided so far, shared by the threads of a sweep.
#[derive(Default)]
struct Tally {
    decided: usize,
    pruned: Pruned,
    best: Option<f64>,
}

impl Tally {
    fn add(&mut self, plan: Option<&ClusterPlan>) {
        self.decided += 1;
        match plan.map(|plan| &plan.prediction) {
            None => self.pruned.invalid += 1,
            Some(prediction) if !prediction.memory.fits => self.pruned.memory += 1,
            Some(prediction) => {
                let seconds = prediction.iteration_seconds;
                self.best = Some(self.best.map_or(seconds, |best| best.min(seconds)));
            }
        }
    }
}

/// Powers of two up to a number.
fn doublings(most: u64) -> Vec<u64> {
    std::iter::successors(Some(1u64), |n| n.checked_mul(2)).take_while(|n| *n <= most).collect()
}

/// The values of an axis: the asked one, or the offered ones.
fn axis<T: Clone>(asked: &Option<T>, offered: Vec<T>) -> Vec<T> {
    asked.clone().map_or(offered, |value| vec![value])
}

fn words(list: &[&str]) -> Vec<String> {
    list.iter().map(|word| (*word).to_owned()).collect()
}

/// Searches the axes that `request` leaves open and returns the `top` fastest layouts that fit.
///
/// # Errors
/// When the model or the cluster of the request cannot be had, or its batch is missing.
pub fn sweep_cluster(request: &ClusterRequest, physics: &Physics, top: usize) -> Result<ClusterSweep, RequestError> {
    sweep_clusters(std::slice::from_ref(request), physics, top)
}

/// The same over several requests for one model, batch and cluster: the combinations of a job's lists.
///
/// # Errors
/// As [`sweep_cluster`], and when there is no request or they differ in what is trained.
pub fn sweep_clusters(
    requests: &[ClusterRequest],
    physics: &Physics,
    top: usize,
) -> Result<ClusterSweep, RequestError> {
    sweep_clusters_while(requests, physics, top, &|_| true)
}

/// [`sweep_clusters`] that tells `progress` after every candidate, from any thread, and ends with what it has found when that
/// says `false`.
///
/// # Errors
/// As [`sweep_clusters`].
pub fn sweep_clusters_while(
    requests: &[ClusterRequest],
    physics: &Physics,
    top: usize,
    progress: &(dyn Fn(SweepProgress) -> bool + Sync),
) -> Result<ClusterSweep, RequestError> {
    let started = std::time::Instant::now();
    let Some(request) = requests.first() else { return Err(RequestError::Number { key: "model" }) };
    let same = |r: &ClusterRequest| {
        (&r.model, &r.cluster, r.nodes, r.gpus_per_node, r.seq, r.global_batch, &r.memory_limit)
            == (
                &request.model,
                &request.cluster,
                request.nodes,
                request.gpus_per_node,
                request.seq,
                request.global_batch,
                &request.memory_limit,
            )
    };
    if let Some(other) = requests.iter().find(|r| !same(r)) {
        return Err(RequestError::Word {
            key: "model, cluster, nodes, gpus_per_node, seq, global_batch, memory_limit",
            value: format!("{} on {}", other.model, other.cluster),
            allowed: "one value each; a search compares layouts of one job".into(),
        });
    }
    let model = Architecture::load(&request.model)?;
    let cluster = request.cluster()?;
    for (key, value) in [("seq", request.seq), ("global_batch", request.global_batch)] {
        if value == 0 {
            return Err(RequestError::Number { key });
        }
    }
    let gpus = request.nodes.unwrap_or(1) * u64::from(cluster.gpus_per_node);
    let node = u64::from(cluster.gpus_per_node);
    let candidates: Vec<ClusterRequest> =
        requests.iter().flat_map(|request| candidates(request, &model, gpus, node)).collect();
    if candidates.is_empty() && requests.iter().any(|request| request.keep_gathered == Some(true)) {
        let named = requests.iter().filter_map(|request| request.states.clone()).collect::<Vec<_>>().join(", ");
        return Err(RequestError::NothingGathered { states: named });
    }
    // A size of groups that suits no candidate is told as such.
    let layouts = || candidates.iter().map(|candidate| candidate.layout(&model, &cluster));
    if layouts().all(|layout| layout.is_err()) {
        let groups = |error: &RequestError| {
            matches!(error, RequestError::Layout(LayoutError::Group { .. }) | RequestError::NoGroups { .. })
        };
        if let Some(error) = layouts().filter_map(Result::err).find(groups) {
            return Err(error);
        }
    }
    let numerics =
        candidates.iter().find_map(|c| c.layout(&model, &cluster).ok()).map(|layout| layout.numerics.compute);
    let rate = super::stated_rate(&cluster.gpu, numerics) * gpus as f64;
    let bound = model.flops_per_token(request.seq, true) * (request.global_batch * request.seq) as f64 / rate;
    let tally = Mutex::new(Tally::default());
    let stopped = AtomicBool::new(false);
    let decide = |candidate: &ClusterRequest| {
        let layout = candidate.layout(&model, &cluster).ok()?;
        let prediction = predict_cluster(&model, &layout, &cluster, physics).ok()?;
        let configuration = ClusterRequest { dp: Some(layout.dp), chunks: Some(layout.chunks), ..candidate.clone() };
        let guideline = rank_layout(&model, &layout, &cluster, &prediction);
        Some(ClusterPlan { configuration, prediction, guideline })
    };
    let results: Vec<Option<ClusterPlan>> = candidates
        .par_iter()
        .filter_map(|candidate| {
            if stopped.load(Ordering::Relaxed) {
                return None;
            }
            let plan = decide(candidate);
            if let Ok(mut tally) = tally.lock() {
                tally.add(plan.as_ref());
                let Tally { decided, pruned, best } = *tally;
                let at = SweepProgress { candidates: candidates.len(), decided, pruned, best, bound };
                if !progress(at) {
                    stopped.store(true, Ordering::Relaxed);
                }
            }
            Some(plan)
        })
        .collect();
    let simulated = results.iter().flatten().count();
    let pruned = tally.into_inner().map_or(Pruned::default(), |tally| tally.pruned);
    let mut plans = Vec::new();
    let mut nearest: Option<ClusterPlan> = None;
    let lacking = |plan: &ClusterPlan| plan.prediction.memory.peak_bytes.iter().copied().fold(0.0, f64::max);
    for plan in results.into_iter().flatten() {
        if plan.prediction.memory.fits {
            plans.push(plan);
        } else if nearest.as_ref().is_none_or(|n| lacking(&plan) < lacking(n)) {
            nearest = Some(plan);
        }
    }
    plans.sort_by(|a, b| a.prediction.iteration_seconds.total_cmp(&b.prediction.iteration_seconds));
    plans.truncate(top);
    Ok(ClusterSweep {
        format: "paceline.plans/1",
        candidates: candidates.len(),
        simulated,
        pruned,
        search_seconds: started.elapsed().as_secs_f64(),
        bound_iteration_seconds: bound,
        gap: plans.first().map(|best| best.prediction.iteration_seconds / bound - 1.0),
        nearest: if plans.is_empty() { nearest } else { None },
        plans,
    })
}

/// Whether gathered parameters stay over the microbatches, where the request leaves it open and there are several: both, or in a
/// pipeline whose states are open too only that, since its ranks would gather for every pass. Nothing where they are asked to stay and
/// none is gathered.
fn kept(request: &ClusterRequest, states: &str, pp: u64, repeated: bool) -> Vec<Option<bool>> {
    let whole = states.parse::<StatePartition>().is_ok_and(|states| states.parameters == Level::Whole);
    match request.keep_gathered {
        Some(true) if whole => Vec::new(),
        Some(asked) => vec![Some(asked)],
        None if whole || !repeated => vec![None],
        None if pp > 1 && request.states.is_none() => vec![Some(true)],
        None => vec![None, Some(true)],
    }
}

fn candidates(request: &ClusterRequest, model: &Architecture, gpus: u64, node: u64) -> Vec<ClusterRequest> {
    let mut list = Vec::new();
    let mut tps = doublings(node.min(model.attention.heads()));
    tps.retain(|tp| model.attention.heads().is_multiple_of(*tp));
    let eps = match model.experts {
        Some(experts) => doublings(experts.count.min(gpus)),
        None => vec![1],
    };
    let pps: Vec<u64> = (1..=model.layers.min(gpus)).filter(|pp| gpus.is_multiple_of(*pp)).collect();
    for tp in axis(&request.tp, tps) {
        for pp in axis(&request.pp, pps.clone()) {
            let cp = request.cp.unwrap_or(1);
            if tp * cp * pp == 0 || !gpus.is_multiple_of(tp * cp * pp) {
                continue;
            }
            let replicas = gpus / (tp * cp * pp);
            for micro_batch in axis(&request.micro_batch, doublings((request.global_batch / replicas).min(16))) {
                for ep in axis(&request.ep, eps.clone()) {
                    // Groups differ from all ranks where replicas lie in several nodes.
                    let states = match (pp, tp * replicas > node) {
                        (1, false) => words(&["zero1", "zero3"]),
                        (1, true) => words(&["zero1", "NNI", "NII", "NIG", "mics", "IIG", "IGG", "zero3"]),
                        _ => words(&["zero1", "zero3"]),
                    };
                    let repeated = micro_batch.saturating_mul(replicas) < request.global_batch;
                    let choices = axis(&request.states, states).into_iter().flat_map(|states| {
                        kept(request, &states, pp, repeated).into_iter().map(move |kept| (states.clone(), kept))
                    });
                    for (states, kept) in choices {
                        for recompute in axis(&request.recompute, words(&["none", "selective", "full"])) {
                            let names = if pp > 1 {
                                words(&["1f1b", "interleaved", "zb-h1", "v-min", "v-half", "v-zb"])
                            } else {
                                words(&["1f1b"])
                            };
                            let cuts = words(if pp > 1 { &["even", "balanced"] } else { &["even"] });
                            let pairs = axis(&request.schedule, names).into_iter().flat_map(|schedule| {
                                axis(&request.partition, cuts.clone())
                                    .into_iter()
                                    .map(move |cut| (schedule.clone(), cut))
                            });
                            for (schedule, cut) in pairs {
                                list.push(ClusterRequest {
                                    tp: Some(tp),
                                    cp: Some(cp),
                                    pp: Some(pp),
                                    micro_batch: Some(micro_batch),
                                    ep: Some(ep),
                                    states: Some(states.clone()),
                                    keep_gathered: kept,
                                    recompute: Some(recompute.clone()),
                                    schedule: Some(schedule),
                                    partition: Some(cut),
                                    ..request.clone()
                                });
                            }
                        }
                    }
                }
            }
        }
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::states::rank;

    fn request(model: &str, nodes: u64) -> ClusterRequest {
        ClusterRequest {
            model: model.into(),
            cluster: "dgx-h100-ib".into(),
            nodes: Some(nodes),
            seq: 8192,
            global_batch: 128,
            ..ClusterRequest::default()
        }
    }

    #[test]
    fn the_best_plan_fits_and_is_no_faster_than_the_bound() {
        let sweep = sweep_cluster(&request("llama-3-70b", 8), &Physics::default(), 5).unwrap();
        assert_eq!(sweep.plans.len(), 5);
        let best = &sweep.plans[0];
        assert!(best.prediction.memory.fits && best.prediction.iteration_seconds > sweep.bound_iteration_seconds);
        assert!(sweep.gap.unwrap() > 0.0 && sweep.gap.unwrap() < 3.0, "{:?}", sweep.gap);
        assert!(sweep.pruned.memory > 0);
        assert_eq!(sweep.candidates, sweep.simulated + sweep.pruned.invalid);
        assert!(sweep.plans.windows(2).all(|w| w[0].prediction.iteration_seconds <= w[1].prediction.iteration_seconds));
        // The plan, asked for by itself, is predicted the same.
        let (model, layout, cluster) = best.configuration.resolve().unwrap();
        let again = predict_cluster(&model, &layout, &cluster, &Physics::default()).unwrap();
        assert_eq!(again, best.prediction);
    }

    #[test]
    fn where_nothing_fits_the_nearest_is_named() {
        let sweep = sweep_cluster(&request("llama-3.1-405b", 1), &Physics::default(), 5).unwrap();
        assert!(sweep.plans.is_empty() && sweep.gap.is_none());
        let nearest = sweep.nearest.unwrap();
        assert!(nearest.prediction.memory.peak_bytes[0] > nearest.prediction.memory.limit_bytes);
    }

    #[test]
    fn a_sweep_tells_how_far_it_is_and_ends_when_told() {
        let told = Mutex::new(Vec::new());
        let tell = |at: SweepProgress| {
            told.lock().unwrap().push(at);
            true
        };
        let sweep = sweep_clusters_while(&[request("llama-3-8b", 1)], &Physics::default(), 3, &tell).unwrap();
        let told = told.into_inner().unwrap();
        assert_eq!(told.len(), sweep.candidates);
        let last = told.iter().max_by_key(|at| at.decided).unwrap();
        assert_eq!((last.decided, last.pruned), (sweep.candidates, sweep.pruned));
        assert_eq!(last.best, Some(sweep.plans[0].prediction.iteration_seconds));
        assert_eq!(last.bound, sweep.bound_iteration_seconds);
        let stopped = sweep_clusters_while(&[request("llama-3-8b", 1)], &Physics::default(), 3, &|at| at.decided < 5);
        let stopped = stopped.unwrap();
        assert!(stopped.simulated + stopped.pruned.invalid < sweep.candidates, "{stopped:?}");
    }

    /// In a pipeline, parameters that are cut are gathered once an iteration or not cut at all; each plan carries what the guideline says.
    #[test]
    fn parameters_may_stay_gathered() {
        let asked = ClusterRequest { states: Some("zero3".into()), ..request("llama-3-70b", 8) };
        let kept = sweep_cluster(&asked, &Physics::default(), 1000).unwrap();
        assert!([None, Some(true)].iter().all(|k| kept.plans.iter().any(|p| p.configuration.keep_gathered == *k)));
        for plan in &kept.plans {
            assert_eq!(rank(&plan.configuration, &plan.prediction).unwrap(), plan.guideline);
        }
        let open = candidates(&request("llama-3-70b", 8), &Architecture::load("llama-3-70b").unwrap(), 64, 8);
        let piped = |c: &&ClusterRequest| c.pp != Some(1) && c.states.as_deref() == Some("zero3");
        assert!(open.iter().filter(piped).any(|c| c.keep_gathered == Some(true)));
        let fixed = ClusterRequest { keep_gathered: Some(false), ..asked };
        let fixed = sweep_cluster(&fixed, &Physics::default(), 1000).unwrap();
        assert!(fixed.plans.iter().all(|p| p.configuration.keep_gathered == Some(false)));
        // Asked to stay, they are cut in every plan; a list leaves out what gathers none, and is refused where nothing is left.
        let stay = |states: &str| ClusterRequest {
            states: Some(states.into()),
            keep_gathered: Some(true),
            ..request("llama-3-8b", 2)
        };
        let open = ClusterRequest { states: None, ..stay("") };
        let open = candidates(&open, &Architecture::load("llama-3-8b").unwrap(), 16, 8);
        let cut =
            |c: &ClusterRequest| c.states.as_ref().is_some_and(|states| !states.starts_with('N') && states != "zero1");
        assert!(!open.is_empty() && open.iter().all(|c| cut(c) && c.keep_gathered == Some(true)));
        let listed = sweep_clusters(&[stay("zero1"), stay("zero3")], &Physics::default(), 1000).unwrap();
        assert!(
            !listed.plans.is_empty() && listed.plans.iter().all(|p| p.configuration.states.as_deref() == Some("zero3"))
        );
        let refused = sweep_clusters(&[stay("zero1"), stay("NII")], &Physics::default(), 3).unwrap_err().to_string();
        assert!(refused.contains("keep_gathered = true with states = zero1, NII"), "{refused}");
        // Groups of seven suit no number of ranks.
        let seven = ClusterRequest { group_size: Some(7), ..request("llama-3-8b", 2) };
        let refused = sweep_cluster(&seven, &Physics::default(), 3).unwrap_err().to_string();
        assert!(refused.contains("group_size = 7 does not divide"), "{refused}");
    }

    #[test]
    fn fixed_axes_stay_fixed() {
        let asked = ClusterRequest { tp: Some(4), recompute: Some("full".into()), ..request("mixtral-8x7b", 4) };
        let sweep = sweep_cluster(&asked, &Physics::default(), 100).unwrap();
        assert!(!sweep.plans.is_empty());
        assert!(sweep.plans.iter().all(|p| p.configuration.tp == Some(4)));
        assert!(sweep.plans.iter().all(|p| p.configuration.recompute.as_deref() == Some("full")));
    }
}
