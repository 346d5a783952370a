//! A lower bound on the interval between microbatches that no order can beat in the long run, however irregular it is: with little memory
//! devices wait for each other, which no bound on a single device sees.
//!
//! Times are rounded down to multiples of a grain, which can only make the best order shorter. Then every pass starts at a multiple of the
//! grain (an order whose passes start as early as they can does), and the pipeline has finitely many states: how far each microbatch in
//! flight is, which W wait, what each device does and for how long. All of them are explored. With `weight = time - interval *
//! microbatches begun` on the steps between states, labels that come to rest (Bellman, Ford) prove that there is no cycle of negative
//! weight, so no order of `m` microbatches, from the empty pipeline to the empty pipeline, takes less than `interval * m`, plus the least
//! weight with which the pipeline becomes empty again.
//!
//! Microbatches are alike, so each stage may take them in their order: the n-th start of a pass after the n-th start of the pass before it
//! is all that the order needs, and activations only count.
//!
//! What a state counts is bounded. Where limits let more W wait than it counts, those beyond are done for nothing, which makes the best
//! order shorter; where they let in more microbatches, there is no bound.

use crate::generators::Problem;
use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};

/// A bound on every number of microbatches: `interval * m + ramps`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Steady {
    /// Between microbatches, in the unit of the times.
    pub interval: f64,
    /// Once, in the unit of the times.
    pub ramps: f64,
    /// States of the pipeline that were explored.
    pub states: usize,
}

impl Steady {
    /// No order of so many microbatches is shorter.
    pub fn makespan(&self, microbatches: u32) -> f64 {
        self.interval * f64::from(microbatches) + self.ramps
    }
}

/// States beyond which the bound is given up.
pub const MOST_STATES: usize = 1_000_000;
/// Steps between states beyond which an interval counts as not proven.
const MOST_STEPS: usize = 20_000_000;
/// The longest pass, in grains.
const LONGEST: u32 = 7;
/// Intervals are tried at these parts of a grain.
const PARTS: u32 = 2;

/// The longest interval that can be proven, at most `reached` (what some order takes; more cannot be true). `None` without limits, for two
/// copies of the model, where the pipeline has too many states or may have more microbatches in flight than a state counts, or where
/// nothing more than the work of a device comes of it.
pub fn steady(problem: &Problem, reached: f64) -> Option<Steady> {
    let grid = Grid::new(problem)?;
    let unit = grid.grain / f64::from(PARTS);
    // Work alone proves `proven`; what is longer than `open` some order beats.
    let mut proven = grid.work * PARTS;
    let mut open = (reached / unit * (1.0 + 1e-9)).floor() as u32 + 1;
    let mut best = None;
    // What is too long shows itself soon, so look there first.
    while proven + 1 < open {
        let tried = (proven + open).div_ceil(2).min(open - 1);
        match grid.explore(tried) {
            Explored::Proven { ramps, states } => {
                best = Some(Steady { interval: f64::from(tried) * unit, ramps: ramps as f64 * unit, states });
                proven = tried;
            }
            Explored::NotProven => open = tried,
            Explored::TooMany => return best,
        }
    }
    best
}

/// What came of an interval.
enum Explored {
    /// No order is faster.
    Proven { ramps: i64, states: usize },
    /// Some order may be.
    NotProven,
    /// There are too many states, or too many microbatches in flight for a state.
    TooMany,
}

/// The problem with whole times. Passes of the chain are F of all stages upwards, then B downwards.
struct Grid<'a> {
    problem: &'a Problem,
    grain: f64,
    /// Of each pass of the chain.
    length: Vec<u32>,
    /// Of W, by stage.
    weights: Vec<u32>,
    /// The device of each pass of the chain.
    device: Vec<usize>,
    /// By stage: the stage with which its W are counted, one like it on the same device.
    group: Vec<usize>,
    /// Of the busiest device, per microbatch.
    work: u32,
}

/// A state of the pipeline; every choice at this moment is still open for the devices from `turn` on.
#[derive(Clone, Copy, PartialEq, Eq)]
struct State {
    /// Passes of the chain that microbatches in flight have behind them, the oldest first.
    done: [u8; FLIGHT],
    flying: u8,
    /// W that wait or run, by group.
    waiting: [u8; STAGES],
    /// By device: the pass of the chain that it runs, or [`WEIGHTS`] and the group, or [`IDLE`].
    runs: [u8; DEVICES],
    /// By device: what is left of it.
    left: [u8; DEVICES],
}

/// What a state counts at most: microbatches in flight, and W that wait of a group.
const FLIGHT: usize = 8;
const WAITING: u8 = 7;
const STAGES: usize = 8;
const DEVICES: usize = 4;
const WEIGHTS: u8 = 16;
const IDLE: u8 = 31;

impl State {
    const EMPTY: State =
        State { done: [0; FLIGHT], flying: 0, waiting: [0; STAGES], runs: [IDLE; DEVICES], left: [0; DEVICES] };

    /// 40 + 4 + 24 + 20 + 12 bits.
    fn key(&self) -> u128 {
        let mut key = u128::from(self.flying);
        for done in &self.done[..] {
            key = key << 5 | u128::from(*done);
        }
        for waiting in &self.waiting[..] {
            key = key << 3 | u128::from(*waiting);
        }
        for (runs, left) in self.runs.iter().zip(&self.left) {
            key = key << 8 | u128::from(*runs) << 3 | u128::from(*left);
        }
        key
    }

    fn from_key(mut key: u128) -> State {
        let mut state = State::EMPTY;
        let mut take = |bits: u32| {
            let low = (key & ((1 << bits) - 1)) as u8;
            key >>= bits;
            low
        };
        for device in (0..DEVICES).rev() {
            state.left[device] = take(3);
            state.runs[device] = take(5);
        }
        for waiting in state.waiting.iter_mut().rev() {
            *waiting = take(3);
        }
        for done in state.done.iter_mut().rev() {
            *done = take(5);
        }
        state.flying = take(8);
        state
    }
}

impl<'a> Grid<'a> {
    fn new(problem: &'a Problem) -> Option<Grid<'a>> {
        let (placement, times) = (&problem.placement, &problem.times);
        let stages = placement.stages();
        let limited = problem.limit.iter().all(|limit| limit.is_finite());
        if placement.copies != 1 || !limited || stages > STAGES || problem.limit.len() > DEVICES {
            return None;
        }
        let chain = || (0..stages).map(|s| (s, times.f[s])).chain((0..stages).rev().map(|s| (s, times.b[s])));
        let all = || chain().map(|(_, time)| time).chain(times.w.iter().copied());
        let sum: f64 = all().sum();
        let grains = |grain: f64, time: f64| (time / grain * (1.0 + 1e-9)).floor() as u32;
        // The coarsest grain of those that keep most of the work.
        let mut grain = (0.0, 0.0);
        for time in all() {
            for parts in 1..=LONGEST {
                let candidate = time / f64::from(parts);
                if !candidate.is_normal() || all().any(|time| !(1..=LONGEST).contains(&grains(candidate, time))) {
                    continue;
                }
                let kept = all().map(|time| f64::from(grains(candidate, time)) * candidate).sum::<f64>() / sum;
                if kept > grain.0 + 0.01 || kept > grain.0 - 1e-9 && candidate > grain.1 {
                    grain = (kept, candidate);
                }
            }
        }
        let grain = grain.1;
        if grain <= 0.0 {
            return None;
        }
        let device_of = |stage: usize| placement.device_of_stage[stage] as usize;
        let weights: Vec<u32> = times.w.iter().map(|time| grains(grain, *time)).collect();
        let alike = |a: usize, b: usize| {
            device_of(a) == device_of(b)
                && weights[a] == weights[b]
                && problem.memory.until_w[a] == problem.memory.until_w[b]
        };
        let group = (0..stages).map(|s| (0..s).find(|other| alike(*other, s)).unwrap_or(s)).collect();
        let length: Vec<u32> = chain().map(|(_, time)| grains(grain, time)).collect();
        let device: Vec<usize> = chain().map(|(stage, _)| device_of(stage)).collect();
        let mut work = vec![0; problem.limit.len()];
        device.iter().zip(&length).for_each(|(device, length)| work[*device] += length);
        (0..stages).for_each(|stage| work[device_of(stage)] += weights[stage]);
        let work = work.into_iter().max().unwrap_or(0);
        Some(Grid { problem, grain, length, weights, device, group, work })
    }

    fn stage(&self, pass: usize) -> usize {
        let stages = self.weights.len();
        if pass < stages { pass } else { 2 * stages - 1 - pass }
    }

    /// What a device holds.
    fn held(&self, state: &State, device: usize) -> f64 {
        let memory = &self.problem.memory;
        let (stages, device_of) = (self.weights.len(), &self.problem.placement.device_of_stage);
        let mut held = 0.0;
        for stage in (0..stages).filter(|stage| device_of[*stage] as usize == device) {
            let backward = 2 * stages - 1 - stage;
            let begun = state.done[..usize::from(state.flying)].iter().filter(|done| {
                let done = usize::from(**done);
                (stage + 1..=backward).contains(&done)
            });
            let running = usize::from(usize::from(state.runs[device]) == stage);
            held += (begun.count() + running) as f64 * memory.until_b[stage];
            if self.group[stage] == stage {
                held += f64::from(state.waiting[stage]) * memory.until_w[stage];
            }
        }
        held
    }

    /// The states after the devices from `device` on have decided, with the number of microbatches begun. `None` where one might begin that
    /// a state does not count.
    fn decide(&self, state: State, device: usize, begun: u32, found: &mut Vec<(State, u32)>) -> Option<()> {
        if device == self.problem.limit.len() {
            found.push((state, begun));
            return Some(());
        }
        if state.runs[device] != IDLE {
            return self.decide(state, device + 1, begun, found);
        }
        let memory = &self.problem.memory;
        let limit = self.problem.limit[device] * (1.0 + 1e-9);
        let held = self.held(&state, device);
        let chain = self.device.len();
        for pass in (0..chain).filter(|pass| self.device[*pass] == device) {
            let stage = self.stage(pass);
            let forward = pass < chain / 2;
            let grows = if forward { memory.until_b[stage] } else { memory.until_w[stage] - memory.until_b[stage] };
            if grows > 0.0 && held + grows > limit {
                continue;
            }
            let mut next = state;
            next.runs[device] = pass as u8;
            next.left[device] = self.length[pass] as u8;
            if pass == 0 {
                if usize::from(state.flying) == FLIGHT {
                    return None;
                }
                next.flying += 1;
                self.decide(next, device + 1, begun + 1, found)?;
            } else if state.done[..usize::from(state.flying)].contains(&(pass as u8)) {
                self.decide(next, device + 1, begun, found)?;
            }
        }
        let device_of = &self.problem.placement.device_of_stage;
        for stage in (0..self.weights.len()).filter(|stage| device_of[*stage] as usize == device) {
            if self.group[stage] == stage && state.waiting[stage] > 0 {
                let mut next = state;
                next.runs[device] = WEIGHTS + stage as u8;
                next.left[device] = self.weights[stage] as u8;
                self.decide(next, device + 1, begun, found)?;
            }
        }
        self.decide(state, device + 1, begun, found)
    }

    /// The next moment at which something ends, and how long it takes to get there. `None` when nothing runs.
    fn advance(&self, mut state: State) -> Option<(State, u32)> {
        let devices = self.problem.limit.len();
        let step = (0..devices).filter(|d| state.runs[*d] != IDLE).map(|d| state.left[d]).min()?;
        for device in 0..devices {
            if state.runs[device] == IDLE {
                continue;
            }
            state.left[device] -= step;
            if state.left[device] > 0 {
                continue;
            }
            let ran = state.runs[device];
            state.runs[device] = IDLE;
            if ran >= WEIGHTS {
                state.waiting[usize::from(ran - WEIGHTS)] -= 1;
                continue;
            }
            let flying = usize::from(state.flying);
            // The oldest of those that have come this far.
            let place = state.done[..flying].iter().position(|done| *done == ran)?;
            state.done[place] += 1;
            let pass = usize::from(ran);
            if pass >= self.device.len() / 2 {
                let waiting = &mut state.waiting[self.group[self.stage(pass)]];
                *waiting = (*waiting + 1).min(WAITING);
            }
            if pass + 1 == self.device.len() {
                state.done.copy_within(place + 1.., place);
                state.done[FLIGHT - 1] = 0;
                state.flying -= 1;
                state.done[usize::from(state.flying)..].fill(0);
            }
        }
        Some((state, u32::from(step)))
    }

    /// Whether labels come to rest for an interval of so many parts of a grain; weights are in parts as well.
    fn explore(&self, interval: u32) -> Explored {
        let empty = State::EMPTY.key();
        let mut labels: HashMap<u128, (i64, bool), BuildHasherDefault<Mix>> = HashMap::default();
        let mut queue: VecDeque<u128> = VecDeque::from([empty]);
        labels.insert(empty, (0, true));
        let mut back: Option<i64> = None;
        let mut found = Vec::new();
        let mut steps = 0;
        while let Some(key) = queue.pop_front() {
            let Some(entry) = labels.get_mut(&key) else { continue };
            entry.1 = false;
            let label = entry.0;
            found.clear();
            if self.decide(State::from_key(key), 0, 0, &mut found).is_none() {
                return Explored::TooMany;
            }
            for (state, begun) in &found {
                let Some((next, time)) = self.advance(*state) else { continue };
                steps += 1;
                let weight = label + i64::from(PARTS * time) - i64::from(interval * begun);
                let key = next.key();
                if key == empty {
                    if weight < 0 {
                        return Explored::NotProven;
                    }
                    back = Some(back.map_or(weight, |least: i64| least.min(weight)));
                    continue;
                }
                let entry = labels.entry(key).or_insert((i64::MAX, false));
                if weight < entry.0 {
                    entry.0 = weight;
                    if !entry.1 {
                        entry.1 = true;
                        queue.push_back(key);
                    }
                }
            }
            if labels.len() > MOST_STATES {
                return Explored::TooMany;
            }
            if steps > MOST_STEPS {
                return Explored::NotProven;
            }
        }
        back.map_or(Explored::NotProven, |ramps| Explored::Proven { ramps, states: labels.len() })
    }
}

/// Mixes a key into a hash (the finalizer of SplitMix64 on both halves).
#[derive(Default)]
struct Mix(u64);

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u128(u128::from(*byte));
        }
    }

    fn write_u128(&mut self, key: u128) {
        let mut mixed = self.0 ^ (key as u64) ^ ((key >> 64) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        self.0 = mixed ^ (mixed >> 31);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bounds::{least_peaks, strongest};
    use crate::optimise::{Effort, optimise};
    use crate::order::Placement;
    use crate::replay::{StageMemory, StageTimes};
    use crate::schedules::{bidirectional, looped, v_shape};
    use proptest::prelude::*;

    fn problem(placement: Placement, times: [f64; 3], limit: f64) -> Problem {
        let (devices, stages) = (placement.devices(), placement.stages());
        let [f, b, w] = times.map(|time| time * devices as f64 / stages as f64);
        Problem {
            microbatches: 64,
            times: StageTimes::uniform(stages, f, b, w, 0.0),
            memory: StageMemory::microbatch_stages(&placement, devices, 0.0),
            limit: vec![limit; devices],
            placement,
        }
    }

    #[test]
    fn no_order_halves_the_repeating_bubble_of_v_min_with_two_chunks() {
        // The paper's adaptive search leaves 22.7 % at two microbatch-stages of memory; half of that would be 11.35 %.
        let problem = problem(v_shape(4), [18.5, 18.1, 9.3], 2.0);
        let found = steady(&problem, 56.3).unwrap();
        // Grains of half a B: F 2, B 2, W 1 of 9.05 / 2, ten a microbatch, and no state goes on with fewer than twelve.
        assert!((found.interval - 12.0 * 9.05 / 2.0).abs() < 1e-9, "{found:?}");
        let bubble = 1.0 - 64.0 * 45.9 / found.makespan(64);
        assert!(bubble > 0.165, "{bubble}");
        let order = optimise(&problem, Effort::default()).unwrap();
        assert!(
            found.makespan(64) <= order.makespan && order.makespan <= found.makespan(64) * 1.03,
            "{}",
            order.makespan
        );
    }

    #[test]
    fn intervals_known_by_hand() {
        // One microbatch at a time: there, back, and W of the last stage to go before the next one, nothing overlaps but W of others.
        let one = steady(&problem(looped(2, 1), [2.0, 2.0, 1.0], 1.0), 20.0).unwrap();
        assert_eq!((one.interval, one.makespan(3)), (9.0, 27.0));
        // Room for all: only the work of a device counts, which other bounds know.
        assert_eq!(steady(&problem(looped(2, 1), [2.0, 2.0, 1.0], 2.0), 5.4), None);
        // W that hold nothing pile up beyond what is counted, and yet no microbatch gets through in less than its eight seconds.
        let mut light = problem(looped(2, 1), [2.0, 2.0, 1.0], 1.0);
        light.memory.until_w.fill(0.0);
        assert_eq!(steady(&light, 20.0).unwrap().interval, 8.0);
        // The stage in the middle takes one microbatch at a time, from its F to its W. The first may run ahead by eight, but not by nine.
        let middle =
            |ahead: f64| Problem { limit: vec![ahead, 1.0, ahead], ..problem(looped(3, 1), [2.0, 2.0, 1.0], 1.0) };
        assert_eq!(steady(&middle(8.0), 20.0).unwrap().interval, 9.0);
        assert_eq!(steady(&middle(9.0), 20.0), None);
        // Without a limit, or with two copies, there is nothing to walk over.
        let free = Problem { limit: vec![f64::INFINITY; 2], ..problem(looped(2, 1), [2.0, 2.0, 1.0], 1.0) };
        assert_eq!(steady(&free, 20.0), None);
        assert_eq!(steady(&problem(bidirectional(2), [2.0, 2.0, 1.0], 1.0), 20.0), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

        #[test]
        fn no_order_found_is_faster(
            shape in 0..4usize,
            microbatches in 1u32..12,
            whole in prop::collection::vec(1u32..4, 18),
            room in 1.0f64..4.0,
            freed_at_b in 0.0f64..1.2,
        ) {
            let placement = [looped(2, 1), looped(3, 1), v_shape(2), looped(2, 2)][shape].clone();
            let stages = placement.stages();
            let list = |from: usize| (0..stages).map(|s| f64::from(whole[from + s]) * 1.25).collect::<Vec<f64>>();
            let memory = StageMemory::microbatch_stages(&placement, placement.devices(), freed_at_b.min(1.0));
            let limit = least_peaks(&placement, &memory).iter().map(|least| least * room).collect();
            let times = StageTimes { f: list(0), b: list(6), w: list(12), comm: 0.4 };
            let problem = Problem { microbatches, times, memory, limit, placement };
            let order = optimise(&problem, Effort::default()).unwrap();
            let bound = strongest(&problem, order.makespan);
            prop_assert!(bound.makespan <= order.makespan * (1.0 + 1e-9), "{bound:?}, but {}", order.makespan);
        }
    }
}
