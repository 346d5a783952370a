//! A GPU through its driver: memory, kernels, products and copies, each stream for itself.

use super::clock::Events;
use super::compile::{architecture, check_capability, machine_code, version};
use super::libraries;
use super::machine::{Kernel, Launch, Machine, Packed, Product};
use super::nccl::{self, Communicator};
use super::products::{Products, WORKSPACE};
use super::sources::SOURCES;
use super::staging::{STAGED, Staging};
use crate::device::{Block, KernelError};
use crate::network::{Channel, Network};
use crate::queue::{Moment, Sequence};
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
pub(super) struct Stream {
    pub handle: sys::CUstream,
    context: Arc<Context>,
}

// SAFETY: streams may be used from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    pub fn new(context: &Arc<Context>) -> Result<Stream, KernelError> {
        context.enter()?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking);
        let handle = stream.map_err(|error| context.failed("creating a stream", error))?;
        Ok(Stream { handle, context: context.clone() })
    }

    fn synchronize(&self, doing: &str) -> Result<(), KernelError> {
        self.context.enter()?;
        // SAFETY: the stream lives.
        unsafe { result::stream::synchronize(self.handle) }.map_err(|error| self.context.failed(doing, error))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: everything queued has its memory still; afterwards nobody uses it. Errors could not be told to anybody.
            unsafe {
                let _ = result::stream::synchronize(self.handle);
                let _ = result::stream::destroy(self.handle);
            }
        }
    }
}

/// A loaded kernel.
#[derive(Clone, Copy)]
struct Function(sys::CUfunction);

// SAFETY: functions may be launched from any thread while their module is loaded, which is as long as the context lives.
unsafe impl Send for Function {}

/// A stream of the driver as a machine.
pub struct Cuda {
    // Dropped in this order.
    graphs: Mutex<Vec<Graph>>,
    stream: Stream,
    /// For copies beside the work of the other stream.
    copies: Stream,
    /// What products need, once there are any.
    workspace: Mutex<Option<Memory>>,
    staging: Mutex<Staging>,
    core: Arc<Core>,
}

/// Work that was captured, ready to be launched.
struct Graph {
    launchable: sys::CUgraphExec,
    context: Arc<Context>,
}

// SAFETY: graphs may be launched from any thread, one at a time.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: nobody launches it any more; one that runs is freed when it has ended. An error could not be told to anybody.
            let _ = unsafe { result::graph::exec_destroy(self.launchable) };
        }
    }
}

/// What all streams of a GPU share.
struct Core {
    // Dropped in this order.
    products: Products,
    events: Events,
    functions: Mutex<HashMap<Kernel, Function>>,
    modules: HashMap<&'static str, Module>,
    details: String,
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
        let products = Products::new(&context.name, cache).map_err(|error| KernelError::Machine {
            device: context.name.clone(),
            what: format!("starting cuBLASLt: {error}"),
        })?;
        let (events, functions) = (Events::new(&context), Mutex::new(HashMap::new()));
        Cuda::of(Arc::new(Core { products, events, functions, modules, details, shared_limit, context }))
    }

    fn of(core: Arc<Core>) -> Result<Cuda, KernelError> {
        let (stream, copies) = (Stream::new(&core.context)?, Stream::new(&core.context)?);
        let staging = Mutex::new(Staging::new(&core.context));
        Ok(Cuda { graphs: Mutex::default(), stream, copies, workspace: Mutex::new(None), staging, core })
    }

    fn context(&self) -> &Arc<Context> {
        &self.core.context
    }

    /// Address of the stream's room for products.
    fn workspace(&self) -> Result<u64, KernelError> {
        let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
        let memory = match &mut *workspace {
            Some(memory) => memory,
            none => none.insert(allocate(self.context(), WORKSPACE)?),
        };
        Ok(memory.address)
    }

    fn function(&self, kernel: Kernel) -> Result<Function, KernelError> {
        let mut functions = self.core.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&function) = functions.get(&kernel) {
            return Ok(function);
        }
        let symbol = kernel.symbol();
        let failed = |error| self.context().failed(format_args!("kernel {symbol}"), error);
        let module = &self.core.modules[kernel.source];
        let name = CString::new(symbol.clone()).map_err(|error| KernelError::Machine {
            device: self.context().name.clone(),
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
                self.core.shared_limit as c_int - declared,
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
        self.context().enter()?;
        nccl::invite(&self.context().name)
    }

    fn open(
        &self,
        invitation: &[u8],
        members: u32,
        member: u32,
        given_up: &dyn Fn() -> bool,
    ) -> Result<Box<dyn Channel>, KernelError> {
        Ok(Box::new(Communicator::open(self.context(), invitation, members, member, given_up)?))
    }
}

impl Machine for Cuda {
    fn name(&self) -> String {
        self.context().name.clone()
    }

    fn shared_limit(&self) -> u32 {
        self.core.shared_limit
    }

    fn allocate(&self, bytes: usize) -> Result<Box<dyn Block>, KernelError> {
        Ok(Box::new(allocate(self.context(), bytes)?))
    }

    unsafe fn launch(&self, launch: &Launch) -> Result<(), KernelError> {
        self.context().enter()?;
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
                self.stream.handle,
                &mut pointers,
            )
        };
        launched.map_err(|error| {
            let Launch { grid, block, shared, .. } = launch;
            let what =
                format!("kernel {} ({grid:?} blocks of {block:?} threads, {shared} bytes)", launch.kernel.symbol());
            self.context().failed(what, error)
        })
    }

    fn fuses(&self, product: &Product) -> Result<bool, KernelError> {
        self.core.context.enter()?;
        Ok(product.can_fuse() && self.core.products.can(product))
    }

    unsafe fn multiply(&self, product: &Product) -> Result<(), KernelError> {
        let workspace = self.workspace()?;
        self.context().enter()?;
        // SAFETY: the caller's promise; driver and runtime streams are the same thing.
        unsafe { self.core.products.multiply(product, workspace, self.stream.handle.cast()) }.map_err(|error| {
            KernelError::Machine {
                device: self.context().name.clone(),
                what: format!("cuBLASLt: {error} for {:?}", product.shape),
            }
        })
    }

    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), KernelError> {
        self.context().enter()?;
        // SAFETY: the caller's promise.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream.handle) }
            .map_err(|error| self.context().failed(format_args!("copying {bytes} bytes"), error))
    }

    unsafe fn clear(&self, at: u64, bytes: usize) -> Result<(), KernelError> {
        self.context().enter()?;
        // SAFETY: the caller's promise.
        unsafe { result::memset_d8_async(at, 0, bytes, self.stream.handle) }
            .map_err(|error| self.context().failed(format_args!("clearing {bytes} bytes"), error))
    }

    fn beside(&self) -> Result<Cuda, KernelError> {
        Cuda::of(self.core.clone())
    }

    fn room(&self) -> u64 {
        WORKSPACE as u64
    }

    fn moment(&self) -> Result<Moment, KernelError> {
        self.core.events.moment()
    }

    fn release(&self, moments: &[Moment]) {
        self.core.events.release(moments);
    }

    fn set(&self, moment: Moment) -> Result<(), KernelError> {
        self.core.events.set(moment, self.stream.handle)
    }

    fn follow(&self, moment: Moment) -> Result<(), KernelError> {
        self.core.events.follow(moment, self.stream.handle)
    }

    fn reach(&self, moment: Moment) -> Result<(), KernelError> {
        self.core.events.reach(moment)
    }

    fn seconds(&self, from: Moment, to: Moment) -> Result<f64, KernelError> {
        self.core.events.seconds(from, to)
    }

    fn keep(&self) -> Result<(), KernelError> {
        self.context().enter()?;
        // Of other threads, which work on other streams, nothing is forbidden meanwhile.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives.
        unsafe { result::stream::begin_capture(self.stream.handle, mode) }
            .map_err(|error| self.context().failed("beginning a graph", error))
    }

    fn kept(&self) -> Result<Sequence, KernelError> {
        self.context().enter()?;
        let failed = |error| self.context().failed("making a graph of what was queued", error);
        // SAFETY: the stream lives.
        let graph = unsafe { result::stream::end_capture(self.stream.handle) }.map_err(failed)?;
        // SAFETY: the graph is ours, and used no more once it can be launched.
        let launchable = unsafe {
            let launchable = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags_enum(0));
            let _ = result::graph::destroy(graph);
            launchable.map_err(failed)?
        };
        let mut graphs = self.graphs.lock().unwrap_or_else(PoisonError::into_inner);
        graphs.push(Graph { launchable, context: self.context().clone() });
        Ok(Sequence(graphs.len() - 1))
    }

    unsafe fn replay(&self, sequence: Sequence) -> Result<(), KernelError> {
        self.context().enter()?;
        let graphs = self.graphs.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(graph) = graphs.get(sequence.0) else {
            let what = format!("graph {} is not this stream's", sequence.0);
            return Err(KernelError::Machine { device: self.name(), what });
        };
        // SAFETY: graph and stream live; the rest is the caller's promise.
        unsafe { result::graph::launch(graph.launchable, self.stream.handle) }
            .map_err(|error| self.context().failed("launching a graph", error))
    }

    unsafe fn upload(&self, from: &[u8], to: u64) -> Result<(), KernelError> {
        if from.is_empty() {
            return Ok(());
        }
        self.context().enter()?;
        let copy = |from: &[u8]| {
            // SAFETY: the caller's promise; `from` lives until the stream has done it.
            unsafe { result::memcpy_htod_async(to, from, self.stream.handle) }
                .map_err(|error| self.context().failed(format_args!("uploading {} bytes", from.len()), error))
        };
        if from.len() <= STAGED {
            let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
            // Where there is no room left, the stream has to come to its end first.
            if !staging.has_room(from.len()) {
                self.stream.synchronize("work that was queued before")?;
                staging.clear();
            }
            return copy(staging.keep(from)?);
        }
        copy(from)?;
        self.complete()
    }

    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<(), KernelError> {
        if to.is_empty() {
            return Ok(());
        }
        self.context().enter()?;
        let bytes = to.len();
        // SAFETY: the caller's promise; `to` lives until the stream has done it.
        unsafe { result::memcpy_dtoh_async(to, from, self.stream.handle) }
            .map_err(|error| self.context().failed(format_args!("downloading {bytes} bytes"), error))?;
        self.complete()
    }

    unsafe fn time(
        &self,
        count: usize,
        work: &mut dyn FnMut(usize) -> Result<(), KernelError>,
        copies: &[(u64, u64, usize)],
    ) -> Result<Vec<f64>, KernelError> {
        let events = (0..=count).map(|_| self.moment()).collect::<Result<Vec<_>, _>>()?;
        // Copies begin when the work before has ended, at the same time as what is timed.
        self.set(events[0])?;
        if !copies.is_empty() {
            self.core.events.follow(events[0], self.copies.handle)?;
        }
        for &(from, to, bytes) in copies {
            // SAFETY: the caller's promise.
            unsafe { result::memcpy_dtod_async(to, from, bytes, self.copies.handle) }
                .map_err(|error| self.context().failed(format_args!("copying {bytes} bytes"), error))?;
        }
        for (n, &event) in events[1..].iter().enumerate() {
            work(n)?;
            self.set(event)?;
        }
        self.complete()?;
        self.copies.synchronize("copies beside")?;
        let seconds = events.windows(2).map(|pair| self.seconds(pair[0], pair[1])).collect();
        self.release(&events);
        seconds
    }

    fn details(&self) -> String {
        self.core.details.clone()
    }

    fn memory(&self) -> Result<Option<(u64, u64)>, KernelError> {
        self.context().enter()?;
        let (free, total) =
            result::mem_get_info().map_err(|error| self.context().failed("asking for free memory", error))?;
        Ok(Some((free as u64, total as u64)))
    }

    fn network(&self) -> Option<&dyn Network> {
        Some(self)
    }

    fn complete(&self) -> Result<(), KernelError> {
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        self.stream.synchronize("work that was queued before")?;
        staging.clear();
        Ok(())
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            for module in self.modules.values() {
                // SAFETY: all streams have ended, nobody uses it any more. An error could not be told to anybody.
                let _ = unsafe { result::module::unload(module.0) };
            }
        }
    }
}
