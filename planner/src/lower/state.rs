//! What follows the passes: gradients are reduced over the holders of the same parameters, their norm is summed, the
//! optimizer updates, and shards are gathered.
//!
//! The collectives of a rank run one after the other, so all ranks must agree on one order. With one copy of the model, ranks
//! that reduce together have the same program, and a unit is reduced when its gradient is complete. With two copies running
//! against each other, they agree on the order of layers. Tied matrices are summed after that, before the units that hold
//! them are reduced, so that both copies take the same sum and stay equal under a sharded optimizer too.

use super::LowerError;
use super::draft::{Draft, DraftOp, Handle};
use super::grid::Grid;
use super::sizes::Sizes;
use paceline_sim::program::{Collective, MemoryClass, OpKind, Payload, Stream, Tensor};
use paceline_sim::units::{BufferId, GroupId, StageId};
use std::collections::{BTreeMap, HashMap};

/// A unit of a rank with its persistent buffers.
struct Held {
    stage: StageId,
    unit: u16,
    parameters: BufferId,
    gradients: BufferId,
    moments: BufferId,
    /// The place of the op that completes the gradient; the first place where no pass makes any.
    ready: usize,
    /// Bytes of the copy of a tied matrix in it.
    tied: Option<u64>,
}

/// Adds the end of a step to a draft that has its passes and messages.
pub(super) fn close_step(
    draft: &mut Draft,
    grid: &Grid,
    data: u32,
    pipeline: u32,
    stages: &[StageId],
    sizes: &Sizes,
) -> Result<(), LowerError> {
    let mut units = hold(draft, grid, data, stages, sizes)?;
    if units.is_empty() {
        return Ok(());
    }
    match grid.copies() {
        1 => units.sort_by_key(|held| held.ready),
        _ => units.sort_by_key(|held| (grid.layers_of(held.stage), held.unit)),
    }
    let end = draft.ops.iter().map(|op| op.action + 1).max().unwrap_or(0);
    let mut reduced: Vec<Handle> = Vec::new();
    let mut insertions: BTreeMap<usize, Vec<Handle>> = BTreeMap::new();
    let mut latest = 0;
    for held in units.iter().filter(|held| held.tied.is_none()) {
        let Some(group) = grid.reduction(held.stage) else { continue };
        latest = held.ready.max(latest);
        let action = draft.order.get(latest).map_or(end, |handle| draft.ops[handle.0].action);
        let handle = draft.add(reduction(draft, grid, held, group, action));
        insertions.entry(latest).or_default().push(handle);
        reduced.push(handle);
    }
    insert(draft, insertions);

    let mut tied: Vec<&Held> = units.iter().filter(|held| held.tied.is_some()).collect();
    tied.sort_by_key(|held| grid.copy_of(held.stage));
    for held in tied {
        let (Some(bytes), Some(group)) = (held.tied, grid.tie(data, held.stage)) else { continue };
        let kind = OpKind::Collective {
            collective: Collective::AllReduce,
            group,
            payload: Payload::TiedEmbedding,
            buffer: held.gradients,
            bytes,
        };
        reduced.push(push(draft, Stream::COLLECTIVE, kind, end, [held.gradients]));
    }
    for held in units.iter().filter(|held| held.tied.is_some()) {
        let Some(group) = grid.reduction(held.stage) else { continue };
        let op = reduction(draft, grid, held, group, end);
        reduced.push(draft.push(op));
    }

    let norm = draft.buffer(Tensor::GradientNorm, MemoryClass::CommScratch, 8)?;
    let gradients = units.iter().map(|held| held.gradients);
    let counted = push(draft, Stream::COMPUTE, OpKind::GradientNorm, end, gradients.chain([norm]));
    draft.op(counted).waits = reduced;
    let summed = grid.norm(data).map(|group| {
        let kind = OpKind::Collective {
            collective: Collective::AllReduce,
            group,
            payload: Payload::GradientNorm,
            buffer: norm,
            bytes: 8,
        };
        push(draft, Stream::COLLECTIVE, kind, end, [norm])
    });
    debug_assert!(summed.is_some() || (grid.rank(data, pipeline).0 == data && !grid.sharded()));

    // The optimizer goes through the layers from the first on, gathering each unit behind its update.
    units.sort_by_key(|held| match grid.copies() {
        1 => (held.stage.index(), held.unit),
        _ => (grid.layers_of(held.stage), held.unit),
    });
    for held in &units {
        let &Held { stage, unit, parameters, gradients, moments, .. } = held;
        let kind = OpKind::Optimizer { stage, unit };
        let update = push(draft, Stream::COMPUTE, kind, end, [parameters, gradients, moments, norm]);
        draft.op(update).waits = summed.into_iter().collect();
        if let Some(group) = grid.reduction(stage).filter(|_| grid.sharded()) {
            let kind = OpKind::Collective {
                collective: Collective::AllGather,
                group,
                payload: Payload::Parameters { stage, unit },
                buffer: parameters,
                bytes: draft.buffers[parameters.index()].bytes,
            };
            push(draft, Stream::COLLECTIVE, kind, end, [parameters]);
        }
    }
    Ok(())
}

/// Makes the persistent buffers, and says when the gradient of each unit is complete.
fn hold(draft: &mut Draft, grid: &Grid, data: u32, stages: &[StageId], sizes: &Sizes) -> Result<Vec<Held>, LowerError> {
    let mut units = Vec::new();
    let mut found: BTreeMap<(StageId, u16), [Option<BufferId>; 3]> = BTreeMap::new();
    for &stage in stages {
        for operand in sizes.persistent(stage, grid.shard(data, stage)) {
            let buffer = draft.buffer(operand.tensor, operand.class, operand.bytes)?;
            draft.persistent.push(buffer);
            let (unit, part) = match operand.tensor {
                Tensor::Parameters { unit, .. } => (unit, 0),
                Tensor::Gradients { unit, .. } => (unit, 1),
                Tensor::Moments { unit, .. } => (unit, 2),
                _ => continue,
            };
            found.entry((stage, unit)).or_default()[part] = Some(buffer);
        }
    }
    let mut last_use: HashMap<BufferId, usize> = HashMap::new();
    for (place, handle) in draft.order.iter().enumerate() {
        let op = &draft.ops[handle.0];
        if let OpKind::Compute { .. } = op.kind {
            last_use.extend(op.uses.iter().map(|&buffer| (buffer, place)));
        }
    }
    for ((stage, unit), buffers) in found {
        let [Some(parameters), Some(gradients), Some(moments)] = buffers else { continue };
        let ready = last_use.get(&gradients).copied().unwrap_or(0);
        let tied = sizes.tied(stage, unit);
        units.push(Held { stage, unit, parameters, gradients, moments, ready, tied });
    }
    Ok(units)
}

fn reduction(draft: &Draft, grid: &Grid, held: &Held, group: GroupId, action: usize) -> DraftOp {
    let &Held { stage, unit, gradients: buffer, .. } = held;
    let kind = OpKind::Collective {
        collective: if grid.sharded() { Collective::ReduceScatter } else { Collective::AllReduce },
        group,
        payload: Payload::Gradients { stage, unit },
        buffer,
        bytes: draft.buffers[buffer.index()].bytes,
    };
    let mut op = DraftOp::new(Stream::COLLECTIVE, kind, action);
    op.uses.push(buffer);
    op
}

fn push(
    draft: &mut Draft,
    stream: Stream,
    kind: OpKind,
    action: usize,
    uses: impl IntoIterator<Item = BufferId>,
) -> Handle {
    let mut op = DraftOp::new(stream, kind, action);
    op.uses.extend(uses);
    draft.push(op)
}

/// Puts ops behind the op at a place and behind the sends that follow it.
fn insert(draft: &mut Draft, insertions: BTreeMap<usize, Vec<Handle>>) {
    let old = std::mem::take(&mut draft.order);
    let mut due: Vec<Handle> = Vec::new();
    for (place, handle) in old.into_iter().enumerate() {
        if !matches!(draft.ops[handle.0].kind, OpKind::Send { .. }) {
            draft.order.append(&mut due);
        }
        draft.order.push(handle);
        due.extend(insertions.get(&place).into_iter().flatten());
    }
    draft.order.append(&mut due);
}
