//! Number formats: which tensor of a training step holds elements of which type.

use super::Tensor;
use paceline_profiles::DType;
use serde::{Deserialize, Serialize};
use std::fmt;

/// A type of elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Element {
    /// 32-bit floating point.
    #[default]
    F32,
    /// bfloat16.
    Bf16,
    /// 64-bit floating point.
    F64,
    /// Indices.
    U32,
}

impl Element {
    /// Bytes of one.
    pub fn bytes(self) -> u64 {
        match self {
            Element::Bf16 => 2,
            Element::F32 | Element::U32 => 4,
            Element::F64 => 8,
        }
    }

    /// Whether it is the usual one, which files leave out.
    pub(super) fn is_usual(&self) -> bool {
        *self == Element::F32
    }
}

/// A recipe of number formats. Master weights, moments, statistics of norms and attention, logits, and losses are 32-bit in each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// 32-bit everywhere: 16 bytes of parameter, gradient and moments per parameter.
    #[default]
    Fp32,
    /// bfloat16 parameters, activations and gradients, 32-bit master weights: 16 bytes per parameter.
    Bf16,
    /// As `bf16`, with gradients written and summed in 32 bits: 18 bytes per parameter.
    Bf16Fp32Gradients,
}

impl Precision {
    /// Every recipe.
    pub const ALL: [Precision; 3] = [Precision::Fp32, Precision::Bf16, Precision::Bf16Fp32Gradients];

    /// Its name in jobs, the same as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Precision::Fp32 => "fp32",
            Precision::Bf16 => "bf16",
            Precision::Bf16Fp32Gradients => "bf16-fp32-gradients",
        }
    }

    /// Parameters as passes read them, and activations.
    pub fn values(self) -> Element {
        if self == Precision::Fp32 { Element::F32 } else { Element::Bf16 }
    }

    /// Gradients of parameters.
    pub fn gradients(self) -> Element {
        if self == Precision::Bf16 { Element::Bf16 } else { Element::F32 }
    }

    /// Whether the optimizer updates 32-bit weights beside those that passes read.
    pub fn has_master(self) -> bool {
        self.values() != Element::F32
    }

    /// The elements of a tensor. Buffers of several pieces (saved activations, workspace) hold values and statistics side by
    /// side: [`crate::model::Slice`] says what each piece has, and the whole is counted in 32-bit words.
    pub fn element(self, tensor: Tensor) -> Element {
        match tensor {
            Tensor::Parameters { .. }
            | Tensor::ParameterShard { .. }
            | Tensor::Frozen { .. }
            | Tensor::FrozenShard { .. }
            | Tensor::StageInput { .. }
            | Tensor::StageOutput { .. }
            | Tensor::OutputGradient { .. }
            | Tensor::InputGradient { .. } => self.values(),
            Tensor::Gradients { .. } | Tensor::GradientShard { .. } | Tensor::SyncedGradients { .. } => {
                self.gradients()
            }
            Tensor::Tokens { .. } | Tensor::Targets { .. } => Element::U32,
            Tensor::GradientNorm => Element::F64,
            Tensor::Master { .. }
            | Tensor::Kept { .. }
            | Tensor::Moments { .. }
            | Tensor::Losses
            | Tensor::Checkpoint { .. }
            | Tensor::SavedForB { .. }
            | Tensor::SavedForW { .. }
            | Tensor::DeltaForW { .. }
            | Tensor::Workspace { .. } => Element::F32,
        }
    }

    /// The format of kernels on values.
    pub fn of_values(self) -> DType {
        if self == Precision::Fp32 { DType::F32 } else { DType::Bf16 }
    }

    /// The format of kernels that read values and add to gradients of parameters.
    pub fn of_gradients(self) -> DType {
        match self {
            Precision::Fp32 => DType::F32,
            Precision::Bf16 => DType::Bf16,
            Precision::Bf16Fp32Gradients => DType::Bf16F32,
        }
    }

    /// The format of kernels on gradients of parameters alone: their norm, zeroing, the optimizer.
    pub fn of_gradients_alone(self) -> DType {
        if self.gradients() == Element::F32 { DType::F32 } else { DType::Bf16 }
    }

    /// Bytes of parameter, gradient, master weight and moments of one parameter that one rank holds alone.
    pub fn bytes_per_parameter(self) -> u64 {
        let master = if self.has_master() { Element::F32.bytes() } else { 0 };
        self.values().bytes() + self.gradients().bytes() + master + 2 * Element::F32.bytes()
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::Numerics;

    #[test]
    fn recipes_have_the_names_and_bytes_of_the_cluster_side() {
        let same = [Numerics::FP32, Numerics::MIXED, Numerics::MIXED_FP32_GRADIENTS];
        for (precision, numerics) in Precision::ALL.into_iter().zip(same) {
            assert_eq!(precision.bytes_per_parameter() as f64, numerics.bytes_per_parameter(), "{precision}");
            assert_eq!(precision.gradients().bytes() as f64, numerics.gradient, "{precision}");
            assert_eq!(precision.values().bytes() as f64, numerics.activation, "{precision}");
            assert_eq!(serde_json::to_value(precision).unwrap(), precision.name());
        }
    }
}
