//! Which profile answers: `--profile`, then `$PACELINE_PROFILE`, then what `paceline calibrate` wrote for this user, then the one
//! that ships with Paceline. A profile of another machine is used with a warning that names both.

use crate::failure::Failure;
use crate::screen::Screen;
use crate::user_folder::user_folder;
use paceline_profiles::{Machine, Profile};
use std::path::{Path, PathBuf};

/// The profile that ships for CPUs, of the machine that Paceline was developed on.
const SHIPPED_CPU: &str = include_str!("../profiles/data/cpu.csv");

/// The environment variable that names a profile.
const VARIABLE: &str = "PACELINE_PROFILE";

/// A profile and where it came from.
#[derive(Debug, Clone)]
pub struct Found {
    /// The measurements.
    pub profile: Profile,
    /// For people.
    pub origin: String,
}

/// Where `paceline calibrate` writes for this user: `$XDG_DATA_HOME` or `~/.local/share`, and there `paceline/`.
pub fn user_path() -> Option<PathBuf> {
    user_file("cpu-profile.csv")
}

/// The same for a GPU.
pub fn gpu_path() -> Option<PathBuf> {
    user_file("gpu-profile.csv")
}

fn user_file(name: &str) -> Option<PathBuf> {
    Some(user_folder("XDG_DATA_HOME", ".local/share")?.join(name))
}

/// Finds the profile for `here` and warns when it was made elsewhere.
pub fn find(screen: &Screen, flag: Option<&Path>, here: &Machine, gpu: bool) -> Result<Found, Failure> {
    let found = search(flag, gpu)?;
    if let Some(other) = found.profile.made_elsewhere(here) {
        screen.warn(format!("{other} ({})", found.origin));
    }
    Ok(found)
}

/// Writes a profile to `path`. Rows of the same machine that lie there already stay where nothing newer measures the same.
pub fn update(screen: &Screen, path: &Path, newer: Profile) -> Result<Profile, Failure> {
    let mut whole = newer;
    if path.exists() {
        let mut older = Profile::load(path).map_err(|error| {
            Failure::bad_input(format!("{}: {error}", path.display()))
                .hint("name another file with -o, or move that one away")
        })?;
        if older.made_elsewhere(&whole.machine).is_some() {
            return Err(Failure::bad_input(format!(
                "{} holds a profile of {}, and this is one of {}",
                path.display(),
                older.machine,
                whole.machine
            ))
            .hint("name another file with -o, or move that one away"));
        }
        let kept = older.rows.len();
        older.update(whole).map_err(Failure::internal)?;
        whole = older;
        screen.say(format!("updating {} ({kept} rows so far)", path.display()));
    }
    if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
        std::fs::create_dir_all(directory)
            .map_err(|error| Failure::bad_input(format!("cannot make {}: {error}", directory.display())))?;
    }
    whole.save(path).map_err(Failure::bad_input)?;
    Ok(whole)
}

fn search(flag: Option<&Path>, gpu: bool) -> Result<Found, Failure> {
    if let Some(path) = flag {
        return load(path, format!("--profile {}", path.display()));
    }
    if let Some(path) = std::env::var_os(VARIABLE).filter(|value| !value.is_empty()).map(PathBuf::from) {
        return load(&path, format!("${VARIABLE}, {}", path.display()));
    }
    let of_gpu = gpu_path().filter(|path| gpu && path.exists());
    if let Some(path) = of_gpu.or_else(user_path).filter(|path| path.exists()) {
        return load(&path, path.display().to_string());
    }
    let profile = Profile::read(SHIPPED_CPU.as_bytes()).map_err(Failure::internal)?;
    Ok(Found { profile, origin: "shipped profile".into() })
}

fn load(path: &Path, origin: String) -> Result<Found, Failure> {
    let profile = Profile::load(path).map_err(|error| Failure::bad_input(format!("{}: {error}", path.display())))?;
    Ok(Found { profile, origin })
}
