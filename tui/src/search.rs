//! Searching for plans, on clusters and on this machine, in one shape; and a plan as settings, to be opened again.

use crate::figures::Figures;
use crate::question::{LocalMachine, cluster_requests};
use crate::settings::Settings;
use paceline_planner::job::Job;
use paceline_planner::predict::{ClusterRequest, SweepProgress, sweep_clusters_while};
use paceline_planner::search::{Progress, Scored, search};
use paceline_sim::cluster::Physics;
use toml::Table;

/// A plan.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Its configuration in a line.
    pub configuration: String,
    /// The keys of a job that is this configuration and no other.
    pub job: Table,
    /// What it takes.
    pub figures: Figures,
    /// As it is, for this machine: what `paceline run` executes.
    pub scored: Option<Box<Scored>>,
}

/// How far a search is.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct SearchProgress {
    /// Candidates in all.
    pub candidates: usize,
    /// Decided ones.
    pub decided: usize,
    /// Left out for their memory.
    pub memory: usize,
    /// Left out because they cannot be.
    pub invalid: usize,
    /// Seconds per iteration of the best so far.
    pub best: Option<f64>,
    /// No plan can be faster, where that is known before the end.
    pub bound: Option<f64>,
}

/// What a search found.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Found {
    /// The best first.
    pub rows: Vec<Row>,
    /// Candidates in all.
    pub candidates: usize,
    /// Left out for their memory, for their bound, because they cannot be.
    pub pruned: [usize; 3],
    /// Predicted ones.
    pub simulated: usize,
    /// Wall-clock seconds.
    pub search_seconds: f64,
    /// How far the best is above what no plan can be below, relative to that.
    pub gap: Option<f64>,
    /// Where nothing fits, why.
    pub nothing: Option<String>,
}

/// Searches the axes that a job leaves open. `progress` is told how far it is and ends the search by `false`.
///
/// # Errors
/// What is wrong with the job.
pub fn find(
    job: &Table,
    local: &LocalMachine,
    top: usize,
    progress: &(dyn Fn(SearchProgress) -> bool + Sync),
) -> Result<Found, String> {
    if Settings::from_table(job).is_local() {
        find_local(job, local, top, progress)
    } else {
        find_on_cluster(job, top, progress)
    }
}

fn find_on_cluster(
    job: &Table,
    top: usize,
    progress: &(dyn Fn(SearchProgress) -> bool + Sync),
) -> Result<Found, String> {
    let requests = cluster_requests(job.clone())?;
    let Some(first) = requests.first() else { return Err("the job has no configuration".into()) };
    let cluster = first.cluster().map_err(|error| error.to_string())?;
    let physics = Physics::of(&cluster).map_err(|error| error.to_string())?;
    let tell = |at: SweepProgress| {
        progress(SearchProgress {
            candidates: at.candidates,
            decided: at.decided,
            memory: at.pruned.memory,
            invalid: at.pruned.invalid,
            best: at.best,
            bound: Some(at.bound),
        })
    };
    let sweep = sweep_clusters_while(&requests, &physics, top, &tell).map_err(|error| error.to_string())?;
    let row = |request: &ClusterRequest, figures: Figures| -> Result<Row, String> {
        let mut keys = Table::try_from(request).map_err(|error| error.to_string())?;
        if let Some(train) = job.get("train") {
            keys.insert("train".into(), train.clone());
        }
        Ok(Row { configuration: request.to_string(), job: keys, figures, scored: None })
    };
    let rows = sweep.plans.iter().map(|plan| row(&plan.configuration, Figures::from(&plan.prediction)));
    let nothing = match &sweep.nearest {
        Some(near) => Some(format!("no plan fits; the one that lacks the least memory: {}", near.configuration)),
        None if sweep.plans.is_empty() => Some("no combination of the axes can be".into()),
        None => None,
    };
    Ok(Found {
        rows: rows.collect::<Result<_, _>>()?,
        candidates: sweep.candidates,
        pruned: [sweep.pruned.memory, sweep.pruned.bound, sweep.pruned.invalid],
        simulated: sweep.simulated,
        search_seconds: sweep.search_seconds,
        gap: sweep.gap,
        nothing,
    })
}

fn find_local(
    job: &Table,
    local: &LocalMachine,
    top: usize,
    progress: &(dyn Fn(SearchProgress) -> bool + Sync),
) -> Result<Found, String> {
    let read = Job::from_table(job.clone(), "job").map_err(|error| error.to_string())?;
    let tell = |at: Progress| {
        progress(SearchProgress {
            candidates: at.candidates,
            decided: at.decided,
            best: at.best,
            ..SearchProgress::default()
        })
    };
    let plans = match search(&read, local.machine, &*local.predictor, top, &tell) {
        Ok(plans) => plans,
        Err(error) => return Ok(Found { nothing: Some(error.to_string()), ..Found::default() }),
    };
    let row = |scored: &Scored| -> Result<Row, String> {
        let mut keys = job.clone();
        let chosen = Table::try_from(&scored.configuration).map_err(|error| error.to_string())?;
        keys.extend(chosen.into_iter().filter(|(key, _)| key != "stage_layers"));
        Ok(Row {
            configuration: scored.configuration.to_string(),
            job: keys,
            figures: Figures::from(&scored.prediction),
            scored: Some(Box::new(scored.clone())),
        })
    };
    Ok(Found {
        rows: plans.plans.iter().map(row).collect::<Result<_, _>>()?,
        candidates: plans.candidates,
        pruned: [plans.pruned.memory, plans.pruned.bound, plans.pruned.invalid],
        simulated: plans.simulated,
        search_seconds: plans.search_seconds,
        gap: Some(plans.gap),
        nothing: None,
    })
}
