//! RMSNorm (Zhang & Sennrich 2019) and LayerNorm (Ba et al. 2016), forward and backward.
//!
//! With `h = (x - mean) * rstd` (mean 0 for RMSNorm) and `g = dy * gamma`:
//! `dx = rstd * (g - avg(g) - h * avg(g * h))`, without `avg(g)` for RMSNorm; `d_gamma = sum over rows of dy * h`;
//! `d_beta = sum over rows of dy`.

use super::vector::{sums, vectorised};

/// Mean and reciprocal standard deviation of row `row`.
#[inline(always)]
fn statistics(stats: &[f32], row: usize, layer_norm: bool) -> (f32, f32) {
    if layer_norm { (stats[2 * row], stats[2 * row + 1]) } else { (0.0, stats[row]) }
}

vectorised! {
    /// `beta` given means LayerNorm. Rows are as long as `gamma`.
    pub(super) fn norm(
        x: &[f32],
        gamma: &[f32],
        beta: Option<&[f32]>,
        out: &mut [f32],
        stats: &mut [f32],
        epsilon: f32,
    ) {
        let cols = gamma.len();
        for (row, (x, out)) in x.chunks_exact(cols).zip(out.chunks_exact_mut(cols)).enumerate() {
            if let Some(beta) = beta {
                let mean = sums([x], |[x]| [x])[0] / cols as f32;
                let variance = sums([x], |[x]| [(x - mean) * (x - mean)])[0] / cols as f32;
                let rstd = 1.0 / (variance + epsilon).sqrt();
                stats[2 * row] = mean;
                stats[2 * row + 1] = rstd;
                for (((out, &x), &gamma), &beta) in out.iter_mut().zip(x).zip(gamma).zip(beta) {
                    *out = ((x - mean) * rstd).mul_add(gamma, beta);
                }
            } else {
                let square = sums([x], |[x]| [x * x])[0] / cols as f32;
                let rstd = 1.0 / (square + epsilon).sqrt();
                stats[row] = rstd;
                for ((out, &x), &gamma) in out.iter_mut().zip(x).zip(gamma) {
                    *out = x * rstd * gamma;
                }
            }
        }
    }

    /// Adds the input gradient to `dx`.
    pub(super) fn norm_backward_input(
        x: &[f32],
        gamma: &[f32],
        stats: &[f32],
        dy: &[f32],
        dx: &mut [f32],
        layer_norm: bool,
    ) {
        let cols = gamma.len();
        let rows = x.chunks_exact(cols).zip(dy.chunks_exact(cols)).zip(dx.chunks_exact_mut(cols));
        for (row, ((x, dy), dx)) in rows.enumerate() {
            let (mean, rstd) = statistics(stats, row, layer_norm);
            let [along, across] =
                sums([x, dy, gamma], |[x, dy, gamma]| [dy * gamma * ((x - mean) * rstd), dy * gamma]);
            let along = along / cols as f32;
            let across = if layer_norm { across / cols as f32 } else { 0.0 };
            for (((dx, &x), &dy), &gamma) in dx.iter_mut().zip(x).zip(dy).zip(gamma) {
                let h = (x - mean) * rstd;
                *dx += rstd * (dy.mul_add(gamma, -across) - h * along);
            }
        }
    }

    /// Adds to `d_gamma` and, for LayerNorm, to `d_beta`.
    pub(super) fn norm_backward_weight(
        x: &[f32],
        stats: &[f32],
        dy: &[f32],
        d_gamma: &mut [f32],
        mut d_beta: Option<&mut [f32]>,
    ) {
        let cols = d_gamma.len();
        let layer_norm = d_beta.is_some();
        for (row, (x, dy)) in x.chunks_exact(cols).zip(dy.chunks_exact(cols)).enumerate() {
            let (mean, rstd) = statistics(stats, row, layer_norm);
            for ((d_gamma, &x), &dy) in d_gamma.iter_mut().zip(x).zip(dy) {
                *d_gamma = dy.mul_add((x - mean) * rstd, *d_gamma);
            }
            if let Some(d_beta) = d_beta.as_deref_mut() {
                for (d_beta, &dy) in d_beta.iter_mut().zip(dy) {
                    *d_beta += dy;
                }
            }
        }
    }
}
