//! The state of training by global parameter name, gathered from the ranks that hold it and given back to them. Names
//! and whole tensors do not depend on the layout, so neither does what is written with them.

use crate::cpu::{CpuHands, Job};
use crate::error::ExecError;
use crate::initialise::fill;
use crate::numbers;
use crate::processes::share::{UNKNOWN, is_unknown, put_together};
use crate::seam::Parameter;
use paceline_kernels::{DType, View};
use paceline_sim::program::{OpKind, Payload, Tensor};
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

/// The hands of all ranks that this process runs, between steps.
pub(crate) struct Holders<'h, 'a> {
    pub job: &'h Job<'a>,
    pub hands: &'h [Mutex<CpuHands<'a>>],
}

impl<'h, 'a> Holders<'h, 'a> {
    /// The hands of a rank that this process runs.
    pub fn lock(&self, rank: usize) -> MutexGuard<'h, CpuHands<'a>> {
        let place = if self.job.mesh.is_some() { 0 } else { rank };
        self.hands[place].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The ranks that this process runs.
    pub fn hosted(&self) -> impl Iterator<Item = usize> {
        (0..self.job.program.ranks.len()).filter(|&rank| self.job.hosts(rank))
    }

    /// Calls `visit` for every buffer of weights that a rank keeps through all steps, in order of rank, with the unit's
    /// parameters.
    fn for_each_piece(
        &self,
        mut visit: impl FnMut(&CpuHands<'a>, &Weights, &[Parameter]) -> Result<(), paceline_kernels::KernelError>,
    ) -> Result<(), ExecError> {
        for r in self.hosted() {
            let (hands, rank) = (self.lock(r), &self.job.program.ranks[r]);
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
        for r in self.hosted() {
            let (hands, rank) = (self.lock(r), &self.job.program.ranks[r]);
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

    /// Whether updated weights are gathered at the begin of the next step, so that between steps a rank has only those that it
    /// updates itself.
    fn gathers_late(&self) -> bool {
        self.job.program.ranks.iter().any(|rank| {
            let first = rank.ops.iter().position(|op| match op.kind {
                OpKind::Collective { payload: Payload::Parameters { .. }, buffer, .. } => {
                    rank.persistent.contains(&buffer)
                }
                _ => false,
            });
            let update = rank.ops.iter().position(|op| matches!(op.kind, OpKind::Optimizer { .. }));
            first.zip(update).is_some_and(|(first, update)| first < update)
        })
    }

    /// Gives every rank all the weights that it keeps as they are now, where their gather belongs to the next step.
    pub fn refresh(&self) -> Result<(), ExecError> {
        if !self.gathers_late() {
            return Ok(());
        }
        if self.job.mesh.is_some() {
            return Err(ExecError::Setting {
                key: "late_gather",
                value: "true".into(),
                allowed: "false where several processes evaluate".into(),
            });
        }
        let state = self.gather()?;
        self.scatter(&state, |parameter, _| ExecError::Program(format!("nobody updates {}", parameter.name)))
    }

    /// Everything that training changes: in the first process; the others give what they hold and get nothing.
    pub fn gather(&self) -> Result<ModelState, ExecError> {
        let mut state = self.gather_own()?;
        let Some(mesh) = self.job.mesh else { return Ok(state) };
        let mut arrays = BTreeMap::new();
        for (name, tensor) in &mut state {
            for (kind, values) in [("p", &mut tensor.values), ("m", &mut tensor.first), ("v", &mut tensor.second)] {
                arrays.insert(format!("{kind} {name}"), std::mem::take(values));
            }
        }
        put_together(mesh, 0, &mut arrays)?;
        if mesh.rank() > 0 {
            return Ok(ModelState::new());
        }
        let shapes = self.shapes();
        let mut whole = ModelState::new();
        for (name, shape) in shapes {
            let mut take = |kind| {
                let mut values = arrays.remove(&format!("{kind} {name}")).unwrap_or_default();
                // What nobody holds is zero: moments of frozen parameters.
                values.iter_mut().filter(|value| is_unknown(**value)).for_each(|value| *value = 0.0);
                values
            };
            let (values, first, second) = (take("p"), take("m"), take("v"));
            whole.insert(name, TensorState { shape, values, first, second });
        }
        Ok(whole)
    }

    /// The shape of every parameter of the program, by name.
    fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let stages = (0u16..).map(StageId).zip(&self.job.program.stages);
        let units = stages.flat_map(|(stage, held)| (0..held.units.len() as u16).map(move |unit| (stage, unit)));
        let passes = self.job.passes;
        let parameters = units
            .flat_map(|(stage, unit)| passes.parameters(stage, unit).into_iter().chain(passes.frozen(stage, unit)));
        parameters.map(|parameter| (parameter.name, parameter.shape)).collect()
    }

    /// What this process holds of everything that training changes, of trained weights what its ranks update themselves; where
    /// there are others, the rest is [`UNKNOWN`].
    fn gather_own(&self) -> Result<ModelState, ExecError> {
        let mut state = ModelState::new();
        let blank = if self.job.mesh.is_some() { UNKNOWN } else { 0.0 };
        self.for_each_piece(|hands, weights, parameters| {
            if weights.are_rounded() {
                return Ok(());
            }
            let updated = match weights.whole {
                Tensor::Parameters { stage, unit } => hands.update_range(stage, unit).unwrap_or_default(),
                _ => weights.holds.clone(),
            };
            let own = updated.start.max(weights.holds.start)..updated.end.min(weights.holds.end);
            if own.is_empty() {
                return Ok(());
            }
            let values = self.read(weights.view.slice(own.start - weights.holds.start, own.len()))?;
            for parameter in parameters {
                let range = parameter.range.clone();
                let entry = state.entry(parameter.name.clone()).or_insert_with(|| TensorState {
                    shape: parameter.shape.clone(),
                    values: vec![blank; range.len()],
                    first: vec![blank; range.len()],
                    second: vec![blank; range.len()],
                });
                copy_overlap(&values, &own, &mut entry.values, &range);
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

    /// The weights of every unit of some stages that no rank keeps whole, by the tensor that passes read: what this process holds of
    /// them, the rest [`UNKNOWN`].
    pub fn assemble(&self, stages: &[StageId]) -> Result<BTreeMap<Tensor, Vec<f32>>, ExecError> {
        let mut all: BTreeMap<Tensor, Vec<f32>> = BTreeMap::new();
        self.for_each_piece(|_, weights, parameters| {
            let len = parameters.iter().map(|parameter| parameter.range.end).max().unwrap_or(0);
            if stages.contains(&weights.stage) && weights.holds != (0..len) {
                let whole = all.entry(weights.whole).or_insert_with(|| vec![UNKNOWN; len]);
                copy_overlap(&self.read(weights.view)?, &weights.holds, whole, &(0..len));
            }
            Ok(())
        })?;
        Ok(all)
    }

    /// The gradients of the last step, if they were captured: in the first process.
    pub fn gradients(&self) -> Result<BTreeMap<String, Vec<f32>>, ExecError> {
        let mut all: BTreeMap<String, Vec<f32>> = BTreeMap::new();
        self.for_each_unit(|hands, stage, unit, parameters| {
            let Some((own, values)) = hands.gradients.get(&(stage, unit)) else { return Ok(()) };
            for parameter in parameters {
                let range = &parameter.range;
                let entry = all.entry(parameter.name.clone()).or_insert_with(|| vec![UNKNOWN; range.len()]);
                copy_overlap(values, own, entry, range);
            }
            Ok(())
        })?;
        if let Some(mesh) = self.job.mesh {
            put_together(mesh, 0, &mut all)?;
            if mesh.rank() > 0 {
                all.clear();
            }
        }
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
