//! The learning rate of every step: linear warm-up, then a cosine down to a floor (as in GPT-3, Brown et al. 2020,
//! appendix B).

use crate::error::ExecError;
use serde::{Deserialize, Serialize};

/// A learning rate for each step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LearningRate {
    /// The highest rate, reached at the end of the warm-up.
    pub peak: f64,
    /// The rate from step `total_steps` on.
    pub floor: f64,
    /// Steps of linear warm-up; the first step already learns at `peak / warmup_steps`.
    pub warmup_steps: u64,
    /// Where the cosine reaches the floor.
    pub total_steps: u64,
}

impl LearningRate {
    /// The same rate at every step.
    pub fn constant(rate: f64) -> LearningRate {
        LearningRate { peak: rate, floor: rate, warmup_steps: 0, total_steps: 0 }
    }

    /// The rate of a 0-based step.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.peak * (step + 1) as f64 / self.warmup_steps as f64;
        }
        if step >= self.total_steps {
            return self.floor;
        }
        let done = (step - self.warmup_steps) as f64 / (self.total_steps - self.warmup_steps) as f64;
        self.floor + 0.5 * (self.peak - self.floor) * (1.0 + (std::f64::consts::PI * done).cos())
    }

    /// Refuses rates that are not finite and non-negative.
    pub fn validate(&self) -> Result<(), ExecError> {
        for (key, value) in [("lr", self.peak), ("min_lr", self.floor)] {
            if !value.is_finite() || value < 0.0 {
                return Err(ExecError::Setting {
                    key,
                    value: value.to_string(),
                    allowed: "a finite rate >= 0 is needed, for example 3e-4".into(),
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCHEDULE: LearningRate = LearningRate { peak: 1e-3, floor: 1e-4, warmup_steps: 10, total_steps: 110 };

    #[test]
    fn warms_up_linearly_and_reaches_the_peak() {
        assert!((SCHEDULE.at(0) - 1e-4).abs() < 1e-15);
        assert!((SCHEDULE.at(4) - 5e-4).abs() < 1e-15);
        assert_eq!(SCHEDULE.at(9), 1e-3);
        assert_eq!(SCHEDULE.at(10), 1e-3);
    }

    #[test]
    fn follows_a_cosine_to_the_floor() {
        // Half way the cosine is zero: the mean of peak and floor. A quarter of the way: cos(pi/4).
        assert!((SCHEDULE.at(60) - 5.5e-4).abs() < 1e-12);
        let quarter = 1e-4 + 4.5e-4 * (1.0 + std::f64::consts::FRAC_1_SQRT_2);
        assert!((SCHEDULE.at(35) - quarter).abs() < 1e-12);
        assert_eq!(SCHEDULE.at(110), 1e-4);
        assert_eq!(SCHEDULE.at(1_000_000), 1e-4);
    }

    #[test]
    fn constant_is_constant() {
        assert_eq!(LearningRate::constant(0.25).at(0), 0.25);
        assert_eq!(LearningRate::constant(0.25).at(99), 0.25);
    }

    #[test]
    fn refuses_rates_that_are_not_rates() {
        let error = LearningRate::constant(f64::NAN).validate().unwrap_err().to_string();
        assert!(error.contains("lr = NaN"), "{error}");
        assert!(LearningRate::constant(-1.0).validate().is_err());
    }
}
