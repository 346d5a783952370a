//! The links between fast groups: who shares one, and in which order it serves. Executor, rehearsal and engine use the same
//! queue, so that concurrent collectives and messages on one link slow each other alike.
//!
//! Each fast group has one link to the others, with both directions at once. A message takes the leaving direction of its
//! sender's group and the entering one of its receiver's; a round of a collective takes both of every group that its members
//! lie in. An exchange begins when all that it takes are free, and those that come later stand behind it.

use super::{Link, Program};
use crate::units::RankId;
use smallvec::SmallVec;

/// The directions of links that an exchange takes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Way(SmallVec<[u32; 4]>);

/// The leaving and the entering direction of a group's link.
fn directions(group: u32) -> [u32; 2] {
    [2 * group, 2 * group + 1]
}

impl Program {
    /// The link of each fast group to the others, where it is slowed down on purpose: all are alike.
    pub fn link(&self) -> Option<Link> {
        self.groups.iter().find_map(|group| group.crossing.and_then(|crossing| crossing.link))
    }

    fn fast_group(&self, rank: RankId) -> u32 {
        self.ranks[rank.index()].coordinates.group
    }

    /// Whether a message between two ranks goes from one fast group to another.
    pub fn crosses(&self, from: RankId, to: RankId) -> bool {
        self.fast_group(from) != self.fast_group(to)
    }

    /// The way of a message.
    pub fn way_of_message(&self, from: RankId, to: RankId) -> Way {
        match self.crosses(from, to) {
            true => {
                Way(SmallVec::from_slice(&[directions(self.fast_group(from))[0], directions(self.fast_group(to))[1]]))
            }
            false => Way::default(),
        }
    }

    /// The way of a round of a collective of these ranks.
    pub fn way_of_round(&self, ranks: &[RankId]) -> Way {
        let mut groups: SmallVec<[u32; 8]> = ranks.iter().map(|&rank| self.fast_group(rank)).collect();
        groups.sort_unstable();
        groups.dedup();
        Way(groups.into_iter().flat_map(directions).collect())
    }
}

/// When links have served what they were given.
#[derive(Debug, Clone, Default)]
pub struct Links {
    /// By direction.
    free_at: Vec<u64>,
}

impl Links {
    /// Gives an exchange to the links at `now`, each of which it keeps busy for so many nanoseconds; returns when its last byte has been sent.
    pub fn serve(&mut self, way: &Way, now: u64, busy: u64) -> u64 {
        let highest = way.0.iter().max().map_or(0, |&direction| direction as usize + 1);
        if self.free_at.len() < highest {
            self.free_at.resize(highest, 0);
        }
        let start = way.0.iter().map(|&direction| self.free_at[direction as usize]).fold(now, u64::max);
        way.0.iter().for_each(|&direction| self.free_at[direction as usize] = start + busy);
        start + busy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_shares_a_direction_waits_and_what_does_not_goes_on() {
        let message = |from: u32, to: u32| Way(SmallVec::from_slice(&[directions(from)[0], directions(to)[1]]));
        let round = |groups: &[u32]| Way(groups.iter().copied().flat_map(directions).collect());
        let mut links = Links::default();
        assert_eq!(links.serve(&message(0, 1), 100, 50), 150);
        // The other direction, and other groups.
        assert_eq!(links.serve(&message(1, 0), 100, 50), 150);
        assert_eq!(links.serve(&message(2, 3), 110, 50), 160);
        // The same direction, and a collective over all.
        assert_eq!(links.serve(&message(0, 1), 100, 10), 160);
        assert_eq!(links.serve(&round(&[0, 1]), 100, 5), 165);
        assert_eq!(links.serve(&round(&[2, 3]), 100, 5), 165);
        assert_eq!(links.serve(&message(1, 2), 100, 1), 166);
        assert_eq!(links.serve(&message(3, 0), 400, 1), 401);
        assert_eq!(links.serve(&Way::default(), 7, 2), 9);
    }
}
