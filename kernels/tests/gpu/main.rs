//! The kernels of the GPU: the tests of the CPU's kernels on a GPU device, and those of bfloat16 and of tensor cores.
//!
//! By default the GPU is the emulated one, which runs the same sources through a C++ compiler; with
//! `PACELINE_TEST_DEVICE=cuda` it is the first GPU of the driver.

#[path = "../kernels/activations.rs"]
mod activations;
#[path = "../kernels/attention.rs"]
mod attention;
#[path = "../kernels/embeddings.rs"]
mod embeddings;
#[path = "../kernels/heads.rs"]
mod heads;
#[path = "../kernels/machine.rs"]
mod machine;
#[path = "../kernels/narrow.rs"]
mod narrow;
#[path = "../kernels/norms.rs"]
mod norms;
#[path = "../kernels/optimizer.rs"]
mod optimizer;
#[path = "../kernels/pointwise.rs"]
mod pointwise;
#[path = "../kernels/products.rs"]
mod products;
#[path = "../kernels/rejections.rs"]
mod rejections;
#[path = "../kernels/rotary.rs"]
mod rotary;

mod indices;
mod tensor_cores;

/// An emulated GPU has no time for long sequences and many cases.
const PATIENT: bool = false;

fn device() -> Box<dyn paceline_kernels::Device> {
    let cache = std::env::temp_dir().join("paceline-kernel-tests");
    match std::env::var("PACELINE_TEST_DEVICE").as_deref() {
        Ok("cuda") => Box::new(paceline_kernels::CudaDevice::open(0, &cache).unwrap()),
        Ok(other) if other != "emulated" => panic!("PACELINE_TEST_DEVICE is {other:?}: cuda or emulated is possible"),
        _ => {
            let cache = option_env!("CARGO_TARGET_TMPDIR").map_or(cache, std::path::PathBuf::from);
            Box::new(paceline_kernels::EmulatedGpu::open(&cache).unwrap())
        }
    }
}
