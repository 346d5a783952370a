//! What a run tells: step by step while it goes, and as a whole.

use crate::exchange_times::ExchangeTimes;
use crate::kernel_times::KernelTimes;
use crate::memory::MemoryReport;
use paceline_sim::trace::Trace;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// One step.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// Steps done, this one included.
    pub step: u64,
    /// From the begin of the step to the end of the last rank; where several steps run without a barrier, their mean.
    pub seconds: f64,
    /// Mean over the tokens of the global batch, before the update.
    pub loss: f64,
    /// Global norm of the gradients, before clipping.
    pub gradient_norm: f64,
    /// Of this step.
    pub learning_rate: f64,
    /// Tokens of the global batch over `seconds`.
    pub tokens_per_second: f64,
}

/// Follows a run.
pub trait Observer {
    /// A step is done.
    fn step(&mut self, report: &StepReport);

    /// The loss on held-out data was measured after `step` steps.
    fn evaluated(&mut self, step: u64, held_out_loss: f64);

    /// A checkpoint is complete.
    fn saved(&mut self, path: &std::path::Path);

    /// The step (or the steps without a barrier) that ended with this one can be looked at as a whole; `trace` makes its
    /// timeline for whoever looks.
    fn timeline(&mut self, _step: u64, _trace: &dyn Fn() -> Trace) {}
}

/// Follows a run without looking.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Observer for Silent {
    fn step(&mut self, _: &StepReport) {}
    fn evaluated(&mut self, _: u64, _: f64) {}
    fn saved(&mut self, _: &std::path::Path) {}
}

/// A finished (or stopped) run.
#[derive(Debug, Clone)]
pub struct RunReport {
    /// Every step of this run.
    pub steps: Vec<StepReport>,
    /// (steps done, loss on held-out data).
    pub held_out: Vec<(u64, f64)>,
    /// Tokens of a global batch.
    pub tokens_per_step: u64,
    /// The step with the median time (the first is left out where there are more); where several steps run without a barrier,
    /// all of them.
    pub trace: Trace,
    /// Its number, or that of the first.
    pub trace_step: u64,
    /// Measured memory by rank.
    pub memory: Vec<MemoryReport>,
    /// Kernel times over all ranks (those of the first step are left out where there are more).
    pub kernels: Vec<KernelTimes>,
    /// Times of communication between the ranks of this process, over the same steps.
    pub exchanges: Vec<ExchangeTimes>,
    /// Share of the compute ops' time, and of the time between them that no wait explains, that was spent outside
    /// kernels, over the same steps.
    pub outside_kernels: f64,
    /// By step (or run of several steps without a barrier) whose kernels are counted: the time of compute ops and the time between
    /// them that no wait explains, summed over all ranks.
    pub busy_seconds: Vec<f64>,
    /// Ended by the stop flag.
    pub stopped: bool,
    /// The last checkpoint written.
    pub checkpoint: Option<PathBuf>,
    /// Gradients of the last step by parameter, if asked for.
    pub gradients: BTreeMap<String, Vec<f32>>,
    /// Parameters after the last step, if gradients were asked for.
    pub parameters: BTreeMap<String, Vec<f32>>,
}

impl RunReport {
    /// Median seconds of a step (the first is left out where there are more).
    pub fn median_seconds(&self) -> f64 {
        let mut seconds: Vec<f64> =
            self.steps.iter().skip(usize::from(self.steps.len() > 1)).map(|s| s.seconds).collect();
        seconds.sort_by(f64::total_cmp);
        seconds.get(seconds.len() / 2).copied().unwrap_or(f64::NAN)
    }
}
