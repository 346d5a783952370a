//! Kernels to machine code by NVRTC, once per source, architecture and compiler version: the result is kept in a folder.

use super::sources::{HEADER, Source, digest};
use crate::device::KernelError;
use cudarc::nvrtc::{result, sys};
use std::ffi::{CString, c_char};
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// Options beside the architecture. `scripts/nvrtc-check` compiles with the same.
const OPTIONS: [&str; 2] = ["--std=c++17", "--device-int128"];

/// Oldest architecture with everything that `gpu.cuh` uses.
const OLDEST: (u32, u32) = (8, 0);

/// Refuses a GPU that lacks what the kernels use, before anything is compiled for it.
///
/// # Errors
/// [`KernelError::Unavailable`] with what was found, what is needed and a way out.
pub(super) fn check_capability(name: &str, capability: (u32, u32)) -> Result<(), KernelError> {
    if capability >= OLDEST {
        return Ok(());
    }
    let ((major, minor), (oldest, of)) = (capability, OLDEST);
    Err(KernelError::Unavailable(format!(
        "{name} has compute capability {major}.{minor}, the kernels need {oldest}.{of} (A100, RTX 30 series) or newer: \
         take another GPU (CUDA_VISIBLE_DEVICES chooses), or --device cpu"
    )))
}

/// The name of an architecture whose machine code is wanted.
pub(super) fn architecture((major, minor): (u32, u32)) -> String {
    format!("sm_{major}{minor}")
}

fn failed(source: &Source, what: impl std::fmt::Display) -> KernelError {
    KernelError::Unavailable(format!("kernels of {}.cu cannot be compiled: {what}", source.name))
}

/// Version of the loaded NVRTC.
pub(super) fn version() -> Result<String, KernelError> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: two places to write to.
    unsafe { sys::nvrtcVersion(&mut major, &mut minor) }
        .result()
        .map_err(|error| KernelError::Unavailable(format!("NVRTC does not tell its version: {error}")))?;
    Ok(format!("{major}.{minor}"))
}

/// Machine code of a source, from the cache if it is there. The libraries must be loaded.
///
/// # Errors
/// [`KernelError::Unavailable`] with the compiler's log.
pub(super) fn machine_code(source: &Source, architecture: &str, cache: &Path) -> Result<Vec<u8>, KernelError> {
    let path = cached(source, architecture, &version()?, cache);
    if let Ok(code) = std::fs::read(&path)
        && !code.is_empty()
    {
        return Ok(code);
    }
    let code = compile(source, architecture)?;
    // Without a place to keep it, every start compiles again: slower, but right.
    let _ = keep(&path, &code);
    Ok(code)
}

fn cached(source: &Source, architecture: &str, version: &str, cache: &Path) -> PathBuf {
    let key = digest([source.text, HEADER.text, architecture, version].into_iter().chain(OPTIONS));
    cache.join(format!("{}-{architecture}-{key:016x}.cubin", source.name))
}

/// Writes a file of the cache. Another thread or process may read or write the same name: it appears in one step.
pub(super) fn keep(path: &Path, code: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    let mut unfinished = tempfile::NamedTempFile::new_in(folder)?;
    unfinished.write_all(code)?;
    unfinished.persist(path)?;
    Ok(())
}

fn compile(source: &Source, architecture: &str) -> Result<Vec<u8>, KernelError> {
    let text = |text: &str| CString::new(text).map_err(|error| failed(source, error));
    let (code, name) = (text(source.text)?, text(&format!("{}.cu", source.name))?);
    let (header, header_name) = (text(HEADER.text)?, text(HEADER.name)?);
    let mut program = std::ptr::null_mut();
    // SAFETY: the strings live until the program is destroyed.
    unsafe {
        sys::nvrtcCreateProgram(
            &mut program,
            code.as_ptr(),
            name.as_ptr(),
            1,
            [header.as_ptr()].as_ptr(),
            [header_name.as_ptr()].as_ptr(),
        )
    }
    .result()
    .map_err(|error| failed(source, error))?;
    let mut options = vec![format!("--gpu-architecture={architecture}")];
    options.extend(OPTIONS.map(str::to_owned));
    // SAFETY: the program was created above and is destroyed once, below.
    unsafe {
        let compiled = result::compile_program(program, &options);
        let log = result::get_program_log(program).map(|log| log.iter().map(|&c| c as u8).collect::<Vec<u8>>());
        let code = compiled.and_then(|()| {
            let mut size = 0;
            sys::nvrtcGetCUBINSize(program, &mut size).result()?;
            let mut code = vec![0u8; size];
            sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast::<c_char>()).result()?;
            Ok(code)
        });
        let _ = result::destroy_program(program);
        code.map_err(|error| {
            let log = log.unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            failed(source, format_args!("{error} for {architecture}\n{}", log.trim_matches(['\0', '\n'])))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::{libraries, sources::SOURCES};

    #[test]
    fn the_script_that_checks_kernels_compiles_with_the_same_options() {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/nvrtc-check");
        let script = std::fs::read_to_string(script).unwrap();
        let quoted: Vec<String> = OPTIONS.iter().map(|option| format!("\"{option}\"")).collect();
        assert!(script.contains(&quoted.join(", ")), "{quoted:?} in nvrtc-check");
        assert!(script.contains(&format!("\"{}\"", architecture(OLDEST))), "it compiles for the oldest architecture");
    }

    #[test]
    fn gpus_that_are_too_old_are_refused_with_a_way_out() {
        for capability in [(7, 0), (7, 5), (3, 9)] {
            let error = check_capability("Tesla V100-SXM2-16GB", capability).unwrap_err().to_string();
            let found = format!("capability {}.{}", capability.0, capability.1);
            for part in ["Tesla V100-SXM2-16GB", found.as_str(), "need 8.0", "CUDA_VISIBLE_DEVICES", "--device cpu"] {
                assert!(error.contains(part), "{error} does not say {part}");
            }
            assert_eq!(error.lines().count(), 1);
        }
        for capability in [(8, 0), (8, 9), (9, 0), (10, 0), (12, 1)] {
            check_capability("a GPU", capability).unwrap();
        }
    }

    #[test]
    fn the_cache_tells_sources_architectures_and_compilers_apart() {
        let of = |source, architecture, version| cached(source, architecture, version, Path::new("/c"));
        let one = of(&SOURCES[0], "sm_90", "13.0");
        assert!(one.display().to_string().starts_with("/c/attention-sm_90-"));
        for other in
            [of(&SOURCES[1], "sm_90", "13.0"), of(&SOURCES[0], "sm_80", "13.0"), of(&SOURCES[0], "sm_90", "12.9")]
        {
            assert_ne!(one, other);
        }
    }

    /// With NVRTC at hand (`PACELINE_CUDA_LIBS`), it compiles and keeps machine code; without, the error says what is missing.
    #[test]
    fn kernels_compile_or_the_missing_library_is_named() {
        match libraries::load_compiler() {
            Err(error) => assert!(error.to_string().contains("libnvrtc.so"), "{error}"),
            Ok(()) => {
                let cache = std::env::temp_dir().join(format!("paceline-cubins-{}", std::process::id()));
                let source = SOURCES.iter().find(|source| source.name == "rotary").unwrap();
                let code = machine_code(source, "sm_80", &cache).unwrap();
                assert_eq!(code[..4], *b"\x7fELF");
                let kept = cached(source, "sm_80", &version().unwrap(), &cache);
                assert_eq!(std::fs::read(&kept).unwrap(), code);
                std::fs::write(&kept, b"kept").unwrap();
                assert_eq!(
                    machine_code(source, "sm_80", &cache).unwrap(),
                    b"kept",
                    "the second time nothing is compiled"
                );
                let broken = Source { name: "broken", text: "extern \"C\" __global__ void k() { nonsense; }" };
                let error = machine_code(&broken, "sm_80", &cache).unwrap_err().to_string();
                assert!(error.contains("broken.cu") && error.contains("nonsense"), "{error}");
                std::fs::remove_dir_all(cache).unwrap();
            }
        }
    }
}
