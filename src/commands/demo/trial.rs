//! Short runs of configurations, in rounds: every round runs each of them once, in an order of its own. What slows the machine for a
//! minute then touches all alike, and the round in the middle counts.

use super::median;
use crate::failure::Failure;
use crate::local::Local;
use crate::screen::Screen;
use crate::table::show_seconds;
use crate::training;
use paceline_exec::measure::{DISTURBED_RUN, disturbance, rows_of_runs};
use paceline_exec::{Dataset, RunReport, Silent};
use paceline_planner::configuration::Configuration;
use paceline_planner::job::Job;
use paceline_profiles::{Predictor, Row};
use paceline_sim::program::Program;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Where trials run.
pub struct Bench<'a> {
    pub local: &'a Local,
    pub job: &'a Job,
    pub data: &'a Dataset,
    pub stop: &'a Arc<AtomicBool>,
}

/// How often a configuration runs, and how long.
#[derive(Debug, Clone, Copy)]
pub struct Rounds {
    pub number: u32,
    /// Steps of each run, of which the first warms up.
    pub steps: u64,
}

/// The runs of one configuration.
pub struct Trial {
    pub configuration: Configuration,
    /// What ran.
    pub program: Program,
    /// Those that other work did not disturb; all where none was left alone.
    pub reports: Vec<RunReport>,
    /// Runs that were disturbed.
    pub disturbed: u32,
    /// Some run was left alone by other work.
    quiet: bool,
}

impl Bench<'_> {
    /// Fails when Ctrl-C was pressed.
    pub fn refuse_if_stopped(&self) -> Result<(), Failure> {
        if self.stop.load(Ordering::Relaxed) { Err(Failure::interrupted("demonstration stopped")) } else { Ok(()) }
    }

    /// Runs all configurations in every round.
    pub fn run(
        &self,
        screen: &Screen,
        configurations: Vec<Configuration>,
        rounds: Rounds,
    ) -> Result<Vec<Trial>, Failure> {
        let machine = self.local.machine.for_job(self.job);
        let mut settings = training::settings(self.job, self.data, rounds.steps)?;
        settings.evaluation = None;
        settings.stop = Some(self.stop.clone());
        let mut trials = Vec::new();
        for configuration in configurations {
            let program = configuration.program(self.job, machine).map_err(Failure::internal)?;
            trials.push(Trial { configuration, program, reports: Vec::new(), disturbed: 0, quiet: true });
        }
        let mut order: Vec<usize> = (0..trials.len()).collect();
        let mut progress = screen.progress(u64::from(rounds.number) * trials.len() as u64, "runs");
        for round in 1..=rounds.number {
            order.rotate_left(trials.len() / rounds.number as usize);
            order.reverse();
            for &place in &order {
                let trial = &mut trials[place];
                let device = &self.local.device;
                let report = paceline_exec::run(&trial.program, device, &settings, self.data, &mut Silent);
                trial.reports.push(report.map_err(training::failure)?);
                self.refuse_if_stopped()?;
                let done = trials.iter().map(|trial| trial.reports.len() as u64).sum();
                progress.set(done, format!("round {round} of {}", rounds.number));
            }
        }
        drop(progress);
        trials.iter_mut().for_each(Trial::leave_out_disturbed);
        for trial in &trials {
            let note = if trial.quiet { "" } else { " (other work shared its cores)" };
            let [least, middle, most] = trial.seconds();
            screen.say(format!(
                "    {}: {} ({} to {} by round){note}",
                trial.configuration,
                show_seconds(middle),
                show_seconds(least),
                show_seconds(most)
            ));
        }
        Ok(trials)
    }
}

impl Trial {
    fn leave_out_disturbed(&mut self) {
        let disturbed = |report: &RunReport| disturbance(report) > DISTURBED_RUN;
        self.disturbed = self.reports.iter().filter(|report| disturbed(report)).count() as u32;
        self.quiet = (self.disturbed as usize) < self.reports.len();
        if self.quiet {
            self.reports.retain(|report| !disturbed(report));
        }
    }

    /// Seconds of a step: of the fastest run, of that in the middle, and of the slowest.
    pub fn seconds(&self) -> [f64; 3] {
        let seconds: Vec<f64> = self.reports.iter().map(RunReport::median_seconds).collect();
        let end = |choose: fn(f64, f64) -> f64| seconds.iter().copied().reduce(choose).unwrap_or(f64::NAN);
        [end(f64::min), median(seconds.clone()), end(f64::max)]
    }

    /// What the runs teach about the machine, if any was left alone.
    pub fn rows(&self, measured: &Predictor) -> Option<Vec<Row>> {
        self.quiet.then(|| rows_of_runs(&self.program, &self.reports, Some(measured)))
    }
}
