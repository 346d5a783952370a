//! AdamW with clipping by the global norm, in one pass over its four arrays, and the sum of squares that the norm is
//! made of.

use super::vector::vectorised;
use crate::call::AdamW;

/// Sums that are kept apart: two registers of the widest kind, twice.
const LANES: usize = 32;

/// What gradients are multiplied by so that their global norm does not exceed `clip`: as PyTorch's `clip_grad_norm_`. A norm
/// that is not a number stays visible in the result.
pub(super) fn clip_coefficient(clip: Option<f32>, squared_norm: f64) -> f32 {
    let Some(clip) = clip else { return 1.0 };
    let coefficient = f64::from(clip) / (squared_norm.sqrt() + 1e-6);
    if coefficient >= 1.0 { 1.0 } else { coefficient as f32 }
}

/// One update of parameters and moments; zeroes the gradients. `coefficient` multiplies the gradients first.
pub(super) fn update(
    parameters: &mut [f32],
    gradients: &mut [f32],
    first: &mut [f32],
    second: &mut [f32],
    coefficient: f32,
    with: AdamW,
) {
    let correction = |beta: f32| 1.0 - f64::from(beta).powi(with.step.min(i32::MAX as u32) as i32);
    step(
        parameters,
        gradients,
        first,
        second,
        Factors {
            gradient: coefficient,
            beta1: with.beta1,
            beta2: with.beta2,
            decay: 1.0 - with.lr * with.weight_decay,
            rate: (f64::from(with.lr) / correction(with.beta1)) as f32,
            root: (1.0 / correction(with.beta2).sqrt()) as f32,
            epsilon: with.epsilon,
        },
    );
}

/// What one update multiplies by; bias corrections are folded in.
#[derive(Clone, Copy)]
struct Factors {
    gradient: f32,
    beta1: f32,
    beta2: f32,
    /// `1 - lr * weight_decay`.
    decay: f32,
    /// `lr / (1 - beta1^step)`.
    rate: f32,
    /// `1 / sqrt(1 - beta2^step)`.
    root: f32,
    epsilon: f32,
}

vectorised! {
    fn step(parameters: &mut [f32], gradients: &mut [f32], first: &mut [f32], second: &mut [f32], with: Factors) {
        let moments = first.iter_mut().zip(second);
        for ((parameter, gradient), (first, second)) in parameters.iter_mut().zip(gradients).zip(moments) {
            let g = *gradient * with.gradient;
            let m = with.beta1.mul_add(*first - g, g);
            let v = with.beta2.mul_add(*second - g * g, g * g);
            *parameter = with.decay * *parameter - with.rate * m / v.sqrt().mul_add(with.root, with.epsilon);
            *first = m;
            *second = v;
            *gradient = 0.0;
        }
    }

    /// Sum of squares in double precision.
    pub(super) fn sum_squares(x: &[f32]) -> f64 {
        let mut lanes = [0.0f64; LANES];
        let (whole, rest) = x.as_chunks::<LANES>();
        for chunk in whole {
            for lane in 0..LANES {
                lanes[lane] += f64::from(chunk[lane]) * f64::from(chunk[lane]);
            }
        }
        for (lane, &x) in lanes.iter_mut().zip(rest) {
            *lane += f64::from(x) * f64::from(x);
        }
        lanes.iter().sum()
    }
}
