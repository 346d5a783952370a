//! Time of a layer's work on a GPU: matrix products by shape, attention, traffic, and the host that launches them.
//!
//! A product is cut into tiles that the multiprocessors take in waves; the last wave may be half empty (wave quantisation)
//! and the last tiles of a row reach over the edge (tile quantisation). Smaller tiles fill the GPU better but read each
//! operand more often. Of the shapes that libraries have, the fastest counts. A product never takes less than its traffic.

use super::work::{Product, Work};
use super::{AttentionKernel, Compute, Launches, Layout, Physics};
use paceline_profiles::{Generation, Gpu};

/// Tiles of the products, with the share of the best rate that their reuse of operands permits.
const TILES: [(f64, f64, f64); 4] = [(256.0, 128.0, 1.0), (128.0, 128.0, 0.95), (128.0, 64.0, 0.8), (64.0, 64.0, 0.6)];
/// Into how many parts a long summed dimension may be split, to fill the multiprocessors.
const SPLITS: [f64; 4] = [1.0, 2.0, 4.0, 8.0];

/// A GPU under the fitted parameters.
#[derive(Debug, Clone, Copy)]
pub struct Device {
    /// FLOPs per second of a large product, in the layout's format.
    rate: f64,
    /// Stated FLOPs per second with 16-bit inputs, under the power limit.
    stated16: f64,
    generation: Generation,
    compute: Compute,
    share: f64,
    /// Bytes per second of memory-bound operators.
    memory: f64,
    multiprocessors: f64,
    /// Seconds per wave of tiles.
    fill: f64,
    /// Seconds per launch.
    launch: f64,
}

/// Time of one pass: on the GPU, and what the host needs to launch it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Passing {
    /// Of the GPU.
    pub gpu: f64,
    /// Of the host.
    pub host: f64,
    /// Of the GPU's part: matrix products and attention, among which communication can hide.
    pub products: f64,
    /// Of these: fused attention.
    pub attention: f64,
}

impl Passing {
    /// The longer of both: launches run ahead of the GPU, unless they are what it waits for.
    pub fn seconds(&self) -> f64 {
        self.gpu.max(self.host)
    }

    /// Sum of two passes.
    pub fn plus(self, other: Passing) -> Passing {
        Passing {
            gpu: self.gpu + other.gpu,
            host: self.host + other.host,
            products: self.products + other.products,
            attention: self.attention + other.attention,
        }
    }

    /// This pass `times` times.
    pub fn times(self, times: f64) -> Passing {
        Passing {
            gpu: self.gpu * times,
            host: self.host * times,
            products: self.products * times,
            attention: self.attention * times,
        }
    }
}

/// Forward and backward rate of attention kernels on long sequences, as a share of the stated 16-bit rate.
///
/// FlashAttention 2 on A100: 220 of 312 TFLOP/s forward, 190 backward, version 1 about 0.6 of that (arXiv 2307.08691, figures 4
/// to 6). On H100 (arXiv 2407.08608, figures 5 and 6) version 2 reaches about 370 of 989, backward 320; version 3 650 and 550. On
/// Blackwell cuDNN is taken at the share of version 3.
fn attention_rates(kernel: AttentionKernel, generation: Generation) -> (f64, f64) {
    let recent = matches!(generation, Generation::Hopper | Generation::Blackwell);
    match kernel {
        AttentionKernel::Flash1 if recent => (0.25, 0.2),
        AttentionKernel::Flash1 => (0.42, 0.36),
        AttentionKernel::Flash3 if recent => (0.65, 0.55),
        _ if recent => (0.37, 0.32),
        _ => (0.70, 0.61),
    }
}

/// Watts per stated 16-bit TFLOP/s of the GPU of a process whose rate the parameters tell: an A100 of 400 W, an H100 of 700 W.
/// Blackwell is made in a refinement of Hopper's process (TSMC 4NP after 4N).
fn reference_watts(generation: Generation) -> f64 {
    match generation {
        Generation::Volta | Generation::Ampere | Generation::Ada => 400.0 / 312.0,
        Generation::Hopper | Generation::Blackwell => 700.0 / 989.4,
    }
}

/// How a power limit lowers the clock, relative to the reference of the generation. Dynamic power grows with the third power
/// of the clock where the voltage follows it, but memory, links and leakage, about a third of the whole, do not fall
/// with it: the clock goes with the square root of the whole. A limit that is not stated is the usual one.
fn power_share(gpu: &Gpu) -> f64 {
    gpu.power_watts.map_or(1.0, |watts| {
        let ratio = watts / gpu.bf16_tflops / reference_watts(gpu.generation);
        ratio.sqrt().min(1.1)
    })
}

/// Sequence at which fused attention runs at half its rate: 120, 160, 190, 208 and 217 TFLOP/s at 512 to 8,192 tokens (arXiv
/// 2307.08691, figure 5, causal, heads of 128).
const HALF_RATE_TOKENS: f64 = 400.0;

/// What a quantised product reaches of the rate that its stated one would give, after the casts and scales of its operands. Seven runs
/// of MPT 1B and 3B in FP8 with Transformer Engine on eight H100 (llm-foundry's benchmark table: 284 to 598 TFLOP/s per GPU) are
/// predicted within 3 % with it. Of other generations and of 4-bit formats no run is known here: there it is assumed, and
/// predictions say so.
const QUANTISED: f64 = 0.8;

/// Cost of a kernel replayed from a CUDA graph over that of its launch by the host (NVIDIA, "Constant Time Launch for
/// Straight-Line CUDA Graphs": 2.5 us and about 1 ns a node, beside some 1.5 us between kernels).
const GRAPH_SHARE: f64 = 0.1;

impl Device {
    /// A GPU with the number formats of a layout.
    pub fn of(gpu: &Gpu, layout: &Layout, physics: &Physics) -> Device {
        let power = power_share(gpu);
        let share = match gpu.generation {
            Generation::Volta | Generation::Ampere | Generation::Ada => physics.matmul_ampere,
            Generation::Hopper => physics.matmul_hopper,
            Generation::Blackwell => physics.matmul_hopper * physics.blackwell,
        };
        let rate16 = gpu.bf16_tflops * 1e12 * share * power;
        let quantised = |stated: f64| stated * 1e12 * share * power * QUANTISED;
        let rate = match layout.numerics.compute {
            Compute::Fp32 => gpu.tf32_tflops * 1e12 * share * power,
            Compute::Bf16 => rate16,
            Compute::Fp8 => gpu.fp8_tflops.map_or(rate16, quantised),
            Compute::Fp4 => gpu.fp4_tflops.or(gpu.fp8_tflops).map_or(rate16, quantised),
        };
        Device {
            rate,
            stated16: gpu.bf16_tflops * 1e12 * power,
            generation: gpu.generation,
            compute: layout.numerics.compute,
            share: physics.attention,
            memory: gpu.memory_bandwidth_gbps * 1e9 * physics.memory,
            multiprocessors: f64::from(gpu.multiprocessors),
            fill: physics.fill,
            launch: physics.launch * if layout.launches == Launches::Graph { GRAPH_SHARE } else { 1.0 },
        }
    }

    /// Whether runs tell the rate of products in the layout's format on this generation.
    pub fn known_format(&self) -> bool {
        match self.compute {
            Compute::Fp32 | Compute::Bf16 => true,
            Compute::Fp8 => self.generation == Generation::Hopper,
            Compute::Fp4 => false,
        }
    }

    /// Seconds of a product with `element` bytes per element.
    pub fn product(&self, p: &Product, element: f64) -> f64 {
        let per_multiprocessor = self.rate / self.multiprocessors;
        let mut best = f64::INFINITY;
        for (rows, columns, reuse) in TILES {
            let tiles = (p.m / rows).ceil() * (p.n / columns).ceil() * p.count;
            for split in SPLITS {
                let depth = p.k / split;
                if split > 1.0 && depth < 1024.0 {
                    break;
                }
                let waves = (tiles * split / self.multiprocessors).ceil();
                let tile = 2.0 * rows * columns * depth / (per_multiprocessor * reuse);
                best = best.min(waves * (tile + self.fill));
            }
        }
        let bytes = element * p.count * (p.m * p.k + p.k * p.n + p.m * p.n);
        best.max(bytes / self.memory)
    }

    /// A forward pass.
    pub fn forward(&self, work: &Work, element: f64) -> Passing {
        self.pass(work, element, |core| core.flops, |rates| rates.0)
    }

    /// A backward pass for input and weights; attention runs at its backward rate, with five products for the two forward.
    pub fn backward(&self, forward: &Work, element: f64) -> (Passing, Passing) {
        let input = Work { core: forward.core, ..forward.backward_input() };
        let input = self.pass(&input, element, |core| 2.5 * core.flops, |rates| rates.1);
        let weights = self.pass(&forward.backward_weights(), element, |core| core.flops, |rates| rates.0);
        (input, weights)
    }

    fn pass(
        &self,
        work: &Work,
        element: f64,
        flops: fn(&super::work::Core) -> f64,
        rate: fn((f64, f64)) -> f64,
    ) -> Passing {
        let products: f64 = work.products.iter().map(|p| self.product(p, element)).sum();
        let core = work.core.as_ref().map_or(0.0, |core| {
            let kernel = rate(attention_rates(core.kernel, self.generation));
            (flops(core) / (self.stated16 * self.share * kernel * core.seq / (core.seq + HALF_RATE_TOKENS)))
                .max(core.bytes / self.memory)
        });
        Passing {
            gpu: products + core + work.traffic / self.memory,
            host: work.kernels * self.launch,
            products: products + core,
            attention: core,
        }
    }

    /// Seconds of a kernel that has next to nothing to do.
    pub fn small_kernel(&self) -> f64 {
        self.fill
    }

    /// Memory-bound work by its bytes.
    pub fn traffic(&self, bytes: f64) -> f64 {
        bytes / self.memory
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use paceline_profiles::find_gpu;

    fn a100(fill: f64) -> Device {
        let physics = Physics { matmul_ampere: 1.0, memory: 1.0, fill, ..Physics::default() };
        Device::of(find_gpu("A100").unwrap(), &Layout::single(2048, 1), &physics)
    }

    #[test]
    fn a_full_wave_runs_at_the_rate_and_one_tile_more_costs_a_wave() {
        let device = a100(0.0);
        // 108 multiprocessors: 12 x 9 tiles of 256 x 128.
        let full = Product { m: 12.0 * 256.0, n: 9.0 * 128.0, k: 8192.0, count: 1.0 };
        let seconds = device.product(&full, 2.0);
        assert!((seconds / (full.flops() / 312e12) - 1.0).abs() < 1e-9);
        // One tile row more (9 tiles) needs a second, nearly empty wave; splitting the depth eight times wastes least.
        let more = Product { m: 13.0 * 256.0, ..full };
        let ratio = device.product(&more, 2.0) / seconds;
        assert!((ratio - 9.0 / 8.0).abs() < 1e-9, "{ratio}");
    }

    #[test]
    fn thin_products_are_bound_by_memory() {
        let device = a100(0.0);
        let thin = Product { m: 1.0, n: 16384.0, k: 16384.0, count: 1.0 };
        let bytes = 2.0 * (16384.0 * 16384.0 + 2.0 * 16384.0);
        assert!((device.product(&thin, 2.0) / (bytes / 2039e9) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn eight_bit_products_are_faster_only_where_the_gpu_has_them() {
        use crate::cluster::Numerics;
        let fp8 = Layout { numerics: Numerics { compute: Compute::Fp8, ..Numerics::MIXED }, ..Layout::single(2048, 1) };
        let product = Product { m: 8192.0, n: 8192.0, k: 8192.0, count: 1.0 };
        let time = |gpu, layout: &Layout| {
            Device::of(find_gpu(gpu).unwrap(), layout, &Physics::default()).product(&product, 2.0)
        };
        let bf16 = Layout::single(2048, 1);
        assert_eq!(time("A100", &fp8), time("A100", &bf16));
        let ratio = time("H100", &bf16) / time("H100", &fp8);
        assert!((1.4..=1.7).contains(&ratio), "{ratio}");
    }
}
