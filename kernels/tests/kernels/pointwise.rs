use crate::machine::{Random, assert_close, doubles, floats, indices, plus, poisoned, run};
use paceline_kernels::Call;
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

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
}
