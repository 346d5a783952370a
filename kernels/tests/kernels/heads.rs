use crate::machine::{Random, assert_close, dot, floats, gradient, indices, plus, poisoned, run};
use paceline_kernels::{Call, head_scratch};
use proptest::prelude::*;

/// Logarithms of the sums of exponentials, and losses, per row.
fn reference(x: &[f64], weight: &[f64], targets: &[u32], cols: usize) -> (Vec<f64>, Vec<f64>) {
    x.chunks(cols)
        .zip(targets)
        .map(|(x, &target)| {
            let logits: Vec<f64> = weight.chunks(cols).map(|w| dot(x, w)).collect();
            let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let lse = largest + logits.iter().map(|l| (l - largest).exp()).sum::<f64>().ln();
            (lse, lse - logits[target as usize])
        })
        .unzip()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if crate::PATIENT { 32 } else { 8 }))]
    #[test]
    fn loss_and_its_gradients(
        rows in 1u32..10,
        cols in 1u32..12,
        vocab in 1u32..90,
        chunk in 1u32..12,
        bound in prop_oneof![Just(1.0), Just(8.0)],
        seed: u64,
    ) {
        let mut random = Random(seed);
        let (r, c, v) = (rows as usize, cols as usize, vocab as usize);
        let (x, weight) = (random.floats(r * c, bound), random.floats(v * c, 1.0));
        let targets = random.indices(r, vocab);
        let (expected_lse, losses) = reference(&x, &weight, &targets, c);
        let (x_array, weight_array, target_array) = (floats(&x), floats(&weight), indices(&targets));
        let (lse, loss, scratch) = (poisoned(r), poisoned(1), poisoned(head_scratch([rows, cols, vocab, chunk], false)));
        run(Call::HeadLoss {
            x: x_array.view(),
            weight: weight_array.view(),
            targets: target_array.view(),
            lse: lse.view(),
            loss: loss.view(),
            scratch: scratch.view(),
            rows,
            cols,
            vocab,
            chunk,
        });
        assert_close("lse", &lse, &expected_lse, 3e-6);
        assert_close("loss", &loss, &[losses.iter().sum::<f64>() / f64::from(rows)], 5e-6);

        let scale = 0.37f32;
        let total = |x: &[f64], weight: &[f64]| -> f64 {
            f64::from(scale) * reference(x, weight, &targets, c).1.iter().sum::<f64>()
        };
        let expected_dx = gradient(&x, |x| total(x, &weight));
        let before = random.floats(v * c, 1.0);
        let expected_weight = plus(&before, &gradient(&weight, |weight| total(&x, weight)));
        for (with_dx, with_weight) in [(true, true), (true, false), (false, true)] {
            let (dx, d_weight) = (poisoned(r * c), floats(&before));
            let scratch = poisoned(head_scratch([rows, cols, vocab, chunk], false));
            run(Call::HeadBackward {
                x: x_array.view(),
                weight: weight_array.view(),
                targets: target_array.view(),
                lse: lse.view(),
                dx: with_dx.then(|| dx.view()),
                d_weight: with_weight.then(|| d_weight.view()),
                scratch: scratch.view(),
                rows,
                cols,
                vocab,
                chunk,
                scale,
            });
            if with_dx {
                assert_close("dx", &dx, &expected_dx, 2e-5);
            }
            assert_close("d_weight", &d_weight, if with_weight { &expected_weight } else { &before }, 2e-5);
        }
    }
}
