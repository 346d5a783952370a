//! A trace as rows of characters over time, one per rank: what its compute stream does, and where it idles the reason.

use super::{Trace, WaitReason};
use crate::program::{OpKind, Pass, Stream};
use crate::units::Nanos;

/// What a rank does in one column: whatever took most of the column's time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// A pass of a microbatch.
    Compute {
        /// Which pass.
        pass: Pass,
        /// Of which microbatch.
        microbatch: u32,
        /// Part of the model.
        stage: u32,
    },
    /// Gradient norm or optimizer.
    Optimizer,
    /// Nothing, while its own communication is under way.
    Communication,
    /// Nothing, because another rank holds its device.
    Device,
    /// Nothing, because an earlier op or a peer is awaited.
    Waiting,
    /// Nothing to do any more, or not yet.
    Idle,
}

impl Moment {
    /// One letter; `X` is the fused backward. The unoccupied states are quiet signs.
    pub fn glyph(self) -> char {
        match self {
            Moment::Compute { pass: Pass::F, .. } => 'F',
            Moment::Compute { pass: Pass::B, .. } => 'B',
            Moment::Compute { pass: Pass::W, .. } => 'W',
            Moment::Compute { pass: Pass::BW, .. } => 'X',
            Moment::Compute { pass: Pass::R, .. } => 'R',
            Moment::Optimizer => 'O',
            Moment::Communication => '~',
            Moment::Device => ':',
            Moment::Waiting => '-',
            Moment::Idle => ' ',
        }
    }
}

/// A time with what happens in it.
struct Span {
    start: u64,
    end: u64,
    moment: Moment,
}

impl Trace {
    /// One row of `columns` moments per rank, from the begin of the step to its end.
    pub fn timeline(&self, columns: usize) -> Vec<Vec<Moment>> {
        let end = self.makespan.0.max(1);
        (0..self.ranks.len())
            .map(|rank| {
                let spans = self.spans(rank);
                let mut next = 0;
                (0..columns as u64)
                    .map(|column| {
                        let from = column * end / columns as u64;
                        let to = ((column + 1) * end / columns as u64).max(from + 1);
                        while spans.get(next).is_some_and(|span| span.end <= from) {
                            next += 1;
                        }
                        longest(&spans[next..], from, to)
                    })
                    .collect()
            })
            .collect()
    }

    /// All that a rank does and why it does not, in order of time, without overlaps.
    fn spans(&self, rank: usize) -> Vec<Span> {
        let events = &self.ranks[rank].events;
        let mut busy: Vec<(Nanos, Nanos)> = events
            .iter()
            .filter(|event| event.stream != Stream::COMPUTE && event.end > event.start)
            .map(|event| (event.start, event.end))
            .collect();
        busy.sort_unstable();
        let mut spans = Vec::new();
        let mut clock = 0;
        let mut compute: Vec<_> = events.iter().filter(|event| event.stream == Stream::COMPUTE).collect();
        compute.sort_by_key(|event| (event.start, event.op));
        for event in compute {
            let moment = match event.kind {
                OpKind::Compute { pass, stage, microbatch, .. } => {
                    Moment::Compute { pass, microbatch: microbatch.0, stage: u32::from(stage.0) }
                }
                OpKind::GradientNorm
                | OpKind::Optimizer { .. }
                | OpKind::OptimizerAhead { .. }
                | OpKind::Validate { .. } => Moment::Optimizer,
                OpKind::Join | OpKind::Send { .. } | OpKind::Recv { .. } | OpKind::Collective { .. } => Moment::Waiting,
            };
            let idle = match event.wait {
                Some(WaitReason::Device) => Moment::Device,
                Some(WaitReason::Op(_) | WaitReason::Peer) => Moment::Waiting,
                None => Moment::Idle,
            };
            gap(&mut spans, clock, event.start.0, idle, &busy);
            if event.end > event.start {
                spans.push(Span { start: event.start.0, end: event.end.0, moment });
            }
            clock = clock.max(event.end.0);
        }
        gap(&mut spans, clock, self.makespan.0, Moment::Idle, &busy);
        spans
    }
}

/// Fills a gap with the communication that runs in it, and `idle` between.
fn gap(spans: &mut Vec<Span>, from: u64, to: u64, idle: Moment, busy: &[(Nanos, Nanos)]) {
    let mut clock = from;
    for &(start, end) in busy.iter().filter(|(start, end)| start.0 < to && end.0 > from) {
        let (start, end) = (start.0.max(clock), end.0.min(to));
        if start > clock {
            spans.push(Span { start: clock, end: start, moment: idle });
        }
        if end > start {
            spans.push(Span { start, end, moment: Moment::Communication });
        }
        clock = clock.max(end);
    }
    if to > clock {
        spans.push(Span { start: clock, end: to, moment: idle });
    }
}

/// What takes most of a column.
fn longest(spans: &[Span], from: u64, to: u64) -> Moment {
    let within = spans.iter().take_while(|span| span.start < to);
    let covered = within.map(|span| (span.end.min(to).saturating_sub(span.start.max(from)), span.moment));
    covered.reduce(|best, next| if next.0 > best.0 { next } else { best }).map_or(Moment::Idle, |(_, moment)| moment)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::{Event, Origin, RankTrace, TRACE_FORMAT};
    use crate::units::{MicrobatchId, OpId, StageId};
    use std::collections::BTreeMap;

    #[test]
    fn a_column_shows_what_takes_most_of_it_and_gaps_their_reason() {
        let event = |op, kind, stream, start, end, wait| Event {
            op: OpId(op),
            kind,
            stream,
            ready: Nanos(start),
            start: Nanos(start),
            end: Nanos(end),
            wait,
        };
        let pass = |pass| OpKind::Compute { pass, stage: StageId(1), microbatch: MicrobatchId(3), first: 0, end: 1 };
        let receive = OpKind::Join;
        let events = vec![
            event(0, receive, Stream(2), 10, 30, None),
            event(1, pass(Pass::F), Stream::COMPUTE, 30, 60, Some(WaitReason::Op(OpId(0)))),
            event(2, pass(Pass::BW), Stream::COMPUTE, 80, 98, Some(WaitReason::Device)),
            event(3, OpKind::GradientNorm, Stream::COMPUTE, 98, 100, None),
        ];
        let trace = Trace {
            format: TRACE_FORMAT.into(),
            origin: Origin::Predicted,
            makespan: Nanos(110),
            ranks: vec![RankTrace { events, memory: vec![], peak_bytes: 0, peak_by_class: BTreeMap::new() }],
        };
        let text: String = trace.timeline(11)[0].iter().map(|moment| moment.glyph()).collect();
        assert_eq!(text, "-~~FFF::XX ");
        // The optimizer has two of the last ten nanoseconds before 100: too few to show until columns are fine.
        let fine: String = trace.timeline(110)[0].iter().map(|moment| moment.glyph()).collect();
        assert_eq!(&fine[96..], "XXOO          ");
        assert_eq!(trace.timeline(11)[0][3], Moment::Compute { pass: Pass::F, microbatch: 3, stage: 1 });
        assert!(trace.timeline(0)[0].is_empty());
    }
}
