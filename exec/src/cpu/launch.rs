//! One op at its device: which memory its tensors are, and its kernel calls.

use super::Job;
use crate::error::ExecError;
use crate::kernel_times::KernelTally;
use crate::memory::RankMemory;
use crate::numbers::dtype;
use crate::seam::{Launch, Operands};
use paceline_kernels::{Call, View};
use paceline_sim::program::{Op, RankProgram, Tensor};
use paceline_sim::units::{OpId, RankId};
use std::cell::RefCell;

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

/// Runs kernel calls of an op on the device.
pub(super) struct Launcher<'a> {
    pub(super) job: &'a Job<'a>,
    /// Waits for every call and counts its time.
    pub(super) timed: bool,
    pub(super) id: RankId,
    pub(super) op: OpId,
    pub(super) tally: RefCell<&'a mut KernelTally>,
}

impl Launch for Launcher<'_> {
    fn launch(&self, call: Call) -> Result<(), ExecError> {
        let start = self.job.clock.now();
        // SAFETY: the views come from living buffers that the op declares, and the program's check has proved that no
        // other op that runs at this time writes to them.
        unsafe { self.job.device.run(&call) }.map_err(|source| ExecError::Kernel {
            rank: self.id,
            op: self.op,
            source,
        })?;
        if self.timed {
            self.job.device.complete().map_err(|source| ExecError::Kernel { rank: self.id, op: self.op, source })?;
            self.tally.borrow_mut().add(&call, self.job.clock.now() - start);
        }
        Ok(())
    }
}
