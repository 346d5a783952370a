//! `paceline-planner`: plans, pipeline schedules, lowering to a `Program`, and search.
//!
//! - [`order`]: what a schedule states.
//! - [`schedules`]: the named schedules, and the registry that the command line asks.
//! - [`blocks`]: the building-block algebra, for schedules made by repetition and rearrangement.
//! - [`bounds`]: proven lower bounds on the makespan of any order.
//! - [`configuration`]: one point of the space of a job.
//! - [`drawing`]: a replayed schedule as terminal cells and as SVG.
//! - [`export`]: a configuration as files for other launchers.
//! - `generators`: schedules computed for given times and memory limits, behind the registry.
//! - [`interchange`]: schedules as files of other tools.
//! - [`job`]: what to train, on what, and which axes are fixed.
//! - [`layer_partition`]: which layers each stage has.
//! - [`lower`]: from an order to the program that simulator and executor interpret.
//! - [`predict`]: an iteration of a layout on a real cluster, second by second and byte by byte.
//! - [`validate`]: predictions against measured runs, and fits to them.
//! - [`prediction`]: time and memory of a program, by part.
//! - [`search`]: the best configurations of a job.
//! - [`optimise`]: the shortest order that can be found under memory limits, with its gap.
//! - [`plan`]: a configuration as a file, to be run later.
//! - [`replay`]: exact times and memory of an order, and its validation.

pub mod blocks;
pub mod bounds;
pub mod configuration;
pub mod drawing;
pub mod export;
mod generators;
pub mod interchange;
pub mod job;
pub mod layer_partition;
pub mod lower;
pub mod optimise;
pub mod order;
pub mod plan;
pub mod predict;
pub mod prediction;
pub mod replay;
pub mod schedules;
pub mod search;
pub mod states;
pub mod validate;
