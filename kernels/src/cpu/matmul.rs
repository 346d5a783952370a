//! Matrix products on one thread, by the library that is fastest for the layout (docs/kernels.md has the figures).

use std::marker::PhantomData;

/// A matrix within a slice: element `(i, j)` lies at `i * row_stride + j * column_stride`. One stride is 1.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    start: *const f32,
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
    data: PhantomData<&'a [f32]>,
}

impl<'a> Matrix<'a> {
    /// `rows` rows of `columns`, each `row_stride` after the one before.
    pub fn new(data: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Matrix<'a> {
        check_bounds(data.len(), rows, columns, row_stride);
        Matrix { start: data.as_ptr(), rows, columns, row_stride, column_stride: 1, data: PhantomData }
    }

    /// Rows that follow each other without a gap.
    pub fn dense(data: &'a [f32], rows: usize, columns: usize) -> Matrix<'a> {
        Matrix::new(data, rows, columns, columns)
    }

    /// Its transpose, in place.
    pub fn transposed(self) -> Matrix<'a> {
        Matrix {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// A matrix to write, with rows of neighbouring elements.
pub(super) struct MatrixMut<'a> {
    start: *mut f32,
    rows: usize,
    columns: usize,
    row_stride: usize,
    data: PhantomData<&'a mut [f32]>,
}

impl<'a> MatrixMut<'a> {
    /// `rows` rows of `columns`, each `row_stride` after the one before.
    pub fn new(data: &'a mut [f32], rows: usize, columns: usize, row_stride: usize) -> MatrixMut<'a> {
        check_bounds(data.len(), rows, columns, row_stride);
        MatrixMut { start: data.as_mut_ptr(), rows, columns, row_stride, data: PhantomData }
    }

    /// Rows that follow each other without a gap.
    pub fn dense(data: &'a mut [f32], rows: usize, columns: usize) -> MatrixMut<'a> {
        MatrixMut::new(data, rows, columns, columns)
    }
}

fn check_bounds(len: usize, rows: usize, columns: usize, row_stride: usize) {
    let fits = rows == 0 || (columns <= row_stride && (rows - 1) * row_stride + columns <= len);
    assert!(fits, "{rows} rows of {columns}, {row_stride} apart, do not fit into {len} elements");
}

/// `c = a * b`, or `c += a * b` if `accumulate`.
pub(super) fn multiply(a: Matrix, b: Matrix, c: MatrixMut, accumulate: bool) {
    assert!(
        a.rows == c.rows && b.columns == c.columns && a.columns == b.rows,
        "product of {}x{} and {}x{} into {}x{}",
        a.rows,
        a.columns,
        b.rows,
        b.columns,
        c.rows,
        c.columns
    );
    if b.column_stride == 1 { by_gemm(a, b, c, accumulate) } else { by_faer(a, b, c, accumulate) }
}

/// `b` has neighbouring columns: gradients (NN for the input, TN for the weights), probabilities times values.
fn by_gemm(a: Matrix, b: Matrix, c: MatrixMut, accumulate: bool) {
    // SAFETY: the constructors have checked that all elements lie within their slices, `c` is borrowed exclusively, and
    // the shapes agree.
    unsafe {
        gemm::gemm(
            c.rows,
            c.columns,
            a.columns,
            c.start,
            1,
            c.row_stride as isize,
            accumulate,
            a.start,
            a.column_stride as isize,
            a.row_stride as isize,
            b.start,
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// `b` is a transpose, as weights `[out, in]` are in the forward pass: `gemm` packs such an operand slowly. In tiles of
/// `c`, because faer keeps its rate only where `c` is not much wider than high.
fn by_faer(a: Matrix, b: Matrix, c: MatrixMut, accumulate: bool) {
    const TILE_ROWS: usize = 1024;
    const TILE_COLUMNS: usize = 512;
    let accumulate = if accumulate { faer::Accum::Add } else { faer::Accum::Replace };
    for row in (0..c.rows).step_by(TILE_ROWS) {
        let rows = TILE_ROWS.min(c.rows - row);
        for column in (0..c.columns).step_by(TILE_COLUMNS) {
            let columns = TILE_COLUMNS.min(c.columns - column);
            // SAFETY: as for `by_gemm`; the tile is a part of the matrices.
            let (a, b, c) = unsafe {
                let a_start = a.start.add(row * a.row_stride);
                let b_start = b.start.add(column * b.column_stride);
                let c_start = c.start.add(row * c.row_stride + column);
                (
                    faer::MatRef::from_raw_parts(
                        a_start,
                        rows,
                        a.columns,
                        a.row_stride as isize,
                        a.column_stride as isize,
                    ),
                    faer::MatRef::from_raw_parts(
                        b_start,
                        b.rows,
                        columns,
                        b.row_stride as isize,
                        b.column_stride as isize,
                    ),
                    faer::MatMut::from_raw_parts_mut(c_start, rows, columns, c.row_stride as isize, 1),
                )
            };
            faer::linalg::matmul::matmul(c, accumulate, a, b, 1.0, faer::Par::Seq);
        }
    }
}
