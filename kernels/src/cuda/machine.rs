//! What the calls need of a GPU: memory, launches of kernels, matrix products, one order in which all of it happens, and moments by
//! which such orders (streams) wait for each other.
//!
//! Two machines implement it: the driver with its libraries ([`super::driver`]), and a CPU that runs the kernels' own sources
//! thread for thread ([`super::emulated`]). Everything above this trait, and so every grid, every argument and every order of
//! launches, is tested without a GPU.

use crate::device::{Block, DType, KernelError};
use crate::network::Network;
use crate::queue::{Moment, Sequence};
use smallvec::SmallVec;
use std::ffi::c_void;

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
    /// A structure of 32-bit words.
    Words([u32; WORDS]),
}

/// Words of [`Argument::Words`].
pub const WORDS: usize = 16;

impl Argument {
    /// Number of its bytes.
    pub fn bytes(self) -> u32 {
        match self {
            Argument::U32(_) | Argument::F32(_) => 4,
            Argument::Address(_) | Argument::U64(_) | Argument::F64(_) => 8,
            Argument::Words(_) => 4 * WORDS as u32,
        }
    }
}

/// Arguments as they lie in memory, each at a multiple of eight bytes.
pub struct Packed {
    words: SmallVec<[u64; 24]>,
    starts: SmallVec<[usize; 16]>,
}

impl Packed {
    pub fn new(arguments: &[Argument]) -> Packed {
        let mut packed = Packed { words: SmallVec::new(), starts: SmallVec::new() };
        for argument in arguments {
            packed.starts.push(packed.words.len());
            match *argument {
                Argument::Address(x) | Argument::U64(x) => packed.words.push(x),
                // The first four bytes of eight, in the byte order of every host that has such a GPU.
                Argument::U32(x) => packed.words.push(u64::from(x)),
                Argument::F32(x) => packed.words.push(u64::from(x.to_bits())),
                Argument::F64(x) => packed.words.push(x.to_bits()),
                Argument::Words(all) => {
                    let pairs = all.as_chunks().0.iter().map(|&[low, high]| u64::from(high) << 32 | u64::from(low));
                    packed.words.extend(pairs);
                }
            }
        }
        packed
    }

    /// Where each lies, as long as `self` stays where it is.
    pub fn pointers(&mut self) -> SmallVec<[*mut c_void; 16]> {
        let Packed { words, starts } = self;
        starts.iter().map(|&start| std::ptr::from_mut(&mut words[start]).cast()).collect()
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

/// What happens to a product before it is written, beside what it is added to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Epilogue {
    None,
    /// Each row is added to [`Product::bias`].
    Bias,
    /// As `Bias`; the sum goes to [`Product::beside`] and its GELU to `c`.
    BiasGelu,
    /// It is multiplied by the slope of GELU at [`Product::beside`].
    GeluSlope,
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
    /// Adds what lies at [`Product::base`], with the layout of `c`.
    pub accumulate: bool,
    pub epilogue: Epilogue,
}

/// `c[m,n] = epilogue(op(a)[m,k] * op(b)[k,n] (+ base[m,n]))`, row-major, with sums in `F32`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Product {
    pub shape: ProductShape,
    pub a: u64,
    pub b: u64,
    pub c: u64,
    /// `c` itself, or another matrix.
    pub base: u64,
    /// `n` elements of the type of `c`, where the epilogue has them.
    pub bias: u64,
    /// A matrix of the type of `c` without gaps between rows, where the epilogue has it.
    pub beside: u64,
}

impl Product {
    /// Added to `c`, or replacing it.
    pub fn new(shape: ProductShape, a: u64, b: u64, c: u64) -> Product {
        Product { shape, a, b, c, base: c, bias: 0, beside: 0 }
    }

    /// What libraries ask of the operands of an epilogue: they begin at multiples of 16 bytes, and rows have a multiple of 8 elements.
    pub fn can_fuse(&self) -> bool {
        let aligned = self.bias.is_multiple_of(16) && self.beside.is_multiple_of(16);
        self.shape.epilogue == Epilogue::None || aligned && self.shape.n.is_multiple_of(8)
    }
}

/// A stream of a GPU. Work is done in the order in which it was asked for.
pub trait Machine: Send + Sync + Sized + 'static {
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

    /// Whether [`Machine::multiply`] can do the epilogue of a product; without one it can do every product.
    fn fuses(&self, product: &Product) -> Result<bool, KernelError>;

    /// Starts a product.
    ///
    /// # Safety
    /// The matrices lie in living memory of this machine, and what is written does not overlap the others, but for `base` being `c`.
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

    /// Another stream of the same GPU, whose work goes on beside this one's.
    fn beside(&self) -> Result<Self, KernelError>;

    /// Most bytes of its memory that a stream takes for itself once it computes.
    fn room(&self) -> u64 {
        0
    }

    /// A moment that was not set yet; all streams of the GPU know it.
    fn moment(&self) -> Result<Moment, KernelError>;

    /// Takes moments back that nobody uses any more.
    fn release(&self, moments: &[Moment]);

    /// The moment comes when everything that was asked for so far has ended.
    fn set(&self, moment: Moment) -> Result<(), KernelError>;

    /// What is asked for from now on begins after the moment, as it was set last.
    fn follow(&self, moment: Moment) -> Result<(), KernelError>;

    /// Lets the host wait for a moment, as it was set last.
    fn reach(&self, moment: Moment) -> Result<(), KernelError>;

    /// Seconds between two moments that have come.
    fn seconds(&self, from: Moment, to: Moment) -> Result<f64, KernelError>;

    /// Keeps what is asked for instead of doing it.
    fn keep(&self) -> Result<(), KernelError>;

    /// What was kept since [`Machine::keep`].
    fn kept(&self) -> Result<Sequence, KernelError>;

    /// Does what was kept.
    ///
    /// # Safety
    /// As for all that was kept.
    unsafe fn replay(&self, sequence: Sequence) -> Result<(), KernelError>;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_lie_where_their_pointers_say() {
        let words: [u32; WORDS] = std::array::from_fn(|n| 7 * n as u32 + 1);
        let arguments = [
            Argument::U32(3),
            Argument::Words(words),
            Argument::F32(0.5),
            Argument::Address(1 << 40),
            Argument::F64(-2.0),
        ];
        let mut packed = Packed::new(&arguments);
        let pointers = packed.pointers();
        // SAFETY: each pointer is at an argument of this type, in `packed`.
        unsafe {
            assert_eq!(*pointers[0].cast::<u32>(), 3);
            assert_eq!(*pointers[1].cast::<[u32; WORDS]>(), words);
            assert_eq!(*pointers[2].cast::<f32>(), 0.5);
            assert_eq!(*pointers[3].cast::<u64>(), 1 << 40);
            assert_eq!(*pointers[4].cast::<f64>(), -2.0);
        }
        assert_eq!(arguments.map(Argument::bytes), [4, 64, 4, 8, 8]);
    }
}
