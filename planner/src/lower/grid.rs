//! The ranks and their groups: replicas times pipeline ranks, numbered replica by replica.

use super::states::{Cut, Levels};
use super::{Blueprint, Form, LowerError};
use crate::order::Placement;
use paceline_sim::partition::Level;
use paceline_sim::partition::exchange::Scope;
use paceline_sim::program::{Coordinates, Device, Group, NetworkLevel};
use paceline_sim::units::{DeviceId, GroupId, RankId, StageId};
use std::collections::HashMap;

impl Placement {
    /// The stages of a pipeline rank, in forward order.
    pub fn stages_of(&self, device: u32) -> impl Iterator<Item = StageId> + '_ {
        let here = move |(stage, &on): (usize, &u32)| (on == device).then_some(StageId(stage as u16));
        self.device_of_stage.iter().enumerate().filter_map(here)
    }
}

pub(super) struct Grid<'a> {
    placement: &'a Placement,
    devices: &'a [Device],
    data: u32,
    pipeline: u32,
    present: u32,
    levels: Levels,
    groups: Vec<Group>,
    /// By stage of one copy: the holders of its layers.
    reduction: Vec<GroupId>,
    /// By scope, stage of one copy and index: the holders within a fast group, and those with one place in every group.
    within: HashMap<(Scope, usize, u32), GroupId>,
    /// By replica and copy.
    ties: HashMap<(u32, u32), GroupId>,
    /// By replica.
    norms: Vec<GroupId>,
}

impl<'a> Grid<'a> {
    pub fn new(blueprint: &'a Blueprint, placement: &'a Placement) -> Result<Grid<'a>, LowerError> {
        let (data, pipeline) = (blueprint.data, blueprint.order.actions.len() as u32);
        let per_copy = placement.stages_per_copy();
        for stage in 0..per_copy {
            let mut ranks: Vec<u32> = holders(placement, stage).collect();
            ranks.sort_unstable();
            if let Some(pair) = ranks.windows(2).find(|pair| pair[0] == pair[1]) {
                return Err(LowerError::CopiesTogether { stage, rank: pair[0] });
            }
        }
        let mut grid = Grid {
            placement,
            devices: &blueprint.devices,
            data,
            pipeline,
            present: if blueprint.form == Form::Full { data } else { 1 },
            levels: Levels::of(blueprint, placement)?,
            groups: Vec::new(),
            reduction: Vec::new(),
            within: HashMap::new(),
            ties: HashMap::new(),
            norms: Vec::new(),
        };
        if grid.reduces() {
            let mut known: HashMap<Vec<u32>, (GroupId, usize)> = HashMap::new();
            for stage in 0..per_copy {
                let ranks: Vec<u32> = holders(placement, stage).collect();
                let (group, first) = match known.get(&ranks) {
                    Some(&found) => found,
                    None => {
                        let names: Vec<String> = ranks.iter().map(u32::to_string).collect();
                        let replicas = grid.levels.replicas();
                        let all = replicas.flat_map(|d| ranks.iter().map(move |&r| (d, r)));
                        let group = grid.add(format!("replicas of pipeline rank {}", names.join(" and ")), all);
                        known.insert(ranks.clone(), (group, stage));
                        (group, stage)
                    }
                };
                grid.reduction.push(group);
                if !grid.levels.has_groups() {
                    continue;
                }
                for scope in [Scope::Group, Scope::Across] {
                    for index in 0..grid.levels.communicators(scope) {
                        let members: Vec<(u32, u32)> =
                            grid.levels.members(scope, index).map(|d| (d, ranks[0])).collect();
                        if stage != first {
                            if let Some(&same) = grid.within.get(&(scope, first, index)) {
                                grid.within.insert((scope, stage, index), same);
                            }
                        } else if members.iter().any(|&(replica, _)| replica < grid.present) {
                            let what = if scope == Scope::Group { "group" } else { "place" };
                            let name = format!("{what} {index} of the replicas of pipeline rank {}", ranks[0]);
                            let group = grid.add(name, members.into_iter());
                            grid.within.insert((scope, stage, index), group);
                        }
                    }
                }
            }
        }
        for replica in 0..grid.present {
            for copy in 0..placement.copies {
                let ends = grid.ends(copy);
                if ends[0] != ends[1] {
                    let name = format!("tied embedding of replica {replica}, copy {copy}");
                    let group = grid.add(name, ends.into_iter().map(|rank| (replica, rank)));
                    grid.ties.insert((replica, copy), group);
                }
            }
        }
        match grid.levels.optimizer() {
            Level::Global => {
                let everyone = (0..data).flat_map(|d| (0..pipeline).map(move |p| (d, p)));
                let group = grid.add("all ranks".into(), everyone);
                grid.norms = vec![group; grid.present as usize];
            }
            Level::Group => {
                for index in 0..grid.levels.communicators(Scope::Group) {
                    let members: Vec<u32> = grid.levels.members(Scope::Group, index).collect();
                    let there = members.iter().filter(|&&replica| replica < grid.present).count();
                    if there > 0 {
                        let all = members.into_iter().flat_map(|d| (0..pipeline).map(move |p| (d, p)));
                        let group = grid.add(format!("all ranks of group {index}"), all);
                        grid.norms.extend(std::iter::repeat_n(group, there));
                    }
                }
            }
            Level::Whole if pipeline > 1 => {
                for replica in 0..grid.present {
                    let group = grid.add(format!("pipeline of replica {replica}"), (0..pipeline).map(|p| (replica, p)));
                    grid.norms.push(group);
                }
            }
            Level::Whole => {}
        }
        Ok(grid)
    }

    /// Adds a group of (replica, pipeline rank).
    fn add(&mut self, name: String, members: impl Iterator<Item = (u32, u32)>) -> GroupId {
        let (mut ranks, mut size) = (Vec::new(), 0);
        let (mut nodes, mut fast) = (Vec::new(), Vec::new());
        for (replica, pipeline) in members {
            size += 1;
            let node = self.devices[self.device(replica, pipeline).index()].node;
            let group = self.levels.group_of(replica, pipeline);
            nodes.push((node, group));
            fast.push(group);
            if replica < self.present {
                ranks.push(self.rank(replica, pipeline));
            }
        }
        nodes.sort_unstable();
        nodes.dedup();
        let level = if nodes.len() > 1 { NetworkLevel::Inter } else { NetworkLevel::Intra };
        fast.sort_unstable();
        fast.dedup();
        let crossing = self.levels.crossing(fast.len());
        self.groups.push(Group { name, ranks, size, level, crossing });
        GroupId(self.groups.len() as u32 - 1)
    }

    /// The pipeline ranks of a copy's first and last stage.
    fn ends(&self, copy: u32) -> [u32; 2] {
        let n = self.placement.stages_per_copy();
        let first = copy as usize * n;
        [self.placement.device_of_stage[first], self.placement.device_of_stage[first + n - 1]]
    }

    /// Replicas in the program.
    pub fn present(&self) -> usize {
        self.present as usize
    }

    pub fn rank(&self, data: u32, pipeline: u32) -> RankId {
        RankId(data * self.pipeline + pipeline)
    }

    pub fn coordinates(&self, data: u32, pipeline: u32) -> Coordinates {
        Coordinates { data, pipeline, group: self.levels.group_of(data, pipeline) }
    }

    pub fn device(&self, data: u32, pipeline: u32) -> DeviceId {
        DeviceId(self.rank(data, pipeline).0 % self.devices.len() as u32)
    }

    /// Whether several ranks hold the same parameters.
    pub fn reduces(&self) -> bool {
        self.data * self.placement.copies > 1
    }

    /// How holders of the same parameters share states.
    pub fn levels(&self) -> &Levels {
        &self.levels
    }

    /// Whether the model has two copies in one pipeline.
    pub fn copies(&self) -> u32 {
        self.placement.copies
    }

    /// The stage of the first copy that holds the same layers.
    pub fn layers_of(&self, stage: StageId) -> usize {
        stage.index() % self.placement.stages_per_copy()
    }

    /// The copy of a stage.
    pub fn copy_of(&self, stage: StageId) -> u32 {
        (stage.index() / self.placement.stages_per_copy()) as u32
    }

    /// The holders of a stage's layers with which a replica exchanges in a scope.
    pub fn sharers(&self, scope: Scope, data: u32, stage: StageId) -> Option<GroupId> {
        let layers = self.layers_of(stage);
        match scope {
            Scope::World => self.reduction.get(layers).copied(),
            _ => self.within.get(&(scope, layers, self.levels.communicator(scope, data))).copied(),
        }
    }

    /// The holders of the two copies of a tied matrix.
    pub fn tie(&self, data: u32, stage: StageId) -> Option<GroupId> {
        self.ties.get(&(data, self.copy_of(stage))).copied()
    }

    /// Who sums the gradient norm.
    pub fn norm(&self, data: u32) -> Option<GroupId> {
        self.norms.get(data as usize).copied()
    }

    /// How the states of a unit of so many elements are cut, as seen by a holder.
    pub fn cut(&self, data: u32, stage: StageId, elements: u64) -> Cut {
        self.levels.cut(data, self.copy_of(stage), elements)
    }

    /// The true number of members of a group.
    pub fn size(&self, group: GroupId) -> u32 {
        self.groups[group.index()].size
    }

    pub fn groups(self) -> Vec<Group> {
        self.groups
    }
}

/// The pipeline ranks that hold the layers of a stage: one per copy.
fn holders(placement: &Placement, stage: usize) -> impl Iterator<Item = u32> + '_ {
    let n = placement.stages_per_copy();
    (0..placement.copies as usize).map(move |copy| placement.device_of_stage[copy * n + stage])
}
