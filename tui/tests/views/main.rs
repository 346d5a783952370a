//! Views as they look, at the sizes of small, usual and large terminals, and what keys make of the state. Figures are made
//! up here, so that pictures change only when drawing does.

mod calibration;
mod plans;
mod predict;
mod report;
mod stage;
mod timeline;
mod training;
