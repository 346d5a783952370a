use crate::machine::{Array, Random, assert_close, dot, floats, gradient, poisoned, run};
use paceline_kernels::{AttentionShape, Call, attention_scratch};
use proptest::prelude::*;

struct Sizes {
    seq: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    width: usize,
}

fn sizes(shape: &AttentionShape) -> Sizes {
    let [seq, heads, kv_heads, dim] = [shape.seq, shape.heads, shape.kv_heads, shape.head_dim].map(|x| x as usize);
    Sizes { seq, heads, kv_heads, dim, width: (heads + 2 * kv_heads) * dim }
}

/// Probabilities of one query of one head over the keys that it sees, and the logarithm of their sum.
fn probabilities(qkv: &[f64], sizes: &Sizes, sequence: usize, head: usize, query: usize) -> (Vec<f64>, f64) {
    let Sizes { seq, heads, kv_heads, dim, width } = *sizes;
    let key_column = (heads + head * kv_heads / heads) * dim;
    let row = |token: usize| &qkv[(sequence * seq + token) * width..][..width];
    let q = &row(query)[head * dim..][..dim];
    let scores: Vec<f64> =
        (0..=query).map(|key| dot(q, &row(key)[key_column..][..dim]) / (dim as f64).sqrt()).collect();
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let lse = largest + scores.iter().map(|s| (s - largest).exp()).sum::<f64>().ln();
    (scores.iter().map(|s| (s - lse).exp()).collect(), lse)
}

/// Output and logarithms of sums.
pub fn forward(qkv: &[f64], shape: &AttentionShape) -> (Vec<f64>, Vec<f64>) {
    let of = sizes(shape);
    let Sizes { seq, heads, kv_heads, dim, width } = of;
    let batch = shape.batch as usize;
    let (mut out, mut lse) = (vec![0.0; batch * seq * heads * dim], vec![0.0; batch * heads * seq]);
    for sequence in 0..batch {
        for head in 0..heads {
            let value_column = (heads + kv_heads + head * kv_heads / heads) * dim;
            for query in 0..seq {
                let (p, l) = probabilities(qkv, &of, sequence, head, query);
                lse[(sequence * heads + head) * seq + query] = l;
                let out = &mut out[((sequence * seq + query) * heads + head) * dim..][..dim];
                for (key, p) in p.iter().enumerate() {
                    let value = &qkv[(sequence * seq + key) * width + value_column..][..dim];
                    out.iter_mut().zip(value).for_each(|(out, value)| *out += p * value);
                }
            }
        }
    }
    (out, lse)
}

/// The gradient of `dot(d_out, out)`, from the definition of softmax.
pub fn backward(qkv: &[f64], d_out: &[f64], shape: &AttentionShape) -> Vec<f64> {
    let of = sizes(shape);
    let Sizes { seq, heads, kv_heads, dim, width } = of;
    let mut d_qkv = vec![0.0; qkv.len()];
    for sequence in 0..shape.batch as usize {
        for head in 0..heads {
            let group = head * kv_heads / heads;
            let (query_column, key_column) = (head * dim, (heads + group) * dim);
            let value_column = (heads + kv_heads + group) * dim;
            for query in 0..seq {
                let (p, _) = probabilities(qkv, &of, sequence, head, query);
                let d_out = &d_out[((sequence * seq + query) * heads + head) * dim..][..dim];
                let at = |key: usize, column: usize| (sequence * seq + key) * width + column;
                let d_p: Vec<f64> = (0..=query).map(|key| dot(d_out, &qkv[at(key, value_column)..][..dim])).collect();
                let mean = dot(&p, &d_p);
                for key in 0..=query {
                    let d_score = p[key] * (d_p[key] - mean) / (dim as f64).sqrt();
                    for i in 0..dim {
                        d_qkv[at(key, value_column) + i] += p[key] * d_out[i];
                        d_qkv[at(key, key_column) + i] += d_score * qkv[at(query, query_column) + i];
                        d_qkv[at(query, query_column) + i] += d_score * qkv[at(key, key_column) + i];
                    }
                }
            }
        }
    }
    d_qkv
}

struct Outputs {
    out: Array,
    lse: Array,
    d_qkv: Array,
}

fn run_both(qkv: &[f64], d_out: &[f64], shape: AttentionShape) -> Outputs {
    let (qkv_array, d_out_array) = (floats(qkv), floats(d_out));
    let (out, lse) = (poisoned(d_out.len()), poisoned(attention_scratch(&shape)));
    let (d_qkv, scratch) = (poisoned(qkv.len()), poisoned(attention_scratch(&shape)));
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
    Outputs { out, lse, d_qkv }
}

fn inputs(shape: &AttentionShape, bound: f64, seed: u64) -> (Vec<f64>, Vec<f64>) {
    let mut random = Random(seed);
    let of = sizes(shape);
    let tokens = shape.batch as usize * of.seq;
    (random.floats(tokens * of.width, bound), random.floats(tokens * of.heads * of.dim, 1.0))
}

fn check(shape: AttentionShape, bound: f64, seed: u64) {
    let (qkv, d_out) = inputs(&shape, bound, seed);
    let (expected, expected_lse) = forward(&qkv, &shape);
    let outputs = run_both(&qkv, &d_out, shape);
    assert_close("out", &outputs.out, &expected, 1e-5);
    assert_close("lse", &outputs.lse, &expected_lse, 1e-5);
    assert_close("d_qkv", &outputs.d_qkv, &backward(&qkv, &d_out, &shape), 3e-5);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if crate::PATIENT { 12 } else { 3 }))]

    /// The gradients of the kernel and of the reference are those of the forward pass.
    #[test]
    fn gradients_are_finite_differences(
        batch in 1u32..3,
        seq in 1u32..9,
        group in 1u32..4,
        kv_heads in 1u32..3,
        head_dim in 1u32..6,
        seed: u64,
    ) {
        let shape = AttentionShape { batch, seq, heads: group * kv_heads, kv_heads, head_dim };
        let (qkv, d_out) = inputs(&shape, 1.5, seed);
        let slope = gradient(&qkv, |qkv| dot(&d_out, &forward(qkv, &shape).0));
        for (reference, slope) in backward(&qkv, &d_out, &shape).iter().zip(&slope) {
            prop_assert!((reference - slope).abs() < 1e-7);
        }
        assert_close("d_qkv", &run_both(&qkv, &d_out, shape).d_qkv, &slope, 1e-5);
    }

    /// Blocks that are not full, groups of heads, odd widths.
    #[test]
    fn blocks_of_any_shape(
        batch in 1u32..3,
        seq in 50u32..if crate::PATIENT { 140 } else { 70 },
        group in 1u32..4,
        kv_heads in 1u32..3,
        head_dim in 1u32..40,
        seed: u64,
    ) {
        check(AttentionShape { batch, seq, heads: group * kv_heads, kv_heads, head_dim }, 1.0, seed);
    }
}

/// Several panels of keys: the running softmax is rescaled; whole and broken panels.
#[test]
fn sequences_of_several_panels() {
    let long = [(256, 64, 1.0), (257, 8, 3.0), (700, 16, 4.0), (1025, 4, 2.0)];
    for (seq, head_dim, bound) in
        if crate::PATIENT { &long[..] } else { &[(131, 64, 1.0), (97, 8, 3.0)] }.iter().copied()
    {
        check(AttentionShape { batch: 1, seq, heads: 2, kv_heads: 1, head_dim }, bound, u64::from(seq));
    }
}

/// Scores of hundreds: their exponentials exist only relative to the largest.
#[test]
fn large_scores_do_not_overflow() {
    let seq = if crate::PATIENT { 300 } else { 150 };
    let shape = AttentionShape { batch: 1, seq, heads: 1, kv_heads: 1, head_dim: 16 };
    let (qkv, d_out) = inputs(&shape, 30.0, 9);
    let outputs = run_both(&qkv, &d_out, shape);
    assert_close("out", &outputs.out, &forward(&qkv, &shape).0, 3e-3);
    assert!(outputs.d_qkv.values().iter().all(|x| x.is_finite()));
}

/// The same bits again, and on another thread.
#[test]
fn results_do_not_depend_on_the_thread() {
    let seq = if crate::PATIENT { 333 } else { 37 };
    let shape = AttentionShape { batch: 2, seq, heads: 4, kv_heads: 2, head_dim: 32 };
    let bits = move || {
        let (qkv, d_out) = inputs(&shape, 1.0, 3);
        let outputs = run_both(&qkv, &d_out, shape);
        [outputs.out.bits(), outputs.lse.bits(), outputs.d_qkv.bits()]
    };
    let here = bits();
    assert!(here == bits());
    assert!(here == std::thread::spawn(bits).join().unwrap());
}
