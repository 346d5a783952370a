//! Low-rank adapters beside frozen matrices (LoRA, Hu et al., arXiv 2106.09685): a matrix of k columns and d rows gets two of
//! rank r, with r (k + d) parameters that are trained.

use super::{Architecture, Attention, Layout};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Adapters of one rank beside matrices of every block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adapters {
    /// Their rank.
    pub rank: u64,
    /// Beside which matrices; when empty, one beside each of them. `qkv` and `gate_up` are one adapter beside several matrices that
    /// read the same input, as Megatron Core has them (`linear_qkv`, `linear_fc1`).
    #[serde(default)]
    pub beside: Vec<String>,
}

impl Adapters {
    /// Whether one stands beside the matrices of a name.
    pub fn stand_beside(&self, name: &str) -> bool {
        if self.beside.is_empty() { !FUSED.contains(&name) } else { self.beside.iter().any(|known| known == name) }
    }
}

/// Names of several matrices together.
const FUSED: [&str; 2] = ["qkv", "gate_up"];

/// Matrices that do not exist.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("there is no matrix {name:?} in {model}; its matrices are {known}")]
pub struct AdapterError {
    /// The name that was given.
    pub name: String,
    model: String,
    known: String,
}

/// How tensor parallelism cuts a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    Outputs,
    Inputs,
    Not,
}

/// Which tokens a matrix sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rows {
    All,
    /// Those that the router sends to its expert.
    Routed,
}

/// Matrices of a block that adapters can stand beside.
#[derive(Debug, Clone, Copy)]
struct Matrix {
    name: &'static str,
    inputs: u64,
    outputs: u64,
    /// How many there are of it.
    count: u64,
    cut: Cut,
    rows: Rows,
}

/// An adapter beside a matrix on a tensor-parallel rank: `[rows, inputs]` by `A`, then by `B` to `[rows, outputs]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Beside {
    /// Rows that each of them sees.
    pub rows: f64,
    /// Columns of the input.
    pub inputs: f64,
    /// Columns of the output.
    pub outputs: f64,
    /// How many the rank has of it.
    pub count: f64,
}

impl Architecture {
    /// Parameters of each matrix of a block that every rank of an expert group holds, in the order of a pass.
    pub fn dense_matrices(&self, layer: u64) -> Vec<u64> {
        let own = |matrix: &Matrix| matrix.count == 1 && !FUSED.contains(&matrix.name);
        let single = self.adaptable(layer).into_iter().filter(own);
        single.map(|matrix| matrix.inputs * matrix.outputs).collect()
    }

    /// The matrices of a block that adapters can stand beside, and those together that go by one name.
    fn adaptable(&self, layer: u64) -> Vec<Matrix> {
        let dense = |name, inputs, outputs, cut| Matrix { name, inputs, outputs, count: 1, cut, rows: Rows::All };
        let mut list = match self.attention {
            Attention::Grouped { .. } => {
                let (q, k, v) = self.attention.widths();
                vec![
                    dense("q", self.hidden, q, Cut::Outputs),
                    dense("k", self.hidden, k, Cut::Outputs),
                    dense("v", self.hidden, v, Cut::Outputs),
                    dense("o", q, self.hidden, Cut::Inputs),
                    dense("qkv", self.hidden, q + k + v, Cut::Outputs),
                ]
            }
            Attention::Latent { heads, query_rank, kv_rank, nope_dim, rope_dim, value_dim } => {
                let query = heads * (nope_dim + rope_dim);
                let mut list = vec![
                    dense("kv_down", self.hidden, kv_rank + rope_dim, Cut::Not),
                    dense("kv_up", kv_rank, heads * (nope_dim + value_dim), Cut::Outputs),
                    dense("o", heads * value_dim, self.hidden, Cut::Inputs),
                ];
                if query_rank > 0 {
                    list.push(dense("q_down", self.hidden, query_rank, Cut::Not));
                    list.push(dense("q_up", query_rank, query, Cut::Outputs));
                } else {
                    list.push(dense("q", self.hidden, query, Cut::Outputs));
                }
                list
            }
        };
        let mut mlp = |ffn: u64, count: u64, rows: Rows| {
            // Of experts the tensor ranks share the rows, not the matrices.
            let cut = |cut| if rows == Rows::Routed { Cut::Not } else { cut };
            let matrix = |name, inputs, outputs, by| Matrix { name, inputs, outputs, count, cut: cut(by), rows };
            if self.gated {
                list.push(matrix("gate", self.hidden, ffn, Cut::Outputs));
            }
            list.push(matrix("up", self.hidden, ffn, Cut::Outputs));
            list.push(matrix("down", ffn, self.hidden, Cut::Inputs));
            if self.gated {
                list.push(matrix("gate_up", self.hidden, 2 * ffn, Cut::Outputs));
            }
        };
        match self.experts {
            Some(experts) if self.routed(layer) => {
                mlp(experts.ffn, experts.count, Rows::Routed);
                if experts.shared_ffn > 0 {
                    mlp(experts.shared_ffn, 1, Rows::All);
                }
            }
            _ => mlp(self.ffn, 1, Rows::All),
        }
        list
    }

    /// Parameters of adapters in the whole model.
    ///
    /// # Errors
    /// When no block has a matrix of a name.
    pub fn adapter_parameters(&self, adapters: &Adapters) -> Result<u64, AdapterError> {
        let blocks: Vec<_> = (0..self.layers).map(|layer| self.adaptable(layer)).collect();
        for name in &adapters.beside {
            if !blocks.iter().flatten().any(|matrix| matrix.name == name) {
                let mut known: Vec<&str> = blocks.iter().flatten().map(|matrix| matrix.name).collect();
                known.sort_unstable();
                known.dedup();
                return Err(AdapterError { name: name.clone(), model: self.name.clone(), known: known.join(", ") });
            }
        }
        let chosen = blocks.iter().flatten().filter(|matrix| adapters.stand_beside(matrix.name));
        Ok(chosen.map(|matrix| matrix.count * adapters.rank * (matrix.inputs + matrix.outputs)).sum())
    }

    /// The adapters of a block on a rank of a layout; none where the layout has none.
    pub fn adapters_of(&self, layout: &Layout, layer: u64) -> Vec<Beside> {
        let Some(adapters) = &layout.adapters else { return Vec::new() };
        let matrices = self.adaptable(layer).into_iter().filter(|matrix| adapters.stand_beside(matrix.name));
        let ways = |yes: bool| if yes { layout.tp as f64 } else { 1.0 };
        matrices
            .map(|matrix| {
                let (rows, count) = match (matrix.rows, self.experts) {
                    (Rows::Routed, Some(experts)) => layout.expert_rows(experts),
                    _ => (layout.tokens(), 1.0),
                };
                Beside {
                    rows,
                    inputs: matrix.inputs as f64 / ways(matrix.cut == Cut::Inputs),
                    outputs: matrix.outputs as f64 / ways(matrix.cut == Cut::Outputs),
                    count,
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lora(rank: u64, beside: &[&str]) -> Adapters {
        Adapters { rank, beside: beside.iter().map(|name| (*name).to_owned()).collect() }
    }

    /// What a rank has of them: rows by columns, and columns cut where the matrix is.
    #[test]
    fn adapters_are_cut_like_their_matrices() {
        let model = Architecture::load("llama-3-8b").unwrap();
        let layout = Layout { tp: 4, adapters: Some(lora(16, &["k", "down"])), ..Layout::single(2048, 2) };
        let beside = |inputs, outputs| Beside { rows: 4096.0, inputs, outputs, count: 1.0 };
        assert_eq!(model.adapters_of(&layout, 0), [beside(4096.0, 256.0), beside(3584.0, 4096.0)]);
        assert!(model.adapters_of(&Layout::single(2048, 2), 0).is_empty());
        // Experts: top 2 of 8 on two ranks, four each.
        let model = Architecture::load("mixtral-8x7b").unwrap();
        let layout = Layout { tp: 1, dp: 2, ep: 2, ..Layout { adapters: Some(lora(16, &["up"])), ..layout } };
        let experts = model.adapters_of(&layout, 0);
        assert_eq!(experts, [Beside { rows: 4096.0 * 2.0 / 4.0, inputs: 4096.0, outputs: 14336.0, count: 4.0 }]);
    }

    /// Llama 2 7B with rank 8: 4,194,304 on queries and values, as PEFT prints it; 19,988,480 on all matrices.
    #[test]
    fn parameters_of_known_adapters() {
        let model = Architecture::load("llama-2-7b").unwrap();
        assert_eq!(model.adapter_parameters(&lora(8, &["q", "v"])), Ok(4_194_304));
        assert_eq!(model.adapter_parameters(&lora(8, &[])), Ok(19_988_480));
        // Of the fused matrices: 4096 x 12288 and 4096 x 22016.
        assert_eq!(model.adapter_parameters(&lora(8, &["qkv"])), Ok(32 * 8 * (4096 + 12288)));
        assert_eq!(model.adapter_parameters(&lora(8, &["gate_up"])), Ok(32 * 8 * (4096 + 22016)));
        // 32 layers of 4096 x (4096 and 1024) on Llama 3 8B, rank 16.
        let model = Architecture::load("llama-3-8b").unwrap();
        assert_eq!(model.adapter_parameters(&lora(16, &["q", "v"])), Ok(32 * 16 * (8192 + 5120)));
    }

    #[test]
    fn a_matrix_that_is_not_there_is_named_with_those_that_are() {
        let error = Architecture::load("llama-2-7b").unwrap().adapter_parameters(&lora(8, &["q", "x"])).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("\"x\"") && text.contains("down, gate, gate_up, k, o, q, qkv, up, v"), "{text}");
    }
}
