//! Every kernel of the CPU device against plain double-precision references, and every backward pass against finite
//! differences of them. What a call overwrites is poisoned with NaN first; what it accumulates into holds known values.

mod activations;
mod attention;
mod embeddings;
mod heads;
mod indices;
mod machine;
mod narrow;
mod norms;
mod optimizer;
mod pointwise;
mod products;
mod rejections;
mod rotary;

/// Whether there is time for long sequences and many cases.
const PATIENT: bool = true;

fn device() -> Box<dyn paceline_kernels::Device> {
    Box::new(paceline_kernels::CpuDevice::new())
}
