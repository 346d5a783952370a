//! Measurements of other tools.

pub mod nccl_tests;
