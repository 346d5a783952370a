//! How much a model computes: FLOPs by convention, for MFU and HFU.

use super::{Layer, ModelConfig, trained_elements};
use crate::program::TransformerWorkload;

/// FLOPs per token of one forward pass.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Flops {
    /// Matrix products with weights: two per parameter of every projection, the output projection included, the embedding
    /// (a look-up) not.
    pub projections: f64,
    /// Scores and values of attention, over the pairs that causality leaves: `(seq + 1) / 2` per token.
    pub attention: f64,
}

impl Flops {
    /// Of a whole model at this sequence length.
    pub fn per_token(model: &ModelConfig, seq: u32) -> Flops {
        let layers = f64::from(model.layers);
        let matrices = Flops::block_matrices(model) * layers + f64::from(model.hidden) * f64::from(model.vocab);
        let pairs = (f64::from(seq) + 1.0) / 2.0;
        Flops { projections: 2.0 * matrices, attention: 4.0 * model.query_width() as f64 * pairs * layers }
    }

    /// Of one layer.
    pub fn of_layer(model: &ModelConfig, layer: Layer, seq: u32) -> Flops {
        match layer {
            Layer::Embedding => Flops { projections: 0.0, attention: 0.0 },
            Layer::Block(_) => {
                let pairs = (f64::from(seq) + 1.0) / 2.0;
                Flops {
                    projections: 2.0 * Flops::block_matrices(model),
                    attention: 4.0 * model.query_width() as f64 * pairs,
                }
            }
            Layer::Head => {
                Flops { projections: 2.0 * f64::from(model.hidden) * f64::from(model.vocab), attention: 0.0 }
            }
        }
    }

    /// Both parts.
    pub fn total(&self) -> f64 {
        self.projections + self.attention
    }

    fn block_matrices(model: &ModelConfig) -> f64 {
        let hidden = f64::from(model.hidden);
        let attention = hidden * (model.qkv_width() + model.query_width()) as f64;
        attention + hidden * (model.up_width() as f64 + f64::from(model.intermediate))
    }
}

/// FLOPs per trained token by the convention of MFU: forward once and backward twice, nothing for recomputation; causal
/// attention counts the pairs that are computed, half of the square (PaLM, arXiv 2204.02311, appendix B, counts the whole square).
pub fn model_flops_per_token(model: &ModelConfig, seq: u32) -> f64 {
    3.0 * Flops::per_token(model, seq).total()
}

/// [`model_flops_per_token`] of what is trained: the backward for the weights counts for their trained share.
pub fn trained_flops_per_token(workload: &TransformerWorkload) -> f64 {
    let share = trained_elements(&workload.model, &workload.trainable) as f64 / workload.model.parameters() as f64;
    model_flops_per_token(&workload.model, workload.seq) * (2.0 + share) / 3.0
}
