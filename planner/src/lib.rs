//! `paceline-planner`: plans, pipeline schedules, lowering to a `Program`, and search.

pub mod order;
