//! The building-block algebra of pipeline schedules (Qi et al., "Pipeline Parallelism with Controllable Memory", arXiv
//! 2405.15362): a schedule is one microbatch's block of passes, repeated at an interval, squeezed, and rearranged at
//! its ends.
//!
//! ```
//! use paceline_planner::blocks::{Block, Goal, justify};
//! use paceline_planner::replay::{StageMemory, StageTimes, peaks};
//!
//! let block = Block::v_min(8);
//! assert!(block.collision().is_none());
//! let order = block.repeat(32).squeeze().order;
//! let memory = StageMemory::microbatch_stages(&order.placement, 8, 0.0);
//! let order = justify(&order, &StageTimes::unit(16), &memory, &[4.0; 8], Goal::Span).unwrap();
//! assert_eq!(peaks(&order, &memory).peak_unsplit, [4.0; 8]);
//! ```
//!
//! - [`Block`]: offsets of the passes, lifespan, predicted peak, collisions.
//! - [`Block::repeat`] and [`Slotted::squeeze`]: from a block to an order.
//! - [`justify`]: rearranges the warm-up and the cool-down (every place where a device idles) under a memory limit.
//! - [`extend`]: more microbatches for an order with a periodic steady phase.

mod extend;
mod family;
mod justify;
mod offsets;

pub use extend::extend;
pub use justify::{Enough, Goal, justify, justify_until};
pub use offsets::{Block, BlockError, Collision, Offsets, Slotted, fill_weights};

#[cfg(test)]
mod tests;
