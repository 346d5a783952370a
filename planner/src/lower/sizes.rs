//! What passes touch, with sizes: asked once per kind of pass, and renamed for each microbatch.

use super::{Blueprint, LowerError};
use crate::order::{ComputeOrder, Placement};
use paceline_sim::model::parameters::{frozen_parameters, tied_matrix, unit_parameters};
use paceline_sim::model::{ModelPass, Operand};
use paceline_sim::program::{MemoryClass, OpKind, Pass, Precision, Stage, Tensor, TransformerWorkload};
use paceline_sim::units::{MicrobatchId, StageId};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::rc::Rc;

/// What passes hold.
#[derive(Debug, Clone, PartialEq)]
pub enum Substance {
    /// The layers of a transformer. Whether a tied matrix is held once is decided by the placement.
    Transformer(TransformerWorkload),
    /// Given sizes by stage, for a schedule under study.
    Abstract(Vec<AbstractStage>),
}

/// What one stage holds, in bytes; see [`crate::replay::StageMemory`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct AbstractStage {
    /// Parameters, rounded up to whole 32-bit words; gradients take as much and moments twice as much. A program without parameters
    /// has no optimizer.
    pub parameters: u64,
    /// The hidden state of a microbatch, as messages carry it.
    pub message: u64,
    /// Held from F to R, when the order recomputes.
    pub checkpoint: u64,
    /// Held from F (or R) to B.
    pub until_b: u64,
    /// Held from B to W.
    pub until_w: u64,
}

/// The parameters of a unit, in elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct UnitSize {
    pub unit: u16,
    /// With gradients and moments.
    pub trained: u64,
    /// Without.
    pub frozen: u64,
}

impl AbstractStage {
    /// Parameters, 32-bit.
    fn elements(&self) -> u64 {
        self.parameters.div_ceil(4)
    }
}

/// The key of a pass without its microbatch.
type PassKey = (Pass, StageId, u16, u16);

pub(super) struct Sizes {
    pub substance: Substance,
    pub placement: Placement,
    stages: Vec<Stage>,
    microbatches: u32,
    recomputes: bool,
    known: HashMap<PassKey, Rc<[Operand]>>,
}

impl Sizes {
    pub fn new(blueprint: &Blueprint, order: &ComputeOrder) -> Sizes {
        let placement = order.placement.clone();
        let mut substance = blueprint.substance.clone();
        if let Substance::Transformer(workload) = &mut substance {
            let per_copy = placement.stages_per_copy();
            let ends = |copy: usize| {
                let (first, last) = (copy * per_copy, (copy + 1) * per_copy - 1);
                placement.device_of_stage[first] == placement.device_of_stage[last]
            };
            workload.tied_on_one_rank = (0..placement.copies as usize).all(ends);
        }
        Sizes {
            substance,
            placement,
            stages: blueprint.stages.clone(),
            microbatches: order.microbatches,
            recomputes: order.actions.iter().flatten().any(|action| action.pass == Pass::R),
            known: HashMap::new(),
        }
    }

    pub fn validate(&self) -> Result<(), LowerError> {
        match &self.substance {
            Substance::Transformer(workload) => Ok(workload.validate(&self.stages)?),
            Substance::Abstract(_) => Ok(()),
        }
    }

    pub fn units(&self, stage: StageId) -> u16 {
        self.stages[stage.index()].units.len() as u16
    }

    /// The operands of a pass, for microbatch 0.
    pub fn operands(&mut self, pass: Pass, stage: StageId, first: u16, end: u16) -> Rc<[Operand]> {
        if let Some(known) = self.known.get(&(pass, stage, first, end)) {
            return Rc::clone(known);
        }
        let found: Rc<[Operand]> = match &self.substance {
            Substance::Transformer(workload) => {
                let kind = OpKind::Compute { pass, stage, microbatch: MicrobatchId(0), first, end };
                ModelPass::new(workload, &self.stages, self.microbatches, &kind).operands.into()
            }
            Substance::Abstract(sizes) => self.given(pass, stage, sizes[stage.index()]).into(),
        };
        self.known.insert((pass, stage, first, end), Rc::clone(&found));
        found
    }

    /// The operands of a whole abstract stage.
    fn given(&self, pass: Pass, stage: StageId, sizes: AbstractStage) -> Vec<Operand> {
        let (unit, microbatch) = (0, MicrobatchId(0));
        let saved_for_b = Tensor::SavedForB { stage, unit, microbatch };
        let saved_for_w = Tensor::SavedForW { stage, unit, microbatch };
        let delta = Tensor::DeltaForW { stage, unit, microbatch };
        let checkpoint = Tensor::Checkpoint { stage, unit, microbatch };
        let input = Tensor::StageInput { stage, microbatch };
        let output = Tensor::StageOutput { stage, microbatch };
        let entering = Tensor::OutputGradient { stage, microbatch };
        let leaving = Tensor::InputGradient { stage, microbatch };
        let (first, last) = (self.placement.is_first(stage), self.placement.is_last(stage));
        let kept = |there: bool, tensor, bytes: u64| {
            (there && bytes > 0).then_some(Operand { tensor, class: MemoryClass::Activation, bytes })
        };
        let message = |there: bool, tensor| {
            there.then_some(Operand { tensor, class: MemoryClass::Activation, bytes: sizes.message })
        };
        let until_b_only = sizes.until_b.saturating_sub(sizes.until_w);
        let both = sizes.until_b.min(sizes.until_w);
        let after_b = sizes.until_w.saturating_sub(sizes.until_b);
        let saves = match pass {
            Pass::F => !self.recomputes,
            Pass::R | Pass::B | Pass::BW => true,
            Pass::W => false,
        };
        let backward = matches!(pass, Pass::B | Pass::BW);
        let weights = Operand {
            tensor: Tensor::Parameters { stage, unit },
            class: MemoryClass::Parameter,
            bytes: 4 * sizes.elements(),
        };
        let gradients = Operand {
            tensor: Tensor::Gradients { stage, unit },
            class: MemoryClass::Gradient,
            bytes: 4 * sizes.elements(),
        };
        [
            kept(saves, saved_for_b, until_b_only),
            kept(saves || pass == Pass::W, saved_for_w, both),
            kept(matches!(pass, Pass::B | Pass::W), delta, after_b),
            kept(self.recomputes && matches!(pass, Pass::F | Pass::R), checkpoint, sizes.checkpoint),
            message(pass == Pass::F && !first, input),
            message(pass == Pass::F && !last, output),
            message(backward && !last, entering),
            message(backward && !first, leaving),
            (sizes.parameters > 0 && pass != Pass::W).then_some(weights),
            (sizes.parameters > 0 && matches!(pass, Pass::W | Pass::BW)).then_some(gradients),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    /// The number formats; 32-bit where sizes are given.
    pub fn precision(&self) -> Precision {
        match &self.substance {
            Substance::Transformer(workload) => workload.precision,
            Substance::Abstract(_) => Precision::Fp32,
        }
    }

    /// The units of a stage that have parameters.
    pub fn units_with_parameters(&self, stage: StageId) -> Vec<UnitSize> {
        let all: Vec<UnitSize> = match &self.substance {
            Substance::Transformer(workload) => {
                let of = |unit| UnitSize {
                    unit,
                    trained: unit_parameters(workload, &self.stages, stage, unit) as u64,
                    frozen: frozen_parameters(workload, &self.stages, stage, unit) as u64,
                };
                (0..self.units(stage)).map(of).collect()
            }
            Substance::Abstract(sizes) => {
                vec![UnitSize { unit: 0, trained: sizes[stage.index()].elements(), frozen: 0 }]
            }
        };
        all.into_iter().filter(|unit| unit.trained + unit.frozen > 0).collect()
    }

    /// Bytes of the gradients of the tied matrix in a unit, where two ranks hold it.
    pub fn tied(&self, stage: StageId, unit: u16) -> Option<u64> {
        match &self.substance {
            Substance::Transformer(workload) => {
                let matrix = tied_matrix(workload, &self.stages, stage, unit);
                matrix.map(|(range, _)| workload.precision.gradients().bytes() * range.len() as u64)
            }
            Substance::Abstract(_) => None,
        }
    }

    /// How a rank names a tensor and what it is to it: what leaves a stage for the next on the same rank is the input of
    /// that one; what another rank sends is received.
    pub fn on_rank(&self, operand: Operand, microbatch: MicrobatchId) -> Operand {
        let tensor = match renamed(operand.tensor, microbatch) {
            Tensor::StageOutput { stage, microbatch } if self.stays(stage, true) => {
                Tensor::StageInput { stage: StageId(stage.0 + 1), microbatch }
            }
            Tensor::InputGradient { stage, microbatch } if self.stays(stage, false) => {
                Tensor::OutputGradient { stage: StageId(stage.0 - 1), microbatch }
            }
            other => other,
        };
        let received = match tensor {
            Tensor::StageInput { stage, .. } => !self.placement.is_first(stage) && !self.stays(stage, false),
            Tensor::OutputGradient { stage, .. } => !self.placement.is_last(stage) && !self.stays(stage, true),
            _ => false,
        };
        let class = if received { MemoryClass::ReceivedActivation } else { operand.class };
        Operand { tensor, class, ..operand }
    }

    /// Whether the neighbour of a stage, in forward direction or back, is there and on the same rank.
    fn stays(&self, stage: StageId, forward: bool) -> bool {
        let device = |index: usize| self.placement.device_of_stage[index];
        let own = stage.index();
        match forward {
            true => !self.placement.is_last(stage) && device(own) == device(own + 1),
            false => !self.placement.is_first(stage) && device(own) == device(own - 1),
        }
    }
}

/// The same tensor of another microbatch.
fn renamed(tensor: Tensor, microbatch: MicrobatchId) -> Tensor {
    match tensor {
        Tensor::Tokens { .. } => Tensor::Tokens { microbatch },
        Tensor::Targets { .. } => Tensor::Targets { microbatch },
        Tensor::StageInput { stage, .. } => Tensor::StageInput { stage, microbatch },
        Tensor::StageOutput { stage, .. } => Tensor::StageOutput { stage, microbatch },
        Tensor::OutputGradient { stage, .. } => Tensor::OutputGradient { stage, microbatch },
        Tensor::InputGradient { stage, .. } => Tensor::InputGradient { stage, microbatch },
        Tensor::Checkpoint { stage, unit, .. } => Tensor::Checkpoint { stage, unit, microbatch },
        Tensor::SavedForB { stage, unit, .. } => Tensor::SavedForB { stage, unit, microbatch },
        Tensor::SavedForW { stage, unit, .. } => Tensor::SavedForW { stage, unit, microbatch },
        Tensor::DeltaForW { stage, unit, .. } => Tensor::DeltaForW { stage, unit, microbatch },
        Tensor::Parameters { .. }
        | Tensor::Gradients { .. }
        | Tensor::Moments { .. }
        | Tensor::ParameterShard { .. }
        | Tensor::GradientShard { .. }
        | Tensor::SyncedGradients { .. }
        | Tensor::Master { .. }
        | Tensor::Kept { .. }
        | Tensor::Frozen { .. }
        | Tensor::FrozenShard { .. }
        | Tensor::Losses
        | Tensor::GradientNorm
        | Tensor::Workspace { .. } => tensor,
    }
}
