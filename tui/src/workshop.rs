//! What the terminal UI has done by others, because it knows neither kernels nor threads: training and measuring. The
//! command line brings the workshop along; tests bring one of cardboard.

use crate::calibration::{MeasureNews, Measured};
use crate::training::{End, RunNews};
use paceline_planner::job::Job;
use paceline_sim::program::Program;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// What to train.
#[derive(Debug, Clone, Copy)]
pub struct TrainOrder<'a> {
    /// Model, data and optimizer.
    pub job: &'a Job,
    /// The lowered configuration.
    pub program: &'a Program,
    /// Train until this many steps are done.
    pub steps: u64,
    /// Go on from the latest checkpoint.
    pub resume: bool,
}

/// Does the work. Every method returns when its work is done, stopped or failed, and is called on a thread of its own.
pub trait Workshop: Send + Sync {
    /// Trains; raising `stop` ends it after the present step, with a checkpoint.
    ///
    /// # Errors
    /// Why it ended before its time.
    fn train(
        &self,
        order: TrainOrder<'_>,
        tell: &mut dyn FnMut(RunNews),
        stop: &Arc<AtomicBool>,
    ) -> Result<End, String>;

    /// Measures this machine for `seconds`, at the kernels of a job where there is one, and keeps the profile.
    ///
    /// # Errors
    /// Why nothing was measured; nothing is kept then.
    fn measure(
        &self,
        job: Option<&Job>,
        seconds: f64,
        tell: &mut dyn FnMut(MeasureNews),
        stop: &Arc<AtomicBool>,
    ) -> Result<Measured, String>;
}
