//! Questions that views ask of the simulator, answered as the command line answers them: the same job gives the same figures.

use crate::figures::Figures;
use crate::lanes::Lanes;
use crate::settings::Settings;
use paceline_planner::configuration::{Configuration, Machine};
use paceline_planner::job::{Job, parse_bytes};
use paceline_planner::predict::{ClusterRequest, OverlapRatios, TokenBudget, predict_cluster, schedule_cluster};
use paceline_planner::prediction::{Prediction, predict};
use paceline_profiles::{Cluster, Predictor, Profile};
use paceline_sim::cluster::{Architecture, Layout, Physics};
use paceline_sim::program::Program;
use std::sync::Arc;
use toml::{Table, Value};

/// This machine, as far as predictions need it.
#[derive(Debug, Clone)]
pub struct LocalMachine {
    /// What was measured.
    pub profile: Arc<Profile>,
    /// Fits over it.
    pub predictor: Arc<Predictor>,
    /// Device slots and their rate.
    pub machine: Machine,
    /// Where the profile comes from, for people.
    pub origin: String,
}

/// What a configuration takes.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The figures.
    pub figures: Figures,
    /// Model and machine in one line.
    pub title: String,
    /// Devices.
    pub devices: u64,
    /// Microbatches of a replica in an iteration.
    pub microbatches: u64,
    /// Whether communication can hide, on clusters.
    pub ratios: Option<OverlapRatios>,
    /// What training on the tokens of the budget takes; on one token where there is no budget, for its speed.
    pub budget: TokenBudget,
    /// Where the figures of the machine come from.
    pub source: String,
}

/// The requests behind the keys of a job for a cluster, one for each combination of its lists.
///
/// # Errors
/// Keys that are not known and values of the wrong kind.
pub fn cluster_requests(mut table: Table) -> Result<Vec<ClusterRequest>, String> {
    // How to train is none of a prediction's business.
    table.remove("train");
    if let Some(Value::String(text)) = table.get("memory_limit") {
        let bytes = parse_bytes(text).and_then(|bytes| i64::try_from(bytes).ok()).filter(|bytes| *bytes > 0);
        let bytes = bytes.ok_or_else(|| format!("memory_limit = {text:?}; allowed: bytes, or a size such as 80GiB"))?;
        table.insert("memory_limit".into(), Value::Integer(bytes));
    }
    for key in ["model", "seq", "global_batch"] {
        if !table.contains_key(key) {
            return Err(format!("{key} is missing"));
        }
    }
    ClusterRequest::of_table(table, "job").map_err(|error| error.to_string())
}

/// The job and the configuration behind the keys of a job for this machine.
///
/// # Errors
/// What is wrong, with what is allowed.
pub fn local_job(settings: &Settings) -> Result<(Job, Configuration), String> {
    let job = Job::from_table(settings.table(), "job").map_err(|error| error.to_string())?;
    let configuration = match &settings.opened {
        Some(opened) => (**opened).clone(),
        None => Configuration::of_job(&job).map_err(|error| error.to_string())?,
    };
    Ok((job, configuration))
}

/// Predicts.
///
/// # Errors
/// Why there is no such configuration, with what is allowed.
pub fn ask(settings: &Settings, local: &LocalMachine) -> Result<Answer, String> {
    if settings.is_local() { ask_local(settings, local) } else { ask_cluster(settings) }
}

fn budget(settings: &Settings, speed: f64, devices: u64) -> TokenBudget {
    let price = settings.budget("price").unwrap_or(0.0);
    TokenBudget::of(speed, devices, settings.budget("tokens").unwrap_or(1.0), price)
}

/// What a job on a cluster comes down to.
pub type OnCluster = (ClusterRequest, Architecture, Layout, Cluster, Physics);

/// A configuration on a cluster with what its prediction needs.
///
/// # Errors
/// What is wrong, with what is allowed.
pub fn on_cluster(settings: &Settings) -> Result<OnCluster, String> {
    let requests = cluster_requests(settings.table())?;
    let Some(request) = requests.into_iter().next() else { return Err("the job has no configuration".into()) };
    let (model, layout, cluster) = request.resolve().map_err(|error| error.to_string())?;
    let physics = Physics::of(&cluster).map_err(|error| error.to_string())?;
    Ok((request, model, layout, cluster, physics))
}

/// Simulates every pass, for a timeline.
///
/// # Errors
/// As [`ask`].
pub fn simulate(settings: &Settings, local: &LocalMachine) -> Result<Lanes, String> {
    if settings.is_local() {
        let (job, configuration) = local_job(settings)?;
        let machine = local.machine.for_job(&job);
        let program = configuration.program(&job, machine).map_err(|error| error.to_string())?;
        let predicted = predict(&program, &*local.predictor, machine, job.memory_limit);
        let (_, trace) = predicted.map_err(|error| error.to_string())?;
        return Ok(Lanes::of_trace(&trace));
    }
    let (_, model, layout, cluster, physics) = on_cluster(settings)?;
    let prediction = predict_cluster(&model, &layout, &cluster, &physics).map_err(|error| error.to_string())?;
    let schedule = schedule_cluster(&model, &layout, &cluster, &physics).map_err(|error| error.to_string())?;
    Ok(Lanes::of_schedule(&schedule, prediction.iteration_seconds, &prediction.memory))
}

fn ask_cluster(settings: &Settings) -> Result<Answer, String> {
    let (_, model, layout, cluster, physics) = on_cluster(settings)?;
    let prediction = predict_cluster(&model, &layout, &cluster, &physics).map_err(|error| error.to_string())?;
    let devices = layout.gpus();
    let nodes = devices.div_ceil(u64::from(cluster.gpus_per_node));
    Ok(Answer {
        title: format!("{} on {nodes} x {} of {}", model.name, cluster.gpus_per_node, cluster.name),
        devices,
        microbatches: layout.microbatches,
        ratios: Some(OverlapRatios::of(&model, &layout, &cluster)),
        budget: budget(settings, prediction.tokens_per_second_per_gpu, devices),
        figures: Figures::from(&prediction),
        source: cluster.source,
    })
}

fn ask_local(settings: &Settings, local: &LocalMachine) -> Result<Answer, String> {
    let (job, configuration) = local_job(settings)?;
    let machine = local.machine.for_job(&job);
    let program = configuration.program(&job, machine).map_err(|error| error.to_string())?;
    let (prediction, _) =
        predict(&program, &*local.predictor, machine, job.memory_limit).map_err(|error| error.to_string())?;
    Ok(ask_program(settings, &job, &program, machine, &prediction, local))
}

/// The answer of a program of this machine that is predicted already.
pub fn ask_program(
    settings: &Settings,
    job: &Job,
    program: &Program,
    machine: Machine,
    prediction: &Prediction,
    local: &LocalMachine,
) -> Answer {
    let devices = u64::from(machine.devices);
    let plural = if devices == 1 { "" } else { "s" };
    Answer {
        title: format!("{} on {devices} device{plural} of this machine", job.model.name),
        devices,
        microbatches: u64::from(program.microbatches),
        ratios: None,
        budget: budget(settings, prediction.tokens_per_second_per_gpu, devices),
        figures: Figures::from(prediction),
        source: local.origin.clone(),
    }
}
