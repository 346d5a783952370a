//! Messages and collectives of the program over a device's own network (NCCL between GPUs).
//!
//! Every edge of the program (a stream of the sender and one of the receiver) and every pair of a group and a stream has a channel
//! of its own, so nothing waits for anything that the program does not make wait: sends and receives need no batches among each other.
//! On one channel both sides come in the same order, because the program's check has proved that it ends with one message in flight per edge.

use super::staged::ExchangeError;
use super::{Matter, Mesh, tag};
use crate::bind::Bound;
use crate::collectives::Parts;
use crate::effects::HostRange;
use crate::error::ExecError;
use paceline_kernels::{Call, Channel, DType, Device, Joint, Network, View};
use paceline_sim::program::{Collective, Stream};
use std::collections::BTreeMap;

/// What a channel serves. The order is that in which all processes open theirs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Served {
    Edge { from: (u32, Stream), to: (u32, Stream) },
    Group { group: usize, stream: Stream },
}

/// The channels of this process.
#[derive(Debug)]
pub(crate) struct Channels {
    open: Vec<Option<Box<dyn Channel>>>,
    /// By transfer and by meeting: which channel.
    of_transfer: Vec<usize>,
    of_meeting: Vec<usize>,
}

/// A collective of this process.
pub(crate) struct Work {
    pub collective: Collective,
    pub dtype: DType,
    pub parts: Parts,
    pub members: usize,
    pub member: usize,
}

impl Channels {
    /// Opens all channels of process `mesh.rank()`, together with the others.
    pub fn open(bound: &Bound, mesh: &Mesh, network: &dyn Network) -> Result<Channels, ExecError> {
        let (served, of_transfer, of_meeting) = plan(bound)?;
        let given_up = || mesh.failure().is_some();
        let mut open = Vec::with_capacity(served.len());
        for (number, members) in (0u32..).zip(&served) {
            let Some(member) = members.iter().position(|&rank| rank == mesh.rank()) else {
                open.push(None);
                continue;
            };
            let tag = tag(Matter::Invitation, number);
            let invitation = if member == 0 {
                let invitation = network.invite().map_err(ExecError::Device)?;
                members[1..].iter().try_for_each(|&other| mesh.send(other, tag, &invitation))?;
                invitation
            } else {
                mesh.receive(members[0], tag)?
            };
            let channel = network.open(&invitation, members.len() as u32, member as u32, &given_up);
            // Where another process is the cause, that is what is told.
            open.push(Some(channel.map_err(|error| mesh.failure().map_or(ExecError::Device(error), ExecError::from))?));
        }
        Ok(Channels { open, of_transfer, of_meeting })
    }

    fn channel(&self, number: usize) -> Result<&dyn Channel, ExchangeError> {
        self.open[number]
            .as_deref()
            .ok_or_else(|| super::ProcessError::Ended("an exchange of other processes came to this one".into()).into())
    }

    /// # Safety
    /// The range is live memory of the device that nobody else touches.
    pub unsafe fn transfer(
        &self,
        transfer: usize,
        range: HostRange,
        sends: bool,
        mesh: &Mesh,
    ) -> Result<(), ExchangeError> {
        let x = View::at(range.address, range.bytes as usize / 2, DType::BF16);
        let joint = if sends { Joint::Send { from: x, to: 1 } } else { Joint::Receive { to: x, from: 0 } };
        // SAFETY: the caller's promise.
        unsafe { self.run(self.of_transfer[transfer], &[joint], mesh) }
    }

    /// # Safety
    /// `own` leads to the array, and the shard where there is one, in live memory of the device that nobody else touches.
    pub unsafe fn collective(
        &self,
        meeting: usize,
        work: &Work,
        own: HostRange,
        device: &dyn Device,
        mesh: &Mesh,
    ) -> Result<(), ExchangeError> {
        let (batch, last) = batch(work, own);
        // SAFETY: the caller's promise.
        unsafe {
            self.run(self.of_meeting[meeting], &batch, mesh)?;
            if let Some(call) = last {
                device.run(&call)?;
                device.complete()?;
            }
        }
        Ok(())
    }

    unsafe fn run(&self, channel: usize, batch: &[Joint], mesh: &Mesh) -> Result<(), ExchangeError> {
        if batch.is_empty() {
            return Ok(());
        }
        let given_up = || mesh.failure().is_some();
        // SAFETY: the caller's promise.
        let done = unsafe { self.channel(channel)?.run(batch, &given_up) };
        done.map_err(|error| mesh.failure().map_or(ExchangeError::Kernel(error), ExchangeError::Process))
    }
}

type Planned = (Vec<Vec<u32>>, Vec<usize>, Vec<usize>);

/// The members of every channel, and which one serves each transfer and meeting.
fn plan(bound: &Bound) -> Result<Planned, ExecError> {
    let ranks = &bound.program.ranks;
    let stream = |at: crate::bind::OpRef| ranks[at.rank as usize].ops[at.op as usize].stream;
    let edge = |transfer: &crate::bind::Transfer| Served::Edge {
        from: (transfer.from.rank, stream(transfer.from)),
        to: (transfer.to.rank, stream(transfer.to)),
    };
    let mut numbers: BTreeMap<Served, Vec<u32>> = BTreeMap::new();
    for transfer in &bound.transfers {
        numbers.insert(edge(transfer), vec![transfer.from.rank, transfer.to.rank]);
    }
    let mut met = Vec::with_capacity(bound.meetings.len());
    for meeting in &bound.meetings {
        if meeting.collective == Collective::AllToAll {
            return Err(ExecError::Program(
                "an all-to-all changes places within one array, which the devices' network cannot: choose --transport tcp".into(),
            ));
        }
        let first = stream(meeting.members[0]);
        if meeting.members.iter().any(|&member| stream(member) != first) {
            let name = &bound.program.groups[meeting.group].name;
            return Err(ExecError::Program(format!("members of group {name:?} run a collective on different streams")));
        }
        let served = Served::Group { group: meeting.group, stream: first };
        numbers.insert(served, meeting.members.iter().map(|member| member.rank).collect());
        met.push(served);
    }
    let number = |served: Served| numbers.keys().position(|&key| key == served).unwrap_or_default();
    let of_transfer = bound.transfers.iter().map(|transfer| number(edge(transfer))).collect();
    let of_meeting = met.into_iter().map(number).collect();
    Ok((numbers.into_values().collect(), of_transfer, of_meeting))
}

/// What a member brings to a collective, and what it does by itself afterwards.
///
/// Even parts are the library's own reduce-scatter and all-gather; uneven ones are a batch of reductions or broadcasts, one per part.
fn batch(work: &Work, own: HostRange) -> (Vec<Joint>, Option<Call>) {
    let &Work { collective, dtype, parts, members, member } = work;
    let width = dtype.bytes() as u64;
    let x = View::at(own.address, parts.len, dtype);
    let part = |index: usize| {
        let range = parts.of(index);
        View::at(own.address + range.start as u64 * width, range.len(), dtype)
    };
    let mine = part(member);
    let shard = (own.shard != 0).then(|| View::at(own.shard, mine.len(), dtype));
    let even = parts.part * members == parts.len;
    let owners = (0..members).filter(|&owner| !part(owner).is_empty());
    if parts.len == 0 {
        return (Vec::new(), None);
    }
    match collective {
        Collective::AllReduce => (vec![Joint::AllReduce { x }], None),
        // Refused when channels are opened.
        Collective::AllToAll => (Vec::new(), None),
        Collective::ReduceScatter => {
            let batch = if even {
                vec![Joint::ReduceScatter { from: x, to: mine }]
            } else {
                owners.map(|root| Joint::Reduce { from: part(root), to: part(root), root: root as u32 }).collect()
            };
            let shard = shard.filter(|shard| !shard.is_empty());
            (batch, shard.map(|into| Call::Add { x: mine, into }))
        }
        Collective::AllGather => {
            let from = |owner: usize| shard.filter(|_| owner == member).unwrap_or(part(owner));
            let batch = if even {
                vec![Joint::AllGather { from: from(member), to: x }]
            } else {
                let joint = |root| Joint::Broadcast { from: from(root), to: part(root), root: root as u32 };
                owners.map(joint).collect()
            };
            (batch, None)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::mesh::tests::meshes;
    use super::*;
    use crate::collectives::{Member, perform};
    use paceline_kernels::{CpuDevice, ThreadNetwork};
    use paceline_sim::program::{Algorithm, rounds};
    use std::time::Duration;

    /// Batches of all collectives, even and uneven, in place and apart, against the executor's own on the host.
    #[test]
    fn batches_do_what_the_collectives_of_a_process_do() {
        for (members, len) in [(2usize, 8usize), (3, 10), (4, 5), (4, 16), (3, 2)] {
            let parts = Parts::even(len, members);
            for collective in [Collective::AllReduce, Collective::ReduceScatter, Collective::AllGather] {
                for apart in [false, true] {
                    if apart && collective == Collective::AllReduce {
                        continue;
                    }
                    // Whole numbers: sums do not depend on their order.
                    let start = |m: usize| {
                        let array: Vec<f32> = (0..len).map(|k| (m * 100 + k) as f32).collect();
                        (array, vec![1000.0f32 * m as f32; parts.of(m).len()])
                    };
                    let mut expected: Vec<_> = (0..members).map(start).collect();
                    let hands: Vec<Member<f32>> = expected
                        .iter_mut()
                        .map(|(array, shard)| Member {
                            array: array.as_mut_ptr(),
                            shard: apart.then_some(shard.as_mut_ptr()),
                        })
                        .collect();
                    for step in rounds(collective, Algorithm::Direct, members as u32, 1) {
                        // SAFETY: the arrays live, and only this thread touches them.
                        (0..members).for_each(|m| unsafe { perform(step, &hands, 1, parts, m) });
                    }
                    let mut got: Vec<_> = (0..members).map(start).collect();
                    let planned: Vec<_> = got
                        .iter_mut()
                        .enumerate()
                        .map(|(member, (array, shard))| {
                            let own = HostRange {
                                address: array.as_mut_ptr().expose_provenance() as u64,
                                bytes: 4 * len as u64,
                                shard: if apart { shard.as_mut_ptr().expose_provenance() as u64 } else { 0 },
                            };
                            batch(&Work { collective, dtype: DType::F32, parts, members, member }, own)
                        })
                        .collect();
                    let network = ThreadNetwork::default();
                    let invitation = network.invite().unwrap();
                    std::thread::scope(|scope| {
                        for (member, (batch, call)) in (0u32..).zip(&planned) {
                            let (network, invitation) = (&network, &invitation);
                            scope.spawn(move || {
                                let channel = network.open(invitation, members as u32, member, &|| false).unwrap();
                                // SAFETY: all members bring what the network works on, and wait until it has.
                                unsafe { channel.run(batch, &|| false) }.unwrap();
                                // SAFETY: as above.
                                call.iter().for_each(|call| unsafe { CpuDevice::new().run(call) }.unwrap());
                            });
                        }
                    });
                    let what = format!("{collective:?} of {members} over {len}, apart {apart}");
                    for (m, (got, expected)) in got.iter().zip(&expected).enumerate() {
                        match collective {
                            // The rest of the array is unspecified.
                            Collective::ReduceScatter if apart => assert_eq!(got.1, expected.1, "{what}"),
                            Collective::ReduceScatter => {
                                assert_eq!(got.0[parts.of(m)], expected.0[parts.of(m)], "{what}");
                            }
                            _ => assert_eq!(got, expected, "{what}"),
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn waiting_for_a_lost_process_ends_with_its_name() {
        let meshes = meshes(2, Duration::from_secs(20), Duration::from_secs(20));
        let network = ThreadNetwork::default();
        let invitation = network.invite().unwrap();
        let open = |member| network.open(&invitation, 2, member, &|| false).unwrap();
        let (here, there) = std::thread::scope(|scope| {
            let there = scope.spawn(|| open(1));
            (open(0), there.join().unwrap())
        });
        let message = std::thread::scope(|scope| {
            let mesh = &meshes[0];
            let waiting = scope.spawn(move || {
                let channels = Channels { open: vec![Some(here)], of_transfer: vec![0], of_meeting: vec![] };
                let mut x = [0.0f32; 2];
                let range = HostRange { address: x.as_mut_ptr().expose_provenance() as u64, bytes: 8, shard: 0 };
                // SAFETY: the array is this thread's.
                unsafe { channels.transfer(0, range, false, mesh) }.unwrap_err().to_string()
            });
            meshes[1].give_up("no memory left");
            waiting.join().unwrap()
        });
        drop(there);
        assert!(message.starts_with("rank 1 on ") && message.ends_with("gave up: no memory left"), "{message}");
    }
}
