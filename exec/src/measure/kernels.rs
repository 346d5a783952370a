//! Times of kernels while a given number of devices work at once, or beside copies on a GPU.
//!
//! Each device has a thread on a core of its own and a working set of its own. It goes through all cases again and again,
//! each time in another random order, and puts the operands of a call somewhere in its working set, so that what caches
//! hold is what they would hold in a run. Then the operand that the kernel before would have made is written, and the
//! call is timed.

use super::case::{Context, Role, call};
use super::samples::Summary;
use super::{MeasureError, Measured, Phase};
use crate::data::mix;
use paceline_kernels::{Block, Call, DType, Device, KernelError, View};
use paceline_profiles::{KernelKey, Overhead, Subject, Work};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Each case is repeated so often even if the time is up.
const LEAST_ROUNDS: usize = 5;
/// Timings kept per case and device.
const MOST_SAMPLES: usize = 2000;
/// Operands above this are refused (a terabyte).
const MOST_BYTES: f64 = 1e12;
/// Elements of a cache line of `f32`.
const LINE: usize = 16;

/// Measures kernels with `busy` devices at work. Where the device has a memory of its own there is one, and `busy` of 2 says that copies go
/// on beside the kernels.
pub(super) fn measure(phase: &mut Phase, keys: &[&KernelKey], busy: u32) -> Result<Vec<Measured>, MeasureError> {
    if keys.is_empty() {
        return Err(MeasureError::NoKernels);
    }
    let context = Context::of(keys);
    let mut sizes = Sizes::default();
    for key in keys {
        let bytes = Work::of(key).bytes;
        if bytes > MOST_BYTES {
            return Err(MeasureError::TooLarge { key: (*key).clone(), bytes, limit: MOST_BYTES });
        }
        let needed = Sizes::of(key, &context);
        // Refused here, a shape costs no measuring time.
        needed.1.check().map_err(|source| MeasureError::Kernel { key: (*key).clone(), source })?;
        sizes.cover(&needed.0);
    }
    let floats = phase.settings.working_set_bytes as usize / 4 / 2;
    sizes.cover(&Sizes { read: floats, written: floats, tokens: 0 });

    let cores = core_affinity::get_core_ids().unwrap_or_default();
    let gave_up = AtomicBool::new(false);
    let (device, deadline, stop, seed) = (phase.device, phase.deadline, phase.stop, phase.settings.seed);
    let give_up = || stop() || gave_up.load(Ordering::Relaxed);
    let mut timings: Vec<Vec<f64>> = vec![Vec::new(); keys.len()];
    let beside_copies = !device.is_host() && busy > 1;
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..if device.is_host() { busy } else { 1 })
            .map(|slot| {
                let core = cores.get(slot as usize).copied();
                let (context, gave_up, give_up) = (&context, &gave_up, &give_up);
                scope.spawn(move || {
                    if let Some(core) = core {
                        core_affinity::set_for_current(core);
                    }
                    let seed = mix(seed ^ mix(u64::from(slot)));
                    let arena =
                        Arena::new(device, &sizes, context.vocab, seed, beside_copies).map_err(MeasureError::Memory);
                    let times = arena.and_then(|arena| work(arena, keys, context, deadline, give_up));
                    if times.is_err() {
                        gave_up.store(true, Ordering::Relaxed);
                    }
                    times
                })
            })
            .collect();
        while !workers.iter().all(|worker| worker.is_finished()) {
            (phase.tick)();
            std::thread::sleep(Duration::from_millis(100));
        }
        let mut first_error = None;
        for worker in workers {
            match worker.join() {
                Ok(Ok(of_worker)) => timings.iter_mut().zip(of_worker).for_each(|(all, own)| all.extend(own)),
                // What stopped the others is the cause, their stopping is not.
                Ok(Err(error)) => match &first_error {
                    None | Some(MeasureError::Stopped) => first_error = Some(error),
                    Some(_) => {}
                },
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        first_error.map_or(Ok(()), Err)
    })?;
    let mut lost = Lost::default();
    let mut results = Vec::with_capacity(keys.len() + 1);
    for (key, seconds) in keys.iter().zip(timings) {
        let taken: f64 = seconds.iter().sum();
        if let Some(summary) = Summary::of(seconds) {
            lost.add(taken, &summary);
            results.push(Measured { subject: Subject::Kernel((*key).clone()), busy_devices: busy, summary });
        }
    }
    // A device with clocks of its own is not held up by other work of the host.
    if device.is_host() {
        results.extend(lost.measured(busy));
    }
    Ok(results)
}

/// What other work of the machine took from the calls, all shapes together: it hits single calls hard and most not at all, so that one
/// shape alone would have to be repeated for long to show it.
#[derive(Debug, Default)]
struct Lost {
    taken: f64,
    usual: f64,
    calls: u64,
}

impl Lost {
    fn add(&mut self, taken: f64, calls: &Summary) {
        self.taken += taken;
        self.usual += calls.median * calls.count as f64;
        self.calls += calls.count;
    }

    /// Seconds lost of a second.
    fn measured(&self, busy_devices: u32) -> Option<Measured> {
        let share = (self.taken / self.usual - 1.0).max(0.0);
        let summary = Summary { median: share.max(1e-9), spread: 0.0, count: self.calls };
        let subject = Subject::Overhead(Overhead::Interference);
        (self.usual > 0.0).then_some(Measured { subject, busy_devices, summary })
    }
}

/// One device's timings of all cases, in order of `keys`.
fn work(
    mut arena: Arena,
    keys: &[&KernelKey],
    context: &Context,
    deadline: Instant,
    give_up: &dyn Fn() -> bool,
) -> Result<Vec<Vec<f64>>, MeasureError> {
    let mut timings: Vec<Vec<f64>> = vec![Vec::new(); keys.len()];
    let mut order: Vec<usize> = (0..keys.len()).collect();
    // The first round warms up: pages, code, the clock.
    for round in 0.. {
        arena.shuffle(&mut order);
        for &case in &order {
            if give_up() {
                return Err(MeasureError::Stopped);
            }
            if round > LEAST_ROUNDS && Instant::now() >= deadline {
                return Ok(timings);
            }
            let failed = |source| MeasureError::Kernel { key: keys[case].clone(), source };
            let seconds = arena.time(keys[case], context).map_err(failed)?;
            if round > 0 && timings[case].len() < MOST_SAMPLES {
                timings[case].push(seconds);
            }
        }
    }
    Ok(timings)
}

/// The call of a key on operands that are not there.
#[cfg(test)]
pub(super) fn sketch(key: &KernelKey, context: &Context) -> Call {
    Sizes::of(key, context).1
}

/// 32-bit words that the largest case needs.
#[derive(Debug, Clone, Copy, Default)]
struct Sizes {
    /// That calls only read.
    read: usize,
    /// That calls write, and fresh operands.
    written: usize,
    tokens: usize,
}

impl Sizes {
    /// Of one case; and its call on operands that are not there.
    fn of(key: &KernelKey, context: &Context) -> (Sizes, Call) {
        let nowhere: &dyn Block = &Nowhere;
        let mut sizes = Sizes::default();
        let mut next = 0;
        let call = call(key, context, &mut |role, dtype, len| {
            let words = words(len, dtype);
            match role {
                Role::Read => sizes.read += words,
                Role::Fresh | Role::Written => sizes.written += words,
                Role::Tokens => sizes.tokens += words,
                Role::Wide => {}
            }
            let start = next;
            next += words * 4 + 64;
            nowhere.view(start, len, dtype)
        });
        (sizes, call)
    }

    fn cover(&mut self, other: &Sizes) {
        self.read = self.read.max(other.read);
        self.written = self.written.max(other.written);
        self.tokens = self.tokens.max(other.tokens);
    }
}

/// 32-bit words of whole cache lines.
fn lines(words: usize) -> usize {
    words.div_ceil(LINE) * LINE
}

/// What `len` elements take of them.
fn words(len: usize, dtype: DType) -> usize {
    lines(len.saturating_mul(dtype.bytes()).div_ceil(4))
}

/// Addresses to count with.
struct Nowhere;

impl Block for Nowhere {
    fn address(&self) -> u64 {
        0
    }

    fn bytes(&self) -> usize {
        usize::MAX / 2
    }
}

/// A device's working set.
struct Arena<'d> {
    device: &'d dyn Device,
    read: Region,
    written: Region,
    tokens: Box<dyn Block>,
    wide: Box<dyn Block>,
    random: u64,
    /// Of a device that works behind the host's back.
    far: Option<Far>,
}

/// What it takes to time a kernel alone on a device that works behind the host's back.
struct Far {
    /// Filled before each timing: what lay in the caches leaves them, and the host comes to queue all of the timing while it lasts.
    plug: Box<dyn Block>,
    /// From and to, for copies beside kernels, and the seconds of one.
    copies: Option<(Region, Region, f64)>,
    /// Seconds from one queued call to the next, where the device has nothing to do: no kernel of a run takes less.
    interval: f64,
}

/// Calls whose time is that of queueing them.
const QUEUED: u32 = 200;
/// Copies beside one kernel at most.
const MOST_COPIES: usize = 64;

impl Far {
    fn new(device: &dyn Device, floats: usize, beside_copies: bool) -> Result<Far, KernelError> {
        let plug = device.allocate(floats * 4)?;
        let one = Call::Zero { x: plug.view(0, 1, DType::F32) };
        let mut intervals = Vec::new();
        for _ in 0..8 {
            device.complete()?;
            let start = Instant::now();
            for _ in 0..QUEUED {
                // SAFETY: this thread alone knows the block.
                unsafe { device.run(&one) }?;
            }
            device.complete()?;
            intervals.push(start.elapsed().as_secs_f64() / f64::from(QUEUED));
        }
        let interval = Summary::of(intervals).map_or(0.0, |summary| summary.median);
        let mut copies = None;
        if beside_copies {
            let (from, to) = (Region::new(device, floats)?, Region::new(device, floats)?);
            let call = Call::Copy { from: from.all(), to: to.all() };
            // SAFETY: as above.
            let seconds = unsafe { device.time(&[call; 5], &[]) }?;
            let seconds = Summary::of(seconds).map_or(0.0, |summary| summary.median);
            copies = Some((from, to, seconds));
        }
        Ok(Far { plug, copies, interval })
    }

    /// Times a call; `prepare` is run just before it.
    ///
    /// # Safety
    /// As for [`Device::time`].
    unsafe fn time(&self, device: &dyn Device, call: &Call, prepare: &[Call]) -> Result<f64, KernelError> {
        let before = || {
            let x = self.plug.view(0, self.plug.bytes() / 4, DType::F32);
            // SAFETY: this thread alone knows the plug; the rest is the caller's promise.
            [Call::Zero { x }].iter().chain(prepare).try_for_each(|call| unsafe { device.run(call) })
        };
        let timed = |copies: &[(View, View)]| {
            before()?;
            // SAFETY: the caller's promise.
            let seconds = unsafe { device.time(std::slice::from_ref(call), copies) }?;
            Ok(seconds[0].max(self.interval))
        };
        let alone = timed(&[])?;
        let Some((from, to, each)) = &self.copies else { return Ok(alone) };
        // As many as last while the call does.
        let count = (alone / each.max(1e-9)).ceil() as usize + 1;
        timed(&vec![(from.all(), to.all()); count.min(MOST_COPIES)])
    }
}

/// Memory in which operands are placed.
struct Region {
    block: Box<dyn Block>,
    floats: usize,
}

impl Region {
    fn new(device: &dyn Device, floats: usize) -> Result<Region, KernelError> {
        let floats = lines(floats.max(1));
        Ok(Region { block: device.allocate(floats * 4)?, floats })
    }

    fn all(&self) -> View {
        self.block.view(0, self.floats, DType::F32)
    }

    /// A place to begin so that `needed` elements follow.
    fn begin(&self, needed: usize, random: u64) -> usize {
        let free = (self.floats - needed) / LINE;
        (random % (free as u64 + 1)) as usize * LINE
    }
}

impl<'d> Arena<'d> {
    fn new(
        device: &'d dyn Device,
        sizes: &Sizes,
        vocab: u32,
        seed: u64,
        beside_copies: bool,
    ) -> Result<Arena<'d>, KernelError> {
        // Room to move even for the largest case.
        let read = Region::new(device, sizes.read + sizes.read / 4)?;
        let written = Region::new(device, sizes.written + sizes.written / 4)?;
        let tokens = device.allocate(4 * lines(sizes.tokens.max(1)))?;
        let wide = device.allocate(64)?;
        let plug = (read.floats / 4).max(1);
        let far = (!device.is_host()).then(|| Far::new(device, plug, beside_copies)).transpose()?;
        let mut arena = Arena { device, read, written, tokens, wide, random: seed, far };
        // Values between -1 and 1, read as 32-bit words and as two narrow ones alike: no product, sum or exponential of them
        // overflows.
        const CHUNK: usize = 1 << 16;
        let mut values = vec![0u8; 4 * CHUNK];
        for start in (0..arena.read.floats).step_by(CHUNK) {
            let len = CHUNK.min(arena.read.floats - start);
            for bytes in values[..4 * len].chunks_exact_mut(4) {
                let value = (arena.random() >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
                let half = value.to_bits() & 0xffff_0000;
                bytes.copy_from_slice(&(half | half >> 16).to_ne_bytes());
            }
            let to = arena.read.all().slice(start, len);
            // SAFETY: this thread alone knows the block.
            unsafe { device.upload(&values[..4 * len], to) }?;
        }
        let count = arena.tokens.bytes() / 4;
        let tokens: Vec<u8> =
            (0..count).flat_map(|_| ((arena.random() % u64::from(vocab.max(1))) as u32).to_ne_bytes()).collect();
        // SAFETY: as above.
        unsafe { device.upload(&tokens, arena.tokens.view(0, count, DType::U32)) }?;
        for start in (0..arena.written.floats).step_by(arena.read.floats) {
            let len = arena.read.floats.min(arena.written.floats - start);
            let (from, to) = (arena.read.all().slice(0, len), arena.written.all().slice(start, len));
            // SAFETY: as above.
            unsafe { device.run(&Call::Copy { from, to }) }?;
        }
        let zero = arena.wide.view(0, 8, DType::F64);
        // SAFETY: as above.
        unsafe { device.upload(&[0; 64], zero) }?;
        Ok(arena)
    }

    fn random(&mut self) -> u64 {
        self.random = mix(self.random);
        self.random
    }

    fn shuffle(&mut self, order: &mut [usize]) {
        for n in (1..order.len()).rev() {
            order.swap(n, (self.random() % (n as u64 + 1)) as usize);
        }
    }

    /// Runs a call once and tells its seconds.
    fn time(&mut self, key: &KernelKey, context: &Context) -> Result<f64, KernelError> {
        let (needed, _) = Sizes::of(key, context);
        let (here, there) = (self.random(), self.random());
        let mut read = self.read.begin(needed.read, here);
        let mut written = self.written.begin(needed.written, there);
        let mut tokens = 0;
        let mut fresh: Option<View> = None;
        let call = call(key, context, &mut |role, dtype, len| {
            let take = |at: &mut usize, block: &(dyn Block + 'static)| {
                let view = block.view(*at * 4, len, dtype);
                *at += words(len, dtype);
                view
            };
            match role {
                Role::Read => take(&mut read, &*self.read.block),
                Role::Written => take(&mut written, &*self.written.block),
                Role::Fresh => *fresh.insert(take(&mut written, &*self.written.block)),
                Role::Tokens => take(&mut tokens, &*self.tokens),
                Role::Wide => self.wide.view(0, len, dtype),
            }
        });
        let mut prepare = Vec::new();
        if let Some(to) = fresh {
            let most = self.read.floats * 4 / to.dtype().bytes();
            for start in (0..to.len()).step_by(most) {
                let len = most.min(to.len() - start);
                let from = self.read.all().within(0, len, to.dtype());
                prepare.push(Call::Copy { from, to: to.slice(start, len) });
            }
        }
        if let Some(far) = &self.far {
            // SAFETY: the blocks live as long as the arena, which this thread alone has; operands that are written lie next to each
            // other in their region, never over each other.
            return unsafe { far.time(self.device, &call, &prepare) };
        }
        // SAFETY: as above.
        prepare.iter().try_for_each(|call| unsafe { self.device.run(call) })?;
        let start = Instant::now();
        // SAFETY: as above; operands that are written lie next to each other in their region, never over each other.
        unsafe { self.device.run(&call) }?;
        Ok(start.elapsed().as_secs_f64())
    }
}
