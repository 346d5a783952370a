//! Predicts an iteration of a layout on a cluster: where each second goes and where each byte lies.
//!
//! The real schedule is replayed with the real times of every stage. A long iteration is replayed for a few rounds of
//! microbatches and continued at the pace of its steady state.

mod coordinator;
mod memory;
mod overlap;
mod parts;
mod request;
mod schedule;
mod stages;
mod sweep;

pub use overlap::{OverlapRatios, TokenBudget};
pub use parts::{ComputeParts, Exchanges, MemoryClasses, MemoryParts, Origin, TimeParts};
pub use request::{ClusterRequest, PRECISIONS, RequestError};
pub use schedule::{ClusterSchedule, schedule_cluster};
pub use stages::{Groups, PassTimes, Stage, Timer, cut};

pub use sweep::{
    ClusterPlan, ClusterSweep, Pruned, SweepProgress, sweep_cluster, sweep_clusters, sweep_clusters_while,
};

use crate::order::ComputeOrder;
use crate::replay::{OrderError, Replayer, StageTimes};
use crate::schedules::{self, Request, ScheduleError};
use paceline_profiles::{Cluster, Gpu};
use paceline_sim::cluster::device::Device;
use paceline_sim::cluster::memory::{RankParameters, parts as shards};
use paceline_sim::cluster::network::Network;
use paceline_sim::cluster::{
    Architecture, Compute, ContextExchange, Layout, LayoutError, Partition, Physics, Recompute,
};
use paceline_sim::partition::exchange::{Exchange, Kind, Scope};
use paceline_sim::partition::{Level, StatePartition};
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use thiserror::Error;

/// A predicted iteration on a cluster.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClusterPrediction {
    /// Time of one iteration.
    pub iteration_seconds: f64,
    /// Tokens per second and GPU.
    pub tokens_per_second_per_gpu: f64,
    /// Share of the GPU's stated rate that the model's FLOPs make (attention counted in full, nothing twice).
    pub mfu: f64,
    /// The same with recomputed FLOPs.
    pub hfu: f64,
    /// Parts of the iteration; they sum to it.
    pub time: TimeParts,
    /// Parts of `time.compute`; they sum to it.
    pub compute: ComputeParts,
    /// Memory.
    pub memory: MemoryParts,
    /// Communication between replicas on the critical pipeline rank, as if nothing hid it.
    pub exchanges: Exchanges,
    /// Shares of the predicted time by where they come from; they sum to 1.
    pub provenance: Origin,
}

impl ClusterPrediction {
    /// The document of `predict --json`.
    ///
    /// # Errors
    /// When a figure is no finite number, which JSON cannot hold.
    pub fn to_json(&self) -> Result<serde_json::Value, serde_json::Error> {
        let mut document = serde_json::to_value(self)?;
        if let Some(object) = document.as_object_mut() {
            object.insert("format".into(), "paceline.prediction/1".into());
        }
        Ok(document)
    }
}

/// A layout that cannot be predicted.
#[derive(Debug, Error)]
pub enum PredictError {
    /// The layout itself.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Its schedule.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    /// Its order.
    #[error(transparent)]
    Order(#[from] OrderError),
    /// More stages than blocks.
    #[error("{stages} stages, but the model has {layers} blocks; use at most {layers} (pp x chunks)")]
    Stages { stages: u64, layers: u64 },
}

/// Stated FLOPs per second of a GPU in a format; in 16 bits where nothing else is known.
fn stated_rate(gpu: &Gpu, compute: Option<Compute>) -> f64 {
    1e12 * match compute {
        Some(Compute::Fp32) => gpu.tf32_tflops,
        Some(Compute::Fp8) => gpu.fp8_tflops.unwrap_or(gpu.bf16_tflops),
        Some(Compute::Fp4) => gpu.fp4_tflops.or(gpu.fp8_tflops).unwrap_or(gpu.bf16_tflops),
        _ => gpu.bf16_tflops,
    }
}

/// Rounds of `pp` microbatches that are replayed before the steady state is continued.
const ROUNDS: u64 = 4;

/// Bytes that the optimizer reads and writes per parameter: gradient, master weight and moments read, the last three and
/// the parameter written, and the gradient's norm and zeroing.
fn optimizer_bytes(layout: &Layout) -> f64 {
    let n = &layout.numerics;
    let gradient = if n.accumulated > 0.0 { n.accumulated } else { n.gradient };
    3.0 * gradient + 2.0 * (n.master + n.moments) + n.parameter
}

/// What an iteration is made of before its schedule is replayed.
struct Prepared<'a> {
    timer: Timer<'a>,
    stages: Vec<Stage>,
    parameters: Vec<RankParameters>,
    passes: Vec<PassTimes>,
    hop: f64,
    device_of: Vec<u32>,
}

impl<'a> Prepared<'a> {
    fn new(
        model: &'a Architecture,
        layout: &'a Layout,
        cluster: &Cluster,
        physics: &'a Physics,
    ) -> Result<Prepared<'a>, PredictError> {
        layout.check()?;
        let timer = Timer {
            model,
            layout,
            device: Device::of(&cluster.gpu, layout, physics),
            network: Network::of(cluster, physics),
            groups: Groups::of(layout, u64::from(cluster.gpus_per_node)),
            physics,
            pace: cluster.host_pace_us * 1e-6,
        };
        let count = layout.pp * layout.chunks;
        if count > model.layers + 2 {
            return Err(PredictError::Stages { stages: count, layers: model.layers });
        }
        let stages = cut(model, layout.partition, count, layout.pp);
        let schedule = schedules::find(&layout.schedule)?;
        let asked = (layout.chunks > 1).then_some(layout.chunks as u32);
        let placement = schedule.placement(layout.pp as u32, asked)?;
        let of_stage =
            |stage: &Stage| RankParameters::of(model, layout, stage.blocks.clone(), stage.embedding, stage.head);
        let parameters: Vec<RankParameters> = stages.iter().map(of_stage).collect();
        // Stages of equal content take equal times; most are equal.
        let mut known: Vec<(usize, PassTimes)> = Vec::new();
        let key = |s: &Stage| {
            let routed = s.blocks.clone().filter(|l| model.routed(*l)).count();
            (s.blocks.end - s.blocks.start, routed, s.embedding.to_bits(), s.head.to_bits())
        };
        let passes: Vec<PassTimes> = stages
            .iter()
            .enumerate()
            .map(|(n, stage)| {
                if let Some((_, times)) = known.iter().find(|(other, _)| key(&stages[*other]) == key(stage)) {
                    return *times;
                }
                let times = timer.stage(stage, &parameters[n]);
                known.push((n, times));
                times
            })
            .collect();

        let parts = if layout.scatters || layout.sp { layout.tp as f64 } else { 1.0 };
        let message = layout.numerics.activation * layout.tokens() * model.hidden as f64 / parts;
        let hop = if layout.pp > 1 { timer.network.message(timer.groups.pipeline_across, message) } else { 0.0 };
        Ok(Prepared { timer, stages, parameters, passes, hop, device_of: placement.device_of_stage })
    }

    /// Times of the stages in the replay.
    fn times(&self) -> StageTimes {
        stage_times(&self.passes, self.hop, &self.device_of)
    }
}

/// Times of the stages: sending blocks a rank in the runtimes of the field, unless its neighbour is the rank itself.
fn stage_times(passes: &[PassTimes], hop: f64, device_of: &[u32]) -> StageTimes {
    let sends = |n: usize, other: Option<usize>| {
        other.filter(|o| *o < device_of.len() && device_of[*o] != device_of[n]).map_or(0.0, |_| hop)
    };
    StageTimes {
        f: passes.iter().enumerate().map(|(n, p)| p.f() + sends(n, Some(n + 1))).collect(),
        b: passes.iter().enumerate().map(|(n, p)| p.b() + sends(n, n.checked_sub(1))).collect(),
        w: passes.iter().map(|p| p.weights).collect(),
        comm: 0.0,
    }
}

/// Predicts one iteration.
///
/// # Errors
/// When the layout or its schedule is impossible.
pub fn predict_cluster(
    model: &Architecture,
    layout: &Layout,
    cluster: &Cluster,
    physics: &Physics,
) -> Result<ClusterPrediction, PredictError> {
    let Prepared { timer, stages, parameters, passes, hop, device_of } =
        Prepared::new(model, layout, cluster, physics)?;
    let device_of = &device_of;
    let pipeline = Pipeline::replay(layout, &passes, hop, device_of)?;
    let ends = ends(&timer, &stages, &parameters, &passes, device_of);
    let (time, compute) = timeline(&timer, cluster, &pipeline, &ends, &passes, hop, device_of);
    let iteration = time.total();

    let memory = memory::memory(&timer, cluster, &stages, &parameters, device_of)?;
    let tokens = (layout.global_batch() * layout.seq) as f64;
    // Of three equal parts, that of the weights' gradients is done for what is trained.
    let done = (2.0 + layout.trainable) / 3.0;
    let whole = model.flops_per_token(layout.seq, false);
    let flops = done * whole;
    let rate = cluster.gpu.bf16_tflops * 1e12;
    let per_gpu = tokens / iteration / layout.gpus() as f64;
    let mfu = per_gpu * flops / rate;
    let head = 6.0 * (model.hidden * model.vocab) as f64;
    let recomputed: u64 = stages.iter().map(|s| layout.recomputed(s.blocks.end - s.blocks.start)).sum();
    let again = recomputed as f64 / model.layers as f64
        * match layout.recompute {
            Recompute::None => 0.0,
            Recompute::Full => (whole - head) / 3.0,
            // Keys, output projection, and half of gate and up or the second matrix of the MLP.
            Recompute::Operators => {
                let (_, key, _) = model.attention.widths();
                let width = key + model.attention.output_width() + model.ffn;
                2.0 * (model.layers * model.hidden * width) as f64
            }
            Recompute::Selective => {
                let (query, _, _) = model.attention.widths();
                2.0 * (model.layers * layout.seq * (query + model.attention.output_width())) as f64
            }
        };
    Ok(ClusterPrediction {
        iteration_seconds: iteration,
        tokens_per_second_per_gpu: per_gpu,
        mfu,
        hfu: mfu * (flops + again) / flops,
        time,
        compute,
        memory,
        exchanges: ends.alone[ends.critical()],
        provenance: origin(&time, &compute, &timer, cluster),
    })
}

/// Where an iteration's time comes from: communication that shows, over links whose bandwidth was measured or is a datasheet's;
/// everything else from stated rates through fitted efficiencies.
fn origin(time: &TimeParts, compute: &ComputeParts, timer: &Timer<'_>, cluster: &Cluster) -> Origin {
    let (layout, groups) = (timer.layout, &timer.groups);
    let tensor = if layout.sp { "gather_gbps" } else { "all_reduce_gbps" };
    let data = if layout.sharding == StatePartition::NONE { "all_reduce_gbps" } else { "gather_gbps" };
    let context = if layout.context == ContextExchange::AllGather { "gather_gbps" } else { "intra_gbps" };
    let parts = [
        (time.exposed_tp, groups.tensor.nodes() > 1, tensor),
        (time.exposed_dp, groups.data.nodes() > 1, data),
        (time.exposed_cp, groups.context.nodes() > 1, context),
        (time.exposed_ep, groups.experts.nodes() > 1, "intra_gbps"),
        (time.exposed_pp, groups.pipeline_across, "intra_gbps"),
    ];
    let total = time.total();
    let mut origin = Origin::default();
    for (seconds, across, key) in parts {
        let share = seconds / total;
        if cluster.measured.contains(if across { "inter_gbps" } else { key }) {
            origin.measured += share;
        } else {
            origin.datasheet += share;
        }
    }
    if !timer.device.known_format() {
        origin.assumed = compute.products / total;
    }
    origin.fitted = 1.0 - origin.measured - origin.datasheet - origin.assumed;
    origin
}

/// Totals of the replayed pipeline, the whole iteration's microbatches included.
struct Pipeline {
    makespan: f64,
}

/// Orders by schedule, pipeline ranks, chunks and microbatches.
type Orders = HashMap<(String, u32, u32, u32), Rc<ComputeOrder>>;

thread_local! {
    static ORDERS: RefCell<Orders> = RefCell::new(HashMap::new());
    static REPLAYER: RefCell<Replayer> = RefCell::new(Replayer::default());
}

/// The order of a layout for some microbatches; built once per thread.
fn order(layout: &Layout, microbatches: u64) -> Result<Rc<ComputeOrder>, PredictError> {
    let key = (layout.schedule.clone(), layout.pp as u32, layout.chunks as u32, microbatches as u32);
    if let Some(order) = ORDERS.with(|orders| orders.borrow().get(&key).cloned()) {
        return Ok(order);
    }
    let chunks = (layout.chunks > 1).then_some(layout.chunks as u32);
    let request = Request { chunks, ..Request::new(layout.pp as u32, microbatches as u32) };
    let order = Rc::new(schedules::build(&layout.schedule, &request)?);
    ORDERS.with(|orders| {
        let mut orders = orders.borrow_mut();
        // A bound, not a policy: a sweep has few shapes of pipelines.
        if orders.len() > 512 {
            orders.clear();
        }
        orders.insert(key, Rc::clone(&order));
    });
    Ok(order)
}

impl Pipeline {
    fn replay(layout: &Layout, passes: &[PassTimes], hop: f64, device_of: &[u32]) -> Result<Pipeline, PredictError> {
        let times = stage_times(passes, hop, device_of);
        let run = |microbatches: u64| -> Result<f64, PredictError> {
            let order = order(layout, microbatches)?;
            REPLAYER.with(|replayer| Ok(replayer.borrow_mut().run(&order, &times)?.makespan))
        };
        let m = layout.microbatches;
        let whole = (ROUNDS + 1) * layout.pp;
        if layout.pp == 1 && layout.chunks == 1 {
            let each = times.f[0] + times.b[0] + times.w[0];
            return Ok(Pipeline { makespan: m as f64 * each });
        }
        let later = vocabulary_fill(layout, passes, device_of);
        if m <= whole {
            return Ok(Pipeline { makespan: run(m)? + later });
        }
        // Keep the remainder, so that schedules in rounds of `pp` see the same end.
        let short = (ROUNDS - 1) * layout.pp + m % layout.pp;
        let long = short + layout.pp;
        let (a, b) = (run(short)?, run(long)?);
        let rounds = ((m - long) / layout.pp) as f64;
        Ok(Pipeline { makespan: b + rounds * (b - a) + later })
    }
}

/// By how much the pipeline fills and drains later when its ranks share the vocabulary: the microbatches that are in flight beyond
/// those of the plain schedule, each an interval of the slowest rank.
fn vocabulary_fill(layout: &Layout, passes: &[PassTimes], device_of: &[u32]) -> f64 {
    if layout.partition != Partition::VocabularySpread {
        return 0.0;
    }
    let mut interval = vec![0.0; layout.pp as usize];
    for (pass, device) in passes.iter().zip(device_of) {
        interval[*device as usize] += pass.f() + pass.b() + pass.weights;
    }
    layout.vocabulary.microbatches(layout.pp) * interval.into_iter().fold(0.0, f64::max)
}

/// What happens once per iteration beside the pipeline, by pipeline rank.
struct Ends {
    data: Vec<f64>,
    optimizer: Vec<f64>,
    alone: Vec<Exchanges>,
}

impl Ends {
    /// The pipeline rank that has most to do after the passes.
    fn critical(&self) -> usize {
        let last = |rank: &usize| self.data[*rank] + self.optimizer[*rank];
        (0..self.data.len()).max_by(|a, b| last(a).total_cmp(&last(b))).unwrap_or(0)
    }
}

/// Copying the parts of every parameter, one small kernel each, into the buffers of a reduction and out of those of a gathering.
fn slices(timer: &Timer<'_>, blocks: u64) -> f64 {
    let layout = timer.layout;
    let replicas = layout.data_ranks();
    if !layout.slices || replicas == 1 || layout.sharding.optimizer == Level::Whole {
        return 0.0;
    }
    let model = timer.model;
    // The matrices of attention and MLP, and two norms.
    let tensors = model.attention.matrices(model.hidden).len() + model.mlp_matrices(model.ffn).len() + 2;
    2.0 * (blocks * tensors as u64 * replicas) as f64 * timer.device.small_kernel()
}

fn ends(
    timer: &Timer<'_>,
    stages: &[Stage],
    parameters: &[RankParameters],
    passes: &[PassTimes],
    device_of: &[u32],
) -> Ends {
    let layout = timer.layout;
    let ranks = layout.pp as usize;
    let mut ends =
        Ends { data: vec![0.0; ranks], optimizer: vec![0.0; ranks], alone: vec![Exchanges::default(); ranks] };
    let (mut dense, mut routed, mut backward, mut forward) =
        (vec![0.0; ranks], vec![0.0; ranks], vec![0.0; ranks], vec![0.0; ranks]);
    let mut blocks = vec![0; ranks];
    for n in 0..stages.len() {
        let rank = device_of[n] as usize;
        dense[rank] += parameters[n].dense;
        routed[rank] += parameters[n].routed;
        backward[rank] += passes[n].backward + passes[n].weights + passes[n].recompute;
        forward[rank] += passes[n].forward;
        blocks[rank] += stages[n].blocks.end - stages[n].blocks.start;
        let [gathers, reductions] = passes[n].exchanged.map(|seconds| seconds * layout.microbatches as f64);
        let (once, shown) = timer.gather_once(&parameters[n], passes[n].forward);
        ends.alone[rank].parameter_gather += gathers + once;
        ends.alone[rank].gradient_reduction += reductions;
        ends.data[rank] += shown;
    }
    let numerics = &layout.numerics;
    let (overlap, runtime) = (timer.overlap(), layout.runtime);
    let node = timer.groups.node;
    for rank in 0..ranks {
        let trained = [dense[rank] * layout.trainable, routed[rank] * layout.trainable];
        let hide = |overlap: bool, communication: f64, behind: f64| {
            if overlap { stages::exposed(communication, behind, timer.physics) } else { communication }
        };
        let sync = layout.sharding.gradient_sync().into_iter();
        let element = |e: Exchange| {
            let wide = runtime.sums_in_32_bits && layout.sharding.parameters == Level::Whole;
            if wide && e.kind == Kind::AllReduce && e.scope == Scope::Across { 4.0 } else { numerics.reduced }
        };
        let sync =
            sync.map(|e| timer.exchange(e, trained, element(e), layout.bucket_bytes)).fold(0.0, |sum, t| sum + t);
        let parameter = numerics.parameter.min(numerics.activation);
        let after = layout.sharding.parameter_sync().map(|e| timer.exchange(e, trained, parameter, None));
        let after = after.unwrap_or(0.0);
        (ends.alone[rank].gradient_sync, ends.alone[rank].parameter_sync) = (sync, after);
        ends.data[rank] += hide(overlap.gradients, sync, backward[rank])
            + hide(overlap.parameters && !runtime.waits_for_updates, after, forward[rank]);
        let held = |level| {
            let (dense_parts, routed_parts) = shards(layout, level, node);
            trained[0] / dense_parts + trained[1] / routed_parts
        };
        // Gradients held beyond the own part of the optimizer's are zeroed and measured all the same.
        let (own, gradients) = (held(layout.sharding.optimizer), held(layout.sharding.gradients));
        let beyond = if gradients > own { gradients * 4.0 } else { 0.0 };
        ends.optimizer[rank] =
            timer.device.traffic(own * optimizer_bytes(layout) + beyond) + slices(timer, blocks[rank]);
    }
    ends
}

/// The parts of the iteration on the pipeline rank that ends last.
fn timeline(
    timer: &Timer<'_>,
    cluster: &Cluster,
    pipeline: &Pipeline,
    ends: &Ends,
    passes: &[PassTimes],
    hop: f64,
    device_of: &[u32],
) -> (TimeParts, ComputeParts) {
    let layout = timer.layout;
    let m = layout.microbatches as f64;
    let critical = ends.critical();
    let mut parts = TimeParts::default();
    let mut compute = ComputeParts::default();
    for (n, pass) in passes.iter().enumerate() {
        if device_of[n] as usize != critical {
            continue;
        }
        parts.compute += m * (pass.forward + pass.backward + pass.weights);
        compute.products += m * pass.products;
        compute.attention += m * pass.attention;
        compute.memory_bound += m * pass.memory_bound;
        parts.recompute += m * pass.recompute;
        parts.exposed_tp += m * (pass.tensor[0] + pass.tensor[1]);
        parts.exposed_cp += m * (pass.context[0] + pass.context[1]);
        parts.exposed_ep += m * (pass.experts[0] + pass.experts[1]);
        parts.exposed_dp += m * (pass.sharded[0] + pass.sharded[1]);
        let sends = |other: Option<usize>| other.is_some_and(|o| o < device_of.len() && device_of[o] != device_of[n]);
        parts.exposed_pp += m * hop * f64::from(u8::from(sends(Some(n + 1))) + u8::from(sends(n.checked_sub(1))));
    }
    compute.launches = parts.compute - compute.products - compute.attention - compute.memory_bound;
    parts.bubble = (pipeline.makespan - parts.total()).max(0.0);
    parts.exposed_dp += ends.data[critical];
    parts.optimizer += ends.optimizer[critical];
    let nodes = (layout.gpus() as f64 / f64::from(cluster.gpus_per_node)).max(1.0);
    parts.bubble += parts.total() * timer.physics.jitter * nodes.log2();
    (parts, compute)
}

#[cfg(test)]
mod tests;
