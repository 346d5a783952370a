//! Models by shape, and their parameter counts: dense and mixture-of-experts blocks, grouped and latent attention.

use crate::model::{Activation, ModelConfig, Norm, Positions};
use serde::{Deserialize, Serialize};

/// A decoder transformer as far as its size and its arithmetic go.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Architecture {
    /// For people.
    pub name: String,
    /// Blocks.
    pub layers: u64,
    /// Width of the residual stream.
    pub hidden: u64,
    /// Attention of every block.
    pub attention: Attention,
    /// Width of a dense MLP.
    pub ffn: u64,
    /// Gate and up matrices (SwiGLU) instead of one (GELU).
    pub gated: bool,
    /// Routed experts; `None` for a dense model.
    pub experts: Option<Experts>,
    /// Tokens in the vocabulary, padding included.
    pub vocab: u64,
    /// The output projection is the embedding matrix.
    pub tied: bool,
    /// Biases on every matrix, and norms with a shift (GPT); otherwise scale-only norms without biases (Llama).
    pub biases: bool,
    /// How positions enter.
    pub positions: PositionTable,
    /// Dropout after attention and MLP: its masks are kept for the backward pass.
    pub dropout: bool,
}

/// Kinds of attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Attention {
    /// Query heads that share key and value heads.
    Grouped {
        /// Query heads.
        heads: u64,
        /// Key and value heads.
        kv_heads: u64,
        /// Width of one head.
        head_dim: u64,
    },
    /// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).
    Latent {
        /// Heads.
        heads: u64,
        /// Rank of the query compression; 0 without one.
        query_rank: u64,
        /// Rank of the key and value compression.
        kv_rank: u64,
        /// Width of the part of a head without rotary embedding.
        nope_dim: u64,
        /// Width of the part with rotary embedding; keys share one.
        rope_dim: u64,
        /// Width of a value head.
        value_dim: u64,
    },
}

/// Routed experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Experts {
    /// Experts of a layer.
    pub count: u64,
    /// Experts that a token visits.
    pub top_k: u64,
    /// Width of one expert.
    pub ffn: u64,
    /// Width of the shared expert; 0 without one.
    pub shared_ffn: u64,
    /// First layers with a dense MLP.
    pub dense_layers: u64,
}

/// How positions enter, as far as size goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PositionTable {
    /// Rotary, linear biases or none: no parameters.
    None,
    /// A learned table with this many rows.
    Learned(u64),
}

impl Attention {
    /// Query heads.
    pub fn heads(&self) -> u64 {
        match *self {
            Attention::Grouped { heads, .. } | Attention::Latent { heads, .. } => heads,
        }
    }

    /// Widths of all query, key and value heads together, as the attention kernel sees them.
    pub fn widths(&self) -> (u64, u64, u64) {
        match *self {
            Attention::Grouped { heads, kv_heads, head_dim } => {
                (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
            }
            Attention::Latent { heads, nope_dim, rope_dim, value_dim, .. } => {
                (heads * (nope_dim + rope_dim), heads * (nope_dim + rope_dim), heads * value_dim)
            }
        }
    }

    /// Width of all value heads of the queries: the input of the output projection.
    pub fn output_width(&self) -> u64 {
        match *self {
            Attention::Grouped { heads, head_dim, .. } => heads * head_dim,
            Attention::Latent { heads, value_dim, .. } => heads * value_dim,
        }
    }

    /// Matrices of the block as `(input width, output width, cut by tensor parallelism)`.
    pub fn matrices(&self, hidden: u64) -> Vec<(u64, u64, bool)> {
        match *self {
            Attention::Grouped { .. } => {
                let (q, k, v) = self.widths();
                vec![(hidden, q + k + v, true), (q, hidden, true)]
            }
            Attention::Latent { heads, query_rank, kv_rank, nope_dim, rope_dim, value_dim } => {
                let query = heads * (nope_dim + rope_dim);
                let mut list = if query_rank > 0 {
                    vec![(hidden, query_rank, false), (query_rank, query, true)]
                } else {
                    vec![(hidden, query, true)]
                };
                list.push((hidden, kv_rank + rope_dim, false));
                list.push((kv_rank, heads * (nope_dim + value_dim), true));
                list.push((heads * value_dim, hidden, true));
                list
            }
        }
    }

    /// Norm parameters inside attention (of the compressed queries, keys and values).
    fn norms(&self) -> u64 {
        match *self {
            Attention::Grouped { .. } => 0,
            Attention::Latent { query_rank, kv_rank, .. } => query_rank + kv_rank,
        }
    }
}

impl Architecture {
    /// Matrices of an MLP of one width, gate and up counted as one of double output width.
    pub fn mlp_matrices(&self, ffn: u64) -> [(u64, u64); 2] {
        [(self.hidden, if self.gated { 2 * ffn } else { ffn }), (ffn, self.hidden)]
    }

    /// Whether a block's MLP is made of experts.
    pub fn routed(&self, layer: u64) -> bool {
        self.experts.is_some_and(|experts| layer >= experts.dense_layers)
    }

    fn mlp_parameters(&self, ffn: u64) -> u64 {
        let [up, down] = self.mlp_matrices(ffn);
        let biases = if self.biases { up.1 + down.1 } else { 0 };
        up.0 * up.1 + down.0 * down.1 + biases
    }

    fn norm_parameters(&self) -> u64 {
        if self.biases { 2 * self.hidden } else { self.hidden }
    }

    /// Parameters of one block that every rank of an expert group holds: all but the routed experts.
    pub fn block_parameters(&self, layer: u64) -> u64 {
        let matrices = self.attention.matrices(self.hidden);
        let biases: u64 = if self.biases { matrices.iter().map(|m| m.1).sum() } else { 0 };
        let attention = matrices.iter().map(|m| m.0 * m.1).sum::<u64>() + biases + self.attention.norms();
        let mlp = match self.experts {
            Some(experts) if self.routed(layer) => {
                let shared = if experts.shared_ffn > 0 { self.mlp_parameters(experts.shared_ffn) } else { 0 };
                self.hidden * experts.count + shared
            }
            _ => self.mlp_parameters(self.ffn),
        };
        attention + mlp + 2 * self.norm_parameters()
    }

    /// Parameters of the routed experts of one block.
    pub fn expert_parameters(&self, layer: u64) -> u64 {
        match self.experts {
            Some(experts) if self.routed(layer) => experts.count * self.mlp_parameters(experts.ffn),
            _ => 0,
        }
    }

    /// Parameters of token and position embedding.
    pub fn embedding_parameters(&self) -> u64 {
        let positions = match self.positions {
            PositionTable::None => 0,
            PositionTable::Learned(rows) => rows,
        };
        (self.vocab + positions) * self.hidden
    }

    /// Parameters of the last norm and of an own output projection.
    pub fn head_parameters(&self) -> u64 {
        self.norm_parameters() + if self.tied { 0 } else { self.vocab * self.hidden }
    }

    /// All parameters.
    pub fn parameters(&self) -> u64 {
        let blocks = (0..self.layers).map(|l| self.block_parameters(l) + self.expert_parameters(l)).sum::<u64>();
        blocks + self.embedding_parameters() + self.head_parameters()
    }

    /// Parameters that one token uses: of the routed experts only those that it visits.
    pub fn active_parameters(&self) -> u64 {
        let idle = self.experts.map_or(0, |e| {
            (self.layers - e.dense_layers.min(self.layers)) * (e.count - e.top_k) * self.mlp_parameters(e.ffn)
        });
        self.parameters() - idle
    }

    /// FLOPs of one token, forward and backward, without recomputation: `6` per parameter of a matrix product (the embedding
    /// is none, the output projection is one) and `6 s` per query-key and per value width; halved where only the causal
    /// half counts.
    pub fn flops_per_token(&self, seq: u64, causal: bool) -> f64 {
        let mut matrices = self.hidden * self.vocab;
        for layer in 0..self.layers {
            matrices += self.attention.matrices(self.hidden).iter().map(|m| m.0 * m.1).sum::<u64>();
            let mlp = |ffn| self.mlp_matrices(ffn).iter().map(|m| m.0 * m.1).sum::<u64>();
            matrices += match self.experts {
                Some(e) if self.routed(layer) => {
                    self.hidden * e.count + e.top_k * mlp(e.ffn) + if e.shared_ffn > 0 { mlp(e.shared_ffn) } else { 0 }
                }
                _ => mlp(self.ffn),
            };
        }
        let (query, _, _) = self.attention.widths();
        let scores = self.layers * seq * (query + self.attention.output_width());
        6.0 * (matrices as f64 + scores as f64 * if causal { 0.5 } else { 1.0 })
    }
}

impl From<&ModelConfig> for Architecture {
    fn from(config: &ModelConfig) -> Architecture {
        let (heads, kv_heads, head_dim) =
            (u64::from(config.heads), u64::from(config.kv_heads), u64::from(config.head_dim));
        Architecture {
            name: config.name.clone(),
            layers: u64::from(config.layers),
            hidden: u64::from(config.hidden),
            attention: Attention::Grouped { heads, kv_heads, head_dim },
            ffn: u64::from(config.intermediate),
            gated: config.activation == Activation::SwiGlu,
            experts: None,
            vocab: u64::from(config.vocab),
            tied: config.tied_embeddings,
            biases: config.norm == Norm::LayerNorm,
            positions: match config.positions {
                Positions::Learned => PositionTable::Learned(u64::from(config.max_positions)),
                _ => PositionTable::None,
            },
            dropout: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn llama(layers: u64, hidden: u64, heads: u64, kv_heads: u64, ffn: u64, vocab: u64) -> Architecture {
        Architecture {
            name: String::new(),
            layers,
            hidden,
            attention: Attention::Grouped { heads, kv_heads, head_dim: hidden / heads },
            ffn,
            gated: true,
            experts: None,
            vocab,
            tied: false,
            biases: false,
            positions: PositionTable::None,
            dropout: false,
        }
    }

    fn mixture(
        base: Architecture,
        count: u64,
        top_k: u64,
        ffn: u64,
        shared_ffn: u64,
        dense_layers: u64,
    ) -> Architecture {
        Architecture { experts: Some(Experts { count, top_k, ffn, shared_ffn, dense_layers }), ..base }
    }

    /// Counts as printed by the models' own checkpoints.
    #[test]
    fn published_counts() {
        assert_eq!(llama(32, 4096, 32, 32, 11008, 32000).parameters(), 6_738_415_616, "Llama 2 7B");
        assert_eq!(llama(32, 4096, 32, 8, 14336, 128256).parameters(), 8_030_261_248, "Llama 3 8B");
        assert_eq!(llama(80, 8192, 64, 8, 28672, 128256).parameters(), 70_553_706_496, "Llama 3 70B");
        assert_eq!(llama(126, 16384, 128, 8, 53248, 128256).parameters(), 405_853_388_800, "Llama 3.1 405B");
        let mixtral = mixture(llama(32, 4096, 32, 8, 14336, 32000), 8, 2, 14336, 0, 0);
        assert_eq!(mixtral.parameters(), 46_702_792_704, "Mixtral 8x7B");
        assert_eq!(mixtral.active_parameters(), 12_879_925_248, "Mixtral 8x7B, active");
        let gpt2 = Architecture {
            gated: false,
            tied: true,
            biases: true,
            positions: PositionTable::Learned(1024),
            ..llama(12, 768, 12, 12, 3072, 50257)
        };
        assert_eq!(gpt2.parameters(), 124_439_808, "GPT-2");
    }

    /// DeepSeek-V3: 671 billion parameters, 37 billion active (arXiv 2412.19437, section 4.2), and DeepSeek-V2's 236 and 21.
    #[test]
    fn latent_attention_with_experts() {
        let latent = |heads| Attention::Latent {
            heads,
            query_rank: 1536,
            kv_rank: 512,
            nope_dim: 128,
            rope_dim: 64,
            value_dim: 128,
        };
        let base = Architecture { attention: latent(128), ..llama(61, 7168, 128, 128, 18432, 129280) };
        let v3 = mixture(base, 256, 8, 2048, 2048, 3);
        assert!((v3.parameters() as f64 / 671.0e9 - 1.0).abs() < 0.001, "{}", v3.parameters());
        assert!((v3.active_parameters() as f64 / 37.0e9 - 1.0).abs() < 0.02, "{}", v3.active_parameters());
        let base = Architecture { attention: latent(128), ..llama(60, 5120, 128, 128, 12288, 102400) };
        let v2 = mixture(base, 160, 6, 1536, 3072, 1);
        assert!((v2.parameters() as f64 / 236.0e9 - 1.0).abs() < 0.003, "{}", v2.parameters());
        assert!((v2.active_parameters() as f64 / 21.0e9 - 1.0).abs() < 0.03, "{}", v2.active_parameters());
    }

    /// Narayanan et al. (arXiv 2104.04473, section 5.1): `P = 12 l h^2 (1 + 13/(12h) + (V + s)/(12 l h))`, and
    /// `96 B s l h^2 (1 + s/(6h) + V/(16 l h))` FLOPs per iteration with full recomputation. The formula has the final norm
    /// nowhere; the logits are not recomputed.
    #[test]
    fn formulas_of_megatron() {
        let (l, h, v, s) = (48u64, 8192u64, 51200u64, 2048u64);
        let gpt = Architecture {
            gated: false,
            tied: true,
            biases: true,
            positions: PositionTable::Learned(s),
            ..llama(l, h, 64, 64, 4 * h, v)
        };
        assert_eq!(gpt.parameters() - 2 * h, 12 * l * h * h + 13 * l * h + (v + s) * h);
        // The playbook's, without a table of positions: N = h v + L (12 h^2 + 13 h) + 2 h.
        let rotary = Architecture { positions: PositionTable::None, ..gpt.clone() };
        assert_eq!(rotary.parameters(), h * v + l * (12 * h * h + 13 * h) + 2 * h);
        let whole = gpt.flops_per_token(s, false);
        let head = 6.0 * (h * v) as f64;
        let with_recompute = head + (whole - head) * 4.0 / 3.0;
        let (lf, hf, vf, sf) = (l as f64, h as f64, v as f64, s as f64);
        let published = 96.0 * lf * hf * hf * (1.0 + sf / (6.0 * hf) + vf / (16.0 * lf * hf));
        assert!((with_recompute / published - 1.0).abs() < 1e-12);
    }
}
