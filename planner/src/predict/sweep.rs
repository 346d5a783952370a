//! The best layouts of a model on a cluster: every combination of the axes that the request leaves open, each predicted.

use super::request::{ClusterRequest, RequestError};
use super::{ClusterPrediction, predict_cluster};
use paceline_sim::cluster::{Architecture, Layout, Physics};
use rayon::prelude::*;
use serde::Serialize;

/// A layout that fits, and its prediction.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ClusterPlan {
    /// The request with every axis set.
    pub configuration: ClusterRequest,
    /// What it is predicted to take.
    pub prediction: ClusterPrediction,
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
    let results: Vec<Option<(Layout, ClusterPlan)>> = candidates
        .par_iter()
        .map(|candidate| {
            let layout = candidate.layout(&model, &cluster).ok()?;
            let prediction = predict_cluster(&model, &layout, &cluster, physics).ok()?;
            let configuration =
                ClusterRequest { dp: Some(layout.dp), chunks: Some(layout.chunks), ..candidate.clone() };
            Some((layout, ClusterPlan { configuration, prediction }))
        })
        .collect();
    let mut pruned = Pruned::default();
    let mut plans = Vec::new();
    let mut nearest: Option<ClusterPlan> = None;
    let lacking = |plan: &ClusterPlan| plan.prediction.memory.peak_bytes.iter().copied().fold(0.0, f64::max);
    for result in &results {
        match result {
            None => pruned.invalid += 1,
            Some((_, plan)) if plan.prediction.memory.fits => plans.push(plan.clone()),
            Some((_, plan)) => {
                pruned.memory += 1;
                if nearest.as_ref().is_none_or(|n| lacking(plan) < lacking(n)) {
                    nearest = Some(plan.clone());
                }
            }
        }
    }
    plans.sort_by(|a, b| a.prediction.iteration_seconds.total_cmp(&b.prediction.iteration_seconds));
    plans.truncate(top);
    let tokens = (request.global_batch * request.seq) as f64;
    let numerics = results.iter().flatten().next().map(|(layout, _)| layout.numerics.compute);
    let rate = super::stated_rate(&cluster.gpu, numerics) * gpus as f64;
    let bound = model.flops_per_token(request.seq, true) * tokens / rate;
    Ok(ClusterSweep {
        format: "paceline.plans/1",
        candidates: candidates.len(),
        simulated: results.iter().flatten().count(),
        pruned,
        search_seconds: started.elapsed().as_secs_f64(),
        bound_iteration_seconds: bound,
        gap: plans.first().map(|best| best.prediction.iteration_seconds / bound - 1.0),
        nearest: if plans.is_empty() { nearest } else { None },
        plans,
    })
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
                    let states = if pp == 1 { words(&["zero1", "zero3"]) } else { words(&["zero1"]) };
                    for states in axis(&request.states, states) {
                        for recompute in axis(&request.recompute, words(&["none", "selective", "full"])) {
                            let names =
                                if pp > 1 { words(&["1f1b", "interleaved", "zb-h1"]) } else { words(&["1f1b"]) };
                            for schedule in axis(&request.schedule, names) {
                                list.push(ClusterRequest {
                                    tp: Some(tp),
                                    cp: Some(cp),
                                    pp: Some(pp),
                                    micro_batch: Some(micro_batch),
                                    ep: Some(ep),
                                    states: Some(states.clone()),
                                    recompute: Some(recompute.clone()),
                                    schedule: Some(schedule),
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
    fn fixed_axes_stay_fixed() {
        let asked = ClusterRequest { tp: Some(4), recompute: Some("full".into()), ..request("mixtral-8x7b", 4) };
        let sweep = sweep_cluster(&asked, &Physics::default(), 100).unwrap();
        assert!(!sweep.plans.is_empty());
        assert!(sweep.plans.iter().all(|p| p.configuration.tp == Some(4)));
        assert!(sweep.plans.iter().all(|p| p.configuration.recompute.as_deref() == Some("full")));
    }
}
