//! A program as flat arrays: ops numbered through over all ranks, partners and waits resolved.

use super::EngineError;
use super::state::State;
use super::timeline::Timeline;
use crate::cost::{CostModel, Exchange, Pauses, Round};
use crate::program::{OpKind, OpRef, Partners, Program, Stream, Way};
use crate::units::{OpId, RankId};
use smallvec::SmallVec;

/// A program prepared for simulation.
#[derive(Debug)]
pub struct Compiled<'p> {
    pub(super) program: &'p Program,
    /// By rank, its first op; and one more.
    pub(super) first: Vec<u32>,
    /// By op.
    pub(super) ops: Vec<Node>,
    /// All waits; an op has `waits[from..to]`.
    pub(super) waits: Vec<u32>,
    pub(super) transfers: Vec<Transfer>,
    pub(super) meetings: Vec<Meeting>,
    /// Members of all meetings, as ops.
    pub(super) members: Vec<u32>,
    /// By rank: number of streams.
    pub(super) streams: Vec<usize>,
    /// By rank.
    pub(super) devices: Vec<u32>,
    /// The links between fast groups that transfers take, and then those of meetings; none where links are not slowed down.
    pub(super) ways: Vec<Way>,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Node {
    pub rank: u32,
    pub stream: u8,
    pub role: Role,
    pub waits: (u32, u32),
}

/// What an op is to the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Compute,
    /// One end of a transfer.
    End(u32),
    Member(u32),
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Transfer {
    pub from: u32,
    pub to: u32,
    pub bytes: u64,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Meeting {
    pub group: u32,
    /// Its members are `members[from..to]`.
    pub members: (u32, u32),
}

/// Ops are numbered below this, so that an event fits a few bytes.
const MOST_OPS: usize = 1 << 30;

impl<'p> Compiled<'p> {
    /// Resolves partners and waits.
    ///
    /// # Errors
    /// When ops do not meet, wait for later ones, or compute on a communication stream.
    pub fn new(program: &'p Program) -> Result<Compiled<'p>, EngineError> {
        let partners = Partners::of(program)?;
        let total: usize = program.ranks.iter().map(|rank| rank.ops.len()).sum();
        if total > MOST_OPS {
            return Err(EngineError::TooLarge { limit: MOST_OPS });
        }
        let mut first = Vec::with_capacity(program.ranks.len() + 1);
        let mut ops = Vec::with_capacity(total);
        let mut waits = Vec::new();
        for (number, rank) in (0u32..).zip(&program.ranks) {
            first.push(ops.len() as u32);
            let start = ops.len() as u32;
            for (index, op) in rank.ops.iter().enumerate() {
                let this = OpRef { rank: RankId(number), op: OpId(index as u32) };
                let from = waits.len() as u32;
                for wait in &op.waits {
                    if wait.index() >= index {
                        return Err(EngineError::Wait { op: this, wait: wait.index() });
                    }
                    waits.push(start + wait.0);
                }
                if !op.kind.communicates() && op.stream != Stream::COMPUTE {
                    return Err(EngineError::Stream { op: this, stream: op.stream.0 });
                }
                let waits = (from, waits.len() as u32);
                ops.push(Node { rank: number, stream: op.stream.0, role: Role::Compute, waits });
            }
            if rank.device.index() >= program.devices.len() {
                let op = OpRef { rank: RankId(number), op: OpId(0) };
                let (device, devices) = (rank.device.index(), program.devices.len());
                return Err(EngineError::Device { op, device, devices });
            }
        }
        first.push(ops.len() as u32);
        let place = |at: OpRef| first[at.rank.index()] + at.op.0;
        let mut transfers = Vec::with_capacity(partners.transfers.len());
        for (number, found) in (0u32..).zip(&partners.transfers) {
            let transfer = Transfer { from: place(found.from), to: place(found.to), bytes: found.bytes };
            ops[transfer.from as usize].role = Role::End(number);
            ops[transfer.to as usize].role = Role::End(number);
            transfers.push(transfer);
        }
        let mut members = Vec::new();
        let mut meetings = Vec::with_capacity(partners.meetings.len());
        for (number, found) in (0u32..).zip(&partners.meetings) {
            let from = members.len() as u32;
            for &member in &found.members {
                ops[place(member) as usize].role = Role::Member(number);
                members.push(place(member));
            }
            meetings.push(Meeting { group: found.group as u32, members: (from, members.len() as u32) });
        }
        let mut ways = Vec::new();
        if program.link().is_some() {
            ways.extend(partners.transfers.iter().map(|t| program.way_of_message(t.from.rank, t.to.rank)));
            ways.extend(partners.meetings.iter().map(|m| program.way_of_round(&program.groups[m.group].ranks)));
        }
        let streams = program.ranks.iter().map(|rank| {
            let highest = rank.ops.iter().map(|op| usize::from(op.stream.0)).max();
            highest.map_or(0, |highest| highest + 1)
        });
        Ok(Compiled {
            streams: streams.collect(),
            devices: program.ranks.iter().map(|rank| rank.device.0).collect(),
            program,
            first,
            ops,
            waits,
            transfers,
            meetings,
            members,
            ways,
        })
    }

    /// Number of ops on all ranks.
    pub fn len(&self) -> usize {
        self.ops.len()
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Simulates one step.
    ///
    /// # Errors
    /// [`EngineError::Deadlock`] with the ops that stand.
    pub fn run(&self, costs: &dyn CostModel) -> Result<Timeline, EngineError> {
        State::new(self, &Times::of(self, costs)).run()
    }

    /// The op behind a number.
    pub(super) fn at(&self, op: u32) -> OpRef {
        let rank = self.ops[op as usize].rank;
        OpRef { rank: RankId(rank), op: OpId(op - self.first[rank as usize]) }
    }

    pub(super) fn members(&self, meeting: u32) -> &[u32] {
        let (from, to) = self.meetings[meeting as usize].members;
        &self.members[from as usize..to as usize]
    }
}

/// What every op takes.
pub(super) struct Times {
    /// By op; zero for communication.
    pub compute: Vec<u64>,
    pub transfers: Vec<Round>,
    pub meetings: Vec<SmallVec<[Round; 2]>>,
    /// By rank; empty where there are none.
    pub pauses: Vec<Pauses>,
}

impl Times {
    fn of(compiled: &Compiled, costs: &dyn CostModel) -> Times {
        let program = compiled.program;
        let mut compute = Vec::with_capacity(compiled.ops.len());
        for (number, rank) in (0..).zip(&program.ranks) {
            let cost = |op| costs.compute(program, RankId(number), op).0;
            compute.extend(rank.ops.iter().map(|op| if op.kind.communicates() { 0 } else { cost(op) }));
        }
        let rank = |op: u32| RankId(compiled.ops[op as usize].rank);
        let transfers = compiled.transfers.iter();
        let transfers = transfers.map(|t| costs.transfer(program, rank(t.from), rank(t.to), t.bytes)).collect();
        let rounds = |number: usize| {
            let meeting = &compiled.meetings[number];
            let first = compiled.at(compiled.members[meeting.members.0 as usize]);
            let rank = &program.ranks[first.rank.index()];
            match rank.ops[first.op.index()].kind {
                OpKind::Collective { collective, buffer, bytes, arrangement, .. } => {
                    let element = rank.buffers[buffer.index()].element;
                    let exchange = Exchange { collective, bytes, element, arrangement };
                    costs.collective(program, exchange, &program.groups[meeting.group as usize])
                }
                _ => SmallVec::new(),
            }
        };
        let mut pauses: Vec<Pauses> =
            (0..program.ranks.len()).map(|number| costs.pauses(program, RankId(number as u32))).collect();
        if pauses.iter().all(|&pauses| pauses == Pauses::default()) {
            pauses.clear();
        }
        Times { compute, transfers, meetings: (0..compiled.meetings.len()).map(rounds).collect(), pauses }
    }
}
