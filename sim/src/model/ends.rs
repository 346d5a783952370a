//! The ends of the model as kernels: the embedding, and the head with final norm, output projection and loss.

use super::activations::Piece;
use super::block::rebuilt_norm;
use super::parameters::Role;
use super::passes::Builder;
use super::places::Spot;
use super::steps::{Detail, Slice};
use crate::program::{Element, Tensor};
use paceline_profiles::KernelOp;
use smallvec::SmallVec;

const FINAL_NORM: (Role, Role) = (Role::FinalNormWeight, Role::FinalNormBias);

/// F of the embedding.
pub(crate) fn embedding_forward(b: &mut Builder, spot: &Spot) {
    let out = b.output(spot);
    let table = b.weight(spot, Role::Table);
    let positions = b.parameter(spot, Role::PositionTable, false);
    let operands: SmallVec<[Slice; 7]> = [b.ids(false), table].into_iter().chain(positions).chain([out]).collect();
    b.push(KernelOp::Embedding, &[b.shape.rows, b.shape.hidden], operands, Detail::Seq(b.workload.seq));
}

/// W (or the fused backward) of the embedding.
pub(crate) fn embedding_backward(b: &mut Builder, spot: &Spot, fused: bool) {
    let d_out = match (fused, spot.closes_stage) {
        (true, true) => b.entering_gradient(spot.stage),
        (true, false) => b.running_gradient(spot.stage),
        (false, _) => b.output_delta(spot),
    };
    let Some(d_table) = b.gradient(spot, Role::Table) else { return };
    let d_positions = b.gradient(spot, Role::PositionTable);
    let operands: SmallVec<[Slice; 7]> = [b.ids(false), d_out, d_table].into_iter().chain(d_positions).collect();
    b.push(KernelOp::EmbeddingBackward, &[b.shape.rows, b.shape.hidden], operands, Detail::Seq(b.workload.seq));
}

/// F of the head: final norm, output projection and loss, a chunk of rows at a time.
pub(crate) fn head_forward(b: &mut Builder, spot: &Spot) {
    let start = b.workspace.mark();
    let x = b.input(spot);
    let normed = b.piece(spot, Piece::Normed, false);
    let (stats, lse) = (b.piece(spot, Piece::Stats, false), b.piece(spot, Piece::LogSumExp, false));
    b.norm(spot, FINAL_NORM, &x, &normed, &stats);
    let place = b.loss;
    let loss = b.slice(Tensor::Losses, place..place + 1);
    let weight = b.weight(spot, Role::Logits);
    let scratch = logits(b, false);
    let operands = [normed, weight, b.ids(true), lse, loss, scratch];
    b.push(KernelOp::HeadLoss, &head_dims(b), operands, Detail::None);
    b.workspace.release(start);
}

/// B of the head.
pub(crate) fn head_backward_input(b: &mut Builder, spot: &Spot) {
    let into = b.input_delta(spot);
    head(b, spot, Some(&into), false);
}

/// W of the head.
pub(crate) fn head_backward_weight(b: &mut Builder, spot: &Spot) {
    head(b, spot, None, true);
}

/// BW of the head: the logits are made again once for both gradients.
pub(crate) fn head_backward(b: &mut Builder, spot: &Spot) {
    let into = b.running_gradient(spot.stage);
    head(b, spot, Some(&into), true);
}

/// Gradients of the head: of its input into `into`, of its matrix where it is trained.
fn head(b: &mut Builder, spot: &Spot, into: Option<&Slice>, matrix: bool) {
    let s = b.shape;
    let d_weight = b.gradient(spot, Role::Logits).filter(|_| matrix);
    if into.is_none() && d_weight.is_none() {
        return;
    }
    let start = b.workspace.mark();
    let x = b.input(spot);
    let normed = rebuilt_norm(b, spot, Piece::Normed, FINAL_NORM, &x);
    let lse = b.piece(spot, Piece::LogSumExp, false);
    let d_normed = into.map(|_| b.scratch(s.rows * s.hidden));
    let scratch = logits(b, d_normed.is_some() && d_weight.is_some());
    let weight = b.weight(spot, Role::Logits);
    let op = match (&d_normed, &d_weight) {
        (Some(_), Some(_)) => KernelOp::HeadBackward,
        (Some(_), None) => KernelOp::HeadBackwardInput,
        (None, _) => KernelOp::HeadBackwardWeight,
    };
    let operands: SmallVec<[Slice; 7]> = [normed, weight, b.ids(true), lse]
        .into_iter()
        .chain(d_normed.clone())
        .chain(d_weight)
        .chain([scratch])
        .collect();
    b.push(op, &head_dims(b), operands, Detail::None);
    if let (Some(into), Some(d_normed)) = (into, d_normed) {
        let stats = b.piece(spot, Piece::Stats, false);
        b.elements(KernelOp::Zero, s.rows * s.hidden, [into]);
        b.norm_backward(spot, FINAL_NORM, (&x, &stats), &d_normed, into);
    }
    b.workspace.release(start);
}

fn head_dims(b: &Builder) -> [usize; 4] {
    [b.shape.rows, b.shape.hidden, b.shape.vocab, b.shape.chunk]
}

/// Room for a chunk of logits, rows rounded up to a multiple of 8 elements; where both gradients of narrow values are summed, also for the
/// 32-bit sums of the input's.
fn logits(b: &mut Builder, both: bool) -> Slice {
    let s = b.shape;
    let sums = if both && s.precision.values() == Element::Bf16 { s.rows * s.hidden } else { 0 };
    b.workspace.take(s.chunk * s.vocab.next_multiple_of(8) + sums, Element::F32)
}
