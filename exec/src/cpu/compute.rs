//! What the ops of the compute stream do: passes, the gradient norm, the optimizer.

use super::CpuHands;
use super::launch::{Launcher, OpOperands};
use super::optimizer::UnitUpdate;
use crate::error::ExecError;
use crate::seam::{Launch, Operands};
use paceline_kernels::Call;
use paceline_sim::program::{OpKind, Tensor, begun_gradients, gradient_sources};
use paceline_sim::units::OpId;
use std::cell::RefCell;

impl CpuHands<'_> {
    /// Does the work of an op, or queues it.
    pub(super) fn work(&mut self, op: u32) -> Result<(), ExecError> {
        let (job, rank) = (self.job, self.rank);
        let (at, device) = (self.at(op), self.device());
        let this = &rank.ops[op as usize];
        let operands = OpOperands { rank, id: self.id, op: OpId(op), this, memory: &self.memory };
        let launch = Launcher {
            job,
            device,
            timed: self.orders.time_kernels,
            id: self.id,
            op: OpId(op),
            tally: RefCell::new((&mut self.kernels, &mut self.ticks)),
        };
        let update = |unit, step: u32| {
            let with = job.adamw(self.orders.step + u64::from(step));
            UnitUpdate::of(&launch, &operands, unit, &self.parameters, with)
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
                    Some(lines) => {
                        self.graphs.run(op, &*lines.of(at).queue, &pass, |source| launch.refused(source))?;
                    }
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
            OpKind::OptimizerAhead { stage, unit, step } => update((stage, unit), step)?.guess()?,
            OpKind::Optimizer { stage, unit } => {
                let update = update((stage, unit), job.steps - 1)?;
                if self.orders.capture_gradients {
                    self.gradients.insert((stage, unit), update.captured()?);
                }
                let rounded = update.rounded();
                update.apply(rounded)?;
                update.copy(rounded)?;
            }
            OpKind::Validate { stage, unit, step } => {
                let update = update((stage, unit), step)?;
                if self.orders.capture_gradients {
                    self.gradients.insert((stage, unit), update.captured()?);
                }
                update.apply(None)?;
                // All ranks see the same norm, so they decide alike. A guess that was right has the same bits.
                let right = job.adamw(0).clip_coefficient(update.norm()?) == 1.0;
                if !right || step + 1 == self.orders.steps {
                    self.leaving = Some(step + 1);
                }
                if !right {
                    update.copy(None)?;
                }
            }
            OpKind::Join | OpKind::Send { .. } | OpKind::Recv { .. } | OpKind::Collective { .. } => {}
        }
        Ok(())
    }
}
