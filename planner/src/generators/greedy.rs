//! The zero-bubble heuristic for several stages per device (ZB-V: arXiv 2401.10241, section 6), with real times per stage and
//! a limit per device in bytes. All devices advance together in time; a device that is free takes, in this order, what is there:
//!
//! 1. W, when the next F has no room and W makes some;
//! 2. B, or the F whose turn it is;
//! 3. W, when it ends before the next input is due, or when idling would make this device the one with the most idle time.
//!
//! Every stage has a share of its device's memory in proportion to how long its activations live at least, so that long and short
//! lives are in flight together. And F of a stage leaves room for one activation of each later stage of its device, so an F
//! that waits for room always gets it: what later stages hold comes back without needing room.
//!
//! Decisions without a clear winner are settings; all of them are tried on a few microbatches. The best one or the hand-made ZB-V, where
//! that fits, whichever is shorter, is rearranged at its ends for the real times.

use super::Problem;
use crate::blocks::{Goal, justify};
use crate::order::{Action, ComputeOrder};
use crate::replay::{OrderError, Replayer};
use crate::schedules::{action, v_shape, zb_v};
use paceline_sim::program::Pass;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

/// The undecided points.
#[derive(Debug, Clone, Copy)]
struct Settings {
    /// After a B, an F that is ready goes before the next B.
    in_turn: bool,
    /// Of two F that are ready, the one of the earlier stage goes first.
    early_first: bool,
    /// W goes into every wait, however short.
    weights_in_short_waits: bool,
}

/// Microbatches, in multiples of the devices, by which the settings are compared.
const SHORT: u32 = 3;
/// Tolerance for sums of times and sizes.
const CLOSE: f64 = 1e-9;

/// The order with the shortest span (then the shortest makespan) that the heuristic finds, its ends rearranged;
/// in V placement no longer than the hand-made ZB-V where that fits. One microbatch after the other when no setting comes to an end
/// within the limit (where B leaves more for W than it frees, room that suffices for the one may be too little for the heuristic).
///
/// # Errors
/// When an order cannot be replayed with the times.
pub(crate) fn greedy(problem: &Problem) -> Result<ComputeOrder, OrderError> {
    let mut replayer = Replayer::default();
    let devices = problem.limit.len() as u32;
    let mut measured =
        |order: &ComputeOrder| replayer.run(order, &problem.times).map(|totals| (totals.longest_span, totals.makespan));
    // A few rounds of microbatches tell the settings apart.
    let short = Problem { microbatches: problem.microbatches.min(SHORT * devices), ..problem.clone() };
    let mut chosen: Option<((f64, f64), Settings)> = None;
    for number in 0..8 {
        let settings = Settings {
            in_turn: number & 1 == 0,
            early_first: number & 4 == 0,
            weights_in_short_waits: number & 2 == 0,
        };
        let Some(order) = Draft::new(&short, settings).build().map(|lists| short.with_lists(lists)) else { continue };
        let key = measured(&order)?;
        if chosen.is_none_or(|(least, _)| key < least) {
            chosen = Some((key, settings));
        }
    }
    let drafted = chosen.and_then(|(_, settings)| Draft::new(problem, settings).build());
    let drafted = drafted.map_or_else(|| problem.serial(), |lists| problem.with_lists(lists));
    let mut best = (measured(&drafted)?, drafted);
    if problem.placement == v_shape(devices) {
        let by_hand = zb_v(devices, problem.microbatches);
        let key = measured(&by_hand)?;
        if key < best.0 && problem.fits(&by_hand) {
            best = (key, by_hand);
        }
    }
    justify(&best.1, &problem.times, &problem.memory, &problem.limit, Goal::Span)
}

#[derive(Debug, Clone, Default)]
struct Device {
    /// Its stages in forward order.
    stages: Vec<usize>,
    /// B that have run and whose W have not, oldest first.
    weights: VecDeque<Action>,
    free: f64,
    idle: f64,
    held: f64,
    last_was_backward: bool,
    list: Vec<Action>,
}

struct Draft<'a> {
    problem: &'a Problem,
    m: usize,
    settings: Settings,
    devices: Vec<Device>,
    /// Microbatches whose F, B and W have run, by stage.
    done: [Vec<usize>; 3],
    /// End of F and of B, by stage and microbatch; infinite while unknown.
    ended: [Vec<f64>; 2],
    /// What an activation may grow to, by stage.
    size: Vec<f64>,
    /// The most activations that a stage may hold.
    most: Vec<usize>,
    events: BinaryHeap<Reverse<Moment>>,
}

/// A device to look at, and when.
#[derive(PartialEq)]
struct Moment(f64, usize);

impl Eq for Moment {}

impl PartialOrd for Moment {
    fn partial_cmp(&self, other: &Moment) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Moment {
    fn cmp(&self, other: &Moment) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0).then(self.1.cmp(&other.1))
    }
}

impl<'a> Draft<'a> {
    fn new(problem: &'a Problem, settings: Settings) -> Draft<'a> {
        let (m, stages) = (problem.microbatches as usize, problem.placement.stages());
        let devices = (0..problem.limit.len() as u32).map(|device| Device {
            stages: problem.placement.stages_of(device).map(|stage| stage.index()).collect(),
            ..Device::default()
        });
        let devices: Vec<Device> = devices.collect();
        let memory = &problem.memory;
        let size: Vec<f64> = memory.until_b.iter().zip(&memory.until_w).map(|(b, w)| b.max(*w)).collect();
        let lives = lives(problem);
        let mut most = vec![1; stages];
        for (device, limit) in devices.iter().zip(&problem.limit) {
            let all: f64 = device.stages.iter().map(|&stage| lives[stage] * size[stage]).sum();
            for &stage in &device.stages {
                let share = if all > 0.0 { limit * lives[stage] / all } else { f64::INFINITY };
                most[stage] = (share.round() as usize).max(1);
            }
        }
        Draft {
            problem,
            m,
            settings,
            devices,
            done: [vec![0; stages], vec![0; stages], vec![0; stages]],
            ended: [vec![f64::INFINITY; stages * m], vec![f64::INFINITY; stages * m]],
            size,
            most,
            events: BinaryHeap::new(),
        }
    }

    /// The lists; `None` when a device waits for room for ever.
    fn build(mut self) -> Option<Vec<Vec<Action>>> {
        for device in 0..self.devices.len() {
            self.events.push(Reverse(Moment(0.0, device)));
        }
        while let Some(Reverse(Moment(now, device))) = self.events.pop() {
            if self.devices[device].free > now + CLOSE {
                continue;
            }
            match self.choose(device, now) {
                Ok(action) => self.put(device, now, action),
                Err(due) if due < f64::INFINITY => self.events.push(Reverse(Moment(due, device))),
                Err(_) => {}
            }
        }
        let complete = self.devices.iter().all(|device| device.list.len() == 3 * self.m * device.stages.len());
        complete.then(|| self.devices.into_iter().map(|device| device.list).collect())
    }

    /// When the input of the next F (0) or B (1) of a stage is there; infinite while unknown, or when none is left.
    fn due(&self, pass: usize, stage: usize) -> f64 {
        let microbatch = self.done[pass][stage];
        if microbatch == self.m {
            return f64::INFINITY;
        }
        let device_of = &self.problem.placement.device_of_stage;
        let from = |pass: usize, other: usize| {
            let transfer = if device_of[other] == device_of[stage] { 0.0 } else { self.problem.times.comm };
            self.ended[pass][other * self.m + microbatch] + transfer
        };
        match pass {
            0 if stage == 0 => 0.0,
            0 => from(0, stage - 1),
            _ if stage + 1 == device_of.len() => from(0, stage),
            _ => from(1, stage + 1).max(self.ended[0][stage * self.m + microbatch]),
        }
    }

    /// Whether F of the `place`-th stage of a device finds room.
    fn has_room(&self, device: usize, place: usize) -> bool {
        let state = &self.devices[device];
        let limit = self.problem.limit[device] * (1.0 + CLOSE);
        let (stage, later) = (state.stages[place], &state.stages[place + 1..]);
        let held = |stage: usize| self.done[0][stage] - self.done[2][stage];
        let kept: f64 = later.iter().map(|&stage| self.size[stage]).sum();
        let early: f64 = state.stages[..=place].iter().map(|&stage| held(stage) as f64 * self.size[stage]).sum();
        held(stage) < self.most[stage]
            && state.held + self.size[stage] <= limit
            && early + self.size[stage] + kept <= limit
    }

    /// What a free device starts now, or when to look again.
    fn choose(&self, device: usize, now: f64) -> Result<Action, f64> {
        let state = &self.devices[device];
        let mut due = f64::INFINITY;
        let (mut forward, mut backward, mut blocked) = (None, None, false);
        // Later stages first: they bring activations to their end.
        for (place, &stage) in state.stages.iter().enumerate().rev() {
            for (pass, kind, found) in [(0, Pass::F, &mut forward), (1, Pass::B, &mut backward)] {
                let arrives = self.due(pass, stage);
                if arrives > now + CLOSE {
                    due = due.min(arrives);
                } else if pass == 0 && !self.has_room(device, place) {
                    blocked = true;
                } else if found.is_none() || pass == 0 && self.settings.early_first {
                    *found = Some(action(kind, stage as u32, self.done[pass][stage] as u32));
                }
            }
        }
        let weights = state.weights.front().copied();
        let order = if self.settings.in_turn && state.last_was_backward {
            [forward, weights.filter(|_| blocked), backward]
        } else {
            [backward, weights.filter(|_| blocked), forward]
        };
        if let Some(action) = order.into_iter().flatten().next() {
            return Ok(action);
        }
        let Some(weights) = weights else { return Err(due) };
        let most_idle = self.devices.iter().map(|device| device.idle).fold(0.0, f64::max);
        let wait = due - now;
        let fits = self.problem.times.w[weights.stage.index()] <= wait + CLOSE;
        let affordable = state.idle + wait <= most_idle;
        if fits || self.settings.weights_in_short_waits || !affordable { Ok(weights) } else { Err(due) }
    }

    fn put(&mut self, device: usize, now: f64, action: Action) {
        let (stage, microbatch) = (action.stage.index(), action.microbatch.index());
        let end = now + self.problem.times.of(action.pass, stage);
        let memory = &self.problem.memory;
        let state = &mut self.devices[device];
        let change = match action.pass {
            Pass::F => self.size[stage],
            Pass::B => memory.until_w[stage] - self.size[stage],
            _ => -memory.until_w[stage],
        };
        if !state.list.is_empty() {
            state.idle += now - state.free;
        }
        state.held += change;
        state.free = end;
        state.last_was_backward = action.pass == Pass::B;
        state.list.push(action);
        self.events.push(Reverse(Moment(end, device)));
        let (pass, receiver) = match action.pass {
            Pass::F => (0, Some(stage + 1)),
            Pass::B => (1, stage.checked_sub(1)),
            _ => {
                state.weights.pop_front();
                self.done[2][stage] += 1;
                return;
            }
        };
        if pass == 1 {
            state.weights.push_back(Action { pass: Pass::W, ..action });
        }
        self.done[pass][stage] += 1;
        self.ended[pass][stage * self.m + microbatch] = end;
        let device_of = &self.problem.placement.device_of_stage;
        if let Some(peer) = receiver.and_then(|stage| device_of.get(stage)) {
            self.events.push(Reverse(Moment(end + self.problem.times.comm, *peer as usize)));
        }
    }
}

/// How long an activation of each stage lives at least: its microbatch's way to the last stage and back, and W.
fn lives(problem: &Problem) -> Vec<f64> {
    let (times, device_of) = (&problem.times, &problem.placement.device_of_stage);
    let mut lives = vec![0.0; device_of.len()];
    let mut way = 0.0;
    for stage in (0..device_of.len()).rev() {
        let leaves = device_of.get(stage + 1).is_some_and(|next| *next != device_of[stage]);
        way += times.f[stage] + times.b[stage] + if leaves { 2.0 * times.comm } else { 0.0 };
        lives[stage] = way + times.w[stage];
    }
    lives
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::{StageMemory, StageTimes, replay};
    use crate::schedules::wave;

    fn problem(p: u32, m: u32, chunks: f64, [f, b, w, comm]: [f64; 4]) -> Problem {
        let placement = v_shape(p);
        let stages = placement.stages();
        Problem {
            times: StageTimes::uniform(stages, f, b, w, comm),
            memory: StageMemory::microbatch_stages(&placement, p as usize, 0.0),
            limit: vec![chunks / 2.0; p as usize],
            microbatches: m,
            placement,
        }
    }

    #[test]
    fn unit_time_has_no_span_bubble_at_the_memory_of_one_f_one_b() {
        for p in 1..=12 {
            let problem = problem(p, 3 * p, f64::from(2 * p), [1.0, 1.0, 1.0, 0.0]);
            let order = greedy(&problem).unwrap();
            order.validate().unwrap();
            assert!(problem.fits(&order));
            assert_eq!(replay(&order, &problem.times).unwrap().bubble_span(), 0.0, "p={p}");
        }
    }

    #[test]
    fn published_times_are_no_worse_than_the_fixed_schedule() {
        for (p, [f, b, w, comm]) in [(8, [29.718, 29.444, 19.927, 0.527]), (16, [11.347, 11.248, 8.132, 0.377])] {
            let problem = problem(p, 3 * p, f64::from(2 * p), [f / 2.0, b / 2.0, w / 2.0, comm]);
            let span = |order: &ComputeOrder| replay(order, &problem.times).unwrap().totals.longest_span;
            let order = greedy(&problem).unwrap();
            let fixed = crate::schedules::build("zb-v", &crate::schedules::Request::new(p, 3 * p)).unwrap();
            assert!(problem.fits(&order) && problem.fits(&fixed));
            assert!(span(&order) < span(&fixed), "p={p}: {} {}", span(&order), span(&fixed));
        }
    }

    #[test]
    fn every_limit_from_the_least_on_is_kept() {
        for placement in [v_shape(5), wave(3, 4)] {
            let stages = placement.stages();
            let sizes: Vec<f64> = (0..stages).map(|s| 1e6 * (1.0 + (s * 5 % 7) as f64)).collect();
            let memory = StageMemory {
                until_w: sizes.iter().map(|size| 0.9 * size).collect(),
                until_b: sizes,
                checkpoint: vec![0.0; stages],
            };
            let least = crate::bounds::least_peaks(&placement, &memory);
            let mut before = f64::INFINITY;
            for room in [1.0, 1.5, 2.5, 4.0, f64::INFINITY] {
                let problem = Problem {
                    microbatches: 12,
                    times: StageTimes::uniform(stages, 3.0, 4.0, 2.0, 0.5),
                    limit: least.iter().map(|least| room * least).collect(),
                    placement: placement.clone(),
                    memory: memory.clone(),
                };
                let order = greedy(&problem).unwrap();
                order.validate().unwrap();
                assert!(problem.fits(&order), "{room}");
                let makespan = replay(&order, &problem.times).unwrap().makespan();
                let serial = replay(&problem.serial(), &problem.times).unwrap().makespan();
                assert!(makespan <= serial.min(before * 1.05), "{room}: {makespan}, serial {serial}, before {before}");
                before = makespan;
            }
        }
    }
}
