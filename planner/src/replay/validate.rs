//! What makes a compute order valid: every microbatch passes every stage of one copy of the model exactly once, on the
//! right device, forward before backward, and no device waits for ever.

use super::{Replayer, StageTimes};
use crate::order::{Action, ComputeOrder, Placement};
use paceline_sim::program::Pass;
use paceline_sim::units::{MicrobatchId, StageId};
use std::fmt;
use thiserror::Error;

/// A device that cannot go on: its next action, and what that action waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiting {
    /// The pipeline rank.
    pub device: usize,
    /// Its next action.
    pub action: Action,
    /// The action that must end first.
    pub needs: Action,
    /// The pipeline rank that has `needs` in its list, further down.
    pub on: usize,
}

impl fmt::Display for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} at {} needs {} of rank {}", self.device, self.action, self.needs, self.on)
    }
}

fn chain(waiting: &[Waiting]) -> String {
    waiting.iter().map(|w| w.to_string()).collect::<Vec<_>>().join("; ")
}

/// Why an order or its times cannot be used.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum OrderError {
    /// No stage at all, or a number of stages that the copies do not divide.
    #[error(
        "placement `{name}` has {stages} stages in {copies} copies; every copy needs the same number, at least one"
    )]
    Copies { name: String, stages: usize, copies: u32 },
    /// A stage on a device without a list.
    #[error("stage {stage} is placed on rank {device}, but the order has lists for ranks 0 to {last} only", last = .devices.saturating_sub(1))]
    NoSuchDevice { stage: usize, device: u32, devices: usize },
    /// An action that names a stage or a microbatch out of range.
    #[error(
        "rank {device} has {action}, but there are {stages} stages and {microbatches} microbatches (both count from 0)"
    )]
    Unknown { action: Action, device: usize, stages: usize, microbatches: u32 },
    /// An action on a device that does not hold its stage.
    #[error("{action} is on rank {device}, but stage {stage} lives on rank {expected}", stage = .action.stage.0)]
    WrongDevice { action: Action, device: usize, expected: u32 },
    /// The same action twice.
    #[error("{action} appears twice on rank {device}; keep one")]
    Doubled { action: Action, device: usize },
    /// An action that has to be there and is not.
    #[error("{action} is missing on rank {device}{}", if matches!(.action.pass, Pass::B) { " (or a fused BW in its place)" } else { "" })]
    Missing { action: Action, device: usize },
    /// Both a fused backward and a split one.
    #[error("rank {device} has {action} beside a fused BW of the same stage and microbatch; keep either BW or B and W")]
    BothBackwards { action: Action, device: usize },
    /// Two passes of one stage and microbatch in the wrong order.
    #[error("on rank {device}, {later} comes before {earlier}; {earlier} has to come first")]
    Reversed { earlier: Action, later: Action, device: usize },
    /// A microbatch that passes through two copies of the model.
    #[error("{action} on rank {device}: microbatch {microbatch} already passes through another copy of the model", microbatch = .action.microbatch.0)]
    TwoCopies { action: Action, device: usize },
    /// Devices that wait for each other for ever.
    #[error("deadlock: {}", chain(.0))]
    Deadlock(Vec<Waiting>),
    /// An action waits for one that no list has.
    #[error("rank {device} waits at {action} for {needs}, which no rank computes")]
    WaitsForNothing { device: usize, action: Action, needs: Action },
    /// A list of times of the wrong length.
    #[error("{have} times given for {what}, but the placement has {stages} stages; give one per stage")]
    TimesLength { what: &'static str, have: usize, stages: usize },
    /// A time that is no time.
    #[error("time {value} given for {what}; times are finite and not negative")]
    BadTime { what: &'static str, value: f64 },
}

impl Placement {
    /// Number of stages, all copies together.
    pub fn stages(&self) -> usize {
        self.device_of_stage.len()
    }

    /// Stages that a microbatch passes: those of one copy.
    pub fn stages_per_copy(&self) -> usize {
        self.stages() / self.copies.max(1) as usize
    }

    /// Number of devices that hold stages.
    pub fn devices(&self) -> usize {
        self.device_of_stage.iter().max().map_or(0, |last| *last as usize + 1)
    }

    /// Whether the stage is the first of its copy, so that its F needs no input from another stage.
    pub fn is_first(&self, stage: StageId) -> bool {
        stage.index().is_multiple_of(self.stages_per_copy())
    }

    /// Whether the stage is the last of its copy, so that its backward follows its own F.
    pub fn is_last(&self, stage: StageId) -> bool {
        (stage.index() + 1).is_multiple_of(self.stages_per_copy())
    }

    pub(crate) fn check(&self, devices: usize) -> Result<(), OrderError> {
        let stages = self.stages();
        if self.copies == 0 || stages == 0 || !stages.is_multiple_of(self.copies as usize) {
            return Err(OrderError::Copies { name: self.name.clone(), stages, copies: self.copies });
        }
        match self.device_of_stage.iter().position(|d| *d as usize >= devices) {
            Some(stage) => Err(OrderError::NoSuchDevice { stage, device: self.device_of_stage[stage], devices }),
            None => Ok(()),
        }
    }
}

/// The place in a device's list of each pass of one (stage, microbatch), or [`ABSENT`].
type Places = [u32; 5];
const ABSENT: u32 = u32::MAX;

impl ComputeOrder {
    /// Checks everything that a schedule promises: each microbatch has, on every stage of the one copy of the model that
    /// it passes, one F, then B and W in this order or one BW (and at most one R between F and the backward), each on the
    /// stage's device; and the order runs to its end.
    ///
    /// # Errors
    /// The first violation, naming the actions.
    pub fn validate(&self) -> Result<(), OrderError> {
        let stages = self.placement.stages();
        self.placement.check(self.actions.len())?;
        let m = self.microbatches as usize;
        let mut places: Vec<Places> = vec![[ABSENT; 5]; stages * m];
        for (device, list) in self.actions.iter().enumerate() {
            for (place, &action) in list.iter().enumerate() {
                let (stage, microbatch) = (action.stage.index(), action.microbatch.index());
                if stage >= stages || microbatch >= m {
                    return Err(OrderError::Unknown { action, device, stages, microbatches: self.microbatches });
                }
                let expected = self.placement.device_of_stage[stage];
                if expected as usize != device {
                    return Err(OrderError::WrongDevice { action, device, expected });
                }
                let slot = &mut places[stage * m + microbatch][action.pass as usize];
                if *slot != ABSENT {
                    return Err(OrderError::Doubled { action, device });
                }
                *slot = place as u32;
            }
        }
        let per_copy = self.placement.stages_per_copy();
        for microbatch in 0..m {
            // A microbatch belongs to the first copy that computes any of it; one that nobody computes misses its first F.
            let touches = |copy: usize| {
                (copy * per_copy..(copy + 1) * per_copy)
                    .find(|stage| places[stage * m + microbatch].iter().any(|place| *place != ABSENT))
            };
            let mut copies = (0..self.placement.copies as usize).filter(|copy| touches(*copy).is_some());
            let copy = copies.next().unwrap_or(0);
            if let Some(stage) = copies.next().and_then(touches) {
                let device = self.placement.device_of_stage[stage] as usize;
                let list = &self.actions[device];
                let place = places[stage * m + microbatch].into_iter().min().unwrap_or(0);
                return Err(OrderError::TwoCopies { action: list[place as usize], device });
            }
            for stage in copy * per_copy..(copy + 1) * per_copy {
                let device = self.placement.device_of_stage[stage] as usize;
                check_passes(places[stage * m + microbatch], stage, microbatch, device)?;
            }
        }
        Replayer::default().run(self, &StageTimes::unit(stages)).map(|_| ())
    }
}

fn check_passes(places: Places, stage: usize, microbatch: usize, device: usize) -> Result<(), OrderError> {
    let action = |pass| Action { pass, stage: StageId(stage as u16), microbatch: MicrobatchId(microbatch as u32) };
    let has = |pass: Pass| places[pass as usize] != ABSENT;
    if !has(Pass::F) {
        return Err(OrderError::Missing { action: action(Pass::F), device });
    }
    let chain: &[Pass] = if has(Pass::BW) {
        if let Some(pass) = [Pass::B, Pass::W].into_iter().find(|pass| has(*pass)) {
            return Err(OrderError::BothBackwards { action: action(pass), device });
        }
        &[Pass::F, Pass::R, Pass::BW]
    } else {
        if let Some(pass) = [Pass::B, Pass::W].into_iter().find(|pass| !has(*pass)) {
            return Err(OrderError::Missing { action: action(pass), device });
        }
        &[Pass::F, Pass::R, Pass::B, Pass::W]
    };
    let present: Vec<Pass> = chain.iter().copied().filter(|pass| has(*pass)).collect();
    for pair in present.windows(2) {
        if places[pair[0] as usize] > places[pair[1] as usize] {
            return Err(OrderError::Reversed { earlier: action(pair[0]), later: action(pair[1]), device });
        }
    }
    Ok(())
}

/// The entry of the replay's table of end times that an F, B or BW fills.
pub(super) fn produced(action: Action, m: usize, backward: usize) -> usize {
    let own = action.stage.index() * m + action.microbatch.index();
    if action.pass == Pass::F { own } else { backward + own }
}

/// Explains a replay that stopped: follows the waits from one blocked device to the next until they close.
pub(super) fn stuck(
    placement: &Placement,
    actions: &[Vec<Action>],
    next: &[usize],
    done: impl Fn(Action) -> bool,
) -> OrderError {
    let needs = |action: Action| -> Action {
        let with = |pass, stage: u16| Action { pass, stage: StageId(stage), microbatch: action.microbatch };
        let stage = action.stage.0;
        let own_forward = with(Pass::F, stage);
        match action.pass {
            Pass::F => with(Pass::F, stage.saturating_sub(1)),
            Pass::R => own_forward,
            Pass::B | Pass::BW if placement.is_last(action.stage) || !done(own_forward) => own_forward,
            Pass::B | Pass::BW => with(Pass::B, stage + 1),
            Pass::W => with(Pass::B, stage),
        }
    };
    let mut waiting: Vec<Waiting> = Vec::new();
    let mut device = (0..actions.len()).find(|d| next[*d] < actions[*d].len()).unwrap_or(0);
    loop {
        if let Some(start) = waiting.iter().position(|w| w.device == device) {
            return OrderError::Deadlock(waiting.split_off(start));
        }
        let action = actions[device][next[device]];
        let wanted = needs(action);
        let on = placement.device_of_stage[wanted.stage.index()] as usize;
        let found = actions[on][next[on]..].iter().find(|a| {
            (a.stage, a.microbatch) == (wanted.stage, wanted.microbatch)
                && (a.pass == wanted.pass || (wanted.pass == Pass::B && a.pass == Pass::BW))
        });
        let Some(&needs) = found else {
            return OrderError::WaitsForNothing { device, action, needs: wanted };
        };
        waiting.push(Waiting { device, action, needs, on });
        device = on;
    }
}
