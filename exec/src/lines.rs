//! Ranks on a device that runs behind the host's back: a queue per stream of each rank, and the moments by which they wait for each other.
//!
//! Host threads go through the program as everywhere, but an op that "has ended" to them has only been queued: they run ahead of
//! the device. What the program makes an op wait for, its queue follows on the device:
//! - an op of a communication stream follows the compute op before it in the list, as the contract of programs says
//!   ([`paceline_sim::program`]). So memory that an earlier op has freed and that this one uses again is out of use: only compute
//!   ops free, after what else used the buffer;
//! - every op follows the ops that it waits for, where they are on another queue;
//! - a receive follows its send, and every round of a collective the round before of all members.
//!
//! Hosts wait where they read a value, and at the end of a step. Then the times of ops, by the device's clock, are put in place
//! of those at which they were queued.

use crate::bind::{Bound, OpRef, Partner};
use crate::device_exchange::Sums;
use crate::effects::Effects;
use crate::fabric::{Fabric, NOTICEABLE};
use paceline_kernels::{Device, KernelError, Moment, Queue, Queues};
use paceline_sim::program::{Op, Stream};
use paceline_sim::trace::WaitReason;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A queue, and memory for the sums that its communication makes.
pub(crate) struct Line {
    pub queue: Box<dyn Queue>,
    pub sums: Sums,
}

/// When an op came to its peers (communication), began its work, and ended.
#[derive(Debug, Clone, Copy)]
struct Moments {
    arrived: Moment,
    start: Moment,
    end: Moment,
}

struct RankLines {
    /// By stream of the program.
    lines: Vec<Line>,
    /// By op.
    moments: Vec<Moments>,
    /// By op: the last compute-stream op before it.
    before: Vec<Option<u32>>,
    /// Moments between kernel calls, and how many of them are taken.
    ticks: Mutex<(Vec<Moment>, usize)>,
}

/// The queues of all ranks that this process runs.
pub(crate) struct Lines<'a> {
    bound: &'a Bound<'a>,
    queues: &'a dyn Queues,
    /// By rank; empty for ranks of other processes.
    ranks: Vec<RankLines>,
    /// By meeting: all members have done a round.
    gates: Vec<Moment>,
    /// The begin of a step.
    origin: Moment,
}

impl<'a> Lines<'a> {
    pub fn open(
        bound: &'a Bound<'a>,
        queues: &'a dyn Queues,
        hosts: impl Fn(usize) -> bool,
    ) -> Result<Lines<'a>, KernelError> {
        let rank = |(r, rank): (usize, &'a paceline_sim::program::RankProgram)| {
            let ops = if hosts(r) { &rank.ops[..] } else { &[] };
            let streams = if hosts(r) { bound.streams[r].max(1) } else { 0 };
            let line = |_| Ok(Line { queue: queues.open()?, sums: Sums::default() });
            let moments = |_| Ok(Moments { arrived: queues.moment()?, start: queues.moment()?, end: queues.moment()? });
            let mut last = None;
            let before = (0..).zip(ops).map(|(number, op)| {
                let before = last;
                if op.stream == Stream::COMPUTE {
                    last = Some(number);
                }
                before
            });
            Ok(RankLines {
                before: before.collect(),
                lines: (0..streams).map(line).collect::<Result<_, KernelError>>()?,
                moments: ops.iter().map(moments).collect::<Result<_, KernelError>>()?,
                ticks: Mutex::default(),
            })
        };
        let ranks = bound.program.ranks.iter().enumerate();
        Ok(Lines {
            bound,
            queues,
            ranks: ranks.map(rank).collect::<Result<_, KernelError>>()?,
            gates: bound.meetings.iter().map(|_| queues.moment()).collect::<Result<_, _>>()?,
            origin: queues.moment()?,
        })
    }

    fn op(&self, at: OpRef) -> &Op {
        &self.bound.program.ranks[at.rank as usize].ops[at.op as usize]
    }

    fn moments(&self, at: OpRef) -> &Moments {
        &self.ranks[at.rank as usize].moments[at.op as usize]
    }

    /// The line of an op.
    pub fn of(&self, at: OpRef) -> &Line {
        &self.ranks[at.rank as usize].lines[usize::from(self.op(at).stream.0)]
    }

    /// Where a rank computes.
    pub fn compute(&self, rank: u32) -> &dyn Device {
        &*self.ranks[rank as usize].lines[0].queue
    }

    /// The ops of other queues after which an op begins.
    fn causes(&self, at: OpRef) -> impl Iterator<Item = OpRef> {
        let (op, rank) = (self.op(at), at.rank);
        let before = self.ranks[rank as usize].before[at.op as usize].filter(|_| op.stream != Stream::COMPUTE);
        let waits = op.waits.iter().map(|wait| wait.0);
        let other = move |&cause: &OpRef| self.op(cause).stream != op.stream;
        before.into_iter().chain(waits).map(move |op| OpRef { rank, op }).filter(other)
    }

    /// The memory that an op allocates is out of use when its queue comes here.
    pub fn await_memory(&self, at: OpRef) -> Result<(), KernelError> {
        match self.ranks[at.rank as usize].before[at.op as usize] {
            Some(op) if self.op(at).stream != Stream::COMPUTE => {
                self.of(at).queue.follow(self.moments(OpRef { rank: at.rank, op }).end)
            }
            _ => Ok(()),
        }
    }

    /// Brings the queue of an op to where the op stands before its peers, or begins to compute.
    pub fn arrive(&self, at: OpRef) -> Result<(), KernelError> {
        let queue = &self.of(at).queue;
        self.causes(at).try_for_each(|cause| queue.follow(self.moments(cause).end))?;
        queue.set(self.moments(at).arrived)
    }

    /// An op begins its work.
    pub fn start(&self, at: OpRef) -> Result<(), KernelError> {
        self.of(at).queue.set(self.moments(at).start)
    }

    /// An op has done its work, or its part in a round.
    pub fn end(&self, at: OpRef) -> Result<(), KernelError> {
        self.of(at).queue.set(self.moments(at).end)
    }

    /// Brings sender and receiver together: the receiver copies next.
    pub fn open_transfer(&self, from: OpRef, to: OpRef) -> Result<(), KernelError> {
        self.arrive(from)?;
        self.arrive(to)?;
        let receiver = &self.of(to).queue;
        receiver.follow(self.moments(from).arrived)?;
        receiver.set(self.moments(from).start)?;
        self.start(to)
    }

    /// The receiver has copied: both sides end.
    pub fn close_transfer(&self, from: OpRef, to: OpRef) -> Result<(), KernelError> {
        self.end(to)?;
        self.of(from).queue.follow(self.moments(to).end)?;
        self.end(from)
    }

    /// All members of a meeting wait for each other before a round: for their arrival, or for the ends of their parts in the round before.
    pub fn open_round(&self, meeting: usize, round: usize) -> Result<(), KernelError> {
        let members = &self.bound.meetings[meeting].members;
        if round == 0 {
            members.iter().try_for_each(|&member| self.arrive(member))?;
        }
        self.gather(meeting, |moments| if round == 0 { moments.arrived } else { moments.end })?;
        members.iter().filter(|_| round == 0).try_for_each(|&member| self.start(member))
    }

    /// All members have done all rounds, of which there are so many: nobody works on another one's memory any more.
    pub fn close_meeting(&self, meeting: usize, rounds: usize) -> Result<(), KernelError> {
        if rounds == 0 {
            self.open_round(meeting, 0)?;
        } else {
            self.gather(meeting, |moments| moments.end)?;
        }
        self.bound.meetings[meeting].members.iter().try_for_each(|&member| self.end(member))
    }

    fn gather(&self, meeting: usize, of: impl Fn(&Moments) -> Moment) -> Result<(), KernelError> {
        let Some((&first, others)) = self.bound.meetings[meeting].members.split_first() else { return Ok(()) };
        for &other in others {
            self.of(first).queue.follow(of(self.moments(other)))?;
        }
        self.of(first).queue.set(self.gates[meeting])?;
        others.iter().try_for_each(|&other| self.of(other).queue.follow(self.gates[meeting]))
    }

    /// Brings the host to where an op stands before its peers.
    pub fn await_arrival(&self, at: OpRef) -> Result<(), KernelError> {
        self.arrive(at)?;
        self.queues.reach(self.moments(at).arrived)
    }

    /// The op of this process that has this part in an exchange.
    pub fn op_of(&self, partner: Partner) -> Option<OpRef> {
        match partner {
            Partner::None => None,
            Partner::Sender(t) => Some(self.bound.transfers[t as usize].from),
            Partner::Receiver(t) => Some(self.bound.transfers[t as usize].to),
            Partner::Member { meeting, member } => Some(self.bound.meetings[meeting as usize].members[member as usize]),
        }
    }

    /// A moment of its own between the kernel calls of a rank, from now until the end of the step.
    pub fn tick(&self, rank: u32) -> Result<Moment, KernelError> {
        let this = &self.ranks[rank as usize];
        let mut ticks = lock(&this.ticks);
        if ticks.1 == ticks.0.len() {
            ticks.0.push(self.queues.moment()?);
        }
        let moment = ticks.0[ticks.1];
        ticks.1 += 1;
        this.lines[0].queue.set(moment)?;
        Ok(moment)
    }

    /// Nanoseconds between two moments that have come.
    pub fn nanoseconds(&self, from: Moment, to: Moment) -> Result<u64, KernelError> {
        Ok((self.queues.seconds(from, to)? * 1e9).round() as u64)
    }

    /// A step begins.
    pub fn begin(&self) -> Result<(), KernelError> {
        for rank in &self.ranks {
            lock(&rank.ticks).1 = 0;
        }
        let first = self.ranks.iter().find_map(|rank| rank.lines.first());
        first.map_or(Ok(()), |line| line.queue.set(self.origin))
    }

    /// Lets the host wait for all queues of a rank.
    pub fn finish(&self, rank: u32) -> Result<(), KernelError> {
        self.ranks[rank as usize].lines.iter().try_for_each(|line| line.queue.complete())
    }

    /// Puts the times of ops by the device's clock into the fabric's records, after a step that began at `begin` by the host's. What was
    /// carried to other processes keeps the host's times.
    pub fn resolve<E: Effects>(&self, fabric: &Fabric<E>, begin: u64) -> Result<(), KernelError> {
        let at = |moment| Ok::<u64, KernelError>(begin + self.nanoseconds(self.origin, moment)?);
        // First all ends and arrivals: causes lie on other ranks, too.
        for (rank, lines) in (0..).zip(&self.ranks) {
            for (op, moments) in (0..).zip(&lines.moments) {
                let here = OpRef { rank, op };
                if fabric.has_ended(rank, op) && !fabric.is_carried(self.partner(here)) {
                    let record = &fabric.records(rank)[op as usize];
                    let (arrived, start, end) = (at(moments.arrived)?, at(moments.start)?, at(moments.end)?);
                    record.arrived.store(arrived, Ordering::Relaxed);
                    record.start.store(start.max(arrived), Ordering::Relaxed);
                    record.end.store(end, Ordering::Relaxed);
                    record.observed_end.store(end, Ordering::Relaxed);
                }
            }
        }
        for (rank, lines) in (0..).zip(&self.ranks) {
            // By stream: when its last op ended.
            let mut ended = vec![begin; lines.lines.len()];
            for op in 0..lines.moments.len() as u32 {
                let here = OpRef { rank, op };
                if !fabric.has_ended(rank, op) {
                    continue;
                }
                let stream = usize::from(self.op(here).stream.0);
                if !fabric.is_carried(self.partner(here)) {
                    self.explain(fabric, here, ended[0].max(ended[stream]));
                }
                ended[stream] = fabric.records(rank)[op as usize].end.load(Ordering::Relaxed);
            }
        }
        Ok(())
    }

    fn partner(&self, at: OpRef) -> Partner {
        self.bound.partners[at.rank as usize][at.op as usize]
    }

    /// Notes from when on an op could have begun, and what it waited for: of the causes of a late start the one that cost most.
    fn explain<E: Effects>(&self, fabric: &Fabric<E>, at: OpRef, ready: u64) {
        let records = fabric.records(at.rank);
        let record = &records[at.op as usize];
        let end = |op: u32| records[op as usize].end.load(Ordering::Relaxed);
        let (arrived, start) = (record.arrived.load(Ordering::Relaxed), record.start.load(Ordering::Relaxed));
        let last = self.op(at).waits.iter().max_by_key(|wait| end(wait.0));
        let op = last.map_or(0, |wait| end(wait.0).saturating_sub(ready));
        let arrival = |peer: OpRef| fabric.records(peer.rank)[peer.op as usize].arrived.load(Ordering::Relaxed);
        let peers: &[OpRef] = match self.partner(at) {
            Partner::None => &[],
            Partner::Sender(t) | Partner::Receiver(t) => {
                let transfer = &self.bound.transfers[t as usize];
                &[transfer.from, transfer.to]
            }
            Partner::Member { meeting, .. } => &self.bound.meetings[meeting as usize].members,
        };
        let met = peers.iter().map(|&peer| arrival(peer)).max().unwrap_or(arrived);
        let peer = met.saturating_sub(arrived);
        record.ready.store(ready.min(start), Ordering::Relaxed);
        record.set_wait(if peer > op.max(NOTICEABLE) {
            Some(WaitReason::Peer)
        } else {
            last.filter(|_| op > NOTICEABLE).map(|&wait| WaitReason::Op(wait))
        });
    }
}

impl Drop for Lines<'_> {
    fn drop(&mut self) {
        let of_ops = self.ranks.iter().flat_map(|rank| &rank.moments);
        let mut all: Vec<Moment> = of_ops.flat_map(|op| [op.arrived, op.start, op.end]).collect();
        for rank in &self.ranks {
            all.append(&mut lock(&rank.ticks).0);
            // What was queued uses memory that goes next. An error was told, or nobody is left to hear it.
            rank.lines.iter().for_each(|line| drop(line.queue.complete()));
        }
        all.extend(&self.gates);
        all.push(self.origin);
        self.queues.release(&all);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
