//! GPUs of NVIDIA: calls as launches of the kernels in `kernels/cuda` and as products of cuBLASLt.
//!
//! [`Gpu`] turns calls into launches on a [`Machine`]; [`launches`] holds the arithmetic of that. The libraries are loaded when a
//! device is opened, never before ([`libraries`]).

mod algorithms;
mod attention;
mod clock;
mod compile;
mod driver;
mod emulated;
mod head;
mod launches;
mod libraries;
mod machine;
mod nccl;
mod nccl_library;
mod products;
mod sources;
mod staging;

use crate::call::Call;
use crate::device::{Block, Device, KernelError, View};
use crate::network::Network;
use crate::queue::{Moment, Queue, Queues, Sequence};
use crate::streams::Pace;
use machine::Machine;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

pub use libraries::CudaLibraries;

/// A GPU through its driver.
pub type CudaDevice = Gpu<driver::Cuda>;

/// The same kernels, run by the CPU: slow, and for tests.
pub type EmulatedGpu = Gpu<emulated::Emulated>;

/// A stream of a GPU as a device that launches kernels. Calls are queued in one order and run behind the caller's back.
pub struct Gpu<M> {
    machine: M,
    /// Parts of sums; a call that uses it holds it until all of its launches are queued.
    parts: Mutex<Box<dyn Block>>,
}

impl<M: Machine> Gpu<M> {
    fn with(machine: M) -> Result<Gpu<M>, KernelError> {
        let parts = machine.allocate(launches::PARTS_BYTES)?;
        Ok(Gpu { machine, parts: Mutex::new(parts) })
    }
}

impl CudaDevice {
    /// Opens GPU number `ordinal` of those that the driver shows. Compiled kernels are kept in `cache`.
    ///
    /// # Errors
    /// [`KernelError::Unavailable`] says what is missing and where it was looked for.
    pub fn open(ordinal: u32, cache: &Path) -> Result<CudaDevice, KernelError> {
        Gpu::with(driver::Cuda::open(ordinal, cache)?)
    }
}

impl EmulatedGpu {
    /// Compiles the kernels with a C++ compiler (`CXX`, `c++`, `g++` or `clang++`); what was compiled is kept in `cache`.
    ///
    /// # Errors
    /// [`KernelError::Unavailable`] without a compiler, or when it refuses the sources.
    pub fn open(cache: &Path) -> Result<EmulatedGpu, KernelError> {
        EmulatedGpu::at_pace(cache, Pace::Late)
    }

    /// The same, with the work of queues done in an order of choice.
    ///
    /// # Errors
    /// As for [`EmulatedGpu::open`].
    pub fn at_pace(cache: &Path, pace: Pace) -> Result<EmulatedGpu, KernelError> {
        Gpu::with(emulated::Emulated::open(cache, pace)?)
    }
}

impl<M: Machine> Device for Gpu<M> {
    fn name(&self) -> String {
        self.machine.name()
    }

    fn is_host(&self) -> bool {
        false
    }

    fn allocate(&self, bytes: usize) -> Result<Box<dyn Block>, KernelError> {
        self.machine.allocate(bytes)
    }

    unsafe fn run(&self, call: &Call) -> Result<(), KernelError> {
        call.check()?;
        let parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: `check` has proved that operands have the lengths that the kernels assume and that nothing that is written
        // overlaps another operand; the rest is the caller's promise.
        unsafe { launches::run(&self.machine, call, parts.address()) }
    }

    fn complete(&self) -> Result<(), KernelError> {
        self.machine.complete()
    }

    unsafe fn time(&self, calls: &[Call], copies: &[(View, View)]) -> Result<Vec<f64>, KernelError> {
        calls.iter().try_for_each(Call::check)?;
        if let Some((from, to)) = copies.iter().find(|(from, to)| from.bytes() != to.bytes() || from.overlaps(to)) {
            let what = format!("{} bytes to {}, apart from each other", from.bytes(), to.bytes());
            return Err(KernelError::Shape { call: "Copy", what });
        }
        let copies: Vec<_> = copies.iter().map(|(from, to)| (from.address(), to.address(), from.bytes())).collect();
        let parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: as for `run`.
        let mut work = |n: usize| unsafe { launches::run(&self.machine, &calls[n], parts.address()) };
        // SAFETY: the caller's promise.
        unsafe { self.machine.time(calls.len(), &mut work, &copies) }
    }

    fn details(&self) -> String {
        self.machine.details()
    }

    fn memory(&self) -> Result<Option<(u64, u64)>, KernelError> {
        self.machine.memory()
    }

    fn queues(&self) -> Option<&dyn Queues> {
        Some(self)
    }

    fn network(&self) -> Option<&dyn Network> {
        self.machine.network()
    }

    unsafe fn upload(&self, from: &[u8], to: View) -> Result<(), KernelError> {
        check_transfer("upload", from.len(), to)?;
        // SAFETY: the caller's promise.
        unsafe { self.machine.upload(from, to.address()) }
    }

    unsafe fn download(&self, from: View, to: &mut [u8]) -> Result<(), KernelError> {
        check_transfer("download", to.len(), from)?;
        // SAFETY: the caller's promise.
        unsafe { self.machine.download(from.address(), to) }
    }
}

impl<M: Machine> Queues for Gpu<M> {
    fn open(&self) -> Result<Box<dyn Queue>, KernelError> {
        Ok(Box::new(Gpu::with(self.machine.beside()?)?))
    }

    fn room(&self) -> u64 {
        self.machine.room()
    }

    fn moment(&self) -> Result<Moment, KernelError> {
        self.machine.moment()
    }

    fn release(&self, moments: &[Moment]) {
        self.machine.release(moments);
    }

    fn reach(&self, moment: Moment) -> Result<(), KernelError> {
        self.machine.reach(moment)
    }

    fn seconds(&self, from: Moment, to: Moment) -> Result<f64, KernelError> {
        self.machine.seconds(from, to)
    }
}

impl<M: Machine> Queue for Gpu<M> {
    fn set(&self, moment: Moment) -> Result<(), KernelError> {
        self.machine.set(moment)
    }

    fn follow(&self, moment: Moment) -> Result<(), KernelError> {
        self.machine.follow(moment)
    }

    fn keep(&self) -> Result<(), KernelError> {
        self.machine.keep()
    }

    fn kept(&self) -> Result<Sequence, KernelError> {
        self.machine.kept()
    }

    unsafe fn replay(&self, sequence: Sequence) -> Result<(), KernelError> {
        // SAFETY: the caller's promise.
        unsafe { self.machine.replay(sequence) }
    }
}

fn check_transfer(call: &'static str, host: usize, view: View) -> Result<(), KernelError> {
    if host == view.bytes() {
        return Ok(());
    }
    Err(KernelError::Shape { call, what: format!("host has {host} bytes, the view {}", view.bytes()) })
}
