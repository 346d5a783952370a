//! `paceline plan`: the best configurations of a job, and why the others lost.

use crate::commands::cluster;
use crate::failure::Failure;
use crate::interrupt;
use crate::job_source::JobSource;
use crate::local::Local;
use crate::screen::{Screen, Style};
use crate::table::{Table, show_percent, show_seconds};
use paceline_planner::job::Job;
use paceline_planner::plan::{ClusterPlanFile, Plan};
use paceline_planner::search::{Part, Plans, Progress, Reason, SearchError, search};
use paceline_planner::states::{GuidelineRank, rank_here};
use paceline_sim::units::show_bytes;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::Ordering;

/// Searches data parallel x pipeline parallel x chunks x schedule x microbatch x recomputation x state partition under the
/// memory limit, by simulation. Axes that the job names are fixed.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(
    after_help = "Examples:\n  paceline plan --model demo-3m --seq 256 --global-batch 8 -o plan.json\n  paceline plan job.toml --memory-limit 64MiB --explain"
)]
pub struct Arguments {
    #[command(flatten)]
    pub source: JobSource,

    /// Write a plan to this file, for `paceline run`.
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,

    /// Which of the plans to write, 1 for the best.
    #[arg(long, value_name = "PLACE", default_value_t = 1, requires = "output", value_parser = clap::value_parser!(u32).range(1..))]
    pub pick: u32,

    /// How many plans to show.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub top: u32,

    /// Say of more of the losers why they lost.
    #[arg(long)]
    pub explain: bool,

    /// On a cluster, search among what this launcher can run: `megatron`, `torchtitan`, `nanotron`, `deepspeed`.
    #[arg(long = "for", value_name = "LAUNCHER")]
    pub launcher: Option<String>,

    /// Profile of this machine (default: $PACELINE_PROFILE, else what `paceline calibrate` wrote, else the shipped one).
    #[arg(long, value_name = "FILE")]
    pub profile: Option<PathBuf>,
}

/// Runs the command.
pub fn run(screen: &Screen, arguments: &Arguments) -> Result<(), Failure> {
    if arguments.source.cluster()?.is_some() {
        if arguments.profile.is_some() {
            return Err(Failure::bad_input("--profile is for cluster = \"local\"; leave it out"));
        }
        let (top, place) = (arguments.top.max(arguments.pick) as usize, arguments.pick as usize);
        let launcher = arguments.launcher.as_deref().map(str::parse).transpose().map_err(Failure::bad_input)?;
        let sweep = cluster::plan(screen, &arguments.source, top, arguments.explain, launcher)?;
        if let Some(path) = &arguments.output {
            let Some(chosen) = sweep.plans.get(place - 1) else {
                return Err(Failure::bad_input(format!(
                    "--pick {place}: the search found {} plans",
                    sweep.plans.len()
                )));
            };
            let plan = ClusterPlanFile::new(chosen.configuration.clone(), chosen.prediction.clone());
            plan.write(path).map_err(Failure::bad_input)?;
            screen.say(format!(
                "plan {place} written to {}; start it with the files of `paceline export`",
                path.display()
            ));
        }
        return Ok(());
    }
    if arguments.launcher.is_some() {
        let hint = "leave --for out, or name a --cluster";
        return Err(Failure::bad_input("--for is for clusters; this machine runs plans by itself").hint(hint));
    }
    let job = arguments.source.read()?;
    let local = Local::open(screen, arguments.profile.as_deref())?;
    let mut plans = find(screen, &job, &local, arguments.top.max(arguments.pick) as usize)?;
    rank_all(&job, &local, &mut plans)?;
    if let Some(path) = &arguments.output {
        let place = arguments.pick as usize;
        let Some(chosen) = plans.plans.get(place - 1) else {
            return Err(Failure::bad_input(format!("--pick {place}: the search found {} plans", plans.plans.len())));
        };
        let plan = Plan {
            configuration: chosen.configuration.clone(),
            prediction: chosen.prediction.clone(),
            machine: local.machine.for_job(&job),
            job: job.clone(),
        };
        plan.write(path).map_err(Failure::bad_input)?;
        screen.say(format!("plan {place} written to {}", path.display()));
    }
    screen.line(format!("{}, {} tokens per step, {}", job.model.name, job.tokens_per_step(), local.origin))?;
    show(screen, &plans, if arguments.explain { 40 } else { 5 })?;
    if arguments.explain {
        screen.line("")?;
        show_guideline(screen, &plans)?;
    }
    if arguments.output.is_none() {
        screen.say("write the best with -o plan.json, then `paceline run plan.json`");
    }
    screen.document(&plans)
}

/// Bytes of a message over which ranks reach their bandwidth.
const LARGE: u64 = 16 << 20;

/// What PaRO's closed form says of each plan, with the bandwidth at which ranks of this machine copy large messages from each other.
fn rank_all(job: &Job, local: &Local, plans: &mut Plans) -> Result<(), Failure> {
    for plan in &mut plans.plans {
        let busy = plan.configuration.ranks().min(local.machine.devices);
        let inside = LARGE as f64 / local.predictor.transfer(LARGE, busy).seconds;
        let time = &plan.prediction.time;
        let ranked =
            rank_here(job, &plan.configuration, time.compute + time.recompute, inside).map_err(Failure::internal)?;
        plan.guideline = Some(ranked);
    }
    Ok(())
}

/// The guideline's ranking of the plans beside the predicted one.
fn show_guideline(screen: &Screen, plans: &Plans) -> Result<(), Failure> {
    let ranks: Vec<GuidelineRank> = plans.plans.iter().filter_map(|plan| plan.guideline).collect();
    let mut table = Table::new(["", "predicted", "states", "guideline", "log(1/T)", "place"]);
    for (n, (plan, guideline)) in plans.plans.iter().zip(&ranks).enumerate() {
        table.row([
            (n + 1).to_string(),
            show_seconds(plan.prediction.iteration_seconds),
            plan.configuration.states.letters(),
            show_seconds(guideline.seconds),
            format!("{:.2}", guideline.indicator),
            cluster::place_of(guideline, &ranks),
        ]);
    }
    table.print(screen)?;
    screen.line(
        "\n  guideline: PaRO's closed form of the state partition, the longer of communication and computation; place: by its indicator\n  \
         log(1/T) among these plans. It knows no pipeline, no latency, and no work of ranks that share a core.",
    )
}

/// Searches with progress; Ctrl-C ends the search with what it has found.
pub fn find(screen: &Screen, job: &Job, local: &Local, top: usize) -> Result<Plans, Failure> {
    let stop = interrupt::flag()?;
    let bar = Mutex::new(screen.progress(0, "search"));
    let progress = |at: Progress| {
        if let Ok(mut bar) = bar.lock() {
            let best = at.best.map_or(String::new(), |seconds| format!("best {}", show_seconds(seconds)));
            bar.resize(at.candidates as u64);
            bar.set(at.decided as u64, best);
        }
        !stop.load(Ordering::Relaxed)
    };
    search(job, local.machine, &local.predictor, top, &progress).map_err(|error| match error {
        SearchError::NothingFits { .. } | SearchError::NothingPossible { .. } => Failure::infeasible(error),
        SearchError::Cluster { .. } => Failure::bad_input(error),
    })
}

/// Prints the plans and `losers` of those that lost.
pub fn show(screen: &Screen, plans: &Plans, losers: usize) -> Result<(), Failure> {
    let mut table = Table::new(["", "time", "tokens/s per device", "MFU", "bubble", "peak per rank", "configuration"]);
    for (place, plan) in plans.plans.iter().enumerate() {
        let p = &plan.prediction;
        let peak = p.memory.peak_bytes.iter().copied().max().unwrap_or(0);
        table.styled(
            (place == 0).then_some(Style::Good),
            [
                (place + 1).to_string(),
                show_seconds(p.iteration_seconds),
                format!("{:.0}", p.tokens_per_second_per_gpu),
                p.mfu.map_or("-".into(), show_percent),
                show_percent(p.bubble_makespan),
                show_bytes(peak),
                plan.configuration.to_string(),
            ],
        );
    }
    table.print(screen)?;
    let pruned = &plans.pruned;
    screen.line(format!(
        "\n  {} candidates in {}: {} simulated, {} too large, {} slower by their bound, {} impossible; the best is within {} of the bound",
        plans.candidates,
        show_seconds(plans.search_seconds),
        plans.simulated,
        pruned.memory,
        pruned.bound,
        pruned.invalid,
        show_percent(plans.gap)
    ))?;
    if plans.losers.is_empty() || losers == 0 {
        return Ok(());
    }
    screen.line("\n  Why others lost:")?;
    // Of each reason some, so that no reason hides the others.
    let kinds: [fn(&Reason) -> bool; 4] = [
        |reason| matches!(reason, Reason::Slower { .. }),
        |reason| matches!(reason, Reason::Memory { .. }),
        |reason| matches!(reason, Reason::Bound { .. }),
        |reason| matches!(reason, Reason::Invalid { .. }),
    ];
    for kind in kinds {
        for loser in plans.losers.iter().filter(|loser| kind(&loser.reason)).take(losers.div_ceil(4)) {
            screen.line(format!("    {}: {}", loser.configuration, why(&loser.reason)))?;
        }
    }
    Ok(())
}

fn why(reason: &Reason) -> String {
    match reason {
        Reason::Memory { bytes } => format!("memory, needs {}", show_bytes(*bytes)),
        Reason::Bound { seconds } => format!("cannot take less than {}", show_seconds(*seconds)),
        Reason::Slower { seconds, mostly, by_seconds } => {
            let part = match mostly {
                Part::Compute => "compute",
                Part::Bubble => "bubble",
                Part::Recompute => "recomputation",
                Part::Communication => "communication",
                Part::Optimizer => "optimizer",
            };
            format!("{}, most of it {part} (+{})", show_seconds(*seconds), show_seconds(*by_seconds))
        }
        Reason::Invalid { why } => why.clone(),
    }
}
