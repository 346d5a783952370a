//! Actions as compute ops over units. A pass is one op over all units of its stage, because every op has a price, with
//! four exceptions:
//! - the backward that completes gradients which are reduced is an op per unit, so that the reduction of the last units
//!   overlaps with the backward of the first;
//! - where parameters or gradients are partitioned, every pass is an op per unit, so that one unit is gathered at a time;
//! - where updated weights are gathered late, the first forward of a stage is an op per unit, so that it need not wait for all of them;
//! - under full recomputation R and backward alternate unit by unit, so that one unit's activations live at a time.

use super::LowerError;
use super::draft::{Draft, DraftOp};
use super::sizes::Sizes;
use crate::order::ComputeOrder;
use paceline_sim::program::{OpKind, Pass, Stream};
use std::collections::HashMap;

/// When passes are ops over one unit each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Grain {
    /// Never: nothing is shared with other ranks.
    Stages,
    /// The last backward, which completes the gradients.
    LastBackward,
    /// Always.
    Units,
}

/// Fills a draft with the compute ops of a pipeline rank; `late`: its weights are gathered at the begin of the step.
pub(super) fn expand(
    draft: &mut Draft,
    order: &ComputeOrder,
    device: usize,
    sizes: &mut Sizes,
    (grain, late): (Grain, bool),
) -> Result<(), LowerError> {
    let actions = &order.actions[device];
    let mut begins = HashMap::new();
    let mut completes = HashMap::new();
    for (place, action) in actions.iter().enumerate() {
        if action.pass == Pass::F {
            begins.entry(action.stage).or_insert(place);
        }
        if matches!(action.pass, Pass::W | Pass::BW) {
            completes.insert(action.stage, place);
        }
    }
    let mut place = 0;
    while let Some(&action) = actions.get(place) {
        let units = sizes.units(action.stage);
        let (stage, microbatch) = (action.stage, action.microbatch);
        let follows = |a: &&crate::order::Action| {
            matches!(a.pass, Pass::B | Pass::BW) && (a.stage, a.microbatch) == (stage, microbatch)
        };
        let backward = actions.get(place + 1).filter(follows).filter(|_| action.pass == Pass::R);
        let mut compute = |pass, first, end, place| -> Result<(), LowerError> {
            let operands = sizes.operands(pass, stage, first, end);
            if pass == Pass::R && operands.is_empty() {
                // The ends of the model drop nothing.
                return Ok(());
            }
            let kind = OpKind::Compute { pass, stage, microbatch, first, end };
            let mut op = DraftOp::new(Stream::COMPUTE, kind, place);
            for &operand in operands.iter() {
                let here = sizes.on_rank(operand, microbatch);
                op.uses.push(draft.buffer(here.tensor, here.class, here.bytes)?);
            }
            draft.push(op);
            Ok(())
        };
        if let Some(backward) = backward {
            for unit in (0..units).rev() {
                compute(Pass::R, unit, unit + 1, place)?;
                compute(backward.pass, unit, unit + 1, place + 1)?;
            }
            place += 2;
            continue;
        }
        let last = grain == Grain::LastBackward && completes.get(&stage) == Some(&place);
        let first = late && begins.get(&stage) == Some(&place);
        if (first || grain == Grain::Units) && action.pass == Pass::F {
            for unit in 0..units {
                compute(action.pass, unit, unit + 1, place)?;
            }
        } else if last || grain == Grain::Units {
            for unit in (0..units).rev() {
                compute(action.pass, unit, unit + 1, place)?;
            }
        } else {
            compute(action.pass, 0, units, place)?;
        }
        place += 1;
    }
    Ok(())
}
