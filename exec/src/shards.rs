//! Which part of a unit's gradient a rank answers for. A program says it through its collectives, so that there is one
//! source of truth: who reduce-scatters a gradient updates its shard; who is in one group for the norm with other
//! holders of the same gradient counts its shard of it.

use crate::collectives::shard;
use crate::error::ExecError;
use paceline_sim::program::{Collective, OpKind, Payload, Program};
use paceline_sim::units::{GroupId, RankId, StageId};
use std::ops::Range;

/// Shard `index` of `shards`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Share {
    shards: usize,
    index: usize,
}

impl Share {
    const WHOLE: Share = Share { shards: 1, index: 0 };

    /// Elements of a buffer of `len`.
    pub fn range(self, len: usize) -> Range<usize> {
        shard(len, self.shards, self.index)
    }
}

/// The shares of one rank in a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shares {
    /// What its optimizer updates.
    pub update: Share,
    /// What its gradient norm counts.
    pub norm: Share,
}

/// The shares of `rank` in the gradients of a unit.
pub(crate) fn shares(program: &Program, rank: RankId, stage: StageId, unit: u16) -> Result<Shares, ExecError> {
    let mut reduction: Option<(Collective, GroupId)> = None;
    let mut norm: Option<GroupId> = None;
    for op in &program.ranks[rank.index()].ops {
        let OpKind::Collective { collective, group, payload, .. } = op.kind else { continue };
        let before = match payload {
            Payload::Gradients { stage: s, unit: u } if (s, u) == (stage, unit) => {
                reduction.replace((collective, group)).map(|_| "gradients")
            }
            Payload::GradientNorm => norm.replace(group).map(|_| "norm of the gradients"),
            _ => None,
        };
        if let Some(what) = before {
            return Err(ExecError::Program(format!("{rank} reduces the {what} of {stage} unit {unit} twice")));
        }
    }
    let members = |group: GroupId| program.groups[group.index()].ranks.as_slice();
    let position = |ranks: &[RankId]| ranks.iter().position(|&member| member == rank).unwrap_or(0);
    let update = match reduction {
        Some((Collective::ReduceScatter, group)) => {
            Share { shards: members(group).len(), index: position(members(group)) }
        }
        _ => Share::WHOLE,
    };
    let norm = match (reduction, norm) {
        (Some((_, holders)), Some(counters)) => {
            let counters = members(counters);
            let both: Vec<RankId> = members(holders).iter().copied().filter(|r| counters.contains(r)).collect();
            if update != Share::WHOLE && both.len() != members(holders).len() {
                return Err(ExecError::Program(format!(
                    "{rank} holds a shard of the gradients of {stage} unit {unit}, and the norm leaves other shards out"
                )));
            }
            Share { shards: both.len(), index: position(&both) }
        }
        _ if update != Share::WHOLE => {
            return Err(ExecError::Program(format!("{rank} holds a shard of gradients, and nobody sums the norm")));
        }
        _ => Share::WHOLE,
    };
    Ok(Shares { update, norm })
}
