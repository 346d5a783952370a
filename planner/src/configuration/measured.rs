//! What the passes of a configuration take and hold, as its program and the costs of the machine say, for schedules that are
//! computed from that. It is part of the configuration, so that the same order is made wherever the configuration goes.

use super::{Configuration, ConfigurationError, Machine};
use crate::job::Job;
use crate::lower::{Collectives, Form, fastest};
use crate::prediction::Costs;
use crate::replay::{StageMemory, StageTimes};
use crate::schedules::{Request, find};
use paceline_sim::cost::CostError;
use paceline_sim::memory::walk;
use paceline_sim::program::{MemoryClass, OpKind, Pass, Program, Recompute, Tensor};
use paceline_sim::units::{MicrobatchId, RankId};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Times and sizes of one microbatch by stage, and the room for activations by pipeline rank.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// Forward, by stage, in nanoseconds.
    pub forward_nanos: Vec<u64>,
    /// Backward for the input, and the recomputation before it, by stage, in nanoseconds.
    pub input_nanos: Vec<u64>,
    /// Backward for the weights, by stage, in nanoseconds.
    pub weight_nanos: Vec<u64>,
    /// The longest message between two ranks, in nanoseconds.
    pub message_nanos: u64,
    /// Held from F to B, by stage.
    pub until_b_bytes: Vec<u64>,
    /// Held from B to W, by stage.
    pub until_w_bytes: Vec<u64>,
    /// Room for activations, by pipeline rank; empty without a memory limit.
    pub limit_bytes: Vec<u64>,
}

/// Why a configuration has no times.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum MeasureError {
    /// It cannot be.
    #[error(transparent)]
    Configuration(#[from] ConfigurationError),
    /// The machine's profile lacks something.
    #[error(transparent)]
    Cost(#[from] CostError),
}

impl Measured {
    fn new(program: &Program, ranks: u32, costs: &dyn Costs, memory_limit: Option<u64>) -> Result<Measured, CostError> {
        let (costs, _) = costs.of(program)?;
        let stages = program.stages.len();
        let mut found = Measured {
            forward_nanos: vec![0; stages],
            input_nanos: vec![0; stages],
            weight_nanos: vec![0; stages],
            until_b_bytes: vec![0; stages],
            until_w_bytes: vec![0; stages],
            ..Measured::default()
        };
        for (rank, held) in (0..ranks).map(RankId).zip(&program.ranks) {
            // One microbatch speaks for all.
            let mut chosen: Vec<Option<MicrobatchId>> = vec![None; stages];
            for op in &held.ops {
                match op.kind {
                    OpKind::Compute { pass, stage, microbatch, .. } => {
                        if *chosen[stage.index()].get_or_insert(microbatch) != microbatch {
                            continue;
                        }
                        let nanos = costs.compute(program, rank, op).0;
                        let weights = match pass {
                            Pass::W => nanos,
                            Pass::BW => nanos / 2,
                            Pass::F | Pass::B | Pass::R => 0,
                        };
                        found.weight_nanos[stage.index()] += weights;
                        let other = if pass == Pass::F { &mut found.forward_nanos } else { &mut found.input_nanos };
                        other[stage.index()] += nanos - weights;
                    }
                    OpKind::Send { peer, buffer, .. } => {
                        let round = costs.transfer(program, rank, peer, held.buffers[buffer.index()].bytes);
                        found.message_nanos = found.message_nanos.max(round.wire.0 + round.work.0);
                    }
                    _ => {}
                }
            }
            for buffer in &held.buffers {
                let (stage, microbatch, until_b, until_w) = match buffer.tensor {
                    Tensor::Checkpoint { stage, microbatch, .. } => (stage, microbatch, buffer.bytes, 0),
                    Tensor::SavedForB { stage, microbatch, .. } => (stage, microbatch, buffer.bytes, 0),
                    Tensor::SavedForW { stage, microbatch, .. } => (stage, microbatch, buffer.bytes, buffer.bytes),
                    _ => continue,
                };
                if chosen[stage.index()] == Some(microbatch) {
                    found.until_b_bytes[stage.index()] += until_b;
                    found.until_w_bytes[stage.index()] += until_w;
                }
            }
            if let Some(limit) = memory_limit {
                let walked = walk(program, rank);
                let activations = walked.peak_by_class.get(&MemoryClass::Activation).copied().unwrap_or(0);
                found.limit_bytes.push(limit.saturating_sub(walked.peak_bytes - activations));
            }
        }
        Ok(found)
    }

    /// Times by stage, in seconds.
    pub fn times(&self) -> StageTimes {
        let list = |values: &[u64]| values.iter().map(|nanos| *nanos as f64 / 1e9).collect();
        StageTimes {
            f: list(&self.forward_nanos),
            b: list(&self.input_nanos),
            w: list(&self.weight_nanos),
            comm: self.message_nanos as f64 / 1e9,
        }
    }

    /// Activation sizes by stage, in bytes.
    pub fn memory(&self) -> StageMemory {
        StageMemory {
            until_b: numbers(&self.until_b_bytes),
            until_w: numbers(&self.until_w_bytes),
            checkpoint: vec![0.0; self.until_b_bytes.len()],
        }
    }

    /// Room for activations by pipeline rank, in bytes; `None` without a limit.
    pub fn limit(&self) -> Option<Vec<f64>> {
        (!self.limit_bytes.is_empty()).then(|| numbers(&self.limit_bytes))
    }

    /// Lays the times (in nanoseconds) and sizes into a request.
    pub(crate) fn lay_into(&self, request: Request) -> Request {
        Request {
            times: Some(StageTimes {
                f: numbers(&self.forward_nanos),
                b: numbers(&self.input_nanos),
                w: numbers(&self.weight_nanos),
                comm: self.message_nanos as f64,
            }),
            memory: Some(self.memory()),
            limit: self.limit(),
            ..request
        }
    }
}

/// Whole numbers as the schedules take them.
fn numbers(values: &[u64]) -> Vec<f64> {
    values.iter().map(|value| *value as f64).collect()
}

impl Configuration {
    /// The configuration with the times and sizes of its passes where its schedule is computed from them, and with the fastest
    /// algorithms of its collectives where the job leaves these open; others as they are. With full recomputation activations are
    /// there for a moment only, so such an order knows times, not sizes.
    ///
    /// # Errors
    /// When it cannot be lowered or costed.
    pub fn measured(mut self, job: &Job, machine: Machine, costs: &dyn Costs) -> Result<Configuration, MeasureError> {
        let fixed = find(&self.schedule).map_err(ConfigurationError::from)?.fixed;
        if self.sharing.collectives == Collectives::Auto && self.collectives.is_empty() {
            let program = self.program_unchecked(job, machine, Form::Full)?;
            self.collectives = fastest(&program, costs)?;
        }
        if fixed || self.measured.is_some() {
            return Ok(self);
        }
        let mut measured = self.measure(job, machine, costs)?;
        if self.recompute == Recompute::Full {
            measured.until_b_bytes.fill(1);
            measured.until_w_bytes.fill(1);
            measured.limit_bytes.clear();
        }
        self.measured = Some(measured);
        Ok(self)
    }

    /// What the passes of the configuration take and hold on a machine, and the room for activations beside everything else.
    ///
    /// # Errors
    /// When it cannot be lowered or costed.
    pub fn measure(&self, job: &Job, machine: Machine, costs: &dyn Costs) -> Result<Measured, MeasureError> {
        // Any order of the same stages has the same passes.
        let program = self.program_unchecked(job, machine, Form::Full)?;
        Ok(Measured::new(&program, self.pp, costs, job.memory_limit)?)
    }
}
