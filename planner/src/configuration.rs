//! One point of a job's space: every axis fixed. It is lowered to the same program each time, because it also says how the
//! layers are cut.

mod measured;

pub use measured::{MeasureError, Measured};

use crate::job::{Job, LOCAL};
use crate::lower::{
    Blueprint, ChosenAlgorithm, Form, LowerError, Sharing, States, Substance, choose, cut, forward_flops,
    lower_unchecked, unroll,
};
use crate::order::ComputeOrder;
use crate::schedules::{self, Request, ScheduleError};
use paceline_sim::model::Layer;
use paceline_sim::partition::StatePartition;
use paceline_sim::program::{Device, Program, Recompute, Stage, TransformerWorkload, Unit, check};
use serde::{Deserialize, Serialize};
use std::fmt;
use thiserror::Error;

/// What a job runs on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Device slots. More ranks than that share them in turn.
    pub devices: u32,
    /// Most floating-point operations per second of one device, where known: MFU is relative to it.
    pub flops_per_second: Option<f64>,
}

/// More device slots than any one machine has.
pub(crate) const MOST_DEVICES: u32 = 4096;

impl Machine {
    /// The devices of the job where it names a number, else those of the machine.
    pub fn for_job(self, job: &Job) -> Machine {
        Machine { devices: job.gpus_per_node.unwrap_or(self.devices).clamp(1, MOST_DEVICES), ..self }
    }

    fn list(self) -> Vec<Device> {
        (0..self.devices).map(|n| Device { name: format!("cpu:{n}"), node: 0 }).collect()
    }
}

/// Every axis fixed, by the names of the command line's flags.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Configuration {
    /// Data-parallel size.
    pub dp: u32,
    /// Pipeline-parallel size.
    pub pp: u32,
    /// Stages per pipeline rank.
    pub chunks: u32,
    /// Pipeline schedule.
    pub schedule: String,
    /// Sequences per microbatch.
    pub micro_batch: u32,
    /// Which activations are recomputed.
    pub recompute: Recompute,
    /// How parameters, gradients and optimizer states are cut over the replicas.
    pub states: StatePartition,
    /// In which groups, and when parameters are gathered and dropped.
    #[serde(default, skip_serializing_if = "is_usual")]
    pub sharing: Sharing,
    /// Layers of each stage of one copy of the model, embedding and head counted; cut by FLOPs when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stage_layers: Vec<u32>,
    /// What passes take and hold, for schedules that are computed from it; equal passes when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<Measured>,
    /// By which rounds collectives are done, where the job leaves it open.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub collectives: Vec<ChosenAlgorithm>,
}

fn is_usual(sharing: &Sharing) -> bool {
    *sharing == Sharing::default()
}

/// Why a configuration is none of its job.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum ConfigurationError {
    /// An axis that may take several values where one is needed.
    #[error(
        "{key} = {values} leaves a choice, and a prediction is of one configuration; name one value, or search with `paceline plan`"
    )]
    Choice { key: &'static str, values: String },
    /// Not this machine.
    #[error(
        "cluster = {cluster:?} has layouts with more axes than a program of this machine; leave the key out to stay on it"
    )]
    Cluster { cluster: String },
    /// The batch cannot be cut like this.
    #[error(
        "global_batch = {global_batch} is not divisible by dp * micro_batch = {dp} * {micro_batch}; take a global_batch that is a multiple of {}, or a smaller micro_batch",
        u64::from(*.dp) * u64::from(*.micro_batch)
    )]
    Batch { global_batch: u32, dp: u32, micro_batch: u32 },
    /// The number of layers of the stages does not fit.
    #[error("stage_layers = {given:?} must be {stages} numbers above 0 that sum to {layers}")]
    StageLayers { given: Vec<u32>, stages: usize, layers: u32 },
    /// The schedule does not permit it.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    /// It cannot be lowered.
    #[error(transparent)]
    Lower(#[from] LowerError),
}

impl fmt::Display for Configuration {
    /// One line for people.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dp {} pp {}", self.dp, self.pp)?;
        if self.pp > 1 || self.chunks > 1 {
            write!(f, " {}", self.schedule)?;
        }
        if self.chunks > 1 {
            write!(f, " x{}", self.chunks)?;
        }
        write!(f, ", micro-batch {}", self.micro_batch)?;
        match self.recompute {
            Recompute::None => {}
            Recompute::Selective => f.write_str(", selective recomputation")?,
            Recompute::Full => f.write_str(", full recomputation")?,
        }
        if self.states.is_whole() {
            return Ok(());
        }
        write!(f, ", {}", self.states)?;
        if let Some(size) = self.sharing.group_size.filter(|_| self.states.has_groups()) {
            write!(f, " in groups of {size}")?;
        }
        if self.sharing.keep_gathered {
            f.write_str(", gathered once a step")?;
        }
        if self.sharing.late_gather { f.write_str(", updates gathered late") } else { Ok(()) }
    }
}

impl Configuration {
    /// The one configuration that a job names. Absent axes take the simplest value: no parallelism, `1f1b`, one sequence per
    /// microbatch, nothing recomputed (all of it where the schedule demands it).
    ///
    /// # Errors
    /// When an axis has several values, or the whole cannot be.
    pub fn of_job(job: &Job) -> Result<Configuration, ConfigurationError> {
        fn one<T: Clone + fmt::Debug>(key: &'static str, values: &[T], usual: T) -> Result<T, ConfigurationError> {
            match values {
                [] => Ok(usual),
                [value] => Ok(value.clone()),
                many => Err(ConfigurationError::Choice { key, values: format!("{many:?}") }),
            }
        }
        if job.cluster != LOCAL {
            return Err(ConfigurationError::Cluster { cluster: job.cluster.clone() });
        }
        let chunks = one("chunks", &job.chunks, 0)?;
        let usual = if chunks > 1 { "interleaved" } else { "1f1b" };
        let schedule = one("schedule", &job.schedule, usual.to_string())?;
        let found = schedules::find(&schedule)?;
        let recompute = if schedule == RECOMPUTING { Recompute::Full } else { Recompute::None };
        let configuration = Configuration {
            dp: one("dp", &job.dp, 1)?,
            pp: one("pp", &job.pp, 1)?,
            chunks: found.chunks_for((chunks > 0).then_some(chunks))?,
            micro_batch: one("micro_batch", &job.micro_batch, 1)?,
            recompute: one("recompute", &job.recompute, recompute)?,
            states: one("states", &job.states, StatePartition::NONE)?,
            schedule,
            sharing: job.sharing,
            stage_layers: Vec::new(),
            measured: None,
            collectives: Vec::new(),
        };
        configuration.microbatches(job)?;
        Ok(configuration)
    }

    /// Ranks in all.
    pub fn ranks(&self) -> u32 {
        self.dp.saturating_mul(self.pp)
    }

    /// Microbatches per replica and step.
    ///
    /// # Errors
    /// When the global batch is not divisible.
    pub fn microbatches(&self, job: &Job) -> Result<u32, ConfigurationError> {
        let (global_batch, dp, micro_batch) = (job.global_batch, self.dp, self.micro_batch);
        match dp.checked_mul(micro_batch) {
            Some(whole) if whole > 0 && global_batch.is_multiple_of(whole) => Ok(global_batch / whole),
            _ => Err(ConfigurationError::Batch { global_batch, dp, micro_batch }),
        }
    }

    /// The compute order of its schedule.
    ///
    /// # Errors
    /// When the schedule does not permit these numbers.
    pub fn order(&self, job: &Job) -> Result<ComputeOrder, ConfigurationError> {
        let request = Request { chunks: Some(self.chunks), ..Request::new(self.pp, self.microbatches(job)?) };
        let request = match &self.measured {
            Some(measured) => measured.lay_into(request),
            None => request,
        };
        Ok(schedules::build(&self.schedule, &request)?)
    }

    /// The stages of one copy of the model.
    ///
    /// # Errors
    /// When the layers cannot be cut so.
    pub fn cut(&self, job: &Job, stages: usize) -> Result<Vec<Stage>, ConfigurationError> {
        if self.stage_layers.is_empty() {
            return Ok(cut(&job.model, stages, forward_flops(&job.model, job.seq))?);
        }
        let mut layers = job.model.all_layers();
        let wrong = || ConfigurationError::StageLayers {
            given: self.stage_layers.clone(),
            stages,
            layers: job.model.layers + 2,
        };
        let take = |&count: &u32| -> Option<Stage> {
            let units: Vec<Unit> =
                layers.by_ref().take(count as usize).map(|layer: Layer| Unit { layers: vec![layer] }).collect();
            (count > 0 && units.len() == count as usize).then_some(Stage { units })
        };
        let held: Vec<Stage> = self.stage_layers.iter().map(take).collect::<Option<_>>().ok_or_else(wrong)?;
        if held.len() == stages && layers.next().is_none() { Ok(held) } else { Err(wrong()) }
    }

    /// The program, proved to run.
    ///
    /// # Errors
    /// When it cannot be.
    pub fn program(&self, job: &Job, machine: Machine) -> Result<Program, ConfigurationError> {
        self.lowered(job, machine, Form::Full, true)
    }

    /// The program in one of its forms, without the proof that it runs.
    ///
    /// # Errors
    /// When it cannot be.
    pub fn program_unchecked(&self, job: &Job, machine: Machine, form: Form) -> Result<Program, ConfigurationError> {
        self.lowered(job, machine, form, false)
    }

    fn lowered(&self, job: &Job, machine: Machine, form: Form, checked: bool) -> Result<Program, ConfigurationError> {
        let order = self.order(job)?;
        let mut stages = self.cut(job, order.placement.stages_per_copy())?;
        let one_copy = stages.clone();
        for _ in 1..order.placement.copies {
            stages.extend(one_copy.iter().cloned());
        }
        let workload = TransformerWorkload {
            model: job.model.clone(),
            micro_batch: self.micro_batch,
            seq: job.seq,
            recompute: self.recompute,
            tied_on_one_rank: false,
            trainable: job.trainable.clone(),
            precision: job.precision,
        };
        let blueprint = Blueprint {
            order: &order,
            substance: Substance::Transformer(workload),
            stages,
            data: self.dp,
            states: States { partition: self.states, sharing: self.sharing },
            devices: machine.for_job(job).list(),
            form,
        };
        // Ranks that do not wait for others' passes have nothing to gain.
        let steps = if self.pp > 1 { job.barrier_every } else { 1 };
        let mut program = lower_unchecked(&blueprint)?;
        choose(&mut program, &self.collectives);
        if steps > 1 {
            program = unroll(program, steps)?;
        }
        if checked {
            check(&program).map_err(LowerError::from)?;
        }
        Ok(program)
    }
}

/// The schedule that is defined by recomputing.
pub const RECOMPUTING: &str = "1f1b-r";
