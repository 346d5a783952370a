//! A job's training settings for the executor, and progress while it trains.

use crate::failure::Failure;
use crate::screen::{Progress, Screen};
use crate::table::show_seconds;
use paceline_exec::{
    DataError, Dataset, Evaluation, ExecError, LearningRate, Observer, OptimizerSettings, RunSettings, StepReport,
};
use paceline_planner::job::{Job, Train};
use std::path::Path;

/// The training data of a job.
pub fn dataset(train: &Train) -> Result<Dataset, Failure> {
    match &train.data {
        None => Ok(Dataset::bundled()),
        Some(path) => Dataset::open(Path::new(path)).map_err(Failure::bad_input),
    }
}

/// What the executor is told: `steps` in all, of which the job's warm-up and cosine are cut to size.
pub fn settings(job: &Job, data: &Dataset, steps: u64) -> Result<RunSettings, Failure> {
    let train = &job.train;
    let sampler = data.sampler(job.seq, job.model.vocab, train.seed).map_err(Failure::bad_input)?;
    let held_out = sampler.held_out_sequences();
    let sequences = ((held_out as f64 * train.validation).ceil() as u64).clamp(1, held_out.max(1));
    Ok(RunSettings {
        seed: train.seed,
        optimizer: OptimizerSettings {
            learning_rate: LearningRate {
                peak: train.lr,
                floor: train.min_lr,
                warmup_steps: train.warmup.min(steps),
                total_steps: steps,
            },
            weight_decay: train.weight_decay as f32,
            clip: train.clip.map(|clip| clip as f32),
            ..OptimizerSettings::default()
        },
        evaluation: Some(Evaluation { every: (steps / 5).max(1), sequences }),
        ..RunSettings::new(steps, train.lr)
    })
}

/// Whose fault a failed run is.
pub fn failure(error: ExecError) -> Failure {
    match error {
        ExecError::Setting { .. }
        | ExecError::NoRoom { .. }
        | ExecError::Data(_)
        | ExecError::Checkpoint(_)
        | ExecError::Program(_) => Failure::bad_input(error),
        other => Failure::internal(other),
    }
}

/// The same for data.
impl From<DataError> for Failure {
    fn from(error: DataError) -> Failure {
        Failure::bad_input(error)
    }
}

/// Follows a run on standard error.
pub struct Follow<'a> {
    screen: &'a Screen,
    progress: Progress,
    every: u64,
    steps: u64,
    held_out: Option<f64>,
}

impl<'a> Follow<'a> {
    /// Follows a run that ends after `steps`.
    pub fn new(screen: &'a Screen, what: &str, steps: u64) -> Follow<'a> {
        Follow { screen, progress: screen.progress(steps, what), every: (steps / 8).max(1), steps, held_out: None }
    }
}

impl Observer for Follow<'_> {
    fn step(&mut self, report: &StepReport) {
        let held_out = self.held_out.map_or(String::new(), |loss| format!(", held out {loss:.3}"));
        let message = format!(
            "loss {:.3}{held_out}, {}, {:.0} tokens/s",
            report.loss,
            show_seconds(report.seconds),
            report.tokens_per_second
        );
        self.progress.at(report.step, &message);
        if report.step.is_multiple_of(self.every) || report.step == 1 || report.step == self.steps {
            self.progress.above(self.screen, &format!("    step {:>4}/{}  {message}", report.step, self.steps));
        }
    }

    fn evaluated(&mut self, _: u64, held_out_loss: f64) {
        self.held_out = Some(held_out_loss);
    }

    fn saved(&mut self, path: &Path) {
        self.progress.above(self.screen, &format!("    checkpoint {}", path.display()));
    }
}
