//! Memory of a predicted iteration on a cluster: states, activations in flight under the schedule, buffers and work space.

use super::{MemoryClasses, MemoryParts, PredictError, ROUNDS, Stage, Timer, order};
use crate::replay::{StageMemory, peaks};
use paceline_profiles::Cluster;
use paceline_sim::cluster::memory::{RankParameters, states};
use paceline_sim::cluster::{Architecture, Layout, Partition, activations};
use paceline_sim::partition::Level;

/// Bytes that one microbatch keeps, by stage.
pub(super) fn kept(model: &Architecture, layout: &Layout, stages: &[Stage]) -> Vec<f64> {
    let kept_by = |stage: &Stage| {
        let mut known: [Option<f64>; 2] = [None; 2];
        let kept: f64 = stage
            .blocks
            .clone()
            .map(|l| {
                *known[usize::from(model.routed(l))].get_or_insert_with(|| activations::kept_by_block(model, layout, l))
            })
            .sum();
        kept + stage.embedding * activations::embedding(model, layout)
    };
    stages.iter().map(kept_by).collect()
}

/// The same from F to B and from B to W: B needs the input of every matrix no longer than W does; only what elementwise
/// operators kept is freed.
pub(super) fn stage_memory(kept: &[f64]) -> StageMemory {
    let until_w = kept.iter().map(|k| k * (1.0 - StageMemory::FREED_AT_B)).collect();
    StageMemory { until_b: kept.to_vec(), until_w, checkpoint: vec![0.0; kept.len()] }
}

/// What every pipeline rank holds at its highest.
pub(super) fn memory(
    timer: &Timer<'_>,
    cluster: &Cluster,
    stages: &[Stage],
    parameters: &[RankParameters],
    device_of: &[u32],
) -> Result<MemoryParts, PredictError> {
    let (model, layout, physics) = (timer.model, timer.layout, timer.physics);
    let kept = kept(model, layout, stages);
    let ranks = layout.pp as usize;
    let activations_peak: Vec<f64> = if ranks == 1 && layout.chunks == 1 {
        vec![kept[0]]
    } else {
        let rounds = layout.microbatches.min(ROUNDS * layout.pp + layout.microbatches % layout.pp);
        let order = order(layout, rounds)?;
        peaks(&order, &stage_memory(&kept)).peak
    };
    let held = cluster.gpu.memory_bytes() - physics.context;
    let limit = layout.memory_limit.map_or(held, |limit| limit.min(held));
    let mut parts = MemoryParts { limit_bytes: limit, fits: true, ..MemoryParts::default() };
    for (rank, in_flight) in activations_peak.into_iter().enumerate() {
        let mut classes = MemoryClasses { activations: in_flight, ..MemoryClasses::default() };
        if layout.partition == Partition::VocabularySpread {
            // One microbatch more is in flight while all ranks work on its logits (arXiv 2411.05288, section 4).
            classes.activations += kept[rank];
        }
        let mut held = RankParameters::default();
        let (mut work, mut embedding) = (0.0f64, 0.0f64);
        for n in (0..stages.len()).filter(|n| device_of[*n] as usize == rank) {
            held.dense += parameters[n].dense;
            held.routed += parameters[n].routed;
            held.largest_unit = held.largest_unit.max(parameters[n].largest_unit);
            if let Some(last) = stages[n].blocks.clone().last() {
                work = work.max(activations::working_set(model, layout, last));
            }
            work = work.max(stages[n].head * activations::loss(model, layout));
            if layout.sharding.parameters == Level::Whole {
                embedding = embedding.max(stages[n].embedding * activations::embedding_gradient(model, layout));
            }
        }
        let states = states(layout, &held, timer.groups.node);
        classes.parameters = states.parameters;
        classes.gradients = states.gradients;
        classes.optimizer = states.optimizer;
        classes.communication = states.communication;
        if layout.pp > 1 {
            // A received and a sent message each way.
            classes.communication +=
                4.0 * layout.numerics.activation * layout.tokens() * model.hidden as f64 / layout.sequence_cut();
        }
        classes.workspace = work + embedding;
        parts.allocated_bytes.push(classes.total());
        classes.overhead = physics.fragmentation * (classes.activations + classes.workspace + classes.communication);
        parts.fits &= classes.total() <= limit;
        parts.peak_bytes.push(classes.total());
        parts.by_class.push(classes);
    }
    Ok(parts)
}
