//! The arithmetic of decoder transformers: what a layer holds, computes and keeps.

mod config;

pub use config::*;
