//! The ranks and their groups: replicas times pipeline ranks, numbered replica by replica.

use super::{Blueprint, Form, LowerError, StatePartition};
use crate::order::Placement;
use paceline_sim::model::Shard;
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
    sharded: bool,
    groups: Vec<Group>,
    /// By stage of one copy.
    reduction: Vec<GroupId>,
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
            sharded: blueprint.states == StatePartition::Zero1 && data * placement.copies > 1,
            groups: Vec::new(),
            reduction: Vec::new(),
            ties: HashMap::new(),
            norms: Vec::new(),
        };
        if grid.reduces() {
            let mut known: HashMap<Vec<u32>, GroupId> = HashMap::new();
            for stage in 0..per_copy {
                let ranks: Vec<u32> = holders(placement, stage).collect();
                let group = match known.get(&ranks) {
                    Some(&group) => group,
                    None => {
                        let names: Vec<String> = ranks.iter().map(u32::to_string).collect();
                        let all = (0..data).flat_map(|d| ranks.iter().map(move |&r| (d, r)));
                        let group = grid.add(format!("replicas of pipeline rank {}", names.join(" and ")), all);
                        known.insert(ranks, group);
                        group
                    }
                };
                grid.reduction.push(group);
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
        if grid.sharded {
            let everyone = (0..data).flat_map(|d| (0..pipeline).map(move |p| (d, p)));
            let group = grid.add("all ranks".into(), everyone);
            grid.norms = vec![group; grid.present as usize];
        } else if pipeline > 1 {
            for replica in 0..grid.present {
                let group = grid.add(format!("pipeline of replica {replica}"), (0..pipeline).map(|p| (replica, p)));
                grid.norms.push(group);
            }
        }
        Ok(grid)
    }

    /// Adds a group of (replica, pipeline rank).
    fn add(&mut self, name: String, members: impl Iterator<Item = (u32, u32)>) -> GroupId {
        let (mut ranks, mut size) = (Vec::new(), 0);
        let mut nodes = Vec::new();
        for (replica, pipeline) in members {
            size += 1;
            nodes.push(self.devices[self.device(replica, pipeline).index()].node);
            if replica < self.present {
                ranks.push(self.rank(replica, pipeline));
            }
        }
        nodes.dedup();
        let level = if nodes.len() > 1 { NetworkLevel::Inter } else { NetworkLevel::Intra };
        self.groups.push(Group { name, ranks, size, level });
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
        Coordinates { data, pipeline }
    }

    pub fn device(&self, data: u32, pipeline: u32) -> DeviceId {
        DeviceId(self.rank(data, pipeline).0 % self.devices.len() as u32)
    }

    /// Whether several ranks hold the same parameters.
    pub fn reduces(&self) -> bool {
        self.data * self.placement.copies > 1
    }

    /// Whether holders of the same parameters share the work of the optimizer.
    pub fn sharded(&self) -> bool {
        self.sharded
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

    /// The holders of a stage's layers.
    pub fn reduction(&self, stage: StageId) -> Option<GroupId> {
        self.reduction.get(self.layers_of(stage)).copied()
    }

    /// The holders of the two copies of a tied matrix.
    pub fn tie(&self, data: u32, stage: StageId) -> Option<GroupId> {
        self.ties.get(&(data, self.copy_of(stage))).copied()
    }

    /// Who sums the gradient norm.
    pub fn norm(&self, data: u32) -> Option<GroupId> {
        self.norms.get(data as usize).copied()
    }

    /// The part of a stage's optimizer states that a replica holds.
    pub fn shard(&self, data: u32, stage: StageId) -> Shard {
        if !self.sharded {
            return Shard::WHOLE;
        }
        let copies = self.placement.copies;
        Shard { index: data * copies + self.copy_of(stage), count: self.data * copies }
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
