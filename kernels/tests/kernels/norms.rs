use crate::machine::{Array, Random, assert_close, dot, floats, gradient, plus, poisoned, run};
use paceline_kernels::Call;
use proptest::prelude::*;

const EPSILON: f64 = 1e-5;

/// Output and statistics.
fn reference(x: &[f64], gamma: &[f64], beta: Option<&[f64]>) -> (Vec<f64>, Vec<f64>) {
    let cols = gamma.len();
    let (mut out, mut stats) = (Vec::new(), Vec::new());
    for row in x.chunks(cols) {
        let mean = if beta.is_some() { row.iter().sum::<f64>() / cols as f64 } else { 0.0 };
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / cols as f64;
        let rstd = 1.0 / (variance + EPSILON).sqrt();
        out.extend((0..cols).map(|c| (row[c] - mean) * rstd * gamma[c] + beta.map_or(0.0, |beta| beta[c])));
        if beta.is_some() {
            stats.push(mean);
        }
        stats.push(rstd);
    }
    (out, stats)
}

fn check(rows: u32, cols: u32, layer_norm: bool, offset: f64, seed: u64) {
    let mut random = Random(seed);
    let (r, c) = (rows as usize, cols as usize);
    let x: Vec<f64> = random.floats(r * c, 2.0).iter().map(|x| f64::from((x + offset) as f32)).collect();
    let (gamma, beta, dy) = (random.floats(c, 1.0), random.floats(c, 1.0), random.floats(r * c, 1.0));
    let beta = layer_norm.then_some(beta);
    let beta = beta.as_deref();
    let (expected, expected_stats) = reference(&x, &gamma, beta);

    let [x_array, gamma_array, dy_array] = [&x, &gamma, &dy].map(|values| floats(values));
    let beta_array = beta.map(floats);
    let beta_view = beta_array.as_ref().map(Array::view);
    let (out, stats) = (poisoned(r * c), poisoned(expected_stats.len()));
    run(Call::Norm {
        x: x_array.view(),
        gamma: gamma_array.view(),
        beta: beta_view,
        out: out.view(),
        stats: stats.view(),
        rows,
        cols,
        epsilon: EPSILON as f32,
    });
    assert_close("out", &out, &expected, 4e-6);
    assert_close("stats", &stats, &expected_stats, 4e-6);

    let before = random.floats(r * c, 1.0);
    let dx = floats(&before);
    run(Call::NormBackwardInput {
        x: x_array.view(),
        gamma: gamma_array.view(),
        stats: stats.view(),
        dy: dy_array.view(),
        dx: dx.view(),
        rows,
        cols,
        layer_norm,
    });
    let slope = gradient(&x, |x| dot(&dy, &reference(x, &gamma, beta).0));
    assert_close("dx", &dx, &plus(&before, &slope), 2e-5);

    let (gamma_before, beta_before) = (random.floats(c, 1.0), random.floats(c, 1.0));
    let d_gamma = floats(&gamma_before);
    let d_beta = layer_norm.then(|| floats(&beta_before));
    run(Call::NormBackwardWeight {
        x: x_array.view(),
        stats: stats.view(),
        dy: dy_array.view(),
        d_gamma: d_gamma.view(),
        d_beta: d_beta.as_ref().map(Array::view),
        rows,
        cols,
    });
    let slope = gradient(&gamma, |gamma| dot(&dy, &reference(&x, gamma, beta).0));
    assert_close("d_gamma", &d_gamma, &plus(&gamma_before, &slope), 1e-5);
    if let (Some(d_beta), Some(beta)) = (d_beta, beta) {
        let slope = gradient(beta, |beta| dot(&dy, &reference(&x, &gamma, Some(beta)).0));
        assert_close("d_beta", &d_beta, &plus(&beta_before, &slope), 1e-5);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if crate::PATIENT { 24 } else { 6 }))]
    #[test]
    fn norms_and_their_gradients(rows in 1u32..6, cols in 2u32..150, layer_norm: bool, seed: u64) {
        check(rows, cols, layer_norm, 0.0, seed);
    }
}

/// The variance is taken around the mean, not as a difference of large squares.
#[test]
fn layer_norm_of_rows_far_from_zero() {
    check(3, 97, true, 30.0, 5);
}
