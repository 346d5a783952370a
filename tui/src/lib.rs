//! `paceline-tui`: the terminal UI.
//!
//! Three rooms that know little of each other:
//! - the state, [`app`], which takes [`event`]s and says what it wants done, without a terminal and without a simulator;
//! - drawing, [`draw`], a function of the state;
//! - the world: the [`desk`], where simulation happens off the UI's thread, the [`workshop`], which trains and measures, and the
//!   [`terminal`].
//!
//! [`settings`] are the knobs, [`question`] asks the simulator what the command line asks it, [`figures`] are its answers, [`theme`] the
//! colours, and [`visit`] what is kept from one visit to the next.

pub mod activity;
pub mod app;
pub mod calibration;
pub mod desk;
pub mod draw;
pub mod event;
pub mod figures;
pub mod files;
pub mod lanes;
pub mod plans;
pub mod question;
pub mod recorded;
pub mod report;
pub mod search;
pub mod settings;
pub mod terminal;
pub mod theme;
pub mod timeline;
pub mod training;
pub mod visit;
pub mod workshop;
