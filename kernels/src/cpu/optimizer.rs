//! AdamW with clipping by the global norm, in one pass over its four arrays, and the sum of squares that the norm is
//! made of.

use super::vector::vectorised;
use crate::call::AdamW;

/// Sums that are kept apart: two registers of the widest kind, twice.
const LANES: usize = 32;

/// One update of parameters and moments; zeroes the gradients. `coefficient` multiplies the gradients first.
pub(super) fn update(
    parameters: &mut [f32],
    gradients: &mut [f32],
    first: &mut [f32],
    second: &mut [f32],
    coefficient: f32,
    with: AdamW,
) {
    step(parameters, gradients, first, second, Factors::of(coefficient, with));
}

/// Keeps the parameters and updates them as [`update`] would with coefficient 1; moments and gradients stay.
pub(super) fn update_ahead(
    parameters: &mut [f32],
    kept: &mut [f32],
    gradients: &[f32],
    first: &[f32],
    second: &[f32],
    with: AdamW,
) {
    step_ahead(parameters, kept, gradients, first, second, Factors::of(1.0, with));
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

impl Factors {
    fn of(gradient: f32, with: AdamW) -> Factors {
        let correction = |beta: f32| 1.0 - f64::from(beta).powi(with.step.min(i32::MAX as u32) as i32);
        Factors {
            gradient,
            beta1: with.beta1,
            beta2: with.beta2,
            decay: 1.0 - with.lr * with.weight_decay,
            rate: (f64::from(with.lr) / correction(with.beta1)) as f32,
            root: (1.0 / correction(with.beta2).sqrt()) as f32,
            epsilon: with.epsilon,
        }
    }

    /// First and second moment after a gradient.
    #[inline(always)]
    fn moments(&self, gradient: f32, first: f32, second: f32) -> (f32, f32) {
        let g = gradient * self.gradient;
        (self.beta1.mul_add(first - g, g), self.beta2.mul_add(second - g * g, g * g))
    }

    /// The parameter after a step with these moments.
    #[inline(always)]
    fn parameter(&self, before: f32, first: f32, second: f32) -> f32 {
        self.decay * before - self.rate * first / second.sqrt().mul_add(self.root, self.epsilon)
    }
}

vectorised! {
    fn step(parameters: &mut [f32], gradients: &mut [f32], first: &mut [f32], second: &mut [f32], with: Factors) {
        let moments = first.iter_mut().zip(second);
        for ((parameter, gradient), (first, second)) in parameters.iter_mut().zip(gradients).zip(moments) {
            (*first, *second) = with.moments(*gradient, *first, *second);
            *parameter = with.parameter(*parameter, *first, *second);
            *gradient = 0.0;
        }
    }

    fn step_ahead(
        parameters: &mut [f32],
        kept: &mut [f32],
        gradients: &[f32],
        first: &[f32],
        second: &[f32],
        with: Factors
    ) {
        let (parameters, moments) = (parameters.iter_mut().zip(kept), first.iter().zip(second));
        for (((parameter, kept), gradient), (first, second)) in parameters.zip(gradients).zip(moments) {
            let (m, v) = with.moments(*gradient, *first, *second);
            *kept = *parameter;
            *parameter = with.parameter(*parameter, m, v);
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
