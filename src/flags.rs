//! Flags that stand for keys of the job file: same name, `_` for `-`. A flag given overrides the key; both go through the
//! same parser, so their errors are the same.

use clap::Args;
use serde::Serialize;

/// What to train, where, and what is fixed. Each is also a key of the job file.
#[derive(Debug, Clone, Default, Args, Serialize)]
#[command(next_help_heading = "Job (each also a key of the job file)")]
#[serde(rename_all = "snake_case")]
pub struct JobFlags {
    /// Preset or path of a Hugging Face config.json.
    #[arg(long, value_name = "PRESET|FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Cluster preset or file; `local` is this machine.
    #[arg(long, value_name = "PRESET|FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster: Option<String>,
    /// Number of nodes.
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nodes: Option<u32>,
    /// Devices per node.
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpus_per_node: Option<u32>,
    /// Tokens per sequence.
    #[arg(long, value_name = "S")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seq: Option<u32>,
    /// Sequences per step over all replicas.
    #[arg(long, value_name = "G")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub global_batch: Option<u32>,
    /// Sequences per microbatch.
    #[arg(long, value_name = "B")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batch: Option<u32>,
    /// Tensor-parallel size.
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tp: Option<u32>,
    /// Sequence parallelism inside the tensor-parallel group.
    #[arg(long, value_name = "BOOL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sp: Option<bool>,
    /// Context-parallel size.
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cp: Option<u32>,
    /// How context ranks exchange on a cluster: zig-zag, ring, all-gather or all-to-all.
    #[arg(long, value_name = "KIND")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cp_exchange: Option<String>,
    /// Pipeline-parallel size.
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pp: Option<u32>,
    /// Chunks (virtual stages) per pipeline rank.
    #[arg(long, value_name = "V")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chunks: Option<u32>,
    /// Data-parallel size.
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dp: Option<u32>,
    /// Expert-parallel size.
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ep: Option<u32>,
    /// Tokens of the busiest expert-parallel rank over the mean, on a cluster.
    #[arg(long, value_name = "RATIO")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expert_skew: Option<f64>,
    /// Tokens of an expert-parallel rank beyond this multiple of the mean are dropped, on a cluster.
    #[arg(long, value_name = "RATIO")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expert_capacity: Option<f64>,
    /// How parameters, gradients and optimizer states are partitioned.
    #[arg(long, value_name = "NNN..GGG|zero1|...")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub states: Option<String>,
    /// Ranks of a fast group of the state partition.
    #[arg(long, value_name = "M")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group_size: Option<u32>,
    /// Fast groups over which the ranks of a pipeline are spread on this machine (default 1).
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pipeline_groups: Option<u32>,
    /// Passes ahead of its own at which a unit's partitioned parameters are gathered (default 1).
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefetch: Option<u32>,
    /// How exchanges of states are carried out on a cluster: fused, or as deepspeed does.
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub runtime: Option<String>,
    /// Gathered parameters live until their last pass of the step, instead of for one pass.
    #[arg(long, value_name = "BOOL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_gathered: Option<bool>,
    /// Updated parameters are gathered beside the first passes of the next step.
    #[arg(long, value_name = "BOOL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub late_gather: Option<bool>,
    /// Steps between barriers of a pipeline: with more than 1 the optimizer goes ahead of the gradient norm (post-validation).
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub barrier_every: Option<u32>,
    /// How collectives over several fast groups are done on this machine: two-level, ring, tree, direct, or auto (the fastest for each size).
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub collectives: Option<String>,
    /// Bytes per second of the link between fast groups of this machine's ranks, to rehearse a slow network (for example 100MB).
    #[arg(long, value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link_bandwidth: Option<String>,
    /// Seconds that a message takes on that link beside its bytes.
    #[arg(long, value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link_latency: Option<f64>,
    /// Pipeline schedule.
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub schedule: Option<String>,
    /// How blocks are spread over stages on a cluster: even, by-cost, balanced, or vocabulary-spread (an equal part of the vocabulary
    /// on every pipeline rank).
    #[arg(long, value_name = "KIND")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partition: Option<String>,
    /// Activation recomputation: none, selective or full.
    #[arg(long, value_name = "KIND")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recompute: Option<String>,
    /// Precision recipe.
    #[arg(long, value_name = "RECIPE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub precision: Option<String>,
    /// Attention kernel: naive, fused or flash.
    #[arg(long, value_name = "KERNEL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attention: Option<String>,
    /// Operators beside products and attention on a cluster: fused, or separate (a kernel for each step, as in Hugging Face's models).
    #[arg(long, value_name = "KIND")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernels: Option<String>,
    /// What runs beside computation on a cluster: none, all, or some of gradients, parameters, tensor, experts.
    #[arg(long, value_name = "LIST")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overlap: Option<String>,
    /// Bytes of parameters that are gathered at a time on a cluster; a block by default.
    #[arg(long, value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gather_bucket: Option<String>,
    /// Bytes of gradients that are reduced at a time on a cluster.
    #[arg(long, value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reduce_bucket: Option<String>,
    /// Memory per rank.
    #[arg(long, value_name = "BYTES|80GiB")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_limit: Option<String>,
    /// Trainable parameters: full, a ratio, or lora:R, adapters of rank R (lora:8:q,v beside these matrices only).
    #[arg(long, value_name = "full|RATIO|lora:R")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trainable: Option<String>,
}

impl JobFlags {
    /// The flags that were given, as keys of a job file.
    pub fn table(&self) -> Result<toml::Table, toml::ser::Error> {
        toml::Table::try_from(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_given_becomes_a_key() {
        let flags = JobFlags { gpus_per_node: Some(8), model: Some("gpt2".into()), ..JobFlags::default() };
        let table = flags.table().unwrap();
        assert_eq!(table.len(), 2);
        assert_eq!(table["gpus_per_node"].as_integer(), Some(8));
        assert_eq!(table["model"].as_str(), Some("gpt2"));
    }
}
