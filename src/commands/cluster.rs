//! `paceline predict` and `paceline plan` for a cluster other than this machine: five-dimensional layouts from datasheets, published
//! measurements and few fitted parameters.

use crate::commands::predict::show;
use crate::failure::Failure;
use crate::job_source::JobSource;
use crate::screen::{Screen, Style};
use crate::table::{Table, show_percent, show_seconds};
use clap::Args;
use paceline_planner::export::{Launch, Target, export, offered};
use paceline_planner::job::parse_bytes;
use paceline_planner::predict::{
    ClusterPlan, ClusterPrediction, ClusterRequest, ClusterSweep, OverlapRatios, RequestError, TokenBudget,
    predict_cluster, sweep_clusters,
};
use paceline_planner::prediction::{ClassBytes, MemoryPrediction, PREDICTION_FORMAT, Prediction};
use paceline_planner::states::GuidelineRank;
use paceline_profiles::Shares;
use paceline_sim::cluster::Physics;
use paceline_sim::units::show_bytes;
use serde::Serialize;
use toml::Value;

/// What training on a number of tokens takes and costs.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Budget (on clusters)")]
pub struct Budget {
    /// Tokens to train on, for example 15e12: prints days and cost.
    #[arg(long, value_name = "TOKENS", value_parser = positive)]
    tokens: Option<f64>,
    /// Price of a GPU for an hour.
    #[arg(long, value_name = "DOLLARS", value_parser = positive, requires = "tokens")]
    dollars_per_gpu_hour: Option<f64>,
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && value > 0.0 => Ok(value),
        _ => Err("a number above zero is needed".into()),
    }
}

/// What `predict --json` adds for a cluster.
#[derive(Debug, Serialize)]
struct Document {
    #[serde(flatten)]
    prediction: serde_json::Value,
    configuration: ClusterRequest,
    overlap_ratios: OverlapRatios,
    #[serde(skip_serializing_if = "Option::is_none")]
    budget: Option<TokenBudget>,
}

/// The prediction of one layout.
pub fn predict(screen: &Screen, source: &JobSource, budget: &Budget) -> Result<(), Failure> {
    let request = request(source)?;
    let (model, layout, cluster) = request.resolve().map_err(|error| refused(source, error))?;
    let physics = Physics::of(&cluster).map_err(|error| refused(source, error.into()))?;
    let prediction = predict_cluster(&model, &layout, &cluster, &physics).map_err(Failure::bad_input)?;
    let configuration = ClusterRequest { dp: Some(layout.dp), chunks: Some(layout.chunks), ..request.clone() };
    screen.line(format!(
        "{} on {} x {} of {}, {}",
        model.name,
        layout.gpus().div_ceil(u64::from(cluster.gpus_per_node)),
        cluster.gpus_per_node,
        cluster.name,
        configuration
    ))?;
    show(screen, &as_prediction(&prediction))?;
    screen.line("")?;
    show_compute(screen, &prediction)?;
    let ratios = OverlapRatios::of(&model, &layout, &cluster);
    screen.line("")?;
    show_ratios(screen, &ratios)?;
    let speed = prediction.tokens_per_second_per_gpu;
    let gpus = layout.gpus();
    let price = budget.dollars_per_gpu_hour.unwrap_or(0.0);
    let spent = budget.tokens.map(|tokens| TokenBudget::of(speed, gpus, tokens, price));
    let day = TokenBudget::of(speed, gpus, 1.0, 0.0).tokens_per_day;
    screen.line(format!("\n  {:.3e} tokens per day on {gpus} GPUs", day))?;
    if let (Some(tokens), Some(spent)) = (budget.tokens, &spent) {
        let mut line = format!("  {tokens:.3e} tokens: {:.1} days, {:.0} GPU-hours", spent.days, spent.gpu_hours);
        if budget.dollars_per_gpu_hour.is_some() {
            line += &format!(", {:.0} dollars", spent.cost);
        }
        screen.line(line)?;
    }
    screen.line(format!("  cluster figures: {}", cluster.source))?;
    if !prediction.memory.fits {
        screen.warn("this does not fit; `paceline plan` with the same flags searches for what does");
    }
    screen.document(&Document {
        prediction: prediction.to_json().map_err(Failure::internal)?,
        configuration,
        overlap_ratios: ratios,
        budget: spent,
    })
}

/// The best layouts.
///
/// With a launcher, only those that it can run.
pub fn plan(
    screen: &Screen,
    source: &JobSource,
    top: usize,
    explain: bool,
    launcher: Option<Target>,
) -> Result<ClusterSweep, Failure> {
    let requests = requests(source)?;
    let requests = launcher.map_or_else(|| requests.clone(), |target| offered(target, &requests));
    let request = &requests[0];
    let cluster = request.cluster().map_err(|error| refused(source, error))?;
    let physics = Physics::of(&cluster).map_err(|error| refused(source, error.into()))?;
    let all = if launcher.is_some() { usize::MAX } else { top };
    let mut sweep = sweep_clusters(&requests, &physics, all).map_err(|error| refused(source, error))?;
    if let Some(target) = launcher {
        let found = sweep.plans.len();
        let runs = |plan: &ClusterPlan| {
            Launch::of_request(&plan.configuration).and_then(|launch| export(&launch, target)).map(drop)
        };
        let mut last = None;
        let mut able: Vec<ClusterPlan> = Vec::new();
        for plan in std::mem::take(&mut sweep.plans) {
            if able.len() == top {
                break;
            }
            match runs(&plan) {
                Ok(()) => able.push(plan),
                Err(error) => last = Some(error),
            }
        }
        if let (true, Some(error)) = (able.is_empty(), last) {
            return Err(Failure::infeasible(format!(
                "{found} layouts fit, and {target} can run none of them: {error}"
            )));
        }
        sweep.plans = able;
    }
    if sweep.plans.is_empty() {
        return Err(nothing(&sweep));
    }
    screen.line(format!(
        "{} on {} node{} of {}, {} tokens per step",
        request.model,
        request.nodes.unwrap_or(1),
        if request.nodes.unwrap_or(1) == 1 { "" } else { "s" },
        request.cluster,
        request.global_batch.saturating_mul(request.seq)
    ))?;
    let mut table = Table::new(["", "time", "tokens/s per GPU", "MFU", "bubble", "peak per GPU", "configuration"]);
    for (place, plan) in sweep.plans.iter().enumerate() {
        let p = &plan.prediction;
        table.styled(
            (place == 0).then_some(Style::Good),
            [
                (place + 1).to_string(),
                show_seconds(p.iteration_seconds),
                format!("{:.0}", p.tokens_per_second_per_gpu),
                show_percent(p.mfu),
                show_percent(p.time.bubble / p.iteration_seconds),
                show_bytes(highest(p)),
                plan.configuration.to_string(),
            ],
        );
    }
    table.print(screen)?;
    screen.line(format!(
        "\n  {} candidates in {}: {} predicted, {} too large, {} impossible; the best takes {:.2} times what the model's FLOPs take at the stated rate",
        sweep.candidates,
        show_seconds(sweep.search_seconds),
        sweep.simulated,
        sweep.pruned.memory,
        sweep.pruned.invalid,
        1.0 + sweep.gap.unwrap_or(0.0)
    ))?;
    if explain {
        screen.line("")?;
        show_differences(screen, &sweep.plans)?;
    }
    screen.document(&sweep)?;
    Ok(sweep)
}

/// Where each plan spends more than the best, and how PaRO's closed form ranks their state partitions beside the prediction.
fn show_differences(screen: &Screen, plans: &[ClusterPlan]) -> Result<(), Failure> {
    let mut table = Table::new([
        "",
        "compute",
        "recompute",
        "tensor",
        "data",
        "pipeline",
        "context",
        "experts",
        "bubble",
        "optimizer",
        "states",
        "guideline",
        "log(1/T)",
        "place",
    ]);
    let ranks: Vec<GuidelineRank> = plans.iter().map(|plan| plan.guideline).collect();
    for (place, (plan, guideline)) in plans.iter().zip(&ranks).enumerate() {
        let parts = plan.prediction.time.in_order();
        let states = plan.configuration.states.clone().unwrap_or_else(|| "zero1".into());
        let ranked = [
            states,
            show_seconds(guideline.seconds),
            format!("{:.2}", guideline.indicator),
            place_of(guideline, &ranks),
        ];
        table.row(std::iter::once((place + 1).to_string()).chain(parts.map(show_seconds)).chain(ranked));
    }
    table.print(screen)?;
    screen.line(
        "\n  guideline: PaRO's closed form of the state partition, the longer of communication and computation; place: by its indicator\n  \
         log(1/T) among these plans. It ranks partitions of one layout; it knows no tensor or pipeline communication and no bubble.",
    )
}

/// The place of a plan by the guideline among some.
pub fn place_of(guideline: &GuidelineRank, among: &[GuidelineRank]) -> String {
    (1 + among.iter().filter(|other| other.seconds < guideline.seconds * (1.0 - 1e-9)).count()).to_string()
}

fn nothing(sweep: &ClusterSweep) -> Failure {
    match &sweep.nearest {
        Some(near) => Failure::infeasible(format!(
            "no plan fits: every GPU may hold {}, and the layout that lacks the least ({}) needs {} ({} bytes)",
            show_bytes(near.prediction.memory.limit_bytes as u64),
            near.configuration,
            show_bytes(highest(&near.prediction)),
            highest(&near.prediction)
        ))
        .hint("use more nodes or GPUs with more memory, raise memory_limit, or free an axis that is fixed (recompute, states, tp, pp)"),
        None => Failure::infeasible(format!(
            "none of {} combinations can be: tp x cp x pp x dp must be the number of GPUs, and global_batch a multiple of dp x micro_batch",
            sweep.candidates
        ))
        .hint("free an axis that is fixed, or change global_batch"),
    }
}

fn highest(prediction: &ClusterPrediction) -> u64 {
    prediction.memory.peak_bytes.iter().copied().fold(0.0, f64::max).ceil() as u64
}

/// The request of a job that has one value per key.
pub fn request(source: &JobSource) -> Result<ClusterRequest, Failure> {
    match requests(source)?.as_slice() {
        [one] => Ok(one.clone()),
        several => Err(Failure::bad_input(format!("the job's lists make {} configurations", several.len()))
            .hint("one value per key is needed here; `paceline plan` chooses from lists")),
    }
}

/// The requests of a job, at least one: same keys, and one request for each combination of its lists.
fn requests(source: &JobSource) -> Result<Vec<ClusterRequest>, Failure> {
    let (mut table, origin) = source.table()?;
    // How to train is none of a prediction's business.
    table.remove("train");
    for key in ["memory_limit", "gather_bucket", "reduce_bucket"] {
        if let Some(Value::String(text)) = table.get(key) {
            let bytes = bytes(key, text).map_err(|error| error.within(&origin))?;
            table.insert(key.into(), Value::Integer(i64::try_from(bytes).unwrap_or(i64::MAX)));
        }
    }
    if let Some(share @ (Value::Float(_) | Value::Integer(_))) = table.get("trainable") {
        let text = share.to_string();
        table.insert("trainable".into(), Value::String(text));
    }
    for key in ["model", "cluster", "seq", "global_batch"] {
        if !table.contains_key(key) {
            return Err(Failure::bad_input(format!("{origin}: {key} is missing"))
                .hint("for example --model llama-3-8b --cluster dgx-h100-ib --nodes 4 --seq 8192 --global-batch 128"));
        }
    }
    let mut requests = ClusterRequest::of_table(table, &origin).map_err(Failure::bad_input)?;
    for request in &mut requests {
        place_files(source, request);
    }
    Ok(requests)
}

/// Bytes from a text, with or without a unit.
fn bytes(key: &str, text: &str) -> Result<u64, Failure> {
    parse_bytes(text).filter(|&bytes| bytes > 0 && i64::try_from(bytes).is_ok()).ok_or_else(|| {
        Failure::bad_input(format!(
            "{key} = {text:?}; allowed: bytes as a whole number, or a size such as 80GiB, 512MiB or 40GB"
        ))
    })
}

/// Files named in a job file lie beside it; those of flags in the working directory.
fn place_files(source: &JobSource, request: &mut ClusterRequest) {
    let Some(directory) = source.job.as_deref().and_then(std::path::Path::parent) else { return };
    let beside = |name: &mut String, flag: &Option<String>| {
        let path = directory.join(&*name);
        if flag.is_none() && path.is_file() {
            *name = path.display().to_string();
        }
    };
    beside(&mut request.model, &source.flags.model);
    beside(&mut request.cluster, &source.flags.cluster);
}

pub fn refused(source: &JobSource, error: RequestError) -> Failure {
    let origin = source.job.as_ref().map_or("command line".to_string(), |path| path.display().to_string());
    Failure::bad_input(format!("{origin}: {error}"))
}

/// Compute by class of operator.
fn show_compute(screen: &Screen, prediction: &ClusterPrediction) -> Result<(), Failure> {
    let compute = &prediction.compute;
    let parts = [
        ("matrix products", compute.products),
        ("attention", compute.attention),
        ("memory-bound operators", compute.memory_bound),
        ("waiting for launches", compute.launches),
    ];
    let mut table = Table::new(["compute on the slowest rank", "", "share"]);
    for (name, seconds) in parts.into_iter().filter(|&(_, seconds)| seconds > 0.0) {
        table.row([name.to_string(), show_seconds(seconds), show_percent(seconds / prediction.iteration_seconds)]);
    }
    table.print(screen)
}

fn show_ratios(screen: &Screen, ratios: &OverlapRatios) -> Result<(), Failure> {
    let mut table = Table::new(["communication that can hide", "ratio", ""]);
    let rows = [
        ("gradient reduction behind the backward", ratios.dp),
        ("parameter gathers of ZeRO-3 behind the forward", ratios.zero3),
        ("tensor-parallel gathers behind products", ratios.tp),
        ("pipeline messages behind a stage", ratios.pp),
    ];
    for (what, ratio) in rows.into_iter().filter(|&(_, ratio)| ratio > 0.0) {
        let verdict = if ratio <= 1.0 { "hides" } else { "shows" };
        table.row([what.to_string(), format!("{ratio:.3}"), verdict.to_string()]);
    }
    table.print(screen)
}

/// The same figures in the shape of local predictions, to be shown alike.
fn as_prediction(p: &ClusterPrediction) -> Prediction {
    let whole = |bytes: f64| bytes.round() as u64;
    Prediction {
        format: PREDICTION_FORMAT.into(),
        iteration_seconds: p.iteration_seconds,
        tokens_per_second_per_gpu: p.tokens_per_second_per_gpu,
        mfu: Some(p.mfu),
        hfu: Some(p.hfu),
        time: p.time,
        bubble_makespan: p.time.bubble / p.iteration_seconds,
        memory: MemoryPrediction {
            peak_bytes: p.memory.peak_bytes.iter().copied().map(whole).collect(),
            limit_bytes: Some(whole(p.memory.limit_bytes)),
            fits: p.memory.fits,
            by_class: p
                .memory
                .by_class
                .iter()
                .map(|c| ClassBytes {
                    parameters: whole(c.parameters),
                    gradients: whole(c.gradients),
                    optimizer: whole(c.optimizer),
                    activations: whole(c.activations),
                    communication: whole(c.communication),
                    workspace: whole(c.workspace),
                    overhead: whole(c.overhead),
                })
                .collect(),
        },
        provenance: Shares {
            measured: p.provenance.measured,
            fitted: p.provenance.fitted,
            datasheet: p.provenance.datasheet,
            assumed: p.provenance.assumed,
        },
    }
}
