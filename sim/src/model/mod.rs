//! The arithmetic of decoder transformers: what a layer holds, computes and keeps.
//!
//! - [`ModelConfig`]: the architecture, from a [preset](ModelConfig::preset) or a Hugging Face `config.json`.
//! - [`parameters`](mod@parameters): counts, names, and the flat layout of a unit's parameters; [`Trainable`]: which of them are
//!   trained.
//! - [`activations`](mod@activations): what F keeps for B and for W, and what B keeps for W.
//! - [`ModelPass`]: one pass over units of a stage as a list of [`Step`]s, each a kernel with its operands. Everything
//!   else is read off that list: kernel calls, FLOPs, bytes moved, the buffers it touches. The executor runs the very same
//!   list, so a prediction cannot differ from what runs.

pub mod activations;
mod block;
mod config;
mod ends;
mod huggingface;
pub mod parameters;
mod passes;
mod places;
mod presets;
mod steps;
mod trainable;
mod validate;
mod work;

pub use activations::{Holder, Piece, Shape};
pub use config::*;
pub use huggingface::ReadError;
pub use parameters::{Initial, ParameterSpec, Shard};
pub use passes::{ModelPass, Operand, neighbour, persistent};
pub use steps::{AttentionDims, Detail, Slice, Step};
pub use trainable::{Trainable, TrainableError, trained_elements};
pub use validate::ModelError;
pub use work::{Flops, model_flops_per_token, trained_flops_per_token};

#[cfg(test)]
mod tests;
