//! A step as a kernel call.

use crate::error::ExecError;
use crate::numbers::dtype;
use crate::seam::Operands;
use paceline_kernels::{AttentionShape, Call, View};
use paceline_profiles::KernelOp;
use paceline_sim::model::{AttentionDims, Detail, Step};

/// The call of a step on the buffers of its op. Gradients of the loss are multiplied by `scale`.
///
/// # Errors
/// When the op does not declare a tensor, or the step lacks an operand of its operator.
pub(super) fn call(step: &Step, operands: &dyn Operands, scale: f32) -> Result<Call, ExecError> {
    let mut views = Vec::with_capacity(step.operands.len());
    for slice in &step.operands {
        let dtype = dtype(slice.element);
        views.push(operands.view(slice.tensor)?.within(slice.range.start * dtype.bytes(), slice.range.len(), dtype));
    }
    of_views(step, &views, scale).ok_or_else(|| {
        ExecError::Program(format!("{} with {} operands and {:?} is no call", step.key, views.len(), step.detail))
    })
}

/// `None` where number of operands or detail are not those of the operator.
fn of_views(step: &Step, views: &[View], scale: f32) -> Option<Call> {
    use KernelOp as Op;
    let dim = |n: usize| step.key.dims.get(n).copied();
    let (first, second) = (dim(0)?, dim(1).unwrap_or(1));
    Some(match (step.key.op, step.detail, views) {
        (op @ (Op::MatmulNn | Op::MatmulNt | Op::MatmulTn), _, &[a, b, c]) => Call::MatMul {
            a,
            b,
            c,
            m: first,
            n: second,
            k: dim(2)?,
            transpose_a: op == Op::MatmulTn,
            transpose_b: op == Op::MatmulNt,
            // Weight gradients add up over microbatches.
            accumulate: op == Op::MatmulTn || step.detail == Detail::Accumulate,
        },
        (
            op @ (Op::ProjectBias | Op::ProjectBiasGelu | Op::ProjectBiasAdd | Op::ProjectAdd),
            _,
            &[x, weight, ref rest @ .., out],
        ) => {
            let (bias, base, input) = match (op, rest) {
                (Op::ProjectBias, &[bias]) => (Some(bias), None, None),
                (Op::ProjectBiasGelu, &[bias, input]) => (Some(bias), None, Some(input)),
                (Op::ProjectBiasAdd, &[bias, base]) => (Some(bias), Some(base), None),
                (Op::ProjectAdd, &[base]) => (None, Some(base), None),
                _ => return None,
            };
            Call::Project { x, weight, bias, base, input, out, m: first, n: second, k: dim(2)? }
        }
        (Op::ProjectBackGelu, _, &[dy, weight, input, d_input]) => {
            Call::ProjectBackGelu { dy, weight, input, d_input, m: first, n: second, k: dim(2)? }
        }
        (Op::AddBias, _, &[x, bias]) => Call::AddBias { x, bias, rows: first, cols: second },
        (Op::BiasGradient, _, &[dy, d_bias]) => Call::BiasGradient { dy, d_bias, rows: first, cols: second },
        (Op::RmsNorm, Detail::Epsilon(epsilon), &[x, gamma, out, stats]) => {
            let epsilon = epsilon as f32;
            Call::Norm { x, gamma, beta: None, out, stats, rows: first, cols: second, epsilon }
        }
        (Op::LayerNorm, Detail::Epsilon(epsilon), &[x, gamma, beta, out, stats]) => {
            let epsilon = epsilon as f32;
            Call::Norm { x, gamma, beta: Some(beta), out, stats, rows: first, cols: second, epsilon }
        }
        (op @ (Op::RmsNormBackwardInput | Op::LayerNormBackwardInput), _, &[x, gamma, stats, dy, dx]) => {
            let layer_norm = op == Op::LayerNormBackwardInput;
            Call::NormBackwardInput { x, gamma, stats, dy, dx, rows: first, cols: second, layer_norm }
        }
        (Op::RmsNormBackwardWeight, _, &[x, stats, dy, d_gamma]) => {
            Call::NormBackwardWeight { x, stats, dy, d_gamma, d_beta: None, rows: first, cols: second }
        }
        (Op::LayerNormBackwardWeight, _, &[x, stats, dy, d_gamma, d_beta]) => {
            Call::NormBackwardWeight { x, stats, dy, d_gamma, d_beta: Some(d_beta), rows: first, cols: second }
        }
        (Op::Rotary, Detail::Rotary { shape, theta, inverse }, &[qkv]) => {
            Call::Rotary { qkv, shape: attention(shape), theta: theta as f32, inverse }
        }
        (Op::Attention, _, &[qkv, out, lse]) => Call::Attention { qkv, out, lse, shape: attention_of(step)? },
        (Op::AttentionBackward, _, &[qkv, out, lse, d_out, d_qkv, scratch]) => {
            Call::AttentionBackward { qkv, out, lse, d_out, d_qkv, scratch, shape: attention_of(step)? }
        }
        (Op::SwiGlu, _, &[gate_up, out]) => Call::SwiGlu { gate_up, out, rows: first, cols: second },
        (Op::SwiGluBackward, _, &[gate_up, d_out, d_gate_up]) => {
            Call::SwiGluBackward { gate_up, d_out, d_gate_up, rows: first, cols: second }
        }
        (Op::Gelu, _, &[x, out]) => Call::Gelu { x, out },
        (Op::GeluBackward, _, &[x, d_out, d_x]) => Call::GeluBackward { x, d_out, d_x },
        (Op::Embedding, Detail::Seq(seq), &[tokens, table, ref rest @ .., out]) => {
            Call::Embedding { tokens, table, positions: at_most_one(rest)?, out, rows: first, cols: second, seq }
        }
        (Op::EmbeddingBackward, Detail::Seq(seq), &[tokens, d_out, d_table, ref rest @ ..]) => {
            let d_positions = at_most_one(rest)?;
            Call::EmbeddingBackward { tokens, d_out, d_table, d_positions, rows: first, cols: second, seq }
        }
        (Op::HeadLoss, _, &[x, weight, targets, lse, loss, scratch]) => {
            let (vocab, chunk) = (dim(2)?, dim(3)?);
            Call::HeadLoss { x, weight, targets, lse, loss, scratch, rows: first, cols: second, vocab, chunk }
        }
        (
            op @ (Op::HeadBackward | Op::HeadBackwardInput | Op::HeadBackwardWeight),
            _,
            &[x, weight, targets, lse, ref gradients @ .., scratch],
        ) => {
            let (dx, d_weight) = match (op, gradients) {
                (Op::HeadBackward, &[dx, d_weight]) => (Some(dx), Some(d_weight)),
                (Op::HeadBackwardInput, &[dx]) => (Some(dx), None),
                (Op::HeadBackwardWeight, &[d_weight]) => (None, Some(d_weight)),
                _ => return None,
            };
            Call::HeadBackward {
                x,
                weight,
                targets,
                lse,
                dx,
                d_weight,
                scratch,
                rows: first,
                cols: second,
                vocab: dim(2)?,
                chunk: dim(3)?,
                scale,
            }
        }
        (Op::Add, _, &[x, into]) => Call::Add { x, into },
        (Op::Copy, _, &[from, to]) => Call::Copy { from, to },
        (Op::Zero, _, &[x]) => Call::Zero { x },
        _ => return None,
    })
}

fn at_most_one(views: &[View]) -> Option<Option<View>> {
    match *views {
        [] => Some(None),
        [view] => Some(Some(view)),
        _ => None,
    }
}

fn attention(dims: AttentionDims) -> AttentionShape {
    let AttentionDims { batch, seq, heads, kv_heads, head_dim } = dims;
    AttentionShape { batch, seq, heads, kv_heads, head_dim }
}

fn attention_of(step: &Step) -> Option<AttentionShape> {
    let &[batch, seq, heads, kv_heads, head_dim] = &step.key.dims[..] else { return None };
    Some(AttentionShape { batch, seq, heads, kv_heads, head_dim })
}
