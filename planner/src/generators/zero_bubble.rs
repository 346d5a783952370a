//! The zero-bubble heuristic (arXiv 2401.10241, section 3.1 and appendix): one stage per device, backwards split, real times and a
//! memory limit per device.
//!
//! 1. Warm-up: forwards while they fit in memory and the first backward has not arrived; every device at least one fewer than the
//!    device before it.
//! 2. Then one forward and one backward per device and microbatch, forwards from the first device down, backwards from the
//!    last one up. Before each, W is put where it fits into the wait, or where memory needs it. A wait too short for W is
//!    filled with W when idling would make this device the one with the most idle time.
//! 3. The W left.
//!
//! Three decisions have no clear winner, so all eight settings are built and the shortest order is kept.

use crate::order::{Action, ComputeOrder};
use crate::replay::{Replayer, StageMemory, StageTimes};
use crate::schedules::{ScheduleError, action, looped};
use paceline_sim::program::Pass;

/// The undecided points.
#[derive(Debug, Clone, Copy)]
struct Settings {
    /// The warm-up ends when another forward would delay the first backward, not only when that backward is there.
    punctual: bool,
    /// A device well ahead of the next one lets a forward wait when that one will soon hand it a backward.
    backward_first: bool,
    /// W also goes into waits that are too short for it when the device can afford to idle.
    weights_in_short_waits: bool,
}

/// The order with the shortest span that the heuristic finds for `p` devices and `m` microbatches.
///
/// # Errors
/// When one microbatch does not fit into `limit` on some device.
pub(crate) fn zero_bubble(
    schedule: &'static str,
    m: u32,
    times: &StageTimes,
    memory: &StageMemory,
    limit: &[f64],
) -> Result<ComputeOrder, ScheduleError> {
    let p = limit.len() as u32;
    let placement = looped(p, 1);
    super::check_limit(schedule, &placement, memory, limit)?;
    let mut replayer = Replayer::default();
    let mut shortest = (f64::INFINITY, f64::INFINITY);
    let mut best = Vec::new();
    for number in 0..8 {
        let settings = Settings {
            punctual: number & 4 == 0,
            backward_first: number & 2 == 0,
            weights_in_short_waits: number & 1 == 0,
        };
        let actions = Draft::new(m, times, memory, limit, settings).build();
        let totals = replayer
            .run_lists(&placement, m, &actions, times)
            .map_err(|source| ScheduleError::Order { schedule, source })?;
        let key = (totals.longest_span, totals.makespan);
        if key < shortest {
            shortest = key;
            best = actions;
        }
    }
    Ok(ComputeOrder { name: schedule.to_owned(), microbatches: m, placement, actions: best })
}

/// What a device has done so far.
#[derive(Debug, Clone, Default)]
struct Device {
    forwards: usize,
    backwards: usize,
    weights: usize,
    free: f64,
    idle: f64,
    held: f64,
    list: Vec<Action>,
}

struct Draft<'a> {
    m: usize,
    times: &'a StageTimes,
    memory: &'a StageMemory,
    limit: &'a [f64],
    settings: Settings,
    devices: Vec<Device>,
    /// End of F and of B, by device and microbatch.
    ends: [Vec<f64>; 2],
}

impl<'a> Draft<'a> {
    fn new(m: u32, times: &'a StageTimes, memory: &'a StageMemory, limit: &'a [f64], settings: Settings) -> Draft<'a> {
        let m = m as usize;
        let device = Device { list: Vec::with_capacity(3 * m), ..Device::default() };
        let ends = [vec![0.0; limit.len() * m], vec![0.0; limit.len() * m]];
        Draft { m, times, memory, limit, settings, devices: vec![device; limit.len()], ends }
    }

    fn build(mut self) -> Vec<Vec<Action>> {
        self.warm_up();
        for microbatch in 1..self.m {
            self.forward_row();
            self.backward_row(microbatch);
        }
        for d in 0..self.devices.len() {
            while self.devices[d].weights < self.m {
                self.put(d, Pass::W);
            }
        }
        self.devices.into_iter().map(|device| device.list).collect()
    }

    /// When the input of a device's next F or B arrives.
    fn arrival(&self, d: usize, pass: Pass) -> f64 {
        let device = &self.devices[d];
        match pass {
            Pass::F if d > 0 => self.ends[0][(d - 1) * self.m + device.forwards] + self.times.comm,
            Pass::B if d + 1 < self.devices.len() => {
                self.ends[1][(d + 1) * self.m + device.backwards] + self.times.comm
            }
            _ => 0.0,
        }
    }

    fn put(&mut self, d: usize, pass: Pass) {
        let start = self.arrival(d, pass).max(self.devices[d].free);
        let end = start + self.times.of(pass, d);
        let (until_b, until_w) = (self.memory.until_b[d], self.memory.until_w[d]);
        let device = &mut self.devices[d];
        if device.forwards > 0 {
            device.idle += start - device.free;
        }
        device.free = end;
        let (count, change) = match pass {
            Pass::F => (&mut device.forwards, until_b),
            Pass::B => (&mut device.backwards, until_w - until_b),
            _ => (&mut device.weights, -until_w),
        };
        let microbatch = *count;
        *count += 1;
        device.held += change;
        device.list.push(action(pass, d as u32, microbatch as u32));
        match pass {
            Pass::F => self.ends[0][d * self.m + microbatch] = end,
            Pass::B => self.ends[1][d * self.m + microbatch] = end,
            _ => {}
        }
    }

    /// Sums of sizes carry rounding.
    fn room(&self, d: usize) -> f64 {
        self.limit[d] * (1.0 + 1e-9)
    }

    fn warm_up(&mut self) {
        let p = self.devices.len();
        (0..p).for_each(|d| self.put(d, Pass::F));
        let mut further = vec![0usize; p];
        let mut first_b_ends = self.devices[p - 1].free + self.times.b[p - 1];
        for d in (0..p - 1).rev() {
            let device = &self.devices[d];
            let arrives = first_b_ends + self.times.comm;
            let (mut held, mut busy_until) = (device.held, device.free);
            // Where B leaves more for W than it frees, it needs room too.
            let room = self.room(d) - (self.memory.until_w[d] - self.memory.until_b[d]).max(0.0);
            while device.forwards + further[d] < self.m && held + self.memory.until_b[d] <= room {
                let enough =
                    if self.settings.punctual { busy_until + self.times.f[d] > arrives } else { busy_until >= arrives };
                if enough {
                    break;
                }
                held += self.memory.until_b[d];
                busy_until += self.times.f[d];
                further[d] += 1;
            }
            first_b_ends = busy_until.max(arrives) + self.times.b[d];
        }
        for d in 1..p {
            while further[d] > 0 && further[d] >= further[d - 1] && self.devices[d].forwards + further[d] < self.m {
                further[d] -= 1;
            }
        }
        for (d, count) in further.into_iter().enumerate() {
            (0..count).for_each(|_| self.put(d, Pass::F));
        }
        (0..p).rev().for_each(|d| self.put(d, Pass::B));
    }

    fn most_idle(&self) -> f64 {
        self.devices.iter().map(|device| device.idle).fold(0.0, f64::max)
    }

    fn pending_weights(&self, d: usize) -> usize {
        self.devices[d].backwards - self.devices[d].weights
    }

    /// Whether a device that is ahead of the next one does better to wait for that one's backward than to run a forward.
    fn lets_forward_wait(&self, d: usize) -> bool {
        let device = &self.devices[d];
        let Some(next) = self.devices.get(d + 1) else { return false };
        if !self.settings.backward_first || device.forwards < next.forwards + 2 {
            return false;
        }
        let soon = next.free + self.times.f[d + 1] + self.times.b[d + 1] + self.times.comm;
        if device.free >= soon {
            return true;
        }
        // The W that have to make room count as part of the forward.
        let over = device.held + self.memory.until_b[d] - self.room(d);
        let needed = if over > 0.0 { (over / self.memory.until_w[d]).ceil() as usize } else { 0 };
        let making_room = needed.min(self.pending_weights(d)) as f64 * self.times.w[d];
        if device.free + self.times.f[d] + making_room <= soon {
            return false;
        }
        soon - device.free <= self.most_idle() - device.idle
    }

    fn forward_row(&mut self) {
        let p = self.devices.len();
        let mut wanted: Vec<bool> =
            (0..p).map(|d| self.devices[d].forwards < self.m && !self.lets_forward_wait(d)).collect();
        for d in (0..p - 1).rev() {
            wanted[d] &= wanted[d + 1];
        }
        for d in (0..p).filter(|d| wanted[*d]) {
            self.make_room(d, self.memory.until_b[d]);
            if d > 0 {
                self.fill_wait(d, Pass::F);
            }
            self.put(d, Pass::F);
        }
    }

    fn backward_row(&mut self, microbatch: usize) {
        let p = self.devices.len();
        for d in (0..p).rev() {
            debug_assert_eq!(self.devices[d].backwards, microbatch);
            self.make_room(d, self.memory.until_w[d] - self.memory.until_b[d]);
            if d + 1 < p {
                self.fill_wait(d, Pass::B);
            }
            if d == 0 && self.devices[0].forwards == self.m {
                while self.pending_weights(0) > 0 {
                    self.put(0, Pass::W);
                }
            }
            self.put(d, Pass::B);
        }
    }

    fn make_room(&mut self, d: usize, size: f64) {
        while self.devices[d].held + size > self.room(d) && self.pending_weights(d) > 0 {
            self.put(d, Pass::W);
        }
    }

    /// Puts W into the wait for the input of the next `pass`.
    fn fill_wait(&mut self, d: usize, pass: Pass) {
        let arrives = self.arrival(d, pass);
        while self.pending_weights(d) > 0 && self.devices[d].free + self.times.w[d] <= arrives {
            self.put(d, Pass::W);
        }
        if self.pending_weights(d) > 0 && self.devices[d].free < arrives {
            let affordable = arrives - self.devices[d].free <= self.most_idle() - self.devices[d].idle;
            if !affordable || self.settings.weights_in_short_waits {
                self.put(d, Pass::W);
            }
        }
    }
}
