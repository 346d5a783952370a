//! GPUs, and what stands in for one.

use crate::failure::Failure;
use crate::user_folder::user_folder;
use paceline_kernels::{CudaDevice, Device, EmulatedGpu};

/// Opens GPU number `ordinal` of those that the driver shows, or the emulated one. Compiled kernels are kept in the user's cache.
pub fn open(emulated: bool, ordinal: u32) -> Result<Box<dyn Device>, Failure> {
    let folder = user_folder("XDG_CACHE_HOME", ".cache").unwrap_or_else(|| std::env::temp_dir().join("paceline"));
    let cache = folder.join("kernels");
    Ok(match emulated {
        false => Box::new(CudaDevice::open(ordinal, &cache).map_err(Failure::bad_input)?),
        true => Box::new(EmulatedGpu::open(&cache).map_err(Failure::bad_input)?),
    })
}
