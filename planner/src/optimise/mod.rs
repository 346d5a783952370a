//! The schedule optimiser: the shortest order it can find for given stages, times and memory limits, with a proven gap.
//!
//! 1. *Seeds*: every named schedule with the placement at hand that fits, the zero-bubble heuristic or the V family, blocks with
//!    continuous offsets, and one microbatch after the other.
//! 2. The shortest seeds are rearranged ([`justify`]): list scheduling forwards and backwards with the seed as priority.
//! 3. *Local search*: the best order is rearranged for times that are a little off, which changes its priorities here and there,
//!    and from there for the true times (Charon and Hudry, "The noising method", Operations Research Letters 14, 1993), until the
//!    bound is near or the rounds are over.
//!
//! The disturbances are the same in every run, and the result is never longer than any seed.

use crate::blocks::{Goal, justify};
use crate::bounds::{LowerBound, lower_bound};
pub use crate::generators::Problem;
use crate::generators::{best_rearranged, continuous, greedy, ranked, zero_bubble};
use crate::order::ComputeOrder;
use crate::replay::{OrderError, Replayer};
use crate::schedules::{Request, SCHEDULES, ScheduleError};
use paceline_sim::program::Pass;

/// How long to look.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Effort {
    /// Seeds that are rearranged.
    pub seeds: usize,
    /// Actions that the local search rearranges in all: its rounds are this by the actions of an order, at least
    /// [`FEWEST_ROUNDS`] and at most [`MOST_ROUNDS`].
    pub actions: usize,
    /// The search ends when the gap to the lower bound is no larger.
    pub gap: f64,
}

impl Default for Effort {
    fn default() -> Effort {
        Effort { seeds: 12, actions: 300_000, gap: 1e-3 }
    }
}

/// The least rounds of local search, for orders of any size.
pub const FEWEST_ROUNDS: usize = 4;
/// The most rounds of local search; later ones find little.
pub const MOST_ROUNDS: usize = 200;
/// Rounds of a walk before the next one starts from the best order again.
const WALK: usize = 6;

/// What was found.
#[derive(Debug, Clone)]
pub struct Optimised {
    /// The order; it keeps the limit.
    pub order: ComputeOrder,
    /// Its makespan.
    pub makespan: f64,
    /// The bound of the problem.
    pub bound: LowerBound,
}

/// Optimises the makespan.
///
/// # Errors
/// When no order can keep the limit (the error says the least that is needed), or the times do not fit the stages.
pub fn optimise(problem: &Problem, effort: Effort) -> Result<Optimised, ScheduleError> {
    const NAME: &str = "optimised";
    let wrong = |source: OrderError| ScheduleError::Order { schedule: NAME, source };
    problem.check(NAME)?;
    let finite: Vec<f64> = problem.limit.iter().map(|limit| limit.min(f64::MAX)).collect();
    let limits = problem.limit.iter().any(|limit| limit.is_finite()).then_some(finite.as_slice());
    let bound = lower_bound(&problem.placement, problem.microbatches, &problem.times, &problem.memory, limits);
    let mut search = Search { problem, replayer: Replayer::default(), best: None };
    let mut seeds = Vec::new();
    for order in seed_orders(problem).map_err(wrong)? {
        let makespan = search.offer(&order).map_err(wrong)?;
        seeds.push((makespan, order));
    }
    seeds.sort_by(|a, b| a.0.total_cmp(&b.0));
    for (_, order) in seeds.iter().take(effort.seeds) {
        if search.gap(&bound) <= effort.gap {
            break;
        }
        let better = justify(order, &problem.times, &problem.memory, &problem.limit, Goal::Makespan).map_err(wrong)?;
        search.offer(&better).map_err(wrong)?;
    }
    search.disturb(effort, &bound).map_err(wrong)?;
    let (makespan, mut order) = search.best.unwrap_or_else(|| (f64::INFINITY, problem.serial()));
    order.name = NAME.to_owned();
    Ok(Optimised { order, makespan, bound })
}

struct Search<'a> {
    problem: &'a Problem,
    replayer: Replayer,
    best: Option<(f64, ComputeOrder)>,
}

impl Search<'_> {
    /// Keeps the order if it is the shortest so far. Returns its makespan.
    fn offer(&mut self, order: &ComputeOrder) -> Result<f64, OrderError> {
        let makespan = self.replayer.run(order, &self.problem.times)?.makespan;
        if self.best.as_ref().is_none_or(|(least, _)| makespan < *least) {
            self.best = Some((makespan, order.clone()));
        }
        Ok(makespan)
    }

    /// The local search: short walks from the best order, each step a disturbance and a rearrangement, shorter or not.
    fn disturb(&mut self, effort: Effort, bound: &LowerBound) -> Result<(), OrderError> {
        let Some((_, best)) = &self.best else { return Ok(()) };
        let problem = self.problem;
        let mut walked = best.clone();
        let actions = walked.actions.iter().map(Vec::len).sum::<usize>().max(1);
        let mut noise = Noise(1);
        for round in 0..(effort.actions / actions).clamp(FEWEST_ROUNDS, MOST_ROUNDS) {
            if self.gap(bound) <= effort.gap {
                break;
            }
            if let Some((_, best)) = self.best.as_ref().filter(|_| round.is_multiple_of(WALK)) {
                walked.clone_from(best);
            }
            let strength = NOISE[round % NOISE.len()];
            let mut off = problem.times.clone();
            for list in [&mut off.f, &mut off.b, &mut off.w] {
                list.iter_mut().for_each(|time| *time *= 1.0 + strength * noise.next());
            }
            for times in [&off, &problem.times] {
                walked = justify(&walked, times, &problem.memory, &problem.limit, Goal::Makespan)?;
            }
            self.offer(&walked)?;
        }
        Ok(())
    }

    fn gap(&self, bound: &LowerBound) -> f64 {
        self.best.as_ref().map_or(f64::INFINITY, |(makespan, _)| bound.gap(*makespan))
    }
}

/// How far the times are off, as shares, in turn.
const NOISE: [f64; 4] = [0.02, 0.1, 0.3, 0.6];

/// Numbers from -1 to 1, the same sequence each time (Steele, Lea and Flood, "Fast splittable pseudorandom number
/// generators", OOPSLA 2014).
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        (mixed >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }
}

/// Orders to start from; all fit.
fn seed_orders(problem: &Problem) -> Result<Vec<ComputeOrder>, OrderError> {
    let devices = problem.limit.len() as u32;
    let chunks = problem.placement.stages() as u32 / devices.max(1);
    let mut orders = vec![problem.serial()];
    for schedule in SCHEDULES.iter().filter(|schedule| schedule.fixed) {
        let request = Request::new(devices, problem.microbatches).chunks(chunks);
        if schedule.placement(devices, Some(chunks)).as_ref() != Ok(&problem.placement) {
            continue;
        }
        let Ok(order) = schedule.check(&request).and_then(|chunks| (schedule.build)(&request, chunks)) else {
            continue;
        };
        // Recomputation changes what is computed, not only its order.
        if !order.actions.iter().flatten().any(|action| action.pass == Pass::R) {
            orders.push(order);
        }
    }
    match problem.placement.name.as_str() {
        "loop" if chunks == 1 => {
            let ideas = [1.0, 2.0, f64::INFINITY].map(|times| {
                let own = problem.memory.until_b.iter().map(|size| times * f64::from(devices) * size);
                own.zip(&problem.limit).map(|(own, limit)| own.min(*limit)).collect::<Vec<f64>>()
            });
            orders.extend(ideas.iter().filter_map(|limit| {
                zero_bubble("optimised", problem.microbatches, &problem.times, &problem.memory, limit).ok()
            }));
        }
        "v" => {
            let blocks = ranked(problem, 16)?;
            orders.push(best_rearranged(problem, &blocks)?);
            orders.extend(blocks);
        }
        _ => {}
    }
    if chunks > 1 && problem.placement.copies == 1 {
        orders.push(greedy(problem)?);
    }
    orders.extend(continuous(problem));
    orders.retain(|order| problem.fits(order));
    Ok(orders)
}

#[cfg(test)]
mod tests;
