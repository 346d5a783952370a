//! When a rank can know that a message has been received, without asking: a later pass of its own depends, through
//! other messages, on a pass that used it. From there on the sent buffer is free, and waiting for the send costs nothing.
//!
//! Each pass carries, for every rank, how many of that rank's passes have ended before it (a vector clock: Fidge 1988,
//! Mattern 1989).

use crate::order::ComputeOrder;
use paceline_sim::program::{Direction, Message, Pass};
use paceline_sim::units::StageId;
use std::collections::HashMap;

/// By pipeline rank: the first action of the sender that surely follows the receipt, for messages that have one.
pub(super) type Receipts = HashMap<Message, usize>;

struct Pending {
    message: Message,
    consumer: usize,
    place: u32,
}

/// Follows an order that [`ComputeOrder::validate`] has accepted.
pub(super) fn known(order: &ComputeOrder) -> Vec<Receipts> {
    let devices = order.actions.len();
    let placement = &order.placement;
    let device_of = |stage: StageId| placement.device_of_stage[stage.index()] as usize;

    // Where each message is used: the place of the F or the B (BW) that it is for.
    let mut used: HashMap<Message, u32> = HashMap::new();
    for list in &order.actions {
        for (place, action) in list.iter().enumerate() {
            let direction = match action.pass {
                Pass::F if !placement.is_first(action.stage) => Direction::Forward,
                Pass::B | Pass::BW if !placement.is_last(action.stage) => Direction::Backward,
                _ => continue,
            };
            used.insert(Message { direction, stage: action.stage, microbatch: action.microbatch }, place as u32);
        }
    }

    let mut receipts: Vec<Receipts> = vec![Receipts::new(); devices];
    let mut clocks: Vec<Vec<u32>> = vec![vec![0; devices]; devices];
    let mut sent: HashMap<Message, Vec<u32>> = HashMap::new();
    let mut pending: Vec<Vec<Pending>> = (0..devices).map(|_| Vec::new()).collect();
    let mut next = vec![0usize; devices];
    let mut waiting: HashMap<Message, usize> = HashMap::new();
    let mut ready: Vec<usize> = (0..devices).rev().collect();
    while let Some(device) = ready.pop() {
        while let Some(action) = order.actions[device].get(next[device]) {
            let place = next[device];
            let (stage, microbatch) = (action.stage, action.microbatch);
            let message = |direction, stage| Message { direction, stage, microbatch };
            let (enters, leaves) = match action.pass {
                Pass::F => (
                    (!placement.is_first(stage)).then(|| (Direction::Forward, stage.0 - 1)),
                    (!placement.is_last(stage)).then(|| (Direction::Forward, stage.0 + 1)),
                ),
                Pass::B | Pass::BW => (
                    (!placement.is_last(stage)).then(|| (Direction::Backward, stage.0 + 1)),
                    (!placement.is_first(stage)).then(|| (Direction::Backward, stage.0 - 1)),
                ),
                Pass::W | Pass::R => (None, None),
            };
            if let Some((direction, from)) = enters.filter(|(_, from)| device_of(StageId(*from)) != device) {
                let awaited = message(direction, stage);
                let Some(clock) = sent.remove(&awaited) else {
                    waiting.insert(awaited, device);
                    break;
                };
                debug_assert!(device_of(StageId(from)) != device);
                clocks[device].iter_mut().zip(clock).for_each(|(own, other)| *own = (*own).max(other));
                let (clock, receipts) = (&clocks[device], &mut receipts[device]);
                pending[device].retain(|wait| {
                    let known = clock[wait.consumer] > wait.place;
                    if known {
                        receipts.insert(wait.message, place);
                    }
                    !known
                });
            }
            clocks[device][device] = place as u32 + 1;
            next[device] += 1;
            if let Some((direction, to)) = leaves.filter(|(_, to)| device_of(StageId(*to)) != device) {
                let message = message(direction, StageId(to));
                let consumer = device_of(StageId(to));
                if let Some(&place) = used.get(&message) {
                    pending[device].push(Pending { message, consumer, place });
                }
                sent.insert(message, clocks[device].clone());
                if let Some(sleeper) = waiting.remove(&message) {
                    ready.push(sleeper);
                }
            }
        }
    }
    receipts
}
