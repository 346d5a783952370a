//! Fits of a few positive coefficients to measured times.
//!
//! A time is modelled as `latency + flops * a + bytes * b`: what must be paid however small the work, the arithmetic at
//! its peak, and the traffic at its bandwidth. In terms of efficiency that is `flops / (peak * efficiency)` with `efficiency =
//! 1 / (1 + (latency + bytes * b) / (flops * a))`. A message has no flops: the latency-bandwidth (alpha-beta) model.
//!
//! Errors count relatively (squares of log ratios), so that a kernel of microseconds weighs as much as one of
//! seconds; the coefficients are searched in logarithms, so that they stay positive. The search is Nelder and Mead's
//! (argmin). Where the points leave a coefficient open, it stays at its first guess.

use crate::profile::ProfileError;
use argmin::core::{CostFunction, Error, Executor, State};
use argmin::solver::neldermead::NelderMead;
use serde::{Deserialize, Serialize};

/// A measured time of known work.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Point {
    pub flops: f64,
    pub bytes: f64,
    pub seconds: f64,
}

/// Coefficients of a time: `latency + flops * seconds_per_flop + bytes * seconds_per_byte`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// Seconds however small the work.
    pub latency_seconds: f64,
    /// Seconds of a floating-point operation at the peak.
    pub seconds_per_flop: f64,
    /// Seconds of a byte at the full bandwidth.
    pub seconds_per_byte: f64,
}

/// What a call costs at least; where the first guess of a latency starts.
const LEAST_LATENCY: f64 = 1e-7;

impl Line {
    /// The time of some work.
    pub fn seconds(&self, flops: f64, bytes: f64) -> f64 {
        self.latency_seconds + flops * self.seconds_per_flop + bytes * self.seconds_per_byte
    }

    /// Bytes per second at full size.
    pub fn bandwidth(&self) -> f64 {
        1.0 / self.seconds_per_byte
    }

    /// Fits the coefficients to points, of which there must be at least one.
    pub(crate) fn fit(what: &str, points: &[Point]) -> Result<Line, ProfileError> {
        let computes = points.iter().any(|p| p.flops > 0.0);
        // The largest time bounds what one flop and one byte can cost; a fast point shows what they can do.
        let least = |cost: fn(&Point) -> f64| points.iter().map(cost).fold(f64::INFINITY, f64::min);
        let latency = (least(|p| p.seconds) / 2.0).min(LEAST_LATENCY);
        let mut guess = vec![latency.ln(), least(|p| p.seconds / p.bytes).ln()];
        if computes {
            // Of a product most is arithmetic.
            guess[1] -= 2.0;
            guess.push(least(|p| if p.flops > 0.0 { p.seconds / p.flops } else { f64::INFINITY }).ln());
        }
        let line = |logs: &[f64]| Line {
            latency_seconds: logs[0].exp(),
            seconds_per_byte: logs[1].exp(),
            seconds_per_flop: logs.get(2).map_or(0.0, |l| l.exp()),
        };
        let cost = |logs: &[f64]| {
            let line = line(logs);
            let error = |p: &Point| (line.seconds(p.flops, p.bytes) / p.seconds).ln().powi(2);
            let pull: f64 = logs.iter().zip(&guess).map(|(l, g)| (l - g).powi(2)).sum();
            points.iter().map(error).sum::<f64>() / points.len() as f64 + HOLD * pull
        };
        let logs = minimise(&guess, cost)
            .map_err(|error| ProfileError::Fit { what: what.into(), reason: error.to_string() })?;
        Ok(line(&logs))
    }
}

/// How strongly a coefficient is held at its first guess: too weakly to be seen where points say anything about it.
const HOLD: f64 = 1e-8;

struct Problem<F>(F);

impl<F: Fn(&[f64]) -> f64> CostFunction for Problem<F> {
    type Param = Vec<f64>;
    type Output = f64;

    fn cost(&self, parameters: &Vec<f64>) -> Result<f64, Error> {
        Ok((self.0)(parameters))
    }
}

/// The parameters of least cost near `start`.
fn minimise(start: &[f64], cost: impl Fn(&[f64]) -> f64) -> Result<Vec<f64>, Error> {
    let mut best = start.to_vec();
    // A simplex can collapse early; begun again around its best point, it finds the rest of the way.
    for step in [1.0, 0.5, 0.1] {
        let corner = |n: usize| {
            let mut corner = best.clone();
            corner[n] += step;
            corner
        };
        let simplex = (0..best.len()).map(corner).chain([best.clone()]).collect();
        let solver = NelderMead::new(simplex).with_sd_tolerance(1e-14)?;
        let result = Executor::new(Problem(&cost), solver).configure(|state| state.max_iters(400)).run()?;
        if let Some(found) = result.state().get_best_param() {
            best.clone_from(found);
        }
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn planted(line: Line, work: impl Iterator<Item = (f64, f64)>) -> Vec<Point> {
        work.map(|(flops, bytes)| Point { flops, bytes, seconds: line.seconds(flops, bytes) }).collect()
    }

    fn close(found: f64, planted: f64) -> bool {
        (found / planted).ln().abs() < 0.01
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn finds_planted_latency_and_bandwidth(latency in 1e-7f64..1e-4, bandwidth in 1e9f64..1e12) {
            let line = Line { latency_seconds: latency, seconds_per_flop: 0.0, seconds_per_byte: 1.0 / bandwidth };
            let points = planted(line, (8..=30).map(|n| (0.0, f64::from(1u32 << n))));
            let found = Line::fit("planted", &points).unwrap();
            prop_assert!(close(found.latency_seconds, latency), "{found:?}");
            prop_assert!(close(found.bandwidth(), bandwidth), "{found:?}");
        }

        #[test]
        fn finds_a_planted_peak(peak in 1e10f64..1e12, bandwidth in 5e9f64..1e11, latency in 1e-6f64..1e-5) {
            let line = Line { latency_seconds: latency, seconds_per_flop: 1.0 / peak, seconds_per_byte: 1.0 / bandwidth };
            let sizes = [16.0, 64.0, 256.0, 1024.0];
            let shapes = sizes.iter().flat_map(|&m| sizes.iter().map(move |&k| (m, k)));
            let work = shapes.map(|(m, k)| (2.0 * m * m * k, 4.0 * (2.0 * m * k + m * m)));
            let found = Line::fit("planted", &planted(line, work)).unwrap();
            prop_assert!(close(found.seconds_per_flop, 1.0 / peak), "{found:?}");
            prop_assert!(close(found.bandwidth(), bandwidth), "{found:?}");
            prop_assert!(close(found.latency_seconds, latency), "{found:?}");
        }
    }

    #[test]
    fn one_point_is_met_and_scales_sensibly() {
        let points = [Point { flops: 1e9, bytes: 1e6, seconds: 0.01 }];
        let line = Line::fit("one", &points).unwrap();
        assert!((line.seconds(1e9, 1e6) / 0.01 - 1.0).abs() < 1e-3, "{line:?}");
        let twice = line.seconds(2e9, 2e6) / 0.01;
        assert!((1.9..=2.0).contains(&twice), "{twice}");
    }

    #[test]
    fn noise_moves_the_fit_little() {
        let line = Line { latency_seconds: 2e-6, seconds_per_flop: 0.0, seconds_per_byte: 1e-10 };
        let mut points = planted(line, (10..=26).map(|n| (0.0, f64::from(1u32 << n))));
        for (n, point) in points.iter_mut().enumerate() {
            point.seconds *= if n % 2 == 0 { 1.05 } else { 0.95 };
        }
        let found = Line::fit("noisy", &points).unwrap();
        assert!((found.bandwidth() / 1e10 - 1.0).abs() < 0.03, "{found:?}");
        assert!((found.latency_seconds / 2e-6 - 1.0).abs() < 0.03, "{found:?}");
    }
}
