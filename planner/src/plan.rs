//! A plan file: a job, one of its configurations and what it will take. The program is lowered from it again, the same
//! each time.

mod cluster;

pub use cluster::{CLUSTER_PLAN_FORMAT, ClusterPlanFile};

use crate::configuration::{Configuration, ConfigurationError, Machine};
use crate::job::{Job, JobError};
use crate::prediction::Prediction;
use paceline_sim::model::ModelConfig;
use paceline_sim::program::Program;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// The format of plan files.
pub const PLAN_FORMAT: &str = "paceline.plan/1";

/// A plan.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// What to train.
    pub job: Job,
    /// How.
    pub configuration: Configuration,
    /// On what it was planned.
    pub machine: Machine,
    /// What it will take.
    pub prediction: Prediction,
}

/// A plan as it lies in a file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    format: String,
    job: toml::Table,
    /// Of the model as it was when the plan was made.
    model_digest: String,
    configuration: Configuration,
    machine: Machine,
    prediction: Prediction,
}

/// Why a plan file cannot be used.
#[derive(Debug, Error)]
pub enum PlanError {
    /// It cannot be read or written.
    #[error("plan {path}: {source}")]
    File { path: PathBuf, source: io::Error },
    /// It ends too early.
    #[error("plan {path} is truncated (it ends at line {line}); make it again with `paceline plan`")]
    Truncated { path: PathBuf, line: usize },
    /// It is no plan.
    #[error("plan {path} is not a plan file: {error}; make one with `paceline plan JOB.toml -o plan.json`")]
    Content { path: PathBuf, error: serde_json::Error },
    /// Another format, or a later version of it.
    #[error("plan {path} has format {found:?}, and this version reads {PLAN_FORMAT}; {}", if *.newer { "update paceline, or make the plan again" } else { "make one with `paceline plan JOB.toml -o plan.json`" })]
    Format { path: PathBuf, found: String, newer: bool },
    /// A plan for a cluster, where one for this machine is needed.
    #[error("plan {path} is for a cluster; start it there with the files of `paceline export {path} --to megatron`")]
    ForCluster { path: PathBuf },
    /// Its job is not one any more.
    #[error("plan {path}: {source}")]
    Job { path: PathBuf, source: Box<JobError> },
    /// The model has changed since.
    #[error(
        "plan {path} was made for another {model}: its digest is {planned}, that of the model as it is now {found}; make the plan again"
    )]
    OtherModel { path: PathBuf, model: String, planned: String, found: String },
    /// Its configuration is none of its job.
    #[error("plan {path}: {source}")]
    Configuration { path: PathBuf, source: Box<ConfigurationError> },
}

/// A text that changes whenever the architecture does (the name aside): FNV-1a, 64 bits, over its parts
/// (<http://www.isthe.com/chongo/tech/comp/fnv/>).
pub fn model_digest(model: &ModelConfig) -> String {
    let parts = format!("{:?}", ModelConfig { name: String::new(), ..model.clone() });
    let hash = parts
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    format!("{hash:016x}")
}

/// Writes a file whole or not at all.
///
/// # Errors
/// When it cannot be written; what was begun is gone then.
pub fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".part");
    let part = path.with_file_name(name);
    let written = fs::File::create(&part).and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()));
    written.and_then(|()| fs::rename(&part, path)).inspect_err(|_| {
        // What was begun is of no use; that it may not exist is no second failure.
        drop(fs::remove_file(&part));
    })
}

impl Plan {
    /// The program of the plan, proved to run.
    ///
    /// # Errors
    /// When the configuration is none of the job.
    pub fn program(&self) -> Result<Program, ConfigurationError> {
        self.configuration.program(&self.job, self.machine)
    }

    /// The document as text.
    ///
    /// # Errors
    /// When a figure has no JSON form; predictions are finite, so that is a defect.
    pub fn to_json(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string_pretty(&Document {
            format: PLAN_FORMAT.into(),
            job: self.job.table().clone(),
            model_digest: model_digest(&self.job.model),
            configuration: self.configuration.clone(),
            machine: self.machine,
            prediction: self.prediction.clone(),
        })
    }

    /// Writes the file whole or not at all.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), PlanError> {
        let failed = |source| PlanError::File { path: path.into(), source };
        let text = self.to_json().map_err(|error| failed(error.into()))?;
        write_whole(path, text.as_bytes()).map_err(failed)
    }

    /// Reads a plan file, and the model that it is for.
    ///
    /// # Errors
    /// See [`PlanError`].
    pub fn read(path: &Path) -> Result<Plan, PlanError> {
        let text = fs::read_to_string(path).map_err(|source| PlanError::File { path: path.into(), source })?;
        Plan::from_json(&text, path)
    }

    /// A plan from the text of a file; `path` names it in errors.
    ///
    /// # Errors
    /// See [`PlanError`].
    pub fn from_json(text: &str, path: &Path) -> Result<Plan, PlanError> {
        let unreadable = |error: serde_json::Error| match error.classify() {
            serde_json::error::Category::Eof => PlanError::Truncated { path: path.into(), line: error.line() },
            _ => PlanError::Content { path: path.into(), error },
        };
        let value: serde_json::Value = serde_json::from_str(text).map_err(unreadable)?;
        let format = value.get("format").and_then(|format| format.as_str()).unwrap_or_default();
        if format == CLUSTER_PLAN_FORMAT {
            return Err(PlanError::ForCluster { path: path.into() });
        }
        if format != PLAN_FORMAT {
            let version = format.strip_prefix("paceline.plan/").and_then(|number| number.parse::<u32>().ok());
            let newer = version.is_some_and(|version| version > 1);
            return Err(PlanError::Format { path: path.into(), found: format.into(), newer });
        }
        let document: Document = serde_json::from_value(value).map_err(unreadable)?;
        let origin = format!("plan {}", path.display());
        let job = Job::from_table(document.job, &origin)
            .map_err(|source| PlanError::Job { path: path.into(), source: Box::new(source) })?;
        let found = model_digest(&job.model);
        if found != document.model_digest {
            return Err(PlanError::OtherModel {
                path: path.into(),
                model: job.model.name,
                planned: document.model_digest,
                found,
            });
        }
        let plan = Plan {
            job,
            configuration: document.configuration,
            machine: document.machine,
            prediction: document.prediction,
        };
        let wrong = |source| PlanError::Configuration { path: path.into(), source: Box::new(source) };
        plan.configuration
            .order(&plan.job)
            .and_then(|order| plan.configuration.cut(&plan.job, order.placement.stages_per_copy()))
            .map_err(wrong)?;
        Ok(plan)
    }
}

#[cfg(test)]
mod tests;
