//! The simulation itself.

use super::EngineError;
use super::compiled::{Compiled, Role, Times};
use super::timeline::Timeline;
use crate::cost::{Pause, Round};
use crate::program::Links;
use crate::trace::WaitReason;
use crate::units::{Nanos, OpId};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

/// Something that happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    /// A rank's compute op has ended.
    Computed(u32),
    /// A device's communication work has ended.
    Worked(u32),
    /// A thread has woken up for a device's communication work.
    Woken(u32),
    /// A message has passed the wire.
    Passed(u32),
    /// A round of a collective has passed the wire.
    RoundPassed(u32),
}

/// An event at its time, as one number: earlier is smaller, and what happens at one time is ordered by kind and number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Timed(u128);

impl Timed {
    fn new(time: u64, event: Event) -> Timed {
        let (kind, number) = match event {
            Event::Computed(rank) => (0, rank),
            Event::Worked(device) => (1, device),
            Event::Passed(transfer) => (2, transfer),
            Event::RoundPassed(meeting) => (3, meeting),
            Event::Woken(device) => (4u128, device),
        };
        Timed(u128::from(time) << 64 | kind << 32 | u128::from(number))
    }

    fn time(self) -> u64 {
        (self.0 >> 64) as u64
    }

    fn event(self) -> Event {
        let number = self.0 as u32;
        match (self.0 >> 32) as u32 {
            0 => Event::Computed(number),
            1 => Event::Worked(number),
            2 => Event::Passed(number),
            3 => Event::RoundPassed(number),
            _ => Event::Woken(number),
        }
    }
}

/// Communication work for a device.
#[derive(Debug, Clone, Copy)]
enum Work {
    Transfer(u32),
    Round { meeting: u32 },
}

#[derive(Debug, Clone, Copy)]
enum Turn {
    Compute(u32),
    Work(Work),
}

#[derive(Debug, Default)]
struct Device {
    held: bool,
    /// What holds it, if it is communication.
    work: Option<Work>,
    /// Until then, that has not begun: nobody is awake.
    asleep: Option<u64>,
    queue: VecDeque<Turn>,
}

/// A rank between two events.
#[derive(Debug, Default)]
struct Rank {
    /// The op that it issues next, or stands at.
    next: u32,
    /// When its last compute-stream op ended.
    clock: u64,
    /// The op at `next` has been issued and waits.
    issued: bool,
    /// It is in the queue of its device, or holds it.
    computing: bool,
    streams: Vec<Stream>,
    /// Streams whose first op has not arrived, by number modulo 64: only these can be brought further.
    open: u64,
}

#[derive(Debug, Default)]
struct Stream {
    /// Issued and not ended.
    queue: VecDeque<u32>,
    /// The first of them stands before its peers.
    arrived: bool,
    free_at: u64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Met {
    arrived: u32,
    round: u32,
    remaining: u32,
    met: u64,
}

const NEVER: u64 = u64::MAX;

pub(super) struct State<'c, 't> {
    compiled: &'c Compiled<'c>,
    times: &'t Times,
    now: u64,
    events: BinaryHeap<Reverse<Timed>>,
    ranks: Vec<Rank>,
    devices: Vec<Device>,
    /// By transfer: how many ends have arrived.
    ends: Vec<u8>,
    meetings: Vec<Met>,
    /// By communication op: when it stood before its peers.
    arrived: Vec<u64>,
    line: Timeline,
    /// Ranks that may go on.
    awake: Vec<u32>,
    /// The links between fast groups.
    links: Links,
    /// By transfer: when it has passed the wire.
    passed: Vec<u64>,
}

impl<'c, 't> State<'c, 't> {
    pub fn new(compiled: &'c Compiled<'c>, times: &'t Times) -> State<'c, 't> {
        let count = compiled.ops.len();
        let rank = |(number, &streams): (usize, &usize)| Rank {
            next: compiled.first[number],
            streams: std::iter::repeat_with(Stream::default).take(streams).collect(),
            ..Rank::default()
        };
        State {
            compiled,
            times,
            now: 0,
            events: BinaryHeap::with_capacity(4 * compiled.streams.len()),
            ranks: compiled.streams.iter().enumerate().map(rank).collect(),
            devices: std::iter::repeat_with(Device::default).take(compiled.program.devices.len()).collect(),
            ends: vec![0; compiled.transfers.len()],
            meetings: vec![Met::default(); compiled.meetings.len()],
            arrived: vec![0; count],
            line: Timeline {
                first: compiled.first.clone(),
                ready: vec![0; count],
                start: vec![0; count],
                end: vec![NEVER; count],
                wait: vec![None; count],
            },
            awake: Vec::new(),
            links: Links::default(),
            passed: vec![0; compiled.transfers.len()],
        }
    }

    pub fn run(mut self) -> Result<Timeline, EngineError> {
        for rank in 0..self.ranks.len() as u32 {
            self.go_on(rank);
        }
        self.wake();
        while let Some(Reverse(next)) = self.events.pop() {
            let time = next.time();
            self.now = time;
            match next.event() {
                Event::Computed(rank) => {
                    let state = &mut self.ranks[rank as usize];
                    let op = state.next;
                    state.clock = time;
                    state.computing = false;
                    state.issued = false;
                    state.next += 1;
                    self.line.end[op as usize] = time;
                    self.release(self.compiled.devices[rank as usize]);
                    self.advance_streams(rank);
                    self.awake.push(rank);
                }
                Event::Worked(device) => {
                    let work = self.devices[device as usize].work.take();
                    self.release(device);
                    match work {
                        Some(Work::Transfer(transfer)) => self.end_transfer(transfer),
                        Some(Work::Round { meeting }) => self.end_part(meeting),
                        None => {}
                    }
                }
                Event::Woken(device) if self.devices[device as usize].asleep == Some(time) => self.begin_work(device),
                // Somebody woke up before.
                Event::Woken(_) => {}
                Event::Passed(transfer) => self.copy(transfer),
                Event::RoundPassed(meeting) => self.work_on_round(meeting),
            }
            self.wake();
        }
        self.finished()
    }

    fn plan(&mut self, time: u64, event: Event) {
        self.events.push(Reverse(Timed::new(time, event)));
    }

    fn finished(self) -> Result<Timeline, EngineError> {
        let compiled = self.compiled;
        let mut standing = Vec::new();
        for (number, rank) in self.ranks.iter().enumerate() {
            let heads = rank.streams.iter().filter_map(|stream| stream.queue.front().copied());
            let stuck = (rank.next < compiled.first[number + 1]).then_some(rank.next);
            for op in heads.chain(stuck) {
                let at = compiled.at(op);
                let this = &compiled.program.ranks[at.rank.index()].ops[at.op.index()];
                let (from, to) = compiled.ops[op as usize].waits;
                let unmet = compiled.waits[from as usize..to as usize].iter();
                let unmet: Vec<String> = unmet
                    .filter(|&&wait| self.line.end[wait as usize] == NEVER)
                    .map(|&wait| compiled.at(wait).op.to_string())
                    .collect();
                let cause = if unmet.is_empty() { "its peers".to_string() } else { unmet.join(", ") };
                standing.push(format!("{at} {:?} waits for {cause}", this.kind));
            }
        }
        if standing.is_empty() { Ok(self.line) } else { Err(EngineError::Deadlock { standing }) }
    }

    fn wake(&mut self) {
        while let Some(rank) = self.awake.pop() {
            self.go_on(rank);
        }
    }

    /// Issues ops of a rank until it has to wait.
    fn go_on(&mut self, rank: u32) {
        let compiled = self.compiled;
        let last = compiled.first[rank as usize + 1];
        loop {
            let state = &mut self.ranks[rank as usize];
            if state.computing || state.next == last {
                return;
            }
            let op = state.next;
            let node = compiled.ops[op as usize];
            if node.role == Role::Compute {
                if !state.issued {
                    state.issued = true;
                    self.line.ready[op as usize] = state.clock;
                }
                let Some(waited) = self.waits_ended(op) else { return };
                let state = &mut self.ranks[rank as usize];
                state.computing = true;
                self.note_wait(op, waited);
                self.ask(rank, op);
                return;
            }
            if !state.issued {
                let at = state.clock;
                state.issued = true;
                self.line.ready[op as usize] = at;
                let stream = &mut state.streams[usize::from(node.stream)];
                stream.queue.push_back(op);
                if stream.queue.len() == 1 {
                    state.open |= 1 << (node.stream % 64);
                    self.try_arrive(rank, usize::from(node.stream));
                }
            }
            let state = &mut self.ranks[rank as usize];
            if node.stream == 0 {
                let end = self.line.end[op as usize];
                if end == NEVER {
                    return;
                }
                state.clock = end;
            }
            state.next += 1;
            state.issued = false;
        }
    }

    /// When the last wait of an op ended, and which it was; `None` while one has not.
    fn waits_ended(&self, op: u32) -> Option<Option<(u64, u32)>> {
        let (from, to) = self.compiled.ops[op as usize].waits;
        let mut last = None;
        for &wait in &self.compiled.waits[from as usize..to as usize] {
            let end = self.line.end[wait as usize];
            if end == NEVER {
                return None;
            }
            if last.is_none_or(|(latest, _)| end > latest) {
                last = Some((end, wait));
            }
        }
        Some(last)
    }

    /// Notes that an op waited for another until then, if it did.
    fn note_wait(&mut self, op: u32, waited: Option<(u64, u32)>) {
        if let Some((until, wait)) = waited
            && until > self.line.ready[op as usize]
        {
            let first = self.compiled.first[self.compiled.ops[op as usize].rank as usize];
            self.line.wait[op as usize] = Some(WaitReason::Op(OpId(wait - first)));
        }
    }

    /// A compute op asks for its device.
    fn ask(&mut self, rank: u32, op: u32) {
        let device = self.compiled.devices[rank as usize];
        // Of a compute op: when it could have started, had the device been free.
        self.arrived[op as usize] = self.now;
        let slot = &mut self.devices[device as usize];
        if slot.held {
            slot.queue.push_back(Turn::Compute(rank));
            // Who asks is awake, and does first what was there before.
            if slot.asleep.is_some() {
                self.begin_work(device);
            }
        } else {
            slot.held = true;
            self.compute(rank);
        }
    }

    /// A rank that holds its device computes.
    fn compute(&mut self, rank: u32) {
        let op = self.ranks[rank as usize].next as usize;
        let (clock, ready) = (self.line.ready[op], self.arrived[op]);
        let for_device = self.now - ready;
        if for_device > ready.saturating_sub(clock) {
            self.line.wait[op] = Some(WaitReason::Device);
        }
        let pauses = self.times.pauses.get(rank as usize);
        let start = self.now + pauses.map_or(0, |pauses| pauses.of(Pause::before(clock, ready, self.now)).0);
        self.line.start[op] = start;
        self.plan(start + self.times.compute[op], Event::Computed(rank));
    }

    fn give(&mut self, device: u32, work: Work) {
        let slot = &mut self.devices[device as usize];
        if slot.held {
            slot.queue.push_back(Turn::Work(work));
        } else {
            slot.held = true;
            slot.work = Some(work);
            let late = self.round_of(work).late.0;
            if late > 0 {
                self.devices[device as usize].asleep = Some(self.now + late);
                self.plan(self.now + late, Event::Woken(device));
            } else {
                self.begin_work(device);
            }
        }
    }

    fn round_of(&self, work: Work) -> Round {
        match work {
            Work::Transfer(transfer) => self.times.transfers[transfer as usize],
            Work::Round { meeting } => self.round(meeting),
        }
    }

    /// A device does the communication work that holds it.
    fn begin_work(&mut self, device: u32) {
        let slot = &mut self.devices[device as usize];
        slot.asleep = None;
        let Some(work) = slot.work else { return };
        if let Work::Transfer(transfer) = work {
            let ends = self.compiled.transfers[transfer as usize];
            for op in [ends.from, ends.to] {
                let met = self.line.start[op as usize];
                self.note_cause(op, met, self.now - self.passed[transfer as usize]);
                self.line.start[op as usize] = self.now;
            }
        }
        self.plan(self.now + self.round_of(work).work.0, Event::Worked(device));
    }

    /// Gives a device up to the next in line.
    fn release(&mut self, device: u32) {
        let slot = &mut self.devices[device as usize];
        match slot.queue.pop_front() {
            None => slot.held = false,
            Some(Turn::Compute(rank)) => self.compute(rank),
            Some(Turn::Work(work)) => {
                slot.work = Some(work);
                self.begin_work(device);
            }
        }
    }

    /// Lets the heads of a rank's streams arrive whose waits have ended.
    fn advance_streams(&mut self, rank: u32) {
        let mut open = self.ranks[rank as usize].open;
        while open != 0 {
            let low = open.trailing_zeros() as usize;
            open &= open - 1;
            for stream in (low..self.ranks[rank as usize].streams.len()).step_by(64) {
                self.try_arrive(rank, stream);
            }
        }
    }

    fn try_arrive(&mut self, rank: u32, stream: usize) {
        let state = &self.ranks[rank as usize].streams[stream];
        let Some(&op) = state.queue.front().filter(|_| !state.arrived) else { return };
        let Some(waited) = self.waits_ended(op) else { return };
        let free_at = state.free_at;
        let state = &mut self.ranks[rank as usize];
        state.streams[stream].arrived = true;
        // Where two streams share the bit, the other one may still be open.
        if state.streams.len() <= 64 {
            state.open &= !(1 << stream);
        }
        let ready = &mut self.line.ready[op as usize];
        *ready = (*ready).max(free_at);
        self.note_wait(op, waited);
        self.arrived[op as usize] = self.now;
        match self.compiled.ops[op as usize].role {
            Role::Compute => {}
            Role::End(transfer) => {
                self.ends[transfer as usize] += 1;
                if self.ends[transfer as usize] == 2 {
                    self.begin_transfer(transfer);
                }
            }
            Role::Member(meeting) => {
                let members = self.compiled.members(meeting).len() as u32;
                let met = &mut self.meetings[meeting as usize];
                met.arrived += 1;
                if met.arrived == members {
                    met.met = self.now;
                    self.begin_round(meeting);
                }
            }
        }
    }

    fn begin_transfer(&mut self, transfer: u32) {
        let ends = self.compiled.transfers[transfer as usize];
        for op in [ends.from, ends.to] {
            self.line.start[op as usize] = self.now;
            self.note_cause(op, self.now, 0);
        }
        let Round { link, wire, .. } = self.times.transfers[transfer as usize];
        let passed = self.sent(transfer as usize, link) + wire.0;
        self.passed[transfer as usize] = passed;
        if passed > self.now {
            self.plan(passed, Event::Passed(transfer));
        } else {
            self.copy(transfer);
        }
    }

    /// When the links on a way have served an exchange that is given to them now.
    fn sent(&mut self, way: usize, link: Nanos) -> u64 {
        match self.compiled.ways.get(way).filter(|_| link > Nanos::ZERO) {
            Some(way) => self.links.serve(way, self.now, link.0),
            None => self.now + link.0,
        }
    }

    /// Of the causes that held a communication op up, notes the one that cost most: its peers, who were all there at `met`,
    /// its device, or the op that it waited for (noted at its arrival).
    fn note_cause(&mut self, op: u32, met: u64, for_device: u64) {
        let op = op as usize;
        let for_peers = met - self.arrived[op];
        if for_peers.max(for_device) > self.arrived[op].saturating_sub(self.line.ready[op]) {
            let peers = for_peers >= for_device;
            self.line.wait[op] = Some(if peers { WaitReason::Peer } else { WaitReason::Device });
        }
    }

    /// The wire is passed: the receiver copies.
    fn copy(&mut self, transfer: u32) {
        let to = self.compiled.transfers[transfer as usize].to;
        if self.times.transfers[transfer as usize].work.0 > 0 {
            let rank = self.compiled.ops[to as usize].rank;
            self.give(self.compiled.devices[rank as usize], Work::Transfer(transfer));
        } else {
            self.end_transfer(transfer);
        }
    }

    fn end_transfer(&mut self, transfer: u32) {
        let ends = self.compiled.transfers[transfer as usize];
        self.end(ends.from);
        self.end(ends.to);
    }

    /// The present round of a meeting.
    fn round(&self, meeting: u32) -> Round {
        let round = self.meetings[meeting as usize].round as usize;
        self.times.meetings[meeting as usize].get(round).copied().unwrap_or_default()
    }

    fn begin_round(&mut self, meeting: u32) {
        let members = self.compiled.members(meeting);
        let rounds = self.times.meetings[meeting as usize].len() as u32;
        let met = &mut self.meetings[meeting as usize];
        // A collective of one rank moves nothing.
        let group = self.compiled.meetings[meeting as usize].group as usize;
        if met.round == rounds || self.compiled.program.groups[group].size <= 1 {
            let began = met.met;
            for &op in members {
                self.line.start[op as usize] = began;
                self.note_cause(op, began, 0);
                self.end(op);
            }
            return;
        }
        met.remaining = members.len() as u32;
        let Round { link, wire, .. } = self.round(meeting);
        let passed = self.sent(self.compiled.transfers.len() + meeting as usize, link) + wire.0;
        if passed > self.now {
            self.plan(passed, Event::RoundPassed(meeting));
        } else {
            self.work_on_round(meeting);
        }
    }

    /// The wire is passed: every member works.
    fn work_on_round(&mut self, meeting: u32) {
        let work = self.round(meeting).work.0;
        for &op in self.compiled.members(meeting) {
            if work > 0 {
                let rank = self.compiled.ops[op as usize].rank;
                self.give(self.compiled.devices[rank as usize], Work::Round { meeting });
            } else {
                self.end_part(meeting);
            }
        }
    }

    fn end_part(&mut self, meeting: u32) {
        let met = &mut self.meetings[meeting as usize];
        met.remaining -= 1;
        if met.remaining == 0 {
            met.round += 1;
            self.begin_round(meeting);
        }
    }

    /// Ends a communication op.
    fn end(&mut self, op: u32) {
        self.line.end[op as usize] = self.now;
        let node = self.compiled.ops[op as usize];
        let stream = &mut self.ranks[node.rank as usize].streams[usize::from(node.stream)];
        stream.queue.pop_front();
        stream.arrived = false;
        stream.free_at = self.now;
        if !stream.queue.is_empty() {
            self.ranks[node.rank as usize].open |= 1 << (node.stream % 64);
        }
        self.awake.push(node.rank);
        self.advance_streams(node.rank);
    }
}
