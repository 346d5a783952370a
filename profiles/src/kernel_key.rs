//! The names under which kernel times are stored: an operator and the dimensions that its time depends on.

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

/// Operators with a time of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KernelOp {
    /// `m, n, k`, neither operand transposed (B of a projection).
    MatmulNn,
    /// `m, n, k`, second operand transposed (F of a projection).
    MatmulNt,
    /// `m, n, k`, first operand transposed (W of a projection, accumulating).
    MatmulTn,
    /// `rows, cols`.
    AddBias,
    /// `rows, cols`.
    BiasGradient,
    /// `rows, cols`.
    RmsNorm,
    /// `rows, cols`.
    RmsNormBackwardInput,
    /// `rows, cols`.
    RmsNormBackwardWeight,
    /// `rows, cols`.
    LayerNorm,
    /// `rows, cols`.
    LayerNormBackwardInput,
    /// `rows, cols`.
    LayerNormBackwardWeight,
    /// `rows, rotated columns`.
    Rotary,
    /// `batch, seq, heads, kv_heads, head_dim`.
    Attention,
    /// `batch, seq, heads, kv_heads, head_dim`.
    AttentionBackward,
    /// `rows, cols` of the output.
    SwiGlu,
    /// `rows, cols` of the output.
    SwiGluBackward,
    /// `elements`.
    Gelu,
    /// `elements`.
    GeluBackward,
    /// `rows, cols`.
    Embedding,
    /// `rows, cols`.
    EmbeddingBackward,
    /// `rows, cols, vocab, chunk`.
    HeadLoss,
    /// `rows, cols, vocab, chunk`: input gradient only.
    HeadBackwardInput,
    /// `rows, cols, vocab, chunk`: weight gradient only.
    HeadBackwardWeight,
    /// `rows, cols, vocab, chunk`: both.
    HeadBackward,
    /// `elements`.
    Add,
    /// `elements`.
    Sum,
    /// `elements`.
    Copy,
    /// `elements`.
    Zero,
    /// `elements`.
    SumSquares,
    /// `elements`.
    AdamW,
}

/// An operator at a shape.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct KernelKey {
    /// The operator.
    pub op: KernelOp,
    /// Its dimensions, in the order that [`KernelOp`] documents.
    pub dims: SmallVec<[u32; 5]>,
}
