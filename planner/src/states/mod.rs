//! The 27 state partitions side by side: what each holds, what each moves, how long each step takes by the closed-form guideline
//! and by simulation.

pub mod guideline;
mod published;
mod table;

pub use guideline::{Guideline, GuidelineParts};
pub use published::{GainComparison, GatherComparison, compare_gathers, compare_published, published_of};
pub use table::{GuidelineRank, StateParts, StateRow, StatesError, rank, tabulate};
