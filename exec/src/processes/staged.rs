//! Messages and collectives between processes through the hosts' memory, over TCP.
//!
//! A collective goes through the same rounds and moves as within one process ([`Shape::moves`]), and sums in the same order, so results
//! have the same bits. Every process knows all moves: before its own, it sends what the others' moves read of its arrays.

use super::error::ProcessError;
use super::mesh::Mesh;
use super::{Matter, tag};
use crate::collectives::{Move, Parts, Place, Shape};
use crate::effects::HostRange;
use crate::numbers::Addend;
use half::bf16;
use paceline_kernels::{DType, Device, KernelError, View};
use paceline_sim::program::Step;
use thiserror::Error;

/// Why an exchange failed.
#[derive(Debug, Error)]
pub(crate) enum ExchangeError {
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

/// A collective as the processes do it.
pub(crate) struct Collective<'a> {
    pub meeting: u32,
    pub steps: &'a [Step],
    pub dtype: DType,
    pub parts: Parts,
    /// Fast groups over which its members are spread.
    pub groups: usize,
    /// Processes of the members.
    pub members: &'a [u32],
    /// Which of them this one is.
    pub member: usize,
}

/// Exchanges of this process.
pub(crate) struct Staged<'a> {
    pub mesh: &'a Mesh,
    pub device: &'a dyn Device,
}

impl Staged<'_> {
    /// # Safety
    /// The range is live memory of the device to which nobody writes.
    unsafe fn read(&self, address: u64, bytes: usize) -> Result<Vec<u8>, KernelError> {
        let mut into = vec![0; bytes];
        // Every element type has an even number of bytes.
        // SAFETY: the caller's promise.
        unsafe { self.device.download(View::at(address, bytes / 2, DType::BF16), &mut into) }?;
        Ok(into)
    }

    /// # Safety
    /// The range is live memory of the device that nobody else touches.
    unsafe fn write(&self, address: u64, bytes: &[u8]) -> Result<(), KernelError> {
        // SAFETY: the caller's promise.
        unsafe { self.device.upload(bytes, View::at(address, bytes.len() / 2, DType::BF16)) }
    }

    /// Sends a message of the program.
    ///
    /// # Safety
    /// As for [`Staged::read`].
    pub unsafe fn send(&self, transfer: u32, to: u32, from: HostRange) -> Result<(), ExchangeError> {
        // SAFETY: the caller's promise.
        let bytes = unsafe { self.read(from.address, from.bytes as usize) }?;
        Ok(self.mesh.send(to, tag(Matter::Transfer, transfer), &bytes)?)
    }

    /// Receives a message of the program; calls `met` when it is there.
    ///
    /// # Safety
    /// As for [`Staged::write`].
    pub unsafe fn receive(
        &self,
        transfer: u32,
        from: u32,
        to: HostRange,
        met: impl FnOnce(),
    ) -> Result<(), ExchangeError> {
        let bytes = self.mesh.receive(from, tag(Matter::Transfer, transfer))?;
        met();
        if bytes.len() as u64 != to.bytes {
            let what = format!("a message of {} bytes came for a buffer of {}", bytes.len(), to.bytes);
            return Err(KernelError::Shape { call: "Receive", what }.into());
        }
        // SAFETY: the caller's promise.
        Ok(unsafe { self.write(to.address, &bytes) }?)
    }

    /// Does the part of this process in a collective.
    ///
    /// # Safety
    /// `own` leads to living memory of the device with the array, and to the shard where it has one, that nobody else touches.
    pub unsafe fn perform(&self, collective: &Collective, own: HostRange) -> Result<(), ExchangeError> {
        let &Collective { meeting, dtype, parts, groups, members, member, .. } = collective;
        let (width, tag) = (dtype.bytes(), tag(Matter::Meeting, meeting));
        let shape = Shape { members: members.len(), groups };
        // All members cut alike: the parts of all lie apart, or of none.
        let apart = |_| own.shard != 0;
        let address = |place: Place| match place {
            Place::Array { element, .. } => own.address + (element * width) as u64,
            Place::Shard { .. } => own.shard,
        };
        for &step in collective.steps {
            for other in (0..members.len()).filter(|&other| other != member) {
                for work in shape.moves(step, parts, other, apart) {
                    for (place, len) in sources(&work).into_iter().filter(|&(place, _)| owner(place) == member) {
                        // SAFETY: the caller's promise; the place lies within the array or the shard.
                        let bytes = unsafe { self.read(address(place), len * width) }?;
                        self.mesh.send(members[other], tag, &bytes)?;
                    }
                }
            }
            let swaps: Vec<(Place, Place, usize)> =
                (0..members.len()).flat_map(|m| own_swaps(shape.moves(step, parts, m, apart), member)).collect();
            for &(mine, theirs, len) in &swaps {
                // SAFETY: as above.
                let bytes = unsafe { self.read(address(mine), len * width) }?;
                self.mesh.send(members[owner(theirs)], tag, &bytes)?;
            }
            for &(mine, theirs, _) in &swaps {
                let bytes = self.mesh.receive(members[owner(theirs)], tag)?;
                // SAFETY: as above; what lay there has been sent.
                unsafe { self.write(address(mine), &bytes) }?;
            }
            let fetch = |place: Place, len: usize| -> Result<Vec<u8>, ExchangeError> {
                if owner(place) == member {
                    // SAFETY: as above.
                    return Ok(unsafe { self.read(address(place), len * width) }?);
                }
                Ok(self.mesh.receive(members[owner(place)], tag)?)
            };
            for work in shape.moves(step, parts, member, apart) {
                let (to, adds) = match &work {
                    Move::Sum { to, adds, .. } => (*to, *adds),
                    Move::Copy { to, .. } => (*to, false),
                    Move::Swap { .. } => continue,
                };
                let pieces = sources(&work);
                let addends =
                    pieces.into_iter().map(|(place, len)| fetch(place, len)).collect::<Result<Vec<_>, _>>()?;
                let Some(first) = addends.first() else { continue };
                // SAFETY: as above.
                let there = adds.then(|| unsafe { self.read(address(to), first.len()) }).transpose()?;
                let result = sum(dtype, &addends, there.as_deref());
                // SAFETY: as above.
                unsafe { self.write(address(to), &result) }?;
            }
        }
        Ok(())
    }
}

/// Of the places that change with each other, those of one member: its own, the other's, and how many elements.
fn own_swaps(moves: Vec<Move>, member: usize) -> Vec<(Place, Place, usize)> {
    let own = |work| match work {
        Move::Swap { len: 0, .. } => None,
        Move::Swap { one, other, len } if owner(one) == member => Some((one, other, len)),
        Move::Swap { one, other, len } if owner(other) == member => Some((other, one, len)),
        _ => None,
    };
    moves.into_iter().filter_map(own).collect()
}

/// What a piece of work reads, in order: where, and how many elements. Nothing where there are none, or where places change.
fn sources(work: &Move) -> Vec<(Place, usize)> {
    match work {
        Move::Copy { len: 0, .. } | Move::Swap { .. } => Vec::new(),
        Move::Copy { from, len, .. } => vec![(*from, *len)],
        Move::Sum { part, .. } if part.is_empty() => Vec::new(),
        Move::Sum { addends, part, .. } => {
            addends.iter().map(|&member| (Place::Array { member, element: part.start }, part.len())).collect()
        }
    }
}

fn owner(place: Place) -> usize {
    match place {
        Place::Array { member, .. } | Place::Shard { member } => member,
    }
}

/// The sum of addends from first to last, and then of what is there, as within a process.
fn sum(dtype: DType, addends: &[Vec<u8>], there: Option<&[u8]>) -> Vec<u8> {
    match dtype {
        DType::F64 => sum_of::<f64, 8>(addends, there, f64::from_ne_bytes, f64::to_ne_bytes),
        DType::BF16 => sum_of::<bf16, 2>(addends, there, bf16::from_ne_bytes, bf16::to_ne_bytes),
        // Nothing adds tokens.
        DType::F32 | DType::U32 => sum_of::<f32, 4>(addends, there, f32::from_ne_bytes, f32::to_ne_bytes),
    }
}

fn sum_of<T: Addend, const N: usize>(
    addends: &[Vec<u8>],
    there: Option<&[u8]>,
    from: fn([u8; N]) -> T,
    to: fn(T) -> [u8; N],
) -> Vec<u8> {
    // A copy keeps every bit, also of what is not a number.
    if let ([only], None) = (addends, there) {
        return only.clone();
    }
    let values =
        |bytes: &'_ [u8]| bytes.as_chunks::<N>().0.iter().map(|&bytes| from(bytes).widen()).collect::<Vec<_>>();
    let mut total = values(&addends[0]);
    let mut sums = addends[1..].iter().map(|addend| values(addend));
    sums.by_ref().for_each(|addend| total.iter_mut().zip(addend).for_each(|(total, x)| *total += x));
    if let Some(there) = there {
        for (total, mut sum) in total.iter_mut().zip(values(there)) {
            sum += *total;
            *total = sum;
        }
    }
    total.into_iter().flat_map(|sum| to(T::narrow(sum))).collect()
}

#[cfg(test)]
mod tests {
    use super::super::mesh::tests::meshes;
    use super::*;
    use crate::collectives::{Member, perform};
    use paceline_kernels::CpuDevice;
    use paceline_sim::program::{Algorithm, Collective as Kind, rounds};
    use std::time::Duration;

    const SOON: Duration = Duration::from_secs(20);

    fn arrays(members: usize, len: usize) -> Vec<Vec<f32>> {
        (0..members).map(|m| (0..len).map(|k| ((m * 7 + k * 13) as f32).sin()).collect()).collect()
    }

    fn range(array: &mut [f32], shard: Option<&mut [f32]>) -> HostRange {
        HostRange {
            address: array.as_mut_ptr().expose_provenance() as u64,
            bytes: 4 * array.len() as u64,
            shard: shard.map_or(0, |shard| shard.as_mut_ptr().expose_provenance() as u64),
        }
    }

    /// Every algorithm, in place and with shards apart, between processes and within one: the same bits everywhere.
    #[test]
    fn collectives_have_the_bits_of_those_within_a_process() {
        const MEMBERS: usize = 4;
        let meshes = meshes(MEMBERS as u32, SOON, SOON);
        let mut number = 0;
        for (groups, algorithm, len) in [
            (1, Algorithm::Direct, 10),
            (1, Algorithm::Ring, 23),
            (1, Algorithm::Tree, 22),
            (2, Algorithm::TwoLevel, 21),
            (1, Algorithm::Direct, 3),
        ] {
            let parts = Parts::even(len, MEMBERS);
            for kind in [Kind::AllReduce, Kind::ReduceScatter, Kind::AllGather, Kind::AllToAll] {
                for with_shards in [false, true] {
                    if with_shards && matches!(kind, Kind::AllReduce | Kind::AllToAll) {
                        continue;
                    }
                    let steps = rounds(kind, algorithm, MEMBERS as u32, groups as u32);
                    let shards = |m: usize| vec![m as f32 + 0.5; parts.of(m).len().max(1)];
                    let mut expected: Vec<_> =
                        arrays(MEMBERS, len).into_iter().enumerate().map(|(m, array)| (array, shards(m))).collect();
                    let members: Vec<Member<f32>> = expected
                        .iter_mut()
                        .map(|(array, shard)| Member {
                            array: array.as_mut_ptr(),
                            shard: with_shards.then_some(shard.as_mut_ptr()),
                        })
                        .collect();
                    for &step in &steps {
                        // SAFETY: the arrays live, and only this thread touches them.
                        (0..MEMBERS).for_each(|m| unsafe { perform(step, &members, groups, parts, m) });
                    }
                    let mut got: Vec<_> =
                        arrays(MEMBERS, len).into_iter().enumerate().map(|(m, array)| (array, shards(m))).collect();
                    std::thread::scope(|scope| {
                        for (member, (mesh, (array, shard))) in meshes.iter().zip(&mut got).enumerate() {
                            let steps = &steps;
                            scope.spawn(move || {
                                let own = range(array, with_shards.then_some(shard));
                                let device = CpuDevice::new();
                                let collective = Collective {
                                    meeting: number,
                                    steps,
                                    dtype: DType::F32,
                                    parts,
                                    groups,
                                    members: &[0, 1, 2, 3],
                                    member,
                                };
                                // SAFETY: the array and the shard are this thread's.
                                unsafe { Staged { mesh, device: &device }.perform(&collective, own) }.unwrap();
                            });
                        }
                    });
                    assert_eq!(got, expected, "{kind:?} {algorithm:?} over {len}, shards {with_shards}");
                    number += 1;
                }
            }
        }
    }

    #[test]
    fn a_message_of_another_size_is_refused() {
        let meshes = meshes(2, SOON, SOON);
        let device = CpuDevice::new();
        let (mut from, mut to) = ([1.5f32; 4], [0.0f32; 2]);
        let staged = |n: usize| Staged { mesh: &meshes[n], device: &device };
        // SAFETY: the arrays are this thread's.
        unsafe {
            staged(0).send(3, 1, range(&mut from, None)).unwrap();
            let error = staged(1).receive(3, 0, range(&mut to, None), || {}).unwrap_err();
            assert!(error.to_string().contains("16 bytes came for a buffer of 8"), "{error}");
            staged(0).send(3, 1, range(&mut from[..2], None)).unwrap();
            staged(1).receive(3, 0, range(&mut to, None), || {}).unwrap();
        }
        assert_eq!(to, [1.5; 2]);
    }

    #[test]
    fn sums_of_narrow_elements_are_rounded_once() {
        let bytes = |x: f32| bf16::from_f32(x).to_ne_bytes().to_vec();
        // 256 + 1 + 1: rounded after each addend it would stay 256, eight bits of mantissa being too few for 257.
        assert_eq!(sum(DType::BF16, &[bytes(256.0), bytes(1.0), bytes(1.0)], None), bytes(258.0));
        assert_eq!(sum(DType::BF16, &[bytes(1.0), bytes(1.0)], Some(&bytes(256.0))), bytes(258.0));
        let pattern = vec![0xff, 0xff, 0x81, 0x7f];
        assert_eq!(sum(DType::F32, std::slice::from_ref(&pattern), None), pattern, "copies keep all bits");
        let wide = |x: f64| x.to_ne_bytes().to_vec();
        assert_eq!(sum(DType::F64, &[wide(1.0), wide(1e-12)], None), wide(1.0 + 1e-12));
    }
}
