//! Blocks with continuous offsets: each pass of one microbatch starts at a time, not in a slot, and the block repeats at any
//! interval that its devices and their memory allow. So unequal F, B and W need leave no repeating bubble.
//!
//! This is modulo scheduling (Rau, "Iterative modulo scheduling", MICRO 1994) with a beam instead of backtracking: the passes
//! of a microbatch are placed in the order of its way, each where it is free modulo the interval, and of all placements
//! those with the shortest way so far go on: a short way is a short life of all activations. A placement that splits
//! the free time of a device so that its other passes no longer fit is dropped at once.

use super::Problem;
use crate::order::{Action, ComputeOrder};
use crate::schedules::action;
use paceline_sim::program::Pass;

/// Placements that go on from one pass to the next.
const BEAM: usize = 96;
/// Places tried for a pass.
const PLACES: usize = 4;
/// Attempts to pack what is left of a device into its free times.
const MOST_PACKINGS: u32 = 100;
/// Tolerance, as a share of the interval.
const CLOSE: f64 = 1e-9;
/// Steps by which the interval grows until a block fits, as shares of the least interval, and how often the last step is halved.
const GROWTH: [f64; 10] = [0.0, 0.005, 0.015, 0.03, 0.06, 0.1, 0.16, 0.25, 0.4, 0.7];
const HALVINGS: usize = 4;

/// Repeated blocks with the shortest intervals found under the memory limit of the problem, shortest first. Empty when the
/// model has two copies, or no interval in reach fits.
pub(crate) fn continuous(problem: &Problem) -> Vec<ComputeOrder> {
    if problem.placement.copies != 1 {
        return Vec::new();
    }
    let least = least_interval(problem);
    let mut found = Vec::new();
    let mut below = least;
    for growth in GROWTH {
        let interval = least * (1.0 + growth);
        if let Some(starts) = Search::new(problem, interval).run() {
            found.push((interval, starts));
            break;
        }
        below = interval;
    }
    let Some((mut above, _)) = found.first().cloned() else { return Vec::new() };
    for _ in 0..HALVINGS {
        if above - below <= least * 1e-3 {
            break;
        }
        let middle = (above + below) / 2.0;
        match Search::new(problem, middle).run() {
            Some(starts) => {
                found.push((middle, starts));
                above = middle;
            }
            None => below = middle,
        }
    }
    found.sort_by(|a, b| a.0.total_cmp(&b.0));
    found.into_iter().map(|(interval, starts)| repeat(problem, interval, &starts)).collect()
}

/// No block repeats faster than a device can work, or than its memory turns over.
fn least_interval(problem: &Problem) -> f64 {
    let times = &problem.times;
    let (placement, memory) = (&problem.placement, &problem.memory);
    let mut work = vec![0.0; problem.limit.len()];
    let mut area = vec![0.0; problem.limit.len()];
    let transfer = |a: usize, b: usize| {
        if placement.device_of_stage[a] == placement.device_of_stage[b] { 0.0 } else { times.comm }
    };
    let mut way = 0.0;
    for stage in (0..placement.stages()).rev() {
        way += times.f[stage] + times.b[stage];
        let device = placement.device_of_stage[stage] as usize;
        work[device] += times.f[stage] + times.b[stage] + times.w[stage];
        area[device] += memory.until_b[stage] * way + memory.until_w[stage] * times.w[stage];
        if stage > 0 {
            way += 2.0 * transfer(stage - 1, stage);
        }
    }
    let turnover = area.iter().zip(&problem.limit).map(|(area, limit)| area / limit);
    work.iter().copied().chain(turnover).fold(0.0, f64::max)
}

/// The whole part below `x`. Baseline x86-64 has no instruction for it, and a call would be most of the search's time.
fn floor(x: f64) -> f64 {
    let towards_zero = x as i64 as f64;
    if towards_zero > x { towards_zero - 1.0 } else { towards_zero }
}

/// `time` modulo the interval.
fn phase(time: f64, interval: f64) -> f64 {
    time - floor(time / interval) * interval
}

/// Starts of the passes of microbatch 0, by stage: F, B, W. Not a number where not placed.
type Starts = Vec<[f64; 3]>;

#[derive(Clone)]
struct Partial {
    starts: Starts,
    /// End of the last pass placed.
    end: f64,
}

struct Search<'a> {
    problem: &'a Problem,
    interval: f64,
    close: f64,
    local: Vec<Vec<usize>>,
}

impl<'a> Search<'a> {
    fn new(problem: &'a Problem, interval: f64) -> Search<'a> {
        let local = (0..problem.limit.len() as u32)
            .map(|device| problem.placement.stages_of(device).map(|s| s.index()).collect())
            .collect();
        Search { problem, interval, close: interval * CLOSE, local }
    }

    fn time(&self, stage: usize, pass: usize) -> f64 {
        let times = &self.problem.times;
        [times.f[stage], times.b[stage], times.w[stage]][pass]
    }

    /// The limit of a device, with tolerance for sums.
    fn room(&self, device: usize) -> f64 {
        self.problem.limit[device] * (1.0 + 1e-9)
    }

    /// The first complete placement within memory.
    fn run(&self) -> Option<Starts> {
        let stages = self.problem.placement.stages();
        let device_of = &self.problem.placement.device_of_stage;
        let way = (0..stages).map(|s| (s, 0)).chain((0..stages).rev().map(|s| (s, 1)));
        let mut beam = vec![Partial { starts: vec![[f64::NAN; 3]; stages], end: 0.0 }];
        let mut before: Option<usize> = None;
        for (stage, pass) in way {
            let device = device_of[stage] as usize;
            let transfer = match before {
                Some(from) if device_of[from] as usize != device => self.problem.times.comm,
                _ => 0.0,
            };
            let mut next: Vec<Partial> = Vec::with_capacity(beam.len() * PLACES);
            for partial in &beam {
                let busy = self.busy(&partial.starts, device);
                let duration = self.time(stage, pass);
                for start in self.places(&busy, partial.end + transfer, duration).into_iter().take(PLACES) {
                    let mut starts = partial.starts.clone();
                    starts[stage][pass] = start;
                    if self.rest_fits(&starts, device) && self.half_way_fits(&starts, device) {
                        next.push(Partial { starts, end: start + duration });
                    }
                }
            }
            next.sort_by(|a, b| a.end.total_cmp(&b.end));
            // The same way with the same phases can be reached by different roads.
            next.dedup_by(|a, b| (a.end - b.end).abs() <= self.close && same(&a.starts, &b.starts, self.close));
            next.truncate(BEAM);
            beam = next;
            before = Some(stage);
        }
        beam.into_iter().find_map(|partial| self.with_weights(partial.starts))
    }

    /// What a device does, modulo the interval, sorted.
    fn busy(&self, starts: &Starts, device: usize) -> Vec<(f64, f64)> {
        let mut busy: Vec<(f64, f64)> = Vec::with_capacity(3 * self.local[device].len());
        for &stage in &self.local[device] {
            for (pass, start) in starts[stage].iter().enumerate().filter(|(_, start)| !start.is_nan()) {
                busy.push((phase(*start, self.interval), self.time(stage, pass)));
            }
        }
        busy.sort_by(|a, b| a.0.total_cmp(&b.0));
        busy
    }

    /// Starts from `ready` on, less than an interval away, that keep clear of `busy`: the earliest one, and those that leave no gap
    /// to a neighbour.
    fn places(&self, busy: &[(f64, f64)], ready: f64, duration: f64) -> Vec<f64> {
        let from = |moment: f64| {
            let late = phase(moment - ready, self.interval);
            ready + if self.interval - late <= self.close { 0.0 } else { late }
        };
        let mut places = vec![ready];
        for (start, length) in busy {
            places.push(from(start + length));
            places.push(from(start - duration));
        }
        places.retain(|place| {
            busy.iter().all(|(start, length)| {
                let after = phase(place - start, self.interval);
                let after = if self.interval - after <= self.close { 0.0 } else { after };
                after >= length - self.close && after + duration <= self.interval + self.close
            })
        });
        places.sort_by(f64::total_cmp);
        places.dedup_by(|a, b| (*a - *b).abs() <= self.close);
        places
    }

    /// Whether the passes of the device that are not placed yet still fit into its free times.
    fn rest_fits(&self, starts: &Starts, device: usize) -> bool {
        let busy = self.busy(starts, device);
        let mut gaps: Vec<f64> = Vec::with_capacity(busy.len());
        for (number, (start, length)) in busy.iter().enumerate() {
            let next = busy.get(number + 1).map_or(busy[0].0 + self.interval, |(next, _)| *next);
            let gap = next - start - length;
            if gap < -self.close {
                return false;
            }
            gaps.push(gap);
        }
        let mut rest: Vec<f64> = Vec::with_capacity(busy.len());
        for &stage in &self.local[device] {
            rest.extend((0..3).filter(|pass| starts[stage][*pass].is_nan()).map(|pass| self.time(stage, pass)));
        }
        rest.sort_by(|a, b| b.total_cmp(a));
        let mut tries = MOST_PACKINGS;
        packs(&rest, &mut gaps, self.close, &mut tries)
    }

    /// Whether what the device holds already, from what is placed, is within the limit: an F without a B yet counts up to now.
    fn half_way_fits(&self, starts: &Starts, device: usize) -> bool {
        self.highest(starts, device) <= self.room(device)
    }

    /// The most that the device holds in the steady phase. Passes that are not placed count as following at once.
    fn highest(&self, starts: &Starts, device: usize) -> f64 {
        let memory = &self.problem.memory;
        let mut lives: Vec<(f64, f64, f64)> = Vec::with_capacity(2 * self.local[device].len());
        for &stage in &self.local[device] {
            let [f, b, w] = starts[stage];
            if f.is_nan() {
                continue;
            }
            let b_ends = if b.is_nan() { f + self.time(stage, 0) } else { b + self.time(stage, 1) };
            lives.push((f, b_ends, memory.until_b[stage]));
            if !b.is_nan() {
                let w_ends = if w.is_nan() { b_ends + self.time(stage, 2) } else { w + self.time(stage, 2) };
                lives.push((b_ends, w_ends, memory.until_w[stage]));
            }
        }
        let frequency = 1.0 / self.interval;
        let mut highest = 0.0f64;
        for (moment, _, _) in &lives {
            let held: f64 = lives
                .iter()
                .map(|(from, to, size)| {
                    let begun = floor((moment - from + self.close) * frequency);
                    let over = floor((moment - to + self.close) * frequency);
                    (begun - over) * size
                })
                .sum();
            highest = highest.max(held);
        }
        highest
    }

    /// Places W on every device where it holds memory for the shortest time; `None` when it cannot be done within the limit.
    fn with_weights(&self, mut starts: Starts) -> Option<Starts> {
        for device in 0..self.local.len() {
            let mut best: Option<(f64, f64, Starts)> = None;
            self.place_weights(device, &mut starts, &mut best);
            starts = best?.2;
        }
        Some(starts)
    }

    /// All places of the W of a device: the one with the lowest peak, then the earliest. A W that is not placed yet counts as following
    /// its B at once, so what is held can only grow, and a start that holds too much already is left.
    fn place_weights(&self, device: usize, starts: &mut Starts, best: &mut Option<(f64, f64, Starts)>) {
        let highest = self.highest(starts, device);
        let room = self.room(device);
        if highest > best.as_ref().map_or(room, |(least, _, _)| least.min(room)) {
            return;
        }
        let open: Vec<usize> = self.local[device].iter().copied().filter(|&stage| starts[stage][2].is_nan()).collect();
        if open.is_empty() {
            let late: f64 = self.local[device].iter().map(|&stage| starts[stage][2]).sum();
            if best.as_ref().is_none_or(|(least, soonest, _)| (highest, late) < (*least, *soonest)) {
                *best = Some((highest, late, starts.clone()));
            }
            return;
        }
        // With more stages than this the choice of the next one is left to their order.
        let choices = if open.len() <= 3 { open.as_slice() } else { &open[..1] };
        for &stage in choices {
            let ready = starts[stage][1] + self.time(stage, 1);
            let busy = self.busy(starts, device);
            for place in self.places(&busy, ready, self.time(stage, 2)).into_iter().take(PLACES) {
                starts[stage][2] = place;
                if self.rest_fits(starts, device) {
                    self.place_weights(device, starts, best);
                }
                starts[stage][2] = f64::NAN;
            }
        }
    }
}

fn same(a: &Starts, b: &Starts, close: f64) -> bool {
    a.iter().flatten().zip(b.iter().flatten()).all(|(a, b)| a.is_nan() && b.is_nan() || (a - b).abs() <= close)
}

/// Whether the items (longest first) fit into the gaps. When that takes more than `tries` to decide, they may: what does not
/// fit is noticed with the next pass.
fn packs(items: &[f64], gaps: &mut [f64], close: f64, tries: &mut u32) -> bool {
    let Some((item, rest)) = items.split_first() else { return true };
    if *tries == 0 {
        return true;
    }
    *tries -= 1;
    for place in 0..gaps.len() {
        let gap = gaps[place];
        // Gaps of one length are one choice.
        if gap + close < *item || gaps[..place].iter().any(|other| (other - gap).abs() <= close) {
            continue;
        }
        gaps[place] = gap - item;
        let fits = packs(rest, gaps, close, tries);
        gaps[place] = gap;
        if fits {
            return true;
        }
    }
    false
}

fn repeat(problem: &Problem, interval: f64, starts: &Starts) -> ComputeOrder {
    let mut lists: Vec<Vec<(f64, Action)>> = vec![Vec::new(); problem.limit.len()];
    for (stage, own) in starts.iter().enumerate() {
        let list = &mut lists[problem.placement.device_of_stage[stage] as usize];
        for microbatch in 0..problem.microbatches {
            let shift = f64::from(microbatch) * interval;
            list.extend(
                [Pass::F, Pass::B, Pass::W]
                    .into_iter()
                    .zip(own)
                    .map(|(pass, start)| (start + shift, action(pass, stage as u32, microbatch))),
            );
        }
    }
    let actions = lists
        .into_iter()
        .map(|mut list| {
            list.sort_by(|a, b| a.0.total_cmp(&b.0));
            list.into_iter().map(|(_, action)| action).collect()
        })
        .collect();
    ComputeOrder {
        name: String::new(),
        microbatches: problem.microbatches,
        placement: problem.placement.clone(),
        actions,
    }
}
