//! A plan file for a cluster: a configuration by the words of the command line, and what it will take.

use super::{PlanError, write_whole};
use crate::predict::{ClusterPrediction, ClusterRequest};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The format of plan files for clusters.
pub const CLUSTER_PLAN_FORMAT: &str = "paceline.cluster-plan/1";

/// A plan for a cluster.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterPlanFile {
    format: String,
    /// What to run, every axis named.
    pub configuration: ClusterRequest,
    /// What it will take.
    pub prediction: ClusterPrediction,
}

impl ClusterPlanFile {
    /// Of a configuration and its prediction.
    pub fn new(configuration: ClusterRequest, prediction: ClusterPrediction) -> ClusterPlanFile {
        ClusterPlanFile { format: CLUSTER_PLAN_FORMAT.into(), configuration, prediction }
    }

    /// Writes the file whole or not at all.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), PlanError> {
        let failed = |source| PlanError::File { path: path.into(), source };
        let text = serde_json::to_string_pretty(self).map_err(|error| failed(error.into()))?;
        write_whole(path, text.as_bytes()).map_err(failed)
    }

    /// Whether the text of a file says that it is one.
    pub fn is_one(text: &str) -> bool {
        serde_json::from_str::<serde_json::Value>(text)
            .is_ok_and(|value| value.get("format").and_then(|format| format.as_str()) == Some(CLUSTER_PLAN_FORMAT))
    }

    /// A plan from the text of a file; `path` names it in errors.
    ///
    /// # Errors
    /// When it is none.
    pub fn from_json(text: &str, path: &Path) -> Result<ClusterPlanFile, PlanError> {
        serde_json::from_str(text).map_err(|error| PlanError::Content { path: path.into(), error })
    }
}
