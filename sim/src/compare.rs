//! Predicted against measured: two traces of one program, op class by op class and rank by rank. Ops are matched by identity
//! (rank and place in the issue order), never by time.

use crate::program::{Collective, OpKind, Payload};
use crate::trace::{RankTrace, Trace};
use crate::units::{Nanos, RankId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use thiserror::Error;

/// What a comparison finds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// Predicted seconds of the step.
    pub predicted_seconds: f64,
    /// Measured seconds of the step.
    pub measured_seconds: f64,
    /// By class of op, in order of measured time.
    pub classes: Vec<ClassComparison>,
    /// By rank.
    pub ranks: Vec<RankComparison>,
}

/// All ops of one class.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassComparison {
    /// For example `F`, `BW`, `receive`, `all-reduce gradients`.
    pub class: String,
    /// How many ops.
    pub count: u64,
    /// Sum of predicted durations.
    pub predicted_seconds: f64,
    /// Sum of measured durations.
    pub measured_seconds: f64,
}

/// One rank.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RankComparison {
    /// Which.
    pub rank: RankId,
    /// Predicted seconds of computing.
    pub predicted_compute_seconds: f64,
    /// Measured seconds of computing.
    pub measured_compute_seconds: f64,
    /// Predicted end of its last op.
    pub predicted_end_seconds: f64,
    /// Measured end of its last op.
    pub measured_end_seconds: f64,
    /// Predicted peak of memory.
    pub predicted_peak_bytes: u64,
    /// Measured peak of memory.
    pub measured_peak_bytes: u64,
}

/// Why two traces cannot be compared.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum CompareError {
    /// They are not of one program.
    #[error(
        "the traces are of different programs: {predicted} ranks predicted, {measured} measured; compare a run with the prediction of the same plan"
    )]
    Ranks { predicted: usize, measured: usize },
    /// They are not of one program.
    #[error(
        "the traces are of different programs: {rank} does {predicted} at op {op} in the first and {measured} in the second; compare a run with the prediction of the same plan"
    )]
    Op { rank: RankId, op: usize, predicted: String, measured: String },
}

impl ClassComparison {
    /// Relative error of the predicted time; `None` where nothing was measured.
    pub fn error(&self) -> Option<f64> {
        (self.measured_seconds > 0.0).then(|| self.predicted_seconds / self.measured_seconds - 1.0)
    }
}

impl Comparison {
    /// Relative error of the predicted step time.
    pub fn error(&self) -> f64 {
        self.predicted_seconds / self.measured_seconds - 1.0
    }
}

/// The class of an op in reports.
pub fn op_class(kind: &OpKind) -> String {
    match kind {
        OpKind::Compute { pass, .. } => pass.to_string(),
        OpKind::Send { .. } => "send".into(),
        OpKind::Recv { .. } => "receive".into(),
        OpKind::Collective { collective, payload, .. } => {
            let what = match collective {
                Collective::AllReduce => "all-reduce",
                Collective::ReduceScatter => "reduce-scatter",
                Collective::AllGather => "all-gather",
                Collective::AllToAll => "all-to-all",
            };
            let of = match payload {
                Payload::Gradients { .. } => "gradients",
                Payload::TiedEmbedding => "tied embedding",
                Payload::Parameters { .. } => "parameters",
                Payload::GradientNorm => "norm",
            };
            format!("{what} {of}")
        }
        OpKind::GradientNorm => "gradient norm".into(),
        OpKind::Optimizer { .. } => "optimizer".into(),
        OpKind::OptimizerAhead { .. } => "optimizer ahead".into(),
        OpKind::Validate { .. } => "validate".into(),
        OpKind::Join => "join".into(),
    }
}

/// Compares two traces of one program.
///
/// # Errors
/// When the traces do not list the same ops.
pub fn compare(predicted: &Trace, measured: &Trace) -> Result<Comparison, CompareError> {
    if predicted.ranks.len() != measured.ranks.len() {
        return Err(CompareError::Ranks { predicted: predicted.ranks.len(), measured: measured.ranks.len() });
    }
    let mut classes: BTreeMap<String, (u64, Nanos, Nanos)> = BTreeMap::new();
    let mut ranks = Vec::with_capacity(predicted.ranks.len());
    for (index, (p, m)) in predicted.ranks.iter().zip(&measured.ranks).enumerate() {
        let rank = RankId(index as u32);
        if p.events.len() != m.events.len() {
            let op = p.events.len().min(m.events.len());
            let name = |t: &RankTrace| t.events.get(op).map_or("nothing".to_string(), |e| op_class(&e.kind));
            return Err(CompareError::Op { rank, op, predicted: name(p), measured: name(m) });
        }
        for (op, (a, b)) in p.events.iter().zip(&m.events).enumerate() {
            if a.kind != b.kind {
                return Err(CompareError::Op {
                    rank,
                    op,
                    predicted: format!("{:?}", a.kind),
                    measured: format!("{:?}", b.kind),
                });
            }
            let entry = classes.entry(op_class(&a.kind)).or_default();
            entry.0 += 1;
            entry.1 += a.end - a.start;
            entry.2 += b.end - b.start;
        }
        let compute = |t: &RankTrace| {
            let spans = t.events.iter().filter(|e| matches!(e.kind, OpKind::Compute { .. }));
            spans.map(|e| e.end - e.start).sum::<Nanos>().seconds()
        };
        let end = |t: &RankTrace| t.events.iter().map(|e| e.end).max().unwrap_or_default().seconds();
        ranks.push(RankComparison {
            rank,
            predicted_compute_seconds: compute(p),
            measured_compute_seconds: compute(m),
            predicted_end_seconds: end(p),
            measured_end_seconds: end(m),
            predicted_peak_bytes: p.peak_bytes,
            measured_peak_bytes: m.peak_bytes,
        });
    }
    let mut classes: Vec<ClassComparison> = classes
        .into_iter()
        .filter(|(class, _)| class != "join")
        .map(|(class, (count, p, m))| ClassComparison {
            class,
            count,
            predicted_seconds: p.seconds(),
            measured_seconds: m.seconds(),
        })
        .collect();
    classes.sort_by(|a, b| b.measured_seconds.total_cmp(&a.measured_seconds));
    Ok(Comparison {
        predicted_seconds: predicted.makespan.seconds(),
        measured_seconds: measured.makespan.seconds(),
        classes,
        ranks,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::{Pass, Stream};
    use crate::trace::{Event, Origin, TRACE_FORMAT};
    use crate::units::{MicrobatchId, OpId, StageId};

    fn trace(origin: Origin, spans: &[(Pass, u64, u64)], peak: u64) -> Trace {
        let events = spans
            .iter()
            .enumerate()
            .map(|(i, &(pass, start, end))| Event {
                op: OpId(i as u32),
                kind: OpKind::Compute { pass, stage: StageId(0), microbatch: MicrobatchId(0), first: 0, end: 1 },
                stream: Stream::COMPUTE,
                ready: Nanos(start),
                start: Nanos(start),
                end: Nanos(end),
                wait: None,
            })
            .collect();
        Trace {
            format: TRACE_FORMAT.into(),
            origin,
            makespan: Nanos(spans.last().map_or(0, |s| s.2)),
            ranks: vec![RankTrace { events, memory: vec![], peak_bytes: peak, peak_by_class: BTreeMap::new() }],
        }
    }

    #[test]
    fn sums_by_class_and_rank() {
        let p = trace(Origin::Predicted, &[(Pass::F, 0, 10), (Pass::BW, 10, 30)], 7);
        let m = trace(Origin::Measured, &[(Pass::F, 0, 20), (Pass::BW, 25, 50)], 7);
        let c = compare(&p, &m).unwrap();
        let by_name = |n: &str| c.classes.iter().find(|x| x.class == n).unwrap();
        assert!((by_name("F").error().unwrap() + 0.5).abs() < 1e-12);
        assert!((by_name("BW").measured_seconds - 25e-9).abs() < 1e-18);
        assert!((c.error() - (30.0 / 50.0 - 1.0)).abs() < 1e-12);
        assert!((c.ranks[0].measured_compute_seconds - 45e-9).abs() < 1e-18);
        assert_eq!(c.ranks[0].predicted_peak_bytes, c.ranks[0].measured_peak_bytes);
    }

    #[test]
    fn other_programs_are_refused() {
        let p = trace(Origin::Predicted, &[(Pass::F, 0, 10)], 0);
        let m = trace(Origin::Measured, &[(Pass::BW, 0, 10)], 0);
        assert!(matches!(compare(&p, &m), Err(CompareError::Op { op: 0, .. })));
        let short = trace(Origin::Measured, &[], 0);
        assert!(matches!(compare(&p, &short), Err(CompareError::Op { op: 0, .. })));
    }
}
