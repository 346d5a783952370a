//! `paceline-exec`: runs a [`Program`](paceline_sim::program::Program) with real kernels and real messages.

mod data;
mod error;
mod learning_rate;
mod slot;

pub use data::{Dataset, Sampler};
pub use error::{CheckpointError, DataError, ExecError};
pub use learning_rate::LearningRate;
