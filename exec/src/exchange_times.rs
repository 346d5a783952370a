//! Times of communication as it happens in a run: a member's part of a round, how long work lies before an idle device until it
//! begins, and how late ops begin that waited. What `calibrate --from-trace` learns of messages and collectives, beside the copies that the
//! trace itself shows.

use crate::bind::{Bound, Meeting};
use paceline_profiles::{CollectiveRound, Overhead, Subject};
use paceline_sim::cost::Pause;
use paceline_sim::program::{Element, Step, rounds};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// What was timed, how often, and how long it took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExchangeTimes {
    /// A round of a collective, or the overhead of a message or round.
    pub subject: Subject,
    /// How often.
    pub count: u64,
    /// Sum over all times.
    pub total_seconds: f64,
}

/// Nanoseconds from which on a pause is not the executor's.
const DISTURBED: u64 = 200_000;

/// Gathers them, from all threads.
#[derive(Debug, Default)]
pub(crate) struct ExchangeTally {
    sums: Mutex<BTreeMap<Subject, (u64, u64)>>,
    /// By meeting and round, where its work is measured by itself.
    subjects: Vec<Vec<Option<Subject>>>,
    /// By meeting: every member on a device of its own.
    apart: Vec<bool>,
    /// By transfer: both sides on one device.
    shared: Vec<bool>,
}

impl ExchangeTally {
    pub fn new(bound: &Bound) -> ExchangeTally {
        let program = bound.program;
        let device = |rank: u32| program.ranks[rank as usize].device;
        let of_rounds = |meeting: &Meeting| {
            let (members, groups) = (meeting.members.len() as u32, program.groups[meeting.group].fast_groups());
            let steps = rounds(meeting.collective, meeting.arrangement.algorithm, members, groups);
            let usual = meeting.element == Element::F32 && meeting.arrangement.shard.is_none();
            let subject = |step: Step| {
                let round = match step {
                    Step::Reduce => CollectiveRound::Reduce,
                    Step::Gather => CollectiveRound::Gather,
                    _ => return None,
                };
                usual.then_some(Subject::Collective { round, members, bytes: meeting.bytes })
            };
            steps.into_iter().map(subject).collect()
        };
        let apart = |meeting: &Meeting| {
            let mut devices: Vec<_> = meeting.members.iter().map(|member| device(member.rank)).collect();
            devices.sort_unstable();
            devices.windows(2).all(|pair| pair[0] != pair[1])
        };
        ExchangeTally {
            sums: Mutex::default(),
            subjects: bound.meetings.iter().map(of_rounds).collect(),
            apart: bound.meetings.iter().map(apart).collect(),
            shared: bound.transfers.iter().map(|t| device(t.from.rank) == device(t.to.rank)).collect(),
        }
    }

    fn add(&self, subject: Subject, nanoseconds: u64) {
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let (count, total) = sums.entry(subject).or_default();
        *count += 1;
        *total += nanoseconds;
    }

    /// A message lay before an idle device for so long.
    pub fn message(&self, transfer: usize, waited: u64) {
        let kind = if self.shared[transfer] { Overhead::SharedMessage } else { Overhead::Message };
        self.add(Subject::Overhead(kind), waited);
    }

    /// All members of a meeting had their devices idle, and the last of them began after so long.
    pub fn round(&self, meeting: usize, waited: u64) {
        // On one device, one member waits for the work of the other.
        if self.apart[meeting] {
            self.add(Subject::Overhead(Overhead::Round), waited);
        }
    }

    /// An op that had waited began so late.
    pub fn pause(&self, pause: Pause, lateness: u64) {
        // No thread needs as long as that: something else had the core.
        if lateness < DISTURBED {
            let kind = match pause {
                Pause::Turn => Overhead::Turn,
                Pause::Wake => Overhead::Wake,
            };
            self.add(Subject::Overhead(kind), lateness);
        }
    }

    /// A member's part of a round took so long.
    pub fn work(&self, meeting: usize, round: usize, nanoseconds: u64) {
        if let Some(Some(subject)) = self.subjects[meeting].get(round) {
            self.add(subject.clone(), nanoseconds);
        }
    }

    pub fn clear(&self) {
        self.sums.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    pub fn times(&self) -> Vec<ExchangeTimes> {
        let sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let times = |(subject, &(count, total)): (&Subject, &(u64, u64))| ExchangeTimes {
            subject: subject.clone(),
            count,
            total_seconds: total as f64 * 1e-9,
        };
        sums.iter().map(times).collect()
    }
}
