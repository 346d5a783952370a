//! Rates of the other kernels on one core. Attention counts the FLOPs of the causal triangle only (4 per score and head
//! column forward, 10 backward), shown as elements per second, to be held against the rate of a matrix product;
//! elementwise kernels count the bytes that they must move.
//!
//! `cargo bench -p paceline-kernels --bench kernels`; pin it (`taskset -c 1`) where other work runs.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use paceline_kernels::{
    AdamW, AttentionShape, Block, Call, CpuDevice, DType, Decays, Device, View, attention_scratch, head_scratch,
};
use std::time::Duration;

/// Memory that the views of a benchmark point to.
struct Bench {
    device: CpuDevice,
    blocks: Vec<Box<dyn Block>>,
}

impl Bench {
    fn new() -> Bench {
        Bench { device: CpuDevice::new(), blocks: Vec::new() }
    }

    fn array(&mut self, len: usize, dtype: DType) -> View {
        let block = self.device.allocate(len * dtype.bytes()).unwrap();
        let view = block.view(0, len, dtype);
        self.blocks.push(block);
        view
    }

    /// Values between -1 and 1.
    fn floats(&mut self, len: usize) -> View {
        let view = self.array(len, DType::F32);
        let value = |i: usize| ((i * 2_654_435_761) % 1_000_003) as f32 / 500_001.5 - 1.0;
        let bytes: Vec<u8> = (0..len).flat_map(|i| value(i).to_ne_bytes()).collect();
        // SAFETY: the block was just allocated.
        unsafe { self.device.upload(&bytes, view) }.unwrap();
        view
    }

    fn run(&self, call: &Call) {
        // SAFETY: the views are of blocks that this holds, and one thread runs.
        unsafe { self.device.run(call) }.unwrap();
    }
}

fn attention(c: &mut Criterion) {
    for (seq, heads, kv_heads, head_dim) in [
        (128, 8, 8, 64),
        (256, 8, 8, 64),
        (512, 8, 2, 64),
        (1024, 8, 8, 64),
        (2048, 8, 8, 64),
        (512, 8, 8, 32),
        (512, 4, 4, 128),
    ] {
        let shape = AttentionShape { batch: 2, seq, heads, kv_heads, head_dim };
        let rows = (shape.batch * seq) as usize;
        let (width, attended) = (((heads + 2 * kv_heads) * head_dim) as usize, (heads * head_dim) as usize);
        let mut bench = Bench::new();
        let [qkv, d_qkv] = [rows * width; 2].map(|len| bench.floats(len));
        let [out, d_out] = [rows * attended; 2].map(|len| bench.floats(len));
        let [lse, scratch] = [attention_scratch(&shape); 2].map(|len| bench.floats(len));
        let forward = Call::Attention { qkv, out, lse, shape };
        let backward = Call::AttentionBackward { qkv, out, lse, d_out, d_qkv, scratch, shape };
        let scores = u64::from(seq) * u64::from(seq + 1) / 2 * u64::from(shape.batch * heads * head_dim);
        let name = format!("seq{seq}_heads{heads}_kv{kv_heads}_dim{head_dim}");
        let mut group = c.benchmark_group("attention");
        group.throughput(Throughput::Elements(4 * scores));
        group.bench_function(BenchmarkId::new("forward", &name), |b| b.iter(|| bench.run(&forward)));
        group.throughput(Throughput::Elements(10 * scores));
        group.bench_function(BenchmarkId::new("backward", &name), |b| b.iter(|| bench.run(&backward)));
        group.finish();
    }
}

fn elementwise(c: &mut Criterion) {
    let mut bench = Bench::new();
    let (rows, cols) = (1024u32, 512u32);
    let len = (rows * cols) as usize;
    let shape = AttentionShape { batch: 2, seq: rows / 2, heads: 4, kv_heads: 2, head_dim: 64 };
    let [x, dy, out, dx] = [len; 4].map(|len| bench.floats(len));
    let [wide, d_wide] = [2 * len; 2].map(|len| bench.floats(len));
    let [gamma, beta, d_gamma, d_beta] = [cols as usize; 4].map(|len| bench.floats(len));
    let [rms, layer] = [rows as usize, 2 * rows as usize].map(|len| bench.floats(len));
    let norm = bench.array(1, DType::F64);
    let tokens = bench.array(rows as usize, DType::U32);
    let with = AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.1, step: 1, clip: Some(1.0) };
    // Name, floats moved per element of `x`, call.
    let calls = [
        ("copy", 2, Call::Copy { from: x, to: out }),
        ("zero", 1, Call::Zero { x: out }),
        ("add", 3, Call::Add { x, into: dx }),
        ("sum", 3, Call::Sum { a: x, b: dy, out }),
        ("add_bias", 2, Call::AddBias { x: dx, bias: beta, rows, cols }),
        ("bias_gradient", 1, Call::BiasGradient { dy, d_bias: d_beta, rows, cols }),
        ("rms_norm", 2, Call::Norm { x, gamma, beta: None, out, stats: rms, rows, cols, epsilon: 1e-5 }),
        ("layer_norm", 2, Call::Norm { x, gamma, beta: Some(beta), out, stats: layer, rows, cols, epsilon: 1e-5 }),
        (
            "rms_norm_backward_input",
            4,
            Call::NormBackwardInput { x, gamma, stats: rms, dy, dx, rows, cols, layer_norm: false },
        ),
        (
            "layer_norm_backward_input",
            4,
            Call::NormBackwardInput { x, gamma, stats: layer, dy, dx, rows, cols, layer_norm: true },
        ),
        (
            "rms_norm_backward_weight",
            2,
            Call::NormBackwardWeight { x, stats: rms, dy, d_gamma, d_beta: None, rows, cols },
        ),
        (
            "layer_norm_backward_weight",
            2,
            Call::NormBackwardWeight { x, stats: layer, dy, d_gamma, d_beta: Some(d_beta), rows, cols },
        ),
        // Three quarters of the fused projection, read and written: `x` is as large as all of it.
        ("rotary", 2, Call::Rotary { qkv: x, shape, theta: 1e4, inverse: false }),
        ("swiglu", 3, Call::SwiGlu { gate_up: wide, out, rows, cols }),
        ("swiglu_backward", 5, Call::SwiGluBackward { gate_up: wide, d_out: dy, d_gate_up: d_wide, rows, cols }),
        ("gelu", 2, Call::Gelu { x, out }),
        ("gelu_backward", 3, Call::GeluBackward { x, d_out: dy, d_x: out }),
        ("embedding", 2, Call::Embedding { tokens, table: x, positions: None, out, rows, cols, seq: rows }),
        (
            "embedding_backward",
            3,
            Call::EmbeddingBackward { tokens, d_out: dy, d_table: dx, d_positions: None, rows, cols, seq: rows },
        ),
        ("sum_squares", 1, Call::SumSquares { x, out: norm }),
        (
            "adamw",
            8,
            Call::AdamW {
                parameters: dx,
                gradients: dy,
                first: x,
                second: out,
                rounded: None,
                norm,
                decays: Decays::all(true),
                with,
            },
        ),
    ];
    let mut group = c.benchmark_group("elementwise");
    for (name, floats, call) in calls {
        group.throughput(Throughput::Bytes(4 * floats * len as u64));
        group.bench_function(BenchmarkId::new(name, format!("{rows}x{cols}")), |b| b.iter(|| bench.run(&call)));
    }
    group.finish();
}

fn head(c: &mut Criterion) {
    let (rows, cols, chunk) = (1024, 512, 256);
    for vocab in [8192u32, 32_000] {
        let mut bench = Bench::new();
        let [x, dx] = [(rows * cols) as usize; 2].map(|len| bench.floats(len));
        let [weight, d_weight] = [(vocab * cols) as usize; 2].map(|len| bench.floats(len));
        let [lse, loss] = [rows as usize, 1].map(|len| bench.floats(len));
        let scratch = bench.floats(head_scratch([rows, cols, vocab, chunk], false));
        let targets = bench.array(rows as usize, DType::U32);
        let forward = Call::HeadLoss { x, weight, targets, lse, loss, scratch, rows, cols, vocab, chunk };
        let (dx, d_weight, scale) = (Some(dx), Some(d_weight), 1e-4);
        let backward =
            Call::HeadBackward { x, weight, targets, lse, dx, d_weight, scratch, rows, cols, vocab, chunk, scale };
        let flops = 2 * u64::from(rows) * u64::from(cols) * u64::from(vocab);
        let mut group = c.benchmark_group("head");
        group.throughput(Throughput::Elements(flops));
        group.bench_function(BenchmarkId::new("loss", vocab), |b| b.iter(|| bench.run(&forward)));
        group.throughput(Throughput::Elements(3 * flops));
        group.bench_function(BenchmarkId::new("backward", vocab), |b| b.iter(|| bench.run(&backward)));
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(600));
    targets = attention, elementwise, head
}
criterion_main!(benches);
