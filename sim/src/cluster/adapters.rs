//! Low-rank adapters beside frozen matrices (LoRA, Hu et al., arXiv 2106.09685): a matrix of k columns and d rows gets two of
//! rank r, with r (k + d) parameters that are trained.

use super::{Architecture, Attention};
use thiserror::Error;

/// Matrices that do not exist.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("there is no matrix {name:?} in {model}; its matrices are {known}")]
pub struct AdapterError {
    /// The name that was given.
    pub name: String,
    model: String,
    known: String,
}

impl Architecture {
    /// Parameters of each matrix of a block that every rank of an expert group holds, in the order of a pass.
    pub fn dense_matrices(&self, layer: u64) -> Vec<u64> {
        let single = self.adaptable(layer).into_iter().filter(|(.., count)| *count == 1);
        single.map(|(_, inputs, outputs, _)| inputs * outputs).collect()
    }

    /// The matrices of a block that adapters can stand beside: name, inputs, outputs, and how many there are of it.
    fn adaptable(&self, layer: u64) -> Vec<(&'static str, u64, u64, u64)> {
        let mut list = match self.attention {
            Attention::Grouped { .. } => {
                let (q, k, v) = self.attention.widths();
                vec![
                    ("q", self.hidden, q, 1),
                    ("k", self.hidden, k, 1),
                    ("v", self.hidden, v, 1),
                    ("o", q, self.hidden, 1),
                ]
            }
            Attention::Latent { heads, query_rank, kv_rank, nope_dim, rope_dim, value_dim } => {
                let query = heads * (nope_dim + rope_dim);
                let mut list = vec![
                    ("kv_down", self.hidden, kv_rank + rope_dim, 1),
                    ("kv_up", kv_rank, heads * (nope_dim + value_dim), 1),
                    ("o", heads * value_dim, self.hidden, 1),
                ];
                if query_rank > 0 {
                    list.extend([("q_down", self.hidden, query_rank, 1), ("q_up", query_rank, query, 1)]);
                } else {
                    list.push(("q", self.hidden, query, 1));
                }
                list
            }
        };
        let mut mlp = |ffn: u64, count: u64| {
            if self.gated {
                list.push(("gate", self.hidden, ffn, count));
            }
            list.extend([("up", self.hidden, ffn, count), ("down", ffn, self.hidden, count)]);
        };
        match self.experts {
            Some(experts) if self.routed(layer) => {
                mlp(experts.ffn, experts.count);
                if experts.shared_ffn > 0 {
                    mlp(experts.shared_ffn, 1);
                }
            }
            _ => mlp(self.ffn, 1),
        }
        list
    }

    /// Parameters of adapters of a rank beside these matrices of every block, or beside all.
    ///
    /// # Errors
    /// When no block has a matrix of that name.
    pub fn adapter_parameters(&self, rank: u64, matrices: Option<&[&str]>) -> Result<u64, AdapterError> {
        let blocks: Vec<_> = (0..self.layers).map(|layer| self.adaptable(layer)).collect();
        for name in matrices.unwrap_or_default() {
            if !blocks.iter().flatten().any(|(known, ..)| known == name) {
                let mut known: Vec<&str> = blocks.iter().flatten().map(|(known, ..)| *known).collect();
                known.sort_unstable();
                known.dedup();
                return Err(AdapterError {
                    name: (*name).to_owned(),
                    model: self.name.clone(),
                    known: known.join(", "),
                });
            }
        }
        let chosen = |name: &str| matrices.is_none_or(|matrices| matrices.contains(&name));
        let parameters = blocks.iter().flatten().filter(|(name, ..)| chosen(name));
        Ok(parameters.map(|(_, inputs, outputs, count)| count * rank * (inputs + outputs)).sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Llama 2 7B with rank 8: 4,194,304 on queries and values, as PEFT prints it; 19,988,480 on all matrices.
    #[test]
    fn parameters_of_known_adapters() {
        let model = Architecture::load("llama-2-7b").unwrap();
        assert_eq!(model.adapter_parameters(8, Some(&["q", "v"])), Ok(4_194_304));
        assert_eq!(model.adapter_parameters(8, None), Ok(19_988_480));
        // 32 layers of 4096 x (4096 and 1024) on Llama 3 8B, rank 16.
        let model = Architecture::load("llama-3-8b").unwrap();
        assert_eq!(model.adapter_parameters(16, Some(&["q", "v"])), Ok(32 * 16 * (8192 + 5120)));
    }

    #[test]
    fn a_matrix_that_is_not_there_is_named_with_those_that_are() {
        let error = Architecture::load("llama-2-7b").unwrap().adapter_parameters(8, Some(&["q", "x"])).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("\"x\"") && text.contains("down, gate, k, o, q, up, v"), "{text}");
    }
}
