//! What the calls need of a GPU: memory, launches of kernels, matrix products, one order in which all of it happens.
//!
//! Two machines implement it: the driver with its libraries ([`super::driver`]), and a CPU that runs the kernels' own sources
//! thread for thread ([`super::emulated`]). Everything above this trait, and so every grid, every argument and every order of
//! launches, is tested without a GPU.

use crate::device::{Block, DType, KernelError};
use crate::network::Network;
use smallvec::SmallVec;

/// A kernel of `kernels/cuda`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// Its file, without extension.
    pub source: &'static str,
    /// Its name, without the suffixes below.
    pub base: &'static str,
    /// Suffix `_f32` or `_bf16`.
    pub element: Option<DType>,
    /// Suffix of a head width it was made for.
    pub width: Option<u32>,
    /// Suffix `_wide`: it moves 16 bytes at a time and needs addresses and lengths that are multiples of that.
    pub wide: bool,
}

impl Kernel {
    pub const fn plain(source: &'static str, base: &'static str) -> Kernel {
        Kernel { source, base, element: None, width: None, wide: false }
    }

    pub const fn of(source: &'static str, base: &'static str, element: DType) -> Kernel {
        Kernel { element: Some(element), ..Kernel::plain(source, base) }
    }

    pub const fn wide(self, wide: bool) -> Kernel {
        Kernel { wide, ..self }
    }

    /// The name in the source.
    pub fn symbol(&self) -> String {
        let element = match self.element {
            Some(DType::BF16) => "_bf16",
            Some(_) => "_f32",
            None => "",
        };
        let width = self.width.map_or(String::new(), |width| format!("_{width}"));
        format!("{}{element}{width}{}", self.base, if self.wide { "_wide" } else { "" })
    }
}

/// An argument of a kernel, by value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Argument {
    /// Device address; zero is null.
    Address(u64),
    U32(u32),
    U64(u64),
    F32(f32),
    F64(f64),
}

impl Argument {
    /// Its bytes, at the begin of eight.
    pub fn bits(self) -> u64 {
        match self {
            Argument::Address(x) | Argument::U64(x) => x,
            Argument::U32(x) => u64::from(x),
            Argument::F32(x) => u64::from(x.to_bits()),
            Argument::F64(x) => x.to_bits(),
        }
    }

    /// Number of its bytes.
    pub fn bytes(self) -> u32 {
        match self {
            Argument::U32(_) | Argument::F32(_) => 4,
            Argument::Address(_) | Argument::U64(_) | Argument::F64(_) => 8,
        }
    }
}

/// A launch.
#[derive(Debug, Clone, PartialEq)]
pub struct Launch {
    pub kernel: Kernel,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    pub arguments: SmallVec<[Argument; 16]>,
}

/// A matrix in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Layout {
    pub dtype: DType,
    /// Elements from one row to the next.
    pub stride: u64,
    /// It is used transposed.
    pub transposed: bool,
}

/// Everything about a product but the addresses: what an algorithm is chosen by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ProductShape {
    pub m: u32,
    pub n: u32,
    pub k: u32,
    pub a: Layout,
    pub b: Layout,
    /// Never transposed.
    pub c: Layout,
    /// Adds to `c` instead of replacing it.
    pub accumulate: bool,
}

/// `c[m,n] (+)= op(a)[m,k] * op(b)[k,n]`, row-major, with sums in `F32`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Product {
    pub shape: ProductShape,
    pub a: u64,
    pub b: u64,
    pub c: u64,
}

/// A GPU. Work is done in the order in which it was asked for.
pub trait Machine: Send + Sync {
    /// For people and profiles.
    fn name(&self) -> String;

    /// Bytes of dynamic shared memory that a block may have.
    fn shared_limit(&self) -> u32;

    /// Exactly `bytes` bytes, aligned to 256.
    fn allocate(&self, bytes: usize) -> Result<Box<dyn Block>, KernelError>;

    /// Starts a kernel.
    ///
    /// # Safety
    /// The arguments are those of the kernel, and everything that it touches is memory of this machine that lives until it has ended.
    unsafe fn launch(&self, launch: &Launch) -> Result<(), KernelError>;

    /// Starts a product.
    ///
    /// # Safety
    /// The matrices lie in living memory of this machine, and `c` does not overlap the others.
    unsafe fn multiply(&self, product: &Product) -> Result<(), KernelError>;

    /// Starts a copy of `bytes` bytes.
    ///
    /// # Safety
    /// Both ranges lie in living memory of this machine and do not overlap.
    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), KernelError>;

    /// Starts filling with zeroes.
    ///
    /// # Safety
    /// The range lies in living memory of this machine.
    unsafe fn clear(&self, at: u64, bytes: usize) -> Result<(), KernelError>;

    /// Copies from the host; `from` may be changed when it returns.
    ///
    /// # Safety
    /// As for [`Machine::clear`].
    unsafe fn upload(&self, from: &[u8], to: u64) -> Result<(), KernelError>;

    /// Copies to the host, after all work that was asked for before.
    ///
    /// # Safety
    /// As for [`Machine::clear`].
    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<(), KernelError>;

    /// Does pieces of work one after the other, to their end; the seconds that each took. `copies` (from, to, bytes) go on beside them.
    ///
    /// # Safety
    /// As for [`Machine::copy`].
    unsafe fn time(
        &self,
        count: usize,
        work: &mut dyn FnMut(usize) -> Result<(), KernelError>,
        copies: &[(u64, u64, usize)],
    ) -> Result<Vec<f64>, KernelError>;

    /// What times depend on beside the name.
    fn details(&self) -> String {
        String::new()
    }

    /// Free and total bytes, where memory is a limit.
    fn memory(&self) -> Result<Option<(u64, u64)>, KernelError> {
        Ok(None)
    }

    /// The way to the machines of other processes.
    fn network(&self) -> Option<&dyn Network> {
        None
    }

    /// Waits until all work has ended.
    fn complete(&self) -> Result<(), KernelError>;
}
