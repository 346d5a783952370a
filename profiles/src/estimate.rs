//! A time together with where it comes from: every figure shown can be asked.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Where a figure comes from, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Provenance {
    /// Measured at exactly this shape.
    Measured,
    /// Interpolated between measured points, or scaled from one by a measured ratio.
    Fitted,
    /// Stated by a vendor.
    Datasheet,
    /// Derived from measurements of other operators.
    Assumed,
}

impl Provenance {
    /// Every kind, best first.
    pub const ALL: [Provenance; 4] =
        [Provenance::Measured, Provenance::Fitted, Provenance::Datasheet, Provenance::Assumed];
}

impl fmt::Display for Provenance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Provenance::Measured => "measured",
            Provenance::Fitted => "fitted",
            Provenance::Datasheet => "datasheet",
            Provenance::Assumed => "assumed",
        })
    }
}

/// A time and where it comes from.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The time.
    pub seconds: f64,
    /// Where it comes from.
    pub provenance: Provenance,
}

impl Estimate {
    /// The same share of a longer or shorter time; known less well than before.
    pub(crate) fn scaled(self, ratio: f64) -> Estimate {
        Estimate { seconds: self.seconds * ratio, provenance: self.provenance.max(Provenance::Fitted) }
    }
}

/// Seconds by provenance: the parts of a predicted time.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Shares {
    /// From exact measurements.
    pub measured: f64,
    /// From interpolation.
    pub fitted: f64,
    /// From datasheets.
    pub datasheet: f64,
    /// From other operators.
    pub assumed: f64,
}

impl Shares {
    /// Adds a time to its part.
    pub fn add(&mut self, estimate: Estimate) {
        *match estimate.provenance {
            Provenance::Measured => &mut self.measured,
            Provenance::Fitted => &mut self.fitted,
            Provenance::Datasheet => &mut self.datasheet,
            Provenance::Assumed => &mut self.assumed,
        } += estimate.seconds;
    }

    /// Adds all parts of another, `times` times.
    pub fn add_all(&mut self, other: &Shares, times: f64) {
        self.measured += other.measured * times;
        self.fitted += other.fitted * times;
        self.datasheet += other.datasheet * times;
        self.assumed += other.assumed * times;
    }

    /// Sum of the parts.
    pub fn total(&self) -> f64 {
        self.measured + self.fitted + self.datasheet + self.assumed
    }

    /// The parts as fractions of their sum; all zero where there is nothing.
    pub fn normalised(&self) -> Shares {
        let mut shares = Shares::default();
        let total = self.total();
        if total > 0.0 {
            shares.add_all(self, 1.0 / total);
        }
        shares
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_make_the_whole() {
        let mut shares = Shares::default();
        for (seconds, provenance) in (1..).map(f64::from).zip(Provenance::ALL) {
            shares.add(Estimate { seconds, provenance });
        }
        assert_eq!(shares.total(), 10.0);
        assert!((shares.normalised().datasheet - 0.3).abs() < 1e-12);
        assert_eq!(Shares::default().normalised(), Shares::default());
    }

    #[test]
    fn scaling_loses_certainty_and_never_gains_it() {
        let of = |provenance| Estimate { seconds: 2.0, provenance }.scaled(1.5);
        assert_eq!(of(Provenance::Measured), Estimate { seconds: 3.0, provenance: Provenance::Fitted });
        assert_eq!(of(Provenance::Assumed).provenance, Provenance::Assumed);
    }
}
