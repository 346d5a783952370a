//! Plans as files: to be run here, to be opened again, or to be started by another launcher. Names that are taken stay as they are.

use crate::question::{LocalMachine, cluster_requests};
use crate::search::Row;
use paceline_planner::export::{Launch, Target, export};
use paceline_planner::job::Job;
use paceline_planner::plan::Plan;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// The plan of a row for this machine; none for clusters.
fn local_plan(row: &Row, local: &LocalMachine) -> Result<Option<Plan>, String> {
    let Some(scored) = &row.scored else { return Ok(None) };
    let job = Job::from_table(row.job.clone(), "job").map_err(|error| error.to_string())?;
    Ok(Some(Plan {
        machine: local.machine.for_job(&job),
        configuration: scored.configuration.clone(),
        prediction: scored.prediction.clone(),
        job,
    }))
}

/// The file of a plan: for this machine what `paceline run` executes, for a cluster the job with every axis set.
///
/// # Errors
/// What is wrong with the plan.
pub fn plan_file(row: &Row, local: &LocalMachine) -> Result<String, String> {
    match local_plan(row, local)? {
        Some(plan) => plan.to_json().map_err(|error| error.to_string()),
        None => toml::to_string(&row.job).map_err(|error| error.to_string()),
    }
}

/// Writes a plan into a folder; returns the name of its file there.
///
/// # Errors
/// What is wrong with the plan, or the file system.
pub fn write_plan(row: &Row, local: &LocalMachine, into: &Path) -> Result<String, String> {
    let text = plan_file(row, local)?;
    let kind = if row.scored.is_some() { "json" } else { "toml" };
    let write = |name: &str| File::create_new(into.join(name))?.write_all(text.as_bytes());
    new_name(|number| numbered("plan", number) + "." + kind, write)
        .map_err(|error| format!("the plan cannot be written: {error}"))
}

/// Writes what a launcher needs to start a plan into a folder of its own in a folder; returns its name there, and what the launcher
/// decides by itself.
///
/// # Errors
/// What the launcher cannot do, with what it can, or the file system.
pub fn export_plan(row: &Row, local: &LocalMachine, to: Target, into: &Path) -> Result<String, String> {
    let launch = match local_plan(row, local)? {
        Some(plan) => Launch::of_plan(&plan),
        None => {
            let requests = cluster_requests(row.job.clone())?;
            Launch::of_request(requests.first().ok_or("the plan has no configuration")?)
        }
    };
    let launch = launch.map_err(|error| error.to_string())?;
    let exported = export(&launch, to).map_err(|error| error.to_string())?;
    let write = |name: &str| {
        let folder = into.join(name);
        fs::create_dir(&folder)?;
        for file in &exported.files {
            let path = folder.join(&file.name);
            fs::write(&path, &file.text)?;
            if file.executable {
                make_executable(&path)?;
            }
        }
        Ok(())
    };
    let folder = new_name(|number| numbered(to.name(), number), write)
        .map_err(|error| format!("the plan cannot be exported: {error}"))?;
    Ok(std::iter::once(folder).chain(exported.notes).collect::<Vec<_>>().join("; "))
}

fn numbered(name: &str, number: u32) -> String {
    if number == 1 { name.to_owned() } else { format!("{name}-{number}") }
}

/// Writes to the first name that is not taken.
fn new_name(name: impl Fn(u32) -> String, write: impl Fn(&str) -> io::Result<()>) -> io::Result<String> {
    for number in 1..1000 {
        let name = name(number);
        match write(&name) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            outcome => return outcome.map(|()| name),
        }
    }
    Err(io::Error::other(format!("{} to {} are all taken", name(1), name(999))))
}

#[cfg(unix)]
fn make_executable(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}

#[cfg(not(unix))]
fn make_executable(_: &Path) -> io::Result<()> {
    Ok(())
}
