//! What the terminal UI has done: training on the CPU executor and measuring this machine, without a word on the screen.

use crate::failure::Failure;
use crate::local::{Demand, Local, cores, measure, measure_settings};
use crate::profile_store;
use crate::screen::{ColorChoice, Screen};
use crate::training;
use paceline_exec::measure::{MeasureProgress, usual_shapes};
use paceline_exec::{CheckpointSettings, Observer, StepReport};
use paceline_kernels::CpuDevice;
use paceline_planner::job::Job;
use paceline_sim::program::Program;
use paceline_sim::trace::Trace;
use paceline_tui::activity::activities;
use paceline_tui::calibration::{MeasureNews, Measured};
use paceline_tui::lanes::Lanes;
use paceline_tui::training::{End, Look, RunNews, Step};
use paceline_tui::workshop::{TrainOrder, Workshop};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// Steps are looked at as a whole no more often than eyes can follow.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// The workshop of the command line.
pub struct LocalWorkshop {
    /// Where checkpoints go.
    pub checkpoints: PathBuf,
    /// Where measurements go.
    pub profile: Option<PathBuf>,
}

impl Workshop for LocalWorkshop {
    fn train(
        &self,
        order: TrainOrder<'_>,
        tell: &mut dyn FnMut(RunNews),
        stop: &Arc<AtomicBool>,
    ) -> Result<End, String> {
        let data = training::dataset(&order.job.train).map_err(told)?;
        let mut settings = training::settings(order.job, &data, order.steps).map_err(told)?;
        settings.stop = Some(stop.clone());
        settings.resume = order.resume.then(|| self.checkpoints.clone());
        settings.checkpoint = Some(CheckpointSettings { directory: self.checkpoints.clone(), every: None });
        let mut follow = Follow { tell, program: order.program, looked: None };
        let report = paceline_exec::run(order.program, &CpuDevice::new(), &settings, &data, &mut follow)
            .map_err(|error| error.to_string())?;
        Ok(End { stopped: report.stopped, lanes: Arc::new(Lanes::of_trace(&report.trace)) })
    }

    fn measure(
        &self,
        job: Option<&Job>,
        seconds: f64,
        tell: &mut dyn FnMut(MeasureNews),
        stop: &Arc<AtomicBool>,
    ) -> Result<Measured, String> {
        let path =
            self.profile.clone().ok_or("there is no home directory to keep a profile in; name one with --profile")?;
        let (keys, settings) = match job {
            Some(job) => {
                let demand = Demand::of(job, cores()).map_err(told)?;
                let settings = demand.settings(seconds, None);
                (demand.keys, settings)
            }
            None => (usual_shapes().into_iter().collect(), measure_settings(seconds, None)),
        };
        let mut progress =
            |at: MeasureProgress| tell(MeasureNews { what: at.phase.to_string(), fraction: at.fraction });
        let profile = measure(&CpuDevice::new(), &keys, &settings, &mut progress, stop).map_err(told)?;
        // Nothing may be printed under the views.
        let silent = Screen::new(false, true, ColorChoice::Never);
        let profile = profile_store::update(&silent, &path, profile).map_err(told)?;
        let local = Local::with(CpuDevice::new(), profile, path.display().to_string()).map_err(told)?;
        Ok(Measured { local: local.for_views(), path: path.display().to_string() })
    }
}

fn told(failure: Failure) -> String {
    failure.message().replace('\n', " ")
}

struct Follow<'a> {
    tell: &'a mut dyn FnMut(RunNews),
    program: &'a Program,
    looked: Option<Instant>,
}

impl Observer for Follow<'_> {
    fn step(&mut self, report: &StepReport) {
        (self.tell)(RunNews::Step(Step {
            step: report.step,
            seconds: report.seconds,
            loss: report.loss,
            gradient_norm: report.gradient_norm,
            tokens_per_second: report.tokens_per_second,
        }));
    }

    fn evaluated(&mut self, step: u64, held_out_loss: f64) {
        (self.tell)(RunNews::HeldOut(step, held_out_loss));
    }

    fn saved(&mut self, path: &Path) {
        (self.tell)(RunNews::Saved(path.display().to_string()));
    }

    fn timeline(&mut self, step: u64, trace: &dyn Fn() -> Trace) {
        if self.looked.is_some_and(|looked| looked.elapsed() < LOOK_EVERY) {
            return;
        }
        self.looked = Some(Instant::now());
        let trace = trace();
        let ranks = activities(self.program, &trace);
        (self.tell)(RunNews::Look(Box::new(Look { step, ranks, lanes: Arc::new(Lanes::of_trace(&trace)) })));
    }
}
