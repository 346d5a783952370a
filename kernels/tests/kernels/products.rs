use crate::machine::{Random, assert_close, floats, poisoned, run};
use paceline_kernels::Call;
use proptest::prelude::*;

fn reference(a: &[f64], b: &[f64], [m, n, k]: [usize; 3], transpose_a: bool, transpose_b: bool) -> Vec<f64> {
    let a_at = |i: usize, l: usize| if transpose_a { a[l * m + i] } else { a[i * k + l] };
    let b_at = |l: usize, j: usize| if transpose_b { b[j * k + l] } else { b[l * n + j] };
    (0..m * n).map(|at| (0..k).map(|l| a_at(at / n, l) * b_at(l, at % n)).sum()).collect()
}

fn check([m, n, k]: [usize; 3], seed: u64) {
    let mut random = Random(seed);
    let (a, b) = (random.floats(m * k, 1.0), random.floats(k * n, 1.0));
    let before = random.floats(m * n, 1.0);
    let (a_array, b_array) = (floats(&a), floats(&b));
    for transpose_a in [false, true] {
        for transpose_b in [false, true] {
            let product = reference(&a, &b, [m, n, k], transpose_a, transpose_b);
            for accumulate in [false, true] {
                let c = if accumulate { floats(&before) } else { poisoned(m * n) };
                run(Call::MatMul {
                    a: a_array.view(),
                    b: b_array.view(),
                    c: c.view(),
                    m: m as u32,
                    n: n as u32,
                    k: k as u32,
                    transpose_a,
                    transpose_b,
                    accumulate,
                });
                let expected: Vec<f64> =
                    product.iter().zip(&before).map(|(p, c)| if accumulate { p + c } else { *p }).collect();
                let name = format!("c {m}x{n}x{k} {transpose_a} {transpose_b} {accumulate}");
                assert_close(&name, &c, &expected, 1e-6 * (k as f64).sqrt() + 1e-6);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if crate::PATIENT { 48 } else { 12 }))]
    #[test]
    fn products_of_odd_shapes(m in 1usize..70, n in 1usize..70, k in 1usize..70, seed: u64) {
        check([m, n, k], seed);
    }
}

/// GELU in its tanh form, and its slope.
fn gelu(x: f64) -> (f64, f64) {
    let root = (2.0 / std::f64::consts::PI).sqrt();
    let t = (root * (x + 0.044_715 * x.powi(3))).tanh();
    (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * root * (1.0 + 3.0 * 0.044_715 * x * x))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if crate::PATIENT { 48 } else { 16 }))]
    /// Columns in eights are what libraries can fuse; others take the parts one after the other.
    #[test]
    fn projections_and_what_follows_them(m in 1u32..40, eights in 1u32..6, odd in 0u32..2, k in 1u32..40, seed: u64) {
        let n = 8 * eights + odd;
        let mut random = Random(seed);
        let [x, weight, bias, base] = [m * k, n * k, n, m * n].map(|len| random.floats(len as usize, 1.0));
        let [x_array, weight_array, bias_array, base_array] = [&x, &weight, &bias, &base].map(|values| floats(values));
        let product = reference(&x, &weight, [m, n, k].map(|dim| dim as usize), false, true);
        let tolerance = 1e-6 * f64::from(k).sqrt() + 2e-6;
        for (with_bias, with_base, with_input) in [
            (false, false, false),
            (true, false, false),
            (false, true, false),
            (true, true, false),
            (true, false, true),
            (false, false, true),
        ] {
            let (out, input) = (poisoned((m * n) as usize), poisoned((m * n) as usize));
            run(Call::Project {
                x: x_array.view(),
                weight: weight_array.view(),
                bias: with_bias.then(|| bias_array.view()),
                base: with_base.then(|| base_array.view()),
                input: with_input.then(|| input.view()),
                out: out.view(),
                m,
                n,
                k,
            });
            let added = |at: usize| {
                let bias = if with_bias { bias[at % n as usize] } else { 0.0 };
                bias + if with_base { base[at] } else { 0.0 }
            };
            let sums: Vec<f64> = product.iter().enumerate().map(|(at, product)| product + added(at)).collect();
            let name = format!("{m}x{n}x{k} {with_bias} {with_base} {with_input}");
            if with_input {
                assert_close(&name, &input, &sums, tolerance);
                let expected: Vec<f64> = sums.iter().map(|&x| gelu(x).0).collect();
                assert_close(&name, &out, &expected, 2.0 * tolerance);
            } else {
                assert_close(&name, &out, &sums, tolerance);
            }
        }
        // Back through a GELU: dy [m, k], the projection's matrix [k, n].
        let product = reference(&x, &weight, [m, n, k].map(|dim| dim as usize), false, false);
        let d_input = poisoned((m * n) as usize);
        run(Call::ProjectBackGelu {
            dy: x_array.view(),
            weight: weight_array.view(),
            input: base_array.view(),
            d_input: d_input.view(),
            m,
            n,
            k,
        });
        let expected: Vec<f64> = product.iter().zip(&base).map(|(d, &x)| d * gelu(x).1).collect();
        assert_close("d_input", &d_input, &expected, 2.0 * tolerance);
    }
}

#[test]
fn products_beyond_one_tile() {
    check([3, 1100, 5], 1);
    check([1030, 515, 7], 2);
    check([65, 129, 600], 3);
}
