//! Shapes to measure beside those of a job: around them, so that what is nearly measured is well interpolated, and
//! those of usual models, for a profile before there is a job.

use paceline_profiles::{Family, KernelKey, KernelOp};
use paceline_sim::model::parameters::unit_parameters;
use paceline_sim::model::{Activation, Layer, ModelConfig, ModelPass, Norm, Positions, Trainable};
use paceline_sim::program::{OpKind, Pass, Precision, Recompute, Stage, TransformerWorkload, Unit};
use paceline_sim::units::{MicrobatchId, StageId};
use std::collections::BTreeSet;

/// Widths of usual small models.
const WIDTHS: [u32; 4] = [128, 256, 512, 1024];
/// Tokens of their sequences.
const SEQUENCES: [u32; 2] = [256, 1024];
/// Bytes, and a small vocabulary of words.
const VOCABULARIES: [u32; 2] = [256, 8192];
/// A width at which narrow numbers are measured too: what widening and rounding add to each operator.
const NARROW_WIDTH: u32 = 256;

/// The kernels of llama-like and gpt2-like models of usual widths, over usual sequences: what a profile needs to say
/// something about most jobs that fit a machine of a few cores. In order, without repetition.
pub fn usual_shapes() -> Vec<KernelKey> {
    let mut all = BTreeSet::new();
    for width in WIDTHS {
        for seq in SEQUENCES {
            for vocab in VOCABULARIES {
                for model in [llama(width, vocab), gpt(width, vocab)] {
                    all.extend(kernels(model, seq, Precision::Fp32));
                }
            }
        }
    }
    let (seq, vocab) = (SEQUENCES[0], VOCABULARIES[0]);
    for precision in [Precision::Bf16, Precision::Bf16Fp32Gradients] {
        for model in [llama(NARROW_WIDTH, vocab), gpt(NARROW_WIDTH, vocab)] {
            all.extend(kernels(model, seq, precision));
        }
    }
    all.into_iter().collect()
}

/// Widths of models that are trained on GPUs.
const GPU_WIDTHS: [u32; 4] = [768, 2048, 4096, 8192];
/// Tokens of their sequences.
const GPU_SEQUENCES: [u32; 2] = [1024, 4096];

/// The kernels of such models in 32 bits and in bfloat16, in order, without repetition.
pub fn gpu_shapes() -> Vec<KernelKey> {
    let mut all = BTreeSet::new();
    for width in GPU_WIDTHS {
        for seq in GPU_SEQUENCES {
            for precision in [Precision::Fp32, Precision::Bf16Fp32Gradients] {
                // Heads as wide as tensor cores like them, with their keys shared as llama 3 does.
                let heads = width / if width < 2048 { 64 } else { 128 };
                let head_dim = width / heads;
                let kv_heads = if width < 2048 { heads } else { 8 };
                let model = ModelConfig { heads, kv_heads, head_dim, max_positions: seq, ..llama(width, 32_000) };
                all.extend(kernels(model, seq, precision));
            }
        }
    }
    all.into_iter().collect()
}

fn llama(width: u32, vocab: u32) -> ModelConfig {
    let heads = (width / 64).max(2);
    ModelConfig {
        name: format!("llama-like {width}"),
        layers: 1,
        hidden: width,
        heads,
        kv_heads: heads / 2,
        head_dim: width / heads,
        // Two thirds of four times the width, to a multiple of 128.
        intermediate: (8 * width / 3).next_multiple_of(128),
        vocab,
        max_positions: 1024,
        norm: Norm::RmsNorm,
        norm_epsilon: 1e-5,
        activation: Activation::SwiGlu,
        positions: Positions::Rotary { theta: 10_000.0 },
        qkv_bias: false,
        attention_output_bias: false,
        mlp_bias: false,
        tied_embeddings: false,
    }
}

fn gpt(width: u32, vocab: u32) -> ModelConfig {
    let llama = llama(width, vocab);
    ModelConfig {
        name: format!("gpt-like {width}"),
        kv_heads: llama.heads,
        intermediate: 4 * width,
        norm: Norm::LayerNorm,
        activation: Activation::Gelu,
        positions: Positions::Learned,
        qkv_bias: true,
        attention_output_bias: true,
        mlp_bias: true,
        ..llama
    }
}

/// Kernels of all passes of a model of one block, and of its optimizer.
fn kernels(model: ModelConfig, seq: u32, precision: Precision) -> BTreeSet<KernelKey> {
    let workload = TransformerWorkload {
        model,
        micro_batch: 1,
        seq,
        recompute: Recompute::None,
        tied_on_one_rank: false,
        trainable: Trainable::Full,
        precision,
    };
    let units = [Layer::Embedding, Layer::Block(0), Layer::Head].map(|layer| Unit { layers: vec![layer] });
    let stages = [Stage { units: units.to_vec() }];
    let (stage, microbatch) = (StageId(0), MicrobatchId(0));
    let mut all = BTreeSet::new();
    for pass in [Pass::F, Pass::B, Pass::W, Pass::BW] {
        let kind = OpKind::Compute { pass, stage, microbatch, first: 0, end: 3 };
        all.extend(ModelPass::new(&workload, &stages, 1, &kind).kernel_calls().cloned());
    }
    let block = unit_parameters(&workload, &stages, stage, 1) as u32;
    for op in [KernelOp::SumSquares, KernelOp::AdamW, KernelOp::AdamWAhead, KernelOp::Zero] {
        all.extend(KernelKey::new(op, &[block]).map(|key| key.with(precision.of_gradients_alone())));
    }
    if precision.has_master() {
        all.extend(KernelKey::new(KernelOp::Cast, &[block]).map(|key| key.with(precision.of_values())));
    }
    // Beside adapters, nothing is fused into a product.
    let parts: Vec<KernelKey> = all.iter().flat_map(KernelKey::parts).collect();
    all.extend(parts);
    all
}

/// Shapes next to `keys` and not among them: with half and twice the tokens, and for operators whose time is that of
/// moving bytes, a quarter and four times as many. In order, without repetition.
pub fn grid_around(keys: &[KernelKey]) -> Vec<KernelKey> {
    let known: BTreeSet<&KernelKey> = keys.iter().collect();
    let mut around = BTreeSet::new();
    for key in keys {
        let factors: &[(u64, u64)] =
            if key.op.family() == Family::Memory { &[(1, 4), (1, 2), (2, 1), (4, 1)] } else { &[(1, 2), (2, 1)] };
        for &(times, over) in factors {
            let mut near = key.clone();
            let scale = |dim: &mut u32| {
                let scaled = u64::from(*dim) * times;
                // Rounding would invent shapes that no job has.
                let exact = scaled.is_multiple_of(over).then_some(scaled / over);
                exact.and_then(|d| u32::try_from(d).ok()).filter(|&d| d > 0).map(|d| *dim = d).is_some()
            };
            if scale(&mut near.dims[tokens(key.op)]) && !known.contains(&near) {
                around.insert(near);
            }
        }
    }
    around.into_iter().collect()
}

/// The dimension that grows with the microbatch.
fn tokens(op: KernelOp) -> usize {
    match op {
        // Weight gradients sum over tokens.
        KernelOp::MatmulTn => 2,
        // Sequences of one microbatch.
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use paceline_profiles::DType;

    fn key(op: KernelOp, dims: &[u32]) -> KernelKey {
        KernelKey::new(op, dims).unwrap()
    }

    #[test]
    fn tokens_vary_and_weights_do_not() {
        let around = grid_around(&[
            key(KernelOp::MatmulNt, &[256, 768, 64]),
            key(KernelOp::MatmulNt, &[512, 768, 64]),
            key(KernelOp::MatmulTn, &[768, 64, 256]),
            key(KernelOp::Attention, &[1, 256, 4, 4, 64]),
        ]);
        let expected = [
            key(KernelOp::MatmulNt, &[128, 768, 64]),
            key(KernelOp::MatmulNt, &[1024, 768, 64]),
            key(KernelOp::MatmulTn, &[768, 64, 128]),
            key(KernelOp::MatmulTn, &[768, 64, 512]),
            key(KernelOp::Attention, &[2, 256, 4, 4, 64]),
        ];
        assert_eq!(around, expected);
    }

    #[test]
    fn usual_shapes_leave_out_what_training_does_not_call() {
        let shapes = usual_shapes();
        assert!(shapes.is_sorted() && shapes.len() > 200, "{}", shapes.len());
        let of = |op: KernelOp| shapes.iter().filter(move |key| key.op == op).count();
        // The sum into a third array is left to other layers than ours.
        for op in KernelOp::ALL.into_iter().filter(|op| ![KernelOp::Sum, KernelOp::Cast].contains(op)) {
            assert!(of(op) >= WIDTHS.len(), "{op}: {}", of(op));
            let narrow = |key: &&KernelKey| key.op == op && key.dtype == DType::Bf16;
            assert!(shapes.iter().any(|key| narrow(&key)), "{op} on narrow numbers");
        }
        assert_eq!(of(KernelOp::Cast), 2, "one for each model in bfloat16");
        assert!(shapes.contains(&key(KernelOp::MatmulNt, &[1024, 2048, 512])), "up projection of a gpt 512 wide");
        assert!(shapes.contains(&key(KernelOp::Attention, &[1, 256, 4, 2, 64])), "a llama 256 wide");
    }

    #[test]
    fn sizes_that_do_not_exist_are_left_out() {
        assert_eq!(grid_around(&[key(KernelOp::Add, &[6])]), [3, 12, 24].map(|n| key(KernelOp::Add, &[n])));
        let huge = grid_around(&[key(KernelOp::Zero, &[u32::MAX])]);
        assert!(huge.is_empty(), "{huge:?}");
    }
}
