//! `paceline export`: a plan as files that start it with Megatron-LM, torchtitan, nanotron, DeepSpeed or PyTorch.

use crate::commands::cluster;
use crate::failure::Failure;
use crate::flags::JobFlags;
use crate::job_source::JobSource;
use crate::local::Local;
use crate::screen::Screen;
use crate::trace_file::write_whole;
use paceline_planner::configuration::Configuration;
use paceline_planner::export::{Exported, File, Launch, Target, export};
use paceline_planner::plan::{ClusterPlanFile, Plan};
use paceline_planner::prediction::predict;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// Writes what another launcher needs to start a plan: a script, its configuration, and the schedule where it takes one.
///
/// A plan that the launcher cannot run as it was planned is refused, with what the launcher has.
#[derive(Debug, Clone, clap::Args)]
#[command(
    after_help = "Examples:\n  paceline plan --model llama-3-70b --cluster dgx-h100-ib --nodes 8 --seq 8192 --global-batch 128 -o plan.json\n  paceline export plan.json --to megatron -o run\n  paceline export --model llama-3-8b --cluster dgx-h100-ib --seq 8192 --global-batch 64 --states zero3 --to torchtitan"
)]
pub struct Arguments {
    /// A plan of `paceline plan -o`, or a job file.
    #[arg(value_name = "plan.json|JOB.toml")]
    pub plan: Option<PathBuf>,

    #[command(flatten)]
    pub flags: JobFlags,

    /// `megatron`, `torchtitan`, `nanotron`, `deepspeed`, `pytorch-schedule`.
    #[arg(long, value_name = "LAUNCHER")]
    pub to: String,

    /// Directory for the files; without it they are printed.
    #[arg(long, short, value_name = "DIR")]
    pub output: Option<PathBuf>,

    /// Profile of this machine, for plans of it (default: as for `paceline predict`).
    #[arg(long, value_name = "FILE")]
    pub profile: Option<PathBuf>,
}

/// The document of `--json`.
#[derive(Debug, Serialize)]
struct Document<'a> {
    format: &'static str,
    to: Target,
    written: Vec<PathBuf>,
    #[serde(flatten)]
    exported: &'a Exported,
}

/// Runs the command.
pub fn run(screen: &Screen, arguments: &Arguments) -> Result<(), Failure> {
    let target: Target = arguments.to.parse().map_err(Failure::bad_input)?;
    let launch = launch(screen, arguments)?;
    let exported = export(&launch, target).map_err(Failure::bad_input)?;
    let mut written = Vec::new();
    match &arguments.output {
        Some(directory) => {
            std::fs::create_dir_all(directory).map_err(|error| {
                Failure::bad_input(format!("-o {}: {error}; name a directory", directory.display()))
            })?;
            for file in &exported.files {
                let path = directory.join(&file.name);
                write_whole(&path, file.text.as_bytes())?;
                if file.executable {
                    start_bit(&path)?;
                }
                screen.line(path.display().to_string())?;
                written.push(path);
            }
        }
        None => show(screen, &exported.files)?,
    }
    for note in &exported.notes {
        screen.say(format!("note: {note}"));
    }
    screen.document(&Document { format: "paceline.export/1", to: target, written, exported: &exported })
}

/// One file as it is; several under their names.
fn show(screen: &Screen, files: &[File]) -> Result<(), Failure> {
    for (place, file) in files.iter().enumerate() {
        if files.len() > 1 {
            screen.line(format!("{}==> {} <==", if place > 0 { "\n" } else { "" }, file.name))?;
        }
        screen.line(file.text.trim_end())?;
    }
    Ok(())
}

#[cfg(unix)]
fn start_bit(path: &Path) -> Result<(), Failure> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).map_err(Failure::internal)
}

#[cfg(not(unix))]
fn start_bit(_: &Path) -> Result<(), Failure> {
    Ok(())
}

fn launch(screen: &Screen, arguments: &Arguments) -> Result<Launch, Failure> {
    if let Some(path) = arguments.plan.as_deref().filter(|path| path.extension().is_some_and(|e| e == "json")) {
        if !arguments.flags.table().map_err(Failure::internal)?.is_empty() {
            let hint = "make another plan with `paceline plan`, or give a job file with flags";
            return Err(Failure::bad_input("a plan names everything; flags beside it have no place").hint(hint));
        }
        let text = std::fs::read_to_string(path)
            .map_err(|error| Failure::bad_input(format!("plan {}: {error}", path.display())))?;
        return if ClusterPlanFile::is_one(&text) {
            let plan = ClusterPlanFile::from_json(&text, path).map_err(Failure::bad_input)?;
            Launch::of_request(&plan.configuration).map_err(Failure::bad_input)
        } else {
            let plan = Plan::from_json(&text, path).map_err(Failure::bad_input)?;
            Launch::of_plan(&plan).map_err(Failure::bad_input)
        };
    }
    let source = JobSource { job: arguments.plan.clone(), flags: arguments.flags.clone() };
    if source.cluster()?.is_some() {
        return Launch::of_request(&cluster::request(&source)?).map_err(Failure::bad_input);
    }
    let job = source.read()?;
    let local = Local::open(screen, arguments.profile.as_deref())?;
    let configuration = Configuration::of_job(&job).map_err(Failure::bad_input)?;
    let machine = local.machine.for_job(&job);
    let program = configuration.program(&job, machine).map_err(Failure::bad_input)?;
    let (prediction, _) = predict(&program, &local.predictor, machine, job.memory_limit).map_err(Failure::internal)?;
    Launch::of_plan(&Plan { job, configuration, machine, prediction }).map_err(Failure::bad_input)
}
