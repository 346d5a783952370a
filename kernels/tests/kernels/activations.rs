use crate::machine::{Random, assert_close, dot, floats, gradient, poisoned, run};
use paceline_kernels::Call;
use proptest::prelude::*;

fn gelu(x: f64) -> f64 {
    let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
    0.5 * x * (1.0 + u.tanh())
}

fn swiglu(gate_up: &[f64], cols: usize) -> Vec<f64> {
    let silu = |g: f64| g / (1.0 + (-g).exp());
    gate_up
        .chunks(2 * cols)
        .flat_map(|row| (0..cols).map(|c| silu(row[c]) * row[cols + c]).collect::<Vec<_>>())
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if crate::PATIENT { 24 } else { 6 }))]

    #[test]
    fn gelu_and_its_gradient(len in 1usize..200, seed: u64) {
        let mut random = Random(seed);
        let (x, d_out) = (random.floats(len, 5.0), random.floats(len, 1.0));
        let (x_array, d_array) = (floats(&x), floats(&d_out));
        let (out, d_x) = (poisoned(len), poisoned(len));
        run(Call::Gelu { x: x_array.view(), out: out.view() });
        assert_close("out", &out, &x.iter().map(|&x| gelu(x)).collect::<Vec<_>>(), 1e-6);
        run(Call::GeluBackward { x: x_array.view(), d_out: d_array.view(), d_x: d_x.view() });
        let expected = gradient(&x, |x| dot(&d_out, &x.iter().map(|&x| gelu(x)).collect::<Vec<_>>()));
        assert_close("d_x", &d_x, &expected, 2e-6);
    }

    #[test]
    fn swiglu_and_its_gradient(rows in 1u32..6, cols in 1u32..50, seed: u64) {
        let mut random = Random(seed);
        let (r, c) = (rows as usize, cols as usize);
        let (gate_up, d_out) = (random.floats(2 * r * c, 5.0), random.floats(r * c, 1.0));
        let (g_array, d_array) = (floats(&gate_up), floats(&d_out));
        let (out, d_gate_up) = (poisoned(r * c), poisoned(2 * r * c));
        run(Call::SwiGlu { gate_up: g_array.view(), out: out.view(), rows, cols });
        assert_close("out", &out, &swiglu(&gate_up, c), 1e-6);
        let (d_out_view, d_view) = (d_array.view(), d_gate_up.view());
        run(Call::SwiGluBackward { gate_up: g_array.view(), d_out: d_out_view, d_gate_up: d_view, rows, cols });
        let expected = gradient(&gate_up, |x| dot(&d_out, &swiglu(x, c)));
        assert_close("d_gate_up", &d_gate_up, &expected, 2e-6);
    }
}

/// Far from zero the exponentials leave the range of single precision; values and slopes must not.
#[test]
fn extreme_inputs_stay_finite() {
    let x = [-1e30, -1000.0, -100.0, -20.0, 20.0, 100.0, 1000.0, 1e30];
    let (x_array, ones) = (floats(&x), floats(&[1.0; 8]));
    let (out, d_x) = (poisoned(8), poisoned(8));
    run(Call::Gelu { x: x_array.view(), out: out.view() });
    assert_close("gelu", &out, &x.map(|x| if x > 0.0 { f64::from(x as f32) } else { 0.0 }), 1e-6);
    let moderate = floats(&[-1e4, -1000.0, -100.0, -20.0, 20.0, 100.0, 1000.0, 1e4]);
    run(Call::GeluBackward { x: moderate.view(), d_out: ones.view(), d_x: d_x.view() });
    assert_close("gelu slope", &d_x, &[0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0], 1e-6);
    let gates = floats(&[-1e30, -200.0, 200.0, 1e30, 1.0, 1.0, 1.0, 1.0]);
    let out = poisoned(4);
    run(Call::SwiGlu { gate_up: gates.view(), out: out.view(), rows: 1, cols: 4 });
    assert_close("swiglu", &out, &[0.0, 0.0, 200.0, f64::from(1e30f32)], 1e-6);
}

/// The exponential behind all of them, over its whole range, through the SwiGLU of `-x`: `1 / (1 + e^x)` is `e^-x` where
/// `x` is large.
#[test]
fn sigmoid_is_precise_in_its_tail() {
    let x: Vec<f64> = (0..4000).map(|i| f64::from(-(i as f32) * 0.02)).collect();
    let row: Vec<f64> = x.iter().copied().chain(x.iter().map(|_| 1.0)).collect();
    let (gate_up, out) = (floats(&row), poisoned(x.len()));
    run(Call::SwiGlu { gate_up: gate_up.view(), out: out.view(), rows: 1, cols: x.len() as u32 });
    for (x, got) in x.iter().zip(out.values()) {
        let expected = x / (1.0 + (-x).exp());
        assert!((got - expected).abs() <= 1e-6 * expected.abs(), "silu({x}) is {got}, must be {expected}");
    }
}
