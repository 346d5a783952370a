//! How replicas share parameters, gradients and optimizer states: the triple as it is for a number of replicas, which
//! replicas exchange in which scope, and where the part of each lies.
//!
//! Replicas lie in fast groups of `m`, group by group: replica `i * m + j` is member `j` of group `i`. A unit's array of elements is
//! cut into one block per replica. Block `j * groups + i` belongs to member `j` of group `i`, so that what a member holds
//! within its group, `groups` blocks in a row, contains its own block, and every part is one slice of the array.

use super::{Blueprint, Collectives, LowerError};
use crate::order::Placement;
use paceline_sim::partition::exchange::Scope;
use paceline_sim::partition::{Level, StatePartition};
use paceline_sim::program::{Algorithm, Crossing, Link};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Which replicas share states, and when what was gathered is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sharing {
    /// Replicas of a fast group; all of them when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group_size: Option<u32>,
    /// So many passes ahead of its own is the gather of a unit's parameters issued.
    pub prefetch: u32,
    /// Gathered parameters live until their last pass of the step, instead of for one pass.
    pub keep_gathered: bool,
    /// Parts that the optimizer has updated are gathered at the begin of the next step, unit by unit beside its first passes, instead of
    /// at the end of this one.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub late_gather: bool,
    /// Fast groups over which the ranks of a pipeline are spread, in runs of equal length: messages between stages then cross the
    /// links too.
    #[serde(skip_serializing_if = "is_one")]
    pub pipeline_groups: u32,
    /// By which rounds collectives are done: one algorithm for those that join several fast groups of several replicas, or for
    /// each the fastest.
    pub collectives: Collectives,
    /// The link of each fast group to the others, where it is slowed down on purpose.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link: Option<Link>,
}

impl Default for Sharing {
    /// One group of all replicas, and parameters gathered one pass ahead for one pass.
    fn default() -> Sharing {
        Sharing {
            group_size: None,
            late_gather: false,
            pipeline_groups: 1,
            prefetch: 1,
            keep_gathered: false,
            collectives: Collectives::TwoLevel,
            link: None,
        }
    }
}

fn is_one(number: &u32) -> bool {
    *number == 1
}

/// How states are shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct States {
    /// What is cut over which replicas.
    pub partition: StatePartition,
    /// Which replicas, and for how long.
    pub sharing: Sharing,
}

impl Default for States {
    fn default() -> States {
        States::from(StatePartition::NONE)
    }
}

impl From<StatePartition> for States {
    fn from(partition: StatePartition) -> States {
        States { partition, sharing: Sharing::default() }
    }
}

/// A triple for a number of replicas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Levels {
    partition: StatePartition,
    data: u32,
    copies: u32,
    /// Ranks of a pipeline.
    pipeline: u32,
    group: u32,
    sharing: Sharing,
}

impl Levels {
    pub fn of(blueprint: &Blueprint, placement: &Placement) -> Result<Levels, LowerError> {
        let (data, copies, States { partition, sharing }) = (blueprint.data, placement.copies, blueprint.states);
        let size = sharing.group_size.unwrap_or(data);
        if size == 0 || !data.is_multiple_of(size) {
            return Err(LowerError::Group { group: size, data });
        }
        if sharing.keep_gathered && partition.parameters == Level::Whole {
            return Err(LowerError::NothingGathered { partition });
        }
        let alone = data * copies == 1;
        if partition.has_groups() && !alone && (size == 1 || size == data) {
            let level = if size == 1 { Level::Whole } else { Level::Global };
            let same = collapsed(partition, level);
            let named = sharing.group_size.is_some();
            return Err(LowerError::NoGroups { partition, group: size, data, named, same });
        }
        if copies > 1
            && (partition.has_groups() || partition.parameters != Level::Whole || partition.gradients != Level::Whole)
        {
            return Err(LowerError::TwoCopies { partition, schedule: blueprint.order.name.clone() });
        }
        let partition = if alone { StatePartition::NONE } else { partition };
        let pipeline = blueprint.order.actions.len() as u32;
        if sharing.pipeline_groups == 0 || !pipeline.is_multiple_of(sharing.pipeline_groups) {
            return Err(LowerError::PipelineGroups { groups: sharing.pipeline_groups, pipeline });
        }
        Ok(Levels { partition, data, copies, pipeline, group: size, sharing })
    }

    /// The levels of a unit; `tied` when another rank holds a copy of a matrix in it. The sum of the gradients of both copies
    /// needs both whole, because the two units are not cut in the same places.
    pub fn unit(&self, tied: bool) -> StatePartition {
        let gradients = if tied { Level::Whole } else { self.partition.gradients };
        StatePartition { gradients, ..self.partition }
    }

    pub fn optimizer(&self) -> Level {
        self.partition.optimizer
    }

    /// Whether passes need their parameters gathered, or their gradients reduced.
    pub fn works_by_unit(&self) -> bool {
        self.partition.parameters != Level::Whole || self.partition.gradients != Level::Whole
    }

    /// Whether weights are gathered after an update.
    pub fn gathers_updates(&self) -> bool {
        self.partition.parameter_sync().is_some()
    }

    /// Whether a state is cut within groups.
    pub fn has_groups(&self) -> bool {
        self.partition.has_groups()
    }

    /// The rounds of a collective in a scope.
    pub fn algorithm(&self, scope: Scope) -> Algorithm {
        let several = 1 < self.group && self.group < self.data;
        if scope == Scope::World && several { self.sharing.collectives.over_groups() } else { Algorithm::Direct }
    }

    /// How members of these fast groups cross the links between them.
    pub fn crossing(&self, groups: usize) -> Option<Crossing> {
        (groups > 1).then_some(Crossing { groups: groups as u32, link: self.sharing.link })
    }

    /// Fast groups.
    fn groups(&self) -> u32 {
        self.data / self.group
    }

    /// The fast group of a pipeline rank of a replica.
    pub fn group_of(&self, replica: u32, pipeline: u32) -> u32 {
        let spread = self.sharing.pipeline_groups;
        replica / self.group * spread + pipeline * spread / self.pipeline
    }

    /// All replicas in the order of their blocks.
    pub fn replicas(&self) -> impl Iterator<Item = u32> + use<> {
        let (group, groups) = (self.group, self.groups());
        (0..group).flat_map(move |j| (0..groups).map(move |i| i * group + j))
    }

    /// How many communicators of a scope there are side by side.
    pub fn communicators(&self, scope: Scope) -> u32 {
        match scope {
            Scope::Group => self.groups(),
            Scope::Across => self.group,
            Scope::World => 1,
        }
    }

    /// The communicator of a replica.
    pub fn communicator(&self, scope: Scope, replica: u32) -> u32 {
        match scope {
            Scope::Group => replica / self.group,
            Scope::Across => replica % self.group,
            Scope::World => 0,
        }
    }

    /// The replicas of a communicator.
    pub fn members(&self, scope: Scope, index: u32) -> Box<dyn Iterator<Item = u32>> {
        let (group, groups) = (self.group, self.groups());
        match scope {
            Scope::Group => Box::new((0..group).map(move |j| index * group + j)),
            Scope::Across => Box::new((0..groups).map(move |i| i * group + index)),
            Scope::World => Box::new(self.replicas()),
        }
    }

    /// Where the parts of a holder of so many elements lie.
    pub fn cut(&self, replica: u32, copy: u32, elements: u64) -> Cut {
        let holders = u64::from(self.data) * u64::from(self.copies);
        let block = elements.div_ceil(holders);
        let (i, j) = (u64::from(replica / self.group), u64::from(replica % self.group));
        let in_group = u64::from(self.groups()) * u64::from(self.copies);
        let index = (j * u64::from(self.groups()) + i) * u64::from(self.copies) + u64::from(copy);
        Cut { elements, block, in_group, member: j, index }
    }
}

/// A triple with its groups taken for one of the other levels.
fn collapsed(partition: StatePartition, level: Level) -> StatePartition {
    let of = |found: Level| if found == Level::Group { level } else { found };
    StatePartition {
        parameters: of(partition.parameters),
        gradients: of(partition.gradients),
        optimizer: of(partition.optimizer),
    }
}

/// Where the parts of one holder of a unit's array lie, in elements: each state has its own number format, and all are cut at
/// the same elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cut {
    elements: u64,
    /// Elements of a block.
    block: u64,
    /// Blocks in a row that a member holds within its group.
    in_group: u64,
    member: u64,
    index: u64,
}

impl Cut {
    /// What the holder has of a state at a level.
    pub fn range(&self, level: Level) -> Range<u64> {
        let (start, end) = match level {
            Level::Whole => (0, self.elements),
            Level::Group => {
                let part = self.block * self.in_group;
                (self.member * part, (self.member + 1) * part)
            }
            Level::Global => (self.index * self.block, (self.index + 1) * self.block),
        };
        start.min(self.elements)..end.min(self.elements)
    }

    /// The array of an exchange: what its members hold together.
    pub fn array(&self, scope: Scope) -> Range<u64> {
        self.range(if scope == Scope::Across { Level::Group } else { Level::Whole })
    }

    /// Elements of a member's part of it.
    pub fn part(&self, scope: Scope) -> u64 {
        if scope == Scope::Group { self.block * self.in_group } else { self.block }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The blocks of all replicas tile the array, lie within what their holders have in their group, and follow each other in the
    /// order of the communicators, whatever the size.
    #[test]
    fn parts_nest_and_tile() {
        for (data, group) in [(1, 1), (4, 2), (8, 4), (8, 2), (6, 3), (12, 4), (6, 6), (5, 1)] {
            for elements in [0, 1, 10, 25, 250, 251, 1024] {
                let levels = Levels {
                    partition: StatePartition::ZERO3,
                    data,
                    copies: 1,
                    pipeline: 1,
                    group,
                    sharing: Sharing::default(),
                };
                let cut = |replica| levels.cut(replica, 0, elements);
                let tile = |replicas: Vec<u32>, level, all: Range<u64>, part: u64| {
                    let mut reach = all.start;
                    for (n, replica) in (0..).zip(replicas) {
                        let range = cut(replica).range(level);
                        // Member n of the communicator has part n of its array.
                        let place = (all.start + n * part).min(all.end)..(all.start + (n + 1) * part).min(all.end);
                        assert_eq!(range, place, "{data} {group} {elements} {level:?} {replica}");
                        reach = range.end;
                    }
                    assert_eq!(reach, all.end);
                };
                tile(levels.replicas().collect(), Level::Global, 0..elements, cut(0).part(Scope::World));
                for index in 0..levels.communicators(Scope::Group) {
                    let members: Vec<u32> = levels.members(Scope::Group, index).collect();
                    assert!(members.iter().all(|&d| levels.communicator(Scope::Group, d) == index));
                    tile(members, Level::Group, 0..elements, cut(0).part(Scope::Group));
                }
                for index in 0..levels.communicators(Scope::Across) {
                    let members: Vec<u32> = levels.members(Scope::Across, index).collect();
                    assert!(members.iter().all(|&d| levels.communicator(Scope::Across, d) == index));
                    let array = cut(members[0]).array(Scope::Across);
                    tile(members, Level::Global, array, cut(0).part(Scope::Across));
                }
            }
        }
    }
}
