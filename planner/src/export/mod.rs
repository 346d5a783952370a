//! A configuration as files that start it elsewhere: Megatron-LM, torchtitan, nanotron, DeepSpeed, PyTorch's pipeline runtime.
//!
//! A launcher gets what was planned, or an error that says what it lacks. Where it decides something by itself, a note says so.

mod deepspeed;
mod launch;
mod megatron;
mod nanotron;
mod torchtitan;

pub use launch::{Forecast, Launch};

use crate::configuration::ConfigurationError;
use crate::interchange::pytorch::{self, CsvError};
use crate::predict::{ClusterRequest, PredictError, RequestError};
use crate::schedules::ScheduleError;
use paceline_sim::cluster::ZooError;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use thiserror::Error;

/// Where a configuration is to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// Megatron-LM: arguments of `pretrain_gpt.py`.
    Megatron,
    /// torchtitan: a module with a configuration function, and the schedule as CSV where it is none of its own.
    Torchtitan,
    /// nanotron: its YAML.
    Nanotron,
    /// DeepSpeed: its JSON, for a training script of the user's.
    Deepspeed,
    /// PyTorch's pipeline runtime: the compute-only CSV.
    PytorchSchedule,
}

impl Target {
    /// All.
    pub const ALL: [Target; 5] =
        [Target::Megatron, Target::Torchtitan, Target::Nanotron, Target::Deepspeed, Target::PytorchSchedule];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Target::Megatron => "megatron",
            Target::Torchtitan => "torchtitan",
            Target::Nanotron => "nanotron",
            Target::Deepspeed => "deepspeed",
            Target::PytorchSchedule => "pytorch-schedule",
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Target {
    type Err = ExportError;

    fn from_str(text: &str) -> Result<Target, ExportError> {
        Target::ALL
            .into_iter()
            .find(|target| target.name() == text)
            .ok_or_else(|| ExportError::Target { name: text.to_owned() })
    }
}

/// A file to be written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct File {
    /// Its name.
    pub name: String,
    /// Its text.
    pub text: String,
    /// It is started, not read.
    pub executable: bool,
}

/// What a target needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Exported {
    /// Files of one directory.
    pub files: Vec<File>,
    /// What the launcher decides otherwise or by itself.
    pub notes: Vec<String>,
}

/// Why a configuration cannot be exported.
#[derive(Debug, Error)]
pub enum ExportError {
    /// Not a target.
    #[error("no exporter is called {name:?}; known: {}", Target::ALL.map(Target::name).join(", "))]
    Target { name: String },
    /// The launcher has no such thing.
    #[error("{target} cannot run {key} = {value}; {allowed}")]
    Unsupported { target: Target, key: &'static str, value: String, allowed: String },
    /// The configuration is none of its job.
    #[error(transparent)]
    Configuration(#[from] ConfigurationError),
    /// The same, on a cluster.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// It cannot be predicted.
    #[error(transparent)]
    Predict(#[from] PredictError),
    /// The model.
    #[error(transparent)]
    Model(#[from] ZooError),
    /// The schedule.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    /// PyTorch cannot express the schedule.
    #[error(transparent)]
    Csv(#[from] CsvError),
    /// A document has no text form; that is a defect.
    #[error("the document could not be written: {0}")]
    Text(String),
}

/// The requests of a search among what a target can run: axes that a request leaves open are offered the values that the target has.
/// What a search of them finds may still be refused by [`export`], which looks at the whole.
pub fn offered(target: Target, requests: &[ClusterRequest]) -> Vec<ClusterRequest> {
    let (states, recompute): (&[&str], &[&str]) = match target {
        Target::Megatron => {
            (&["none", "zero1", "NNI", "zero2", "zero3", "mics", "IIG"], &["none", "selective", "full"])
        }
        Target::Torchtitan => (&["none", "zero2", "zero3", "mics"], &["none", "operators", "full"]),
        Target::Nanotron => (&["none", "zero1"], &["none", "full"]),
        Target::Deepspeed => (&["none", "zero1", "zero2", "zero3"], &["none", "full"]),
        Target::PytorchSchedule => return requests.to_vec(),
    };
    let words = |asked: &Option<String>, offered: &[&str]| match asked {
        Some(word) => vec![Some(word.clone())],
        None => offered.iter().map(|word| Some((*word).to_owned())).collect(),
    };
    let mut list = Vec::new();
    for request in requests {
        let sp = if target == Target::Deepspeed { request.sp.or(Some(false)) } else { request.sp };
        for states in words(&request.states, states) {
            for recompute in words(&request.recompute, recompute) {
                let keep_gathered = request.keep_gathered.or(Some(false));
                list.push(ClusterRequest { states: states.clone(), recompute, sp, keep_gathered, ..request.clone() });
            }
        }
    }
    list
}

/// The files of `target` for a launch.
///
/// # Errors
/// The first thing that the target cannot do, with what it can.
pub fn export(launch: &Launch, target: Target) -> Result<Exported, ExportError> {
    let mut exported = match target {
        Target::Megatron => megatron::files(launch),
        Target::Torchtitan => torchtitan::files(launch),
        Target::Nanotron => nanotron::files(launch),
        Target::Deepspeed => deepspeed::files(launch),
        Target::PytorchSchedule => {
            let text = pytorch::write(&launch.order()?, pytorch::Layout::Dense)?;
            let file = File { name: "schedule.csv".into(), text, executable: false };
            Ok(Exported { files: vec![file], notes: Vec::new() })
        }
    }?;
    if !launch.forecast.fits {
        exported
            .notes
            .insert(0, "this is predicted not to fit the memory; `paceline plan` searches for what does".into());
    }
    Ok(exported)
}

#[cfg(test)]
mod tests;
