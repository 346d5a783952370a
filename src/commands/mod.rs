//! One file per subcommand: parse, call, render.

pub mod calibrate;
pub mod compare;
pub mod demo;
pub mod plan;
pub mod predict;
pub mod run;
pub mod schedule;
