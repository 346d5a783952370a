//! A timeline as views show it: a lane per rank with its passes, why it is idle between them, its memory, and the longest
//! chain of passes. Made from the schedule of a cluster here, and from a trace in [`crate::recorded`].

use paceline_planner::order::{Action, ComputeOrder};
use paceline_planner::predict::{ClusterSchedule, MemoryParts};
use paceline_sim::program::Pass;
use paceline_sim::units::MicrobatchId;
use std::collections::HashMap;

/// What fills a span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// A pass of a microbatch.
    Pass {
        /// Which.
        pass: Pass,
        /// On which stage.
        stage: u32,
        /// Of which microbatch.
        microbatch: u32,
    },
    /// Communication that nothing hides.
    Communication,
    /// Norm of the gradients, and the optimizer.
    Optimizer,
}

impl What {
    /// One letter; `X` is the fused backward.
    pub fn letter(self) -> char {
        match self {
            What::Pass { pass: Pass::F, .. } => 'F',
            What::Pass { pass: Pass::B, .. } => 'B',
            What::Pass { pass: Pass::W, .. } => 'W',
            What::Pass { pass: Pass::BW, .. } => 'X',
            What::Pass { pass: Pass::R, .. } => 'R',
            What::Communication => '~',
            What::Optimizer => 'O',
        }
    }

    /// For people.
    pub fn describe(self) -> String {
        match self {
            What::Pass { pass, stage, microbatch } => {
                let name = match pass {
                    Pass::F => "forward",
                    Pass::B => "backward for inputs",
                    Pass::W => "backward for weights",
                    Pass::BW => "backward",
                    Pass::R => "recomputation",
                };
                format!("{name} of microbatch {microbatch} on stage {stage}")
            }
            What::Communication => "communication that nothing hides".into(),
            What::Optimizer => "optimizer".into(),
        }
    }
}

/// A time in which a rank works.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Span {
    /// In seconds from the begin of the iteration.
    pub start: f64,
    /// In seconds from the begin of the iteration.
    pub end: f64,
    /// Which work.
    pub what: What,
    /// Lane and place of the span whose end let this one start, where it is not the one before.
    pub cause: Option<(usize, usize)>,
    /// Whether it lies on the longest chain.
    pub critical: bool,
}

/// A time in which a rank does not work.
#[derive(Debug, Clone, PartialEq)]
pub struct Gap {
    /// In seconds.
    pub start: f64,
    /// In seconds.
    pub end: f64,
    /// Why.
    pub why: String,
}

/// One rank.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Lane {
    /// Its work, in order of time.
    pub spans: Vec<Span>,
    /// Between, in order of time.
    pub gaps: Vec<Gap>,
    /// Memory from a time on: `(seconds, bytes)`, in order of time.
    pub memory: Vec<(f64, f64)>,
    /// The most of it.
    pub peak_bytes: f64,
}

impl Lane {
    /// The span at a time.
    pub fn span_at(&self, time: f64) -> Option<&Span> {
        let next = self.spans.partition_point(|span| span.end <= time);
        self.spans.get(next).filter(|span| span.start <= time)
    }

    /// The gap at a time.
    pub fn gap_at(&self, time: f64) -> Option<&Gap> {
        let next = self.gaps.partition_point(|gap| gap.end <= time);
        self.gaps.get(next).filter(|gap| gap.start <= time)
    }

    /// Bytes at a time.
    pub fn bytes_at(&self, time: f64) -> f64 {
        let next = self.memory.partition_point(|(from, _)| *from <= time);
        next.checked_sub(1).map_or(0.0, |at| self.memory[at].1)
    }

    /// The most bytes from one time to another.
    pub fn most_bytes(&self, from: f64, to: f64) -> f64 {
        let first = self.memory.partition_point(|(at, _)| *at <= from);
        let last = self.memory.partition_point(|(at, _)| *at < to);
        let within = self.memory[first..last.max(first)].iter().map(|(_, bytes)| *bytes);
        within.fold(self.bytes_at(from), f64::max)
    }

    /// Seconds of work.
    pub fn busy(&self) -> f64 {
        self.spans.iter().filter(|span| span.what != What::Communication).map(|span| span.end - span.start).sum()
    }
}

/// A timeline.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Lanes {
    /// By rank.
    pub lanes: Vec<Lane>,
    /// End of the iteration in seconds.
    pub end: f64,
    /// Whether it was measured.
    pub measured: bool,
}

/// Spans by pass (forward, or backward for inputs), stage and microbatch.
type Places = HashMap<(bool, u32, u32), Vec<(usize, usize)>>;

/// Times closer than this are one: what an engine that counts nanoseconds can tell apart, and rounding cannot.
const SAME: f64 = 5e-10;

impl Lanes {
    /// Of the schedule behind a prediction. What follows the last pass of the iteration is drawn after it on every rank.
    pub fn of_schedule(schedule: &ClusterSchedule, iteration_seconds: f64, memory: &MemoryParts) -> Lanes {
        let passes_end = schedule.timing.makespan();
        let mut lanes = Lanes { end: iteration_seconds.max(passes_end), ..Lanes::default() };
        for (rank, actions) in schedule.order.actions.iter().enumerate() {
            let (starts, ends) = (&schedule.timing.start[rank], &schedule.timing.end[rank]);
            let mut lane = Lane::default();
            for (place, action) in actions.iter().enumerate() {
                let what = What::Pass {
                    pass: action.pass,
                    stage: action.stage.index() as u32,
                    microbatch: action.microbatch.0,
                };
                lane.spans.push(span(starts[place], ends[place], what));
            }
            let classes = memory.by_class.get(rank).copied().unwrap_or_default();
            let rest = classes.total() - classes.activations;
            lane.memory.push((0.0, rest));
            for (place, held) in schedule.activations[rank].iter().enumerate() {
                lane.memory.push((starts[place], rest + held));
            }
            lane.memory.push((passes_end, rest));
            lane.peak_bytes = classes.total();
            let (data, optimizer) = schedule.after[rank];
            if data > 0.0 {
                lane.spans.push(span(passes_end, passes_end + data, What::Communication));
            }
            if optimizer > 0.0 {
                lane.spans.push(span(passes_end + data, passes_end + data + optimizer, What::Optimizer));
            }
            lanes.lanes.push(lane);
        }
        lanes.link(|stage| is_last(&schedule.order, stage), |stage| is_first(&schedule.order, stage));
        lanes.explain(|_, _| None, "waits for the slowest node and the slowest rank");
        lanes.mark_critical();
        lanes
    }

    /// Of what was recorded: lanes with their spans and memory, and why a span began at a nanosecond, where that is known.
    pub(crate) fn of_recorded(lanes: Vec<Lane>, end: f64, measured: bool, reasons: &[HashMap<u64, String>]) -> Lanes {
        let stages = lanes.iter().flat_map(|lane| &lane.spans).filter_map(|span| match span.what {
            What::Pass { stage, .. } => Some(stage),
            _ => None,
        });
        let last = stages.max().unwrap_or(0);
        let mut lanes = Lanes { lanes, end, measured };
        lanes.link(|stage| stage == last, |stage| stage == 0);
        let nanos = |time: f64| (time * 1e9).round() as u64;
        lanes.explain(|rank, end| reasons.get(rank)?.get(&nanos(end)).cloned(), "has nothing left to do");
        lanes.mark_critical();
        lanes
    }

    /// Finds for every pass the span of another rank that let it start.
    fn link(&mut self, is_last: impl Fn(u32) -> bool, is_first: impl Fn(u32) -> bool) {
        let mut places = Places::new();
        for (rank, lane) in self.lanes.iter().enumerate() {
            for (place, span) in lane.spans.iter().enumerate() {
                if let What::Pass { pass, stage, microbatch } = span.what {
                    let forward = match pass {
                        Pass::F => true,
                        Pass::B | Pass::BW => false,
                        Pass::W | Pass::R => continue,
                    };
                    places.entry((forward, stage, microbatch)).or_default().push((rank, place));
                }
            }
        }
        let mut causes = Vec::new();
        for (rank, lane) in self.lanes.iter().enumerate() {
            let mut before = 0.0;
            for (place, span) in lane.spans.iter().enumerate() {
                let idle = span.start > before + SAME;
                before = f64::max(before, span.end);
                let wanted = match span.what {
                    What::Pass { pass: Pass::F | Pass::R, stage, microbatch } if !is_first(stage) => {
                        (true, stage - 1, microbatch)
                    }
                    What::Pass { pass: Pass::B | Pass::BW, stage, microbatch } if !is_last(stage) => {
                        (false, stage + 1, microbatch)
                    }
                    _ => continue,
                };
                let ended = |&&(rank, place): &&(usize, usize)| self.lanes[rank].spans[place].end <= span.start + SAME;
                let end = |&(rank, place): &(usize, usize)| self.lanes[rank].spans[place].end;
                let found = places.get(&wanted).into_iter().flatten().filter(ended);
                let found = found.max_by(|a, b| end(a).total_cmp(&end(b)));
                // What ended long before is not what held this one up.
                if let Some(found) = found.filter(|found| idle && end(found) > lane_end(lane, place) - SAME) {
                    causes.push(((rank, place), *found));
                }
            }
        }
        for ((rank, place), cause) in causes {
            self.lanes[rank].spans[place].cause = Some(cause);
        }
    }

    /// Says of every gap why.
    fn explain(&mut self, known: impl Fn(usize, f64) -> Option<String>, at_the_end: &str) {
        let all: Vec<Vec<Span>> = self.lanes.iter().map(|lane| lane.spans.clone()).collect();
        for (rank, lane) in self.lanes.iter_mut().enumerate() {
            let mut clock = 0.0;
            for span in &lane.spans {
                if span.start > clock + SAME {
                    let cause = span
                        .cause
                        .map(|(other, place)| format!("waits for {} (r{other})", all[other][place].what.describe()));
                    let why = match (cause, known(rank, span.start), span.what) {
                        (Some(cause), Some(known), _) => format!("{cause}; {known}"),
                        (Some(why), None, _) | (None, Some(why), _) => why,
                        (None, None, What::Pass { .. }) => "waits for its turn".into(),
                        (None, None, _) => "waits for the last pass of the other ranks".into(),
                    };
                    lane.gaps.push(Gap { start: clock, end: span.start, why });
                }
                clock = f64::max(clock, span.end);
            }
            if self.end > clock + SAME {
                lane.gaps.push(Gap { start: clock, end: self.end, why: at_the_end.to_owned() });
            }
        }
    }

    /// Walks from the last end backwards: from each span to the one whose end let it start.
    fn mark_critical(&mut self) {
        let mut at = None;
        let mut latest = f64::NEG_INFINITY;
        for (rank, lane) in self.lanes.iter().enumerate() {
            if let Some(span) = lane.spans.last()
                && span.end > latest
            {
                latest = span.end;
                at = Some((rank, lane.spans.len() - 1));
            }
        }
        while let Some((rank, place)) = at {
            let span = &mut self.lanes[rank].spans[place];
            if span.critical {
                return;
            }
            span.critical = true;
            let (cause, start, after_passes) = (span.cause, span.start, !matches!(span.what, What::Pass { .. }));
            at = cause.or_else(|| place.checked_sub(1).map(|before| (rank, before)));
            // What follows all passes follows the last of them, on whichever rank.
            if let Some((_, before)) = at
                && after_passes
                && self.lanes[rank].spans[before].end + SAME < start
            {
                at = self.ending_at(start);
            }
        }
    }

    /// The span that ends last up to a time.
    fn ending_at(&self, time: f64) -> Option<(usize, usize)> {
        let lanes = self.lanes.iter().enumerate();
        let last = lanes.filter_map(|(rank, lane)| {
            let after = lane.spans.partition_point(|span| span.end <= time + SAME);
            after.checked_sub(1).map(|place| (rank, place))
        });
        last.max_by(|a, b| self.lanes[a.0].spans[a.1].end.total_cmp(&self.lanes[b.0].spans[b.1].end))
    }

    /// The critical span that begins after a time, on whichever lane; the first of all where none does.
    pub fn next_critical(&self, time: f64) -> Option<(usize, &Span)> {
        let all = || {
            let lanes = self.lanes.iter().enumerate();
            lanes.flat_map(|(rank, lane)| lane.spans.iter().filter(|s| s.critical).map(move |span| (rank, span)))
        };
        let after = all().filter(|(_, span)| span.start > time + SAME);
        let earliest = |a: &(usize, &Span), b: &(usize, &Span)| a.1.start.total_cmp(&b.1.start);
        after.min_by(earliest).or_else(|| all().min_by(earliest))
    }
}

fn lane_end(lane: &Lane, place: usize) -> f64 {
    place.checked_sub(1).map_or(0.0, |before| lane.spans[before].end)
}

pub(crate) fn span(start: f64, end: f64, what: What) -> Span {
    Span { start, end, what, cause: None, critical: false }
}

fn action(stage: u32) -> Action {
    Action {
        pass: Pass::F,
        stage: paceline_sim::units::StageId(stage.min(u32::from(u16::MAX)) as u16),
        microbatch: MicrobatchId(0),
    }
}

fn is_last(order: &ComputeOrder, stage: u32) -> bool {
    order.placement.is_last(action(stage).stage)
}

fn is_first(order: &ComputeOrder, stage: u32) -> bool {
    order.placement.is_first(action(stage).stage)
}

#[cfg(test)]
mod tests {
    use super::*;
    use paceline_planner::predict::{ClusterPrediction, ClusterRequest, predict_cluster, schedule_cluster};
    use paceline_sim::cluster::Physics;

    fn lanes(pp: u64, schedule: &str, global_batch: u64) -> (Lanes, ClusterPrediction) {
        let request = ClusterRequest {
            model: "llama-3-8b".into(),
            cluster: "dgx-h100-ib".into(),
            nodes: Some(1),
            seq: 4096,
            global_batch,
            pp: Some(pp),
            schedule: Some(schedule.into()),
            ..ClusterRequest::default()
        };
        let (model, layout, cluster) = request.resolve().unwrap();
        let physics = Physics::default();
        let prediction = predict_cluster(&model, &layout, &cluster, &physics).unwrap();
        let schedule = schedule_cluster(&model, &layout, &cluster, &physics).unwrap();
        (Lanes::of_schedule(&schedule, prediction.iteration_seconds, &prediction.memory), prediction)
    }

    #[test]
    fn work_and_gaps_cover_the_iteration_without_overlap() {
        for (pp, schedule) in [(1, "1f1b"), (4, "1f1b"), (4, "zb-h1"), (4, "interleaved"), (8, "dualpipe")] {
            let (lanes, prediction) = lanes(pp, schedule, 64);
            assert_eq!(lanes.lanes.len(), pp as usize);
            for (rank, lane) in lanes.lanes.iter().enumerate() {
                let mut edges: Vec<(f64, f64)> = lane.spans.iter().map(|s| (s.start, s.end)).collect();
                edges.extend(lane.gaps.iter().map(|gap| (gap.start, gap.end)));
                edges.sort_by(|a, b| a.0.total_cmp(&b.0));
                assert!(edges[0].0.abs() < 1e-9);
                assert!(edges.windows(2).all(|w| (w[0].1 - w[1].0).abs() < 1e-9), "{schedule} r{rank}");
                assert!((edges.last().unwrap().1 - lanes.end).abs() < 1e-9);
                let highest = lane.memory.iter().map(|(_, bytes)| *bytes).fold(0.0, f64::max);
                assert!((highest / prediction.memory.peak_bytes[rank] - 1.0).abs() < 1e-9, "{schedule} r{rank}");
            }
        }
    }

    /// 1F1B: the last rank waits for the first forward to come through all ranks before it, the first rank for the first
    /// backward to come back.
    #[test]
    fn gaps_name_what_is_waited_for() {
        let (lanes, _) = lanes(4, "1f1b", 16);
        let last = &lanes.lanes[3];
        assert_eq!(last.gaps[0].why, "waits for forward of microbatch 0 on stage 2 (r2)");
        let first = &lanes.lanes[0];
        assert_eq!(first.spans.iter().take_while(|s| s.what.letter() == 'F').count(), 4);
        assert_eq!(first.gaps[0].why, "waits for backward of microbatch 0 on stage 1 (r1)");
        assert!(first.gap_at(first.gaps[0].start + 1e-6).is_some() && first.span_at(1e-6).is_some());
        assert!(first.gaps.last().unwrap().why.contains("slowest"));
    }

    /// The longest chain has no holes: each span on it starts when the one before ends.
    #[test]
    fn the_critical_chain_reaches_from_begin_to_end() {
        for schedule in ["1f1b", "zb-h1", "gpipe"] {
            let (lanes, _) = lanes(4, schedule, 32);
            let mut chain: Vec<Span> =
                lanes.lanes.iter().flat_map(|lane| lane.spans.iter().copied()).filter(|span| span.critical).collect();
            chain.sort_by(|a, b| a.start.total_cmp(&b.start));
            assert!(chain[0].start.abs() < 1e-9, "{schedule}");
            assert!(chain.windows(2).all(|w| (w[0].end - w[1].start).abs() < 1e-9), "{schedule}: {chain:?}");
            let (rank, first) = lanes.next_critical(-1.0).unwrap();
            assert_eq!((rank, first.start), (0, 0.0));
            assert!(lanes.next_critical(first.start).unwrap().1.start > first.start);
        }
    }
}
