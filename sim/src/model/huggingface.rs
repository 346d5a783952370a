//! Reads the architecture from a Hugging Face `config.json` (families llama, mistral, qwen2, gpt2).
//!
//! Only what changes the arithmetic is read. Rescaled rotary frequencies (`rope_scaling`) change no cost and are left out.
//! A sliding window limits the longest sequence, because attention is counted and run as fully causal.

use super::{Activation, ModelConfig, ModelError, Norm, Positions};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why a `config.json` gives no model.
#[derive(Debug, Error)]
pub enum ReadError {
    /// Neither a preset nor a readable file.
    #[error("model {path}: {source}; give the path of a config.json, or one of the presets {presets}")]
    Unreadable { path: PathBuf, source: std::io::Error, presets: String },
    /// Not JSON.
    #[error("model {path}: not a JSON document ({source}); give the config.json of a Hugging Face model")]
    Json { path: PathBuf, source: serde_json::Error },
    /// JSON, but no object.
    #[error("model {path}: must be a JSON object with `model_type` and the sizes of the model")]
    NotAnObject { path: PathBuf },
    /// A family whose arithmetic is unknown.
    #[error("model {path}: model_type = {found:?}; known families: {}; rewrite it as one of them if it computes the same", FAMILIES.join(", "))]
    Family { path: PathBuf, found: String },
    /// A key that must be there.
    #[error("model {path}: {key} is missing; a {family} model needs {expected} there")]
    Missing { path: PathBuf, key: &'static str, family: &'static str, expected: &'static str },
    /// A key with the wrong type or an impossible value.
    #[error("model {path}: {key} = {value}; allowed: {allowed}")]
    Key { path: PathBuf, key: &'static str, value: String, allowed: String },
    /// Values that do not fit together.
    #[error(transparent)]
    Model(#[from] ModelError),
}

const FAMILIES: [&str; 4] = ["llama", "mistral", "qwen2", "gpt2"];

const COUNT: &str = "a whole number from 1 to 4294967295";

impl ModelConfig {
    /// A preset by name, or a `config.json` by path (a directory stands for the `config.json` in it).
    ///
    /// # Errors
    /// See [`ReadError`].
    pub fn load(preset_or_path: &str) -> Result<ModelConfig, ReadError> {
        let path = Path::new(preset_or_path);
        let looks_like_a_path = path.components().count() > 1 || path.extension().is_some_and(|e| e == "json");
        match ModelConfig::preset(preset_or_path) {
            Ok(model) => Ok(model),
            Err(unknown) if !looks_like_a_path && !path.exists() => Err(unknown.into()),
            Err(_) => ModelConfig::read(path),
        }
    }

    /// Reads a `config.json`; a directory stands for the one in it. The model is named after its directory.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub fn read(path: &Path) -> Result<ModelConfig, ReadError> {
        let file = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
        let text = std::fs::read_to_string(&file).map_err(|source| ReadError::Unreadable {
            path: file.clone(),
            source,
            presets: ModelConfig::presets().into_iter().map(|model| model.name).collect::<Vec<_>>().join(", "),
        })?;
        let name = match file.file_stem().and_then(|stem| stem.to_str()) {
            Some("config") | None => file.parent().and_then(|folder| folder.file_name()).and_then(|name| name.to_str()),
            stem => stem,
        };
        ModelConfig::from_json(name.unwrap_or("config.json"), &text, &file)
    }

    /// Parses the text of a `config.json`; `path` is for messages.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub fn from_json(name: &str, text: &str, path: &Path) -> Result<ModelConfig, ReadError> {
        let value: Value =
            serde_json::from_str(text).map_err(|source| ReadError::Json { path: path.to_owned(), source })?;
        let Value::Object(keys) = &value else { return Err(ReadError::NotAnObject { path: path.to_owned() }) };
        let mut file = File { path, keys, family: "Hugging Face" };
        let found = file.text("model_type", "one of llama, mistral, qwen2, gpt2")?;
        let Some(family) = FAMILIES.into_iter().find(|family| *family == found) else {
            return Err(ReadError::Family { path: path.to_owned(), found: found.into() });
        };
        file.family = family;
        let model = if family == "gpt2" { file.gpt2(name)? } else { file.llama(name)? };
        model.validate()?;
        Ok(model)
    }
}

/// A document and how its keys are read: absent and `null` are the same.
struct File<'a> {
    path: &'a Path,
    keys: &'a Map<String, Value>,
    family: &'static str,
}

impl<'a> File<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.keys.get(key).filter(|value| !value.is_null())
    }

    fn wrong(&self, key: &'static str, value: impl ToString, allowed: impl Into<String>) -> ReadError {
        ReadError::Key { path: self.path.to_owned(), key, value: value.to_string(), allowed: allowed.into() }
    }

    fn missing(&self, key: &'static str, expected: &'static str) -> ReadError {
        ReadError::Missing { path: self.path.to_owned(), key, family: self.family, expected }
    }

    fn text(&self, key: &'static str, expected: &'static str) -> Result<&'a str, ReadError> {
        let value = self.get(key).ok_or_else(|| self.missing(key, expected))?;
        value.as_str().ok_or_else(|| self.wrong(key, value, expected))
    }

    fn count_or_absent(&self, key: &'static str) -> Result<Option<u32>, ReadError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64().and_then(|count| u32::try_from(count).ok()).filter(|&count| count > 0) {
            Some(count) => Ok(Some(count)),
            None => Err(self.wrong(key, value, COUNT)),
        }
    }

    fn count(&self, key: &'static str) -> Result<u32, ReadError> {
        self.count_or_absent(key)?.ok_or_else(|| self.missing(key, COUNT))
    }

    fn number(&self, key: &'static str, default: f64) -> Result<f64, ReadError> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_f64().filter(|n| *n > 0.0).ok_or_else(|| self.wrong(key, value, "a number above 0"))
    }

    fn flag(&self, key: &'static str, default: bool) -> Result<bool, ReadError> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.wrong(key, value, "true or false"))
    }

    fn require(&self, key: &'static str, default: &'a str, allowed: &'static [&'static str]) -> Result<(), ReadError> {
        let found = if self.get(key).is_some() { self.text(key, "a name")? } else { default };
        if allowed.contains(&found) {
            return Ok(());
        }
        Err(self.wrong(key, format_args!("{found:?}"), allowed.join(", ")))
    }

    /// The width of a head, which must cut `hidden` evenly where the file does not give it.
    fn head_dim(&self, key: &'static str, hidden: u32, heads: u32) -> Result<u32, ReadError> {
        if hidden.is_multiple_of(heads) {
            return Ok(hidden / heads);
        }
        Err(self.wrong(key, heads, format!("a divisor of the hidden size {hidden} (or give head_dim)")))
    }

    /// llama, and mistral and qwen2, which differ in biases and in the sliding window.
    fn llama(&self, name: &str) -> Result<ModelConfig, ReadError> {
        self.require("hidden_act", "silu", &["silu", "swish"])?;
        let (hidden, heads) = (self.count("hidden_size")?, self.count("num_attention_heads")?);
        let kv_heads = self.count_or_absent("num_key_value_heads")?.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            let allowed = format!("a divisor of num_attention_heads = {heads}");
            return Err(self.wrong("num_key_value_heads", kv_heads, allowed));
        }
        let head_dim = match self.count_or_absent("head_dim")? {
            Some(width) => width,
            None => self.head_dim("num_attention_heads", hidden, heads)?,
        };
        let window = match self.family {
            "mistral" => self.count_or_absent("sliding_window")?,
            "qwen2" if self.flag("use_sliding_window", false)? => self.count_or_absent("sliding_window")?,
            _ => None,
        };
        let longest = self.count_or_absent("max_position_embeddings")?.unwrap_or(2048);
        // Newer files hold the base of the frequencies in an object of its own.
        let theta = match self.get("rope_parameters").and_then(|object| object.get("rope_theta")) {
            Some(value) => value.as_f64().ok_or_else(|| self.wrong("rope_parameters.rope_theta", value, "a number"))?,
            None => self.number("rope_theta", 10000.0)?,
        };
        let is_llama = self.family == "llama";
        let attention_bias = is_llama && self.flag("attention_bias", false)?;
        Ok(ModelConfig {
            name: name.into(),
            layers: self.count("num_hidden_layers")?,
            hidden,
            heads,
            kv_heads,
            head_dim,
            intermediate: self.count("intermediate_size")?,
            vocab: self.count("vocab_size")?,
            max_positions: window.map_or(longest, |window| window.min(longest)),
            norm: Norm::RmsNorm,
            norm_epsilon: self.number("rms_norm_eps", 1e-6)?,
            activation: Activation::SwiGlu,
            positions: Positions::Rotary { theta },
            qkv_bias: attention_bias || self.family == "qwen2",
            attention_output_bias: attention_bias,
            mlp_bias: is_llama && self.flag("mlp_bias", false)?,
            tied_embeddings: self.flag("tie_word_embeddings", false)?,
        })
    }

    fn gpt2(&self, name: &str) -> Result<ModelConfig, ReadError> {
        self.require("activation_function", "gelu_new", &["gelu_new", "gelu_pytorch_tanh", "gelu_fast"])?;
        for key in ["scale_attn_by_inverse_layer_idx", "add_cross_attention"] {
            if self.flag(key, false)? {
                return Err(self.wrong(key, true, "false: this variant is not supported"));
            }
        }
        let (hidden, heads) = (self.count("n_embd")?, self.count("n_head")?);
        let positions = match self.count_or_absent("n_positions")? {
            Some(positions) => positions,
            None => self.count_or_absent("n_ctx")?.unwrap_or(1024),
        };
        let wide =
            || hidden.checked_mul(4).ok_or_else(|| self.wrong("n_embd", hidden, "a quarter of 4294967295 at most"));
        let intermediate = match self.count_or_absent("n_inner")? {
            Some(width) => width,
            None => wide()?,
        };
        Ok(ModelConfig {
            name: name.into(),
            layers: self.count("n_layer")?,
            hidden,
            heads,
            kv_heads: heads,
            head_dim: self.head_dim("n_head", hidden, heads)?,
            intermediate,
            vocab: self.count("vocab_size")?,
            max_positions: positions,
            norm: Norm::LayerNorm,
            norm_epsilon: self.number("layer_norm_epsilon", 1e-5)?,
            activation: Activation::Gelu,
            positions: Positions::Learned,
            qkv_bias: true,
            attention_output_bias: true,
            mlp_bias: true,
            tied_embeddings: self.flag("tie_word_embeddings", true)?,
        })
    }
}
