//! Calls on bfloat16: operands are widened into memory beside the program's, the kernel computes in 32 bits, and what it wrote
//! is rounded once. So storage is narrow and arithmetic is not, as on tensor cores.
//!
//! The memory belongs to the thread and is kept between calls; it is the CPU's own, as the panels are that products are packed into,
//! and no buffer of a program.

use super::memory::{HostBlock, read, write};
use super::pointwise::{narrow, widen};
use crate::call::Call;
use crate::check::Access;
use crate::device::{Block, DType, KernelError, View};
use smallvec::SmallVec;
use std::cell::Cell;

/// Elements between operands: a cache line.
const LINE: usize = 16;

thread_local! {
    /// The stage of the last call; taken while a call uses it.
    static STAGE: Cell<Option<HostBlock>> = const { Cell::new(None) };
}

/// Runs a checked call by `compute`, which takes all its operands in 32 bits; copies and casts do not care.
///
/// # Safety
/// The views are valid, and nothing that is written overlaps another operand or is touched by another thread.
pub(super) unsafe fn run(
    device: &str,
    call: &Call,
    compute: impl FnOnce(&Call) -> Result<(), KernelError>,
) -> Result<(), KernelError> {
    if matches!(call, Call::Cast { .. } | Call::Copy { .. } | Call::Zero { .. }) {
        return compute(call);
    }
    let operands = call.operands();
    let narrow_ones = || operands.iter().filter(|operand| operand.dtype == DType::BF16);
    let needed: usize = narrow_ones().map(|operand| operand.view.len().next_multiple_of(LINE)).sum();
    if narrow_ones().next().is_none() {
        return compute(call);
    }
    let stage = match STAGE.take().filter(|stage| stage.bytes() >= 4 * needed) {
        Some(stage) => stage,
        None => HostBlock::allocate(device, 4 * needed)?,
    };
    let room: &dyn Block = &stage;
    let mut wide: SmallVec<[(View, View, Access); 7]> = SmallVec::new();
    let mut next = 0;
    for operand in narrow_ones() {
        let to = room.view(4 * next, operand.view.len(), DType::F32);
        next += operand.view.len().next_multiple_of(LINE);
        if operand.access != Access::Write {
            // SAFETY: the caller's promise; the stage is this thread's own.
            unsafe { widen(read(operand.view), write(to)) };
        }
        wide.push((operand.view, to, operand.access));
    }
    let mut staged = *call;
    for view in staged.views_mut() {
        // Two operands that are read may be one view; either copy serves.
        if let Some((_, to, _)) = wide.iter().find(|(from, _, _)| from == view) {
            *view = *to;
        }
    }
    let done = compute(&staged);
    if done.is_ok() {
        for (to, from, _) in wide.iter().filter(|(_, _, access)| *access != Access::Read) {
            // SAFETY: as above.
            unsafe { narrow(read(*from), write(*to)) };
        }
    }
    STAGE.set(Some(stage));
    done
}
