//! The update of what a rank owns of a unit: AdamW over its elements, ahead of the gradient norm or with it, and what is copied from there.

use super::launch::{Launcher, OpOperands};
use crate::error::ExecError;
use crate::numbers;
use crate::seam::{Launch, Operands};
use paceline_kernels::{AdamW, Call, Decays, View};
use paceline_sim::model::parameters::{DecayGroup, DecayRun, decay_groups};
use paceline_sim::program::{Piece, Tensor, Update, update};
use paceline_sim::units::StageId;
use std::collections::BTreeMap;
use std::ops::Range;

// Simulator and kernels agree how much one call updates.
const _: () = assert!(DecayGroup::MOST == Decays::MOST);

/// An optimizer op at its device.
pub(super) struct UnitUpdate<'a, 'l> {
    launch: &'a Launcher<'l>,
    operands: &'a OpOperands<'a>,
    unit: (StageId, u16),
    update: Update,
    /// All parameters of the unit.
    parameters: &'a [DecayRun],
    with: AdamW,
}

/// What one call updates.
struct Run {
    /// Of the unit.
    elements: Range<usize>,
    gradients: View,
    first: View,
    second: View,
    decays: Decays,
}

impl<'a, 'l> UnitUpdate<'a, 'l> {
    /// What an optimizer op does, within the buffers that it has. `parameters` are those of all units.
    pub fn of(
        launch: &'a Launcher<'l>,
        operands: &'a OpOperands<'a>,
        unit: (StageId, u16),
        parameters: &'a BTreeMap<(StageId, u16), Vec<DecayRun>>,
        with: AdamW,
    ) -> Result<UnitUpdate<'a, 'l>, ExecError> {
        let wrong = |what: &str| {
            let (stage, unit) = unit;
            Err(ExecError::Program(format!("the optimizer of {stage} unit {unit} on {} {what}", operands.id)))
        };
        let Some(update) = update(operands.rank, operands.this) else {
            return wrong("lacks weights, gradients or moments");
        };
        let within =
            |piece: &Piece, range: &Range<usize>| piece.holds.start <= range.start && range.end <= piece.holds.end;
        if !within(&update.parameters, &update.range) || !within(&update.gradients, &update.range) {
            return wrong("has moments of elements whose weights or gradients it lacks");
        }
        Ok(UnitUpdate { launch, operands, unit, update, parameters: &parameters[&unit], with })
    }

    /// Updates the first copy of the weights as if no gradient norm were too large, and keeps the weights as they are.
    pub fn guess(&self) -> Result<(), ExecError> {
        let Some(((guessed, _), others)) = self.update.copies.split_first() else { return Ok(()) };
        for Run { elements, gradients, first, second, decays } in self.runs()? {
            let (parameters, kept) = (self.part(guessed, &elements)?, self.part(&self.update.parameters, &elements)?);
            let with = self.with;
            self.launch.launch(Call::AdamWAhead { parameters, kept, gradients, first, second, decays, with })?;
        }
        self.hand_on(guessed, others)
    }

    /// The copy that the update itself writes beside the weights.
    pub fn rounded(&self) -> Option<&Piece> {
        self.update.rounded()
    }

    /// Updates the weights, and with them the copy `rounded`; gradients are zero then.
    pub fn apply(&self, rounded: Option<&Piece>) -> Result<(), ExecError> {
        let norm = self.operands.view(Tensor::GradientNorm)?;
        for Run { elements, gradients, first, second, decays } in self.runs()? {
            let parameters = self.part(&self.update.parameters, &elements)?;
            let rounded = rounded.map(|piece| self.part(piece, &elements)).transpose()?;
            let with = self.with;
            self.launch.launch(Call::AdamW { parameters, gradients, first, second, rounded, norm, decays, with })?;
        }
        // AdamW zeroes the gradients that it used; what the reduction left elsewhere is zeroed here.
        let (accumulated, leftovers) = &self.update.leftovers;
        leftovers.iter().try_for_each(|part| self.launch.launch(Call::Zero { x: self.part(accumulated, part)? }))
    }

    /// Copies the updated weights to where else they are, but for the copy `rounded`, from which the others are made.
    pub fn copy(&self, rounded: Option<&Piece>) -> Result<(), ExecError> {
        match rounded {
            Some(piece) => self.hand_on(piece, &self.update.copies[1..]),
            None => self.hand_on(&self.update.parameters, &self.update.copies),
        }
    }

    /// The gradients, before they are used: their elements of the unit, and the values.
    pub fn captured(&self) -> Result<(Range<usize>, Vec<f32>), ExecError> {
        let shard = self.part(&self.update.gradients, &self.update.range)?;
        let mut bytes = vec![0; shard.bytes()];
        self.launch.read(shard, &mut bytes)?;
        Ok((self.update.range.clone(), numbers::values(&bytes, shard.dtype())))
    }

    /// The sum of squares of all gradients.
    pub fn norm(&self) -> Result<f64, ExecError> {
        let mut bytes = [0; 8];
        self.launch.read(self.operands.view(Tensor::GradientNorm)?, &mut bytes)?;
        Ok(f64::from_ne_bytes(bytes))
    }

    fn runs(&self) -> Result<Vec<Run>, ExecError> {
        let (range, (stage, unit)) = (&self.update.range, self.unit);
        let moments = self.operands.view(Tensor::Moments { stage, unit })?;
        let run = |group: DecayGroup| {
            let (place, len) = (group.range.start - range.start, group.range.len());
            Ok(Run {
                gradients: self.part(&self.update.gradients, &group.range)?,
                first: moments.slice(place, len),
                second: moments.slice(range.len() + place, len),
                decays: decays(&group)?,
                elements: group.range,
            })
        };
        decay_groups(self.parameters.iter().cloned(), range.clone()).into_iter().map(run).collect()
    }

    /// The memory of some elements of the unit in a piece that holds them.
    fn part(&self, piece: &Piece, elements: &Range<usize>) -> Result<View, ExecError> {
        Ok(self.operands.view(piece.tensor)?.slice(piece.place(elements).start, elements.len()))
    }

    /// Hands weights on from one piece to the next.
    fn hand_on(&self, from: &Piece, copies: &[(Piece, Range<usize>)]) -> Result<(), ExecError> {
        let mut before = from;
        for (piece, both) in copies {
            let (from, to) = (self.part(before, both)?, self.part(piece, both)?);
            let same = from.dtype() == to.dtype();
            self.launch.launch(if same { Call::Copy { from, to } } else { Call::Cast { from, to } })?;
            before = piece;
        }
        Ok(())
    }
}

/// The runs of a group as a call has them.
fn decays(group: &DecayGroup) -> Result<Decays, ExecError> {
    Decays::new(group.first, &group.borders)
        .ok_or_else(|| ExecError::Program(format!("no optimizer call has the decaying runs {:?}", group.borders)))
}
