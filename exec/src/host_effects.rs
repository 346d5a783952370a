//! Communication by copies and sums in memory that all ranks reach.

use crate::bind::{Bound, Meeting, Partner};
use crate::collectives::{Member, Parts, perform};
use crate::crew::Clock;
use crate::device_exchange::{DeviceExchange, Part};
use crate::effects::{Effects, HostRange, Passage, Span};
use crate::error::ExecError;
use crate::lines::Lines;
use crate::numbers::dtype;
use crate::processes::network::{Channels, Work};
use crate::processes::staged::{Collective as Staging, ExchangeError, Staged};
use crate::processes::{Mesh, Processes};
use half::bf16;
use paceline_kernels::{DType, Device, KernelError};
use paceline_sim::program::{Collective, Links, Step, Way, rounds};
use paceline_sim::units::RankId;
use smallvec::SmallVec;
use std::sync::{Arc, Mutex, PoisonError};

/// A collective as the ranks do it.
struct Exchange {
    collective: Collective,
    /// By member: its rank.
    members: Vec<u32>,
    steps: Vec<Step>,
    dtype: DType,
    parts: Parts,
    /// Fast groups over which its members are spread.
    groups: usize,
    /// By step, where the links between groups are slowed down: how long they are busy, and how long the way takes then.
    delays: Vec<(u64, u64)>,
}

/// A message as the ranks move it.
struct Transfer {
    bytes: u64,
    /// How long the links on its way are busy, and how long the way takes then.
    delay: (u64, u64),
    way: Way,
}

/// Communication by copies and sums in memory that all ranks share: the host's, or that of one device.
pub(crate) struct HostEffects<'d> {
    bound: &'d Bound<'d>,
    clock: Clock,
    lines: Option<&'d Lines<'d>>,
    /// Does the work where the host cannot.
    far: Option<DeviceExchange<'d>>,
    meetings: Vec<Exchange>,
    transfers: Vec<Transfer>,
    /// By meeting.
    ways: Vec<Way>,
    links: Mutex<Links>,
    /// By transfer: the ranks of sender and receiver.
    ends: Vec<(u32, u32)>,
    /// Where every rank has a process of its own.
    away: Option<Away<'d>>,
}

/// The way to ranks of other processes.
struct Away<'d> {
    mesh: Arc<Mesh>,
    device: &'d dyn Device,
    /// The device's own network; without, messages go through the host's memory.
    channels: Option<Channels>,
}

impl<'d> HostEffects<'d> {
    /// The same between processes, each with one rank; opens the channels of the device's network if they are wanted.
    ///
    /// # Errors
    /// When the device has no network, or it cannot be opened.
    pub fn among(mut self, processes: &Processes, device: &'d dyn Device) -> Result<Self, ExecError> {
        let channels = match (processes.direct, device.network()) {
            (false, _) => None,
            (true, Some(network)) => Some(Channels::open(self.bound, &processes.mesh, network)?),
            (true, None) => {
                return Err(ExecError::Setting {
                    key: "transport",
                    value: "direct".into(),
                    allowed: format!("device {} has no network of its own; choose tcp", device.name()),
                });
            }
        };
        self.away = Some(Away { mesh: processes.mesh.clone(), device, channels });
        Ok(self)
    }

    pub fn new(
        bound: &'d Bound<'d>,
        clock: Clock,
        device: &'d dyn Device,
        lines: Option<&'d Lines<'d>>,
    ) -> HostEffects<'d> {
        let exchange = |meeting: &Meeting| {
            let dtype = dtype(meeting.element);
            let (width, members) = (dtype.bytes() as u64, meeting.members.len() as u32);
            let part = meeting.arrangement.part_of(meeting.bytes, members, width) / width;
            let parts = Parts { len: (meeting.bytes / width) as usize, part: part as usize };
            let group = &bound.program.groups[meeting.group];
            let groups = group.fast_groups();
            let steps = rounds(meeting.collective, meeting.arrangement.algorithm, members, groups);
            let link = group.crossing.and_then(|crossing| crossing.link);
            let delay = |step: &Step| {
                let bytes = step.crossing(members, groups, (part * width).min(meeting.bytes));
                link.filter(|_| bytes > 0).map_or((0, 0), |link| (link.busy(bytes).0, link.latency.0))
            };
            Exchange {
                collective: meeting.collective,
                members: meeting.members.iter().map(|member| member.rank).collect(),
                delays: steps.iter().map(delay).collect(),
                steps,
                dtype,
                parts,
                groups: groups as usize,
            }
        };
        let program = bound.program;
        let transfer = |t: &crate::bind::Transfer| {
            let (from, to) = (RankId(t.from.rank), RankId(t.to.rank));
            let link = program.link().filter(|_| program.crosses(from, to));
            let delay = link.map_or((0, 0), |link| (link.busy(t.bytes).0, link.latency.0));
            Transfer { bytes: t.bytes, delay, way: program.way_of_message(from, to) }
        };
        HostEffects {
            bound,
            clock,
            lines,
            far: (!device.is_host()).then(|| DeviceExchange::new(device, lines)),
            meetings: bound.meetings.iter().map(exchange).collect(),
            transfers: bound.transfers.iter().map(transfer).collect(),
            ways: bound.meetings.iter().map(|m| program.way_of_round(&program.groups[m.group].ranks)).collect(),
            links: Mutex::default(),
            ends: bound.transfers.iter().map(|t| (t.from.rank, t.to.rank)).collect(),
            away: None,
        }
    }

    /// What went wrong in communication since this was asked last.
    pub fn take_failure(&self) -> Option<KernelError> {
        self.far.as_ref().and_then(DeviceExchange::take_failure)
    }

    /// Gives an exchange to the links on its way.
    fn pass(&self, way: &Way, (busy, latency): (u64, u64)) -> Passage {
        if busy == 0 && latency == 0 {
            return Passage::Free;
        }
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        Passage::Awaited(links.serve(way, self.clock.now(), busy) + latency)
    }

    fn timed(&self, work: impl FnOnce()) -> Span {
        let start = self.clock.now();
        work();
        let end = self.clock.now();
        Span { start, end, effective: end }
    }
}

impl Effects for HostEffects<'_> {
    fn at(&self, _: u64) -> u64 {
        self.clock.now()
    }

    fn reach(&self, time: u64) -> u64 {
        time
    }

    fn open_transfer(&self, transfer: usize, _: u64) -> Passage {
        let Transfer { way, delay, .. } = &self.transfers[transfer];
        self.pass(way, *delay)
    }

    fn hosts(&self, rank: u32) -> bool {
        self.away.as_ref().is_none_or(|away| away.mesh.rank() == rank)
    }

    unsafe fn carry(&self, partner: Partner, range: HostRange) -> Result<Span, ExecError> {
        let Some(Away { mesh, device, channels }) = &self.away else {
            return Err(ExecError::Program("an exchange with another process, where there is none".into()));
        };
        let staged = Staged { mesh, device: *device };
        // What another process gets has to be there, and what it sends has to have a place.
        let queued = self.lines.and_then(|lines| Some((lines, lines.op_of(partner)?)));
        if let Some((lines, op)) = queued {
            lines.await_arrival(op).map_err(ExecError::Device)?;
        }
        let mut start = self.clock.now();
        // SAFETY: the caller's promise.
        let done = unsafe {
            match (partner, channels) {
                (Partner::None, _) => Ok(()),
                (Partner::Sender(t), None) => staged.send(t, self.ends[t as usize].1, range),
                (Partner::Receiver(t), None) => {
                    staged.receive(t, self.ends[t as usize].0, range, || start = self.clock.now())
                }
                (Partner::Sender(t), Some(channels)) => channels.transfer(t as usize, range, true, mesh),
                (Partner::Receiver(t), Some(channels)) => channels.transfer(t as usize, range, false, mesh),
                (Partner::Member { meeting, member }, channels) => {
                    let &Exchange { collective, ref members, ref steps, dtype, parts, groups, .. } =
                        &self.meetings[meeting as usize];
                    let member = member as usize;
                    match channels {
                        None => {
                            let staging = Staging { meeting, steps, dtype, parts, groups, members, member };
                            staged.perform(&staging, range)
                        }
                        Some(channels) => {
                            let work = Work { collective, dtype, parts, members: members.len(), member };
                            channels.collective(meeting as usize, &work, range, *device, mesh)
                        }
                    }
                }
            }
        };
        done.map_err(|error| match error {
            ExchangeError::Process(error) => error.into(),
            ExchangeError::Kernel(error) => ExecError::Device(error),
        })?;
        if let Some((lines, op)) = queued {
            lines.end(op).map_err(ExecError::Device)?;
        }
        let end = self.clock.now();
        Ok(Span { start, end, effective: end })
    }

    fn give_up(&self, error: &ExecError) {
        if let Some(away) = &self.away {
            away.mesh.give_up(&error.to_string());
        }
    }

    fn transfer_takes_device(&self, _: usize) -> bool {
        true
    }

    unsafe fn transfer(&self, transfer: usize, from: HostRange, to: HostRange, _: u64) -> Span {
        debug_assert!(from.bytes == to.bytes && from.bytes == self.transfers[transfer].bytes);
        // SAFETY: the caller's promise; buffers of different ranks are different blocks.
        let copy = || unsafe {
            if let Some(far) = &self.far {
                return far.transfer(self.bound, transfer, from, to);
            }
            std::ptr::copy_nonoverlapping(from.address as *const u8, to.address as *mut u8, to.bytes as usize);
        };
        self.timed(copy)
    }

    fn rounds(&self, meeting: usize) -> usize {
        self.meetings[meeting].steps.len()
    }

    fn open_round(&self, meeting: usize, round: usize, _: u64) -> Passage {
        if let Some(far) = &self.far {
            far.open_round(meeting, round);
        }
        self.pass(&self.ways[meeting], self.meetings[meeting].delays[round])
    }

    fn close_meeting(&self, meeting: usize) {
        if let Some(far) = &self.far {
            let one = self.meetings[meeting].members.len() == 1;
            far.close_meeting(meeting, if one { 0 } else { self.rounds(meeting) });
        }
    }

    fn is_delayed(&self) -> bool {
        let rounds = self.meetings.iter().flat_map(|meeting| &meeting.delays);
        rounds.chain(self.transfers.iter().map(|transfer| &transfer.delay)).any(|delay| *delay != (0, 0))
    }

    fn round_takes_device(&self, _: usize, _: usize) -> bool {
        true
    }

    unsafe fn round(&self, meeting: usize, round: usize, member: usize, ranges: &[HostRange], _: u64) -> Span {
        let &Exchange { ref steps, dtype, parts, groups, .. } = &self.meetings[meeting];
        // SAFETY: the caller's promise; blocks are aligned to 64 bytes and the elements have the meeting's type.
        self.timed(|| unsafe {
            if let Some(far) = &self.far {
                let part = Part { meeting, member, step: steps[round], groups, parts, dtype };
                return far.perform(self.bound, &part, ranges);
            }
            match dtype {
                DType::F64 => perform(steps[round], &members::<f64>(ranges), groups, parts, member),
                DType::BF16 => perform(steps[round], &members::<bf16>(ranges), groups, parts, member),
                _ => perform(steps[round], &members::<f32>(ranges), groups, parts, member),
            }
        })
    }
}

fn members<T>(ranges: &[HostRange]) -> SmallVec<[Member<T>; 8]> {
    let shard = |address: u64| (address != 0).then_some(address as *mut T);
    ranges.iter().map(|range| Member { array: range.address as *mut T, shard: shard(range.shard) }).collect()
}
