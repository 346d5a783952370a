//! Sends and receives between stages on different ranks.
//!
//! A send follows its pass. A receive is posted one action before the pass that needs it, so that the message travels
//! while the rank computes; the receives of an edge are posted in the order in which the peer sends, so that one message
//! in flight per edge is enough to go on. Each edge (direction, peer, in or out) has its stream: a message never waits
//! behind one that has nothing to do with it.

use super::LowerError;
use super::draft::{Draft, DraftOp, Handle};
use super::sizes::Sizes;
use crate::order::ComputeOrder;
use paceline_sim::program::{Direction, Message, OpKind, Pass, Stream, Tensor};
use paceline_sim::units::{BufferId, RankId, StageId};
use std::collections::{BTreeMap, HashMap};

/// An edge as one rank sees it.
type Edge = (Direction, u32, bool);

/// A receive before it has a place.
struct Arrival {
    message: Message,
    peer: u32,
    buffer: BufferId,
    /// The op that waits for it.
    consumer: Handle,
    /// The action before which it is posted.
    posted: usize,
}

/// Puts the messages of a pipeline rank into its draft.
pub(super) fn connect(draft: &mut Draft, order: &ComputeOrder, device: usize, sizes: &Sizes) -> Result<(), LowerError> {
    let placement = &sizes.placement;
    let device_of = |stage: StageId| placement.device_of_stage[stage.index()];
    let mut first_op: HashMap<usize, Handle> = HashMap::new();
    let mut last_op: HashMap<usize, Handle> = HashMap::new();
    for &handle in &draft.order {
        let action = draft.ops[handle.0].action;
        first_op.entry(action).or_insert(handle);
        last_op.insert(action, handle);
    }
    let sent = sending_places(order, device as u32);

    let mut sends: HashMap<Handle, (u32, Message, BufferId)> = HashMap::new();
    let mut arrivals: BTreeMap<Edge, Vec<(usize, Arrival)>> = BTreeMap::new();
    for (place, action) in order.actions[device].iter().enumerate() {
        let (stage, microbatch) = (action.stage, action.microbatch);
        let before = (!placement.is_first(stage)).then(|| StageId(stage.0 - 1));
        let after = (!placement.is_last(stage)).then(|| StageId(stage.0 + 1));
        let (direction, from, to, enters, leaves) = match action.pass {
            Pass::F => {
                let (enters, leaves) =
                    (Tensor::StageInput { stage, microbatch }, Tensor::StageOutput { stage, microbatch });
                (Direction::Forward, before, after, enters, leaves)
            }
            Pass::B | Pass::BW => {
                let (enters, leaves) =
                    (Tensor::OutputGradient { stage, microbatch }, Tensor::InputGradient { stage, microbatch });
                (Direction::Backward, after, before, enters, leaves)
            }
            Pass::W | Pass::R => continue,
        };
        let elsewhere = |stage: &StageId| device_of(*stage) as usize != device;
        if let (Some(from), Some(buffer), Some(&consumer)) =
            (from.filter(elsewhere), draft.find(enters), first_op.get(&place))
        {
            let message = Message { direction, stage, microbatch };
            let peer = device_of(from);
            let arrival = Arrival { message, peer, buffer, consumer, posted: place.saturating_sub(1) };
            let sent = sent.get(&message).copied().unwrap_or(0);
            arrivals.entry((direction, peer, false)).or_default().push((sent, arrival));
        }
        if let (Some(to), Some(buffer), Some(&last)) = (to.filter(elsewhere), draft.find(leaves), last_op.get(&place)) {
            let message = Message { direction, stage: to, microbatch };
            sends.insert(last, (device_of(to), message, buffer));
        }
    }

    let edges: std::collections::BTreeSet<Edge> = arrivals
        .keys()
        .copied()
        .chain(sends.values().map(|(peer, message, _)| (message.direction, *peer, true)))
        .collect();
    let most = usize::from(u8::MAX - Stream::FIRST_EDGE) + 1;
    if edges.len() > most {
        return Err(LowerError::TooManyEdges { rank: device, most });
    }
    let stream = |edge: Edge| {
        let number = edges.iter().position(|e| *e == edge).unwrap_or(0);
        Stream(Stream::FIRST_EDGE + number as u8)
    };

    // A receive is posted no later than those behind it in its stream.
    let mut posts: BTreeMap<usize, Vec<(Edge, Arrival)>> = BTreeMap::new();
    for (edge, mut list) in arrivals {
        list.sort_by_key(|(sent, _)| *sent);
        let mut latest = usize::MAX;
        for (_, arrival) in list.iter_mut().rev() {
            latest = latest.min(arrival.posted);
            arrival.posted = latest;
        }
        for (_, arrival) in list {
            posts.entry(arrival.posted).or_default().push((edge, arrival));
        }
    }

    let passes = std::mem::take(&mut draft.order);
    let mut posts = posts.into_iter().peekable();
    for handle in passes {
        let action = draft.ops[handle.0].action;
        while let Some((_, due)) = posts.next_if(|(posted, _)| *posted <= action) {
            for (edge, arrival) in due {
                let Arrival { message, peer, buffer, consumer, .. } = arrival;
                let kind = OpKind::Recv { peer: RankId(peer), message, buffer };
                let mut op = DraftOp::new(stream(edge), kind, action);
                op.uses.push(buffer);
                let receive = draft.push(op);
                draft.op(consumer).waits.push(receive);
            }
        }
        draft.order.push(handle);
        if let Some(&(peer, message, buffer)) = sends.get(&handle) {
            let kind = OpKind::Send { peer: RankId(peer), message, buffer };
            let mut op = DraftOp::new(stream((message.direction, peer, true)), kind, action);
            op.uses.push(buffer);
            draft.push(op);
        }
    }
    Ok(())
}

/// The place, in its sender's list, of the pass that makes each message for a rank.
fn sending_places(order: &ComputeOrder, to: u32) -> HashMap<Message, usize> {
    let placement = &order.placement;
    let mut places = HashMap::new();
    for list in &order.actions {
        for (place, action) in list.iter().enumerate() {
            let (direction, stage) = match action.pass {
                Pass::F if !placement.is_last(action.stage) => (Direction::Forward, StageId(action.stage.0 + 1)),
                Pass::B | Pass::BW if !placement.is_first(action.stage) => {
                    (Direction::Backward, StageId(action.stage.0 - 1))
                }
                _ => continue,
            };
            if placement.device_of_stage[stage.index()] == to {
                places.insert(Message { direction, stage, microbatch: action.microbatch }, place);
            }
        }
    }
    places
}
