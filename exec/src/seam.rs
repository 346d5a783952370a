//! What a model gives to the executor, and what the executor gives to a model's passes. The executor knows neither layers
//! nor shapes; the passes know neither threads nor buffers.

use crate::error::ExecError;
use paceline_kernels::{Call, View};
use paceline_sim::program::{MemoryClass, OpKind, Tensor};
use paceline_sim::units::StageId;
use std::ops::Range;

/// Runs kernel calls on a rank's device, and times them.
pub trait Launch {
    /// Runs a call to its end. Its views must come from the [`Operands`] of the same op.
    fn launch(&self, call: Call) -> Result<(), ExecError>;
}

/// Finds the operands of an op by name.
pub trait Operands {
    /// The whole buffer of a tensor, in its elements ([`paceline_sim::program::Precision::element`]).
    /// Any [`Tensor::Workspace`] names the workspace of the op.
    ///
    /// # Errors
    /// [`ExecError::Undeclared`] when the op does not declare the tensor in its `uses`.
    fn view(&self, tensor: Tensor) -> Result<View, ExecError>;

    /// Whether the op declares the tensor.
    fn has(&self, tensor: Tensor) -> bool;
}

/// How a parameter starts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Start {
    /// Independent normal values of mean zero.
    Normal { deviation: f64 },
    /// All the same.
    Constant(f32),
}

/// A parameter within the flat buffer of a unit.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameter {
    /// The same in every layout, for example `blocks.3.mlp.down.weight`.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// Where it lies, in elements.
    pub range: Range<usize>,
    /// Its first value.
    pub start: Start,
    /// Weight decay pulls it towards zero.
    pub decay: bool,
}

/// The copy of a tied embedding matrix that a unit holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TiedCopy {
    /// Where it lies in the unit's flat buffer, in elements.
    pub range: Range<usize>,
    /// The gradient norm counts this copy; the other is left out.
    pub counted: bool,
}

/// The passes of a model over the stages of a program.
pub trait Passes: Sync {
    /// Runs a [`OpKind::Compute`].
    fn run(&self, kind: &OpKind, launch: &dyn Launch, operands: &dyn Operands) -> Result<(), ExecError>;

    /// Trained parameters of a unit in the order of its flat buffer, which they fill without gaps.
    fn parameters(&self, stage: StageId, unit: u16) -> Vec<Parameter>;

    /// Frozen parameters of a unit, likewise.
    fn frozen(&self, stage: StageId, unit: u16) -> Vec<Parameter>;

    /// The copy of a tied embedding matrix in a unit, if any.
    fn tied_copy(&self, stage: StageId, unit: u16) -> Option<TiedCopy>;

    /// What a compute op touches, with sizes in bytes.
    fn operands(&self, kind: &OpKind) -> Vec<(Tensor, MemoryClass, u64)>;

    /// Whether the forward of this stage ends with the loss.
    fn has_loss(&self, stage: StageId) -> bool;

    /// Sequences of a microbatch.
    fn sequences(&self) -> u32;

    /// Tokens of a sequence.
    fn seq(&self) -> u32;

    /// Size of the vocabulary.
    fn vocab(&self) -> u32;

    /// A text that changes whenever checkpoints of the model are not interchangeable.
    fn digest(&self) -> String;
}
