//! What a program will take: time by part, memory by class, and where the figures come from, in the shape of
//! `paceline.prediction/1`.

use crate::configuration::Machine;
use crate::predict::TimeParts;
use paceline_profiles::{Predictor, Shares};
use paceline_sim::cost::{CostError, CostModel, FixedTimes, ProfileCost};
use paceline_sim::engine::{EngineError, simulate};
use paceline_sim::memory::walk;
use paceline_sim::model::{ModelPass, trained_flops_per_token};
use paceline_sim::program::{MemoryClass, OpKind, Pass, Program, Stream, TransformerWorkload, Workload};
use paceline_sim::trace::Trace;
use paceline_sim::units::{Nanos, RankId, StageId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use thiserror::Error;

/// The format of a prediction as JSON.
pub const PREDICTION_FORMAT: &str = "paceline.prediction/1";

/// One step of a program, predicted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// [`PREDICTION_FORMAT`].
    pub format: String,
    /// From the begin of a step to the end of its last op; where several steps run without a barrier, their mean.
    pub iteration_seconds: f64,
    /// Tokens per second and device.
    pub tokens_per_second_per_gpu: f64,
    /// Share of the devices' rate that the model's FLOPs make; absent where the rate is not known.
    pub mfu: Option<f64>,
    /// The same with all matrix products that are computed: the blocks that full recomputation repeats, and the attention
    /// scores and logits that a backward makes again (the logits twice where B and W are split). Norms and activations that
    /// selective recomputation rebuilds are no matrix products: they cost time, not FLOPs.
    pub hfu: Option<f64>,
    /// Parts of the step, mean over the devices; they sum to `iteration_seconds`.
    pub time: TimeParts,
    /// Idle share of the devices: `1 - work / iteration`.
    pub bubble_makespan: f64,
    /// Memory by pipeline rank.
    pub memory: MemoryPrediction,
    /// Shares of the predicted time by where they come from.
    pub provenance: Shares,
}

/// Peaks by pipeline rank, the highest over its replicas.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPrediction {
    /// Highest sum of live bytes.
    pub peak_bytes: Vec<u64>,
    /// What a rank may hold.
    pub limit_bytes: Option<u64>,
    /// No rank holds more.
    pub fits: bool,
    /// Parts of each peak; they sum to it.
    pub by_class: Vec<ClassBytes>,
}

/// Parts of a peak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ClassBytes {
    /// Weights.
    pub parameters: u64,
    /// Their gradients.
    pub gradients: u64,
    /// Moments.
    pub optimizer: u64,
    /// What passes keep.
    pub activations: u64,
    /// Received messages and scratch of collectives.
    pub communication: u64,
    /// Scratch of single ops.
    pub workspace: u64,
    /// What the allocator holds on top: nothing, the executor allocates what the program says.
    pub overhead: u64,
}

impl ClassBytes {
    fn of(classes: &BTreeMap<MemoryClass, u64>) -> ClassBytes {
        let bytes = |class| classes.get(&class).copied().unwrap_or(0);
        ClassBytes {
            parameters: bytes(MemoryClass::Parameter),
            gradients: bytes(MemoryClass::Gradient),
            optimizer: bytes(MemoryClass::OptimizerState),
            activations: bytes(MemoryClass::Activation),
            communication: bytes(MemoryClass::ReceivedActivation) + bytes(MemoryClass::CommScratch),
            workspace: bytes(MemoryClass::Workspace),
            overhead: 0,
        }
    }

    /// Sum of the parts.
    pub fn total(&self) -> u64 {
        self.parameters
            + self.gradients
            + self.optimizer
            + self.activations
            + self.communication
            + self.workspace
            + self.overhead
    }
}

/// Why a program cannot be predicted.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum PredictionError {
    /// No costs for it.
    #[error(transparent)]
    Cost(#[from] CostError),
    /// It does not run.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// Costs for any program.
pub trait Costs: Sync {
    /// The costs of one program, and the seconds of all its work by provenance.
    ///
    /// # Errors
    /// When it does something that has no cost.
    fn of(&self, program: &Program) -> Result<(Box<dyn CostModel>, Shares), CostError>;
}

impl Costs for Predictor {
    fn of(&self, program: &Program) -> Result<(Box<dyn CostModel>, Shares), CostError> {
        let costs = ProfileCost::new(self, program)?;
        let provenance = costs.provenance(program);
        Ok((Box::new(costs), provenance))
    }
}

impl Costs for FixedTimes {
    fn of(&self, _: &Program) -> Result<(Box<dyn CostModel>, Shares), CostError> {
        Ok((Box::new(self.clone()), Shares { assumed: 1.0, ..Shares::default() }))
    }
}

/// Predicts one step of a program, with its timeline.
///
/// # Errors
/// When it has no costs, or does not run.
pub fn predict(
    program: &Program,
    costs: &dyn Costs,
    machine: Machine,
    limit_bytes: Option<u64>,
) -> Result<(Prediction, Trace), PredictionError> {
    let (model, provenance) = costs.of(program)?;
    let trace = simulate(program, &*model)?;
    let steps = f64::from(program.steps());
    let iteration_seconds = trace.makespan.seconds() / steps;
    let (time, work) = parts(program, &trace, steps);
    let memory = memory(program, limit_bytes);
    let mut prediction = Prediction {
        format: PREDICTION_FORMAT.into(),
        iteration_seconds,
        tokens_per_second_per_gpu: 0.0,
        mfu: None,
        hfu: None,
        time,
        bubble_makespan: if trace.makespan > Nanos::ZERO { 1.0 - work / iteration_seconds } else { 0.0 },
        memory,
        provenance: provenance.normalised(),
    };
    if let Workload::Transformer(workload) = &program.workload {
        let present = program.ranks.iter().map(|rank| rank.coordinates.data + 1).max().unwrap_or(1);
        let tokens = f64::from(present)
            * f64::from(program.microbatches)
            * f64::from(workload.micro_batch)
            * f64::from(workload.seq);
        let devices = program.devices.len().max(1) as f64;
        prediction.tokens_per_second_per_gpu = tokens / iteration_seconds / devices;
        if let Some(rate) = machine.flops_per_second {
            let per_token = trained_flops_per_token(workload);
            let share = |flops: f64| Some(flops / iteration_seconds / devices / rate);
            prediction.mfu = share(per_token * tokens);
            prediction.hfu = share(executed_flops(program, workload) / steps);
        }
    }
    Ok((prediction, trace))
}

/// FLOPs of all kernels of all passes in the program.
fn executed_flops(program: &Program, workload: &TransformerWorkload) -> f64 {
    let mut known: HashMap<(Pass, StageId, u16, u16), f64> = HashMap::new();
    let ops = program.ranks.iter().flat_map(|rank| &rank.ops);
    ops.map(|op| match op.kind {
        OpKind::Compute { pass, stage, first, end, .. } => *known
            .entry((pass, stage, first, end))
            .or_insert_with(|| ModelPass::new(workload, &program.stages, program.microbatches, &op.kind).flops()),
        _ => 0.0,
    })
    .sum()
}

fn memory(program: &Program, limit_bytes: Option<u64>) -> MemoryPrediction {
    let mut peaks: BTreeMap<u32, (u64, ClassBytes)> = BTreeMap::new();
    for (number, rank) in (0..).zip(&program.ranks) {
        let walk = walk(program, RankId(number));
        let found = (walk.peak_bytes, ClassBytes::of(&walk.peak_by_class));
        let highest = peaks.entry(rank.coordinates.pipeline).or_insert(found);
        if found.0 > highest.0 {
            *highest = found;
        }
    }
    let (peak_bytes, by_class): (Vec<u64>, Vec<ClassBytes>) = peaks.into_values().unzip();
    let fits = limit_bytes.is_none_or(|limit| peak_bytes.iter().all(|&peak| peak <= limit));
    MemoryPrediction { peak_bytes, limit_bytes, fits, by_class }
}

/// What a device does at a time; earlier kinds hide later ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Doing {
    Compute,
    Recompute,
    Optimizer,
    Reduce,
    Message,
    Nothing,
}

/// Where the time of the devices goes, as a mean over them, and the mean seconds of compute work among it. Communication
/// counts where its device computes nothing meanwhile; what is left is bubble.
fn parts(program: &Program, trace: &Trace, steps: f64) -> (TimeParts, f64) {
    let mut totals = [0u64; 6];
    for device in 0..program.devices.len() {
        // Begins and ends of everything on this device, in order of time.
        let mut changes: Vec<(u64, bool, Doing)> = Vec::new();
        for (rank, traced) in program.ranks.iter().zip(&trace.ranks) {
            if rank.device.index() != device {
                continue;
            }
            for event in traced.events.iter().filter(|event| event.end > event.start) {
                let doing = match event.kind {
                    OpKind::Compute { pass: Pass::R, .. } => Doing::Recompute,
                    OpKind::Compute { .. } => Doing::Compute,
                    OpKind::GradientNorm
                    | OpKind::Optimizer { .. }
                    | OpKind::OptimizerAhead { .. }
                    | OpKind::Validate { .. }
                    | OpKind::Join => Doing::Optimizer,
                    OpKind::Collective { .. } => Doing::Reduce,
                    OpKind::Send { .. } | OpKind::Recv { .. } => Doing::Message,
                };
                debug_assert!((event.stream == Stream::COMPUTE) == (doing < Doing::Reduce));
                changes.push((event.start.0, true, doing));
                changes.push((event.end.0, false, doing));
            }
        }
        changes.sort_unstable_by_key(|&(at, begins, _)| (at, begins));
        let mut active = [0u32; 5];
        let mut clock = 0;
        for (at, begins, doing) in changes {
            let now = active.iter().position(|&count| count > 0).unwrap_or(Doing::Nothing as usize);
            totals[now] += at - clock;
            clock = at;
            let count = &mut active[doing as usize];
            *count = if begins { *count + 1 } else { count.saturating_sub(1) };
        }
        totals[Doing::Nothing as usize] += trace.makespan.0.saturating_sub(clock);
    }
    let devices = program.devices.len().max(1) as f64;
    let seconds = |doing: Doing| totals[doing as usize] as f64 * 1e-9 / devices / steps;
    let time = TimeParts {
        compute: seconds(Doing::Compute),
        exposed_dp: seconds(Doing::Reduce),
        exposed_pp: seconds(Doing::Message),
        bubble: seconds(Doing::Nothing),
        recompute: seconds(Doing::Recompute),
        optimizer: seconds(Doing::Optimizer),
        ..TimeParts::default()
    };
    (time, time.compute + time.recompute + time.optimizer)
}
