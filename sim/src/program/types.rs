//! The data types of a program. No behaviour beyond reading them.

use super::{Algorithm, Element, Precision};
use crate::model::{Layer, ModelConfig, Trainable};
use crate::units::*;
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;
use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;

/// The format written into every serialised program.
pub const PROGRAM_FORMAT: &str = "paceline.program/1";

/// One training step of every rank, or several without a barrier between them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Program {
    /// [`PROGRAM_FORMAT`].
    pub format: String,
    /// What the passes compute.
    pub workload: Workload,
    /// Microbatches per replica and step.
    pub microbatches: u32,
    /// The devices that ranks run on.
    pub devices: Vec<Device>,
    /// Communication groups, by [`GroupId`].
    pub groups: Vec<Group>,
    /// Pipeline stages, by [`StageId`].
    pub stages: Vec<Stage>,
    /// Ranks, by [`RankId`].
    pub ranks: Vec<RankProgram>,
}

impl Program {
    /// Training steps in the program: all but the last end with an [`OpKind::Validate`] per unit. Microbatches are numbered on
    /// through the steps.
    pub fn steps(&self) -> u32 {
        self.ranks.iter().map(RankProgram::steps).max().unwrap_or(1)
    }

    /// How many devices work: those that have a rank.
    pub fn busy_devices(&self) -> u32 {
        self.ranks.iter().map(|rank| rank.device).collect::<BTreeSet<DeviceId>>().len() as u32
    }
}

impl RankProgram {
    /// Training steps of this rank: see [`Program::steps`].
    pub fn steps(&self) -> u32 {
        let validated = self.ops.iter().filter_map(|op| match op.kind {
            OpKind::Validate { step, .. } => Some(step + 1),
            _ => None,
        });
        1 + validated.max().unwrap_or(0)
    }
}

/// What the passes of a program compute.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Workload {
    /// A decoder transformer: passes run its layers.
    Transformer(TransformerWorkload),
    /// Passes with given times and sizes only (a schedule under study); it can be simulated, not trained.
    Abstract,
}

/// A transformer and the shape of one microbatch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TransformerWorkload {
    /// The architecture.
    pub model: ModelConfig,
    /// Sequences per microbatch.
    pub micro_batch: u32,
    /// Tokens per sequence.
    pub seq: u32,
    /// Which activations are kept from F to B.
    pub recompute: Recompute,
    /// Embedding and head of a tied model lie on the same pipeline rank (one rank, or a V placement), so that it holds
    /// the matrix once. Untied models do not read it.
    #[serde(default)]
    pub tied_on_one_rank: bool,
    /// Which parameters are trained.
    #[serde(default, skip_serializing_if = "Trainable::is_full")]
    pub trainable: Trainable,
    /// Number formats of parameters, gradients and activations.
    #[serde(default)]
    pub precision: Precision,
}

impl Workload {
    /// The number formats; 32-bit where nothing is computed.
    pub fn precision(&self) -> Precision {
        match self {
            Workload::Transformer(workload) => workload.precision,
            Workload::Abstract => Precision::Fp32,
        }
    }
}

/// Which activations F drops and the backward recomputes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Recompute {
    /// Everything the backward needs is kept.
    #[default]
    None,
    /// Cheap, large intermediates (norm outputs, the MLP activation) are rebuilt inside B and W.
    Selective,
    /// Only the input of each block is kept; an `R` pass runs its forward again.
    Full,
}

/// A physical device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Device {
    /// For people, for example `cpu:0`.
    pub name: String,
    /// The innermost network group (node, NVLink domain) it belongs to.
    pub node: u32,
}

/// Ranks that communicate together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Group {
    /// What it is for, for example `dp of stage 2`.
    pub name: String,
    /// The members present in the program, in the order that collectives use.
    pub ranks: Vec<RankId>,
    /// The true number of members; larger than `ranks.len()` in a representative program.
    pub size: u32,
    /// How far it reaches.
    pub level: NetworkLevel,
    /// The links between fast groups that it crosses, where it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub crossing: Option<Crossing>,
}

/// How a communication group lies over fast groups of ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Crossing {
    /// Fast groups; member `k` lies in group `k mod groups`.
    pub groups: u32,
    /// The link of each fast group to the others, where it is slowed down on purpose: a rehearsed cluster.
    pub link: Option<Link>,
}

/// A link that serves what is sent over it in order of arrival, one after the other: see [`super::Links`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Link {
    /// From the last byte sent to the last byte received.
    pub latency: Nanos,
    /// In each direction.
    pub bytes_per_second: u64,
}

impl Link {
    /// How long the link is busy with so many bytes.
    pub fn busy(&self, bytes: u64) -> Nanos {
        Nanos::from_seconds(bytes as f64 / self.bytes_per_second.max(1) as f64)
    }
}

impl Group {
    /// Fast groups over which its members are spread.
    pub fn fast_groups(&self) -> u32 {
        self.crossing.map_or(1, |crossing| crossing.groups)
    }
}

/// The slowest level of the network that a group crosses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetworkLevel {
    /// Within a fast group (a node).
    Intra,
    /// Across fast groups.
    Inter,
}

/// A pipeline stage: a contiguous run of layers, cut into units.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stage {
    /// Units in forward order: the granularity of gradient buckets, state partition and recomputation.
    pub units: Vec<Unit>,
}

/// Consecutive layers whose parameters form one flat buffer and whose passes may be one op.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Unit {
    /// In forward order; empty in an abstract program.
    pub layers: Vec<Layer>,
}

/// One rank's part of the program.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RankProgram {
    /// The device it runs on.
    pub device: DeviceId,
    /// Its place in the rank grid.
    pub coordinates: Coordinates,
    /// The stages it holds, in order of chunk.
    pub stages: Vec<StageId>,
    /// All buffers it ever holds, by [`BufferId`].
    pub buffers: Vec<Buffer>,
    /// Buffers that live through all steps (parameters, gradients, optimizer states).
    pub persistent: Vec<BufferId>,
    /// Ops in issue order, by [`OpId`].
    pub ops: Vec<Op>,
}

/// The place of a rank in the grid of parallel axes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Coordinates {
    /// Data-parallel replica.
    pub data: u32,
    /// Pipeline rank.
    pub pipeline: u32,
    /// The fast group that it lies in.
    #[serde(default)]
    pub group: u32,
}

/// A piece of a rank's memory with one lifetime per step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Buffer {
    /// What it is accounted as.
    pub class: MemoryClass,
    /// Its size.
    pub bytes: u64,
    /// What it holds.
    pub tensor: Tensor,
    /// Of a part of a unit's flat array: the element of the array at which the part begins. Zero for whole tensors.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub start: u64,
    /// What it is counted in: see [`Precision::element`].
    #[serde(default, skip_serializing_if = "Element::is_usual")]
    pub element: Element,
}

impl Buffer {
    /// Elements in it.
    pub fn elements(&self) -> usize {
        (self.bytes / self.element.bytes()) as usize
    }

    /// The elements of a unit's array that a part of it holds.
    pub fn holds(&self) -> Range<usize> {
        self.start as usize..self.start as usize + self.elements()
    }
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// Memory classes: a peak is the sum of its classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryClass {
    /// Weights.
    Parameter,
    /// Weight gradients.
    Gradient,
    /// Optimizer states and master weights.
    OptimizerState,
    /// What F keeps for B and W, what B keeps for W, and the running hidden state.
    Activation,
    /// Messages from other stages.
    ReceivedActivation,
    /// Scratch of collectives.
    CommScratch,
    /// Scratch of one compute op.
    Workspace,
}

impl MemoryClass {
    /// Every class, in the order of reports.
    pub const ALL: [MemoryClass; 7] = [
        MemoryClass::Parameter,
        MemoryClass::Gradient,
        MemoryClass::OptimizerState,
        MemoryClass::Activation,
        MemoryClass::ReceivedActivation,
        MemoryClass::CommScratch,
        MemoryClass::Workspace,
    ];
}

impl fmt::Display for MemoryClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            MemoryClass::Parameter => "parameters",
            MemoryClass::Gradient => "gradients",
            MemoryClass::OptimizerState => "optimizer states",
            MemoryClass::Activation => "activations",
            MemoryClass::ReceivedActivation => "received activations",
            MemoryClass::CommScratch => "communication",
            MemoryClass::Workspace => "workspace",
        })
    }
}

/// What a buffer holds. The executor finds the operands of an op by these names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tensor {
    /// Weights of a unit that are trained, flat.
    Parameters { stage: StageId, unit: u16 },
    /// Accumulated weight gradients of a unit, flat, same layout.
    Gradients { stage: StageId, unit: u16 },
    /// AdamW moments of the part of a unit that this rank updates: first, then second moments. [`Buffer::start`] is
    /// where that part begins.
    Moments { stage: StageId, unit: u16 },
    /// Token ids of a microbatch (first stage): `u32`.
    Tokens { microbatch: MicrobatchId },
    /// Target ids of a microbatch (last stage): `u32`.
    Targets { microbatch: MicrobatchId },
    /// The hidden state that enters a stage, received or left by a stage on the same rank.
    StageInput { stage: StageId, microbatch: MicrobatchId },
    /// The hidden state that F builds and that leaves the stage.
    StageOutput { stage: StageId, microbatch: MicrobatchId },
    /// The gradient that enters a stage's backward from the next stage.
    OutputGradient { stage: StageId, microbatch: MicrobatchId },
    /// The gradient that B builds and that leaves for the previous stage.
    InputGradient { stage: StageId, microbatch: MicrobatchId },
    /// Block inputs kept by F under full recomputation, all blocks of a unit.
    Checkpoint { stage: StageId, unit: u16, microbatch: MicrobatchId },
    /// Activations of a unit needed by B only.
    SavedForB { stage: StageId, unit: u16, microbatch: MicrobatchId },
    /// Activations of a unit needed until W (by B too, perhaps).
    SavedForW { stage: StageId, unit: u16, microbatch: MicrobatchId },
    /// Output gradients of a unit's matrix products, made by B and needed by W.
    DeltaForW { stage: StageId, unit: u16, microbatch: MicrobatchId },
    /// Per-microbatch losses, one `f32` each (last stage).
    Losses,
    /// One `f64`: the squared gradient norm, partial and then global.
    GradientNorm,
    /// Scratch of the op that allocates it.
    Workspace { op: u32 },
    /// The part of a unit's weights that this rank keeps where weights are partitioned; passes read gathered
    /// [`Tensor::Parameters`], which live for a while only.
    ParameterShard { stage: StageId, unit: u16 },
    /// The part of a unit's gradients that this rank accumulates where gradients are partitioned; passes make whole
    /// [`Tensor::Gradients`] of one microbatch.
    GradientShard { stage: StageId, unit: u16 },
    /// Reduced gradients of the part that the optimizer updates, gathered where gradients are cut more finely than it.
    SyncedGradients { stage: StageId, unit: u16 },
    /// The 32-bit weights that the optimizer updates, where passes keep narrower ones, or where it is cut more coarsely than the
    /// weights that passes keep.
    Master { stage: StageId, unit: u16 },
    /// The weights of a unit before [`OpKind::OptimizerAhead`]; [`OpKind::Validate`] turns them into the true ones.
    Kept { stage: StageId, unit: u16 },
    /// Weights of a unit that are not trained, flat.
    Frozen { stage: StageId, unit: u16 },
    /// The part of them that this rank keeps where weights are partitioned; passes read gathered [`Tensor::Frozen`].
    FrozenShard { stage: StageId, unit: u16 },
}

/// A stream of a rank: ops on one stream run in issue order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Stream(pub u8);

impl Stream {
    /// The stream of passes and optimizer; every other stream communicates.
    pub const COMPUTE: Stream = Stream(0);
    /// The stream of collectives that reduce gradients and their norm.
    pub const COLLECTIVE: Stream = Stream(1);
    /// The stream of collectives that passes wait for: gathers of parameters.
    pub const GATHER: Stream = Stream(2);
    /// The first stream for point-to-point edges; lowering numbers one per direction and peer.
    pub const FIRST_EDGE: u8 = 3;
}

/// A list of op or buffer ids, inline while short.
pub type Ids<T> = SmallVec<[T; 4]>;

/// One operation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Op {
    /// Where it runs.
    pub stream: Stream,
    /// What it does.
    pub kind: OpKind,
    /// Earlier ops of this rank that must have ended before it starts.
    #[serde(default, skip_serializing_if = "SmallVec::is_empty")]
    pub waits: Ids<OpId>,
    /// Buffers whose life starts when it is issued.
    #[serde(default, skip_serializing_if = "SmallVec::is_empty")]
    pub alloc: Ids<BufferId>,
    /// Buffers that it reads or writes (those it allocates or frees included).
    #[serde(default, skip_serializing_if = "SmallVec::is_empty")]
    pub uses: Ids<BufferId>,
    /// Buffers whose life ends when it has ended.
    #[serde(default, skip_serializing_if = "SmallVec::is_empty")]
    pub free: Ids<BufferId>,
}

#[cfg(test)]
impl Op {
    /// An op without buffers, for tests of what does not look at memory.
    pub(crate) fn bare(stream: Stream, kind: OpKind, waits: &[u32]) -> Op {
        let waits = waits.iter().map(|&wait| OpId(wait)).collect();
        Op { stream, kind, waits, alloc: Ids::new(), uses: Ids::new(), free: Ids::new() }
    }
}

impl OpKind {
    /// Whether it meets ops of other ranks; all others are the rank's own and run on its compute stream.
    pub fn communicates(&self) -> bool {
        matches!(self, OpKind::Send { .. } | OpKind::Recv { .. } | OpKind::Collective { .. })
    }
}

/// What an op does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OpKind {
    /// A pass of a microbatch over units `first..end` of a stage (forward order for F and R, reverse for B, W, BW).
    Compute { pass: Pass, stage: StageId, microbatch: MicrobatchId, first: u16, end: u16 },
    /// Sends a buffer to the rank that posts the matching receive.
    Send { peer: RankId, message: Message, buffer: BufferId },
    /// Receives into a buffer.
    Recv { peer: RankId, message: Message, buffer: BufferId },
    /// A collective over a group, on an array of `bytes` in `buffer`.
    Collective {
        collective: Collective,
        group: GroupId,
        payload: Payload,
        buffer: BufferId,
        bytes: u64,
        #[serde(default, skip_serializing_if = "Arrangement::is_usual")]
        arrangement: Arrangement,
    },
    /// Adds the squared norm of this rank's shard of all gradients into [`Tensor::GradientNorm`].
    GradientNorm,
    /// Clips by the global norm, updates this rank's shard of a unit with AdamW and zeroes its gradients.
    Optimizer { stage: StageId, unit: u16 },
    /// Nothing: a place to wait and to free.
    Join,
    /// Updates a unit without knowing the global norm, as if nothing were clipped, and keeps the weights as they were
    /// in [`Tensor::Kept`]. The step is numbered within the program.
    OptimizerAhead { stage: StageId, unit: u16, step: u32 },
    /// Makes the true update of a unit from [`Tensor::Kept`], now that the global norm of the step is known, and zeroes its
    /// gradients. Where nothing was clipped it equals what [`OpKind::OptimizerAhead`] guessed. Where the guess was wrong it
    /// replaces the weights, and what has been computed with the wrong ones is computed again (Qi et al. 2024, Zero Bubble
    /// Pipeline Parallelism, arXiv 2401.10241, section 4: post-validation).
    Validate { stage: StageId, unit: u16, step: u32 },
}

/// A pass of the pipeline. `BW` is the fused backward; PyTorch and DualPipe call it B.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Pass {
    /// Forward.
    F,
    /// Backward for the input.
    B,
    /// Backward for the weights.
    W,
    /// B and W in one.
    BW,
    /// Forward again, to rebuild dropped activations.
    R,
}

impl fmt::Display for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Pass::F => "F",
            Pass::B => "B",
            Pass::W => "W",
            Pass::BW => "BW",
            Pass::R => "R",
        })
    }
}

/// Identifies a message between stages: what it carries and for whom, so that two edges between the same pair of ranks
/// are never confused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Message {
    /// Activation (forward) or gradient (backward).
    pub direction: Direction,
    /// The stage that receives it.
    pub stage: StageId,
    /// The microbatch that it belongs to.
    pub microbatch: MicrobatchId,
}

/// Which way a message travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// Activations, to the next stage.
    Forward,
    /// Gradients, to the previous stage.
    Backward,
}

/// A collective operation (reductions are sums).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Collective {
    /// Every member ends with the sum.
    AllReduce,
    /// Member `i` ends with shard `i` of the sum; the rest of its buffer is unspecified.
    ReduceScatter,
    /// Member `i` brings shard `i`; every member ends with all.
    AllGather,
    /// The array is one part per member, all of the same length: part `k` of member `i` changes places with part `i` of member
    /// `k`. Elements beyond the last whole part stay where they are.
    AllToAll,
}

/// Where the array of a collective lies and how it is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Arrangement {
    /// The byte of the buffer at which the array begins.
    pub offset: u64,
    /// Bytes of each member's part: member `i` has the part from `i * part` on, the last ones shorter or empty. Without it the
    /// elements are shared out evenly, rounded up.
    pub part: Option<u64>,
    /// Where this member's part lies by itself: an all-gather takes it from there, a reduce-scatter adds the sum to what is
    /// there. Without it the part lies in its place in the array.
    pub shard: Option<BufferId>,
    /// By which rounds it is done.
    pub algorithm: Algorithm,
}

impl Arrangement {
    /// In place from the begin of the buffer on, evenly cut.
    pub fn is_usual(&self) -> bool {
        *self == Arrangement::default()
    }

    /// Bytes of each member's part of an array of `bytes` over `members`, in elements of `width` bytes.
    pub fn part_of(&self, bytes: u64, members: u32, width: u64) -> u64 {
        self.part.unwrap_or_else(|| (bytes / width).div_ceil(u64::from(members.max(1))) * width)
    }

    /// Whether another member's op can be one of the same collective.
    pub fn meets(&self, other: &Arrangement) -> bool {
        (self.offset, self.part, self.shard.is_some(), self.algorithm)
            == (other.offset, other.part, other.shard.is_some(), other.algorithm)
    }
}

/// What a collective carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Payload {
    /// Gradients of a unit.
    Gradients { stage: StageId, unit: u16 },
    /// Gradients of the tied embedding matrix, between the stages that hold a copy.
    TiedEmbedding,
    /// Parameters of a unit.
    Parameters { stage: StageId, unit: u16 },
    /// The squared gradient norm.
    GradientNorm,
}
