//! One op at its device: which memory its tensors are, and its kernel calls.

use super::Job;
use crate::error::ExecError;
use crate::kernel_times::KernelTally;
use crate::lines::Lines;
use crate::memory::RankMemory;
use crate::numbers::dtype;
use crate::seam::{Launch, Operands};
use paceline_kernels::{Call, Device, KernelError, Moment, Queue, Sequence, View};
use paceline_sim::program::{Op, RankProgram, Tensor};
use paceline_sim::units::{OpId, RankId};
use std::cell::RefCell;
use std::collections::HashMap;

/// The buffers that an op declares, as views of its tensors.
pub(super) struct OpOperands<'a> {
    pub(super) rank: &'a RankProgram,
    pub(super) id: RankId,
    pub(super) op: OpId,
    pub(super) this: &'a Op,
    pub(super) memory: &'a RankMemory<'a>,
}

impl OpOperands<'_> {
    fn buffer(&self, tensor: Tensor) -> Option<usize> {
        let same = |held: Tensor| match (held, tensor) {
            (Tensor::Workspace { .. }, Tensor::Workspace { .. }) => true,
            _ => held == tensor,
        };
        self.this.uses.iter().map(|b| b.index()).find(|&b| same(self.rank.buffers[b].tensor))
    }
}

impl Operands for OpOperands<'_> {
    fn view(&self, tensor: Tensor) -> Result<View, ExecError> {
        let found = self.buffer(tensor).and_then(|buffer| Some((buffer, self.memory.block(buffer)?)));
        let Some((buffer, block)) = found else {
            return Err(ExecError::Undeclared { rank: self.id, op: self.op, tensor });
        };
        let dtype = dtype(self.rank.buffers[buffer].element);
        Ok(block.view(0, block.bytes() / dtype.bytes(), dtype))
    }

    fn has(&self, tensor: Tensor) -> bool {
        self.buffer(tensor).is_some()
    }
}

/// Moments between kernel calls whose times are read when the step has ended.
#[derive(Debug, Default)]
pub(super) struct Ticks {
    calls: Vec<(Call, Moment, Moment)>,
    /// The end of the last call, while nothing else comes between.
    last: Option<Moment>,
}

impl Ticks {
    /// Something else comes between this call and the next.
    pub(super) fn pause(&mut self) {
        self.last = None;
    }

    /// Counts the times of all calls since this was asked last.
    pub(super) fn count(&mut self, lines: &Lines, tally: &mut KernelTally) -> Result<(), KernelError> {
        self.pause();
        for (call, from, to) in self.calls.drain(..) {
            tally.add(&call, lines.nanoseconds(from, to)?);
        }
        Ok(())
    }
}

/// Passes whose kernels are launched as one. Their calls are the same in every step, because buffers have their places in the arena
/// and nothing but addresses and shapes is in a call of a pass.
#[derive(Debug, Default)]
pub(super) struct Graphs {
    /// By op.
    known: HashMap<u32, Option<Sequence>>,
}

impl Graphs {
    /// Runs the pass of an op: the first time by itself, so that whatever is made for the first time is there; then it is kept, and
    /// from there on replayed.
    pub(super) fn run(
        &mut self,
        op: u32,
        queue: &dyn Queue,
        pass: &dyn Fn() -> Result<(), ExecError>,
        refused: impl Fn(KernelError) -> ExecError,
    ) -> Result<(), ExecError> {
        let sequence = match self.known.get(&op) {
            None => {
                self.known.insert(op, None);
                return pass();
            }
            Some(&Some(sequence)) => sequence,
            Some(None) => {
                queue.keep().map_err(&refused)?;
                let passed = pass();
                // Whatever came of the pass, the queue must not go on keeping.
                let kept = queue.kept();
                passed?;
                let sequence = kept.map_err(&refused)?;
                self.known.insert(op, Some(sequence));
                sequence
            }
        };
        // SAFETY: the calls are those that the pass would make now, on the same buffers.
        unsafe { queue.replay(sequence) }.map_err(refused)
    }
}

/// Runs kernel calls of an op on the device.
pub(super) struct Launcher<'a> {
    pub(super) job: &'a Job<'a>,
    /// Where: the device, or the queue on which the rank computes.
    pub(super) device: &'a dyn Device,
    /// Counts the time of every call. Without queues it waits for each.
    pub(super) timed: bool,
    pub(super) id: RankId,
    pub(super) op: OpId,
    pub(super) tally: RefCell<(&'a mut KernelTally, &'a mut Ticks)>,
}

impl Launcher<'_> {
    /// The device has refused the op.
    pub(super) fn refused(&self, source: KernelError) -> ExecError {
        ExecError::Kernel { rank: self.id, op: self.op, source }
    }

    /// Reads an operand of the op.
    pub(super) fn read(&self, view: View, to: &mut [u8]) -> Result<(), ExecError> {
        // SAFETY: the view is of a living buffer that the op declares, and whoever writes to it has ended: the op waits for it.
        unsafe { self.device.download(view, to) }.map_err(|source| self.refused(source))
    }

    fn run(&self, call: &Call) -> Result<(), KernelError> {
        // SAFETY: the views come from living buffers that the op declares, and the program's check has proved that no
        // other op that runs at this time writes to them.
        let run = || unsafe { self.device.run(call) };
        if !self.timed {
            return run();
        }
        let (tally, ticks) = &mut *self.tally.borrow_mut();
        if let Some(lines) = self.job.lines {
            let from = ticks.last.map_or_else(|| lines.tick(self.id.0), Ok)?;
            run()?;
            let to = lines.tick(self.id.0)?;
            ticks.last = Some(to);
            ticks.calls.push((*call, from, to));
        } else {
            let start = self.job.clock.now();
            run()?;
            self.device.complete()?;
            tally.add(call, self.job.clock.now() - start);
        }
        Ok(())
    }
}

impl Launch for Launcher<'_> {
    fn launch(&self, call: Call) -> Result<(), ExecError> {
        self.run(&call).map_err(|source| self.refused(source))
    }
}
