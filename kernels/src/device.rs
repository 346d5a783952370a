//! The device trait and memory views.

use crate::call::Call;
use crate::network::Network;
use crate::queue::Queues;
use std::time::Instant;
use thiserror::Error;

/// Element types.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    F32,
    F64,
    U32,
    /// bfloat16: the upper half of an `F32`.
    BF16,
}

impl DType {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            DType::BF16 => 2,
            DType::F32 | DType::U32 => 4,
            DType::F64 => 8,
        }
    }
}

/// A typed range of device memory: plain data, like a device pointer. Valid while the [`Block`] it came from lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    address: u64,
    len: usize,
    dtype: DType,
}

impl View {
    /// `len` elements from a device address on, which must lie within one live block wherever the view is used.
    pub fn at(address: u64, len: usize, dtype: DType) -> View {
        View { address, len, dtype }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Device address of the first element.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.len * self.dtype.bytes()
    }

    /// Elements `start..start + len` of this view. Panics when out of range: a layout that does not fit is a bug.
    pub fn slice(&self, start: usize, len: usize) -> View {
        assert!(start + len <= self.len, "view of {} elements sliced at {start}..{}", self.len, start + len);
        View { address: self.address + (start * self.dtype.bytes()) as u64, len, dtype: self.dtype }
    }

    /// `len` elements of another type, from a byte of this view on. Panics when out of range or misaligned, as [`View::slice`].
    pub fn within(&self, byte_offset: usize, len: usize, dtype: DType) -> View {
        let end = byte_offset + len * dtype.bytes();
        assert!(end <= self.bytes(), "view of {} bytes cut at {byte_offset}..{end}", self.bytes());
        assert!(byte_offset.is_multiple_of(dtype.bytes()), "view at byte {byte_offset} is not aligned to {dtype:?}");
        View { address: self.address + byte_offset as u64, len, dtype }
    }

    /// Whether two views share a byte.
    pub fn overlaps(&self, other: &View) -> bool {
        let end = |v: &View| v.address + v.bytes() as u64;
        !self.is_empty() && !other.is_empty() && self.address < end(other) && other.address < end(self)
    }
}

/// Device memory that its owner frees by dropping it.
pub trait Block: Send + Sync {
    /// Address of its first byte.
    fn address(&self) -> u64;
    /// Its size.
    fn bytes(&self) -> usize;
}

impl dyn Block {
    /// `len` elements from a byte offset. Panics when out of range or misaligned: a layout that does not fit is a bug.
    pub fn view(&self, byte_offset: usize, len: usize, dtype: DType) -> View {
        assert!(byte_offset.is_multiple_of(dtype.bytes()), "view at byte {byte_offset} is not aligned to {dtype:?}");
        assert!(
            byte_offset + len * dtype.bytes() <= self.bytes(),
            "view of {len} {dtype:?} at byte {byte_offset} exceeds a block of {} bytes",
            self.bytes()
        );
        View { address: self.address() + byte_offset as u64, len, dtype }
    }
}

/// A device that allocates memory and runs calls.
pub trait Device: Send + Sync {
    /// For people and profiles.
    fn name(&self) -> String;

    /// Whether blocks are memory of this process, that anybody may read and write by address, and calls have ended when
    /// [`Device::run`] returns.
    fn is_host(&self) -> bool {
        true
    }

    /// Exactly `bytes` bytes, contents unspecified, aligned to 64.
    fn allocate(&self, bytes: usize) -> Result<Box<dyn Block>, KernelError>;

    /// Runs a call. Later calls of this device see its effects; it has certainly ended when [`Device::complete`] returns.
    ///
    /// # Safety
    /// Every view of the call comes from a live block of this device, and no other thread writes to what it reads or
    /// touches what it writes until it has ended. (`Program::check` proves that for the ops of a program.) Shapes and
    /// overlaps within the call are checked here and reported as errors.
    unsafe fn run(&self, call: &Call) -> Result<(), KernelError>;

    /// Waits until everything that was run has ended, and reports what went wrong meanwhile.
    fn complete(&self) -> Result<(), KernelError> {
        Ok(())
    }

    /// Runs calls one after the other, to their end, and tells how many seconds each took, by the device's own clock where it has one.
    /// The `copies`, from and to, go on beside them where the device can do that, as often as it takes.
    ///
    /// # Safety
    /// As for [`Device::run`], with the copies as calls of their own.
    unsafe fn time(&self, calls: &[Call], copies: &[(View, View)]) -> Result<Vec<f64>, KernelError> {
        let mut seconds = Vec::with_capacity(calls.len());
        for &(from, to) in copies {
            // SAFETY: the caller's promise.
            unsafe { self.run(&Call::Copy { from, to }) }?;
        }
        self.complete()?;
        for call in calls {
            let start = Instant::now();
            // SAFETY: the caller's promise.
            unsafe { self.run(call) }?;
            self.complete()?;
            seconds.push(start.elapsed().as_secs_f64());
        }
        Ok(seconds)
    }

    /// What times depend on beside its name: driver, clocks. Empty where nothing is known.
    fn details(&self) -> String {
        String::new()
    }

    /// Free and total bytes of its memory, where that is a limit of its own.
    ///
    /// # Errors
    /// See [`KernelError`].
    fn memory(&self) -> Result<Option<(u64, u64)>, KernelError> {
        Ok(None)
    }

    /// Where work can go on beside other work: its queues.
    fn queues(&self) -> Option<&dyn Queues> {
        None
    }

    /// The way from this device to those of other processes, if it has one.
    fn network(&self) -> Option<&dyn Network> {
        None
    }

    /// Copies from the host.
    ///
    /// # Safety
    /// As for [`Device::run`].
    unsafe fn upload(&self, from: &[u8], to: View) -> Result<(), KernelError>;

    /// Copies to the host.
    ///
    /// # Safety
    /// As for [`Device::run`].
    unsafe fn download(&self, from: View, to: &mut [u8]) -> Result<(), KernelError>;
}

/// Why a device could not do it.
#[derive(Debug, Error)]
pub enum KernelError {
    /// Operands that do not fit together: a bug of the caller, caught before memory is touched.
    #[error("{call}: {what}")]
    Shape { call: &'static str, what: String },
    /// Data that an operator cannot work on, found while it ran: its outputs are undefined.
    #[error("{call}: {what}")]
    Value { call: &'static str, what: String },
    /// The operator exists, but not for such operands on this device.
    #[error("{call} on device {device}: {what}")]
    Unsupported { call: &'static str, device: String, what: String },
    /// The device is not there, or what it needs to run is not.
    #[error("{0}")]
    Unavailable(String),
    /// The device, its driver or its libraries failed.
    #[error("device {device}: {what}")]
    Machine { device: String, what: String },
    /// No memory left.
    #[error("device {device}: cannot allocate {bytes} bytes")]
    OutOfMemory { device: String, bytes: usize },
}
