use crate::machine::{Random, assert_close, floats, run};
use paceline_kernels::{AttentionShape, Call};
use proptest::prelude::*;

fn reference(qkv: &[f64], shape: &AttentionShape, theta: f64) -> Vec<f64> {
    let (dim, turned) = (shape.head_dim as usize, (shape.heads + shape.kv_heads) as usize);
    let width = (shape.heads + 2 * shape.kv_heads) as usize * dim;
    let mut out = qkv.to_vec();
    for (row, values) in out.chunks_mut(width).enumerate() {
        let position = (row % shape.seq as usize) as f64;
        for head in values.chunks_mut(dim).take(turned) {
            for i in 0..dim / 2 {
                let angle = position * theta.powf(-2.0 * i as f64 / dim as f64);
                let (x, y) = (head[i], head[i + dim / 2]);
                head[i] = x * angle.cos() - y * angle.sin();
                head[i + dim / 2] = y * angle.cos() + x * angle.sin();
            }
        }
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if crate::PATIENT { 24 } else { 6 }))]
    #[test]
    fn turns_queries_and_keys_and_back(
        batch in 1u32..4,
        seq in 1u32..40,
        group in 1u32..4,
        kv_heads in 1u32..4,
        pairs in 1u32..20,
        seed: u64,
    ) {
        let shape = AttentionShape { batch, seq, heads: group * kv_heads, kv_heads, head_dim: 2 * pairs };
        let len = (batch * seq * (shape.heads + 2 * kv_heads) * shape.head_dim) as usize;
        let qkv = Random(seed).floats(len, 1.0);
        let array = floats(&qkv);
        run(Call::Rotary { qkv: array.view(), shape, theta: 10_000.0, inverse: false });
        assert_close("turned", &array, &reference(&qkv, &shape, 10_000.0), 3e-7);
        run(Call::Rotary { qkv: array.view(), shape, theta: 10_000.0, inverse: true });
        assert_close("turned back", &array, &qkv, 6e-7);
    }
}

/// The cached table grows with the sequence, and bases do not share one.
#[test]
fn long_sequences_and_other_bases() {
    for (seq, theta) in [(8, 500.0), (3000, 500.0), (5, 500.0), (3000, 1e6)] {
        let shape = AttentionShape { batch: 2, seq, heads: 1, kv_heads: 1, head_dim: 6 };
        let qkv = Random(u64::from(seq)).floats((2 * seq * 3 * 6) as usize, 1.0);
        let array = floats(&qkv);
        run(Call::Rotary { qkv: array.view(), shape, theta, inverse: false });
        assert_close("turned", &array, &reference(&qkv, &shape, f64::from(theta)), 3e-7);
    }
}
