//! What a user asks for, in the words of the command line, as a model, a layout and a cluster.

use crate::schedules;
use paceline_profiles::{Cluster, ClusterError, find_cluster};
use paceline_sim::cluster::{
    AdapterError, Adapters, Architecture, AttentionKernel, Compute, ContextExchange, Layout, LayoutError, LossKernel,
    Numerics, Overlap, Partition, PhysicsError, Recompute, Routing, Runtime, ZooError,
};
use paceline_sim::model::{Trainable, TrainableError};
use paceline_sim::partition::{Level, PartitionError, StatePartition};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// One configuration on a cluster; what is left open takes its default.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClusterRequest {
    /// A preset, or the path of a `config.json`.
    pub model: String,
    /// A preset, or the path of a TOML file.
    pub cluster: String,
    /// Nodes; 1 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nodes: Option<u64>,
    /// GPUs of a node; those of the cluster by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpus_per_node: Option<u64>,
    /// Tokens of a sequence.
    pub seq: u64,
    /// Sequences of an iteration.
    pub global_batch: u64,
    /// Sequences of a microbatch; 1 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batch: Option<u64>,
    /// Tensor-parallel ranks; 1 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tp: Option<u64>,
    /// Sequence parallelism; on by default with tensor parallelism.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sp: Option<bool>,
    /// Context-parallel ranks; 1 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cp: Option<u64>,
    /// How context ranks exchange: `zig-zag` (the default), `ring`, `all-gather`, `all-to-all`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cp_exchange: Option<ContextExchange>,
    /// Pipeline ranks; 1 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pp: Option<u64>,
    /// Stages per pipeline rank; what the schedule usually has by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chunks: Option<u64>,
    /// Replicas; what is left of the GPUs by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dp: Option<u64>,
    /// Expert-parallel ranks; 1 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ep: Option<u64>,
    /// Tokens of the busiest expert-parallel rank over the mean; 1 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expert_skew: Option<f64>,
    /// Tokens of a rank beyond this multiple of the mean are dropped; none by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expert_capacity: Option<f64>,
    /// A triple (`NNN` to `GGG`) or its name (`none`, `zero1`, `zero2`, `zero3`, `fsdp`, `mics`, `hsdp`); `zero1` by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub states: Option<String>,
    /// Data-parallel ranks of a group within which states are cut; those of a node by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group_size: Option<u64>,
    /// Gathered parameters stay until their last pass of the iteration, over all its microbatches; `false` by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_gathered: Option<bool>,
    /// How exchanges of states are carried out: `fused` (the default), or as `deepspeed` does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub runtime: Option<String>,
    /// What is trained: `full`, a share such as `0.0625` or `1/16`, or `lora:R`: adapters of rank R beside
    /// every matrix, or (`lora:R:q,v`) beside some.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trainable: Option<String>,
    /// A schedule's name; `1f1b` by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub schedule: Option<String>,
    /// `none`, `selective` (the attention core), `operators` (every second product and what is elementwise), `full`; `none` by default.
    /// `full:K` (or another kind with a number) for the first K blocks of every stage only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recompute: Option<String>,
    /// How blocks are spread over stages: `even`, `by-cost`, `balanced`, or `vocabulary-spread`, an equal part of embedding and output
    /// projection on every pipeline rank (arXiv 2411.05288); `even` by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partition: Option<String>,
    /// A recipe, see [`PRECISIONS`]; `bf16` by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub precision: Option<String>,
    /// `naive`, `fused`, `flash`; `flash` by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attention: Option<String>,
    /// `fused` (the default), or `separate`: norms, rotary embedding, gate and loss in an operator for each step, as in the models of
    /// Hugging Face's library.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernels: Option<String>,
    /// Which communication runs beside computation: `none`, `all` (that between replicas: the default), or some of `gradients`,
    /// `parameters`, `tensor` and `experts`, with commas.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overlap: Option<String>,
    /// Bytes of parameters that are gathered at a time; a block by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gather_bucket: Option<u64>,
    /// Bytes of gradients that are reduced at a time; a block, or all of them where they are reduced once, by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reduce_bucket: Option<u64>,
    /// Most bytes per GPU; what the GPU has for the allocator by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_limit: Option<u64>,
}

/// Recipes of number formats.
pub const PRECISIONS: [(&str, Numerics); 11] = [
    ("fp32", Numerics::FP32),
    ("bf16", Numerics::MIXED),
    ("bf16-fp32-gradients", Numerics::MIXED_FP32_GRADIENTS),
    ("bf16-fp32-accumulation", Numerics::MIXED_FP32_ACCUMULATION),
    ("fp8", Numerics { compute: Compute::Fp8, ..Numerics::MIXED }),
    ("fp8-transformer-engine", Numerics::FP8_TRANSFORMER_ENGINE),
    ("fp8-lm", Numerics::FP8_LM),
    ("fp8-deepseek", Numerics::FP8_DEEPSEEK),
    ("fp8-nanotron", Numerics::FP8_NANOTRON),
    ("mxfp8", Numerics { compute: Compute::Fp8, ..Numerics::MIXED }),
    ("nvfp4", Numerics { compute: Compute::Fp4, ..Numerics::MIXED }),
];

/// What runs beside computation, from a list of words.
fn overlap(text: &str) -> Result<Overlap, RequestError> {
    let mut overlap =
        Overlap { gradients: false, tensor: false, input_gradients: true, parameters: false, experts: false };
    for word in text.split(',').map(str::trim) {
        match word {
            "none" => {}
            "all" => (overlap.gradients, overlap.parameters) = (true, true),
            "gradients" => overlap.gradients = true,
            "parameters" => overlap.parameters = true,
            "tensor" => overlap.tensor = true,
            "experts" => overlap.experts = true,
            _ => {
                return Err(RequestError::Word {
                    key: "overlap",
                    value: text.to_owned(),
                    allowed: "none, all (that between replicas), or some of gradients, parameters, tensor, experts, with commas"
                        .into(),
                });
            }
        }
    }
    Ok(overlap)
}
const RECOMPUTES: [(&str, Recompute); 4] = [
    ("none", Recompute::None),
    ("selective", Recompute::Selective),
    ("operators", Recompute::Operators),
    ("full", Recompute::Full),
];

/// A request that names no configuration.
#[derive(Debug, Error)]
pub enum RequestError {
    /// Its model.
    #[error(transparent)]
    Model(#[from] ZooError),
    /// Its cluster.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The file of its cluster.
    #[error("cluster {path}: {source}")]
    Unreadable { path: PathBuf, source: std::io::Error },
    /// A word that is not known.
    #[error("{key} = {value:?}; allowed: {allowed}")]
    Word { key: &'static str, value: String, allowed: String },
    /// A key of the wrong type.
    #[error("{origin}: {}", error.to_string().trim().replace('\n', " "))]
    Type { origin: String, error: Box<toml::de::Error> },
    /// A key that has several values where one is needed, or none.
    #[error("{origin}: {key} = {value}; {allowed}")]
    List { origin: String, key: String, value: String, allowed: &'static str },
    /// A parameter that the cluster's file brings.
    #[error(transparent)]
    Physics(#[from] PhysicsError),
    /// A number that is missing or zero.
    #[error("{key} has to be given, as a whole number above zero")]
    Number { key: &'static str },
    /// Factors that do not make the GPUs.
    #[error(
        "tp x cp x pp x dp = {product}, but there are {gpus} GPUs ({nodes} nodes of {per_node}); change dp or nodes"
    )]
    Gpus { product: u64, gpus: u64, nodes: u64, per_node: u64 },
    /// A batch that does not divide.
    #[error("global_batch = {global} is no multiple of micro_batch x dp = {part}; take {nearest}")]
    Batch { global: u64, part: u64, nearest: u64 },
    /// A schedule that is not known or does not fit.
    #[error(transparent)]
    Schedule(#[from] schedules::ScheduleError),
    /// Gathered parameters are to stay where none is gathered.
    #[error(
        "keep_gathered = true with states = {states}, which leaves parameters whole on every rank, so that none is gathered; it goes with states whose first letter is I or G (mics, IIG, zero3, ...): take one of them, or leave keep_gathered out"
    )]
    NothingGathered { states: String },
    /// A partition within groups where there are none.
    #[error(
        "states = {states} cuts within groups, and group_size = {group} of {ranks} data-parallel ranks leaves none; set a group_size between 1 and {ranks}, or take states = {same}, which is the same here"
    )]
    NoGroups { states: StatePartition, group: u64, ranks: u64, same: String },
    /// The layout.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A text that says nothing about training, or adapters larger than what they stand beside.
    #[error(transparent)]
    Trainable(#[from] TrainableError),
    /// Adapters.
    #[error("trainable: {0}")]
    Adapters(#[from] AdapterError),
    /// No state partition.
    #[error(transparent)]
    States(#[from] PartitionError),
}

fn bucket(key: &'static str, bytes: Option<u64>) -> Result<Option<f64>, RequestError> {
    if bytes == Some(0) { Err(RequestError::Number { key }) } else { Ok(bytes.map(|bytes| bytes as f64)) }
}

/// The share of the parameters that is trained, and the adapters that these are.
fn trained(text: &str, model: &Architecture) -> Result<(f64, Option<Adapters>), RequestError> {
    match text.parse()? {
        Trainable::Full => Ok((1.0, None)),
        Trainable::Share(share) => Ok((share, None)),
        Trainable::Adapters { rank, beside } => {
            let adapters = Adapters { rank: rank.into(), beside };
            let share = model.adapter_parameters(&adapters)? as f64 / model.parameters() as f64;
            let sensible = adapters.rank <= model.hidden && share <= 1.0;
            if sensible { Ok((share, Some(adapters))) } else { Err(TrainableError { text: text.to_owned() }.into()) }
        }
    }
}

/// What is computed again, and of how many blocks of a stage, from `kind` or `kind:blocks`.
fn recompute(text: &str) -> Result<(Recompute, Option<u64>), RequestError> {
    let (kind, blocks) = text.split_once(':').map_or((text, None), |(kind, blocks)| (kind, Some(blocks)));
    let known = RECOMPUTES.iter().find(|(name, _)| *name == kind).map(|(_, kind)| *kind);
    let blocks = blocks.map(|blocks| blocks.parse::<u64>().ok().filter(|n| *n > 0 && kind != "none"));
    match (known, blocks) {
        (Some(kind), None) => Ok((kind, None)),
        (Some(kind), Some(Some(blocks))) => Ok((kind, Some(blocks))),
        _ => Err(RequestError::Word {
            key: "recompute",
            value: text.to_owned(),
            allowed: "none, selective, operators, full; with a colon and a number of blocks, for the first blocks of every stage (full:2)"
                .into(),
        }),
    }
}

fn word<T: Copy>(key: &'static str, value: Option<&str>, usual: &str, known: &[(&str, T)]) -> Result<T, RequestError> {
    let value = value.unwrap_or(usual);
    known.iter().find(|(name, _)| *name == value).map(|(_, v)| *v).ok_or_else(|| RequestError::Word {
        key,
        value: value.to_owned(),
        allowed: known.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", "),
    })
}

const RUNTIMES: [(&str, Runtime); 2] = [("fused", Runtime::FUSED), ("deepspeed", Runtime::DEEPSPEED)];
/// Whether operators are fused.
const KERNELS: [(&str, bool); 2] = [("fused", true), ("separate", false)];

const PARTITIONS: [(&str, Partition); 4] = [
    ("even", Partition::Even),
    ("by-cost", Partition::ByCost),
    ("balanced", Partition::Balanced),
    ("vocabulary-spread", Partition::VocabularySpread),
];

/// More combinations than a search looks at.
const MOST_REQUESTS: usize = 10_000;

impl fmt::Display for ClusterRequest {
    /// The configuration in one line; sizes of 1 and what is left to defaults are not named.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, size) in [("dp", self.dp), ("tp", self.tp), ("cp", self.cp), ("pp", self.pp), ("ep", self.ep)] {
            if let Some(size) = size.filter(|size| *size > 1) {
                write!(f, "{name} {size} ")?;
            }
        }
        if self.pp.is_some_and(|pp| pp > 1) {
            write!(f, "{} ", self.schedule.as_deref().unwrap_or("1f1b"))?;
            if let Some(chunks) = self.chunks.filter(|chunks| *chunks > 1) {
                write!(f, "x{chunks} ")?;
            }
        }
        if let Some(partition) = self.partition.as_deref().filter(|partition| *partition != "even") {
            write!(f, "{partition} ")?;
        }
        write!(f, "micro-batch {} {}", self.micro_batch.unwrap_or(1), self.states.as_deref().unwrap_or("zero1"))?;
        if self.keep_gathered == Some(true) {
            write!(f, " gathered once")?;
        }
        match self.recompute.as_deref() {
            None | Some("none") => Ok(()),
            Some(kind) => write!(f, " {kind} recomputation"),
        }
    }
}

impl ClusterRequest {
    /// The requests of a job's keys and values: one, or with lists one for each of their combinations. `origin` names the job in
    /// errors.
    ///
    /// # Errors
    /// When a key is unknown or of the wrong type, a list is empty, or there are too many combinations.
    pub fn of_table(table: toml::Table, origin: &str) -> Result<Vec<ClusterRequest>, RequestError> {
        let mut tables = vec![table.clone()];
        for (key, value) in &table {
            let toml::Value::Array(choices) = value else { continue };
            if choices.is_empty() || tables.len().saturating_mul(choices.len()) > MOST_REQUESTS {
                let allowed = "a list needs a value, and all lists together may make 10000 combinations";
                return Err(RequestError::List {
                    origin: origin.into(),
                    key: key.clone(),
                    value: value.to_string(),
                    allowed,
                });
            }
            let with = |choice: &toml::Value| {
                let choice = choice.clone();
                tables.iter().map(move |table| {
                    let mut table = table.clone();
                    table.insert(key.clone(), choice.clone());
                    table
                })
            };
            tables = choices.iter().flat_map(with).collect();
        }
        let typed = |table: toml::Table| {
            table.try_into().map_err(|error| RequestError::Type { origin: origin.into(), error: Box::new(error) })
        };
        tables.into_iter().map(typed).collect()
    }

    /// The cluster: a preset, or a file.
    ///
    /// # Errors
    /// When there is neither, or the file is wrong.
    pub fn cluster(&self) -> Result<Cluster, RequestError> {
        let path = Path::new(&self.cluster);
        let mut cluster = if path.extension().is_some_and(|e| e == "toml") {
            let text = std::fs::read_to_string(path)
                .map_err(|source| RequestError::Unreadable { path: path.to_owned(), source })?;
            Cluster::from_toml(&text)?
        } else {
            find_cluster(&self.cluster)?.clone()
        };
        if let Some(gpus) = self.gpus_per_node {
            cluster.gpus_per_node = gpus.min(u64::from(u32::MAX)) as u32;
            cluster.check()?;
        }
        Ok(cluster)
    }

    /// The model, the layout and the cluster.
    ///
    /// # Errors
    /// The first thing that is wrong, with what is allowed.
    pub fn resolve(&self) -> Result<(Architecture, Layout, Cluster), RequestError> {
        let model = Architecture::load(&self.model)?;
        let cluster = self.cluster()?;
        let layout = self.layout(&model, &cluster)?;
        Ok((model, layout, cluster))
    }

    pub(super) fn layout(&self, model: &Architecture, cluster: &Cluster) -> Result<Layout, RequestError> {
        for (key, value) in [("seq", self.seq), ("global_batch", self.global_batch)] {
            if value == 0 {
                return Err(RequestError::Number { key });
            }
        }
        let one = |value: Option<u64>| value.unwrap_or(1);
        let (tp, cp, pp, ep) = (one(self.tp), one(self.cp), one(self.pp), one(self.ep));
        let (nodes, per_node) = (one(self.nodes), u64::from(cluster.gpus_per_node));
        let gpus = nodes.saturating_mul(per_node);
        let inner = tp.saturating_mul(cp).saturating_mul(pp);
        for (key, value) in [("tp", tp), ("cp", cp), ("pp", pp), ("micro_batch", one(self.micro_batch))] {
            if value == 0 {
                return Err(RequestError::Number { key });
            }
        }
        let dp = self.dp.unwrap_or((gpus / inner).max(1));
        let product = inner.saturating_mul(dp);
        if product != gpus {
            return Err(RequestError::Gpus { product, gpus, nodes, per_node });
        }
        let micro_batch = one(self.micro_batch);
        let part = micro_batch.saturating_mul(dp);
        if !self.global_batch.is_multiple_of(part) {
            let nearest = (self.global_batch / part).max(1).saturating_mul(part);
            return Err(RequestError::Batch { global: self.global_batch, part, nearest });
        }
        let name = self.schedule.as_deref().unwrap_or("1f1b");
        let schedule = schedules::find(name)?;
        let chunks = match (pp, self.chunks) {
            (1, None) => 1,
            (_, asked) => u64::from(schedule.chunks_for(asked.map(|n| n.min(u64::from(u32::MAX)) as u32))?),
        };
        let attention = word(
            "attention",
            self.attention.as_deref(),
            "flash",
            &[
                ("naive", AttentionKernel::Naive),
                ("fused", AttentionKernel::FusedSoftmax),
                ("flash", best_flash(cluster)),
            ],
        )?;
        let fused = word("kernels", self.kernels.as_deref(), "fused", &KERNELS)?;
        let (recompute, recomputed_blocks) = recompute(self.recompute.as_deref().unwrap_or("none"))?;
        let (trainable, adapters) = self.trainable.as_deref().map_or(Ok((1.0, None)), |text| trained(text, model))?;
        let layout = Layout {
            tp,
            sp: self.sp.unwrap_or(true) && tp > 1,
            cp,
            context: self.cp_exchange.unwrap_or_default(),
            pp,
            chunks,
            dp,
            ep,
            routing: Routing { skew: self.expert_skew.unwrap_or(1.0), capacity: self.expert_capacity },
            sharding: self.states.as_deref().unwrap_or("zero1").parse()?,
            group: self.group_size,
            keep_gathered: self.keep_gathered.unwrap_or(false),
            runtime: word("runtime", self.runtime.as_deref(), "fused", &RUNTIMES)?,
            trainable,
            adapters,
            schedule: if pp == 1 { "1f1b".into() } else { name.into() },
            microbatches: self.global_batch / part,
            partition: word("partition", self.partition.as_deref(), "even", &PARTITIONS)?,
            recompute,
            recomputed_blocks,
            attention,
            fused_kernels: fused,
            fused_norms: fused,
            loss: if fused { LossKernel::InPlace } else { LossKernel::Eager },
            numerics: word("precision", self.precision.as_deref(), "bf16", &PRECISIONS)?,
            memory_limit: self.memory_limit.map(|bytes| bytes as f64),
            overlap: overlap(self.overlap.as_deref().unwrap_or("all"))?,
            gather_bytes: bucket("gather_bucket", self.gather_bucket)?,
            bucket_bytes: bucket("reduce_bucket", self.reduce_bucket)?,
            ..Layout::single(self.seq, micro_batch)
        };
        layout.check()?;
        if layout.keep_gathered && layout.sharding.parameters == Level::Whole {
            let states = self.states.clone().unwrap_or_else(|| "zero1 (the default)".into());
            return Err(RequestError::NothingGathered { states });
        }
        let ranks = layout.data_ranks();
        let none = |group: &u64| layout.sharding.has_groups() && ranks > 1 && (*group == 1 || *group == ranks);
        if let Some(group) = layout.group.filter(none) {
            let states = layout.sharding;
            let same = states.letters().replace('I', if group == 1 { "N" } else { "G" });
            return Err(RequestError::NoGroups { states, group, ranks, same });
        }
        let stages = pp * layout.chunks;
        if stages > model.layers {
            return Err(RequestError::Word {
                key: "pp",
                value: format!("{pp} x {} chunks", layout.chunks),
                allowed: format!("at most {} stages, one per block", model.layers),
            });
        }
        Ok(layout)
    }
}

/// FlashAttention 3 (or cuDNN) on Hopper and later, 2 before.
fn best_flash(cluster: &Cluster) -> AttentionKernel {
    use paceline_profiles::Generation;
    match cluster.gpu.generation {
        Generation::Hopper | Generation::Blackwell => AttentionKernel::Flash3,
        _ => AttentionKernel::Flash2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> ClusterRequest {
        ClusterRequest {
            model: "llama-3-8b".into(),
            cluster: "dgx-h100-ib".into(),
            nodes: Some(2),
            seq: 8192,
            global_batch: 64,
            ..ClusterRequest::default()
        }
    }

    #[test]
    fn defaults_make_data_parallelism() {
        let (model, layout, cluster) = request().resolve().unwrap();
        assert_eq!((layout.dp, layout.microbatches, layout.sp), (16, 4, false));
        assert_eq!((model.layers, cluster.gpus_per_node), (32, 8));
        let request = ClusterRequest {
            tp: Some(2),
            pp: Some(4),
            schedule: Some("interleaved".into()),
            states: Some("zero3".into()),
            precision: Some("fp8".into()),
            ..request()
        };
        let (_, layout, _) = request.resolve().unwrap();
        assert_eq!((layout.dp, layout.chunks, layout.sp, layout.sharding), (2, 2, true, StatePartition::ZERO3));
    }

    #[test]
    fn lists_make_one_request_for_each_combination() {
        let table = |text: &str| text.parse::<toml::Table>().unwrap();
        let both = "model = \"m\"\ntp = [1, 2, 4]\nrecompute = [\"none\", \"full\"]\npp = 2\n";
        let all = ClusterRequest::of_table(table(both), "job").unwrap();
        assert_eq!(all.len(), 6);
        assert!(all.iter().all(|r| r.pp == Some(2)));
        assert_eq!(all.iter().filter(|r| r.tp == Some(4) && r.recompute.as_deref() == Some("full")).count(), 1);
        let error = |text: &str| ClusterRequest::of_table(table(text), "job").unwrap_err().to_string();
        assert!(error("tq = 1").contains("tq"));
        assert!(error("tp = \"two\"").contains("string"));
        assert!(error("tp = []").contains("tp"));
    }

    #[test]
    fn mistakes_are_named_with_what_is_allowed() {
        let error = |change: &dyn Fn(&mut ClusterRequest)| {
            let mut request = request();
            change(&mut request);
            request.resolve().unwrap_err().to_string()
        };
        for (message, phrase) in [
            (error(&|r| r.model = "llama-9".into()), "llama-9"),
            (error(&|r| r.cluster = "moon".into()), "dgx-h100-ib"),
            (error(&|r| r.dp = Some(3)), "there are 16 GPUs"),
            (error(&|r| r.global_batch = 65), "take 64"),
            (error(&|r| r.states = Some("zero9".into())), "zero1"),
            (error(&|r| r.group_size = Some(5)), "group_size = 5 does not divide the 16"),
            (
                error(&|r| (r.group_size, r.states) = (Some(16), Some("IIG".into()))),
                "group_size = 16 of 16 data-parallel ranks leaves none; set a group_size between 1 and 16, or take states = GGG",
            ),
            (
                error(&|r| (r.group_size, r.states) = (Some(1), Some("mics".into()))),
                "take states = NNN, which is the same",
            ),
            (error(&|r| r.trainable = Some("2".into())), "trainable = \"2\""),
            (error(&|r| r.trainable = Some("lora:0".into())), "rank R of at least 1"),
            (error(&|r| r.trainable = Some("lora:8:q,z".into())), "no matrix \"z\" in llama-3-8b"),
            (error(&|r| r.recompute = Some("some".into())), "selective"),
            (error(&|r| r.recompute = Some("full:0".into())), "full:2"),
            (error(&|r| r.recompute = Some("none:2".into())), "recompute = \"none:2\""),
            (error(&|r| r.precision = Some("int1".into())), "bf16"),
            (error(&|r| r.runtime = Some("horovod".into())), "runtime = \"horovod\"; allowed: fused, deepspeed"),
            (error(&|r| r.kernels = Some("fast".into())), "kernels = \"fast\"; allowed: fused, separate"),
            (error(&|r| r.partition = Some("odd".into())), "vocabulary-spread"),
            (error(&|r| r.schedule = Some("none".into())), "none"),
            (
                error(&|r| r.overlap = Some("gradients,sleep".into())),
                "overlap = \"gradients,sleep\"; allowed: none, all",
            ),
            (error(&|r| r.keep_gathered = Some(true)), "keep_gathered = true with states = zero1 (the default)"),
            (
                error(&|r| (r.keep_gathered, r.states) = (Some(true), Some("NII".into()))),
                "states = NII, which leaves parameters whole on every rank",
            ),
            (error(&|r| r.expert_skew = Some(0.5)), "expert_skew = 0.5"),
            (error(&|r| r.expert_capacity = Some(f64::NAN)), "expert_capacity = NaN"),
            (error(&|r| r.seq = 0), "seq"),
            (error(&|r| r.tp = Some(0)), "tp"),
            (error(&|r| (r.pp, r.nodes) = (Some(64), Some(8))), "32 stages"),
            (error(&|r| r.cluster = "missing.toml".into()), "missing.toml"),
        ] {
            assert!(message.contains(phrase), "{message}");
        }
    }
}
