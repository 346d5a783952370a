use crate::machine::{Random, assert_close, doubles, floats, indices, plus, poisoned, poisoned_halves, run};
use paceline_kernels::Call;
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if crate::PATIENT { 32 } else { 8 }))]

    /// Rounding to bfloat16 is to the nearest, ties to even, and what is exact comes back.
    #[test]
    fn casts_round_to_nearest(len in 0usize..300, seed: u64) {
        let x = Random(seed).floats(len, 1e3);
        let (wide, narrow, back) = (floats(&x), poisoned_halves(len), poisoned(len));
        run(Call::Cast { from: wide.view(), to: narrow.view() });
        for (x, got) in x.iter().zip(narrow.values()) {
            let unit = f64::from(f32::from_bits(((*x as f32).to_bits() & 0x7f80_0000) - (7 << 23)));
            let nearest = (x / unit).round_ties_even() * unit;
            prop_assert!(got == nearest, "{x} becomes {got}, must become {nearest}");
        }
        run(Call::Cast { from: narrow.view(), to: back.view() });
        prop_assert_eq!(back.values(), narrow.values());
    }

    #[test]
    fn sums_and_copies(len in 0usize..400, seed: u64) {
        let mut random = Random(seed);
        let (a, b) = (random.floats(len, 3.0), random.floats(len, 3.0));
        let (x, y) = (floats(&a), floats(&b));
        let (out, to) = (poisoned(len), poisoned(len));
        run(Call::Sum { a: x.view(), b: y.view(), out: out.view() });
        assert_close("out", &out, &plus(&a, &b), 1e-7);
        run(Call::Add { x: x.view(), into: y.view() });
        assert_close("into", &y, &plus(&a, &b), 1e-7);
        run(Call::Copy { from: x.view(), to: to.view() });
        prop_assert_eq!(to.bits(), x.bits());
        run(Call::Zero { x: to.view() });
        prop_assert!(to.bits().iter().all(|&byte| byte == 0));
    }

    #[test]
    fn biases(rows in 1u32..40, cols in 1u32..200, seed: u64) {
        let mut random = Random(seed);
        let (r, c) = (rows as usize, cols as usize);
        let (x, bias) = (random.floats(r * c, 2.0), random.floats(c, 2.0));
        let (x_array, bias_array) = (floats(&x), floats(&bias));
        run(Call::AddBias { x: x_array.view(), bias: bias_array.view(), rows, cols });
        let expected: Vec<f64> = x.iter().enumerate().map(|(i, x)| x + bias[i % c]).collect();
        assert_close("x", &x_array, &expected, 1e-7);

        let (dy, d_bias) = (floats(&x), floats(&bias));
        run(Call::BiasGradient { dy: dy.view(), d_bias: d_bias.view(), rows, cols });
        let expected: Vec<f64> = (0..c).map(|col| bias[col] + x[col..].iter().step_by(c).sum::<f64>()).collect();
        assert_close("d_bias", &d_bias, &expected, 1e-5);
    }
}

#[test]
fn copies_and_zeroes_other_types() {
    let (from, to) = (indices(&[7, u32::MAX, 0]), indices(&[1, 2, 3]));
    run(Call::Copy { from: from.view(), to: to.view() });
    assert_eq!(to.values(), [7.0, f64::from(u32::MAX), 0.0]);
    let norm = doubles(&[4.0]);
    run(Call::Zero { x: norm.view() });
    assert_eq!(norm.values(), [0.0]);
    let (x, into) = (doubles(&[1.0, 1e-12]), doubles(&[2.0, 1.0]));
    run(Call::Add { x: x.view(), into: into.view() });
    assert_eq!(into.values(), [3.0, 1.0 + 1e-12]);
}
