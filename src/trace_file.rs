//! Traces as files: ours (for `compare` and `calibrate --from-trace`) and Chrome's (for ui.perfetto.dev).

use crate::failure::Failure;
use crate::screen::Screen;
use paceline_planner::plan;
use paceline_profiles::{Machine, Profile, Row};
use paceline_sim::trace::{TRACE_FORMAT, Trace};
use std::path::{Path, PathBuf};

/// Writes a file whole or not at all.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    plan::write_whole(path, bytes)
        .map_err(|error| Failure::bad_input(format!("cannot write {}: {error}", path.display())))
}

/// Writes the trace in the forms that were asked for.
pub fn write_if_asked(
    screen: &Screen,
    trace: &Trace,
    own: Option<&Path>,
    perfetto: Option<&Path>,
) -> Result<(), Failure> {
    if let Some(path) = own {
        write_whole(path, &serde_json::to_vec(trace).map_err(Failure::internal)?)?;
        screen.say(format!("trace written to {}", path.display()));
    }
    if let Some(path) = perfetto {
        write_whole(path, &serde_json::to_vec(&trace.to_chrome()).map_err(Failure::internal)?)?;
        screen.say(format!("trace written to {}; open it at ui.perfetto.dev", path.display()));
    }
    Ok(())
}

/// Reads a trace of ours.
pub fn read(path: &Path) -> Result<Trace, Failure> {
    let refuse = |what: String| {
        Failure::bad_input(format!("trace {}: {what}", path.display()))
            .hint("write one with `paceline predict --trace FILE` or `paceline run plan.json --trace FILE`")
    };
    let text = std::fs::read_to_string(path).map_err(|error| refuse(error.to_string()))?;
    let value: serde_json::Value = serde_json::from_str(&text).map_err(|error| {
        refuse(if error.is_eof() {
            format!("truncated at line {}", error.line())
        } else {
            format!("not JSON: {error}")
        })
    })?;
    let format = value.get("format").and_then(|format| format.as_str()).unwrap_or("none");
    if format != TRACE_FORMAT {
        return Err(refuse(format!("format {format:?} is not {TRACE_FORMAT:?}")));
    }
    serde_json::from_value(value).map_err(|error| refuse(error.to_string()))
}

/// Where the kernel times of a traced run lie: beside the trace.
pub fn kernels_path(trace: &Path) -> PathBuf {
    trace.with_extension("kernels.csv")
}

/// Writes the kernel times of a run beside its trace.
pub fn write_kernels(trace: &Path, machine: Machine, rows: Vec<Row>) -> Result<(), Failure> {
    let profile = Profile { machine, rows };
    profile.save(&kernels_path(trace)).map_err(Failure::bad_input)
}

/// Reads the kernel times of the run behind a trace.
pub fn read_kernels(trace: &Path) -> Result<Profile, Failure> {
    let path = kernels_path(trace);
    if !path.exists() {
        return Err(Failure::bad_input(format!(
            "{} does not exist: `paceline run` writes the kernel times of a run there, beside its trace {}",
            path.display(),
            trace.display()
        ))
        .hint("run again with `paceline run plan.json --trace FILE`, and keep both files together"));
    }
    Profile::load(&path).map_err(Failure::bad_input)
}
