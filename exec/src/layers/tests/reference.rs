//! A decoder transformer written down a second time, as plainly as possible and in double precision: no kernels, no fused
//! matrices beyond the layout of the parameters, no online softmax, no backward. Gradients come from central differences.

use paceline_sim::model::{Activation, ModelConfig, Norm, Positions};
use std::collections::BTreeMap;

type Rows = Vec<Vec<f64>>;

pub struct Reference {
    pub config: ModelConfig,
    /// Parameters by name, row-major.
    pub values: BTreeMap<String, Vec<f64>>,
    pub seq: usize,
    pub tokens: Vec<u32>,
    pub targets: Vec<u32>,
}

impl Reference {
    /// Mean loss over all tokens.
    pub fn loss(&self) -> f64 {
        let sequences = self.tokens.chunks(self.seq).zip(self.targets.chunks(self.seq));
        sequences.map(|(tokens, targets)| self.sequence(tokens, targets)).sum::<f64>() / self.tokens.len() as f64
    }

    /// Derivative of the loss by one parameter.
    pub fn gradient(&mut self, name: &str, element: usize) -> f64 {
        let step = 1e-5;
        let mut at = |offset: f64| {
            self.values.get_mut(name).unwrap()[element] += offset;
            let loss = self.loss();
            self.values.get_mut(name).unwrap()[element] -= offset;
            loss
        };
        (at(step) - at(-step)) / (2.0 * step)
    }

    fn sequence(&self, tokens: &[u32], targets: &[u32]) -> f64 {
        let hidden = self.config.hidden as usize;
        let table = &self.values["embedding.weight"];
        let mut x: Rows = tokens.iter().map(|&t| table[t as usize * hidden..][..hidden].to_vec()).collect();
        if let Some(positions) = self.values.get("embedding.positions") {
            add(&mut x, &positions.chunks(hidden).map(<[f64]>::to_vec).collect());
        }
        for block in 0..self.config.layers {
            let part = |name: &str| format!("blocks.{block}.{name}");
            let normed = self.norm(&x, &part("attention.norm"));
            let attended = self.attention(self.linear(&normed, &part("attention.qkv")));
            add(&mut x, &self.linear(&attended, &part("attention.output")));
            let normed = self.norm(&x, &part("mlp.norm"));
            let activated = match self.config.activation {
                Activation::SwiGlu => {
                    self.linear(&normed, &part("mlp.gate_up")).iter().map(|row| swiglu(row)).collect()
                }
                Activation::Gelu => {
                    let up = self.linear(&normed, &part("mlp.up"));
                    up.iter().map(|row| row.iter().map(|&x| gelu(x)).collect()).collect()
                }
            };
            add(&mut x, &self.linear(&activated, &part("mlp.down")));
        }
        let tied = self.config.tied_embeddings;
        let logits = self.linear(&self.norm(&x, "head.norm"), if tied { "embedding" } else { "head" });
        let loss = |row: &Vec<f64>, target: u32| row.iter().map(|l| l.exp()).sum::<f64>().ln() - row[target as usize];
        logits.iter().zip(targets).map(|(row, &target)| loss(row, target)).sum()
    }

    fn norm(&self, x: &Rows, name: &str) -> Rows {
        let weight = &self.values[&format!("{name}.weight")];
        let bias = self.values.get(&format!("{name}.bias"));
        let row = |x: &Vec<f64>| {
            let width = x.len() as f64;
            let mean = if self.config.norm == Norm::LayerNorm { x.iter().sum::<f64>() / width } else { 0.0 };
            let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width;
            let scale = 1.0 / (variance + self.config.norm_epsilon).sqrt();
            (0..x.len()).map(|n| (x[n] - mean) * scale * weight[n] + bias.map_or(0.0, |bias| bias[n])).collect()
        };
        x.iter().map(row).collect()
    }

    /// With what adapters add to the rows of its matrix.
    fn linear(&self, x: &Rows, name: &str) -> Rows {
        let mut out = self.matrix(x, name);
        let ModelConfig { heads, kv_heads, head_dim, intermediate, .. } = self.config;
        let (query, key) = ((heads * head_dim) as usize, (kv_heads * head_dim) as usize);
        let beside = match name.rsplit_once('.') {
            Some((room, "qkv")) => {
                vec![(format!("{room}.q"), 0), (format!("{room}.k"), query), (format!("{room}.v"), query + key)]
            }
            Some((room, "output")) => vec![(format!("{room}.o"), 0)],
            Some((room, "gate_up")) => vec![(format!("{room}.gate"), 0), (format!("{room}.up"), intermediate as usize)],
            Some((room, part @ ("up" | "down"))) => vec![(format!("{room}.{part}"), 0)],
            _ => Vec::new(),
        };
        for (adapter, first) in beside {
            let of = |side: &str| self.values.get(&format!("{adapter}.adapter.{side}"));
            let (Some(a), Some(b)) = (of("a"), of("b")) else { continue };
            for (x, out) in x.iter().zip(&mut out) {
                let inner: Vec<f64> = a.chunks(x.len()).map(|a| a.iter().zip(x).map(|(a, x)| a * x).sum()).collect();
                for (n, b) in b.chunks(inner.len()).enumerate() {
                    out[first + n] += b.iter().zip(&inner).map(|(b, u)| b * u).sum::<f64>();
                }
            }
        }
        out
    }

    fn matrix(&self, x: &Rows, name: &str) -> Rows {
        let weight = &self.values[&format!("{name}.weight")];
        let bias = self.values.get(&format!("{name}.bias"));
        let row = |x: &Vec<f64>| {
            let dots = weight.chunks(x.len()).map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>());
            dots.enumerate().map(|(n, dot)| dot + bias.map_or(0.0, |bias| bias[n])).collect()
        };
        x.iter().map(row).collect()
    }

    fn attention(&self, mut qkv: Rows) -> Rows {
        let ModelConfig { heads, kv_heads, head_dim, .. } = self.config;
        let (heads, kv_heads, width) = (heads as usize, kv_heads as usize, head_dim as usize);
        if let Positions::Rotary { theta } = self.config.positions {
            for (position, row) in qkv.iter_mut().enumerate() {
                row[..(heads + kv_heads) * width].chunks_mut(width).for_each(|head| turn(head, position, theta));
            }
        }
        let head = |row: usize, n: usize| &qkv[row][n * width..(n + 1) * width];
        let attend = |row: usize| {
            let of_head = |h: usize| {
                let shared = h / (heads / kv_heads);
                let score = |other: usize| {
                    let dot: f64 = head(row, h).iter().zip(head(other, heads + shared)).map(|(q, k)| q * k).sum();
                    (dot / (width as f64).sqrt()).exp()
                };
                let scores: Vec<f64> = (0..=row).map(score).collect();
                let total: f64 = scores.iter().sum();
                let value = |other: usize, n: usize| scores[other] * head(other, heads + kv_heads + shared)[n];
                (0..width).map(|n| (0..=row).map(|other| value(other, n)).sum::<f64>() / total).collect::<Vec<f64>>()
            };
            (0..heads).flat_map(of_head).collect()
        };
        (0..qkv.len()).map(attend).collect()
    }
}

/// Rotary embedding of one head (Su et al. 2021), in the half-split order of Hugging Face's llama.
fn turn(head: &mut [f64], position: usize, theta: f64) {
    let half = head.len() / 2;
    for n in 0..half {
        let angle = position as f64 * theta.powf(-(n as f64) / half as f64);
        let (a, b) = (head[n], head[n + half]);
        head[n] = a * angle.cos() - b * angle.sin();
        head[n + half] = b * angle.cos() + a * angle.sin();
    }
}

fn add(x: &mut Rows, y: &Rows) {
    for (x, y) in x.iter_mut().zip(y) {
        x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    }
}

fn swiglu(gate_up: &[f64]) -> Vec<f64> {
    let (gate, up) = gate_up.split_at(gate_up.len() / 2);
    gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()
}

fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
}
