//! Lowering: from a compute order to the [`Program`] that simulator and executor interpret. Each pass is written once, for
//! all schedules:
//!
//! 1. [`recompute`]: an R before the backward of every microbatch, under full recomputation;
//! 2. [`passes`]: actions become compute ops over units of their stage, as fine as reduction and recomputation need;
//! 3. [`messages`]: receives posted one action ahead, sends behind their pass, a stream for each edge;
//! 4. [`gather`]: where parameters or gradients are partitioned ([`states`]), gathers before passes and reductions after them;
//!    [`state`]: what the optimizer needs of the gradients, their norm, the optimizer, gathering of parameters;
//! 5. [`lifetimes`]: allocations and frees, from what ops use.
//!
//! Which rounds the collectives take may be left to the costs of a machine ([`algorithms`]).
//!
//! Sizes come from [`sizes`]: the arithmetic of a transformer, or given numbers for a schedule under study.

mod algorithms;
mod cut;
mod draft;
mod gather;
mod grid;
mod lifetimes;
mod messages;
mod passes;
mod receipts;
mod recompute;
mod sizes;
mod state;
mod states;
mod unroll;

pub use algorithms::{ChosenAlgorithm, Collectives, choose, fastest};
pub use cut::{cut, forward_flops};
pub use sizes::{AbstractStage, Substance};
pub use states::{Sharing, States};
pub use unroll::unroll;

use crate::order::ComputeOrder;
use crate::replay::OrderError;
use draft::Draft;
use grid::Grid;
use paceline_sim::model::ModelError;
use paceline_sim::partition::StatePartition;
use paceline_sim::program::{CheckError, Device, PROGRAM_FORMAT, Program, RankProgram, Stage, Tensor, Workload, check};
use paceline_sim::units::StageId;
use passes::Grain;
use sizes::Sizes;
use std::borrow::Cow;
use thiserror::Error;

/// Which ranks a program has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Form {
    /// All: for the executor, and for the simulator where replicas share devices.
    #[default]
    Full,
    /// The first data-parallel replica alone, its groups with their true sizes: for the simulator.
    Representative,
}

/// What is lowered.
#[derive(Debug, Clone)]
pub struct Blueprint<'a> {
    /// Which passes each pipeline rank computes, in which order.
    pub order: &'a ComputeOrder,
    /// What passes hold.
    pub substance: Substance,
    /// By stage of the placement, all copies.
    pub stages: Vec<Stage>,
    /// Data-parallel replicas.
    pub data: u32,
    /// How they share parameters, gradients and optimizer states.
    pub states: States,
    /// Where ranks run: rank `r` on device `r mod devices`.
    pub devices: Vec<Device>,
    /// Which ranks the program has.
    pub form: Form,
}

/// Why something cannot be lowered.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum LowerError {
    /// The order is no schedule.
    #[error(transparent)]
    Order(#[from] OrderError),
    /// The stages do not make up the model, or it cannot be.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Stages or their sizes do not fit the placement.
    #[error("{have} {what} given, but the placement of {schedule} has {stages} stages; give one for each")]
    Stages { what: &'static str, have: usize, schedule: String, stages: usize },
    /// Nothing to run on.
    #[error("{what} is 0; it has to be at least 1")]
    Zero { what: &'static str },
    /// More stages than blocks.
    #[error(
        "{stages} stages, but {model} has {blocks} blocks, and every stage needs one; lower pp or chunks so that pp * chunks <= {blocks}"
    )]
    TooManyStages { model: String, stages: usize, blocks: u32 },
    /// Two copies of a stage in one place.
    #[error("both copies of stage {stage} lie on pipeline rank {rank}; place them on two ranks")]
    CopiesTogether { stage: usize, rank: u32 },
    /// More edges than stream numbers.
    #[error(
        "pipeline rank {rank} exchanges messages with more neighbours than the {most} streams that a rank can have"
    )]
    TooManyEdges { rank: usize, most: usize },
    /// A schedule with R where nothing is dropped.
    #[error("{schedule} recomputes, but recompute = {recompute:?}; set recompute = \"full\" or take another schedule")]
    Recompute { schedule: String, recompute: &'static str },
    /// Groups that do not share the replicas out.
    #[error("group_size = {group} does not divide the {data} data-parallel replicas; take one of their divisors")]
    Group { group: u32, data: u32 },
    /// Groups that do not share the pipeline out.
    #[error(
        "pipeline_groups = {groups} does not divide the {pipeline} ranks of a pipeline; take one of their divisors"
    )]
    PipelineGroups { groups: u32, pipeline: u32 },
    /// A partition within groups where there are none.
    #[error(
        "states = {partition} cuts within groups, and {} = {group} of {data} data-parallel replicas leaves none; set a group_size between 1 and {data}, or take states = {same}, which is the same here",
        if *.named { "group_size" } else { "the default group_size" }
    )]
    NoGroups { partition: StatePartition, group: u32, data: u32, named: bool, same: StatePartition },
    /// Gathered parameters are to stay where none is gathered.
    #[error(
        "keep_gathered = true with states = {partition}, which leaves parameters whole on every rank, so that none is gathered; it goes with states whose first letter is I or G (mics, IIG, zero3, ...): take one of them, or leave keep_gathered out"
    )]
    NothingGathered { partition: StatePartition },
    /// Two copies of the model have different programs and cannot gather in one order.
    #[error(
        "states = {partition} needs collectives in every microbatch, and {schedule} runs two copies of the model against each other; take none or zero1, or another schedule"
    )]
    TwoCopies { partition: StatePartition, schedule: String },
    /// One tensor with two sizes.
    #[error("{tensor:?} has {first} bytes in one op and {second} in another")]
    Size { tensor: Tensor, first: u64, second: u64 },
    /// A step without a barrier where parts of parameters are gathered after an update.
    #[error(
        "barrier_every = {steps} lets {steps} steps run without a barrier, but the ranks gather updated parameters, which a step taken back would have to do again; take states = none, or barrier_every = 1"
    )]
    Barrier { steps: u32 },
    /// The lowered program does not run: a defect of the lowering, or an order that no bounded channel can carry.
    #[error("the lowered program fails its check: {0}")]
    Check(#[from] CheckError),
}

/// Lowers a compute order, and proves that the result runs.
///
/// # Errors
/// See [`LowerError`].
pub fn lower(blueprint: &Blueprint) -> Result<Program, LowerError> {
    let program = lower_unchecked(blueprint)?;
    check(&program)?;
    Ok(program)
}

/// [`lower`] without the proof, for a search that proves only what it returns.
///
/// # Errors
/// See [`LowerError`].
pub fn lower_unchecked(blueprint: &Blueprint) -> Result<Program, LowerError> {
    validate(blueprint)?;
    let order: Cow<ComputeOrder> = recompute::apply(blueprint)?;
    let mut sizes = Sizes::new(blueprint, &order);
    sizes.validate()?;
    let grid = Grid::new(blueprint, &order.placement)?;
    let receipts = receipts::known(&order);

    // The passes of a pipeline rank and its messages are the same in every replica, up to the numbers of its peers.
    let mut drafts = Vec::with_capacity(order.actions.len());
    for device in 0..order.actions.len() {
        let mut draft = Draft::new(sizes.precision());
        let grain = match grid.reduces() {
            _ if grid.levels().works_by_unit() => Grain::Units,
            true => Grain::LastBackward,
            false => Grain::Stages,
        };
        let late = blueprint.states.sharing.late_gather && grid.levels().gathers_updates();
        passes::expand(&mut draft, &order, device, &mut sizes, (grain, late))?;
        messages::connect(&mut draft, &order, device, &sizes)?;
        drafts.push(draft);
    }
    let mut ranks = Vec::with_capacity(grid.present() * drafts.len());
    for data in 0..grid.present() as u32 {
        for (pipeline, draft) in drafts.iter().enumerate() {
            let mut draft = draft.clone();
            let held: Vec<StageId> = order.placement.stages_of(pipeline as u32).collect();
            state::close_step(&mut draft, &grid, data, pipeline as u32, &held, &sizes, blueprint.states.sharing)?;
            lifetimes::derive(&mut draft, &receipts[pipeline]);
            let coordinates = grid.coordinates(data, pipeline as u32);
            let (buffers, persistent, ops) = draft.finish(|peer| grid.rank(data, peer));
            let device = grid.device(data, pipeline as u32);
            ranks.push(RankProgram { device, coordinates, stages: held, buffers, persistent, ops });
        }
    }
    let workload = match &sizes.substance {
        Substance::Transformer(workload) => Workload::Transformer(workload.clone()),
        Substance::Abstract(_) => Workload::Abstract,
    };
    Ok(Program {
        format: PROGRAM_FORMAT.into(),
        workload,
        microbatches: order.microbatches,
        devices: blueprint.devices.clone(),
        groups: grid.groups(),
        stages: blueprint.stages.clone(),
        ranks,
    })
}

fn validate(blueprint: &Blueprint) -> Result<(), LowerError> {
    blueprint.order.validate()?;
    let (schedule, stages) = (&blueprint.order.name, blueprint.order.placement.stages());
    let lengths = match &blueprint.substance {
        Substance::Transformer(_) => vec![("stages", blueprint.stages.len())],
        Substance::Abstract(sizes) => vec![("stages", blueprint.stages.len()), ("stage sizes", sizes.len())],
    };
    if let Some(&(what, have)) = lengths.iter().find(|(_, have)| *have != stages) {
        return Err(LowerError::Stages { what, have, schedule: schedule.clone(), stages });
    }
    for (what, value) in [("dp", blueprint.data as usize), ("the number of devices", blueprint.devices.len())] {
        if value == 0 {
            return Err(LowerError::Zero { what });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
