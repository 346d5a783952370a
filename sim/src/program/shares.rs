//! Which part of a unit's gradient a rank answers for. A program says it through its collectives, so that there is one
//! source of truth: who reduce-scatters a gradient updates its shard; who is in one group for the norm with other
//! holders of the same gradient counts its shard of it.

use super::{Collective, Group, OpKind, Payload, Program, Tensor};
use crate::model::Shard;
use crate::units::{GroupId, RankId, StageId};
use std::collections::BTreeMap;
use std::ops::Range;
use thiserror::Error;

/// The shares of one rank in a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shares {
    /// What its optimizer updates.
    pub update: Shard,
    /// What its gradient norm counts.
    pub norm: Shard,
}

/// Collectives that leave open who answers for what.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SharesError {
    /// Two reductions of one gradient, or two of the norm.
    #[error("{rank} reduces {what} twice")]
    Twice { rank: RankId, what: String },
    /// Nobody counts what this rank holds.
    #[error("{rank} holds a shard of the gradients of {stage} unit {unit}, and {what}")]
    Uncounted { rank: RankId, stage: StageId, unit: u16, what: &'static str },
}

impl Shares {
    /// All of everything: a rank that reduces with nobody.
    pub const WHOLE: Shares = Shares { update: Shard::WHOLE, norm: Shard::WHOLE };

    /// The elements of gradients of `len` that the norm counts, without those of `excluded` (the copy of a tied matrix
    /// that another rank counts).
    pub fn counted(self, len: usize, excluded: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        without(self.norm.range(len), excluded)
    }

    /// The elements of gradients of `len` that the update does not use: after the reduction they hold leftovers, which
    /// the optimizer zeroes.
    pub fn leftover(self, len: usize) -> impl Iterator<Item = Range<usize>> {
        without(0..len, self.update.range(len))
    }
}

/// The shares of `rank` in every unit whose gradients it has.
///
/// # Errors
/// When its collectives contradict each other.
pub fn shares(program: &Program, rank: RankId) -> Result<BTreeMap<(StageId, u16), Shares>, SharesError> {
    let mut reductions: BTreeMap<(StageId, u16), (Collective, GroupId)> = BTreeMap::new();
    let mut counters: Option<GroupId> = None;
    let this = &program.ranks[rank.index()];
    for op in &this.ops {
        let OpKind::Collective { collective, group, payload, .. } = op.kind else { continue };
        let before = match payload {
            Payload::Gradients { stage, unit } => reductions
                .insert((stage, unit), (collective, group))
                .map(|_| format!("the gradients of {stage} unit {unit}")),
            Payload::GradientNorm => counters.replace(group).map(|_| "the norm of the gradients".into()),
            _ => None,
        };
        if let Some(what) = before {
            return Err(SharesError::Twice { rank, what });
        }
    }
    let group = |id: GroupId| &program.groups[id.index()];
    let counters = counters.map(|id| group(id).ranks.as_slice());
    let held = this.buffers.iter().filter_map(|buffer| match buffer.tensor {
        Tensor::Gradients { stage, unit } => Some((stage, unit)),
        _ => None,
    });
    held.map(|(stage, unit)| {
        let uncounted = |what| Err(SharesError::Uncounted { rank, stage, unit, what });
        let reduction = reductions.get(&(stage, unit)).map(|&(collective, id)| (collective, group(id)));
        let update = match reduction {
            // A representative program leaves members out; their shards exist all the same.
            Some((Collective::ReduceScatter, holders)) => {
                Shard { count: holders.size, ..shard_of(holders.ranks.iter().copied(), rank) }
            }
            _ => Shard::WHOLE,
        };
        let norm = match (reduction, counters) {
            (Some((_, Group { ranks, size, .. })), Some(_))
                if update != Shard::WHOLE && ranks.len() < *size as usize =>
            {
                update
            }
            (Some((_, Group { ranks: holders, .. })), Some(counters)) => {
                let both = holders.iter().copied().filter(|holder| counters.contains(holder));
                if update != Shard::WHOLE && both.clone().count() != holders.len() {
                    return uncounted("the norm leaves other shards out");
                }
                shard_of(both, rank)
            }
            _ if update != Shard::WHOLE => return uncounted("nobody sums the norm"),
            _ => Shard::WHOLE,
        };
        Ok(((stage, unit), Shares { update, norm }))
    })
    .collect()
}

/// The part of `rank` where each of `ranks` has one, in their order.
fn shard_of(ranks: impl Iterator<Item = RankId> + Clone, rank: RankId) -> Shard {
    let index = ranks.clone().position(|member| member == rank).unwrap_or(0);
    Shard { index: index as u32, count: ranks.count() as u32 }
}

/// The elements of `all` that are not in `hole`, as up to two ranges that are not empty.
fn without(all: Range<usize>, hole: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let hole = hole.start.clamp(all.start, all.end)..hole.end.clamp(all.start, all.end);
    let parts = if hole.is_empty() { [all, 0..0] } else { [all.start..hole.start, hole.end..all.end] };
    parts.into_iter().filter(|part| !part.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::{
        Buffer, Coordinates, Device, MemoryClass, NetworkLevel, Op, PROGRAM_FORMAT, RankProgram, Stream, Workload,
    };
    use crate::units::{BufferId, DeviceId};
    use smallvec::SmallVec;

    const STAGE: StageId = StageId(0);
    const GRADIENTS: Payload = Payload::Gradients { stage: STAGE, unit: 0 };

    /// Ranks that run the same collectives over groups of ranks.
    fn program(ranks: u32, groups: &[&[u32]], collectives: &[(Collective, Payload, usize)]) -> Program {
        let group = |ranks: &&[u32]| Group {
            name: "test".into(),
            ranks: ranks.iter().map(|&rank| RankId(rank)).collect(),
            size: ranks.len() as u32,
            level: NetworkLevel::Intra,
        };
        let op = |rank: u32, &(collective, payload, group): &(Collective, Payload, usize)| {
            let group = (group..groups.len()).find(|&g| groups[g].contains(&rank)).unwrap();
            let group = GroupId(group as u32);
            Op {
                stream: Stream::COLLECTIVE,
                kind: OpKind::Collective { collective, group, payload, buffer: BufferId(0), bytes: 40 },
                waits: SmallVec::new(),
                alloc: SmallVec::new(),
                uses: SmallVec::new(),
                free: SmallVec::new(),
            }
        };
        let tensor = Tensor::Gradients { stage: STAGE, unit: 0 };
        Program {
            format: PROGRAM_FORMAT.into(),
            workload: Workload::Abstract,
            microbatches: 1,
            devices: vec![Device { name: "cpu:0".into(), node: 0 }],
            groups: groups.iter().map(group).collect(),
            stages: vec![],
            ranks: (0..ranks)
                .map(|rank| RankProgram {
                    device: DeviceId(0),
                    coordinates: Coordinates { data: rank, pipeline: 0 },
                    stages: vec![STAGE],
                    buffers: vec![Buffer { class: MemoryClass::Gradient, bytes: 40, tensor }],
                    persistent: vec![BufferId(0)],
                    ops: collectives.iter().map(|collective| op(rank, collective)).collect(),
                })
                .collect(),
        }
    }

    fn of(program: &Program, rank: u32) -> Result<Shares, SharesError> {
        shares(program, RankId(rank)).map(|all| all[&(STAGE, 0)])
    }

    #[test]
    fn collectives_say_who_answers_for_what() {
        let alone = program(1, &[], &[]);
        assert_eq!(of(&alone, 0), Ok(Shares::WHOLE));

        let half = Shard { index: 1, count: 2 };
        let everyone: &[&[u32]] = &[&[0, 1]];
        let norm = (Collective::AllReduce, Payload::GradientNorm, 0);
        let data = program(2, everyone, &[(Collective::AllReduce, GRADIENTS, 0), norm]);
        assert_eq!(of(&data, 1), Ok(Shares { update: Shard::WHOLE, norm: half }), "equal gradients are counted once");
        let sharded = program(2, everyone, &[(Collective::ReduceScatter, GRADIENTS, 0), norm]);
        assert_eq!(of(&sharded, 1), Ok(Shares { update: half, norm: half }));

        // The norm is summed over pairs that hold different gradients.
        let pairs: &[&[u32]] = &[&[0, 1, 2, 3], &[0, 1], &[2, 3]];
        let crossed = (Collective::AllReduce, Payload::GradientNorm, 1);
        let grid = program(4, pairs, &[(Collective::AllReduce, GRADIENTS, 0), crossed]);
        assert_eq!(of(&grid, 3), Ok(Shares { update: Shard::WHOLE, norm: half }));
        let lost = program(4, pairs, &[(Collective::ReduceScatter, GRADIENTS, 0), crossed]);
        assert!(of(&lost, 0).unwrap_err().to_string().contains("leaves other shards out"));
    }

    #[test]
    fn a_representative_has_its_shard_of_the_true_group() {
        let everyone: &[&[u32]] = &[&[0]];
        let norm = (Collective::AllReduce, Payload::GradientNorm, 0);
        let mut one = program(1, everyone, &[(Collective::ReduceScatter, GRADIENTS, 0), norm]);
        one.groups[0].size = 4;
        let quarter = Shard { index: 0, count: 4 };
        assert_eq!(of(&one, 0), Ok(Shares { update: quarter, norm: quarter }));
    }

    #[test]
    fn contradictions_are_named() {
        let reduce = (Collective::ReduceScatter, GRADIENTS, 0);
        let message = |collectives: &[_]| of(&program(2, &[&[0, 1]], collectives), 0).unwrap_err().to_string();
        assert_eq!(message(&[reduce, reduce]), "r0 reduces the gradients of s0 unit 0 twice");
        assert!(message(&[reduce]).ends_with("nobody sums the norm"));
    }

    #[test]
    fn what_is_counted_and_what_is_left_over() {
        let parts = |ranges: &mut dyn Iterator<Item = Range<usize>>| {
            ranges.map(|part| (part.start, part.end)).collect::<Vec<_>>()
        };
        let middle = Shares { update: Shard { index: 1, count: 3 }, norm: Shard { index: 1, count: 3 } };
        assert_eq!(parts(&mut middle.leftover(10)), [(0, 4), (8, 10)]);
        assert!(parts(&mut Shares::WHOLE.leftover(10)).is_empty());
        let whole = Shares::WHOLE;
        assert_eq!(parts(&mut whole.counted(10, 3..5)), [(0, 3), (5, 10)]);
        assert_eq!(parts(&mut whole.counted(10, 0..0)), [(0, 10)]);
        assert_eq!(parts(&mut middle.counted(10, 0..6)), [(6, 8)]);
        assert_eq!(parts(&mut middle.counted(10, 6..20)), [(4, 6)]);
        assert_eq!(parts(&mut middle.counted(10, 0..4)), [(4, 8)]);
        assert!(parts(&mut middle.counted(10, 0..12)).is_empty());
    }
}
