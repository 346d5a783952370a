//! What makes an architecture, a microbatch or a cut into stages impossible.

use super::{Activation, Layer, ModelConfig, Positions};
use crate::program::{Stage, TransformerWorkload};
use crate::units::StageId;
use thiserror::Error;

/// Most parameters of a model, and most elements that a microbatch keeps: far above any machine, and far enough below the range
/// of 64 bits that sizes in bytes, with optimizer state and over all microbatches, do not overflow.
const LARGEST: u64 = 1 << 52;

/// Why a model cannot be built or cut as asked.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ModelError {
    /// A value that no model can have.
    #[error("model {model}: {key} = {value}; allowed: {allowed}")]
    Value { model: String, key: &'static str, value: String, allowed: String },
    /// No preset of that name.
    #[error("no model is called `{name}`; presets: {known}; or give the path of a config.json")]
    UnknownPreset { name: String, known: String },
    /// A stage or unit without layers.
    #[error(
        "{stage} has a unit without layers: {layers} layers (embedding and head included) must fill every unit; use fewer stages"
    )]
    EmptyUnit { stage: StageId, layers: usize },
    /// Layers that are not in the order of the model, each once.
    #[error(
        "{stage} holds {found:?} where {expected:?} belongs: stages hold the layers of the model in order, each once"
    )]
    LayerOrder { stage: StageId, found: Option<Layer>, expected: Option<Layer> },
}

impl ModelConfig {
    /// Checks what the arithmetic relies on.
    ///
    /// # Errors
    /// Names the first key whose value is impossible.
    pub fn validate(&self) -> Result<(), ModelError> {
        let refuse = |key, value: String, allowed: String| {
            Err(ModelError::Value { model: self.name.clone(), key, value, allowed })
        };
        for (key, value) in [
            ("layers", self.layers),
            ("hidden", self.hidden),
            ("heads", self.heads),
            ("kv_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("intermediate", self.intermediate),
            ("vocab", self.vocab),
            ("max_positions", self.max_positions),
        ] {
            if value == 0 {
                return refuse(key, "0".into(), "a whole number from 1 on".into());
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return refuse("kv_heads", self.kv_heads.to_string(), format!("a divisor of the {} heads", self.heads));
        }
        if matches!(self.positions, Positions::Rotary { .. }) && !self.head_dim.is_multiple_of(2) {
            return refuse("head_dim", self.head_dim.to_string(), "an even number: rotary positions turn pairs".into());
        }
        if !(self.norm_epsilon.is_finite() && self.norm_epsilon > 0.0) {
            return refuse("norm_epsilon", self.norm_epsilon.to_string(), "a number above 0, for example 1e-5".into());
        }
        let (heads, kv_heads) = (u64::from(self.heads), u64::from(self.kv_heads));
        let width = u64::from(self.head_dim) * heads;
        if u32::try_from(width.saturating_add(2 * kv_heads * u64::from(self.head_dim))).is_err() {
            let allowed = "such that queries, keys and values are at most 4294967295 wide".into();
            return refuse("head_dim", self.head_dim.to_string(), allowed);
        }
        if self.activation == Activation::SwiGlu && self.intermediate > u32::MAX / 2 {
            let allowed = format!("at most {}: gate and up are one matrix", u32::MAX / 2);
            return refuse("intermediate", self.intermediate.to_string(), allowed);
        }
        let parameters = self.wide_parameters();
        if parameters > u128::from(LARGEST) {
            return refuse(
                "parameters",
                parameters.to_string(),
                format!("at most {LARGEST}; use fewer or narrower layers"),
            );
        }
        match self.positions {
            Positions::Rotary { theta } if !(theta.is_finite() && theta > 1.0) => {
                refuse("rope_theta", theta.to_string(), "a number above 1, for example 10000".into())
            }
            _ => Ok(()),
        }
    }

    /// About [`ModelConfig::parameters`], from above, where that may overflow.
    fn wide_parameters(&self) -> u128 {
        let wide = |value: u32| u128::from(value);
        let hidden = wide(self.hidden);
        let attention = wide(self.head_dim) * (2 * wide(self.heads) + 2 * wide(self.kv_heads));
        // Three matrices of the MLP, and as a bound on norms and biases eight vectors more.
        let block = (hidden + 1) * (attention + 3 * wide(self.intermediate) + 8);
        wide(self.layers) * block + hidden * (2 * wide(self.vocab) + wide(self.max_positions) + 4)
    }

    /// The layers of the model in forward order: embedding, blocks, head.
    pub fn all_layers(&self) -> impl Iterator<Item = Layer> + use<> {
        std::iter::once(Layer::Embedding).chain((0..self.layers).map(Layer::Block)).chain(std::iter::once(Layer::Head))
    }
}

impl TransformerWorkload {
    /// Checks the model, the shape of the microbatch, and that the stages hold every layer once, in order, with no empty
    /// unit. A second copy of the model (bidirectional pipelines) may follow the first.
    ///
    /// # Errors
    /// Names what is wrong and what is allowed.
    pub fn validate(&self, stages: &[Stage]) -> Result<(), ModelError> {
        self.model.validate()?;
        let refuse = |key, value: u32, allowed: String| {
            Err(ModelError::Value { model: self.model.name.clone(), key, value: value.to_string(), allowed })
        };
        if self.micro_batch == 0 {
            return refuse("micro_batch", 0, "a whole number from 1 on".into());
        }
        if self.seq == 0 {
            return refuse("seq", 0, "a whole number from 1 on".into());
        }
        if self.model.positions == Positions::Learned && self.seq > self.model.max_positions {
            let allowed = format!("at most {}, the rows of the learned position table", self.model.max_positions);
            return refuse("seq", self.seq, allowed);
        }
        if self.micro_batch.checked_mul(self.seq).is_none() {
            return refuse(
                "micro_batch",
                self.micro_batch,
                format!("below {} at seq {}", u32::MAX / self.seq, self.seq),
            );
        }
        let model = &self.model;
        // What a token keeps over all layers is fewer elements than this: see the table of `activations`.
        let widths = 12 * u128::from(model.hidden) + 4 * (model.qkv_width() + 2 * model.up_width()) as u128;
        let rows = u128::from(self.micro_batch) * u128::from(self.seq);
        if rows * widths * (u128::from(model.layers) + 2) > u128::from(LARGEST) {
            let allowed =
                format!("such that activations are at most {LARGEST} elements; use a smaller microbatch or seq");
            return refuse("micro_batch", self.micro_batch, allowed);
        }
        self.trainable.validate(model)?;
        self.validate_stages(stages)
    }

    fn validate_stages(&self, stages: &[Stage]) -> Result<(), ModelError> {
        let layers = self.model.layers as usize + 2;
        let mut expected = self.model.all_layers();
        for (number, stage) in stages.iter().enumerate() {
            let id = StageId(number as u16);
            if stage.units.is_empty() || stage.units.iter().any(|unit| unit.layers.is_empty()) {
                return Err(ModelError::EmptyUnit { stage: id, layers });
            }
            for &found in stage.units.iter().flat_map(|unit| &unit.layers) {
                let wanted = expected.next().or_else(|| {
                    expected = self.model.all_layers();
                    expected.next()
                });
                if wanted != Some(found) {
                    return Err(ModelError::LayerOrder { stage: id, found: Some(found), expected: wanted });
                }
            }
        }
        match expected.next() {
            None if !stages.is_empty() => Ok(()),
            missing => Err(ModelError::LayerOrder {
                stage: StageId(stages.len().saturating_sub(1) as u16),
                found: None,
                expected: missing,
            }),
        }
    }
}
