//! What the ops of the compute stream do: passes, the gradient norm, the optimizer.

use super::CpuHands;
use super::launch::{Launcher, OpOperands};
use crate::error::ExecError;
use crate::numbers;
use crate::seam::{Launch, Operands};
use paceline_kernels::{Call, Decays, View};
use paceline_sim::model::parameters::{DecayGroup, decay_groups};
use paceline_sim::program::{Op, OpKind, Piece, Tensor, Update, begun_gradients, gradient_sources, update};
use paceline_sim::units::{OpId, StageId};
use std::cell::RefCell;
use std::ops::Range;

impl CpuHands<'_> {
    /// What an optimizer op does, within the buffers that it has.
    fn update_of(&self, op: &Op, stage: StageId, unit: u16) -> Result<Update, ExecError> {
        let wrong =
            |what: &str| Err(ExecError::Program(format!("the optimizer of {stage} unit {unit} on {} {what}", self.id)));
        let Some(update) = update(self.rank, op) else { return wrong("lacks weights, gradients or moments") };
        let within =
            |piece: &Piece, range: &Range<usize>| piece.holds.start <= range.start && range.end <= piece.holds.end;
        if !within(&update.parameters, &update.range) || !within(&update.gradients, &update.range) {
            return wrong("has moments of elements whose weights or gradients it lacks");
        }
        Ok(update)
    }

    /// Does the work of an op, or queues it.
    pub(super) fn work(&mut self, op: u32) -> Result<(), ExecError> {
        let (job, rank) = (self.job, self.rank);
        let (at, device) = (self.at(op), self.device());
        let this = &rank.ops[op as usize];
        let operands = OpOperands { rank, id: self.id, op: OpId(op), this, memory: &self.memory };
        let update = match this.kind {
            OpKind::Optimizer { stage, unit } => Some((self.update_of(this, stage, unit)?, job.steps - 1)),
            OpKind::OptimizerAhead { stage, unit, step } | OpKind::Validate { stage, unit, step } => {
                Some((self.update_of(this, stage, unit)?, step))
            }
            _ => None,
        };
        let id = self.id;
        let refused = |source| ExecError::Kernel { rank: id, op: OpId(op), source };
        let launch = Launcher {
            job,
            device,
            timed: self.orders.time_kernels,
            id: self.id,
            op: OpId(op),
            tally: RefCell::new((&mut self.kernels, &mut self.ticks)),
        };
        match this.kind {
            OpKind::Compute { .. } => {
                let pass = || {
                    // Gradients of one microbatch, which begin with the first pass that adds to them.
                    for begun in begun_gradients(rank, this) {
                        launch.launch(Call::Zero { x: operands.view(begun.tensor)? })?;
                    }
                    job.passes.run(&this.kind, &launch, &operands)
                };
                match job.lines.filter(|_| job.graphs && !self.orders.time_kernels) {
                    Some(lines) => self.graphs.run(op, &*lines.of(at).queue, &pass, refused)?,
                    None => pass()?,
                }
            }
            OpKind::GradientNorm => {
                let out = operands.view(Tensor::GradientNorm)?;
                for ((stage, unit), source) in gradient_sources(rank, this) {
                    let gradients = operands.view(source.tensor)?;
                    let copy = job.passes.tied_copy(stage, unit).filter(|copy| !copy.counted).map(|copy| copy.range);
                    for part in self.shares[&(stage, unit)].counted(copy.unwrap_or_default()) {
                        let place = source.place(&part);
                        launch.launch(Call::SumSquares { x: gradients.slice(place.start, place.len()), out })?;
                    }
                }
            }
            OpKind::OptimizerAhead { stage, unit, .. } => {
                let Some((update, step)) = update else { return Ok(()) };
                let Some(((guessed, _), others)) = update.copies.split_first() else { return Ok(()) };
                let kept = operands.view(update.parameters.tensor)?;
                let parameters = operands.view(guessed.tensor)?;
                let gradients = operands.view(update.gradients.tensor)?;
                let moments = operands.view(Tensor::Moments { stage, unit })?;
                let all = self.parameters[&(stage, unit)].iter().cloned();
                for group in decay_groups(all, update.range.clone()) {
                    let run = &group.range;
                    let (place, len) = (run.start - update.range.start, run.len());
                    launch.launch(Call::AdamWAhead {
                        parameters: parameters.slice(guessed.place(run).start, len),
                        kept: kept.slice(update.parameters.place(run).start, len),
                        gradients: gradients.slice(update.gradients.place(run).start, len),
                        first: moments.slice(place, len),
                        second: moments.slice(update.range.len() + place, len),
                        decays: decays(&group)?,
                        with: job.adamw(self.orders.step + u64::from(step)),
                    })?;
                }
                hand_on(&launch, &operands, guessed, others)?;
            }
            OpKind::Optimizer { stage, unit } | OpKind::Validate { stage, unit, .. } => {
                let Some((update, step)) = update else { return Ok(()) };
                let parameters = operands.view(update.parameters.tensor)?;
                let gradients = operands.view(update.gradients.tensor)?;
                let moments = operands.view(Tensor::Moments { stage, unit })?;
                let norm = operands.view(Tensor::GradientNorm)?;
                let own = update.range.clone();
                if self.orders.capture_gradients {
                    let place = update.gradients.place(&own);
                    let shard = gradients.slice(place.start, place.len());
                    let mut bytes = vec![0; shard.bytes()];
                    // SAFETY: the reduction of these gradients has ended (the op waits for it).
                    unsafe { device.download(shard, &mut bytes) }.map_err(refused)?;
                    let values = numbers::values(&bytes, shard.dtype());
                    self.gradients.insert((stage, unit), (own.clone(), values));
                }
                let validates = matches!(this.kind, OpKind::Validate { .. });
                let narrow = update.rounded().filter(|_| !validates);
                let narrow = narrow.map(|piece| operands.view(piece.tensor).map(|view| (piece, view))).transpose()?;
                let all = self.parameters[&(stage, unit)].iter().cloned();
                for group in decay_groups(all, own.clone()) {
                    let run = &group.range;
                    let (place, len) = (run.start - own.start, run.len());
                    launch.launch(Call::AdamW {
                        parameters: parameters.slice(update.parameters.place(run).start, len),
                        gradients: gradients.slice(update.gradients.place(run).start, len),
                        first: moments.slice(place, len),
                        second: moments.slice(own.len() + place, len),
                        rounded: narrow.map(|(piece, view)| view.slice(piece.place(run).start, len)),
                        norm,
                        decays: decays(&group)?,
                        with: job.adamw(self.orders.step + u64::from(step)),
                    })?;
                }
                // AdamW zeroes the gradients that it used; what the reduction left elsewhere is zeroed here.
                let (accumulated, leftovers) = &update.leftovers;
                let whole = operands.view(accumulated.tensor)?;
                for part in leftovers {
                    let place = accumulated.place(part);
                    launch.launch(Call::Zero { x: whole.slice(place.start, place.len()) })?;
                }
                let mut stays = false;
                if let OpKind::Validate { .. } = this.kind {
                    let mut bytes = [0; 8];
                    // SAFETY: the sum of the norm has ended (the op waits for it).
                    unsafe { device.download(norm, &mut bytes) }.map_err(refused)?;
                    // All ranks see the same norm, so they decide alike.
                    stays = job.adamw(0).clip_coefficient(f64::from_ne_bytes(bytes)) == 1.0;
                    if !stays || step + 1 == self.orders.steps {
                        self.leaving = Some(step + 1);
                    }
                }
                // A guess that was right has the same bits.
                if !stays {
                    let (from, others) = match narrow {
                        Some((piece, _)) => (piece, &update.copies[1..]),
                        None => (&update.parameters, &update.copies[..]),
                    };
                    hand_on(&launch, &operands, from, others)?;
                }
            }
            OpKind::Join | OpKind::Send { .. } | OpKind::Recv { .. } | OpKind::Collective { .. } => {}
        }
        Ok(())
    }
}

/// Hands weights on from one piece to the next.
fn hand_on(
    launch: &dyn Launch,
    operands: &dyn Operands,
    from: &Piece,
    copies: &[(Piece, Range<usize>)],
) -> Result<(), ExecError> {
    let part = |piece: &Piece, both: &Range<usize>| -> Result<View, ExecError> {
        Ok(operands.view(piece.tensor)?.slice(piece.place(both).start, both.len()))
    };
    let mut before = from;
    for (piece, both) in copies {
        let (from, to) = (part(before, both)?, part(piece, both)?);
        let same = from.dtype() == to.dtype();
        launch.launch(if same { Call::Copy { from, to } } else { Call::Cast { from, to } })?;
        before = piece;
    }
    Ok(())
}

// Simulator and kernels agree how much one call updates.
const _: () = assert!(DecayGroup::MOST == Decays::MOST);

/// The runs of a group as a call has them.
fn decays(group: &DecayGroup) -> Result<Decays, ExecError> {
    Decays::new(group.first, &group.borders)
        .ok_or_else(|| ExecError::Program(format!("no optimizer call has the decaying runs {:?}", group.borders)))
}
