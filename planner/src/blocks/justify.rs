//! Rearranges an order where devices idle: list scheduling forwards in time, then backwards in time, under a memory
//! limit per device.
//!
//! The forward pass follows the order, and when a device would idle it takes the first later action that is ready and leaves
//! room for everything it overtakes. That refills the warm-up. The backward pass does the same from the end, where W plays
//! the part of F (in reversed time W allocates and F frees), and refills the cool-down. Passes alternate while they
//! help: the double justification of project scheduling (Valls, Ballestin and Quintanilla, EJOR 165, 2005), with memory
//! as the limited resource. The steady phase has no idle slot, so it keeps its order and the cost stays near linear.

use crate::order::{Action, ComputeOrder};
use crate::replay::{OrderError, Replayer, StageMemory, StageTimes, Totals, peaks};
use paceline_sim::program::Pass;

/// What to make short first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// The longest device span, then the makespan.
    Span,
    /// The makespan, then the longest device span.
    Makespan,
}

impl Goal {
    fn key(self, totals: &Totals) -> (f64, f64) {
        match self {
            Goal::Span => (totals.longest_span, totals.makespan),
            Goal::Makespan => (totals.makespan, totals.longest_span),
        }
    }
}

/// Rounds of a forward and a backward pass; unit-time blocks settle after two.
const ROUNDS: usize = 6;
/// How far down its list a device looks for something to do.
const LOOK_AHEAD: usize = 512;
/// Tolerance for sums of times and sizes.
const CLOSE: f64 = 1e-9;

/// The best order found from `order` that keeps every device within `limit` (as far as `order` itself does), never worse than
/// `order` for `goal`. `memory` gives the sizes; the limit is kept for activations freed as `memory` says.
///
/// # Errors
/// When `order` cannot be replayed with `times`.
pub fn justify(
    order: &ComputeOrder,
    times: &StageTimes,
    memory: &StageMemory,
    limit: &[f64],
    goal: Goal,
) -> Result<ComputeOrder, OrderError> {
    justify_until(order, times, memory, limit, goal, Enough { span: 0.0, makespan: 0.0 })
}

/// When an order cannot become better, so that looking on is in vain.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Enough {
    /// The longest device span is no longer than this,
    pub span: f64,
    /// and the makespan no longer than this.
    pub makespan: f64,
}

impl Enough {
    fn reached(&self, totals: &Totals) -> bool {
        let within = |value: f64, enough: f64| value <= enough * (1.0 + CLOSE);
        within(totals.longest_span, self.span) && within(totals.makespan, self.makespan)
    }
}

/// [`justify`] that stops as soon as the order is good enough.
///
/// # Errors
/// As [`justify`].
pub fn justify_until(
    order: &ComputeOrder,
    times: &StageTimes,
    memory: &StageMemory,
    limit: &[f64],
    goal: Goal,
    enough: Enough,
) -> Result<ComputeOrder, OrderError> {
    let mut replayer = Replayer::default();
    let totals = replayer.run(order, times)?;
    if enough.reached(&totals) {
        return Ok(order.clone());
    }
    let mut best = (goal.key(&totals), order.clone());
    // A device that the order itself takes over the limit may stay there.
    let limit: Vec<f64> = peaks(order, memory)
        .peak
        .iter()
        .enumerate()
        .map(|(d, own)| limit.get(d).map_or(*own, |l| l.max(*own)))
        .collect();
    let mut pass = ListPass::new(order, times, memory, &limit);
    let forwards = pass.run(&order.actions, false, &[]);
    // Levelling the ends of the devices and leaving them in a slope reach different orders; either may win.
    for slope in [true, false] {
        let mut current = order.clone();
        let mut reached = f64::INFINITY;
        for round in 0..ROUNDS {
            current.actions = if round == 0 { forwards.clone() } else { pass.run(&current.actions, false, &[]) };
            replayer.run(&current, times)?;
            let first: Vec<f64> = (0..current.actions.len())
                .map(|device| replayer.starts(device).first().copied().unwrap_or(0.0))
                .collect();
            let latest = first.iter().copied().fold(0.0, f64::max);
            let release: Vec<f64> = first.iter().map(|start| if slope { latest - start } else { 0.0 }).collect();
            let mut reversed: Vec<Vec<Action>> = current.actions;
            reversed.iter_mut().for_each(|list| list.reverse());
            current.actions = pass.run(&reversed, true, &release);
            current.actions.iter_mut().for_each(|list| list.reverse());
            let totals = replayer.run(&current, times)?;
            let key = goal.key(&totals);
            if key < best.0 {
                best = (key, current.clone());
                if enough.reached(&totals) {
                    return Ok(best.1);
                }
            }
            if key.0 + key.1 >= reached - CLOSE * reached.abs().min(1.0) {
                break;
            }
            reached = key.0 + key.1;
        }
    }
    Ok(best.1)
}

/// Not yet scheduled.
const PENDING: f64 = f64::INFINITY;
/// The end of a chain of places.
const END: u32 = u32::MAX;

/// One pass of list scheduling; buffers are kept from one to the next.
struct ListPass<'a> {
    times: &'a StageTimes,
    memory: &'a StageMemory,
    limit: &'a [f64],
    device_of: &'a [u32],
    per_copy: usize,
    m: usize,
    /// End of every action by stage, microbatch and pass (F, B or BW, W, R); 0 for actions that do not exist.
    ended: Vec<f64>,
    /// By device: the place of the first action not yet taken.
    head: Vec<u32>,
    /// By device and place: the next place not yet taken.
    next: Vec<Vec<u32>>,
    /// By stage: its number among the stages of its device.
    local: Vec<u32>,
    /// By device and class (pass and local stage): actions not yet taken.
    left: Vec<Vec<u32>>,
    /// By device: memory held.
    held: Vec<f64>,
    /// By device: whether it found nothing to do when it was last looked at.
    idle: Vec<bool>,
    /// By device: when to look at it next; `PENDING` when only another device can give it something to do. So few devices need
    /// no heap.
    look: Vec<f64>,
}

/// The device to look at first, and when.
fn soonest(look: &[f64]) -> Option<(usize, f64)> {
    let (device, time) = look
        .iter()
        .enumerate()
        .fold((0, PENDING), |least, (device, &time)| if time < least.1 { (device, time) } else { least });
    (time < PENDING).then_some((device, time))
}

impl<'a> ListPass<'a> {
    fn new(order: &'a ComputeOrder, times: &'a StageTimes, memory: &'a StageMemory, limit: &'a [f64]) -> Self {
        let mut local: Vec<u32> = Vec::with_capacity(order.placement.stages());
        for (stage, device) in order.placement.device_of_stage.iter().enumerate() {
            local.push(order.placement.device_of_stage[..stage].iter().filter(|d| *d == device).count() as u32);
        }
        ListPass {
            times,
            memory,
            limit,
            device_of: &order.placement.device_of_stage,
            per_copy: order.placement.stages_per_copy(),
            m: order.microbatches as usize,
            ended: Vec::new(),
            head: Vec::new(),
            next: Vec::new(),
            local,
            left: Vec::new(),
            held: Vec::new(),
            idle: Vec::new(),
            look: Vec::new(),
        }
    }

    fn slot(&self, pass: Pass, stage: usize, microbatch: usize) -> usize {
        let kind = match pass {
            Pass::F => 0,
            Pass::B | Pass::BW => 1,
            Pass::W => 2,
            Pass::R => 3,
        };
        (stage * self.m + microbatch) * 4 + kind
    }

    /// Pass and stage as a small number. Actions of a class depend on each other in the order of their microbatches, so
    /// only the first of each class in a list is worth a look.
    fn class(&self, action: Action) -> usize {
        let kind = match action.pass {
            Pass::F => 0,
            Pass::B | Pass::BW => 1,
            Pass::W => 2,
            Pass::R => 3,
        };
        4 * self.local[action.stage.index()] as usize + kind
    }

    /// When everything that `action` needs is there: `PENDING` while something is not scheduled. In reversed time an action
    /// needs what needs it.
    fn ready(&self, action: Action, backwards: bool) -> f64 {
        let (stage, microbatch) = (action.stage.index(), action.microbatch.index());
        let own = |pass| self.ended[self.slot(pass, stage, microbatch)];
        let from = |pass, other: usize| {
            let transfer = if self.device_of[other] == self.device_of[stage] { 0.0 } else { self.times.comm };
            self.ended[self.slot(pass, other, microbatch)] + transfer
        };
        let is_first = stage.is_multiple_of(self.per_copy);
        let is_last = (stage + 1).is_multiple_of(self.per_copy);
        let neighbour = match (action.pass, backwards) {
            (Pass::F, false) if !is_first => from(Pass::F, stage - 1),
            (Pass::F, true) if !is_last => from(Pass::F, stage + 1),
            (Pass::B | Pass::BW, false) if !is_last => from(Pass::B, stage + 1),
            (Pass::B | Pass::BW, true) if !is_first => from(Pass::B, stage - 1),
            _ => 0.0,
        };
        let local = match (action.pass, backwards) {
            (Pass::F, false) | (Pass::W, true) => 0.0,
            (Pass::R, false) => own(Pass::F),
            (Pass::B | Pass::BW, false) => own(Pass::F).max(own(Pass::R)),
            (Pass::W, false) | (Pass::R, true) => own(Pass::B),
            (Pass::F, true) => own(Pass::R).max(own(Pass::B)),
            (Pass::B | Pass::BW, true) => own(Pass::W),
        };
        neighbour.max(local)
    }

    /// What the device holds more after the action, in the direction of time of this pass.
    fn change(&self, action: Action, backwards: bool, recomputes: bool) -> f64 {
        let s = action.stage.index();
        let (until_b, until_w) = (self.memory.until_b[s], self.memory.until_w[s]);
        let forwards = match action.pass {
            Pass::F if recomputes => self.memory.checkpoint[s],
            Pass::F => until_b,
            Pass::R => until_b - self.memory.checkpoint[s],
            Pass::B => until_w - until_b,
            Pass::W => -until_w,
            Pass::BW => -until_b,
        };
        if backwards { -forwards } else { forwards }
    }

    /// Lists in the order of their new starts (in the direction of time of the pass). `release` is when a device may start.
    fn run(&mut self, lists: &[Vec<Action>], backwards: bool, release: &[f64]) -> Vec<Vec<Action>> {
        let stages = self.device_of.len();
        self.ended.clear();
        self.ended.resize(4 * stages * self.m, 0.0);
        let mut recomputes = vec![false; stages];
        self.head.clear();
        self.next.clear();
        self.left.clear();
        self.look.clear();
        let classes = 4 * (1 + self.local.iter().copied().max().unwrap_or(0) as usize);
        for (device, list) in lists.iter().enumerate() {
            let mut left = vec![0; classes];
            for action in list {
                let slot = self.slot(action.pass, action.stage.index(), action.microbatch.index());
                self.ended[slot] = PENDING;
                left[self.class(*action)] += 1;
                recomputes[action.stage.index()] |= action.pass == Pass::R;
            }
            self.left.push(left);
            self.head.push(if list.is_empty() { END } else { 0 });
            self.next.push((1..=list.len() as u32).map(|n| if n as usize == list.len() { END } else { n }).collect());
            self.look.push(release.get(device).copied().unwrap_or(0.0));
        }
        self.held.clear();
        self.held.resize(lists.len(), 0.0);
        self.idle.clear();
        self.idle.resize(lists.len(), false);
        let mut result: Vec<Vec<Action>> = lists.iter().map(|list| Vec::with_capacity(list.len())).collect();
        while let Some((device, now)) = soonest(&self.look) {
            let action = match self.take(&lists[device], device, now, backwards, &recomputes) {
                Ok(action) => action,
                Err(soonest) => {
                    self.idle[device] = true;
                    self.look[device] = soonest;
                    continue;
                }
            };
            self.idle[device] = false;
            let (stage, microbatch) = (action.stage.index(), action.microbatch.index());
            let end = now + self.times.of(action.pass, stage);
            self.held[device] += self.change(action, backwards, recomputes[stage]);
            self.look[device] = end;
            let slot = self.slot(action.pass, stage, microbatch);
            self.ended[slot] = end;
            result[device].push(action);
            // Wake who may have waited for this: the stage after or before. A busy device will look by itself.
            let down = (action.pass == Pass::F) != backwards;
            let receiver = match action.pass {
                Pass::W | Pass::R => None,
                _ if down => (!(stage + 1).is_multiple_of(self.per_copy)).then_some(stage + 1),
                _ => (!stage.is_multiple_of(self.per_copy)).then(|| stage - 1),
            };
            if let Some(receiver) = receiver {
                let peer = self.device_of[receiver] as usize;
                if self.idle[peer] {
                    self.look[peer] = self.look[peer].min(end + self.times.comm);
                }
            }
        }
        result
    }

    /// Takes the action that `device` starts now: the next one of its list if ready, else the first that is ready, ends
    /// before the next one becomes ready, and leaves room for all that it overtakes. Otherwise the soonest time at which an
    /// action that was looked at becomes ready, as far as it is known.
    fn take(
        &mut self,
        list: &[Action],
        device: usize,
        now: f64,
        backwards: bool,
        recomputes: &[bool],
    ) -> Result<Action, f64> {
        let (mut previous, mut place) = (END, self.head[device]);
        if let Some(&action) = list.get(place as usize)
            && self.ready(action, backwards) <= now + CLOSE
        {
            self.head[device] = self.next[device][place as usize];
            let class = self.class(action);
            self.left[device][class] -= 1;
            return Ok(action);
        }
        let mut held = self.held[device];
        let mut highest = held;
        let (mut gap, mut soonest) = (PENDING, PENDING);
        let (mut seen, mut unseen) = (0u64, self.left[device].iter().filter(|left| **left > 0).count());
        for _ in 0..LOOK_AHEAD {
            if place == END {
                break;
            }
            let action = list[place as usize];
            let change = self.change(action, backwards, recomputes[action.stage.index()]);
            // Classes beyond 64 (more than 16 stages on a device) have no bit and are looked at each time.
            let class = self.class(action);
            let bit = 1u64.checked_shl(class as u32).unwrap_or(0);
            let again = seen & bit != 0;
            let ready = if again { PENDING } else { self.ready(action, backwards) };
            let fits = change <= 0.0 || highest + change <= self.limit[device] * (1.0 + CLOSE);
            if ready > now + CLOSE {
                soonest = soonest.min(ready);
            } else if fits && now + self.times.of(action.pass, action.stage.index()) <= gap + CLOSE {
                self.next[device][previous as usize] = self.next[device][place as usize];
                self.left[device][class] -= 1;
                return Ok(action);
            }
            if previous == END {
                gap = ready;
            }
            if bit != 0 && !again {
                seen |= bit;
                unseen -= 1;
                if unseen == 0 {
                    break;
                }
            }
            held += change;
            highest = highest.max(held);
            previous = place;
            place = self.next[device][place as usize];
        }
        Err(soonest)
    }
}
