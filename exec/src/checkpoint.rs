//! Checkpoints: a folder per checkpoint with safetensors files of about a gigabyte and a `manifest.json` that names, sizes
//! and sums them.
//!
//! A folder is written under another name, flushed to disk, and renamed when it is whole; the file `latest` beside
//! it is replaced after that. So whatever happens while writing, what is found is whole or absent. Tensors
//! have global names and whole shapes, so a checkpoint can be resumed under another layout.

use crate::error::{CheckpointError, ExecError};
use crate::state::{ModelState, TensorState};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

const FORMAT: &str = "paceline.checkpoint/1";
const MANIFEST: &str = "manifest.json";
const LATEST: &str = "latest";
const FIRST: &str = ".first_moment";
const SECOND: &str = ".second_moment";
/// A file is begun anew beyond this size, so that a large model does not have to be serialised in one piece.
const FILE_BYTES: usize = 1 << 30;

/// What is known of a checkpoint beside its tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Progress {
    /// Steps done.
    pub step: u64,
    /// Seeds the order of the data, which with `step` gives the position in it.
    pub seed: u64,
    /// Of the model.
    pub digest: String,
    /// Name of the data.
    pub data: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    format: String,
    #[serde(flatten)]
    progress: Progress,
    files: Vec<FileEntry>,
}

#[derive(Debug, Serialize, Deserialize)]
struct FileEntry {
    name: String,
    bytes: u64,
    crc32: u32,
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> CheckpointError + '_ {
    move |source| CheckpointError::Io { path: path.into(), source }
}

/// Writes a checkpoint into its own folder in `directory` and returns that folder.
pub(crate) fn save(directory: &Path, progress: &Progress, state: &ModelState) -> Result<PathBuf, CheckpointError> {
    let name = format!("step-{:08}", progress.step);
    let (whole, partial) = (directory.join(&name), directory.join(format!(".{name}.partial")));
    if partial.exists() {
        fs::remove_dir_all(&partial).map_err(io(&partial))?;
    }
    fs::create_dir_all(&partial).map_err(io(&partial))?;
    let mut files = Vec::new();
    let mut pending: Vec<(String, &TensorState)> = Vec::new();
    let mut pending_bytes = 0;
    for (name, tensor) in state {
        if pending_bytes > 0 && pending_bytes + 12 * tensor.values.len() > FILE_BYTES {
            files.push(write_tensors(&partial, files.len(), &pending)?);
            pending.clear();
            pending_bytes = 0;
        }
        pending_bytes += 12 * tensor.values.len();
        pending.push((name.clone(), tensor));
    }
    files.push(write_tensors(&partial, files.len(), &pending)?);
    let manifest = Manifest { format: FORMAT.into(), progress: progress.clone(), files };
    let text = serde_json::to_vec_pretty(&manifest).map_err(|e| io(&partial)(e.into()))?;
    write_synced(&partial.join(MANIFEST), &text)?;
    sync_folder(&partial)?;
    if whole.exists() {
        fs::remove_dir_all(&whole).map_err(io(&whole))?;
    }
    fs::rename(&partial, &whole).map_err(io(&whole))?;
    let (latest, new) = (directory.join(LATEST), directory.join(".latest.partial"));
    write_synced(&new, name.as_bytes())?;
    fs::rename(&new, &latest).map_err(io(&latest))?;
    sync_folder(directory)?;
    Ok(whole)
}

fn write_tensors(
    folder: &Path,
    number: usize,
    tensors: &[(String, &TensorState)],
) -> Result<FileEntry, CheckpointError> {
    let name = format!("tensors-{number:04}.safetensors");
    let path = folder.join(&name);
    let mut parts: Vec<(String, &[usize], Vec<u8>)> = Vec::with_capacity(3 * tensors.len());
    for (name, tensor) in tensors {
        for (suffix, values) in [("", &tensor.values), (FIRST, &tensor.first), (SECOND, &tensor.second)] {
            let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            parts.push((format!("{name}{suffix}"), &tensor.shape, bytes));
        }
    }
    let damaged = |error: safetensors::SafeTensorError| CheckpointError::Damaged {
        path: path.clone(),
        what: format!("cannot be put into safetensors: {error}"),
    };
    let views = parts
        .iter()
        .map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::F32, shape.to_vec(), bytes)?)))
        .collect::<Result<Vec<_>, _>>()
        .map_err(damaged)?;
    let bytes = safetensors::serialize(views, None).map_err(damaged)?;
    write_synced(&path, &bytes)?;
    Ok(FileEntry { name, bytes: bytes.len() as u64, crc32: crc32fast::hash(&bytes) })
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    let mut file = File::create(path).map_err(io(path))?;
    file.write_all(bytes).map_err(io(path))?;
    file.sync_all().map_err(io(path))
}

/// Makes renames within a folder durable.
fn sync_folder(path: &Path) -> Result<(), CheckpointError> {
    #[cfg(unix)]
    File::open(path).and_then(|folder| folder.sync_all()).map_err(io(path))?;
    #[cfg(not(unix))]
    let _ = path;
    Ok(())
}

/// Reads a checkpoint: `path` is its folder, or one with several, of which the latest is taken.
pub(crate) fn load(path: &Path) -> Result<(PathBuf, Progress, ModelState), CheckpointError> {
    let folder = if path.join(MANIFEST).is_file() {
        path.to_path_buf()
    } else {
        match fs::read_to_string(path.join(LATEST)) {
            Ok(name) => path.join(name.trim()),
            Err(_) => return Err(CheckpointError::Missing { path: path.into() }),
        }
    };
    let damaged = |path: &Path, what: String| CheckpointError::Damaged { path: path.into(), what };
    let manifest_path = folder.join(MANIFEST);
    let text = fs::read(&manifest_path).map_err(io(&manifest_path))?;
    #[derive(Deserialize)]
    struct Versioned {
        format: String,
    }
    let versioned: Versioned = serde_json::from_slice(&text)
        .map_err(|error| damaged(&manifest_path, format!("it is not a manifest ({error})")))?;
    if versioned.format != FORMAT {
        return Err(CheckpointError::Newer { path: folder, format: versioned.format, known: FORMAT });
    }
    let manifest: Manifest = serde_json::from_slice(&text)
        .map_err(|error| damaged(&manifest_path, format!("it is not a manifest ({error})")))?;
    let mut state = ModelState::new();
    for entry in &manifest.files {
        let path = folder.join(&entry.name);
        let bytes = fs::read(&path).map_err(io(&path))?;
        if bytes.len() as u64 != entry.bytes {
            let what = format!("it has {} bytes instead of {}: truncated", bytes.len(), entry.bytes);
            return Err(damaged(&path, what));
        }
        if crc32fast::hash(&bytes) != entry.crc32 {
            return Err(damaged(&path, "its checksum differs".into()));
        }
        let tensors =
            SafeTensors::deserialize(&bytes).map_err(|error| damaged(&path, format!("not safetensors: {error}")))?;
        let values = |name: &str| {
            let view = tensors.tensor(name).map_err(|_| damaged(&path, format!("tensor {name} is missing")))?;
            if view.dtype() != Dtype::F32 {
                return Err(damaged(&path, format!("tensor {name} is {:?} instead of F32", view.dtype())));
            }
            let values = view.data().as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect::<Vec<f32>>();
            Ok((view.shape().to_vec(), values))
        };
        for name in tensors.names() {
            if name.ends_with(FIRST) || name.ends_with(SECOND) {
                continue;
            }
            let (shape, parameter) = values(name)?;
            let (first, second) = (values(&format!("{name}{FIRST}"))?.1, values(&format!("{name}{SECOND}"))?.1);
            if first.len() != parameter.len() || second.len() != parameter.len() {
                return Err(damaged(&path, format!("the moments of {name} have another size than it has")));
            }
            state.insert(name.to_string(), TensorState { shape, values: parameter, first, second });
        }
    }
    Ok((folder, manifest.progress, state))
}

/// Refuses a checkpoint of another model.
pub(crate) fn require_same_model(folder: &Path, progress: &Progress, digest: &str) -> Result<(), ExecError> {
    if progress.digest == digest {
        return Ok(());
    }
    Err(CheckpointError::OtherModel {
        path: folder.into(),
        key: "digest".into(),
        found: progress.digest.clone(),
        expected: digest.into(),
    }
    .into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> (Progress, ModelState) {
        let tensor = |k: f32| TensorState {
            shape: vec![2, 3],
            values: (0..6).map(|i| i as f32 * k).collect(),
            first: vec![k; 6],
            second: vec![f32::MIN_POSITIVE * k; 6],
        };
        let progress = Progress { step: 7, seed: u64::MAX, digest: "d".into(), data: "t".into() };
        (progress, ModelState::from([("a.weight".into(), tensor(0.1)), ("b.weight".into(), tensor(-3.0))]))
    }

    #[test]
    fn what_is_read_is_what_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let (mut progress, mut state) = example();
        let first = save(folder.path(), &progress, &state).unwrap();
        progress.step = 8;
        state.get_mut("a.weight").unwrap().values[0] = 42.0;
        save(folder.path(), &progress, &state).unwrap();
        assert_eq!(load(folder.path()).unwrap().1, progress, "the folder above gives the latest");
        assert_eq!(load(folder.path()).unwrap().2, state);
        assert_eq!(load(&first).unwrap().1.step, 7);
        assert_eq!(load(&first).unwrap().2, example().1);
        // Writing again over the same step replaces it.
        assert_eq!(save(folder.path(), &progress, &example().1).unwrap(), folder.path().join("step-00000008"));
        assert_eq!(load(folder.path()).unwrap().2, example().1);
        let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(left.iter().all(|name| !name.to_string_lossy().contains("partial")), "{left:?}");
    }

    #[test]
    fn damage_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let (progress, state) = example();
        let message = |path: &Path| load(path).unwrap_err().to_string();
        assert!(message(folder.path()).contains("no checkpoint in"));
        let whole = save(folder.path(), &progress, &state).unwrap();
        let file = whole.join("tensors-0000.safetensors");
        let bytes = fs::read(&file).unwrap();
        fs::write(&file, &bytes[..bytes.len() - 5]).unwrap();
        assert!(message(&whole).contains("truncated"), "{}", message(&whole));
        let mut altered = bytes.clone();
        *altered.last_mut().unwrap() ^= 1;
        fs::write(&file, &altered).unwrap();
        assert!(message(&whole).contains("checksum"), "{}", message(&whole));
        fs::remove_file(&file).unwrap();
        assert!(message(&whole).contains("tensors-0000.safetensors"));
        fs::write(&file, &bytes).unwrap();
        let manifest = whole.join(MANIFEST);
        let text = fs::read_to_string(&manifest).unwrap();
        fs::write(&manifest, text.replace("checkpoint/1", "checkpoint/9")).unwrap();
        assert!(message(&whole).contains("checkpoint/9"));
        fs::write(&manifest, &text[..text.len() / 2]).unwrap();
        assert!(message(&whole).contains("not a manifest"));
        let error = require_same_model(&whole, &progress, "other").unwrap_err().to_string();
        assert!(error.contains("another model"), "{error}");
    }
}
