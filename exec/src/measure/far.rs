//! Measuring a device with a memory of its own, which works behind the host's back: kernels by its own clock with nothing beside
//! them and with copies beside them, exchanges within its memory as a run makes them, and what it costs the host to begin an op there
//! and to see that it has ended.

use super::overhead::{Overheads, overheads};
use super::samples::Summary;
use super::{
    KernelKey, MeasureError, MeasurePhase, MeasureProgress, MeasureSettings, Measured, Phase, Profile, Run,
    this_machine,
};
use crate::collectives::Parts;
use crate::device_exchange::DeviceExchange;
use crate::effects::HostRange;
use paceline_kernels::{Block, Call, DType, Device};
use paceline_profiles::{CollectiveRound, KernelOp, Overhead, Subject};
use paceline_sim::program::Step;
use std::collections::BTreeSet;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

/// Parts of the budget.
const ALONE: f64 = 0.6;
const BESIDE_COPIES: f64 = 0.2;
const EXCHANGE: f64 = 0.12;
const OVERHEAD: f64 = 0.08;

/// Sizes of messages and arrays: 4 KiB to 256 MiB, where the working set has room for them.
const SIZES: [u64; 9] = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20];
/// Sizes of groups.
const GROUPS: [usize; 2] = [2, 4];
/// Repetitions even if the time is up; and at most.
const LEAST: usize = 3;
const MOST: usize = 100;

/// [`super::calibrate`] for such a device. Rows with two busy devices are those of kernels beside copies.
pub(super) fn calibrate(
    device: &dyn Device,
    keys: &[KernelKey],
    around: &[KernelKey],
    settings: &MeasureSettings,
    progress: &mut dyn FnMut(MeasureProgress),
    stop: Option<&AtomicBool>,
) -> Result<Profile, MeasureError> {
    let mut profile = Profile::new(this_machine(device));
    let settings = &MeasureSettings { devices: 1, ..settings.clone() };
    let keys: BTreeSet<&KernelKey> = keys.iter().collect();
    let mut run = Run { device, settings, stop, planned: 1.0, done: 0.0, progress, rows: Vec::new() };
    // The smallest fill takes as long as queueing it.
    let launch = KernelKey::new(KernelOp::Zero, &[1]).ok();
    let all: Vec<&KernelKey> =
        keys.iter().copied().chain(around).chain(&launch).collect::<BTreeSet<_>>().into_iter().collect();
    let measure = super::kernels::measure;
    run.phase(MeasurePhase::Kernels { busy_devices: 1 }, ALONE, |phase| measure(phase, &all, 1))?;
    let keys: Vec<&KernelKey> = keys.into_iter().collect();
    run.phase(MeasurePhase::BesideCopies, BESIDE_COPIES, |phase| measure(phase, &keys, 2))?;
    run.phase(MeasurePhase::Exchange, EXCHANGE, exchange)?;
    run.phase(MeasurePhase::Overhead, OVERHEAD, overhead)?;
    profile.rows = run.rows;
    Ok(profile)
}

/// What is measured of exchanges.
#[derive(Debug, Clone, Copy)]
enum Case {
    Copy,
    Part { round: CollectiveRound, members: usize },
}

/// Times messages and rounds as a run makes them, from the host's call to the end that it sees.
fn exchange(phase: &mut Phase) -> Result<Vec<Measured>, MeasureError> {
    let most = (phase.settings.working_set_bytes / 4).max(SIZES[0]);
    let blocks: Vec<Box<dyn Block>> = (0..GROUPS[GROUPS.len() - 1])
        .map(|_| phase.device.allocate(most as usize).map_err(MeasureError::Memory))
        .collect::<Result<_, _>>()?;
    for block in &blocks {
        let x = block.view(0, most as usize / 4, DType::F32);
        // SAFETY: nobody else knows the block.
        unsafe { phase.device.run(&Call::Zero { x }) }.map_err(MeasureError::Device)?;
    }
    let exchange = DeviceExchange::new(phase.device);
    let parts = GROUPS
        .into_iter()
        .flat_map(|members| CollectiveRound::ALL.into_iter().map(move |round| Case::Part { round, members }));
    let cases: Vec<(Case, u64)> = std::iter::once(Case::Copy)
        .chain(parts)
        .flat_map(|case| SIZES.into_iter().filter(|&bytes| bytes <= most).map(move |bytes| (case, bytes)))
        .collect();
    let mut timings: Vec<Vec<f64>> = vec![Vec::new(); cases.len()];
    // The first round warms up.
    for round in 0..=MOST {
        if (phase.stop)() || (round > LEAST && Instant::now() >= phase.deadline) {
            break;
        }
        for ((case, bytes), seconds) in cases.iter().zip(&mut timings) {
            let range = |block: &dyn Block| HostRange { address: block.address(), bytes: *bytes, shard: 0 };
            let ranges: Vec<HostRange> = blocks.iter().map(|block| range(&**block)).collect();
            let start = Instant::now();
            // SAFETY: the blocks are different, live, and nobody else knows them.
            unsafe {
                match *case {
                    Case::Copy => exchange.copy(ranges[0], ranges[1]),
                    Case::Part { round, members } => {
                        let step = match round {
                            CollectiveRound::Reduce => Step::Reduce,
                            CollectiveRound::Gather => Step::Gather,
                        };
                        let len = *bytes as usize / 4;
                        let parts = Parts { len, part: len.div_ceil(members) };
                        exchange.perform(step, &ranges[..members], 1, parts, 0, DType::F32);
                    }
                }
            }
            if round > 0 {
                seconds.push(start.elapsed().as_secs_f64());
            }
            if let Some(error) = exchange.take_failure() {
                return Err(MeasureError::Device(error));
            }
            (phase.tick)();
        }
    }
    let results = cases.into_iter().zip(timings).filter_map(|((case, bytes), seconds)| {
        let subject = match case {
            Case::Copy => Subject::Transfer { bytes },
            Case::Part { round, members } => Subject::Collective { round, members: members as u32, bytes },
        };
        Summary::of(seconds).map(|summary| Measured { subject, busy_devices: 1, summary })
    });
    Ok(results.collect())
}

/// The executor's overheads, with what an op costs beside its kernels: beginning on an idle device, and seeing its end.
fn overhead(phase: &mut Phase) -> Result<Vec<Measured>, MeasureError> {
    let beyond = begin_and_end(phase)?;
    let mut results = overheads(phase, Overheads { calls: false })?;
    for result in &mut results {
        if let Subject::Overhead(Overhead::Op | Overhead::SharedOp) = result.subject {
            result.summary.median += beyond.median;
            result.summary.spread = result.summary.spread.max(beyond.spread);
        }
    }
    Ok(results)
}

/// How much longer a call takes for the host that waits for it than on the device's clock.
fn begin_and_end(phase: &mut Phase) -> Result<Summary, MeasureError> {
    let floats = (phase.settings.working_set_bytes as usize / 16).max(1);
    let block = phase.device.allocate(floats * 4).map_err(MeasureError::Memory)?;
    let call = Call::Zero { x: block.view(0, floats, DType::F32) };
    let mut beyond = Vec::new();
    for _ in 0..MOST {
        // SAFETY: nobody else knows the block.
        let on_device =
            unsafe { phase.device.time(std::slice::from_ref(&call), &[]) }.map_err(MeasureError::Device)?[0];
        let start = Instant::now();
        // SAFETY: as above.
        unsafe { phase.device.run(&call) }.map_err(MeasureError::Device)?;
        phase.device.complete().map_err(MeasureError::Device)?;
        beyond.push((start.elapsed().as_secs_f64() - on_device).max(0.0));
        if (phase.stop)() || (beyond.len() >= LEAST && Instant::now() >= phase.deadline) {
            break;
        }
    }
    Summary::of(beyond).ok_or(MeasureError::Stopped)
}
