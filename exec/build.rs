//! Concatenates the sources and documents of this repository into the bundled training text, so that the binary has
//! real data wherever it runs. Built once per build folder: an edit elsewhere in the repository does not rebuild this crate.

use std::path::{Path, PathBuf};
use std::{env, fs};

/// Folders of the repository, in the order of the text.
const FOLDERS: [&str; 8] =
    ["docs", "src", "exec/src", "kernels/src", "planner/src", "profiles/src", "sim/src", "tests"];
const EXTENSIONS: [&str; 4] = ["md", "rs", "toml", "cu"];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("bundled.txt");
    let mut files = Vec::new();
    // Outside its workspace (a packaged crate) only this crate's own folder is there.
    match here.parent().filter(|root| root.join("sim/src").is_dir()) {
        Some(root) => {
            files.extend([root.join("README.md"), root.join("CHANGELOG.md")].into_iter().filter(|f| f.is_file()));
            FOLDERS.iter().for_each(|folder| collect(&root.join(folder), &mut files));
        }
        None => collect(&here.join("src"), &mut files),
    }
    let mut text = Vec::new();
    for file in files {
        let bytes = fs::read(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        text.extend_from_slice(&bytes);
        text.push(b'\n');
    }
    fs::write(&out, text).unwrap_or_else(|error| panic!("{}: {error}", out.display()));
}

/// Text files below a folder, sorted by path so that the text does not depend on the file system.
fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    for path in paths {
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|e| EXTENSIONS.iter().any(|known| e == *known)) {
            files.push(path);
        }
    }
}
