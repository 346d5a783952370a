//! Models by name or by `config.json`, mixtures of experts and latent attention included.

use super::{Architecture, Attention, Experts, PositionTable};
use crate::model::{ModelConfig, ReadError};
use serde_json::Value;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// A model that cannot be had.
#[derive(Debug, Error)]
pub enum ZooError {
    /// A dense model, read as the executor reads it.
    #[error("{source}. With experts there are also {presets}", presets = presets())]
    Dense {
        /// What is wrong.
        source: ReadError,
    },
    /// A model whose sizes are known, but not all that a launcher asks for.
    #[error(
        "model {name}: {what} is not among what a launcher's files are written with; it is predicted and planned only"
    )]
    Details {
        /// The preset.
        name: String,
        /// What it has.
        what: &'static str,
    },
    /// A file that cannot be read.
    #[error("model {path}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not JSON.
    #[error("model {path}: not a JSON document ({source}); give the config.json of a Hugging Face model")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where.
        source: serde_json::Error,
    },
    /// A key that must be there, as a whole number above zero.
    #[error("model {path}: {key} = {found}; it has to be a whole number above zero")]
    Key {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What is there.
        found: String,
    },
}

/// Names of the presets with experts or of families that only the planner knows.
fn presets() -> String {
    PRESETS.iter().map(|row| row.0).collect::<Vec<_>>().join(", ")
}

/// Name, layers, hidden, heads, kv heads, head width, MLP width, vocabulary, experts `(count, top k, width, shared width, dense
/// layers)`, latent attention.
type Row = (&'static str, u64, u64, u64, u64, u64, u64, u64, Option<(u64, u64, u64, u64, u64)>, bool);

/// From the models' own `config.json` (Mixtral: arXiv 2401.04088; Qwen3: arXiv 2505.09388; DeepSeek: arXiv 2405.04434 and
/// 2412.19437; GPT-NeoX: arXiv 2204.06745; BLOOM: arXiv 2211.05100; MPT: its `config.json`) and, for GPT-3, from table 2.1 of arXiv
/// 2005.14165.
const PRESETS: [Row; 11] = [
    ("mixtral-8x7b", 32, 4096, 32, 8, 128, 14336, 32_000, Some((8, 2, 14336, 0, 0)), false),
    ("mixtral-8x22b", 56, 6144, 48, 8, 128, 16384, 32_768, Some((8, 2, 16384, 0, 0)), false),
    ("qwen3-30b-a3b", 48, 2048, 32, 4, 128, 6144, 151_936, Some((128, 8, 768, 0, 0)), false),
    ("qwen3-235b-a22b", 94, 4096, 64, 4, 128, 12288, 151_936, Some((128, 8, 1536, 0, 0)), false),
    ("deepseek-v2", 60, 5120, 128, 128, 192, 12288, 102_400, Some((160, 6, 1536, 3072, 1)), true),
    ("deepseek-v3", 61, 7168, 128, 128, 192, 18432, 129_280, Some((256, 8, 2048, 2048, 3)), true),
    ("gpt3-175b", 96, 12288, 96, 96, 128, 49152, 51_200, None, false),
    ("gpt-neox-20b", 44, 6144, 64, 64, 96, 24576, 50_432, None, false),
    ("bloom-176b", 70, 14336, 112, 112, 128, 57344, 250_880, None, false),
    ("mpt-7b", 32, 4096, 32, 32, 128, 16384, 50_432, None, false),
    ("mpt-30b", 48, 7168, 64, 64, 112, 28672, 50_432, None, false),
];

fn latent(heads: u64) -> Attention {
    Attention::Latent { heads, query_rank: 1536, kv_rank: 512, nope_dim: 128, rope_dim: 64, value_dim: 128 }
}

impl Architecture {
    /// Names of all presets: published dense models, those with experts, and those of the demonstration.
    pub fn preset_names() -> Vec<String> {
        let mut names: Vec<String> = ModelConfig::presets().into_iter().map(|model| model.name).collect();
        names.extend(PRESETS.iter().map(|row| row.0.to_owned()));
        names.sort_by_key(|name| name.starts_with("demo"));
        names
    }

    /// A preset by name (case, separators and an organisation before a slash do not matter), or a `config.json` by path (a directory
    /// stands for the one in it).
    ///
    /// # Errors
    /// When there is no such preset or file, or the file lacks a size.
    pub fn load(preset_or_path: &str) -> Result<Architecture, ZooError> {
        let known = known_preset(preset_or_path);
        let preset_or_path = known.as_deref().unwrap_or(preset_or_path);
        if let Some(row) = PRESETS.iter().find(|row| row.0 == preset_or_path) {
            return Ok(preset(row));
        }
        if let Some((json, file)) = document(preset_or_path)? {
            return from_json(&json, &file);
        }
        let model = ModelConfig::load(preset_or_path).map_err(|source| ZooError::Dense { source })?;
        Ok(Architecture::from(&model))
    }
}

/// The preset that is meant: case, separators and an organisation before a slash do not matter. A path that exists is none.
pub(super) fn known_preset(preset_or_path: &str) -> Option<String> {
    if Path::new(preset_or_path).exists() {
        return None;
    }
    let letters = |name: &str| -> String {
        name.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect()
    };
    let name = letters(preset_or_path.rsplit('/').next()?);
    Architecture::preset_names().into_iter().find(|preset| letters(preset) == name)
}

/// A `config.json` (or the one in a directory) of a model with experts or latent attention, which the executor does not read.
pub(super) fn document(path: &str) -> Result<Option<(Value, PathBuf)>, ZooError> {
    let path = Path::new(path);
    let file = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
    if !file.is_file() {
        return Ok(None);
    }
    let text = std::fs::read_to_string(&file).map_err(|source| ZooError::Unreadable { path: file.clone(), source })?;
    let json: Value = serde_json::from_str(&text).map_err(|source| ZooError::Json { path: file.clone(), source })?;
    let sparse = experts_of(&json).is_some() || json.get("kv_lora_rank").is_some_and(Value::is_u64);
    Ok(sparse.then_some((json, file)))
}

fn preset(&(name, layers, hidden, heads, kv_heads, head_dim, ffn, vocab, experts, compressed): &Row) -> Architecture {
    // GPT-3 learns positions, GPT-NeoX rotates; BLOOM and MPT have linear biases (ALiBi), which are no parameters. MPT has no other biases
    // either.
    let plain = ["gpt", "bloom", "mpt"].iter().any(|family| name.starts_with(family));
    let learned = name.starts_with("gpt3");
    Architecture {
        name: name.into(),
        layers,
        hidden,
        attention: if compressed { latent(heads) } else { Attention::Grouped { heads, kv_heads, head_dim } },
        ffn,
        gated: !plain,
        experts: experts.map(|(count, top_k, ffn, shared_ffn, dense_layers)| Experts {
            count,
            top_k,
            ffn,
            shared_ffn,
            dense_layers,
        }),
        vocab,
        tied: plain && !name.starts_with("gpt-neox"),
        biases: plain && !name.starts_with("mpt"),
        positions: if learned { PositionTable::Learned(2048) } else { PositionTable::None },
        dropout: false,
    }
}

/// The number of routed experts, under the names that the families use.
fn experts_of(json: &Value) -> Option<u64> {
    ["num_local_experts", "num_experts", "n_routed_experts"]
        .iter()
        .find_map(|key| json.get(*key).and_then(Value::as_u64))
        .filter(|count| *count > 1)
}

fn from_json(json: &Value, path: &Path) -> Result<Architecture, ZooError> {
    let given = |key: &str| json.get(key).and_then(Value::as_u64).filter(|n| *n > 0);
    let need = |key: &'static str| {
        given(key).ok_or_else(|| ZooError::Key {
            path: path.to_owned(),
            key,
            found: json.get(key).map_or("nothing".to_owned(), Value::to_string),
        })
    };
    let (hidden, heads) = (need("hidden_size")?, need("num_attention_heads")?);
    let attention = match given("kv_lora_rank") {
        Some(kv_rank) => Attention::Latent {
            heads,
            query_rank: given("q_lora_rank").unwrap_or(0),
            kv_rank,
            nope_dim: need("qk_nope_head_dim")?,
            rope_dim: need("qk_rope_head_dim")?,
            value_dim: need("v_head_dim")?,
        },
        None => Attention::Grouped {
            heads,
            kv_heads: given("num_key_value_heads").unwrap_or(heads),
            head_dim: given("head_dim").unwrap_or(hidden / heads),
        },
    };
    let layers = need("num_hidden_layers")?;
    let ffn = need("intermediate_size")?;
    let experts = match experts_of(json) {
        None => None,
        Some(count) => {
            let width = given("moe_intermediate_size").unwrap_or(ffn);
            let shared = given("shared_expert_intermediate_size")
                .unwrap_or_else(|| given("n_shared_experts").unwrap_or(0) * width);
            Some(Experts {
                count,
                top_k: need("num_experts_per_tok")?.min(count),
                ffn: width,
                shared_ffn: shared,
                dense_layers: given("first_k_dense_replace").unwrap_or(0).min(layers),
            })
        }
    };
    let name = path.parent().and_then(Path::file_name).unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    Ok(Architecture {
        name,
        layers,
        hidden,
        attention,
        ffn,
        gated: true,
        experts,
        vocab: need("vocab_size")?,
        tied: json.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(false),
        biases: false,
        positions: PositionTable::None,
        dropout: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Totals and active parameters in billions, as the models' papers and cards print them.
    #[test]
    fn presets_have_their_published_sizes() {
        for (name, total, active) in [
            ("mixtral-8x7b", 46.7, 12.9),
            ("mixtral-8x22b", 140.6, 39.1),
            ("qwen3-30b-a3b", 30.5, 3.3),
            ("qwen3-235b-a22b", 235.0, 22.0),
            ("deepseek-v2", 236.0, 21.4),
            ("deepseek-v3", 671.0, 37.6),
            ("gpt3-175b", 175.0, 175.0),
        ] {
            let model = Architecture::load(name).unwrap();
            let (a, b) = (model.parameters() as f64 / 1e9, model.active_parameters() as f64 / 1e9);
            assert!((a / total - 1.0).abs() < 0.01 && (b / active - 1.0).abs() < 0.02, "{name}: {a} {b}");
        }
        assert_eq!(Architecture::load("mixtral-8x7b").unwrap().parameters(), 46_702_792_704);
        // 56 blocks of attention (88,080,384), eight experts (2,415,919,104), router and norms (61,440); two matrices of the
        // vocabulary and the last norm.
        assert_eq!(
            Architecture::load("mixtral-8x22b").unwrap().parameters(),
            56 * (88_080_384 + 2_415_919_104 + 61_440) + 402_653_184 + 6_144
        );
        assert_eq!(Architecture::load("llama-3-8b").unwrap().parameters(), 8_030_261_248);
        // Of their checkpoints. BLOOM normalises its embedding, too, which is two vectors more.
        assert_eq!(Architecture::load("gpt-neox-20b").unwrap().parameters(), 20_554_567_680);
        assert_eq!(Architecture::load("mpt-7b").unwrap().parameters(), 6_649_286_656);
        assert_eq!(Architecture::load("bloom-176b").unwrap().parameters() + 2 * 14336, 176_247_271_424);
        for name in ["Mixtral-8x7B", "mistralai/Mixtral_8x7B", "MIXTRAL 8X7B"] {
            assert_eq!(Architecture::load(name).unwrap().parameters(), 46_702_792_704);
        }
        assert_eq!(Architecture::load("Llama3-8B").unwrap().name, "llama-3-8b");
        let error = Architecture::load("no-such-model").unwrap_err().to_string();
        assert!(error.contains("no-such-model") && error.contains("deepseek-v3"), "{error}");
    }

    #[test]
    fn files_of_mixtures() {
        let mut json = json!({"model_type": "mixtral", "hidden_size": 4096, "num_attention_heads": 32,
            "num_key_value_heads": 8, "num_hidden_layers": 32, "intermediate_size": 14336, "vocab_size": 32000,
            "num_local_experts": 8, "num_experts_per_tok": 2});
        let path = Path::new("somewhere/mixtral/config.json");
        let model = from_json(&json, path).unwrap();
        assert_eq!((model.name.as_str(), model.parameters()), ("mixtral", 46_702_792_704));
        json["hidden_size"] = json!(-1);
        let error = from_json(&json, path).unwrap_err().to_string();
        assert!(error.contains("hidden_size = -1"), "{error}");
    }
}
