//! Transformers on real clusters: what every rank of a five-dimensional layout (TP and SP, CP, PP, DP with sharded states,
//! EP) computes, sends and holds. The arithmetic only; devices and links come from `paceline_profiles`, the schedule and
//! the sum over an iteration from the planner.
//!
//! - [`Architecture`]: models by shape, mixtures of experts and latent attention included, and their parameters.
//! - [`Layout`]: how a model is cut, and the numerics and kernels that it runs with.
//! - [`Numerics`]: number formats of products and states.
//! - [`Adapters`]: what low-rank adapters beside frozen matrices are; their products are in [`work`].
//! - [`activations`]: bytes kept per layer for the backward pass, tensor by tensor.
//! - [`memory`]: parameters, gradients and optimizer states of one rank.
//! - [`work`]: matrix products, attention, traffic and kernel launches of a layer.
//! - [`network`]: times of collectives over two levels of a network.
//! - [`device`]: time of that work on a GPU.
//! - [`Runtime`]: how exchanges of states are carried out, where runtimes differ.
//! - [`Physics`]: the few fitted parameters, each with its meaning.

pub mod activations;
mod adapters;
mod architecture;
mod details;
pub mod device;
mod layout;
pub mod memory;
pub mod network;
mod numerics;
mod physics;
mod runtime;
pub mod work;
mod zoo;

pub use adapters::{AdapterError, Adapters, Beside};
pub use architecture::{Architecture, Attention, Experts, PositionTable};
pub use details::Details;
pub use layout::{
    AttentionKernel, ContextExchange, Launches, Layout, LayoutError, LossKernel, MessageBuffers, Overlap, Partition,
    Recompute, Routing, VocabularyPasses,
};
pub use numerics::{Compute, Numerics};
pub use physics::{PARAMETERS, Parameter, Physics, PhysicsError};
pub use runtime::{Coordinator, Runtime};
pub use zoo::ZooError;
