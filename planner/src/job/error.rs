//! Why a job cannot be: each error names the key, the value, what is allowed and a way out.

use paceline_sim::model::{ModelError, ReadError};
use std::path::PathBuf;
use thiserror::Error;

/// Why a job is refused.
#[derive(Debug, Error)]
pub enum JobError {
    /// No such file, or not a readable one.
    #[error("job {path}: {source}; give the path of a job file, or the keys as flags")]
    Unreadable { path: PathBuf, source: std::io::Error },
    /// Not TOML.
    #[error("job {origin}: not a TOML document: {error}")]
    Syntax { origin: String, error: Box<toml::de::Error> },
    /// A key that does not exist.
    #[error("{origin}: unknown key {key}{}; known keys: {known}", nearest.as_ref().map_or(String::new(), |n| format!(" (did you mean {n}?)")))]
    UnknownKey { origin: String, key: String, nearest: Option<String>, known: String },
    /// A key that must be there.
    #[error("{origin}: {key} is missing; it needs {allowed}")]
    Missing { origin: String, key: String, allowed: String },
    /// A wrong type, or a value out of range.
    #[error("{origin}: {key} = {value}; allowed: {allowed}")]
    Value { origin: String, key: String, value: String, allowed: String },
    /// A value that exists, but not here.
    #[error(
        "{origin}: {key} = {value} cannot run on cluster = \"local\" yet; allowed there: {allowed}; leave the key out or name another cluster"
    )]
    Unsupported { origin: String, key: String, value: String, allowed: String },
    /// The model cannot be read.
    #[error(transparent)]
    Model(#[from] ReadError),
    /// The model cannot be.
    #[error(transparent)]
    Shape(ModelError),
}
