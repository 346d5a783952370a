//! Measuring a device with a memory of its own, which works behind the host's back: by its own clock, kernels with nothing beside
//! them and with copies beside them, exchanges within its memory as a run makes them, and what ops and messages take beyond their
//! kernels and copies.

use super::exchange::{Case, MEMBERS, step_of, summarised};
use super::samples::Summary;
use super::{KernelKey, MeasureError, MeasurePhase, Measured, Phase, Run};
use crate::collectives::Parts;
use crate::device_exchange::{Part, Sums, round};
use crate::effects::HostRange;
use paceline_kernels::{Block, Call, DType, KernelError, Moment, Queue, Queues, View};
use paceline_profiles::{KernelOp, Overhead, Subject};
use std::collections::BTreeSet;
use std::time::Instant;

/// Parts of the budget.
const ALONE: f64 = 0.6;
const BESIDE_COPIES: f64 = 0.2;
const EXCHANGE: f64 = 0.12;
const OVERHEAD: f64 = 0.08;

/// Sizes of messages and arrays: 4 KiB to 256 MiB, where the working set has room for them.
const SIZES: [u64; 9] = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20];
/// Repetitions even if the time is up; and at most.
const LEAST: usize = 3;
const MOST: usize = 100;

/// Measures such a device: kernels at `keys` both ways, those of `all` with nothing beside them. Rows with two busy devices are those of
/// kernels beside copies.
pub(super) fn measure(
    run: &mut Run,
    keys: &BTreeSet<&KernelKey>,
    all: &BTreeSet<&KernelKey>,
) -> Result<(), MeasureError> {
    // The smallest fill takes as long as queueing it.
    let launch = KernelKey::new(KernelOp::Zero, &[1]).ok();
    run.kernels(&all.iter().copied().chain(&launch).collect(), 1, ALONE)?;
    let keys: Vec<&KernelKey> = keys.iter().copied().collect();
    run.phase(MeasurePhase::BesideCopies, BESIDE_COPIES, |phase| super::kernels::measure(phase, &keys, 2))?;
    run.phase(MeasurePhase::Exchange, EXCHANGE, exchange)?;
    run.phase(MeasurePhase::Overhead, OVERHEAD, overhead)
}

/// Ops and messages that are timed together.
const CHAIN: usize = 50;

/// Queues on which pieces of work are timed as a run queues them.
struct Timer<'d> {
    queues: &'d dyn Queues,
    one: Box<dyn Queue>,
    other: Box<dyn Queue>,
    moments: Vec<Moment>,
    /// What is filled first, so that the host has time to queue what is timed.
    plug: Box<dyn Block>,
}

impl<'d> Timer<'d> {
    fn new(phase: &Phase<'d>) -> Result<Timer<'d>, MeasureError> {
        let none = || KernelError::Unavailable(format!("device {} has no queues to time", phase.device.name()));
        let queues = phase.device.queues().ok_or_else(none).map_err(MeasureError::Device)?;
        let open = || queues.open().map_err(MeasureError::Device);
        let moments = (0..2 * CHAIN + 2).map(|_| queues.moment()).collect::<Result<_, _>>();
        let plug = (phase.settings.working_set_bytes as usize / 4).max(4);
        Ok(Timer {
            one: open()?,
            other: open()?,
            queues,
            moments: moments.map_err(MeasureError::Device)?,
            plug: phase.device.allocate(plug).map_err(MeasureError::Memory)?,
        })
    }

    /// Seconds that work takes on the device, from its begin on the first queue to its end there.
    fn seconds(&self, work: impl FnOnce() -> Result<(), KernelError>) -> Result<f64, MeasureError> {
        let [from, to, ..] = self.moments[..] else { return Ok(0.0) };
        let timed = || {
            let x = self.plug.view(0, self.plug.bytes() / 4, DType::F32);
            // SAFETY: nobody else knows the block.
            unsafe { self.one.run(&Call::Zero { x }) }?;
            self.one.set(from)?;
            work()?;
            self.one.set(to)?;
            self.one.complete()?;
            self.queues.seconds(from, to)
        };
        timed().map_err(MeasureError::Device)
    }
}

impl Drop for Timer<'_> {
    fn drop(&mut self) {
        self.queues.release(&self.moments);
    }
}

/// Times messages and rounds as a run makes them.
fn exchange(phase: &mut Phase) -> Result<Vec<Measured>, MeasureError> {
    let most = (phase.settings.working_set_bytes / 4).max(SIZES[0]);
    let blocks: Vec<Box<dyn Block>> = (0..MEMBERS)
        .map(|_| phase.device.allocate(most as usize).map_err(MeasureError::Memory))
        .collect::<Result<_, _>>()?;
    let timer = Timer::new(phase)?;
    for block in &blocks {
        let x = block.view(0, most as usize / 4, DType::F32);
        // SAFETY: nobody else knows the block.
        unsafe { timer.one.run(&Call::Zero { x }) }.map_err(MeasureError::Device)?;
    }
    let sums = Sums::default();
    let sizes: Vec<u64> = SIZES.into_iter().filter(|&bytes| bytes <= most).collect();
    let cases = Case::all(&sizes);
    let mut timings: Vec<Vec<f64>> = vec![Vec::new(); cases.len()];
    // The first round warms up.
    for number in 0..=MOST {
        if (phase.stop)() || (number > LEAST && Instant::now() >= phase.deadline) {
            break;
        }
        for (case, timings) in cases.iter().zip(&mut timings) {
            let (Case::Copy { bytes } | Case::Part { bytes, .. }) = *case;
            let range = |block: &dyn Block| HostRange { address: block.address(), bytes, shard: 0 };
            let ranges: Vec<HostRange> = blocks.iter().map(|block| range(&**block)).collect();
            let len = bytes as usize / 4;
            // SAFETY: the blocks are different, live, and nobody else knows them.
            let seconds = timer.seconds(|| unsafe {
                match *case {
                    Case::Copy { .. } => {
                        let view = |n: usize| View::at(ranges[n].address, len, DType::U32);
                        timer.one.run(&Call::Copy { from: view(0), to: view(1) })
                    }
                    Case::Part { round: kind, members, .. } => {
                        let (members, step) = (members as usize, step_of(kind));
                        let parts = Parts { len, part: len.div_ceil(members) };
                        let part = Part { meeting: 0, member: 0, step, groups: 1, parts, dtype: DType::F32 };
                        round(&*timer.one, &sums, &part, &ranges[..members])
                    }
                }
            })?;
            if number > 0 {
                timings.push(seconds);
            }
            (phase.tick)();
        }
    }
    Ok(summarised(&cases, timings, 1))
}

/// What an op takes beyond its kernels where the host runs ahead: the moments before and after it. And what a message takes beyond its
/// copy: two queues that wait for each other.
fn overhead(phase: &mut Phase) -> Result<Vec<Measured>, MeasureError> {
    let timer = Timer::new(phase)?;
    let block = phase.device.allocate(512).map_err(MeasureError::Memory)?;
    let call = Call::Zero { x: block.view(0, 64, DType::F32) };
    let (mut per_op, mut per_message) = (Vec::new(), Vec::new());
    for number in 0..=MOST {
        if (phase.stop)() || (number > LEAST && Instant::now() >= phase.deadline) {
            break;
        }
        // SAFETY: nobody else knows the block, and one call of each chain comes after the other.
        let run = |queue: &dyn Queue| unsafe { queue.run(&call) };
        let calls = timer.seconds(|| (0..CHAIN).try_for_each(|_| run(&*timer.one)))?;
        let ops = timer.seconds(|| {
            timer.moments[2..].chunks_exact(2).try_for_each(|op| {
                timer.one.set(op[0])?;
                run(&*timer.one)?;
                timer.one.set(op[1])
            })
        })?;
        let messages = timer.seconds(|| {
            timer.moments[2..].chunks_exact(2).try_for_each(|there_and_back| {
                timer.one.set(there_and_back[0])?;
                timer.other.follow(there_and_back[0])?;
                run(&*timer.other)?;
                timer.other.set(there_and_back[1])?;
                timer.one.follow(there_and_back[1])
            })
        })?;
        if number > 0 {
            let each = |all: f64| ((all - calls) / CHAIN as f64).max(1e-9);
            per_op.push(each(ops));
            per_message.push(each(messages));
        }
        (phase.tick)();
    }
    timer.other.complete().map_err(MeasureError::Device)?;
    let of = |overhead, seconds: &[f64]| {
        let summary = Summary::of(seconds.to_vec()).ok_or(MeasureError::Stopped)?;
        Ok::<_, MeasureError>(Measured { subject: Subject::Overhead(overhead), busy_devices: 1, summary })
    };
    Ok(vec![of(Overhead::Op, &per_op)?, of(Overhead::SharedOp, &per_op)?, of(Overhead::SharedMessage, &per_message)?])
}
