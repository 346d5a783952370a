//! The passes of a transformer on kernels. What a pass does is stated once, in [`paceline_sim::model`], as a list of steps;
//! here each step becomes a kernel call on the buffers of its op. There is no arithmetic of layers in this crate.

mod call;

use crate::data::Dataset;
use crate::error::ExecError;
use crate::report::{Observer, RunReport};
use crate::run::run_passes;
use crate::seam::{Launch, Operands, Parameter, Passes, Start, TiedCopy};
use crate::settings::RunSettings;
use call::call;
use paceline_kernels::{Device, View};
use paceline_sim::model::parameters::{frozen_layout, tied_matrix, unit_layout};
use paceline_sim::model::{Initial, Layer, ModelPass, ParameterSpec, Trainable, neighbour};
use paceline_sim::program::{MemoryClass, OpKind, Program, Stage, Tensor, TransformerWorkload, Workload};
use paceline_sim::units::StageId;
use std::borrow::Cow;
use std::collections::HashMap;

/// Trains the transformer of a program.
///
/// # Errors
/// See [`ExecError`]: the program must be of a transformer, and pass its static check.
pub fn run(
    program: &Program,
    device: &dyn Device,
    settings: &RunSettings,
    data: &Dataset,
    observer: &mut dyn Observer,
) -> Result<RunReport, ExecError> {
    run_passes(program, &TransformerPasses::new(program)?, device, settings, data, observer)
}

/// A transformer cut into the stages of a program.
pub struct TransformerPasses {
    workload: TransformerWorkload,
    stages: Vec<Stage>,
    microbatches: u32,
    /// What every token's loss weighs in the gradient: the loss is the mean over the global batch.
    scale: f32,
    /// The passes of the program, made ready before time is measured.
    ready: HashMap<OpKindKey, ModelPass>,
}

/// A compute op by what it does.
type OpKindKey = (paceline_sim::program::Pass, StageId, u32, u16, u16);

fn key_of(kind: &OpKind) -> Option<OpKindKey> {
    match *kind {
        OpKind::Compute { pass, stage, microbatch, first, end } => Some((pass, stage, microbatch.0, first, end)),
        _ => None,
    }
}

impl TransformerPasses {
    /// The passes of a program.
    ///
    /// # Errors
    /// When the program is abstract, or its stages do not hold the model.
    pub fn new(program: &Program) -> Result<TransformerPasses, ExecError> {
        let Workload::Transformer(workload) = &program.workload else {
            return Err(ExecError::Program("it is abstract: it has times and sizes, and no model to train".into()));
        };
        workload.validate(&program.stages).map_err(|error| ExecError::Program(error.to_string()))?;
        let replicas = program.ranks.iter().map(|rank| rank.coordinates.data + 1).max().unwrap_or(1);
        let microbatches = program.microbatches;
        let tokens =
            f64::from(replicas) * f64::from(microbatches) * f64::from(workload.micro_batch) * f64::from(workload.seq);
        let mut passes = TransformerPasses {
            workload: workload.clone(),
            stages: program.stages.clone(),
            microbatches,
            scale: (1.0 / tokens) as f32,
            ready: HashMap::new(),
        };
        for op in program.ranks.iter().flat_map(|rank| &rank.ops) {
            let Some(key) = key_of(&op.kind) else { continue };
            if !passes.ready.contains_key(&key) {
                let pass = ModelPass::new(workload, &passes.stages, microbatches, &op.kind);
                passes.ready.insert(key, pass);
            }
        }
        Ok(passes)
    }

    fn pass(&self, kind: &OpKind) -> Cow<'_, ModelPass> {
        match key_of(kind).and_then(|key| self.ready.get(&key)) {
            Some(pass) => Cow::Borrowed(pass),
            None => Cow::Owned(ModelPass::new(&self.workload, &self.stages, self.microbatches, kind)),
        }
    }
}

/// The operands of an op; what a stage hands to its neighbour on the same rank goes by the neighbour's name.
struct HandedOver<'a> {
    operands: &'a dyn Operands,
    stages: &'a [Stage],
}

impl HandedOver<'_> {
    fn name(&self, tensor: Tensor) -> Tensor {
        match neighbour(self.stages, tensor) {
            Some(other) if !self.operands.has(tensor) && self.operands.has(other) => other,
            _ => tensor,
        }
    }
}

impl Operands for HandedOver<'_> {
    fn view(&self, tensor: Tensor) -> Result<View, ExecError> {
        self.operands.view(self.name(tensor))
    }

    fn has(&self, tensor: Tensor) -> bool {
        self.operands.has(self.name(tensor))
    }
}

impl Passes for TransformerPasses {
    fn run(&self, kind: &OpKind, launch: &dyn Launch, operands: &dyn Operands) -> Result<(), ExecError> {
        let operands = HandedOver { operands, stages: &self.stages };
        for step in &self.pass(kind).steps {
            launch.launch(call(step, &operands, self.scale)?)?;
        }
        Ok(())
    }

    fn parameters(&self, stage: StageId, unit: u16) -> Vec<Parameter> {
        unit_layout(&self.workload, &self.stages, stage, unit).into_iter().map(parameter).collect()
    }

    fn frozen(&self, stage: StageId, unit: u16) -> Vec<Parameter> {
        frozen_layout(&self.workload, &self.stages, stage, unit).into_iter().map(parameter).collect()
    }

    fn tied_copy(&self, stage: StageId, unit: u16) -> Option<TiedCopy> {
        let copy = tied_matrix(&self.workload, &self.stages, stage, unit);
        copy.map(|(range, counted)| TiedCopy { range, counted })
    }

    fn operands(&self, kind: &OpKind) -> Vec<(Tensor, MemoryClass, u64)> {
        self.pass(kind).operands.iter().map(|operand| (operand.tensor, operand.class, operand.bytes)).collect()
    }

    fn has_loss(&self, stage: StageId) -> bool {
        let last = self.stages.get(stage.index()).and_then(|stage| stage.units.last());
        last.is_some_and(|unit| unit.layers.last() == Some(&Layer::Head))
    }

    fn sequences(&self) -> u32 {
        self.workload.micro_batch
    }

    fn seq(&self) -> u32 {
        self.workload.seq
    }

    fn vocab(&self) -> u32 {
        self.workload.model.vocab
    }

    /// The architecture without its name, and its adapters: how it is cut does not matter, checkpoints hold whole
    /// parameters, frozen or not.
    fn digest(&self) -> String {
        let model = paceline_sim::model::ModelConfig { name: String::new(), ..self.workload.model.clone() };
        match &self.workload.trainable {
            Trainable::Full | Trainable::Share(_) => format!("{model:?}"),
            adapters => format!("{model:?} {adapters}"),
        }
    }
}

fn parameter(spec: ParameterSpec) -> Parameter {
    Parameter {
        name: spec.name,
        shape: spec.shape,
        range: spec.range,
        start: match spec.initial {
            Initial::Normal { deviation } => Start::Normal { deviation },
            Initial::Constant(value) => Start::Constant(value),
        },
        decay: spec.decay,
    }
}

#[cfg(test)]
mod tests;
