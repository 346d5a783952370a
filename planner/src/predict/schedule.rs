//! The schedule behind a prediction, pass by pass: what a timeline view shows.

use super::memory::{kept, stage_memory};
use super::{Architecture, Cluster, Layout, PassTimes, Physics, PredictError, Prepared, ends, order};
use crate::order::ComputeOrder;
use crate::replay::{Timing, memory_curve, replay};

/// Every pass of an iteration with its times, and what follows the last.
#[derive(Debug, Clone, PartialEq)]
pub struct ClusterSchedule {
    /// Which pass each pipeline rank computes next.
    pub order: ComputeOrder,
    /// Start and end of each, in seconds; sending a message on is part of the pass.
    pub timing: Timing,
    /// Times of the passes of each stage by part.
    pub passes: Vec<PassTimes>,
    /// Bytes of activations held while each pass runs, by rank and place in its list.
    pub activations: Vec<Vec<f64>>,
    /// After the last pass of a rank: exposed reduction and gathering of the data-parallel ranks, and the optimizer, in seconds.
    pub after: Vec<(f64, f64)>,
}

/// Replays every microbatch of the iteration that [`super::predict_cluster`] predicts, with the same times. (A prediction
/// replays a few rounds of a long iteration and continues at their pace, so its time may differ in the last digits.)
///
/// # Errors
/// As [`super::predict_cluster`].
pub fn schedule_cluster(
    model: &Architecture,
    layout: &Layout,
    cluster: &Cluster,
    physics: &Physics,
) -> Result<ClusterSchedule, PredictError> {
    let prepared = Prepared::new(model, layout, cluster, physics)?;
    let order = order(layout, layout.microbatches)?;
    let timing = replay(&order, &prepared.times())?;
    let activations = memory_curve(&order, &stage_memory(&kept(model, layout, &prepared.stages)));
    let ends = ends(&prepared.timer, &prepared.stages, &prepared.parameters, &prepared.passes, &prepared.device_of);
    Ok(ClusterSchedule {
        order: (*order).clone(),
        timing,
        passes: prepared.passes,
        activations,
        after: ends.data.into_iter().zip(ends.optimizer).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::{ClusterRequest, predict_cluster};
    use super::*;

    #[test]
    fn the_schedule_is_that_of_the_prediction() {
        let request = |pp, micro_batch, nodes| ClusterRequest {
            model: "llama-3-8b".into(),
            cluster: "dgx-h100-ib".into(),
            nodes: Some(nodes),
            seq: 4096,
            global_batch: 64,
            micro_batch: Some(micro_batch),
            tp: Some(2),
            pp: Some(pp),
            ..ClusterRequest::default()
        };
        for (pp, micro_batch, nodes) in [(1, 1, 1), (4, 1, 1), (8, 2, 4)] {
            let (model, layout, cluster) = request(pp, micro_batch, nodes).resolve().unwrap();
            let physics = Physics::default();
            let predicted = predict_cluster(&model, &layout, &cluster, &physics).unwrap();
            let schedule = schedule_cluster(&model, &layout, &cluster, &physics).unwrap();
            let actions: usize = schedule.order.actions.iter().map(Vec::len).sum();
            assert_eq!(actions as u64, 2 * pp * layout.microbatches);
            let last = schedule.after.iter().map(|(data, optimizer)| data + optimizer).fold(0.0, f64::max);
            let nodes = (layout.gpus() as f64 / 8.0).max(1.0);
            let whole = (schedule.timing.makespan() + last) * (1.0 + physics.jitter * nodes.log2());
            assert!((whole / predicted.iteration_seconds - 1.0).abs() < 1e-3, "{whole} {predicted:?}");
            for (held, classes) in schedule.activations.iter().zip(&predicted.memory.by_class) {
                let peak = held.iter().copied().fold(0.0, f64::max);
                assert!((peak / classes.activations - 1.0).abs() < 1e-9);
            }
        }
    }
}
