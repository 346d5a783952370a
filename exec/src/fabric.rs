//! The moving parts between ranks: their streams, their meetings, and the devices' turns.
//!
//! Nothing here runs on a thread of its own. An op of a communication stream **arrives** when it is issued, its
//! stream is free and its waits have ended; the thread that brings this about records it. The thread that completes a pair or a
//! group queues the work (the copy, the shards of a round) on the devices that have to do it, in that instant, so the
//! order of turns is the order of arrivals. A thread that waits for anything does the work at the head of its device's queue
//! itself: while a rank computes, it holds its device, so its communication could not run beside it anyway, and
//! when it waits, its thread is free. A message so costs at most one thread wake-up.
//!
//! One lock is held at a time, never while work is done.

mod carriage;
mod turns;
mod work;

use crate::bind::{Bound, OpRef, Partner};
use crate::effects::{Effects, HostRange, Passage};
use crate::error::ExecError;
use crate::exchange_times::ExchangeTally;
use crate::record::Record;
use crate::slot::Slot;
use carriage::Carriage;
use paceline_sim::trace::WaitReason;
use paceline_sim::units::{OpId, RankId};
use smallvec::SmallVec;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, OnceLock, PoisonError};
use std::thread::Thread;
use turns::Standing;
pub(crate) use turns::Turn;
use work::Watch;

/// Communication work for a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    Transfer { transfer: u32 },
    Round { meeting: u32, member: u32 },
}

/// What is under way between fast groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Passing {
    Transfer(u32),
    Round(u32),
}

/// The run was given up: the reason is in the fabric.
#[derive(Debug)]
pub(crate) struct Aborted;

struct Issued {
    op: u32,
    at: u64,
}

#[derive(Default)]
struct StreamState {
    queue: VecDeque<Issued>,
    /// The head has met its waits and stands before its peers.
    arrived: bool,
    /// When the last op of the stream ended.
    free_at: u64,
}

struct RankState {
    records: Vec<Record>,
    streams: Mutex<Vec<StreamState>>,
    /// Communication ops issued and not ended.
    outstanding: AtomicU32,
    thread: OnceLock<Thread>,
    granted: AtomicBool,
    standing: Mutex<Standing>,
    /// The thread sleeps until somebody wakes it.
    asleep: AtomicBool,
    /// The rank that has the device after it, and that it has yet to wake, see [`Fabric::pay`].
    owed: Mutex<Option<u32>>,
}

#[derive(Default)]
struct TransferState {
    arrived: AtomicU32,
    latest: AtomicU64,
    /// When it may be copied, where it passes a link.
    passed: AtomicU64,
    /// It was given to an idle device.
    to_idle: AtomicBool,
    from: AtomicRange,
    to: AtomicRange,
}

#[derive(Default)]
struct MeetingState {
    arrived: AtomicU32,
    /// Last arrival.
    began: AtomicU64,
    /// When the present round began.
    since: AtomicU64,
    /// Latest effective end of the parts of the present round.
    until: AtomicU64,
    round: AtomicU32,
    remaining: AtomicU32,
    /// Members whose part of the present round was given to an idle device, and when the last part began.
    to_idle: AtomicU32,
    last_begun: AtomicU64,
    ranges: Vec<AtomicRange>,
}

#[derive(Default)]
struct AtomicRange {
    address: AtomicU64,
    bytes: AtomicU64,
    shard: AtomicU64,
}

// Ranges and times are published by the AcqRel counters beside them.
impl AtomicRange {
    fn store(&self, range: HostRange) {
        self.address.store(range.address, Ordering::Relaxed);
        self.bytes.store(range.bytes, Ordering::Relaxed);
        self.shard.store(range.shard, Ordering::Relaxed);
    }

    fn load(&self) -> HostRange {
        HostRange {
            address: self.address.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            shard: self.shard.load(Ordering::Relaxed),
        }
    }
}

struct DeviceState {
    slot: Slot<Work>,
    /// When the device was last given up (paced runs start the next turn there).
    free_at: AtomicU64,
    /// When a rank last asked for it, by plan.
    asked: AtomicU64,
    /// Threads of its ranks that are not asleep.
    awake: AtomicU32,
}

/// A consequence to be worked off.
enum Consequence {
    Arrived {
        op: OpRef,
        at: u64,
    },
    /// All peers were there from `met` on; the exchange began at `start`.
    Ended {
        op: OpRef,
        met: u64,
        start: u64,
        end: u64,
    },
}

type Consequences = SmallVec<[Consequence; 8]>;

/// The state that ranks share.
pub(crate) struct Fabric<'p, E> {
    pub bound: &'p Bound<'p>,
    pub effects: E,
    ranks: Vec<RankState>,
    transfers: Vec<TransferState>,
    meetings: Vec<MeetingState>,
    devices: Vec<DeviceState>,
    /// The present step, from 1.
    epoch: AtomicU32,
    aborted: AtomicBool,
    /// Ranks that have left the present step before its end.
    left: AtomicU32,
    /// All have: what is still under way is for nobody.
    abandoned: AtomicBool,
    error: Mutex<Option<ExecError>>,
    /// What is under way between fast groups: when it has passed.
    wire: Mutex<BinaryHeap<Reverse<(u64, Passing)>>>,
    wire_changed: Condvar,
    /// When the next of it has passed; the end of time where nothing is under way.
    due: AtomicU64,
    /// Exchanges with other processes, and whether there are any.
    carriage: Carriage,
    alone: bool,
    /// Ops ended so far: tells a slow step from one that stands still.
    progress: AtomicU64,
    /// How often a waiting thread looks before it sleeps, while its device is idle.
    spins: u32,
    pub exchanges: ExchangeTally,
}

impl<'p, E: Effects> Fabric<'p, E> {
    pub fn new(bound: &'p Bound<'p>, effects: E, spins: u32) -> Fabric<'p, E> {
        let ranks = bound.program.ranks.iter().zip(&bound.streams).map(|(rank, &streams)| RankState {
            records: std::iter::repeat_with(Record::default).take(rank.ops.len()).collect(),
            streams: Mutex::new(std::iter::repeat_with(StreamState::default).take(streams).collect()),
            outstanding: AtomicU32::new(0),
            thread: OnceLock::new(),
            granted: AtomicBool::new(false),
            standing: Mutex::default(),
            asleep: AtomicBool::new(false),
            owed: Mutex::default(),
        });
        let meetings = bound.meetings.iter().map(|meeting| MeetingState {
            ranges: std::iter::repeat_with(AtomicRange::default).take(meeting.members.len()).collect(),
            ..MeetingState::default()
        });
        let devices = bound.program.devices.iter().map(|_| DeviceState {
            slot: Slot::default(),
            free_at: AtomicU64::new(0),
            asked: AtomicU64::new(0),
            awake: AtomicU32::new(0),
        });
        Fabric {
            ranks: ranks.collect(),
            transfers: std::iter::repeat_with(TransferState::default).take(bound.transfers.len()).collect(),
            meetings: meetings.collect(),
            devices: devices.collect(),
            epoch: AtomicU32::new(0),
            aborted: AtomicBool::new(false),
            left: AtomicU32::new(0),
            abandoned: AtomicBool::new(false),
            error: Mutex::new(None),
            wire: Mutex::new(BinaryHeap::new()),
            wire_changed: Condvar::new(),
            due: AtomicU64::new(u64::MAX),
            alone: (0..bound.program.ranks.len() as u32).all(|rank| effects.hosts(rank)),
            carriage: Carriage::new(bound.streams.iter().copied().max().unwrap_or(0)),
            progress: AtomicU64::new(0),
            spins,
            exchanges: ExchangeTally::new(bound),
            bound,
            effects,
        }
    }

    /// Makes the calling thread the thread of a rank.
    pub fn enter(&self, rank: u32) {
        // A rank has one thread per run, so this never finds another one.
        let _ = self.ranks[rank as usize].thread.set(std::thread::current());
        self.devices[self.bound.device(rank)].awake.fetch_add(1, Ordering::Relaxed);
    }

    /// What is measured of the ops of a rank.
    pub fn records(&self, rank: u32) -> &[Record] {
        &self.ranks[rank as usize].records
    }

    /// Lets all ranks begin the next step.
    pub fn begin_step(&self) {
        self.ask_for_first();
        self.epoch.fetch_add(1, Ordering::Release);
        self.wake_all();
    }

    /// The present step, from 1; 0 before the first.
    pub fn epoch(&self) -> u32 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Gives the run up. The first error is kept.
    pub fn abort(&self, error: ExecError) {
        self.effects.give_up(&error);
        self.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.stop();
    }

    /// Makes every thread leave at its next wait.
    pub fn stop(&self) {
        self.aborted.store(true, Ordering::Release);
        self.wake_all();
        // Under the lock, so that the watcher has either seen the flag or waits already.
        drop(self.wire.lock().unwrap_or_else(PoisonError::into_inner));
        self.wire_changed.notify_all();
        self.carriage.wake();
    }

    pub fn aborted(&self) -> bool {
        self.aborted.load(Ordering::Acquire)
    }

    pub fn take_error(&self) -> Option<ExecError> {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn wake_all(&self) {
        (0..self.ranks.len()).for_each(|rank| self.wake(rank as u32));
    }

    fn wake(&self, rank: u32) {
        let RankState { thread, asleep, .. } = &self.ranks[rank as usize];
        if let Some(thread) = thread.get() {
            if asleep.swap(false, Ordering::Relaxed) {
                self.devices[self.bound.device(rank)].awake.fetch_add(1, Ordering::Relaxed);
            }
            thread.unpark();
        }
    }

    /// Whether an op has ended in the present step.
    pub fn has_ended(&self, rank: u32, op: u32) -> bool {
        self.ranks[rank as usize].records[op as usize].ended.load(Ordering::Acquire)
            == self.epoch.load(Ordering::Relaxed)
    }

    /// The thread of `rank` waits until `done`, and meanwhile does the communication work of its device.
    pub fn drive(&self, rank: u32, done: impl Fn() -> bool) -> Result<(), Aborted> {
        let device = self.bound.device(rank);
        let DeviceState { slot, awake, .. } = &self.devices[device];
        loop {
            if done() {
                return Ok(());
            }
            if self.aborted() {
                return Err(Aborted);
            }
            self.pay(rank);
            if !self.is_abandoned()
                && let Some(work) = slot.take()
            {
                self.perform(device, work);
                continue;
            }
            // While the device is idle and none of its other threads could run, its core has nothing better to do than to
            // look.
            let alone = || slot.is_idle() && awake.load(Ordering::Relaxed) == 1;
            let mut left = self.spins;
            while left > 0 && alone() && !done() && !self.aborted() {
                left -= 1;
                std::hint::spin_loop();
            }
            if left < self.spins && left > 0 {
                continue;
            }
            let nap = match self.meet_passage(|| alone() && !done() && !self.aborted()) {
                Watch::Met => continue,
                Watch::Later(nap) => Some(nap),
                Watch::Nothing => None,
            };
            let asleep = &self.ranks[rank as usize].asleep;
            asleep.store(true, Ordering::Relaxed);
            awake.fetch_sub(1, Ordering::Relaxed);
            match nap {
                Some(nap) => std::thread::park_timeout(nap),
                None => std::thread::park(),
            }
            // Who wakes a thread counts it awake at once, though it may run only later.
            if asleep.swap(false, Ordering::Relaxed) {
                awake.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// A rank ends its program here, and all others end theirs at the same place. Waits for them, and works for them
    /// meanwhile. What nobody takes any more is dropped by [`Fabric::reset`].
    pub fn leave(&self, rank: u32) -> Result<(), Aborted> {
        self.pay(rank);
        if self.left.fetch_add(1, Ordering::AcqRel) + 1 == self.ranks.len() as u32 {
            self.abandoned.store(true, Ordering::Release);
            self.wake_all();
        }
        self.drive(rank, || self.is_abandoned())
    }

    /// Whether all ranks have left the present step.
    pub fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }

    /// Drops what an abandoned step has left under way. All threads must be between steps.
    pub fn reset(&self) {
        for rank in &self.ranks {
            for stream in rank.streams.lock().unwrap_or_else(PoisonError::into_inner).iter_mut() {
                stream.queue.clear();
                stream.arrived = false;
            }
            rank.outstanding.store(0, Ordering::Relaxed);
            rank.granted.store(false, Ordering::Relaxed);
            *rank.standing.lock().unwrap_or_else(PoisonError::into_inner) = Standing::Elsewhere;
        }
        self.transfers.iter().for_each(|transfer| transfer.arrived.store(0, Ordering::Relaxed));
        self.meetings.iter().for_each(|meeting| meeting.arrived.store(0, Ordering::Relaxed));
        self.devices.iter().for_each(|device| device.slot.clear());
        self.left.store(0, Ordering::Relaxed);
        self.abandoned.store(false, Ordering::Release);
    }

    /// How many ops have ended, and whether every thread sleeps. Where all sleep and nothing has ended for long, nobody is
    /// left to wake anybody.
    pub fn progress(&self) -> (u64, bool) {
        let on_wire = !self.wire.lock().unwrap_or_else(PoisonError::into_inner).is_empty();
        let asleep = !on_wire && self.ranks.iter().all(|rank| rank.asleep.load(Ordering::Relaxed));
        (self.progress.load(Ordering::Relaxed), asleep)
    }

    /// The communication ops that stand before their peers or wait for others, for an error message.
    pub fn standing(&self) -> String {
        let mut all = Vec::new();
        for (r, rank) in self.ranks.iter().enumerate() {
            let streams = rank.streams.lock().unwrap_or_else(PoisonError::into_inner);
            for head in streams.iter().filter_map(|stream| stream.queue.front()) {
                let kind = self.bound.program.ranks[r].ops[head.op as usize].kind;
                all.push(format!("{} {} {kind:?}", RankId(r as u32), OpId(head.op)));
            }
        }
        if all.is_empty() { "no communication is under way".into() } else { all.join("; ") }
    }

    /// Records that a compute-stream op has ended.
    pub fn end(&self, rank: u32, op: u32) {
        let epoch = self.epoch.load(Ordering::Relaxed);
        self.ranks[rank as usize].records[op as usize].ended.store(epoch, Ordering::Release);
        self.progress.fetch_add(1, Ordering::Relaxed);
    }

    /// Issues a communication op: `range` is what it sends, receives into or works on.
    pub fn issue(&self, rank: u32, op: u32, range: HostRange, at: u64) {
        match self.bound.partners[rank as usize][op as usize] {
            Partner::None => unreachable!("an op without partner is not issued to the fabric"),
            Partner::Sender(t) => self.transfers[t as usize].from.store(range),
            Partner::Receiver(t) => self.transfers[t as usize].to.store(range),
            Partner::Member { meeting, member } => {
                self.meetings[meeting as usize].ranges[member as usize].store(range);
            }
        }
        let state = &self.ranks[rank as usize];
        state.outstanding.fetch_add(1, Ordering::Relaxed);
        let mut consequences = Consequences::new();
        {
            let stream = self.bound.program.ranks[rank as usize].ops[op as usize].stream.0 as usize;
            let mut streams = state.streams.lock().unwrap_or_else(PoisonError::into_inner);
            streams[stream].queue.push_back(Issued { op, at });
            if streams[stream].queue.len() == 1 {
                self.advance(rank, &mut streams, &mut consequences);
            }
        }
        self.settle(consequences);
    }

    /// When the last communication op of a rank ended (or will, in a paced run).
    pub fn streams_end(&self, rank: u32) -> u64 {
        let streams = self.ranks[rank as usize].streams.lock().unwrap_or_else(PoisonError::into_inner);
        streams.iter().map(|stream| stream.free_at).max().unwrap_or(0)
    }

    /// Whether all communication ops issued by a rank have ended.
    pub fn is_quiet(&self, rank: u32) -> bool {
        self.ranks[rank as usize].outstanding.load(Ordering::Acquire) == 0
    }

    /// Lets the heads of a rank's streams arrive whose waits have ended.
    fn advance(&self, rank: u32, streams: &mut [StreamState], consequences: &mut Consequences) {
        let records = &self.ranks[rank as usize].records;
        let ops = &self.bound.program.ranks[rank as usize].ops;
        for stream in streams {
            let Some(head) = stream.queue.front().filter(|_| !stream.arrived) else { continue };
            let waits = &ops[head.op as usize].waits;
            if !waits.iter().all(|wait| self.has_ended(rank, wait.0)) {
                continue;
            }
            stream.arrived = true;
            let ready = head.at.max(stream.free_at);
            let record = &records[head.op as usize];
            record.ready.store(ready, Ordering::Relaxed);
            let last = waits.iter().max_by_key(|wait| records[wait.index()].end.load(Ordering::Relaxed));
            let waited_until = last.map_or(0, |wait| records[wait.index()].end.load(Ordering::Relaxed));
            record.set_wait(last.filter(|_| waited_until > ready).map(|&wait| WaitReason::Op(wait)));
            let at = self.effects.at(ready.max(waited_until));
            record.arrived.store(at, Ordering::Relaxed);
            consequences.push(Consequence::Arrived { op: OpRef { rank, op: head.op }, at });
        }
    }

    /// Works consequences off until there are no more. Only then ranks go on, those first whose ops ended last, as in the simulator: what
    /// they compute would have its turn before the exchanges that follow at once. Nor is a thread woken before: it may take this one's core.
    fn settle(&self, mut consequences: Consequences) {
        let mut ended: SmallVec<[u32; 8]> = SmallVec::new();
        while let Some(consequence) = consequences.pop() {
            match consequence {
                Consequence::Arrived { op, at } => self.arrive(op, at, &mut consequences),
                Consequence::Ended { op, met, start, end } => {
                    self.finish(op, met, start, end, &mut consequences);
                    ended.push(op.rank);
                }
            }
        }
        ended.reverse();
        ended.retain(|rank| self.ask_for(*rank));
        ended.into_iter().for_each(|rank| self.wake(rank));
    }

    fn arrive(&self, op: OpRef, at: u64, consequences: &mut Consequences) {
        let partner = self.bound.partners[op.rank as usize][op.op as usize];
        if self.is_carried(partner) {
            let stream = self.bound.program.ranks[op.rank as usize].ops[op.op as usize].stream;
            return self.carriage.give(stream.0 as usize, op);
        }
        match partner {
            Partner::None => unreachable!("an op without partner does not arrive"),
            Partner::Sender(t) | Partner::Receiver(t) => {
                let state = &self.transfers[t as usize];
                state.latest.fetch_max(at, Ordering::Relaxed);
                if state.arrived.fetch_add(1, Ordering::AcqRel) == 1 {
                    // Nobody arrives here again before this step has ended.
                    state.arrived.store(0, Ordering::Relaxed);
                    let since = state.latest.load(Ordering::Relaxed);
                    match self.effects.open_transfer(t as usize, since) {
                        Passage::Free => state.passed.store(since, Ordering::Relaxed),
                        Passage::Planned(at) => state.passed.store(at, Ordering::Relaxed),
                        Passage::Awaited(at) => return self.await_passage(at, Passing::Transfer(t)),
                    }
                    self.work_on_transfer(t, consequences);
                }
            }
            Partner::Member { meeting, .. } => {
                let state = &self.meetings[meeting as usize];
                let members = self.bound.meetings[meeting as usize].members.len() as u32;
                state.began.fetch_max(at, Ordering::Relaxed);
                if state.arrived.fetch_add(1, Ordering::AcqRel) + 1 == members {
                    state.arrived.store(0, Ordering::Relaxed);
                    state.since.store(state.began.load(Ordering::Relaxed), Ordering::Relaxed);
                    state.round.store(0, Ordering::Relaxed);
                    self.begin_round(meeting, consequences);
                }
            }
        }
    }

    /// Ends a communication op.
    fn finish(&self, op: OpRef, met: u64, start: u64, end: u64, consequences: &mut Consequences) {
        let state = &self.ranks[op.rank as usize];
        let record = &state.records[op.op as usize];
        let (ready, arrived) = (record.ready.load(Ordering::Relaxed), record.arrived.load(Ordering::Relaxed));
        record.start.store(start, Ordering::Relaxed);
        record.end.store(end, Ordering::Relaxed);
        record.observed_end.store(end, Ordering::Relaxed);
        // Of the causes of a late start, the one that cost most. A wait for an op was noted at arrival.
        let (peer, device) = (met.saturating_sub(arrived), start.saturating_sub(met));
        if peer.max(device) > NOTICEABLE.max(arrived.saturating_sub(ready)) {
            record.set_wait(Some(if peer >= device { WaitReason::Peer } else { WaitReason::Device }));
        }
        self.end(op.rank, op.op);
        let stream = self.bound.program.ranks[op.rank as usize].ops[op.op as usize].stream.0 as usize;
        {
            let mut streams = state.streams.lock().unwrap_or_else(PoisonError::into_inner);
            let this = &mut streams[stream];
            this.queue.pop_front();
            this.arrived = false;
            this.free_at = end;
            self.advance(op.rank, &mut streams, consequences);
        }
        state.outstanding.fetch_sub(1, Ordering::Release);
    }
}

/// Waits up to this many nanoseconds are the executor's own pace, not a reason.
pub(crate) const NOTICEABLE: u64 = 1000;
