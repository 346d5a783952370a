//! The architecture of a decoder transformer, as read from a Hugging Face `config.json` or a preset.

use serde::{Deserialize, Serialize};

/// A dense decoder transformer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// For people: a preset's name or the file it was read from.
    pub name: String,
    /// Blocks.
    pub layers: u32,
    /// Width of the residual stream.
    pub hidden: u32,
    /// Query heads.
    pub heads: u32,
    /// Key and value heads; divides `heads`.
    pub kv_heads: u32,
    /// Width of one head.
    pub head_dim: u32,
    /// Width of the MLP.
    pub intermediate: u32,
    /// Tokens in the vocabulary.
    pub vocab: u32,
    /// Longest sequence (rows of the learned position table, if any).
    pub max_positions: u32,
    /// Normalisation.
    pub norm: Norm,
    /// Epsilon of the normalisation.
    pub norm_epsilon: f64,
    /// MLP activation.
    pub activation: Activation,
    /// How positions enter.
    pub positions: Positions,
    /// Biases on the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias on the attention output projection.
    pub attention_output_bias: bool,
    /// Biases on the MLP matrices.
    pub mlp_bias: bool,
    /// The output projection is the embedding matrix.
    pub tied_embeddings: bool,
}

/// Kinds of normalisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Norm {
    /// Scale only.
    RmsNorm,
    /// Scale and shift.
    LayerNorm,
}

/// Kinds of MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activation {
    /// `down(silu(gate x) * up x)`.
    SwiGlu,
    /// `down(gelu(up x))`, tanh approximation as in GPT-2.
    Gelu,
}

/// How positions enter.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Positions {
    /// Rotary embedding of queries and keys with this base.
    Rotary {
        /// Base of the frequencies.
        theta: f64,
    },
    /// A learned table added to the token embedding.
    Learned,
}

/// A layer of the model, as stages hold them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layer {
    /// Token (and learned position) embedding.
    Embedding,
    /// Transformer block `n`.
    Block(u32),
    /// Final norm, output projection and loss.
    Head,
}
