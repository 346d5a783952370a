//! Times, activation sizes and limits of a schedule study, as its flags give them.

use super::Arguments;
use crate::failure::Failure;
use crate::size::parse_bytes;
use clap::ValueEnum;
use paceline_planner::order::Placement;
use paceline_planner::replay::{StageMemory, StageTimes};
use serde::Serialize;
use std::str::FromStr;

/// What a single time is the time of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Per {
    /// One stage.
    Stage,
    /// All stages of a device.
    Device,
}

/// One number, or one per stage.
#[derive(Debug, Clone, PartialEq)]
pub struct Given(Vec<f64>);

impl FromStr for Given {
    type Err = String;

    fn from_str(text: &str) -> Result<Given, String> {
        text.split(',')
            .map(|part| {
                let value: f64 = part.trim().parse().map_err(|_| format!("`{part}` is no number"))?;
                if value.is_finite() && value >= 0.0 {
                    Ok(value)
                } else {
                    Err(format!("{part} is not a time of 0 or more"))
                }
            })
            .collect::<Result<Vec<_>, _>>()
            .map(Given)
    }
}

impl Given {
    fn spread(&self, flag: &str, stages: usize, share: f64) -> Result<Vec<f64>, Failure> {
        match self.0.as_slice() {
            [one] => Ok(vec![one * share; stages]),
            list if list.len() == stages => Ok(list.to_vec()),
            list => Err(Failure::bad_input(format!(
                "--{flag}: {} values, but the schedule has {stages} stages; give one number, or one per stage",
                list.len()
            ))),
        }
    }
}

/// What is known of the stages of a schedule.
#[derive(Debug, Clone)]
pub struct Sizes {
    /// Times by stage.
    pub times: StageTimes,
    /// Activation sizes by stage.
    pub memory: StageMemory,
    /// The most that each device may hold, in the unit of the sizes.
    pub limit: Option<Vec<f64>>,
}

/// All of it as the flags say.
pub fn sizes(arguments: &Arguments, placement: &Placement, per: Per) -> Result<Sizes, Failure> {
    Ok(Sizes {
        times: stage_times(arguments, placement, per)?,
        memory: stage_memory(arguments, placement)?,
        limit: limit(arguments)?.map(|limit| vec![limit; placement.devices()]),
    })
}

/// Times by stage.
fn stage_times(arguments: &Arguments, placement: &Placement, per: Per) -> Result<StageTimes, Failure> {
    let stages = placement.stages();
    // With two copies of the model a microbatch goes through one of them only.
    let share = match per {
        Per::Stage => 1.0,
        Per::Device => placement.devices() as f64 / placement.stages_per_copy().max(1) as f64,
    };
    if !(arguments.comm.is_finite() && arguments.comm >= 0.0) {
        return Err(Failure::bad_input(format!("--comm {}: not a time of 0 or more", arguments.comm)));
    }
    Ok(StageTimes {
        f: arguments.f.spread("f", stages, share)?,
        b: arguments.b.spread("b", stages, share)?,
        w: arguments.w.spread("w", stages, share)?,
        comm: arguments.comm,
    })
}

/// Activation sizes by stage, in microbatch-stages.
fn stage_memory(arguments: &Arguments, placement: &Placement) -> Result<StageMemory, Failure> {
    let freed_at_b = match &arguments.memory_fractions {
        None => StageMemory::FREED_AT_B,
        Some(text) => fractions(text)?,
    };
    Ok(StageMemory::microbatch_stages(placement, placement.devices(), freed_at_b))
}

fn fractions(text: &str) -> Result<f64, Failure> {
    let wrong = || {
        Failure::bad_input(format!(
            "--memory-fractions {text}: two numbers of 0 to 1 with the sum 1 are needed, for example 0.25,0.75"
        ))
    };
    let (b, w) = text.split_once(',').ok_or_else(wrong)?;
    let (b, w): (f64, f64) = (b.trim().parse().map_err(|_| wrong())?, w.trim().parse().map_err(|_| wrong())?);
    if b >= 0.0 && w >= 0.0 && (b + w - 1.0).abs() < 1e-6 { Ok(b) } else { Err(wrong()) }
}

/// The memory limit in microbatch-stages.
fn limit(arguments: &Arguments) -> Result<Option<f64>, Failure> {
    let Some(text) = &arguments.memory_limit else { return Ok(None) };
    if let Ok(count) = text.trim().parse::<f64>() {
        if count.is_finite() && count > 0.0 {
            return Ok(Some(count));
        }
        return Err(Failure::bad_input(format!("--memory-limit {text}: must be above 0")));
    }
    let bytes = parse_bytes(text).map_err(|error| Failure::bad_input(format!("--memory-limit {text}: {error}")))?;
    let Some(unit) = &arguments.activation else {
        return Err(Failure::bad_input(format!(
            "--memory-limit {text}: a limit in bytes needs --activation, the bytes of one microbatch on one device; or give a bare number of microbatch-stages"
        )));
    };
    let unit = parse_bytes(unit).map_err(|error| Failure::bad_input(format!("--activation {unit}: {error}")))?;
    if unit == 0 {
        return Err(Failure::bad_input("--activation 0: must be above 0"));
    }
    Ok(Some(bytes as f64 / unit as f64))
}
