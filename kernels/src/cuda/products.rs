//! Matrix products through cuBLASLt, with the algorithm for a shape chosen once, and kept for later runs.
//!
//! cuBLASLt is column-major. A row-major matrix read column by column is its transpose, so `c = a b` is asked for as
//! `c^T = b^T a^T`: operands change places, strides and transpositions stay as they are.

use super::algorithms::{Algorithms, Chosen, key};
use super::machine::{Epilogue, Layout, Product, ProductShape};
use crate::device::DType;
use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// Bytes of workspace: what cuBLAS itself takes on the largest GPUs.
pub(super) const WORKSPACE: usize = 32 << 20;

/// By shape and alignment; nothing for a product with an epilogue that the library cannot do.
type Plans = HashMap<(ProductShape, [u32; 3]), Option<Plan>>;

/// A handle and the algorithms found so far.
pub(super) struct Products {
    handle: sys::cublasLtHandle_t,
    plans: Mutex<Plans>,
    algorithms: Mutex<Algorithms>,
}

// SAFETY: handle and descriptors are used under the lock of `plans`, and cuBLASLt handles may be used from any thread.
unsafe impl Send for Products {}
// SAFETY: as above.
unsafe impl Sync for Products {}

/// How products of one shape and alignment are done.
struct Plan {
    product: sys::cublasLtMatmulDesc_t,
    left: sys::cublasLtMatrixLayout_t,
    right: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulHeuristicResult_t,
}

/// What cuBLASLt is asked for: its left operand is our `b`, its rows are our columns.
#[derive(Debug, PartialEq, Eq)]
struct ColumnMajor {
    rows: u64,
    cols: u64,
    left: Stored,
    right: Stored,
    out: Stored,
}

/// A matrix as it lies in memory, column by column.
#[derive(Debug, PartialEq, Eq)]
struct Stored {
    rows: u64,
    cols: u64,
    stride: i64,
    transposed: bool,
}

impl ColumnMajor {
    fn of(shape: &ProductShape) -> ColumnMajor {
        let (m, n, k) = (u64::from(shape.m), u64::from(shape.n), u64::from(shape.k));
        // `rows` and `cols` are those of the operand as it is used, row-major.
        let stored = |layout: Layout, rows: u64, cols: u64| {
            let (rows, cols) = if layout.transposed { (cols, rows) } else { (rows, cols) };
            Stored { rows: cols, cols: rows, stride: layout.stride as i64, transposed: layout.transposed }
        };
        ColumnMajor {
            rows: n,
            cols: m,
            left: stored(shape.b, k, n),
            right: stored(shape.a, m, k),
            out: stored(shape.c, m, n),
        }
    }
}

fn data_type(dtype: DType) -> sys::cudaDataType {
    match dtype {
        DType::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
        _ => sys::cudaDataType_t::CUDA_R_32F,
    }
}

/// The largest power of two, at most 256, that an address is a multiple of.
fn alignment(address: u64) -> u32 {
    1 << address.trailing_zeros().min(8)
}

impl Products {
    /// For the current context; choices for `device` are kept in the folder `cache`.
    pub fn new(device: &str, cache: &Path) -> Result<Products, CublasError> {
        let handle = result::create_handle()?;
        // SAFETY: the library is loaded; the function has no arguments.
        let version = unsafe { sys::cublasLtGetVersion() };
        let algorithms = Mutex::new(Algorithms::open(cache, device, &format!("cuBLASLt-{version}")));
        Ok(Products { handle, plans: Mutex::new(HashMap::new()), algorithms })
    }

    /// Queues a product on a stream of the current context. `workspace` is the address of [`WORKSPACE`] bytes that the stream has for
    /// itself.
    ///
    /// # Safety
    /// As for [`super::machine::Machine::multiply`]; the stream lives.
    pub unsafe fn multiply(
        &self,
        product: &Product,
        workspace: u64,
        stream: sys::cudaStream_t,
    ) -> Result<(), CublasError> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(plan) = self.planned(&mut plans, product)? else {
            return Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED));
        };
        point(plan.product, product)?;
        let (one, beta) = (1.0f32, if product.shape.accumulate { 1.0f32 } else { 0.0 });
        // SAFETY: descriptors live as long as the plan; addresses are the caller's promise.
        unsafe {
            result::matmul(
                self.handle,
                plan.product,
                (&raw const one).cast(),
                (&raw const beta).cast(),
                product.b as *const c_void,
                plan.left,
                product.a as *const c_void,
                plan.right,
                product.base as *const c_void,
                plan.out,
                product.c as *mut c_void,
                plan.out,
                &raw const plan.algorithm.algo,
                workspace as *mut c_void,
                plan.algorithm.workspaceSize,
                stream,
            )
        }
    }

    /// Whether the library can do the epilogue of a product.
    pub fn can(&self, product: &Product) -> bool {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        product.shape.epilogue == Epilogue::None || self.planned(&mut plans, product).is_ok_and(|plan| plan.is_some())
    }

    /// The plan of a product, made when it is first asked for.
    fn planned<'p>(&self, plans: &'p mut Plans, product: &Product) -> Result<Option<&'p Plan>, CublasError> {
        let written = product.c | if product.shape.accumulate { product.base } else { 0 };
        let key = (product.shape, [product.a, product.b, written].map(alignment));
        let plan = match plans.entry(key) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => {
                let plan = match self.plan(product, key.1) {
                    Err(_) if product.shape.epilogue != Epilogue::None => None,
                    plan => Some(plan?),
                };
                place.insert(plan)
            }
        };
        Ok(plan.as_ref())
    }

    /// Takes what an earlier run has chosen, or asks the heuristics. What is created before an error is lost, which happens once per shape
    /// that cannot be done.
    fn plan(&self, of: &Product, [a, b, c]: [u32; 3]) -> Result<Plan, CublasError> {
        let shape = &of.shape;
        let asked = ColumnMajor::of(shape);
        let layout = |stored: &Stored, dtype| {
            result::create_matrix_layout(data_type(dtype), stored.rows, stored.cols, stored.stride)
        };
        let (left, right) = (layout(&asked.left, shape.b.dtype)?, layout(&asked.right, shape.a.dtype)?);
        let out = layout(&asked.out, shape.c.dtype)?;
        let product =
            result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F)?;
        let operation = |stored: &Stored| i32::from(stored.transposed);
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        for (attribute, value) in [
            (Attribute::CUBLASLT_MATMUL_DESC_TRANSA, operation(&asked.left)),
            (Attribute::CUBLASLT_MATMUL_DESC_TRANSB, operation(&asked.right)),
        ] {
            // SAFETY: the attribute is a 32-bit enumeration (CUBLAS_OP_N is 0, CUBLAS_OP_T is 1).
            unsafe { result::set_matmul_desc_attribute(product, attribute, (&raw const value).cast(), 4) }?;
        }
        if shape.epilogue != Epilogue::None {
            let epilogue = epilogue(shape.epilogue);
            // Elements from one row of the matrix beside to the next.
            let stride = i64::from(shape.n);
            // SAFETY: the first attribute is a 32-bit enumeration, the second has 64 bits.
            unsafe {
                let (one, other) =
                    (Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD);
                result::set_matmul_desc_attribute(product, one, (&raw const epilogue).cast(), 4)?;
                if of.beside != 0 {
                    result::set_matmul_desc_attribute(product, other, (&raw const stride).cast(), 8)?;
                }
            }
            point(product, of)?;
        }
        let key = key(shape, [a, b, c], WORKSPACE);
        let mut algorithms = self.algorithms.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(algorithm) =
            algorithms.get(&key).and_then(|chosen| self.restored(chosen, product, [left, right, out]))
        {
            return Ok(Plan { product, left, right, out, algorithm });
        }
        let algorithm = self.preferred(product, [left, right, out], [b, a, c])?;
        let workspace = algorithm.workspaceSize as u64;
        algorithms.keep(key, Chosen { words: algorithm.algo.data, workspace });
        Ok(Plan { product, left, right, out, algorithm })
    }

    /// What the library's heuristics prefer, where left and right operand and result are aligned so.
    fn preferred(
        &self,
        product: sys::cublasLtMatmulDesc_t,
        [left, right, out]: [sys::cublasLtMatrixLayout_t; 3],
        [for_left, for_right, for_out]: [u32; 3],
    ) -> Result<sys::cublasLtMatmulHeuristicResult_t, CublasError> {
        let preference = result::create_matmul_pref()?;
        use sys::cublasLtMatmulPreferenceAttributes_t as Preference;
        let workspace = WORKSPACE as u64;
        // SAFETY: the attribute is 64 bits wide, the alignments are 32.
        unsafe {
            result::set_matmul_pref_attribute(
                preference,
                Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const workspace).cast(),
                8,
            )?;
            for (attribute, bytes) in [
                (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, for_left),
                (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, for_right),
                (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, for_out),
                (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, for_out),
            ] {
                result::set_matmul_pref_attribute(preference, attribute, (&raw const bytes).cast(), 4)?;
            }
        }
        // SAFETY: the caller's descriptors live, the preference was created above.
        let algorithm =
            unsafe { result::get_matmul_algo_heuristic(self.handle, product, left, right, out, out, preference) };
        // SAFETY: created above, used no more.
        unsafe { result::destroy_matmul_pref(preference) }?;
        algorithm
    }

    /// A choice of an earlier run, if the library says that it can do the product so.
    fn restored(
        &self,
        chosen: Chosen,
        product: sys::cublasLtMatmulDesc_t,
        [left, right, out]: [sys::cublasLtMatrixLayout_t; 3],
    ) -> Option<sys::cublasLtMatmulHeuristicResult_t> {
        let algo = sys::cublasLtMatmulAlgo_t { data: chosen.words };
        let mut checked = MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::uninit();
        let place = checked.as_mut_ptr();
        // SAFETY: everything lives; where the check succeeds, it has written the result.
        let checked = unsafe {
            sys::cublasLtMatmulAlgoCheck(self.handle, product, left, right, out, out, &algo, place).result().ok()?;
            // It leaves the algorithm itself as it was.
            (&raw mut (*place).algo).write(algo);
            checked.assume_init()
        };
        (checked.workspaceSize as u64 == chosen.workspace && checked.workspaceSize <= WORKSPACE).then_some(checked)
    }
}

/// Our left operand is the library's right one, so its rows are our columns: its bias, one element per row of the result, is one
/// element per column of ours.
fn epilogue(epilogue: Epilogue) -> sys::cublasLtEpilogue_t {
    match epilogue {
        Epilogue::None => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_DEFAULT,
        Epilogue::Bias => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS,
        Epilogue::BiasGelu => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
        Epilogue::GeluSlope => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_DGELU,
    }
}

/// Tells a descriptor where the operands of the epilogue lie.
fn point(descriptor: sys::cublasLtMatmulDesc_t, product: &Product) -> Result<(), CublasError> {
    use sys::cublasLtMatmulDescAttributes_t as Attribute;
    for (attribute, address) in [
        (Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, product.bias),
        (Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, product.beside),
    ] {
        if address != 0 {
            // SAFETY: both attributes are pointers.
            unsafe { result::set_matmul_desc_attribute(descriptor, attribute, (&raw const address).cast(), 8) }?;
        }
    }
    Ok(())
}

impl Drop for Products {
    fn drop(&mut self) {
        let plans = self.plans.get_mut().unwrap_or_else(PoisonError::into_inner);
        for plan in plans.values().flatten() {
            // SAFETY: each was created once and is not used any more. Errors could not be told to anybody.
            unsafe {
                let _ = result::destroy_matmul_desc(plan.product);
                for layout in [plan.left, plan.right, plan.out] {
                    let _ = result::destroy_matrix_layout(layout);
                }
            }
        }
        // SAFETY: as above.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A column-major product as BLAS defines it, on the bytes that a row-major caller has.
    fn gemm(asked: &ColumnMajor, k: u64, left: &[f64], right: &[f64], out: &mut [f64]) {
        let at = |stored: &Stored, row: u64, col: u64| {
            let (row, col) = if stored.transposed { (col, row) } else { (row, col) };
            assert!(row < stored.rows && col < stored.cols);
            (row + col * stored.stride as u64) as usize
        };
        for row in 0..asked.rows {
            for col in 0..asked.cols {
                let terms = (0..k).map(|i| left[at(&asked.left, row, i)] * right[at(&asked.right, i, col)]);
                out[at(&asked.out, row, col)] = terms.sum();
            }
        }
    }

    #[test]
    fn what_is_asked_of_a_column_major_library_is_the_row_major_product() {
        let (m, n, k) = (3u32, 4u32, 5u32);
        for (transpose_a, transpose_b) in [(false, false), (true, false), (false, true), (true, true)] {
            // One element between rows that does not belong to the matrix.
            let layout = |cols: u32, transposed| Layout { dtype: DType::F32, stride: u64::from(cols) + 1, transposed };
            let shape = ProductShape {
                m,
                n,
                k,
                a: layout(if transpose_a { m } else { k }, transpose_a),
                b: layout(if transpose_b { k } else { n }, transpose_b),
                c: layout(n, false),
                accumulate: false,
                epilogue: Epilogue::None,
            };
            let a: Vec<f64> = (0..40).map(|i| f64::from(i * i % 17)).collect();
            let b: Vec<f64> = (0..40).map(|i| f64::from(i * 7 % 13) - 5.0).collect();
            let mut c = vec![0.0; 40];
            gemm(&ColumnMajor::of(&shape), u64::from(k), &b, &a, &mut c);
            let element = |x: &[f64], layout: Layout, row: u32, col: u32| {
                let (row, col) = if layout.transposed { (col, row) } else { (row, col) };
                x[row as usize * layout.stride as usize + col as usize]
            };
            for row in 0..m {
                for col in 0..n {
                    let terms = (0..k).map(|i| element(&a, shape.a, row, i) * element(&b, shape.b, i, col));
                    assert_eq!(c[row as usize * 5 + col as usize], terms.sum::<f64>(), "{transpose_a} {transpose_b}");
                }
            }
        }
    }

    #[test]
    fn alignment_is_the_largest_power_of_two_up_to_256() {
        for (address, expected) in [(1, 1), (2, 2), (24, 8), (0x7f00_0000_0100, 256), (0x1000, 256), (0x1010, 16)] {
            assert_eq!(alignment(address), expected);
        }
    }
}
