//! A job from the command line: a job file with flags laid over it, or flags alone.

use crate::failure::Failure;
use crate::flags::JobFlags;
use clap::Args;
use paceline_planner::job::{Job, JobError};
use std::path::PathBuf;

/// Where a job comes from.
#[derive(Debug, Clone, Default, Args)]
pub struct JobSource {
    /// Job file in TOML; flags replace its keys.
    #[arg(value_name = "JOB.toml")]
    pub job: Option<PathBuf>,

    #[command(flatten)]
    pub flags: JobFlags,
}

impl JobSource {
    /// Whether nothing was given at all.
    pub fn is_empty(&self) -> Result<bool, Failure> {
        Ok(self.job.is_none() && self.flags()?.is_empty())
    }

    fn flags(&self) -> Result<toml::Table, Failure> {
        self.flags.table().map_err(Failure::internal)
    }

    /// The job.
    pub fn read(&self) -> Result<Job, Failure> {
        let job = match &self.job {
            Some(path) => Job::read_with(path, self.flags()?),
            None => Job::from_table(self.flags()?, "command line"),
        };
        job.map_err(|error| match error {
            JobError::Missing { .. } if self.job.is_none() => Failure::bad_input(error)
                .hint("give a job file, or the keys as flags, for example --model demo-3m --seq 256 --global-batch 8"),
            other => Failure::bad_input(other),
        })
    }
}
