//! A job: what to train, on what, and which axes of the plan are fixed. Read from a TOML file with the flags of the command
//! line laid over it.
//!
//! ```toml
//! model = "demo-3m"        # a preset, or the path of a Hugging Face config.json
//! seq = 256                # tokens per sequence
//! global_batch = 32        # sequences per step over all replicas
//! pp = [1, 2]              # fixed axes: a value, or a list to choose from; an absent axis is searched
//! memory_limit = "2GiB"    # per rank
//! [train]
//! steps = 100
//! lr = 1e-3
//! ```

mod error;
mod fields;
mod train;

pub use error::JobError;
pub use fields::parse_bytes;
pub use train::Train;

use crate::configuration::MOST_DEVICES;
use crate::lower::{Collectives, Sharing};
use crate::schedules;
use fields::Fields;
use paceline_sim::model::{ModelConfig, Trainable};
use paceline_sim::partition::{Level, StatePartition};
use paceline_sim::program::{Link, Precision, Recompute};
use paceline_sim::units::Nanos;
use std::path::{Path, PathBuf};

/// The cluster that stands for this machine.
pub const LOCAL: &str = "local";

/// What to train, on what, and what is fixed. Lists hold the values that an axis may take; an empty one leaves it to the
/// search.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// The architecture.
    pub model: ModelConfig,
    /// Tokens per sequence.
    pub seq: u32,
    /// Sequences per step over all replicas.
    pub global_batch: u32,
    /// Sequences per microbatch.
    pub micro_batch: Vec<u32>,
    /// Data-parallel sizes.
    pub dp: Vec<u32>,
    /// Pipeline-parallel sizes.
    pub pp: Vec<u32>,
    /// Stages per pipeline rank.
    pub chunks: Vec<u32>,
    /// Pipeline schedules, by name.
    pub schedule: Vec<String>,
    /// Kinds of recomputation.
    pub recompute: Vec<Recompute>,
    /// Partitions of parameters, gradients and optimizer states.
    pub states: Vec<StatePartition>,
    /// In which groups states are cut, and when parameters are gathered and dropped.
    pub sharing: Sharing,
    /// Which parameters are trained.
    pub trainable: Trainable,
    /// Steps that run without a barrier between them, where there is a pipeline.
    pub barrier_every: u32,
    /// Number formats on this machine; a cluster has recipes of its own.
    pub precision: Precision,
    /// Where it runs.
    pub cluster: String,
    /// Nodes of the cluster.
    pub nodes: Option<u32>,
    /// Devices per node; on this machine, its device slots.
    pub gpus_per_node: Option<u32>,
    /// Most bytes per rank.
    pub memory_limit: Option<u64>,
    /// How to train.
    pub train: Train,
    /// All keys as given, paths made absolute: the same job can be read from it again.
    source: toml::Table,
}

impl Job {
    /// Reads a job file; paths in it are relative to its directory.
    ///
    /// # Errors
    /// See [`JobError`].
    pub fn read(path: &Path) -> Result<Job, JobError> {
        Job::read_with(path, toml::Table::new())
    }

    /// Reads a job file and lays `flags` over it: a flag replaces the key of the same name. Paths in flags are relative to the
    /// working directory.
    ///
    /// # Errors
    /// See [`JobError`].
    pub fn read_with(path: &Path, flags: toml::Table) -> Result<Job, JobError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| JobError::Unreadable { path: path.into(), source })?;
        let origin = path.display().to_string();
        let mut table: toml::Table = text
            .parse()
            .map_err(|error: toml::de::Error| JobError::Syntax { origin: origin.clone(), error: Box::new(error) })?;
        let directory = path.parent().unwrap_or(Path::new(""));
        place_paths(&mut table, directory);
        table.extend(flags);
        Job::from_table(table, &origin)
    }

    /// A job from keys and values; `origin` names them in errors.
    ///
    /// # Errors
    /// See [`JobError`].
    pub fn from_table(table: toml::Table, origin: &str) -> Result<Job, JobError> {
        let mut source = table.clone();
        place_paths(&mut source, &std::env::current_dir().unwrap_or_default());
        let mut fields = Fields::new(table, origin, KEYS);
        fields.refuse_unknown()?;

        let name: String = fields.text("model", "a preset such as demo-3m, or the path of a config.json")?;
        let seq = fields.count("seq")?;
        let global_batch = fields.count("global_batch")?;
        let cluster = fields.optional_text("cluster")?.unwrap_or_else(|| LOCAL.into());
        let job = Job {
            model: ModelConfig::load(&name)?,
            seq,
            global_batch,
            micro_batch: fields.counts("micro_batch")?,
            dp: fields.counts("dp")?,
            pp: fields.counts("pp")?,
            chunks: fields.counts("chunks")?,
            schedule: fields.names("schedule", &schedules::names().collect::<Vec<_>>())?,
            recompute: fields.choices("recompute", &RECOMPUTE)?,
            states: fields.parsed("states", STATES)?,
            sharing: sharing(&fields)?,
            trainable: trainable(&fields)?,
            barrier_every: fields.optional_count("barrier_every")?.unwrap_or(1),
            precision: if cluster == LOCAL { precision(&fields)? } else { Precision::default() },
            nodes: fields.optional_count("nodes")?,
            gpus_per_node: fields.optional_count("gpus_per_node")?,
            memory_limit: fields.bytes("memory_limit")?,
            train: Train::from_fields(&mut fields)?,
            cluster,
            source,
        };
        if job.cluster == LOCAL {
            job.refuse_what_this_machine_lacks(&mut fields)?;
        }
        job.check(origin)?;
        Ok(job)
    }

    /// All keys as given: [`Job::from_table`] of it is this job.
    pub fn table(&self) -> &toml::Table {
        &self.source
    }

    /// Tokens of a global batch.
    pub fn tokens_per_step(&self) -> u64 {
        u64::from(self.global_batch) * u64::from(self.seq)
    }

    /// Whether a partition of states goes with what the job says of them: gathered parameters can stay only where some are gathered.
    pub fn can_have(&self, states: &StatePartition) -> bool {
        !self.sharing.keep_gathered || states.parameters != Level::Whole
    }

    /// What the local executor cannot do yet, refused with what it can.
    fn refuse_what_this_machine_lacks(&self, fields: &mut Fields) -> Result<(), JobError> {
        for key in ["tp", "cp", "ep"] {
            if let Some(size) = fields.optional_count(key)?.filter(|&size| size > 1) {
                return Err(fields.unsupported(key, size.to_string(), "1"));
            }
        }
        if self.gpus_per_node.is_some_and(|devices| devices > MOST_DEVICES) {
            let allowed = format!("up to {MOST_DEVICES}");
            return Err(fields.unsupported("gpus_per_node", fields.show("gpus_per_node"), &allowed));
        }
        if self.nodes.is_some_and(|nodes| nodes > 1) {
            return Err(fields.unsupported("nodes", fields.show("nodes"), "1"));
        }
        let only: [(&'static str, &str); 2] = [("sp", "false"), ("attention", "flash")];
        for (key, allowed) in only {
            let given = fields.show(key);
            if !given.is_empty() && given.trim_matches('"') != allowed {
                return Err(fields.unsupported(key, given, allowed));
            }
        }
        Ok(())
    }

    /// What no value of the other axes could mend.
    fn check(&self, origin: &str) -> Result<(), JobError> {
        let refuse = |key: &str, value: String, allowed: String| {
            Err(JobError::Value { origin: origin.into(), key: key.into(), value, allowed })
        };
        self.model.validate().map_err(JobError::Shape)?;
        self.trainable.validate(&self.model).map_err(JobError::Shape)?;
        let learned = self.model.positions == paceline_sim::model::Positions::Learned;
        if learned && self.seq > self.model.max_positions {
            let rows = self.model.max_positions;
            return refuse("seq", self.seq.to_string(), format!("at most {rows}, the learned positions of the model"));
        }
        let (batch, seq) = (self.global_batch, self.seq);
        if batch.checked_mul(seq).is_none() {
            return refuse("global_batch", batch.to_string(), format!("at most {} at seq = {seq}", u32::MAX / seq));
        }
        let divides = |key: &str, values: &[u32]| match values.iter().all(|value| !batch.is_multiple_of(*value)) {
            true if !values.is_empty() => {
                let divisors: Vec<String> = (1..=batch.min(1 << 16))
                    .filter(|d| batch.is_multiple_of(*d))
                    .take(16)
                    .map(|d| d.to_string())
                    .collect();
                let allowed = format!("a divisor of global_batch = {batch}: {}", divisors.join(", "));
                refuse(key, show_list(values), allowed)
            }
            _ => Ok(()),
        };
        if self.barrier_every > MOST_STEPS || (self.barrier_every > 1 && self.cluster != LOCAL) {
            let allowed = format!("1 to {MOST_STEPS} on this machine, 1 on a cluster");
            return refuse("barrier_every", self.barrier_every.to_string(), allowed);
        }
        if !self.states.is_empty() && !self.states.iter().any(|states| self.can_have(states)) {
            let named: Vec<String> = self.states.iter().map(StatePartition::letters).collect();
            let allowed = "with states that cut parameters, whose first letter is I or G (mics, IIG, zero3, ...): others gather none; \
                           take one of them, or leave keep_gathered out";
            return refuse("keep_gathered", format!("true with states = {}", named.join(", ")), allowed.into());
        }
        divides("micro_batch", &self.micro_batch)?;
        divides("dp", &self.dp)?;
        let fewest = |values: &[u32]| values.iter().copied().min().unwrap_or(1);
        let stages = u64::from(fewest(&self.pp)) * u64::from(fewest(&self.chunks));
        if stages > u64::from(self.model.layers) {
            let layers = self.model.layers;
            let key = if self.chunks.is_empty() { "pp" } else { "pp * chunks" };
            let allowed = format!("at most {layers}: {} has {layers} blocks and each stage needs one", self.model.name);
            return refuse(key, stages.to_string(), allowed);
        }
        Ok(())
    }
}

/// Most steps without a barrier: a program lists the ops of all of them.
const MOST_STEPS: u32 = 64;

/// Every key of a job file.
pub(crate) const KEYS: &[&str] = &[
    "model",
    "cluster",
    "nodes",
    "gpus_per_node",
    "seq",
    "global_batch",
    "micro_batch",
    "tp",
    "sp",
    "cp",
    "pp",
    "chunks",
    "dp",
    "ep",
    "states",
    "group_size",
    "pipeline_groups",
    "prefetch",
    "keep_gathered",
    "late_gather",
    "barrier_every",
    "collectives",
    "link_bandwidth",
    "link_latency",
    "schedule",
    "recompute",
    "precision",
    "attention",
    "memory_limit",
    "trainable",
    "train",
];

/// Kinds of recomputation by name.
pub(crate) const RECOMPUTE: [(&str, Recompute); 3] =
    [("none", Recompute::None), ("selective", Recompute::Selective), ("full", Recompute::Full)];

/// What `states` may be.
const STATES: &str = "none (ddp), zero1, zero2, zero3 (fsdp), mics (hsdp), or three letters for parameters, gradients and optimizer states: \
     N whole, I cut within groups of group_size, G cut over all replicas; for example NNG or IIG";

/// Rounds of collectives over several fast groups, by name.
const COLLECTIVES: [(&str, Collectives); 5] = [
    ("two-level", Collectives::TwoLevel),
    ("ring", Collectives::Ring),
    ("tree", Collectives::Tree),
    ("direct", Collectives::Direct),
    ("auto", Collectives::Auto),
];

/// The link between fast groups of this machine's ranks, where one is to be rehearsed.
fn link(fields: &Fields) -> Result<Option<Link>, JobError> {
    let bytes_per_second = fields.bytes("link_bandwidth")?;
    let latency = fields.number("link_latency", "seconds from 0 to 10", |s| (0.0..=10.0).contains(&s))?;
    let latency = Nanos::from_seconds(latency.unwrap_or(0.0));
    Ok(match bytes_per_second {
        Some(bytes_per_second) => Some(Link { latency, bytes_per_second }),
        None if latency > Nanos::ZERO => Some(Link { latency, bytes_per_second: u64::MAX }),
        None => None,
    })
}

/// Which parameters are trained: a text, or a share as a number.
fn trainable(fields: &Fields) -> Result<Trainable, JobError> {
    const ALLOWED: &str = "full, a share above 0 and at most 1 (0.0625 or \"1/16\"), or \"lora:R\" (\"lora:8:q,v\" beside these matrices only)";
    Ok(fields.parsed_or_number("trainable", ALLOWED)?.unwrap_or_default())
}

/// The recipe of number formats; 32-bit where none is named.
fn precision(fields: &Fields) -> Result<Precision, JobError> {
    let known = Precision::ALL.map(|precision| (precision.name(), precision));
    match fields.choices("precision", &known)?[..] {
        [] => Ok(Precision::default()),
        [one] => Ok(one),
        _ => Err(fields.unsupported("precision", fields.show("precision"), "one recipe")),
    }
}

/// Which replicas share states, and for how long.
fn sharing(fields: &Fields) -> Result<Sharing, JobError> {
    let usual = Sharing::default();
    Ok(Sharing {
        group_size: fields.optional_count("group_size")?,
        pipeline_groups: fields.optional_count("pipeline_groups")?.unwrap_or(usual.pipeline_groups),
        prefetch: fields.whole("prefetch")?.map_or(usual.prefetch, |ahead| ahead.min(u64::from(u32::MAX)) as u32),
        late_gather: fields.truth("late_gather")?.unwrap_or(usual.late_gather),
        keep_gathered: fields.truth("keep_gathered")?.unwrap_or(usual.keep_gathered),
        collectives: *fields.choices("collectives", &COLLECTIVES)?.first().unwrap_or(&usual.collectives),
        link: link(fields)?,
    })
}

fn show_list(values: &[u32]) -> String {
    match values {
        [one] => one.to_string(),
        many => format!("{many:?}"),
    }
}

/// Makes paths absolute that exist relative to a directory.
fn place_paths(table: &mut toml::Table, directory: &Path) {
    let place = |value: &mut toml::Value| {
        if let toml::Value::String(text) = value {
            let path: PathBuf = directory.join(&*text);
            let is_preset = ModelConfig::preset(text).is_ok();
            if !is_preset
                && !text.is_empty()
                && let Ok(found) = path.canonicalize()
            {
                *text = found.display().to_string();
            }
        }
    };
    if let Some(model) = table.get_mut("model") {
        place(model);
    }
    if let Some(data) = table.get_mut("train").and_then(toml::Value::as_table_mut).and_then(|t| t.get_mut("data")) {
        place(data);
    }
}

#[cfg(test)]
mod tests;
