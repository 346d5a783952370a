//! A Python module with a configuration function for torchtitan (fields as in its `torchtitan/config/configs.py` of August 2026).
//!
//! Schedules that PyTorch does not name travel as a CSV, which its pipeline runtime executes as it stands.

use super::{ExportError, Exported, File, Launch, Target};
use crate::interchange::pytorch;
use paceline_sim::cluster::{Architecture, ContextExchange, Recompute};

const TARGET: Target = Target::Torchtitan;

/// A model that torchtitan ships: our preset, its package, the function to start from, the flavour.
const MODELS: [(&str, &str, &str, &str); 6] = [
    ("llama-3-8b", "llama3", "llama3_8b", "8B"),
    ("llama-3-70b", "llama3", "llama3_70b", "70B"),
    ("llama-3.1-405b", "llama3", "llama3_70b", "405B"),
    ("qwen3-30b-a3b", "qwen3", "qwen3_30b_a3b", "30B-A3B"),
    ("qwen3-235b-a22b", "qwen3", "qwen3_30b_a3b", "235B-A22B"),
    ("deepseek-v3", "deepseek_v3", "deepseek_v3_671b", "671B"),
];

pub(super) fn files(launch: &Launch) -> Result<Exported, ExportError> {
    launch.refuse_rare(TARGET)?;
    let same = |name: &str| {
        Architecture::load(name)
            .is_ok_and(|known| Architecture { name: launch.model.name.clone(), ..known } == launch.model)
    };
    let Some(&(_, package, base, flavour)) = MODELS.iter().find(|row| same(row.0)) else {
        let known: Vec<&str> = MODELS.iter().map(|row| row.0).collect();
        let allowed = format!("a model is code there; it ships {}; or export to megatron", known.join(", "));
        return Launch::lacks(TARGET, "model", &launch.model.name, &allowed);
    };
    let mut notes = vec![
        format!(
            "data, optimizer, checkpoints and validation are those of torchtitan's {base}; the number of steps is an example"
        ),
        "parameters are kept in 32 bits and cast when they are used, 16 bytes each as planned".to_owned(),
    ];
    let mut files = Vec::new();
    let mut body = vec![format!("config = {base}()")];
    body.extend(model(launch, flavour)?);
    body.extend(batch(launch));
    body.extend(states(launch, &mut notes)?);
    body.extend(ranks(launch)?);
    if launch.pp > 1 {
        let (lines, csv) = pipeline(launch)?;
        body.extend(lines);
        files.extend(csv.map(|text| File { name: "schedule.csv".into(), text, executable: false }));
    }
    body.push(format!("config.training.steps = {}", launch.train.steps));
    body.push("return config".into());
    let mut text = String::from("\"\"\"A torchtitan run.\n\n");
    for line in launch.header() {
        text += &format!("{line}\n");
    }
    text += "\"\"\"\n\n";
    let uses = |name: &str| body.iter().any(|line| line.contains(name));
    if uses("Path(") {
        text += "from pathlib import Path\n\n";
    }
    for (module, name) in [
        ("torchtitan.components.quantization", "Float8LinearConverter"),
        ("torchtitan.components.quantization", "MXFP8LinearConverter"),
        ("torchtitan.config", "CompileConfig"),
        ("torchtitan.distributed.activation_checkpoint", "FullAC"),
        ("torchtitan.distributed.activation_checkpoint", "SelectiveAC"),
    ] {
        if uses(name) {
            text += &format!("from {module} import {name}\n");
        }
    }
    text += &format!("from torchtitan.models.{package} import model_registry\n");
    text += &format!("from torchtitan.models.{package}.config_registry import {base}\n");
    text += "from torchtitan.trainer import Trainer\n\n\ndef paceline() -> Trainer.Config:\n";
    for line in body {
        text += &format!("    {line}\n");
    }
    files.insert(0, File { name: "paceline_run.py".into(), text, executable: false });
    let mut script = String::from("#!/usr/bin/env bash\n");
    for line in launch.header() {
        script += &format!("# {line}\n");
    }
    script += &format!(
        "#\n# Start it on every node where torchtitan is installed, with NODE_RANK from 0 and MASTER_ADDR the first node.\nset -euo pipefail\n\
         PYTHONPATH=\"$(cd \"$(dirname \"$0\")\" && pwd)${{PYTHONPATH:+:$PYTHONPATH}}\" PYTORCH_ALLOC_CONF=expandable_segments:True \\\n\
         torchrun --nnodes {} --nproc-per-node {} --node-rank \"${{NODE_RANK:-0}}\" \\\n  \
         --master-addr \"${{MASTER_ADDR:-localhost}}\" --master-port \"${{MASTER_PORT:-29500}}\" \\\n  \
         -m torchtitan.train --module paceline_run --config paceline \"$@\"\n",
        launch.nodes, launch.gpus_per_node
    );
    files.push(File { name: "launch.sh".into(), text: script, executable: true });
    Ok(Exported { files, notes })
}

fn model(launch: &Launch, flavour: &str) -> Result<Vec<String>, ExportError> {
    let mut lines = Vec::new();
    let converter = match launch.precision.as_str() {
        "bf16" | "fp32" => None,
        "fp8" => Some("Float8LinearConverter.Config(filter_fqns=[\"lm_head\"], model_compile_enabled=True)"),
        "mxfp8" => Some("MXFP8LinearConverter.Config(model_compile_enabled=True)"),
        other => return Launch::lacks(TARGET, "precision", other, "it has fp32, bf16, fp8 and mxfp8"),
    };
    lines.push(match converter {
        None => format!("config.model_spec = model_registry(\"{flavour}\")"),
        Some(converter) => format!("config.model_spec = model_registry(\"{flavour}\", converters=[{converter}])"),
    });
    lines.push("config.compile = CompileConfig(enable=True, components=[\"model\", \"loss\"])".into());
    // Graphs know no pipelines and no expert exchange yet, and the prediction has none.
    lines.push("config.training.disable_cuda_graphs = True".into());
    let dtype = if launch.precision == "fp32" { "float32" } else { "bfloat16" };
    lines.push(format!("config.training.mixed_precision_param = \"{dtype}\""));
    lines.push(match launch.recompute {
        Recompute::None => "config.activation_checkpoint = None".into(),
        Recompute::Operators => "config.activation_checkpoint = SelectiveAC.Config()".into(),
        Recompute::Full => "config.activation_checkpoint = FullAC.Config()".into(),
        Recompute::Selective => {
            let allowed = "it has none, operators (its selective checkpointing) and full";
            return Launch::lacks(TARGET, "recompute", "selective", allowed);
        }
    });
    Ok(lines)
}

fn batch(launch: &Launch) -> Vec<String> {
    // Without a pipeline a microbatch is a step of gradient accumulation.
    let pipelined = if launch.pp > 1 { launch.microbatches() } else { 1 };
    vec![
        format!("config.training.max_context_length = {}", launch.seq),
        format!("config.training.num_tokens_per_microbatch_per_dp_rank = {}", launch.micro_batch * launch.seq),
        format!("config.training.num_tokens_per_train_step = {}", launch.global_batch * launch.seq),
        format!("config.parallelism.num_pp_microbatches = {pipelined}"),
    ]
}

fn states(launch: &Launch, notes: &mut Vec<String>) -> Result<Vec<String>, ExportError> {
    let name = launch.states.letters();
    let gathered = match (launch.keep_gathered, launch.pp) {
        (false, _) => "always",
        (true, 1) => {
            let allowed = "without a pipeline it gathers for every microbatch; take false, or states = NGG";
            return Launch::lacks(TARGET, "keep_gathered", true, allowed);
        }
        (true, _) => "never",
    };
    let (replicate, shard, reshard) = match name.as_str() {
        "NNN" => (launch.dp, 1, "default"),
        "NGG" => {
            notes.push("states NGG become FSDP that keeps parameters from the forward to the backward pass".into());
            (1, launch.dp, "never")
        }
        "GGG" => (1, launch.dp, gathered),
        "III" => (launch.dp / launch.group.max(1), launch.group, gathered),
        _ => return Launch::lacks(TARGET, "states", name, "it has NNN (DDP), NGG, GGG (FSDP) and III (hybrid FSDP)"),
    };
    Ok(vec![
        format!("config.parallelism.data_parallel_replicate_degree = {replicate}"),
        format!("config.parallelism.data_parallel_shard_degree = {shard}"),
        format!("config.parallelism.fsdp_reshard_after_forward = \"{reshard}\""),
    ])
}

fn ranks(launch: &Launch) -> Result<Vec<String>, ExportError> {
    let balancer = match launch.context {
        _ if launch.cp == 1 => "\"headtail\"",
        ContextExchange::ZigZag => "\"headtail\"",
        ContextExchange::Ring => "None",
        ContextExchange::AllGather | ContextExchange::AllToAll => {
            let allowed = "its context ranks pass keys and values on: take zig-zag or ring";
            return Launch::lacks(TARGET, "cp_exchange", format!("{:?}", launch.context).to_lowercase(), allowed);
        }
    };
    let truth = |yes: bool| if yes { "True" } else { "False" };
    Ok(vec![
        format!("config.parallelism.tensor_parallel_degree = {}", launch.tp),
        format!("config.parallelism.enable_sequence_parallel = {}", truth(launch.sp || launch.tp == 1)),
        format!("config.parallelism.context_parallel_degree = {}", launch.cp),
        format!("config.parallelism.context_parallel_load_balancer = {balancer}"),
        format!("config.parallelism.expert_parallel_degree = {}", launch.ep),
        format!("config.parallelism.pipeline_parallel_degree = {}", launch.pp),
    ])
}

/// Lines, and the CSV where PyTorch has no such schedule.
fn pipeline(launch: &Launch) -> Result<(Vec<String>, Option<String>), ExportError> {
    let order = launch.order()?;
    let named = match launch.schedule.as_str() {
        "gpipe" => Some("GPipe"),
        "1f1b" => Some("1F1B"),
        "interleaved" => Some("Interleaved1F1B"),
        "interleaved-bf" => Some("LoopedBFS"),
        _ => None,
    };
    // The name decides the placement also where a CSV decides the order.
    let style = named.unwrap_or(if order.placement.name == "v" { "ZBVZeroBubble" } else { "Interleaved1F1B" });
    let csv = match named {
        Some(_) => None,
        None if order.placement.name == "loop" || order.placement.name == "v" && launch.chunks == 2 => {
            Some(pytorch::write(&order, pytorch::Layout::Dense)?)
        }
        None => {
            let value =
                format!("{} ({} placement, {} stages per rank)", launch.schedule, order.placement.name, launch.chunks);
            return Launch::lacks(TARGET, "schedule", value, "its stages lie in a loop, or in a V of two per rank");
        }
    };
    let mut lines = vec![format!("config.parallelism.pipeline_parallel_schedule = \"{style}\"")];
    if csv.is_some() {
        lines.push(
            "config.parallelism.pipeline_parallel_schedule_csv = str(Path(__file__).with_name(\"schedule.csv\"))"
                .into(),
        );
    }
    lines.push("config.parallelism.module_fqns_per_model_part = [".into());
    let mut first = 0;
    for (place, blocks) in launch.blocks.iter().enumerate() {
        let mut names = Vec::new();
        if place == 0 {
            names.push("\"tok_embeddings\"".to_owned());
        }
        names.extend((first..first + blocks).map(|block| format!("\"layers.{block}\"")));
        if place + 1 == launch.blocks.len() {
            names.extend(["\"norm\"".to_owned(), "\"lm_head\"".to_owned()]);
        }
        lines.push(format!("    [{}],", names.join(", ")));
        first += blocks;
    }
    lines.push("]".into());
    Ok((lines, csv))
}
