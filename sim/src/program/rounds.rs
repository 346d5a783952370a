//! The rounds of a collective: which member reads which parts from whom, and how much of it crosses the links between fast
//! groups. Executor and cost model follow the same list.
//!
//! - **Direct**: each member reads its part, or all parts, from every other member. One round, and every byte crosses as
//!   often as there are readers.
//! - **Ring**: members lie on a ring, group by group; each turn a part goes one place on. One part enters each group per turn, and the
//!   slowest hop sets the pace of every turn.
//! - **Two-level** (PaRO-CC, Wu et al., NeurIPS 2024, section 3.4): a reduction first sums within each group and then across
//!   groups, between members of the same place; a gather goes across first. Each byte enters a group once.
//!
//! With `groups` fast groups, member `k` lies in group `k mod groups` at place `k / groups`.

use super::Collective;
use serde::{Deserialize, Serialize};

/// By which rounds a collective is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Algorithm {
    /// Everybody reads from everybody.
    #[default]
    Direct,
    /// Parts travel round a ring.
    Ring,
    /// Within groups and across them, one after the other.
    TwoLevel,
}

/// A round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Each member sums its own part over all.
    Reduce,
    /// Each member copies the other parts from their owners.
    Gather,
    /// Each member adds its predecessor's sum of a part to its own values.
    RingReduce {
        /// From 0; the last one leaves each member with its own part.
        turn: u32,
    },
    /// Each member copies a part from its predecessor.
    RingGather {
        /// From 0.
        turn: u32,
    },
    /// Each member sums, over its group, the parts of the members at its place in any group.
    ReduceWithin,
    /// Each member sums its own part over the members at its place.
    ReduceAcross,
    /// Each member copies the parts of the members at its place.
    GatherAcross,
    /// Each member copies, from the others of its group, what they have from their places.
    GatherWithin,
}

/// The rounds of a collective of `members`, spread evenly over `groups`. Two levels where there is one are the direct
/// algorithm.
pub fn rounds(collective: Collective, algorithm: Algorithm, members: u32, groups: u32) -> Vec<Step> {
    let turns = 0..members.saturating_sub(1);
    let two = groups > 1 && members > groups && members.is_multiple_of(groups);
    let (reduce, gather): (Vec<Step>, Vec<Step>) = match algorithm {
        Algorithm::Ring if members > 2 => (
            turns.clone().map(|turn| Step::RingReduce { turn }).collect(),
            turns.map(|turn| Step::RingGather { turn }).collect(),
        ),
        Algorithm::TwoLevel if two => {
            (vec![Step::ReduceWithin, Step::ReduceAcross], vec![Step::GatherAcross, Step::GatherWithin])
        }
        _ => (vec![Step::Reduce], vec![Step::Gather]),
    };
    match collective {
        Collective::AllReduce => [reduce, gather].concat(),
        Collective::ReduceScatter => reduce,
        Collective::AllGather => gather,
    }
}

impl Step {
    /// Bytes that enter each group, and leave it, where a part has `part` bytes.
    pub fn crossing(self, members: u32, groups: u32, part: u64) -> u64 {
        if groups <= 1 {
            return 0;
        }
        let (members, groups) = (u64::from(members), u64::from(groups));
        let in_group = members.div_ceil(groups);
        let parts = match self {
            Step::Reduce | Step::Gather => in_group * (members - in_group),
            Step::RingReduce { .. } | Step::RingGather { .. } => 1,
            Step::ReduceAcross | Step::GatherAcross => in_group * (groups - 1),
            Step::ReduceWithin | Step::GatherWithin => 0,
        };
        parts * part
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of an all-gather of `n` parts over two groups of four: each of the four members of a group fetches four parts from the
    /// other one by itself, or a part enters per turn, or each part enters once.
    #[test]
    fn two_levels_cross_least() {
        let sum = |algorithm| -> u64 {
            rounds(Collective::AllGather, algorithm, 8, 2).iter().map(|step| step.crossing(8, 2, 10)).sum()
        };
        assert_eq!((sum(Algorithm::Direct), sum(Algorithm::Ring), sum(Algorithm::TwoLevel)), (160, 70, 40));
        let count = |algorithm| rounds(Collective::AllReduce, algorithm, 8, 2).len();
        assert_eq!((count(Algorithm::Direct), count(Algorithm::Ring), count(Algorithm::TwoLevel)), (2, 14, 4));
    }

    #[test]
    fn one_group_and_one_member_per_group_have_one_level() {
        for (members, groups) in [(4, 1), (4, 4), (1, 1)] {
            assert_eq!(rounds(Collective::ReduceScatter, Algorithm::TwoLevel, members, groups), [Step::Reduce]);
        }
        assert_eq!(Step::Reduce.crossing(4, 1, 10), 0);
        assert_eq!(Step::Reduce.crossing(4, 4, 10), 30);
    }
}
