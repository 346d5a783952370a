//! What any launcher has to know, from a configuration of this machine or of a cluster.

use super::{ExportError, Target};
use crate::configuration::Configuration;
use crate::job::{Job, Train};
use crate::order::ComputeOrder;
use crate::plan::Plan;
use crate::predict::{ClusterRequest, cut, predict_cluster};
use crate::schedules::{self, Request};
use paceline_sim::cluster::{
    Architecture, AttentionKernel, ContextExchange, Details, Layout, Partition, Physics, Recompute, Routing,
};
use paceline_sim::model::{Layer, trained_elements};

use paceline_sim::partition::{Level, StatePartition};
use paceline_sim::program;
use paceline_sim::units::show_bytes;

/// What is predicted of a launch.
#[derive(Debug, Clone, PartialEq)]
pub struct Forecast {
    /// Time of an iteration.
    pub iteration_seconds: f64,
    /// Most bytes that any device holds.
    pub peak_bytes: u64,
    /// Whether that fits.
    pub fits: bool,
    /// What it was predicted for.
    pub place: String,
}

/// A configuration, with every default filled in.
#[derive(Debug, Clone, PartialEq)]
pub struct Launch {
    /// Sizes of the model.
    pub model: Architecture,
    /// The rest of it.
    pub details: Details,
    /// Nodes.
    pub nodes: u64,
    /// GPUs of a node.
    pub gpus_per_node: u64,
    /// Tensor-parallel ranks.
    pub tp: u64,
    /// Sequence parallelism.
    pub sp: bool,
    /// Context-parallel ranks.
    pub cp: u64,
    /// How they exchange.
    pub context: ContextExchange,
    /// Pipeline ranks.
    pub pp: u64,
    /// Stages of each.
    pub chunks: u64,
    /// Replicas.
    pub dp: u64,
    /// Expert-parallel ranks.
    pub ep: u64,
    /// Capacity of experts.
    pub routing: Routing,
    /// What replicas share out.
    pub states: StatePartition,
    /// Replicas of a group.
    pub group: u64,
    /// Parameters that are cut stay gathered over the microbatches.
    pub keep_gathered: bool,
    /// Share of the parameters that is trained.
    pub trainable: f64,
    /// Schedule.
    pub schedule: String,
    /// Whether the vocabulary is cut over pipeline ranks.
    pub vocabulary_spread: bool,
    /// Blocks of each stage, from the input to the loss.
    pub blocks: Vec<u64>,
    /// Tokens of a sequence.
    pub seq: u64,
    /// Sequences of a microbatch.
    pub micro_batch: u64,
    /// Sequences of an iteration.
    pub global_batch: u64,
    /// What is computed again.
    pub recompute: Recompute,
    /// Of that, blocks of each stage; all without.
    pub recomputed_blocks: Option<u64>,
    /// Recipe of number formats.
    pub precision: String,
    /// Kernel of the attention.
    pub attention: AttentionKernel,
    /// Gradients are reduced beside the backward pass, parameters gathered beside the forward pass.
    pub overlap: (bool, bool),
    /// How to train.
    pub train: Train,
    /// What is predicted.
    pub forecast: Forecast,
    /// What a schedule computed from measured times was computed from.
    pub measured: Option<crate::configuration::Measured>,
}

impl Launch {
    /// Of a configuration of this machine.
    ///
    /// # Errors
    /// When it is none of its job.
    pub fn of_plan(plan: &Plan) -> Result<Launch, ExportError> {
        let peak_bytes = plan.prediction.memory.peak_bytes.iter().copied().max().unwrap_or(0);
        let forecast = Forecast {
            iteration_seconds: plan.prediction.iteration_seconds,
            peak_bytes,
            fits: plan.prediction.memory.fits,
            place: format!("{} devices of the machine that planned it", plan.machine.devices),
        };
        Launch::of_configuration(&plan.job, &plan.configuration, forecast)
    }

    fn of_configuration(job: &Job, chosen: &Configuration, forecast: Forecast) -> Result<Launch, ExportError> {
        let order = chosen.order(job)?;
        let stages = chosen.cut(job, order.placement.stages_per_copy())?;
        let blocks = |stage: &program::Stage| {
            stage.units.iter().flat_map(|unit| &unit.layers).filter(|layer| matches!(layer, Layer::Block(_))).count()
        };
        Ok(Launch {
            model: Architecture::from(&job.model),
            details: Details::from(&job.model),
            nodes: 1,
            gpus_per_node: u64::from(chosen.ranks()),
            tp: 1,
            sp: false,
            cp: 1,
            context: ContextExchange::default(),
            pp: chosen.pp.into(),
            chunks: chosen.chunks.into(),
            dp: chosen.dp.into(),
            ep: 1,
            routing: Routing::default(),
            keep_gathered: chosen.sharing.keep_gathered && chosen.states.parameters != Level::Whole,
            states: chosen.states,
            group: chosen.sharing.group_size.unwrap_or(chosen.dp).into(),
            trainable: if job.trainable.is_full() {
                1.0
            } else {
                trained_elements(&job.model, &job.trainable) as f64 / job.model.parameters() as f64
            },
            schedule: chosen.schedule.clone(),
            vocabulary_spread: false,
            blocks: stages.iter().map(|stage| blocks(stage) as u64).collect(),
            seq: job.seq.into(),
            micro_batch: chosen.micro_batch.into(),
            global_batch: job.global_batch.into(),
            recompute: match chosen.recompute {
                program::Recompute::None => Recompute::None,
                program::Recompute::Selective => Recompute::Selective,
                program::Recompute::Full => Recompute::Full,
            },
            recomputed_blocks: None,
            precision: job.precision.name().into(),
            attention: AttentionKernel::Flash2,
            overlap: (true, true),
            train: job.train.clone(),
            forecast,
            measured: chosen.measured.clone(),
        })
    }

    /// Of a configuration on a cluster.
    ///
    /// # Errors
    /// When the request names none, or it cannot be predicted.
    pub fn of_request(request: &ClusterRequest) -> Result<Launch, ExportError> {
        let (model, layout, cluster) = request.resolve()?;
        let physics = Physics::of(&cluster).map_err(crate::predict::RequestError::from)?;
        let prediction = predict_cluster(&model, &layout, &cluster, &physics)?;
        let peak = prediction.memory.peak_bytes.iter().copied().fold(0.0, f64::max);
        let Layout { tp, sp, cp, context, pp, chunks, dp, ep, routing, .. } = layout;
        let per_node = u64::from(cluster.gpus_per_node);
        let partition = layout.partition;
        let blocks = cut(&model, partition, pp * chunks, pp);
        Ok(Launch {
            details: Details::load(&request.model)?,
            nodes: layout.gpus().div_ceil(per_node),
            gpus_per_node: per_node.min(layout.gpus()),
            tp,
            sp,
            cp,
            context,
            pp,
            chunks,
            dp,
            ep,
            routing,
            keep_gathered: layout.keep_gathered && layout.sharding.parameters != Level::Whole,
            states: layout.sharding,
            group: layout.group.unwrap_or_else(|| (per_node / (tp * cp)).clamp(1, dp)),
            trainable: layout.trainable,
            vocabulary_spread: partition == Partition::VocabularySpread,
            blocks: blocks.iter().map(|stage| stage.blocks.end - stage.blocks.start).collect(),
            seq: layout.seq,
            micro_batch: layout.micro_batch,
            global_batch: layout.global_batch(),
            recompute: layout.recompute,
            recomputed_blocks: layout.recomputed_blocks,
            precision: request.precision.clone().unwrap_or_else(|| "bf16".into()),
            attention: layout.attention,
            overlap: (layout.overlap.gradients, layout.overlap.parameters),
            train: Train { lr: 3e-4, min_lr: 3e-5, steps: 1000, warmup: 100, ..Train::default() },
            forecast: Forecast {
                iteration_seconds: prediction.iteration_seconds,
                peak_bytes: peak as u64,
                fits: prediction.memory.fits,
                place: cluster.name.clone(),
            },
            schedule: layout.schedule,
            measured: None,
            model,
        })
    }

    /// Microbatches of a replica in an iteration.
    pub fn microbatches(&self) -> u64 {
        self.global_batch / (self.micro_batch * self.dp)
    }

    /// GPUs in all.
    pub fn gpus(&self) -> u64 {
        self.tp * self.cp * self.pp * self.dp
    }

    /// Which passes each pipeline rank computes.
    ///
    /// # Errors
    /// When the schedule does not permit these numbers.
    pub fn order(&self) -> Result<ComputeOrder, ExportError> {
        let request = Request::new(self.pp as u32, self.microbatches() as u32).chunks(self.chunks as u32);
        let request = match &self.measured {
            Some(measured) => measured.lay_into(request),
            None => request,
        };
        Ok(schedules::build(&self.schedule, &request)?)
    }

    /// What is to be run and what is expected of it, as lines of a comment.
    pub fn header(&self) -> Vec<String> {
        let mut sizes = String::new();
        for (name, size) in [("dp", self.dp), ("tp", self.tp), ("cp", self.cp), ("pp", self.pp), ("ep", self.ep)] {
            if size > 1 {
                sizes += &format!("{name} {size}, ");
            }
        }
        let tokens = (self.global_batch * self.seq) as f64;
        let speed = tokens / self.forecast.iteration_seconds / self.gpus() as f64;
        vec![
            format!("Written by paceline {} for {}.", env!("CARGO_PKG_VERSION"), self.model.name),
            format!(
                "{sizes}micro-batch {}, {} microbatches of {} tokens, {} ({}), states {}",
                self.micro_batch,
                self.microbatches(),
                self.micro_batch * self.seq,
                self.schedule,
                if self.chunks > 1 { format!("{} stages per rank", self.chunks) } else { "1 stage per rank".into() },
                self.states
            ),
            format!(
                "Predicted on {}: {:.4} s per iteration, {speed:.0} tokens/s per GPU, at most {} per GPU.",
                self.forecast.place,
                self.forecast.iteration_seconds,
                show_bytes(self.forecast.peak_bytes)
            ),
        ]
    }

    /// The error of a key that the target does not have.
    pub(super) fn lacks<T>(
        target: Target,
        key: &'static str,
        value: impl ToString,
        allowed: &str,
    ) -> Result<T, ExportError> {
        Err(ExportError::Unsupported { target, key, value: value.to_string(), allowed: allowed.to_owned() })
    }

    /// Refuses what none of the launchers' shipped trainers does.
    pub(super) fn refuse_rare(&self, target: Target) -> Result<(), ExportError> {
        if let Some(blocks) = self.recomputed_blocks
            && !(target == Target::Megatron && self.recompute == Recompute::Full)
        {
            let allowed = "only Megatron-LM chooses blocks, and computes all of them again (full)";
            return Launch::lacks(target, "recompute", format!("some blocks ({blocks})"), allowed);
        }
        if self.trainable < 1.0 {
            let allowed = "it trains all parameters; leave trainable out and plan again";
            return Launch::lacks(target, "trainable", self.trainable, allowed);
        }
        if self.keep_gathered && target != Target::Torchtitan {
            let allowed = "it gathers for every pass; take false, or export to torchtitan";
            return Launch::lacks(target, "keep_gathered", true, allowed);
        }
        if self.vocabulary_spread {
            let allowed =
                "it holds the embedding on the first stage and the head on the last; choose another partition";
            return Launch::lacks(target, "partition", "vocabulary-spread", allowed);
        }
        Ok(())
    }
}
