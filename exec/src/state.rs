//! The state of training by global parameter name, gathered from the ranks that hold it and given back to them. Names
//! and whole tensors do not depend on the layout, so neither does what is written with them.

use crate::cpu::{CpuHands, Job};
use crate::error::ExecError;
use crate::initialise::fill;
use crate::seam::Parameter;
use paceline_kernels::{DType, View};
use paceline_sim::program::Tensor;
use paceline_sim::units::{OpId, RankId, StageId};
use std::collections::BTreeMap;
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

/// The hands of all ranks, between steps.
pub(crate) struct Holders<'h, 'a> {
    pub job: &'h Job<'a>,
    pub hands: &'h [Mutex<CpuHands<'a>>],
}

impl<'h, 'a> Holders<'h, 'a> {
    pub fn lock(&self, rank: usize) -> MutexGuard<'h, CpuHands<'a>> {
        self.hands[rank].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `visit` for every unit that a rank holds, in order of rank, with its parameters.
    fn for_each_unit(
        &self,
        mut visit: impl FnMut(&CpuHands<'a>, StageId, u16, &[Parameter]) -> Result<(), paceline_kernels::KernelError>,
    ) -> Result<(), ExecError> {
        for (r, rank) in self.job.program.ranks.iter().enumerate() {
            let hands = self.lock(r);
            for buffer in &rank.persistent {
                let Tensor::Parameters { stage, unit } = rank.buffers[buffer.index()].tensor else { continue };
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
        self.for_each_unit(|hands, stage, unit, parameters| {
            let Some(view) = hands.persistent(Tensor::Parameters { stage, unit }) else { return Ok(()) };
            let mut values = vec![0.0; view.len()];
            for parameter in parameters {
                fill(parameter.start, &parameter.name, seed, &mut values[parameter.range.clone()]);
            }
            self.write(view, &values)
        })
    }

    /// Everything that training changes.
    pub fn gather(&self) -> Result<ModelState, ExecError> {
        let mut state = ModelState::new();
        self.for_each_unit(|hands, stage, unit, parameters| {
            let Some(view) = hands.persistent(Tensor::Parameters { stage, unit }) else { return Ok(()) };
            let values = self.read(view)?;
            let own = hands.update_range(stage, unit, view.len()).unwrap_or_default();
            let moments = match hands.persistent(Tensor::Moments { stage, unit }) {
                Some(view) => self.read(view)?,
                None => vec![0.0; 2 * own.len()],
            };
            let (first, second) = moments.split_at(own.len());
            for parameter in parameters {
                let range = parameter.range.clone();
                let entry = state.entry(parameter.name.clone()).or_insert_with(|| TensorState {
                    shape: parameter.shape.clone(),
                    values: values[range.clone()].to_vec(),
                    first: vec![0.0; range.len()],
                    second: vec![0.0; range.len()],
                });
                // The part of this parameter whose moments this rank has.
                let (start, end) = (own.start.max(range.start), own.end.min(range.end));
                if start < end {
                    let (to, from) = (start - range.start..end - range.start, start - own.start..end - own.start);
                    entry.first[to.clone()].copy_from_slice(&first[from.clone()]);
                    entry.second[to].copy_from_slice(&second[from]);
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
        self.for_each_unit(|hands, stage, unit, parameters| {
            let Some(view) = hands.persistent(Tensor::Parameters { stage, unit }) else { return Ok(()) };
            let mut values = vec![0.0; view.len()];
            let (mut first, mut second) = (values.clone(), values.clone());
            for parameter in parameters {
                let range = parameter.range.clone();
                match state.get(&parameter.name).filter(|found| found.shape == parameter.shape) {
                    Some(found) => {
                        values[range.clone()].copy_from_slice(&found.values);
                        first[range.clone()].copy_from_slice(&found.first);
                        second[range].copy_from_slice(&found.second);
                    }
                    None => {
                        wrong.get_or_insert_with(|| missing(parameter, state.get(&parameter.name)));
                    }
                }
            }
            self.write(view, &values)?;
            let own = hands.update_range(stage, unit, view.len()).unwrap_or_default();
            match hands.persistent(Tensor::Moments { stage, unit }) {
                Some(view) => {
                    self.write(view.slice(0, own.len()), &first[own.clone()])?;
                    self.write(view.slice(own.len(), own.len()), &second[own])
                }
                None => Ok(()),
            }
        })?;
        wrong.map_or(Ok(()), Err)
    }

    /// The gradients of the last step, if they were captured.
    pub fn gradients(&self) -> Result<BTreeMap<String, Vec<f32>>, ExecError> {
        let mut all: BTreeMap<String, Vec<f32>> = BTreeMap::new();
        self.for_each_unit(|hands, stage, unit, parameters| {
            let Some((own, values)) = hands.gradients.get(&(stage, unit)) else { return Ok(()) };
            for parameter in parameters {
                let range = &parameter.range;
                let entry = all.entry(parameter.name.clone()).or_insert_with(|| vec![f32::NAN; range.len()]);
                let (start, end) = (own.start.max(range.start), own.end.min(range.end));
                if start < end {
                    let from = &values[start - own.start..end - own.start];
                    entry[start - range.start..end - range.start].copy_from_slice(from);
                }
            }
            Ok(())
        })?;
        Ok(all)
    }

    fn read(&self, view: View) -> Result<Vec<f32>, paceline_kernels::KernelError> {
        debug_assert!(view.dtype() == DType::F32);
        let mut bytes = vec![0; view.bytes()];
        // SAFETY: between steps nobody else touches the ranks' buffers.
        unsafe { self.job.device.download(view, &mut bytes) }?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_ne_bytes(b)).collect())
    }

    fn write(&self, view: View, values: &[f32]) -> Result<(), paceline_kernels::KernelError> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
        // SAFETY: between steps nobody else touches the ranks' buffers.
        unsafe { self.job.device.upload(&bytes, view) }
    }
}
