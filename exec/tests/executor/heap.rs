//! A device of host memory that knows the few calls that the executor itself makes.

use paceline_kernels::{Block, Call, DType, Device, KernelError, View};

/// # Safety
/// The view must be of living host memory that nobody else writes to.
pub unsafe fn floats<'a>(view: View) -> &'a mut [f32] {
    unsafe { std::slice::from_raw_parts_mut(view.address() as *mut f32, view.len()) }
}

/// Host memory, poisoned.
pub struct Heap;

struct HeapBlock {
    words: Box<[u64]>,
    bytes: usize,
}

impl Block for HeapBlock {
    fn address(&self) -> u64 {
        self.words.as_ptr() as u64
    }

    fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Device for Heap {
    fn name(&self) -> String {
        "heap".into()
    }

    fn allocate(&self, bytes: usize) -> Result<Box<dyn Block>, KernelError> {
        Ok(Box::new(HeapBlock { words: vec![0x5555_5555_5555_5555; bytes.div_ceil(8)].into(), bytes }))
    }

    unsafe fn run(&self, call: &Call) -> Result<(), KernelError> {
        // SAFETY: the caller's promise.
        unsafe {
            match *call {
                Call::Zero { x } if x.dtype() == DType::F64 => *(x.address() as *mut f64) = 0.0,
                Call::Zero { x } => floats(x).fill(0.0),
                Call::SumSquares { x, out } => {
                    *(out.address() as *mut f64) += floats(x).iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
                }
                // Everything decays, and nothing is rounded.
                Call::AdamW { parameters, gradients, first, second, norm, with, rounded: None, .. } => {
                    let norm = (*(norm.address() as *const f64)).sqrt();
                    let clip = with.clip.map_or(1.0, |clip| (f64::from(clip) / norm).min(1.0)) as f32;
                    let (p, g) = (floats(parameters), floats(gradients));
                    let (m, v) = (floats(first), floats(second));
                    for i in 0..p.len() {
                        let gradient = g[i] * clip;
                        m[i] = with.beta1 * m[i] + (1.0 - with.beta1) * gradient;
                        v[i] = with.beta2 * v[i] + (1.0 - with.beta2) * gradient * gradient;
                        let m_hat = m[i] / (1.0 - with.beta1.powi(with.step as i32));
                        let v_hat = v[i] / (1.0 - with.beta2.powi(with.step as i32));
                        p[i] -= with.lr * (m_hat / (v_hat.sqrt() + with.epsilon) + with.weight_decay * p[i]);
                        g[i] = 0.0;
                    }
                }
                _ => return Err(KernelError::Shape { call: "heap", what: format!("{call:?} is not for the toy") }),
            }
        }
        Ok(())
    }

    unsafe fn upload(&self, from: &[u8], to: View) -> Result<(), KernelError> {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to.address() as *mut u8, from.len()) };
        Ok(())
    }

    unsafe fn download(&self, from: View, to: &mut [u8]) -> Result<(), KernelError> {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(from.address() as *const u8, to.as_mut_ptr(), to.len()) };
        Ok(())
    }
}
