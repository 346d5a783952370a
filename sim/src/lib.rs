//! `paceline-sim`: what a plan costs, before it runs.
//!
//! - [`units`]: ids and quantities.
//! - [`model`]: the arithmetic of a decoder transformer (parameters, FLOPs, bytes, kernel calls).
//! - [`program`]: the one representation that the simulator predicts and the executor runs.
//! - [`cluster`]: the arithmetic of five-dimensional layouts on real clusters.
//! - [`cost`]: what an op costs, asked by the engine.
//! - [`engine`]: the discrete-event interpreter of a program.
//! - [`memory`]: what every rank holds at every op, exactly.
//! - [`arena`]: where every buffer of a rank lies, in one allocation.
//! - [`trace`]: the timeline and the memory curve, predicted or measured, in one schema.
//! - [`attribution`]: where the error of a predicted step comes from, by replaying it with measured times.

pub mod arena;
pub mod attribution;
pub mod cluster;
pub mod compare;
pub mod cost;
pub mod engine;
pub mod memory;
pub mod model;
pub mod partition;
pub mod program;
pub mod trace;
pub mod units;
