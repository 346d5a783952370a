//! A GPU through its driver: memory, kernels, products and copies on one stream.

use super::clock::Event;
use super::compile::{architecture, check_capability, machine_code, version};
use super::libraries;
use super::machine::{Kernel, Launch, Machine, Packed, Product};
use super::nccl::{self, Communicator};
use super::products::{Products, WORKSPACE};
use super::sources::SOURCES;
use crate::device::{Block, KernelError};
use crate::network::{Channel, Network};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use std::collections::HashMap;
use std::ffi::{CString, c_int};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// The primary context of a GPU, kept as long as anybody has memory in it.
#[derive(Debug)]
pub(super) struct Context {
    device: sys::CUdevice,
    handle: sys::CUcontext,
    pub name: String,
}

// SAFETY: contexts of the driver may be made current on any thread.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Makes it the calling thread's.
    pub fn enter(&self) -> Result<(), KernelError> {
        // SAFETY: the handle lives as long as `self`.
        unsafe { result::ctx::set_current(self.handle) }.map_err(|error| self.failed("its context", error))
    }

    pub fn failed(&self, doing: impl std::fmt::Display, error: DriverError) -> KernelError {
        KernelError::Machine { device: self.name.clone(), what: format!("{doing}: {error}") }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: it was retained once. An error could not be told to anybody.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// Memory of a GPU.
struct Memory {
    context: Arc<Context>,
    address: u64,
    bytes: usize,
}

impl Block for Memory {
    fn address(&self) -> u64 {
        self.address
    }

    fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.bytes > 0 && self.context.enter().is_ok() {
            // SAFETY: allocated once; the caller of `Device::run` keeps blocks until their calls have ended, and freeing waits.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}

/// Where empty blocks lie: nobody reads or writes there.
const NOWHERE: u64 = 256;

fn allocate(context: &Arc<Context>, bytes: usize) -> Result<Memory, KernelError> {
    context.enter()?;
    if bytes == 0 {
        return Ok(Memory { context: context.clone(), address: NOWHERE, bytes });
    }
    // SAFETY: the context is current.
    let address = unsafe { result::malloc_sync(bytes) }.map_err(|error| match error.0 {
        sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => KernelError::OutOfMemory { device: context.name.clone(), bytes },
        _ => context.failed(format_args!("allocating {bytes} bytes"), error),
    })?;
    Ok(Memory { context: context.clone(), address, bytes })
}

/// A stream of the driver.
#[derive(Debug)]
pub(super) struct Stream(pub sys::CUstream);

// SAFETY: streams may be used from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

/// A loaded kernel.
#[derive(Clone, Copy)]
struct Function(sys::CUfunction);

// SAFETY: functions may be launched from any thread while their module is loaded, which is as long as the context lives.
unsafe impl Send for Function {}

/// The driver as a machine.
pub struct Cuda {
    // Dropped in this order.
    products: Products,
    _workspace: Memory,
    stream: Stream,
    /// For copies beside the work of the other stream.
    copies: Stream,
    details: String,
    functions: Mutex<HashMap<Kernel, Function>>,
    modules: HashMap<&'static str, Module>,
    shared_limit: u32,
    context: Arc<Context>,
}

struct Module(sys::CUmodule);

// SAFETY: as for functions.
unsafe impl Send for Module {}
// SAFETY: as for functions.
unsafe impl Sync for Module {}

fn unavailable(doing: &str, error: DriverError) -> KernelError {
    KernelError::Unavailable(format!("device cuda: {doing}: {error}; is there a GPU, and may this user use it?"))
}

/// The driver's version as its module tells it, for example `driver 580.65.06`.
fn driver_version() -> String {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
    let number =
        text.split_whitespace().find(|word| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.'));
    number.map_or("driver of unknown version".into(), |number| format!("driver {number}"))
}

impl Cuda {
    pub fn open(ordinal: u32, cache: &Path) -> Result<Cuda, KernelError> {
        libraries::load()?;
        result::init().map_err(|error| unavailable("the driver does not start", error))?;
        let count = result::device::get_count().map_err(|error| unavailable("GPUs cannot be counted", error))?;
        if ordinal >= count as u32 {
            return Err(KernelError::Unavailable(format!(
                "GPU {ordinal} was asked for, the driver shows {count}: choose one below {count} (see also CUDA_VISIBLE_DEVICES)"
            )));
        }
        let device =
            result::device::get(ordinal as c_int).map_err(|error| unavailable("the GPU cannot be opened", error))?;
        let name = result::device::get_name(device).map_err(|error| unavailable("the GPU has no name", error))?;
        let attribute = |attribute| {
            // SAFETY: the device is one of the driver's.
            unsafe { result::device::get_attribute(device, attribute) }
                .map_err(|error| unavailable("the GPU does not tell its properties", error))
        };
        use sys::CUdevice_attribute_enum as Attribute;
        let capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? as u32,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)? as u32,
        );
        check_capability(&name, capability)?;
        let shared_limit = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32;
        // SAFETY: as above.
        let handle = unsafe { result::primary_ctx::retain(device) }
            .map_err(|error| unavailable("the GPU gives no context", error))?;
        let context = Arc::new(Context { device, handle, name });
        context.enter()?;
        let mut modules = HashMap::new();
        for source in SOURCES {
            let code = machine_code(source, &architecture(capability), cache)?;
            // SAFETY: the code is an image that NVRTC made.
            let module = unsafe { result::module::load_data(code.as_ptr().cast()) };
            let module = module.map_err(|error| {
                context.failed(format_args!("loading {}.cu (is NVRTC newer than the driver?)", source.name), error)
            })?;
            modules.insert(source.name, Module(module));
        }
        let stream = || {
            let stream = result::stream::create(result::stream::StreamKind::NonBlocking);
            stream.map(Stream).map_err(|error| context.failed("creating a stream", error))
        };
        let (stream, copies) = (stream()?, stream()?);
        // In kHz; some drivers do not tell them any more.
        let clock =
            |which| attribute(which).ok().filter(|&khz| khz > 0).map_or("?".into(), |khz| (khz / 1000).to_string());
        let details = format!(
            "{}; compute capability {}.{}; {} multiprocessors; clocks {} and {} MHz; NVRTC {}",
            driver_version(),
            capability.0,
            capability.1,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            clock(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE),
            clock(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE),
            version()?
        );
        let workspace = allocate(&context, WORKSPACE)?;
        let products = Products::new(workspace.address, &context.name, cache).map_err(|error| {
            KernelError::Machine { device: context.name.clone(), what: format!("starting cuBLASLt: {error}") }
        })?;
        let functions = Mutex::new(HashMap::new());
        Ok(Cuda { products, _workspace: workspace, stream, copies, details, functions, modules, shared_limit, context })
    }

    fn function(&self, kernel: Kernel) -> Result<Function, KernelError> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&function) = functions.get(&kernel) {
            return Ok(function);
        }
        let symbol = kernel.symbol();
        let failed = |error| self.context.failed(format_args!("kernel {symbol}"), error);
        let module = &self.modules[kernel.source];
        let name = CString::new(symbol.clone()).map_err(|error| KernelError::Machine {
            device: self.context.name.clone(),
            what: format!("kernel {symbol}: {error}"),
        })?;
        // SAFETY: the module is loaded.
        let function = unsafe { result::module::get_function(module.0, name) }.map_err(failed)?;
        // What the kernel itself declares and what launches add share one limit.
        // SAFETY: as above.
        unsafe {
            use sys::CUfunction_attribute_enum as Attribute;
            let declared =
                result::function::get_function_attribute(function, Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)
                    .map_err(failed)?;
            result::function::set_function_attribute(
                function,
                Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                self.shared_limit as c_int - declared,
            )
            .map_err(failed)?;
        }
        functions.insert(kernel, Function(function));
        Ok(Function(function))
    }
}

impl Network for Cuda {
    fn version(&self) -> Result<String, KernelError> {
        nccl::version()
    }

    fn invite(&self) -> Result<Vec<u8>, KernelError> {
        self.context.enter()?;
        nccl::invite(&self.context.name)
    }

    fn open(
        &self,
        invitation: &[u8],
        members: u32,
        member: u32,
        given_up: &dyn Fn() -> bool,
    ) -> Result<Box<dyn Channel>, KernelError> {
        Ok(Box::new(Communicator::open(&self.context, invitation, members, member, given_up)?))
    }
}

impl Machine for Cuda {
    fn name(&self) -> String {
        self.context.name.clone()
    }

    fn shared_limit(&self) -> u32 {
        self.shared_limit
    }

    fn allocate(&self, bytes: usize) -> Result<Box<dyn Block>, KernelError> {
        Ok(Box::new(allocate(&self.context, bytes)?))
    }

    unsafe fn launch(&self, launch: &Launch) -> Result<(), KernelError> {
        self.context.enter()?;
        let function = self.function(launch.kernel)?;
        let mut arguments = Packed::new(&launch.arguments);
        let mut pointers = arguments.pointers();
        let triple = |[x, y, z]: [u32; 3]| (x, y, z);
        // SAFETY: the driver copies the arguments before it returns; the rest is the caller's promise.
        let launched = unsafe {
            result::launch_kernel(
                function.0,
                triple(launch.grid),
                triple(launch.block),
                launch.shared,
                self.stream.0,
                &mut pointers,
            )
        };
        launched.map_err(|error| {
            let Launch { grid, block, shared, .. } = launch;
            let what =
                format!("kernel {} ({grid:?} blocks of {block:?} threads, {shared} bytes)", launch.kernel.symbol());
            self.context.failed(what, error)
        })
    }

    unsafe fn multiply(&self, product: &Product) -> Result<(), KernelError> {
        self.context.enter()?;
        // SAFETY: the caller's promise; driver and runtime streams are the same thing.
        unsafe { self.products.multiply(product, self.stream.0.cast()) }.map_err(|error| KernelError::Machine {
            device: self.context.name.clone(),
            what: format!("cuBLASLt: {error} for {:?}", product.shape),
        })
    }

    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), KernelError> {
        self.context.enter()?;
        // SAFETY: the caller's promise.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream.0) }
            .map_err(|error| self.context.failed(format_args!("copying {bytes} bytes"), error))
    }

    unsafe fn clear(&self, at: u64, bytes: usize) -> Result<(), KernelError> {
        self.context.enter()?;
        // SAFETY: the caller's promise.
        unsafe { result::memset_d8_async(at, 0, bytes, self.stream.0) }
            .map_err(|error| self.context.failed(format_args!("clearing {bytes} bytes"), error))
    }

    unsafe fn upload(&self, from: &[u8], to: u64) -> Result<(), KernelError> {
        if from.is_empty() {
            return Ok(());
        }
        self.context.enter()?;
        // SAFETY: the caller's promise; `from` lives until the stream has done it.
        unsafe { result::memcpy_htod_async(to, from, self.stream.0) }
            .map_err(|error| self.context.failed(format_args!("uploading {} bytes", from.len()), error))?;
        self.complete()
    }

    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<(), KernelError> {
        if to.is_empty() {
            return Ok(());
        }
        self.context.enter()?;
        let bytes = to.len();
        // SAFETY: the caller's promise; `to` lives until the stream has done it.
        unsafe { result::memcpy_dtoh_async(to, from, self.stream.0) }
            .map_err(|error| self.context.failed(format_args!("downloading {bytes} bytes"), error))?;
        self.complete()
    }

    unsafe fn time(
        &self,
        count: usize,
        work: &mut dyn FnMut(usize) -> Result<(), KernelError>,
        copies: &[(u64, u64, usize)],
    ) -> Result<Vec<f64>, KernelError> {
        let events = (0..=count).map(|_| Event::new(&self.context)).collect::<Result<Vec<_>, _>>()?;
        // Copies begin when the work before has ended, at the same time as what is timed.
        events[0].record(self.stream.0)?;
        if !copies.is_empty() {
            events[0].hold(self.copies.0)?;
        }
        for &(from, to, bytes) in copies {
            // SAFETY: the caller's promise.
            unsafe { result::memcpy_dtod_async(to, from, bytes, self.copies.0) }
                .map_err(|error| self.context.failed(format_args!("copying {bytes} bytes"), error))?;
        }
        for (n, event) in events[1..].iter().enumerate() {
            work(n)?;
            event.record(self.stream.0)?;
        }
        self.complete()?;
        // SAFETY: the stream lives.
        unsafe { result::stream::synchronize(self.copies.0) }
            .map_err(|error| self.context.failed("copies beside", error))?;
        events.windows(2).map(|pair| pair[1].since(&pair[0])).collect()
    }

    fn details(&self) -> String {
        self.details.clone()
    }

    fn memory(&self) -> Result<Option<(u64, u64)>, KernelError> {
        self.context.enter()?;
        let (free, total) =
            result::mem_get_info().map_err(|error| self.context.failed("asking for free memory", error))?;
        Ok(Some((free as u64, total as u64)))
    }

    fn network(&self) -> Option<&dyn Network> {
        Some(self)
    }

    fn complete(&self) -> Result<(), KernelError> {
        self.context.enter()?;
        // SAFETY: the stream lives.
        unsafe { result::stream::synchronize(self.stream.0) }
            .map_err(|error| self.context.failed("work that was queued before", error))
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: everything queued has its memory still; afterwards nobody uses stream or modules. Errors could not be told.
            unsafe {
                let _ = result::stream::synchronize(self.stream.0);
                let _ = result::stream::destroy(self.stream.0);
                let _ = result::stream::destroy(self.copies.0);
                for module in self.modules.values() {
                    let _ = result::module::unload(module.0);
                }
            }
        }
    }
}
