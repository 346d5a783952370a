//! Measuring this machine for a profile, under the conditions of a run: the devices that a run keeps busy are busy,
//! operands lie in a working set as large as a run's, what the previous kernel would have made is fresh in the cache, and
//! cases follow each other in random order so that a drifting clock touches all alike.

mod case;
mod exchange;
mod far;
mod from_run;
mod grid;
mod kernels;
mod machine;
mod overhead;
mod samples;

pub use from_run::{DISTURBED_RUN, disturbance, rows_of_run, rows_of_runs};
pub use grid::{gpu_shapes, grid_around, usual_shapes};
pub use machine::this_machine;

use crate::error::ExecError;
use paceline_kernels::{Device, KernelError};
use paceline_profiles::{KernelKey, Profile, Row, Source, Subject};
use samples::Summary;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use thiserror::Error;

/// How to measure.
#[derive(Debug, Clone)]
pub struct MeasureSettings {
    /// Devices (core slots) that a run keeps busy; kernels are measured with so many at work, and with one.
    pub devices: u32,
    /// Time for everything together. Each case is repeated a few times even if that takes longer.
    pub budget: Duration,
    /// Bytes that a device touches in a step of a run: decides what caches can hold.
    pub working_set_bytes: u64,
    /// Seed of the order of cases and of the contents of operands.
    pub seed: u64,
}

impl Default for MeasureSettings {
    /// All cores, 30 seconds, a working set of 256 MiB.
    fn default() -> MeasureSettings {
        MeasureSettings {
            devices: std::thread::available_parallelism().map_or(1, |n| n.get() as u32),
            budget: Duration::from_secs(30),
            working_set_bytes: 256 << 20,
            seed: 0,
        }
    }
}

/// How far a measurement is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MeasureProgress {
    /// What is being measured.
    pub phase: MeasurePhase,
    /// Part of the whole that is done, from 0 to 1.
    pub fraction: f64,
}

/// The parts of a measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MeasurePhase {
    /// Kernels, while so many devices work.
    Kernels {
        /// How many.
        busy_devices: u32,
    },
    /// Kernels, while copies go on beside them on the same device.
    BesideCopies,
    /// Copies of messages and rounds of collectives.
    Exchange,
    /// The executor itself.
    Overhead,
}

impl std::fmt::Display for MeasurePhase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            MeasurePhase::Kernels { busy_devices: 1 } => f.write_str("kernels, one device at work"),
            MeasurePhase::Kernels { busy_devices } => write!(f, "kernels, {busy_devices} devices at work"),
            MeasurePhase::BesideCopies => f.write_str("kernels, beside copies"),
            MeasurePhase::Exchange => f.write_str("messages and collectives"),
            MeasurePhase::Overhead => f.write_str("overheads"),
        }
    }
}

/// Why a measurement did not finish.
#[derive(Debug, Error)]
pub enum MeasureError {
    /// A kernel refused, or there is not enough memory.
    #[error("{key}: {source}")]
    Kernel { key: KernelKey, source: KernelError },
    /// Memory for operands.
    #[error("cannot hold the operands: {0}; a smaller working set or smaller shapes need less")]
    Memory(KernelError),
    /// Operands larger than any machine.
    #[error("{key} has operands of {bytes:.1e} bytes: more than the {limit:.1e} that are measured")]
    TooLarge { key: KernelKey, bytes: f64, limit: f64 },
    /// Nothing to measure.
    #[error("no kernels to measure")]
    NoKernels,
    /// More devices than cores cannot be busy at once.
    #[error("devices = {devices}: this machine has {cores} cores, from 1 to {cores} are allowed")]
    Devices { devices: u32, cores: u32 },
    /// The executor failed while its overhead was measured.
    #[error(transparent)]
    Executor(#[from] ExecError),
    /// The device failed.
    #[error(transparent)]
    Device(KernelError),
    /// The stop flag was set.
    #[error("stopped")]
    Stopped,
}

/// Parts of the budget.
const ALL_BUSY: f64 = 0.55;
const ONE_BUSY: f64 = 0.25;
const EXCHANGE: f64 = 0.12;
const OVERHEAD: f64 = 0.08;

/// Measures a profile of this machine: kernels at `keys` with all devices and with one at work, at the shapes `around`
/// them with all, messages and collectives over sizes, and the executor's overheads. Progress is told about ten times a
/// second.
///
/// # Errors
/// When a kernel cannot run at its shape, memory does not suffice, or `stop` becomes true.
pub fn calibrate(
    device: &dyn Device,
    keys: &[KernelKey],
    around: &[KernelKey],
    settings: &MeasureSettings,
    progress: &mut dyn FnMut(MeasureProgress),
    stop: Option<&AtomicBool>,
) -> Result<Profile, MeasureError> {
    let mut profile = Profile::new(this_machine(device));
    let keys: BTreeSet<&KernelKey> = keys.iter().collect();
    let all: BTreeSet<&KernelKey> = keys.iter().copied().chain(around).collect();
    let mut run = Run { device, settings, stop, planned: 1.0, done: 0.0, progress, rows: Vec::new() };
    if device.is_host() {
        near(&mut run, &keys, &all)?
    } else {
        far::measure(&mut run, &keys, &all)?
    }
    profile.rows = run.rows;
    Ok(profile)
}

/// Measures devices that are cores of the host.
fn near(run: &mut Run, keys: &BTreeSet<&KernelKey>, all: &BTreeSet<&KernelKey>) -> Result<(), MeasureError> {
    let devices = run.settings.devices;
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    if devices == 0 || devices > cores {
        return Err(MeasureError::Devices { devices, cores });
    }
    let one_at_work = devices > 1;
    if !one_at_work {
        run.planned -= ONE_BUSY;
    }
    run.kernels(all, devices, ALL_BUSY)?;
    if one_at_work {
        run.kernels(keys, 1, ONE_BUSY)?;
    }
    run.phase(MeasurePhase::Exchange, EXCHANGE, exchange::measure)?;
    run.phase(MeasurePhase::Overhead, OVERHEAD, overhead::measure)
}

/// A measurement under way.
struct Run<'a> {
    device: &'a dyn Device,
    settings: &'a MeasureSettings,
    stop: Option<&'a AtomicBool>,
    /// Parts of the budget that will be used.
    planned: f64,
    /// Part of the whole that is done.
    done: f64,
    progress: &'a mut dyn FnMut(MeasureProgress),
    rows: Vec<Row>,
}

/// What a phase needs to know while it runs.
struct Phase<'a> {
    device: &'a dyn Device,
    settings: &'a MeasureSettings,
    /// When it shall end.
    deadline: Instant,
    stop: &'a (dyn Fn() -> bool + Sync),
    /// To be called now and then by the thread that leads.
    tick: &'a mut dyn FnMut(),
}

impl Run<'_> {
    fn kernels(&mut self, keys: &BTreeSet<&KernelKey>, busy: u32, part: f64) -> Result<(), MeasureError> {
        let keys: Vec<&KernelKey> = keys.iter().copied().collect();
        self.phase(MeasurePhase::Kernels { busy_devices: busy }, part, |phase| kernels::measure(phase, &keys, busy))
    }

    fn phase(
        &mut self,
        what: MeasurePhase,
        part: f64,
        measure: impl FnOnce(&mut Phase) -> Result<Vec<Measured>, MeasureError>,
    ) -> Result<(), MeasureError> {
        let length = self.settings.budget.mul_f64(part / self.planned);
        let started = Instant::now();
        let part_of_all = part / self.planned;
        let (before, after) = (self.done, (self.done + part_of_all).min(1.0));
        let stop = self.stop;
        let stopped = move || stop.is_some_and(|stop| stop.load(Ordering::Relaxed));
        let progress = &mut *self.progress;
        progress(MeasureProgress { phase: what, fraction: before });
        let mut tick = || {
            let within = started.elapsed().as_secs_f64() / length.as_secs_f64().max(1e-9);
            progress(MeasureProgress { phase: what, fraction: (before + part_of_all * within).min(after) });
        };
        let measured = measure(&mut Phase {
            device: self.device,
            settings: self.settings,
            deadline: started + length,
            stop: &stopped,
            tick: &mut tick,
        })?;
        if stopped() {
            return Err(MeasureError::Stopped);
        }
        self.done = after;
        progress(MeasureProgress { phase: what, fraction: after });
        let (date, versions) = (machine::today(), machine::versions(Some(self.device)));
        self.rows.extend(measured.into_iter().map(|m| Row {
            subject: m.subject,
            busy_devices: m.busy_devices,
            context: None,
            median_seconds: m.summary.median,
            spread_seconds: m.summary.spread,
            repetitions: m.summary.count,
            source: Source::Measured,
            date: date.clone(),
            versions: versions.clone(),
        }));
        Ok(())
    }
}

/// A result, before it becomes a row.
struct Measured {
    subject: Subject,
    busy_devices: u32,
    summary: Summary,
}

#[cfg(test)]
mod tests;
