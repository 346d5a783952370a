//! One pass over units of a stage: its kernels in order, and every tensor that it touches with its size.

use super::activations::{Holder, Piece, Shape, element_of, held, length, padded, place};
use super::parameters::{Array, Layers, Role, Shard, Side, matrix_for, persistent_operands};
use super::places::{OutputMatrix, Spot, spots};
use super::steps::{Detail, Slice, Step};
use super::trainable::{Matrix, adapters};
use super::{Layer, block, ends};
use crate::program::{Element, MemoryClass, OpKind, Pass, Stage, Tensor, TransformerWorkload};
use crate::units::{MicrobatchId, StageId};
use paceline_profiles::{DType, KernelKey, KernelOp};
use smallvec::SmallVec;
use std::collections::BTreeMap;
use std::ops::Range;

/// A tensor that an op touches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operand {
    /// Its name. The workspace of a pass is [`Tensor::Workspace`] `{ op: 0 }`.
    pub tensor: Tensor,
    /// What it is accounted as.
    pub class: MemoryClass,
    /// Its whole size.
    pub bytes: u64,
}

/// A pass as kernels and operands.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelPass {
    /// Kernels in order.
    pub steps: Vec<Step>,
    /// Every tensor it touches, in order of name.
    pub operands: Vec<Operand>,
}

impl ModelPass {
    /// The pass of an [`OpKind::Compute`] over the stages of a program with so many microbatches; nothing for other ops.
    ///
    /// F writes the input of the layer that follows its units, which is [`Tensor::StageOutput`] at the end of the stage. A
    /// fused backward carries the gradient in [`Tensor::InputGradient`]; a split B writes every gradient into its place for
    /// W. Stages on one rank hand over under the receiver's name: see [`neighbour`].
    pub fn new(workload: &TransformerWorkload, stages: &[Stage], microbatches: u32, kind: &OpKind) -> ModelPass {
        let &OpKind::Compute { pass, stage, microbatch, first, end } = kind else {
            return ModelPass { steps: Vec::new(), operands: Vec::new() };
        };
        let all = spots(stages, stage);
        let mut builder = Builder {
            workload,
            stages,
            shape: Shape::of(workload),
            microbatch,
            loss: microbatch.0.checked_rem(microbatches).unwrap_or(0) as usize,
            spots: &all,
            held: Layers::new(workload, stages),
            steps: Vec::new(),
            workspace: Workspace::default(),
        };
        let within = |spot: &&Spot| (first..end).contains(&spot.unit);
        match pass {
            Pass::F | Pass::R => all.iter().filter(within).for_each(|spot| builder.layer(pass, spot)),
            Pass::B | Pass::W | Pass::BW => all.iter().rev().filter(within).for_each(|spot| builder.layer(pass, spot)),
        }
        let operands = builder.operands(microbatches);
        ModelPass { steps: builder.steps, operands }
    }

    /// Kernels by operator and shape, in order.
    pub fn kernel_calls(&self) -> impl Iterator<Item = &KernelKey> {
        self.steps.iter().map(|step| &step.key)
    }

    /// Floating-point operations of all matrix products, causal attention as it is computed.
    pub fn flops(&self) -> f64 {
        self.steps.iter().map(Step::flops).sum()
    }

    /// Bytes moved, each operand of each kernel once.
    pub fn bytes_moved(&self) -> f64 {
        self.steps.iter().map(Step::bytes).sum()
    }
}

/// The name under which the neighbouring stage on the same rank knows a tensor: what leaves a stage is what enters the
/// next. `None` where there is no neighbour in that direction, or for other tensors.
pub fn neighbour(stages: &[Stage], tensor: Tensor) -> Option<Tensor> {
    let starts = |stage: StageId| {
        stages
            .get(stage.index())
            .and_then(|s| s.units.first())
            .is_some_and(|u| u.layers.first() == Some(&Layer::Embedding))
    };
    match tensor {
        Tensor::StageOutput { stage, microbatch } => {
            let next = StageId(stage.0 + 1);
            (next.index() < stages.len() && !starts(next)).then_some(Tensor::StageInput { stage: next, microbatch })
        }
        Tensor::InputGradient { stage, microbatch } => {
            let before = StageId(stage.0.checked_sub(1)?);
            (!starts(stage)).then_some(Tensor::OutputGradient { stage: before, microbatch })
        }
        _ => None,
    }
}

/// What a rank holds of a stage through all steps: parameters of every unit, gradients of the trained ones, and both AdamW
/// moments of its shard of them, with 32-bit weights where parameters are narrower.
pub fn persistent(workload: &TransformerWorkload, stages: &[Stage], stage: StageId, moments: Shard) -> Vec<Operand> {
    persistent_operands(workload, stages, stage, moments)
}

/// Scratch of one pass, in bytes: taken and given back in stack order.
#[derive(Debug, Default)]
pub(crate) struct Workspace {
    next: usize,
    highest: usize,
}

impl Workspace {
    /// Room for `len` elements.
    pub fn take(&mut self, len: usize, element: Element) -> Slice {
        let start = self.next / element.bytes() as usize;
        self.next += padded(len, element);
        self.highest = self.highest.max(self.next);
        Slice { tensor: Tensor::Workspace { op: 0 }, range: start..start + len, element }
    }

    pub fn mark(&self) -> usize {
        self.next
    }

    pub fn release(&mut self, mark: usize) {
        self.next = mark;
    }
}

/// What follows a projection and its bias.
#[derive(Clone, Copy)]
pub(crate) enum After<'s> {
    Nothing,
    /// The residual stream is added.
    Add(&'s Slice),
    /// Its GELU goes here.
    Gelu(&'s Slice),
}

/// An adapter of a block with its gradients.
struct Adapter {
    matrix: Matrix,
    rank: usize,
    a: Slice,
    b: Slice,
    into_a: Slice,
    into_b: Slice,
}

/// Builds the kernels of a pass.
pub(crate) struct Builder<'a> {
    pub workload: &'a TransformerWorkload,
    pub stages: &'a [Stage],
    pub shape: Shape,
    pub microbatch: MicrobatchId,
    /// Its number within its step: the place of its loss.
    pub loss: usize,
    /// All layers of the stage.
    pub spots: &'a [Spot],
    /// Where parameters lie.
    held: Layers<'a>,
    pub steps: Vec<Step>,
    pub workspace: Workspace,
}

impl Builder<'_> {
    fn layer(&mut self, pass: Pass, spot: &Spot) {
        match (spot.layer, pass) {
            (Layer::Block(_), Pass::F) => block::forward(self, spot),
            (Layer::Block(_), Pass::R) => block::recompute(self, spot),
            (Layer::Block(_), Pass::B) => block::backward_input(self, spot),
            (Layer::Block(_), Pass::W) => block::backward_weight(self, spot),
            (Layer::Block(_), Pass::BW) => block::backward(self, spot),
            (Layer::Embedding, Pass::F) => ends::embedding_forward(self, spot),
            (Layer::Embedding, Pass::W) => ends::embedding_backward(self, spot, false),
            (Layer::Embedding, Pass::BW) => ends::embedding_backward(self, spot, true),
            (Layer::Head, Pass::F) => ends::head_forward(self, spot),
            (Layer::Head, Pass::B) => ends::head_backward_input(self, spot),
            (Layer::Head, Pass::W) => ends::head_backward_weight(self, spot),
            (Layer::Head, Pass::BW) => ends::head_backward(self, spot),
            // The embedding has no input gradient; the ends are not recomputed.
            (Layer::Embedding, Pass::B | Pass::R) | (Layer::Head, Pass::R) => {}
        }
    }

    fn unit_spots(&self, unit: u16) -> &[Spot] {
        let start = self.spots.iter().position(|spot| spot.unit == unit).unwrap_or(self.spots.len());
        let end = self.spots.iter().rposition(|spot| spot.unit == unit).map_or(start, |last| last + 1);
        &self.spots[start..end]
    }

    fn order_of(&self, spot: &Spot) -> usize {
        self.spots.iter().position(|s| (s.unit, s.index) == (spot.unit, spot.index)).unwrap_or(0)
    }

    /// A kept piece.
    pub fn kept(&self, spot: &Spot, piece: Piece) -> Option<Slice> {
        place(&self.shape, self.workload.recompute, self.unit_spots(spot.unit), spot, piece, self.microbatch)
    }

    /// A piece where it is kept, or in workspace where it is not (or must not be).
    pub fn piece(&mut self, spot: &Spot, piece: Piece, transient: bool) -> Slice {
        match self.kept(spot, piece).filter(|_| !transient) {
            Some(slice) => slice,
            None => {
                let len = length(&self.shape, piece, spot.layer);
                self.workspace.take(len, element_of(self.shape.precision, piece))
            }
        }
    }

    /// Elements of a tensor that holds one type.
    pub fn slice(&self, tensor: Tensor, range: Range<usize>) -> Slice {
        Slice { tensor, range, element: self.shape.precision.element(tensor) }
    }

    /// Room for values of this pass alone.
    pub fn scratch(&mut self, len: usize) -> Slice {
        self.workspace.take(len, self.shape.precision.values())
    }

    fn whole_hidden(&self, tensor: Tensor) -> Slice {
        self.slice(tensor, 0..self.shape.rows * self.shape.hidden)
    }

    /// `x` of a layer.
    pub fn input(&self, spot: &Spot) -> Slice {
        let stage_input = Tensor::StageInput { stage: spot.stage, microbatch: self.microbatch };
        self.kept(spot, Piece::Input).unwrap_or_else(|| self.whole_hidden(stage_input))
    }

    /// Where the output of a layer goes: the input of the next, or out of the stage.
    pub fn output(&self, spot: &Spot) -> Slice {
        let leaves = Tensor::StageOutput { stage: spot.stage, microbatch: self.microbatch };
        match self.spots.get(self.order_of(spot) + 1) {
            Some(next) => self.input(next),
            None => self.whole_hidden(leaves),
        }
    }

    /// The gradient of a layer's output, as a split backward finds it.
    pub fn output_delta(&self, spot: &Spot) -> Slice {
        let enters = Tensor::OutputGradient { stage: spot.stage, microbatch: self.microbatch };
        self.kept(spot, Piece::OutputDelta).unwrap_or_else(|| self.whole_hidden(enters))
    }

    /// Where a split backward leaves the gradient of a layer's input.
    pub fn input_delta(&self, spot: &Spot) -> Slice {
        match self.order_of(spot).checked_sub(1) {
            Some(before) => self.output_delta(&self.spots[before]),
            None => self.running_gradient(spot.stage),
        }
    }

    /// The gradient that a fused backward carries from layer to layer.
    pub fn running_gradient(&self, stage: StageId) -> Slice {
        self.whole_hidden(Tensor::InputGradient { stage, microbatch: self.microbatch })
    }

    /// The gradient that enters the stage.
    pub fn entering_gradient(&self, stage: StageId) -> Slice {
        self.whole_hidden(Tensor::OutputGradient { stage, microbatch: self.microbatch })
    }

    /// A parameter of a layer, if the layer has it; its gradient, if it is trained too.
    pub fn parameter(&self, spot: &Spot, role: Role, gradient: bool) -> Option<Slice> {
        let matrix = matrix_for(self.workload, self.stages, spot.stage);
        let (stage, unit, layer, role) = match (role, matrix) {
            (Role::Logits, OutputMatrix::Shared { stage, unit }) => (stage, unit, Layer::Embedding, Role::Table),
            _ => (spot.stage, spot.unit, spot.layer, role),
        };
        let (held, range) = self.held.ranges(stage, unit, layer).into_iter().find(|(held, _)| held.role == role)?;
        let tensor = match (held.trained, gradient) {
            (true, true) => Tensor::Gradients { stage, unit },
            (true, false) => Tensor::Parameters { stage, unit },
            (false, true) => return None,
            (false, false) => Tensor::Frozen { stage, unit },
        };
        Some(self.slice(tensor, range))
    }

    /// A parameter that every model of this shape has.
    pub fn weight(&self, spot: &Spot, role: Role) -> Slice {
        let none = || self.slice(Tensor::Parameters { stage: spot.stage, unit: spot.unit }, 0..0);
        self.parameter(spot, role, false).unwrap_or_else(none)
    }

    /// The gradient of a parameter that is trained.
    pub fn gradient(&self, spot: &Spot, role: Role) -> Option<Slice> {
        self.parameter(spot, role, true)
    }

    /// The adapters beside a matrix of a block, as the block holds it.
    fn adapters(&self, spot: &Spot, fused: Role) -> Vec<Adapter> {
        let model = &self.workload.model;
        let there = adapters(model, &self.workload.trainable).into_iter();
        let beside = there.filter(|(matrix, _)| matrix.within(model).0 == fused);
        beside
            .filter_map(|(matrix, rank)| {
                let find = |side, gradient| self.parameter(spot, Role::Adapter(matrix, side), gradient);
                let (a, b) = (find(Side::A, false)?, find(Side::B, false)?);
                let (into_a, into_b) = (find(Side::A, true)?, find(Side::B, true)?);
                Some(Adapter { matrix, rank, a, b, into_a, into_b })
            })
            .collect()
    }

    /// Whether adapters stand beside a matrix of a block.
    pub fn adapted(&self, spot: &Spot, matrix: Role) -> bool {
        !self.adapters(spot, matrix).is_empty()
    }

    /// Whether anything of a matrix of a block has a gradient: itself, or an adapter beside it.
    pub fn learns(&self, spot: &Spot, matrix: Role) -> bool {
        self.gradient(spot, matrix).is_some() || self.adapted(spot, matrix)
    }

    /// The `B` of an adapter with zeros in the rows of the fused matrix that are not its own.
    fn widened(&mut self, adapter: &Adapter, outputs: usize) -> Slice {
        let rows = adapter.matrix.within(&self.workload.model).1;
        if rows.len() == outputs {
            return adapter.b.clone();
        }
        let wide = self.scratch(outputs * adapter.rank);
        self.elements(KernelOp::Zero, outputs * adapter.rank, [&wide]);
        let own = part(&wide, rows.start * adapter.rank..rows.end * adapter.rank);
        self.elements(KernelOp::Copy, adapter.b.range.len(), [&adapter.b, &own]);
        wide
    }

    /// What adapters add to a projection: `out += (x A^T) B^T`. `n` columns of `out`, `k` of `x`.
    pub fn adapt(&mut self, spot: &Spot, fused: Role, x: &Slice, out: &Slice, (n, k): (usize, usize)) {
        let rows = self.shape.rows;
        for adapter in self.adapters(spot, fused) {
            let start = self.workspace.mark();
            let inner = self.scratch(rows * adapter.rank);
            self.project(x, adapter.a.clone(), &inner, adapter.rank, k);
            let wide = self.widened(&adapter, n);
            let operands = [inner, wide, out.clone()];
            self.push(KernelOp::MatmulNt, &[rows, n, adapter.rank], operands, Detail::Accumulate);
            self.workspace.release(start);
        }
    }

    /// What adapters add to the gradient of a projection's input: `dx += (dy B) A`.
    pub fn adapt_back(&mut self, spot: &Spot, fused: Role, dy: &Slice, dx: &Slice, (n, k): (usize, usize)) {
        let rows = self.shape.rows;
        for adapter in self.adapters(spot, fused) {
            let start = self.workspace.mark();
            let inner = self.scratch(rows * adapter.rank);
            let wide = self.widened(&adapter, n);
            self.project_back(dy, wide, &inner, adapter.rank, n);
            let operands = [inner, adapter.a.clone(), dx.clone()];
            self.push(KernelOp::MatmulNn, &[rows, k, adapter.rank], operands, Detail::Accumulate);
            self.workspace.release(start);
        }
    }

    /// The gradients of a projection's matrix, where it is trained, and of the adapters beside it:
    /// `dB += dy^T (x A^T)`, `dA += (dy B)^T x`.
    pub fn learn(&mut self, spot: &Spot, role: Role, dy: &Slice, x: &Slice, (n, k): (usize, usize)) {
        if let Some(gradient) = self.gradient(spot, role) {
            self.accumulate(dy, x, gradient, n, k);
        }
        let rows = self.shape.rows;
        for adapter in self.adapters(spot, role) {
            let (rank, start) = (adapter.rank, self.workspace.mark());
            let inner = self.scratch(rows * rank);
            self.project(x, adapter.a.clone(), &inner, rank, k);
            let own = adapter.matrix.within(&self.workload.model).1;
            if own.len() == n {
                self.accumulate(dy, &inner, adapter.into_b.clone(), n, rank);
            } else {
                let wide = self.workspace.take(n * rank, self.shape.precision.gradients());
                self.elements(KernelOp::Zero, n * rank, [&wide]);
                self.accumulate(dy, &inner, wide.clone(), n, rank);
                let own = part(&wide, own.start * rank..own.end * rank);
                self.elements(KernelOp::Add, adapter.into_b.range.len(), [&own, &adapter.into_b]);
            }
            let wide = self.widened(&adapter, n);
            self.project_back(dy, wide, &inner, rank, n);
            self.accumulate(&inner, x, adapter.into_a.clone(), rank, k);
            self.workspace.release(start);
        }
    }

    /// Ids of the microbatch's tokens or targets.
    pub fn ids(&self, targets: bool) -> Slice {
        let microbatch = self.microbatch;
        let tensor = if targets { Tensor::Targets { microbatch } } else { Tensor::Tokens { microbatch } };
        self.slice(tensor, 0..self.shape.rows)
    }

    pub fn push(&mut self, op: KernelOp, dims: &[usize], operands: impl IntoIterator<Item = Slice>, detail: Detail) {
        let dims = dims.iter().map(|&d| d as u32).collect();
        let (precision, operands) = (self.shape.precision, operands.into_iter().collect::<SmallVec<[Slice; 7]>>());
        // Indices tell nothing.
        let first = operands.iter().map(|slice| slice.element).find(|&element| element != Element::U32);
        let dtype = match first {
            Some(Element::Bf16) if adds_to_gradients(op) => precision.of_gradients(),
            Some(Element::Bf16) => DType::Bf16,
            _ => DType::F32,
        };
        self.steps.push(Step { key: KernelKey { op, dims, dtype }, operands, detail });
    }

    /// `c[m,n] = a[m,k] b[n,k]^T`: the forward of a projection.
    pub fn project(&mut self, a: &Slice, b: Slice, c: &Slice, n: usize, k: usize) {
        let rows = self.shape.rows;
        self.push(KernelOp::MatmulNt, &[rows, n, k], [a.clone(), b, c.clone()], Detail::None);
    }

    /// `c[m,n] = a[m,k] b[k,n]`: its backward for the input.
    pub fn project_back(&mut self, a: &Slice, b: Slice, c: &Slice, n: usize, k: usize) {
        let rows = self.shape.rows;
        self.push(KernelOp::MatmulNn, &[rows, n, k], [a.clone(), b, c.clone()], Detail::None);
    }

    /// `c[m,n] += a[k,m]^T b[k,n]`: its backward for the weights.
    pub fn accumulate(&mut self, a: &Slice, b: &Slice, c: Slice, m: usize, n: usize) {
        let rows = self.shape.rows;
        self.push(KernelOp::MatmulTn, &[m, n, rows], [a.clone(), b.clone(), c], Detail::None);
    }

    /// A projection with its bias, if the layer has it, and what follows: one kernel, unless adapters add to the product in between.
    pub fn projection(
        &mut self,
        spot: &Spot,
        (weight, bias): (Role, Role),
        x: &Slice,
        out: &Slice,
        (n, k): (usize, usize),
        after: After,
    ) {
        let matrix = self.weight(spot, weight);
        let shift = self.parameter(spot, bias, false);
        let fused = match (&shift, after) {
            _ if self.adapted(spot, weight) => None,
            (Some(_), After::Nothing) => Some(KernelOp::ProjectBias),
            (Some(_), After::Add(_)) => Some(KernelOp::ProjectBiasAdd),
            (Some(_), After::Gelu(_)) => Some(KernelOp::ProjectBiasGelu),
            (None, After::Add(_)) => Some(KernelOp::ProjectAdd),
            (None, After::Nothing | After::Gelu(_)) => None,
        };
        if let Some(op) = fused {
            let rest = match after {
                After::Nothing => [None, Some(out)],
                After::Add(residual) => [Some(residual), Some(out)],
                After::Gelu(activated) => [Some(out), Some(activated)],
            };
            let operands = [x.clone(), matrix].into_iter().chain(shift).chain(rest.into_iter().flatten().cloned());
            self.push(op, &[self.shape.rows, n, k], operands.collect::<SmallVec<[Slice; 7]>>(), Detail::None);
            return;
        }
        self.project(x, matrix, out, n, k);
        self.adapt(spot, weight, x, out, (n, k));
        self.bias(spot, bias, out, n);
        match after {
            After::Nothing => {}
            After::Add(residual) => self.elements(KernelOp::Add, self.shape.rows * n, [residual, out]),
            After::Gelu(activated) => self.elements(KernelOp::Gelu, self.shape.rows * n, [out, activated]),
        }
    }

    /// Adds a bias, if the layer has it.
    pub fn bias(&mut self, spot: &Spot, role: Role, x: &Slice, cols: usize) {
        if let Some(bias) = self.parameter(spot, role, false) {
            self.push(KernelOp::AddBias, &[self.shape.rows, cols], [x.clone(), bias], Detail::None);
        }
    }

    /// Accumulates the gradient of a bias, if the layer has it and it is trained.
    pub fn bias_gradient(&mut self, spot: &Spot, role: Role, dy: &Slice, cols: usize) {
        if let Some(bias) = self.gradient(spot, role) {
            self.push(KernelOp::BiasGradient, &[self.shape.rows, cols], [dy.clone(), bias], Detail::None);
        }
    }

    /// `out = norm(x)`.
    pub fn norm(&mut self, spot: &Spot, (weight, bias): (Role, Role), x: &Slice, out: &Slice, stats: &Slice) {
        let dims = [self.shape.rows, self.shape.hidden];
        let gamma = self.weight(spot, weight);
        let op = if self.shape.layer_norm { KernelOp::LayerNorm } else { KernelOp::RmsNorm };
        let beta = self.parameter(spot, bias, false);
        let operands: SmallVec<[Slice; 7]> =
            [x.clone(), gamma].into_iter().chain(beta).chain([out.clone(), stats.clone()]).collect();
        self.push(op, &dims, operands, Detail::Epsilon(self.workload.model.norm_epsilon));
    }

    /// Accumulates the gradients of a norm: of its weights, where they are trained, and of its input into `dx`.
    pub fn norm_backward(
        &mut self,
        spot: &Spot,
        (weight, bias): (Role, Role),
        (x, stats): (&Slice, &Slice),
        dy: &Slice,
        dx: &Slice,
    ) {
        let dims = [self.shape.rows, self.shape.hidden];
        let (for_weight, for_input) = if self.shape.layer_norm {
            (KernelOp::LayerNormBackwardWeight, KernelOp::LayerNormBackwardInput)
        } else {
            (KernelOp::RmsNormBackwardWeight, KernelOp::RmsNormBackwardInput)
        };
        if let Some(d_gamma) = self.gradient(spot, weight) {
            let d_beta = self.gradient(spot, bias);
            let operands: SmallVec<[Slice; 7]> =
                [x.clone(), stats.clone(), dy.clone(), d_gamma].into_iter().chain(d_beta).collect();
            self.push(for_weight, &dims, operands, Detail::None);
        }
        let gamma = self.weight(spot, weight);
        self.push(for_input, &dims, [x.clone(), gamma, stats.clone(), dy.clone(), dx.clone()], Detail::None);
    }

    /// An operator over elements; `len` of them.
    pub fn elements<const N: usize>(&mut self, op: KernelOp, len: usize, operands: [&Slice; N]) {
        self.push(op, &[len], operands.map(Clone::clone), Detail::None);
    }

    fn operands(&self, microbatches: u32) -> Vec<Operand> {
        let mut used: BTreeMap<Tensor, u64> = BTreeMap::new();
        for slice in self.steps.iter().flat_map(|step| &step.operands) {
            let end = used.entry(slice.tensor).or_default();
            *end = (*end).max(slice.end());
        }
        let sized = used.into_keys().map(|tensor| {
            let (class, bytes) = self.size(tensor, microbatches);
            Operand { tensor, class, bytes }
        });
        sized.collect()
    }

    /// Class and bytes of a tensor.
    fn size(&self, tensor: Tensor, microbatches: u32) -> (MemoryClass, u64) {
        let kept = |unit: u16, holder| held(&self.shape, self.workload.recompute, self.unit_spots(unit), holder) as u64;
        let of = |elements: usize| self.shape.precision.element(tensor).bytes() * elements as u64;
        let whole = |stage, unit| of(self.held.len(stage, unit, Array::Trained));
        match tensor {
            Tensor::Parameters { stage, unit } | Tensor::ParameterShard { stage, unit } => {
                (MemoryClass::Parameter, whole(stage, unit))
            }
            Tensor::Frozen { stage, unit } | Tensor::FrozenShard { stage, unit } => {
                (MemoryClass::Parameter, of(self.held.len(stage, unit, Array::Frozen)))
            }
            Tensor::Gradients { stage, unit }
            | Tensor::GradientShard { stage, unit }
            | Tensor::SyncedGradients { stage, unit } => (MemoryClass::Gradient, whole(stage, unit)),
            Tensor::Master { stage, unit } | Tensor::Kept { stage, unit } => {
                (MemoryClass::OptimizerState, whole(stage, unit))
            }
            Tensor::Moments { stage, unit } => (MemoryClass::OptimizerState, 2 * whole(stage, unit)),
            Tensor::Tokens { .. } | Tensor::Targets { .. } => (MemoryClass::Activation, of(self.shape.rows)),
            Tensor::StageInput { .. }
            | Tensor::StageOutput { .. }
            | Tensor::OutputGradient { .. }
            | Tensor::InputGradient { .. } => (MemoryClass::Activation, of(self.shape.rows * self.shape.hidden)),
            Tensor::Checkpoint { unit, .. } => (MemoryClass::Activation, kept(unit, Holder::Checkpoint)),
            Tensor::SavedForB { unit, .. } => (MemoryClass::Activation, kept(unit, Holder::UntilB)),
            Tensor::SavedForW { unit, .. } => (MemoryClass::Activation, kept(unit, Holder::UntilW)),
            Tensor::DeltaForW { unit, .. } => (MemoryClass::Activation, kept(unit, Holder::Delta)),
            Tensor::Losses => (MemoryClass::Activation, of(microbatches as usize)),
            Tensor::GradientNorm => (MemoryClass::CommScratch, of(1)),
            Tensor::Workspace { .. } => (MemoryClass::Workspace, self.workspace.highest as u64),
        }
    }
}

/// Elements `range` of a slice.
pub(crate) fn part(slice: &Slice, range: Range<usize>) -> Slice {
    Slice { range: slice.range.start + range.start..slice.range.start + range.end, ..slice.clone() }
}

/// Whether an operator adds to gradients of parameters.
fn adds_to_gradients(op: KernelOp) -> bool {
    matches!(
        op,
        KernelOp::MatmulTn
            | KernelOp::BiasGradient
            | KernelOp::RmsNormBackwardWeight
            | KernelOp::LayerNormBackwardWeight
            | KernelOp::EmbeddingBackward
            | KernelOp::HeadBackwardWeight
            | KernelOp::HeadBackward
    )
}
