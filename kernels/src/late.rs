//! The CPU's kernels behind streams, done late and watched: a device on which a host that runs ahead without saying what waits for what
//! is found out.
//!
//! Every call is held against those before it that touched the same bytes: where one of two writes and nothing orders them, that is a
//! race, told at once and whatever the order in which they are done. Order comes from the queues, from the moments they follow, and from
//! hosts that wait; it is kept as vector clocks (Mattern 1989, Virtual Time and Global States of Distributed Systems), one entry per
//! queue.

use crate::call::Call;
use crate::check::Access;
use crate::cpu::CpuDevice;
use crate::device::{Block, Device, KernelError, View};
use crate::queue::{Moment, Queue, Queues, Sequence};
use crate::streams::{Kept, Late, Pace, Streams, Task};
use smallvec::SmallVec;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const NAME: &str = "late CPU";

/// A CPU whose queues run behind the host's back. The device itself does its calls at once.
pub struct LateDevice {
    core: Arc<Core>,
    stream: usize,
}

struct Core {
    streams: Streams,
    cpu: Arc<CpuDevice>,
    watch: Mutex<Watch>,
}

impl Core {
    fn watch(&self) -> MutexGuard<'_, Watch> {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Late for Core {
    fn streams(&self) -> &Streams {
        &self.streams
    }

    fn forget(&self, block: &dyn Block) {
        let (begin, end) = (block.address(), block.address() + block.bytes() as u64);
        self.watch().pieces.retain(|&at, piece| piece.end <= begin || at >= end);
    }
}

impl LateDevice {
    /// A device whose work is done at a pace.
    pub fn new(pace: Pace) -> LateDevice {
        let watch = Mutex::new(Watch { clocks: vec![Clock::default()], ..Watch::default() });
        let core = Core { streams: Streams::new(pace), cpu: Arc::new(CpuDevice::new()), watch };
        LateDevice { core: Arc::new(core), stream: 0 }
    }

    fn note(&self, touched: &[(View, bool)], what: &'static str) -> Result<(), KernelError> {
        self.core.watch().note(self.stream, touched, what)
    }

    /// Queues work. What is on the first stream is done at once, and the host has seen its end.
    fn later(&self, task: Task) -> Result<(), KernelError> {
        self.core.streams.run(self.stream, task)?;
        if self.stream == 0 {
            self.seen();
        }
        Ok(())
    }

    /// The host has seen the end of everything on this stream.
    fn seen(&self) {
        let mut watch = self.core.watch();
        let here = watch.clocks[self.stream].clone();
        watch.host.join(&here);
    }
}

impl Device for LateDevice {
    fn name(&self) -> String {
        NAME.into()
    }

    fn is_host(&self) -> bool {
        false
    }

    fn allocate(&self, bytes: usize) -> Result<Box<dyn Block>, KernelError> {
        Ok(Box::new(Kept { block: self.core.cpu.allocate(bytes)?, core: self.core.clone() }))
    }

    unsafe fn run(&self, call: &Call) -> Result<(), KernelError> {
        call.check()?;
        let touched: Touched =
            call.operands().iter().map(|operand| (operand.view, operand.access != Access::Read)).collect();
        let mut watch = self.core.watch();
        if let Some((_, calls)) = watch.keeping.iter_mut().find(|(stream, _)| *stream == self.stream) {
            calls.push((touched, call.name()));
        } else {
            watch.note(self.stream, &touched, call.name())?;
        }
        drop(watch);
        let (cpu, call) = (self.core.cpu.clone(), *call);
        // SAFETY: the caller's promise: operands live until the call has ended.
        self.later(Arc::new(move || unsafe { cpu.run(&call) }))
    }

    fn complete(&self) -> Result<(), KernelError> {
        self.core.streams.finish(self.stream)?;
        self.seen();
        Ok(())
    }

    fn queues(&self) -> Option<&dyn Queues> {
        Some(self)
    }

    unsafe fn upload(&self, from: &[u8], to: View) -> Result<(), KernelError> {
        self.note(&[(to, true)], "upload")?;
        let (cpu, from) = (self.core.cpu.clone(), from.to_vec());
        // SAFETY: the caller's promise: the view lives until the copy has ended.
        self.later(Arc::new(move || unsafe { cpu.upload(&from, to) }))
    }

    unsafe fn download(&self, from: View, to: &mut [u8]) -> Result<(), KernelError> {
        self.note(&[(from, false)], "download")?;
        self.complete()?;
        // SAFETY: the caller's promise.
        unsafe { self.core.cpu.download(from, to) }
    }
}

impl Queue for LateDevice {
    fn set(&self, moment: Moment) -> Result<(), KernelError> {
        let mut watch = self.core.watch();
        let here = watch.clocks[self.stream].clone();
        watch.moments.insert(moment, here);
        self.core.streams.set(self.stream, moment);
        Ok(())
    }

    fn follow(&self, moment: Moment) -> Result<(), KernelError> {
        let mut watch = self.core.watch();
        let there = watch.moments.get(&moment).cloned().unwrap_or_default();
        watch.clocks[self.stream].join(&there);
        self.core.streams.follow(self.stream, moment);
        Ok(())
    }

    fn keep(&self) -> Result<(), KernelError> {
        self.core.watch().keeping.push((self.stream, Vec::new()));
        self.core.streams.keep(self.stream);
        Ok(())
    }

    fn kept(&self) -> Result<Sequence, KernelError> {
        let sequence = self.core.streams.kept(self.stream);
        let mut watch = self.core.watch();
        if let Some(place) = watch.keeping.iter().position(|(stream, _)| *stream == self.stream) {
            let (_, calls) = watch.keeping.swap_remove(place);
            watch.sequences.insert(sequence.0, calls);
        }
        Ok(sequence)
    }

    unsafe fn replay(&self, sequence: Sequence) -> Result<(), KernelError> {
        let mut watch = self.core.watch();
        let calls = watch.sequences.get(&sequence.0).cloned().unwrap_or_default();
        calls.iter().try_for_each(|(touched, what)| watch.note(self.stream, touched, what))?;
        drop(watch);
        self.core.streams.replay(self.stream, sequence)
    }
}

impl Queues for LateDevice {
    fn open(&self) -> Result<Box<dyn Queue>, KernelError> {
        let stream = self.core.streams.open();
        self.core.watch().clocks.resize_with(stream + 1, Clock::default);
        Ok(Box::new(LateDevice { core: self.core.clone(), stream }))
    }

    fn moment(&self) -> Result<Moment, KernelError> {
        let moment = self.core.streams.moment();
        self.core.watch().moments.remove(&moment);
        Ok(moment)
    }

    fn release(&self, moments: &[Moment]) {
        self.core.streams.release(moments);
    }

    fn reach(&self, moment: Moment) -> Result<(), KernelError> {
        self.core.streams.reach(moment)?;
        let mut watch = self.core.watch();
        let there = watch.moments.get(&moment).cloned().unwrap_or_default();
        watch.host.join(&there);
        Ok(())
    }

    fn seconds(&self, from: Moment, to: Moment) -> Result<f64, KernelError> {
        let never = || KernelError::Machine { device: NAME.into(), what: "a moment has not come".into() };
        self.core.streams.seconds(from, to).ok_or_else(never)
    }
}

/// By stream: how many of its calls have certainly ended.
#[derive(Debug, Clone, Default)]
struct Clock(SmallVec<[u32; 8]>);

impl Clock {
    fn of(&self, stream: usize) -> u32 {
        self.0.get(stream).copied().unwrap_or(0)
    }

    fn join(&mut self, other: &Clock) {
        if self.0.len() < other.0.len() {
            self.0.resize(other.0.len(), 0);
        }
        self.0.iter_mut().zip(&other.0).for_each(|(here, &there)| *here = (*here).max(there));
    }

    /// Counts one more call of a stream.
    fn tick(&mut self, stream: usize) -> u32 {
        if self.0.len() <= stream {
            self.0.resize(stream + 1, 0);
        }
        self.0[stream] += 1;
        self.0[stream]
    }
}

/// A call that touched a piece of memory.
#[derive(Debug, Clone)]
struct Touch {
    stream: usize,
    number: u32,
    what: &'static str,
}

/// A piece of memory with one history.
#[derive(Debug, Clone, Default)]
struct Piece {
    end: u64,
    written: Option<Touch>,
    /// Since then, the last of each stream.
    read: SmallVec<[Touch; 2]>,
}

#[derive(Default)]
struct Watch {
    /// By stream: what has ended when its next call begins.
    clocks: Vec<Clock>,
    moments: BTreeMap<Moment, Clock>,
    /// What the host has seen the end of: calls that it queues begin after that.
    host: Clock,
    /// By first byte.
    pieces: BTreeMap<u64, Piece>,
    /// What calls that are kept touch: of streams that keep, and of sequences.
    keeping: Vec<(usize, Vec<(Touched, &'static str)>)>,
    sequences: BTreeMap<usize, Vec<(Touched, &'static str)>>,
}

/// What a call touches, and whether it writes it.
type Touched = SmallVec<[(View, bool); 7]>;

impl Watch {
    /// Cuts a piece in two at an address.
    fn cut(&mut self, at: u64) {
        if let Some((_, piece)) = self.pieces.range_mut(..at).next_back()
            && piece.end > at
        {
            let rest = piece.clone();
            piece.end = at;
            self.pieces.insert(at, rest);
        }
    }

    /// Notes what a call of a stream touches (and whether it writes it), and tells what it races with.
    fn note(&mut self, stream: usize, touched: &[(View, bool)], what: &'static str) -> Result<(), KernelError> {
        let host = self.host.clone();
        self.clocks[stream].join(&host);
        let number = self.clocks[stream].tick(stream);
        for &(view, writes) in touched {
            let (mut at, end) = (view.address(), view.address() + view.bytes() as u64);
            self.cut(at);
            self.cut(end);
            while at < end {
                let next = self.pieces.range(at..).next().map_or(end, |(&next, _)| next.min(end));
                if next > at {
                    // Nobody has touched this yet.
                    self.pieces.insert(at, Piece { end: next, ..Piece::default() });
                }
                let clock = &self.clocks[stream];
                let Some(piece) = self.pieces.get_mut(&at) else { break };
                let others = piece.written.iter().chain(piece.read.iter().filter(|_| writes));
                let others = { others }.find(|other| other.stream != stream && clock.of(other.stream) < other.number);
                if let Some(other) = others {
                    let does = if writes { "writes" } else { "reads" };
                    let what = format!(
                        "{what} on stream {stream} {does} {:#x}..{:#x}, which {} on stream {} may still be working on",
                        at, piece.end, other.what, other.stream
                    );
                    return Err(KernelError::Machine { device: NAME.into(), what });
                }
                let touch = Touch { stream, number, what };
                if writes {
                    (piece.written, piece.read) = (Some(touch), SmallVec::new());
                } else {
                    piece.read.retain(|other| other.stream != stream);
                    piece.read.push(touch);
                }
                at = piece.end;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::DType;

    struct Two {
        device: LateDevice,
        block: Box<dyn Block>,
        one: Box<dyn Queue>,
        two: Box<dyn Queue>,
    }

    impl Two {
        fn new(pace: Pace) -> Two {
            let device = LateDevice::new(pace);
            let (one, two) = (device.open().unwrap(), device.open().unwrap());
            Two { block: device.allocate(64).unwrap(), one, two, device }
        }

        fn part(&self, n: usize) -> View {
            self.block.view(16 * n, 4, DType::F32)
        }

        fn read(&self, n: usize) -> [f32; 4] {
            let mut bytes = [0; 16];
            // SAFETY: nobody else has the block.
            unsafe { self.device.download(self.part(n), &mut bytes) }.unwrap();
            std::array::from_fn(|i| f32::from_ne_bytes(bytes[4 * i..][..4].try_into().unwrap()))
        }
    }

    fn ones() -> [u8; 16] {
        std::array::from_fn(|i| 1.0f32.to_ne_bytes()[i % 4])
    }

    /// A host that waits for nothing queues an upload, a sum and a copy over two queues.
    #[test]
    fn a_moment_orders_two_queues() {
        for pace in [Pace::Late, Pace::Drawn(1), Pace::Drawn(2), Pace::Drawn(3)] {
            let two = Two::new(pace);
            let (uploaded, summed) = (two.device.moment().unwrap(), two.device.moment().unwrap());
            // SAFETY: the block lives, and the moments order what touches it.
            unsafe {
                two.one.upload(&ones(), two.part(0)).unwrap();
                two.one.set(uploaded).unwrap();
                two.two.follow(uploaded).unwrap();
                two.two.run(&Call::Sum { a: two.part(0), b: two.part(0), out: two.part(1) }).unwrap();
                two.two.set(summed).unwrap();
                two.one.follow(summed).unwrap();
                two.one.run(&Call::Copy { from: two.part(1), to: two.part(2) }).unwrap();
            }
            two.one.complete().unwrap();
            assert_eq!(two.read(2), [2.0; 4], "{pace:?}");
            assert!(two.device.seconds(uploaded, summed).unwrap() >= 0.0);
        }
    }

    #[test]
    fn what_nothing_orders_is_a_race() {
        let copy = |two: &Two, from, to| Call::Copy { from: two.part(from), to: two.part(to) };
        let two = Two::new(Pace::Late);
        // SAFETY: of two calls that race the second is refused.
        unsafe {
            two.one.run(&copy(&two, 0, 1)).unwrap();
            two.two.run(&copy(&two, 0, 2)).unwrap();
            let read = two.two.run(&copy(&two, 1, 3)).unwrap_err().to_string();
            assert!(read.contains("Copy on stream 2 reads") && read.contains("Copy on stream 1"), "{read}");
            let write = two.two.upload(&ones(), two.part(0)).unwrap_err().to_string();
            assert!(write.contains("upload on stream 2 writes"), "two may read, none may write then: {write}");
            // Half of a piece is enough.
            let half = two.block.view(24, 4, DType::F32);
            assert!(two.two.run(&Call::Zero { x: half }).is_err());
            // A moment of before the copy orders nothing; nor does one that somebody else follows.
            let early = two.device.moment().unwrap();
            two.two.follow(early).unwrap();
            assert!(two.two.run(&copy(&two, 1, 3)).is_err());
            two.one.set(early).unwrap();
            assert!(two.two.run(&copy(&two, 1, 3)).is_err());
            two.two.follow(early).unwrap();
            two.two.run(&copy(&two, 1, 3)).unwrap();
            // The host's own wait orders as well.
            assert!(two.one.run(&Call::Zero { x: two.part(2) }).is_err());
            two.two.complete().unwrap();
            two.one.run(&Call::Zero { x: two.part(2) }).unwrap();
        }
    }
}
