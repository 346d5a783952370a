//! SwiGLU (Shazeer 2020) and GELU in its tanh approximation (Hendrycks & Gimpel 2016, section 2).

use super::vector::{sigmoid, vectorised};

/// `sqrt(2 / pi)`.
const ROOT: f32 = 0.797_884_6;
/// Weight of the cubic term of the approximation.
const CUBIC: f32 = 0.044_715;

/// `(1 + tanh(u)) / 2 = sigmoid(2 u)` with `u = ROOT * (x + CUBIC * x^3)`: gelu is `x` times that. The sigmoid keeps
/// its relative precision where `1 + tanh` cancels.
#[inline(always)]
fn gate(x: f32) -> f32 {
    sigmoid(2.0 * ROOT * x * (CUBIC * x).mul_add(x, 1.0))
}

/// `d_out` times `gelu'(x) = s + x s (1 - s) 2 u'` with `s` = [`gate`] and `u' = ROOT * (1 + 3 CUBIC x^2)`.
#[inline(always)]
fn slope(x: f32, d_out: f32) -> f32 {
    let s = gate(x);
    let twice_slope = 2.0 * ROOT * (3.0 * CUBIC * x).mul_add(x, 1.0);
    d_out * s * (x * (1.0 - s)).mul_add(twice_slope, 1.0)
}

vectorised! {
    /// `out = silu(gate) * up`; rows of `gate_up` hold `cols` gates, then `cols` ups.
    pub(super) fn swiglu(gate_up: &[f32], out: &mut [f32], cols: usize) {
        for (gate_up, out) in gate_up.chunks_exact(2 * cols).zip(out.chunks_exact_mut(cols)) {
            let (gate, up) = gate_up.split_at(cols);
            for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
                *out = gate * sigmoid(gate) * up;
            }
        }
    }

    /// `silu'(g) = s (1 + g (1 - s))` with `s = sigmoid(g)`.
    pub(super) fn swiglu_backward(gate_up: &[f32], d_out: &[f32], d_gate_up: &mut [f32], cols: usize) {
        let rows = gate_up.chunks_exact(2 * cols).zip(d_out.chunks_exact(cols));
        for ((gate_up, d_out), d_gate_up) in rows.zip(d_gate_up.chunks_exact_mut(2 * cols)) {
            let (gate, up) = gate_up.split_at(cols);
            let (d_gate, d_up) = d_gate_up.split_at_mut(cols);
            let inputs = gate.iter().zip(up).zip(d_out);
            for (((&gate, &up), &d_out), (d_gate, d_up)) in inputs.zip(d_gate.iter_mut().zip(d_up)) {
                let s = sigmoid(gate);
                *d_gate = d_out * up * s * gate.mul_add(1.0 - s, 1.0);
                *d_up = d_out * gate * s;
            }
        }
    }

    /// `out = gelu(x)`.
    pub(super) fn gelu(x: &[f32], out: &mut [f32]) {
        for (out, &x) in out.iter_mut().zip(x) {
            *out = x * gate(x);
        }
    }

    /// `d_x = gelu'(x) d_out`.
    pub(super) fn gelu_backward(x: &[f32], d_out: &[f32], d_x: &mut [f32]) {
        for ((d_x, &x), &d_out) in d_x.iter_mut().zip(x).zip(d_out) {
            *d_x = slope(x, d_out);
        }
    }

    /// The same in place: `d` becomes the gradient of the input.
    pub(super) fn gelu_slope(x: &[f32], d: &mut [f32]) {
        for (d, &x) in d.iter_mut().zip(x) {
            *d = slope(x, *d);
        }
    }
}
