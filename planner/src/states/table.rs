//! A job under each of the 27 state partitions: predicted, and ranked by the closed-form guideline.

use super::guideline::{Guideline, GuidelineParts};
use crate::predict::{ClusterPrediction, ClusterRequest, PredictError, RequestError, predict_cluster};
use paceline_profiles::Cluster;
use paceline_sim::cluster::{Architecture, Layout, Physics};
use paceline_sim::partition::{StatePartition, dominance};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A job under one state partition.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StateRow {
    /// Its letters: parameters, gradients, optimizer states.
    pub triple: String,
    /// What the field calls it.
    pub names: Vec<&'static str>,
    /// Whether no finer one takes no more time on any network.
    pub effective: bool,
    /// The finer one that never takes more time, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dominated_by: Option<String>,
    /// Whether every rank fits.
    pub fits: bool,
    /// Highest memory of any rank, everything included.
    pub memory_bytes: f64,
    /// Parameters, gradients and optimizer states of the rank with most of them.
    pub state_bytes: f64,
    /// Predicted time of a step.
    pub iteration_seconds: f64,
    /// Sequences per second over all GPUs.
    pub samples_per_second: f64,
    /// The guideline's log(1/T).
    pub indicator: f64,
    /// The guideline's T: the longer of communication and computation.
    pub guideline_seconds: f64,
    /// Where the step goes.
    pub parts: StateParts,
}

/// Parts of a step, in seconds. What communication takes is given as if it were alone; `exposed` is what it costs.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct StateParts {
    /// Forward and backward passes, recomputation included.
    pub compute: f64,
    /// The optimizer.
    pub optimizer: f64,
    /// Gathering parameters before the passes, over all microbatches.
    pub parameter_gather: f64,
    /// Reducing gradients after the passes, over all microbatches.
    pub gradient_reduction: f64,
    /// Gradients once at the end of accumulation.
    pub gradient_sync: f64,
    /// Parameters once after the optimizer.
    pub parameter_sync: f64,
    /// Communication between replicas that nothing hides.
    pub exposed: f64,
    /// The same terms by the guideline's formulas.
    pub guideline: GuidelineParts,
}

/// A job whose states cannot be tabulated.
#[derive(Debug, Error)]
pub enum StatesError {
    /// The job.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// Its prediction.
    #[error(transparent)]
    Predict(#[from] PredictError),
}

/// The job under all 27, whichever it asks for. Gathered parameters that are to stay do so where some are gathered.
///
/// # Errors
/// When the job is no job.
pub fn tabulate(request: &ClusterRequest, physics: &Physics) -> Result<Vec<StateRow>, StatesError> {
    let (model, layout, cluster) = any_states(request)?.resolve()?;
    StatePartition::all()
        .map(|triple| {
            let layout = Layout { sharding: triple, ..layout.clone() };
            Ok(row(&model, &layout, &cluster, physics)?)
        })
        .collect()
}

/// The job under states that contradict none of its other keys. Its own have to be states all the same.
pub(super) fn any_states(request: &ClusterRequest) -> Result<ClusterRequest, RequestError> {
    if let Some(states) = &request.states {
        states.parse::<StatePartition>()?;
    }
    Ok(ClusterRequest { states: Some("zero3".into()), ..request.clone() })
}

/// What the closed-form guideline says of a job whose time is predicted.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct GuidelineRank {
    /// The published indicator, log(1/T): the higher, the better.
    pub indicator: f64,
    /// Its T: the longer of communication and computation, in seconds.
    pub seconds: f64,
    /// Communication of a step by the guideline, in seconds.
    pub communication: f64,
}

/// The guideline for a job, with the computation that was predicted for it.
///
/// # Errors
/// When the job is no job.
pub fn rank(request: &ClusterRequest, prediction: &ClusterPrediction) -> Result<GuidelineRank, RequestError> {
    let (model, layout, cluster) = request.resolve()?;
    Ok(rank_layout(&model, &layout, &cluster, prediction))
}

/// The same for a layout at hand.
pub fn rank_layout(
    model: &Architecture,
    layout: &Layout,
    cluster: &Cluster,
    prediction: &ClusterPrediction,
) -> GuidelineRank {
    guideline(model, layout, cluster, prediction.time.compute + prediction.time.recompute).rank(&layout.sharding)
}

impl Guideline {
    /// What it says of a triple.
    pub(super) fn rank(&self, triple: &StatePartition) -> GuidelineRank {
        GuidelineRank {
            indicator: self.indicator(triple),
            seconds: self.seconds(triple),
            communication: self.parts(triple).communication,
        }
    }
}

/// The guideline's inputs for a layout: one pipeline rank's share of the model, and computation as predicted.
fn guideline(model: &Architecture, layout: &Layout, cluster: &Cluster, compute: f64) -> Guideline {
    let group = layout.group_ranks(u64::from(cluster.gpus_per_node));
    let inside = cluster.intra_gbps * 1e9;
    let one_node = layout.gpus() <= u64::from(cluster.gpus_per_node);
    let parameters = model.parameters() as f64 / (layout.tp * layout.pp) as f64;
    Guideline {
        ranks: layout.data_ranks() as f64,
        group: group as f64,
        across: if one_node { inside } else { cluster.inter_gbps * 1e9 },
        inside,
        parameters,
        trainable: parameters * layout.trainable,
        microbatches: layout.microbatches as f64,
        wire: layout.numerics.parameter.min(layout.numerics.activation),
        compute,
    }
}

fn row(model: &Architecture, layout: &Layout, cluster: &Cluster, physics: &Physics) -> Result<StateRow, PredictError> {
    let prediction = predict_cluster(model, layout, cluster, physics)?;
    let triple = layout.sharding;
    let compute = prediction.time.compute + prediction.time.recompute;
    let guideline = guideline(model, layout, cluster, compute);
    let alone = prediction.exchanges;
    let highest = prediction.memory.peak_bytes.iter().copied().fold(0.0, f64::max);
    let held = prediction.memory.by_class.iter().map(|c| c.parameters + c.gradients + c.optimizer).fold(0.0, f64::max);
    let dominator = dominance::dominator(&triple);
    Ok(StateRow {
        triple: triple.letters(),
        names: triple.names().collect(),
        effective: dominator.is_none(),
        dominated_by: dominator.map(|by| by.letters()),
        fits: prediction.memory.fits,
        memory_bytes: highest,
        state_bytes: held,
        iteration_seconds: prediction.iteration_seconds,
        samples_per_second: layout.global_batch() as f64 / prediction.iteration_seconds,
        indicator: guideline.indicator(&triple),
        guideline_seconds: guideline.seconds(&triple),
        parts: StateParts {
            compute,
            optimizer: prediction.time.optimizer,
            parameter_gather: alone.parameter_gather,
            gradient_reduction: alone.gradient_reduction,
            gradient_sync: alone.gradient_sync,
            parameter_sync: alone.parameter_sync,
            exposed: prediction.time.exposed_dp,
            guideline: guideline.parts(&triple),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::states::published::published_job;

    /// A plan shows what the table of all 27 shows for its triple.
    #[test]
    fn a_plan_and_the_table_agree_on_the_guideline() {
        let physics = Physics::default();
        let rows = tabulate(&published_job("llama-7b", "1/16"), &physics).unwrap();
        for triple in ["NII", "IIG", "GGG"] {
            let job = ClusterRequest { states: Some(triple.into()), ..published_job("llama-7b", "1/16") };
            let (model, layout, cluster) = job.resolve().unwrap();
            let prediction = predict_cluster(&model, &layout, &cluster, &physics).unwrap();
            let found = rank(&job, &prediction).unwrap();
            let row = rows.iter().find(|row| row.triple == triple).unwrap();
            assert_eq!((found.indicator, found.seconds), (row.indicator, row.guideline_seconds), "{triple}");
            assert_eq!(found.communication, row.parts.guideline.communication);
        }
    }
}
