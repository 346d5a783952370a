//! What is known of a program before it runs: which send meets which receive, which ops of a group form one
//! collective, on which device everything happens.

use crate::error::ExecError;
use paceline_sim::program::{Arrangement, Collective, Element, Message, OpKind, Program, Stream};
use paceline_sim::units::{OpId, RankId};
use std::collections::HashMap;

/// An op of a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct OpRef {
    pub rank: u32,
    pub op: u32,
}

/// A message: one send and the receive that it meets.
#[derive(Debug, Clone, Copy)]
pub struct Transfer {
    pub from: OpRef,
    pub to: OpRef,
    pub bytes: u64,
}

/// One collective of a group: the op of every member, in the order of the group.
#[derive(Debug, Clone)]
pub struct Meeting {
    pub collective: Collective,
    /// Index into [`Program::groups`].
    pub group: usize,
    pub members: Vec<OpRef>,
    /// Size of the whole array.
    pub bytes: u64,
    /// What it is an array of.
    pub element: Element,
    /// How it is cut, as the first member says it.
    pub arrangement: Arrangement,
}

/// The part of an op that meets other ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Partner {
    /// A compute-stream op that stays within its rank.
    None,
    /// The sender of a transfer.
    Sender(u32),
    /// The receiver of a transfer.
    Receiver(u32),
    /// A member of a collective.
    Member { meeting: u32, member: u32 },
}

/// A program with its partners found.
#[derive(Debug)]
pub struct Bound<'p> {
    pub program: &'p Program,
    pub transfers: Vec<Transfer>,
    pub meetings: Vec<Meeting>,
    /// By rank and op.
    pub partners: Vec<Vec<Partner>>,
    /// Communication streams of every rank: one more than the highest stream number.
    pub streams: Vec<usize>,
}

impl<'p> Bound<'p> {
    /// Finds the partners. The program's check has proved that there are; what is refused here would have been there.
    pub fn new(program: &'p Program) -> Result<Bound<'p>, ExecError> {
        let wrong = |what: String| Err(ExecError::Program(what));
        let mut partners: Vec<Vec<Partner>> =
            program.ranks.iter().map(|rank| vec![Partner::None; rank.ops.len()]).collect();
        let mut posted: HashMap<(u32, u32, Message), (OpRef, u64)> = HashMap::new();
        let mut meetings: Vec<Meeting> = Vec::new();
        // Per group, the meetings in order; per group and member, how many it has joined.
        let mut of_group: Vec<Vec<u32>> = vec![Vec::new(); program.groups.len()];
        let mut joined: HashMap<(usize, u32), usize> = HashMap::new();
        for (r, rank) in program.ranks.iter().enumerate() {
            for (o, op) in rank.ops.iter().enumerate() {
                let here = OpRef { rank: r as u32, op: o as u32 };
                match op.kind {
                    OpKind::Send { peer, message, buffer } => {
                        let bytes = rank.buffers[buffer.index()].bytes;
                        if posted.insert((here.rank, peer.0, message), (here, bytes)).is_some() {
                            return wrong(format!("{} {} sends {message:?} twice", RankId(here.rank), OpId(here.op)));
                        }
                    }
                    OpKind::Collective { collective, group, buffer, bytes, arrangement, .. } => {
                        let g = group.index();
                        let ranks = &program.groups[g].ranks;
                        if ranks.len() != program.groups[g].size as usize {
                            return wrong(format!(
                                "group {:?} has {} of {} ranks: a representative program is for the simulator",
                                program.groups[g].name,
                                ranks.len(),
                                program.groups[g].size
                            ));
                        }
                        let Some(member) = ranks.iter().position(|rank| rank.0 == here.rank) else {
                            return wrong(format!(
                                "{} is not in group {:?}",
                                RankId(here.rank),
                                program.groups[g].name
                            ));
                        };
                        let turn = joined.entry((g, here.rank)).or_insert(0);
                        if *turn == of_group[g].len() {
                            of_group[g].push(meetings.len() as u32);
                            let members = vec![OpRef { rank: u32::MAX, op: 0 }; ranks.len()];
                            let element = rank.buffers[buffer.index()].element;
                            meetings.push(Meeting { collective, group: g, members, bytes, element, arrangement });
                        }
                        let meeting = of_group[g][*turn];
                        *turn += 1;
                        let found = &mut meetings[meeting as usize];
                        let element = rank.buffers[buffer.index()].element;
                        let same = (found.collective, found.bytes, found.element) == (collective, bytes, element);
                        if !same || !found.arrangement.meets(&arrangement) {
                            return wrong(format!(
                                "{} {} brings {collective:?} of {bytes} bytes of {element:?} where its group runs {:?} of {} of {:?}",
                                RankId(here.rank),
                                OpId(here.op),
                                found.collective,
                                found.bytes,
                                found.element
                            ));
                        }
                        found.members[member] = here;
                        partners[r][o] = Partner::Member { meeting, member: member as u32 };
                    }
                    OpKind::Recv { .. } => {}
                    _ if op.stream != Stream::COMPUTE => {
                        return wrong(format!(
                            "{} {} computes on a communication stream",
                            RankId(here.rank),
                            OpId(here.op)
                        ));
                    }
                    _ => {}
                }
                let buffer = match op.kind {
                    OpKind::Send { buffer, .. } | OpKind::Recv { buffer, .. } | OpKind::Collective { buffer, .. } => {
                        buffer
                    }
                    _ => continue,
                };
                if !op.uses.contains(&buffer) {
                    return Err(ExecError::Undeclared {
                        rank: RankId(here.rank),
                        op: OpId(here.op),
                        tensor: rank.buffers[buffer.index()].tensor,
                    });
                }
            }
        }
        for meeting in &meetings {
            if let Some(absent) = meeting.members.iter().position(|member| member.rank == u32::MAX) {
                let group = &program.groups[meeting.group];
                return wrong(format!("{} never joins a collective of group {:?}", group.ranks[absent], group.name));
            }
        }
        let mut transfers = Vec::with_capacity(posted.len());
        for (r, rank) in program.ranks.iter().enumerate() {
            for (o, op) in rank.ops.iter().enumerate() {
                let OpKind::Recv { peer, message, buffer } = op.kind else { continue };
                let to = OpRef { rank: r as u32, op: o as u32 };
                let Some((from, bytes)) = posted.remove(&(peer.0, to.rank, message)) else {
                    return wrong(format!(
                        "{} {} receives {message:?}, which nobody sends",
                        RankId(to.rank),
                        OpId(to.op)
                    ));
                };
                let room = rank.buffers[buffer.index()].bytes;
                if room != bytes {
                    return wrong(format!(
                        "{} {} receives {bytes} bytes into a buffer of {room}",
                        RankId(to.rank),
                        OpId(to.op)
                    ));
                }
                partners[from.rank as usize][from.op as usize] = Partner::Sender(transfers.len() as u32);
                partners[r][o] = Partner::Receiver(transfers.len() as u32);
                transfers.push(Transfer { from, to, bytes });
            }
        }
        if let Some((from, _)) = posted.values().next() {
            return wrong(format!("{} {} sends what nobody receives", RankId(from.rank), OpId(from.op)));
        }
        let streams = program
            .ranks
            .iter()
            .map(|rank| rank.ops.iter().map(|op| op.stream.0 as usize + 1).max().unwrap_or(0))
            .collect();
        Ok(Bound { program, transfers, meetings, partners, streams })
    }

    /// The device of a rank.
    pub fn device(&self, rank: u32) -> usize {
        self.program.ranks[rank as usize].device.index()
    }
}
