//! Files of other tools: schedules in and out.

pub mod pytorch;
