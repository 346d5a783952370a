//! The figures of a prediction as views show them: one shape for clusters and for this machine, each figure the one that
//! `paceline predict --json` prints.

use paceline_planner::predict::{ClusterPrediction, TimeParts};
use paceline_planner::prediction::Prediction;
use paceline_profiles::Shares;

/// Number of classes of memory.
pub const CLASSES: usize = 7;

/// Classes of memory by name, in the order of `by_class`; the letter stands for the class where there is no colour.
pub const CLASS_NAMES: [(&str, char); CLASSES] = [
    ("parameters", 'P'),
    ("gradients", 'G'),
    ("optimizer", 'O'),
    ("activations", 'A'),
    ("communication", 'C'),
    ("workspace", 'W'),
    ("overhead", 'H'),
];

/// Number of parts of an iteration.
pub const PARTS: usize = 9;

/// Parts of an iteration by name, in the order of [`Figures::parts`].
pub const PART_NAMES: [(&str, char); PARTS] = [
    ("compute", '#'),
    ("recompute", 'r'),
    ("tensor comm", 't'),
    ("data comm", 'd'),
    ("pipeline comm", 'p'),
    ("context comm", 'c'),
    ("expert comm", 'e'),
    ("bubble", '.'),
    ("optimizer", 'o'),
];

/// A prediction.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Figures {
    /// Seconds of an iteration.
    pub iteration_seconds: f64,
    /// Tokens per second and device.
    pub tokens_per_second_per_gpu: f64,
    /// Share of the stated rate that the model's FLOPs make, where the rate is known.
    pub mfu: Option<f64>,
    /// The same with recomputation.
    pub hfu: Option<f64>,
    /// Parts of the iteration in seconds.
    pub time: TimeParts,
    /// Bytes of each pipeline rank at its highest.
    pub peak_bytes: Vec<f64>,
    /// Their parts, in the order of [`CLASS_NAMES`].
    pub by_class: Vec<[f64; CLASSES]>,
    /// Most bytes of a rank.
    pub limit_bytes: Option<f64>,
    /// Whether every rank fits.
    pub fits: bool,
    /// Shares of the time by where they come from.
    pub provenance: Shares,
}

impl Figures {
    /// The parts of the iteration in the order of [`PART_NAMES`].
    pub fn parts(&self) -> [f64; PARTS] {
        self.time.in_order()
    }

    /// The fullest rank and its bytes.
    pub fn fullest(&self) -> (usize, f64) {
        let ranks = self.peak_bytes.iter().copied().enumerate();
        ranks.fold((0, 0.0), |best, rank| if rank.1 > best.1 { rank } else { best })
    }
}

impl From<&ClusterPrediction> for Figures {
    fn from(p: &ClusterPrediction) -> Figures {
        let classes =
            p.memory.by_class.iter().map(|c| {
                [c.parameters, c.gradients, c.optimizer, c.activations, c.communication, c.workspace, c.overhead]
            });
        Figures {
            iteration_seconds: p.iteration_seconds,
            tokens_per_second_per_gpu: p.tokens_per_second_per_gpu,
            mfu: Some(p.mfu),
            hfu: Some(p.hfu),
            time: p.time,
            peak_bytes: p.memory.peak_bytes.clone(),
            by_class: classes.collect(),
            limit_bytes: Some(p.memory.limit_bytes),
            fits: p.memory.fits,
            provenance: Shares {
                measured: p.provenance.measured,
                fitted: p.provenance.fitted,
                datasheet: p.provenance.datasheet,
                assumed: p.provenance.assumed,
            },
        }
    }
}

impl From<&Prediction> for Figures {
    fn from(p: &Prediction) -> Figures {
        let classes = p.memory.by_class.iter().map(|c| {
            [c.parameters, c.gradients, c.optimizer, c.activations, c.communication, c.workspace, c.overhead]
                .map(|bytes| bytes as f64)
        });
        Figures {
            iteration_seconds: p.iteration_seconds,
            tokens_per_second_per_gpu: p.tokens_per_second_per_gpu,
            mfu: p.mfu,
            hfu: p.hfu,
            time: p.time,
            peak_bytes: p.memory.peak_bytes.iter().map(|bytes| *bytes as f64).collect(),
            by_class: classes.collect(),
            limit_bytes: p.memory.limit_bytes.map(|bytes| bytes as f64),
            fits: p.memory.fits,
            provenance: p.provenance,
        }
    }
}
