//! `paceline-profiles`: what hardware does, as measured.
//!
//! - [`Profile`]: measurements of one machine and their CSV file.
//! - [`Predictor`]: times of kernels, messages and collectives from a profile, exact where measured, interpolated
//!   elsewhere, each with its [`Provenance`].
//! - [`recalibrate`]: corrects a profile by what a real run showed.

mod curve;
mod estimate;
mod fit;
mod kernel_key;
mod predictor;
mod profile;
mod recalibrate;
mod row;
mod work;

pub use estimate::*;
pub use fit::Line;
pub use kernel_key::*;
pub use predictor::{Class, Predictor, Residual};
pub use profile::*;
pub use recalibrate::*;
pub use row::*;
pub use work::Work;
