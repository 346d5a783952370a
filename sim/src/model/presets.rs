//! Architectures by name: published models and the small ones that the demonstration trains.

use super::{Activation, ModelConfig, ModelError, Norm, Positions};

/// A llama-style row: name, layers, hidden, heads, kv heads, intermediate, vocabulary, positions, epsilon, theta.
struct Llama(&'static str, u32, u32, u32, u32, u32, u32, u32, f64, f64);

/// Published: <https://arxiv.org/abs/2302.13971> table 2 (LLaMA), <https://arxiv.org/abs/2307.09288> (Llama 2), <https://arxiv.org/abs/2407.21783> table 3 (Llama 3),
/// <https://arxiv.org/abs/2310.06825> table 1 (Mistral). Demo models are byte-level.
const LLAMAS: [Llama; 14] = [
    Llama("llama-7b", 32, 4096, 32, 32, 11008, 32000, 2048, 1e-6, 1e4),
    Llama("llama-13b", 40, 5120, 40, 40, 13824, 32000, 2048, 1e-6, 1e4),
    Llama("llama-30b", 60, 6656, 52, 52, 17920, 32000, 2048, 1e-6, 1e4),
    Llama("llama-65b", 80, 8192, 64, 64, 22016, 32000, 2048, 1e-6, 1e4),
    Llama("llama-2-7b", 32, 4096, 32, 32, 11008, 32000, 4096, 1e-5, 1e4),
    Llama("llama-2-13b", 40, 5120, 40, 40, 13824, 32000, 4096, 1e-5, 1e4),
    Llama("llama-2-70b", 80, 8192, 64, 8, 28672, 32000, 4096, 1e-5, 1e4),
    Llama("llama-3-8b", 32, 4096, 32, 8, 14336, 128_256, 8192, 1e-5, 5e5),
    Llama("llama-3-70b", 80, 8192, 64, 8, 28672, 128_256, 8192, 1e-5, 5e5),
    Llama("llama-3.1-405b", 126, 16384, 128, 8, 53248, 128_256, 131_072, 1e-5, 5e5),
    Llama("mistral-7b", 32, 4096, 32, 8, 14336, 32000, 4096, 1e-5, 1e4),
    Llama("demo-1m", 8, 128, 4, 2, 256, 256, 2048, 1e-5, 1e4),
    Llama("demo-3m", 8, 192, 6, 2, 512, 256, 2048, 1e-5, 1e4),
    Llama("demo-25m", 8, 512, 8, 4, 1536, 256, 2048, 1e-5, 1e4),
];

/// A GPT-2-style row: name, layers, hidden, heads, vocabulary, positions.
struct Gpt2(&'static str, u32, u32, u32, u32, u32);

/// Radford et al. 2019, table 2, with the sizes as released.
const GPT2S: [Gpt2; 5] = [
    Gpt2("gpt2", 12, 768, 12, 50257, 1024),
    Gpt2("gpt2-medium", 24, 1024, 16, 50257, 1024),
    Gpt2("gpt2-large", 36, 1280, 20, 50257, 1024),
    Gpt2("gpt2-xl", 48, 1600, 25, 50257, 1024),
    Gpt2("demo-gpt-1m", 6, 128, 4, 256, 1024),
];

impl Llama {
    fn config(&self) -> ModelConfig {
        let &Llama(name, layers, hidden, heads, kv_heads, intermediate, vocab, max_positions, norm_epsilon, theta) =
            self;
        ModelConfig {
            name: name.into(),
            layers,
            hidden,
            heads,
            kv_heads,
            head_dim: hidden / heads,
            intermediate,
            vocab,
            max_positions,
            norm: Norm::RmsNorm,
            norm_epsilon,
            activation: Activation::SwiGlu,
            positions: Positions::Rotary { theta },
            qkv_bias: false,
            attention_output_bias: false,
            mlp_bias: false,
            tied_embeddings: false,
        }
    }
}

impl Gpt2 {
    fn config(&self) -> ModelConfig {
        let &Gpt2(name, layers, hidden, heads, vocab, max_positions) = self;
        ModelConfig {
            name: name.into(),
            layers,
            hidden,
            heads,
            kv_heads: heads,
            head_dim: hidden / heads,
            intermediate: 4 * hidden,
            vocab,
            max_positions,
            norm: Norm::LayerNorm,
            norm_epsilon: 1e-5,
            activation: Activation::Gelu,
            positions: Positions::Learned,
            qkv_bias: true,
            attention_output_bias: true,
            mlp_bias: true,
            tied_embeddings: true,
        }
    }
}

/// <https://arxiv.org/abs/2407.10671> table 1, with the released `config.json`.
fn qwen2(
    name: &str,
    layers: u32,
    hidden: u32,
    (heads, kv_heads): (u32, u32),
    intermediate: u32,
    vocab: u32,
) -> ModelConfig {
    let tied = name == "qwen2-0.5b";
    let row = Llama("qwen2", layers, hidden, heads, kv_heads, intermediate, vocab, 131_072, 1e-6, 1e6);
    ModelConfig { name: name.into(), qkv_bias: true, tied_embeddings: tied, ..row.config() }
}

impl ModelConfig {
    /// Every preset: published models first, then those of the demonstration.
    pub fn presets() -> Vec<ModelConfig> {
        let mut all: Vec<ModelConfig> =
            GPT2S.iter().map(Gpt2::config).chain(LLAMAS.iter().map(Llama::config)).collect();
        all.push(qwen2("qwen2-0.5b", 24, 896, (14, 2), 4864, 151_936));
        all.push(qwen2("qwen2-7b", 28, 3584, (28, 4), 18944, 152_064));
        all.sort_by_key(|model| model.name.starts_with("demo"));
        all
    }

    /// The preset of a name.
    ///
    /// # Errors
    /// [`ModelError::UnknownPreset`], which lists all names.
    pub fn preset(name: &str) -> Result<ModelConfig, ModelError> {
        let mut all = ModelConfig::presets();
        match all.iter().position(|model| model.name == name) {
            Some(found) => Ok(all.swap_remove(found)),
            None => Err(ModelError::UnknownPreset {
                name: name.into(),
                known: all.into_iter().map(|model| model.name).collect::<Vec<_>>().join(", "),
            }),
        }
    }
}
