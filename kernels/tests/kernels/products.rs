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

#[test]
fn products_beyond_one_tile() {
    check([3, 1100, 5], 1);
    check([1030, 515, 7], 2);
    check([65, 129, 600], 3);
}
