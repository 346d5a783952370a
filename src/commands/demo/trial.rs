//! A short run of one configuration, repeated where other work shared its cores.

use crate::failure::Failure;
use crate::local::Local;
use crate::screen::Screen;
use crate::table::show_seconds;
use crate::training;
use paceline_exec::measure::{DISTURBED_RUN, disturbance, rows_of_run};
use paceline_exec::{Dataset, RunReport, Silent};
use paceline_planner::configuration::Configuration;
use paceline_planner::job::Job;
use paceline_profiles::{Predictor, Row};
use paceline_sim::program::Program;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A run that was disturbed no more than this is not repeated: on a machine of its own, caches and clocks make this difference.
const QUIET_RUN: f64 = 1.25;

/// Where trials run.
pub struct Bench<'a> {
    pub local: &'a Local,
    pub job: &'a Job,
    pub data: &'a Dataset,
    pub stop: &'a Arc<AtomicBool>,
    /// Runs of a configuration at most; the quietest counts.
    pub attempts: u32,
}

/// A finished trial.
pub struct Trial {
    /// What ran.
    pub program: Program,
    /// The least disturbed of its runs.
    pub report: RunReport,
    /// Runs that were too much disturbed.
    pub disturbed: u32,
    quiet: bool,
}

impl Bench<'_> {
    /// Fails when Ctrl-C was pressed.
    pub fn refuse_if_stopped(&self) -> Result<(), Failure> {
        if self.stop.load(Ordering::Relaxed) { Err(Failure::interrupted("demonstration stopped")) } else { Ok(()) }
    }

    /// Runs a configuration for some steps.
    pub fn run(&self, screen: &Screen, configuration: &Configuration, steps: u64) -> Result<Trial, Failure> {
        let machine = self.local.machine.for_job(self.job);
        let program = configuration.program(self.job, machine).map_err(Failure::internal)?;
        let mut settings = training::settings(self.job, self.data, steps)?;
        settings.evaluation = None;
        settings.stop = Some(self.stop.clone());
        let mut least: Option<(f64, RunReport)> = None;
        let mut disturbed = 0;
        for _ in 0..self.attempts {
            let report = paceline_exec::run(&program, &self.local.device, &settings, self.data, &mut Silent)
                .map_err(training::failure)?;
            self.refuse_if_stopped()?;
            let found = disturbance(&report);
            if least.as_ref().is_none_or(|(so_far, _)| found < *so_far) {
                least = Some((found, report));
            }
            if found <= QUIET_RUN {
                break;
            }
            disturbed += u32::from(found > DISTURBED_RUN);
        }
        let Some((found, report)) = least else { return Err(Failure::internal("no run was made")) };
        let quiet = found <= DISTURBED_RUN;
        let note = if quiet { "" } else { " (other work shared its cores)" };
        screen.say(format!("    {configuration}: {}{note}", show_seconds(report.median_seconds())));
        Ok(Trial { program, report, disturbed, quiet })
    }
}

impl Trial {
    /// What the run teaches about the machine, if it was left alone.
    pub fn rows(&self, measured: &Predictor) -> Option<Vec<Row>> {
        self.quiet.then(|| rows_of_run(&self.program, &self.report, Some(measured)))
    }
}
