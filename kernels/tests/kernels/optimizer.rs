use crate::machine::{Random, assert_close, doubles, floats, halves, poisoned_halves, run};
use paceline_kernels::{AdamW, Call, Decays};
use proptest::prelude::*;

/// Up to as many runs as a call may have, and whether each element decays.
fn random_decays(random: &mut Random, len: usize) -> (Decays, Vec<bool>) {
    let wanted = random.bits() as usize % (Decays::MOST + 1);
    let mut borders: Vec<u32> = random.indices(wanted, len as u32).into_iter().filter(|&border| border > 0).collect();
    borders.sort_unstable();
    borders.dedup();
    let first = random.bits().is_multiple_of(2);
    let turns = |i: usize| borders.iter().filter(|&&border| border as usize <= i).count();
    let decaying = (0..len).map(|i| first == (turns(i) % 2 == 0)).collect();
    (Decays::new(first, &borders).unwrap(), decaying)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if crate::PATIENT { 32 } else { 8 }))]

    #[test]
    fn sum_of_squares_adds_in_double_precision(len in 0usize..500, seed: u64) {
        let x = Random(seed).floats(len, 3.0);
        let (x_array, out) = (floats(&x), doubles(&[0.25]));
        run(Call::SumSquares { x: x_array.view(), out: out.view() });
        assert_close("out", &out, &[0.25 + x.iter().map(|x| x * x).sum::<f64>()], 1e-14);
        let x = Random(seed).halves(len, 4.0);
        let (x_array, out) = (halves(&x), doubles(&[0.25]));
        run(Call::SumSquares { x: x_array.view(), out: out.view() });
        assert_close("out", &out, &[0.25 + x.iter().map(|x| x * x).sum::<f64>()], 1e-14);
    }

    #[test]
    fn steps_follow_the_published_update(
        len in 1usize..200,
        clip in prop_oneof![Just(None), (0.01f32..10.0).prop_map(Some)],
        narrow: bool,
        seed: u64,
    ) {
        let mut random = Random(seed);
        let (decays, decaying) = random_decays(&mut random, len);
        let (mut p, mut m, mut v) = (random.floats(len, 1.0), vec![0.0; len], vec![0.0; len]);
        let (parameters, first, second) = (floats(&p), floats(&m), floats(&v));
        for step in 1..=4 {
            let with = AdamW {
                lr: 0.03,
                beta1: 0.875,
                beta2: 0.984_375,
                epsilon: 1e-6,
                weight_decay: 0.125,
                step,
                clip,
            };
            let g = if narrow { random.halves(len, 1.0) } else { random.floats(len, 1.0) };
            let squared: f64 = g.iter().map(|g| g * g).sum();
            let (gradients, norm) = (if narrow { halves(&g) } else { floats(&g) }, doubles(&[squared]));
            // Every other step leaves a rounded copy.
            let rounded = poisoned_halves(len);
            run(Call::AdamW {
                parameters: parameters.view(),
                gradients: gradients.view(),
                first: first.view(),
                second: second.view(),
                rounded: (step % 2 == 0).then(|| rounded.view()),
                norm: norm.view(),
                decays,
                with,
            });
            if step % 2 == 0 {
                let copy = poisoned_halves(len);
                run(Call::Cast { from: parameters.view(), to: copy.view() });
                prop_assert_eq!(rounded.bits(), copy.bits());
            } else {
                prop_assert!(rounded.values().iter().all(|x| x.is_nan()));
            }
            let coefficient = clip.map_or(1.0, |clip| (f64::from(clip) / (squared.sqrt() + 1e-6)).min(1.0));
            let (b1, b2, lr) = (f64::from(with.beta1), f64::from(with.beta2), f64::from(with.lr));
            let (c1, c2) = (1.0 - b1.powi(step as i32), 1.0 - b2.powi(step as i32));
            for i in 0..len {
                let g = coefficient * g[i];
                m[i] = b1 * m[i] + (1.0 - b1) * g;
                v[i] = b2 * v[i] + (1.0 - b2) * g * g;
                p[i] -= if decaying[i] { lr * f64::from(with.weight_decay) * p[i] } else { 0.0 };
                p[i] -= lr * (m[i] / c1) / ((v[i] / c2).sqrt() + f64::from(with.epsilon));
            }
            assert_close("first", &first, &m, 1e-6);
            assert_close("second", &second, &v, 1e-6);
            assert_close("parameters", &parameters, &p, 2e-6 * f64::from(step));
            prop_assert!(gradients.bits().iter().all(|&byte| byte == 0), "gradients are zeroed");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn a_step_ahead_is_the_unclipped_step_to_the_bit(len in 1usize..300, step in 1u32..1000, narrow: bool, seed: u64) {
        let mut random = Random(seed);
        let (decays, _) = random_decays(&mut random, len);
        let [p, mut g, m] = [1.0, 0.1, 0.1].map(|size| random.floats(len, size));
        let v: Vec<f64> = random.floats(len, 0.1).iter().map(|x| x * x).collect();
        let with =
            AdamW { lr: 0.03, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1, step, clip: Some(1e-3) };
        if narrow {
            g = random.halves(len, 0.125);
        }
        let gradients = if narrow { halves(&g) } else { floats(&g) };
        let [first, second] = [&m, &v].map(|values| floats(values));
        let (ahead, kept, true_step) = (floats(&p), floats(&vec![9.0; len]), floats(&p));
        run(Call::AdamWAhead {
            parameters: ahead.view(),
            kept: kept.view(),
            gradients: gradients.view(),
            first: first.view(),
            second: second.view(),
            decays,
            with,
        });
        for (array, before) in [(&kept, &p), (&first, &m), (&second, &v)] {
            prop_assert_eq!(array.bits(), floats(before).bits());
        }
        prop_assert_eq!(gradients.values(), g);
        let norm = doubles(&[1e9]);
        run(Call::AdamW {
            parameters: true_step.view(),
            gradients: gradients.view(),
            first: first.view(),
            second: second.view(),
            rounded: None,
            norm: norm.view(),
            decays,
            with: AdamW { clip: None, ..with },
        });
        prop_assert_eq!(ahead.bits(), true_step.bits());
        prop_assert_ne!(ahead.bits(), kept.bits());
    }
}

/// A gradient that is not a number must not be clipped away.
#[test]
fn a_norm_that_is_not_a_number_reaches_the_parameters() {
    let [parameters, gradients, first, second] = [1.0, 0.5, 0.0, 0.0].map(|x| floats(&[x]));
    let norm = doubles(&[f64::NAN]);
    let with = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.0, step: 1, clip: Some(1.0) };
    run(Call::AdamW {
        parameters: parameters.view(),
        gradients: gradients.view(),
        first: first.view(),
        second: second.view(),
        rounded: None,
        norm: norm.view(),
        decays: Decays::all(true),
        with,
    });
    assert!(parameters.values()[0].is_nan());
}
