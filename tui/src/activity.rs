//! What each rank did in a step that was measured: a stacked bar of its time, its memory, and the speed of its communication.

use paceline_sim::program::{Collective, OpKind, Pass, Program, RankProgram};
use paceline_sim::trace::{RankTrace, Trace};

/// Number of kinds of time.
pub const KINDS: usize = 6;

/// Kinds of time by name, in the order of [`Activity::seconds`]; the letter stands for the kind where there is no colour.
pub const KIND_NAMES: [(&str, char); KINDS] = [
    ("forward", 'F'),
    ("backward", 'X'),
    ("recompute", 'R'),
    ("optimizer", 'O'),
    ("communication", '~'),
    ("idle", '.'),
];

/// A rank's step.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Activity {
    /// Seconds by kind; they sum to the step. Of communication, what no pass hides.
    pub seconds: [f64; KINDS],
    /// Highest sum of live bytes.
    pub peak_bytes: u64,
    /// Bytes that reached the rank: messages, and for collectives what each member must receive and send on at least (as
    /// nccl-tests counts the bus: `2 (n - 1) / n` of the array in an all-reduce, half of that in its two halves).
    pub moved_bytes: f64,
    /// Seconds from the begin to the end of what moved them.
    pub moving_seconds: f64,
}

impl Activity {
    /// Bytes per second while bytes move; none where none do.
    pub fn bandwidth(&self) -> Option<f64> {
        (self.moving_seconds > 0.0).then(|| self.moved_bytes / self.moving_seconds)
    }
}

/// What the ranks of a program did, rank by rank.
pub fn activities(program: &Program, trace: &Trace) -> Vec<Activity> {
    let ranks = program.ranks.iter().zip(&trace.ranks);
    ranks.map(|(rank, traced)| activity(program, rank, traced, trace.makespan.seconds())).collect()
}

fn activity(program: &Program, rank: &RankProgram, traced: &RankTrace, step_seconds: f64) -> Activity {
    let mut activity = Activity { peak_bytes: traced.peak_bytes, ..Activity::default() };
    let (mut working, mut moving) = (Vec::new(), Vec::new());
    for event in traced.events.iter().filter(|event| event.end > event.start) {
        let (start, end) = (event.start.0, event.end.0);
        let seconds = (event.end - event.start).seconds();
        let kind = match event.kind {
            OpKind::Compute { pass: Pass::F, .. } => 0,
            OpKind::Compute { pass: Pass::B | Pass::W | Pass::BW, .. } => 1,
            OpKind::Compute { pass: Pass::R, .. } => 2,
            OpKind::GradientNorm
            | OpKind::Optimizer { .. }
            | OpKind::OptimizerAhead { .. }
            | OpKind::Validate { .. } => 3,
            OpKind::Recv { buffer, .. } => {
                activity.moved_bytes += rank.buffers.get(buffer.index()).map_or(0.0, |buffer| buffer.bytes as f64);
                activity.moving_seconds += seconds;
                moving.push((start, end));
                continue;
            }
            OpKind::Collective { collective, group, bytes, .. } => {
                let members = program.groups.get(group.index()).map_or(1.0, |group| f64::from(group.size.max(1)));
                let ways = if collective == Collective::AllReduce { 2.0 } else { 1.0 };
                activity.moved_bytes += ways * (members - 1.0) / members * bytes as f64;
                activity.moving_seconds += seconds;
                moving.push((start, end));
                continue;
            }
            // The sender has no work of its own: the receiver takes the message.
            OpKind::Send { .. } | OpKind::Join => continue,
        };
        activity.seconds[kind] += seconds;
        working.push((start, end));
    }
    let (worked, moved, either) = (covered(&mut working.clone()), covered(&mut moving), {
        working.extend(moving.iter().copied());
        covered(&mut working)
    });
    debug_assert!(either <= worked + moved);
    activity.seconds[4] = (either - worked) as f64 * 1e-9;
    activity.seconds[5] = (step_seconds - either as f64 * 1e-9).max(0.0);
    activity
}

/// Nanoseconds that intervals cover together; sorts them.
fn covered(intervals: &mut [(u64, u64)]) -> u64 {
    intervals.sort_unstable();
    let (mut sum, mut until) = (0, 0);
    for &(start, end) in intervals.iter() {
        sum += end.saturating_sub(start.max(until));
        until = until.max(end);
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_intervals_count_once() {
        assert_eq!(covered(&mut [(5, 9), (0, 4), (3, 6), (20, 21)]), 10);
        assert_eq!(covered(&mut []), 0);
        assert_eq!(covered(&mut [(0, 10), (2, 3)]), 10);
    }
}
