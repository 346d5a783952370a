//! The operators as data. Matrices are row-major; `rows` counts tokens of a microbatch; weights are `[out, in]` as in
//! PyTorch. "Accumulates" means `+=` on the operand.
//!
//! Activations and weights of a call are all `F32` or all `BF16` (its *values*); sums are `F32` inside either way. Gradients of
//! weights are `F32`, or `BF16` where values are. Statistics, logits, losses, master weights and moments are always `F32`.

use crate::device::View;
use smallvec::{SmallVec, smallvec};
use std::ops::Range;

/// Shape of causal self-attention over a fused projection: row = token, columns = all query heads, then all key heads,
/// then all value heads, each `head_dim` wide.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AttentionShape {
    /// Sequences.
    pub batch: u32,
    /// Tokens per sequence.
    pub seq: u32,
    /// Query heads.
    pub heads: u32,
    /// Key/value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: u32,
    /// Width of a head.
    pub head_dim: u32,
}

/// AdamW hyper-parameters of one update (Loshchilov & Hutter 2019, decoupled weight decay).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root.
    pub epsilon: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// 1-based step, for bias correction.
    pub step: u32,
    /// Clip the gradient to this global norm (`None`: no clipping); the norm is read from the call's `norm` view.
    pub clip: Option<f32>,
}

impl AdamW {
    /// What gradients are multiplied by so that their global norm does not exceed `clip`, as PyTorch's `clip_grad_norm_` does;
    /// 1 where nothing is clipped. A norm that is not a number stays visible in the result.
    pub fn clip_coefficient(&self, squared_norm: f64) -> f32 {
        let Some(clip) = self.clip else { return 1.0 };
        let coefficient = f64::from(clip) / (squared_norm.sqrt() + 1e-6);
        if coefficient >= 1.0 { 1.0 } else { coefficient as f32 }
    }

    /// The same for parameters that decay, or that do not.
    pub(crate) fn decaying(self, decay: bool) -> AdamW {
        AdamW { weight_decay: if decay { self.weight_decay } else { 0.0 }, ..self }
    }
}

/// Which elements of an update decay: runs that do and runs that do not, in turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decays {
    first: bool,
    count: u8,
    borders: [u32; Decays::MOST],
}

impl Decays {
    /// Borders between runs that one call can have.
    pub const MOST: usize = 15;

    /// All elements, or none.
    pub const fn all(decay: bool) -> Decays {
        Decays { first: decay, count: 0, borders: [0; Decays::MOST] }
    }

    /// The first run decays or not, and at each of `borders` (elements, rising) another run begins. `None` where there are more than
    /// [`Decays::MOST`], or they do not rise.
    pub fn new(first: bool, borders: &[u32]) -> Option<Decays> {
        let mut decays = Decays { count: borders.len() as u8, ..Decays::all(first) };
        decays.borders.get_mut(..borders.len())?.copy_from_slice(borders);
        borders.is_sorted_by(|a, b| a < b).then_some(decays)
    }

    /// Whether the first run decays.
    pub fn first(&self) -> bool {
        self.first
    }

    /// Where a run begins, but the first.
    pub fn borders(&self) -> &[u32] {
        &self.borders[..usize::from(self.count)]
    }

    /// The runs of `len` elements, and whether they decay.
    pub fn runs(&self, len: usize) -> impl Iterator<Item = (Range<usize>, bool)> + '_ {
        let borders = self.borders().iter().map(|&border| border as usize);
        let starts = std::iter::once(0).chain(borders.clone());
        let ends = borders.chain(std::iter::once(len));
        let turns = std::iter::successors(Some(self.first), |before| Some(!before));
        starts.zip(ends).map(|(start, end)| start..end).zip(turns)
    }
}

/// One operator with its operands.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Call {
    /// `c[m,n] (+)= op(a) * op(b)`; `a` is `[m,k]` (`[k,m]` if transposed), `b` is `[k,n]` (`[n,k]` if transposed). `c` may be
    /// `F32` where `a` and `b` are `BF16`.
    MatMul { a: View, b: View, c: View, m: u32, n: u32, k: u32, transpose_a: bool, transpose_b: bool, accumulate: bool },
    /// `out[m,n] = x[m,k] weight[n,k]^T (+ bias[n]) (+ base[m,n])`; where `input` is given, it receives the sum and `out` its
    /// [`Call::Gelu`] (then there is no `base`).
    Project {
        x: View,
        weight: View,
        bias: Option<View>,
        base: Option<View>,
        input: Option<View>,
        out: View,
        m: u32,
        n: u32,
        k: u32,
    },
    /// Overwrites `d_input[m,n]` with the gradient of the input of a GELU whose output goes through a projection:
    /// `gelu'(input) * (dy[m,k] weight[k,n])`.
    ProjectBackGelu { dy: View, weight: View, input: View, d_input: View, m: u32, n: u32, k: u32 },
    /// `x[rows,cols] += bias[cols]`.
    AddBias { x: View, bias: View, rows: u32, cols: u32 },
    /// `d_bias[cols] += sum over rows of dy`.
    BiasGradient { dy: View, d_bias: View, rows: u32, cols: u32 },
    /// RMSNorm (`beta` and mean absent) of each row: `out = (x - mean) * rstd * gamma + beta`. `stats` is `[rows]` (rstd), or
    /// `[rows, 2]` (mean, rstd) for LayerNorm, which is the case when `beta` is given.
    Norm { x: View, gamma: View, beta: Option<View>, out: View, stats: View, rows: u32, cols: u32, epsilon: f32 },
    /// Accumulates the input gradient of [`Call::Norm`] into `dx` (the residual gradient is already there).
    NormBackwardInput { x: View, gamma: View, stats: View, dy: View, dx: View, rows: u32, cols: u32, layer_norm: bool },
    /// Accumulates the weight gradients of [`Call::Norm`]; `d_beta` given means LayerNorm.
    NormBackwardWeight { x: View, stats: View, dy: View, d_gamma: View, d_beta: Option<View>, rows: u32, cols: u32 },
    /// Rotates queries and keys of a fused projection in place (half-split convention of Hugging Face llama);
    /// `inverse` rotates back, which is its backward.
    Rotary { qkv: View, shape: AttentionShape, theta: f32, inverse: bool },
    /// Causal attention with an online softmax; `lse` is `[batch, heads, seq]`; the score matrix is never kept.
    Attention { qkv: View, out: View, lse: View, shape: AttentionShape },
    /// Backward of [`Call::Attention`]: overwrites `d_qkv`; `scratch` holds `attention_scratch(shape)` floats.
    AttentionBackward {
        qkv: View,
        out: View,
        lse: View,
        d_out: View,
        d_qkv: View,
        scratch: View,
        shape: AttentionShape,
    },
    /// `out[rows,cols] = silu(gate) * up` with `gate_up[rows, 2*cols]` holding gate then up.
    SwiGlu { gate_up: View, out: View, rows: u32, cols: u32 },
    /// Overwrites `d_gate_up`.
    SwiGluBackward { gate_up: View, d_out: View, d_gate_up: View, rows: u32, cols: u32 },
    /// `out = gelu(x)`, tanh approximation.
    Gelu { x: View, out: View },
    /// Overwrites `d_x`.
    GeluBackward { x: View, d_out: View, d_x: View },
    /// `out[row] = table[token]` (`+ positions[row % seq]`).
    Embedding { tokens: View, table: View, positions: Option<View>, out: View, rows: u32, cols: u32, seq: u32 },
    /// Accumulates into `d_table` (and `d_positions`).
    EmbeddingBackward {
        tokens: View,
        d_out: View,
        d_table: View,
        d_positions: Option<View>,
        rows: u32,
        cols: u32,
        seq: u32,
    },
    /// Output projection and cross-entropy, `chunk` rows at a time so that at most `chunk * vocab` logits exist (in
    /// `scratch`, see [`head_scratch`]): writes `lse[rows]`, and the mean loss over rows to `loss[0]`.
    HeadLoss {
        x: View,
        weight: View,
        targets: View,
        lse: View,
        loss: View,
        scratch: View,
        rows: u32,
        cols: u32,
        vocab: u32,
        chunk: u32,
    },
    /// Recomputes logits, `chunk * vocab` at a time; overwrites `dx` (if given) with, and accumulates into `d_weight` (if
    /// given), the gradient of `scale * sum of row losses`.
    HeadBackward {
        x: View,
        weight: View,
        targets: View,
        lse: View,
        dx: Option<View>,
        d_weight: Option<View>,
        scratch: View,
        rows: u32,
        cols: u32,
        vocab: u32,
        chunk: u32,
        scale: f32,
    },
    /// `into += x`, of values or of `F64`.
    Add { x: View, into: View },
    /// `out = a + b`.
    Sum { a: View, b: View, out: View },
    /// `to = from`.
    Copy { from: View, to: View },
    /// `to = from`, rounded to nearest even where `to` is the narrower of `F32` and `BF16`.
    Cast { from: View, to: View },
    /// `x = 0`.
    Zero { x: View },
    /// `out[0] += sum of x^2`, accumulated and stored as `f64`.
    SumSquares { x: View, out: View },
    /// Updates `parameters` and moments in place and zeroes `gradients`; `norm[0]` (`f64`) is the squared global norm. `rounded`,
    /// where it is given, receives the new parameters in `BF16`. Elements outside of `decays` do not decay.
    AdamW {
        parameters: View,
        gradients: View,
        first: View,
        second: View,
        rounded: Option<View>,
        norm: View,
        decays: Decays,
        with: AdamW,
    },
    /// The update that [`Call::AdamW`] would make without clipping, on trial: `kept` receives the parameters as they were, moments and
    /// gradients stay as they are. With the same numbers the new parameters have the same bits. `with.clip` is ignored.
    AdamWAhead { parameters: View, kept: View, gradients: View, first: View, second: View, decays: Decays, with: AdamW },
}

impl Call {
    /// Its operands in place, in no particular order.
    pub(crate) fn views_mut(&mut self) -> SmallVec<[&mut View; 7]> {
        match self {
            Call::MatMul { a, b, c, .. } | Call::Sum { a, b, out: c } => smallvec![a, b, c],
            Call::Project { x, weight, bias, base, input, out, .. } => {
                let mut all: SmallVec<[&mut View; 7]> = smallvec![x, weight, out];
                all.extend(bias);
                all.extend(base);
                all.extend(input);
                all
            }
            Call::ProjectBackGelu { dy, weight, input, d_input, .. } => smallvec![dy, weight, input, d_input],
            Call::AddBias { x, bias, .. } => smallvec![x, bias],
            Call::BiasGradient { dy, d_bias, .. } => smallvec![dy, d_bias],
            Call::Norm { x, gamma, beta, out, stats, .. } => {
                let mut all: SmallVec<[&mut View; 7]> = smallvec![x, gamma, out, stats];
                all.extend(beta);
                all
            }
            Call::NormBackwardInput { x, gamma, stats, dy, dx, .. } => smallvec![x, gamma, stats, dy, dx],
            Call::NormBackwardWeight { x, stats, dy, d_gamma, d_beta, .. } => {
                let mut all: SmallVec<[&mut View; 7]> = smallvec![x, stats, dy, d_gamma];
                all.extend(d_beta);
                all
            }
            Call::Rotary { qkv, .. } => smallvec![qkv],
            Call::Attention { qkv, out, lse, .. } => smallvec![qkv, out, lse],
            Call::AttentionBackward { qkv, out, lse, d_out, d_qkv, scratch, .. } => {
                smallvec![qkv, out, lse, d_out, d_qkv, scratch]
            }
            Call::SwiGlu { gate_up, out, .. } => smallvec![gate_up, out],
            Call::SwiGluBackward { gate_up, d_out, d_gate_up, .. } => smallvec![gate_up, d_out, d_gate_up],
            Call::Gelu { x, out } | Call::SumSquares { x, out } => smallvec![x, out],
            Call::GeluBackward { x, d_out, d_x } => smallvec![x, d_out, d_x],
            Call::Embedding { tokens, table, positions, out, .. } => {
                let mut all: SmallVec<[&mut View; 7]> = smallvec![tokens, table, out];
                all.extend(positions);
                all
            }
            Call::EmbeddingBackward { tokens, d_out, d_table, d_positions, .. } => {
                let mut all: SmallVec<[&mut View; 7]> = smallvec![tokens, d_out, d_table];
                all.extend(d_positions);
                all
            }
            Call::HeadLoss { x, weight, targets, lse, loss, scratch, .. } => {
                smallvec![x, weight, targets, lse, loss, scratch]
            }
            Call::HeadBackward { x, weight, targets, lse, dx, d_weight, scratch, .. } => {
                let mut all: SmallVec<[&mut View; 7]> = smallvec![x, weight, targets, lse, scratch];
                all.extend(dx);
                all.extend(d_weight);
                all
            }
            Call::Add { x, into } => smallvec![x, into],
            Call::Copy { from, to } | Call::Cast { from, to } => smallvec![from, to],
            Call::Zero { x } => smallvec![x],
            Call::AdamW { parameters, gradients, first, second, rounded, norm, .. } => {
                let mut all: SmallVec<[&mut View; 7]> = smallvec![parameters, gradients, first, second, norm];
                all.extend(rounded);
                all
            }
            Call::AdamWAhead { parameters, kept, gradients, first, second, .. } => {
                smallvec![parameters, kept, gradients, first, second]
            }
        }
    }
}

/// Floats of scratch that [`Call::AttentionBackward`] needs: one per query row (the row sums of `d_out * out`).
pub fn attention_scratch(shape: &AttentionShape) -> usize {
    shape.batch as usize * shape.heads as usize * shape.seq as usize
}

/// Rows of logits begin at multiples of so many elements, so that devices can move 16 bytes at a time whatever the vocabulary.
pub(crate) const HEAD_ALIGNMENT: u32 = 8;

/// Floats of scratch that [`Call::HeadLoss`] and [`Call::HeadBackward`] need: the logits of a chunk of rows, each row rounded up to a
/// multiple of 8; where both gradients of `BF16` values are wanted, also a 32-bit sum per element of the input.
pub fn head_scratch([rows, cols, vocab, chunk]: [u32; 4], both_of_bf16: bool) -> usize {
    let size = |a: u32, b: u32| (a as usize).saturating_mul(b as usize);
    let sums = if both_of_bf16 { size(rows, cols) } else { 0 };
    let padded = u64::from(vocab).next_multiple_of(u64::from(HEAD_ALIGNMENT)).min(u64::from(u32::MAX));
    size(chunk.min(rows), padded as u32).saturating_add(sums)
}
