//! Measurements of other tools.

pub mod nccl_tests;
pub mod torch_trace;
