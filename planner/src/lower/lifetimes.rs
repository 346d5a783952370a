//! When buffers live: from the first op that uses them to the last. A communication op does not free, because the rank goes
//! on while it runs; what it used is freed by a pass that comes after it anyway (see [`super::receipts`]), or at the end of
//! the step.

use super::draft::{Draft, DraftOp, Handle};
use super::receipts::Receipts;
use paceline_sim::program::{OpKind, Stream};
use std::collections::HashSet;

/// Where a buffer's life ends.
#[derive(Clone, Copy, PartialEq)]
enum End {
    /// Behind this place at the earliest.
    At(usize),
    /// With the step.
    Step,
}

impl End {
    fn later(self, other: End) -> End {
        match (self, other) {
            (End::At(a), End::At(b)) => End::At(a.max(b)),
            _ => End::Step,
        }
    }
}

/// Fills in `alloc` and `free`, adds the waits for sends, and closes the step with a join where something is still under way.
pub(super) fn derive(draft: &mut Draft, receipts: &Receipts) {
    let passes = places_of_actions(draft);
    let buffers = draft.buffers.len();
    let mut lives = vec![true; buffers];
    draft.persistent.iter().for_each(|buffer| lives[buffer.index()] = false);
    let mut first: Vec<Option<usize>> = vec![None; buffers];
    let mut end = vec![End::At(0); buffers];
    let mut sent: Vec<Vec<Handle>> = vec![Vec::new(); buffers];
    for (place, &handle) in draft.order.iter().enumerate() {
        let op = &draft.ops[handle.0];
        for buffer in &op.uses {
            let b = buffer.index();
            first[b].get_or_insert(place);
            let until = match op.kind {
                OpKind::Send { message, .. } => {
                    sent[b].push(handle);
                    let known = receipts.get(&message).and_then(|&action| passes.get(action).copied().flatten());
                    known.map_or(End::Step, End::At)
                }
                _ if op.computes() => End::At(place),
                _ => continue,
            };
            end[b] = end[b].later(until);
        }
    }
    let mut leftovers = Vec::new();
    for b in (0..buffers).filter(|&b| lives[b]) {
        let Some(first) = first[b] else { continue };
        let buffer = paceline_sim::units::BufferId(b as u32);
        let allocating = draft.order[first];
        draft.op(allocating).alloc.push(buffer);
        match end[b] {
            End::At(place) => {
                let freeing = draft.order[place];
                let op = draft.op(freeing);
                op.free.push(buffer);
                op.uses.push(buffer);
                op.waits.extend(&sent[b]);
            }
            End::Step => leftovers.push(buffer),
        }
    }
    let awaited: HashSet<Handle> =
        draft.order.iter().flat_map(|handle| draft.ops[handle.0].waits.iter().copied()).collect();
    let under_way: Vec<Handle> = draft
        .order
        .iter()
        .copied()
        .filter(|handle| !draft.ops[handle.0].computes() && !awaited.contains(handle))
        .collect();
    if !leftovers.is_empty() || !under_way.is_empty() {
        let mut join = DraftOp::new(Stream::COMPUTE, OpKind::Join, usize::MAX);
        join.uses = leftovers.clone();
        join.free = leftovers.into();
        join.waits = under_way;
        draft.push(join);
    }
}

/// By action: the place of the first pass that belongs to it or to a later one.
fn places_of_actions(draft: &Draft) -> Vec<Option<usize>> {
    let mut places: Vec<Option<usize>> = Vec::new();
    for (place, handle) in draft.order.iter().enumerate() {
        let op = &draft.ops[handle.0];
        if let OpKind::Compute { .. } = op.kind {
            if op.action >= places.len() {
                places.resize(op.action + 1, None);
            }
            places[op.action].get_or_insert(place);
        }
    }
    let mut next = None;
    for place in places.iter_mut().rev() {
        *place = [*place, next].into_iter().flatten().min();
        next = *place;
    }
    places
}
