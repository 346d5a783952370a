//! Memory of a predicted iteration on a cluster: states, activations in flight under the schedule, buffers and work space.

use super::{MemoryClasses, MemoryParts, PredictError, ROUNDS, Stage, Timer, order};
use crate::replay::{StageMemory, peaks};
use paceline_profiles::{Cluster, Generation};
use paceline_sim::cluster::memory::{RankParameters, states};
use paceline_sim::cluster::{Architecture, Layout, MessageBuffers, Partition, Recompute, activations, work};
use paceline_sim::partition::Level;

/// Bytes that one microbatch keeps, by stage.
pub(super) fn kept(model: &Architecture, layout: &Layout, stages: &[Stage]) -> Vec<f64> {
    let kept_by = |stage: &Stage| {
        let again = stage.blocks.start + layout.recomputed(stage.blocks.end - stage.blocks.start);
        let mut known: [Option<f64>; 4] = [None; 4];
        let kept: f64 = stage
            .blocks
            .clone()
            .map(|l| {
                let (kind, recompute) = if l < again { (0, layout.recompute) } else { (2, Recompute::None) };
                *known[kind + usize::from(model.routed(l))]
                    .get_or_insert_with(|| activations::kept_under(model, layout, l, recompute))
            })
            .sum();
        let spread = layout.partition == Partition::VocabularySpread && stage.blocks.start == 0;
        // The sum of the embedding's parts over all ranks arrives in a tensor of its own.
        let arrived = if spread { layout.numerics.activation * layout.tokens() * model.hidden as f64 } else { 0.0 };
        kept + stage.embedding * activations::embedding(model, layout) + arrived
    };
    stages.iter().map(kept_by).collect()
}

/// The same from F to B and from B to W: B needs the input of every matrix no longer than W does; only what elementwise
/// operators kept is freed.
pub(super) fn stage_memory(kept: &[f64]) -> StageMemory {
    let until_w = kept.iter().map(|k| k * (1.0 - StageMemory::FREED_AT_B)).collect();
    StageMemory { until_b: kept.to_vec(), until_w, checkpoint: vec![0.0; kept.len()] }
}

/// Launches that wait for a GPU at most; then the host waits too (depth of CUDA's launch queue).
const LAUNCH_QUEUE: f64 = 1024.0;
/// Whole rows of the hidden width that collectives of a block's forward pass under sequence parallelism read or write: two gathered
/// inputs, and two outputs before they are summed and scattered.
const ROWS_OF_A_BLOCK: f64 = 4.0;

/// Pace of hosts, in seconds per step of a collective, from which on they are taken to wait for it.
const WAITING: f64 = 1e-4;

/// Memory of collectives that the host has given back and the GPU has not yet passed. The host runs ahead of the GPU where its
/// launches take less time than the kernels; at the start of a pipeline, where the GPU waits for the first gradients and
/// the host goes on; and where it goes on while gradients are reduced. At most by the launch queue.
fn freed_late(timer: &Timer<'_>, rank: u64, blocks: u64) -> f64 {
    let (model, layout) = (timer.model, timer.layout);
    if layout.messages == MessageBuffers::Shared || layout.tp == 1 || !layout.sp || blocks == 0 {
        return 0.0;
    }
    let work = work::block(model, layout, 0);
    let (forward, backward) = timer.launched(0);
    let in_flight = layout.microbatches.min(layout.pp - rank);
    let ahead = if layout.messages == MessageBuffers::FreedLateAcrossIterations {
        if timer.pace < WAITING { (blocks * layout.microbatches) as f64 } else { 0.0 }
    } else {
        // Between nodes, slow hosts hold up the messages themselves.
        let across = timer.groups.tensor.nodes() > 1;
        let held_up = if across { work.messages.tensor_calls * (layout.tp - 1) as f64 * timer.pace } else { 0.0 };
        let slack = (1.0 - (forward.host + held_up) / forward.gpu).max(0.0);
        // Until the first gradients have come from the ranks behind, the host has launched backward and forward passes in turn.
        let behind = layout.pp - 1 - rank;
        let turns = (behind as f64 * backward.host / (forward.host + backward.host)).floor();
        let waiting = turns.min(layout.microbatches.saturating_sub(in_flight) as f64);
        blocks as f64 * (slack * in_flight as f64).max(waiting)
    };
    let row = layout.numerics.activation * layout.tokens() * model.hidden as f64;
    ahead.min(LAUNCH_QUEUE / work.kernels) * ROWS_OF_A_BLOCK * row
}

/// Scratch memory of matrix libraries: a workspace per handle, of which the forward and the backward thread have one each (PyTorch's
/// defaults, `CUBLAS_WORKSPACE_CONFIG`: 32 MiB from Hopper on, 8 MiB and a bit before).
fn library_workspace(generation: Generation) -> f64 {
    let mib = match generation {
        Generation::Hopper | Generation::Blackwell => 32.0,
        Generation::Volta | Generation::Ampere | Generation::Ada => 8.125,
    };
    2.0 * mib * f64::from(1 << 20)
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
            // More microbatches are in flight while all ranks work on their logits (arXiv 2411.05288, sections 4 and 5).
            let own: f64 = (0..stages.len()).filter(|n| device_of[*n] as usize == rank).map(|n| kept[n]).sum();
            classes.activations += own * layout.vocabulary.microbatches(layout.pp);
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
            if layout.sharding.parameters == Level::Whole && layout.trained_share() > 0.0 {
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
        classes.workspace = work + embedding + library_workspace(cluster.gpu.generation);
        parts.allocated_bytes.push(classes.total());
        classes.overhead = physics.fragmentation * (classes.activations + classes.workspace + classes.communication);
        parts.fits &= classes.total() <= limit;
        // When memory is short, the allocator waits for the GPU and gets these back.
        let blocks = (0..stages.len())
            .filter(|n| device_of[*n] as usize == rank)
            .map(|n| stages[n].blocks.end - stages[n].blocks.start)
            .sum();
        classes.overhead += freed_late(timer, rank as u64, blocks).min((limit - classes.total()).max(0.0));
        parts.peak_bytes.push(classes.total());
        parts.by_class.push(classes);
    }
    Ok(parts)
}
