//! `paceline-profiles`: what hardware does, as measured.

mod kernel_key;

pub use kernel_key::*;
