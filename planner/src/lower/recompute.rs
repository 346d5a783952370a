//! Full recomputation: an R before the backward of every microbatch that has none.

use super::{Blueprint, LowerError, Substance};
use crate::order::{Action, ComputeOrder};
use paceline_sim::program::{Pass, Recompute};
use std::borrow::Cow;
use std::collections::HashSet;

/// The order with R where the backward needs it. A schedule that states its R keeps them where it wants them.
pub(super) fn apply<'a>(blueprint: &Blueprint<'a>) -> Result<Cow<'a, ComputeOrder>, LowerError> {
    let order = blueprint.order;
    let stated: HashSet<_> = order
        .actions
        .iter()
        .flatten()
        .filter(|action| action.pass == Pass::R)
        .map(|action| (action.stage, action.microbatch))
        .collect();
    let wanted = match &blueprint.substance {
        Substance::Transformer(workload) => workload.recompute,
        Substance::Abstract(_) if stated.is_empty() => Recompute::None,
        Substance::Abstract(_) => Recompute::Full,
    };
    if wanted != Recompute::Full {
        return if stated.is_empty() {
            Ok(Cow::Borrowed(order))
        } else {
            let recompute = if wanted == Recompute::None { "none" } else { "selective" };
            Err(LowerError::Recompute { schedule: order.name.clone(), recompute })
        };
    }
    let mut order = order.clone();
    for list in &mut order.actions {
        *list = list
            .iter()
            .flat_map(|&action| {
                let needs =
                    matches!(action.pass, Pass::B | Pass::BW) && !stated.contains(&(action.stage, action.microbatch));
                needs.then_some(Action { pass: Pass::R, ..action }).into_iter().chain([action])
            })
            .collect();
    }
    Ok(Cow::Owned(order))
}
