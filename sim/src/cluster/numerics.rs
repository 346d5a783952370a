//! Number formats of products and states, and the recipes that the field trains with.

use serde::{Deserialize, Serialize};

/// Number formats by class, in bytes per parameter.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Numerics {
    /// Format of the matrix products.
    pub compute: Compute,
    /// Bytes of a parameter as the forward pass reads it.
    pub parameter: f64,
    /// Bytes of a gradient as the backward pass writes it, where that is kept beside `accumulated`.
    pub gradient: f64,
    /// Bytes of an accumulated gradient in a second buffer; 0 where gradients accumulate in place.
    pub accumulated: f64,
    /// Bytes of the master weight.
    pub master: f64,
    /// Bytes of both moments.
    pub moments: f64,
    /// Bytes of an activation.
    pub activation: f64,
    /// Bytes of a gradient on the wire between replicas.
    pub reduced: f64,
}

/// Formats of matrix products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compute {
    /// 32-bit (TF32 on tensor cores).
    Fp32,
    /// 16-bit, either format.
    Bf16,
    /// 8-bit, scaled per tensor or per block.
    Fp8,
    /// 4-bit, scaled per block.
    Fp4,
}

impl Numerics {
    /// 32-bit everywhere.
    pub const FP32: Numerics = Numerics {
        compute: Compute::Fp32,
        parameter: 4.0,
        gradient: 4.0,
        accumulated: 0.0,
        master: 0.0,
        moments: 8.0,
        activation: 4.0,
        reduced: 4.0,
    };

    /// 16-bit parameters and gradients, 32-bit master weights and moments: 16 bytes per parameter.
    pub const MIXED: Numerics = Numerics {
        compute: Compute::Bf16,
        parameter: 2.0,
        gradient: 2.0,
        accumulated: 0.0,
        master: 4.0,
        moments: 8.0,
        activation: 2.0,
        reduced: 2.0,
    };

    /// As [`Numerics::MIXED`] with gradients written and summed in 32 bits (Megatron-LM): 18 bytes.
    pub const MIXED_FP32_GRADIENTS: Numerics = Numerics { gradient: 4.0, reduced: 4.0, ..Numerics::MIXED };

    /// As [`Numerics::MIXED`] with a second, 32-bit gradient that sums microbatches (nanotron): 20 bytes.
    pub const MIXED_FP32_ACCUMULATION: Numerics = Numerics { accumulated: 4.0, reduced: 4.0, ..Numerics::MIXED };

    /// 32-bit parameters, cast to 16 bits when they are gathered (PyTorch FSDP with mixed precision): 16 bytes.
    pub const GATHERED_16_BIT: Numerics =
        Numerics { parameter: 4.0, gradient: 4.0, master: 0.0, reduced: 2.0, ..Numerics::MIXED };

    /// 8-bit products with parameters and gradients in 32 bits (Transformer Engine): 16 bytes. This and the next three are the rows of
    /// the Ultra-Scale Playbook's table of FP8 recipes.
    pub const FP8_TRANSFORMER_ENGINE: Numerics = Numerics {
        compute: Compute::Fp8,
        parameter: 4.0,
        gradient: 4.0,
        accumulated: 0.0,
        master: 0.0,
        moments: 8.0,
        activation: 2.0,
        reduced: 4.0,
    };

    /// FP8-LM at level O3 (arXiv 2310.18313): 8-bit parameters, gradients and first moments, 16-bit master weights, sums of gradients
    /// and second moments: 9 bytes.
    pub const FP8_LM: Numerics = Numerics {
        compute: Compute::Fp8,
        parameter: 1.0,
        gradient: 1.0,
        accumulated: 2.0,
        master: 2.0,
        moments: 3.0,
        activation: 2.0,
        reduced: 1.0,
    };

    /// DeepSeek-V3 (arXiv 2412.19437, section 3.3): 8-bit parameters, 16-bit gradients and moments, 32-bit master weights and sums
    /// of gradients: 15 bytes.
    pub const FP8_DEEPSEEK: Numerics = Numerics {
        compute: Compute::Fp8,
        parameter: 1.0,
        gradient: 2.0,
        accumulated: 4.0,
        master: 4.0,
        moments: 4.0,
        activation: 2.0,
        reduced: 4.0,
    };

    /// nanotron's FP8: 8-bit parameters, gradients and moments, 16-bit master weights, sums of gradients in 32 bits: 10 bytes.
    pub const FP8_NANOTRON: Numerics = Numerics {
        compute: Compute::Fp8,
        parameter: 1.0,
        gradient: 1.0,
        accumulated: 4.0,
        master: 2.0,
        moments: 2.0,
        activation: 2.0,
        reduced: 4.0,
    };

    /// Bytes of all states of one parameter, unsharded.
    pub fn bytes_per_parameter(&self) -> f64 {
        self.parameter + self.gradient + self.accumulated + self.master + self.moments
    }
}
