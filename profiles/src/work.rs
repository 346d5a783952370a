//! How much a kernel does: floating-point operations and bytes moved, by operator and shape. These are the axes of the
//! fits, not a forecast: constant factors that apply to all shapes of an operator do not matter here.

use crate::kernel_key::{DType, KernelKey, KernelOp};

/// What a kernel call does at least.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Work {
    /// Additions and multiplications of the matrix products in it; causal attention is counted as causal.
    pub flops: f64,
    /// Bytes of its operands, each read and each written operand once.
    pub bytes: f64,
}

impl Work {
    /// The work of a call.
    pub fn of(key: &KernelKey) -> Work {
        let dim = |n: usize| key.dims.get(n).map_or(1.0, |&d| f64::from(d));
        let first_two = dim(0) * dim(1);
        let width = key.dtype.bytes() as f64;
        let gradient = if key.dtype == DType::Bf16 { 2.0 } else { 4.0 };
        let copy = if key.dtype == DType::F32 { 0.0 } else { 2.0 };
        // (flops, values moved)
        let (flops, values) = match key.op {
            // c is written (W: read too).
            KernelOp::MatmulNn | KernelOp::MatmulNt | KernelOp::ProjectBias => product(dim(0), dim(1), dim(2), 1.0),
            // Or another matrix of that size: the residual stream, the input of the GELU.
            KernelOp::MatmulTn
            | KernelOp::ProjectBiasGelu
            | KernelOp::ProjectBiasAdd
            | KernelOp::ProjectAdd
            | KernelOp::ProjectBackGelu => product(dim(0), dim(1), dim(2), 2.0),
            KernelOp::Attention => attention(dim(0), dim(1), dim(2), dim(3), dim(4), 2.0, 1.0),
            // Scores again, and the gradients of values, probabilities, queries and keys.
            KernelOp::AttentionBackward => attention(dim(0), dim(1), dim(2), dim(3), dim(4), 5.0, 2.0),
            KernelOp::HeadLoss => head(dim(0), dim(1), dim(2), dim(3), 1.0),
            // Logits again, then one product each.
            KernelOp::HeadBackwardInput | KernelOp::HeadBackwardWeight => head(dim(0), dim(1), dim(2), dim(3), 2.0),
            KernelOp::HeadBackward => head(dim(0), dim(1), dim(2), dim(3), 3.0),
            // The numbers are values moved per element of the shape.
            KernelOp::AddBias => (0.0, 2.0 * first_two),
            KernelOp::BiasGradient => (0.0, first_two),
            KernelOp::RmsNorm | KernelOp::LayerNorm => (0.0, 2.0 * first_two),
            KernelOp::RmsNormBackwardInput | KernelOp::LayerNormBackwardInput => (0.0, 4.0 * first_two),
            KernelOp::RmsNormBackwardWeight | KernelOp::LayerNormBackwardWeight => (0.0, 2.0 * first_two),
            KernelOp::Rotary => (0.0, 2.0 * first_two),
            KernelOp::SwiGlu => (0.0, 3.0 * first_two),
            KernelOp::SwiGluBackward => (0.0, 5.0 * first_two),
            KernelOp::Embedding => (0.0, 2.0 * first_two),
            KernelOp::EmbeddingBackward => (0.0, 3.0 * first_two),
            KernelOp::Gelu | KernelOp::Copy => (0.0, 2.0 * dim(0)),
            // One side is 32-bit.
            KernelOp::Cast => (0.0, (1.0 + 4.0 / width) * dim(0)),
            KernelOp::GeluBackward | KernelOp::Add | KernelOp::Sum => (0.0, 3.0 * dim(0)),
            KernelOp::Zero | KernelOp::SumSquares => (0.0, dim(0)),
            // Moments and weights are 32-bit whatever the gradients are; a narrow copy of the weights comes with the update.
            KernelOp::AdamW => (0.0, dim(0) * (6.0 * 4.0 + 2.0 * gradient + copy) / width),
            KernelOp::AdamWAhead => (0.0, dim(0) * (5.0 * 4.0 + gradient) / width),
        };
        Work { flops, bytes: width * values }
    }
}

fn product(m: f64, n: f64, k: f64, passes_over_c: f64) -> (f64, f64) {
    (2.0 * m * n * k, m * k + k * n + passes_over_c * m * n)
}

/// `products` of `seq x seq x head_dim` per head, half of each by causality; `passes` over the fused projection and the output.
fn attention(batch: f64, seq: f64, heads: f64, kv_heads: f64, width: f64, products: f64, passes: f64) -> (f64, f64) {
    let pairs = batch * heads * seq * (seq + 1.0) / 2.0;
    // The softmax touches every score once; for narrow heads that is no small part.
    (2.0 * products * pairs * width, pairs + passes * batch * seq * (2.0 * heads + 2.0 * kv_heads) * width)
}

/// `products` of `rows x cols x vocab`, the weights read once per chunk and product, the logits written and read.
fn head(rows: f64, cols: f64, vocab: f64, chunk: f64, products: f64) -> (f64, f64) {
    let chunks = (rows / chunk.max(1.0)).ceil();
    (2.0 * products * rows * cols * vocab, products * (chunks * cols * vocab + rows * cols) + 2.0 * rows * vocab)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(op: KernelOp, dims: &[u32]) -> Work {
        Work::of(&KernelKey::new(op, dims).unwrap())
    }

    #[test]
    fn products_count_each_multiplication_and_addition() {
        assert_eq!(work(KernelOp::MatmulNt, &[2, 3, 5]), Work { flops: 60.0, bytes: 4.0 * (10.0 + 15.0 + 6.0) });
        assert_eq!(work(KernelOp::MatmulTn, &[2, 3, 5]).bytes, 4.0 * (10.0 + 15.0 + 12.0));
    }

    #[test]
    fn narrow_values_move_half_the_bytes() {
        let bytes = |op, dims: &[u32], dtype| Work::of(&KernelKey::new(op, dims).unwrap().with(dtype)).bytes;
        assert_eq!(bytes(KernelOp::Add, &[10], DType::Bf16), 2.0 * 30.0);
        assert_eq!(bytes(KernelOp::Cast, &[10], DType::Bf16), 6.0 * 10.0);
        // Weights and moments read and written, gradients read and zeroed, the copy written.
        assert_eq!(bytes(KernelOp::AdamW, &[10], DType::F32), 10.0 * (24.0 + 8.0));
        assert_eq!(bytes(KernelOp::AdamW, &[10], DType::Bf16F32), 10.0 * (24.0 + 8.0 + 2.0));
        assert_eq!(bytes(KernelOp::AdamW, &[10], DType::Bf16), 10.0 * (24.0 + 4.0 + 2.0));
        assert_eq!(bytes(KernelOp::AdamWAhead, &[10], DType::F32), 10.0 * 24.0);
        assert_eq!(bytes(KernelOp::AdamWAhead, &[10], DType::Bf16), 10.0 * 22.0);
    }

    #[test]
    fn attention_is_causal() {
        // 3 positions see 1 + 2 + 3 = 6 pairs; 2 products of width 8, 2 flops each, 4 heads, 2 sequences.
        assert_eq!(work(KernelOp::Attention, &[2, 3, 4, 2, 8]).flops, 6.0 * 2.0 * 8.0 * 2.0 * 4.0 * 2.0);
        let forward = work(KernelOp::Attention, &[1, 64, 4, 4, 32]).flops;
        assert_eq!(work(KernelOp::AttentionBackward, &[1, 64, 4, 4, 32]).flops, 2.5 * forward);
    }

    #[test]
    fn the_head_is_three_products() {
        let flops = |op| work(op, &[128, 64, 256, 32]).flops;
        let one = 2.0 * 128.0 * 64.0 * 256.0;
        assert_eq!(flops(KernelOp::HeadLoss), one);
        assert_eq!(flops(KernelOp::HeadBackwardInput) + flops(KernelOp::HeadBackwardWeight), 4.0 * one);
        assert_eq!(flops(KernelOp::HeadBackward), 3.0 * one);
    }

    #[test]
    fn every_operator_does_something_and_more_of_it_when_larger() {
        for op in KernelOp::ALL {
            let of = |size: u32| work(op, &vec![size; op.dimensions().len()]);
            assert!(of(64).bytes > of(32).bytes && of(32).bytes > 0.0, "{op}");
            assert!(of(64).flops >= of(32).flops, "{op}");
        }
    }
}
