//! How a training runtime carries out the exchanges of a state partition, where runtimes differ in what the partition leaves open.

use serde::{Deserialize, Serialize};

/// Limits of a runtime that gathers the parameters of each module when it runs, and some ahead.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Coordinator {
    /// Parameters above which nothing is gathered ahead.
    pub live: f64,
    /// Parameters within which a module that is used again keeps its own.
    pub reuse: f64,
}

/// Choices of a runtime. Each can be taken back by itself, to see what it costs.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Runtime {
    /// Ranks that hold all parameters send each bucket of gradients to the ranks that own its parts, by one rooted reduction for each
    /// owner, instead of reducing and scattering it at once.
    pub rooted_reductions: bool,
    /// On such ranks the passes wait for every reduction.
    pub waits_for_reductions: bool,
    /// The next step waits until all updated parameters are gathered.
    pub waits_for_updates: bool,
    /// Parameters are gathered by whole matrices as modules need them, under these limits; block by block without.
    pub coordinator: Option<Coordinator>,
    /// Where ranks hold all parameters and groups their own optimizer states, groups sum their gradients in 32 bits.
    pub sums_in_32_bits: bool,
    /// Seconds of the host around a pass of one module (a matrix, a norm, a block, ...) of a model whose parameters are gathered: what
    /// to gather and to release is decided there.
    pub hook: f64,
}

impl Runtime {
    /// Every exchange in one fused collective, beside computation where the layout says so.
    pub const FUSED: Runtime = Runtime {
        rooted_reductions: false,
        waits_for_reductions: false,
        waits_for_updates: false,
        coordinator: None,
        sums_in_32_bits: false,
        hook: 0.0,
    };

    /// DeepSpeed 0.10 at its defaults, and PaRO's partitions, which were made in it.
    ///
    /// - Stages 1 and 2 (`stage_1_and_2.py`: `average_tensor`) issue a `reduce` for every destination rank of a bucket, and their
    ///   `overlap_comm` is off unless asked for (`config.py`), so that the stream of the passes waits.
    /// - All stages gather updated parameters at the end of `step`.
    /// - Stage 3 (`partitioned_param_coordinator.py`: `fetch_sub_module`) gathers the parameters of a module, and ahead of it whole ones
    ///   until `prefetch_bucket_size` is passed, while fewer than `max_live_parameters` are there.
    /// - PaRO's NII (`stage_NII.py`) sums the 32-bit copy of the gradients between nodes inside `step`.
    pub const DEEPSPEED: Runtime = Runtime {
        rooted_reductions: true,
        waits_for_reductions: true,
        waits_for_updates: true,
        coordinator: Some(Coordinator { live: 1e9, reuse: 1e9 }),
        sums_in_32_bits: true,
        hook: 0.0,
    };
}
