//! Attention on tensor cores against the definition in double precision: every head width that has a kernel, sequences that do
//! not fill their tiles, groups of heads, several sequences.

use crate::attention::{backward, forward};
use crate::machine::{Array, Random, halves, poisoned, poisoned_halves, run};
use paceline_kernels::{AttentionShape, Call, attention_scratch};

struct Case {
    qkv: Vec<f64>,
    d_out: Vec<f64>,
    out: Array,
    lse: Array,
    d_qkv: Array,
}

fn run_case(shape: AttentionShape, bound: f64, seed: u64) -> Case {
    let AttentionShape { batch, seq, heads, kv_heads, head_dim } = shape;
    let tokens = (batch * seq) as usize;
    let mut random = Random(seed);
    let qkv = random.halves(tokens * ((heads + 2 * kv_heads) * head_dim) as usize, bound);
    let d_out = random.halves(tokens * (heads * head_dim) as usize, 1.0);
    let (qkv_array, d_out_array) = (halves(&qkv), halves(&d_out));
    let (out, d_qkv) = (poisoned_halves(d_out.len()), poisoned_halves(qkv.len()));
    let (lse, scratch) = (poisoned(attention_scratch(&shape)), poisoned(attention_scratch(&shape)));
    run(Call::Attention { qkv: qkv_array.view(), out: out.view(), lse: lse.view(), shape });
    run(Call::AttentionBackward {
        qkv: qkv_array.view(),
        out: out.view(),
        lse: lse.view(),
        d_out: d_out_array.view(),
        d_qkv: d_qkv.view(),
        scratch: scratch.view(),
        shape,
    });
    Case { qkv, d_out, out, lse, d_qkv }
}

/// Probabilities, results and what the backward pass reads of them are rounded to bfloat16 (2^-9 relative), so errors are small
/// against the whole: within a hundredth in the mean, a tenth anywhere.
#[track_caller]
fn assert_near(name: &str, got: &Array, expected: &[f64]) {
    let norm =
        |values: &mut dyn Iterator<Item = f64>| (values.map(|x| x * x).sum::<f64>() / expected.len() as f64).sqrt();
    let scale = norm(&mut expected.iter().copied());
    let errors: Vec<f64> = got.values().iter().zip(expected).map(|(got, expected)| got - expected).collect();
    let mean = norm(&mut errors.iter().copied()) / scale;
    assert!(mean <= 1e-2, "{name} is off by {mean} of its root mean square");
    let (worst, error) = errors.iter().enumerate().max_by(|a, b| a.1.abs().total_cmp(&b.1.abs())).unwrap();
    let relative = error.abs() / expected[worst].abs().max(scale);
    assert!(
        relative <= 0.1,
        "{name}[{worst}] is off by {error}, must be {} (root mean square {scale})",
        expected[worst]
    );
}

fn check(shape: AttentionShape, bound: f64, seed: u64) {
    let case = run_case(shape, bound, seed);
    let (out, lse) = forward(&case.qkv, &shape);
    assert_near("out", &case.out, &out);
    for (got, expected) in case.lse.values().iter().zip(&lse) {
        assert!((got - expected).abs() <= 1e-5 * expected.abs().max(1.0), "lse is {got}, must be {expected}");
    }
    assert_near("d_qkv", &case.d_qkv, &backward(&case.qkv, &case.d_out, &shape));
}

#[test]
fn every_head_width_with_tiles_that_are_not_full() {
    for (head_dim, seq) in [(32, 150), (64, 131), (96, 135), (128, 129)] {
        check(AttentionShape { batch: 1, seq, heads: 1, kv_heads: 1, head_dim }, 1.0, u64::from(seq));
    }
}

#[test]
fn groups_of_heads_and_several_sequences() {
    check(AttentionShape { batch: 2, seq: 70, heads: 4, kv_heads: 2, head_dim: 64 }, 1.0, 5);
    check(AttentionShape { batch: 2, seq: 33, heads: 3, kv_heads: 1, head_dim: 32 }, 2.0, 6);
}

#[test]
fn sequences_of_one_tile_and_of_one_token() {
    for seq in [1, 16, 17, 64, 128] {
        check(AttentionShape { batch: 1, seq, heads: 2, kv_heads: 2, head_dim: 32 }, 1.0, u64::from(seq) + 40);
    }
}

/// The largest score changes from tile to tile, so the running sums are rescaled; scores of some hundred.
#[test]
fn large_scores() {
    let shape = AttentionShape { batch: 1, seq: 200, heads: 1, kv_heads: 1, head_dim: 64 };
    let case = run_case(shape, 16.0, 8);
    let (out, _) = forward(&case.qkv, &shape);
    assert_near("out", &case.out, &out);
    assert!(case.d_qkv.values().iter().all(|x| x.is_finite()));
}

/// Widths without a tensor-core kernel take the plain one; so do rows that are not aligned.
#[test]
fn other_widths_in_bfloat16() {
    check(AttentionShape { batch: 1, seq: 40, heads: 2, kv_heads: 1, head_dim: 48 }, 1.0, 11);
    check(AttentionShape { batch: 2, seq: 21, heads: 2, kv_heads: 2, head_dim: 5 }, 1.0, 12);
}

#[test]
fn heads_that_are_too_wide_are_refused() {
    let shape = AttentionShape { batch: 1, seq: 2, heads: 1, kv_heads: 1, head_dim: 264 };
    let (qkv, out, lse) = (poisoned(2 * 3 * 264), poisoned(2 * 264), poisoned(2));
    let call = Call::Attention { qkv: qkv.view(), out: out.view(), lse: lse.view(), shape };
    let error = crate::machine::try_run(call).unwrap_err().to_string();
    assert!(error.contains("264") && error.contains("256"), "{error}");
}
