//! This machine: its device, the profile that describes it, and what the planner needs to know of it.

use crate::failure::Failure;
use crate::profile_store;
use crate::screen::Screen;
use crate::table::show_percent;
use paceline_exec::measure::{self, MeasureError, MeasureSettings, this_machine};
use paceline_kernels::{CpuDevice, Device};
use paceline_planner::configuration::Machine;
use paceline_planner::job::Job;
use paceline_planner::lower::Form;
use paceline_planner::search::candidates;
use paceline_profiles::{Family, KernelKey, Overhead, Predictor, Profile, Row, Source, Subject, Work};
use paceline_sim::cost::kernels_of;
use paceline_sim::memory::walk;
use paceline_sim::units::RankId;
use paceline_tui::question::LocalMachine;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// This machine, ready to predict with.
pub struct Local {
    /// Its device.
    pub device: CpuDevice,
    /// What is known of it.
    pub profile: Profile,
    /// Where that came from, for people.
    pub origin: String,
    /// Fits over it.
    pub predictor: Predictor,
    /// What the planner needs.
    pub machine: Machine,
}

impl Local {
    /// Opens the machine with the profile that `--profile`, the environment or an earlier calibration names.
    pub fn open(screen: &Screen, profile: Option<&Path>) -> Result<Local, Failure> {
        Local::open_with(screen, profile, None)
    }

    /// The same for runs on a GPU of the machine, if one is given: then the profile that a calibration of a GPU left comes first.
    pub fn open_with(screen: &Screen, profile: Option<&Path>, gpu: Option<&dyn Device>) -> Result<Local, Failure> {
        let device = CpuDevice::new();
        let here = this_machine(gpu.unwrap_or(&device));
        let found = profile_store::find(screen, profile, &here, gpu.is_some())?;
        Local::with(device, found.profile, found.origin)
    }

    /// The same as the terminal UI and the report take it.
    pub fn for_views(self) -> LocalMachine {
        LocalMachine {
            predictor: Arc::new(self.predictor),
            profile: Arc::new(self.profile),
            machine: self.machine,
            origin: self.origin,
        }
    }

    /// The machine with a profile at hand.
    pub fn with(device: CpuDevice, profile: Profile, origin: String) -> Result<Local, Failure> {
        let predictor = Predictor::new(&profile).map_err(|error| Failure::bad_input(format!("{origin}: {error}")))?;
        // A GPU is one device, which all ranks share.
        let devices = if profile.machine.is_host() { cores() } else { 1 };
        let machine = Machine { devices, flops_per_second: product_rate(&profile) };
        Ok(Local { device, profile, origin, predictor, machine })
    }
}

/// Device slots of this machine: one per core.
pub fn cores() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| n.get() as u32)
}

/// The highest rate of matrix products that was measured, in FLOP/s of one device: what MFU is relative to.
pub fn product_rate(profile: &Profile) -> Option<f64> {
    let rate = |row: &Row| match &row.subject {
        Subject::Kernel(key) if key.op.family() == Family::Matmul && row.source == Source::Measured => {
            Some(Work::of(key).flops / row.median_seconds)
        }
        _ => None,
    };
    profile.rows.iter().filter_map(rate).reduce(f64::max)
}

/// What a job asks of this machine, over all configurations that it allows.
pub struct Demand {
    /// Every kernel, at its shape there.
    pub keys: BTreeSet<KernelKey>,
    /// What a device holds at most, in the median configuration: no cache keeps it all from step to step.
    pub working_set_bytes: u64,
}

impl Demand {
    /// Of a job on so many devices.
    pub fn of(job: &Job, devices: u32) -> Result<Demand, Failure> {
        let machine = Machine { devices, flops_per_second: None }.for_job(job);
        let mut keys = BTreeSet::new();
        let mut held = Vec::new();
        for configuration in candidates::of_job(job, machine) {
            // What cannot be lowered is none of the job's configurations.
            if let Ok(program) = configuration.program_unchecked(job, machine, Form::Representative) {
                keys.extend(kernels_of(&program).map_err(Failure::internal)?);
                let mut devices = vec![0; program.devices.len()];
                for (number, rank) in (0..).zip(&program.ranks) {
                    devices[rank.device.index()] += walk(&program, RankId(number)).peak_bytes;
                }
                held.extend(devices.into_iter().max());
            }
        }
        held.sort_unstable();
        let working_set_bytes = held.get(held.len() / 2).copied().unwrap_or(0);
        Ok(Demand { keys, working_set_bytes })
    }

    /// Settings of a measurement of `seconds` for it.
    pub fn settings(&self, seconds: f64, devices: Option<u32>) -> MeasureSettings {
        MeasureSettings { working_set_bytes: self.working_set_bytes, ..measure_settings(seconds, devices) }
    }
}

/// Measures a device of this machine at `keys` and around them, with progress on the screen.
pub fn calibrate(
    screen: &Screen,
    device: &dyn Device,
    keys: &BTreeSet<KernelKey>,
    settings: &MeasureSettings,
    stop: &AtomicBool,
) -> Result<Profile, Failure> {
    let mut progress = screen.progress(settings.budget.as_secs().max(1), "calibrate");
    let mut tell = |at: measure::MeasureProgress| {
        progress.set((at.fraction * settings.budget.as_secs_f64()) as u64, at.phase.to_string());
    };
    let profile = measure(device, keys, settings, &mut tell, stop)?;
    drop(progress);
    warn_of_interference(screen, &profile);
    Ok(profile)
}

/// Other work above this share of the kernels' time makes a profile of it more than of the machine.
const MUCH_INTERFERENCE: f64 = 0.15;

fn warn_of_interference(screen: &Screen, profile: &Profile) {
    let lost = |row: &Row| (row.subject == Subject::Overhead(Overhead::Interference)).then_some(row.median_seconds);
    if let Some(lost) = profile.rows.iter().filter_map(lost).reduce(f64::max).filter(|&lost| lost > MUCH_INTERFERENCE) {
        screen.warn(format!(
            "other work on this machine took {} on top of the kernels' own time while they were measured, and predictions assume that it \
             goes on; calibrate again when the machine is quiet",
            show_percent(lost)
        ));
    }
}

/// Measures a device of this machine at `keys` and around them.
pub fn measure(
    device: &dyn Device,
    keys: &BTreeSet<KernelKey>,
    settings: &MeasureSettings,
    tell: &mut dyn FnMut(measure::MeasureProgress),
    stop: &AtomicBool,
) -> Result<Profile, Failure> {
    let keys: Vec<KernelKey> = keys.iter().cloned().collect();
    let around = measure::grid_around(&keys);
    measure::calibrate(device, &keys, &around, settings, tell, Some(stop)).map_err(|error| match error {
        MeasureError::Stopped => Failure::interrupted("calibration stopped; nothing was written"),
        MeasureError::Devices { .. } | MeasureError::TooLarge { .. } | MeasureError::Memory(_) => {
            Failure::bad_input(error)
        }
        other => Failure::internal(other),
    })
}

/// Settings of a measurement of `seconds`.
pub fn measure_settings(seconds: f64, devices: Option<u32>) -> MeasureSettings {
    let usual = MeasureSettings::default();
    MeasureSettings { devices: devices.unwrap_or(usual.devices), budget: Duration::from_secs_f64(seconds), ..usual }
}
