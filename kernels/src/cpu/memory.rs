//! Host memory as device memory: aligned blocks, and the slices behind views.

use crate::device::{Block, DType, KernelError, View};
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

/// A cache line, and a full vector register.
const ALIGNMENT: usize = 64;

#[repr(align(64))]
struct Line;

/// A block of exactly the asked size.
pub(super) struct HostBlock {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the block is memory and nothing else; who may touch it when is the promise of the caller of `Device::run`.
unsafe impl Send for HostBlock {}
// SAFETY: as above; the block itself gives out addresses, not references.
unsafe impl Sync for HostBlock {}

impl HostBlock {
    /// Zeroed, so that every slice of it holds values (reading memory that was never written is undefined), and so that
    /// its pages exist before a kernel is timed on them.
    pub fn allocate(device: &str, bytes: usize) -> Result<HostBlock, KernelError> {
        let refused = || KernelError::OutOfMemory { device: device.to_owned(), bytes };
        let layout = Layout::from_size_align(bytes, ALIGNMENT).map_err(|_| refused())?;
        if bytes == 0 {
            return Ok(HostBlock { start: NonNull::<Line>::dangling().cast(), bytes });
        }
        // SAFETY: the layout has a size above zero.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(refused)?;
        // Views carry addresses as numbers.
        start.as_ptr().expose_provenance();
        Ok(HostBlock { start, bytes })
    }
}

impl Drop for HostBlock {
    fn drop(&mut self) {
        if self.bytes > 0 {
            // SAFETY: allocated with this layout, which was valid then.
            unsafe { dealloc(self.start.as_ptr(), Layout::from_size_align_unchecked(self.bytes, ALIGNMENT)) }
        }
    }
}

impl Block for HostBlock {
    fn address(&self) -> u64 {
        self.start.as_ptr().addr() as u64
    }

    fn bytes(&self) -> usize {
        self.bytes
    }
}

/// An element type of Rust behind a [`DType`].
pub(super) trait Element {
    const DTYPE: DType;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
}

impl Element for f64 {
    const DTYPE: DType = DType::F64;
}

impl Element for u32 {
    const DTYPE: DType = DType::U32;
}

/// bfloat16 as bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(super) struct Narrow(pub u16);

impl Element for Narrow {
    const DTYPE: DType = DType::BF16;
}

fn pointer<T: Element>(view: View) -> *mut T {
    assert!(view.dtype() == T::DTYPE, "a view of {:?} is used as {:?}", view.dtype(), T::DTYPE);
    std::ptr::with_exposed_provenance_mut(view.address() as usize)
}

/// The elements of a view.
///
/// # Safety
/// The view comes from a living [`HostBlock`], and nobody writes to it while the slice lives.
pub(super) unsafe fn read<'a, T: Element>(view: View) -> &'a [T] {
    // SAFETY: views are in bounds and aligned by construction, blocks are initialised, and the caller promises the rest.
    unsafe { std::slice::from_raw_parts(pointer(view), view.len()) }
}

/// The elements of a view, to write.
///
/// # Safety
/// As for [`read`], and nobody else reads it while the slice lives.
pub(super) unsafe fn write<'a, T: Element>(view: View) -> &'a mut [T] {
    // SAFETY: as above.
    unsafe { std::slice::from_raw_parts_mut(pointer(view), view.len()) }
}

/// The bytes of a view of any type.
///
/// # Safety
/// As for [`read`].
pub(super) unsafe fn bytes<'a>(view: View) -> &'a [u8] {
    // SAFETY: as above; every element is plain bytes.
    unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(view.address() as usize), view.bytes()) }
}

/// The bytes of a view of any type, to write.
///
/// # Safety
/// As for [`write`].
pub(super) unsafe fn bytes_mut<'a>(view: View) -> &'a mut [u8] {
    // SAFETY: as above; any bytes are valid elements of the three types.
    unsafe {
        std::slice::from_raw_parts_mut(std::ptr::with_exposed_provenance_mut(view.address() as usize), view.bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_aligned_zeroed_and_exact() {
        for bytes in [0, 1, 4, 63, 64, 65, 4096, 100_003] {
            let block = HostBlock::allocate("cpu", bytes).unwrap();
            assert_eq!(block.address() % 64, 0);
            assert_eq!(block.bytes(), bytes);
            let block: Box<dyn Block> = Box::new(block);
            let view = block.view(0, bytes / 4, DType::F32);
            // SAFETY: the block lives and nobody else knows it.
            assert!(unsafe { read::<f32>(view) }.iter().all(|x| x.to_bits() == 0));
        }
    }

    #[test]
    fn sizes_that_no_machine_has_are_refused() {
        for bytes in [usize::MAX, isize::MAX as usize - 63] {
            let refused = HostBlock::allocate("cpu", bytes).err().expect("no machine has that much memory");
            assert!(matches!(refused, KernelError::OutOfMemory { bytes: asked, .. } if asked == bytes), "{refused}");
        }
    }
}
