//! One file per subcommand: parse, call, render.

pub mod calibrate;
pub mod cluster;
pub mod compare;
pub mod demo;
pub mod export;
pub mod import;
pub mod plan;
pub mod predict;
pub mod report;
pub mod run;
pub mod schedule;
pub mod states;
pub mod tui;
pub mod validate;
