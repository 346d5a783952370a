//! Where layers lie: a layer together with its stage and unit, and which unit holds the matrix of a tied model.

use super::Layer;
use crate::program::{Stage, TransformerWorkload};
use crate::units::StageId;

/// A layer in its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Spot {
    pub stage: StageId,
    pub unit: u16,
    /// Its place within the unit.
    pub index: u16,
    pub layer: Layer,
    /// It is the first layer of its stage, so that its input is what the stage receives.
    pub opens_stage: bool,
    /// It is the last layer of its stage, so that the gradient of its output is what the stage receives.
    pub closes_stage: bool,
}

/// All layers of a stage, in forward order.
pub(crate) fn spots(stages: &[Stage], stage: StageId) -> Vec<Spot> {
    let units = &stages[stage.index()].units;
    let mut all: Vec<Spot> = Vec::new();
    for (unit, held) in units.iter().enumerate() {
        for (index, &layer) in held.layers.iter().enumerate() {
            let opens_stage = all.is_empty();
            all.push(Spot { stage, unit: unit as u16, index: index as u16, layer, opens_stage, closes_stage: false });
        }
    }
    if let Some(last) = all.last_mut() {
        last.closes_stage = true;
    }
    all
}

/// Whether a stage begins with the embedding, or ends with the head.
pub(crate) fn holds(stage: &Stage, layer: Layer) -> bool {
    stage.units.iter().any(|unit| unit.layers.contains(&layer))
}

/// The unit with the embedding that belongs to the head of `stage`: of the same copy of the model.
pub(crate) fn embedding_of(stages: &[Stage], stage: StageId) -> Option<(StageId, u16)> {
    stages[..=stage.index()].iter().enumerate().rev().find_map(|(number, held)| {
        let unit = held.units.iter().position(|unit| unit.layers.contains(&Layer::Embedding))?;
        Some((StageId(number as u16), unit as u16))
    })
}

/// How the head gets its matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OutputMatrix {
    /// It has its own parameters.
    Own,
    /// It has a copy of the embedding matrix, kept equal by summing the gradients of both.
    Copy,
    /// It reads the matrix of the embedding's unit, on the same rank.
    Shared { stage: StageId, unit: u16 },
}

/// Where the matrix of the head of `stage` lies. A tied matrix is held once where embedding and head are on one rank
/// (which a common stage implies), twice elsewhere.
pub(crate) fn output_matrix(workload: &TransformerWorkload, stages: &[Stage], stage: StageId) -> OutputMatrix {
    if !workload.model.tied_embeddings {
        return OutputMatrix::Own;
    }
    match embedding_of(stages, stage) {
        Some((at, unit)) if at == stage || workload.tied_on_one_rank => OutputMatrix::Shared { stage: at, unit },
        _ => OutputMatrix::Copy,
    }
}
