//! What follows the passes: gradients are reduced over the holders of the same parameters as the optimizer needs them, their
//! norm is summed, the optimizer updates, and updated parts are gathered.
//!
//! The collectives of a rank run one after the other, so all ranks must agree on one order. With one copy of the model, ranks
//! that reduce together have the same program, and a unit is reduced when its gradient is complete. With two copies running
//! against each other, they agree on the order of layers. Tied matrices are summed after that, before the units that hold
//! them are reduced, so that both copies take the same sum and stay equal under a sharded optimizer too.

use super::LowerError;
use super::draft::{Draft, DraftOp, Handle};
use super::gather::{Exchange, Shards, exchange, partition};
use super::grid::Grid;
use super::sizes::{Sizes, UnitSize};
use super::states::Sharing;
use paceline_sim::partition::exchange::Kind;
use paceline_sim::partition::{Level, StatePartition};
use paceline_sim::program::{Arrangement, Collective, MemoryClass, OpKind, Payload, Stream, Tensor};
use paceline_sim::units::{BufferId, StageId};
use std::collections::{BTreeMap, HashMap};

/// A unit of a rank with its persistent buffers.
struct Held {
    stage: StageId,
    unit: u16,
    /// Elements of its whole array.
    elements: u64,
    levels: StatePartition,
    /// The parameters that the rank keeps, whole or its part.
    parameters: BufferId,
    /// The parameters that the optimizer updates, where these are others.
    master: Option<BufferId>,
    /// The gradients that the rank accumulates, whole or its part.
    gradients: BufferId,
    /// The reduced gradients that the optimizer reads, where these are others.
    synced: Option<BufferId>,
    moments: BufferId,
    /// The place of the op that completes the gradient; the first place where none makes any.
    ready: usize,
    /// Bytes of the copy of a tied matrix in it.
    tied: Option<u64>,
}

/// Adds gathers and reductions to a draft that has its passes and messages, and the end of the step.
pub(super) fn close_step(
    draft: &mut Draft,
    grid: &Grid,
    data: u32,
    pipeline: u32,
    stages: &[StageId],
    sizes: &Sizes,
    sharing: Sharing,
) -> Result<(), LowerError> {
    let (mut units, frozen) = hold(draft, grid, data, stages, sizes);
    if units.is_empty() && frozen.is_empty() {
        return Ok(());
    }
    let parameters = units.iter().filter(|held| held.levels.parameters != Level::Whole).map(|held| {
        let tensor = Tensor::Parameters { stage: held.stage, unit: held.unit };
        (tensor, (held.parameters, held.elements))
    });
    let gradients = units.iter().filter(|held| held.levels.gradients != Level::Whole);
    let shards = Shards {
        parameters: parameters.chain(frozen).collect(),
        gradients: gradients.map(|held| ((held.stage, held.unit), (held.gradients, held.elements))).collect(),
    };
    partition(draft, grid, data, sizes, sharing, &shards);
    let mut last_use: HashMap<BufferId, (usize, Handle)> = HashMap::new();
    for (place, &handle) in draft.order.iter().enumerate() {
        let op = &draft.ops[handle.0];
        if let OpKind::Compute { .. } | OpKind::Collective { .. } = op.kind {
            last_use.extend(op.uses.iter().map(|&buffer| (buffer, (place, handle))));
        }
    }
    for held in &mut units {
        held.ready = last_use.get(&held.gradients).map_or(0, |&(place, _)| place);
    }
    match grid.copies() {
        1 => units.sort_by_key(|held| held.ready),
        _ => units.sort_by_key(|held| (grid.layers_of(held.stage), held.unit)),
    }
    let end = draft.ops.iter().map(|op| op.action + 1).max().unwrap_or(0);
    // Reductions under way at the end of accumulation, which the norm waits for.
    let reduces = |held: &&Held| held.levels.gradients != Level::Whole;
    let mut reduced: Vec<Handle> =
        units.iter().filter(reduces).filter_map(|held| last_use.get(&held.gradients).map(|last| last.1)).collect();
    let mut insertions: BTreeMap<usize, Vec<Handle>> = BTreeMap::new();
    let mut latest = 0;
    for held in units.iter_mut().filter(|held| held.tied.is_none()) {
        latest = held.ready.max(latest);
        let action = draft.order.get(latest).map_or(end, |handle| draft.ops[handle.0].action);
        for op in synchronise(draft, grid, data, held, action) {
            let handle = draft.add(op);
            insertions.entry(latest).or_default().push(handle);
            reduced.push(handle);
        }
    }
    draft.insert_behind(&insertions);

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
            arrangement: Arrangement::default(),
        };
        reduced.push(push(draft, Stream::COLLECTIVE, kind, end, [held.gradients]));
    }
    for held in units.iter_mut().filter(|held| held.tied.is_some()) {
        for op in synchronise(draft, grid, data, held, end) {
            reduced.push(draft.push(op));
        }
    }

    let norm = draft.buffer(Tensor::GradientNorm, MemoryClass::CommScratch, 8)?;
    let gradients = units.iter().map(|held| held.synced.unwrap_or(held.gradients));
    let counted = push(draft, Stream::COMPUTE, OpKind::GradientNorm, end, gradients.chain([norm]));
    draft.op(counted).waits = reduced;
    let summed = grid.norm(data).map(|group| {
        let kind = OpKind::Collective {
            collective: Collective::AllReduce,
            group,
            payload: Payload::GradientNorm,
            buffer: norm,
            bytes: 8,
            arrangement: Arrangement::default(),
        };
        push(draft, Stream::COLLECTIVE, kind, end, [norm])
    });
    debug_assert!(
        summed.is_some() || (grid.rank(data, pipeline).0 == data && grid.levels().optimizer() == Level::Whole)
    );

    // The optimizer goes through the layers from the first on, gathering each unit behind its update.
    units.sort_by_key(|held| match grid.copies() {
        1 => (held.stage.index(), held.unit),
        _ => (grid.layers_of(held.stage), held.unit),
    });
    let mut late = Vec::new();
    for held in &units {
        let &Held { stage, unit, parameters, gradients, moments, elements, .. } = held;
        let kind = OpKind::Optimizer { stage, unit };
        let apart = held.synced.into_iter().chain(held.master);
        let uses = [parameters, gradients, moments, norm].into_iter().chain(apart);
        let update = push(draft, Stream::COMPUTE, kind, end, uses);
        draft.op(update).waits = summed.into_iter().collect();
        if let Some(after) = held.levels.parameter_sync() {
            let at = Exchange {
                collective: collective(after.kind),
                scope: after.scope,
                payload: Payload::Parameters { stage, unit },
                buffer: parameters,
                shard: None,
            };
            match exchange(draft, grid, data, at, elements, end) {
                Some(op) if sharing.late_gather => late.push((parameters, DraftOp { action: 0, ..op })),
                Some(op) => drop(draft.push(op)),
                None => {}
            }
        }
    }
    gather_at_begin(draft, late);
    Ok(())
}

/// Puts the gathers of what the step before has updated before everything else, and whoever reads weights waits for theirs. A shard
/// is read by gathers only: its own goes before the first of these, on the same stream.
fn gather_at_begin(draft: &mut Draft, gathers: Vec<(BufferId, DraftOp)>) {
    let mut insertions: BTreeMap<usize, Vec<Handle>> = BTreeMap::new();
    for (weights, op) in gathers {
        let gather = draft.add(op);
        let mut reader = None;
        for place in 0..draft.order.len() {
            let handle = draft.order[place];
            let op = draft.op(handle);
            match op.kind {
                OpKind::Compute { .. } if op.uses.contains(&weights) => op.waits.push(gather),
                OpKind::Collective { arrangement, .. } if arrangement.shard == Some(weights) => {
                    reader.get_or_insert(place);
                }
                _ => {}
            }
        }
        insertions.entry(reader.unwrap_or(0)).or_default().push(gather);
    }
    draft.insert_before(insertions);
}

fn collective(kind: Kind) -> Collective {
    match kind {
        Kind::AllGather => Collective::AllGather,
        Kind::ReduceScatter => Collective::ReduceScatter,
        Kind::AllReduce => Collective::AllReduce,
    }
}

/// The kept parts of frozen parameters that passes have to gather: by the tensor that they read, with the elements of the whole.
type FrozenParts = Vec<(Tensor, (BufferId, u64))>;

/// Makes the persistent buffers: the units with anything trained, and of the frozen parameters those that are cut.
fn hold(draft: &mut Draft, grid: &Grid, data: u32, stages: &[StageId], sizes: &Sizes) -> (Vec<Held>, FrozenParts) {
    let (mut units, mut parts) = (Vec::new(), Vec::new());
    for &stage in stages {
        for UnitSize { unit, trained: elements, frozen } in sizes.units_with_parameters(stage) {
            if frozen > 0 {
                let level = grid.levels().unit(false).parameters;
                let whole = Tensor::Frozen { stage, unit };
                let tensor = if level == Level::Whole { whole } else { Tensor::FrozenShard { stage, unit } };
                let range = grid.cut(data, stage, frozen).range(level);
                let buffer = draft.keep(tensor, MemoryClass::Parameter, &range, 1);
                if level != Level::Whole {
                    parts.push((whole, (buffer, frozen)));
                }
            }
            if elements == 0 {
                continue;
            }
            let cut = grid.cut(data, stage, elements);
            let tied = sizes.tied(stage, unit);
            let levels = grid.levels().unit(tied.is_some());
            let StatePartition { parameters, gradients, optimizer } = levels;
            let name = |level: Level, whole, part| if level == Level::Whole { whole } else { part };
            let weights = name(parameters, Tensor::Parameters { stage, unit }, Tensor::ParameterShard { stage, unit });
            let weights = draft.keep(weights, MemoryClass::Parameter, &cut.range(parameters), 1);
            let sums = name(gradients, Tensor::Gradients { stage, unit }, Tensor::GradientShard { stage, unit });
            let sums = draft.keep(sums, MemoryClass::Gradient, &cut.range(gradients), 1);
            let own = cut.range(optimizer);
            let master = (optimizer < parameters || sizes.precision().has_master())
                .then(|| draft.keep(Tensor::Master { stage, unit }, MemoryClass::OptimizerState, &own, 1));
            let moments = draft.keep(Tensor::Moments { stage, unit }, MemoryClass::OptimizerState, &own, 2);
            units.push(Held {
                stage,
                unit,
                elements,
                levels,
                parameters: weights,
                master,
                gradients: sums,
                synced: None,
                moments,
                ready: 0,
                tied,
            });
        }
    }
    (units, parts)
}

/// The collectives that make of accumulated gradients what the optimizer reads.
fn synchronise(draft: &mut Draft, grid: &Grid, data: u32, held: &mut Held, action: usize) -> Vec<DraftOp> {
    let (stage, unit) = (held.stage, held.unit);
    let mut ops = Vec::new();
    for step in held.levels.gradient_sync() {
        if grid.sharers(step.scope, data, stage).is_none() {
            continue;
        }
        let (mut buffer, mut shard) = (held.gradients, None);
        if step.kind == Kind::AllGather {
            // From the part that was accumulated to the larger part that is updated.
            let array = grid.cut(data, stage, held.elements).array(step.scope);
            let tensor = Tensor::SyncedGradients { stage, unit };
            let synced = draft.another_of(tensor, MemoryClass::Gradient, array.end - array.start);
            draft.buffers[synced.index()].start = array.start;
            held.synced = Some(synced);
            (buffer, shard) = (synced, Some(held.gradients));
        }
        let at = Exchange {
            collective: collective(step.kind),
            scope: step.scope,
            payload: Payload::Gradients { stage, unit },
            buffer,
            shard,
        };
        ops.extend(exchange(draft, grid, data, at, held.elements, action));
    }
    ops
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
