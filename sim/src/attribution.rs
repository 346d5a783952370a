//! Where the error of a predicted step comes from. The program is simulated again and again, each time with one more kind of
//! predicted times replaced by measured ones; what a replacement changes is that kind's part of the error. The parts sum to the
//! whole.
//!
//! Sums of op times do not tell this: an op that nobody waits for may take as long as it likes.

use crate::compare::{CompareError, compare, op_class};
use crate::cost::{CostModel, Exchange, Pauses, Round};
use crate::engine::{EngineError, simulate};
use crate::program::{Collective, Group, Op, OpKind, Program};
use crate::trace::Trace;
use crate::units::{MicrobatchId, Nanos, RankId};
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use thiserror::Error;

/// The error of a predicted step, by cause.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attribution {
    /// Predicted seconds of the step.
    pub predicted_seconds: f64,
    /// Measured seconds of the step.
    pub measured_seconds: f64,
    /// In the order of replacement; their seconds sum to measured minus predicted.
    pub parts: Vec<Part>,
}

/// One cause and what it adds to the step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// Why.
    pub cause: Cause,
    /// Measured minus predicted: above zero where the step took longer for it than predicted.
    pub seconds: f64,
}

/// Why a measured step differs from the predicted one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// Ops of a class (`F`, `BW`, `optimizer`) take another time at the mean.
    Ops(String),
    /// Copies of messages take another time at the mean.
    Messages,
    /// Collectives take another time at the mean.
    Collectives,
    /// Ops that cost the same do not last the same, and others wait for the longest.
    Unevenness,
    /// The step begins late: nobody computes yet.
    Begin,
    /// The step ends late: nobody computes any more.
    End,
    /// Time between ops, beyond what is foretold of it: from the end of what an op waits for to its begin.
    HandOver,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::Ops(class) => write!(f, "{class}: mean time of an op"),
            Cause::Messages => f.write_str("messages: mean time of a copy"),
            Cause::Collectives => f.write_str("collectives: mean time"),
            Cause::Unevenness => f.write_str("like ops do not last alike"),
            Cause::Begin => f.write_str("begin of the step"),
            Cause::End => f.write_str("end of the step"),
            Cause::HandOver => f.write_str("between ops"),
        }
    }
}

/// Why an error cannot be told apart.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum AttributionError {
    /// The trace is of another program.
    #[error(transparent)]
    Compare(#[from] CompareError),
    /// The program does not run.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

impl Attribution {
    /// Holds the measured `trace` of a step of `program` against what `costs` foretell.
    ///
    /// # Errors
    /// When the trace is of another program, or the program cannot be simulated.
    pub fn of(program: &Program, costs: &dyn CostModel, trace: &Trace) -> Result<Attribution, AttributionError> {
        let predicted = simulate(program, costs)?;
        compare(&predicted, trace)?;
        let predicted_seconds = predicted.makespan.seconds();
        let measured = Measured::of(program, trace);
        let mut replay = Replay::of(costs);
        let mut steps = Steps { program, last: predicted, parts: Vec::new() };
        for (class, mean) in measured.means {
            replay.means.extend(mean);
            steps.take(Cause::Ops(class), &replay)?;
        }
        if !measured.copies.is_empty() {
            replay.copies = measured.copies;
            steps.take(Cause::Messages, &replay)?;
        }
        let simulated = durations(program, &steps.last);
        for (&of, &seconds) in &durations(program, trace) {
            let known = simulated.get(&of).copied().unwrap_or(0.0);
            if known > 0.0 {
                replay.scales.insert(of, seconds / known);
            }
        }
        if !replay.scales.is_empty() {
            steps.take(Cause::Collectives, &replay)?;
        }
        replay.each = measured.each;
        steps.take(Cause::Unevenness, &replay)?;
        let Steps { last, mut parts, .. } = steps;
        let (simulated, measured) = (ends(&last), ends(trace));
        let begin = measured.0.seconds() - simulated.0.seconds();
        let end = measured.1.seconds() - simulated.1.seconds();
        let rest = trace.makespan.seconds() - last.makespan.seconds() - begin - end;
        let outside = [(Cause::Begin, begin), (Cause::End, end), (Cause::HandOver, rest)];
        parts.extend(outside.map(|(cause, seconds)| Part { cause, seconds }));
        Ok(Attribution { predicted_seconds, measured_seconds: trace.makespan.seconds(), parts })
    }
}

/// The way from the predicted step to the measured one.
struct Steps<'p> {
    program: &'p Program,
    /// As simulated so far.
    last: Trace,
    parts: Vec<Part>,
}

impl Steps<'_> {
    /// Simulates with what is known now; the change is the cause's.
    fn take(&mut self, cause: Cause, replay: &Replay) -> Result<(), EngineError> {
        let now = simulate(self.program, replay)?;
        self.parts.push(Part { cause, seconds: now.makespan.seconds() - self.last.makespan.seconds() });
        self.last = now;
        Ok(())
    }
}

/// Time before the first op on a device begins, and after the last one has ended.
fn ends(trace: &Trace) -> (Nanos, Nanos) {
    let events = || trace.ranks.iter().flat_map(|rank| &rank.events);
    let begin = events().map(|event| event.start).min().unwrap_or_default();
    let end = events().map(|event| event.end).max().unwrap_or_default();
    (begin, trace.makespan - end)
}

/// Ops that cost the same: the microbatch does not matter.
fn alike(kind: OpKind) -> OpKind {
    match kind {
        OpKind::Compute { pass, stage, first, end, .. } => {
            OpKind::Compute { pass, stage, microbatch: MicrobatchId(0), first, end }
        }
        other => other,
    }
}

/// Collectives that cost the same.
type Meeting = (Collective, u64, u32);

fn meeting(program: &Program, kind: &OpKind) -> Option<Meeting> {
    match *kind {
        OpKind::Collective { collective, group, bytes, .. } => {
            Some((collective, bytes, program.groups[group.index()].size))
        }
        _ => None,
    }
}

/// Seconds from the meeting of the members to the end, summed by what costs the same.
fn durations(program: &Program, trace: &Trace) -> HashMap<Meeting, f64> {
    let mut sums = HashMap::new();
    for event in trace.ranks.iter().flat_map(|rank| &rank.events) {
        if let Some(of) = meeting(program, &event.kind) {
            *sums.entry(of).or_insert(0.0) += (event.end - event.start).seconds();
        }
    }
    sums
}

/// Sum and number of times, by op.
type Sums = HashMap<(RankId, OpKind), (u64, u64)>;

/// What a trace says of single ops.
struct Measured {
    /// By class, the means of ops that cost the same.
    means: BTreeMap<String, HashMap<(RankId, OpKind), Nanos>>,
    each: HashMap<(RankId, OpKind), Nanos>,
    copies: HashMap<u64, Nanos>,
}

impl Measured {
    fn of(program: &Program, trace: &Trace) -> Measured {
        let mut sums: BTreeMap<String, Sums> = BTreeMap::new();
        let mut each = HashMap::new();
        let mut copies: HashMap<u64, (u64, u64)> = HashMap::new();
        for ((number, rank), traced) in (0..).zip(&program.ranks).zip(&trace.ranks) {
            let rank_id = RankId(number);
            for event in &traced.events {
                let time = event.end - event.start;
                let entry = match event.kind {
                    OpKind::Send { .. } | OpKind::Collective { .. } => continue,
                    OpKind::Recv { buffer, .. } => copies.entry(rank.buffers[buffer.index()].bytes).or_default(),
                    kind => {
                        each.insert((rank_id, kind), time);
                        sums.entry(op_class(&kind)).or_default().entry((rank_id, alike(kind))).or_default()
                    }
                };
                entry.0 += time.0;
                entry.1 += 1;
            }
        }
        let mean = |(sum, count): (u64, u64)| Nanos(sum / count.max(1));
        let means = |all: Sums| all.into_iter().map(|(of, sum)| (of, mean(sum))).collect();
        Measured {
            means: sums.into_iter().map(|(class, all)| (class, means(all))).collect(),
            each,
            copies: copies.into_iter().map(|(bytes, sum)| (bytes, mean(sum))).collect(),
        }
    }
}

/// Predicted costs, some of them replaced.
struct Replay<'c> {
    costs: &'c dyn CostModel,
    means: HashMap<(RankId, OpKind), Nanos>,
    each: HashMap<(RankId, OpKind), Nanos>,
    copies: HashMap<u64, Nanos>,
    scales: HashMap<Meeting, f64>,
}

impl<'c> Replay<'c> {
    fn of(costs: &'c dyn CostModel) -> Replay<'c> {
        Replay { costs, means: HashMap::new(), each: HashMap::new(), copies: HashMap::new(), scales: HashMap::new() }
    }
}

impl CostModel for Replay<'_> {
    fn compute(&self, program: &Program, rank: RankId, op: &Op) -> Nanos {
        let known = self.each.get(&(rank, op.kind)).or_else(|| self.means.get(&(rank, alike(op.kind))));
        known.copied().unwrap_or_else(|| self.costs.compute(program, rank, op))
    }

    fn transfer(&self, program: &Program, from: RankId, to: RankId, bytes: u64) -> Round {
        let round = self.costs.transfer(program, from, to, bytes);
        Round { work: self.copies.get(&bytes).copied().unwrap_or(round.work), ..round }
    }

    fn collective(&self, program: &Program, exchange: Exchange, group: &Group) -> SmallVec<[Round; 2]> {
        let mut rounds = self.costs.collective(program, exchange, group);
        if let Some(&scale) = self.scales.get(&(exchange.collective, exchange.bytes, group.size)) {
            let scaled = |time: Nanos| Nanos::from_seconds(time.seconds() * scale);
            for round in &mut rounds {
                *round = Round { wire: scaled(round.wire), work: scaled(round.work), ..*round };
            }
        }
        rounds
    }

    fn pauses(&self, program: &Program, rank: RankId) -> Pauses {
        self.costs.pauses(program, rank)
    }
}

#[cfg(test)]
mod tests;
