//! DeepSpeed's JSON (keys as in its documentation of August 2026). The model and the loop are the user's script.

use super::{ExportError, Exported, File, Launch, Target};
use paceline_sim::cluster::{ContextExchange, Recompute};
use serde_json::{Value, json};

const TARGET: Target = Target::Deepspeed;

pub(super) fn files(launch: &Launch) -> Result<Exported, ExportError> {
    launch.refuse_rare(TARGET)?;
    let mut notes = vec![
        "the script that builds the model and calls deepspeed.initialize is yours; SCRIPT names it".to_owned(),
        "learning rate and warm-up are examples; set yours".to_owned(),
    ];
    let name = launch.states.letters();
    let stage = match name.as_str() {
        "NNN" => 0,
        "NNG" => 1,
        "NGG" => 2,
        "GGG" => 3,
        _ => {
            let allowed = "it has NNN, NNG, NGG and GGG (stages 0 to 3), and no longer MiCS; export groups to megatron or torchtitan";
            return Launch::lacks(TARGET, "states", name, allowed);
        }
    };
    pipeline(launch, stage, &mut notes)?;
    let (reduced, gathered) = launch.overlap;
    let mut zero =
        json!({ "stage": stage, "overlap_comm": reduced, "contiguous_gradients": true, "reduce_scatter": true });
    if stage == 3 && !gathered {
        zero["stage3_prefetch_bucket_size"] = 0.into();
    }
    let mut document = json!({
        "train_batch_size": launch.global_batch,
        "train_micro_batch_size_per_gpu": launch.micro_batch,
        "gradient_accumulation_steps": launch.microbatches(),
        "zero_optimization": zero,
        "optimizer": { "type": "AdamW", "params": { "lr": launch.train.lr, "betas": [0.9, 0.95], "eps": 1e-8,
            "weight_decay": launch.train.weight_decay } },
        "scheduler": { "type": "WarmupCosineLR", "params": { "warmup_num_steps": launch.train.warmup,
            "total_num_steps": launch.train.steps, "cos_min_ratio": launch.train.min_lr / launch.train.lr } },
        "steps_per_print": 10,
        "wall_clock_breakdown": false,
    });
    if let Some(norm) = launch.train.clip {
        document["gradient_clipping"] = norm.into();
    }
    precision(launch, &mut document)?;
    if launch.tp > 1 {
        document["tensor_parallel"] = json!({ "autotp_size": launch.tp });
        notes.push("tensor parallelism is DeepSpeed's AutoTP, which knows Hugging Face models".into());
        if launch.sp {
            let allowed = "AutoTP has none; plan with sp = false";
            return Launch::lacks(TARGET, "sp", true, allowed);
        }
    }
    if launch.cp > 1 {
        if launch.context != ContextExchange::AllToAll {
            let allowed = "its sequence parallelism is Ulysses; take cp_exchange = \"all-to-all\"";
            return Launch::lacks(TARGET, "cp_exchange", format!("{:?}", launch.context).to_lowercase(), allowed);
        }
        document["sequence_parallel_size"] = launch.cp.into();
        notes.push("Ulysses needs the script to register its attention (deepspeed.sequence)".into());
    }
    if launch.ep > 1 {
        notes.push(format!("expert parallelism is set in the model: deepspeed.moe.layer.MoE(ep_size={})", launch.ep));
    }
    match launch.recompute {
        Recompute::None => {}
        Recompute::Full => {
            document["activation_checkpointing"] =
                json!({ "partition_activations": false, "cpu_checkpointing": false });
            notes.push(
                "the script has to checkpoint every block (gradient_checkpointing_enable() of Hugging Face models)"
                    .into(),
            );
        }
        Recompute::Selective | Recompute::Operators => {
            return Launch::lacks(TARGET, "recompute", "selective", "it has none and full");
        }
    }
    let text = serde_json::to_string_pretty(&document).map_err(|error| ExportError::Text(error.to_string()))? + "\n";
    let mut script = String::from("#!/usr/bin/env bash\n");
    for line in launch.header() {
        script += &format!("# {line}\n");
    }
    script += &format!(
        "#\n# Start it on the first node; a hostfile names the others.\nset -euo pipefail\ncd \"$(dirname \"$0\")\"\n\
         deepspeed --num_nodes {} --num_gpus {} \"${{SCRIPT:?the training script, for example SCRIPT=train.py}}\" \\\n  \
         --deepspeed --deepspeed_config ds_config.json \"$@\"\n",
        launch.nodes, launch.gpus_per_node
    );
    Ok(Exported {
        files: vec![
            File { name: "ds_config.json".into(), text, executable: false },
            File { name: "launch.sh".into(), text: script, executable: true },
        ],
        notes,
    })
}

fn pipeline(launch: &Launch, stage: u32, notes: &mut Vec<String>) -> Result<(), ExportError> {
    if launch.pp == 1 {
        return Ok(());
    }
    if launch.schedule != "1f1b" || launch.chunks > 1 {
        return Launch::lacks(
            TARGET,
            "schedule",
            &launch.schedule,
            "its pipeline engine runs 1f1b with one stage per rank",
        );
    }
    if stage > 1 {
        return Launch::lacks(TARGET, "states", launch.states, "beside a pipeline it has NNN and NNG (stages 0 and 1)");
    }
    notes.push(format!(
        "the script has to build a PipelineModule with num_stages={} and the blocks cut {:?}",
        launch.pp, launch.blocks
    ));
    Ok(())
}

fn precision(launch: &Launch, document: &mut Value) -> Result<(), ExportError> {
    let accumulated = match launch.precision.as_str() {
        "fp32" => return Ok(()),
        "bf16" => "bf16",
        "bf16-fp32-gradients" | "bf16-fp32-accumulation" => "fp32",
        other => {
            let allowed = "it has fp32, bf16, bf16-fp32-gradients and bf16-fp32-accumulation";
            return Launch::lacks(TARGET, "precision", other, allowed);
        }
    };
    document["bf16"] = json!({ "enabled": true });
    document["data_types"] = json!({ "grad_accum_dtype": accumulated });
    Ok(())
}
