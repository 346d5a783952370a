//! A CPU that runs the kernels' own sources: they are compiled with a C++ compiler, and `cuda/host/emulator.h` runs their
//! threads in turns. It checks what hardware does not (barriers that not all threads reach, waits that are missing) and is some
//! thousand times slower. Its streams do their work late ([`Streams`]), all but the first.

use super::machine::{Epilogue, Kernel, Launch, Layout, Machine, Packed, Product};
use super::sources::{EMULATOR, HEADER, SOURCES, Source, digest};
use crate::cpu::CpuDevice;
use crate::device::{Block, DType, Device, KernelError};
use crate::queue::{Moment, Sequence};
use crate::streams::{Kept, Late, Pace, Streams, Task};
use libloading::Library;
use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// `emulated::Entry::launch` of the emulator.
type Entry = unsafe extern "C" fn(
    grid: *const u32,
    block: *const u32,
    shared: u32,
    arguments: *mut *mut c_void,
    sizes: *const u32,
    count: u32,
    error: *mut c_char,
    room: usize,
) -> c_int;

const NAME: &str = "emulated GPU";

/// Shared memory of a block of compute capability 9.0.
const SHARED_LIMIT: u32 = 227 * 1024;

/// A stream of the emulator as a machine.
pub struct Emulated {
    core: Arc<Core>,
    stream: usize,
}

/// What all streams share.
struct Core {
    // Work that waits is dropped before the library that it would run.
    streams: Streams,
    library: Library,
    entries: Mutex<HashMap<Kernel, Entry>>,
    memory: CpuDevice,
}

impl Late for Core {
    fn streams(&self) -> &Streams {
        &self.streams
    }
}

fn unavailable(what: impl std::fmt::Display) -> KernelError {
    KernelError::Unavailable(format!("the emulated GPU: {what}"))
}

impl Emulated {
    pub fn open(cache: &Path, pace: Pace) -> Result<Emulated, KernelError> {
        Emulated::of(SOURCES, cache, pace)
    }

    fn of(sources: &[Source], cache: &Path, pace: Pace) -> Result<Emulated, KernelError> {
        let path = compiled(sources, cache)?;
        // SAFETY: the library was compiled from our sources; loading it runs no code of its own.
        let library = unsafe { Library::new(&path) }.map_err(unavailable)?;
        let (streams, entries) = (Streams::new(pace), Mutex::new(HashMap::new()));
        Ok(Emulated { core: Arc::new(Core { streams, library, entries, memory: CpuDevice::new() }), stream: 0 })
    }

    fn entry(&self, kernel: Kernel) -> Result<Entry, KernelError> {
        let mut entries = self.core.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&entry) = entries.get(&kernel) {
            return Ok(entry);
        }
        let symbol = format!("launch_{}", kernel.symbol());
        // SAFETY: every such symbol is a function of this type (`wrapper`).
        let entry = unsafe { self.core.library.get::<Entry>(symbol.as_bytes()) };
        let entry = *entry.map_err(|error| self.failed(format!("no kernel {}: {error}", kernel.symbol())))?;
        entries.insert(kernel, entry);
        Ok(entry)
    }

    fn failed(&self, what: String) -> KernelError {
        KernelError::Machine { device: NAME.to_owned(), what }
    }

    fn later(&self, task: Task) -> Result<(), KernelError> {
        self.core.streams.run(self.stream, task)
    }
}

/// The library of the present sources, compiled unless an earlier run left it in the cache.
fn compiled(sources: &[Source], cache: &Path) -> Result<PathBuf, KernelError> {
    let (compiler, version) = compiler()?;
    let texts = sources.iter().chain([&HEADER, &EMULATOR]).map(|source| source.text);
    let key = digest(texts.chain([version.as_str(), WRAPPER]).chain(FLAGS));
    let library = cache.join(format!("emulated-{key:016x}.so"));
    // The threads of a process wait for the first one; what other processes do is kept apart by a folder of our own.
    static COMPILING: Mutex<()> = Mutex::new(());
    let _compiling = COMPILING.lock().unwrap_or_else(PoisonError::into_inner);
    if library.is_file() {
        return Ok(library);
    }
    let io = |error: std::io::Error| unavailable(format_args!("{}: {error}", cache.display()));
    std::fs::create_dir_all(cache).map_err(io)?;
    let folder = tempfile::Builder::new().prefix("emulated-").tempdir_in(cache).map_err(io)?;
    std::fs::create_dir_all(folder.path().join("host")).map_err(io)?;
    for source in [&HEADER, &EMULATOR] {
        std::fs::write(folder.path().join(source.name), source.text).map_err(io)?;
    }
    let object = |source| object(&compiler, folder.path(), source);
    let objects = sources.iter().map(object).collect::<Result<Vec<_>, _>>()?;
    let built = folder.path().join("library.so");
    succeeded(Command::new(&compiler).arg("-shared").arg("-o").arg(&built).args(&objects).output())?;
    // Another process may have done the same meanwhile: the names are exchanged in one step, the contents are the same.
    std::fs::rename(&built, &library).map_err(io)?;
    Ok(library)
}

/// Fused multiply-add as the GPU has it is allowed; what else the compiler reorders is not.
const FLAGS: [&str; 5] = ["-std=c++17", "-O2", "-fPIC", "-DPACELINE_EMULATED", "-w"];

/// How a kernel is found from outside.
const WRAPPER: &str =
    "extern \"C\" int launch_KERNEL(const unsigned* grid, const unsigned* block, unsigned shared, void** arguments,
    const unsigned* sizes, unsigned count, char* error, std::size_t room) {
    return emulated::Entry<&in_SOURCE::KERNEL>::launch(grid, block, shared, arguments, sizes, count, error, room);
}
";

fn object(compiler: &str, folder: &Path, source: &Source) -> Result<PathBuf, KernelError> {
    let io = |error: std::io::Error| unavailable(format_args!("{}: {error}", folder.display()));
    let at = |extension: &str| folder.join(source.name).with_extension(extension);
    std::fs::write(at("cu"), source.text).map_err(io)?;
    let mut preprocess = Command::new(compiler);
    let expanded = succeeded(preprocess.args(FLAGS).args(["-E", "-P", "-x", "c++"]).arg(at("cu")).output())?;
    // Every file is in a namespace of its own: equal names of different files are different functions.
    let name = source.name;
    let mut text = format!("#include \"host/emulator.h\"\nnamespace in_{name} {{\n#include \"{name}.cu\"\n}}\n");
    for kernel in kernels(&expanded) {
        text += &WRAPPER.replace("KERNEL", kernel).replace("SOURCE", name);
    }
    std::fs::write(at("cpp"), text).map_err(io)?;
    succeeded(Command::new(compiler).args(FLAGS).arg("-c").arg(at("cpp")).arg("-o").arg(at("o")).output())?;
    Ok(at("o"))
}

/// The kernels that a preprocessed file declares.
fn kernels(expanded: &str) -> impl Iterator<Item = &str> {
    expanded.split("extern \"C\" void").skip(1).filter_map(|rest| {
        let name = rest.trim_start();
        let end = name.find(|c: char| !c.is_ascii_alphanumeric() && c != '_')?;
        (end > 0 && name[end..].trim_start().starts_with('(')).then(|| &name[..end])
    })
}

fn compiler() -> Result<(String, String), KernelError> {
    let named = std::env::var("CXX").ok().filter(|name| !name.is_empty());
    let candidates: Vec<String> = match named {
        Some(name) => vec![name],
        None => ["c++", "g++", "clang++"].map(str::to_owned).into(),
    };
    for name in &candidates {
        if let Ok(output) = Command::new(name).arg("--version").output()
            && output.status.success()
        {
            return Ok((name.clone(), String::from_utf8_lossy(&output.stdout).into_owned()));
        }
    }
    Err(unavailable(format_args!("no C++ compiler: tried {}; install one or name it in CXX", candidates.join(", "))))
}

fn succeeded(result: std::io::Result<Output>) -> Result<String, KernelError> {
    let output = result.map_err(unavailable)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(unavailable(format_args!("the C++ compiler says:\n{}", String::from_utf8_lossy(&output.stderr))))
}

/// An element of an array.
///
/// # Safety
/// It lies in living memory.
unsafe fn element(address: u64, dtype: DType, index: usize) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        match dtype {
            DType::BF16 => {
                let bits = *std::ptr::with_exposed_provenance::<u16>(address as usize).add(index);
                f32::from_bits(u32::from(bits) << 16)
            }
            _ => *std::ptr::with_exposed_provenance::<f32>(address as usize).add(index),
        }
    }
}

/// Writes an element of an array, rounded to its type.
///
/// # Safety
/// It lies in living memory that nobody else uses.
unsafe fn put(address: u64, dtype: DType, index: usize, x: f32) {
    // SAFETY: the caller's promise.
    unsafe {
        match dtype {
            DType::BF16 => *std::ptr::with_exposed_provenance_mut::<u16>(address as usize).add(index) = round(x),
            _ => *std::ptr::with_exposed_provenance_mut::<f32>(address as usize).add(index) = x,
        }
    }
}

/// GELU in its tanh form, which is that of cuBLASLt: `x (1 + tanh(u)) / 2` with `u = sqrt(2 / pi) (x + 0.044715 x^3)`.
fn gelu(x: f64) -> f64 {
    x / (1.0 + (-2.0 * gelu_argument(x)).exp())
}

fn gelu_argument(x: f64) -> f64 {
    (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))
}

/// Its derivative.
fn gelu_slope(x: f64) -> f64 {
    let s = 1.0 / (1.0 + (-2.0 * gelu_argument(x)).exp());
    let inner = (2.0 / std::f64::consts::PI).sqrt() * (1.0 + 3.0 * 0.044_715 * x * x);
    s + 2.0 * x * s * (1.0 - s) * inner
}

/// The elements of a matrix, row by row of how it is used.
///
/// # Safety
/// The matrix lies in living memory.
unsafe fn gather(address: u64, layout: Layout, rows: usize, cols: usize) -> Vec<f32> {
    let at = |row: usize, col: usize| {
        let (row, col) = if layout.transposed { (col, row) } else { (row, col) };
        let index = row * layout.stride as usize + col;
        // SAFETY: the caller's promise.
        unsafe { element(address, layout.dtype, index) }
    };
    (0..rows * cols).map(|i| at(i / cols, i % cols)).collect()
}

/// bfloat16 nearest to `x`, ties to even.
fn round(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() { 0x7fff } else { (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16 }
}

/// Runs a kernel to its end.
///
/// # Safety
/// As for [`Machine::launch`].
unsafe fn enter(entry: Entry, launch: &Launch) -> Result<(), KernelError> {
    let mut arguments = Packed::new(&launch.arguments);
    let mut pointers = arguments.pointers();
    let sizes: Vec<u32> = launch.arguments.iter().map(|argument| argument.bytes()).collect();
    let mut error = [0u8; 512];
    // SAFETY: the entry checks number and sizes of the arguments; what they point to is the caller's promise.
    let code = unsafe {
        entry(
            launch.grid.as_ptr(),
            launch.block.as_ptr(),
            launch.shared,
            pointers.as_mut_ptr(),
            sizes.as_ptr(),
            sizes.len() as u32,
            error.as_mut_ptr().cast(),
            error.len(),
        )
    };
    if code == 0 {
        return Ok(());
    }
    let text = error.split(|&byte| byte == 0).next().unwrap_or_default();
    let what = format!("{}: {}", launch.kernel.symbol(), String::from_utf8_lossy(text));
    Err(KernelError::Machine { device: NAME.to_owned(), what })
}

/// Does a product.
///
/// # Safety
/// As for [`Machine::multiply`].
unsafe fn multiply(product: &Product) {
    let shape = product.shape;
    let (m, n, k) = (shape.m as usize, shape.n as usize, shape.k as usize);
    // SAFETY: the caller's promise.
    let (a, b) = unsafe { (gather(product.a, shape.a, m, k), gather(product.b, shape.b, k, n)) };
    let mut sums = vec![0.0f64; n];
    for row in 0..m {
        sums.fill(0.0);
        for (&x, b) in a[row * k..][..k].iter().zip(b.chunks_exact(n)) {
            for (sum, &y) in sums.iter_mut().zip(b) {
                *sum += f64::from(x) * f64::from(y);
            }
        }
        for (col, &sum) in sums.iter().enumerate() {
            let (index, beside) = (row * shape.c.stride as usize + col, row * n + col);
            let dtype = shape.c.dtype;
            // SAFETY: as above; what is written is ours alone.
            unsafe {
                let base = if shape.accumulate { element(product.base, dtype, index) } else { 0.0 };
                let sum = sum + f64::from(base);
                let result = match shape.epilogue {
                    Epilogue::None => sum,
                    Epilogue::Bias => sum + f64::from(element(product.bias, dtype, col)),
                    Epilogue::BiasGelu => {
                        let input = sum + f64::from(element(product.bias, dtype, col));
                        put(product.beside, dtype, beside, input as f32);
                        gelu(input)
                    }
                    Epilogue::GeluSlope => sum * gelu_slope(f64::from(element(product.beside, dtype, beside))),
                };
                put(product.c, dtype, index, result as f32);
            }
        }
    }
}

impl Machine for Emulated {
    fn name(&self) -> String {
        NAME.to_owned()
    }

    fn shared_limit(&self) -> u32 {
        SHARED_LIMIT
    }

    fn allocate(&self, bytes: usize) -> Result<Box<dyn Block>, KernelError> {
        Ok(Box::new(Kept { block: self.core.memory.allocate(bytes)?, core: self.core.clone() }))
    }

    unsafe fn launch(&self, launch: &Launch) -> Result<(), KernelError> {
        let entry = self.entry(launch.kernel)?;
        let launch = launch.clone();
        // SAFETY: the caller's promise.
        self.later(Arc::new(move || unsafe { enter(entry, &launch) }))
    }

    /// As cuBLASLt: matrices beside a product begin, and their rows too, at multiples of 16 bytes.
    fn fuses(&self, product: &Product) -> Result<bool, KernelError> {
        Ok(product.can_fuse())
    }

    unsafe fn multiply(&self, product: &Product) -> Result<(), KernelError> {
        let product = *product;
        self.later(Arc::new(move || {
            // SAFETY: the caller's promise.
            unsafe { multiply(&product) };
            Ok(())
        }))
    }

    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), KernelError> {
        self.later(Arc::new(move || {
            // SAFETY: the caller's promise.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    std::ptr::with_exposed_provenance::<u8>(from as usize),
                    std::ptr::with_exposed_provenance_mut(to as usize),
                    bytes,
                );
            }
            Ok(())
        }))
    }

    unsafe fn clear(&self, at: u64, bytes: usize) -> Result<(), KernelError> {
        self.later(Arc::new(move || {
            // SAFETY: the caller's promise.
            unsafe { std::ptr::write_bytes(std::ptr::with_exposed_provenance_mut::<u8>(at as usize), 0, bytes) }
            Ok(())
        }))
    }

    fn beside(&self) -> Result<Emulated, KernelError> {
        Ok(Emulated { core: self.core.clone(), stream: self.core.streams.open() })
    }

    fn moment(&self) -> Result<Moment, KernelError> {
        Ok(self.core.streams.moment())
    }

    fn release(&self, moments: &[Moment]) {
        self.core.streams.release(moments);
    }

    fn set(&self, moment: Moment) -> Result<(), KernelError> {
        self.core.streams.set(self.stream, moment);
        Ok(())
    }

    fn follow(&self, moment: Moment) -> Result<(), KernelError> {
        self.core.streams.follow(self.stream, moment);
        Ok(())
    }

    fn reach(&self, moment: Moment) -> Result<(), KernelError> {
        self.core.streams.reach(moment)
    }

    fn keep(&self) -> Result<(), KernelError> {
        self.core.streams.keep(self.stream);
        Ok(())
    }

    fn kept(&self) -> Result<Sequence, KernelError> {
        Ok(self.core.streams.kept(self.stream))
    }

    unsafe fn replay(&self, sequence: Sequence) -> Result<(), KernelError> {
        self.core.streams.replay(self.stream, sequence)
    }

    fn seconds(&self, from: Moment, to: Moment) -> Result<f64, KernelError> {
        let never = || self.failed("a moment has not come".to_owned());
        self.core.streams.seconds(from, to).ok_or_else(never)
    }

    unsafe fn upload(&self, from: &[u8], to: u64) -> Result<(), KernelError> {
        let from = from.to_vec();
        self.later(Arc::new(move || {
            let to = std::ptr::with_exposed_provenance_mut::<u8>(to as usize);
            // SAFETY: the caller's promise; the host's memory is not the machine's.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) }
            Ok(())
        }))
    }

    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<(), KernelError> {
        self.complete()?;
        let from = std::ptr::with_exposed_provenance::<u8>(from as usize);
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) }
        Ok(())
    }

    unsafe fn time(
        &self,
        count: usize,
        work: &mut dyn FnMut(usize) -> Result<(), KernelError>,
        copies: &[(u64, u64, usize)],
    ) -> Result<Vec<f64>, KernelError> {
        // Work is done by whoever asks for it, so copies cannot go on beside anything.
        for &(from, to, bytes) in copies {
            // SAFETY: the caller's promise.
            unsafe { self.copy(from, to, bytes) }?;
        }
        self.complete()?;
        let timed = |n| {
            let start = Instant::now();
            work(n)?;
            self.complete()?;
            Ok(start.elapsed().as_secs_f64())
        };
        (0..count).map(timed).collect()
    }

    fn complete(&self) -> Result<(), KernelError> {
        self.core.streams.finish(self.stream)
    }
}

#[cfg(test)]
mod tests {
    use super::super::machine::Argument;
    use super::*;

    #[test]
    fn kernels_are_found_by_their_declarations() {
        let text =
            "extern \"C\" void first(int a) {}\nextern \"C\" void\nsecond_f32(float* x) {}\nextern \"C\" voids third;";
        assert_eq!(kernels(text).collect::<Vec<_>>(), ["first", "second_f32"]);
    }

    /// What a GPU would leave undefined, or do right by chance, is a fault or shows.
    #[test]
    fn faults_of_kernels_are_found() {
        const FAULTY: Source = Source {
            name: "faulty",
            text: "#include \"gpu.cuh\"
                KERNEL(32, 1) half_a_warp(float* x) { if (threadIdx.x < 16) x[0] = warp_sum(1.0f); }
                KERNEL(32, 1) different_operations(float* x) { x[0] = lane() < 16 ? warp_sum(1.0f) : float(ballot(true)); }
                KERNEL(32, 1) no_wait(float* x) {
                    DYNAMIC_SHARED(shared);
                    if (threadIdx.x == 0) copy_async(shared, x, true);
                    copies_commit();
                    __syncthreads();
                    x[threadIdx.x] = reinterpret_cast<float*>(shared)[0];
                }",
        };
        let cache = tempfile::tempdir().unwrap();
        // Who comes while another thread compiles gets what that one has compiled.
        let machine = std::thread::scope(|scope| {
            let open = || Emulated::of(&[FAULTY], &cache.path().join("new"), Pace::Late).unwrap();
            let others = [scope.spawn(open), scope.spawn(open), scope.spawn(open)];
            others.map(|thread| thread.join().unwrap()).into_iter().next_back().unwrap()
        });
        let memory = machine.allocate(256).unwrap();
        let run = |base, threads, arguments: &[Argument]| {
            let kernel = Kernel::plain("faulty", base);
            let arguments = arguments.iter().copied().collect();
            let launch = Launch { kernel, grid: [1; 3], block: [threads, 1, 1], shared: 16, arguments };
            // SAFETY: the kernels write to the first 32 floats at most, and nobody else does.
            unsafe {
                machine.clear(memory.address(), 256).unwrap();
                machine.launch(&launch)
            }
        };
        let x = Argument::Address(memory.address());
        for (base, said) in [("half_a_warp", "all threads wait"), ("different_operations", "different operations")] {
            let error = run(base, 32, &[x]).unwrap_err().to_string();
            assert!(error.contains(base) && error.contains(said), "{error}");
        }
        run("no_wait", 32, &[x]).unwrap();
        let mut first = [0; 4];
        // SAFETY: as above.
        unsafe { machine.download(memory.address(), &mut first) }.unwrap();
        assert!(f32::from_ne_bytes(first).is_nan(), "a copy that nobody waits for has not happened");
        for (arguments, said) in [(&[x, x][..], "2 arguments"), (&[Argument::U32(1)][..], "argument 0 has 4 bytes")] {
            assert!(run("no_wait", 32, arguments).unwrap_err().to_string().contains(said));
        }
        assert!(run("no_such", 32, &[x]).unwrap_err().to_string().contains("no_such"));
        assert_eq!(std::fs::read_dir(cache.path().join("new")).unwrap().count(), 1, "one library and nothing else");
    }

    #[test]
    fn values_round_to_the_nearest_with_ties_to_even() {
        for (x, bits) in
            [(1.0, 0x3f80), (1.0 + 1.0 / 256.0, 0x3f80), (1.0 + 3.0 / 256.0, 0x3f82), (1.004, 0x3f81), (-2.0, 0xc000)]
        {
            assert_eq!(round(x), bits, "{x}");
        }
        assert_eq!(round(f32::INFINITY), 0x7f80);
        assert_eq!(round(f32::MAX), 0x7f80);
        assert!(f32::from_bits(u32::from(round(f32::NAN)) << 16).is_nan());
    }
}
