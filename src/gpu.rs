//! GPUs, and what stands in for one.

use crate::failure::Failure;
use paceline_kernels::{CudaDevice, Device, EmulatedGpu};
use std::path::PathBuf;

/// Opens GPU number `ordinal` of those that the driver shows, or the emulated one. Compiled kernels are kept in the user's cache.
pub fn open(emulated: bool, ordinal: u32) -> Result<Box<dyn Device>, Failure> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")));
    let cache = base.unwrap_or_else(std::env::temp_dir).join("paceline").join("kernels");
    Ok(match emulated {
        false => Box::new(CudaDevice::open(ordinal, &cache).map_err(Failure::bad_input)?),
        true => Box::new(EmulatedGpu::open(&cache).map_err(Failure::bad_input)?),
    })
}
