//! Arguments of Megatron-LM's `pretrain_gpt.py` (names as in its `megatron/training/arguments.py` of August 2026) as a script.

use super::{ExportError, Exported, File, Launch, Target};
use paceline_sim::cluster::{Attention, AttentionKernel, ContextExchange, Recompute};
use paceline_sim::model::{Norm, Positions};

const TARGET: Target = Target::Megatron;

/// Arguments in the order of the script; a flag has no value.
#[derive(Default)]
struct List(Vec<(String, Option<String>)>);

impl List {
    fn flag(&mut self, name: &str) {
        self.0.push((name.into(), None));
    }
    fn value(&mut self, name: &str, value: impl ToString) {
        self.0.push((name.into(), Some(value.to_string())));
    }
    fn flag_if(&mut self, yes: bool, name: &str) {
        if yes {
            self.flag(name);
        }
    }
    fn above_one(&mut self, name: &str, size: u64) {
        if size > 1 {
            self.value(name, size);
        }
    }
}

pub(super) fn files(launch: &Launch) -> Result<Exported, ExportError> {
    launch.refuse_rare(TARGET)?;
    let mut list = List::default();
    let mut notes = vec![
        "learning rate, warm-up, decay and the number of steps are examples; set yours".to_owned(),
        "DATA names the data; without it the script trains on mock data".to_owned(),
    ];
    model(&mut list, launch);
    parallel(&mut list, launch)?;
    let sharded = states(&mut list, launch, &mut notes)?;
    precision(&mut list, launch)?;
    kernels(&mut list, launch)?;
    training(&mut list, launch);
    // Kernels of the tensor-parallel overlap have to start in the order in which they are issued; Megatron-FSDP refuses that.
    let connections = if sharded { None } else { Some("export CUDA_DEVICE_MAX_CONNECTIONS=1\n") };
    let script = script(launch, &list, connections.unwrap_or_default());
    Ok(Exported { files: vec![File { name: "launch.sh".into(), text: script, executable: true }], notes })
}

fn model(list: &mut List, launch: &Launch) {
    let (model, details) = (&launch.model, &launch.details);
    list.value("--num-layers", model.layers);
    list.value("--hidden-size", model.hidden);
    list.value("--ffn-hidden-size", model.ffn);
    list.value("--num-attention-heads", model.attention.heads());
    match model.attention {
        Attention::Grouped { heads, kv_heads, head_dim } => {
            if kv_heads < heads {
                list.flag("--group-query-attention");
                list.value("--num-query-groups", kv_heads);
            }
            list.value("--kv-channels", head_dim);
        }
        Attention::Latent { query_rank, kv_rank, nope_dim, rope_dim, value_dim, .. } => {
            list.flag("--multi-latent-attention");
            if query_rank > 0 {
                list.value("--q-lora-rank", query_rank);
            }
            list.value("--kv-lora-rank", kv_rank);
            list.value("--qk-head-dim", nope_dim);
            list.value("--qk-pos-emb-head-dim", rope_dim);
            list.value("--v-head-dim", value_dim);
        }
    }
    list.value("--seq-length", launch.seq);
    list.value("--max-position-embeddings", details.max_positions.max(launch.seq));
    match details.positions {
        Positions::Rotary { theta } => {
            list.value("--position-embedding-type", "rope");
            list.value("--rotary-base", theta.round() as u64);
        }
        Positions::Learned => list.value("--position-embedding-type", "learned_absolute"),
    }
    list.value("--normalization", if details.norm == Norm::RmsNorm { "RMSNorm" } else { "LayerNorm" });
    list.value("--norm-epsilon", details.norm_epsilon);
    list.flag_if(details.qk_norm, "--qk-layernorm");
    list.flag_if(model.gated, "--swiglu");
    list.flag_if(!model.biases, "--disable-bias-linear");
    list.flag_if(details.qkv_bias, "--add-qkv-bias");
    list.flag_if(!model.tied, "--untie-embeddings-and-output-weights");
    list.value("--make-vocab-size-divisible-by", 1);
    let dropout = if model.dropout { 0.1 } else { 0.0 };
    list.value("--attention-dropout", dropout);
    list.value("--hidden-dropout", dropout);
    if let Some(experts) = model.experts {
        list.value("--num-experts", experts.count);
        list.value("--moe-router-topk", experts.top_k);
        list.value("--moe-ffn-hidden-size", experts.ffn);
        if experts.shared_ffn > 0 {
            list.value("--moe-shared-expert-intermediate-size", experts.shared_ffn);
        }
        if experts.dense_layers > 0 {
            let (dense, rest) = (experts.dense_layers, model.layers - experts.dense_layers);
            list.value("--moe-layer-freq", format!("([0]*{dense}+[1]*{rest})"));
        }
        list.value("--moe-token-dispatcher-type", "alltoall");
        list.flag("--moe-grouped-gemm");
        if let Some(capacity) = launch.routing.capacity {
            list.value("--moe-expert-capacity-factor", capacity);
        }
    }
}

fn parallel(list: &mut List, launch: &Launch) -> Result<(), ExportError> {
    list.value("--tensor-model-parallel-size", launch.tp);
    list.flag_if(launch.sp, "--sequence-parallel");
    list.value("--pipeline-model-parallel-size", launch.pp);
    list.above_one("--context-parallel-size", launch.cp);
    if launch.cp > 1 {
        let kind = match launch.context {
            ContextExchange::ZigZag => "p2p",
            ContextExchange::AllGather => "allgather",
            ContextExchange::AllToAll => "a2a",
            ContextExchange::Ring => {
                let allowed = "its ring balances the causal mask: take zig-zag, all-gather or all-to-all";
                return Launch::lacks(TARGET, "cp_exchange", "ring", allowed);
            }
        };
        list.value("--cp-comm-type", kind);
    }
    list.above_one("--expert-model-parallel-size", launch.ep);
    if launch.pp > 1 {
        match (launch.schedule.as_str(), launch.chunks) {
            ("1f1b", 1) | ("interleaved", 2..) => {}
            (other, _) => {
                let allowed =
                    "it has 1f1b and interleaved; plan with one of these, or export to torchtitan or pytorch-schedule";
                return Launch::lacks(TARGET, "schedule", other, allowed);
            }
        }
        let even = launch.blocks.iter().all(|blocks| *blocks == launch.blocks[0]);
        if !even {
            list.value("--pipeline-model-parallel-layout", layout(&launch.blocks));
        } else if launch.chunks > 1 {
            list.value("--num-virtual-stages-per-pipeline-rank", launch.chunks);
        }
    }
    list.value("--micro-batch-size", launch.micro_batch);
    list.value("--global-batch-size", launch.global_batch);
    Ok(())
}

/// Stages from the first to the last: `E` the embedding, `t` a block, `L` the loss.
fn layout(blocks: &[u64]) -> String {
    let stage = |(place, blocks): (usize, &u64)| {
        let first = if place == 0 { "E" } else { "" };
        match blocks {
            0 => first.to_owned(),
            1 => format!("{first}t"),
            many => format!("{first}t*{many}"),
        }
    };
    let mut text: Vec<String> = blocks.iter().enumerate().map(stage).collect();
    if let Some(end) = text.last_mut() {
        end.push('L');
    }
    text.join("|")
}

/// The data-parallel strategy. Whether it is Megatron-FSDP's.
fn states(list: &mut List, launch: &Launch, notes: &mut Vec<String>) -> Result<bool, ExportError> {
    let (reduced, gathered) = launch.overlap;
    let instances = launch.dp / launch.group.max(1);
    let name = launch.states.letters();
    let (strategy, outer) = match name.as_str() {
        "NNN" => {
            list.flag_if(reduced && launch.dp > 1, "--overlap-grad-reduce");
            return Ok(false);
        }
        "NNG" | "NNI" => {
            list.flag("--use-distributed-optimizer");
            list.flag_if(reduced, "--overlap-grad-reduce");
            list.flag_if(reduced && gathered, "--overlap-param-gather");
            if name == "NNI" {
                list.above_one("--num-distributed-optimizer-instances", instances);
            }
            return Ok(false);
        }
        "NGG" => ("optim_grads", None),
        "GGG" => ("optim_grads_params", None),
        "III" => ("optim_grads_params", Some("no_shard")),
        "IIG" => ("optim_grads_params", Some("optim")),
        _ => {
            let allowed = "it has NNN, NNI, NNG, NGG, GGG, III and IIG; plan with one of these";
            return Launch::lacks(TARGET, "states", name, allowed);
        }
    };
    list.flag("--use-megatron-fsdp");
    list.flag("--use-distributed-optimizer");
    list.value("--data-parallel-sharding-strategy", strategy);
    if let Some(outer) = outer {
        list.above_one("--num-distributed-optimizer-instances", instances);
        list.value("--outer-dp-sharding-strategy", outer);
    }
    list.flag("--overlap-grad-reduce");
    list.flag("--overlap-param-gather");
    list.value("--ckpt-format", "fsdp_dtensor");
    list.flag("--no-gradient-accumulation-fusion");
    notes.push("Megatron-FSDP always reduces and gathers beside computation".into());
    Ok(true)
}

fn precision(list: &mut List, launch: &Launch) -> Result<(), ExportError> {
    match launch.precision.as_str() {
        "fp32" => return Ok(()),
        "bf16-fp32-gradients" => {
            list.flag("--bf16");
            list.flag("--accumulate-allreduce-grads-in-fp32");
            return Ok(());
        }
        "bf16" => {}
        "fp8" => {
            list.value("--fp8-format", "hybrid");
            list.value("--fp8-recipe", "tensorwise");
        }
        "mxfp8" => {
            list.value("--fp8-format", "e4m3");
            list.value("--fp8-recipe", "mxfp8");
        }
        "nvfp4" => {
            list.value("--fp4-format", "e2m1");
            list.value("--fp4-recipe", "nvfp4");
        }
        other => {
            let allowed = "it has fp32, bf16, bf16-fp32-gradients, fp8, mxfp8 and nvfp4";
            return Launch::lacks(TARGET, "precision", other, allowed);
        }
    }
    list.flag("--bf16");
    list.flag("--grad-reduce-in-bf16");
    Ok(())
}

fn kernels(list: &mut List, launch: &Launch) -> Result<(), ExportError> {
    match launch.recompute {
        Recompute::None => {}
        Recompute::Selective => list.value("--recompute-granularity", "selective"),
        Recompute::Full => {
            list.value("--recompute-granularity", "full");
            list.value("--recompute-method", if launch.recomputed_blocks.is_some() { "block" } else { "uniform" });
            list.value("--recompute-num-layers", launch.recomputed_blocks.unwrap_or(1));
        }
        Recompute::Operators => {
            let allowed = "it has none, selective and full; torchtitan has operators";
            return Launch::lacks(TARGET, "recompute", "operators", allowed);
        }
    }
    match launch.attention {
        AttentionKernel::Naive => {
            list.value("--attention-backend", "unfused");
            list.flag("--no-masked-softmax-fusion");
        }
        AttentionKernel::FusedSoftmax => list.value("--attention-backend", "unfused"),
        AttentionKernel::Flash1 | AttentionKernel::Flash2 => list.value("--attention-backend", "flash"),
        AttentionKernel::Flash3 => list.value("--attention-backend", "fused"),
    }
    list.value("--transformer-impl", "transformer_engine");
    Ok(())
}

fn training(list: &mut List, launch: &Launch) {
    let train = &launch.train;
    list.value("--train-iters", train.steps);
    list.value("--lr", train.lr);
    list.value("--min-lr", train.min_lr);
    list.value("--lr-decay-style", "cosine");
    list.value("--lr-warmup-iters", train.warmup);
    list.value("--weight-decay", train.weight_decay);
    list.value("--clip-grad", train.clip.unwrap_or(0.0));
    list.value("--adam-beta1", 0.9);
    list.value("--adam-beta2", 0.95);
    list.value("--eval-iters", 0);
    list.value("--log-interval", 1);
    list.flag("--log-throughput");
}

fn script(launch: &Launch, list: &List, environment: &str) -> String {
    let mut text = String::from("#!/usr/bin/env bash\n");
    for line in launch.header() {
        text += &format!("# {line}\n");
    }
    text += "#\n# Start it on every node from a checkout of Megatron-LM, with NODE_RANK from 0 and MASTER_ADDR the first node.\n";
    text += "set -euo pipefail\n";
    text += environment;
    let vocab = launch.model.vocab;
    text += &format!("DATA=${{DATA:---mock-data --tokenizer-type NullTokenizer --vocab-size {vocab}}}\n");
    text += &format!(
        "# $DATA is several words.\ntorchrun --nnodes {} --nproc-per-node {} --node-rank \"${{NODE_RANK:-0}}\" \\\n  \
         --master-addr \"${{MASTER_ADDR:-localhost}}\" --master-port \"${{MASTER_PORT:-29500}}\" \\\n  pretrain_gpt.py \\\n",
        launch.nodes, launch.gpus_per_node
    );
    for (name, value) in &list.0 {
        match value {
            None => text += &format!("  {name} \\\n"),
            Some(value) if value.contains(['*', '|', '(']) => text += &format!("  {name} '{value}' \\\n"),
            Some(value) => text += &format!("  {name} {value} \\\n"),
        }
    }
    text + "  $DATA \"$@\"\n"
}
