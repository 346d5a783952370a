//! A transformer block as kernels: `y = x + attention(norm(x))`, `z = y + mlp(norm(y))`.

use super::Positions;
use super::activations::Piece;
use super::parameters::Role;
use super::passes::{After, Builder};
use super::places::Spot;
use super::steps::{Detail, Slice};
use crate::program::{Element, Recompute};
use paceline_profiles::KernelOp;

const ATTENTION_NORM: (Role, Role) = (Role::AttentionNormWeight, Role::AttentionNormBias);
const MLP_NORM: (Role, Role) = (Role::MlpNormWeight, Role::MlpNormBias);

/// F. Under full recomputation everything but the input of the next layer is in workspace.
pub(crate) fn forward(b: &mut Builder, spot: &Spot) {
    let transient = b.workload.recompute == Recompute::Full;
    let output = b.output(spot);
    run_forward(b, spot, transient, Some(output));
}

/// R: what F dropped, except the output, which is the next layer's checkpoint.
pub(crate) fn recompute(b: &mut Builder, spot: &Spot) {
    if b.workload.recompute == Recompute::Full {
        run_forward(b, spot, false, None);
    }
}

fn run_forward(b: &mut Builder, spot: &Spot, transient: bool, output: Option<Slice>) {
    let s = b.shape;
    let x = b.input(spot);
    let start = b.workspace.mark();
    let y = b.piece(spot, Piece::Middle, transient);
    let after_y = b.workspace.mark();

    let attended = b.piece(spot, Piece::Attended, transient);
    let qkv = b.piece(spot, Piece::Qkv, transient);
    let lse = b.piece(spot, Piece::LogSumExp, transient);
    let normed = b.piece(spot, Piece::Normed, transient);
    let stats = b.piece(spot, Piece::Stats, transient);
    b.norm(spot, ATTENTION_NORM, &x, &normed, &stats);
    b.projection(spot, (Role::QkvWeight, Role::QkvBias), &normed, &qkv, (s.qkv, s.hidden), After::Nothing);
    rotate(b, &qkv, false);
    attention(b, KernelOp::Attention, [&qkv, &attended, &lse]);
    let (roles, sizes) = ((Role::OutputWeight, Role::OutputBias), (s.hidden, s.query));
    b.projection(spot, roles, &attended, &y, sizes, After::Add(&x));
    b.workspace.release(after_y);

    let activated = b.piece(spot, Piece::Activated, transient);
    let up = b.piece(spot, Piece::Up, transient);
    let normed = b.piece(spot, Piece::MlpNormed, transient);
    let stats = b.piece(spot, Piece::MlpStats, transient);
    b.norm(spot, MLP_NORM, &y, &normed, &stats);
    let after = if s.gated { After::Nothing } else { After::Gelu(&activated) };
    b.projection(spot, (Role::UpWeight, Role::UpBias), &normed, &up, (s.up, s.hidden), after);
    if s.gated {
        activate(b, &up, &activated);
    }
    if let Some(z) = output {
        let (roles, sizes) = ((Role::DownWeight, Role::DownBias), (s.hidden, s.intermediate));
        b.projection(spot, roles, &activated, &z, sizes, After::Add(&y));
    }
    b.workspace.release(start);
}

/// B: gradients of the inputs of everything, and of the norm weights.
pub(crate) fn backward_input(b: &mut Builder, spot: &Spot) {
    let (dz, dx) = (b.output_delta(spot), b.input_delta(spot));
    let up_delta = b.piece(spot, Piece::UpDelta, false);
    let dy = b.piece(spot, Piece::MiddleDelta, false);
    let qkv_delta = b.piece(spot, Piece::QkvDelta, false);
    let hidden = b.shape.rows * b.shape.hidden;
    mlp_input(b, spot, &dz, &up_delta, |b| {
        b.elements(KernelOp::Copy, hidden, [&dz, &dy]);
        dy.clone()
    });
    attention_input(b, spot, &dy, &qkv_delta, |b| {
        b.elements(KernelOp::Copy, hidden, [&dy, &dx]);
        dx.clone()
    });
}

/// W: gradients of the matrices and biases that are trained, and of adapters.
pub(crate) fn backward_weight(b: &mut Builder, spot: &Spot) {
    let dz = b.output_delta(spot);
    let up_delta = b.piece(spot, Piece::UpDelta, false);
    let dy = b.piece(spot, Piece::MiddleDelta, false);
    let qkv_delta = b.piece(spot, Piece::QkvDelta, false);
    mlp_output_weight(b, spot, &dz);
    mlp_input_weight(b, spot, &up_delta);
    attention_output_weight(b, spot, &dy);
    attention_input_weight(b, spot, &qkv_delta);
}

/// BW: both in one, the gradient carried in place.
pub(crate) fn backward(b: &mut Builder, spot: &Spot) {
    let s = b.shape;
    let g = b.running_gradient(spot.stage);
    if spot.closes_stage {
        let entering = b.entering_gradient(spot.stage);
        b.elements(KernelOp::Copy, s.rows * s.hidden, [&entering, &g]);
    }
    let start = b.workspace.mark();
    let up_delta = b.scratch(s.rows * s.up);
    // Weights of a matrix before the gradient in place becomes that of its input.
    mlp_output_weight(b, spot, &g);
    mlp_input(b, spot, &g, &up_delta, |_| g.clone());
    mlp_input_weight(b, spot, &up_delta);
    b.workspace.release(start);
    let qkv_delta = b.scratch(s.rows * s.qkv);
    attention_output_weight(b, spot, &g);
    attention_input(b, spot, &g, &qkv_delta, |_| g.clone());
    attention_input_weight(b, spot, &qkv_delta);
    b.workspace.release(start);
}

/// Through the MLP: from the gradient of `z` to that of the projection, and on into the residual stream, which `residual`
/// makes hold the gradient of `z`.
fn mlp_input(b: &mut Builder, spot: &Spot, dz: &Slice, up_delta: &Slice, residual: impl FnOnce(&mut Builder) -> Slice) {
    let s = b.shape;
    let start = b.workspace.mark();
    let weight = b.weight(spot, Role::DownWeight);
    let up = b.piece(spot, Piece::Up, false);
    if s.gated || b.adapted(spot, Role::DownWeight) {
        let d_activated = b.scratch(s.rows * s.intermediate);
        b.project_back(dz, weight, &d_activated, s.intermediate, s.hidden);
        b.adapt_back(spot, Role::DownWeight, dz, &d_activated, (s.hidden, s.intermediate));
        activate_backward(b, &up, &d_activated, up_delta);
    } else {
        let operands = [dz.clone(), weight, up, up_delta.clone()];
        b.push(KernelOp::ProjectBackGelu, &[s.rows, s.intermediate, s.hidden], operands, Detail::None);
    }
    b.workspace.release(start);
    let d_normed = b.scratch(s.rows * s.hidden);
    let weight = b.weight(spot, Role::UpWeight);
    b.project_back(up_delta, weight, &d_normed, s.hidden, s.up);
    b.adapt_back(spot, Role::UpWeight, up_delta, &d_normed, (s.up, s.hidden));
    let into = residual(b);
    let (y, stats) = (b.piece(spot, Piece::Middle, false), b.piece(spot, Piece::MlpStats, false));
    b.norm_backward(spot, MLP_NORM, (&y, &stats), &d_normed, &into);
    b.workspace.release(start);
}

/// Through attention: from the gradient of `y` to that of queries, keys and values, and on into the residual stream.
fn attention_input(
    b: &mut Builder,
    spot: &Spot,
    dy: &Slice,
    qkv_delta: &Slice,
    residual: impl FnOnce(&mut Builder) -> Slice,
) {
    let s = b.shape;
    let start = b.workspace.mark();
    let d_attended = b.scratch(s.rows * s.query);
    let scratch = b.workspace.take(s.rows * s.attention.heads as usize, Element::F32);
    let weight = b.weight(spot, Role::OutputWeight);
    b.project_back(dy, weight, &d_attended, s.query, s.hidden);
    b.adapt_back(spot, Role::OutputWeight, dy, &d_attended, (s.hidden, s.query));
    let (qkv, lse) = (b.piece(spot, Piece::Qkv, false), b.piece(spot, Piece::LogSumExp, false));
    let attended = b.piece(spot, Piece::Attended, false);
    attention(b, KernelOp::AttentionBackward, [&qkv, &attended, &lse, &d_attended, qkv_delta, &scratch]);
    rotate(b, qkv_delta, true);
    b.workspace.release(start);
    let d_normed = b.scratch(s.rows * s.hidden);
    let weight = b.weight(spot, Role::QkvWeight);
    b.project_back(qkv_delta, weight, &d_normed, s.hidden, s.qkv);
    b.adapt_back(spot, Role::QkvWeight, qkv_delta, &d_normed, (s.qkv, s.hidden));
    let into = residual(b);
    let (x, stats) = (b.input(spot), b.piece(spot, Piece::Stats, false));
    b.norm_backward(spot, ATTENTION_NORM, (&x, &stats), &d_normed, &into);
    b.workspace.release(start);
}

fn mlp_output_weight(b: &mut Builder, spot: &Spot, dz: &Slice) {
    let s = b.shape;
    let start = b.workspace.mark();
    if b.learns(spot, Role::DownWeight) {
        let activated = b.piece(spot, Piece::Activated, false);
        if b.kept(spot, Piece::Activated).is_none() {
            let up = b.piece(spot, Piece::Up, false);
            activate(b, &up, &activated);
        }
        b.learn(spot, Role::DownWeight, dz, &activated, (s.hidden, s.intermediate));
    }
    b.bias_gradient(spot, Role::DownBias, dz, s.hidden);
    b.workspace.release(start);
}

fn mlp_input_weight(b: &mut Builder, spot: &Spot, up_delta: &Slice) {
    let s = b.shape;
    let start = b.workspace.mark();
    if b.learns(spot, Role::UpWeight) {
        let y = b.piece(spot, Piece::Middle, false);
        let normed = rebuilt_norm(b, spot, Piece::MlpNormed, MLP_NORM, &y);
        b.learn(spot, Role::UpWeight, up_delta, &normed, (s.up, s.hidden));
    }
    b.bias_gradient(spot, Role::UpBias, up_delta, s.up);
    b.workspace.release(start);
}

fn attention_output_weight(b: &mut Builder, spot: &Spot, dy: &Slice) {
    let s = b.shape;
    if b.learns(spot, Role::OutputWeight) {
        let attended = b.piece(spot, Piece::Attended, false);
        b.learn(spot, Role::OutputWeight, dy, &attended, (s.hidden, s.query));
    }
    b.bias_gradient(spot, Role::OutputBias, dy, s.hidden);
}

fn attention_input_weight(b: &mut Builder, spot: &Spot, qkv_delta: &Slice) {
    let s = b.shape;
    let start = b.workspace.mark();
    if b.learns(spot, Role::QkvWeight) {
        let x = b.input(spot);
        let normed = rebuilt_norm(b, spot, Piece::Normed, ATTENTION_NORM, &x);
        b.learn(spot, Role::QkvWeight, qkv_delta, &normed, (s.qkv, s.hidden));
    }
    b.bias_gradient(spot, Role::QkvBias, qkv_delta, s.qkv);
    b.workspace.release(start);
}

/// A norm's output: as kept, or made again from its input.
pub(crate) fn rebuilt_norm(b: &mut Builder, spot: &Spot, piece: Piece, roles: (Role, Role), x: &Slice) -> Slice {
    let normed = b.piece(spot, piece, false);
    if b.kept(spot, piece).is_none() {
        let stats = b.workspace.take(b.shape.rows * b.shape.stats, Element::F32);
        b.norm(spot, roles, x, &normed, &stats);
    }
    normed
}

fn activate(b: &mut Builder, up: &Slice, out: &Slice) {
    let s = b.shape;
    if s.gated {
        b.push(KernelOp::SwiGlu, &[s.rows, s.intermediate], [up.clone(), out.clone()], Detail::None);
    } else {
        b.elements(KernelOp::Gelu, s.rows * s.intermediate, [up, out]);
    }
}

fn activate_backward(b: &mut Builder, up: &Slice, d_out: &Slice, d_up: &Slice) {
    let s = b.shape;
    if s.gated {
        let operands = [up.clone(), d_out.clone(), d_up.clone()];
        b.push(KernelOp::SwiGluBackward, &[s.rows, s.intermediate], operands, Detail::None);
    } else {
        b.elements(KernelOp::GeluBackward, s.rows * s.intermediate, [up, d_out, d_up]);
    }
}

fn attention<const N: usize>(b: &mut Builder, op: KernelOp, operands: [&Slice; N]) {
    let a = b.shape.attention;
    let dims = [a.batch, a.seq, a.heads, a.kv_heads, a.head_dim].map(|d| d as usize);
    b.push(op, &dims, operands.map(Clone::clone), Detail::None);
}

/// Turns queries and keys, where positions are rotary.
fn rotate(b: &mut Builder, qkv: &Slice, inverse: bool) {
    if let Positions::Rotary { theta } = b.workload.model.positions {
        let shape = b.shape.attention;
        let turned = (shape.heads + shape.kv_heads) as usize * shape.head_dim as usize;
        let detail = Detail::Rotary { shape, theta, inverse };
        b.push(KernelOp::Rotary, &[b.shape.rows, turned], [qkv.clone()], detail);
    }
}
