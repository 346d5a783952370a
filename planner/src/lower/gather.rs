//! Passes over partitioned states: the parameters of a unit, trained and frozen ones each for themselves, are gathered before the passes that read them, so many passes ahead
//! as was asked for, and dropped after them; the gradients that passes make are whole, are reduced into the part that this
//! rank accumulates when the microbatch has made its last contribution, and are dropped when the reduction has ended.
//!
//! Gathers and reductions run on two streams, so that a gather which a pass waits for does not stand behind a reduction
//! that nobody waits for yet.

use super::draft::{Draft, DraftOp, Handle};
use super::grid::Grid;
use super::sizes::Sizes;
use super::states::Sharing;
use paceline_sim::partition::Level;
use paceline_sim::partition::exchange::Scope;
use paceline_sim::program::{Arrangement, Collective, MemoryClass, OpKind, Payload, Stream, Tensor};
use paceline_sim::units::{BufferId, MicrobatchId, StageId};
use std::collections::{BTreeMap, HashMap};

/// Passes after which the gradients of an earlier one must have been reduced: so long they may be under way beside the
/// gradients that the next pass makes.
const REDUCTION_WINDOW: usize = 1;

/// The communicators of a level's states.
pub(super) fn scope(level: Level) -> Option<Scope> {
    match level {
        Level::Whole => None,
        Level::Group => Some(Scope::Group),
        Level::Global => Some(Scope::World),
    }
}

/// A collective over the sharers of a unit, in whose array the rank's buffer `holds` a range.
pub(super) struct Exchange {
    pub collective: Collective,
    pub scope: Scope,
    pub payload: Payload,
    pub buffer: BufferId,
    pub shard: Option<BufferId>,
}

/// The op of an exchange; `None` where a rank shares with nobody.
pub(super) fn exchange(
    draft: &Draft,
    grid: &Grid,
    data: u32,
    at: Exchange,
    elements: u64,
    action: usize,
) -> Option<DraftOp> {
    let Exchange { collective, scope, payload, buffer, shard } = at;
    let (Payload::Gradients { stage, .. } | Payload::Parameters { stage, .. }) = payload else { return None };
    let group = grid.sharers(scope, data, stage)?;
    let cut = grid.cut(data, stage, elements);
    let array = cut.array(scope);
    let held = &draft.buffers[buffer.index()];
    let width = held.element.bytes();
    let bytes = width * (array.end - array.start);
    let usual = Arrangement::default().part_of(bytes, grid.size(group), width);
    let part = Some(width * cut.part(scope)).filter(|&part| part != usual);
    let arrangement = Arrangement {
        offset: width * (array.start - held.start),
        part,
        shard,
        algorithm: grid.levels().algorithm(scope),
    };
    let kind = OpKind::Collective { collective, group, payload, buffer, bytes, arrangement };
    let stream = if matches!(payload, Payload::Parameters { .. }) { Stream::GATHER } else { Stream::COLLECTIVE };
    let mut op = DraftOp::new(stream, kind, action);
    op.uses.push(buffer);
    op.uses.extend(shard);
    Some(op)
}

type Unit = (StageId, u16);

/// The persistent parts of partitioned states, made by the caller: with the elements of the whole.
pub(super) struct Shards {
    /// By the tensor that passes read.
    pub parameters: HashMap<Tensor, (BufferId, u64)>,
    /// By unit.
    pub gradients: HashMap<Unit, (BufferId, u64)>,
}

/// Puts gathers and reductions around the passes of a rank.
pub(super) fn partition(draft: &mut Draft, grid: &Grid, data: u32, sizes: &Sizes, sharing: Sharing, shards: &Shards) {
    gather_parameters(draft, grid, data, sizes, sharing, shards);
    reduce_gradients(draft, grid, data, sizes, shards);
}

/// The compute ops of a draft with their places.
fn passes(draft: &Draft) -> Vec<(usize, Handle)> {
    let passes = draft.order.iter().copied().enumerate();
    passes.filter(|(_, handle)| matches!(draft.ops[handle.0].kind, OpKind::Compute { .. })).collect()
}

fn gather_parameters(draft: &mut Draft, grid: &Grid, data: u32, sizes: &Sizes, sharing: Sharing, shards: &Shards) {
    let passes = passes(draft);
    let mut insertions: BTreeMap<usize, Vec<Handle>> = BTreeMap::new();
    // By tensor: the buffer gathered last, its gather, and the number of the pass that read it last.
    let mut gathered: HashMap<Tensor, (BufferId, Handle, usize)> = HashMap::new();
    for (number, &(_, pass)) in passes.iter().enumerate() {
        for place in 0..draft.ops[pass.0].uses.len() {
            let used = draft.ops[pass.0].uses[place];
            let tensor = draft.buffers[used.index()].tensor;
            let (Tensor::Parameters { stage, unit } | Tensor::Frozen { stage, unit }) = tensor else { continue };
            let Some(&(shard, elements)) = shards.parameters.get(&tensor) else { continue };
            let known = gathered.get(&tensor).copied();
            // Two passes in a row over one unit share a gather.
            let (buffer, gather) = match known.filter(|known| sharing.keep_gathered || known.2 + 1 >= number) {
                Some((buffer, gather, _)) => (buffer, gather),
                None => {
                    let buffer = match known {
                        None => used,
                        Some(_) => draft.another_of(tensor, MemoryClass::Parameter, elements),
                    };
                    let before = passes[number.saturating_sub(sharing.prefetch as usize)];
                    let level = grid.levels().unit(sizes.tied(stage, unit).is_some()).parameters;
                    let at = Exchange {
                        collective: Collective::AllGather,
                        scope: scope(level).unwrap_or(Scope::World),
                        payload: Payload::Parameters { stage, unit },
                        buffer,
                        shard: Some(shard),
                    };
                    let action = draft.ops[before.1.0].action;
                    let Some(op) = exchange(draft, grid, data, at, elements, action) else { continue };
                    let gather = draft.add(op);
                    insertions.entry(before.0).or_default().push(gather);
                    (buffer, gather)
                }
            };
            gathered.insert(tensor, (buffer, gather, number));
            let op = draft.op(pass);
            op.uses[place] = buffer;
            op.waits.push(gather);
        }
    }
    draft.insert_before(insertions);
}

fn reduce_gradients(draft: &mut Draft, grid: &Grid, data: u32, sizes: &Sizes, shards: &Shards) {
    let passes = passes(draft);
    // By unit and microbatch: the numbers of the passes that contribute.
    let mut makers: BTreeMap<(Unit, MicrobatchId), Vec<usize>> = BTreeMap::new();
    for (number, &(_, pass)) in passes.iter().enumerate() {
        let op = &draft.ops[pass.0];
        let OpKind::Compute { microbatch, .. } = op.kind else { continue };
        for buffer in &op.uses {
            if let Tensor::Gradients { stage, unit } = draft.buffers[buffer.index()].tensor
                && shards.gradients.contains_key(&(stage, unit))
            {
                makers.entry(((stage, unit), microbatch)).or_default().push(number);
            }
        }
    }
    // In the order of the reductions.
    let mut makers: Vec<_> = makers.into_iter().collect();
    makers.sort_by_key(|((unit, _), numbers)| (numbers.last().copied(), *unit));
    let mut behind: BTreeMap<usize, Vec<Handle>> = BTreeMap::new();
    // By the pass before which they are freed: reductions and the gradients that they reduced.
    let mut freed: BTreeMap<usize, Vec<(Handle, BufferId)>> = BTreeMap::new();
    let mut first: HashMap<Unit, ()> = HashMap::new();
    for (((stage, unit), _), numbers) in makers {
        let Some(&(shard, elements)) = shards.gradients.get(&(stage, unit)) else { continue };
        let tensor = Tensor::Gradients { stage, unit };
        let Some(original) = draft.find(tensor) else { continue };
        let buffer = match first.insert((stage, unit), ()) {
            None => original,
            Some(()) => draft.another_of(tensor, MemoryClass::Gradient, elements),
        };
        for &number in &numbers {
            let op = draft.op(passes[number].1);
            op.uses.iter_mut().filter(|used| **used == original).for_each(|used| *used = buffer);
        }
        let last = numbers.last().copied().unwrap_or(0);
        let level = grid.levels().unit(sizes.tied(stage, unit).is_some()).gradients;
        let at = Exchange {
            collective: Collective::ReduceScatter,
            scope: scope(level).unwrap_or(Scope::World),
            payload: Payload::Gradients { stage, unit },
            buffer,
            shard: Some(shard),
        };
        let action = draft.ops[passes[last].1.0].action;
        let Some(op) = exchange(draft, grid, data, at, elements, action) else { continue };
        let reduction = draft.add(op);
        behind.entry(passes[last].0).or_default().push(reduction);
        freed.entry(last + 1 + REDUCTION_WINDOW).or_default().push((reduction, buffer));
    }
    let end = draft.ops.iter().map(|op| op.action + 1).max().unwrap_or(0);
    let mut joins: BTreeMap<Handle, Handle> = BTreeMap::new();
    let mut last_join = DraftOp::new(Stream::COMPUTE, OpKind::Join, end);
    for (number, all) in freed {
        let target = passes.get(number).map(|&(_, pass)| pass);
        let action = target.map_or(end, |pass| draft.ops[pass.0].action);
        let mut join = DraftOp::new(Stream::COMPUTE, OpKind::Join, action);
        for (reduction, buffer) in all {
            join.waits.push(reduction);
            join.uses.push(buffer);
        }
        match target {
            Some(pass) => {
                let join = draft.add(join);
                joins.insert(pass, join);
            }
            None => {
                last_join.waits.append(&mut join.waits);
                last_join.uses.append(&mut join.uses);
            }
        }
    }
    draft.insert_behind(&behind);
    let places = draft.order.iter().enumerate();
    let before = places.filter_map(|(place, handle)| joins.get(handle).map(|&join| (place, vec![join])));
    let before: BTreeMap<usize, Vec<Handle>> = before.collect();
    draft.insert_before(before);
    if !last_join.waits.is_empty() {
        draft.push(last_join);
    }
}
