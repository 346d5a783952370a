//! Times of kernel calls as they happen in a run, gathered by operator and shape: what `calibrate --from-trace` learns
//! from.

use paceline_kernels::{AttentionShape, Call};
use paceline_profiles::{DType, KernelKey, KernelOp};
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;
use std::collections::HashMap;

/// Samples kept per key; later ones replace the oldest.
const KEPT: usize = 256;

/// How often a kernel ran and how long it took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KernelTimes {
    /// Operator and shape.
    pub key: KernelKey,
    /// Calls.
    pub count: u64,
    /// Sum over all calls.
    pub total_seconds: f64,
    /// Fastest call.
    pub least_seconds: f64,
    /// Median of the latest calls (up to 256 of each rank).
    pub median_seconds: f64,
}

#[derive(Debug, Clone, Default)]
struct Samples {
    count: u64,
    total: u64,
    least: u64,
    recent: Vec<u64>,
}

/// The kernel times of one rank.
#[derive(Debug, Default)]
pub(crate) struct KernelTally {
    samples: HashMap<KernelKey, Samples>,
}

impl KernelTally {
    pub fn add(&mut self, call: &Call, nanoseconds: u64) {
        let samples = self.samples.entry(kernel_key(call)).or_default();
        samples.least = if samples.count == 0 { nanoseconds } else { samples.least.min(nanoseconds) };
        samples.total += nanoseconds;
        if samples.recent.len() < KEPT {
            samples.recent.push(nanoseconds);
        } else {
            samples.recent[samples.count as usize % KEPT] = nanoseconds;
        }
        samples.count += 1;
    }

    /// Sum over all calls, in nanoseconds.
    pub fn total(&self) -> u64 {
        self.samples.values().map(|samples| samples.total).sum()
    }

    pub fn clear(&mut self) {
        self.samples.clear();
    }

    /// The times of several ranks together, in order of key.
    pub fn merge<'a>(tallies: impl Iterator<Item = &'a KernelTally>) -> Vec<KernelTimes> {
        let mut all: HashMap<&KernelKey, Samples> = HashMap::new();
        for (key, samples) in tallies.flat_map(|tally| &tally.samples) {
            let sum = all.entry(key).or_insert_with(|| Samples { least: u64::MAX, ..Samples::default() });
            sum.count += samples.count;
            sum.total += samples.total;
            sum.least = sum.least.min(samples.least);
            sum.recent.extend_from_slice(&samples.recent);
        }
        let mut times: Vec<KernelTimes> = all
            .into_iter()
            .map(|(key, mut samples)| {
                let middle = samples.recent.len() / 2;
                let median = *samples.recent.select_nth_unstable(middle).1;
                KernelTimes {
                    key: key.clone(),
                    count: samples.count,
                    total_seconds: samples.total as f64 * 1e-9,
                    least_seconds: samples.least as f64 * 1e-9,
                    median_seconds: median as f64 * 1e-9,
                }
            })
            .collect();
        times.sort_by(|a, b| a.key.cmp(&b.key));
        times
    }
}

/// The name under which the time of a call is stored.
pub fn kernel_key(call: &Call) -> KernelKey {
    shape_key(call).with(number_format(call))
}

/// Values as their kind, with 32-bit gradients of parameters apart.
fn number_format(call: &Call) -> DType {
    use paceline_kernels::DType::{BF16, F32};
    let (values, result) = match *call {
        Call::MatMul { a, c, .. } => (a, Some(c)),
        Call::BiasGradient { dy, d_bias, .. } => (dy, Some(d_bias)),
        Call::NormBackwardWeight { x, d_gamma, .. } => (x, Some(d_gamma)),
        Call::EmbeddingBackward { d_out, d_table, .. } => (d_out, Some(d_table)),
        Call::HeadBackward { x, d_weight, .. } => (x, d_weight),
        Call::Cast { from, to } => (if from.dtype() == BF16 { from } else { to }, None),
        // The weights are 32-bit always; a narrow copy may come with them.
        Call::AdamW { gradients, rounded: Some(rounded), .. } => (rounded, Some(gradients)),
        Call::AdamW { gradients, .. } | Call::AdamWAhead { gradients, .. } => (gradients, None),
        Call::ProjectBackGelu { dy, .. } => (dy, None),
        Call::Project { x, .. }
        | Call::AddBias { x, .. }
        | Call::Norm { x, .. }
        | Call::NormBackwardInput { x, .. }
        | Call::HeadLoss { x, .. }
        | Call::Gelu { x, .. }
        | Call::GeluBackward { x, .. }
        | Call::Add { x, .. }
        | Call::Zero { x }
        | Call::SumSquares { x, .. } => (x, None),
        Call::Rotary { qkv, .. } | Call::Attention { qkv, .. } | Call::AttentionBackward { qkv, .. } => (qkv, None),
        Call::SwiGlu { gate_up, .. } | Call::SwiGluBackward { gate_up, .. } => (gate_up, None),
        Call::Embedding { table, .. } => (table, None),
        Call::Sum { a, .. } => (a, None),
        Call::Copy { from, .. } => (from, None),
    };
    match (values.dtype(), result.map(|result| result.dtype())) {
        (BF16, Some(F32)) => DType::Bf16F32,
        (BF16, _) => DType::Bf16,
        _ => DType::F32,
    }
}

fn shape_key(call: &Call) -> KernelKey {
    use KernelOp as Op;
    let attention = |op, s: &AttentionShape| key(op, &[s.batch, s.seq, s.heads, s.kv_heads, s.head_dim]);
    match *call {
        Call::MatMul { m, n, k, transpose_a, transpose_b, .. } => {
            let op = match (transpose_a, transpose_b) {
                (false, false) => Op::MatmulNn,
                (false, true) => Op::MatmulNt,
                // Transposing both is the transpose of an untransposed product; no pass uses it.
                (true, _) => Op::MatmulTn,
            };
            key(op, &[m, n, k])
        }
        Call::Project { bias, base, input, m, n, k, .. } => {
            let op = match (bias, base, input) {
                (Some(_), None, None) => Op::ProjectBias,
                (Some(_), Some(_), _) => Op::ProjectBiasAdd,
                (_, None, Some(_)) => Op::ProjectBiasGelu,
                (None, Some(_), _) => Op::ProjectAdd,
                (None, None, None) => Op::MatmulNt,
            };
            key(op, &[m, n, k])
        }
        Call::ProjectBackGelu { m, n, k, .. } => key(Op::ProjectBackGelu, &[m, n, k]),
        Call::AddBias { rows, cols, .. } => key(Op::AddBias, &[rows, cols]),
        Call::BiasGradient { rows, cols, .. } => key(Op::BiasGradient, &[rows, cols]),
        Call::Norm { beta, rows, cols, .. } => {
            key(if beta.is_some() { Op::LayerNorm } else { Op::RmsNorm }, &[rows, cols])
        }
        Call::NormBackwardInput { layer_norm, rows, cols, .. } => {
            key(if layer_norm { Op::LayerNormBackwardInput } else { Op::RmsNormBackwardInput }, &[rows, cols])
        }
        Call::NormBackwardWeight { d_beta, rows, cols, .. } => {
            let op = if d_beta.is_some() { Op::LayerNormBackwardWeight } else { Op::RmsNormBackwardWeight };
            key(op, &[rows, cols])
        }
        Call::Rotary { shape, .. } => {
            key(Op::Rotary, &[shape.batch * shape.seq, (shape.heads + shape.kv_heads) * shape.head_dim])
        }
        Call::Attention { shape, .. } => attention(Op::Attention, &shape),
        Call::AttentionBackward { shape, .. } => attention(Op::AttentionBackward, &shape),
        Call::SwiGlu { rows, cols, .. } => key(Op::SwiGlu, &[rows, cols]),
        Call::SwiGluBackward { rows, cols, .. } => key(Op::SwiGluBackward, &[rows, cols]),
        Call::Gelu { x, .. } => key(Op::Gelu, &[x.len() as u32]),
        Call::GeluBackward { x, .. } => key(Op::GeluBackward, &[x.len() as u32]),
        Call::Embedding { rows, cols, .. } => key(Op::Embedding, &[rows, cols]),
        Call::EmbeddingBackward { rows, cols, .. } => key(Op::EmbeddingBackward, &[rows, cols]),
        Call::HeadLoss { rows, cols, vocab, chunk, .. } => key(Op::HeadLoss, &[rows, cols, vocab, chunk]),
        Call::HeadBackward { dx, d_weight, rows, cols, vocab, chunk, .. } => {
            let op = match (dx, d_weight) {
                (Some(_), None) => Op::HeadBackwardInput,
                (None, _) => Op::HeadBackwardWeight,
                (Some(_), Some(_)) => Op::HeadBackward,
            };
            key(op, &[rows, cols, vocab, chunk])
        }
        Call::Add { x, .. } => key(Op::Add, &[x.len() as u32]),
        Call::Sum { out, .. } => key(Op::Sum, &[out.len() as u32]),
        Call::Cast { from, to } if from.dtype() != to.dtype() => key(Op::Cast, &[to.len() as u32]),
        Call::Copy { to, .. } | Call::Cast { to, .. } => key(Op::Copy, &[to.len() as u32]),
        Call::Zero { x } => key(Op::Zero, &[x.len() as u32]),
        Call::SumSquares { x, .. } => key(Op::SumSquares, &[x.len() as u32]),
        Call::AdamW { parameters, .. } => key(Op::AdamW, &[parameters.len() as u32]),
        Call::AdamWAhead { parameters, .. } => key(Op::AdamWAhead, &[parameters.len() as u32]),
    }
}

fn key(op: KernelOp, dims: &[u32]) -> KernelKey {
    KernelKey { op, dims: SmallVec::from_slice(dims), dtype: DType::F32 }
}
