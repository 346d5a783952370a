//! Host memory that a GPU reads by itself: what is uploaded is put there, so that the host need not wait until it has been read.

use super::driver::Context;
use crate::device::KernelError;
use cudarc::driver::result;
use std::ffi::c_void;
use std::sync::Arc;

/// Larger uploads are waited for.
pub(super) const STAGED: usize = 1 << 20;
/// Bytes of the memory: tokens of a thousand long sequences.
const ROOM: usize = 16 << 20;

/// Pinned memory of a stream, filled from its begin until the stream has ended what reads it.
pub(super) struct Staging {
    context: Arc<Context>,
    /// Allocated when it is first needed.
    start: *mut c_void,
    used: usize,
}

// SAFETY: the memory is the owner's alone, and pinned memory may be used from any thread.
unsafe impl Send for Staging {}

impl Staging {
    pub fn new(context: &Arc<Context>) -> Staging {
        Staging { context: context.clone(), start: std::ptr::null_mut(), used: 0 }
    }

    pub fn has_room(&self, bytes: usize) -> bool {
        self.used + bytes <= ROOM
    }

    /// Copies bytes to where the GPU can read them until the next [`Staging::clear`]. Panics when there is no room.
    pub fn keep(&mut self, bytes: &[u8]) -> Result<&[u8], KernelError> {
        assert!(self.has_room(bytes.len()), "staging memory is full");
        if self.start.is_null() {
            // SAFETY: the context is current on the calling thread.
            self.start = unsafe { result::malloc_host(ROOM, 0) }
                .map_err(|error| self.context.failed(format_args!("pinning {ROOM} bytes of the host"), error))?;
        }
        // SAFETY: the range is within the memory, and nobody uses it since the last clear.
        let kept = unsafe {
            let to = self.start.cast::<u8>().add(self.used);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
            std::slice::from_raw_parts(to, bytes.len())
        };
        self.used += bytes.len();
        Ok(kept)
    }

    /// Everything that was kept has been read.
    pub fn clear(&mut self) {
        self.used = 0;
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.start.is_null() && self.context.enter().is_ok() {
            // SAFETY: allocated once; the stream that reads it has ended before. An error could not be told to anybody.
            let _ = unsafe { result::free_host(self.start) };
        }
    }
}
