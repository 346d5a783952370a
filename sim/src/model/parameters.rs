//! Parameters: exact counts, and the flat layout of a unit's parameters and gradients.
//!
//! Matrices are `[out, in]`. Query, key and value projections are one matrix (queries, then keys, then values); gate and
//! up projections are one matrix (gate, then up). A tied model's embedding matrix appears once in counts of the model; the
//! head's unit holds a copy of it unless embedding and head are on the same rank
//! ([`TransformerWorkload::tied_on_one_rank`]) or in the same stage: then the head reads the embedding's unit and its
//! gradient goes there. Both copies have the name `embedding.weight`, start equal, and stay equal because their gradients
//! are summed; the gradient norm counts only the embedding's.

use super::places::{OutputMatrix, holds, output_matrix};
use super::trainable::{Matrix, Selection, adapters};
use super::{Activation, Layer, ModelConfig, Norm, Positions};
use crate::program::{MemoryClass, Stage, Tensor, TransformerWorkload};
use crate::units::StageId;
use smallvec::SmallVec;
use std::ops::Range;

use super::passes::Operand;

/// Standard deviation of the first values of matrices (Radford et al. 2019).
const DEVIATION: f64 = 0.02;

/// How a parameter starts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Initial {
    /// Independent normal values of mean zero.
    Normal {
        /// Standard deviation.
        deviation: f64,
    },
    /// All the same.
    Constant(f32),
}

/// A parameter within the flat buffer of a unit.
#[derive(Debug, Clone, PartialEq)]
pub struct ParameterSpec {
    /// Unique in the model and the same in every layout, for example `blocks.3.attention.qkv.weight`.
    pub name: String,
    /// Row-major shape: `[out, in]` or `[width]`.
    pub shape: Vec<usize>,
    /// Elements of the flat buffer.
    pub range: Range<usize>,
    /// Its first value.
    pub initial: Initial,
    /// Weight decay applies: matrices yes, norms and biases no (Radford et al. 2018, section 4.1).
    pub decay: bool,
    /// Another unit's copy of it is the one that norms and counts include.
    pub tied_copy: bool,
}

/// A parameter of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Table,
    PositionTable,
    AttentionNormWeight,
    AttentionNormBias,
    QkvWeight,
    QkvBias,
    OutputWeight,
    OutputBias,
    MlpNormWeight,
    MlpNormBias,
    UpWeight,
    UpBias,
    DownWeight,
    DownBias,
    FinalNormWeight,
    FinalNormBias,
    Logits,
    /// Of the two matrices of an adapter: `A`, or `B`.
    Adapter(Matrix, Side),
}

/// The two matrices of an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// Into the rank.
    A,
    /// Out of it.
    B,
}

impl Role {
    /// The role with which it is trained or frozen: one kernel makes the gradients of both.
    pub fn joined(self) -> Role {
        match self {
            Role::PositionTable => Role::Table,
            Role::AttentionNormBias => Role::AttentionNormWeight,
            Role::MlpNormBias => Role::MlpNormWeight,
            Role::FinalNormBias => Role::FinalNormWeight,
            other => other,
        }
    }
}

/// A role with its rows and columns; a vector has no columns.
type Sized = (Role, usize, Option<usize>);

/// The parameters of a layer in the order of the flat buffer; the head's matrix is left out where it is not its own.
pub(crate) fn roles(model: &ModelConfig, layer: Layer, matrix: OutputMatrix) -> SmallVec<[Sized; 12]> {
    let hidden = model.hidden as usize;
    let layer_norm = model.norm == Norm::LayerNorm;
    let mut all = SmallVec::new();
    let mut add = |there: bool, role, rows: usize, cols| {
        if there {
            all.push((role, rows, cols));
        }
    };
    match layer {
        Layer::Embedding => {
            add(true, Role::Table, model.vocab as usize, Some(hidden));
            let learned = model.positions == Positions::Learned;
            add(learned, Role::PositionTable, model.max_positions as usize, Some(hidden));
        }
        Layer::Block(_) => {
            let query = model.query_width();
            let (qkv, up) = (model.qkv_width(), model.up_width());
            let intermediate = model.intermediate as usize;
            add(true, Role::AttentionNormWeight, hidden, None);
            add(layer_norm, Role::AttentionNormBias, hidden, None);
            add(true, Role::QkvWeight, qkv, Some(hidden));
            add(model.qkv_bias, Role::QkvBias, qkv, None);
            add(true, Role::OutputWeight, hidden, Some(query));
            add(model.attention_output_bias, Role::OutputBias, hidden, None);
            add(true, Role::MlpNormWeight, hidden, None);
            add(layer_norm, Role::MlpNormBias, hidden, None);
            add(true, Role::UpWeight, up, Some(hidden));
            add(model.mlp_bias, Role::UpBias, up, None);
            add(true, Role::DownWeight, hidden, Some(intermediate));
            add(model.mlp_bias, Role::DownBias, hidden, None);
        }
        Layer::Head => {
            add(true, Role::FinalNormWeight, hidden, None);
            add(layer_norm, Role::FinalNormBias, hidden, None);
            let here = !matches!(matrix, OutputMatrix::Shared { .. });
            add(here, Role::Logits, model.vocab as usize, Some(hidden));
        }
    }
    all
}

/// A parameter of a layer in its array.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Held {
    pub role: Role,
    rows: usize,
    /// Absent of a vector.
    cols: Option<usize>,
    pub trained: bool,
}

impl Held {
    pub fn len(&self) -> usize {
        self.rows * self.cols.unwrap_or(1)
    }
}

/// Which array of a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Array {
    /// Parameters with gradients and moments.
    Trained,
    /// Parameters without.
    Frozen,
}

/// What of the parameters of a model is trained, decided once.
#[derive(Debug, Clone)]
pub(crate) struct Layers<'a> {
    workload: &'a TransformerWorkload,
    stages: &'a [Stage],
    selection: Selection,
}

impl<'a> Layers<'a> {
    pub fn new(workload: &'a TransformerWorkload, stages: &'a [Stage]) -> Layers<'a> {
        let model = &workload.model;
        // A matrix of both ends counts once.
        let shared = OutputMatrix::Shared { stage: StageId(0), unit: 0 };
        let matrix = if model.tied_embeddings { shared } else { OutputMatrix::Own };
        let own = |layer| roles(model, layer, matrix).into_iter();
        let sizes = |layer| own(layer).map(|(role, rows, cols)| (role, rows * cols.unwrap_or(1))).collect();
        Layers { workload, stages, selection: Selection::new(&workload.trainable, model.all_layers().map(sizes)) }
    }

    /// The parameters of a layer of a stage in the order of their arrays.
    pub fn of(&self, stage: StageId, layer: Layer) -> SmallVec<[Held; 24]> {
        let (model, matrix) = (&self.workload.model, matrix_for(self.workload, self.stages, stage));
        let trains = |layer, place| self.selection.trains(layer, model.layers, place);
        let held = |(place, (role, rows, cols)): (usize, Sized)| {
            // A copy of the embedding matrix is what the embedding matrix is.
            let copied = role == Role::Logits && model.tied_embeddings;
            let trained = if copied { trains(Layer::Embedding, 0) } else { trains(layer, place) };
            Held { role, rows, cols, trained }
        };
        let mut all: SmallVec<[Held; 24]> = roles(model, layer, matrix).into_iter().enumerate().map(held).collect();
        if let Layer::Block(_) = layer {
            for (matrix, rank) in adapters(model, &self.workload.trainable) {
                let outputs = matrix.within(model).1.len();
                let (a, b) = (Role::Adapter(matrix, Side::A), Role::Adapter(matrix, Side::B));
                all.push(Held { role: a, rows: rank, cols: Some(matrix.inputs(model)), trained: true });
                all.push(Held { role: b, rows: outputs, cols: Some(rank), trained: true });
            }
        }
        all
    }

    /// Elements of an array of a unit.
    pub fn len(&self, stage: StageId, unit: u16, array: Array) -> usize {
        let trained = array == Array::Trained;
        let layers = &self.stages[stage.index()].units[usize::from(unit)].layers;
        let held = layers.iter().flat_map(|&layer| self.of(stage, layer));
        held.filter(|held| held.trained == trained).map(|held| held.len()).sum()
    }

    /// Where the parameters of one layer lie in the arrays of its unit.
    pub fn ranges(&self, stage: StageId, unit: u16, layer: Layer) -> SmallVec<[(Held, Range<usize>); 24]> {
        let mut starts = [0, 0];
        for &other in &self.stages[stage.index()].units[usize::from(unit)].layers {
            let placed = self.of(stage, other).into_iter().map(|held| {
                let start = &mut starts[usize::from(held.trained)];
                *start += held.len();
                (held, *start - held.len()..*start)
            });
            let placed: SmallVec<[(Held, Range<usize>); 24]> = placed.collect();
            if other == layer {
                return placed;
            }
        }
        SmallVec::new()
    }
}

impl ModelConfig {
    /// Columns of all query heads.
    pub fn query_width(&self) -> usize {
        self.heads as usize * self.head_dim as usize
    }

    /// Columns of the fused query, key and value projection.
    pub fn qkv_width(&self) -> usize {
        (self.heads as usize + 2 * self.kv_heads as usize) * self.head_dim as usize
    }

    /// Columns of the projection into the MLP: gate and up where there is a gate.
    pub fn up_width(&self) -> usize {
        match self.activation {
            Activation::SwiGlu => 2 * self.intermediate as usize,
            Activation::Gelu => self.intermediate as usize,
        }
    }

    /// Parameters of a layer; the head of a tied model is counted without the matrix that it shares.
    pub fn layer_parameters(&self, layer: Layer) -> u64 {
        let matrix =
            if self.tied_embeddings { OutputMatrix::Shared { stage: StageId(0), unit: 0 } } else { OutputMatrix::Own };
        elements(&roles(self, layer, matrix)) as u64
    }

    /// Parameters of the model, a tied matrix once.
    pub fn parameters(&self) -> u64 {
        u64::from(self.layers) * self.layer_parameters(Layer::Block(0))
            + self.layer_parameters(Layer::Embedding)
            + self.layer_parameters(Layer::Head)
    }
}

fn elements(roles: &[Sized]) -> usize {
    roles.iter().map(|&(_, rows, cols)| rows * cols.unwrap_or(1)).sum()
}

/// Trained parameters of a unit as its rank holds them (a copy of a tied matrix included).
pub fn unit_parameters(workload: &TransformerWorkload, stages: &[Stage], stage: StageId, unit: u16) -> usize {
    Layers::new(workload, stages).len(stage, unit, Array::Trained)
}

/// Frozen parameters of a unit.
pub fn frozen_parameters(workload: &TransformerWorkload, stages: &[Stage], stage: StageId, unit: u16) -> usize {
    Layers::new(workload, stages).len(stage, unit, Array::Frozen)
}

/// The layout of a unit's flat array of trained parameters; its gradients have the same.
pub fn unit_layout(workload: &TransformerWorkload, stages: &[Stage], stage: StageId, unit: u16) -> Vec<ParameterSpec> {
    layout(workload, stages, stage, unit, Array::Trained)
}

/// The layout of a unit's flat array of frozen parameters.
pub fn frozen_layout(
    workload: &TransformerWorkload,
    stages: &[Stage],
    stage: StageId,
    unit: u16,
) -> Vec<ParameterSpec> {
    layout(workload, stages, stage, unit, Array::Frozen)
}

fn layout(
    workload: &TransformerWorkload,
    stages: &[Stage],
    stage: StageId,
    unit: u16,
    array: Array,
) -> Vec<ParameterSpec> {
    let (model, matrix) = (&workload.model, matrix_for(workload, stages, stage));
    let all = Layers::new(workload, stages);
    let mut specs = Vec::new();
    let mut start = 0;
    for &layer in &stages[stage.index()].units[usize::from(unit)].layers {
        let held = all.of(stage, layer).into_iter().filter(|held| held.trained == (array == Array::Trained));
        for held in held {
            let (role, len) = (held.role, held.len());
            let tied_copy = role == Role::Logits && matrix == OutputMatrix::Copy;
            specs.push(ParameterSpec {
                name: if tied_copy { name(model, layer, Role::Table) } else { name(model, layer, role) },
                shape: std::iter::once(held.rows).chain(held.cols).collect(),
                range: start..start + len,
                initial: initial(model, role),
                decay: held.cols.is_some(),
                tied_copy,
            });
            start += len;
        }
    }
    specs
}

/// Elements of a unit's flat buffer, and whether weight decay applies to them.
pub type DecayRun = (Range<usize>, bool);

/// Neighbouring elements of a unit's flat buffer that one optimizer call updates, whatever parameters they belong to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DecayGroup {
    /// The elements.
    pub range: Range<usize>,
    /// Whether weight decay applies to the first of them.
    pub first: bool,
    /// Where it ceases or begins to apply, from the begin of the range on.
    pub borders: SmallVec<[u32; DecayGroup::MOST]>,
}

impl DecayGroup {
    /// Borders that one call can have.
    pub const MOST: usize = 15;

    fn decays(&self) -> bool {
        self.first == self.borders.len().is_multiple_of(2)
    }

    /// Takes in elements that follow; `false` where one call cannot have them too.
    fn take(&mut self, part: &Range<usize>, decay: bool) -> bool {
        let (len, border) = (self.range.len() + part.len(), self.decays() != decay);
        if self.range.end != part.start || u32::try_from(len).is_err() || border && self.borders.len() == Self::MOST {
            return false;
        }
        if border {
            self.borders.push(self.range.len() as u32);
        }
        self.range.end = part.end;
        true
    }
}

/// Cuts the part `within` of a unit's flat buffer into the fewest optimizer calls. `parameters` are all parameters of the unit in
/// order, with [`ParameterSpec::decay`].
pub fn decay_groups(parameters: impl IntoIterator<Item = DecayRun>, within: Range<usize>) -> Vec<DecayGroup> {
    let mut groups: Vec<DecayGroup> = Vec::new();
    for (range, decay) in parameters {
        let (mut start, end) = (range.start.max(within.start), range.end.min(within.end));
        while start < end {
            let part = start..end.min(start.saturating_add(u32::MAX as usize));
            start = part.end;
            if !groups.last_mut().is_some_and(|last| last.take(&part, decay)) {
                groups.push(DecayGroup { range: part, first: decay, borders: SmallVec::new() });
            }
        }
    }
    groups
}

/// The embedding matrix of a tied model within a unit, where two ranks hold it: the range whose gradients
/// [`crate::program::Payload::TiedEmbedding`] sums, and whether the gradient norm counts it here. A frozen one has none.
pub fn tied_matrix(
    workload: &TransformerWorkload,
    stages: &[Stage],
    stage: StageId,
    unit: u16,
) -> Option<(Range<usize>, bool)> {
    let held = &stages[stage.index()].units[usize::from(unit)];
    let head = (0..stages.len() as u16).map(StageId).find(|&s| s >= stage && holds(&stages[s.index()], Layer::Head))?;
    let ends = held.layers.iter().any(|layer| !matches!(layer, Layer::Block(_)));
    if !ends || output_matrix(workload, stages, head) != OutputMatrix::Copy {
        return None;
    }
    let found = unit_layout(workload, stages, stage, unit).into_iter().find(|spec| spec.name == "embedding.weight")?;
    Some((found.range, !found.tied_copy))
}

/// Where the head's matrix lies, for a stage that may not even have a head.
pub(crate) fn matrix_for(workload: &TransformerWorkload, stages: &[Stage], stage: StageId) -> OutputMatrix {
    if holds(&stages[stage.index()], Layer::Head) { output_matrix(workload, stages, stage) } else { OutputMatrix::Own }
}

fn initial(model: &ModelConfig, role: Role) -> Initial {
    match role {
        Role::AttentionNormWeight | Role::MlpNormWeight | Role::FinalNormWeight => Initial::Constant(1.0),
        Role::AttentionNormBias | Role::MlpNormBias | Role::FinalNormBias => Initial::Constant(0.0),
        Role::QkvBias | Role::OutputBias | Role::UpBias | Role::DownBias => Initial::Constant(0.0),
        // Two of these per block add to the residual stream: the sum keeps its variance over depth (Radford et al. 2019,
        // section 2.3).
        Role::OutputWeight | Role::DownWeight => {
            Initial::Normal { deviation: DEVIATION / (2.0 * f64::from(model.layers)).sqrt() }
        }
        Role::Table | Role::PositionTable | Role::QkvWeight | Role::UpWeight | Role::Logits => {
            Initial::Normal { deviation: DEVIATION }
        }
        // What an adapter adds is nothing at first (Hu et al. 2021, section 4.1).
        Role::Adapter(matrix, Side::A) => Initial::Normal { deviation: 1.0 / (matrix.inputs(model) as f64).sqrt() },
        Role::Adapter(_, Side::B) => Initial::Constant(0.0),
    }
}

fn name(model: &ModelConfig, layer: Layer, role: Role) -> String {
    let gated = model.activation == Activation::SwiGlu;
    let part = match role {
        Role::Table => return "embedding.weight".into(),
        Role::PositionTable => return "embedding.positions".into(),
        Role::FinalNormWeight => return "head.norm.weight".into(),
        Role::FinalNormBias => return "head.norm.bias".into(),
        Role::Logits => return "head.weight".into(),
        Role::AttentionNormWeight => "attention.norm.weight",
        Role::AttentionNormBias => "attention.norm.bias",
        Role::QkvWeight => "attention.qkv.weight",
        Role::QkvBias => "attention.qkv.bias",
        Role::OutputWeight => "attention.output.weight",
        Role::OutputBias => "attention.output.bias",
        Role::MlpNormWeight => "mlp.norm.weight",
        Role::MlpNormBias => "mlp.norm.bias",
        Role::UpWeight if gated => "mlp.gate_up.weight",
        Role::UpBias if gated => "mlp.gate_up.bias",
        Role::UpWeight => "mlp.up.weight",
        Role::UpBias => "mlp.up.bias",
        Role::DownWeight => "mlp.down.weight",
        Role::DownBias => "mlp.down.bias",
        Role::Adapter(matrix, side) => {
            let (room, side) = (matrix.room(), if side == Side::A { "a" } else { "b" });
            return match layer {
                Layer::Block(block) => format!("blocks.{block}.{room}.{}.adapter.{side}", matrix.name()),
                Layer::Embedding | Layer::Head => format!("{room}.{}.adapter.{side}", matrix.name()),
            };
        }
    };
    match layer {
        Layer::Block(block) => format!("blocks.{block}.{part}"),
        Layer::Embedding | Layer::Head => part.into(),
    }
}

/// One of the equal parts that members of a group hold of a flat buffer: `ceil(len / count)` elements each, the last
/// ones fewer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shard {
    /// Which part.
    pub index: u32,
    /// Of how many.
    pub count: u32,
}

impl Shard {
    /// The only part.
    pub const WHOLE: Shard = Shard { index: 0, count: 1 };

    /// Its elements of a buffer of `len`.
    pub fn range(self, len: usize) -> Range<usize> {
        let part = len.div_ceil(self.count.max(1) as usize);
        let start = (self.index as usize * part).min(len);
        start..(start + part).min(len)
    }
}

/// What a rank holds of a stage through all steps: parameters of every unit, gradients of the trained ones, and both AdamW
/// moments of its shard of them, with 32-bit weights where parameters are narrower.
pub(crate) fn persistent_operands(
    workload: &TransformerWorkload,
    stages: &[Stage],
    stage: StageId,
    moments: Shard,
) -> Vec<Operand> {
    let all = Layers::new(workload, stages);
    let units = 0..stages[stage.index()].units.len() as u16;
    units
        .flat_map(|unit| {
            let (len, frozen) = (all.len(stage, unit, Array::Trained), all.len(stage, unit, Array::Frozen));
            let operand = |tensor, class, elements: usize| {
                let bytes = workload.precision.element(tensor).bytes() * elements as u64;
                Operand { tensor, class, bytes }
            };
            let own = moments.range(len).len();
            let master = operand(Tensor::Master { stage, unit }, MemoryClass::OptimizerState, own);
            let trained = [
                Some(operand(Tensor::Parameters { stage, unit }, MemoryClass::Parameter, len)),
                Some(operand(Tensor::Gradients { stage, unit }, MemoryClass::Gradient, len)),
                workload.precision.has_master().then_some(master),
                Some(operand(Tensor::Moments { stage, unit }, MemoryClass::OptimizerState, 2 * own)),
            ];
            let frozen = operand(Tensor::Frozen { stage, unit }, MemoryClass::Parameter, frozen);
            let trained = trained.into_iter().flatten().filter(move |_| len > 0);
            trained.chain(Some(frozen).filter(|frozen| frozen.bytes > 0))
        })
        .collect()
}
