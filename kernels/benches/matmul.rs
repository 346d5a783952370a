//! Which library multiplies fastest on one core, by layout, at the shapes of training: the choice in
//! `src/cpu/matmul.rs` rests on this. Throughput is in FLOP (shown as elements) per second.
//!
//! `cargo bench -p paceline-kernels --bench matmul`; pin it (`taskset -c 1`) where other work runs.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use paceline_kernels::{Block, Call, CpuDevice, DType, Device, View};
use std::time::Duration;

#[derive(Clone, Copy)]
struct Product {
    name: &'static str,
    transpose_a: bool,
    transpose_b: bool,
    accumulate: bool,
    m: usize,
    n: usize,
    k: usize,
}

/// The three products of a layer of `outputs` by `inputs` on `tokens` rows.
fn products(tokens: usize, outputs: usize, inputs: usize) -> [Product; 3] {
    let nt = Product {
        name: "nt_forward",
        transpose_a: false,
        transpose_b: true,
        accumulate: false,
        m: tokens,
        n: outputs,
        k: inputs,
    };
    let nn = Product { name: "nn_input_gradient", transpose_b: false, n: inputs, k: outputs, ..nt };
    let tn = Product {
        name: "tn_weight_gradient",
        transpose_a: true,
        transpose_b: false,
        accumulate: true,
        m: outputs,
        n: inputs,
        k: tokens,
    };
    [nt, nn, tn]
}

/// Pointers and strides of `a` and `b`, as the libraries take them.
struct Operands {
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    of: Product,
}

impl Operands {
    /// Row and column stride of `a` and of `b`.
    fn strides(&self) -> ([isize; 2], [isize; 2]) {
        let Product { transpose_a, transpose_b, m, n, k, .. } = self.of;
        let a = if transpose_a { [1, m as isize] } else { [k as isize, 1] };
        let b = if transpose_b { [1, k as isize] } else { [n as isize, 1] };
        (a, b)
    }

    fn matrixmultiply(&self) {
        let Product { m, n, k, accumulate, .. } = self.of;
        let ([a_row, a_column], [b_row, b_column]) = self.strides();
        let beta = if accumulate { 1.0 } else { 0.0 };
        // SAFETY: the arrays have m * k, k * n and m * n elements and are not shared.
        unsafe {
            matrixmultiply::sgemm(
                m, k, n, 1.0, self.a, a_row, a_column, self.b, b_row, b_column, beta, self.c, n as isize, 1,
            );
        }
    }

    fn gemm(&self) {
        let Product { m, n, k, accumulate, .. } = self.of;
        let ([a_row, a_column], [b_row, b_column]) = self.strides();
        // SAFETY: as above.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                self.c,
                1,
                n as isize,
                accumulate,
                self.a,
                a_column,
                a_row,
                self.b,
                b_column,
                b_row,
                1.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    }

    fn faer(&self) {
        let Product { m, n, k, accumulate, .. } = self.of;
        let ([a_row, a_column], [b_row, b_column]) = self.strides();
        // SAFETY: as above.
        let (a, b, c) = unsafe {
            (
                faer::MatRef::from_raw_parts(self.a, m, k, a_row, a_column),
                faer::MatRef::from_raw_parts(self.b, k, n, b_row, b_column),
                faer::MatMut::from_raw_parts_mut(self.c, m, n, n as isize, 1),
            )
        };
        let accumulate = if accumulate { faer::Accum::Add } else { faer::Accum::Replace };
        faer::linalg::matmul::matmul(c, accumulate, a, b, 1.0, faer::Par::Seq);
    }
}

fn filled(device: &CpuDevice, len: usize) -> (Box<dyn Block>, View) {
    let block = device.allocate(4 * len).unwrap();
    let view = block.view(0, len, DType::F32);
    // SAFETY: the block was just allocated.
    unsafe { device.upload(&0.5f32.to_ne_bytes().repeat(len), view) }.unwrap();
    (block, view)
}

fn candidates(c: &mut Criterion) {
    let device = CpuDevice::new();
    let shapes =
        [(256, 512, 512), (512, 384, 128), (512, 2048, 512), (1024, 1024, 1024), (2048, 512, 2048), (512, 8192, 256)];
    for (tokens, outputs, inputs) in shapes {
        for of in products(tokens, outputs, inputs) {
            let Product { m, n, k, transpose_a, transpose_b, accumulate, .. } = of;
            let [(_a, a), (_b, b), (_c, product)] = [m * k, k * n, m * n].map(|len| filled(&device, len));
            let operands = Operands {
                a: a.address() as *const f32,
                b: b.address() as *const f32,
                c: product.address() as *mut f32,
                of,
            };
            let call = Call::MatMul {
                a,
                b,
                c: product,
                m: m as u32,
                n: n as u32,
                k: k as u32,
                transpose_a,
                transpose_b,
                accumulate,
            };
            let shape = format!("{m}x{n}x{k}");
            let mut group = c.benchmark_group(of.name);
            group.throughput(Throughput::Elements(2 * (m * n * k) as u64));
            group.bench_function(BenchmarkId::new("matrixmultiply", &shape), |b| b.iter(|| operands.matrixmultiply()));
            group.bench_function(BenchmarkId::new("gemm", &shape), |b| b.iter(|| operands.gemm()));
            group.bench_function(BenchmarkId::new("faer", &shape), |b| b.iter(|| operands.faer()));
            // SAFETY: the views are of the blocks above, which this thread alone uses.
            group.bench_function(BenchmarkId::new("chosen", &shape), |b| b.iter(|| unsafe { device.run(&call) }));
            group.finish();
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(600));
    targets = candidates
}
criterion_main!(benches);
