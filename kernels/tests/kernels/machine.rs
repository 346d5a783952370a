//! Operands on the device, random values, comparison, and finite differences.

use paceline_kernels::{Block, Call, DType, Device, KernelError, View};
use std::sync::LazyLock;

pub static DEVICE: LazyLock<Box<dyn Device>> = LazyLock::new(crate::device);

/// One array on the device, in a block of its own.
pub struct Array {
    block: Box<dyn Block>,
    dtype: DType,
}

impl Array {
    fn new(bytes: &[u8], dtype: DType) -> Array {
        let block = DEVICE.allocate(bytes.len()).unwrap();
        let array = Array { block, dtype };
        // SAFETY: the block lives in `array`, and no other thread knows it.
        unsafe { DEVICE.upload(bytes, array.view()) }.unwrap();
        array
    }

    pub fn view(&self) -> View {
        self.block.view(0, self.block.bytes() / self.dtype.bytes(), self.dtype)
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.block.bytes()];
        // SAFETY: as above.
        unsafe { DEVICE.download(self.view(), &mut bytes) }.unwrap();
        bytes
    }

    /// Its elements as `f64`.
    pub fn values(&self) -> Vec<f64> {
        let bytes = self.bytes();
        match self.dtype {
            DType::F32 => bytes.as_chunks().0.iter().map(|&b| f64::from(f32::from_ne_bytes(b))).collect(),
            DType::F64 => bytes.as_chunks().0.iter().map(|&b| f64::from_ne_bytes(b)).collect(),
            DType::BF16 => {
                let widen = |&b: &[u8; 2]| f64::from(f32::from_bits(u32::from(u16::from_ne_bytes(b)) << 16));
                bytes.as_chunks().0.iter().map(widen).collect()
            }
            DType::U32 => bytes.as_chunks().0.iter().map(|&b| f64::from(u32::from_ne_bytes(b))).collect(),
        }
    }

    /// Its exact contents.
    pub fn bits(&self) -> Vec<u8> {
        self.bytes()
    }
}

pub fn floats(values: &[f64]) -> Array {
    let bytes: Vec<u8> = values.iter().flat_map(|&x| (x as f32).to_ne_bytes()).collect();
    Array::new(&bytes, DType::F32)
}

pub fn doubles(values: &[f64]) -> Array {
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_ne_bytes()).collect();
    Array::new(&bytes, DType::F64)
}

pub fn indices(values: &[u32]) -> Array {
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_ne_bytes()).collect();
    Array::new(&bytes, DType::U32)
}

/// Values that bfloat16 holds exactly, as it.
pub fn halves(values: &[f64]) -> Array {
    let narrow = |&x: &f64| {
        let bits = (x as f32).to_bits();
        assert!(bits & 0xffff == 0 || x.is_nan(), "{x} is no bfloat16");
        ((bits >> 16) as u16).to_ne_bytes()
    };
    Array::new(&values.iter().flat_map(narrow).collect::<Vec<u8>>(), DType::BF16)
}

/// An output that a kernel must fill: any NaN that is left, or that is read, shows.
pub fn poisoned(len: usize) -> Array {
    floats(&vec![f64::NAN; len])
}

/// As [`poisoned`], in bfloat16.
pub fn poisoned_halves(len: usize) -> Array {
    halves(&vec![f64::NAN; len])
}

/// Runs a call on arrays that outlive it.
pub fn try_run(call: Call) -> Result<(), KernelError> {
    // SAFETY: tests make calls of views of arrays that they hold, on one thread.
    unsafe { DEVICE.run(&call) }?;
    DEVICE.complete()
}

/// Runs a call that must succeed.
pub fn run(call: Call) {
    try_run(call).unwrap();
}

/// Random numbers that depend on the seed alone (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Values in `-bound..bound` that single precision holds exactly.
    pub fn floats(&mut self, len: usize, bound: f64) -> Vec<f64> {
        let unit = |bits: u64| (bits >> 40) as f64 / (1u64 << 23) as f64 - 1.0;
        (0..len).map(|_| f64::from((unit(self.bits()) * bound) as f32)).collect()
    }

    pub fn indices(&mut self, len: usize, below: u32) -> Vec<u32> {
        (0..len).map(|_| (self.bits() % u64::from(below)) as u32).collect()
    }
}

/// Every element within `tolerance` of the expected one, relative to it or to 1.
#[track_caller]
pub fn assert_close(name: &str, got: &Array, expected: &[f64], tolerance: f64) {
    let got = got.values();
    assert_eq!(got.len(), expected.len(), "{name}: number of elements");
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let error = (got - expected).abs() / expected.abs().max(1.0);
        assert!(error <= tolerance, "{name}[{i}] is {got}, must be {expected}: off by {error:e}");
    }
}

/// Gradient of `f` by central differences in double precision.
pub fn gradient(at: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    const H: f64 = 1e-5;
    let mut x = at.to_vec();
    (0..at.len())
        .map(|i| {
            x[i] = at[i] + H;
            let above = f(&x);
            x[i] = at[i] - H;
            let below = f(&x);
            x[i] = at[i];
            (above - below) / (2.0 * H)
        })
        .collect()
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub fn plus(a: &[f64], b: &[f64]) -> Vec<f64> {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}
