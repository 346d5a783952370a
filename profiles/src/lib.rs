//! `paceline-profiles`: what hardware does, as measured.
//!
//! - [`Profile`]: measurements of one machine and their CSV file.
//! - [`Predictor`]: times of kernels, messages and collectives from a profile, exact where measured, interpolated
//!   elsewhere, each with its [`Provenance`].
//! - [`Gpu`] and [`Cluster`]: devices and networks that are planned for, as stated and measured elsewhere.
//! - [`import`]: measurements of other tools.
//! - [`recalibrate`]: corrects a profile by what a real run showed.

mod class;
mod cluster;
mod context;
mod curve;
mod estimate;
mod fit;
mod gpu;
pub mod import;
mod kernel_key;
mod predictor;
mod profile;
mod recalibrate;
mod row;
mod work;

pub use class::Class;
pub use cluster::{Change, Cluster, ClusterError, Fabric, MeasuredError, cluster_names, find_cluster};
pub use context::*;
pub use estimate::*;
pub use fit::Line;
pub use gpu::{Generation, Gpu, GpuError, find_gpu, gpus, parse as parse_gpus};
pub use kernel_key::*;
pub use predictor::{Foretold, Predictor, Residual};
pub use profile::*;
pub use recalibrate::*;
pub use row::*;
pub use work::Work;
