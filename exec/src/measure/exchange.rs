//! Times of the local work of communication: the copy of a message, and a member's part of each round of a collective.
//! All devices do it at the same time, on data that another device has just written, as in a run.

use super::samples::Summary;
use super::{MeasureError, Measured, Phase};
use crate::collectives::{Member, Parts, perform};
use crate::data::mix;
use paceline_kernels::{Block, DType};
use paceline_profiles::{CollectiveRound, Subject};
use paceline_sim::program::Step;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Barrier, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Sizes of messages and arrays: 4 KiB to 16 MiB.
const SIZES: [u64; 7] = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20];
/// Sizes of groups.
const GROUPS: [u32; 2] = [2, 4];
/// Largest group.
pub(super) const MEMBERS: usize = 4;
/// Each case is repeated so often even if the time is up.
const LEAST_ROUNDS: usize = 5;
const MOST_ROUNDS: usize = 300;

/// What is measured of exchanges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Case {
    Copy { bytes: u64 },
    Part { round: CollectiveRound, members: u32, bytes: u64 },
}

impl Case {
    /// All of them, over `sizes`.
    pub(super) fn all(sizes: &[u64]) -> Vec<Case> {
        let parts = GROUPS.into_iter().flat_map(|members| {
            let rounds = CollectiveRound::ALL.into_iter();
            rounds.flat_map(move |round| sizes.iter().map(move |&bytes| Case::Part { round, members, bytes }))
        });
        sizes.iter().map(|&bytes| Case::Copy { bytes }).chain(parts).collect()
    }

    fn subject(self) -> Subject {
        match self {
            Case::Copy { bytes } => Subject::Transfer { bytes },
            Case::Part { round, members, bytes } => Subject::Collective { round, members, bytes },
        }
    }
}

/// The step of a collective that is such a round.
pub(super) fn step_of(round: CollectiveRound) -> Step {
    match round {
        CollectiveRound::Reduce => Step::Reduce,
        CollectiveRound::Gather => Step::Gather,
    }
}

/// The timings of cases, in one order with them.
pub(super) fn summarised(cases: &[Case], timings: Vec<Vec<f64>>, busy_devices: u32) -> Vec<Measured> {
    let all = cases.iter().zip(timings);
    all.filter_map(|(case, seconds)| {
        Summary::of(seconds).map(|summary| Measured { subject: case.subject(), busy_devices, summary })
    })
    .collect()
}

/// Measures messages and rounds over sizes, with all devices at work.
pub(super) fn measure(phase: &mut Phase) -> Result<Vec<Measured>, MeasureError> {
    let devices = phase.settings.devices as usize;
    // A member's arrays are taken in turn, so that an old one has left the cache.
    let room = (phase.settings.working_set_bytes as usize / MEMBERS).max(2 * SIZES[SIZES.len() - 1] as usize);
    let allocate = |_| phase.device.allocate(room).map_err(MeasureError::Memory);
    let blocks: Vec<Box<dyn Block>> = (0..MEMBERS.max(devices)).map(allocate).collect::<Result<_, _>>()?;
    let cases = Case::all(&SIZES);
    let plan = Plan {
        blocks: &blocks,
        devices,
        barrier: Barrier::new(devices),
        order: Mutex::new((0..cases.len()).collect()),
        round: AtomicUsize::new(0),
        over: AtomicBool::new(false),
        cases: &cases,
        deadline: phase.deadline,
        stop: phase.stop,
        seed: phase.settings.seed,
    };
    let mut timings: Vec<Vec<f64>> = vec![Vec::new(); cases.len()];
    std::thread::scope(|scope| {
        let cores = core_affinity::get_core_ids().unwrap_or_default();
        let workers: Vec<_> = (0..devices)
            .map(|slot| {
                let (plan, core) = (&plan, cores.get(slot).copied());
                scope.spawn(move || {
                    if let Some(core) = core {
                        core_affinity::set_for_current(core);
                    }
                    plan.work(slot)
                })
            })
            .collect();
        while !workers.iter().all(|worker| worker.is_finished()) {
            (phase.tick)();
            std::thread::sleep(Duration::from_millis(100));
        }
        for worker in workers {
            match worker.join() {
                Ok(own) => timings.iter_mut().zip(own).for_each(|(all, own)| all.extend(own)),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
    });
    Ok(summarised(&cases, timings, phase.settings.devices))
}

/// What the devices share.
struct Plan<'a> {
    /// By member.
    blocks: &'a [Box<dyn Block>],
    devices: usize,
    barrier: Barrier,
    /// The order of cases in this round.
    order: Mutex<Vec<usize>>,
    round: AtomicUsize,
    over: AtomicBool,
    cases: &'a [Case],
    deadline: Instant,
    stop: &'a (dyn Fn() -> bool + Sync),
    seed: u64,
}

impl Plan<'_> {
    /// One device's timings by case.
    fn work(&self, slot: usize) -> Vec<Vec<f64>> {
        let mut timings: Vec<Vec<f64>> = vec![Vec::new(); self.cases.len()];
        loop {
            // One decides for all whether to go on, and in which order.
            if self.barrier.wait().is_leader() {
                let round = self.round.fetch_add(1, Ordering::Relaxed);
                let late = round > LEAST_ROUNDS && Instant::now() >= self.deadline;
                self.over.store(late || round > MOST_ROUNDS || (self.stop)(), Ordering::Relaxed);
                let mut order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
                order.sort_by_key(|&case| mix(self.seed ^ mix(((round as u64) << 16) | case as u64)));
            }
            self.barrier.wait();
            if self.over.load(Ordering::Relaxed) {
                return timings;
            }
            let order = self.order.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let round = self.round.load(Ordering::Relaxed);
            for case in order {
                let seconds = self.time(slot, self.cases[case], round);
                // The first round warms up.
                if round > 1 {
                    timings[case].extend(seconds);
                }
            }
        }
    }

    /// Array `index` of a member's block, another one in each round.
    fn array(&self, member: usize, bytes: u64, round: usize, index: usize) -> *mut f32 {
        let block = &self.blocks[member];
        let places = block.bytes() / bytes as usize;
        let place = (2 * round + index) % places;
        let view = block.view(place * bytes as usize, bytes as usize / 4, DType::F32);
        std::ptr::with_exposed_provenance_mut(view.address() as usize)
    }

    /// This device's timings of one case: one for each member that it serves.
    fn time(&self, slot: usize, case: Case, round: usize) -> Vec<f64> {
        let (members, bytes) = match case {
            Case::Copy { bytes } => (self.devices, bytes),
            Case::Part { members, bytes, .. } => (members as usize, bytes),
        };
        let len = bytes as usize / 4;
        let own: Vec<usize> = (slot..members).step_by(self.devices).collect();
        for &member in &own {
            // SAFETY: until the barrier, only the device of a member touches its block.
            unsafe { std::slice::from_raw_parts_mut(self.array(member, bytes, round, 0), len) }.fill(1.0);
        }
        self.barrier.wait();
        let mut timings = Vec::with_capacity(own.len());
        match case {
            Case::Copy { .. } => {
                // From the neighbour's outbox; alone, from the own.
                let from = self.array((slot + 1) % self.devices, bytes, round, 0);
                let to = self.array(slot, bytes, round, 1);
                let start = Instant::now();
                // SAFETY: two different arrays; outboxes are only read until the next barrier, inboxes are touched by their
                // device only.
                unsafe { std::ptr::copy_nonoverlapping(from.cast::<u8>(), to.cast::<u8>(), bytes as usize) };
                timings.push(start.elapsed().as_secs_f64());
            }
            Case::Part { round: step, .. } => {
                let array = |member| Member { array: self.array(member, bytes, round, 0), shard: None };
                let arrays: Vec<Member<f32>> = (0..members).map(array).collect();
                let parts = Parts { len, part: len.div_ceil(members) };
                let step = step_of(step);
                for member in own {
                    let start = Instant::now();
                    // SAFETY: the arrays live and do not overlap, and between the barriers all members are in this round.
                    unsafe { perform(step, &arrays, 1, parts, member) };
                    timings.push(start.elapsed().as_secs_f64());
                }
            }
        }
        self.barrier.wait();
        timings
    }
}
