//! The 27 state partitions side by side: what each holds, what each moves, how long each step takes by the closed-form guideline
//! and by simulation.

mod fit;
pub mod guideline;
mod here;
mod published;
mod table;

pub use fit::{Fit, Unpublished, fit_published, range_unfitted};
pub use guideline::{Guideline, GuidelineParts};
pub use here::rank_here;
pub use published::{
    Explanation, GainComparison, GatherComparison, compare_gathers, compare_published, explain_published, published_of,
};
pub use table::{GuidelineRank, StateParts, StateRow, StatesError, rank, rank_layout, tabulate};
