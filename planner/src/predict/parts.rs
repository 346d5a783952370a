//! Parts of a predicted iteration on a cluster: of its time, of its memory, and where its figures come from.

use serde::{Deserialize, Serialize};

/// Where an iteration goes, on its critical pipeline rank, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct TimeParts {
    /// Forward and backward passes.
    pub compute: f64,
    /// Tensor-parallel communication that nothing hides.
    pub exposed_tp: f64,
    /// Data-parallel communication that nothing hides.
    pub exposed_dp: f64,
    /// Messages between pipeline ranks that nothing hides.
    pub exposed_pp: f64,
    /// Context-parallel communication that nothing hides.
    pub exposed_cp: f64,
    /// Expert-parallel communication that nothing hides.
    pub exposed_ep: f64,
    /// Waiting for other pipeline ranks, and for the slowest node.
    pub bubble: f64,
    /// Forward passes done again.
    pub recompute: f64,
    /// The optimizer.
    pub optimizer: f64,
}

impl TimeParts {
    /// The parts in the order in which they are shown everywhere: compute, recomputation, communication (tensor, data,
    /// pipeline, context, experts), bubble, optimizer.
    pub fn in_order(&self) -> [f64; 9] {
        [
            self.compute,
            self.recompute,
            self.exposed_tp,
            self.exposed_dp,
            self.exposed_pp,
            self.exposed_cp,
            self.exposed_ep,
            self.bubble,
            self.optimizer,
        ]
    }

    /// Sum of the parts.
    pub fn total(&self) -> f64 {
        self.compute
            + self.exposed_tp
            + self.exposed_dp
            + self.exposed_pp
            + self.exposed_cp
            + self.exposed_ep
            + self.bubble
            + self.recompute
            + self.optimizer
    }
}

/// Where the time of passes goes, by class of operator, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct ComputeParts {
    /// Matrix products.
    pub products: f64,
    /// Fused attention.
    pub attention: f64,
    /// Memory-bound operators: norms, activations, residuals, softmax and loss, summing gradients.
    pub memory_bound: f64,
    /// The GPU waits for the host that launches its kernels.
    pub launches: f64,
}

/// What replicas exchange in an iteration, in seconds of communication alone.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Exchanges {
    /// Gathering parameters before the passes, over all microbatches.
    pub parameter_gather: f64,
    /// Reducing gradients after the passes, over all microbatches.
    pub gradient_reduction: f64,
    /// Gradients once, when all microbatches are accumulated.
    pub gradient_sync: f64,
    /// Parameters once, after the optimizer.
    pub parameter_sync: f64,
}

/// Memory by pipeline rank, in bytes.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct MemoryParts {
    /// What the allocator reserves at its highest, by pipeline rank.
    pub peak_bytes: Vec<f64>,
    /// What is allocated at its highest, by pipeline rank.
    pub allocated_bytes: Vec<f64>,
    /// What the GPU has for the allocator.
    pub limit_bytes: f64,
    /// Whether every rank fits.
    pub fits: bool,
    /// Parts of the peak, by pipeline rank; they sum to `peak_bytes`.
    pub by_class: Vec<MemoryClasses>,
}

/// Parts of a peak in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct MemoryClasses {
    /// Parameters.
    pub parameters: f64,
    /// Gradients.
    pub gradients: f64,
    /// Master weights and moments.
    pub optimizer: f64,
    /// Kept activations of all microbatches in flight.
    pub activations: f64,
    /// Buffers of collectives and messages.
    pub communication: f64,
    /// Gradients of activations, recomputed activations, logits and loss.
    pub workspace: f64,
    /// What the allocator holds on top.
    pub overhead: f64,
}

impl MemoryClasses {
    /// Sum of the parts.
    pub fn total(&self) -> f64 {
        self.parameters
            + self.gradients
            + self.optimizer
            + self.activations
            + self.communication
            + self.workspace
            + self.overhead
    }
}

/// Shares of a time by where they come from.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Origin {
    /// Communication over links whose bandwidth was measured.
    pub measured: f64,
    /// Rates of datasheets through fitted efficiencies.
    pub fitted: f64,
    /// Communication over links whose bandwidth is a datasheet's or assumed.
    pub datasheet: f64,
    /// Matrix products in formats of which no run is known on GPUs of the generation.
    #[serde(default)]
    pub assumed: f64,
}
