//! The state of training by global parameter name, gathered from the ranks that hold it and given back to them. Names
//! and whole tensors do not depend on the layout, so neither does what is written with them.

use crate::cpu::{CpuHands, Job};
use crate::error::ExecError;
use crate::initialise::fill;
use crate::numbers;
use crate::seam::Parameter;
use paceline_kernels::{DType, View};
use paceline_sim::program::Tensor;
use paceline_sim::units::{OpId, RankId, StageId};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A parameter and its AdamW moments, whole.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TensorState {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
    pub first: Vec<f32>,
    pub second: Vec<f32>,
}

/// All parameters by name.
pub(crate) type ModelState = BTreeMap<String, TensorState>;

/// A buffer that holds weights of a unit.
struct Weights {
    stage: StageId,
    /// The array as passes read it.
    whole: Tensor,
    view: View,
    /// Which elements of the unit's array.
    holds: Range<usize>,
}

impl Weights {
    /// Whether they are rounded copies of those that the optimizer updates.
    fn are_rounded(&self) -> bool {
        matches!(self.whole, Tensor::Parameters { .. }) && self.view.dtype() != DType::F32
    }
}

/// Copies the elements that two parts of one array have in common.
fn copy_overlap(from: &[f32], from_holds: &Range<usize>, to: &mut [f32], to_holds: &Range<usize>) {
    let (start, end) = (from_holds.start.max(to_holds.start), from_holds.end.min(to_holds.end));
    if start < end {
        let from = &from[start - from_holds.start..end - from_holds.start];
        to[start - to_holds.start..end - to_holds.start].copy_from_slice(from);
    }
}

/// The hands of all ranks, between steps.
pub(crate) struct Holders<'h, 'a> {
    pub job: &'h Job<'a>,
    pub hands: &'h [Mutex<CpuHands<'a>>],
}

impl<'h, 'a> Holders<'h, 'a> {
    pub fn lock(&self, rank: usize) -> MutexGuard<'h, CpuHands<'a>> {
        self.hands[rank].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `visit` for every buffer of weights that a rank keeps through all steps, in order of rank, with the unit's
    /// parameters.
    fn for_each_piece(
        &self,
        mut visit: impl FnMut(&CpuHands<'a>, &Weights, &[Parameter]) -> Result<(), paceline_kernels::KernelError>,
    ) -> Result<(), ExecError> {
        for (r, rank) in self.job.program.ranks.iter().enumerate() {
            let hands = self.lock(r);
            for buffer in &rank.persistent {
                let held = &rank.buffers[buffer.index()];
                let passes = self.job.passes;
                let (stage, whole, parameters) = match held.tensor {
                    Tensor::Parameters { stage, unit }
                    | Tensor::ParameterShard { stage, unit }
                    | Tensor::Master { stage, unit } => {
                        (stage, Tensor::Parameters { stage, unit }, passes.parameters(stage, unit))
                    }
                    Tensor::Frozen { stage, unit } | Tensor::FrozenShard { stage, unit } => {
                        (stage, Tensor::Frozen { stage, unit }, passes.frozen(stage, unit))
                    }
                    _ => continue,
                };
                let Some(view) = hands.persistent(held.tensor) else { continue };
                let weights = Weights { stage, whole, view, holds: held.holds() };
                visit(&hands, &weights, &parameters).map_err(|source| ExecError::Kernel {
                    rank: RankId(r as u32),
                    op: OpId(0),
                    source,
                })?;
            }
        }
        Ok(())
    }

    /// Calls `visit` for every unit that a rank holds, in order of rank, with its parameters.
    fn for_each_unit(
        &self,
        mut visit: impl FnMut(&CpuHands<'a>, StageId, u16, &[Parameter]) -> Result<(), paceline_kernels::KernelError>,
    ) -> Result<(), ExecError> {
        for (r, rank) in self.job.program.ranks.iter().enumerate() {
            let hands = self.lock(r);
            for buffer in &rank.persistent {
                let Tensor::Moments { stage, unit } = rank.buffers[buffer.index()].tensor else { continue };
                let parameters = self.job.passes.parameters(stage, unit);
                visit(&hands, stage, unit, &parameters).map_err(|source| ExecError::Kernel {
                    rank: RankId(r as u32),
                    op: OpId(0),
                    source,
                })?;
            }
        }
        Ok(())
    }

    /// Sets parameters to their first values.
    pub fn initialise(&self, seed: u64) -> Result<(), ExecError> {
        self.for_each_piece(|_, weights, parameters| {
            let len = parameters.iter().map(|parameter| parameter.range.end).max().unwrap_or(0);
            let mut values = vec![0.0; len];
            for parameter in parameters {
                fill(parameter.start, &parameter.name, seed, &mut values[parameter.range.clone()]);
            }
            self.write(weights.view, &values[weights.holds.clone()])
        })
    }

    /// Everything that training changes.
    pub fn gather(&self) -> Result<ModelState, ExecError> {
        let mut state = ModelState::new();
        self.for_each_piece(|_, weights, parameters| {
            if weights.are_rounded() {
                return Ok(());
            }
            let values = self.read(weights.view)?;
            for parameter in parameters {
                let range = parameter.range.clone();
                let entry = state.entry(parameter.name.clone()).or_insert_with(|| TensorState {
                    shape: parameter.shape.clone(),
                    values: vec![0.0; range.len()],
                    first: vec![0.0; range.len()],
                    second: vec![0.0; range.len()],
                });
                copy_overlap(&values, &weights.holds, &mut entry.values, &range);
            }
            Ok(())
        })?;
        self.for_each_unit(|hands, stage, unit, parameters| {
            let own = hands.update_range(stage, unit).unwrap_or_default();
            let Some(view) = hands.persistent(Tensor::Moments { stage, unit }) else { return Ok(()) };
            let moments = self.read(view)?;
            let (first, second) = moments.split_at(own.len());
            for parameter in parameters {
                if let Some(entry) = state.get_mut(&parameter.name) {
                    copy_overlap(first, &own, &mut entry.first, &parameter.range);
                    copy_overlap(second, &own, &mut entry.second, &parameter.range);
                }
            }
            Ok(())
        })?;
        Ok(state)
    }

    /// Gives every rank its part of a state. `missing` is told what the state lacks or has in another shape.
    pub fn scatter(
        &self,
        state: &ModelState,
        missing: impl Fn(&Parameter, Option<&TensorState>) -> ExecError,
    ) -> Result<(), ExecError> {
        let mut wrong = None;
        let found = |parameter: &Parameter| state.get(&parameter.name).filter(|found| found.shape == parameter.shape);
        self.for_each_piece(|_, weights, parameters| {
            let mut values = vec![0.0; weights.holds.len()];
            for parameter in parameters {
                match found(parameter) {
                    Some(found) => copy_overlap(&found.values, &parameter.range, &mut values, &weights.holds),
                    None => {
                        wrong.get_or_insert_with(|| missing(parameter, state.get(&parameter.name)));
                    }
                }
            }
            self.write(weights.view, &values)
        })?;
        self.for_each_unit(|hands, stage, unit, parameters| {
            let own = hands.update_range(stage, unit).unwrap_or_default();
            let Some(view) = hands.persistent(Tensor::Moments { stage, unit }) else { return Ok(()) };
            let (mut first, mut second) = (vec![0.0; own.len()], vec![0.0; own.len()]);
            for parameter in parameters {
                if let Some(found) = found(parameter) {
                    copy_overlap(&found.first, &parameter.range, &mut first, &own);
                    copy_overlap(&found.second, &parameter.range, &mut second, &own);
                }
            }
            self.write(view.slice(0, own.len()), &first)?;
            self.write(view.slice(own.len(), own.len()), &second)
        })?;
        wrong.map_or(Ok(()), Err)
    }

    /// The whole weights of every unit of some stages that no rank keeps whole, by the tensor that passes read.
    pub fn assemble(&self, stages: &[StageId]) -> Result<BTreeMap<Tensor, Vec<f32>>, ExecError> {
        let mut all: BTreeMap<Tensor, Vec<f32>> = BTreeMap::new();
        self.for_each_piece(|_, weights, parameters| {
            let len = parameters.iter().map(|parameter| parameter.range.end).max().unwrap_or(0);
            if stages.contains(&weights.stage) && weights.holds != (0..len) {
                let whole = all.entry(weights.whole).or_insert_with(|| vec![0.0; len]);
                copy_overlap(&self.read(weights.view)?, &weights.holds, whole, &(0..len));
            }
            Ok(())
        })?;
        Ok(all)
    }

    /// The gradients of the last step, if they were captured.
    pub fn gradients(&self) -> Result<BTreeMap<String, Vec<f32>>, ExecError> {
        let mut all: BTreeMap<String, Vec<f32>> = BTreeMap::new();
        self.for_each_unit(|hands, stage, unit, parameters| {
            let Some((own, values)) = hands.gradients.get(&(stage, unit)) else { return Ok(()) };
            for parameter in parameters {
                let range = &parameter.range;
                let entry = all.entry(parameter.name.clone()).or_insert_with(|| vec![f32::NAN; range.len()]);
                copy_overlap(values, own, entry, range);
            }
            Ok(())
        })?;
        Ok(all)
    }

    fn read(&self, view: View) -> Result<Vec<f32>, paceline_kernels::KernelError> {
        let mut bytes = vec![0; view.bytes()];
        // SAFETY: between steps nobody else touches the ranks' buffers.
        unsafe { self.job.device.download(view, &mut bytes) }?;
        Ok(numbers::values(&bytes, view.dtype()))
    }

    fn write(&self, view: View, values: &[f32]) -> Result<(), paceline_kernels::KernelError> {
        let bytes = numbers::bytes(values, view.dtype());
        // SAFETY: between steps nobody else touches the ranks' buffers.
        unsafe { self.job.device.upload(&bytes, view) }
    }
}
