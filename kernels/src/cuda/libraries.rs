//! Where the libraries of CUDA are: on the loader's path, named in the environment, in a CUDA installation, or in Python's
//! `nvidia` packages. They are loaded by their path first; cudarc then finds them by name, because they are loaded already.

use crate::device::KernelError;
use libloading::Library;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// A library that a GPU device needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Wanted {
    /// What it is for people.
    what: &'static str,
    /// Begin of its file name.
    stem: &'static str,
    /// What provides it.
    provided_by: &'static str,
}

const DRIVER: Wanted = Wanted { what: "the NVIDIA driver", stem: "libcuda.so", provided_by: "an NVIDIA driver" };
const NVRTC: Wanted = Wanted {
    what: "the run-time compiler",
    stem: "libnvrtc.so",
    provided_by: "a CUDA toolkit, or `pip install nvidia-cuda-nvrtc`",
};
const BUILTINS: Wanted = Wanted { what: "the run-time compiler's builtins", stem: "libnvrtc-builtins.so", ..NVRTC };
const CUBLAS_LT: Wanted = Wanted {
    what: "matrix products",
    stem: "libcublasLt.so",
    provided_by: "a CUDA toolkit, or `pip install nvidia-cublas`",
};

const NCCL: Wanted = Wanted {
    what: "communication between GPUs",
    stem: "libnccl.so",
    provided_by: "NVIDIA's NCCL packages, or `pip install nvidia-nccl-cu13` (cu12 with an older driver)",
};

/// Major versions of the libraries that this program knows, newest first, and the loader's plain name.
const VERSIONS: [&str; 5] = ["", ".13", ".12", ".2", ".1"];

/// The libraries, found and loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CudaLibraries {
    /// Where each was found: its path, or its name where the loader found it.
    pub found: Vec<PathBuf>,
}

/// Loads driver, NVRTC and cuBLASLt, once per process.
///
/// # Errors
/// [`KernelError::Unavailable`] names the first library that is missing and everywhere it was looked for.
pub(super) fn load() -> Result<&'static CudaLibraries, KernelError> {
    static LOADED: OnceLock<Result<CudaLibraries, String>> = OnceLock::new();
    let loaded = LOADED.get_or_init(|| {
        let places = places(&Surroundings::of_this_process());
        let mut found = vec![load_one(DRIVER, &places)?];
        // The compiler looks for its builtins by name alone; where the loader has them they need no help.
        let _ = load_one(BUILTINS, &places);
        found.push(load_one(NVRTC, &places)?);
        found.push(load_one(CUBLAS_LT, &places)?);
        Ok(CudaLibraries { found })
    });
    loaded.as_ref().map_err(|what| KernelError::Unavailable(what.clone()))
}

/// Finds NCCL, which only several processes need, and loads it.
pub(super) fn find_nccl() -> Result<PathBuf, String> {
    load_one(NCCL, &places(&Surroundings::of_this_process()))
}

/// Loads NVRTC alone: enough to compile.
#[cfg(test)]
pub(super) fn load_compiler() -> Result<(), KernelError> {
    let places = places(&Surroundings::of_this_process());
    let _ = load_one(BUILTINS, &places);
    load_one(NVRTC, &places).map(|_| ()).map_err(KernelError::Unavailable)
}

/// What of this process decides where to look.
#[derive(Debug, Default, Clone)]
struct Surroundings {
    /// `PACELINE_CUDA_LIBS`: folders, like a path.
    named: Option<String>,
    /// `LD_LIBRARY_PATH`.
    loader: Option<String>,
    /// `CUDA_HOME`, `CUDA_PATH`.
    installations: Vec<String>,
    /// Folders of Python packages.
    site_packages: Vec<PathBuf>,
}

impl Surroundings {
    fn of_this_process() -> Surroundings {
        let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        Surroundings {
            named: variable("PACELINE_CUDA_LIBS"),
            loader: variable("LD_LIBRARY_PATH"),
            installations: ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable).collect(),
            site_packages: site_packages(),
        }
    }
}

/// Folders of Python packages: those of an active environment, and the usual ones of the system and of the user.
fn site_packages() -> Vec<PathBuf> {
    let mut roots: Vec<PathBuf> = Vec::new();
    for name in ["VIRTUAL_ENV", "CONDA_PREFIX"] {
        roots.extend(std::env::var_os(name).map(|root| PathBuf::from(root).join("lib")));
    }
    roots.extend(std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/lib")));
    roots.extend(["/usr/local/lib", "/usr/lib", "/opt/conda/lib"].map(PathBuf::from));
    let mut found = Vec::new();
    for root in roots {
        for folder in folders(&root).filter(|folder| name_of(folder).starts_with("python3")) {
            found.extend(
                ["site-packages", "dist-packages"].map(|name| folder.join(name)).into_iter().filter(|f| f.is_dir()),
            );
        }
    }
    found
}

fn name_of(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Folders in a folder, sorted; none where it cannot be read.
fn folders(root: &Path) -> impl Iterator<Item = PathBuf> {
    let mut all: Vec<PathBuf> = std::fs::read_dir(root)
        .map(|entries| entries.filter_map(|entry| entry.ok().map(|entry| entry.path())).collect())
        .unwrap_or_default();
    all.sort();
    all.into_iter().filter(|path| path.is_dir())
}

/// Folders to look in, in order.
fn places(around: &Surroundings) -> Vec<PathBuf> {
    let mut places: Vec<PathBuf> = Vec::new();
    let split = |paths: &Option<String>| -> Vec<PathBuf> {
        paths.iter().flat_map(std::env::split_paths).filter(|path| !path.as_os_str().is_empty()).collect()
    };
    places.extend(split(&around.named));
    places.extend(split(&around.loader));
    let installed = around.installations.iter().map(PathBuf::from).chain([PathBuf::from("/usr/local/cuda")]);
    for root in installed {
        places.extend(
            ["lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"].map(|folder| root.join(folder)),
        );
    }
    for packages in &around.site_packages {
        places.extend(folders(&packages.join("nvidia")).map(|package| package.join("lib")));
    }
    places.extend(
        ["/usr/local/nvidia/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64"]
            .map(PathBuf::from),
    );
    places
}

/// Loads a library for the rest of the process.
fn load_one(wanted: Wanted, places: &[PathBuf]) -> Result<PathBuf, String> {
    let mut refused = Vec::new();
    let mut attempt = |path: PathBuf| {
        // SAFETY: a library of CUDA; its initialisers are meant to run in any process.
        match unsafe { Library::new(&path) } {
            Ok(library) => {
                std::mem::forget(library);
                Some(path)
            }
            Err(error) => {
                if path.is_absolute() {
                    refused.push(format!("{error}"));
                }
                None
            }
        }
    };
    let files = places.iter().flat_map(|place| candidates(place, wanted));
    let named = VERSIONS.iter().map(|version| PathBuf::from(format!("{}{version}", wanted.stem)));
    if let Some(path) = files.chain(named).find_map(&mut attempt) {
        return Ok(path);
    }
    let looked: Vec<String> = places.iter().map(|place| place.display().to_string()).collect();
    let mut message = format!(
        "device cuda needs {} ({}), which was not found on the loader's path nor in {}",
        wanted.stem,
        wanted.what,
        looked.join(", ")
    );
    if !refused.is_empty() {
        message += &format!("; found, but not loadable: {}", refused.join("; "));
    }
    Err(format!(
        "{message}; it comes with {}; name its folder in PACELINE_CUDA_LIBS, or use --device cpu",
        wanted.provided_by
    ))
}

/// Files of a library in a folder, newest version first.
fn candidates(place: &Path, wanted: Wanted) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(place)
        .map(|entries| entries.filter_map(|entry| entry.ok().map(|entry| entry.path())).collect())
        .unwrap_or_default();
    files.retain(|path| {
        let name = name_of(path);
        name.strip_prefix(wanted.stem).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    });
    // Stubs are for linkers; a link and the file behind it are the same library.
    files.retain(|path| !path.components().any(|part| part.as_os_str() == "stubs"));
    files.sort_by_key(|path| std::cmp::Reverse(version(&name_of(path))));
    files
}

/// The numbers after `.so`.
fn version(name: &str) -> Vec<u32> {
    name.split_once(".so").map_or("", |(_, rest)| rest).split('.').filter_map(|part| part.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("paceline-libraries-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).unwrap();
        folder
    }

    #[test]
    fn python_packages_are_looked_into() {
        let root = scratch("python");
        for package in ["cublas", "cuda_nvrtc", "cu13"] {
            std::fs::create_dir_all(root.join("nvidia").join(package).join("lib")).unwrap();
        }
        let around = Surroundings { site_packages: vec![root.clone()], ..Surroundings::default() };
        let places = places(&around);
        let at = |package: &str| {
            places.iter().position(|place| *place == root.join("nvidia").join(package).join("lib")).unwrap()
        };
        assert!(at("cu13") < at("cublas") && at("cublas") < at("cuda_nvrtc"));
        std::fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn named_folders_come_first() {
        let around = Surroundings { named: Some("/a:/b".into()), loader: Some("/c".into()), ..Surroundings::default() };
        assert_eq!(places(&around)[..3], ["/a", "/b", "/c"].map(PathBuf::from));
    }

    #[test]
    fn newest_versions_come_first_and_other_libraries_do_not_count() {
        let root = scratch("versions");
        for name in ["libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so", "libnvrtc-builtins.so.13.0", "libnvrtc.so.9.2"]
        {
            std::fs::write(root.join(name), "").unwrap();
        }
        let names: Vec<String> = candidates(&root, NVRTC).iter().map(|path| name_of(path)).collect();
        assert_eq!(names, ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so.9.2", "libnvrtc.so"]);
        std::fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn a_missing_library_is_named_with_every_place_and_a_way_out() {
        let root = scratch("missing");
        let wanted = Wanted { what: "a test", stem: "libpaceline-nowhere.so", provided_by: "nobody" };
        std::fs::write(root.join("libpaceline-nowhere.so.1"), "not a library").unwrap();
        let message = load_one(wanted, std::slice::from_ref(&root)).unwrap_err();
        for part in
            ["libpaceline-nowhere.so", "a test", &root.display().to_string(), "not loadable", "PACELINE_CUDA_LIBS"]
        {
            assert!(message.contains(part), "{part:?} in {message:?}");
        }
        std::fs::remove_dir_all(root).unwrap();
    }
}
