//! Curves through the measured points of a class, and how well each point is foretold by the others.

use crate::class::Class;
use crate::curve::{Ladder, Sample, Surface};
use crate::fit::{Line, Point};
use crate::kernel_key::{DType, Family, KernelOp};
use crate::profile::ProfileError;
use crate::row::{CollectiveRound, Subject};
use crate::work::Work;
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

/// What one curve goes through: a class, collectives by number of members.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Group {
    Kernel(KernelOp, DType),
    Transfer,
    Collective(CollectiveRound, u32),
}

#[derive(Debug, Clone)]
pub(super) struct Curve {
    pub(super) shape: Shape,
    /// Some of its points are a vendor's.
    pub(super) datasheet: bool,
}

#[derive(Debug, Clone)]
pub(super) enum Shape {
    Ladder(Ladder),
    Surface(Surface),
}

impl Shape {
    pub(super) fn new(class: Class, samples: &[Sample]) -> Result<Shape, ProfileError> {
        let what = class.to_string();
        Ok(match class.family() {
            Family::Memory => Shape::Ladder(Ladder::new(&what, samples)?),
            Family::Matmul | Family::Attention | Family::Head => Shape::Surface(Surface::new(&what, samples)?),
        })
    }

    pub(super) fn seconds(&self, sample: &Place) -> f64 {
        match self {
            Shape::Ladder(ladder) => ladder.seconds(sample.bytes),
            Shape::Surface(surface) => surface.seconds(sample.flops, sample.bytes, &sample.place),
        }
    }

    pub(super) fn line(&self) -> Line {
        match self {
            Shape::Ladder(ladder) => ladder.line,
            Shape::Surface(surface) => surface.line,
        }
    }
}

/// Where a subject lies among those of its class.
pub(super) struct Place {
    flops: f64,
    pub(super) bytes: f64,
    place: SmallVec<[f64; 5]>,
}

impl Place {
    pub(super) fn of(subject: &Subject) -> Option<(Group, Place)> {
        let moved = |bytes: f64| Place { flops: 0.0, bytes, place: SmallVec::from_slice(&[bytes.max(1.0).ln()]) };
        match subject {
            Subject::Kernel(key) => {
                let Work { flops, bytes } = Work::of(key);
                let place = key.dims.iter().map(|&d| f64::from(d.max(1)).ln()).collect();
                Some((Group::Kernel(key.op, key.dtype), Place { flops, bytes, place }))
            }
            Subject::Transfer { bytes } => Some((Group::Transfer, moved(2.0 * *bytes as f64))),
            &Subject::Collective { round, members, bytes } => {
                let (all, n) = (bytes as f64, f64::from(members.max(1)));
                let touched = match round {
                    // Its shard of every member is read, and written once.
                    CollectiveRound::Reduce => all + all / n,
                    // Every other shard is read and written.
                    CollectiveRound::Gather => 2.0 * all * (n - 1.0) / n,
                };
                Some((Group::Collective(round, members), moved(touched)))
            }
            Subject::Overhead(_) => None,
        }
    }

    /// The same with the time that was measured there.
    pub(super) fn sample(self, seconds: f64) -> Sample {
        Sample { point: Point { flops: self.flops, bytes: self.bytes, seconds }, place: self.place }
    }
}

/// How well the curve of a class foretells points that it has not seen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Residual {
    /// What was fitted.
    pub class: Class,
    /// Measured points.
    pub points: usize,
    /// The fitted coefficients.
    pub line: Line,
    /// Median over the points of the relative error when the others foretell it; `None` for a single point.
    pub median_error: Option<f64>,
    /// The largest.
    pub worst_error: Option<f64>,
}

/// A measured point and what the others of its class foretell for it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Foretold {
    /// Floating-point operations of its work.
    pub flops: f64,
    /// Bytes that it moves.
    pub bytes: f64,
    /// As measured.
    pub seconds: f64,
    /// As foretold.
    pub foretold_seconds: f64,
}

impl Foretold {
    /// Signed, relative to the measured time.
    pub fn error(&self) -> f64 {
        self.foretold_seconds / self.seconds - 1.0
    }
}

/// Leaves out each sample in turn and foretells it by the others.
pub(super) fn left_out(class: Class, samples: &[Sample]) -> Result<Vec<Foretold>, ProfileError> {
    let mut points = Vec::new();
    for place in 0..samples.len() {
        let mut others = samples.to_vec();
        let Sample { point, place } = others.swap_remove(place);
        if others.is_empty() {
            continue;
        }
        let at = Place { flops: point.flops, bytes: point.bytes, place };
        let foretold_seconds = Shape::new(class, &others)?.seconds(&at);
        points.push(Foretold { flops: point.flops, bytes: point.bytes, seconds: point.seconds, foretold_seconds });
    }
    Ok(points)
}
