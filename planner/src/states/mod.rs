//! The 27 state partitions side by side: what each holds, what each moves, how long each step takes by the closed-form guideline
//! and by simulation.

pub mod guideline;

pub use guideline::{Guideline, GuidelineParts};
