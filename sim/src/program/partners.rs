//! Which ops of a program meet: every send with its receive, every op of a collective with those of its group.

use super::{Algorithm, Arrangement, Collective, Message, OpKind, Payload, Program};
use crate::units::{OpId, RankId, StageId};
use std::collections::HashMap;
use thiserror::Error;

/// An op of a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OpRef {
    /// Whose.
    pub rank: RankId,
    /// Which.
    pub op: OpId,
}

impl std::fmt::Display for OpRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.rank, self.op)
    }
}

/// A message: one send and the receive that it meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transfer {
    /// The send.
    pub from: OpRef,
    /// The receive.
    pub to: OpRef,
    /// Size of the message.
    pub bytes: u64,
}

/// One collective of a group: the op of every member in the program, in the order of the group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meeting {
    /// What it does.
    pub collective: Collective,
    /// Index into [`Program::groups`].
    pub group: usize,
    /// One op per member.
    pub members: Vec<OpRef>,
    /// Size of the whole array.
    pub bytes: u64,
    /// How the first member says that it is cut; where each member's own part lies is its own affair.
    pub arrangement: Arrangement,
}

/// All meetings of a program.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Partners {
    /// Messages.
    pub transfers: Vec<Transfer>,
    /// Collectives.
    pub meetings: Vec<Meeting>,
}

/// Why ops do not meet.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PartnerError {
    /// Two sends, or two receives, of one message between one pair of ranks.
    #[error("{second} and {first} both carry {message:?} between the same ranks")]
    Twice { first: OpRef, second: OpRef, message: Message },
    /// A send or a receive without its other end.
    #[error("{op} {what} {message:?}, and {peer} does not {missing}")]
    Alone { op: OpRef, what: &'static str, message: Message, peer: RankId, missing: &'static str },
    /// The two ends disagree on the size.
    #[error("{from} sends {sent} bytes, and {to} receives {received}")]
    Size { from: OpRef, to: OpRef, sent: u64, received: u64 },
    /// A collective of a group that the rank does not belong to.
    #[error("{op} is a collective of group `{group}`, of which {} is no member", op.rank)]
    Stranger { op: OpRef, group: String },
    /// Members of a group issue different collectives in the same place of their order.
    #[error(
        "group `{group}` disagrees on its collective number {number}: {first} brings {theirs}, {second} brings {ours}; every member must issue the same ones in the same order"
    )]
    Order { group: String, number: usize, first: OpRef, second: OpRef, theirs: String, ours: String },
    /// A member issues fewer collectives than another.
    #[error("group `{group}`: {op} waits for {rank}, which never joins")]
    Absent { group: String, op: OpRef, rank: RankId },
    /// A rank, group or buffer that is not in the program.
    #[error("{op} names {what} {index}, and the program has {count}")]
    Unknown { op: OpRef, what: &'static str, index: usize, count: usize },
}

impl Partners {
    /// Finds who meets whom.
    ///
    /// # Errors
    /// The first op that meets nobody, or not what it expects.
    pub fn of(program: &Program) -> Result<Partners, PartnerError> {
        let mut sends: HashMap<(RankId, RankId, Message), (OpRef, u64)> = HashMap::new();
        let mut receives: HashMap<(RankId, RankId, Message), (OpRef, u64)> = HashMap::new();
        let mut partners = Partners::default();
        // Per group, its meetings in order; per group and member, how many that has joined.
        let mut of_group: Vec<Vec<usize>> = vec![Vec::new(); program.groups.len()];
        let mut joined: Vec<Vec<usize>> = program.groups.iter().map(|group| vec![0; group.ranks.len()]).collect();
        // What the first member said about a meeting: to be repeated by all.
        let mut said: Vec<Payload> = Vec::new();
        for (number, rank) in (0..).zip(&program.ranks) {
            let here = RankId(number);
            for (number, op) in (0..).zip(&rank.ops) {
                let this = OpRef { rank: here, op: OpId(number) };
                let size = |buffer: crate::units::BufferId| {
                    let found = rank.buffers.get(buffer.index()).map(|held| held.bytes);
                    let (index, count) = (buffer.index(), rank.buffers.len());
                    found.ok_or(PartnerError::Unknown { op: this, what: "buffer", index, count })
                };
                let known = |peer: RankId| {
                    let (index, count) = (peer.index(), program.ranks.len());
                    let there = index < count;
                    if there { Ok(()) } else { Err(PartnerError::Unknown { op: this, what: "rank", index, count }) }
                };
                match op.kind {
                    OpKind::Send { peer, message, buffer } => {
                        known(peer)?;
                        let before = sends.insert((here, peer, message), (this, size(buffer)?));
                        if let Some((first, _)) = before {
                            return Err(PartnerError::Twice { first, second: this, message });
                        }
                    }
                    OpKind::Recv { peer, message, buffer } => {
                        known(peer)?;
                        let before = receives.insert((peer, here, message), (this, size(buffer)?));
                        if let Some((first, _)) = before {
                            return Err(PartnerError::Twice { first, second: this, message });
                        }
                    }
                    OpKind::Collective { collective, group, payload, bytes, buffer, arrangement } => {
                        size(buffer)?;
                        arrangement.shard.map(size).transpose()?;
                        let (index, count) = (group.index(), program.groups.len());
                        let Some(of) = program.groups.get(index) else {
                            return Err(PartnerError::Unknown { op: this, what: "group", index, count });
                        };
                        let name = || of.name.clone();
                        let Some(member) = of.ranks.iter().position(|&rank| rank == here) else {
                            return Err(PartnerError::Stranger { op: this, group: name() });
                        };
                        let turn = joined[index][member];
                        joined[index][member] += 1;
                        let meeting = match of_group[index].get(turn) {
                            Some(&meeting) => meeting,
                            None => {
                                of_group[index].push(partners.meetings.len());
                                let members = vec![OpRef { rank: RankId(u32::MAX), op: OpId(0) }; of.ranks.len()];
                                let meeting = Meeting { collective, group: index, members, bytes, arrangement };
                                partners.meetings.push(meeting);
                                said.push(payload);
                                partners.meetings.len() - 1
                            }
                        };
                        let found = &mut partners.meetings[meeting];
                        let theirs = said[meeting];
                        let same = (found.collective, found.bytes) == (collective, bytes)
                            && found.arrangement.meets(&arrangement);
                        if !same || !same_array(program, theirs, payload) {
                            let first = found.members.iter().copied().find(|member| member.rank.0 != u32::MAX);
                            return Err(PartnerError::Order {
                                group: name(),
                                number: turn,
                                first: first.unwrap_or(this),
                                second: this,
                                theirs: describe(found.collective, theirs, found.bytes, &found.arrangement),
                                ours: describe(collective, payload, bytes, &arrangement),
                            });
                        }
                        found.members[member] = this;
                    }
                    OpKind::Compute { .. }
                    | OpKind::GradientNorm
                    | OpKind::Optimizer { .. }
                    | OpKind::OptimizerAhead { .. }
                    | OpKind::Validate { .. }
                    | OpKind::Join => {}
                }
            }
        }
        for meeting in &partners.meetings {
            let group = &program.groups[meeting.group];
            if let Some(absent) = meeting.members.iter().position(|member| member.rank.0 == u32::MAX) {
                let present = meeting.members.iter().copied().find(|member| member.rank.0 != u32::MAX);
                let rank = group.ranks[absent];
                let op = present.unwrap_or(OpRef { rank, op: OpId(0) });
                return Err(PartnerError::Absent { group: group.name.clone(), op, rank });
            }
        }
        for (number, rank) in (0..).zip(&program.ranks) {
            for (op_number, op) in (0..).zip(&rank.ops) {
                let this = OpRef { rank: RankId(number), op: OpId(op_number) };
                match op.kind {
                    OpKind::Send { peer, message, .. } if !receives.contains_key(&(this.rank, peer, message)) => {
                        return Err(PartnerError::Alone {
                            op: this,
                            what: "sends",
                            message,
                            peer,
                            missing: "receive it",
                        });
                    }
                    OpKind::Recv { peer, message, .. } => {
                        let Some(&(from, sent)) = sends.get(&(peer, this.rank, message)) else {
                            let what = "receives";
                            return Err(PartnerError::Alone { op: this, what, message, peer, missing: "send it" });
                        };
                        let received = receives[&(peer, this.rank, message)].1;
                        if sent != received {
                            return Err(PartnerError::Size { from, to: this, sent, received });
                        }
                        partners.transfers.push(Transfer { from, to: this, bytes: sent });
                    }
                    _ => {}
                }
            }
        }
        Ok(partners)
    }
}

fn describe(collective: Collective, payload: Payload, bytes: u64, arrangement: &Arrangement) -> String {
    let mut text = format!("{collective:?} of {payload:?}, {bytes} bytes");
    if arrangement.offset > 0 {
        text += &format!(" from byte {}", arrangement.offset);
    }
    if let Some(part) = arrangement.part {
        text += &format!(" in parts of {part}");
    }
    if arrangement.algorithm != Algorithm::default() {
        text += &format!(" by {:?}", arrangement.algorithm);
    }
    text + if arrangement.shard.is_some() { " with shards apart" } else { "" }
}

/// Whether two members of a group mean the same array.
fn same_array(program: &Program, first: Payload, second: Payload) -> bool {
    match (first, second) {
        (Payload::Gradients { stage: a, unit: u }, Payload::Gradients { stage: b, unit: v })
        | (Payload::Parameters { stage: a, unit: u }, Payload::Parameters { stage: b, unit: v }) => {
            same_layers(program, (a, u), (b, v))
        }
        _ => first == second,
    }
}

/// Whether two units have the same layers. Where the model has two copies (two pipelines running against each other), one
/// layer goes by two stages.
pub(super) fn same_layers(program: &Program, a: (StageId, u16), b: (StageId, u16)) -> bool {
    let unit = |(stage, unit): (StageId, u16)| {
        program.stages.get(stage.index()).and_then(|held| held.units.get(usize::from(unit)))
    };
    let half = program.stages.len() / 2;
    a == b || (a.0.index().abs_diff(b.0.index()) == half && a.1 == b.1 && unit(a) == unit(b))
}
