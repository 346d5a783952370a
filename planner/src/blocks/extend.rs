//! Lengthens an order by further microbatches where it is periodic: a long order costs no more to find than a short one.

use crate::order::{Action, ComputeOrder};
use crate::replay::{Replayer, StageTimes};
use paceline_sim::units::MicrobatchId;

/// `order` with `extra` more microbatches, put in where every device repeats the same actions at the same times with
/// the next microbatch. The bubble stays the same. `None` when there is no such place, or when a repetition would
/// cost more than the one it repeats.
pub fn extend(order: &ComputeOrder, times: &StageTimes, extra: u32) -> Option<ComputeOrder> {
    let mut replayer = Replayer::default();
    let before = replayer.run(order, times).ok()?;
    let cut = cuts(order, &replayer, before.makespan)?;
    let mut longer = order.clone();
    longer.microbatches = order.microbatches.checked_add(extra)?;
    for (list, (place, length)) in longer.actions.iter_mut().zip(&cut.windows) {
        let tail = list.split_off(place + length);
        let window: Vec<Action> = list[*place..].to_vec();
        for shift in 1..=extra {
            list.extend(window.iter().map(|action| shifted(*action, shift)));
        }
        list.extend(tail.into_iter().map(|action| shifted(action, extra)));
    }
    let after = replayer.run(&longer, times).ok()?;
    let expected = before.makespan + f64::from(extra) * cut.period;
    (after.makespan <= expected * (1.0 + 1e-12)).then_some(longer)
}

fn shifted(action: Action, by: u32) -> Action {
    Action { microbatch: MicrobatchId(action.microbatch.0 + by), ..action }
}

/// One period of every device.
struct Cut {
    period: f64,
    /// First place and number of actions, by device.
    windows: Vec<(usize, usize)>,
}

/// Looks from the middle of the order outwards for a time from which every device repeats itself.
fn cuts(order: &ComputeOrder, replayer: &Replayer, makespan: f64) -> Option<Cut> {
    let devices = order.actions.len();
    let probe = order.actions.iter().position(|list| !list.is_empty())?;
    let starts = replayer.starts(probe);
    let middle = starts.partition_point(|start| *start < makespan / 2.0);
    let candidates = (0..starts.len()).flat_map(|away| [middle.checked_sub(away), middle.checked_add(away + 1)]);
    for place in candidates.flatten().filter(|place| *place < starts.len()) {
        let Some(length) = repeats(order, replayer, probe, place) else { continue };
        let period = starts[place + length] - starts[place];
        let windows: Option<Vec<(usize, usize)>> = (0..devices)
            .map(|device| {
                let starts_here = replayer.starts(device);
                let first = starts_here.partition_point(|start| *start < starts[place]);
                let length = repeats(order, replayer, device, first)?;
                (starts_here[first + length] - starts_here[first] == period).then_some((first, length))
            })
            .collect();
        if let Some(windows) = windows {
            return Some(Cut { period, windows });
        }
    }
    None
}

/// The number of actions after which `device` does the same again, with the next microbatch and at the same distances,
/// for one full period from `place` on.
fn repeats(order: &ComputeOrder, replayer: &Replayer, device: usize, place: usize) -> Option<usize> {
    let list = &order.actions[device];
    let starts = replayer.starts(device);
    let first = *list.get(place)?;
    let length = list[place + 1..].iter().position(|action| *action == shifted(first, 1))? + 1;
    let period = starts[place + length] - starts[place];
    let same = |offset: usize| {
        let (here, there) = (place + offset, place + length + offset);
        there < list.len() && list[there] == shifted(list[here], 1) && starts[there] - starts[here] == period
    };
    // The first and the last action of the first window, and all between.
    let mut classes: Vec<_> = list[place..place + length].iter().map(|action| (action.pass, action.stage)).collect();
    classes.sort_unstable();
    classes.dedup();
    (classes.len() == length && (0..length).all(same)).then_some(length)
}
