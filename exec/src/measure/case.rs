//! A kernel at a shape, as a call on real operands.

use paceline_kernels::{AdamW, AttentionShape, Call, DType, Decays, View, attention_scratch, head_scratch};
use paceline_profiles::{DType as Format, KernelKey, KernelOp};

/// What an operand is to its call; decides where it lies when the call is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// Made by the kernel before: still in the cache.
    Fresh,
    /// Read (weights, what the forward saved): wherever the working set left it.
    Read,
    /// Written or updated.
    Written,
    /// Token ids, `u32`, below every vocabulary.
    Tokens,
    /// An `f64`, updated.
    Wide,
}

/// What keys leave open.
#[derive(Debug, Clone)]
pub(super) struct Context {
    /// Rows of the embedding table, and a bound on token ids.
    pub vocab: u32,
    /// Attention shapes of the same job: they tell how many heads a rotation has.
    attention: Vec<AttentionShape>,
}

/// Rows of an embedding table where no key of a head tells: all bytes.
const BYTES: u32 = 256;

impl Context {
    /// What the keys together tell.
    pub fn of(keys: &[&KernelKey]) -> Context {
        let attention = keys.iter().filter(|key| matches!(key.op, KernelOp::Attention | KernelOp::AttentionBackward));
        let vocab = keys.iter().filter_map(|key| match key.op {
            KernelOp::HeadLoss
            | KernelOp::HeadBackward
            | KernelOp::HeadBackwardInput
            | KernelOp::HeadBackwardWeight => Some(key.dims[2]),
            _ => None,
        });
        Context { vocab: vocab.min().unwrap_or(BYTES), attention: attention.map(|key| attention_shape(key)).collect() }
    }

    /// A shape with so many tokens and so many columns of queries and keys.
    fn rotary(&self, rows: u32, cols: u32) -> AttentionShape {
        let of_job = self.attention.iter().filter(|s| (s.heads + s.kv_heads) * s.head_dim == cols);
        let tokens = |s: &AttentionShape| s.batch * s.seq;
        if let Some(shape) = of_job.clone().find(|s| tokens(s) == rows).or(of_job.clone().next()) {
            let seq = if rows.is_multiple_of(shape.seq) { shape.seq } else { rows };
            return AttentionShape { batch: rows / seq, seq, ..*shape };
        }
        // The widest even head up to 64 that leaves at least one head for queries and one for keys.
        let head_dim = (1..=32).rev().map(|n| 2 * n).find(|d| cols.is_multiple_of(*d) && cols / d >= 2);
        let head_dim = head_dim.unwrap_or(cols);
        AttentionShape { batch: 1, seq: rows, heads: (cols / head_dim).saturating_sub(1), kv_heads: 1, head_dim }
    }
}

fn attention_shape(key: &KernelKey) -> AttentionShape {
    let [batch, seq, heads, kv_heads, head_dim] = [0, 1, 2, 3, 4].map(|n| key.dims[n]);
    AttentionShape { batch, seq, heads, kv_heads, head_dim }
}

/// The call of a key; `place` finds room for `len` elements of a role, in the order of the call's operands.
pub(super) fn call(key: &KernelKey, context: &Context, place: &mut dyn FnMut(Role, DType, usize) -> View) -> Call {
    use DType::{BF16, F32, F64, U32};
    use Role::{Fresh, Read, Tokens, Wide, Written};
    // What values are, and gradients of parameters; statistics, logits, weights and moments of the optimizer are 32-bit.
    let values = if key.dtype == Format::F32 { F32 } else { BF16 };
    let gradients = if key.dtype == Format::Bf16 { BF16 } else { F32 };
    let dim = |n: usize| key.dims[n];
    let size = |dims: &[u32]| dims.iter().fold(1usize, |all, &d| all.saturating_mul(d as usize));
    let mut put = |role, dtype, dims: &[u32]| place(role, dtype, size(dims));
    match key.op {
        KernelOp::MatmulNn | KernelOp::MatmulNt | KernelOp::MatmulTn => {
            let (m, n, k) = (dim(0), dim(1), dim(2));
            // Weight gradients add up over microbatches.
            let weights = key.op == KernelOp::MatmulTn;
            Call::MatMul {
                a: put(Fresh, values, &[m, k]),
                b: put(Read, values, &[k, n]),
                c: put(Written, if weights { gradients } else { values }, &[m, n]),
                m,
                n,
                k,
                transpose_a: weights,
                transpose_b: key.op == KernelOp::MatmulNt,
                accumulate: weights,
            }
        }
        KernelOp::ProjectBias | KernelOp::ProjectBiasGelu | KernelOp::ProjectBiasAdd | KernelOp::ProjectAdd => {
            let (m, n, k) = (dim(0), dim(1), dim(2));
            let added = matches!(key.op, KernelOp::ProjectBiasAdd | KernelOp::ProjectAdd);
            Call::Project {
                x: put(Fresh, values, &[m, k]),
                weight: put(Read, values, &[n, k]),
                bias: (key.op != KernelOp::ProjectAdd).then(|| put(Read, values, &[n])),
                base: added.then(|| put(Read, values, &[m, n])),
                input: (key.op == KernelOp::ProjectBiasGelu).then(|| put(Written, values, &[m, n])),
                out: put(Written, values, &[m, n]),
                m,
                n,
                k,
            }
        }
        KernelOp::ProjectBackGelu => {
            let (m, n, k) = (dim(0), dim(1), dim(2));
            Call::ProjectBackGelu {
                dy: put(Fresh, values, &[m, k]),
                weight: put(Read, values, &[k, n]),
                input: put(Read, values, &[m, n]),
                d_input: put(Written, values, &[m, n]),
                m,
                n,
                k,
            }
        }
        KernelOp::AddBias => {
            let (rows, cols) = (dim(0), dim(1));
            Call::AddBias { x: put(Fresh, values, &[rows, cols]), bias: put(Read, values, &[cols]), rows, cols }
        }
        KernelOp::BiasGradient => {
            let (rows, cols) = (dim(0), dim(1));
            Call::BiasGradient {
                dy: put(Fresh, values, &[rows, cols]),
                d_bias: put(Written, gradients, &[cols]),
                rows,
                cols,
            }
        }
        KernelOp::RmsNorm | KernelOp::LayerNorm => {
            let (rows, cols) = (dim(0), dim(1));
            let layer = key.op == KernelOp::LayerNorm;
            Call::Norm {
                x: put(Fresh, values, &[rows, cols]),
                gamma: put(Read, values, &[cols]),
                beta: layer.then(|| put(Read, values, &[cols])),
                out: put(Written, values, &[rows, cols]),
                stats: put(Written, F32, &[rows, 1 + u32::from(layer)]),
                rows,
                cols,
                epsilon: 1e-5,
            }
        }
        KernelOp::RmsNormBackwardInput | KernelOp::LayerNormBackwardInput => {
            let (rows, cols) = (dim(0), dim(1));
            let layer_norm = key.op == KernelOp::LayerNormBackwardInput;
            Call::NormBackwardInput {
                x: put(Read, values, &[rows, cols]),
                gamma: put(Read, values, &[cols]),
                stats: put(Read, F32, &[rows, 1 + u32::from(layer_norm)]),
                dy: put(Fresh, values, &[rows, cols]),
                dx: put(Written, values, &[rows, cols]),
                rows,
                cols,
                layer_norm,
            }
        }
        KernelOp::RmsNormBackwardWeight | KernelOp::LayerNormBackwardWeight => {
            let (rows, cols) = (dim(0), dim(1));
            let layer = key.op == KernelOp::LayerNormBackwardWeight;
            Call::NormBackwardWeight {
                x: put(Read, values, &[rows, cols]),
                stats: put(Read, F32, &[rows, 1 + u32::from(layer)]),
                dy: put(Fresh, values, &[rows, cols]),
                d_gamma: put(Written, gradients, &[cols]),
                d_beta: layer.then(|| put(Written, gradients, &[cols])),
                rows,
                cols,
            }
        }
        KernelOp::Rotary => {
            let shape = context.rotary(dim(0), dim(1));
            let qkv = put(Fresh, values, &[dim(0), shape.heads + 2 * shape.kv_heads, shape.head_dim]);
            Call::Rotary { qkv, shape, theta: 10_000.0, inverse: false }
        }
        KernelOp::Attention => {
            let shape = attention_shape(key);
            let AttentionShape { batch, seq, heads, kv_heads, head_dim } = shape;
            Call::Attention {
                qkv: put(Fresh, values, &[batch, seq, heads.saturating_add(2 * kv_heads), head_dim]),
                out: put(Written, values, &[batch, seq, heads, head_dim]),
                lse: put(Written, F32, &[batch, heads, seq]),
                shape,
            }
        }
        KernelOp::AttentionBackward => {
            let shape = attention_shape(key);
            let AttentionShape { batch, seq, heads, kv_heads, head_dim } = shape;
            let fused = heads.saturating_add(2 * kv_heads);
            Call::AttentionBackward {
                qkv: put(Read, values, &[batch, seq, fused, head_dim]),
                out: put(Read, values, &[batch, seq, heads, head_dim]),
                lse: put(Read, F32, &[batch, heads, seq]),
                d_out: put(Fresh, values, &[batch, seq, heads, head_dim]),
                d_qkv: put(Written, values, &[batch, seq, fused, head_dim]),
                scratch: place(Written, F32, attention_scratch(&shape)),
                shape,
            }
        }
        KernelOp::SwiGlu => {
            let (rows, cols) = (dim(0), dim(1));
            Call::SwiGlu {
                gate_up: put(Fresh, values, &[rows, 2, cols]),
                out: put(Written, values, &[rows, cols]),
                rows,
                cols,
            }
        }
        KernelOp::SwiGluBackward => {
            let (rows, cols) = (dim(0), dim(1));
            Call::SwiGluBackward {
                gate_up: put(Read, values, &[rows, 2, cols]),
                d_out: put(Fresh, values, &[rows, cols]),
                d_gate_up: put(Written, values, &[rows, 2, cols]),
                rows,
                cols,
            }
        }
        KernelOp::Gelu => Call::Gelu { x: put(Fresh, values, &[dim(0)]), out: put(Written, values, &[dim(0)]) },
        KernelOp::GeluBackward => Call::GeluBackward {
            x: put(Read, values, &[dim(0)]),
            d_out: put(Fresh, values, &[dim(0)]),
            d_x: put(Written, values, &[dim(0)]),
        },
        KernelOp::Embedding => {
            let (rows, cols) = (dim(0), dim(1));
            Call::Embedding {
                tokens: put(Tokens, U32, &[rows]),
                table: put(Read, values, &[context.vocab, cols]),
                positions: None,
                out: put(Written, values, &[rows, cols]),
                rows,
                cols,
                seq: rows,
            }
        }
        KernelOp::EmbeddingBackward => {
            let (rows, cols) = (dim(0), dim(1));
            Call::EmbeddingBackward {
                tokens: put(Tokens, U32, &[rows]),
                d_out: put(Fresh, values, &[rows, cols]),
                d_table: put(Written, gradients, &[context.vocab, cols]),
                d_positions: None,
                rows,
                cols,
                seq: rows,
            }
        }
        KernelOp::HeadLoss => {
            let (rows, cols, vocab, chunk) = (dim(0), dim(1), dim(2), dim(3));
            Call::HeadLoss {
                x: put(Fresh, values, &[rows, cols]),
                weight: put(Read, values, &[vocab, cols]),
                targets: put(Tokens, U32, &[rows]),
                lse: put(Written, F32, &[rows]),
                loss: put(Written, F32, &[1]),
                scratch: place(Written, F32, head_scratch([rows, cols, vocab, chunk], false)),
                rows,
                cols,
                vocab,
                chunk,
            }
        }
        KernelOp::HeadBackwardInput | KernelOp::HeadBackwardWeight | KernelOp::HeadBackward => {
            let (rows, cols, vocab, chunk) = (dim(0), dim(1), dim(2), dim(3));
            let both = key.op == KernelOp::HeadBackward;
            Call::HeadBackward {
                x: put(Fresh, values, &[rows, cols]),
                weight: put(Read, values, &[vocab, cols]),
                targets: put(Tokens, U32, &[rows]),
                lse: put(Read, F32, &[rows]),
                dx: (key.op != KernelOp::HeadBackwardWeight).then(|| put(Written, values, &[rows, cols])),
                d_weight: (key.op != KernelOp::HeadBackwardInput).then(|| put(Written, gradients, &[vocab, cols])),
                scratch: place(Written, F32, head_scratch([rows, cols, vocab, chunk], both && values == BF16)),
                rows,
                cols,
                vocab,
                chunk,
                scale: 1.0,
            }
        }
        KernelOp::Add => Call::Add { x: put(Fresh, values, &[dim(0)]), into: put(Written, values, &[dim(0)]) },
        KernelOp::Sum => Call::Sum {
            a: put(Read, values, &[dim(0)]),
            b: put(Fresh, values, &[dim(0)]),
            out: put(Written, values, &[dim(0)]),
        },
        KernelOp::Copy => Call::Copy { from: put(Fresh, values, &[dim(0)]), to: put(Written, values, &[dim(0)]) },
        KernelOp::Cast => Call::Cast { from: put(Fresh, F32, &[dim(0)]), to: put(Written, BF16, &[dim(0)]) },
        KernelOp::Zero => Call::Zero { x: put(Written, values, &[dim(0)]) },
        KernelOp::SumSquares => Call::SumSquares { x: put(Read, values, &[dim(0)]), out: put(Wide, F64, &[1]) },
        KernelOp::AdamW => Call::AdamW {
            parameters: put(Written, F32, &[dim(0)]),
            gradients: put(Written, gradients, &[dim(0)]),
            first: put(Written, F32, &[dim(0)]),
            second: put(Written, F32, &[dim(0)]),
            rounded: (values == BF16).then(|| put(Written, BF16, &[dim(0)])),
            norm: put(Wide, F64, &[1]),
            decays: Decays::all(true),
            with: SLOW_MOMENTS,
        },
        KernelOp::AdamWAhead => Call::AdamWAhead {
            parameters: put(Written, F32, &[dim(0)]),
            kept: put(Written, F32, &[dim(0)]),
            gradients: put(Read, gradients, &[dim(0)]),
            first: put(Read, F32, &[dim(0)]),
            second: put(Read, F32, &[dim(0)]),
            decays: Decays::all(true),
            with: SLOW_MOMENTS,
        },
    }
}

/// Repeated on gradients that it has zeroed, moments must not shrink to subnormal numbers, which are slow.
const SLOW_MOMENTS: AdamW =
    AdamW { lr: 1e-6, beta1: 0.999_99, beta2: 0.999_99, epsilon: 1e-8, weight_decay: 0.1, step: 1, clip: Some(1.0) };
