//! The rounds of a collective: which member reads which parts from whom, and how much of it crosses the links between fast
//! groups. Executor and cost model follow the same list.
//!
//! - **Direct**: each member reads its part, or all parts, from every other member. One round, and every byte crosses as
//!   often as there are readers.
//! - **Ring**: members lie on a ring, group by group; each turn a part goes one place on. One part enters each group per turn, and the
//!   slowest hop sets the pace of every turn.
//! - **Tree**: every part has a binomial tree of its own, rooted at its owner, and all trees are climbed at once (recursive doubling
//!   for any number of members; the parallel aggregated trees of NCCL): as many turns as the number of members has binary
//!   digits. Over long distances few parts travel, over short ones many.
//! - **Two-level** (PaRO-CC, Wu et al., NeurIPS 2024, section 3.4): a reduction first sums within each group and then across
//!   groups, between members of the same place; a gather goes across first. Each byte enters a group once. An all-to-all first
//!   brings together, within each group, what goes to members of the same place, and then exchanges it across groups: as many
//!   messages leave a member as there are other groups, instead of members in them.
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
    /// Parts travel along trees.
    Tree,
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
    /// Each member adds, to its own values of some parts, the sums of the member `2^turn` before it on the ring.
    TreeReduce {
        /// From 0; the last one leaves each member with its own part.
        turn: u32,
    },
    /// Each member copies some parts from the member `2^turn` behind it on the ring.
    TreeGather {
        /// Down to 0.
        turn: u32,
    },
    /// Each two members change parts.
    Exchange,
    /// Each two members of a group change the parts that go to each other's places in any group.
    ExchangeWithin,
    /// Each two members of one place change the parts of their groups.
    ExchangeAcross,
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
/// algorithm, as are a ring or trees of two members, and an all-to-all on a ring or on trees.
pub fn rounds(collective: Collective, algorithm: Algorithm, members: u32, groups: u32) -> Vec<Step> {
    let turns = 0..members.saturating_sub(1);
    // Binary digits of the greatest distance.
    let digits = 0..(members.max(2) - 1).ilog2() + 1;
    let two = groups > 1 && members > groups && members.is_multiple_of(groups);
    let (reduce, gather): (Vec<Step>, Vec<Step>) = match algorithm {
        Algorithm::Ring if members > 2 => (
            turns.clone().map(|turn| Step::RingReduce { turn }).collect(),
            turns.map(|turn| Step::RingGather { turn }).collect(),
        ),
        Algorithm::Tree if members > 2 => (
            digits.clone().map(|turn| Step::TreeReduce { turn }).collect(),
            digits.rev().map(|turn| Step::TreeGather { turn }).collect(),
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
        Collective::AllToAll if algorithm == Algorithm::TwoLevel && two => {
            vec![Step::ExchangeWithin, Step::ExchangeAcross]
        }
        Collective::AllToAll => vec![Step::Exchange],
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
            Step::TreeReduce { turn } | Step::TreeGather { turn } => {
                // On the ring, groups follow each other; what leaves the first one is what leaves any.
                let reaches_out = |place: &u64| (place + (1 << turn)) % members >= in_group;
                (0..in_group).filter(reaches_out).count() as u64 * u64::from(tree_parts(members as u32, turn))
            }
            Step::Exchange => in_group * (members - in_group),
            Step::ExchangeAcross => in_group * in_group * (groups - 1),
            Step::ExchangeWithin => 0,
            Step::ReduceAcross | Step::GatherAcross => in_group * (groups - 1),
            Step::ReduceWithin | Step::GatherWithin => 0,
        };
        parts * part
    }
}

/// How far behind a member's own part those lie, on the ring, that it gets in a turn of a tree gather: all below `members`
/// whose lowest binary digit is this turn's. What it passes on in this turn has higher digits only, and is there already.
pub fn tree_offsets(members: u32, turn: u32) -> impl Iterator<Item = u32> {
    let digit = 1u64 << turn;
    (digit..u64::from(members)).step_by(2 * digit as usize).map(|offset| offset as u32)
}

/// Parts that a member gets in a turn of a tree.
pub fn tree_parts(members: u32, turn: u32) -> u32 {
    tree_offsets(members, turn).count() as u32
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

    /// Of five members on trees: offsets 4, then 2, then 1 and 3, so that each gets the four other parts in three turns.
    #[test]
    fn trees_take_a_turn_per_binary_digit() {
        let turns = |members| rounds(Collective::AllGather, Algorithm::Tree, members, 1);
        assert_eq!(turns(5), [2, 1, 0].map(|turn| Step::TreeGather { turn }));
        let offsets: Vec<Vec<u32>> = [2, 1, 0].map(|turn| tree_offsets(5, turn).collect()).to_vec();
        assert_eq!(offsets, [vec![4], vec![2], vec![1, 3]]);
        for members in 3..40 {
            let steps = turns(members);
            assert_eq!(steps.len() as u32, u32::BITS - (members - 1).leading_zeros());
            let parts: u32 = (0..steps.len() as u32).map(|turn| tree_parts(members, turn)).sum();
            assert_eq!(parts, members - 1);
        }
    }

    /// Eight members in two groups of four. Trees: one part over the distance of four for each member, two over two for the last
    /// two of a group, four over one for the last. All-to-all: all that has to cross, whichever way.
    #[test]
    fn what_crosses_of_trees_and_of_an_all_to_all() {
        let sum = |collective, algorithm| -> u64 {
            rounds(collective, algorithm, 8, 2).iter().map(|step| step.crossing(8, 2, 10)).sum()
        };
        assert_eq!(sum(Collective::AllGather, Algorithm::Tree), 10 * (4 + 2 * 2 + 4));
        assert_eq!(sum(Collective::AllReduce, Algorithm::Tree), 20 * (4 + 2 * 2 + 4));
        for algorithm in [Algorithm::Direct, Algorithm::TwoLevel] {
            assert_eq!(sum(Collective::AllToAll, algorithm), 160);
        }
        assert_eq!(
            rounds(Collective::AllToAll, Algorithm::TwoLevel, 8, 2),
            [Step::ExchangeWithin, Step::ExchangeAcross]
        );
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
