//! What a layer keeps: which intermediate results F leaves for B and for W under each kind of recomputation, what B leaves
//! for W, and where each lies within the buffers of its unit.
//!
//! Names follow the block: `x` its input, `y` after attention, `z` its output.
//!
//! | piece | elements per token | none, full | selective |
//! | --- | --- | --- | --- |
//! | `x` | hidden | until B (checkpoint under full) | until W |
//! | norm statistics | 1 or 2, twice | until B | until B |
//! | norm outputs | hidden, twice | until W | rebuilt in W |
//! | queries, keys, values | qkv width | until B | until B |
//! | log-sum-exp | heads | until B | until B |
//! | attention output | query width | until W | until W |
//! | `y` | hidden | until B | until W |
//! | projection into the MLP | up width | until B | until W |
//! | MLP activation | intermediate | until W | rebuilt in W |
//!
//! Under full recomputation F keeps `x` alone and R makes the rest. Between B and W four gradients wait: of `z`, of the
//! projection into the MLP, of `y`, and of queries, keys and values. Norm weights take their gradients in B, which has at hand what
//! they need and nearly for free; W is the matrix products, as in the released zero-bubble code.

use super::{Activation, Layer, Norm};
use crate::program::{Element, Precision, Recompute, Tensor, TransformerWorkload};
use crate::units::MicrobatchId;

use super::places::Spot;
use super::steps::{AttentionDims, Slice};

/// Widths of a workload, in elements, and what they are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Tokens of a microbatch.
    pub rows: usize,
    /// Residual stream.
    pub hidden: usize,
    /// All query heads.
    pub query: usize,
    /// Queries, keys and values.
    pub qkv: usize,
    /// Projection into the MLP (gate and up, where gated).
    pub up: usize,
    /// MLP.
    pub intermediate: usize,
    /// Statistics of a norm per token.
    pub stats: usize,
    /// The attention.
    pub attention: AttentionDims,
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// Rows of logits that the loss holds at a time.
    pub chunk: usize,
    /// The MLP has a gate.
    pub gated: bool,
    /// Norms shift.
    pub layer_norm: bool,
    /// Number formats.
    pub precision: Precision,
}

/// Logits that the loss may hold at a time in any case: 16 MiB of f32. Where the matrix of the output projection is larger, as many as
/// it has elements: with a chunk of `hidden` rows, reading the matrix and adding to its gradient take less time than the products.
const LOGITS: usize = 1 << 22;

impl Shape {
    /// The widths of a workload.
    pub fn of(workload: &TransformerWorkload) -> Shape {
        let model = &workload.model;
        let rows = workload.micro_batch as usize * workload.seq as usize;
        let layer_norm = model.norm == Norm::LayerNorm;
        Shape {
            rows,
            hidden: model.hidden as usize,
            query: model.query_width(),
            qkv: model.qkv_width(),
            up: model.up_width(),
            intermediate: model.intermediate as usize,
            stats: if layer_norm { 2 } else { 1 },
            attention: AttentionDims {
                batch: workload.micro_batch,
                seq: workload.seq,
                heads: model.heads,
                kv_heads: model.kv_heads,
                head_dim: model.head_dim,
            },
            vocab: model.vocab as usize,
            chunk: (LOGITS / model.vocab.max(1) as usize).max(model.hidden as usize).clamp(1, rows.max(1)),
            gated: model.activation == Activation::SwiGlu,
            layer_norm,
            precision: workload.precision,
        }
    }
}

/// An intermediate result of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    /// `x` of a block or of the head.
    Input,
    /// Statistics of the attention norm, or of the head's.
    Stats,
    /// Output of the attention norm, or of the head's.
    Normed,
    /// Queries, keys and values, turned.
    Qkv,
    /// Log-sum-exp of the attention, or of the logits.
    LogSumExp,
    /// Attention output.
    Attended,
    /// `y`.
    Middle,
    /// Statistics of the MLP norm.
    MlpStats,
    /// Output of the MLP norm.
    MlpNormed,
    /// Projection into the MLP.
    Up,
    /// MLP activation.
    Activated,
    /// Gradient of `z`, or of the embedding.
    OutputDelta,
    /// Gradient of [`Piece::Up`].
    UpDelta,
    /// Gradient of `y`.
    MiddleDelta,
    /// Gradient of [`Piece::Qkv`].
    QkvDelta,
}

/// Which buffer of a unit holds a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    /// [`Tensor::Checkpoint`].
    Checkpoint,
    /// [`Tensor::SavedForB`].
    UntilB,
    /// [`Tensor::SavedForW`].
    UntilW,
    /// [`Tensor::DeltaForW`].
    Delta,
    /// No buffer: made again where needed, in workspace.
    Rebuilt,
}

/// Pieces start at multiples of a cache line, in bytes.
const LINE: usize = 64;

/// Bytes of `len` elements, rounded up so that what follows starts at a cache line.
pub(crate) fn padded(len: usize, element: Element) -> usize {
    (len * element.bytes() as usize).next_multiple_of(LINE)
}

/// What a piece is made of: statistics are 32-bit in every recipe.
pub(crate) fn element_of(precision: Precision, piece: Piece) -> Element {
    match piece {
        Piece::Stats | Piece::MlpStats | Piece::LogSumExp => Element::F32,
        _ => precision.values(),
    }
}

/// The pieces of a layer with their holders and lengths. The input of the layer that opens a stage is the stage's input, the
/// output gradient of the one that closes it is the stage's output gradient; neither is listed.
pub(crate) fn pieces(shape: &Shape, recompute: Recompute, spot: &Spot) -> Vec<(Piece, Holder, usize)> {
    let rows = shape.rows;
    // What W needs to rebuild norm outputs and MLP activation has to wait for W instead of B.
    let (wide, rebuilt) = match recompute {
        Recompute::Selective => (Holder::UntilW, Holder::Rebuilt),
        Recompute::None | Recompute::Full => (Holder::UntilB, Holder::UntilW),
    };
    let mut all = Vec::with_capacity(16);
    match spot.layer {
        Layer::Embedding => {}
        Layer::Block(_) => {
            let input = if recompute == Recompute::Full { Holder::Checkpoint } else { wide };
            if !spot.opens_stage {
                all.push((Piece::Input, input, rows * shape.hidden));
            }
            all.extend([
                (Piece::Stats, Holder::UntilB, rows * shape.stats),
                (Piece::Normed, rebuilt, rows * shape.hidden),
                (Piece::Qkv, Holder::UntilB, rows * shape.qkv),
                (Piece::LogSumExp, Holder::UntilB, rows * shape.attention.heads as usize),
                (Piece::Attended, Holder::UntilW, rows * shape.query),
                (Piece::Middle, wide, rows * shape.hidden),
                (Piece::MlpStats, Holder::UntilB, rows * shape.stats),
                (Piece::MlpNormed, rebuilt, rows * shape.hidden),
                (Piece::Up, wide, rows * shape.up),
                (Piece::Activated, rebuilt, rows * shape.intermediate),
                (Piece::UpDelta, Holder::Delta, rows * shape.up),
                (Piece::MiddleDelta, Holder::Delta, rows * shape.hidden),
                (Piece::QkvDelta, Holder::Delta, rows * shape.qkv),
            ]);
        }
        Layer::Head => {
            if !spot.opens_stage {
                all.push((Piece::Input, wide, rows * shape.hidden));
            }
            all.extend([
                (Piece::Stats, Holder::UntilB, rows * shape.stats),
                (Piece::Normed, rebuilt, rows * shape.hidden),
                (Piece::LogSumExp, Holder::UntilW, rows),
            ]);
        }
    }
    if spot.layer != Layer::Head && !spot.closes_stage {
        all.push((Piece::OutputDelta, Holder::Delta, rows * shape.hidden));
    }
    all
}

/// The buffer of a holder.
pub(crate) fn tensor_of(holder: Holder, spot: &Spot, microbatch: MicrobatchId) -> Option<Tensor> {
    let (stage, unit) = (spot.stage, spot.unit);
    match holder {
        Holder::Checkpoint => Some(Tensor::Checkpoint { stage, unit, microbatch }),
        Holder::UntilB => Some(Tensor::SavedForB { stage, unit, microbatch }),
        Holder::UntilW => Some(Tensor::SavedForW { stage, unit, microbatch }),
        Holder::Delta => Some(Tensor::DeltaForW { stage, unit, microbatch }),
        Holder::Rebuilt => None,
    }
}

/// Bytes of one holder over the layers of a unit.
pub(crate) fn held(shape: &Shape, recompute: Recompute, unit: &[Spot], holder: Holder) -> usize {
    let all = unit.iter().flat_map(|spot| pieces(shape, recompute, spot));
    let own = all.filter(|(_, by, _)| *by == holder);
    own.map(|(piece, _, len)| padded(len, element_of(shape.precision, piece))).sum()
}

/// Where a piece lies; `None` when it is rebuilt or the stage's own. `unit` are the layers of its unit.
pub(crate) fn place(
    shape: &Shape,
    recompute: Recompute,
    unit: &[Spot],
    spot: &Spot,
    piece: Piece,
    microbatch: MicrobatchId,
) -> Option<Slice> {
    let (_, holder, len) = pieces(shape, recompute, spot).into_iter().find(|(p, _, _)| *p == piece)?;
    let tensor = tensor_of(holder, spot, microbatch)?;
    let mut start = held(shape, recompute, &unit[..usize::from(spot.index)], holder);
    for (before, by, len) in pieces(shape, recompute, spot) {
        if before == piece {
            break;
        }
        if by == holder {
            start += padded(len, element_of(shape.precision, before));
        }
    }
    let element = element_of(shape.precision, piece);
    let start = start / element.bytes() as usize;
    Some(Slice { tensor, range: start..start + len, element })
}

/// Elements of a piece.
pub(crate) fn length(shape: &Shape, piece: Piece, layer: Layer) -> usize {
    let per_row = match piece {
        Piece::Input | Piece::Normed | Piece::Middle | Piece::MlpNormed | Piece::OutputDelta | Piece::MiddleDelta => {
            shape.hidden
        }
        Piece::Stats | Piece::MlpStats => shape.stats,
        Piece::Qkv | Piece::QkvDelta => shape.qkv,
        Piece::LogSumExp if layer == Layer::Head => 1,
        Piece::LogSumExp => shape.attention.heads as usize,
        Piece::Attended => shape.query,
        Piece::Up | Piece::UpDelta => shape.up,
        Piece::Activated => shape.intermediate,
    };
    shape.rows * per_row
}
