//! A job from the command line: a job file with flags laid over it, or flags alone.

use crate::failure::Failure;
use crate::flags::JobFlags;
use clap::Args;
use paceline_planner::job::{Job, JobError, LOCAL};
use paceline_planner::plan::ClusterPlanFile;
use std::path::{Path, PathBuf};

/// Where a job comes from.
#[derive(Debug, Clone, Default, Args)]
pub struct JobSource {
    /// Job file in TOML, or a plan for a cluster; flags replace its keys.
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

    /// All keys, unchecked, and what to call their origin in errors.
    pub fn table(&self) -> Result<(toml::Table, String), Failure> {
        let Some(path) = &self.job else { return Ok((self.flags()?, "command line".into())) };
        let text = std::fs::read_to_string(path).map_err(|error| {
            Failure::bad_input(format!("job {}: {error}", path.display()))
                .hint("give the path of a job file, or its keys as flags (--model, --seq, --global-batch, ...)")
        })?;
        if ClusterPlanFile::is_one(&text) {
            let plan = ClusterPlanFile::from_json(&text, path).map_err(Failure::bad_input)?;
            let mut table = toml::Table::try_from(&plan.configuration).map_err(Failure::internal)?;
            table.extend(self.flags()?);
            return Ok((table, path.display().to_string()));
        }
        let mut table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
            Failure::bad_input(format!("job {}: not a TOML document: {error}", path.display()))
        })?;
        table.extend(self.flags()?);
        Ok((table, path.display().to_string()))
    }

    /// All keys, unchecked, with the files that a job file names beside it at their whole paths; files of flags lie in the
    /// working directory.
    pub fn placed_table(&self) -> Result<toml::Table, Failure> {
        let (mut table, _) = self.table()?;
        let Some(folder) = self.job.as_deref().and_then(Path::parent) else { return Ok(table) };
        let beside = |value: &mut toml::Value| {
            if let toml::Value::String(name) = value
                && let Ok(path) = folder.join(&*name).canonicalize()
                && path.is_file()
            {
                *name = path.display().to_string();
            }
        };
        for (key, flag) in [("model", &self.flags.model), ("cluster", &self.flags.cluster)] {
            if let (Some(value), None) = (table.get_mut(key), flag) {
                beside(value);
            }
        }
        if let Some(data) = table.get_mut("train").and_then(|train| train.get_mut("data")) {
            beside(data);
        }
        Ok(table)
    }

    /// The cluster that the job names; `None` for this machine.
    pub fn cluster(&self) -> Result<Option<String>, Failure> {
        let (table, _) = self.table()?;
        let name = table.get("cluster").and_then(toml::Value::as_str);
        Ok(name.filter(|name| *name != LOCAL).map(str::to_string))
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
