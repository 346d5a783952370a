//! Which part of a unit's gradient a rank answers for: it updates the part whose moments it holds, and counts in the norm
//! what no other counter of the same part counts. Programs say it with their buffers and with the group of the norm, so
//! that there is one source of truth.

use super::partners::same_layers;
use super::{OpKind, Payload, Program, Tensor};
use crate::model::Shard;
use crate::units::{GroupId, RankId, StageId};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use thiserror::Error;

/// The shares of one rank in a unit, in elements of its flat array.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shares {
    /// What its optimizer updates.
    pub update: Range<usize>,
    /// What its gradient norm counts.
    pub norm: Range<usize>,
}

/// Parts that leave open who answers for what.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SharesError {
    /// Two sums of the norm.
    #[error("{rank} reduces the norm of the gradients twice in a step, or over two groups")]
    Twice { rank: RankId },
    /// Nobody counts what this rank does not hold.
    #[error("{rank} updates elements {update:?} of the {len} of {stage} unit {unit}, and {what}")]
    Uncounted { rank: RankId, stage: StageId, unit: u16, update: Range<usize>, len: usize, what: &'static str },
}

impl Shares {
    /// The elements that the norm counts, without those of `excluded` (the copy of a tied matrix that another rank counts).
    pub fn counted(&self, excluded: Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
        without(self.norm.clone(), excluded)
    }
}

/// The shares of `rank` in every unit that it updates.
///
/// # Errors
/// When parts and the group of the norm contradict each other.
pub fn shares(program: &Program, rank: RankId) -> Result<BTreeMap<(StageId, u16), Shares>, SharesError> {
    let mut norm: Option<GroupId> = None;
    let mut left = program.ranks[rank.index()].steps();
    for op in &program.ranks[rank.index()].ops {
        if let OpKind::Collective { group, payload: Payload::GradientNorm, .. } = op.kind {
            let other = norm.replace(group).is_some_and(|before| before != group);
            left = left.checked_sub(1).filter(|_| !other).ok_or(SharesError::Twice { rank })?;
        }
    }
    let group = norm.map(|id| &program.groups[id.index()]);
    let alone = [rank];
    let counters = group.map_or(&alone[..], |group| &group.ranks);
    let held: Vec<(RankId, Part)> =
        counters.iter().flat_map(|&counter| updated(program, counter).map(move |part| (counter, part))).collect();
    let mut all = BTreeMap::new();
    for own in updated(program, rank) {
        let (stage, unit, update) = (own.stage, own.unit, own.range.clone());
        let reducers = reducers(program, rank, (stage, unit));
        // The other copy of a layer goes by another stage, and is reduced together with this one.
        let alike = held.iter().filter(|(counter, part)| {
            let other = (part.stage, part.unit);
            other == (stage, unit)
                || (reducers.contains(counter)
                    && !program.ranks[counter.index()].stages.contains(&stage)
                    && same_layers(program, other, (stage, unit)))
        });
        let parts: Vec<&(RankId, Part)> = alike.collect();
        let equal = || parts.iter().filter(|(_, part)| part.range == update);
        let index = equal().position(|(counter, _)| *counter == rank).unwrap_or(0) as u32;
        let share = Shard { index, count: equal().count() as u32 }.range(update.len());
        let norm = update.start + share.start..update.start + share.end;
        // A representative program leaves members out; their parts exist all the same.
        if group.is_none_or(|group| group.ranks.len() == group.size as usize) {
            let mut ranges: Vec<&Range<usize>> = parts.iter().map(|(_, part)| &part.range).collect();
            ranges.sort_by_key(|range| range.start);
            let reach =
                ranges.iter().fold(0, |reach, range| if range.start <= reach { reach.max(range.end) } else { reach });
            if reach < own.len {
                let what = if group.is_none() { "nobody sums the norm" } else { "the norm leaves other parts out" };
                return Err(SharesError::Uncounted { rank, stage, unit, update, len: own.len, what });
            }
        }
        all.insert((stage, unit), Shares { update, norm });
    }
    Ok(all)
}

/// The ranks with which a rank reduces the gradients of a unit.
fn reducers(program: &Program, rank: RankId, unit: (StageId, u16)) -> BTreeSet<RankId> {
    let ops = program.ranks[rank.index()].ops.iter();
    let groups = ops.filter_map(|op| match op.kind {
        OpKind::Collective { group, payload: Payload::Gradients { stage, unit: u }, .. } if (stage, u) == unit => {
            Some(group)
        }
        _ => None,
    });
    let groups: BTreeSet<GroupId> = groups.collect();
    groups.into_iter().flat_map(|group| program.groups[group.index()].ranks.iter().copied()).collect()
}

/// The part of a unit that a rank updates.
struct Part {
    stage: StageId,
    unit: u16,
    range: Range<usize>,
    /// Elements of the whole unit.
    len: usize,
}

fn updated(program: &Program, rank: RankId) -> impl Iterator<Item = Part> {
    let rank = &program.ranks[rank.index()];
    let persistent = || rank.persistent.iter().map(|buffer| &rank.buffers[buffer.index()]);
    let whole = move |of: (StageId, u16)| {
        // The array ends where the last part of it does that this rank can see; others' parts do not reach farther
        // than those of gathered weights.
        let ends = rank.buffers.iter().filter_map(move |buffer| match buffer.tensor {
            Tensor::Parameters { stage, unit } | Tensor::Gradients { stage, unit } if (stage, unit) == of => {
                Some(buffer.elements())
            }
            _ => None,
        });
        ends.max().unwrap_or(0)
    };
    persistent().filter_map(move |buffer| match buffer.tensor {
        Tensor::Moments { stage, unit } => {
            let (start, len) = (buffer.start as usize, buffer.elements() / 2);
            Some(Part { stage, unit, range: start..start + len, len: whole((stage, unit)) })
        }
        _ => None,
    })
}

/// The elements of `all` that are not in `hole`, as up to two ranges that are not empty.
pub(super) fn without(all: Range<usize>, hole: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let hole = hole.start.clamp(all.start, all.end)..hole.end.clamp(all.start, all.end);
    let parts = if hole.is_empty() { [all, 0..0] } else { [all.start..hole.start, hole.end..all.end] };
    parts.into_iter().filter(|part| !part.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::{
        Arrangement, Buffer, Collective, Coordinates, Device, Element, Group, MemoryClass, NetworkLevel, Op,
        PROGRAM_FORMAT, RankProgram, Stream, Workload,
    };
    use crate::units::{BufferId, DeviceId};
    use smallvec::SmallVec;

    const STAGE: StageId = StageId(0);
    /// Elements of the unit.
    const LEN: u64 = 10;

    /// Ranks that update ranges of one unit and sum the norm in groups.
    fn program(updates: &[Range<u64>], groups: &[&[u32]]) -> Program {
        let group = |ranks: &&[u32]| Group {
            name: "test".into(),
            ranks: ranks.iter().map(|&rank| RankId(rank)).collect(),
            size: ranks.len() as u32,
            level: NetworkLevel::Intra,
            crossing: None,
        };
        let norm = |group: usize| Op {
            stream: Stream::COLLECTIVE,
            kind: OpKind::Collective {
                collective: Collective::AllReduce,
                group: GroupId(group as u32),
                payload: Payload::GradientNorm,
                buffer: BufferId(0),
                bytes: 8,
                arrangement: Arrangement::default(),
            },
            waits: SmallVec::new(),
            alloc: SmallVec::new(),
            uses: SmallVec::new(),
            free: SmallVec::new(),
        };
        let (stage, unit) = (STAGE, 0);
        let buffer = |class, tensor, start, bytes| Buffer { class, bytes, tensor, start, element: Element::F32 };
        let rank = |(number, update): (usize, &Range<u64>)| RankProgram {
            device: DeviceId(0),
            coordinates: Coordinates { data: number as u32, ..Coordinates::default() },
            stages: vec![STAGE],
            buffers: vec![
                buffer(MemoryClass::Gradient, Tensor::Gradients { stage, unit }, 0, 4 * LEN),
                buffer(
                    MemoryClass::OptimizerState,
                    Tensor::Moments { stage, unit },
                    update.start,
                    8 * (update.end - update.start),
                ),
            ],
            persistent: vec![BufferId(0), BufferId(1)],
            ops: groups.iter().position(|ranks| ranks.contains(&(number as u32))).map(norm).into_iter().collect(),
        };
        Program {
            format: PROGRAM_FORMAT.into(),
            workload: Workload::Abstract,
            microbatches: 1,
            devices: vec![Device { name: "cpu:0".into(), node: 0 }],
            groups: groups.iter().map(group).collect(),
            stages: vec![],
            ranks: updates.iter().enumerate().map(rank).collect(),
        }
    }

    fn of(program: &Program, rank: u32) -> Result<(Range<usize>, Range<usize>), String> {
        let shares = shares(program, RankId(rank)).map_err(|error| error.to_string())?;
        let Shares { update, norm } = shares[&(STAGE, 0)].clone();
        Ok((update, norm))
    }

    #[test]
    fn buffers_and_the_norm_say_who_answers_for_what() {
        assert_eq!(of(&program(std::slice::from_ref(&(0..10)), &[]), 0), Ok((0..10, 0..10)), "alone");
        // Equal gradients are counted once, in parts.
        assert_eq!(of(&program(&[0..10, 0..10], &[&[0, 1]]), 1), Ok((0..10, 5..10)));
        // Replicas that sum the norm apart count all of it each.
        assert_eq!(of(&program(&[0..10, 0..10], &[&[0], &[1]]), 1), Ok((0..10, 0..10)));
        let parts = [0..4, 4..8, 8..10];
        assert_eq!(of(&program(&parts, &[&[0, 1, 2]]), 2), Ok((8..10, 8..10)));
        // Two groups that are cut within.
        let grouped = program(&[0..6, 6..10, 0..6, 6..10], &[&[0, 1], &[2, 3]]);
        assert_eq!(of(&grouped, 2), Ok((0..6, 0..6)));
        assert_eq!(of(&grouped, 3), Ok((6..10, 6..10)));
    }

    #[test]
    fn a_representative_has_its_part_of_the_true_group() {
        let mut one = program(std::slice::from_ref(&(0..3)), &[&[0]]);
        one.groups[0].size = 4;
        assert_eq!(of(&one, 0), Ok((0..3, 0..3)));
    }

    #[test]
    fn contradictions_are_named() {
        let message = |updates: &[Range<u64>], groups: &[&[u32]]| of(&program(updates, groups), 0).unwrap_err();
        let lost = message(&[0..5, 5..10], &[&[0], &[1]]);
        assert_eq!(lost, "r0 updates elements 0..5 of the 10 of s0 unit 0, and the norm leaves other parts out");
        assert!(message(&[0..5, 5..10], &[]).ends_with("nobody sums the norm"));
        assert!(message(&[0..5, 6..10], &[&[0, 1]]).ends_with("leaves other parts out"), "a gap");
        let mut twice = program(&[0..10, 0..10], &[&[0, 1]]);
        let op = twice.ranks[0].ops[0].clone();
        twice.ranks[0].ops.push(op);
        assert!(of(&twice, 0).unwrap_err().starts_with("r0 reduces the norm of the gradients twice in a step"));
    }

    #[test]
    fn what_is_counted() {
        let parts = |shares: &Shares, hole: Range<usize>| {
            shares.counted(hole).map(|part| (part.start, part.end)).collect::<Vec<_>>()
        };
        let whole = Shares { update: 0..10, norm: 0..10 };
        assert_eq!(parts(&whole, 3..5), [(0, 3), (5, 10)]);
        assert_eq!(parts(&whole, 0..0), [(0, 10)]);
        let middle = Shares { update: 4..8, norm: 4..8 };
        assert_eq!(parts(&middle, 0..6), [(6, 8)]);
        assert_eq!(parts(&middle, 6..20), [(4, 6)]);
        assert_eq!(parts(&middle, 0..4), [(4, 8)]);
        assert!(parts(&middle, 0..12).is_empty());
    }
}
