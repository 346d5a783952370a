//! The CPU device: one core, single-threaded kernels in host memory. Vector instructions are chosen at run time, so a
//! plain x86-64 build uses AVX2 or AVX-512 where the machine has them. Every kernel is deterministic: the same inputs
//! give the same bits on the same machine, whichever thread runs it.

mod matmul;
mod memory;

use crate::call::Call;
use crate::device::{Block, Device, KernelError, View};
use matmul::{Matrix, MatrixMut, multiply};
use memory::{HostBlock, bytes, bytes_mut, read, write};

/// A device of one core. Calls may run on any thread, also several at once on disjoint memory.
#[derive(Debug, Default)]
pub struct CpuDevice {}

impl CpuDevice {
    /// A device that uses the best vector instructions of this machine.
    pub fn new() -> CpuDevice {
        CpuDevice {}
    }
}

impl Device for CpuDevice {
    fn name(&self) -> String {
        "cpu".to_owned()
    }

    fn allocate(&self, bytes: usize) -> Result<Box<dyn Block>, KernelError> {
        Ok(Box::new(HostBlock::allocate(&self.name(), bytes)?))
    }

    unsafe fn run(&self, call: &Call) -> Result<(), KernelError> {
        call.check()?;
        // SAFETY: `check` has proved that no operand overlaps one that is written; the rest is the caller's promise.
        unsafe { self.dispatch(call) }
    }

    unsafe fn upload(&self, from: &[u8], to: View) -> Result<(), KernelError> {
        check_transfer("upload", from.len(), to)?;
        // SAFETY: the caller's promise.
        unsafe { bytes_mut(to) }.copy_from_slice(from);
        Ok(())
    }

    unsafe fn download(&self, from: View, to: &mut [u8]) -> Result<(), KernelError> {
        check_transfer("download", to.len(), from)?;
        // SAFETY: the caller's promise.
        to.copy_from_slice(unsafe { bytes(from) });
        Ok(())
    }
}

fn check_transfer(call: &'static str, host: usize, view: View) -> Result<(), KernelError> {
    if host == view.bytes() {
        return Ok(());
    }
    Err(KernelError::Shape { call, what: format!("host has {host} bytes, the view {}", view.bytes()) })
}

impl CpuDevice {
    /// # Safety
    /// The views are valid, and nothing that is written overlaps another operand or is touched by another thread.
    unsafe fn dispatch(&self, call: &Call) -> Result<(), KernelError> {
        match *call {
            Call::MatMul { a, b, c, m, n, k, transpose_a, transpose_b, accumulate } => {
                let (m, n, k) = (m as usize, n as usize, k as usize);
                // SAFETY: the caller's promise.
                let (a, b, c) = unsafe { (read(a), read(b), write(c)) };
                let a = if transpose_a { Matrix::dense(a, k, m).transposed() } else { Matrix::dense(a, m, k) };
                let b = if transpose_b { Matrix::dense(b, n, k).transposed() } else { Matrix::dense(b, k, n) };
                multiply(a, b, MatrixMut::dense(c, m, n), accumulate);
            }
            Call::Copy { from, to } => {
                // SAFETY: the caller's promise.
                unsafe { bytes_mut(to).copy_from_slice(bytes(from)) };
            }
            Call::Zero { x } => {
                // SAFETY: the caller's promise.
                unsafe { bytes_mut(x) }.fill(0);
            }
            _ => return Err(KernelError::Unsupported { device: self.name(), call: call.name() }),
        }
        Ok(())
    }
}
