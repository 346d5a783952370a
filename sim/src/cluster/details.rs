//! What a launcher has to know of a model beside its sizes: positions, normalisation, biases.

use super::zoo::{ZooError, document, known_preset};
use crate::model::{ModelConfig, Norm, Positions};
use serde_json::Value;

/// Details of a model that neither its memory nor its time depends on.
#[derive(Debug, Clone, PartialEq)]
pub struct Details {
    /// How positions enter.
    pub positions: Positions,
    /// Longest sequence that the model is made for.
    pub max_positions: u64,
    /// Normalisation.
    pub norm: Norm,
    /// Its epsilon.
    pub norm_epsilon: f64,
    /// Biases on the query, key and value projections, where other matrices have none.
    pub qkv_bias: bool,
    /// Queries and keys are normalised (Qwen3).
    pub qk_norm: bool,
}

/// Of presets that the executor does not know, from their `config.json`: name, base of the rotary embedding, longest sequence,
/// epsilon.
const ROTARY: [(&str, f64, u64, f64); 6] = [
    ("mixtral-8x7b", 1e6, 32_768, 1e-5),
    ("mixtral-8x22b", 1e6, 65_536, 1e-5),
    ("qwen3-30b-a3b", 1e6, 40_960, 1e-6),
    ("qwen3-235b-a22b", 1e6, 40_960, 1e-6),
    ("deepseek-v2", 1e4, 163_840, 1e-6),
    ("deepseek-v3", 1e4, 163_840, 1e-6),
];

/// Presets with something that no details hold.
const PARTLY_KNOWN: [(&str, &str); 4] = [
    ("gpt-neox-20b", "a rotary embedding of a quarter of each head"),
    ("bloom-176b", "linear biases for positions (ALiBi)"),
    ("mpt-7b", "linear biases for positions (ALiBi)"),
    ("mpt-30b", "linear biases for positions (ALiBi)"),
];

impl Details {
    /// Those of the model that [`Architecture::load`](super::Architecture::load) finds under the same name or path.
    ///
    /// # Errors
    /// When there is no such model, or one of which only sizes are known.
    pub fn load(preset_or_path: &str) -> Result<Details, ZooError> {
        let name = known_preset(preset_or_path);
        let name = name.as_deref().unwrap_or(preset_or_path);
        if let Some(&(_, theta, max_positions, norm_epsilon)) = ROTARY.iter().find(|row| row.0 == name) {
            let qk_norm = name.starts_with("qwen3");
            return Ok(Details { max_positions, qk_norm, ..rotary(theta, norm_epsilon) });
        }
        if let Some(&(name, what)) = PARTLY_KNOWN.iter().find(|row| row.0 == name) {
            return Err(ZooError::Details { name: name.into(), what });
        }
        if name == "gpt3-175b" {
            return Ok(Details {
                positions: Positions::Learned,
                max_positions: 2048,
                norm: Norm::LayerNorm,
                norm_epsilon: 1e-5,
                qkv_bias: false,
                qk_norm: false,
            });
        }
        if let Some((json, _)) = document(name)? {
            let number = |key: &str| json.get(key).and_then(Value::as_f64);
            let scaled = json.get("rope_parameters").and_then(|all| all.get("rope_theta")).and_then(Value::as_f64);
            let theta = scaled.or_else(|| number("rope_theta")).unwrap_or(1e4);
            let longest = json.get("max_position_embeddings").and_then(Value::as_u64);
            let details = rotary(theta, number("rms_norm_eps").unwrap_or(1e-6));
            let family = json.get("model_type").and_then(Value::as_str).unwrap_or_default();
            let qk_norm = family.starts_with("qwen3");
            return Ok(Details { max_positions: longest.unwrap_or(details.max_positions), qk_norm, ..details });
        }
        let model = ModelConfig::load(name).map_err(|source| ZooError::Dense { source })?;
        Ok(Details::from(&model))
    }
}

fn rotary(theta: f64, norm_epsilon: f64) -> Details {
    Details {
        positions: Positions::Rotary { theta },
        max_positions: 4096,
        norm: Norm::RmsNorm,
        norm_epsilon,
        qkv_bias: false,
        qk_norm: false,
    }
}

impl From<&ModelConfig> for Details {
    fn from(model: &ModelConfig) -> Details {
        Details {
            positions: model.positions,
            max_positions: u64::from(model.max_positions),
            norm: model.norm,
            norm_epsilon: model.norm_epsilon,
            qkv_bias: model.qkv_bias && !model.mlp_bias,
            qk_norm: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Architecture;
    use super::*;

    #[test]
    fn every_preset_has_details() {
        for (name, what) in PARTLY_KNOWN {
            let error = Details::load(name).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains(what), "{error}");
        }
        let partly = |name: &String| PARTLY_KNOWN.iter().any(|row| row.0 == name);
        for name in Architecture::preset_names().into_iter().filter(|name| !partly(name)) {
            let details = Details::load(&name).unwrap();
            let model = Architecture::load(&name).unwrap();
            assert_eq!(details.positions == Positions::Learned, name.contains("gpt"), "{name}");
            assert_eq!(model.biases, details.norm == Norm::LayerNorm, "{name}");
        }
        assert_eq!(Details::load("Mixtral-8x7B").unwrap().positions, Positions::Rotary { theta: 1e6 });
        assert_eq!(Details::load("llama-3-8b").unwrap().positions, Positions::Rotary { theta: 5e5 });
        assert!(Details::load("llama-9").is_err());
    }
}
