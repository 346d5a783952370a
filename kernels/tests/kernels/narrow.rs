//! Calls on bfloat16 against the same calls on the same values in single precision, which other tests hold against double
//! precision: what differs is the rounding of what is written.

use crate::machine::{Array, Random, floats, halves, indices, poisoned, poisoned_halves, run};
use paceline_kernels::{AttentionShape, Call, head_scratch};
use proptest::prelude::*;

impl Random {
    /// Values in `-bound..bound`, a power of two, that bfloat16 holds exactly (eight bits).
    pub fn halves(&mut self, len: usize, bound: f64) -> Vec<f64> {
        let unit = |bits: u64| (bits >> 56) as f64 / 128.0 - 1.0;
        (0..len).map(|_| unit(self.bits()) * bound).collect()
    }
}

/// Arrays in one of the two types.
#[derive(Clone, Copy)]
struct Types {
    narrow: bool,
}

impl Types {
    fn of(self, values: &[f64]) -> Array {
        if self.narrow { halves(values) } else { floats(values) }
    }

    /// Gradients of weights are as narrow as values, or `wide`.
    fn gradients(self, wide: bool, values: &[f64]) -> Array {
        Types { narrow: self.narrow && !wide }.of(values)
    }

    fn poisoned(self, len: usize) -> Array {
        if self.narrow { poisoned_halves(len) } else { poisoned(len) }
    }
}

/// Runs in both types; results in bfloat16 must be the others', rounded once (`slack` roundings of the largest element where sums
/// were of rounded values).
#[track_caller]
fn compare(slack: f64, outputs: impl Fn(Types) -> Vec<Array>) {
    let (exact, narrow) = (outputs(Types { narrow: false }), outputs(Types { narrow: true }));
    for (n, (exact, narrow)) in exact.iter().zip(&narrow).enumerate() {
        let (exact, narrow) = (exact.values(), narrow.values());
        let largest = exact.iter().fold(0.0f64, |a, b| a.max(b.abs()));
        for (i, (exact, narrow)) in exact.iter().zip(&narrow).enumerate() {
            let allowed = exact.abs() / 256.0 + slack * largest / 256.0 + 1e-6;
            assert!((exact - narrow).abs() <= allowed, "output {n}[{i}]: {narrow} in bf16, {exact} in f32");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10))]

    #[test]
    fn norms(rows in 1u32..5, eights in 1u32..20, odd in 0u32..2, layer_norm: bool, wide: bool, seed: u64) {
        let cols = 8 * eights + odd;
        let (r, c) = (rows as usize, cols as usize);
        let mut random = Random(seed);
        let [x, dy, before] = [2.0, 1.0, 1.0].map(|bound| random.halves(r * c, bound));
        let [gamma, beta] = [1.0, 1.0].map(|bound| random.halves(c, bound));
        compare(0.0, |types| {
            let [x, dy, gamma] = [&x, &dy, &gamma].map(|values| types.of(values));
            let beta = layer_norm.then(|| types.of(&beta));
            let (out, stats) = (types.poisoned(r * c), poisoned(r * (1 + usize::from(layer_norm))));
            let [d_gamma, d_beta] = [0.5, 0.25].map(|before| types.gradients(wide, &vec![before; c]));
            let dx = types.of(&before);
            let [x, dy, gamma, statistics] = [&x, &dy, &gamma, &stats].map(Array::view);
            let (beta, epsilon) = (beta.as_ref().map(Array::view), 1e-5);
            run(Call::Norm { x, gamma, beta, out: out.view(), stats: statistics, rows, cols, epsilon });
            run(Call::NormBackwardInput { x, gamma, stats: statistics, dy, dx: dx.view(), rows, cols, layer_norm });
            let given = layer_norm.then(|| d_beta.view());
            run(Call::NormBackwardWeight { x, stats: statistics, dy, d_gamma: d_gamma.view(), d_beta: given, rows, cols });
            vec![out, stats, dx, d_gamma, d_beta]
        });
    }

    #[test]
    fn activations_and_biases(rows in 1u32..5, eights in 1u32..12, odd in 0u32..2, wide: bool, seed: u64) {
        let cols = 8 * eights + odd;
        let (r, c) = (rows as usize, cols as usize);
        let mut random = Random(seed);
        let (gate_up, d_out, bias) = (random.halves(2 * r * c, 4.0), random.halves(r * c, 1.0), random.halves(c, 1.0));
        compare(0.0, |types| {
            let (gates, slopes) = (types.of(&gate_up), types.of(&d_out));
            let (out, d_gates) = (types.poisoned(r * c), types.poisoned(2 * r * c));
            run(Call::SwiGlu { gate_up: gates.view(), out: out.view(), rows, cols });
            run(Call::SwiGluBackward { gate_up: gates.view(), d_out: slopes.view(), d_gate_up: d_gates.view(), rows, cols });
            let x = types.of(&gate_up[..r * c]);
            let (gelu, d_x) = (types.poisoned(r * c), types.poisoned(r * c));
            run(Call::Gelu { x: x.view(), out: gelu.view() });
            run(Call::GeluBackward { x: x.view(), d_out: slopes.view(), d_x: d_x.view() });
            let (biased, sum) = (types.of(&d_out), types.poisoned(r * c));
            let d_bias = types.gradients(wide, &vec![0.5; c]);
            let bias = types.of(&bias);
            run(Call::AddBias { x: biased.view(), bias: bias.view(), rows, cols });
            run(Call::BiasGradient { dy: slopes.view(), d_bias: d_bias.view(), rows, cols });
            run(Call::Sum { a: x.view(), b: slopes.view(), out: sum.view() });
            run(Call::Add { x: slopes.view(), into: x.view() });
            vec![out, d_gates, gelu, d_x, biased, d_bias, sum, x]
        });
    }

    #[test]
    fn embeddings_and_rotations(
        sequences in 1u32..3,
        seq in 1u32..9,
        pairs in 1u32..9,
        vocab in 1u32..9,
        wide: bool,
        seed: u64,
    ) {
        let shape = AttentionShape { batch: sequences, seq, heads: 2, kv_heads: 1, head_dim: 2 * pairs };
        let (rows, cols) = (sequences * seq, 4 * 2 * pairs);
        let (r, c, v) = (rows as usize, cols as usize, vocab as usize);
        let mut random = Random(seed);
        let tokens = random.indices(r, vocab);
        let [table, positions, slopes] = [v * c, seq as usize * c, r * c].map(|len| random.halves(len, 1.0));
        compare(0.0, |types| {
            let (tokens, table, positions) = (indices(&tokens), types.of(&table), types.of(&positions));
            let (out, slopes) = (types.poisoned(r * c), types.of(&slopes));
            let [tokens, table_view, position_view] = [&tokens, &table, &positions].map(Array::view);
            let given = Some(position_view);
            run(Call::Embedding { tokens, table: table_view, positions: given, out: out.view(), rows, cols, seq });
            let [d_table, d_positions] = [v * c, seq as usize * c].map(|len| types.gradients(wide, &vec![1.0; len]));
            run(Call::EmbeddingBackward {
                tokens,
                d_out: slopes.view(),
                d_table: d_table.view(),
                d_positions: Some(d_positions.view()),
                rows,
                cols,
                seq,
            });
            // Rows of the embedding serve as queries, keys and values.
            run(Call::Rotary { qkv: slopes.view(), shape, theta: 1e4, inverse: false });
            vec![out, d_table, d_positions, slopes]
        });
    }

    #[test]
    fn heads(
        rows in 1u32..9,
        cols in 1u32..20,
        vocab in 1u32..1200,
        chunk in 1u32..9,
        with_dx: bool,
        wide: bool,
        seed: u64,
    ) {
        let (r, c, v) = (rows as usize, cols as usize, vocab as usize);
        let mut random = Random(seed);
        let (x, weight, targets) = (random.halves(r * c, 1.0), random.halves(v * c, 1.0), random.indices(r, vocab));
        let scale = 0.5;
        // Gradients of logits are rounded before they are added.
        compare(4.0, |types| {
            let (x, weight, targets) = (types.of(&x), types.of(&weight), indices(&targets));
            let needed = head_scratch([rows, cols, vocab, chunk], types.narrow && with_dx);
            let (lse, loss, scratch) = (poisoned(r), poisoned(1), poisoned(needed));
            let dx = if with_dx { types.poisoned(r * c) } else { types.of(&vec![0.0; r * c]) };
            let d_weight = types.gradients(wide, &vec![0.5; v * c]);
            let [x, weight, targets, lse_view, scratch] = [&x, &weight, &targets, &lse, &scratch].map(Array::view);
            run(Call::HeadLoss {
                x,
                weight,
                targets,
                lse: lse_view,
                loss: loss.view(),
                scratch,
                rows,
                cols,
                vocab,
                chunk,
            });
            run(Call::HeadBackward {
                x,
                weight,
                targets,
                lse: lse_view,
                dx: with_dx.then(|| dx.view()),
                d_weight: Some(d_weight.view()),
                scratch,
                rows,
                cols,
                vocab,
                chunk,
                scale,
            });
            vec![lse, loss, dx, d_weight]
        });
    }

    #[test]
    fn products(m in 1u32..40, n in 1u32..40, k in 1u32..40, wide: bool, accumulate: bool, seed: u64) {
        let mut random = Random(seed);
        let [a, b, before] = [m * k, k * n, m * n].map(|len| random.halves(len as usize, 1.0));
        compare(0.0, |types| {
            let (a, b) = (types.of(&a), types.of(&b));
            let c = types.gradients(wide, &before);
            let (transpose_a, transpose_b) = (seed & 1 == 1, seed & 2 == 2);
            run(Call::MatMul { a: a.view(), b: b.view(), c: c.view(), m, n, k, transpose_a, transpose_b, accumulate });
            vec![c]
        });
    }

    #[test]
    fn projections(m in 1u32..20, eights in 1u32..5, odd in 0u32..2, k in 1u32..40, seed: u64) {
        let n = 8 * eights + odd;
        let mut random = Random(seed);
        let [x, weight, bias, base] = [m * k, n * k, n, m * n].map(|len| random.halves(len as usize, 1.0));
        // What follows a product reads it rounded, where it is not fused.
        compare(2.0, |types| {
            let [x, weight, bias, base] = [&x, &weight, &bias, &base].map(|values| types.of(values));
            let [sum, input, activated, d_input] = [(); 4].map(|()| types.poisoned((m * n) as usize));
            let [x, weight, bias_view, base_view] = [&x, &weight, &bias, &base].map(Array::view);
            let bias = Some(bias_view);
            run(Call::Project { x, weight, bias, base: Some(base_view), input: None, out: sum.view(), m, n, k });
            let [given, out] = [&input, &activated].map(Array::view);
            run(Call::Project { x, weight, bias, base: None, input: Some(given), out, m, n, k });
            run(Call::ProjectBackGelu { dy: x, weight, input: base_view, d_input: d_input.view(), m, n, k });
            vec![sum, input, activated, d_input]
        });
    }
}

/// Gradients that many rows add to are rounded once, at the end: more rows than a block of columns takes at a time, tokens that occur
/// hundreds of times, rows wider than a block of the embedding holds.
#[test]
fn gradients_of_many_rows_are_rounded_once() {
    let mut random = Random(7);
    for (rows, cols) in [(700u32, 40u32), (3, 2100)] {
        let (r, c) = (rows as usize, cols as usize);
        let (x, dy) = (random.halves(r * c, 2.0), random.halves(r * c, 1.0));
        let tokens: Vec<u32> = (0..rows).map(|row| row % 3 % 2).collect();
        let stats: Vec<f64> = (0..r).flat_map(|_| [0.25, 1.5]).collect();
        compare(0.0, |types| {
            let (x, dy, tokens, stats) = (types.of(&x), types.of(&dy), indices(&tokens), floats(&stats));
            let [d_gamma, d_beta, d_bias] = [c, c, c].map(|len| types.of(&vec![0.5; len]));
            let (d_table, d_positions) = (types.of(&vec![1.0; 2 * c]), types.of(&vec![1.0; c]));
            run(Call::NormBackwardWeight {
                x: x.view(),
                stats: stats.view(),
                dy: dy.view(),
                d_gamma: d_gamma.view(),
                d_beta: Some(d_beta.view()),
                rows,
                cols,
            });
            run(Call::BiasGradient { dy: dy.view(), d_bias: d_bias.view(), rows, cols });
            run(Call::EmbeddingBackward {
                tokens: tokens.view(),
                d_out: dy.view(),
                d_table: d_table.view(),
                d_positions: Some(d_positions.view()),
                rows,
                cols,
                seq: 1,
            });
            vec![d_gamma, d_beta, d_bias, d_table, d_positions]
        });
    }
}
